"""How an attempt ends other than by success or by a user's mistake. No torch, so that the exit code can be told
without it.
"""

from __future__ import annotations

from finetuned.errors import OutOfMemoryError
from finetuned.fallback import Rung


class StopAskedError(Exception):
    """The trainer was asked to stop; a checkpoint is written."""


class OutOfMeansError(Exception):
    """Memory ran out and this process cannot help itself. `rung` is the one to climb down from."""

    def __init__(self, rung: Rung, detail: str) -> None:
        super().__init__(detail)
        self.rung = rung
        self.detail = detail

    def for_user(self) -> OutOfMemoryError:
        """Give what the user reads if the ladder has no rung left."""
        return OutOfMemoryError(
            f"memory ran out at {self.rung} ({self.detail})",
            remedy="Lower max_length, take a smaller model, or allow fallback_4bit or fallback_max_length.",
        )
