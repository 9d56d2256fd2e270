"""Tokenised rows on the disk, read by mapping them into memory: no data set is too large for it, and a retry, a resume
or another job with the same file tokenises nothing again.

A folder of the cache is written under another name and renamed when it is whole. Its name is made from all that
decides what is in it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from finetuned.dataset.report import Report
from finetuned.durable import sync_tree
from finetuned.trainer.tokens import Encoded, Example

_VERSION = 1  # raise it when what is in a folder, or how a row is read, changes
_KEPT_DAYS = 14  # after the last use
_ABANDONED_HOURS = 24  # after which a folder that is no whole one belongs to nobody
_TOKENS, _INDEX, _REPORT = "tokens.int32", "index.npy", "report.json"
LINE, START, LENGTH, TARGETS, IDENTITY, QUESTION = range(6)  # columns of the index, a row an example


class Examples(Sequence[Example]):
    """Tokenised rows that stay on the disk. A token that is not learned is stored as ~token, which is negative."""

    def __init__(self, tokens: NDArray[np.int32], index: NDArray[np.int64], *, max_length: int) -> None:
        """Take those of `index`, cut to a length; rows with nothing left to learn are left out."""
        if len(index) and index[:, LENGTH].max() > max_length:
            index = _cut(tokens, index, max_length)
        self._tokens, self._index = tokens, index

    @cached_property  # a list takes as much as the index, and who only checks needs none
    def lengths(self) -> list[int]:
        """Give how many tokens each row has."""
        found: list[int] = self.column(LENGTH).tolist()
        return found

    @cached_property
    def targets(self) -> list[int]:
        """Give how many tokens of each row are learned."""
        found: list[int] = self.column(TARGETS).tolist()
        return found

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        """Read a row from the disk."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        line, start, length = self._index[place, [LINE, START, LENGTH]].tolist()
        stored = self._tokens[start : start + length]
        supervised = stored >= 0
        return Example(np.where(supervised, stored, ~stored).tolist(), supervised.tolist(), line)

    def column(self, number: int) -> NDArray[np.int64]:
        """Give a column of the index."""
        return self._index[:, number]

    def chosen(self, rows: NDArray[np.bool_]) -> Examples:
        """Give some of the rows."""
        return Examples(self._tokens, self._index[rows], max_length=2**62)

    def cut_to(self, max_length: int) -> Examples:
        """Give the rows at most so long."""
        return Examples(self._tokens, self._index, max_length=max_length)


def _cut(tokens: NDArray[np.int32], index: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    cut = index.copy()
    for row in np.flatnonzero(index[:, LENGTH] > most):
        start = cut[row, START]
        cut[row, LENGTH] = most
        cut[row, TARGETS] = (tokens[start + 1 : start + most] >= 0).sum()
    return cut[cut[:, TARGETS] > 0]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Give how many tokens each row has."""
    return examples.lengths if isinstance(examples, Examples) else [len(example.ids) for example in examples]


def targets_of(examples: Sequence[Example]) -> list[int]:
    """Give how many tokens of each row are learned."""
    return examples.targets if isinstance(examples, Examples) else [example.targets for example in examples]


def cache_key(**decisive: Any) -> str:
    """Make a folder's name of all that decides what is in it."""
    text = json.dumps({"version": _VERSION, **decisive}, sort_keys=True)
    return sha256(text.encode()).hexdigest()[:32]


@contextmanager
def writable(cache: Path) -> Iterator[Path]:
    """Give the cache, or where it belongs to somebody else a folder for now: what is mapped outlives it."""
    cache.mkdir(parents=True, exist_ok=True)
    if os.access(cache, os.W_OK | os.X_OK):
        yield cache
        return
    with TemporaryDirectory(prefix="finetuned-") as folder:
        yield Path(folder)


def load(folder: Path, *, max_length: int) -> tuple[Examples, Report] | None:
    """Open a folder of the cache; None where there is no whole one."""
    try:
        report = Report.from_dict(json.loads((folder / _REPORT).read_bytes()))
        index = np.load(folder / _INDEX)
        size = (folder / _TOKENS).stat().st_size
        tokens = np.memmap(folder / _TOKENS, np.int32, "r") if size else np.empty(0, np.int32)
        if len(index) and index[-1, START] + index[-1, LENGTH] > len(tokens):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):
        os.utime(folder)
    return Examples(tokens, index, max_length=max_length), report


class Writer:
    """Writes a folder of the cache."""

    def __init__(self, folder: Path) -> None:
        """Begin. Raises OSError."""
        self._folder = folder
        self._staged = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(self._staged, ignore_errors=True)
        self._staged.mkdir()
        self._file = (self._staged / _TOKENS).open("wb", buffering=2**20)
        self._index: list[NDArray[np.int64]] = []
        self._rows: list[tuple[int, ...]] = []
        self._at = 0

    def add(self, encoded: Encoded, hashes: tuple[int, int]) -> None:
        """Append a row."""
        ids, supervised = encoded.ids, encoded.supervised
        self._file.write(np.where(supervised, ids, ~ids).tobytes())
        self._rows.append((encoded.row.line, self._at, len(ids), encoded.targets, *hashes))
        self._at += len(ids)
        if len(self._rows) == 2**10:  # an array takes a tenth of the memory
            self._pack()

    def _pack(self) -> None:
        self._index.append(np.array(self._rows, np.int64).reshape(-1, 6))
        self._rows = []

    def index(self) -> NDArray[np.int64]:
        """Give the index so far."""
        self._pack()
        self._index = [np.concatenate(self._index)]
        return self._index[0]

    def finish(self, report: Report) -> Path:
        """Make the folder appear, and give where it is. Raises OSError."""
        self._file.close()
        np.save(self._staged / _INDEX, self.index())
        (self._staged / _REPORT).write_text(json.dumps(report.as_dict()))
        sync_tree(self._staged)
        for _ in range(2):
            try:
                self._staged.rename(self._folder)
            except OSError:  # another process was faster, or a damaged one lies there
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                return self._folder
        return self._staged  # what lies there is somebody else's

    def abandon(self) -> None:
        """Leave nothing behind that has not appeared; what is mapped already can still be read."""
        self._file.close()
        shutil.rmtree(self._staged, ignore_errors=True)


def prune(cache: Path) -> None:
    """Remove what has not been used for long."""
    now = time.time()
    with suppress(OSError):
        for folder in cache.iterdir():
            most = _ABANDONED_HOURS * 3600 if folder.name.startswith(".") else _KEPT_DAYS * 86400
            if now - folder.stat().st_mtime > most:
                shutil.rmtree(folder, ignore_errors=True)
