"""Start, poll and stop a trainer. All else goes through the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetuned.home import JobFolder


class Trainer(Protocol):
    """A running trainer, whoever started it."""

    @property
    def pid(self) -> int | None:
        """Its process id on this machine, which is also its session's; None on another machine."""

    @property
    def id(self) -> str:
        """What an engine calls it, so that a later daemon finds it again; empty on this machine."""

    @property
    def taken(self) -> str:
        """Why somebody else ended it, a preemption say, once `poll` has said that it ended; empty otherwise."""

    @property
    def waits(self) -> str:
        """Why it does not run yet, in its engine's words; empty once it does, and on this machine.

        One that has ended and still says so was given up before its turn came.
        """

    def poll(self) -> int | None:
        """Give its exit status as subprocess does (minus the number of a signal), or None while it runs."""

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end."""

    def kill(self) -> None:
        """End it and its children at once."""


class Launcher(Protocol):
    """An engine that runs trainers on other machines, which see the base directory at the same path.

    What cannot be started now (the engine does not answer) raises OSError, what never can be FinetunedError. Neither
    waits for an answer longer than a second or two.
    """

    @property
    def back_at(self) -> float:
        """When its engine, after it had been silent, answered again last, as time.monotonic() gives it; else 0."""

    def start(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str], needs: Needs) -> Trainer:
        """Submit a trainer on a job's folder, its output appended to `log`."""

    def find(self, folder: JobFolder, *, trainer_id: str, attempt: int) -> Trainer | None:
        """Give the trainer that an earlier daemon submitted; None if the engine knows none by this id any more.

        While the engine does not answer it is taken to know it.
        """


@dataclass(frozen=True)
class Needs:
    """What a trainer is to have."""

    job: str  # the job's id, for the engine's own lists
    attempt: int
    gpus: int


class Start(Protocol):
    """How a trainer is started. Raises OSError, BlockingIOError if one runs on this folder already."""

    def __call__(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str]) -> Trainer:
        """Start one on a job's folder, its output appended to `log`."""
