"""Slurm asked beside the daemon's loop, which does not wait for a controller that takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from finetuned.errors import FinetunedError

_FIRST_PAUSE, _LAST_PAUSE = 5.0, 600.0  # seconds until what Slurm did not take is submitted again, doubled each time

Answer = TypeVar("Answer")


class LateError(ConnectionError):
    """There is no answer yet."""


class Asking(threading.Thread, Generic[Answer]):
    """A question to Slurm."""

    def __init__(self, ask: Callable[[], Answer]) -> None:
        """Ask."""
        super().__init__(name="slurm", daemon=True)
        self._ask = ask
        self._answer: Answer
        self._error: OSError | FinetunedError | None = None
        self.start()

    def run(self) -> None:
        """Wait for the answer."""
        try:
            self._answer = self._ask()
        except (OSError, FinetunedError) as error:
            self._error = error
        except Exception as error:  # noqa: BLE001, the daemon goes on, whatever Slurm has said
            self._error = ConnectionError(f"Slurm said what cannot be read: {type(error).__name__}: {error}")

    def answer(self, *, within: float = 0.0) -> Answer:
        """Give the answer, or raise the error that it was; LateError if there is neither in so many seconds."""
        self.join(within)
        if self.is_alive():
            raise LateError("Slurm has not answered yet")
        if self._error is not None:
            raise self._error
        return self._answer


class Submit:
    """A submission, which may be tried again."""

    def __init__(self, submit: Callable[[], str]) -> None:
        """Try it."""
        self.asking = Asking(submit)
        self._submit = submit
        self._pause = _FIRST_PAUSE
        self._again_at = 0.0

    def answer(self, *, within: float = 0.0) -> str:
        """Give the job's id, or raise what came of the last try, as `Asking` does."""
        return self.asking.answer(within=within)

    def try_again(self) -> None:
        """Try once more, unless it is too early: after each try for twice as long."""
        now = time.monotonic()
        if not self._again_at:
            self._again_at = now + self._pause
            self._pause = min(2 * self._pause, _LAST_PAUSE)
        elif now >= self._again_at:
            self._again_at = 0.0
            self.asking = Asking(self._submit)
