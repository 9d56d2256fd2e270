"""A real folder and a real ledger in which the real code works, and a look over its shoulder at every change it makes.

`Bench.lay` puts a state on the disk, `Bench.watching` notes each rename, unlink, mkdir, write, fsync and commit in a
`Disk` and calls back after each: there a crash may come.
"""

from __future__ import annotations

import builtins
import io
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import structlog

from crash_disk import ROOT, Disk, Tree
from finetuned.home import Home
from finetuned.ledger import Ledger

NOW = 1_800_000_000.0  # it stands still: states that differ in nothing else are equal
_FIRST_NUMBER = 10**15  # of the inodes in the inbox, far from real ones

Rows = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class State:
    """All that is left after a crash, and how it came about. `treasures` are contents that may never be lost."""

    disk: Disk
    rows: Rows = ()
    orders: Rows = ()
    treasures: frozenset[bytes] = frozenset()
    story: tuple[str, ...] = ()

    def key(self) -> object:
        """Give a value that is equal for states with the same future."""
        return (self.disk.key(), self.rows, self.orders, self.treasures)


class Bench:
    """One base directory in `folder`, which is emptied and laid out anew for every state."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "base")
        self._root = str(self.home.root)
        self._commits: list[tuple[Rows, Rows]] = []
        with patch.object(sqlite3, "connect", _connect(self)):
            self.ledger = Ledger.open(folder / "state.db")
        self._database: sqlite3.Connection = self.ledger._database
        self.columns = [row[1] for row in self._database.execute("PRAGMA table_info(jobs)")]
        # With FULL or more, SQLite syncs its log before a commit returns; with less the last commits may be lost.
        self._commits_are_sure = self._database.execute("PRAGMA synchronous").fetchone()[0] >= 2
        self.disk = Disk()
        self.treasures: frozenset[bytes] = frozenset()
        self.story: list[str] = []
        self._numbers: dict[int, int] = {}  # the inodes of files in the inbox as they are, and as they are shown
        self._written: set[str] = set()
        self._crash: Callable[[], None] | None = None

    def close(self) -> None:
        self.ledger.close()

    # -- states

    def lay(self, state: State) -> None:
        """Put a state on the disk and into the ledger."""
        shutil.rmtree(self._root, ignore_errors=True)
        Path(self._root).mkdir()
        self._numbers = {}
        first: dict[int, str] = {}
        for name, node in state.disk.paths():
            path, content = f"{self._root}/{name}", state.disk.nodes[node].content
            if content is None:
                os.mkdir(path)
                continue
            if node in first:
                os.link(first[node], path)
            else:
                first[node] = path
                _write(path, content)
            if name.startswith("inbox/"):
                os.utime(path, ns=(0, state.disk.nodes[node].mtime_ns))
                self._numbers[os.stat(path).st_ino] = _FIRST_NUMBER + node
        self._database.execute("BEGIN")
        for table, rows in (("jobs", state.rows), ("orders", state.orders)):
            self._database.execute(f"DELETE FROM {table}")
            for row in rows:
                self._database.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(row))})", row)
        self._database.execute("COMMIT")
        self.disk, self.treasures, self.story = state.disk.copy(), state.treasures, list(state.story)
        self._commits = [(state.rows, state.orders)]
        self._written = set()

    def here(self, how: str) -> State:
        """Give the state as it is now."""
        rows, orders = self._tables()
        return State(self.disk.copy(), rows, orders, self.treasures, (*self.story, how))

    def crashes(self, *, ledger_lost: bool = False) -> Iterator[State]:
        """Give every state that a kill or a power loss may leave at this moment."""
        kill = self.here("-- kill -9")
        yield kill
        for lost, disk in self.disk.power_losses():
            for rows, orders in self._commits if not self._commits_are_sure else self._commits[-1:]:
                yield State(disk, rows, orders, self.treasures, (*self.story, f"-- power loss {lost}"))
            if ledger_lost:
                yield State(disk, (), (), self.treasures, (*self.story, f"-- power loss {lost} and the ledger lost"))

    def tree(self) -> Tree:
        """Read what is really there."""
        found: Tree = {}
        waiting = [""]
        while waiting:
            prefix = waiting.pop()
            with os.scandir(f"{self._root}/{prefix}") as entries:
                for entry in entries:
                    path = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        found[path] = None
                        waiting.append(f"{path}/")
                    elif entry.is_symlink():
                        found[path] = _link(os.readlink(entry.path))
                    else:
                        found[path] = _read(entry.path)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Give the ledger's jobs."""
        return [dict(zip(self.columns, row, strict=True)) for row in self._tables()[0]]

    def _tables(self) -> tuple[Rows, Rows]:
        raw = self._database.cursor()
        raw.row_factory = None
        jobs = tuple(raw.execute("SELECT * FROM jobs ORDER BY rowid"))
        return jobs, tuple(raw.execute("SELECT * FROM orders ORDER BY id"))

    # -- looking over the shoulder

    @contextmanager
    def world(self) -> Iterator[None]:
        """Let time stand still, inodes keep their numbers, and changes be noted while `watching`."""
        quiet = structlog.get_config()
        with ExitStack() as stack:
            for module, name, seam in self._seams():
                stack.enter_context(patch.object(module, name, seam))
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
            stack.callback(lambda: structlog.configure(**quiet))
            yield

    @contextmanager
    def watching(self, crash: Callable[[], None]) -> Iterator[None]:
        """Note every change, and call `crash` after each."""
        self._crash = crash
        try:
            crash()
            yield
            self._notice_writes()
        finally:
            self._crash = None
        unseen = sorted(map(str, dict(self.disk.tree().items() ^ self.tree().items())))
        assert not unseen, f"changes that the model has not seen: {unseen}"

    def _seams(self) -> Iterator[tuple[Any, str, Callable]]:
        for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "symlink", "link", "utime", "fsync"):
            yield os, name, self._noting(name, getattr(os, name))
        for module in (os, io, builtins):
            yield module, "open", self._opening(module.open)
        for name in ("stat", "lstat", "fstat"):
            yield os, name, self._stating(getattr(os, name))
        yield time, "time", lambda: NOW
        yield secrets, "token_hex", lambda _: self._unused()

    def _unused(self) -> str:
        """Give the first name that is nowhere in use, so that histories that come to the same have the same names."""
        there = str([*self.disk.tree(), *(row[0] for row in self._tables()[0])])
        return next(token for n in range(10**6) if (token := f"{n:06d}") not in there)

    def _inside(self, path: Any, folder: int | None = None) -> str | None:
        """Give a path in the base directory relative to it, or None for others."""
        path = os.fspath(path)
        if folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return path[len(self._root) + 1 :] if isinstance(path, str) and path.startswith(self._root) else None

    def _noting(self, what: str, real: Callable) -> Callable:
        def seam(*arguments: Any, **options: Any) -> Any:
            if self._crash is None:
                return None if what == "fsync" else real(*arguments, **options)
            self._notice_writes()
            if what == "fsync":
                self._note_fsync(arguments[0])
                return None
            result = real(*arguments, **options)
            self._note(what, *arguments, folder=options.get("dir_fd"), ns=options.get("ns"))
            return result

        return seam

    def _note(self, what: str, source: Any, target: Any = None, *_: Any, folder: int | None, ns: Any) -> None:
        first = self._inside(source if what != "symlink" else target, folder)
        second = self._inside(target) if what in {"rename", "replace", "link"} else None
        if first is None:
            return
        match what:
            case "rename" | "replace":
                self.disk.rename(first, second or "")
            case "link":
                self.disk.link(first, second or "")
            case "unlink" | "remove" | "rmdir":
                self.disk.remove(first)
                self._written.discard(first)
            case "mkdir":
                self.disk.make(first, None)
            case "symlink":
                self.disk.make(first, _link(os.fspath(source)))
                self.disk.sync(self.disk.find(first) or ROOT)  # its content comes with its name
            case "utime":
                self.disk.touch(self.disk.find(first) or ROOT, ns[1])
        if first.endswith(("latest", ".latest.tmp")):  # no part of the promise
            self.disk.make_sure(second or first)
        self._then(f"{what} {first}" + (f" -> {second}" if second else ""))

    def _note_fsync(self, descriptor: int) -> None:
        path = self._inside(os.readlink(f"/proc/self/fd/{descriptor}"))
        node = self.disk.find(path) if path is not None else None
        if node is not None:
            self.disk.sync(node)
            self._then(f"fsync {path or '.'}")

    def _opening(self, real: Callable) -> Callable:
        def seam(file: Any, mode: Any = "r", *arguments: Any, **options: Any) -> Any:
            if self._crash is None or isinstance(file, int):
                return real(file, mode, *arguments, **options)
            writes = mode & (os.O_WRONLY | os.O_RDWR) if isinstance(mode, int) else set(mode) & set("wax+")
            path = self._inside(file) if writes else None
            if path is not None:
                self._notice_writes()
            result = real(file, mode, *arguments, **options)
            if path is not None:
                self._written.add(path)
                if self.disk.find(path) is None:
                    self.disk.make(path, b"")
                    self._then(f"create {path}")
            return result

        return seam

    def _notice_writes(self) -> None:
        for path in sorted(self._written):
            node = self.disk.find(path)
            if node is None:  # renamed by now
                self._written.discard(path)
            elif (content := _read(f"{self._root}/{path}")) != self.disk.nodes[node].content:
                self.disk.write(node, content)
                self._then(f"write {path}")

    def _stating(self, real: Callable) -> Callable:
        def seam(*arguments: Any, **options: Any) -> Any:
            facts = real(*arguments, **options)
            number = self._numbers.get(facts.st_ino)
            return facts if number is None else _Facts(facts, number)

        return seam

    def committed(self) -> None:
        if self._crash is not None:
            self._notice_writes()
            self._commits.append(self._tables())
            states = [dict(zip(self.columns, row, strict=True))["state"] for row in self._commits[-1][0]]
            self._then(f"COMMIT {' '.join(states)}")

    def _then(self, story: str) -> None:
        self.story.append(story)
        if self._crash is not None:
            self._crash()


