"""How many tokens a micro-batch may hold, where the user leaves it to us; and what earlier trainings found out.

Kept in the base directory, one entry for a model, method, length and device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from finetuned.durable import write_file

CPU_TOKENS = 1024  # larger micro-batches fall out of its caches and are no faster (docs/log.md)
FIRST = 2048  # tokens of the first trial on a GPU
_ROOM_TO_DOUBLE = 0.45  # share of memory; twice that leaves a tenth as margin


@dataclass(frozen=True)
class Found:
    """A bound that fitted, and the share of the device's memory that was needed at most."""

    tokens: int
    share: float

    @property
    def next_size(self) -> int:
        """Give the bound to begin the next training with: one size up when memory was left over."""
        return self.tokens * 2 if self.share < _ROOM_TO_DOUBLE else self.tokens


def largest_fitting(first: int, enough: int, attempt: Callable[[int], float | None]) -> tuple[int, str]:
    """Double the bound from `first` while there is room, and give the largest that fitted, and why it is that.

    `attempt` tries a bound: the share of memory that it needed, or None if memory ran out. `enough` tokens are as many
    as the largest step has.
    """
    tokens = first
    while True:
        share = attempt(tokens)
        if share is None:
            return max(1, tokens // 2), f"{tokens} tokens at once did not fit"
        if tokens >= enough:
            return tokens, "the largest step fits at once"
        if share >= _ROOM_TO_DOUBLE:
            return tokens, f"{tokens} tokens take {share:.0%} of memory, twice as many would leave no margin"
        tokens *= 2


def recall(file: Path, key: str) -> Found | None:
    """Give what an earlier training found, if any."""
    try:
        entry = json.loads(file.read_bytes())[key]
        return Found(int(entry["tokens"]), float(entry["share"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(file: Path, key: str, found: Found) -> None:
    """Keep what a training found. A file that cannot be read is begun anew: all in it can be found again."""
    try:
        entries = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        entries = {}
    entries[key] = asdict(found)
    write_file(file, json.dumps(entries, indent=2).encode() + b"\n")
