"""How a model takes its micro-batches: flat or padded, head apart or whole. Tried out on the model itself, before the
first step.

Trying is surer than a list of architectures: some models keep a state across rows, scale their logits, or use an
attention that knows no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetuned.dataset.checks import Row
from finetuned.trainer import attention
from finetuned.trainer.batches import Batch, Example, collate_flat, collate_padded
from finetuned.trainer.model import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (7, 12)  # tokens of the two rows that are tried
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the logits' spread


@dataclass(frozen=True)
class Layout:
    """How micro-batches are made for one model, and why."""

    flat: bool
    reason: str

    @property
    def collate(self) -> Callable[[Sequence[Example]], Batch]:
        """Give the function that makes a micro-batch."""
        return collate_flat if self.flat else collate_padded


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Give the last hidden states at the batch's positions: [positions, width]."""
    hidden = model.get_decoder()(**batch.inputs, use_cache=False).last_hidden_state
    selected: torch.Tensor = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return selected


@torch.no_grad()
def choose_layout(model: PreTrainedModel, compute: torch.dtype) -> Layout:
    """Try the flat layout on two short rows and compare; leave the model set to what was chosen.

    Raises ValueError if even the padded layout, with the head apart, does not give the model's own logits.
    """
    plain = model.config._attn_implementation  # noqa: SLF001, there is no public way to ask
    device = next(model.parameters()).device
    first, second, other = (
        _row(model, length, seed) for length, seed in zip((*_LENGTHS, _LENGTHS[0]), range(3), strict=True)
    )
    with evaluating(model), torch.autocast(device.type, compute, enabled=compute is not torch.float32):
        wanted = torch.cat(
            [model(torch.tensor([e.ids], device=device), use_cache=False).logits[0, :-1] for e in (first, second)]
        )

        def logits(examples: list[Example], layout: Layout) -> torch.Tensor:
            head: torch.nn.Module = model.get_output_embeddings()
            found: torch.Tensor = head(hidden_states(model, layout.collate(examples).to(device)))
            return found

        def agrees(layout: Layout) -> bool:
            error = (logits([first, second], layout) - wanted).abs().max() / wanted.float().std()
            return bool(error < _CLOSE[compute])

        attention.register()
        flat = Layout(flat=True, reason="the model keeps rows apart")
        try:
            model.set_attn_implementation(attention.FLAT)
            # The second row must not notice another first row, to the last bit: closeness alone could hide a leak.
            apart = torch.equal(*(logits([row, second], flat)[_LENGTHS[0] - 1 :] for row in (first, other)))
            if apart and agrees(flat):
                return flat
            why = "the model lets rows of a flat batch see each other" if not apart else "flat logits differ"
        except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
            why = f"the model does not take flat batches: {error}"
        model.set_attn_implementation(plain)
        padded = Layout(flat=False, reason=why)
        if not agrees(padded):
            raise ValueError("the model's head does not give its logits; such a model cannot be trained yet")
        return padded


def _row(model: PreTrainedModel, length: int, seed: int) -> Example:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    return Example(ids.tolist(), [True] * length, Row(0, ()))
