"""What must hold before the daemon touches anything: it is alone here, and files can be renamed all the way."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from finetuned.durable import NO_ROOM, make_folder
from finetuned.errors import HomeError
from finetuned.home import Home
from finetuned.lifesigns import boot_id

_LONGEST = 1024  # bytes of the lock


@dataclass(frozen=True)
class Holder:
    """A daemon, as its lock says; earlier ones gave their pid alone."""

    pid: str
    host: str = ""
    boot: str = ""

    def __str__(self) -> str:
        """Give its pid, and on another machine also that."""
        return self.pid + self.where

    @property
    def elsewhere(self) -> bool:
        """Whether it is on another machine, with which this one shares the base directory."""
        return bool(self.boot) and self.boot != boot_id()

    @property
    def where(self) -> str:
        """Say on which other machine it is."""
        return f" on {self.host}" if self.elsewhere else ""


@contextmanager
def only_daemon(home: Home) -> Iterator[None]:
    """Make the folders and hold the base directory's lock.

    Raises HomeError: with the holder if another daemon has it, with the code `no_room` on a full disk.
    """
    with _writing(home):
        for folder in home.folders:
            make_folder(folder)
        descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if not _locked_soon(descriptor):
            holder = _holder(_read(descriptor)[0]) or Holder("unknown")
            raise HomeError(
                f"another daemon is at work here, pid {holder}",
                where=str(home.root),
                remedy=f"Stop it with `kill {holder.pid}`{holder.where}, or use another base directory.",
                code="already_running",
            )
        with _writing(home):
            _write(descriptor, f"{os.getpid()} {os.uname().nodename} {boot_id()}\n")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writing(home: Home) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HomeError(
            f"cannot be written: {error.strerror}",
            where=str(error.filename or home.root),
            remedy="Make room on the disk, or mend its rights.",
            code="no_room" if error.errno in NO_ROOM else "",
        ) from error


def daemon_at_work(home: Home) -> Holder | None:
    """Give the daemon at work here: who holds the lock wrote there who it is."""
    try:
        descriptor = os.open(home.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(_read(descriptor)[0])
    finally:
        os.close(descriptor)
    return None


def daemon_pid(home: Home) -> int | None:
    """Give its pid, which means nothing on another machine."""
    holder = daemon_at_work(home)
    return int(holder.pid) if holder else None


def say_waiting(home: Home, why: str) -> None:
    """Leave behind the daemon's pid why its queue waits; nothing if it does not.

    There, because the lock has its block on the disk already: where that is full, no other file could say so.
    """
    with suppress(OSError):
        descriptor = os.open(home.lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            _write(descriptor, f"{_read(descriptor)[0]}\n{why}")
        finally:
            os.close(descriptor)


def why_paused(home: Home) -> str | None:
    """Say why no job starts until `finetuned resume`, or None if they do."""
    try:
        return home.paused.read_text(encoding="utf-8", errors="backslashreplace").strip()
    except FileNotFoundError:
        return None


def why_no_centre(home: Home) -> str | None:
    """Say why the daemon cannot keep the control centre running, or None if it does, or shall not."""
    try:
        return home.web_down.read_text(encoding="utf-8", errors="backslashreplace").strip() or None
    except OSError:
        return None


def why_waiting(home: Home) -> str | None:
    """Say why the queue waits for better times, or None if it does not."""
    try:
        descriptor = os.open(home.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(descriptor)[1] or None
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> tuple[str, str]:
    """Give who holds it and why it waits, as far as they are there."""
    holder, _, why = os.pread(descriptor, _LONGEST, 0).decode("utf-8", "replace").partition("\n")
    return holder.strip(), why.strip()


def _holder(said: str) -> Holder | None:
    return Holder(*said.split()[:3]) if said else None


def _write(descriptor: int, text: str) -> None:
    content = text.encode("utf-8", "backslashreplace")[:_LONGEST]
    os.pwrite(descriptor, content, 0)  # and only then cut, for on a full disk a block given back is gone
    os.ftruncate(descriptor, len(content))


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
