"""Attention over flat micro-batches: rows end to end, no padding, and no row sees another. What all rows begin with
stands there once.

The model is used as it is: transformers hands extra arguments of its forward down to the attention function that the
configuration names. What a function here cannot honour it refuses, and the next one is tried (`layout.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAT, VARLEN = "finetuned_flat", "finetuned_varlen"
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")
_SHORT = 128  # keys; up to here a CPU is faster with plain products than with its flash kernel (docs/log.md)
_ALIKE = 7 / 8  # rows that long of their group's longest share one call; the rest is padding


class FlatRows(NamedTuple):
    """Where rows lie in a flat micro-batch: tokens 0 to `shared` begin every row, row i goes on with tokens bounds[i]
    to bounds[i + 1].
    """

    shared: int
    bounds: tuple[int, ...]

    def parts(self) -> list[tuple[int, int, int]]:
        """Give the stretches that attend alike: start, end and how many shared tokens come before."""
        own = [(start, end, self.shared) for start, end in pairwise(self.bounds)]
        return [(0, self.shared, 0), *own] if self.shared else own


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flat_rows: FlatRows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row, for every device: rows of like length in one call.

    query: [1, heads, tokens, width]; key, value: [1, key heads, tokens, width]. Returns [1, tokens, heads, width].
    Raises NotImplementedError for what it cannot honour.
    """
    _refuse(module, attention_mask, sliding_window, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found: list[torch.Tensor] = []
    for group in _alike(flat_rows.parts()):
        longest, before = max(end - start for start, end, _ in group), group[0][2]
        keys, values = (_stack(tensor, group, longest, before) for tensor in (key, value))
        window = sliding_window if sliding_window is not None and before + longest > sliding_window else None
        if query.device.type == "cpu" and before + longest <= _SHORT and not dropout:
            attended = _short_attention(_stack(query, group, longest, 0), keys, values, scale=scale, window=window)
        else:
            if query.device.type == "cuda" and (window is not None or query.dtype is torch.float32):
                # No kernel but the plain one, which keeps all scores, lets heads share keys here.
                keys, values = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (keys, values))
            # The kernel's causal mask is square, so what comes before asks along and is dropped.
            attended = scaled_dot_product_attention(
                _stack(query, group, longest, before),
                keys,
                values,
                attn_mask=None
                if window is None
                else _visible(before + longest, before + longest, window, query.device),
                is_causal=window is None,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=query.shape[1] != keys.shape[1],
            )[:, :, before:]
        found += [attended[index : index + 1, :, : end - start] for index, (start, end, _) in enumerate(group)]
    return torch.cat(found, dim=2).transpose(1, 2), None


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flat_rows: FlatRows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Do the same as `flat_attention` in one call of flash attention's kernel for rows of any length."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(module, attention_mask, sliding_window, others)
    if dropout:
        raise NotImplementedError("the kernel knows no dropout")
    if torch.is_autocast_enabled(query.device.type):  # which knows nothing of this kernel
        query, key, value = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in (query, key, value))
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if flat_rows.shared:
        keys, values = (_repeat_shared(tensor, flat_rows) for tensor in (keys, values))
    bounds_of_queries, bounds_of_keys, most_queries, most_keys = _varlen_bounds(flat_rows, query.device)
    attended = varlen_attn(
        queries,
        keys,
        values,
        bounds_of_queries,
        bounds_of_keys,
        most_queries,
        most_keys,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, torch.Tensor)
    return attended.unsqueeze(0), None


def _refuse(module: torch.nn.Module, mask: torch.Tensor | None, window: int | None, others: dict[str, Any]) -> None:
    refused = [name for name in _REFUSED if others.get(name) is not None]
    if refused or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"flat attention knows no {', '.join(refused) or 'attention to what comes later'}")
    if window != (None if mask is None else int(mask)):
        raise NotImplementedError("the model tells its window to the mask alone")


