"""A model whose layers are spread over ranks, by torch's fully_shard (FSDP2). Each rank keeps its share of every layer,
and the layer is whole on all of them while it computes. Embeddings, last norm and head stay whole on each.

An adapter stays whole too: gradients, optimizer, checkpoints and adapters know nothing of this. Where all weights are
trained, each rank's optimizer has its `Shares` of them, of what is whole too. Which jobs may be trained so:
`sharding.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from finetuned.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuned.trainer.group import Group


def shard(model: PreTrainedModel, device: torch.device, *, trained: bool) -> None:
    """Spread the decoder's layers, which are on the CPU, over all ranks' devices, one after the other, so that none
    ever holds more than one of them whole; put the rest on each. All ranks call it. Raises ConfigError.

    `trained`: whether the layers themselves are, and not an adapter on them.
    """
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call, unused-ignore]  # or the mesh would choose a device itself
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    beside = set() if trained else {parameter for parameter in model.parameters() if parameter.requires_grad}
    decoder, layers = model.get_decoder(), layers_of(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=beside)
    # With no tensor of its own it only lets the next layer come while the one before computes.
    whole = {parameter for parameter in decoder.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    for module in decoder.modules() if trained else ():
        if isinstance(module, FSDPModule):
            # The loss is divided by the whole step's targets already; gloo cannot scale while it sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # An expert that no row of this rank has come to may have a gradient elsewhere.
            if hasattr(module, "set_reduce_scatter_unused_params"):  # as in torch 2.13
                module.set_reduce_scatter_unused_params(True, recurse=False)
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


class Shares:
    """What a rank's optimizer steps on where all weights are trained: its share of each.

    Of a weight that is whole on every rank the share is a view of some rows, and after a step all get each other's.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], group: Group) -> None:
        """Take the trained parameters by their names."""
        self._group = group
        mesh = next(one.device_mesh for one in parameters.values() if isinstance(one, DTensor))
        self.parameters = {name: _share_of(one, mesh) for name, one in parameters.items()}
        self._whole = [(one, self.parameters[name]) for name, one in parameters.items() if not isinstance(one, DTensor)]

    def take_gradients(self) -> None:
        """Take this rank's share of the gradients that are whole."""
        for whole, share in self._whole:
            share.grad = None if whole.grad is None else _cut(whole.grad, share.device_mesh)

    def clip(self, parameters: Iterable[Any], most: float) -> float:
        """Scale some shares' gradients down to a norm of at most `most` over all ranks; give the norm that they had."""
        gradients = [one.grad.to_local() for one in parameters if one.grad is not None]
        (squares,) = self._group.sum([float(torch.nn.utils.get_total_norm(gradients)) ** 2])
        norm = math.sqrt(squares)
        if (scale := most / (norm + 1e-6)) < 1:  # as torch's own clipping does
            torch._foreach_mul_(gradients, scale)
        return norm

    @torch.no_grad()
    def give(self) -> None:
        """Make whole what is whole on every rank, after a step: each has changed its share."""

        def give() -> None:
            for whole, _ in self._whole:
                for rank, rows in enumerate(_pieces(whole.detach(), self._group.size)):
                    if rows.numel():
                        dist.broadcast(rows, src=rank)

        self._group.needing_others(give)

    def whole(self, tree: Any) -> Any:
        """Give what holds shares with whole tensors in the CPU's memory, on rank 0; on others None in their place."""
        return self._group.needing_others(
            lambda: tree_map_only(DTensor, lambda one: _whole(one, keep=self._group.leads), tree)
        )

    @torch.no_grad()
    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put whole weights into the shares of all ranks."""
        for name, share in self.parameters.items():
            share.to_local().copy_(_mine(weights[name], share.device_mesh))
        self.give()

    def cut(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Give an optimizer's state with shares in place of whole tensors."""
        found: dict[int, dict[str, Any]] = {}
        for number, share in enumerate(self.parameters.values()):
            for name, one in optimizer["state"].get(number, {}).items():
                # Its file may be written anew while this training still runs.
                own = _cut(one, share.device_mesh).to(share.device, copy=True) if one.shape == share.shape else one
                found.setdefault(number, {})[name] = own
        return {**optimizer, "state": found}


def _share_of(parameter: torch.nn.Parameter, mesh: DeviceMesh) -> Any:
    if isinstance(parameter, DTensor):
        return parameter
    return torch.nn.Parameter(_cut(parameter.detach(), mesh))


def _cut(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Give a rank's rows of a tensor, as a part of the whole."""
    return DTensor.from_local(
        _mine(whole, mesh), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _mine(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return _pieces(whole, mesh.size())[mesh.get_local_rank()]


def _pieces(whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Give each rank's rows, views of the whole; there may be none for the last, as fully_shard has it."""
    pieces = list(whole.chunk(ranks))
    return pieces + [whole[:0]] * (ranks - len(pieces))


def _whole(share: DTensor, *, keep: bool) -> torch.Tensor | None:
    found = share.full_tensor()
    return found.cpu() if keep else None


def is_whole(parameter: torch.Tensor) -> bool:
    """Whether a parameter is not spread over ranks."""
    return not isinstance(parameter, DTensor)
