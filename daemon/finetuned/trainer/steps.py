"""Which examples belong to which optimizer step. Pure, no torch.

The plan follows from the number of examples, the effective batch, the epochs and the seed alone. How a step is cut
into micro-batches, and among how many processes it is dealt, comes later: neither a smaller micro-batch after an
out-of-memory nor a resume on other GPUs changes the steps.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Plan:
    """The optimizer steps of a training."""

    examples: int
    effective_batch: int  # examples in one step; the last step of an epoch may have fewer
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is seen once."""
        return math.ceil(self.examples / self.effective_batch)

    def step(self, number: int) -> list[int]:
        """Give the indices of the examples of step `number`, from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = _order(self.examples, self.seed, epoch)
        return list(order[within * self.effective_batch : (within + 1) * self.effective_batch])

    def epoch_after(self, steps: int) -> float:
        """Epochs that are done after so many steps."""
        whole, within = divmod(steps, self.steps_per_epoch)
        return whole + min(1.0, within * self.effective_batch / self.examples)

    def fingerprint(self) -> str:
        """Tell whether a checkpoint belongs to these steps."""
        return f"{self.examples} examples, {self.effective_batch} a step, seed {self.seed}"


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def plan_steps(examples: int, *, effective_batch: int, epochs: float, max_steps: int | None, seed: int) -> Plan:
    """Plan a training of so many examples. `epochs` may be a fraction; a started step is a whole one."""
    per_epoch = math.ceil(examples / effective_batch)
    total = max(1, math.ceil(per_epoch * epochs - 1e-9))
    return Plan(examples, effective_batch, min(total, max_steps or total), seed)


@dataclass(frozen=True)
class Bound:
    """How large a micro-batch may be. A row of more than `tokens` stands alone."""

    rows: int
    tokens: int = 0  # 0: any number
    padded: bool = False  # whether rows are padded to the longest, and the padding counts

    def allows(self, rows: list[int], lengths: list[int]) -> bool:
        """Say whether rows may be one micro-batch."""
        small = not self.tokens or self.size(rows, lengths) <= self.tokens
        return len(rows) == 1 or (len(rows) <= self.rows and small)

    def size(self, rows: list[int], lengths: list[int]) -> int:
        """Tokens of a micro-batch."""
        return len(rows) * max(lengths[row] for row in rows) if self.padded else sum(lengths[row] for row in rows)


def deal(rows: list[int], lengths: list[int], ranks: int) -> list[list[int]]:
    """Deal the rows of one step to ranks, longest first, each to the one that has the fewest tokens so far.

    No rank has more tokens than another by more than the longest row. A rank may get none.
    """
    if ranks == 1:
        return [rows]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]  # a heap
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        tokens, rank = least[0]
        shares[rank].append(row)
        heapq.heapreplace(least, (tokens + lengths[row], rank))
    return shares


def cut(rows: list[int], lengths: list[int], bound: Bound) -> list[list[int]]:
    """Cut the rows of one step into micro-batches, longest rows first.

    Rows of like length meet, which saves padding where there is any.
    """
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if parts and bound.allows([*parts[-1], row], lengths):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def largest(parts: list[list[int]], lengths: list[int], bound: Bound) -> list[int]:
    """Give the micro-batch with the most tokens."""
    return max(parts, key=lambda rows: bound.size(rows, lengths))


def cut_for_all(rows: list[int], lengths: list[int], bound: Bound, ranks: int) -> list[list[int]]:
    """Give the micro-batches of one step on all ranks."""
    return [part for share in deal(rows, lengths, ranks) for part in cut(share, lengths, bound)]


def largest_cut(plan: Plan, lengths: list[int], bound: Bound, ranks: int = 1) -> list[int]:
    """Give the micro-batch with the most tokens of the whole training, on whatever rank."""
    every = (cut_for_all(plan.step(number), lengths, bound, ranks) for number in range(plan.total_steps))
    return max((largest(parts, lengths, bound) for parts in every), key=lambda rows: bound.size(rows, lengths))


def learning_rate(step: int, *, total_steps: int, warmup_ratio: float, peak: float) -> float:
    """Give the learning rate of step `step`, from 0: a linear rise, then half a cosine down to 0.

    Source: Loshchilov and Hutter, SGDR, arXiv:1608.03983, without restarts.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
