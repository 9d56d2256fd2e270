"""LoRA's term and the base product in one accumulation, for adapters whose base layer is dense.

peft computes the two apart and adds them, casting on the way; that is three more passes over the activations forward,
and as many backward. The parameters stay peft's own, so saving, merging and loading know nothing of this.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fuse(model: PreTrainedModel) -> int:
    """Let every layer that allows it compute so; give their number."""
    from peft.tuners.lora.layer import Linear

    layers = [layer for layer in model.modules() if type(layer) is Linear and _plain(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _plain(layer: Any) -> bool:
    """Whether a layer is base product and LoRA term and nothing else."""
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else ("",)
    return (
        name in layer.lora_A
        and type(layer.base_layer) is torch.nn.Linear
        and not layer.base_layer.weight.requires_grad
        and not layer.fan_in_fan_out
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
    )


def _forward(layer: Any, peft_forward: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or layer.merged or layer.disable_adapters:
        plain: torch.Tensor = peft_forward(x, *args, **kwargs)
        return plain
    (name,) = layer.active_adapters
    base = layer.base_layer
    with torch.autocast(x.device.type, enabled=False):
        found: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(base.weight.dtype),
            base.weight,
            base.bias,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
        )
    return found


class _Product(torch.autograd.Function):
    """y = x W' + b + s (x A') B', with ' for the transpose: Hu et al., LoRA, arXiv:2106.09685.

    x: [..., in]; W: [out, in], frozen; A: [rank, in], B: [out, rank], in float32 and used in W's dtype.
    """

    @staticmethod
    def forward(  # noqa: PLR0917, autograd passes by position
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
        inner = torch.mm(flat, low_a.t())
        out = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        out.addmm_(inner, low_b.t(), alpha=scaling)
        ctx.save_for_backward(flat, weight, low_a, low_b, inner)
        ctx.scaling, ctx.trained = scaling, a.dtype
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, a, b, inner = ctx.saved_tensors
        into = outer.reshape(-1, weight.shape[0])
        through = torch.mm(into, b).mul_(ctx.scaling)
        grad_a = torch.mm(through.t(), flat)
        grad_b = torch.mm(into.t(), inner).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(into, weight).addmm_(through, a).view(*outer.shape[:-1], weight.shape[1])
        return grad_x, None, None, grad_a.to(ctx.trained), grad_b.to(ctx.trained), None
