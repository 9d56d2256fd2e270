"""Distillation: the labels as in supervised fine-tuning, and the predictions of a larger teacher beside them. Where the
teacher has another vocabulary, its hidden states go through a trained projector and the student's own head.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned.trainer.batches import Batch
from finetuned.trainer.capped import Capped, head_of
from finetuned.trainer.distill import curriculum, states
from finetuned.trainer.distill.divergence import divergence, logits_of, summed_divergence
from finetuned.trainer.distill.teacher import Lesson, Teacher
from finetuned.trainer.distill.terms import Projector, attention_loss, contrastive_loss, hidden_loss
from finetuned.trainer.layout import Layout
from finetuned.trainer.loss import summed_loss
from finetuned.trainer.model import causal
from finetuned.trainer.parts import MODEL, Part
from finetuned.trainer.recipes.sft import trainable
from finetuned.trainer.steps import plan_steps
from finetuned.trainer.store import targets_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.recipe_settings import Distill
    from finetuned.trainer.loop import Task, Training

PROJECTOR = "projector"
_HEAD, _CONTRASTIVE = "head", "contrastive"


def build(task: Task, model: PreTrainedModel, layout: Layout) -> Objective:
    """Take the model with its adapter on, and how micro-batches go through it. Raises ConfigError if a layer that is to
    be compared is not there.
    """
    return Objective(task, model, layout)


class Objective(torch.nn.Module):
    """A model, and what it learns from its teacher; the teacher is no part of the module."""

    def __init__(self, task: Task, model: PreTrainedModel, layout: Layout) -> None:
        super().__init__()
        if task.teacher is None:
            raise ValueError("recipe distill without a teacher")
        self.model, self.layout = model, layout
        self._task = task
        self._teacher: Teacher = task.teacher
        self._settings: Distill = task.settings.distill
        self._pairs = _Pairs(self._settings, causal(model), task.teacher.model)
        self.projectors = torch.nn.ModuleDict(self._projectors(task.settings.seed)).to(task.device)
        self._total = plan_steps(
            len(task.train),
            effective_batch=task.rung.effective_batch,
            epochs=task.settings.epochs,
            max_steps=task.settings.max_steps,
            seed=task.settings.seed,
        ).total_steps
        self.begin(0)

    def _projectors(self, seed: int) -> dict[str, Projector]:
        generator = torch.Generator().manual_seed(seed)
        own, other = causal(self.model).config.get_text_config().hidden_size, self._teacher.width
        found = {}
        if not self._teacher.same_vocabulary and curriculum.highest(self._settings.alpha):
            found[_HEAD] = Projector(other, own, generator)
        for mine, theirs in self._pairs.hidden:
            found[f"hidden_{mine}_{theirs}"] = Projector(own, other, generator)
        if self._pairs.contrastive:
            found[_CONTRASTIVE] = Projector(own, other, generator)
        return found

    def parts(self) -> dict[str, Part]:
        """Train the model, and the projectors where there are any."""
        beside = {name: p for name, p in self.named_parameters() if name.startswith("projectors.")}
        own = {name: p for name, p in trainable(self).items() if name not in beside}
        return {MODEL: Part(own), PROJECTOR: Part(beside, self._settings.projector_rate)}

    def begin(self, step: int) -> None:
        """Take the step's weights and temperature, and forget what was gathered in it."""
        settings = self._settings

        def now(course: float | list[float]) -> float:
            return curriculum.value(course, step, self._total)

        self._alpha, self._temperature = now(settings.alpha), now(settings.temperature)
        self._weights = {
            "labels": 1 - self._alpha,
            "teacher": self._alpha,
            "hidden": now(settings.hidden_weight),
            "attention": now(settings.attention_weight),
            "contrastive": now(settings.contrastive_weight),
        }
        self._measure = divergence(settings.divergence, temperature=self._temperature, top_k=settings.top_k)
        self._sums: dict[str, torch.Tensor] = {}
        self._slopes: dict[str, list[torch.Tensor]] | None = None
        if settings.norm_steps and step % settings.norm_steps == 0:
            self._slopes = {}
        self._targets = self._matched = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        """Give the weighted sum of the terms, each in nats or squares and summed over the batch's targets; in
        evaluation mode the cross-entropy of the labels.
        """
        if not self.training:
            hidden, head = self.layout.hidden_states(causal(self.model), batch)
            return summed_loss(hidden, head, batch.targets)
        terms = self._terms(batch)
        self._gather(terms, batch)
        loss = sum((self._weights[name] * term for name, term in terms.items() if name != PROJECTOR), torch.tensor(0.0))
        # It learns from the labels alone and teaches the student nothing, so it is no part of the loss that is told.
        return loss + (terms[PROJECTOR] - terms[PROJECTOR].detach()) if PROJECTOR in terms else loss

    def _terms(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Give every term that has a weight, and the projector's own loss."""
        pairs, model, weights = self._pairs, causal(self.model), self._weights
        with states.watching(model, pairs.student_layers, pairs.student_attention) as seen:
            hidden, head = self.layout.hidden_states(model, batch)
        found = {}
        if weights["labels"]:
            found["labels"] = summed_loss(hidden, head, batch.targets)
        if not (any(weights[name] for name in weights if name != "labels") or _HEAD in self.projectors):
            return found
        lesson = self._teacher.read(batch.examples, layers=pairs.teacher_layers, attention=pairs.teacher_attention)
        which = slice(None) if lesson.matched is None else lesson.matched.to(hidden.device)
        self._matched += lesson.hidden.shape[0]

        def own(of: torch.Tensor) -> torch.Tensor:
            return of.reshape(-1, of.shape[-1])[batch.positions][which]

        def theirs(of: torch.Tensor) -> torch.Tensor:
            return of.to(hidden.device)

        if _HEAD in self.projectors:  # it learns also while alpha is 0
            found |= self._across(hidden[which], head, lesson, batch.targets[which])
        elif weights["teacher"]:
            found["teacher"] = summed_divergence(
                hidden, head, lambda where: lesson.head(lesson.hidden[where]), self._measure
            )
        if weights["hidden"]:
            losses = [
                hidden_loss(own(seen.layers[s]), theirs(lesson.layers[t]), self._projector(f"hidden_{s}_{t}"))
                for s, t in pairs.hidden
            ]
            found["hidden"] = torch.stack(losses).mean()
        if weights["attention"]:
            losses = [
                attention_loss(
                    own(seen.attention[s, name]),
                    theirs(lesson.attention[t, name]),
                    lesson.counts,
                    (states.heads(model, name), states.heads(self._teacher.model, name)),
                )
                for s, t in pairs.attention
                for name in states.PROJECTIONS
            ]
            found["attention"] = torch.stack(losses).mean()
        if weights["contrastive"]:
            ((s, t),) = pairs.contrastive
            found["contrastive"] = contrastive_loss(
                own(seen.layers[s]),
                theirs(lesson.layers[t]),
                lesson.counts,
                self._projector(_CONTRASTIVE),
                temperature=self._settings.contrastive_temperature,
            )
        return found

    def _across(
        self, hidden: torch.Tensor, head: torch.nn.Module, lesson: Lesson, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Give the teacher's term across vocabularies, and the projector's own loss, where tokens meet.

        The teacher's hidden states go through the projector and the student's head: Zhang et al., Dual-Space Knowledge
        Distillation, arXiv:2406.17328, in the student's space. The projector learns from the labels alone, or it would
        lead wherever the student is already; the student learns from what comes out.
        """
        projector = self._projector(_HEAD)
        out = _held(head_of(causal(self.model)))
        states_of = lesson.hidden.to(hidden.device)
        found = {PROJECTOR: summed_loss(projector(states_of), out, targets)}
        if self._weights["teacher"]:
            found["teacher"] = summed_divergence(
                hidden, head, lambda where: logits_of(out, projector(states_of[where])), self._measure
            )
        return found

    def _projector(self, name: str) -> Projector:
        found = self.projectors[name]
        assert isinstance(found, Projector)
        return found

    def _gather(self, terms: dict[str, torch.Tensor], batch: Batch) -> None:
        """Take down values and, in some steps, slopes. Those are summed over micro-batches before their norm is taken,
        so that it is the step's.
        """
        self._targets += len(batch.targets)
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)).detach() + term.detach()
        if self._slopes is None:
            return
        for name, term in terms.items():
            if name == PROJECTOR:
                continue
            with torch.autocast(term.device.type, enabled=False):  # as the loop's own backward pass
                found = torch.autograd.grad(term, self._watched(), retain_graph=True, materialize_grads=True)
            before = self._slopes.get(name)
            self._slopes[name] = [
                slope.float() if before is None else before[place] + slope for place, slope in enumerate(found)
            ]

    def _watched(self) -> list[torch.nn.Parameter]:
        """Give the parameters by which slopes are taken: the adapter; of a whole model the first layer, through which
        all terms go, for a copy of all weights for each term would not fit.
        """
        own = self.parts()[MODEL].parameters
        layers = states.layers_of(causal(self.model))
        if self._task.rung.tuning != "full" or not layers:
            return list(own.values())
        return [p for p in layers[0].parameters() if p.requires_grad]

    def figures(self) -> dict[str, float]:
        """Give each term a target, what its weight makes of its gradient now and then, and what changes by itself."""
        targets, settings = max(1, self._targets), self._settings
        found = {f"loss_{name}": float(total) / targets for name, total in self._sums.items()}
        for name, slopes in (self._slopes or {}).items():
            norm = math.hypot(*(float(slope.norm()) for slope in slopes))
            found[f"grad_norm_{name}"] = self._weights[name] * norm / targets
        if isinstance(settings.alpha, list):
            found["alpha"] = self._alpha
        if isinstance(settings.temperature, list):
            found["temperature"] = self._temperature
        if not self._teacher.same_vocabulary:
            found["matched"] = self._matched / targets
        return found

    def measured(self, training: Training) -> dict[str, float]:
        """Give the teacher's loss on the held-out text, for each of the student's targets, and how much of what the
        teacher is better by than the untrained student has been learned: 1 is all of it.
        """
        metrics, held_out = training.metrics, self._task.held_out
        loss = metrics.get("teacher_valid_loss")
        if loss is None:
            mine = training.group.share_of(held_out)
            total = training.together(lambda: self._teacher.loss(mine, training.hear_own_stop))
            loss = total / sum(targets_of(held_out))
        gain = metrics.get("valid_loss_before", loss) - loss
        if gain <= 0:
            return {"teacher_valid_loss": loss}
        return {
            "teacher_valid_loss": loss,
            "retained": (metrics["valid_loss_before"] - metrics["valid_loss"]) / gain,
        }

    def save(self, folder: Path) -> None:
        """Write nothing: the projector served the training alone."""

    def metrics(self) -> dict[str, Any]:
        """Tell who the teacher was."""
        return {"teacher": str(self._teacher.found)}


class _Pairs:
    """Which layers of student and teacher are compared."""

    def __init__(self, settings: Distill, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        mine, theirs = states.depth(student), states.depth(teacher)
        # Where there are no layers the first is asked for, so that the check below says so.
        spread = [(layer, max(1, round(layer * theirs / max(1, mine)))) for layer in range(1, max(1, mine) + 1)]
        last = [(max(1, mine), max(1, theirs))]
        self.hidden = (settings.hidden_layers or spread) if curriculum.highest(settings.hidden_weight) else []
        self.attention = (settings.attention_layers or last) if curriculum.highest(settings.attention_weight) else []
        self.contrastive = last if curriculum.highest(settings.contrastive_weight) else []
        self.student_layers = {pair[0] for pair in (*self.hidden, *self.contrastive)}
        self.teacher_layers = {pair[1] for pair in (*self.hidden, *self.contrastive)}
        self.student_attention = {pair[0] for pair in self.attention}
        self.teacher_attention = {pair[1] for pair in self.attention}
        states.check(student, "the model", self.student_layers, self.student_attention)
        states.check(teacher, "the teacher", self.teacher_layers, self.teacher_attention)


def _held(head: torch.nn.Module) -> torch.nn.Module:
    """Give a head with the same weights, which are not learned through it."""
    if isinstance(head, Capped):
        return Capped(_held(head.head), head.cap)
    if not isinstance(head, torch.nn.Linear) or not head.weight.requires_grad:
        return head
    twin = torch.nn.Linear(1, 1, bias=False, device="meta")
    twin.weight = torch.nn.Parameter(head.weight.detach(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        twin.bias = torch.nn.Parameter(head.bias.detach(), requires_grad=False)
    twin.in_features, twin.out_features = head.in_features, head.out_features
    return twin
