"""How far the student's prediction is from the teacher's: in chunks, so that full logits exist neither of the one
nor of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from finetuned.trainer.loss import positions_at_once

Logits = Callable[[slice], torch.Tensor]  # the teacher's at some positions, in the student's vocabulary
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of two models' logits, a position each

# Bytes of one chunk's float32 logits. Some four such tensors live at once, two of each model.
_CHUNK = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


def divergence(kind: str, *, temperature: float, top_k: int | None) -> Divergence:
    """Give the function of the student's and the teacher's logits, both [positions, vocabulary] in float32, that gives
    their divergence in nats, [positions].

    With p the teacher's softmax at temperature T and q the student's: forward is KL(p || q), Hinton, Vinyals and Dean,
    arXiv:1503.02531; reverse is KL(q || p), Gu et al., MiniLLM, arXiv:2306.08543; jsd is half of KL(p || m) and half of
    KL(q || m) with m = (p + q) / 2, Agarwal et al., GKD, arXiv:2306.13649, its beta one half. All are times T squared,
    for their gradients shrink with its square (Hinton et al., section 2).

    With `top_k` all tokens but the teacher's k likeliest count as one, whose probability is what is left. Neither model
    is rescaled, so the figure is never above that of all tokens.
    """

    def found(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        both = min(student.shape[-1], teacher.shape[-1])  # heads are padded to round numbers, each to its own
        q, p = (log_softmax(logits[:, :both] / temperature, dim=-1) for logits in (student, teacher))
        if top_k is not None and top_k < both:
            likeliest = p.topk(top_k, dim=-1).indices
            q, p = _with_rest(q, likeliest), _with_rest(p, likeliest)
        return temperature**2 * _KINDS[kind](p, q)

    return found


def _forward(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    middle = torch.logaddexp(p, q) - math.log(2)
    return (_forward(p, middle) + _forward(q, middle)) / 2


_KINDS: dict[str, Divergence] = {"forward": _forward, "reverse": lambda p, q: _forward(q, p), "jsd": _jsd}


def _with_rest(log_p: torch.Tensor, likeliest: torch.Tensor) -> torch.Tensor:
    """Give the log-probabilities of some tokens and, behind them, of all others together."""
    chosen = log_p.gather(-1, likeliest)
    rest = log_p.scatter(-1, likeliest, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], dim=-1)


def summed_divergence(
    hidden: torch.Tensor, head: torch.nn.Module, teacher: Logits, measure: Divergence
) -> torch.Tensor:
    """Give the divergence summed over positions, float32, with gradient for the student alone.

    hidden: [positions, width], of the student; `teacher` gives the logits of a slice of the positions.
    """
    vocabulary = getattr(head, "out_features", hidden.shape[-1])
    size = positions_at_once(hidden.device, vocabulary, _CHUNK)
    # One at least, if empty: a sum over nothing has a gradient too.
    chunks = [slice(start, start + size) for start in range(0, max(1, hidden.shape[0]), size)]

    def of(part: torch.Tensor, where: slice) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(where).to(part.device, torch.float32)
        return measure(logits_of(head, part), wanted).sum()

    if not torch.is_grad_enabled() or not any(p.requires_grad for p in head.parameters()):
        total: torch.Tensor = _FrozenHead.apply(hidden, of, chunks)  # type: ignore[no-untyped-call]
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for where in chunks:
        total = total + checkpoint(of, hidden[where], where, use_reentrant=False)
    return total


def logits_of(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Give logits in float32, of hidden states in whatever number format: with autocast or without they meet the head
    in its own.
    """
    weight = getattr(head, "weight", None)
    matched = hidden.to(weight.dtype) if weight is not None and weight.is_floating_point() else hidden
    found: torch.Tensor = head(matched)
    return found.float()


class _FrozenHead(torch.autograd.Function):
    """For a head that is not trained: the gradient of the hidden states is taken chunk by chunk on the way forward, so
    that the logits of both models are computed once and not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, of: Callable[[torch.Tensor, slice], torch.Tensor], chunks: list[slice]
    ) -> torch.Tensor:
        gradient = torch.zeros_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        for where in chunks:
            with torch.enable_grad():
                part = hidden[where].detach().requires_grad_()
                value = of(part, where)
                (gradient[where],) = torch.autograd.grad(value, part)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(gradient.dtype), None, None
