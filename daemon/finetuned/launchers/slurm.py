"""The trainer as a job of a Slurm cluster, whose nodes see the base directory at the same path."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from finetuned.engine_settings import Slurm
from finetuned.home import Home, JobFolder
from finetuned.launchers import Needs
from finetuned.launchers.program import GHOST_SECONDS, command, environment_elsewhere
from finetuned.launchers.slurm_queue import Entry, Order, Queue, outcome, require_commands
from finetuned.launchers.slurm_script import TEMPLATE, fill, read_template
from finetuned.lifesigns import exit_code, locked

_log = structlog.get_logger()


class SlurmTrainer:
    """A trainer in Slurm's queue, or run by it, or run by it again after Slurm itself has put it back."""

    pid = None

    def __init__(self, queue: Queue, folder: JobFolder, *, trainer_id: str, attempt: int) -> None:
        """Look after the job of this id. What Slurm said before this moment does not count."""
        self.id = trainer_id
        self.taken = ""
        self.waits = ""  # why it does not run, in Slurm's words; empty when it does
        self._queue = queue
        self._folder = folder
        self._attempt = attempt
        self._since = time.monotonic()
        self._asked_to_stop = False
        self._status: int | None = None
        self._said = ""
        self._give_up_at = 0.0
        queue.watch(trainer_id)

    def poll(self) -> int | None:
        """Give its exit status as subprocess does, or None while Slurm has it."""
        if self._status is None:
            self._queue.tend()
            listing = self._queue.listing
            if listing is not None and listing.asked_at >= self._since:
                self._heed(listing.entries.get(self.id))
        return self._status

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end; one that has not begun is taken out of Slurm's queue."""
        self._asked_to_stop = True
        with suppress(OSError):  # no room on the disk: the signal does it
            self._folder.stop(self._attempt).touch()
        self._queue.order(self.id, Order.STOP)

    def kill(self) -> None:
        """End it and its children at once."""
        self._asked_to_stop = True
        self._queue.order(self.id, Order.KILL)

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
        self.taken = "" if self._asked_to_stop else taken
        self.waits = ""
        self._status = status
        self._queue.forget(self.id)

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

    def start(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str], needs: Needs) -> SlurmTrainer:
        """Submit a trainer on a job's folder, its output appended to `log`. Waits some seconds for Slurm's answer.

        Raises ConnectionError if there is none, BlockingIOError if an earlier trainer of this job is in Slurm's
        queue, and FinetunedError if Slurm will never take it.
        """
        require_commands()
        script = self._script(folder, log=log, environment=environment, needs=needs)
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
        return SlurmTrainer(self._queue, folder, trainer_id=trainer_id, attempt=needs.attempt)

    def find(self, folder: JobFolder, *, trainer_id: str, attempt: int) -> SlurmTrainer | None:
        """Give the trainer that an earlier daemon submitted, by its id or, if its id was lost, by what it is called.

        None if neither Slurm nor its accounting knows it and it left no word on its end. Without an answer of Slurm
        one that has an id is taken to be there; for one without, ConnectionError is raised.
        """
        try:
            entries = self._queue.recent().entries
        except ConnectionError:
            if not trainer_id:
                raise
            return SlurmTrainer(self._queue, folder, trainer_id=trainer_id, attempt=attempt)
        if not trainer_id:
            submitted = _submitted(entries, folder, attempt)
            trainer_id = submitted.id if submitted else ""
        if not trainer_id:
            return None
        entry = entries.get(trainer_id) or self._queue.accounted([trainer_id]).get(trainer_id)
        known = entry is not None and _is_of(entry, folder, attempt)
        if not known and not locked(folder) and last_word(folder, attempt) is None:
            return None
        return SlurmTrainer(self._queue, folder, trainer_id=trainer_id, attempt=attempt)

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
