"""The ladder against out-of-memory: a rung and what is allowed give the next rung. Pure.

`batch_size x gradient_accumulation` is the same on every rung, so the optimizer sees the same steps.
Rungs that change the numbers (4-bit weights, shorter rows) come last and only where config.json allows them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

SHORTEST_ROW = 256  # tokens; below this a chat row rarely holds both its question and its answer


@dataclass(frozen=True)
class Rung:
    """How much memory an attempt may need, from most to least."""

    batch_size: int  # rows in one micro-batch
    gradient_accumulation: int  # micro-batches in one optimizer step
    activation_checkpointing: bool
    tuning: str  # full, lora, lora-8bit or qlora
    max_length: int  # tokens in one row
    micro_batch_tokens: int = 0  # in one micro-batch; 0: not bounded, or not settled yet

    @property
    def effective_batch(self) -> int:
        """Rows in one optimizer step."""
        return self.batch_size * self.gradient_accumulation

    def as_dict(self) -> dict[str, Any]:
        """Give the rung as it is stored."""
        return asdict(self)

    def __str__(self) -> str:
        """Name the rung in a log line."""
        tokens = f" of at most {self.micro_batch_tokens} tokens" if self.micro_batch_tokens else ""
        checkpointing = ", activation checkpointing" if self.activation_checkpointing else ""
        return f"{self.batch_size} x {self.gradient_accumulation}{tokens}{checkpointing}, {self.tuning}"


def next_rung(rung: Rung, *, allow_4bit: bool = False, allow_shorter: bool = False) -> tuple[Rung, str] | None:
    """Climb down one rung: the new rung and why, or None at the foot of the ladder."""
    if rung.batch_size > 1:
        effective = rung.effective_batch
        # The largest divisor that is at most half, so that the product stays for odd sizes too: 3 x 2 -> 1 x 6.
        rows = next(n for n in range(rung.batch_size // 2, 0, -1) if effective % n == 0)
        smaller = replace(
            rung,
            batch_size=rows,
            gradient_accumulation=effective // rows,
            micro_batch_tokens=rung.micro_batch_tokens and max(1, rung.micro_batch_tokens // 2),
        )
        return smaller, f"after {rung}: batch halved, accumulation raised to keep {effective} rows a step"
    if not rung.activation_checkpointing:
        return (
            replace(rung, activation_checkpointing=True),
            f"after {rung}: activations are now computed twice instead of kept",
        )
    if allow_4bit and rung.tuning in {"lora", "lora-8bit"}:
        return (
            replace(rung, tuning="qlora"),
            f"after {rung}: base weights in 4 bits, as fallback_4bit allows",
        )
    if allow_shorter and rung.max_length // 2 >= SHORTEST_ROW:
        return (
            replace(rung, max_length=rung.max_length // 2),
            f"after {rung}: rows cut at {rung.max_length // 2} tokens, as fallback_max_length allows",
        )
    return None
