"""A frozen base model whose layers are spread over ranks, by torch's fully_shard (FSDP2). Each rank keeps its share of
every layer, and the layer is whole on all of them while it computes.

What is trained stays whole on each rank, and so do embeddings, last norm and head: gradients, optimizer, checkpoints
and adapters know nothing of this. Which jobs may be trained so: `sharding.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from finetuned.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Spread the decoder's layers, which are on the CPU, over all ranks' devices, one after the other, so that none
    ever holds more than one of them whole; put the rest on each. All ranks call it. Raises ConfigError.
    """
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call, unused-ignore]  # or the mesh would choose a device itself
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    decoder, layers = model.get_decoder(), layers_of(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # With no tensor of its own it only lets the next layer come while the one before computes.
    whole = {parameter for parameter in decoder.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    model.to(device)  # type: ignore[arg-type, unused-ignore]


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Give the decoder's layers. Raises ConfigError for a model without."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.ModuleList)]
    found = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)  # experts have lists too
    if not found:
        raise ConfigError(
            "has no list of layers that could be spread over several GPUs",
            where=f"model {model.config.model_type}",
            remedy="Take a model that fits on one GPU.",
        )
    return list(found)


def local_bytes(module: torch.nn.Module) -> int:
    """Give how much memory a module's parameters take on this rank."""
    mine = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(one.numel() * one.element_size() for one in mine)
