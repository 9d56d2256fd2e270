"""How many tokens a micro-batch may hold, where the user leaves it to us; and what earlier trainings found out.

Kept in the base directory, one entry for a model, method, length and device.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuned.durable import write_file
from finetuned.fallback import Rung
from finetuned.trainer import memory

if TYPE_CHECKING:
    from finetuned.trainer.loop import Training

CPU_TOKENS = 1024  # larger micro-batches fall out of its caches and are no faster (docs/log.md)
FIRST = 2048  # tokens of the first trial on a GPU
_ROOM_TO_DOUBLE = 0.45  # share of memory; twice that leaves a tenth as margin


@dataclass(frozen=True)
class Found:
    """A bound that fitted, and the share of the device's memory that was needed at most."""

    tokens: int
    share: float

    def next_size(self, enough: int) -> int:
        """Give the bound to begin the next training with: one size up when memory was left over and rows are for it.

        `enough` tokens are as many as the largest step has.
        """
        return self.tokens * 2 if self.share < _ROOM_TO_DOUBLE and self.tokens < enough else self.tokens


def largest_fitting(first: int, enough: int, attempt: Callable[[int], float | None]) -> tuple[int, str]:
    """Double the bound from `first` while there is room, and give the largest that fitted, and why it is that.

    `attempt` tries a bound: the share of memory that it needed, or None if memory ran out. `enough` tokens are as many
    as the largest step has.
    """
    tokens = first
    while True:
        share = attempt(tokens)
        if share is None:
            return max(1, tokens // 2), f"{tokens} tokens at once did not fit"
        if tokens >= enough:
            return tokens, "the largest step fits at once"
        if share >= _ROOM_TO_DOUBLE:
            return tokens, f"{tokens} tokens take {share:.0%} of memory, twice as many would leave no margin"
        tokens *= 2


def settle(training: Training) -> tuple[Rung, dict[str, str]]:
    """Settle the bound of a training whose model is loaded: its rung with the bound, and the choice with its reason."""
    task, rung = training.task, training.rung
    group = training.group
    enough = -(-sum(sorted(training.lengths, reverse=True)[: training.plan.effective_batch]) // group.size)
    if task.settings.micro_batch_tokens != "auto":
        tokens, reason = rung.micro_batch_tokens, "as set"
    elif rung.micro_batch_tokens:
        tokens, reason = rung.micro_batch_tokens, "as settled before"
    elif task.device.type == "cpu":
        tokens, reason = CPU_TOKENS, "larger micro-batches are no faster on a CPU"
    elif task.settings.batch_size != "auto":
        tokens, reason = 0, "batch_size decides"
    elif (found := group.told(lambda: _recall(task.bounds, _key(training)))) is not None:
        tokens, reason = (
            found.next_size(enough),
            f"an earlier training took {found.share:.0%} of memory with {found.tokens}",
        )
    else:
        tokens, reason = largest_fitting(FIRST, enough, lambda tokens: _attempt(training, tokens))
    return replace(rung, micro_batch_tokens=tokens), {"choice": str(tokens or "no bound"), "reason": reason}


def _attempt(training: Training, tokens: int) -> float | None:
    memory.reset_peak()
    fitted = training.try_backward(tokens)
    return training.group.most(memory.peak_bytes() / memory.total_bytes()) if fitted else None


def remember(training: Training) -> None:
    """Keep the bound that fitted, for the next training of this kind.

    A file that cannot be read is begun anew: all in it can be found again.
    """
    if training.task.settings.batch_size != "auto" or not training.rung.micro_batch_tokens:
        return
    file = training.task.bounds
    try:
        entries = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        entries = {}
    share = memory.peak_bytes() / memory.total_bytes()
    entries[_key(training)] = asdict(Found(training.rung.micro_batch_tokens, share))
    write_file(file, json.dumps(entries, indent=2).encode() + b"\n")


def _recall(file: Path, key: str) -> Found | None:
    try:
        entry = json.loads(file.read_bytes())[key]
        return Found(int(entry["tokens"]), float(entry["share"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(training: Training) -> str:
    rung, settings = training.rung, training.task.settings
    parts = [training.task.base.name, rung.tuning, f"dtype {settings.dtype}", f"{rung.max_length} tokens a row"]
    if rung.tuning != "full":
        parts.append(f"r {settings.lora_r}{' dora' if settings.use_dora else ''}")
    if rung.activation_checkpointing:
        parts.append("activation checkpointing")
    if settings.recipe != "sft":
        parts.append(f"recipe {settings.recipe}")
    if training.group.lockstep:
        parts.append(f"spread over {training.group.size}")
    return ", ".join([*parts, memory.device_name()])
