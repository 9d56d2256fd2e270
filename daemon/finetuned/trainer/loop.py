"""The training loop. Begin with `train`, then read `Training` top to bottom.

What a step is (`steps.py`) is fixed before the first one; the loop may cut it smaller, do it again or continue it in
another process, and the weights come out the same.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned.config import TrainingSettings
from finetuned.events import EventType
from finetuned.fallback import Rung, next_rung
from finetuned.trainer import bounds, checkpoint, fused, health, memory, steps
from finetuned.trainer.batches import Example
from finetuned.trainer.chain import Earlier
from finetuned.trainer.ends import Means, OutOfMeansError, StopAskedError
from finetuned.trainer.layout import Layout, choose_layout
from finetuned.trainer.lora import add_adapter
from finetuned.trainer.model import Base, evaluating, load_model, set_checkpointing
from finetuned.trainer.precision import Precision, choose, in_force
from finetuned.trainer.predictions import predict
from finetuned.trainer.recipes import RECIPES
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.start_line import count, start_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FULL_RATE, _ADAPTER_RATE = 1e-5, 2e-4  # peak learning rates where config.json leaves it to us


@dataclass(frozen=True)
class Task:
    """What the loop is given: checked settings and data, and who to talk to."""

    settings: TrainingSettings
    rung: Rung  # its tuning is settled
    base: Base
    tokenizer: PreTrainedTokenizerBase
    train: list[Example]
    held_out: list[Example]
    device: torch.device
    checkpoints: Path
    bounds: Path  # what earlier trainings found out about micro-batches
    say: Reporter
    asked_to_stop: Callable[[], bool]
    earlier: Earlier | None = None  # what the adapter builds on


@dataclass
class Trained:
    """What the loop gives back."""

    model: PreTrainedModel
    rung: Rung
    metrics: dict[str, Any]
    choices: dict[str, dict[str, str]]  # every automatic decision with its reason
    seen: Seen


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

    Raises StopAskedError or OutOfMeansError, with a checkpoint of all steps that are done, UnhealthyError, ModelError
    or ConfigError.
    """
    precision = choose(task.device, task.rung.tuning, task.settings.dtype)
    task.say.phase("loading_model", f"loading {task.base.name}")
    model, layout = _load(task, precision)
    training = Training(task, model, layout, precision)
    try:
        training.settle()
        training.announce()
        training.resume()
        training.prepare()
        while training.done < training.plan.total_steps:
            training.stop_if_asked()
            training.step()
            training.look_up()
        training.conclude()
    except OutOfMeansError:
        training.save_what_is_done()
        raise
    except (RuntimeError, MemoryError) as error:  # elsewhere than in a step's own work
        detail = memory.out_of_memory(error)
        if detail is None:
            raise
        training.save_what_is_done()
        raise OutOfMeansError(training.rung, detail, training.means()) from None
    return Trained(model, training.rung, training.metrics, training.choices, training.seen())


