"""`python -m finetuned.trainer.check`: an order as JSON in, lines of JSON out: how far it is, and at last the answer or
the error. `finetuned.check` asks and prints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from finetuned.errors import DataError, FinetunedError
from finetuned.trainer import embedded
from finetuned.trainer.saying import say


def main() -> None:
    """Answer one order."""
    order = json.load(sys.stdin)
    if not _needs_torch(order):
        # transformers then does without: 2 seconds, and 260 MB.
        sys.modules["torch"] = None  # type: ignore[assignment]
    from finetuned.trainer.base import quiet_libraries
    from finetuned.trainer.judgement import examine

    quiet_libraries()
    try:
        try:
            answer: dict[str, Any] = {"answer": examine(order, say)}
        except OSError as error:
            raise DataError(
                f"cannot be read, or its tokens cannot be kept: {error.strerror or error}",
                where=str(error.filename or order["file"]),
                remedy="Mend its permissions, or make room.",
                code="unreadable",
            ) from error
    except FinetunedError as error:
        answer = {"error": error.as_dict()}
    say(answer)


def _needs_torch(order: dict[str, Any]) -> bool:
    """Whether the embedded model is still packed, or a model's own code may ask for it."""
    settings = order["settings"]
    named = {settings["model"], settings["teacher"] if settings["recipe"] == "distill" else None}
    packed = embedded.NAME in named and not embedded.is_unpacked(Path(order["models"]))
    return packed or bool(settings["trust_remote_code"])


if __name__ == "__main__":
    main()
