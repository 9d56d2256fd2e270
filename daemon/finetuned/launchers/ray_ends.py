"""Pure: what a state of a Ray job means for the attempt that ran in it."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetuned.errors import FinetunedError
from finetuned.events import ExitCode

NOT_SHARED = 72  # exit code of our entry point where the node has no such folder, as of sysexits.h
WORKER_LOST = 74  # likewise, where Ray Train lost one of the workers
_NOT_FOUND = frozenset({126, 127})  # the shell's, where it cannot run a program
_SIGNALS_IN_SHELL = range(129, 160)  # exit codes of a shell, and of our entry point, whose program a signal ended
_GOES_ON = frozenset({"PENDING", "RUNNING"})
_NO_MEMORY = "running low on memory"  # what Ray's memory monitor says as it ends a process
_NEVER_BEGAN = frozenset(
    {"RUNTIME_ENV_SETUP_FAILURE", "JOB_SUPERVISOR_ACTOR_START_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR"}
)
_NO_TURN = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
_SHOWN = 300  # characters of what Ray says


@dataclass(frozen=True)
class End:
    """How an attempt ended, as far as Ray knows it."""

    status: int  # as subprocess gives it
    taken: str = ""  # why Ray, or somebody through it, ended the attempt
    error: FinetunedError | None = None  # why no trainer began


def end_of(info: Mapping[str, Any] | None) -> End | None:
    """Say what Ray's description of a job means, None while the job goes on. No description: Ray knows it no more."""
    if info is None:
        return End(-signal.SIGKILL, taken="Ray knows the job no more; the cluster was started anew, most likely")
    state, code = info["status"], info.get("driver_exit_code")
    kind, said = str(info.get("error_type")), str(info.get("message"))
    if state in _GOES_ON:
        return None
    if state == "SUCCEEDED":
        return End(0)
    if state == "STOPPED":
        return End(-signal.SIGTERM, taken="somebody stopped it through Ray")
    if isinstance(code, int):
        return _end_of_program(code)
    if kind in _NEVER_BEGAN:
        return End(ExitCode.TEMPORARY, error=_no_start(f"Ray could not start the trainer: {_first_line(said)}"))
    if _NO_MEMORY in said and info.get("driver_node_id"):
        return End(-signal.SIGKILL)
    return End(-signal.SIGKILL, taken=f"Ray lost it: {_first_line(said)}")


def waits_for(info: Mapping[str, Any] | None) -> str:
    """Say in Ray's words for what a job waits, or waited until Ray gave it up. Empty of one whose turn has come."""
    if info is None or (info["status"] != "PENDING" and info.get("error_type") != _NO_TURN):
        return ""
    return _first_line(str(info.get("message") or "")) or str(info["status"])


def _end_of_program(code: int) -> End:
    if code == NOT_SHARED:
        what = "the node of Ray that was to run the job does not see the job's folder"
        remedy = "The base directory must be on storage that all nodes have at the same path."
        return End(ExitCode.TEMPORARY, error=_no_start(what, remedy))
    if code in _NOT_FOUND:
        what = f"the node of Ray that was to run the job cannot run its Python (exit code {code})"
        return End(ExitCode.TEMPORARY, error=_no_start(what, "Name one that all nodes have as ray.python."))
    if code == WORKER_LOST:
        return End(-signal.SIGKILL, taken="Ray Train lost one of its workers")
    return End(128 - code if code in _SIGNALS_IN_SHELL and code != ExitCode.STOPPED else code)


def _no_start(what: str, remedy: str = "Mend `ray` in config.json.") -> FinetunedError:
    return FinetunedError(what, where="ray", remedy=remedy, code="ray_start")


def _first_line(text: str) -> str:
    return re.split(r"[\n\t]", text.strip(), maxsplit=1)[0][:_SHOWN]
