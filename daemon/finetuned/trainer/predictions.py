"""What the model answers while it learns: the same held-out questions each time, greedily, before the first step and
after.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuned.dataset.rows import Row
from finetuned.trainer.attention import without_flat
from finetuned.trainer.chat import Renderer
from finetuned.trainer.model import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """One question, the answer that was wanted, and the one that came."""

    prompt: str
    expected: str
    answer: str

    def as_dict(self) -> dict[str, Any]:
        """Give it as it is stored."""
        return {**asdict(self), "exact": self.answer.strip() == self.expected.strip()}


@torch.no_grad()
def predict(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], *, max_new_tokens: int
) -> list[Prediction]:
    """Answer the last assistant turn of each row, in one batch padded at the left. The model is left as it was.

    Autocast is off: generation runs in the model's own number formats. Attention is transformers' own, as flat rows
    know no cache.
    """
    asked = [
        (row.messages[:turn], row.tools, row.messages[turn].content) for row in rows if (turn := _last_answer(row)) > 0
    ]
    if not asked:
        return []
    device = next(model.parameters()).device
    ending = {name: getattr(tokenizer, name) for name in ("padding_side", "pad_token")}
    attention = model.config._attn_implementation  # noqa: SLF001
    cache = model.config.use_cache
    try:
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        model.set_attn_implementation(without_flat(model))
        model.config.use_cache = True
        renderer = Renderer(tokenizer)
        prompts = [renderer.render(chat, tools, add_generation_prompt=True) for chat, tools, _ in asked]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with evaluating(model), torch.autocast(device.type, enabled=False):
            generated = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(_turn_ends(model, tokenizer)),
            )
    finally:
        for name, value in ending.items():
            setattr(tokenizer, name, value)
        model.set_attn_implementation(attention)
        model.config.use_cache = cache
    answers = tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return [
        Prediction(chat[-1].content, expected, answer.strip())
        for (chat, _, expected), answer in zip(asked, answers, strict=True)
    ]


def _turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Give the tokens that end an answer: some models end a turn with another token than a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def _last_answer(row: Row) -> int:
    """Index of the last assistant message, or -1."""
    return max((index for index, turn in enumerate(row.messages) if turn.role == "assistant"), default=-1)
