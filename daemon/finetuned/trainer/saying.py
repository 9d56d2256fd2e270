"""How a process that was asked answers: an order as JSON on standard input, and on standard output an object a line:
how far it is, and at last the answer or the error. `finetuned.asking` asks. No torch here, as not all of them need it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from finetuned.errors import DataError, FinetunedError, OutOfMemoryError

Work = Callable[[dict[str, Any]], dict[str, Any]]


def say(said: dict[str, Any]) -> None:
    """Say it, on a line of its own whatever libraries have left unfinished."""
    print("\n" + json.dumps(said), flush=True)  # noqa: T201, standard output is the answer


def answer(work: Work, *, if_memory: str) -> None:
    """Answer one order with what `work` makes of it, or with what went wrong. `if_memory` is the remedy where there is
    too little of that. A bug stays an exception.
    """
    order = json.load(sys.stdin)
    try:
        said = {"answer": work_on(order, work, if_memory=if_memory)}
    except FinetunedError as error:
        said = {"error": error.as_dict()}
    say(said)


def work_on(order: dict[str, Any], work: Work, *, if_memory: str) -> dict[str, Any]:
    """Give what comes of an order. Raises FinetunedError for all that a user can mend."""
    try:
        return work(order)
    except OSError as error:
        raise DataError(
            f"cannot be read or written: {error.strerror or error}",
            where=str(error.filename or order["file"]),
            remedy="Mend its permissions, or make room.",
            code="unreadable",
        ) from error
    except (RuntimeError, MemoryError) as error:
        detail = _short_of_memory(error)
        if detail is None:
            raise
        raise OutOfMemoryError(f"memory ran out: {detail}", where=order["file"], remedy=if_memory) from error


def _short_of_memory(error: Exception) -> str | None:
    if not sys.modules.get("torch"):  # kept out, or not needed yet
        return str(error) or "MemoryError" if isinstance(error, MemoryError) else None
    from finetuned.trainer.memory import out_of_memory

    return out_of_memory(error)
