"""One attempt's life: launch, tail its events, judge its end, climb down a rung.

The decision what an end means for the job is `decide`, a pure function; the daemon and `finetuned train` both follow
it.
"""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from finetuned.attempts import ended
from finetuned.events import Ending, Event, EventType, describe_end, judge, parse_event
from finetuned.fallback import Rung, next_rung
from finetuned.home import Home, JobFolder, printable
from finetuned.jobs import Job, State
from finetuned.launchers import Launcher, Start, Trainer
from finetuned.launchers.adopted import AdoptedTrainer
from finetuned.ledger import Ledger
from finetuned.lifesigns import boot_id, has_open, locked, signed

_log = structlog.get_logger()

_LAST_WAIT = 10.0  # seconds for a killed trainer to be gone
_ORPHAN_PAUSE = 0.1  # seconds between two looks at its lock
_AT_ONCE = 4 * 2**20  # bytes of events.jsonl
MOST_TRANSIENT = 5
MOST_IN_VAIN = 20  # times that an engine may take a trainer away without a new checkpoint, from which alone it goes on
FIRST_DELAY = 30.0  # seconds before a transient end is tried again; doubled each time
LONGEST_DELAY = 1800.0
_UNCOUNTED = {
    Ending.INTERRUPTED: "stopped, with a checkpoint to go on from",
    Ending.DEVICE: "its GPU failed; it goes on from its checkpoint on another one, or waits for one",
}
SETTLE_RUNG = frozenset({EventType.RUNG, EventType.PLAN})  # events that tell the rung a trainer is on


@dataclass(frozen=True)
class Decision:
    """What follows an attempt. With `publish` false and no reason the job is queued again with these changes."""

    publish: bool = False
    reason: dict[str, str] | None = None
    rung: dict[str, Any] | None = None
    why: str = ""
    delay: float = 0.0  # seconds
    counted: bool = False  # as one of the job's retries after a transient end
    no_room: bool = False  # on the disk, for any job


def decide(job: Job, ending: Ending, *, error: dict[str, Any] | None, end: str) -> Decision:
    """Say what follows an attempt of `job` that ended so.

    `error` is the trainer's last error event, `end` names the exit in words.
    """
    said = {key: str((error or {}).get(key, "")) for key in ("code", "what", "where", "remedy")}
    match ending:
        case Ending.SUCCEEDED:
            return Decision(publish=True)
        case Ending.INTERRUPTED | Ending.DEVICE:
            return Decision(why=_UNCOUNTED[ending])
        case Ending.PERMANENT:
            return Decision(reason=said if error else _unexplained(job, end))
        case Ending.RESOURCE:
            return _climb_down(job, (error or {}).get("rung") or job.rung, said if error else _unexplained(job, end))
        case Ending.HOST_MEMORY if not job.progress.get("host_kills"):
            decision = _climb_down(job, job.rung, _killed(job))
            return replace(decision, why=f"the trainer was killed, which is taken for lack of memory; {decision.why}")
        case Ending.HOST_MEMORY:
            return Decision(reason=_killed(job))
        case Ending.TRANSIENT if said["code"] == "no_space":
            return Decision(why=said["what"], no_room=True)
        case Ending.TRANSIENT if job.retries < MOST_TRANSIENT:
            delay = min(FIRST_DELAY * 2**job.retries, LONGEST_DELAY)
            told = ": ".join(part for part in (said["where"], said["what"]) if part)
            return Decision(why=told or end, delay=delay, counted=True)
        case Ending.BUG if not job.progress.get("bugs"):
            return Decision(why=f"{end}; trying once more")
    return Decision(reason=said if error else _unexplained(job, end))


def _climb_down(job: Job, rung: dict[str, Any], reason: dict[str, str]) -> Decision:
    try:
        now = Rung(**rung)
    except TypeError:  # what the trainer said is none
        now = Rung(**job.rung)
    step = next_rung(
        now,
        allow_4bit=bool(job.settings.get("fallback_4bit")),
        allow_shorter=bool(job.settings.get("fallback_max_length")),
    )
    if step is None:
        return Decision(reason=reason)
    return Decision(rung=step[0].as_dict(), why=step[1])


def _killed(job: Job) -> dict[str, str]:
    return {
        "code": "killed",
        "what": "the trainer was killed, most likely by the kernel because the machine ran out of memory",
        "where": printable(job.name),
        "remedy": "Lower max_length or batch_size, set activation_checkpointing, take a smaller model, or add memory.",
    }


def _taken_too_often(job: Job, taken: str) -> dict[str, str]:
    return {
        "code": "taken_too_often",
        "what": f"the cluster ended it {MOST_IN_VAIN} times, and it wrote no new checkpoint between; {taken} at last",
        "where": printable(job.name),
        "remedy": "Give it more time there, lower checkpoint_minutes, or see the cluster's log; then `retry` it.",
    }


