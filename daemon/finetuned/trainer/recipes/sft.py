"""Supervised fine-tuning: the cross-entropy of the wanted answer's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned.trainer.batches import Batch
from finetuned.trainer.layout import Layout
from finetuned.trainer.loss import summed_loss
from finetuned.trainer.model import causal
from finetuned.trainer.parts import MODEL, Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.trainer.loop import Task, Training


def build(_: Task, model: PreTrainedModel, layout: Layout) -> Objective:
    """Take the model with its adapter on, and how micro-batches go through it."""
    return Objective(model, layout)


class Objective(torch.nn.Module):
    """A model and what is asked of it."""

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    def forward(self, batch: Batch) -> torch.Tensor:
        """Give the summed loss in nats over the batch's targets, a float32 scalar."""
        hidden, head = self.layout.hidden_states(causal(self.model), batch)
        return summed_loss(hidden, head, batch.targets)

    def parts(self) -> dict[str, Part]:
        """Train the model alone."""
        return {MODEL: Part(trainable(self))}

    def begin(self, step: int) -> None:
        """Gather nothing."""

    def figures(self) -> dict[str, float]:
        """Tell nothing beside the loss."""
        return {}

    def measured(self, _: Training) -> dict[str, float]:
        """Measure nothing beside the held-out loss."""
        return {}

    def metrics(self) -> dict[str, Any]:
        """Tell nothing beside the losses."""
        return {}

    def save(self, folder: Path) -> None:
        """Write nothing beside the model."""


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Give the parameters that are trained, by their names."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
