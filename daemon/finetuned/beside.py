"""Questions about jobs that take too long for the daemon's loop: asked in a thread, one at a time, and remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

_PATIENCE = 600.0  # seconds for an answer

T = TypeVar("T")


class Beside(Generic[T]):
    """The answers to one question about many jobs."""

    def __init__(self, *, wake: Callable[[], None]) -> None:
        """Begin with nothing asked; `wake` is called, from a thread, when an answer has come."""
        self._wake = wake
        self._answers: dict[str, T | None] = {}
        self._thread: threading.Thread | None = None
        self._until = 0.0

    def knows(self, job_id: str, find_out: Callable[[], T | None]) -> bool:
        """Whether the answer for a job is there. If not it is found out, after those that were asked before."""
        if job_id in self._answers:
            return True
        if self._thread is not None and self._thread.is_alive() and time.monotonic() > self._until:
            self._answers[self._thread.name] = None  # it hangs
            self._thread = None
        if self._thread is None or not self._thread.is_alive():
            self._until = time.monotonic() + _PATIENCE
            # A daemon's thread that nobody waits for: the process that it asks ends by itself.
            self._thread = threading.Thread(target=self._ask, args=(job_id, find_out), name=job_id, daemon=True)
            self._thread.start()
        return False

    def of(self, job_id: str) -> T | None:
        """Give the answer for a job; None where it is not there, or nobody can say."""
        return self._answers.get(job_id)

    def forget(self, *, but: Collection[str]) -> None:
        """Forget all jobs but these."""
        self._answers = {job_id: answer for job_id, answer in self._answers.copy().items() if job_id in but}

    def _ask(self, job_id: str, find_out: Callable[[], T | None]) -> None:
        answer = None
        try:
            answer = find_out()
        finally:
            self._answers[job_id] = answer
            self._wake()
