"""What is started as a trainer, wherever that is."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping

from finetuned.home import JobFolder
from finetuned.lifesigns import TAKES_LOCK

GHOST_SECONDS = 600.0  # for which a trainer that its engine has lost, or ended, may still hold the job's lock
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
