"""A look at the files of jobs that wait: who dropped a broken one behind a long training hears of it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from finetuned.asking import Terms, ask
from finetuned.beside import PATIENCE, Beside
from finetuned.config import settings_from
from finetuned.errors import DataError, FinetunedError, OutOfMemoryError
from finetuned.home import Home, printable
from finetuned.jobs import Job
from finetuned.spool.claim import held_out_path, input_path

Reason = dict[str, str]

_MAY_PASS = frozenset({"unreadable", OutOfMemoryError.code})


class Preview:
    """Remembers what is wrong with the files of each job as long as it waits."""

    def __init__(self, home: Home, *, wake: Callable[[], None]) -> None:
        """Begin with nothing seen; `wake` is called, from a thread, when a job's files have been looked at."""
        self._home = home
        self._found: Beside[Reason] = Beside(wake=wake)

    def look(self, jobs: Sequence[Job]) -> list[tuple[Job, Reason]]:
        """Look at the first job that was not looked at. Give those that cannot be trained, and why; forget all others.

        A trainer of the user's own may take files of another kind.
        """
        if os.environ.get("FINETUNED_TRAINER"):
            return []
        self._found.forget(but=jobs)
        for job in jobs:
            if not self._found.knows(job, partial(_fault, self._home, job)):
                break
        return [(job, why) for job in jobs if (why := self._found.of(job))]


def _fault(home: Home, job: Job) -> Reason | None:
    held_out = held_out_path(home, job)
    try:
        ask(
            "finetuned.trainer.glance",
            input_path(home, job),
            Terms(settings_from({**job.settings}, where=job.id), home.root, home.models),
            gpu=None,
            limit=PATIENCE,
            name=printable(job.name),
            beside=str(held_out) if held_out else None,
            held_out=printable(job.held_out) if job.held_out else "",
        )
    except (FinetunedError, OSError) as error:
        if isinstance(error, DataError) and error.code not in _MAY_PASS:
            return error.as_dict()
    return None  # the trainer will say what else there is, with all that belongs to it
