"""`python -m finetuned.trainer.check`: what a file would be as a job. `finetuned.check` asks and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from finetuned.trainer import embedded
from finetuned.trainer.saying import answer, say


def check(order: dict[str, Any]) -> dict[str, Any]:
    """Examine what is ordered. Raises FinetunedError or OSError."""
    if not _needs_torch(order):
        # transformers then does without: 2 seconds, and 260 MB.
        sys.modules["torch"] = None  # type: ignore[assignment]
    from finetuned.trainer.base import quiet_libraries
    from finetuned.trainer.judgement import examine

    quiet_libraries()
    return examine(order, say)


def _needs_torch(order: dict[str, Any]) -> bool:
    """Whether the embedded model is still packed, or a model's own code may ask for it."""
    settings = order["settings"]
    named = {settings["model"], settings["teacher"] if settings["recipe"] == "distill" else None}
    packed = embedded.NAME in named and not embedded.is_unpacked(Path(order["models"]))
    return packed or bool(settings["trust_remote_code"])


if __name__ == "__main__":
    answer(check, if_memory="Take a smaller file, or add memory.")
