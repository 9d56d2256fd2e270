"""From tokenised rows to micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from finetuned.trainer.attention import FlatRows
from finetuned.trainer.tokens import Example

_WORTH_SHARING = 8  # tokens


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Flat: one row of all tokens with `flat_rows`; padded: `attention_mask` instead.

    `positions` [n] index the flattened hidden states whose next token is to be predicted, `targets` [n] are these.
    """

    inputs: dict[str, Any]
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: int  # real ones, never padding
    examples: Sequence[Example] = ()  # the rows that it was made of

    @property
    def starts(self) -> list[int]:
        """Where rows begin among the flattened hidden states; one where they share their beginning."""
        flat = self.inputs.get("flat_rows")
        if flat is not None:
            return [0] if flat.shared else list(flat.bounds[:-1])
        rows, longest = self.inputs["input_ids"].shape
        return list(range(0, rows * longest, longest))

    def to(self, device: torch.device) -> Batch:
        """Move it to a device."""
        inputs = {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()
        }
        return replace(self, inputs=inputs, positions=self.positions.to(device), targets=self.targets.to(device))


def led(example: Example, places: int) -> Example:
    """Put places for a soft prompt in front of a row: token 0, which stands for nothing."""
    return replace(example, ids=[0] * places + example.ids, supervised=[False] * places + example.supervised)


def collate_flat(examples: Sequence[Example], *, share: bool = True) -> Batch:
    """Put rows end to end. What all of them begin with (a system prompt, say) is put there once if `share` says so."""
    shared = _common_start([e.ids for e in examples]) if share and len(examples) > 1 else 0
    bounds = tuple(accumulate((len(e.ids) - shared for e in examples), initial=shared))
    tokens = [*examples[0].ids[:shared], *(token for e in examples for token in e.ids[shared:])]
    places = [torch.arange(shared), *(torch.arange(shared, len(e.ids)) for e in examples)]
    inputs = {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.cat(places).unsqueeze(0),
        "flat_rows": FlatRows(shared, bounds),
    }

    def place(row: int, index: int) -> int:
        return index if index < shared else bounds[row] + index - shared

    return _batch(inputs, examples, place)


def _common_start(rows: Sequence[list[int]]) -> int:
    """Give how many tokens all rows begin with. Each keeps one of its own, and a few are not worth their trouble."""
    first, last = min(rows), max(rows)  # all others lie between them
    most = min(len(row) for row in rows) - 1
    common = next((i for i in range(most) if first[i] != last[i]), most)
    return common if common >= _WORTH_SHARING else 0


def collate_padded(examples: Sequence[Example]) -> Batch:
    """Put rows side by side, padded at the right."""
    longest = max(len(e.ids) for e in examples)
    lengths = torch.tensor([len(e.ids) for e in examples]).unsqueeze(1)
    inputs = {
        "input_ids": torch.tensor([e.ids + [0] * (longest - len(e.ids)) for e in examples]),
        "attention_mask": (torch.arange(longest).unsqueeze(0) < lengths).long(),
    }
    return _batch(inputs, examples, lambda row, index: row * longest + index)


def _batch(inputs: dict[str, Any], examples: Sequence[Example], place: Callable[[int, int], int]) -> Batch:
    """Say where the token before each supervised one is; `place` gives the position of a row's token."""
    pairs = [
        (place(row, index - 1), e.ids[index])
        for row, e in enumerate(examples)
        for index in range(1, len(e.ids))
        if e.supervised[index]
    ]
    positions, targets = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return Batch(inputs, positions, targets, tokens=sum(len(e.ids) for e in examples), examples=examples)
