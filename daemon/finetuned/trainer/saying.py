"""What a process that was asked says: a JSON object a line on standard output. `finetuned.asking` listens."""

from __future__ import annotations

import json
from typing import Any


def say(said: dict[str, Any]) -> None:
    """Say it, on a line of its own whatever libraries have left unfinished."""
    print("\n" + json.dumps(said), flush=True)  # noqa: T201, standard output is the answer
