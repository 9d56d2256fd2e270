"""The trainer as a job of a Slurm cluster, whose nodes see the base directory at the same path."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from finetuned.engine_settings import Slurm
from finetuned.errors import FinetunedError
from finetuned.events import ExitCode
from finetuned.home import Home, JobFolder
from finetuned.launchers import Needs
from finetuned.launchers.program import (
    GHOST_SECONDS,
    GIVEN_UP_SECONDS,
    command,
    environment_elsewhere,
    given_up,
    tell,
)
from finetuned.launchers.slurm_asking import Asking, LateError, Submit
from finetuned.launchers.slurm_queue import Entry, Listing, Order, Queue, outcome, require_commands
from finetuned.launchers.slurm_script import TEMPLATE, fill, read_template
from finetuned.lifesigns import Silence, exit_code, locked

_AT_MOST = 1.0  # seconds that the daemon waits for Slurm's answer; what comes later is heard of beside its loop

_log = structlog.get_logger()


class SlurmTrainer:
    """A trainer on its way to Slurm's queue, in it, or run by it, also again after Slurm itself has put it back."""

    pid = None

    def __init__(
        self, queue: Queue, folder: JobFolder, *, trainer_id: str, attempt: int, submit: Submit | None = None
    ) -> None:
        """Look after the job of this id, or if that is not known after the one that was submitted for the attempt.

        With `submit` it is not known either whether it was submitted. What Slurm said before now does not count.
        """
        self.id = trainer_id
        self.taken = ""
        self.waits = ""  # why it does not run, in Slurm's words; empty when it does
        self._queue = queue
        self._folder = folder
        self._attempt = attempt
        self._submit = submit
        self._since = self._heard_at = time.monotonic()
        self._order: Order | None = None
        self._status: int | None = None
        self._said = ""
        self._give_up_at = 0.0
        self._silence = Silence(folder)  # since it was to be killed, or Slurm answered last
        if trainer_id:
            queue.watch(trainer_id)

    def poll(self) -> int | None:
        """Give its exit status as subprocess does, or None while Slurm has it."""
        if self._status is None and (self._submit is None or self._is_submitted(self._submit)):
            self._queue.tend()
            listing = self._queue.listing
            if listing is not None and listing.asked_at >= self._since:
                if listing.asked_at > self._heard_at:
                    self._heard_at, self._silence = listing.asked_at, Silence(self._folder)
                self._heed(listing.entries.get(self.id) if self.id else self._find(listing))
        if self._status is None and self._order is Order.KILL and self._silence.seconds() >= GIVEN_UP_SECONDS:
            self._give_up()
        return self._status

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end; one that has not begun is taken out of Slurm's queue."""
        with suppress(OSError):  # no room on the disk: the signal does it
            self._folder.stop(self._attempt).touch()
        self._give(Order.STOP)

    def kill(self) -> None:
        """End it and its children at once."""
        if self._order is not Order.KILL:
            self._silence = Silence(self._folder)
        self._give(Order.KILL)

    def _give(self, order: Order) -> None:
        self._order = max(order, self._order or order)
        if self.id:
            self._queue.order(self.id, self._order)

    def _is_submitted(self, submit: Submit) -> bool:
        """Whether it is known by now what has become of the submission, which is tried until there is an answer."""
        try:
            self._know(submit.answer())
        except LateError as error:
            self.waits = self.waits or str(error)
            return False
        except FinetunedError as error:
            tell(self._folder, error)
            self._status = ExitCode.BAD_SETTINGS
            return False
        except OSError as error:
            if self._order is None:
                self.waits = str(error)
                submit.try_again()
                return False
        self._submit = None
        self._since = time.monotonic()
        return True

    def _know(self, trainer_id: str) -> None:
        self.id = trainer_id
        self._queue.watch(trainer_id)
        if self._order is not None:
            self._queue.order(trainer_id, self._order)

    def _find(self, listing: Listing) -> Entry | None:
        """Give the job that was submitted for this attempt, whatever its id."""
        entry = _submitted(listing.entries, self._folder, self._attempt)
        if entry is not None:
            self._know(entry.id)
        return entry

    def _heed(self, entry: Entry | None) -> None:
        if entry is None or not _is_of(entry, self._folder, self._attempt):
            if locked(self._folder):
                return  # it is at work all the same
            said = last_word(self._folder, self._attempt)
            status, taken = (-signal.SIGTERM, "Slurm does not know it any more") if said is None else (said, "")
        elif entry.ended and locked(self._folder) and time.monotonic() < self._ended_by():
            with suppress(OSError):  # Slurm has lost it, and it is at work all the same
                self._folder.stop(self._attempt).touch()
            return
        elif entry.ended:
            status, taken = outcome(entry, last_word(self._folder, self._attempt))
        else:
            self._tell(entry)
            return
        _log.info("Slurm's job is over", job=self._folder.path.name, slurm_id=self.id, state=str(entry or "unknown"))
        self.taken = "" if self._order else taken
        self.waits = ""
        self._status = status
        self._queue.forget(self.id)

    def _give_up(self) -> None:
        """Wait no longer for a Slurm that may be gone for ever. Should it come back, it gets the order all the same."""
        said = last_word(self._folder, self._attempt)
        if said is None:
            look = f"scontrol show job {self.id}" if self.id else f"squeue --name={_name(self._folder)}"
            self.taken = given_up(self._folder, "Slurm", self.id, look=look)
        self._queue.leave(self.id)
        self._status = -signal.SIGKILL if said is None else said

    def _ended_by(self) -> float:
        """Give when a trainer that Slurm has ended is no longer waited for, though it holds its lock."""
        self._give_up_at = self._give_up_at or time.monotonic() + GHOST_SECONDS
        return self._give_up_at

    def _tell(self, entry: Entry) -> None:
        self.waits = "" if entry.state == "RUNNING" else str(entry)
        if self._said != entry.state:  # the reason for which one waits may change all the time
            self._said = entry.state
            _log.info("Slurm's job", job=self._folder.path.name, slurm_id=self.id, state=str(entry))


