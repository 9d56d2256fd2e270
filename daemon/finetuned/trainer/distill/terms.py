"""What else may be asked of a student: to be like its teacher on the way through the layers. Each term is summed over
the targets, in float32 whatever autocast is on, and follows from each row alone, so that it does not matter how a
step is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy, linear, log_softmax, normalize

FED = torch.float32  # what feeds a projector, and so what it is made in


class Projector(torch.nn.Module):
    """A linear map from one model's width to the other's, trained beside the student.

    States of any number format are raised to the map's own, and multiplied without autocast: the one feeds it what it
    is made in, the other cannot change it (a float16 teacher's states would not meet a float32 map).
    """

    def __init__(self, width: int, to: int, generator: torch.Generator) -> None:
        super().__init__()
        first = torch.randn(to, width, generator=generator, dtype=FED) / math.sqrt(width)
        self.weight = torch.nn.Parameter(first)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map [positions, width] to [positions, to], float32; the states are brought to a mean square of 1 before."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return linear(_even(states.to(self.weight)), self.weight)


def _even(states: torch.Tensor) -> torch.Tensor:
    """Bring each state to a mean square of 1: in decoders it grows from layer to layer by orders of magnitude."""
    return states * states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, projector: Projector) -> torch.Tensor:
    """Give the mean square between a layer's projected states and the teacher's: Jiao et al., TinyBERT,
    arXiv:1909.10351, equation 8, on states of equal size.

    student: [positions, width]; teacher: [positions, its width].
    """
    return (_even(projector(student)) - _even(teacher.to(projector.weight))).square().mean(-1).sum()


def attention_loss(
    student: torch.Tensor, teacher: torch.Tensor, counts: Sequence[int], heads: tuple[int, int]
) -> torch.Tensor:
    """Give the divergence of the relations between a row's tokens: Wang et al., MiniLMv2, arXiv:2012.15828, equations 3
    to 6, each token looking at itself and those before it.

    student, teacher: [positions, width], queries, keys or values of one layer, rows one after the other; `counts` are
    the positions of each row. Heads are aligned by joining neighbours until there are as many on both sides.
    """
    joined = math.gcd(*heads)
    total = student.new_zeros((), dtype=FED)
    start = 0
    for count in counts:
        mine, theirs = (_relations(states[start : start + count].to(FED), joined) for states in (student, teacher))
        total = total + (theirs.exp() * (theirs - mine).nan_to_num(0.0)).sum() / joined
        start += count
    return total


def _relations(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Give for each head and token the log-probability of each token up to it: [heads, positions, positions]."""
    with torch.autocast(states.device.type, enabled=False):
        split = states.view(states.shape[0], heads, states.shape[1] // heads).transpose(0, 1)
        scores = split @ split.transpose(1, 2) / math.sqrt(split.shape[-1])
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=states.device).triu(1)
        return log_softmax(scores.masked_fill(later, torch.finfo(FED).min), dim=-1)


def contrastive_loss(
    student: torch.Tensor, teacher: torch.Tensor, counts: Sequence[int], projector: Projector, *, temperature: float
) -> torch.Tensor:
    """Give the cross-entropy of finding the teacher's state for a token among those for all tokens of its row: InfoNCE,
    van den Oord et al., arXiv:1807.03748, between student and teacher as Tian et al., arXiv:1910.10699.

    student, teacher: [positions, their widths], rows one after the other. Negatives come from the row alone: others in
    the micro-batch would change with its cut.
    """
    mine, theirs = normalize(projector(student), dim=-1), normalize(teacher.to(projector.weight), dim=-1)
    total = mine.new_zeros(())
    start = 0
    for count in counts:
        own = slice(start, start + count)
        with torch.autocast(mine.device.type, enabled=False):
            alike = mine[own] @ theirs[own].t() / temperature
        total = total + cross_entropy(alike, torch.arange(count, device=alike.device), reduction="sum")
        start += count
    return total
