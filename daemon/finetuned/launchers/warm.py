"""The trainer as a fork of a process that has torch loaded (`warm_trainer`; D7 of docs/protocol.md).

Three processes: the daemon, the warm parent (`trainer/warm.py`), and the trainer. The parent forks twice and the one
in the middle ends, so that the kernel gives the trainer to the daemon, which has made itself the subreaper for that
moment. From then on the trainer is the daemon's own child: its exit status is exact, and the parent may die.

What is said: the parent sends `ready` or why it is unfit. The daemon sends a request with the job's lock, the log and
one end of a pair of sockets; through that the trainer says its pid, waits for `go`, and ends if there is no `go`. So
where the daemon gives up, or dies, nothing has touched the job.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from finetuned.events import describe_end
from finetuned.home import JobFolder
from finetuned.launchers import Trainer
from finetuned.launchers.local import ForkedTrainer, lock_for_trainer, spawn

_PATIENCE = 5.0  # seconds until the parent must have forked; it takes some hundredths
_LOADING = 120.0  # seconds until it must have loaded torch; it takes 4, from a cold disk ten times that
_GPUS = "CUDA_VISIBLE_DEVICES"  # read when CUDA is first touched, so each trainer can have its own
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)

_log = structlog.get_logger()


class _NotWarmError(Exception):
    """A trainer cannot be forked; the message says why."""


class _LoadingError(_NotWarmError):
    """Not yet: the parent is at work on it."""


class WarmParent:
    """The parent of trainers: started, asked for forks, started anew when it fails."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket
        self._environment: dict[str, str] = {}
        self._ready = False
        self._unfit = ""
        self._load_by = 0.0

    def open(self, environment: Mapping[str, str]) -> None:
        """Start it if it does not run; it is of use some seconds later."""
        if self._process is not None:
            return
        self._environment = _without_gpus(environment)
        self._ready, self._unfit, self._load_by = False, "", time.monotonic() + _LOADING
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "finetuned.trainer.warm", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=self._environment,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                self._socket.close()
                _log.warning("the warm parent cannot be started", error=str(error), then="trainers start cold")

    def listen(self) -> None:
        """Take note when it says that it has loaded torch, or why it cannot be forked. Does not wait."""
        if self._process is None or self._ready or self._unfit:
            return
        with suppress(OSError):  # nothing said yet, or it has ended
            said = self._socket.recv(4096).decode()
            self._ready, self._unfit = said == "ready", said.removeprefix("ready")
            if self._ready:
                _log.info("warm parent ready", pid=self._process.pid, then="trainers are forked from it")

    def close(self) -> None:
        """End it. A trainer that was forked from it has a session of its own and goes on."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
            self._socket.close()

    def start(self, folder: JobFolder, *, log: Path, environment: Mapping[str, str]) -> Trainer:
        """Fork a trainer; where that cannot be done, say why and start it the plain way. Meets `Start`."""
        with lock_for_trainer(folder) as lock, log.open("ab") as output:
            try:
                return self._fork(folder, lock=lock, output=output.fileno(), environment=environment)
            except _LoadingError as error:
                _log.info("trainer starts cold", why=str(error))
            except (_NotWarmError, OSError, ValueError) as error:
                _log.warning("trainer starts cold", why=f"the warm parent: {error}", then="the parent is started anew")
                self.close()  # before the plain trainer, so that nothing of the parent's is left at work
            trainer = spawn(folder, lock=lock, output=output.fileno(), environment=environment)
        self.open(environment)
        return trainer

    def _fork(self, folder: JobFolder, *, lock: int, output: int, environment: Mapping[str, str]) -> ForkedTrainer:
        self._check(environment)
        gpus = {**os.environ, **environment}.get(_GPUS)
        request = json.dumps({"folder": str(folder.path), "gpus": gpus}).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.settimeout(_PATIENCE)
            with _subreaper():
                with theirs:
                    socket.send_fds(self._socket, [request], [lock, output, theirs.fileno()])
                said = ours.recv(4096).decode()
            if not said.isdecimal():
                raise _NotWarmError(said or "its fork ended before it began")
            if os.waitpid(int(said), os.WNOHANG) != (0, 0):  # also raises if it is not our child
                raise _NotWarmError("its fork ended before it began")
            ours.send(b"go")
        return ForkedTrainer(int(said))

    def _check(self, environment: Mapping[str, str]) -> None:
        """Raise _NotWarmError unless the parent can be asked."""
        if self._process is None:
            raise _NotWarmError("it was not started")
        self.listen()
        if (status := self._process.poll()) is not None:
            raise _NotWarmError(f"it ended: {describe_end(status)}")
        if self._environment != _without_gpus(environment):
            raise _NotWarmError("it was started with another environment")
        if self._unfit:
            raise _NotWarmError(self._unfit)
        if not self._ready and time.monotonic() < self._load_by:
            raise _LoadingError("the warm parent is still loading torch")
        if not self._ready:
            raise _NotWarmError(f"it has not loaded torch in {_LOADING:.0f} s")


def _without_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in {**os.environ, **environment}.items() if name != _GPUS}


@contextmanager
def _subreaper() -> Iterator[None]:
    """Be the one whom orphans below are given to. Only for a moment: others' orphans would stay as zombies."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SUBREAPER, 0, 0, 0, 0)
