"""What the loop asks of a recipe. A recipe's module has `build(task, model, layout) -> Objective`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from finetuned.trainer.batches import Batch
    from finetuned.trainer.layout import Layout
    from finetuned.trainer.loop import Training
    from finetuned.trainer.parts import Part


class Objective(Protocol):
    """A torch module around the model: from micro-batch to loss.

    A step may be cut into micro-batches in any way and done again after memory ran out, and must come out the same.
    What is drawn therefore follows from the seed, the step and the row (`Example.line`), never from their order.
    """

    layout: Layout  # how its micro-batches are made: the loop's, or another

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Give the loss in nats, summed over the batch's targets, a float32 scalar: the loop divides it by the step's
        count of targets.

        In evaluation mode it is the cross-entropy of the wanted answers, whatever the recipe, so that held-out losses
        can be compared.
        """

    def parts(self) -> dict[str, Part]:
        """Give what is trained. The first is `parts.MODEL`."""

    def begin(self, step: int) -> None:
        """Begin a step, from 0, or begin it again: what was gathered in it is forgotten."""

    def figures(self) -> dict[str, float]:
        """Give what is to be told about the step that was begun last, beside its loss."""

    def measured(self, training: Training) -> dict[str, float]:
        """Give what is to be told beside the held-out loss that was just taken down in `training.metrics`."""

    def metrics(self) -> dict[str, Any]:
        """Give what is to be told about the training so far, beside its losses; it goes into the adapter's story."""

    def save(self, folder: Path) -> None:
        """Write what was trained beside the model, and is needed to use it, into the adapter's folder."""

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002, torch's own
        """Switch between training and evaluation."""
