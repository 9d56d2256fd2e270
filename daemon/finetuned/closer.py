"""How jobs end: published and archived, or put away with the reason. What a full disk stops is left to a later try."""

from __future__ import annotations

from contextlib import suppress

import structlog

from finetuned.errors import FinetunedError
from finetuned.hold import Hold
from finetuned.home import Home, printable
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.pulse import no_room
from finetuned.spool.publish import archive, fail, publish, published

_log = structlog.get_logger()


class Closer:
    """Ends the jobs of one base directory, and says in the daemon's log how."""

    def __init__(self, ledger: Ledger, home: Home, hold: Hold) -> None:
        self._ledger, self._home, self._hold = ledger, home, hold
        self.failures = 0

    def publish(self, job: Job) -> None:
        """Publish a trained job's adapter, and archive its input."""
        try:
            job = publish(self._ledger, self._home, job)
            self._archive(job)
        except FinetunedError as error:
            self.fail(job, error.as_dict())
        except OSError as error:
            if no_room(error) or published(self._home, self._ledger.job(job.id)):
                self._hold.begin(error, doing=f"publishing {job.id}")
            else:
                self.fail(job, _unwritable(error))

    def finish_untrained(self, job: Job) -> None:
        """Do what is left for a job that was settled without a training."""
        if job.state is State.TRAINED:
            _log.info("trained before", job=job.id, duplicate_of=job.duplicate_of, adapter=job.adapter)
            self._archive(job)
        else:
            self.fail(job)

    def fail(self, job: Job, reason: dict[str, str] | None = None) -> None:
        """Say why a job failed, by the reason or by its own, and put its input away."""
        self.failures += 1
        told = reason or job.reason or {}
        _log.error(
            "job failed",
            job=job.id,
            file=printable(job.name),
            **{key: told[key] for key in ("code", "what", "where", "remedy") if told.get(key)},
            reason_in=f"archive/failed/{job.id}/reason.json",
        )
        with (
            suppress(OSError),
            self._home.job_log(job.id).open("a", encoding="utf-8", errors="backslashreplace") as log,
        ):
            log.write(f"failed: {told.get('where', '')}: {told.get('what', '')}. {told.get('remedy', '')}\n")
        self.put_aside(job, reason)

    def put_aside(self, job: Job, reason: dict[str, str] | None) -> None:
        """Put a job away that will not be trained."""
        try:
            fail(self._ledger, self._home, job, reason)
        except OSError as error:
            self._hold.begin(error, doing=f"putting {printable(job.name)} away")

    def _archive(self, job: Job) -> None:
        try:
            job = archive(self._ledger, self._home, job)
        except OSError as error:
            self._hold.begin(error, doing=f"archiving {job.id}")
            return
        if job.duplicate_of is None:
            figures = {key: job.progress[key] for key in ("train_loss", "valid_loss") if key in job.progress}
            _log.info("finished", job=job.id, adapter=f"adapters/{job.adapter}", **figures)


def _unwritable(error: OSError) -> dict[str, str]:
    return {
        "code": "cannot_publish",
        "what": f"the adapter is trained but cannot be put into adapters/: {error.strerror}",
        "where": str(error.filename2 or error.filename or ""),
        "remedy": "The adapter is kept in adapter/ beside this file; move it where you want it, and mend the folder.",
    }
