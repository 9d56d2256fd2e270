"""From chat rows to tokens, and from tokens to micro-batches.

A chat is rendered (`chat.py`) and tokenised as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from finetuned.dataset.checks import Problem, Row
from finetuned.dataset.report import Report
from finetuned.trainer.attention import FlatRows
from finetuned.trainer.chat import render_row, takes_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1024  # rows tokenised at once
_WORTH_SHARING = 8  # tokens


@dataclass(frozen=True)
class Example:
    """A tokenised row. `supervised[i]` says whether token i is to be learned."""

    ids: list[int]
    supervised: list[bool]
    row: Row

    @property
    def targets(self) -> int:
        """Tokens that are learned. The first token of a row has nothing before it to predict it from."""
        return sum(self.supervised[1:])


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Flat: one row of all tokens with `flat_rows`; padded: `attention_mask` instead.

    `positions` [n] index the flattened hidden states whose next token is to be predicted, `targets` [n] are these.
    """

    inputs: dict[str, Any]
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: int  # real ones, never padding

    def to(self, device: torch.device) -> Batch:
        """Move it to a device."""
        inputs = {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()
        }
        return Batch(inputs, self.positions.to(device), self.targets.to(device), self.tokens)


def tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Iterator[Example | tuple[Row, Problem]]:
    """Render and tokenise rows in order; a row that cannot be learned from comes back with its problem."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    parts = takes_parts(tokenizer)
    for start in range(0, len(rows), _BATCH):
        rendered = [render_row(row, tokenizer, parts=parts) for row in rows[start : start + _BATCH]]
        encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
        for index, (text, spans) in enumerate(rendered):
            row = rows[start + index]
            if isinstance(spans, Problem):
                yield row, spans
                continue
            ids = encoded["input_ids"][index]
            mask = _supervised(text, ids, encoded["offset_mapping"][index], spans, special)
            example = Example(ids[:max_length], mask[:max_length], row)
            yield example if example.targets else (row, Problem("no_supervised_tokens"))


def _supervised(
    text: str, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]], special: set[int]
) -> list[bool]:
    """Mark the tokens of each span, and the end-of-turn token behind it, without which the model would never stop."""
    mask = [False] * len(ids)
    token = 0
    for start, end in spans:
        while token < len(ids) and offsets[token][1] <= start:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            mask[token] = True
            token += 1
        behind = token
        while behind < len(ids) and ids[behind] not in special and not text[slice(*offsets[behind])].strip():
            behind += 1
        if behind < len(ids) and ids[behind] in special:
            mask[token : behind + 1] = [True] * (behind + 1 - token)
            token = behind + 1
    return mask


def examples_of(
    rows: Sequence[Row], report: Report, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[Example]:
    """Tokenise rows; those that cannot be learned from go into the report instead."""
    examples = []
    for result in tokenise(rows, tokenizer, max_length=max_length):
        if isinstance(result, Example):
            examples.append(result)
        else:
            report.add(result[0].line, [result[1]])
    return examples


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
    return Batch(inputs, positions, targets, tokens=sum(len(e.ids) for e in examples))
