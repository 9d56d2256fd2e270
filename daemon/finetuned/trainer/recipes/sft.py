"""Supervised fine-tuning: the cross-entropy of the wanted answer's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetuned.trainer.batches import Batch
from finetuned.trainer.layout import Layout
from finetuned.trainer.loss import summed_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(torch.nn.Module):
    """A model and what is asked of it."""

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        """Take the model with its adapter on, and how micro-batches go through it."""
        super().__init__()
        self.model = model
        self.layout = layout

    def forward(self, batch: Batch) -> torch.Tensor:
        """Give the summed loss in nats over the batch's targets, a float32 scalar."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden, head = self.layout.hidden_states(causal, batch)
        return summed_loss(hidden, head, batch.targets)