def _alike(parts: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Gather neighbours of like length that come after the same tokens."""
    group: list[tuple[int, int, int]] = []
    for part in parts:
        lengths = [end - start for start, end, _ in (*group, part)]
        if group and (min(lengths) < _ALIKE * max(lengths) or part[2] != group[0][2]):
            yield group
            group = []
        group.append(part)
    yield group


def _stack(tensor: torch.Tensor, group: list[tuple[int, int, int]], longest: int, before: int) -> torch.Tensor:
    """Put a group's rows side by side, padded at the right where no causal query looks: [rows, heads, before + longest,
    width].
    """
    own = torch.cat([pad(tensor[:, :, start:end], (0, 0, 0, longest - end + start)) for start, end, _ in group])
    if not before:
        return own
    # Expanded, not copied: its gradient is then one sum, not a chain of rounded ones.
    return torch.cat([tensor[:, :, :before].expand(len(group), -1, -1, -1), own], dim=2)


def _short_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """Attention of the last queries of rows by two matrix products: [rows, heads, queries, width].

    Query heads that share a key head stand below each other, so that keys need no copies.
    """
    rows, heads, queries, width = query.shape
    key_heads, keys = key.shape[1:3]
    shared = heads // key_heads
    scores = torch.baddbmm(
        _bias(queries, keys, window, shared, query.dtype),
        query.reshape(rows * key_heads, shared * queries, width),
        key.reshape(rows * key_heads, keys, width).transpose(1, 2),
        alpha=scale,
    )
    attended = torch.bmm(torch.softmax(scores, dim=-1), value.reshape(rows * key_heads, keys, -1))
    return attended.view(rows, heads, queries, -1)


@lru_cache(maxsize=64)
def _bias(queries: int, keys: int, window: int | None, repeats: int, dtype: torch.dtype) -> torch.Tensor:
    hidden = ~_visible(queries, keys, window, torch.device("cpu"))
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(hidden, -math.inf).repeat(repeats, 1).unsqueeze(0)


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Say which keys each of the last `queries` of `keys` tokens sees: token i sees i - window + 1 to i."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = ones.tril(keys - queries)
    return seen if window is None else seen & ones.triu(keys - queries - window + 1)


def _repeat_shared(tensor: torch.Tensor, rows: FlatRows) -> torch.Tensor:
    """Put the shared tokens in front of every row's own, and once for themselves: [keys, heads, width]."""
    shared = tensor[: rows.shared].expand(len(rows.bounds) - 1, -1, -1, -1)
    own = (tensor[start:end] for start, end in pairwise(rows.bounds))
    return torch.cat([tensor[: rows.shared], *(part for pair in zip(shared, own, strict=True) for part in pair)])


@lru_cache(maxsize=4)
def _varlen_bounds(rows: FlatRows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    queries = [end - start for start, end, _ in rows.parts()]
    keys = [end - start + before for start, end, before in rows.parts()]
    bounds = [
        torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        for lengths in (queries, keys)
    ]
    return bounds[0], bounds[1], max(queries), max(keys)


def forget() -> None:
    """Drop what is kept from call to call: tensors without content must not meet those that have some."""
    _bias.cache_clear()
    _varlen_bounds.cache_clear()


def functions(device: torch.device, compute: torch.dtype) -> list[tuple[str, str]]:
    """Name the flat attention functions for a device and number format, best first, each with its reason."""
    everywhere = (FLAT, "torch's attention, a call for rows of like length")
    if device.type == "cuda" and compute is not torch.float32:
        return [(VARLEN, "flash attention's kernel for rows of any length"), everywhere]
    return [everywhere]


def without_flat(model: PreTrainedModel) -> str:
    """Name the attention to use where rows are not flat: transformers' own."""
    chosen: str = model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
    if chosen not in {FLAT, VARLEN}:
        return chosen
    return "sdpa" if model._supports_sdpa else "eager"  # noqa: SLF001


def register() -> None:
    """Make the functions known to transformers, beside a mask function that builds no mask."""
    for name, function in ((FLAT, flat_attention), (VARLEN, varlen_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _window_as_mask)


def _window_as_mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """Build no mask, but pass on a window that only masks are told of, so that it cannot be overlooked."""
    return None if local_size is None else torch.tensor(local_size)
