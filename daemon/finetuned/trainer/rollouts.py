"""Answers that a model gives while it learns, one to each prompt, drawn by lots that were cast before: what comes out
follows from the lots and the weights, never from the rows that stand beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList

from finetuned.trainer.lots import ByLot

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def side_by_side(prompts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put prompts, [tokens, width] each, into one batch that is padded at the left."""
    longest = max(map(len, prompts))
    rows = [torch.nn.functional.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=rows[0].device)
    mask = (torch.arange(longest, 0, -1, device=rows[0].device) <= lengths).long()
    return {"inputs_embeds": torch.stack(rows), "attention_mask": mask}


@torch.no_grad()
def last_states(model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Give the hidden states that the next token would be predicted from, [rows, width], as float32."""
    inputs = side_by_side(prompts)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found: torch.Tensor = model.get_decoder()(**inputs, position_ids=places, use_cache=False).last_hidden_state
    return found[:, -1].float()


@torch.no_grad()
def answers(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], lots: torch.Tensor, *, temperature: float, ends: set[int]
) -> list[list[int]]:
    """Give the tokens of each answer, with the one of `ends` that ends it if it comes in time.

    lots: [rows, most tokens], from 0 to 1; a negative one takes the most probable token.
    """
    inputs = side_by_side(prompts)
    generated = model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([ByLot(lots.to(inputs["inputs_embeds"].device), temperature)]),
        max_new_tokens=lots.shape[1],
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    return [_up_to_the_end(tokens, ends) for tokens in generated.tolist()]


def _up_to_the_end(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
