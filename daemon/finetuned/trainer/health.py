"""Trainings that cannot teach anything, each named by a code of its own, with what to do: before the first step where
that can be known, else at the step that shows it.

A training that breaks on its way is told from a hard batch by `Watch`. What happens to the step is the loop's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from finetuned.errors import UnhealthyError

_REFERENCE_STEPS = 10  # steps whose highest figures stand for what is normal
_HIGHER_LOSS, _LEAST_LOSS = 2.0, 1.0  # times the highest loss of those steps; in nats, a mean loss below it is none
_HIGHER_NORM, _LEAST_NORM = 100.0, 1.0
_LEARNED_BY_HEART = 1e-3  # nats: so small a loss may have no gradient
_LEAST_SCALE = 1.0  # as DeepSpeed's min_loss_scale: below it scaling does harm only
_REMEMBERED = ("skipped", "in_a_row", "taken", "moved", "highest_loss", "highest_norm")


def check_trainable(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Raise UnhealthyError if nothing would be trained, or an adapter is there that is loaded frozen."""
    trainable = {name: parameter.requires_grad for name, parameter in parameters}
    adapter = [trains for name, trains in trainable.items() if "lora_" in name]
    if adapter and not any(adapter):
        raise UnhealthyError(
            f"the adapter is frozen: none of its {len(adapter)} tensors is trainable",
            where="adapter_config.json",
            remedy='A saved adapter has "inference_mode": true; load it with is_trainable=True to train it further.',
            code="adapter_frozen",
        )
    if not any(trainable.values()):
        raise UnhealthyError(
            "no parameter is trainable",
            where="target_modules",
            remedy='Set "target_modules" to "all-linear".',
            code="nothing_trainable",
        )


def check_supervised(steps: Iterable[Iterable[int]], targets: list[int]) -> None:
    """Raise UnhealthyError for a step with nothing to learn. `targets[row]` counts a row's supervised tokens.

    A row without any is refused before it gets here; a step of such rows would divide by zero.
    """
    for number, rows in enumerate(steps, 1):
        if not any(targets[row] for row in rows):
            raise UnhealthyError(
                "every token of the step's rows is masked: there is nothing to learn",
                where=f"step {number}",
                remedy="Look at the rows' assistant turns, and whether max_length cuts them off.",
                code="nothing_supervised",
            )


def check_schedule(rates: Iterable[float]) -> None:
    """Raise UnhealthyError if no step has a learning rate that float32 can tell from zero."""
    if not any(rate >= torch.finfo(torch.float32).tiny for rate in rates):
        raise UnhealthyError(
            "the learning rate is zero at every step",
            where="learning_rate",
            remedy='Raise it, or set it to "auto".',
            code="learning_rate_zero",
        )


def check_step(number: int, loss: float, grad_norm: float, *, scaled: bool) -> None:
    """Raise UnhealthyError if a step cannot have taught anything and no later one will; `number` from 1.

    With a gradient scaler a norm that is not finite is normal: it skips the step and lowers its scale.
    """
    where = f"step {number}"
    if number == 1 and (sick := _not_finite(loss, grad_norm, scaled=scaled)):
        raise UnhealthyError(
            sick[1],
            where=where,
            remedy="Nothing was learned yet, so it is the model or the number format: set dtype to float32 to look.",
            code=sick[0],
        )
    if number == 1 and loss == 0.0:
        raise UnhealthyError(
            "the loss is exactly zero: nothing is supervised, or all of it is known by heart",
            where=where,
            remedy="Look at the rows' assistant turns.",
            code="loss_zero",
        )
    if grad_norm == 0.0 and (number == 1 or loss > _LEARNED_BY_HEART):
        raise UnhealthyError(
            f"the gradient is exactly zero at a loss of {loss:.4f}: nothing that is trained takes part in the answer",
            where=where,
            remedy='Set "target_modules" to "all-linear" and "tuning" to "lora" to look for the cause.',
            code="gradient_zero",
        )


def _not_finite(loss: float, grad_norm: float, *, scaled: bool) -> tuple[str, str] | None:
    """Give code and sentence if a figure is not finite that ought to be."""
    if not math.isfinite(loss):
        return "loss_not_finite", f"the loss is {loss}"
    if not math.isfinite(grad_norm) and not scaled:
        return "gradient_not_finite", f"the gradient is {grad_norm}"
    return None


