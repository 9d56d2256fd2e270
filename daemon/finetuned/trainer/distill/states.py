"""What is seen of a model on its way through its layers: hidden states, and queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetuned.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Seen:
    """Tensors of one pass, [batch, tokens, width] each."""

    layers: dict[int, torch.Tensor] = field(default_factory=dict)  # the output of a layer, from 1
    attention: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)  # of a layer's projection


@contextmanager
def watching(model: PreTrainedModel, layers: Iterable[int], attention: Iterable[int]) -> Iterator[Seen]:
    """Take down what these layers give, in the passes made within. Raises ConfigError if there are no such layers."""
    seen = Seen()
    watched = [(_layer(model, number), _into(seen.layers, number)) for number in layers]
    watched += [
        (_projection(model, number, name), _into(seen.attention, (number, name)))
        for number in attention
        for name in PROJECTIONS
    ]
    hooks = [module.register_forward_hook(hook) for module, hook in watched]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def layers_of(model: PreTrainedModel) -> Sequence[torch.nn.Module]:
    """Give the model's layers; none where they cannot be told apart."""
    decoder = model.get_decoder()
    found: Sequence[torch.nn.Module] = getattr(decoder, "layers", None) or getattr(decoder, "h", None) or ()
    return found


def depth(model: PreTrainedModel) -> int:
    """Count the model's layers."""
    return len(layers_of(model))


def check(model: PreTrainedModel, name: str, layers: Iterable[int], attention: Iterable[int]) -> None:
    """Raise ConfigError if a layer is not there, or not such that its attention can be seen."""
    for number in layers:
        _layer(model, number, name)
    for number in attention:
        for projection in PROJECTIONS:
            _projection(model, number, projection, name)


def heads(model: PreTrainedModel, projection: str) -> int:
    """Count the attention heads of a projection."""
    config = model.config.get_text_config()
    queries: int = config.num_attention_heads
    return queries if projection == "q_proj" else getattr(config, "num_key_value_heads", None) or queries


def _layer(model: PreTrainedModel, number: int, name: str = "the model") -> torch.nn.Module:
    if number > depth(model):
        raise ConfigError(
            f"{name} has {depth(model)} layers that can be told apart, and no layer {number}",
            where="distill",
            remedy="Mend hidden_layers or attention_layers, or set the weight of the term to 0.",
        )
    return layers_of(model)[number - 1]


def _projection(model: PreTrainedModel, number: int, projection: str, name: str = "the model") -> torch.nn.Module:
    attention = getattr(_layer(model, number, name), "self_attn", None)
    found = getattr(attention, projection, None)
    if not isinstance(found, torch.nn.Module):
        raise ConfigError(
            f"layer {number} of {name} has no {projection}, so its attention cannot be compared",
            where="distill.attention_weight",
            remedy="Set it to 0.",
        )
    return found


def _into(found: dict[Any, torch.Tensor], key: Any) -> Any:
    def hook(_: torch.nn.Module, __: Any, output: Any) -> None:
        found[key] = output[0] if isinstance(output, tuple) else output

    return hook
