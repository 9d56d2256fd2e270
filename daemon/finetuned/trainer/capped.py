"""A model's output head, with what the model does to logits behind it: Gemma 2 and its kin cap them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Capped(torch.nn.Module):
    """A head whose logits stay within a cap: cap * tanh(logits / cap), Gemma 2, arXiv:2408.00118, section 2."""

    def __init__(self, head: torch.nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap = head, cap

    @property
    def weight(self) -> torch.nn.Parameter:
        """Give the head's own."""
        return self.head.get_parameter("weight")

    @property
    def out_features(self) -> int:
        """Give the size of the vocabulary."""
        return len(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give the logits of some positions, as the model would."""
        return torch.tanh(self.head(hidden) / self.cap) * self.cap


def head_of(model: PreTrainedModel) -> torch.nn.Module:
    """Give what turns last hidden states into logits, so that it can be applied to some of them at a time."""
    head: torch.nn.Module = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Capped(head, cap) if cap else head