class SlurmLauncher:
    """Submits trainers with sbatch, and finds those again that an earlier daemon submitted."""

    def __init__(self, settings: Slurm, home: Home, queue: Queue | None = None) -> None:
        """Take the settings; Slurm is asked nothing yet."""
        self._settings = settings
        self._home = home
        self._queue = queue or Queue()
        self._last: Asking[Any] | None = None  # that was asked while the daemon waited

    @property
    def back_at(self) -> float:
        """When Slurm, after it had been silent, answered again."""
        return self._queue.back_at

    def start(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str], needs: Needs) -> SlurmTrainer:
        """Submit a trainer on a job's folder, its output appended to `log`.

        Raises ConnectionError if Slurm is away, BlockingIOError if an earlier trainer of this job is in Slurm's
        queue, and FinetunedError if Slurm will never take it. Where there is no answer in a moment the trainer waits
        for that in the caller's place.
        """
        require_commands()
        self._check_that_it_answers()
        script = self._script(folder, log=log, environment=environment, needs=needs)
        submit = Submit(partial(self._submit, script, folder, log, needs))
        self._last = submit.asking
        try:
            trainer_id = submit.answer(within=_AT_MOST)
        except LateError:
            return SlurmTrainer(self._queue, folder, trainer_id="", attempt=needs.attempt, submit=submit)
        return SlurmTrainer(self._queue, folder, trainer_id=trainer_id, attempt=needs.attempt)

    def find(self, folder: JobFolder, *, trainer_id: str, attempt: int) -> SlurmTrainer | None:
        """Give the trainer that an earlier daemon submitted, by its id or, if its id was lost, by what it is called.

        None if neither Slurm nor its accounting knows it and it left no word on its end. Without an answer of Slurm
        it is taken to be there.
        """
        found: str | None = trainer_id
        with suppress(OSError):
            self._check_that_it_answers()
            self._last = asking = Asking(partial(self._id_of, folder, trainer_id, attempt))
            found = asking.answer(within=_AT_MOST)
        return None if found is None else SlurmTrainer(self._queue, folder, trainer_id=found, attempt=attempt)

    def _check_that_it_answers(self) -> None:
        """Raise ConnectionError if Slurm is known to be away, or still thinks about the last question."""
        if self._queue.is_away() or (self._last is not None and self._last.is_alive()):
            raise ConnectionError("Slurm does not answer")

    def _id_of(self, folder: JobFolder, trainer_id: str, attempt: int) -> str | None:
        entries = self._queue.recent().entries
        if not trainer_id:
            submitted = _submitted(entries, folder, attempt)
            there = locked(folder) or last_word(folder, attempt) is not None
            return submitted.id if submitted else ("" if there else None)
        entry = entries.get(trainer_id) or self._queue.accounted([trainer_id]).get(trainer_id)
        known = entry is not None and _is_of(entry, folder, attempt)
        if not known and not locked(folder) and last_word(folder, attempt) is None:
            return None
        return trainer_id

    def _submit(self, script: str, folder: JobFolder, log: Path, needs: Needs) -> str:
        """Submit a script; the job's id. Raises OSError if Slurm takes it not now, FinetunedError if it never will."""
        earlier = _submitted(self._queue.recent().entries, folder, needs.attempt)
        if earlier is not None:  # an order that was answered too late
            return earlier.id
        self._refuse_a_second(folder)
        options = [
            *self._settings.options,
            f"--job-name={_name(folder)}",
            f"--comment={_comment(folder, needs.attempt)}",
            f"--chdir={folder.path}",
            f"--output={str(log).replace('%', '%%')}",
            "--open-mode=append",
        ]
        try:
            trainer_id = self._queue.submit(script, options)
        except ConnectionError:  # it may have been taken, and only the answer was lost
            found = _submitted(self._queue.now().entries, folder, needs.attempt)
            if found is None:
                raise
            trainer_id = found.id
        _log.info("submitted to Slurm", job=needs.job, slurm_id=trainer_id, gpus=needs.gpus)
        return trainer_id

    def _script(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str], needs: Needs) -> str:
        path = TEMPLATE
        if self._settings.template is not None:
            path = self._home.root / Path(self._settings.template).expanduser()
        given = environment_elsewhere(environment, needs.attempt)
        words = ["env", *(f"{name}={value}" for name, value in given.items())]
        words += command(folder, python=self._settings.python)
        values = {
            "command": shlex.join(words),
            "folder": str(folder.path),
            "gpus": str(needs.gpus),
            "job": needs.job,
            "log": str(log),
            "signal_seconds": str(self._settings.signal_seconds),
        }
        return fill(read_template(path), values, where=path)

    def _refuse_a_second(self, folder: JobFolder) -> None:
        """Cancel what is still in Slurm's queue for this folder: submitted once, and its answer was lost."""
        entries = self._queue.recent().entries.values()
        earlier = [
            entry.id for entry in entries if not entry.ended and entry.comment.rpartition(" ")[0] == _mark(folder)
        ]
        if not earlier:
            return
        for job in earlier:
            self._queue.order(job, Order.KILL)
        self._queue.tend()
        raise BlockingIOError(f"Slurm still has an earlier trainer of this job, {earlier[0]}; it is cancelled first")


def last_word(folder: JobFolder, attempt: int) -> int | None:
    """Give the exit code that the trainer left, unless a later run of the same attempt has signed the lock since."""
    with suppress(OSError):
        if folder.exit_code(attempt).stat().st_mtime_ns < folder.lock.stat().st_mtime_ns:
            return None
    return exit_code(folder, attempt)


def _mark(folder: JobFolder) -> str:
    return f"finetuned {folder.path}"


def _comment(folder: JobFolder, attempt: int) -> str:
    return f"{_mark(folder)} {attempt}"


def _name(folder: JobFolder) -> str:
    return f"finetuned-{folder.path.name}"


def _is_of(entry: Entry, folder: JobFolder, attempt: int) -> bool:
    """Whether a job is the one of this attempt: Slurm may have begun its numbers anew."""
    return entry.name == _name(folder) and entry.comment in {"", _comment(folder, attempt)}


def _submitted(entries: Mapping[str, Entry], folder: JobFolder, attempt: int) -> Entry | None:
    """Give the newest job that was submitted for this attempt."""
    mine = [entry for entry in entries.values() if entry.comment == _comment(folder, attempt)]
    return max(mine, key=lambda entry: int(entry.id), default=None)
