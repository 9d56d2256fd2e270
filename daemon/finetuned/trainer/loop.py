"""The training loop. Begin with `train`, then read `Training` top to bottom.

What a step is (`steps.py`) is fixed before the first one; the loop may cut it smaller, do it again or continue it in
another process, and the weights come out the same.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned.config import TrainingSettings
from finetuned.dataset.rows import Row
from finetuned.events import EventType
from finetuned.fallback import Rung, next_rung
from finetuned.trainer import bounds, fused, health, memory, steps
from finetuned.trainer.base import Base
from finetuned.trainer.chain import Earlier
from finetuned.trainer.ends import Means, OutOfMeansError, RankLostError, StopAskedError
from finetuned.trainer.evaluation import evaluate
from finetuned.trainer.group import Group
from finetuned.trainer.layout import Layout, choose_layout, rows_stand_alone
from finetuned.trainer.lora import add_adapter
from finetuned.trainer.model import causal, load_model, set_checkpointing
from finetuned.trainer.pace import Pace
from finetuned.trainer.parts import Parts, joined
from finetuned.trainer.precision import Precision, choose, in_force
from finetuned.trainer.recipes import RECIPES
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.saving import Saver
from finetuned.trainer.start_line import count, start_line
from finetuned.trainer.store import lengths_of, targets_of
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetuned.trainer.distill.teacher import Teacher
    from finetuned.trainer.recipes.contract import Objective

_APART = 2**52  # between the seeds of two ranks
_FULL_RATE, _ADAPTER_RATE = 1e-5, 2e-4  # peak learning rates where config.json leaves it to us


@dataclass(frozen=True)
class Task:
    """What the loop is given: checked settings and data, and who to talk to."""

    settings: TrainingSettings
    rung: Rung  # its tuning is settled
    base: Base
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    held_out: Sequence[Example]
    device: torch.device
    checkpoints: Path
    bounds: Path  # what earlier trainings found out about micro-batches
    say: Reporter
    asked_to_stop: Callable[[], bool]
    earlier: Earlier | None = None  # what the adapter builds on
    asked: list[Row] = field(default_factory=list)  # held-out rows whose questions are put to the model
    teacher: Teacher | None = None  # of recipe distill
    group: Group = field(default_factory=Group)  # who trains this with us


@dataclass
class Trained:
    """What the loop gives back."""

    model: PreTrainedModel
    rung: Rung
    metrics: dict[str, Any]
    choices: dict[str, dict[str, str]]  # every automatic decision with its reason
    seen: Seen
    layout: Layout
    save: Callable[[Path], None]  # writes what the recipe has beside the model into a folder
    weights: dict[str, torch.Tensor] | None = None  # the model's, where they are spread over ranks; on rank 0


@dataclass(frozen=True)
class Seen:
    """What a training took, for predictions of the next (`plan.py`)."""

    largest: list[int]  # rows of the largest micro-batch
    accumulated: bool  # whether some step had more than one
    peak: int  # bytes
    tokens_per_second: float
    seconds: float  # of all steps


def train(task: Task) -> Trained:
    """Train until the plan is done.

    Raises StopAskedError, OutOfMeansError or RankLostError, with a checkpoint of all steps that are done,
    UnhealthyError, ModelError or ConfigError.
    """
    precision = choose(task.device, task.rung.tuning, task.settings.dtype)
    task.say.phase("loading_model", f"loading {task.base.name}")
    training = begin(task, precision)
    try:
        training.settle()
        training.announce()
        training.saver.resume()
        training.prepare()
        while training.done < training.plan.total_steps:
            training.stop_if_asked()
            training.step()
            training.look_up()
        training.conclude()
    except (OutOfMeansError, RankLostError):
        training.save_what_is_done()
        raise
    except (RuntimeError, MemoryError) as error:  # elsewhere than in a step's own work
        detail = memory.out_of_memory(error)
        if detail is None:
            raise
        training.save_what_is_done()
        raise OutOfMeansError(training.rung, detail, training.means()) from None
    recipe, seen, shares = training.recipe, training.seen(), training.parts.shares
    return Trained(
        training.model,
        training.rung,
        training.metrics,
        training.choices,
        seen,
        training.layout,
        recipe.save,
        weights=None if shares is None else shares.whole(training.model.state_dict()),
    )


def begin(task: Task, precision: Precision) -> Training:
    """Load the model in the number formats that the hardware likes, with an adapter or whole; a teacher first, so that
    what is wrong with it is told before.
    """
    found: list[Training] = []

    def work() -> float:
        if task.teacher is not None:
            task.teacher.load(task.device)
        found.append(Training(task, *load(task, precision), precision))
        return 0.0

    with fitting(task):
        task.group.together(work)
    return found[0]


def load(task: Task, precision: Precision) -> tuple[PreTrainedModel, Layout]:
    """Give the model with its adapter on, and how micro-batches go through it. Raises ModelError or ConfigError."""
    spread = task.group.lockstep
    model = load_model(
        task.base,
        task.settings,
        tuning=task.rung.tuning,
        precision=precision,
        device=torch.device("cpu") if spread else task.device,
    )
    # Dropout draws anew for every token, so tokens that rows share could not stand for all of them.
    share = not task.settings.lora_dropout

    def choose() -> Layout:
        return choose_layout(causal(model), precision.compute, name=task.base.name, share=share)

    layout = None if spread else choose()  # a model that one device does not hold cannot be tried before it is spread
    if task.rung.tuning != "full":
        model = add_adapter(model, task.base, task.settings, precision=precision, earlier=task.earlier)
        fused.fuse(model)
    if spread:
        from finetuned.trainer.shards import shard  # slow to import, and most trainings go without

        shard(causal(model), task.device, trained=task.rung.tuning == "full")
        task.group.wait()  # one may read the model more slowly than others wait for it in a pass
    return model, layout or choose()


@contextmanager
def fitting(task: Task) -> Iterator[None]:
    """Raise OutOfMeansError where the model does not fit: no smaller batch helps, only the rungs below them may."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        detail = memory.out_of_memory(error)
        if detail is None:
            raise
        foot = replace(task.rung, batch_size=1, gradient_accumulation=task.rung.effective_batch)
        raise OutOfMeansError(replace(foot, activation_checkpointing=True), detail, _means(task)) from None