def _unexplained(job: Job, end: str) -> dict[str, str]:
    return {
        "code": "bug",
        "what": f"the trainer ended unexpectedly: {end}",
        "where": printable(job.name),
        "remedy": "This is a bug in finetuned or a library; the last lines of the job's log are kept beside this file.",
    }


def progress_for_next(progress: dict[str, Any], ending: Ending) -> dict[str, Any]:
    """Give the figures that the next attempt of a job begins with."""
    kept = {key: value for key, value in progress.items() if key != "error"}
    counter = {Ending.HOST_MEMORY: "host_kills", Ending.BUG: "bugs"}.get(ending)
    return {**kept, counter: 1} if counter else kept


class EventTail:
    """Reads what a trainer appends to events.jsonl, whole lines only."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        self.drained = False  # whether the last call reached the end

    def read(self) -> list[Event]:
        """Give the events since the last call, or the first few MiB of them: nobody may have listened for long."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                content = file.read(_AT_ONCE)
                while b"\n" not in content and (more := file.read(_AT_ONCE)):
                    content += more
                self.drained = not file.read(1)
        except FileNotFoundError:
            self.drained = True
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [event for line in whole.splitlines() if (event := parse_event(line.lstrip(b"\0")))]


def progress_after(progress: dict[str, Any], events: list[Event]) -> dict[str, Any]:
    """Fold events into a job's newest figures."""
    newest = dict(progress)
    for event in events:
        match event.type:
            case EventType.PHASE | EventType.METRICS | EventType.CHECKPOINT | EventType.RESULT:
                newest |= event.data
                if event.type is EventType.CHECKPOINT:
                    newest["in_vain"] = 0
            case EventType.PLAN:
                newest |= {key: event.data[key] for key in ("total_steps", "device") if key in event.data}
            case EventType.ERROR:
                newest["error"] = dict(event.data)
            case _:
                pass
    return newest


