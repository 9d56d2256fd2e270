"""The trainer as a subprocess on this machine (D7 of docs/protocol.md)."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetuned.home import JobFolder
from finetuned.launchers import Trainer
from finetuned.launchers.program import command

_PATIENCE = 1.0  # seconds

# glibc keeps freed memory in its own address space, so that after a failed allocation a smaller one fails too;
# jemalloc gives it back when the trainer asks for that, and until then keeps it: pages given back after every step and
# faulted in again at the next cost a third of the time (docs/log.md).
_JEMALLOC = {"MALLOC_CONF": "retain:false,dirty_decay_ms:-1,muzzy_decay_ms:0"}


@dataclass
class LocalTrainer:
    """A running trainer."""

    process: subprocess.Popen[bytes]
    _waited: bool = False
    id = taken = waits = ""

    @property
    def pid(self) -> int:
        """Give its process id, which is also its session's."""
        return self.process.pid

    def poll(self) -> int | None:
        """Give its exit status as subprocess does (minus the number of a signal), or None while it runs."""
        return self.process.poll()

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its children at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self._waited = self._waited or _wait_a_moment(self)


@dataclass
class ForkedTrainer:
    """A running trainer that another process forked and the kernel gave to this one as its child (`warm.py`)."""

    pid: int
    _status: int | None = None
    _waited: bool = False
    id = taken = waits = ""

    def poll(self) -> int | None:
        """Give its exit status as subprocess does, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def ask_to_stop(self) -> None:
        """Ask for a checkpoint and an end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its children at once."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._waited = self._waited or _wait_a_moment(self)


def _wait_a_moment(trainer: Trainer) -> bool:
    """Wait for a killed trainer's end, but once: one that hangs in the driver of a GPU that is gone stays."""
    deadline = time.monotonic() + _PATIENCE
    while trainer.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return True


def start(folder: JobFolder, *, log: Path, environment: Mapping[str, str]) -> LocalTrainer:
    """Start a trainer on a job's folder, its output appended to `log`. Raises OSError, BlockingIOError if one runs
    already.
    """
    with lock_for_trainer(folder) as lock, log.open("ab") as output:
        return spawn(folder, lock=lock, output=output.fileno(), environment=environment)


@contextmanager
def lock_for_trainer(folder: JobFolder) -> Iterator[int]:
    """Take the job's lock for a trainer to inherit: it is held exactly as long as that lives, even if the daemon dies.

    Raises BlockingIOError if a trainer has it.
    """
    lock = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    finally:
        os.close(lock)


def spawn(folder: JobFolder, *, lock: int, output: int, environment: Mapping[str, str]) -> LocalTrainer:
    """Start the process. It keeps `lock` and writes to `output`, a file: a pipe that nobody drains would stop the
    training.
    """
    process = subprocess.Popen(
        command(folder),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        pass_fds=(lock,),
        start_new_session=True,
    )
    return LocalTrainer(process)


def trainer_environment(*given: str | None) -> tuple[dict[str, str], str]:
    """Give the trainer's extra environment and why: GPUs by their UUIDs (None: no GPU), or jemalloc on a CPU."""
    gpus = [gpu for gpu in given if gpu]
    quiet = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # weights come from the model's own authors, or not at all
    }
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and (chosen is None or {*gpus} <= {*chosen.split(",")}):
        names = ",".join(gpus)
        return {**quiet, "CUDA_VISIBLE_DEVICES": names}, f"on GPU{'s' if len(gpus) > 1 else ''} {names}"
    if chosen:
        return quiet, f"on GPU {chosen}, as CUDA_VISIBLE_DEVICES says"
    library = find_jemalloc()
    if library is None:
        return quiet, "on the CPU, with glibc's allocator (libjemalloc2 gives more memory back after an out-of-memory)"
    preload = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    return {**quiet, **_JEMALLOC, "LD_PRELOAD": preload}, "on the CPU, with jemalloc, which gives freed memory back"


@cache
def find_jemalloc(usr: Path = Path("/usr")) -> Path | None:
    """Find the library without loading it into this process."""
    folders = ("lib/*", "lib", "lib64", "local/lib")
    return next((path for folder in folders for path in usr.glob(f"{folder}/libjemalloc.so.2")), None)
