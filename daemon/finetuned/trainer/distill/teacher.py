"""The teacher at work. It is no part of the objective, which is a torch module: so it is never trained, never in a
checkpoint, and stays on the device and in the number format that are its own, whatever autocast is on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetuned.errors import ConfigError, ModelError
from finetuned.trainer import steps
from finetuned.trainer.distill import states
from finetuned.trainer.distill.alignment import Aligner
from finetuned.trainer.distill.found import Found
from finetuned.trainer.layout import choose_layout
from finetuned.trainer.loss import summed_loss
from finetuned.trainer.model import load_model
from finetuned.trainer.precision import choose
from finetuned.trainer.store import lengths_of
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.trainer.layout import Layout

_BOUND = steps.Bound(8, 1024)  # of a micro-batch where the teacher is measured


@dataclass(frozen=True)
class Lesson:
    """What the teacher makes of a micro-batch, at the student's targets that it can be compared at."""

    matched: torch.Tensor | None  # which targets these are, [matched]; None: all
    counts: list[int]  # how many in each row
    hidden: torch.Tensor  # what its head is applied to, [matched, width]; of another vocabulary its last hidden states
    head: Callable[[torch.Tensor], torch.Tensor]
    layers: dict[int, torch.Tensor]  # of each layer that was asked for, [matched, its width]
    attention: dict[tuple[int, str], torch.Tensor]  # of each of its projections, likewise


class Teacher:
    """A teacher that was found, and after `load` the model."""

    model: PreTrainedModel
    layout: Layout

    def __init__(self, found: Found) -> None:
        self.found = found
        self.same_vocabulary = found.same_vocabulary
        self._align = None if found.same_vocabulary else Aligner(found.student, found.tokenizer)

    def load(self, beside: torch.device) -> None:
        """Load it, before the student: what is wrong with it is then told first. Raises ModelError or ConfigError."""
        if hasattr(self, "model"):
            return
        settings = self.found.settings
        device = beside if self.found.device == "auto" else torch.device(self.found.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"there is no {device}: this training sees {torch.cuda.device_count()} GPUs",
                where="teacher_device",
                remedy='Set it to "auto" or "cpu".',
            )
        if settings.tuning == "qlora" and sys.modules.get("bitsandbytes", "") is None:
            del sys.modules["bitsandbytes"]  # hidden by an adapter of an earlier training in this process
        precision = choose(device, settings.tuning, settings.dtype)
        try:
            self.model = load_model(
                self.found.base, settings, tuning=settings.tuning, precision=precision, device=device
            )
            self.model.requires_grad_(requires_grad=False).eval()
            self.layout = choose_layout(self.model, precision.compute, name=self.found.base.name)
        except ModelError as error:
            error.where = f"teacher {error.where}".replace("teacher teacher", "teacher")
            raise

    @property
    def width(self) -> int:
        """Give the width of its hidden states."""
        width: int = self.model.config.get_text_config().hidden_size
        return width

    @property
    def device(self) -> torch.device:
        """Say where it is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @torch.no_grad()
    def read(self, examples: Sequence[Example], *, layers: Iterable[int] = (), attention: Iterable[int] = ()) -> Lesson:
        """Read rows, and look at some layers on the way."""
        matched: torch.Tensor | None = None
        counts = [example.targets for example in examples]
        if self._align is not None:
            aligned = [self._align(example) for example in examples]
            examples = [one.places for one in aligned]
            firsts = [sum(counts[:row]) for row in range(len(counts))]
            matched = torch.tensor([first + n for first, one in zip(firsts, aligned, strict=True) for n in one.matched])
            counts = [len(one.matched) for one in aligned]
        batch = self.layout.collate(examples).to(self.device)
        with torch.autocast(self.device.type, enabled=False), states.watching(self.model, layers, attention) as seen:
            if self.same_vocabulary:
                hidden, head = self.layout.hidden_states(self.model, batch)
            else:
                hidden, head = self.model.get_decoder()(**batch.inputs, use_cache=False).last_hidden_state, None
                hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]

        def own(of: torch.Tensor) -> torch.Tensor:
            return of.reshape(-1, of.shape[-1])[batch.positions]

        return Lesson(
            None if matched is None else matched.to(torch.long),
            counts,
            hidden,
            self._unmixed(head),
            {number: own(tensor) for number, tensor in seen.layers.items()},
            {key: own(tensor) for key, tensor in seen.attention.items()},
        )

    def _unmixed(self, head: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """Give the head in its own number format, whatever autocast is on where it is called."""

        def call(hidden: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):
                return hidden if head is None else head(hidden)

        return call

    @torch.no_grad()
    def loss(self, examples: Sequence[Example], hear_stop: Callable[[], None]) -> float:
        """Give its own cross-entropy in nats, summed over the text of the targets, in its own tokens. At the seams, a
        token that reaches over is counted whole.
        """
        total = 0.0
        lengths = lengths_of(examples)
        for part in steps.cut(list(range(len(lengths))), lengths, _BOUND):
            hear_stop()
            rows = [examples[row] for row in part]
            rows = rows if self._align is None else [self._align(row).covered for row in rows]
            batch = self.layout.collate(rows).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                hidden, head = self.layout.hidden_states(self.model, batch)
                total += float(summed_loss(hidden, head, batch.targets))
        return total
