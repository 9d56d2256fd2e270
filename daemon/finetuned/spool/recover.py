"""After a crash: where each unfinished job stands, and the step that comes next. The table of docs/protocol.md.

Runs before the watcher starts. It may itself crash at any point and run again.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from finetuned.adapters import belongs_to
from finetuned.attempts import ended
from finetuned.durable import move, same_file, sync_folder
from finetuned.errors import FinetunedError
from finetuned.events import Ending
from finetuned.home import Home, printable
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.lifesigns import locked
from finetuned.spool.claim import forget, input_path, read_beside, take_beside
from finetuned.spool.crashes import note_crash
from finetuned.spool.orders import take_back
from finetuned.spool.publish import archive, archive_folder, fail, publish, published, users_files
from finetuned.spool.rebuild import holds_input, rebuild

MOST_INTERRUPTIONS = 5  # of one job; after that it is the job that takes the machine down

_log = structlog.get_logger()


def _nobody(_: Job) -> bool:
    return False


def recover(
    ledger: Ledger, home: Home, *, stop_orphan: Callable[[Job], None], adopt: Callable[[Job], bool] = _nobody
) -> None:
    """Bring ledger and folders into agreement.

    `adopt` takes on a job whose trainer outlived its daemon, or said how it ended, and tells whether it could.
    `stop_orphan` ends a trainer that nobody adopts and returns when it is gone.
    """
    rebuild(ledger, home)
    for job in ledger.jobs(State.CLAIMING, State.QUEUED, State.RUNNING, State.TRAINED, State.FAILING):
        recover_job(ledger, home, job, stop_orphan=stop_orphan, adopt=adopt)
    known = {job.id for job in ledger.jobs(*(state for state in State if state is not State.FINISHED))}
    for folder in home.jobs.iterdir():
        if folder.is_dir() and folder.name not in known and not holds_input(folder):
            shutil.rmtree(folder, ignore_errors=True)


def recover_job(
    ledger: Ledger, home: Home, job: Job, *, stop_orphan: Callable[[Job], None], adopt: Callable[[Job], bool] = _nobody
) -> None:
    """Put one job right. A row of the table a case."""
    if job.state is not State.QUEUED:
        _make_durable(home, job)
    match job.state:
        case State.CLAIMING:
            _recover_claim(ledger, home, job)
        case State.RUNNING:
            if adopt(job):
                return
            if locked(home.job(job.id)):
                stop_orphan(job)
                if adopt(job):  # it has said how it ended
                    return
            _recover_run(ledger, home, job)
        case State.TRAINED:
            archive(ledger, home, job)
        case State.FAILING:
            fail(ledger, home, job)
        case State.QUEUED | State.FINISHED:
            pass


def _make_durable(home: Home, job: Job) -> None:
    """Finish the fsyncs that a crash cut off: what the next step builds on must not be taken back by a power loss.

    Where files arrive comes before where they leave, as in `move`.
    """
    ours = [home.jobs, home.job(job.id).path]
    put_away = archive_folder(home, job)
    kept = [home.archive, put_away.parent, put_away, home.failed, home.failed / job.id]
    claiming = [*ours, *kept, home.inbox / job.profile]
    for folder in claiming if job.state is State.CLAIMING else [home.adapters, *kept, *ours]:
        if folder.is_dir():
            sync_folder(folder)


def _recover_claim(ledger: Ledger, home: Home, job: Job) -> None:
    source = home.inbox / job.profile / os.fsdecode(job.name)
    if (home.failed / job.id).is_dir():
        take_back(home, job)
    if not job.attempt and (_same_inode(source, job) or same_file(source, input_path(home, job))):
        forget(ledger, home, job)
    elif input_path(home, job).exists():
        _recover_beside(ledger, home, job)
    else:
        _log.warning("file vanished before it was taken", file=printable(job.name))
        ledger.drop(job.id)


def _recover_beside(ledger: Ledger, home: Home, job: Job) -> None:
    """Bring what lay beside the data to where the input is."""
    for place, name in users_files(home, job):
        put_away = archive_folder(home, job) / name
        if put_away.exists() and not place.exists():  # of a duplicate: the ledger was lost before its input followed
            move(put_away, place)
    take_beside(ledger, home, job, home.inbox / job.profile, read_beside(home.job(job.id)))


def _same_inode(path: Path, job: Job) -> bool:
    try:
        facts = path.lstat()
    except OSError:
        return False
    there = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return there == (job.identity.device, job.identity.inode, job.identity.size, job.identity.mtime_ns)


def _recover_run(ledger: Ledger, home: Home, job: Job) -> None:
    """Go on behind an attempt that is over and did not say how it ended."""
    if published(home, job):
        archive(ledger, home, publish(ledger, home, job))
    elif belongs_to(home.job(job.id).staged_adapter(job.attempt), job.id):  # the trainer had come to its end
        try:
            archive(ledger, home, publish(ledger, home, job))
        except FinetunedError as error:
            fail(ledger, home, job, error.as_dict())
    else:
        # A row that was made again does not know whether it was at work.
        if job.boot_id and job.launcher == "local":
            note_crash(home, job.id, time.time())
        lost = "the daemon or the machine went down"
        _count_interruption(
            ledger, home, job, how=lost if job.launcher == "local" else f"{job.launcher} does not know it any more"
        )


def _count_interruption(ledger: Ledger, home: Home, job: Job, *, how: str) -> None:
    if job.interruptions + 1 >= MOST_INTERRUPTIONS:
        fail(
            ledger,
            home,
            job,
            {
                "code": "interrupted_too_often",
                "what": f"this job was interrupted {MOST_INTERRUPTIONS} times while it ran; the last time {how}",
                "where": printable(job.name),
                "remedy": "Look into the job's log and the machine's; drop the file again when the cause is gone.",
            },
        )
    else:
        _log.warning(
            "job was interrupted", job=job.id, attempt=job.attempt, then="it resumes from its newest checkpoint"
        )
        over = ended(job, Ending.INTERRUPTED, at=time.time(), how=how)
        changes = {"state": State.QUEUED, "interruptions": job.interruptions + 1, "trainer_pid": None, "trainer_id": ""}
        ledger.record(job.id, [over], offset=job.events_offset, **changes)
