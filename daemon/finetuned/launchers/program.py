"""What is started as a trainer, wherever that is."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import structlog

from finetuned.errors import FinetunedError
from finetuned.events import Event, EventType
from finetuned.home import JobFolder
from finetuned.lifesigns import TAKES_LOCK

_log = structlog.get_logger()

GHOST_SECONDS = 600.0  # for which a trainer that its engine has lost, or ended, may still hold the job's lock
# After which one that was to be killed is given up, if neither its engine answers nor itself gives a sign of life.
GIVEN_UP_SECONDS = 300.0
_HERE_ONLY = frozenset({"CUDA_VISIBLE_DEVICES", "LD_PRELOAD", "MALLOC_CONF"})  # means nothing on another machine


def command(folder: JobFolder, *, python: str | None = None) -> list[str]:
    """Give the words that start a trainer on a job's folder, with this Python or the daemon's own.

    $FINETUNED_TRAINER may name another program that obeys the contract of docs/architecture.md.
    """
    other = os.environ.get("FINETUNED_TRAINER")
    program = shlex.split(other) if other else [python or sys.executable, "-P", "-m", "finetuned.trainer"]
    return [*program, str(folder.path)]


def environment_elsewhere(environment: Mapping[str, str], attempt: int) -> dict[str, str]:
    """Give what of a trainer's extra environment is for one on another machine, which takes the job's lock itself."""
    given = {name: value for name, value in environment.items() if name not in _HERE_ONLY}
    return {**given, TAKES_LOCK: str(attempt)}


def tell(folder: JobFolder, error: FinetunedError) -> None:
    """Say in the trainer's place why there was none."""
    event = Event(time.time(), EventType.ERROR, error.sentence(), level="error", data=error.as_dict())
    with suppress(OSError), folder.events.open("ab") as file:
        file.write(event.line())


def given_up(folder: JobFolder, engine: str, trainer_id: str, *, look: str) -> str:
    """Log that a trainer is waited for no longer, and what to run to see whether it is there; give why it ended."""
    _log.warning(
        "given up",
        job=folder.path.name,
        id=trainer_id,
        why=f"neither {engine} nor the trainer has given a sign of life for {GIVEN_UP_SECONDS / 60:.0f} minutes",
        then="should it be there all the same, now or later, it sees that nobody wants it and ends",
        look=look,
    )
    return f"given up, as {engine} is silent; it may be there still: {look}"
