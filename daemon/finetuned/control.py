"""What users tell the daemon: each order goes into the ledger, where it waits until the daemon carries it out."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from finetuned.config import load_config
from finetuned.errors import HomeError
from finetuned.guard import Holder, daemon_at_work
from finetuned.home import Home
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.lifesigns import has_open
from finetuned.spool.orders import OrderError, Verb, check_retry, check_turn, pause, resume, settings_of_retry

_NEXT_LOOK = "the daemon hears it at its next look"
_NOT_RUNNING = "the daemon is not running, so this takes effect when it starts"


def order(home: Home, verb: Verb, name: str = "", *, before: str = "") -> str:
    """Give an order for the job of that id, or the beginning of it; the sentence to tell the user. `before` names the
    job before which it is to come.

    Raises HomeError if there is no such job or the ledger cannot be written from here, OrderError or ConfigError if it
    could not be carried out.
    """
    daemon = daemon_at_work(home)
    if daemon is not None and daemon.elsewhere:
        return _from_afar(home, verb, daemon)
    with _ledger(home) as ledger:
        job = _find(ledger, verb, name) if name else None
        other = _find(ledger, verb, before) if verb is Verb.BEFORE else None
        said = _check(home, verb, job, other)
        ledger.order(verb, job.id if job else "", time.time(), before=other.id if other else "")
    daemon = daemon_at_work(home)
    if daemon is None:
        return f"{said}; {_NOT_RUNNING}"
    with suppress(OSError, ValueError):
        # In a container its pid is another process's here, or another's there.
        if has_open(int(daemon.pid), home.lock):
            os.kill(int(daemon.pid), signal.SIGUSR1)
            return said
    return f"{said}; {_NEXT_LOOK}"


def _from_afar(home: Home, verb: Verb, daemon: Holder) -> str:
    """Do what needs no ledger, which is SQLite's and of one machine at a time. Raises HomeError for all else."""
    if verb not in {Verb.PAUSE, Verb.RESUME}:
        raise HomeError(
            f"the daemon is at work on {daemon.host}, and no other machine can write to its ledger",
            where=str(home.root),
            remedy=f"Run this on {daemon.host}, or use its control centre.",
        )
    try:
        if verb is Verb.PAUSE:
            pause(home, "a user asked for it")
        else:
            resume(home)
    except OSError as error:
        raise HomeError(
            f"the queue cannot be {verb}d: {error.strerror}",
            where=str(home.paused),
            remedy="Do it as the user who runs the daemon, or make room on the disk.",
        ) from error
    return f"{_check(home, verb, None, None)}; {_NEXT_LOOK}"


def _check(home: Home, verb: Verb, job: Job | None, other: Job | None) -> str:
    """Refuse at once what the daemon would refuse; give the sentence."""
    if job is None:
        return (
            "no job starts from now on; each that runs writes a checkpoint"
            if verb is Verb.PAUSE
            else "jobs start again"
        )
    if verb is Verb.RETRY:
        if job.state is not State.QUEUED:
            check_retry(home, job)
            settings_of_retry(home, load_config(home.config_file), job)
        return f"{job.id} is tried again"
    if job.state is State.FINISHED:
        raise OrderError(f"job {job.id} has ended: it {job.outcome}")
    if verb is Verb.CANCEL:
        is_so = "will be cancelled when its trainer has ended" if job.state is State.RUNNING else "is cancelled"
        return f"{job.id} {is_so}; its file goes to archive/failed/{job.id}/"
    check_turn(job)
    if other is not None:
        check_turn(other)
        return f"{job.id} comes before {other.id}"
    return f"{job.id} is {verb} in the queue"


def _find(ledger: Ledger, verb: Verb, name: str) -> Job:
    """Give the job that is meant: of several that begin so, the only one to which the order can apply."""
    found = ledger.named(name)
    if len(found) > 1:
        ended = verb is Verb.RETRY
        found = [job for job in found if (job.state is State.FINISHED) is ended] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise HomeError(f"there is no job {name}", remedy="`finetuned status` shows the jobs.")
    raise HomeError(
        f"{name} is the beginning of {len(found)} jobs or more: {', '.join(job.id for job in found)}",
        remedy="Write more of it.",
    )


@contextmanager
def _ledger(home: Home) -> Iterator[Ledger]:
    try:
        home.machinery.mkdir(mode=0o750, exist_ok=True)
        ledger = Ledger.open(home.ledger, check=False)
    except (sqlite3.OperationalError, OSError) as error:
        raise HomeError(
            f"the ledger cannot be written: {error}",
            where=str(home.ledger),
            remedy="Do it as the user who runs the daemon, or make room on the disk.",
        ) from error
    except sqlite3.DatabaseError as error:
        raise HomeError(
            f"the ledger is damaged: {error}",
            where=str(home.ledger),
            remedy="Start the daemon: it puts the ledger aside and builds a new one from the folders.",
        ) from error
    try:
        yield ledger
    finally:
        ledger.close()
