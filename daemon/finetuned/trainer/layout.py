"""How a model takes its micro-batches: flat or padded, head apart or whole. Tried out on the model itself, before the
first step.

Trying is surer than a list of architectures: some models keep a state across rows, scale their logits, or use an
attention that knows no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from finetuned.errors import ModelError
from finetuned.trainer import attention, memory
from finetuned.trainer.batches import Batch, collate_flat, collate_padded, led
from finetuned.trainer.capped import head_of
from finetuned.trainer.model import evaluating
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARED = 8  # tokens that the rows which are tried begin with
_LENGTHS = (12, 15)  # tokens of the two rows
# Root mean square of the logits' error over their spread. In bf16 rounding alone makes some 0.03 after 30 layers.
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}


@dataclass(frozen=True)
class Layout:
    """How micro-batches are made for one model and go through it, and why."""

    flat: bool
    head_apart: bool  # hidden states first, then the head in chunks; else the model's own logits
    reason: str
    attention: str  # as transformers names it
    share: bool = True  # compute once what all rows of a flat micro-batch begin with
    lead: int = 0  # places in front of each row, for a soft prompt

    def __str__(self) -> str:
        """Name it in a log line."""
        return ("flat" if self.flat else "padded") + ("" if self.head_apart else ", with the model's own logits")

    @property
    def collate(self) -> Callable[[Sequence[Example]], Batch]:
        """Give the function that makes a micro-batch."""
        collate = partial(collate_flat, share=self.share) if self.flat else collate_padded
        return (lambda examples: collate([led(one, self.lead) for one in examples])) if self.lead else collate

    def hidden_states(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.nn.Module]:
        """Give what the head is applied to at the batch's positions, [positions, width], and the head."""
        if self.head_apart:
            hidden = model.get_decoder()(**batch.inputs, use_cache=False).last_hidden_state
            head: torch.nn.Module = head_of(model)
        elif len(next(iter(batch.inputs.values()))) == 1:  # in one row, a model can be told where logits are wanted
            logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.positions).logits
            return logits[0], torch.nn.Identity()
        else:
            hidden, head = model(**batch.inputs, use_cache=False).logits, torch.nn.Identity()
        return hidden.reshape(-1, hidden.shape[-1])[batch.positions], head


@torch.no_grad()
def choose_layout(model: PreTrainedModel, compute: torch.dtype, *, name: str = "", share: bool = True) -> Layout:
    """Try the layouts, fastest first, on short rows; leave the model set to what was chosen.

    Raises ModelError if the model's logits are not numbers, or not even padded rows give what single rows do.
    """
    plain = model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
    device = next(model.parameters()).device
    first, second = (_row(model, length, seed) for seed, length in enumerate(_LENGTHS))
    other = _row(model, _LENGTHS[0], 2)
    with evaluating(model), torch.autocast(device.type, compute, enabled=compute is not torch.float32):
        alone = [torch.tensor([row.ids], device=device) for row in (first, second)]
        wanted = torch.cat([model(ids, use_cache=False).logits[0, :-1] for ids in alone]).float()
        if not wanted.isfinite().all():
            raise ModelError(
                "the model's logits are not numbers",
                where=name,
                remedy="Its weights are damaged, or dtype does not suit it.",
            )

        apart = _head_apart(model, alone, wanted)

        def logits(examples: list[Example], layout: Layout) -> torch.Tensor:
            hidden, head = layout.hidden_states(model, layout.collate(examples).to(device))
            found: torch.Tensor = head(hidden)
            return found

        def fails(layout: Layout) -> str:
            """Say why a layout will not do, or nothing."""
            found = logits([first, second], layout)
            error = (found.float() - wanted).square().mean().sqrt() / wanted.std()
            # The second row must not notice another first row, to the last bit: closeness alone could hide a leak.
            tails = [tokens[_LENGTHS[0] - 1 :] for tokens in (found, logits([other, second], layout))]
            if layout.flat and not (torch.equal(*tails) or mixes):
                return "the model lets rows of a flat batch see each other"
            return "" if error < _CLOSE[compute] else "its logits differ from those of single rows"

        # bitsandbytes' 8-bit products on a GPU leave out columns by what is in the whole batch, however it is laid out.
        mixes = device.type == "cuda" and getattr(model, "is_loaded_in_8bit", False)
        attention.register()
        why = ""
        for function, reason in attention.functions(device, compute):
            flat = Layout(flat=True, head_apart=apart, reason=reason, attention=function, share=share)
            why = _tried(model, flat, fails)
            if not why:
                return flat
        model.set_attn_implementation(plain)
        padded = Layout(flat=False, head_apart=apart, reason=why, attention=plain)
        if not fails(padded):
            return padded
    raise ModelError(
        "rows in a padded batch come out different from single rows",
        where=name,
        remedy="Take another model, or set dtype to float32.",
    )


def _head_apart(model: PreTrainedModel, alone: list[torch.Tensor], wanted: torch.Tensor) -> bool:
    """Whether the head alone gives the model's logits, which some models scale afterwards.

    The same products as the model's own, so the answer is exact where nothing comes after them.
    """
    try:
        head, decoder = head_of(model), model.get_decoder()
        found = torch.cat([head(decoder(input_ids=ids, use_cache=False).last_hidden_state)[0, :-1] for ids in alone])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if memory.out_of_memory(error):
            raise
        return False
    return bool((found.float() - wanted).abs().max() <= 1e-4 * wanted.std())


def rows_stand_alone(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows of so many tokens must not share a micro-batch: some rotary embeddings are scaled by the longest row
    of the batch.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    return rope.get("rope_type") in {"longrope", "dynamic"} and longest > original


def _tried(model: PreTrainedModel, layout: Layout, fails: Callable[[Layout], str]) -> str:
    """Set the model to a flat layout and say why it fails or refuses, or nothing."""
    try:
        model.set_attn_implementation(layout.attention)
        return fails(layout)
    except (RuntimeError, ImportError, TypeError, ValueError, LookupError, AttributeError) as error:
        if memory.out_of_memory(error):
            raise
        return f"the model does not take flat batches: {error}"


def _row(model: PreTrainedModel, length: int, seed: int) -> Example:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [
        torch.randint(min(10, vocabulary - 1), vocabulary, (count,), generator=torch.Generator().manual_seed(number))
        for count, number in ((_SHARED, 99), (length - _SHARED, seed))
    ]
    return Example(torch.cat(ids).tolist(), [True] * length, 0)