def _load(task: Task, precision: Precision) -> tuple[PreTrainedModel, Layout]:
    """Load the model in the number formats that the hardware likes, with an adapter or whole."""
    try:
        model = load_model(task.base, task.settings, tuning=task.rung.tuning, precision=precision, device=task.device)
        # Dropout draws anew for every token, so tokens that rows share could not stand for all of them.
        share = not task.settings.lora_dropout
        layout = choose_layout(model, precision.compute, name=task.base.name, share=share)
        if task.rung.tuning != "full":
            model = add_adapter(model, task.base, task.settings, precision=precision, earlier=task.earlier)
            fused.fuse(model)
    except (RuntimeError, MemoryError) as error:
        detail = memory.out_of_memory(error)
        if detail is None:
            raise
        # No smaller batch helps a model that does not fit: only the rungs below them may.
        foot = replace(task.rung, batch_size=1, gradient_accumulation=task.rung.effective_batch)
        raise OutOfMeansError(replace(foot, activation_checkpointing=True), detail, _means(task)) from None
    return model, layout


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
        self.done = 0
        self.metrics: dict[str, Any] = {}
        self.lengths = [len(example.ids) for example in task.train]
        self.plan = steps.plan_steps(
            len(task.train),
            effective_batch=task.rung.effective_batch,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
        )
        accelerator = in_force(precision, task.device)
        objective = importlib.import_module(RECIPES["sft"]).Objective(model, layout)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        health.check_trainable(objective.named_parameters())
        health.check_supervised(map(self.plan.step, range(self.plan.total_steps)), [row.targets for row in task.train])
        self.peak_rate, rate_reason = _learning_rate(settings, task.rung.tuning)
        health.check_schedule(map(self._rate, range(self.plan.total_steps)))
        self.watch = health.Watch(settings.skip_bad_steps, self._checkpoint_before)
        optimizer = torch.optim.AdamW(self.trained.values(), lr=self.peak_rate, weight_decay=settings.weight_decay)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.accelerator = accelerator
        self.choices = {
            **precision.choices(),
            "layout": {"choice": str(layout), "reason": layout.reason},
            "learning_rate": {"choice": f"{self.peak_rate:g}", "reason": rate_reason},
        }
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._torn = False  # in the middle of an optimizer step: nothing to save
        self._pace = _Pace()
        self._largest: dict[steps.Bound, list[int]] = {}

    @property
    def bound(self) -> steps.Bound:
        """How large a micro-batch may be now."""
        return steps.Bound(self.rung.batch_size, self.rung.micro_batch_tokens, padded=not self.layout.flat)

    def largest(self, bound: steps.Bound) -> list[int]:
        """Give the largest micro-batch of the whole training, which takes a look at every step, so once a bound."""
        if bound not in self._largest:
            self._largest[bound] = steps.largest_cut(self.plan, self.lengths, bound)
        return self._largest[bound]

    def settle(self) -> None:
        """Find out how large a micro-batch may be, where that is left to us."""
        set_checkpointing(self.model, on=self.rung.activation_checkpointing)
        self.objective.train()
        self.rung, self.choices["micro_batch_tokens"] = bounds.settle(self)

    def means(self) -> Means:
        """Tell what there was, for a user whose memory has run out."""
        return replace(_means(self.task), parameters=count(self.model.parameters()), longest=max(self.lengths))

    def announce(self) -> None:
        """Say what will be done, and what was decided."""
        sentence, figures = start_line(self)
        self.task.say.say(EventType.PLAN, sentence, **figures)

    def resume(self) -> None:
        """Go on where an earlier attempt left off, from the newest checkpoint that is whole."""
        task, scaler = self.task, self.accelerator.scaler
        found, passed_over = checkpoint.newest(task.checkpoints, plan=self.plan.fingerprint())
        for sentence in passed_over:
            task.say.warn(f"checkpoint {sentence}")
        if found is None:
            return
        weights, state = checkpoint.load(found, device=task.device)
        self._put_weights(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])
        self.done = self._saved_step = found.step
        self.watch.load(found.extra.pop("health", {}))
        self.metrics = found.extra
        total = self.plan.total_steps
        task.say.say(EventType.MESSAGE, f"resumed after step {self.done} of {total}", step=self.done)

    @torch.no_grad()
    def _put_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def prepare(self) -> None:
        """Evaluate once to have a "before", and find out what does not fit before hours have gone into it."""
        if self.done == 0:
            self.evaluate()
        if self._largest_comes_late():
            self._forgiving(lambda: self._backward(self.largest(self.bound), 1))
            self.optimizer.zero_grad(set_to_none=True)
        self.task.say.phase("training", "training")
        self._pace.start()

    def stop_if_asked(self) -> None:
        """Write a checkpoint and raise StopAskedError if somebody wants the trainer to stop."""
        if self.task.asked_to_stop():
            self.save()
            raise StopAskedError

    def step(self) -> None:
        """Do one optimizer step."""
        settings, total = self.task.settings, self.plan.total_steps
        rows = self.plan.step(self.done)
        loss = self._forgiving(lambda: self._gradient(rows))

        rate = self._rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(self.accelerator.clip_grad_norm_(self.trained.values(), settings.max_grad_norm or float("inf")))
        scaler = self.accelerator.scaler
        bad = self.watch.judge(self.done + 1, loss, norm, scale=scaler.get_scale() if scaler else None)
        if bad:
            self._skip(bad)
            return
        self._torn = True  # memory may run out in its middle, and what it changed by then cannot be told
        with self.watch.first_step(self.trained, rate=rate, grad_norm=norm):
            self.optimizer.step()
        self._torn = False
        self.optimizer.zero_grad(set_to_none=True)

        self.done += 1
        speed, left = self._pace.after(sum(self.lengths[row] for row in rows), total - self.done)
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
        )

    def _skip(self, why: str) -> None:
        """Drop a bad step's gradient. The step counts as done, so that the plan goes on."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it takes no new gradient before
        self.optimizer.zero_grad(set_to_none=True)
        lines = ", ".join(str(self.task.train[row].row.line) for row in sorted(self.plan.step(self.done)))
        self.done += 1
        self.metrics |= {"step": self.done, "skipped_steps": self.watch.skipped}
        times = f"{self.watch.skipped} of at most {self.task.settings.skip_bad_steps}"
        self.task.say.warn(f"step {self.done} is skipped, {times}: {why}; its rows are lines {lines}")
        self._pace.start()

    def look_up(self) -> None:
        """After a step: evaluate and write a checkpoint when they are due.

        The best step so far is written at once, and the last one before the evaluation that follows it.
        """
        settings = self.task.settings
        last = self.done == self.plan.total_steps
        if settings.eval_steps and self.done % settings.eval_steps == 0 and not last:
            self.evaluate()
        late = time.monotonic() - self._saved_at > settings.checkpoint_minutes * 60
        best = self.metrics.get("best_step") == self.done
        due = last or late or best or self.done % settings.checkpoint_steps == 0
        if due and not self.watch.in_a_row:  # one of broken weights would push out a good one
            self.save()

    def conclude(self) -> None:
        """Evaluate a last time, and settle whether the last step or the best is published."""
        self.watch.check_end()
        self.task.say.phase("evaluating", "training is done")
        self.evaluate()
        self.metrics["published_step"] = self.done
        if self.task.settings.publish == "best":
            self._go_back(self.metrics.get("best_step", self.done))
        bounds.remember(self)

    def _go_back(self, step: int) -> None:
        """Put the weights of an earlier step into the model."""
        task = self.task
        if step == self.done:
            return
        found = checkpoint.of_step(task.checkpoints, step, plan=self.plan.fingerprint())
        if isinstance(found, str):
            task.say.warn(f"the last step is published and not the best: checkpoint {found}")
            return
        self._put_weights(checkpoint.load(found, device=task.device)[0])
        self.metrics |= {"published_step": step, "valid_loss": self.metrics["best_valid_loss"]}
        task.say.say(EventType.MESSAGE, f"step {step} is published, whose held-out loss was the lowest", step=step)

    def evaluate(self) -> None:
        """Measure the held-out loss and ask some held-out questions. Memory that runs out here ends no training."""
        if not self.task.held_out:
            return
        for measure in (self._measure_loss, self._ask):
            try:
                measure()
            except (RuntimeError, MemoryError) as error:
                detail = memory.out_of_memory(error)
                if detail is None:
                    raise
            else:
                continue
            memory.give_back()
            self.task.say.warn(f"out of memory in the evaluation after step {self.done}, which is left out: {detail}")
        self._pace.start()

    def _measure_loss(self) -> None:
        began = time.monotonic()
        self.metrics.pop("valid_loss", None)  # that of an earlier step must not pass for this one's
        loss = self.metrics["valid_loss"] = self._held_out_loss()
        if self.done == 0:
            self.metrics["valid_loss_before"] = loss
        elif loss < self.metrics.get("best_valid_loss", float("inf")):
            self.metrics |= {"best_valid_loss": loss, "best_step": self.done}
        sentence = f"held-out loss {loss:.4f} after step {self.done} ({time.monotonic() - began:.1f} s)"
        self.task.say.say(EventType.METRICS, sentence, step=self.done, valid_loss=loss)

    def _ask(self) -> None:
        settings = self.task.settings.predictions
        asked = [example.row for example in self.task.held_out[: settings.samples]]
        answers = predict(self.model, self.task.tokenizer, asked, max_new_tokens=settings.max_new_tokens)
        if answers:
            samples = [answer.as_dict() for answer in answers]
            exact = sum(sample["exact"] for sample in samples)
            sentence = f"predictions saved={len(samples)} exact={exact}/{len(samples)} step={self.done}"
            self.task.say.say(EventType.PREDICTIONS, sentence, step=self.done, samples=samples)

    def save(self) -> None:
        """Write a checkpoint of the steps that are done, if there are any since the last.

        Memory that runs out here may be back the next moment, so it is tried twice: no smaller batch would help.
        """
        if self.done == self._saved_step:
            return
        try:
            self._write_checkpoint()
        except (RuntimeError, MemoryError) as error:
            if memory.out_of_memory(error) is None:
                raise
        else:
            return
        memory.give_back()
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        scaler, settings = self.accelerator.scaler, self.task.settings
        state = {"optimizer": self.optimizer.state_dict(), **({"scaler": scaler.state_dict()} if scaler else {})}
        checkpoint.save(
            self.task.checkpoints,
            step=self.done,
            plan=self.plan.fingerprint(),
            trained=self.trained,
            optimizer=state,
            keep=settings.keep_checkpoints,
            extra=self.metrics | {"health": self.watch.state()},
            best=self.metrics.get("best_step"),
        )
        self._saved_at, self._saved_step = time.monotonic(), self.done
        sentence = f"checkpoint after step {self.done}"
        self.task.say.say(EventType.CHECKPOINT, sentence, checkpoint_step=self.done)

    def save_what_is_done(self) -> None:
        """Write a last checkpoint if memory allows: the weights are those of the last whole step, only gradients are
        lost.
        """
        if self.done == self._saved_step or self._torn:
            return
        self.optimizer.zero_grad(set_to_none=True)
        memory.give_back()
        try:
            self.save()
        except (RuntimeError, MemoryError, OSError) as error:
            self.task.say.warn(f"no checkpoint could be written: {error}")

    def try_backward(self, tokens: int) -> bool:
        """Try the largest micro-batch of at most so many tokens; say whether memory did."""
        bound = replace(self.bound, tokens=tokens)
        try:
            self._backward(self.largest(bound), 1)
        except (RuntimeError, MemoryError) as error:
            if memory.out_of_memory(error) is None:
                raise
        else:
            return True
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        memory.give_back()
        return False

    def _rate(self, step: int) -> float:
        total, warmup = self.plan.total_steps, self.task.settings.warmup_ratio
        return steps.learning_rate(step, total_steps=total, warmup_ratio=warmup, peak=self.peak_rate)

    def _checkpoint_before(self, step: int) -> int | None:
        found, _ = checkpoint.newest(self.task.checkpoints, plan=self.plan.fingerprint(), before=step)
        return found.step if found else None

    def seen(self) -> Seen:
        """Give what this training took."""
        largest = self.largest(self.bound)
        accumulated = any(len(self._cut(self.plan.step(number))) > 1 for number in range(self.plan.total_steps))
        return Seen(largest, accumulated, memory.peak_bytes(), self._pace.overall, self._pace.seconds)

    def _largest_comes_late(self) -> bool:
        """Whether a later micro-batch needs clearly more than those of the next step, which need no trial."""
        if self.done == self.plan.total_steps:
            return False
        coming = steps.largest(self._cut(self.plan.step(self.done)), self.lengths, self.bound)
        return self._largest_size() > 1.1 * self.bound.size(coming, self.lengths)

    def _largest_size(self) -> int:
        return self.bound.size(self.largest(self.bound), self.lengths)

    def _cut(self, rows: list[int]) -> list[list[int]]:
        return steps.cut(rows, self.lengths, self.bound)

    def _gradient(self, rows: list[int]) -> float:
        """Gather a step's gradient over its micro-batches; give the mean loss over the step's targets."""
        count = sum(self.task.train[row].targets for row in rows)
        # Dropout follows from seed and step, so that a step done again or after a resume is the same step.
        torch.manual_seed(self.task.settings.seed * 1_000_003 + self.done)
        return sum(self._backward(part, count) for part in self._cut(rows)) / count

    def _backward(self, rows: list[int], count: int) -> float:
        """Add the gradient of one micro-batch to that of its step, which has `count` targets; give the summed loss."""
        batch = self.layout.collate([self.task.train[row] for row in rows]).to(self.task.device)
        loss = self.objective(batch)
        self.accelerator.backward(loss / count)
        return float(loss.detach())

    def _forgiving(self, work: Callable[[], float]) -> float:
        """Do the work, and when memory runs out do it again from its start, one rung lower."""
        again = False
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                detail = memory.out_of_memory(error)
                if detail is None:
                    raise
            # Out of the except block: the traceback there holds the failed step's tensors.
            self.optimizer.zero_grad(set_to_none=True)
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
        size = self._largest_size()
        while lower is not None:
            self.rung, reason = lower
            # Rows that are long already stand alone, so that a rung may change nothing: then it is passed by.
            if self.rung.activation_checkpointing or self._largest_size() < size:
                break
            lower = next_rung(self.rung)
        set_checkpointing(self.model, on=self.rung.activation_checkpointing)
        rung = self.rung.as_dict()
        sentence = f"out of memory; {reason}"
        self.task.say.say(EventType.RUNG, sentence, level="warning", rung=rung, reason=detail, step=self.done + 1)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Give the mean loss in nats over the held-out supervised tokens. Its batches adapt on their own."""
        rows = self.task.held_out
        lengths = [len(example.ids) for example in rows]
        bound = self.bound
        while True:
            total = 0.0
            try:
                with evaluating(self.objective):
                    for part in steps.cut(list(range(len(rows))), lengths, bound):
                        total += float(
                            self.objective(self.layout.collate([rows[row] for row in part]).to(self.task.device))
                        )
                return total / sum(example.targets for example in rows)
            except (RuntimeError, MemoryError) as error:
                if memory.out_of_memory(error) is None or bound.rows == 1:
                    raise
            memory.give_back()
            bound = replace(bound, rows=bound.rows // 2, tokens=bound.tokens and max(1, bound.tokens // 2))


def _learning_rate(settings: TrainingSettings, tuning: str) -> tuple[float, str]:
    """Settle the peak learning rate: the rate and why."""
    if settings.learning_rate != "auto":
        return settings.learning_rate, "as set"
    if tuning == "full":
        return _FULL_RATE, "all weights move, so each a little"
    return _ADAPTER_RATE, "usual for adapters"


class _Pace:
    """Speed and time left, smoothed over the last steps."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._step_seconds: float | None = None
        self._sum_tokens, self.seconds = 0, 0.0  # of all steps so far

    @property
    def overall(self) -> float:
        """Tokens per second of all steps so far."""
        return self._sum_tokens / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        """Leave out what was done between two steps."""
        self._last = time.monotonic()

    def after(self, tokens: int, steps_left: int) -> tuple[float, float]:
        """Give the step's tokens per second and the seconds left."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._sum_tokens, self.seconds = self._sum_tokens + tokens, self.seconds + seconds
        smooth = self._step_seconds
        self._step_seconds = seconds if smooth is None else 0.8 * smooth + 0.2 * seconds
        return tokens / max(seconds, 1e-9), self._step_seconds * steps_left
