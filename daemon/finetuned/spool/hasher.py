"""Hashing claimed files in a thread beside the loop (D4): a large file takes as long as reading it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from finetuned.jobs import Job
from finetuned.spool.claim import fingerprint

_Hashes = list[str]  # of a job's input, and of its held-out file where it has one


class Hasher:
    """Hashes the files of one job after the other."""

    def __init__(self, done: Callable[[], None]) -> None:
        """Start with nothing to do; `done` is called, from the thread, when a file is hashed."""
        self._done = done
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._futures: dict[str, Future[_Hashes | None]] = {}
        self._not_before: dict[str, float] = {}

    def busy(self, job_id: str) -> bool:
        """Whether this job's file is being hashed."""
        return job_id in self._futures

    def again_at(self) -> float | None:
        """Give the time of the next look at a file that was still changing."""
        return min(self._not_before.values(), default=None)

    def ask(self, job: Job, files: Iterable[Path], now: float) -> None:
        """Put a job's files in the queue, if they are not there and their time has come."""
        if not self.busy(job.id) and now >= self._not_before.get(job.id, now):
            self._not_before.pop(job.id, None)
            future = self._futures[job.id] = self._pool.submit(_hash, list(files))
            future.add_done_callback(lambda _: self._done())

    def results(self, *, now: float, pause: float) -> Iterator[tuple[str, _Hashes | OSError | None]]:
        """Yield what is done: a job's id and the hashes of its files, an error, or None.

        None: somebody still writes to one of them; they are looked at again after `pause` seconds.
        """
        for job_id in [job_id for job_id, future in self._futures.items() if future.done()]:
            future = self._futures.pop(job_id)
            try:
                result = future.result()
            except OSError as error:
                yield job_id, error
                continue
            if result is None:
                self._not_before[job_id] = now + pause
            yield job_id, result

    def close(self) -> None:
        """Forget what waits, and end with the file at hand."""
        self._pool.shutdown(cancel_futures=True)


def _hash(files: list[Path]) -> _Hashes | None:
    hashes = []
    for file in files:
        if (result := fingerprint(file)) is None:
            return None
        hashes.append(result[1])
    return hashes