class _Facts:
    """A file's facts, with the inode's number that it has in the model."""

    def __init__(self, facts: os.stat_result, number: int) -> None:
        self._facts = facts
        self.st_ino = number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._facts, name)


def _connect(bench: Bench) -> Callable[..., sqlite3.Connection]:
    class Watched(sqlite3.Connection):
        changes = 0

        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            cursor = super().execute(*arguments)
            if not self.in_transaction and self.total_changes != self.changes:
                self.changes = self.total_changes
                bench.committed()
            return cursor

    real = sqlite3.connect
    return lambda *arguments, **options: real(*arguments, factory=Watched, **options)


def _link(target: str) -> bytes:
    return b"-> " + os.fsencode(target)


def _write(path: str, content: bytes) -> None:
    if content.startswith(b"-> "):
        os.symlink(content[3:], path)
        return
    descriptor = _OPEN(path, os.O_WRONLY | os.O_CREAT, 0o640)
    os.write(descriptor, content)
    os.close(descriptor)


def _read(path: str) -> bytes:
    if os.path.islink(path):
        return _link(os.readlink(path))
    descriptor = _OPEN(path, os.O_RDONLY)
    content = os.read(descriptor, 2**20)
    os.close(descriptor)
    return content


_OPEN = os.open  # as it is without the seam