def _means(task: Task) -> Means:
    settings = task.settings
    return Means(
        device="the GPU" if task.device.type == "cuda" else "the machine",
        total=memory.total_bytes(),
        others=memory.others_bytes(),
        allow_4bit=settings.fallback_4bit,
        allow_shorter=settings.fallback_max_length,
    )


class Training:
    """A training under way. `done` optimizer steps are behind it."""

    def __init__(self, task: Task, model: PreTrainedModel, layout: Layout, precision: Precision) -> None:
        """Plan the steps and put objective and optimizer on accelerate."""
        settings = task.settings
        self.task, self.model, self.layout, self.rung = task, model, layout, task.rung
        self.group = task.group
        self.done = 0
        self.metrics: dict[str, Any] = {}
        self.lengths = lengths_of(task.train)
        self.plan = steps.plan_steps(
            len(task.train),
            effective_batch=task.rung.effective_batch,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
        )
        self._alone = rows_stand_alone(model, max(self.lengths))
        accelerator = in_force(precision, task.device)
        self.recipe: Objective = importlib.import_module(RECIPES[settings.recipe]).build(task, model, layout)
        self.layout = self.recipe.layout
        spread = self.group.lockstep and task.rung.tuning == "full"
        self.parts = Parts(self.recipe.parts(), self.group, spread=spread)
        self.trained = self.parts.parameters
        health.check_trainable(model.named_parameters())
        self._targets = targets_of(task.train)
        health.check_supervised(map(self.plan.step, range(self.plan.total_steps)), self._targets)
        self.peak_rate, rate_reason = _learning_rate(settings, task.rung.tuning)
        health.check_schedule(map(self._rate, range(self.plan.total_steps)))
        self.saver = Saver(self)
        self.watch = health.Watch(settings.skip_bad_steps, self.saver.last_before)
        optimizer = self.parts.optimizer(rate=self.peak_rate, weight_decay=settings.weight_decay)
        self.objective, self.optimizer = accelerator.prepare(self.recipe, optimizer)
        self.accelerator = accelerator
        self.choices = {
            **precision.choices(),
            "layout": {"choice": str(layout), "reason": layout.reason},
            "learning_rate": {"choice": f"{self.peak_rate:g}", "reason": rate_reason},
        }
        if self.group.size > 1:
            self.choices["processes"] = {"choice": str(self.group.size), "reason": "as the job was given"}
        if self.group.lockstep:
            self.choices["sharded"] = {"choice": "yes", "reason": "as the job was given"}
        self._torn = False  # in the middle of an optimizer step: nothing to save
        self._pace = Pace()
        self._largest: dict[steps.Bound, list[int]] = {}

    @property
    def bound(self) -> steps.Bound:
        """How large a micro-batch may be now."""
        rows = 1 if self._alone else self.rung.batch_size
        return steps.Bound(rows, self.rung.micro_batch_tokens, padded=not self.layout.flat)

    def largest(self, bound: steps.Bound) -> list[int]:
        """Give the largest micro-batch of the whole training, which takes a look at every step, so once a bound."""
        if bound not in self._largest:
            self._largest[bound] = steps.largest_cut(self.plan, self.lengths, bound, self.group.size)
        return self._largest[bound]

    def settle(self) -> None:
        """Find out how large a micro-batch may be, where that is left to us."""
        set_checkpointing(self.model, on=self.rung.activation_checkpointing)
        self.objective.train()
        self.group.make_room(self.parts.whole.values())
        self.rung, self.choices["micro_batch_tokens"] = bounds.settle(self)

    def means(self) -> Means:
        """Tell what there was, for a user whose memory has run out."""
        return replace(_means(self.task), parameters=count(self.model.parameters()), longest=max(self.lengths))

    def announce(self) -> None:
        """Say what will be done, and what was decided."""
        sentence, figures = start_line(self)
        self.task.say.say(EventType.PLAN, sentence, **figures)

    def prepare(self) -> None:
        """Evaluate once to have a "before", and find out what does not fit before hours have gone into it."""
        self.group.spread(self.parts.whole.values())
        if self.done == 0:
            self.task.say.phase("evaluating", "evaluating before the first step")
            self._evaluate(measure=True, ask=True)
        else:
            self._evaluate_where_due()
        if self._largest_comes_late():
            self._forgiving(lambda: self.group.together(lambda: self._trial(self.bound)))
            self.drop_gradients()
        self.task.say.phase("training", "training")
        self._pace.start()

    def stop_if_asked(self) -> None:
        """Write a checkpoint and raise StopAskedError if somebody wants the trainer to stop: all ranks at one step."""
        if self.group.any(self.task.asked_to_stop()):
            self.saver.save()
            raise StopAskedError

    def hear_stop(self) -> None:
        """Raise StopAskedError if somebody wants the trainer to stop, in work that is done `together`."""
        asked = self.task.asked_to_stop()
        if self.group.any(asked) if self.group.lockstep else asked:
            raise StopAskedError

    def hear_own_stop(self) -> None:
        """Raise StopAskedError if this rank is asked to stop, in work in which no rank needs the others."""
        if self.task.asked_to_stop():
            raise StopAskedError

    def together(self, work: Callable[[], float]) -> float:
        """Do work between two steps that ranks share, and give the sum of what it comes to; once somebody wants the
        trainer to stop, write a checkpoint and raise StopAskedError.
        """
        try:
            return self.group.together(work)
        except StopAskedError:
            self.saver.save()
            raise

    def step(self) -> None:
        """Do one optimizer step."""
        settings, total = self.task.settings, self.plan.total_steps
        rows = self.plan.step(self.done)
        loss = self._forgiving(lambda: self._gathered(rows))
        self.group.sum_gradients(self.parts.whole.values())
        if self.parts.shares is not None:
            self.parts.shares.take_gradients()

        rate = self._rate(self.done)
        self.parts.set_rate(self.optimizer, rate)
        norms = self.parts.clip(self.accelerator, settings.max_grad_norm or math.inf)
        norm = joined(norms)
        self.parts.check(self.done + 1, norms)
        scaler = self.accelerator.scaler
        bad = self.watch.judge(self.done + 1, loss, norm, scale=scaler.get_scale() if scaler else None)
        if bad:
            self._skip(bad)
            return
        self._torn = True  # memory may run out in its middle, and what it changed by then cannot be told
        with self.watch.first_step(self.parts.stepped, rate=rate, grad_norm=norm, anywhere=self.group.any):
            self.optimizer.step()
        if self.parts.shares is not None:
            self.parts.shares.give()
        self._torn = False
        self.drop_gradients()

        self.done += 1
        speed, left = self._pace.after(sum(self.lengths[row] for row in rows), total - self.done)
        figures: dict[str, Any] = dict(self.recipe.figures())
        if len(norms) > 1:
            figures |= {f"grad_norm_{part}": norm for part, norm in norms.items()}
        self.metrics |= {"train_loss": loss, "step": self.done}
        self.task.say.say(
            EventType.METRICS,
            f"step {self.done} of {total}: loss {loss:.4f}, {speed:.0f} tokens/s",
            step=self.done,
            total_steps=total,
            epoch=round(self.plan.epoch_after(self.done), 4),
            train_loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_second=round(speed, 1),
            seconds_left=round(left, 1),
            peak_memory=memory.peak_bytes(),
            **figures,
        )

    def _skip(self, why: str) -> None:
        """Drop a bad step's gradient. The step counts as done, so that the plan goes on."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it takes no new gradient before
        self.drop_gradients()
        lines = ", ".join(str(self.task.train[row].line) for row in sorted(self.plan.step(self.done)))
        self.done += 1
        self.metrics |= {"step": self.done, "skipped_steps": self.watch.skipped}
        times = f"{self.watch.skipped} of at most {self.task.settings.skip_bad_steps}"
        self.task.say.warn(f"step {self.done} is skipped, {times}: {why}; its rows are lines {lines}")
        self._pace.start()

    def look_up(self) -> None:
        """After a step: evaluate and write a checkpoint when they are due.

        The best step so far is written at once, and the last one before the evaluation that follows it.
        """
        self._evaluate_where_due()
        self.saver.save_when_due()

    def conclude(self) -> None:
        """Evaluate a last time, and settle whether the last step or the best is published."""
        self.watch.check_end()
        self.task.say.phase("evaluating", "training is done")
        self._evaluate(measure=True, ask=True)
        self.metrics |= {"published_step": self.done} | self.recipe.metrics()
        if self.task.settings.publish == "best":
            self.saver.go_back(self.metrics.get("best_step", self.done))
        if self.group.leads:
            bounds.remember(self)

    def save_what_is_done(self) -> None:
        """Write a last checkpoint if memory allows and there is something to save."""
        if not self._torn:
            self.saver.save_what_is_done()

    def _evaluate_where_due(self) -> None:
        """Look at held-out rows between two steps where the settings say so: also when a stop cut it off."""
        settings = self.task.settings
        often = {"eval": settings.eval_steps, "epoch": self.plan.steps_per_epoch}
        ask_every = often.get(str(settings.predictions.frequency), settings.predictions.frequency)
        self._evaluate(
            measure=self._is_due(settings.eval_steps, "evaluated_step"), ask=self._is_due(ask_every, "asked_step")
        )

    def _is_due(self, every: Any, done: str) -> bool:
        between = every and self.done % every == 0 and 0 < self.done < self.plan.total_steps
        return bool(between and self.metrics.get(done) != self.done)

    def _evaluate(self, *, measure: bool, ask: bool) -> None:
        ask = ask and len(self.task.asked) > 0
        measure = measure and len(self.task.held_out) > 0
        if measure or ask:
            evaluate(self, measure=measure, ask=ask)
            self._pace.start()

    def try_backward(self, tokens: int) -> bool:
        """Try the largest micro-batch of at most so many tokens; say whether memory did."""
        bound = replace(self.bound, tokens=tokens)
        try:
            self.group.together(lambda: self._trial(bound))
        except (RuntimeError, MemoryError) as error:
            detail = memory.out_of_memory(error)
            if detail is None:
                raise
            if self.group.lockstep:
                raise OutOfMeansError(replace(self.rung, micro_batch_tokens=tokens), detail, self.means()) from None
        else:
            return True
        finally:
            self.drop_gradients()
        memory.give_back()
        return False

    def _trial(self, bound: steps.Bound) -> float:
        """Compute the gradient of the largest micro-batch of the training."""
        self.recipe.begin(self.done)
        return self._backward(self.largest(bound), 1)

    def _rate(self, step: int) -> float:
        total, warmup = self.plan.total_steps, self.task.settings.warmup_ratio
        return steps.learning_rate(step, total_steps=total, warmup_ratio=warmup, peak=self.peak_rate)

    def seen(self) -> Seen:
        """Give what this training took."""
        largest = self.largest(self.bound)
        accumulated = any(len(self._cut(self.plan.step(number))) > 1 for number in range(self.plan.total_steps))
        return Seen(largest, accumulated, memory.peak_bytes(), self._pace.overall, self._pace.seconds)

    def _largest_comes_late(self) -> bool:
        """Whether a later micro-batch needs clearly more than those of the next step, which need no trial."""
        if self.done == self.plan.total_steps:
            return False
        parts = steps.cut_for_all(self.plan.step(self.done), self.lengths, self.bound, self.group.size)
        coming = steps.largest(parts, self.lengths, self.bound)
        return self._largest_size() > 1.1 * self.bound.size(coming, self.lengths)

    def _largest_size(self) -> int:
        return self.bound.size(self.largest(self.bound), self.lengths)

    def _cut(self, rows: list[int]) -> list[list[int]]:
        """Give this rank's micro-batches of a step's rows."""
        return steps.cut(self.group.share(rows, self.lengths), self.lengths, self.bound)

    def _gathered(self, rows: list[int]) -> float:
        """Let all ranks gather their parts of a step's gradient, ready to be summed; give the step's mean loss."""
        loss = self.group.together(lambda: self._gradient(rows))
        self.group.complete(self.parts.whole.values())
        return loss

    def _gradient(self, rows: list[int]) -> float:
        """Gather this rank's part of a step's gradient over its micro-batches; give its part of the mean loss over the
        step's targets.
        """
        count = sum(self._targets[row] for row in rows)
        # Dropout follows from seed, step and rank, so that a step done again or after a resume is the same step.
        torch.manual_seed(self.task.settings.seed * 1_000_003 + self.done + self.group.rank * _APART)
        self.recipe.begin(self.done)
        if self.accelerator.scaler is not None:  # which is made by its first use, and a rank may have no rows
            self.accelerator.scaler.scale(torch.zeros((), device=self.task.device))
        loss = sum(self._backward(part, count) for part in self._cut(rows)) / count
        for _ in range(self.group.short_of(rows, self.lengths, self.bound)):
            self._keep_company(rows)
        return loss

    def _backward(self, rows: list[int], count: int) -> float:
        """Add the gradient of one micro-batch to that of its step, which has `count` targets; give the summed loss."""
        batch = self.layout.collate([self.task.train[row] for row in rows]).to(self.task.device)
        loss = self.objective(batch)
        self.accelerator.backward(loss / count)
        return float(loss.detach())

    def _keep_company(self, rows: list[int]) -> None:
        """Make a pass whose gradient is zero, because other ranks need this one for theirs."""
        shortest = min(rows, key=lambda row: self.lengths[row])
        batch = self.layout.collate([self.task.train[shortest]]).to(self.task.device)
        self.accelerator.backward(self.objective(batch) * 0)

    def drop_gradients(self) -> None:
        """Forget the gradients that are there, and give their memory back."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parts.whole.values():  # of which the optimizer may have views
            parameter.grad = None

    def _forgiving(self, work: Callable[[], float]) -> float:
        """Do the work, and when memory runs out do it again from its start, one rung lower."""
        again = False
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                detail = memory.out_of_memory(error)
                if detail is None or self.group.lockstep:
                    raise
            # Out of the except block: the traceback there holds the failed step's tensors.
            self.drop_gradients()
            memory.give_back()
            self._climb_down(detail, again=again)
            again = True

    def _climb_down(self, detail: str, *, again: bool) -> None:
        """Take the next rung that this process can take by itself, or raise OutOfMeansError.

        On a CPU memory that failed once may not come back at all (the allocator keeps the address space), so a second
        failure in a row is left to a new process.
        """
        lower = next_rung(self.rung)
        if lower is None or (again and self.task.device.type == "cpu"):
            raise OutOfMeansError(self.rung, detail, self.means())
        size, before = self._largest_size(), self.rung
        while lower is not None:
            self.rung, reason = lower
            # Rows that are long already stand alone, so that a rung may change nothing: then it is passed by.
            switched_on = self.rung.activation_checkpointing and not before.activation_checkpointing
            if switched_on or self._largest_size() < size:
                break
            lower = next_rung(self.rung)
        set_checkpointing(self.model, on=self.rung.activation_checkpointing)
        rung = self.rung.as_dict()
        sentence = f"out of memory; {reason}"
        self.task.say.say(EventType.RUNG, sentence, level="warning", rung=rung, reason=detail, step=self.done + 1)


def _learning_rate(settings: TrainingSettings, tuning: str) -> tuple[float, str]:
    """Settle the peak learning rate: the rate and why."""
    if settings.learning_rate != "auto":
        return settings.learning_rate, "as set"
    if tuning == "full":
        return _FULL_RATE, "all weights move, so each a little"
    return _ADAPTER_RATE, "usual for adapters"
