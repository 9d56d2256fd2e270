"""How much memory a training will need, part by part. No weight is loaded, and nothing here knows of jobs or of a
ladder; `rehearsal.py` counts what a micro-batch needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetuned.config import TrainingSettings
from finetuned.trainer import fused, rehearsal, understudy
from finetuned.trainer.base import Base
from finetuned.trainer.generate import most_at_once
from finetuned.trainer.lora import add_adapter
from finetuned.trainer.model import empty_model, set_checkpointing
from finetuned.trainer.precision import Precision, choose
from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.trainer.distill.found import Found

# What libraries load only when they work (kernels, scratch memory, code), and freed pages that the allocator keeps.
_AT_WORK = 230 * 2**20
_ADAM = 8  # bytes a trained parameter: two float32 moments
_BLOCK = 64  # weights that share a scale in NF4; quantised once more, the scale is 1 byte, and 4 for 256 of them
_FETCHED = 3  # times a layer's weights: the one at work, the next, and the buffer that it comes in
_GIVEN = 2  # times a layer's gradients: as they are made, and in the buffer that they are summed in
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
    teacher: int = 0  # the weights of one beside the model
    answers: int = 0  # what making answers takes above all of a training's own

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
    taught_by: int  # parameters of a teacher, wherever it is
    method: str
    shared: int  # bytes that processes can share where the model's layers are spread over them
    apart: int  # bytes that each of them needs beside its part of those


@dataclass(frozen=True)
class Work:
    """What is trained how: all that decides the footprint but the micro-batch."""

    base: Base
    settings: TrainingSettings
    tuning: str
    precision: Precision
    device: torch.device
    activation_checkpointing: bool
    teacher: Found | None = None  # of recipe distill
    longest_question: int = 0  # tokens, of recipe rft


def count(work: Work, rows: Sequence[Example], *, accumulated: bool, libraries: int) -> Counted:
    """Count what a training needs whose largest micro-batch is `rows`; `accumulated`: its step has others, too.

    Raises ModelError if there is no such model, ConfigError if no adapter fits it.
    """
    model: Any = empty_model(work.base, work.settings, work.precision.weights)
    bare = model
    parameters, largest = sum(p.numel() for p in bare.parameters()), max(p.numel() for p in bare.parameters())
    weights, head = _stored(bare, work), bare.get_output_embeddings().weight.numel()
    in_layers, layer = _layer_sizes(bare)
    layers = 0 if understudy.looks_into_layers(work.settings) else _alike(bare)
    depths = tuple(depth for depth in _DEPTHS if depth < layers) or (0,)
    rehearsal.shorten(bare, max(depths))
    if work.tuning != "full":
        model = add_adapter(bare, work.base, work.settings, precision=work.precision)
        largest = 0
        if work.tuning == "lora":  # others compute as peft does
            fused.fuse(model)
    set_checkpointing(model, on=work.activation_checkpointing)
    stage = rehearsal.Stage(
        model,
        work.device,
        work.precision.compute,
        share=not work.settings.lora_dropout,
        make=understudy.maker(work, rows),
    )
    runs, answers = [], []
    for depth in reversed(depths):
        rehearsal.shorten(bare, depth)
        runs.append((depth, stage.run(rows, accumulated=accumulated)))
        answers.append(_answers(stage, work))
    run, largest = rehearsal.at_depth(runs, layers), max(largest, runs[0][1].largest)
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
    teacher, taught_by = _teacher(work)
    making = rehearsal.line([(depth, one) for (depth, _), one in zip(runs, answers, strict=True)], layers)
    footprint = Footprint(
        weights=weights,
        adapter=0 if work.tuning == "full" else gradients,
        optimizer=_ADAM * run.trained,
        gradients=gradients,
        activations=kept,
        working=highest - gradients - kept,
        libraries=libraries + (_AT_WORK if work.device.type == "cpu" else 0),
        teacher=teacher,
        answers=max(0, making - highest - _ADAM * run.trained),
    )
    stored = work.precision.weights.itemsize
    shared, apart = stored * in_layers, footprint.peak + _FETCHED * stored * layer - stored * in_layers
    if work.tuning == "full":
        beside = gradients - 4 * in_layers  # gradients of what stays whole
        apart = weights - shared + max(run.peak - 4 * in_layers, run.kept + beside) + footprint.libraries
        apart += (_FETCHED * stored + _GIVEN * 4) * layer
        shared += 4 * in_layers + (_ADAM + 4) * run.trained  # and the copy that the optimizer makes
    return Counted(footprint, run.trained, parameters, head, taught_by, run.method, shared, apart)


def _layer_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Give the parameters of all the decoder's layers, and of the largest of them; 0 where there is no list of them."""
    layers = getattr(model.get_decoder(), "layers", ())
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return sum(sizes), max(sizes, default=0)


def _answers(stage: rehearsal.Stage, work: Work) -> int:
    """Give the bytes that a batch of recipe rft's answers takes, before there are gradients or an optimizer."""
    if work.settings.recipe != "rft":
        return 0
    longest = work.settings.rft.max_new_tokens
    rows = most_at_once(work.device, work.longest_question, longest)
    return stage.answers(rows, prompt=work.longest_question, longest=longest)


def _teacher(work: Work) -> tuple[int, int]:
    """Give the bytes of a teacher's weights, none where it is on another device, and its parameters."""
    if work.teacher is None:
        return 0, 0
    own, settings = understudy.home_of(work.teacher, work.device), work.teacher.settings
    precision = choose(own, settings.tuning, settings.dtype)
    model = empty_model(work.teacher.base, settings, precision.weights)
    elsewhere = own.type != work.device.type or (own.index or 0) != (work.device.index or 0)
    parameters = sum(p.numel() for p in model.parameters())
    as_stored = Work(work.teacher.base, settings, settings.tuning, precision, own, False)
    return 0 if elsewhere else _stored(model, as_stored), parameters


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
