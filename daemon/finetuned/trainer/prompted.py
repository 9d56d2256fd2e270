"""A model whose rows begin with embeddings that are no token's: those of a soft prompt, or of a row's own first tokens
as a policy has refined them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from finetuned.trainer.batches import Batch
from finetuned.trainer.layout import Layout
from finetuned.trainer.model import causal
from finetuned.trainer.soft_prompt import soft_prompt
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OWN = 8  # tokens of a row that are refined where there is no soft prompt


class Prompted:
    """A model and how micro-batches go through it. Where `layout.lead` says so, rows have places for a soft prompt."""

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        self.model, self.layout = causal(model), layout
        self._wrapped = model

    @property
    def table(self) -> torch.nn.Module:
        """Give what turns tokens into embeddings."""
        found: torch.nn.Module = self.model.get_input_embeddings()
        return found

    def prompt(self, question: Sequence[int]) -> torch.Tensor:
        """Give the embeddings that a policy may refine, [tokens, width]: the soft prompt's, or those of the question's
        own first tokens.
        """
        return soft_prompt(self._wrapped) if self.layout.lead else self._look_up(question[:OWN])

    def embedded(self, tokens: Sequence[int], prompt: torch.Tensor) -> torch.Tensor:
        """Give the embeddings of a row, [tokens, width], the first of which are those of a prompt."""
        own = self._look_up(tokens)
        return torch.cat([prompt.to(own.dtype), own[len(prompt) :]])

    def plain(self, batch: Batch) -> tuple[torch.Tensor, torch.nn.Module]:
        """Let a micro-batch go through the model with the soft prompt, if there is one; else as `hidden`."""
        return self.hidden(batch, [soft_prompt(self._wrapped)] * len(batch.starts) if self.layout.lead else [])

    def hidden(self, batch: Batch, prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.nn.Module]:
        """Let a micro-batch go through the model, its rows' first embeddings those of prompts; as
        `Layout.hidden_states`.
        """
        if prompts:
            inputs = dict(batch.inputs)
            own = self.table(inputs.pop("input_ids"))
            pairs = zip(batch.starts, prompts, strict=True)
            places = torch.cat([torch.arange(start, start + len(prompt)) for start, prompt in pairs]).to(own.device)
            flat = own.reshape(-1, own.shape[-1]).index_copy(0, places, torch.cat(list(prompts)).to(own.dtype))
            batch = replace(batch, inputs={"inputs_embeds": flat.view_as(own), **inputs})
        return self.layout.hidden_states(self.model, batch)

    def _look_up(self, tokens: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = self.table(torch.tensor(tokens, device=next(self.table.parameters()).device))
        return found


def parted(example: Example) -> tuple[list[int], list[int]]:
    """Give the tokens of all that comes before a row's last answer, and of that answer."""
    end = max(place for place, learned in enumerate(example.supervised) if learned) + 1
    begin = next((place + 1 for place in range(end - 1, -1, -1) if not example.supervised[place]), 1)
    return example.ids[:begin], example.ids[begin:end]
