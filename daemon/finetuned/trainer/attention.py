"""Attention over flat micro-batches: rows end to end, no padding, and no row sees another.

The model is used as it is: transformers hands extra arguments of its forward down to the attention function that the
configuration names. What this function cannot honour it refuses, and the padded way is taken (`layout.py`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAT = "finetuned_flat"
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_bounds: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    query: [1, heads, tokens, width]; key, value: [1, key heads, tokens, width]. `row_bounds` are the rows' starts and
    the end, so row i is tokens row_bounds[i] to row_bounds[i + 1]. Returns [1, tokens, heads, width]. Raises
    NotImplementedError for what it cannot honour.
    """
    refused = [name for name in _REFUSED if others.get(name) is not None]
    if refused or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"flat attention knows no {', '.join(refused) or 'attention to what comes later'}")
    if sliding_window != (None if attention_mask is None else int(attention_mask)):
        raise NotImplementedError("the model tells its window to the mask alone")
    rows = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=_window(end - start, sliding_window, query.device),
            is_causal=not _windowed(end - start, sliding_window),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pairwise(row_bounds)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def _windowed(length: int, window: int | None) -> bool:
    return window is not None and length > window


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Mask of a row longer than the sliding window: token i sees i - window + 1 to i."""
    if window is None or not _windowed(length, window):
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def without_flat(model: PreTrainedModel) -> str:
    """Name the attention to use where rows are not flat: transformers' own."""
    chosen: str = model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
    if chosen != FLAT:
        return chosen
    return "sdpa" if model._supports_sdpa else "eager"  # noqa: SLF001


def register() -> None:
    """Make the function known to transformers, beside a mask function that builds no mask."""
    AttentionInterface.register(FLAT, flat_attention)
    AttentionMaskInterface.register(FLAT, _window_as_mask)


def _window_as_mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """Build no mask, but pass on a window that only masks are told of, so that it cannot be overlooked."""
    return None if local_size is None else torch.tensor(local_size)
