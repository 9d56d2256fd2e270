"""Trainings that could not teach anything, found at the first step and named."""

from __future__ import annotations

import math

import torch

from finetuned.errors import UnhealthyError


def check_trainable(parameters: list[torch.nn.Parameter]) -> None:
    """Raise UnhealthyError if nothing would be trained."""
    if not parameters:
        raise UnhealthyError(
            "no parameter is trainable", where="target_modules", remedy='Set "target_modules" to "all-linear".'
        )


def check_step(number: int, loss: float, grad_norm: float, *, scaled: bool) -> None:
    """Raise UnhealthyError if a step cannot have taught anything; `number` from 1.

    With a gradient scaler an infinite norm is normal: it skips the step and lowers its scale.
    """
    where = f"step {number}"
    if not math.isfinite(loss):
        raise UnhealthyError(
            f"the loss is {loss}",
            where=where,
            remedy="Lower learning_rate, or set dtype to float32 to look for the cause.",
        )
    if not math.isfinite(grad_norm) and not scaled:
        raise UnhealthyError(
            f"the gradient is {grad_norm}", where=where, remedy="Lower learning_rate or max_grad_norm."
        )
    if number == 1 and loss == 0.0:
        raise UnhealthyError(
            "the loss is exactly zero: nothing is supervised", where=where, remedy="Look at the rows' assistant turns."
        )
    if number == 1 and grad_norm == 0.0:
        raise UnhealthyError(
            "the gradient is exactly zero: nothing that is trained takes part in the answer",
            where=where,
            remedy='Set "target_modules" to "all-linear" and "tuning" to "lora" to look for the cause.',
        )
