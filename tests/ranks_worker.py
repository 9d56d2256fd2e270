"""One of the processes that train jobs together in test_ranks.py: all jobs of a folder, one after the other."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch.distributed.tensor import DTensor

from finetuned.trainer import group as group_module
from finetuned.trainer import shards
from finetuned.trainer.group import Group, join
from finetuned.trainer.model import causal
from test_exactness import Job, Story, World

JOBS = "jobs.pickle"


@dataclass
class Ordered:
    """A job for several ranks, and what happens to rank 1 in it."""

    world: World
    settings: dict[str, Any]
    out_of_memory: tuple[int, ...] = ()  # backward passes, from 1, in which it runs out of memory
    no_zeros: tuple[int, ...] = ()  # times, from 1, that it has no memory for the gradients that it lacks
    stopped_after: int | None = None  # steps
    bucket: int = 8 * 2**20  # numbers that are summed at once
    sharded: bool = False


def outcome(folder: Path, name: str, rank: int) -> Path:
    """Where a rank leaves what came of a job: a Story, without the model."""
    return folder / f"{name}.{rank}.pickle"


def sizes(folder: Path, name: str, rank: int) -> Path:
    """Where a rank leaves how many bytes of the model's layers it holds when a job is done."""
    return folder / f"{name}.{rank}.bytes"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None
    group = join()
    for name, ordered in pickle.loads((folder / JOBS).read_bytes()).items():
        story = train(folder / name, ordered, group)
        outcome(folder, name, group.rank).write_bytes(pickle.dumps(story))
    group.leave()


def train(folder: Path, ordered: Ordered, group: Group) -> Story:
    job = Job(folder, ordered.world, group=replace(group, sharded=ordered.sharded), **ordered.settings)
    backward, completed = accelerate.Accelerator.backward, group_module._completed
    group_module._BUCKET = ordered.bucket
    if group.rank == 1:
        accelerate.Accelerator.backward = failing(backward, ordered.out_of_memory)
        group_module._completed = failing(completed, ordered.no_zeros)
    try:
        if ordered.stopped_after is None:
            story = job.done()
            weights = {
                name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in story.weights.items()
            }
            if story.trained.weights and group.leads:  # what is published
                torch.testing.assert_close({n: story.trained.weights[n] for n in weights}, weights, rtol=0, atol=0)
            story = Story(story.attempts, story.trained, weights)
            layers = shards.layers_of(causal(story.trained.model))
            held = sum(local_bytes(layer) for layer in layers)
            sizes(folder.parent, folder.name, group.rank).write_text(str(held))
        else:
            looks, last = itertools.count(), ordered.stopped_after
            assert job.attempt(lambda: group.rank == 1 and next(looks) >= last) is None
            story = Story(job.attempts, None, {})
    finally:
        accelerate.Accelerator.backward, group_module._completed = backward, completed
    attempts = [replace(attempt, ended=attempt.ended and type(attempt.ended).__name__) for attempt in story.attempts]
    return Story(attempts, None, story.weights)


def local_bytes(module: torch.nn.Module) -> int:
    """How much memory a module's parameters take on this rank."""
    mine = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(one.numel() * one.element_size() for one in mine)


def failing(backward: Callable, numbers: tuple[int, ...]) -> Callable:
    """Let calls of these numbers run out of memory when their gradients are there."""
    calls = itertools.count(1)

    def call(*arguments, **named) -> object:
        found = backward(*arguments, **named)
        if next(calls) in numbers:
            raise MemoryError
        return found

    return call


if __name__ == "__main__":
    main(Path(sys.argv[1]))
