"""Contamination: which rows of an evaluation the model has seen in training. Texts in, places out; no torch.

A row counts as seen where its question stands in the training data, white space, case and last mark aside, or where at
least so much of what is its own is found in one row there. Its own are those runs of words that do not stand in
several rows of the evaluation: instructions that all of them share tell nothing.

Source: Broder, On the resemblance and containment of documents, 1997; containment, as a training text may be longer.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuned.adapters import read_story
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, rows_of
from finetuned.dataset.rows import Row
from finetuned.durable import sha256_of
from finetuned.home import Home
from finetuned.trainer.data import Source
from finetuned.trainer.near import ALIKE

_SHINGLE = 5  # words
_FEWEST = 8  # shingles of its own that a row must have to be compared by them
_SHARED = 3  # rows of the evaluation in which a shingle is nobody's own
_MARKS = ".,;:!?\"'()[]"
_EVERY = 500  # training rows between two reports of progress

Told = Callable[[float], None]  # share of the training data that was looked at; may raise to end it


@dataclass(frozen=True)
class Seen:
    """Where a row of the evaluation stands in the training data."""

    file: str
    line: int
    share: float  # of its own runs of words; 1 for the same question

    def as_dict(self) -> dict[str, Any]:
        """Give it as it is stored."""
        return asdict(self)


@dataclass(frozen=True)
class Learned:
    """Files that an adapter learned from, itself and those that it builds on; and the adapters whose is not there."""

    files: list[Source]
    missing: list[str]


def learned_from(story: dict[str, Any], *, own: Source | None = None, name: str = "", archive: Path | None) -> Learned:
    """Find what was trained on, by the hashes that `finetuned.json` tells, in the archive. `own` is the newest file
    where that is not there yet.
    """
    links = [*story.get("chain", []), {**story, "adapter": name}]
    files, missing = list[Source](), list[str]()
    for link in links[:-1] if own else links:
        found = _archived(archive, str(link.get("job_id")), link.get("sha256"))
        if found is None:
            missing.append(str(link.get("adapter") or link.get("job_id")))
        else:
            files.append(found)
    return Learned([*files, own] if own else files, missing)


def learned_by(adapter: Path, archive: Path | None) -> Learned:
    """Find what an adapter in a folder was trained on."""
    near = Home(adapter.parent.parent).archive  # of the base directory that it lies in, if it does
    return learned_from(read_story(adapter), name=adapter.name, archive=near if near.is_dir() else archive)


def _archived(archive: Path | None, job: str, sha256: str | None) -> Source | None:
    if archive is None or not sha256 or "/" in job:
        return None
    files = (path for folder in archive.glob(f"*/{job}") for path in sorted(folder.iterdir()) if path.is_file())
    return next((Source(path, path.name) for path in files if sha256_of(path) == sha256), None)


def overlapping(rows: Sequence[Row], files: Iterable[Source], told: Told = lambda _: None) -> dict[int, Seen]:
    """Give the places of rows that stand in the files, each with the place there that is most like it.

    Raises DataError where a file as a whole cannot be read, OSError.
    """
    asked: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        asked.setdefault(_question(row), []).append(place)
    counts, owners = _own_shingles(rows)
    found: dict[int, Seen] = {}
    sources = [RowFile(one.file, name=one.name) for one in files]
    for number, source in enumerate(sources):
        for count, row in enumerate(rows_of(source, Report(), system_prompt=None)):
            if count % _EVERY == 0:
                told((number + source.fraction) / len(sources))
            for place in asked.get(_question(row), ()):
                found.setdefault(place, Seen(source.name, row.line, 1.0))
            hits = Counter(place for shingle in _shingles(row) for place in owners.get(shingle, ()))
            for place, hit in hits.items():
                part = hit / counts[place]
                if part >= ALIKE and (place not in found or part > found[place].share):
                    found[place] = Seen(source.name, row.line, round(part, 3))
    return found


def _own_shingles(rows: Sequence[Row]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Give for each row with enough shingles of its own how many, and for each of these the places it belongs to."""
    all_of = [_shingles(row) for row in rows]
    different = {row.hashes()[0]: shingles for row, shingles in zip(rows, all_of, strict=True)}
    spread = Counter(shingle for shingles in different.values() for shingle in shingles)
    counts, owners = dict[int, int](), dict[int, list[int]]()
    for place, shingles in enumerate(all_of):
        own = [shingle for shingle in shingles if spread[shingle] < _SHARED]
        if len(own) >= _FEWEST:
            counts[place] = len(own)
            for shingle in own:
                owners.setdefault(shingle, []).append(place)
    return counts, owners


def _question(row: Row) -> str:
    """Give what is asked in one way of writing it; the whole where nothing is."""
    turns = [turn for turn in row.messages if turn.role not in {"system", "developer"}]
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
    asked = "\n".join(turn.content for turn in turns[:last]) if turns else row.text or ""
    return " ".join(_plain(asked).split()).rstrip(_MARKS)


def _shingles(row: Row) -> set[int]:
    """Hash every run of words of a row's question and answer."""
    texts = [turn.content for turn in row.messages if turn.role not in {"system", "developer"}]
    words = [
        word for text in texts or [row.text or ""] for part in _plain(text).split() if (word := part.strip(_MARKS))
    ]
    return {hash(tuple(words[place : place + _SHINGLE])) for place in range(len(words) - _SHINGLE + 1)}


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
