"""The look at held-out rows while a training is under way: their loss, and answers to some of their questions.

Memory that runs out here ends no training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from finetuned.events import EventType
from finetuned.trainer import memory, steps
from finetuned.trainer.ends import RankLostError, StopAskedError
from finetuned.trainer.model import evaluating
from finetuned.trainer.predictions import Prediction, predict
from finetuned.trainer.store import lengths_of, targets_of
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from finetuned.trainer.loop import Training


def evaluate(training: Training, *, measure: bool, ask: bool) -> None:
    """Measure the held-out loss, and ask some held-out questions, each left out where memory does not allow it.

    Raises StopAskedError: a user who wants the GPU does not wait for it.
    """
    for look, wanted in ((_measure, measure), (_ask, ask)):
        if not wanted:
            continue
        try:
            look(training)
        except (RuntimeError, MemoryError) as error:
            detail = memory.out_of_memory(error)
            if detail is None or training.group.lockstep:
                raise
        else:
            continue
        memory.give_back()
        say = training.task.say
        say.warn(f"out of memory in the evaluation after step {training.done}, which is left out: {detail}")


def _measure(training: Training) -> None:
    """Take down the held-out loss, and whether it is the best so far."""
    began, metrics = time.monotonic(), training.metrics
    metrics.pop("valid_loss", None)  # that of an earlier step must not pass for this one's
    loss = metrics["valid_loss"] = held_out_loss(training)
    if training.done == 0:
        metrics["valid_loss_before"] = loss
    elif loss < metrics.get("best_valid_loss", float("inf")):
        metrics |= {"best_valid_loss": loss, "best_step": training.done}
    beside: dict[str, Any] = {}
    try:
        beside = training.recipe.measured(training)
    except (RuntimeError, MemoryError) as error:
        if memory.out_of_memory(error) is None or training.group.lockstep:
            raise
        training.task.say.warn("out of memory in what is measured beside the held-out loss, which is left out")
    metrics |= beside
    sentence = f"held-out loss {loss:.4f} after step {training.done} ({time.monotonic() - began:.1f} s)"
    metrics["evaluated_step"] = training.done
    training.task.say.say(EventType.METRICS, sentence, step=training.done, valid_loss=loss, **beside)


@torch.no_grad()
def held_out_loss(training: Training) -> float:
    """Give the mean loss in nats over the held-out supervised tokens."""
    held_out = training.task.held_out
    mine = training.group.share_of(held_out)
    return training.together(lambda: _summed_loss(training, mine)) / sum(targets_of(held_out))


def _summed_loss(training: Training, examples: Sequence[Example]) -> float:
    """Give the loss summed over supervised tokens. Batches adapt on their own. Raises StopAskedError."""
    bound, lengths = training.bound, lengths_of(examples)
    while True:
        total = 0.0
        try:
            with evaluating(training.objective):
                for part in steps.cut(list(range(len(lengths))), lengths, bound):
                    training.hear_stop()
                    batch = training.layout.collate([examples[row] for row in part]).to(training.task.device)
                    total += float(training.objective(batch))
                _keep_company(training)
        except (RuntimeError, MemoryError) as error:
            if memory.out_of_memory(error) is None or bound.rows == 1 or training.group.lockstep:
                raise
        else:
            return total
        memory.give_back()
        bound = replace(bound, rows=bound.rows // 2, tokens=bound.tokens and max(1, bound.tokens // 2))


def _keep_company(training: Training) -> None:
    """Make the passes that this rank is short of, because other ranks need it for theirs."""
    held_out, group = training.task.held_out, training.group
    lengths = lengths_of(held_out)
    for _ in range(group.short_of(list(range(len(lengths))), lengths, training.bound)):
        training.hear_stop()
        shortest = held_out[min(range(len(lengths)), key=lengths.__getitem__)]
        training.objective(training.layout.collate([shortest]).to(training.task.device))


def _ask(training: Training) -> None:
    """Answer some held-out questions as the model stands."""
    task, step = training.task, training.done
    settings = task.settings.predictions
    if not settings.enabled:
        return
    answers: list[Prediction] = []
    group = training.group

    def told() -> list[Prediction]:
        return predict(
            training.model,
            task.tokenizer,
            task.asked,
            settings,
            seed=task.settings.seed,
            asked_to_stop=(lambda: group.any(task.asked_to_stop())) if group.lockstep else task.asked_to_stop,
            tell=(lambda tokens: group.told(lambda: tokens)) if group.lockstep else None,
        )

    def ask() -> float:
        try:
            if group.lockstep:
                answers[:] = group.needing_others(told)
            elif group.leads:
                answers[:] = told()
        except (StopAskedError, RankLostError):  # they are cut off, and asked for anew when the training goes on
            raise
        except Exception as error:  # no answer is worth the training
            if group.lockstep or (isinstance(error, RuntimeError | MemoryError) and memory.out_of_memory(error)):
                raise  # where ranks are in lockstep the others wait in the middle of a pass
            task.say.warn(f"predictions after step {step} are left out: {str(error) or type(error).__name__}")
        return 0.0

    training.together(ask)
    training.metrics["asked_step"] = step
    if answers:
        exact, errors = (
            sum(kind) for kind in zip(*((one.exact, one.error is not None) for one in answers), strict=True)
        )
        sentence = f"predictions saved={len(answers)} errors={errors} exact={exact}/{len(answers)} step={step}"
        epoch = round(training.plan.epoch_after(step), 4)
        samples = [answer.as_dict() for answer in answers]
        task.say.say(EventType.PREDICTIONS, sentence, step=step, epoch=epoch, samples=samples)
