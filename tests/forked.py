"""Trainers for tests as forks of one process that has torch loaded: a start takes five seconds of a processor less."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import time
from functools import cache
from pathlib import Path
from threading import Lock

from conftest import eventually
from finetuned.home import JobFolder
from finetuned.launchers.local import ForkedTrainer, LocalTrainer
from finetuned.launchers.warm import WarmParent

_CHANGES = "PYTEST_CURRENT_TEST"  # with every test
_one_at_a_time = Lock()


class ForkedProcess:
    """What tests ask of a subprocess.Popen."""

    def __init__(self, trainer: ForkedTrainer) -> None:
        self._trainer = trainer
        self.pid = trainer.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self.returncode = self._trainer.poll()
        return self.returncode

    def wait(self, seconds: float | None = None) -> int:
        deadline = time.monotonic() + (seconds or float("inf"))
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked trainer", seconds or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    folder: JobFolder, *, log: Path, environment: dict[str, str]
) -> ForkedProcess | subprocess.Popen[bytes] | None:
    """Fork a trainer, or start it plainly where that cannot be done. None where the environment is not as it was."""
    with _one_at_a_time:
        shared = _parent(tuple(sorted(environment.items())))
        if _now() != shared.environment:
            return None
        changes = os.environ.pop(_CHANGES, None)
        try:
            trainer = shared.parent.start(folder, log=log, environment=environment)
        finally:
            if changes is not None:
                os.environ[_CHANGES] = changes
    if isinstance(trainer, ForkedTrainer):
        return ForkedProcess(trainer)
    assert isinstance(trainer, LocalTrainer)
    return trainer.process


class _Shared:
    """The parent of all trainers with this environment, as long as the tests run."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = _now()
        self.parent = WarmParent()
        changes = os.environ.pop(_CHANGES, None)
        try:
            self.parent.open(environment)
        finally:
            if changes is not None:
                os.environ[_CHANGES] = changes
        atexit.register(self.parent.close)
        eventually(self._heard, seconds=120, why="torch is loaded")

    def _heard(self) -> bool:
        self.parent.listen()
        return self.parent._ready or bool(self.parent._unfit)


@cache
def _parent(environment: tuple[tuple[str, str], ...]) -> _Shared:
    return _Shared(dict(environment))


def _now() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != _CHANGES}
