"""The loss: the head only at positions that have a label, in chunks, summed. Full logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

# Bytes of one chunk's float32 logits, the only ones that live. A CPU's caches like them small, a GPU's products large.
_CHUNK = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}


def summed_loss(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Give the cross-entropy in nats, summed over positions, as float32; the caller divides once by the step's count.

    hidden: [positions, width], in the dtype that the head computes in; targets: [positions], token ids.
    """
    training = torch.is_grad_enabled() and targets.shape[0] > 0
    if training and type(head) is torch.nn.Linear and not head.weight.requires_grad and head.bias is None:
        with torch.autocast(hidden.device.type, enabled=False):
            loss: torch.Tensor = _FrozenHeadLoss.apply(hidden.to(head.weight.dtype), head.weight, targets)
        return loss
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in _chunks(hidden, targets, _size(hidden, head)):
        if training and part.shape[0] < targets.shape[0]:
            total = total + checkpoint(_chunk_loss, part, head, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(part, head, wanted)
    return total


@torch.no_grad()
def each_loss(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Give the cross-entropy in nats of each position, [positions], as float32."""
    chunks = _chunks(hidden, targets, _size(hidden, head))
    return torch.cat([cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in chunks])


def weighted_loss(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, weights: torch.Tensor, *, temperature: float
) -> torch.Tensor:
    """Give the cross-entropy at a temperature, each position's times its weight, summed; else as `summed_loss`."""

    def chunk(hidden: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # No product of vectors: autocast would do that in 16 bits.
        return (cross_entropy(head(hidden).float() / temperature, wanted, reduction="none") * weights).sum()

    return _gathered(chunk, hidden, head, targets, weights)


def summed_entropy(hidden: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    """Give the entropy in nats of the next token at each position, summed over positions, as float32."""

    def chunk(hidden: torch.Tensor) -> torch.Tensor:
        log_p = log_softmax(head(hidden).float(), dim=1)
        return -(log_p.exp() * log_p).sum()

    return _gathered(chunk, hidden, head)


def _gathered(
    chunk: Callable[..., torch.Tensor], hidden: torch.Tensor, head: torch.nn.Module, *others: torch.Tensor
) -> torch.Tensor:
    """Sum over chunks of positions, whose logits are computed again where their gradient is wanted."""
    size = _size(hidden, head)
    parts = zip(*(torch.split(tensor, size) for tensor in (hidden, *others)), strict=True)
    return sum(
        (checkpoint(chunk, *part, use_reentrant=False) for part in parts), hidden.new_zeros((), dtype=torch.float32)
    )


def positions_at_once(device: torch.device, vocabulary: int, sizes: Mapping[str, int] = _CHUNK) -> int:
    """Give how many positions make a chunk whose float32 logits take so many bytes as `sizes` has for the device."""
    return max(1, sizes.get(device.type, sizes["cuda"]) // (4 * vocabulary))


def _size(hidden: torch.Tensor, head: torch.nn.Module) -> int:
    return positions_at_once(hidden.device, getattr(head, "out_features", hidden.shape[-1]))


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(torch.split(hidden, size), torch.split(targets, size), strict=True))


def _chunk_loss(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The same for a head that is not trained: nothing needs its logits but the gradient of the hidden states, and that
    is known as soon as they are, so they are computed once and not kept.

    With p the softmax of a position's logits and e the target's unit vector, the gradient is (p - e) W; the idea is
    that of Liger's fused linear cross-entropy, arXiv:2410.10989.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        chunks = _chunks(hidden, targets, positions_at_once(hidden.device, weight.shape[0]))
        for (part, wanted), into in zip(chunks, torch.split(gradient, chunks[0][0].shape[0]), strict=True):
            logits = torch.mm(part, weight.t())
            log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            where = wanted.unsqueeze(1)
            total -= log_p.gather(1, where).sum()
            p = log_p.exp_()
            p.scatter_add_(1, where, p.new_full(where.shape, -1.0))
            torch.mm(logits.copy_(p), weight, out=into)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None
