"""Slurm's own commands: what its queue holds, asked so that the daemon's loop does not wait; submit, signal, cancel."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

import structlog

from finetuned.errors import FinetunedError
from finetuned.events import ExitCode

_log = structlog.get_logger()

_SLOW = 60.0  # seconds that an answer may take: the daemon's loop never waits for one
_RECENT = 10.0  # seconds for which Slurm is taken to be there after an answer

_INTERRUPTED = {
    "BOOT_FAIL": "its node could not be started",
    "CANCELLED": "somebody cancelled it in Slurm",
    "DEADLINE": "its deadline passed",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "another job was preferred to it",
    "REVOKED": "another cluster runs it",
    "TIMEOUT": "its time limit was reached",
}
_ENDED = {"COMPLETED", "FAILED", "OUT_OF_MEMORY", *_INTERRUPTED}

_ACCOUNTED = re.compile(r"(\d+)\|([A-Z_]+)[^|]*\|(\d+):(\d+)\|(.*)")  # State may be "CANCELLED by 1000"
_OF_SHELLS, _MOST_SIGNALS = 128, 32

# What sbatch says where the same may be taken later; everything else it will refuse again.
_FOR_NOW = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "temporarily unable",
    "Resource temporarily unavailable",
    "standby mode",
    "Connection refused",
    "Transport endpoint is not connected",
    "Zero Bytes were transmitted",
    "Unexpected message received",
    "Slurm is unavailable",
    "artition not available",  # drained
    "partition configuration not available now",
    "Invalid authentication credential",
)


class Order(IntEnum):
    """What a job is to do."""

    STOP = 1
    KILL = 2


@dataclass(frozen=True)
class Entry:
    """A job as Slurm lists it. `status` is as subprocess gives it and means something once it has ended."""

    id: str
    state: str
    status: int
    reason: str
    name: str
    comment: str  # empty where only the accounting knows the job

    def __str__(self) -> str:
        """Give the state and why."""
        return self.state if self.reason in {"", "None"} else f"{self.state} ({self.reason})"

    @property
    def ended(self) -> bool:
        """Whether it is over; one that Slurm puts back into its queue is not."""
        return self.state in _ENDED


@dataclass(frozen=True)
class Listing:
    """Slurm's list of this user's jobs."""

    asked_at: float  # time.monotonic()
    entries: Mapping[str, Entry]


def outcome(entry: Entry, said: int | None) -> tuple[int, str]:
    """Give the exit status of a job that has ended, and why somebody else ended it, if so.

    `said` is the exit code that the trainer left. It stands above Slurm's word, which is about the whole script.
    """
    if said not in {None, 130}:
        return said, ""
    if entry.state in _INTERRUPTED:
        return 130 if said else -signal.SIGTERM, _INTERRUPTED[entry.state]
    if said is None and entry.reason == "BadConstraints":  # sbatch says it better the next time, if it is still so
        return -signal.SIGTERM, "Slurm has no node any more that meets its options"
    if said or entry.status == 130:
        return 130, "Slurm asked it to stop, as it does before a time limit"
    if entry.state == "OUT_OF_MEMORY":
        return -signal.SIGKILL, ""
    return (128 - entry.status if 128 < entry.status < 160 else entry.status), ""  # as shells say that a signal did it


def parse_queue(text: str) -> dict[str, Entry]:
    """Read what squeue printed, by id."""
    rows = [line.split("|", 5) for line in text.splitlines() if line.count("|") >= 5]
    return {
        job: Entry(job, state, _exit_status(status), reason, name, comment.removesuffix("|"))
        for job, state, status, reason, name, comment in rows
    }


def _exit_status(text: str) -> int:
    """Give what waitpid(2) told Slurm as subprocess would; 1 where it is none, as for a job that never began."""
    try:
        return os.waitstatus_to_exitcode(int(text))
    except (ValueError, OverflowError):
        return 1


def parse_accounting(text: str) -> dict[str, Entry]:
    """Read what sacct printed, by id."""
    found = {}
    for line in text.splitlines():
        if read := _ACCOUNTED.fullmatch(line):
            job, state, code, number, name = read.groups()
            found[job] = Entry(job, state, _accounted_status(int(code), int(number)), "", name, "")
    return found


def _accounted_status(code: int, number: int) -> int:
    """Give an exit code and a signal as subprocess would, though sacct takes 128 away from codes that have it.

    So 2 is 130, a trainer that was stopped, and 9 is 137, as a shell says that its program was killed. No trainer ends
    with a code between 1 and 64.
    """
    if number:
        return -number
    if code == ExitCode.STOPPED - _OF_SHELLS:
        return ExitCode.STOPPED
    return -code if 1 < code < _MOST_SIGNALS else code


def require_commands() -> None:
    """Raise FinetunedError if this machine has no Slurm."""
    if shutil.which("sbatch") is None:
        raise FinetunedError(
            "this machine has no sbatch",
            where="launcher in config.json",
            remedy="Run the daemon where Slurm's commands are, or choose another launcher.",
            code="no_slurm",
        )


class Queue:
    """Slurm's queue, asked every few seconds in a thread: all jobs at once, and carrying out orders."""

    def __init__(self, every: float = 2.0) -> None:
        """Ask every so many seconds, at most."""
        self.listing: Listing | None = None
        self._every = every
        self._thread: threading.Thread | None = None
        self._next = 0.0
        self._watched: set[str] = set()
        self._orders: dict[str, Order] = {}
        self._told: set[str] = set()  # who has got its signal
        self._silent = False
        self.back_at = 0.0

    def tend(self) -> None:
        """Ask anew, if it is time. Does not wait."""
        if time.monotonic() >= self._next and not (self._thread and self._thread.is_alive()):
            self._next = time.monotonic() + self._every
            self._thread = threading.Thread(target=self._look, name="slurm", daemon=True)
            self._thread.start()

    def watch(self, job: str) -> None:
        """Look for this job in the accounting too, once the queue does not list it any more."""
        self._watched.add(job)

    def leave(self, job: str) -> None:
        """Look for it no more; what it was ordered it is told if Slurm answers again."""
        self._watched.discard(job)

    def forget(self, job: str) -> None:
        """Look for it no more, and tell it nothing more."""
        self.leave(job)
        self._orders.pop(job, None)
        self._told.discard(job)

    def order(self, job: str, order: Order) -> None:
        """Have a job stopped or killed, as soon as Slurm answers."""
        if self._orders.get(job, 0) < order:
            self._orders[job] = order
            self._next = 0.0

    def is_away(self) -> bool:
        """Whether Slurm did not answer when it was asked last; then it is asked again."""
        if self._silent:
            self.tend()
        return self._silent

    def recent(self) -> Listing:
        """Give a listing that is some seconds old at most. Waits; raises ConnectionError."""
        if self._silent or self.listing is None or time.monotonic() - self.listing.asked_at > _RECENT:
            return self.now()
        return self.listing

    def now(self) -> Listing:
        """Ask and wait for the answer. Raises ConnectionError."""
        self._ask()
        assert self.listing
        return self.listing

    def submit(self, script: str, options: Sequence[str]) -> str:
        """Submit a script and wait; the job's id.

        Raises ConnectionError, BlockingIOError if Slurm takes this one not now, FinetunedError if it never will.
        """
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        try:
            said = _run("sbatch", "--parsable", *options, script=script, environment=environment)
        except TimeoutError as error:
            raise ConnectionError(f"Slurm does not answer: {error}") from None
        except _RefusedError as error:
            if "job submit limit" in str(error):  # of jobs at once, or what this one asks for is too much
                raise BlockingIOError(f"Slurm takes this job not now: {error}") from None
            if any(words in str(error) for words in _FOR_NOW):
                raise ConnectionError(f"Slurm takes no job now: {error}") from None
            raise FinetunedError(
                f"Slurm refuses the job: {error}",
                where="slurm in config.json",
                remedy="Mend its options or its template (`sinfo` lists the partitions), then retry the job.",
                code="refused_by_slurm",
            ) from None
        if not said.split():
            raise ConnectionError("sbatch gave no number")
        return said.split()[-1].split(";")[0]

    def accounted(self, jobs: Collection[str]) -> dict[str, Entry]:
        """Give what the accounting knows of jobs; nothing where there is none."""
        fields = "--format=JobIDRaw,State,ExitCode,JobName"
        with suppress(OSError, _RefusedError):
            asked = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(jobs)}", fields)
            return parse_accounting(_run(*asked))
        return {}

    def _look(self) -> None:
        with suppress(OSError):
            self._ask()
            self._carry_out_orders()

    def _ask(self) -> None:
        asked_at = time.monotonic()
        fields = "JobID:|,State:|,exit_code:|,Reason:|,Name:|,Comment:|"
        try:
            told = _run("squeue", "--me", "--states=all", "--noheader", f"--Format={fields}")
        except (_RefusedError, OSError) as error:
            if not self._silent:
                _log.warning("Slurm does not answer", why=str(error), then="it is asked again; its jobs are kept")
            self._silent = True
            raise ConnectionError(f"Slurm does not answer: {error}") from None
        entries = parse_queue(told)
        if self._silent:
            self.back_at = time.monotonic()
            _log.info("Slurm answers again")
        self._silent = False
        if lost := [job for job in self._watched.copy() if job not in entries]:
            entries |= {job: entry for job, entry in self.accounted(lost).items() if entry.ended}
        if self.listing is None or self.listing.asked_at < asked_at:
            self.listing = Listing(asked_at, entries)

    def _carry_out_orders(self) -> None:
        assert self.listing
        for job, order in self._orders.copy().items():
            entry = self.listing.entries.get(job)
            if entry is None:  # submitted since
                continue
            if entry.ended:
                self._orders.pop(job, None)
                continue
            with suppress(_RefusedError):  # it has moved on: the next look sees
                if order is Order.KILL:
                    with suppress(_RefusedError):  # it has not begun
                        _run("scancel", "--signal=KILL", "--batch", job)
                    _run("scancel", job)
                elif entry.state == "PENDING":
                    _run("scancel", "--state=PENDING", job)
                elif entry.state == "RUNNING" and job not in self._told:
                    _run("scancel", "--signal=TERM", "--batch", job)
                    self._told.add(job)


class _RefusedError(Exception):
    """A command ended with an error; the message is what it said."""


def _run(*command: str, script: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Run a command of Slurm's and give what it prints. Raises _RefusedError, and OSError: TimeoutError, or it is not
    there.
    """
    try:
        done = subprocess.run(
            command,
            input=script,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # paths are bytes
            timeout=_SLOW,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} said nothing in {_SLOW:.0f} s") from None
    if done.returncode:
        said = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise _RefusedError("; ".join(filter(None, said)) or f"{command[0]} ended with {done.returncode}")
    return done.stdout
