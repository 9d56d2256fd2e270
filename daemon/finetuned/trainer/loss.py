"""The loss: the head only at positions that have a label, in chunks, summed. Full logits never exist."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # positions; 2048 x a vocabulary of 152k in float32 is 1.2 GiB at the peak, and only one chunk lives


def summed_loss(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Give the cross-entropy in nats, summed over positions; the caller divides once by the step's count.

    hidden: [positions, width], in the dtype that the head computes in; targets: [positions], token ids. Each chunk's
    logits are computed again in the backward pass instead of kept.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, targets.shape[0], CHUNK):
        part, wanted = hidden[start : start + CHUNK], targets[start : start + CHUNK]
        if torch.is_grad_enabled() and targets.shape[0] > CHUNK:
            total = total + checkpoint(_chunk_loss, part, head, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(part, head, wanted)
    return total


def _chunk_loss(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
