"""What is thrown away, and when. Never an input, never an adapter that was published."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from finetuned.config import Config
from finetuned.home import Home
from finetuned.jobs import State
from finetuned.ledger import Ledger
from finetuned.spool.publish import REASON

LARGEST_LOG = 64 * 2**20  # bytes of one job's log
LARGEST_EVENTS = 16 * 2**20  # bytes of events.jsonl on the disk, as far as they are in the ledger
_HEAD, _TAIL = 16 * 2**20, 16 * 2**20  # bytes that are left of a larger one
_BLOCK = 2**20
_DAY = 86400.0
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # modes of fallocate(2)

_log = structlog.get_logger()


def tidy(home: Home, ledger: Ledger, config: Config) -> None:
    """Do what is due once a day. Raises OSError or sqlite3.Error; what is left is done the next time."""
    now = time.time()
    at_work = {job.id for job in ledger.jobs(*(state for state in State if state is not State.FINISHED))}
    logs = [
        *home.logs.glob("daemon_*.log"),
        *home.machinery.glob("state.damaged-*"),
        *(path for path in home.job_logs.glob("*.log") if path.stem not in at_work),
    ]
    for path in _older(logs, now - config.keep_logs_days * _DAY):
        path.unlink(missing_ok=True)
        _log.info("old file removed", path=str(path))
    reasons = _older(home.failed.glob(f"*/{REASON}"), now - config.keep_failed_days * _DAY)
    for folder in (reason.parent for reason in reasons if reason.parent.name not in at_work):
        for kept in (folder / "checkpoints", folder / "adapter"):
            if kept.is_dir() and not kept.is_symlink():
                shutil.rmtree(kept)
                _log.info("what a failed job had computed is removed", path=str(kept), kept="its input and reason")
    ledger.thin(now)


def _older(paths: Iterable[Path], than: float) -> Iterator[Path]:
    for path in paths:
        with suppress(FileNotFoundError):
            if path.lstat().st_mtime < than:
                yield path


def keep_ends(log: Path, largest: int = LARGEST_LOG, *, head: int = _HEAD, tail: int = _TAIL) -> bool:
    """Cut the middle out of a log that is larger; say whether it was.

    Somebody may go on appending: it was opened with O_APPEND, so what he writes next comes behind the tail. Lines that
    he writes in the very moment of the cut may be lost.
    """
    try:
        if log.stat().st_size <= largest:
            return False
        with log.open("r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            source = _next_line(file.fileno(), size - tail)
            target = _next_line(file.fileno(), head)
            mark = f"\n[... {source - target} bytes are left out here ...]\n\n".encode()
            target += os.pwrite(file.fileno(), mark, target)
            while block := os.pread(file.fileno(), _BLOCK, source):  # until nothing new has come
                source += len(block)
                target += os.pwrite(file.fileno(), block, target)
            os.ftruncate(file.fileno(), target)
    except FileNotFoundError:  # a trainer that waits in a cluster's queue has said nothing yet
        return False
    except OSError as error:
        _log.warning("a log cannot be cut", path=str(log), error=str(error))
        return False
    return True


def _next_line(descriptor: int, position: int) -> int:
    """Give where the first line behind a position begins; the position itself where no line ends soon."""
    found = os.pread(descriptor, _BLOCK, position).find(b"\n")
    return position + found + 1


def release(path: Path, upto: int, *, largest: int = LARGEST_EVENTS) -> bool:
    """Give the disk back what a larger file holds before `upto`, which was read already; its length and all behind
    stay.

    False where it is not larger, or the file system cannot do that.
    """
    if not path.exists() or path.stat().st_blocks * 512 <= largest:
        return False
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, 0, upto) == 0:
            return True
        if ctypes.get_errno() not in {errno.EOPNOTSUPP, errno.ENOSYS}:
            _log.warning("disk space not released", path=str(path), error=os.strerror(ctypes.get_errno()))
        return False
    finally:
        os.close(descriptor)
