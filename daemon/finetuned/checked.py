"""Which config.json was found to be in order, so that whoever only wants to know that need not check it again.

Loading pydantic takes longer than all else that `finetuned status` does.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from finetuned import __version__
from finetuned.durable import write_file
from finetuned.home import Home


def file_state(path: Path) -> tuple[int, ...]:
    """Give what changes when a file does; nothing if there is none."""
    try:
        facts = path.stat()
    except OSError:
        return ()
    return (facts.st_ino, facts.st_size, facts.st_mtime_ns)


def remember_checked(home: Home, state: tuple[int, ...]) -> None:
    """Note that config.json was in order in this state, if there is room for a note."""
    with suppress(OSError):
        write_file(home.config_checked, _note(state))


def is_checked(home: Home) -> bool:
    """Whether config.json as it is now is known to be in order."""
    with suppress(OSError):
        return home.config_checked.read_bytes() == _note(file_state(home.config_file))
    return False


def _note(state: tuple[int, ...]) -> bytes:
    return f"{__version__} {state}\n".encode()
