"""What a training keeps of itself while it is under way, and how it goes on from there. Files: `checkpoint.py`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from finetuned.events import EventType
from finetuned.trainer import checkpoint, memory

if TYPE_CHECKING:
    from finetuned.trainer.loop import Training


class Saver:
    """The checkpoints of one training."""

    def __init__(self, training: Training) -> None:
        """Begin with nothing saved."""
        self._training = training
        self._folder = training.task.checkpoints
        self._plan = training.plan.fingerprint()
        self._saved_at, self._saved_step = time.monotonic(), 0

    def resume(self) -> None:
        """Go on where an earlier attempt left off, from the newest checkpoint that is whole."""
        training, say = self._training, self._training.task.say
        found, passed_over = training.group.told(lambda: checkpoint.newest(self._folder, plan=self._plan))
        for sentence in passed_over:
            say.warn(f"checkpoint {sentence}")
        if found is None:
            return
        weights, state = self._load(found)
        self._put(weights)
        shares = training.parts.shares
        options = training.parts.options()
        training.optimizer.load_state_dict(state["optimizer"] if shares is None else shares.cut(state["optimizer"]))
        for group in training.optimizer.param_groups:
            group.update(options)  # which those of an attempt with another number of ranks are not
        scaler = training.accelerator.scaler
        if scaler is not None and "scaler" in state:
            scaler.load_state_dict(state["scaler"])
        training.done = self._saved_step = found.step
        training.watch.load(found.extra.pop("health", {}))
        training.parts.load(found.extra.pop("idle_parts", {}))
        training.metrics = found.extra
        total = training.plan.total_steps
        say.say(EventType.MESSAGE, f"resumed after step {training.done} of {total}", step=training.done)

    def save_when_due(self) -> None:
        """Write a checkpoint by steps, by minutes, of the best step so far, and of the last."""
        training = self._training
        settings, done = training.task.settings, training.done
        late = time.monotonic() - self._saved_at > settings.checkpoint_minutes * 60
        best = training.metrics.get("best_step") == done
        last = done == training.plan.total_steps
        due = last or late or best or done % settings.checkpoint_steps == 0
        if training.parts.shares is not None:
            due = training.group.any(due)
        if due and not training.watch.in_a_row:  # one of broken weights would push out a good one
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the steps that are done, if there are any since the last: rank 0's stands for all.

        Memory that runs out here may be back the next moment, so it is tried twice: no smaller batch would help.
        """
        shares = self._training.parts.shares
        if self._training.done == self._saved_step or not (self._training.group.leads or shares):
            return
        try:
            self._write()
        except (RuntimeError, MemoryError) as error:
            if memory.out_of_memory(error) is None or shares:
                raise
        else:
            return
        memory.give_back()
        self._write()

    def save_what_is_done(self) -> None:
        """Write a last checkpoint if memory allows: the weights are those of the last whole step, only gradients are
        lost. Where each rank has a share of them the others may be gone, and there is none.
        """
        if self._training.done == self._saved_step or not self._training.group.leads or self._training.parts.shares:
            return
        self._training.drop_gradients()
        memory.give_back()
        try:
            self.save()
        except (RuntimeError, MemoryError, OSError) as error:
            self._training.task.say.warn(f"no checkpoint could be written: {error}")

    def go_back(self, step: int) -> None:
        """Put the weights of an earlier step into the model, to be published."""
        training, say = self._training, self._training.task.say
        if step == training.done:
            return
        found = training.group.told(lambda: checkpoint.of_step(self._folder, step, plan=self._plan))
        if isinstance(found, str):
            say.warn(f"the last step is published and not the best: checkpoint {found}")
            return
        self._put(self._load(found)[0])
        training.metrics |= {"published_step": step, "valid_loss": training.metrics["best_valid_loss"]}
        if "teacher_valid_loss" in training.metrics:
            training.metrics |= training.recipe.measured(training)  # what follows from that loss
        say.say(EventType.MESSAGE, f"step {step} is published, whose held-out loss was the lowest", step=step)

    def last_before(self, step: int) -> int | None:
        """Give the step of the newest checkpoint that was written before a step."""
        found, _ = checkpoint.newest(self._folder, plan=self._plan, before=step)
        return found.step if found else None

    def _load(self, found: checkpoint.Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read a checkpoint: onto the device, where that has all weights."""
        task, spread = self._training.task, self._training.parts.shares is not None
        return checkpoint.load(found, device=torch.device("cpu") if spread else task.device, mapped=spread)

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        if self._training.parts.shares is not None:
            self._training.parts.shares.put(weights)
            return
        for name, parameter in self._training.trained.items():
            parameter.copy_(weights[name])

    def _write(self) -> None:
        training, shares = self._training, self._training.parts.shares
        scaler = training.accelerator.scaler
        trained, optimizer = training.trained, training.optimizer.state_dict()
        if shares is not None:
            trained, optimizer = shares.whole((training.parts.stepped, optimizer))
        if training.group.leads:
            checkpoint.save(
                self._folder,
                step=training.done,
                plan=self._plan,
                trained=trained,
                optimizer={"optimizer": optimizer, **({"scaler": scaler.state_dict()} if scaler else {})},
                keep=training.task.settings.keep_checkpoints,
                extra={**training.metrics, "health": training.watch.state(), "idle_parts": training.parts.state()},
                best=training.metrics.get("best_step"),
            )
        self._saved_at, self._saved_step = time.monotonic(), training.done
        sentence = f"checkpoint after step {training.done}"
        training.task.say.say(EventType.CHECKPOINT, sentence, checkpoint_step=training.done)
