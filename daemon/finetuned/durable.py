"""Changes on disk that a power loss cannot undo or tear.

A rename is only sure to survive once its folder is fsynced, a file's content once the file is. Every step of the spool
protocol (docs/protocol.md) and every checkpoint goes through these few functions.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

FILE_MODE = 0o640
OTHERS_NOTHING = 0o027  # as umask: files 0640, folders 0750
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # of an OSError that may pass by itself


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make a folder with all that is in it durable, innermost first."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def has_room(folder: Path) -> bool:
    """Whether a little can be written there: 1 MiB, in a new file, on a disk that is not read-only."""
    facts = os.statvfs(folder)
    files_left = facts.f_favail > 0 or facts.f_files == 0  # where they are not counted, there is room for them
    return not facts.f_flag & os.ST_RDONLY and facts.f_bavail * facts.f_frsize >= 2**20 and files_left


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, durably; one that is there already is fine."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o750, exist_ok=True)
    sync_folder(path.parent)


def write_file(path: Path, content: bytes, *, mode: int = FILE_MODE) -> None:
    """Write a file so that its name holds either all of the new content or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename within one file system, durably on both ends.

    The target's folder is synced first: the name may be in both places after a power loss, never in none. Moved again
    then, it is in one: rename(2) would leave both.
    """
    if same_file(source, target):
        source.unlink()
    else:
        source.rename(target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def same_file(path: Path, other: Path) -> bool:
    """Whether both names lead to one file. Links are not followed."""
    try:
        return os.path.samestat(path.lstat(), other.lstat())
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """Give the sha256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
