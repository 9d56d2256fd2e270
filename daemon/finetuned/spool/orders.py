"""What users want done with a job: cancel it, try it again, change its turn. Each a function of docs/protocol.md.

An order stands in the ledger until it is carried out, so every function may be called again after a crash in its
middle. Pausing the queue is a file, which outlives a lost ledger.
"""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import Any

from finetuned.config import Config, TrainingSettings
from finetuned.durable import move, sync_folder, write_file
from finetuned.errors import FinetunedError
from finetuned.fallback import Rung
from finetuned.home import Home, printable
from finetuned.jobs import Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.spool.claim import columns_of, read_beside, settings_beside, write_spec
from finetuned.spool.publish import CANCELLED, REASON, users_files


class Verb(StrEnum):
    """What a user may want."""

    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    RETRY = "retry"
    FIRST = "first"
    LAST = "last"
    BEFORE = "before"  # another job


class OrderError(FinetunedError):
    """The job is not in a state in which this can be done."""

    code = "cannot_be_done"


def cancelled(job: Job) -> dict[str, str]:
    """Give the reason that a cancelled job carries."""
    return {
        "code": CANCELLED,
        "what": "it was cancelled",
        "where": printable(job.name),
        "remedy": f"`finetuned retry {job.id}` takes it up again.",
    }


def pause(home: Home, why: str) -> None:
    """Let no job start until `resume`."""
    write_file(home.paused, why.encode() + b"\n")


def resume(home: Home) -> None:
    """Let jobs start again, and forget the crashes for which they may have been stopped."""
    home.crashes.unlink(missing_ok=True)
    home.paused.unlink(missing_ok=True)
    sync_folder(home.machinery)


def change_turn(ledger: Ledger, home: Home, job: Job, verb: Verb) -> Job:
    """Put a waiting job before or behind all others. Raises OrderError if it does not wait."""
    check_turn(job)
    others = [other for other in ledger.queue() if other.id != job.id]
    if not others:
        return job
    edge = others[0] if verb is Verb.FIRST else others[-1]
    step = -1 if verb is Verb.FIRST else 1
    job = ledger.update(job.id, priority=edge.priority, place=edge.place + step)
    write_spec(home, job, read_beside(home.job(job.id)))  # it may not have been taken as a whole yet
    return job


def put_before(ledger: Ledger, home: Home, job: Job, other: Job) -> None:
    """Put a waiting job right before another one. Raises OrderError if one of them does not wait.

    Those ahead of it give way where there is no place between, the foremost first: cut off at any moment, the order of
    the others is as it was.
    """
    check_turn(job)
    check_turn(other)
    if job.id == other.id:
        return
    waiting = [one for one in ledger.queue() if one.id != job.id]
    ahead = waiting[: [one.id for one in waiting].index(other.id)]
    place, places = other.place - 1, [(job, other.place - 1)]
    for one in reversed(ahead):
        if one.priority != other.priority or one.place < place:
            break
        place -= 1
        places.append((one, place))
    for one, its_place in reversed(places):
        moved = ledger.update(one.id, priority=other.priority, place=its_place)
        write_spec(home, moved, read_beside(home.job(moved.id)))


def check_turn(job: Job) -> None:
    """Raise OrderError if a job does not wait."""
    if job.state not in {State.CLAIMING, State.QUEUED}:
        raise OrderError(f"job {job.id} does not wait: it is {job.status}")


def retry(ledger: Ledger, home: Home, config: Config, job: Job) -> Job:
    """Take a failed or cancelled job up again (R1 to R3): with config.json as it is now, from its newest checkpoint.

    A job that waits for a later time may start at once. Raises OrderError, or ConfigError for settings that cannot be
    used, and then nothing has changed.
    """
    if job.state is State.QUEUED:
        return ledger.update(job.id, not_before=0.0)
    check_retry(home, job)
    columns = columns_of(settings_of_retry(home, config, job))
    job = ledger.update(  # R1
        job.id,
        state=State.CLAIMING,
        **columns,
        place=0.0,
        outcome=None,
        reason=None,
        adapter=None,
        progress={"waits": "tried again, with a checkpoint to go on from"} if _goes_on(home, job, columns) else {},
        retries=0,
        interruptions=0,
        not_before=0.0,
        events_offset=0,
        started_at=None,
        finished_at=None,
    )
    take_back(home, job)
    return job


def _goes_on(home: Home, job: Job, columns: dict[str, Any]) -> bool:
    """Whether a job that is tried again with these columns has a checkpoint, and its steps are what they were."""
    try:
        was, now = Rung(**job.rung), Rung(**columns["rung"])
    except TypeError:  # what its trainer said is none
        return False
    same = (was.effective_batch, was.max_length) == (now.effective_batch, now.max_length)
    kept = home.failed / job.id / home.job(job.id).checkpoints.name
    return same and job.settings == columns["settings"] and any(kept.glob("step-*"))


def check_retry(home: Home, job: Job) -> None:
    """Raise OrderError if there is nothing to try again."""
    if job.outcome is Outcome.SUCCEEDED:
        raise OrderError(
            f"job {job.id} has succeeded",
            remedy='To train it again, drop its file again with "duplicates" set to "run" in config.json.',
        )
    if job.state is not State.FINISHED:
        raise OrderError(f"job {job.id} is {job.status}; there is nothing to try again yet")
    for _, name in users_files(home, job):
        if not (home.failed / job.id / name).exists():
            raise OrderError(
                f"{name} of job {job.id} is no longer there",
                where=str(home.failed / job.id / name),
                remedy="Put it back, or drop the job's files into inbox/ again.",
            )


def settings_of_retry(home: Home, config: Config, job: Job) -> TrainingSettings:
    """Give the settings with which a job would be tried again. Raises ConfigError if they cannot be used."""
    return settings_beside(home, config, job.profile, home.failed / job.id / home.job(job.id).overrides.name)


def take_back(home: Home, job: Job) -> None:
    """Bring what a failed job left back into its folder (R2, R3).

    The input comes first: recovery brings the rest to where the input is, even without the ledger.
    """
    folder, source = home.job(job.id), home.failed / job.id
    write_spec(home, job)  # R2
    earlier = folder.stop(job.attempt)
    if job.attempt and not earlier.exists():  # its trainer may be with a cluster that was silent when it was cancelled
        earlier.touch()
    for kept, place in (
        *((source / name, place) for place, name in reversed(users_files(home, job))),
        (source / folder.checkpoints.name, folder.checkpoints),
        (source / folder.overrides.name, folder.overrides),
    ):
        if kept.exists() and not place.is_dir():
            move(kept, place)  # R3
    (source / REASON).unlink(missing_ok=True)
    with suppress(OSError):  # an adapter that could not be published may lie there
        source.rmdir()
