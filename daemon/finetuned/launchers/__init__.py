"""Start, poll and stop a trainer. All else goes through the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from finetuned.home import JobFolder


class Trainer(Protocol):
    """A running trainer, whoever started it."""

    @property
    def pid(self) -> int:
        """Its process id, which is also its session's."""

    def poll(self) -> int | None:
        """Give its exit status as subprocess does (minus the number of a signal), or None while it runs."""

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end."""

    def kill(self) -> None:
        """End it and its children at once."""


class Start(Protocol):
    """How a trainer is started. Raises OSError, BlockingIOError if one runs on this folder already."""

    def __call__(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str]) -> Trainer:
        """Start one on a job's folder, its output appended to `log`."""
