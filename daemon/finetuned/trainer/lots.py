"""Lots that tokens are drawn by: what comes of a row follows from its lots and the model, not from the rows beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from transformers import LogitsProcessor


def urn(*key: object) -> torch.Generator:
    """Give what a row's lots are drawn from. The key, of plain values, says all that they follow from."""
    name = blake2b(repr(key).encode("utf-8", "backslashreplace"), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(name))


def cast(keys: Sequence[tuple[object, ...]], count: int) -> torch.Tensor:
    """Cast so many lots for each row's key: [rows, count], from 0 to 1."""
    return torch.stack([torch.rand(count, generator=urn(*key)) for key in keys])


class ByLot(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Leaves one token of each row: the first whose share, added to those before it, is above the row's lot.

    lots: [rows, most tokens], from 0 to 1; a negative one takes the most probable token.
    """

    def __init__(self, lots: torch.Tensor, temperature: float) -> None:
        self._lots = iter(lots.unbind(1))
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002, D102, as it is called
        lot = next(self._lots).double().unsqueeze(1)
        shares = torch.softmax(scores.double() / self._temperature, dim=1).cumsum(1)
        drawn = (shares <= lot).sum(1).clamp(max=scores.shape[1] - 1)
        chosen = torch.where(lot[:, 0] < 0, scores.argmax(1), drawn)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)


class AsTold(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Leaves the most probable token of each row, as one of several processes finds it and tells the others."""

    def __init__(self, tell: Callable[[list[int]], list[int]]) -> None:
        self._tell = tell

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002, D102, as it is called
        chosen = torch.tensor(self._tell(scores.argmax(1).tolist()), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)