class Attempt:
    """One trainer at work on one job of the ledger."""

    def __init__(self, ledger: Ledger, home: Home, job: Job, trainer: Trainer) -> None:
        self.job = job
        self.trainer = trainer
        self._ledger = ledger
        self._tail = EventTail(home.job(job.id).events, job.events_offset)
        self._stop_by: float | None = None
        self.gpu_failed = self.cancelled = False

    @classmethod
    def launch(cls, ledger: Ledger, home: Home, job: Job, *, start: Start, environment: dict[str, str]) -> Attempt:
        """Start the trainer of a job that is in state running (D7). Raises OSError, and then none is at work."""
        trainer = start(home.job(job.id), log=home.job_log(job.id), environment=environment)
        with suppress(sqlite3.OperationalError):  # a full disk: it is noted with what the trainer says first
            job = ledger.update(job.id, trainer_pid=trainer.pid, trainer_id=trainer.id)
        return cls(ledger, home, job, trainer)

    @classmethod
    def adopt(cls, ledger: Ledger, home: Home, job: Job, *, stop_seconds: float) -> Attempt | None:
        """Go on with the trainer of a job in state running that outlived its daemon, or ended since and said how.

        One that is not healthy is asked for a checkpoint. None if there is no such trainer.
        """
        if job.boot_id != boot_id():  # a power loss may have taken what it said it had done
            return None
        trainer = AdoptedTrainer.find(home.job(job.id), job.attempt)
        if trainer is None:
            return None
        attempt = cls(ledger, home, ledger.update(job.id, trainer_pid=trainer.pid), trainer)
        if why := trainer.why_unfit():
            _log.warning("a trainer outlived its daemon", job=job.id, pid=trainer.pid, why=why, then="it is stopped")
            attempt.stop(0 if trainer.stands_still else stop_seconds)
        elif trainer.poll() is None:
            _log.info("trainer adopted", job=job.id, attempt=job.attempt, pid=trainer.pid)
        else:
            _log.info("a trainer ended while no daemon was there", job=job.id, attempt=job.attempt)
        return attempt

    @classmethod
    def find(cls, ledger: Ledger, home: Home, job: Job, launcher: Launcher) -> Attempt | None:
        """Go on with the trainer of a job in state running that is on another machine, or was. None if its engine knows
        none.
        """
        trainer = launcher.find(home.job(job.id), trainer_id=job.trainer_id, attempt=job.attempt)
        if trainer is None:
            with suppress(OSError):  # should it begin all the same, on a cluster that we do not ask any more
                home.job(job.id).stop(job.attempt).touch()
            return None
        _log.info("trainer found again", job=job.id, attempt=job.attempt, id=trainer.id)
        return cls(ledger, home, ledger.update(job.id, trainer_id=trainer.id), trainer)

    @property
    def stopping(self) -> bool:
        """Whether the trainer was asked to stop."""
        return self._stop_by is not None

    def stop(self, seconds: float) -> None:
        """Ask the trainer for a checkpoint and an end; after so many seconds it is killed."""
        if self._stop_by is None:
            self._stop_by = time.monotonic() + seconds
            self.trainer.ask_to_stop()

    def hurry(self) -> None:
        """Kill a trainer that was asked to stop already."""
        self._stop_by = time.monotonic()

    def tend(self) -> tuple[list[Event], int | None]:
        """Record what the trainer said; give that, and its exit status once it has ended and all is recorded."""
        if self._stop_by is not None and time.monotonic() >= self._stop_by:
            self.trainer.kill()
        status = self.trainer.poll()  # before reading, so that an ended trainer's last events are read
        offset = self._tail.offset
        events = self._tail.read()
        waits = self.trainer.waits
        if events or waits != self.job.progress.get("waits_for", "") or self.trainer.id != self.job.trainer_id:
            rungs = [event.data["rung"] for event in events if event.type in SETTLE_RUNG]
            changes: dict[str, Any] = {"trainer_pid": self.trainer.pid, "trainer_id": self.trainer.id}
            changes["progress"] = {**progress_after(self.job.progress, events), "waits_for": waits}
            if rungs:
                changes["rung"] = rungs[-1]
            try:
                self.job = self._ledger.record(self.job.id, events, offset=self._tail.offset, **changes)
            except sqlite3.Error:  # a full disk, say: they are read again
                self._tail.offset = offset
                raise
        return events, status if self._tail.drained else None

    def conclude(self, status: int) -> tuple[Decision, Ending]:
        """Judge the end. For a job that goes back into the queue the ledger is updated; the caller publishes or fails
        it.
        """
        taken = self.trainer.taken
        ending = judge(status, stopped=self.stopping or bool(taken), gpu_failed=self.gpu_failed)
        error = self.job.progress.get("error")
        if ending is Ending.TRANSIENT and error is None:  # nor room to say so
            error = {"code": "no_space", "what": "no room on the disk"}
        how = taken or describe_end(status)
        begun = not self.trainer.waits  # else its turn never came: a full cluster may take days
        in_vain = int(self.job.progress.get("in_vain", 0)) + begun if taken else 0  # since its last checkpoint
        decision = decide(self.job, ending, error=error, end=how)
        if in_vain >= MOST_IN_VAIN:
            decision = Decision(reason=_taken_too_often(self.job, taken))
        elif taken and not begun:
            decision = Decision(why=taken)
        then = decision.why or (decision.reason or {}).get("what", "")
        over = ended(self.job, ending, at=time.time(), how=how, then="" if then == how else then)
        if decision.publish or decision.reason:
            self.job = self._ledger.record(self.job.id, [over], offset=self.job.events_offset)
            return decision, ending
        self.job = self._ledger.record(
            self.job.id,
            [over],
            offset=self.job.events_offset,
            state=State.QUEUED,
            rung=decision.rung or self.job.rung,
            retries=self.job.retries + decision.counted,
            not_before=time.time() + decision.delay if decision.delay else 0.0,
            progress={
                **progress_for_next(self.job.progress, ending),
                "waits": decision.why,
                "waits_for": "",
                "in_vain": in_vain,
            },
            trainer_pid=None,
            trainer_id="",
        )
        return decision, ending


def stop_orphan(home: Home, job: Job, *, seconds: float) -> None:
    """End a trainer that outlived its daemon and cannot be adopted: asked for a checkpoint first, after so many
    seconds by force.
    """
    _log.warning(
        "a trainer outlived its daemon", job=job.id, pid=job.trainer_pid, then="it writes a checkpoint and ends"
    )
    folder = home.job(job.id)
    deadline = time.monotonic() + seconds
    with suppress(OSError):
        folder.stop(job.attempt).touch()  # for one on another machine, which no signal of ours reaches
    while locked(folder):
        if time.monotonic() > deadline + _LAST_WAIT:  # stuck in a driver, or it never said who it is
            raise OSError(errno.EBUSY, "a trainer that outlived its daemon does not end", str(folder.lock))
        _signal_trainer(folder, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(_ORPHAN_PAUSE)


def _signal_trainer(folder: JobFolder, number: signal.Signals) -> None:
    """Signal the process that signed the lock, if it is still that trainer."""
    who = signed(folder)
    with suppress(OSError):
        if who is not None and has_open(who.pid, folder.lock):
            os.kill(who.pid, number)
