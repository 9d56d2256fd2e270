"""What comes with the package besides code: the units, the pinned versions."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path | None:
    """Find a file or folder: inside the package where a wheel brought it, at the checkout's root otherwise."""
    return next((place / name for place in (_PACKAGE, _PACKAGE.parents[1]) if (place / name).exists()), None)
