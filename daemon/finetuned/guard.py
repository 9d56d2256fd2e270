"""What must hold before the daemon touches anything: it is alone here, and files can be renamed all the way."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetuned.errors import HomeError
from finetuned.home import Home


@contextmanager
def only_daemon(home: Home) -> Iterator[None]:
    """Hold the base directory's lock. Raises HomeError with the holder's pid if another daemon has it."""
    descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if not _locked_soon(descriptor):
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise HomeError(
                f"another daemon is at work here, pid {holder}",
                where=str(home.root),
                remedy=f"Stop it with `kill {holder}`, or use another base directory.",
                code="already_running",
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def daemon_pid(home: Home) -> int | None:
    """Give the pid of the daemon at work here: who holds the lock wrote it there."""
    try:
        descriptor = os.open(home.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(descriptor, 32, 0) or 0) or None
    finally:
        os.close(descriptor)
    return None


def _locked_soon(descriptor: int) -> bool:
    """Take the lock, patiently: `finetuned status` holds it for a moment when it asks whether a daemon is at work."""
    for _ in range(10):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def check_one_mount(home: Home) -> None:
    """Send a probe the way of every file. Raises HomeError if there is a mount in between.

    Two mounts of one disk have the same device number and still refuse a rename.
    """
    name = f".probe-{os.getpid()}"
    probe = home.inbox / name
    try:
        probe.touch()
        for folder in (home.machinery, home.adapters, home.failed, home.inbox):
            probe = probe.rename(folder / name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            return  # a full or read-only disk, or a folder that may not be written: said where it matters
        raise HomeError(
            "inbox/, .finetuned/, adapters/ and archive/ are not on one mount, so a file cannot be moved in one step",
            where=str(home.root),
            remedy="Mount the base directory as a whole (one ReadWritePaths=, one volume).",
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def check_place(folder: Path) -> None:
    """Make sure, before a night of training, that its result can be put there.

    Raises HomeError if it may not be written to; OSError where that may pass by itself (a full or read-only disk).
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except PermissionError as error:
        raise HomeError(
            "the folder may not be written to, so the result would have no place",
            where=str(folder),
            remedy=f"Let user {os.geteuid()} write there, then drop the file again.",
        ) from error
