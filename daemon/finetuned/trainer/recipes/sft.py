"""Supervised fine-tuning: the cross-entropy of the wanted answer's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetuned.trainer.batches import Batch
from finetuned.trainer.layout import hidden_states
from finetuned.trainer.loss import summed_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(torch.nn.Module):
    """A model and what is asked of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take the model with its adapter on."""
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Give the summed loss in nats over the batch's targets, a float32 scalar."""
        causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return summed_loss(hidden_states(causal, batch), causal.get_output_embeddings(), batch.targets)
