"""Which files of the inbox are ready. The listing is the truth; nothing here moves a file.

A file is ready when it has been quiet for a while, nobody has it open for writing, and its last line is whole, and so
is the held-out file beside it. What will never be ready is named once, with what to do about it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import pwd
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from finetuned.config import Config
from finetuned.spool.inbox import Complaint, Found, list_inbox

_NO_LEASE_FACTOR = 2.5  # a longer quiet window where the kernel cannot say whether somebody writes
_BUSY_SECONDS = 0.5  # look again so soon after a file that somebody has open
_AT_ONCE = 1000  # files; of very many, each would take a kilobyte for as long as it waits
_PACKED = struct.Struct("=QQQqq")
_LAST_LINE_LIMIT = 16 * 2**20  # bytes; a longer last line is judged by the trainer


@dataclass(frozen=True)
class Look:
    """What one look into the inbox found. `again` is in seconds from now, None if only a change can help.

    Of ready and of waiting files at most _AT_ONCE; the others come with later looks.
    """

    ready: list[Found]
    complaints: list[Complaint]
    waiting: list[Path]
    again: float | None


@dataclass(slots=True)
class _Seen:
    state: bytes  # device, inode, size, mtime, ctime; packed, as there may be very many files
    since: float  # when this state was first seen
    look: int  # the number of the last look that saw it


@dataclass
class Settler:
    """Remembers what the inbox looked like, to know what has been quiet for how long."""

    inbox: Path
    _looks: int = 0
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _complained: dict[Path, str] = field(default_factory=dict)

    def look(self, config: Config, now: float) -> Look:
        """List the inbox and say what is ready. `now` is in seconds on a clock that never jumps."""
        ready: list[Found] = []
        waiting: list[Path] = []
        complaints: list[Complaint] = []
        again = math.inf
        self._looks += 1
        for entry in list_inbox(self.inbox, config.profiles):
            verdict = entry if isinstance(entry, Complaint) else self._judge(entry, config, now)
            if isinstance(verdict, Complaint):
                complaints.append(verdict)
            elif verdict > 0:
                again = min(again, verdict)
                if len(waiting) < _AT_ONCE:
                    waiting.append(entry.path)
            elif len(ready) == _AT_ONCE:
                again = 0.01
            elif isinstance(entry, Found):
                ready.append(entry)
        self._seen = {path: seen for path, seen in self._seen.items() if seen.look == self._looks}
        fresh = [c for c in complaints if self._complained.get(c.path) != c.what]
        self._complained = {c.path: c.what for c in complaints}
        return Look(ready, fresh, waiting, None if again == math.inf else again)

    def is_as_seen(self, found: Found) -> bool:
        """Whether a file, and its held-out file, still is what the last look found."""
        try:
            return all(
                self._seen[str(path)].state == _state(path.lstat()) for path in (found.path, found.held_out) if path
            )
        except (KeyError, OSError):
            return False

    def _judge(self, found: Found, config: Config, now: float) -> float | Complaint:
        """Give 0 if the file is ready, else the seconds after which to look again, or a complaint."""
        longest = self._override_left(found.override, config, now)
        for path in filter(None, (found.path, found.held_out)):
            left = self._left(path, config, now)
            if isinstance(left, Complaint):
                return left
            longest = max(longest, left)
        return longest

    def _left(self, path: Path, config: Config, now: float) -> float | Complaint:
        """Seconds until a file with data is whole and quiet, or a complaint."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return _BUSY_SECONDS  # taken back between listing and opening
        except OSError as error:
            return _unopened(path, error)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                return Complaint(path, "is not a regular file", "Put the file itself here.")
            quiet = self._quiet(path, facts, now)
            if facts.st_size == 0:
                return max(0.0, config.empty_seconds - quiet)
            left = _left_to_wait(descriptor, quiet, config.quiet_seconds)
            plain = path.suffix.lower() == ".jsonl"
            if left == 0 and plain and not _last_line_whole(descriptor, facts.st_size):
                left = max(0.0, config.truncated_seconds - quiet)
        except OSError as error:
            return Complaint(path, f"cannot be read: {error.strerror}", "Look at the disk with `dmesg`.")
        else:
            return left
        finally:
            os.close(descriptor)

    def _override_left(self, path: Path, config: Config, now: float) -> float:
        """Seconds until the settings beside a file that is ready are so too; 0 if there are none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # none, or none that can be read: reading it says so
            return 0.0
        try:
            return _left_to_wait(descriptor, self._quiet(path, os.fstat(descriptor), now), config.quiet_seconds)
        finally:
            os.close(descriptor)

    def _quiet(self, path: Path, facts: os.stat_result, now: float) -> float:
        """Seconds for which the file has looked as it does."""
        state = _state(facts)
        seen = self._seen.get(str(path))
        if seen is None or seen.state != state:
            seen = self._seen[str(path)] = _Seen(state, now, self._looks)
        seen.look = self._looks
        return now - seen.since


def _state(facts: os.stat_result) -> bytes:
    return _PACKED.pack(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def _left_to_wait(descriptor: int, quiet: float, window: float) -> float:
    """Seconds that a file which has been quiet so long has to wait yet: for its window, or for who writes to it."""
    if quiet < window:
        return window - quiet
    writer = has_writer(descriptor)
    if writer is None:
        return max(0.0, window * _NO_LEASE_FACTOR - quiet)
    return _BUSY_SECONDS if writer else 0.0


def _unopened(path: Path, error: OSError) -> Complaint:
    if error.errno == errno.ELOOP:
        return Complaint(path, "is a symbolic link", "Put the file itself here, or a hard link to it.")
    if error.errno not in {errno.EACCES, errno.EPERM}:
        return Complaint(path, f"cannot be opened: {error.strerror}", "It is tried again at the next look.")
    facts = path.lstat()
    try:
        owner = pwd.getpwuid(facts.st_uid).pw_name
    except KeyError:
        owner = str(facts.st_uid)
    return Complaint(
        path,
        f"may not be read: owner {owner}, mode {stat.S_IMODE(facts.st_mode):04o}",
        f"`chmod a+r {path}`; it is tried again at every look.",
    )


def has_writer(descriptor: int) -> bool | None:
    """Ask the kernel whether anybody has the file open for writing; None if it cannot say.

    A read lease is refused with EAGAIN while a writable descriptor or mapping exists, also after a rename. On NFS it is
    refused wherever the server has not lent out the file, whoever writes.
    """
    if is_nfs(os.fstat(descriptor).st_dev):
        return None
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


@cache
def is_nfs(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the file system with this device number is on another machine, by NFS."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
            facts, _, kind = line.partition(" - ")
            if facts.split()[2] == number:
                return kind.startswith("nfs")
    return False


def _last_line_whole(descriptor: int, size: int) -> bool:
    """Whether the last line ends in a newline, or is JSON without one."""
    if os.pread(descriptor, 1, size - 1) == b"\n":
        return True
    start = max(0, size - _LAST_LINE_LIMIT)
    tail = os.pread(descriptor, size - start, start)
    line = tail[tail.rfind(b"\n") + 1 :]
    if len(line) == len(tail) and start > 0:
        return True
    try:
        json.loads(line)
    except RecursionError:  # the trainer says what is wrong with it
        return True
    except ValueError:
        return False
    return True
