"""How much memory a training will need, part by part. No weight is loaded, and nothing here knows of jobs or of a
ladder; `rehearsal.py` counts what a micro-batch needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuned.config import TrainingSettings
from finetuned.trainer import fused, rehearsal
from finetuned.trainer.base import Base
from finetuned.trainer.lora import add_adapter
from finetuned.trainer.model import empty_model, set_checkpointing
from finetuned.trainer.precision import Precision
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What libraries load only when they work (kernels, scratch memory, code), and freed pages that the allocator keeps.
_AT_WORK = 230 * 2**20
_ADAM = 8  # bytes a trained parameter: two float32 moments
_BLOCK = 64  # weights that share a scale in NF4; quantised once more, the scale is 1 byte, and 4 for 256 of them
_DEPTHS = (2, 4)  # layers that are run in place of all, where all are alike


@dataclass(frozen=True)
class Footprint:
    """Bytes that a training needs at its peak, part by part."""

    weights: int  # of the base model as it is loaded
    adapter: int  # of what is trained beside it
    optimizer: int
    gradients: int
    activations: int  # kept from the forward to the backward pass of the largest micro-batch
    working: int  # above that: a chunk of logits, what a layer or the optimizer needs for a moment
    libraries: int  # what the process holds before there is a model
    teacher: int = 0  # the weights of one beside the model; what it needs at work is not counted

    @property
    def peak(self) -> int:
        """Give the sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Counted:
    """A footprint, and the parameters that time depends on."""

    footprint: Footprint
    trained: int
    parameters: int  # of the base model, the head among them
    head: int  # of the output layer, which sees supervised tokens alone
    method: str


@dataclass(frozen=True)
class Work:
    """What is trained how: all that decides the footprint but the micro-batch."""

    base: Base
    settings: TrainingSettings
    tuning: str
    precision: Precision
    device: torch.device
    activation_checkpointing: bool


def count(work: Work, rows: Sequence[Example], *, accumulated: bool, libraries: int) -> Counted:
    """Count what a training needs whose largest micro-batch is `rows`; `accumulated`: its step has others, too.

    Raises ModelError if there is no such model, ConfigError if no adapter fits it.
    """
    model: Any = empty_model(work.base, work.settings, work.precision.weights)
    bare = model
    parameters, largest = sum(p.numel() for p in bare.parameters()), max(p.numel() for p in bare.parameters())
    weights, head = _stored(bare, work), bare.get_output_embeddings().weight.numel()
    layers = _alike(bare)
    depths = tuple(depth for depth in _DEPTHS if depth < layers) or (0,)
    rehearsal.shorten(bare, max(depths))
    if work.tuning != "full":
        model = add_adapter(bare, work.base, work.settings, precision=work.precision)
        largest = max((p.numel() for p in model.parameters() if p.requires_grad), default=0)
        if work.tuning == "lora":  # others compute as peft does
            fused.fuse(model)
    set_checkpointing(model, on=work.activation_checkpointing)
    stage = rehearsal.Stage(model, work.device, work.precision.compute, share=not work.settings.lora_dropout)
    runs = []
    for depth in reversed(depths):
        rehearsal.shorten(bare, depth)
        runs.append((depth, stage.run(rows, accumulated=accumulated)))
    run = rehearsal.at_depth(runs, layers)
    gradients = 4 * run.trained
    if work.device.type == "cuda":
        # The optimizer makes a copy of all it steps on, when activations are gone.
        highest = max(run.peak, 2 * gradients)
    else:
        # The allocator keeps freed pages and rarely finds large blocks among small ones, so that moments add up which
        # are not at the same time: the backward pass, two copies of the largest parameter in the optimizer, and two
        # gradients of it before they are added (input and output layer are one in many models).
        highest = run.upper + gradients * (not accumulated) + 4 * 4 * largest
    kept = min(run.kept, highest - gradients)
    return Counted(
        Footprint(
            weights=weights,
            adapter=0 if work.tuning == "full" else gradients,
            optimizer=_ADAM * run.trained,
            gradients=gradients,
            activations=kept,
            working=highest - gradients - kept,
            libraries=libraries + (_AT_WORK if work.device.type == "cpu" else 0),
        ),
        run.trained,
        parameters,
        head,
        run.method,
    )


def weights(work: Work) -> int:
    """Give the bytes of a base model alone. Raises ModelError if there is no such model."""
    return _stored(empty_model(work.base, work.settings, work.precision.weights), work)


def _stored(model: PreTrainedModel, work: Work) -> int:
    """Give the bytes of the base weights; bitsandbytes leaves all but linear layers, and the head, as they are."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    if work.tuning not in {"qlora", "lora-8bit"} or not linear:
        return int(total)
    sizes = [m.weight.numel() for m in linear]
    dense = sum(m.weight.numel() * m.weight.element_size() for m in linear)
    if work.tuning == "lora-8bit":
        small = sum(sizes) + sum(4 * m.out_features for m in linear)  # a float32 scale a row
    else:
        small = sum(size // 2 + size // _BLOCK + 4 * size // (_BLOCK * 256) for size in sizes)
    # One layer's weights at a time are made dense again.
    return int(total - dense + small + max(sizes) * work.precision.compute.itemsize)


def _alike(model: PreTrainedModel) -> int:
    """Give the number of the model's layers if all are alike, else 0."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(set(getattr(model.config, "layer_types", None) or [0])) > 1:
        return 0
    shapes = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}
    return len(layers) if len(shapes) == 1 else 0
