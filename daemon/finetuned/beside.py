"""Questions about jobs that take too long for the daemon's loop: asked in a thread, one at a time, and remembered.

What is remembered is about a job's files and settings: a job that is retried may have others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from finetuned.jobs import Job

PATIENCE = 600.0  # seconds for an answer
_LATE = 10.0  # seconds after which a process that was to be killed for taking longer is given up

T = TypeVar("T")


class Beside(Generic[T]):
    """The answers to one question about many jobs."""

    def __init__(self, *, wake: Callable[[], None]) -> None:
        """Begin with nothing asked; `wake` is called, from a thread, when an answer has come."""
        self._wake = wake
        self._answers: dict[str, T | None] = {}
        self._asked = ""
        self._thread: threading.Thread | None = None
        self._until = 0.0

    def knows(self, job: Job, find_out: Callable[[], T | None]) -> bool:
        """Whether the answer for a job is there. If not it is found out, after those that were asked before."""
        key = _key(job)
        if self._thread is not None and self._thread.is_alive() and time.monotonic() > self._until:
            self._answers[self._asked] = None  # it hangs
            self._thread = None
        if key in self._answers:
            return True
        if self._thread is None or not self._thread.is_alive():
            self._until = time.monotonic() + PATIENCE + _LATE
            # A daemon's thread that nobody waits for: the process that it asks ends by itself.
            self._thread = threading.Thread(target=self._ask, args=(key, find_out), name=job.id, daemon=True)
            self._asked = key
            self._thread.start()
        return False

    def of(self, job: Job) -> T | None:
        """Give the answer for a job; None where it is not there, or nobody can say."""
        return self._answers.get(_key(job))

    def forget(self, *, but: Collection[Job]) -> None:
        """Forget all jobs but these."""
        kept = {_key(job) for job in but}
        self._answers = {key: answer for key, answer in self._answers.copy().items() if key in kept}

    def _ask(self, key: str, find_out: Callable[[], T | None]) -> None:
        answer = None
        try:
            answer = find_out()
        finally:
            self._answers[key] = answer
            self._wake()


def _key(job: Job) -> str:
    return f"{job.id} {job.sha256} {job.held_out_sha256} {job.settings}"
