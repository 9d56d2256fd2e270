"""What a trainer leaves in its job's folder so that a daemon that is not its parent knows it: the lock that it holds,
what it signed there, and at its end its exit code.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetuned import __version__
from finetuned.durable import write_file
from finetuned.home import JobFolder

# Set to the attempt for a trainer whose launcher could not hand it the job's lock.
TAKES_LOCK = "FINETUNED_TAKES_LOCK"


@dataclass(frozen=True)
class Signature:
    """Who holds a job's lock, as it says itself."""

    pid: int
    attempt: int
    version: str  # of finetuned


def sign(folder: JobFolder, attempt: int = 0) -> None:
    """Say in the lock, which this process holds, who it is: first to be found at all, then with its attempt."""
    folder.lock.write_text(f"{os.getpid()} {attempt} {__version__}\n", encoding="utf-8")


def signed(folder: JobFolder) -> Signature | None:
    """Read who signed last; None if nobody did. Whoever that was may have ended."""
    try:
        pid, attempt, version = folder.lock.read_text(encoding="utf-8").split()
        return Signature(int(pid), int(attempt), version)
    except (OSError, ValueError):
        return None


def locked(folder: JobFolder) -> bool:
    """Whether a trainer of this job is alive: it holds the lock, whatever became of the daemon."""
    try:
        # For writing, as NFS locks nothing for us alone that is open for reading.
        descriptor = os.open(folder.lock, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def take_lock(folder: JobFolder) -> bool:
    """Take the job's lock for as long as this process lives; say whether it could be had. Raises OSError."""
    descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)  # never closed
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    return True


class Silence:
    """For how long a trainer has shown no sign of life, as far as somebody looked."""

    def __init__(self, folder: JobFolder) -> None:
        """Begin to look."""
        self._folder = folder
        self._said: tuple[int, int] | None = None
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Look again: a lock that is held is a sign, and so is each new event."""
        said = None
        with suppress(OSError):
            facts = self._folder.events.stat()
            said = facts.st_size, facts.st_mtime_ns
        if said != self._said or locked(self._folder):
            self._said, self._since = said, time.monotonic()
        return time.monotonic() - self._since


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open. Its command line would not do: a forked trainer has that of its parent.

    Raises OSError if there is no such process.
    """
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            if descriptor.samefile(path):
                return True
    return False


def boot_id() -> str:
    """Name this run of the machine: a pid means nothing after a restart, nor on another machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def leave_exit_code(folder: JobFolder, attempt: int, code: int) -> None:
    """Say as the last act how an attempt ends. What does not get so far was killed."""
    with suppress(OSError):  # no room on the disk: the parent knows it all the same
        write_file(folder.exit_code(attempt), f"{code}\n".encode())


def exit_code(folder: JobFolder, attempt: int) -> int | None:
    """Read what the trainer of an attempt said of its end; None if it said nothing."""
    try:
        return int(folder.exit_code(attempt).read_bytes())
    except (OSError, ValueError):
        return None