class Watch:
    """What is remembered over the steps of a training, to tell a hard batch from a training that has broken.

    A step is *bad* if its loss or gradient is not finite or has exploded: a loss over twice, or a gradient norm over a
    hundred times, the highest of the first ten steps that were taken. That bound is fixed, so that a slow runaway does
    not raise it: a base model that has not learned yet is as bad as fine-tuning may get. (Pre-training compares with a
    moving average, as OLMo-core's SkipStepOptimizer does with mean and deviation of the last 128 steps; a fine-tuning
    of tiny batches has heavier tails and may be over by then.) The two factors are ours, chosen wide.

    At most `most_skips` bad steps are skipped. The training ends when more than so many come in a row, which with
    weights that do not move means that the weights are broken, or when one more is not finite. One more hard batch on
    its own, among good ones, is learned from: clipping bounds what it can do.
    """

    def __init__(self, most_skips: int, checkpoint_before: Callable[[int], int | None]) -> None:
        """`checkpoint_before(step)` gives the step of the newest checkpoint with fewer steps done."""
        self.skipped = 0
        self.in_a_row = 0  # bad steps since the last good one
        self.taken = 0
        self.moved = False  # a weight was seen to change
        self.highest_loss = self.highest_norm = 0.0  # of the first steps that were taken
        self._most_skips = most_skips
        self._checkpoint_before = checkpoint_before

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint must hold, so that a resumed training judges as this one would."""
        return {name: getattr(self, name) for name in _REMEMBERED}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        for name, value in state.items():
            setattr(self, name, value)

    def judge(self, number: int, loss: float, grad_norm: float, *, scale: float | None) -> str:
        """Say why step `number` (from 1) is to be skipped, or nothing. `scale` is the gradient scaler's, if any.

        Raises UnhealthyError if the training is to end.
        """
        scaled = scale is not None
        check_step(number, loss, grad_norm, scaled=scaled)
        if scale is not None and scale < _LEAST_SCALE:
            raise UnhealthyError(
                f"the gradient scale fell to {scale:g}: in fp16 the gradient is not finite even without scaling",
                where=f"step {number}",
                remedy='Set "dtype" to "bf16" or "float32".',
                code="scale_collapsed",
            )
        not_finite = _not_finite(loss, grad_norm, scaled=scaled)
        bad = not_finite or self._exploded(loss, grad_norm)
        if bad is None:
            self.in_a_row = 0
            if math.isfinite(grad_norm):
                self._take(loss, grad_norm)
            return ""
        self.in_a_row += 1
        spent = self.skipped >= self._most_skips
        if spent and (not_finite or self.in_a_row > self._most_skips):
            raise self._broken(number, *bad)
        if spent:
            self._take(loss, grad_norm)
            return ""
        self.skipped += 1
        return f"{bad[1]} (loss {loss:.4g}, gradient norm {grad_norm:.4g})"

    def _take(self, loss: float, grad_norm: float) -> None:
        if self.taken < _REFERENCE_STEPS:
            self.highest_loss = max(self.highest_loss, loss)
            self.highest_norm = max(self.highest_norm, grad_norm)
        self.taken += 1

    def _exploded(self, loss: float, grad_norm: float) -> tuple[str, str] | None:
        """Give code and sentence if a figure is far above what it was in the first steps."""
        if self.taken < _REFERENCE_STEPS:
            return None
        if loss > (most := _HIGHER_LOSS * max(self.highest_loss, _LEAST_LOSS)):
            return "loss_exploded", f"the loss exploded: {loss:.4g} is over {most:.4g}"
        # A scaler's own skips have an infinite norm.
        if math.isfinite(grad_norm) and grad_norm > (most := _HIGHER_NORM * max(self.highest_norm, _LEAST_NORM)):
            return "gradient_exploded", f"the gradient exploded: its norm {grad_norm:.4g} is over {most:.4g}"
        return None

    def _broken(self, number: int, code: str, what: str) -> UnhealthyError:
        """Say that the training is broken, and which checkpoint is from before that."""
        # The weights that gave the first bad step of the row are those after the step before it.
        good = self._checkpoint_before(number - self.in_a_row)
        kept = (
            "there is no checkpoint from before it"
            if good is None
            else f"the last good checkpoint, step {good}'s, is kept with the job"
        )
        return UnhealthyError(
            f"{what}; bad steps in a row: {self.in_a_row}, skipped before: {self.skipped}",
            where=f"step {number}",
            remedy=f"Lower learning_rate or max_grad_norm, or look at the bad steps' rows. No adapter is made; {kept}.",
            code=code,
        )

    @contextmanager
    def first_step(
        self, trained: Mapping[str, torch.Tensor], *, rate: float, grad_norm: float, anywhere: Callable[[bool], bool]
    ) -> Iterator[None]:
        """Hold the optimizer's first step to its word. Raises UnhealthyError if it leaves every weight as it was.

        A step that the gradient scaler skips has a norm that is not finite, and does not count. Only two elements of
        each tensor are kept, those with the steepest slope up and down: copies would not fit beside a whole model.
        `anywhere` says whether something is so on any rank.
        """
        if self.moved or rate == 0.0 or not math.isfinite(grad_norm):
            yield
            return
        slopes = {name: _here(p.grad).flatten() for name, p in trained.items() if p.grad is not None}
        slopes = {name: slope for name, slope in slopes.items() if slope.numel()}  # a rank's share may be empty
        steepest = {name: torch.stack([slope.argmax(), slope.argmin()]) for name, slope in slopes.items()}
        before = {name: _here(trained[name]).flatten()[where] for name, where in steepest.items()}
        del slopes
        yield
        self.moved = anywhere(
            any(
                not torch.equal(_here(trained[name]).flatten()[where], before[name]) for name, where in steepest.items()
            )
        )
        if not self.moved:
            raise UnhealthyError(
                f"no weight changed in the first step of the optimizer, at a learning rate of {rate:g}",
                where="learning_rate",
                remedy="Raise it.",
                code="weights_unchanged",
            )

    def check_end(self) -> None:
        """Raise UnhealthyError if not one step was taken: a gradient scaler may have skipped them all."""
        if self.taken == 0:
            raise UnhealthyError(
                "every step was skipped, so no weight has changed",
                where="the last step",
                remedy='Train for more steps, or set "dtype" to "bf16" or "float32".',
                code="weights_unchanged",
            )


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """Give what this rank has of a tensor that may be spread over several."""
    own: torch.Tensor = tensor.detach()
    return own.to_local() if hasattr(own, "to_local") else own
