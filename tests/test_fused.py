"""LoRA's term and the base product in one accumulation: what peft computes, forward and backward."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetuned.trainer.fused import fuse

WIDTH, RANK = 12, 4


class Model(torch.nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def adapted(*, bias: bool = False, dtype: torch.dtype = torch.float32, **lora) -> torch.nn.Module:
    """A model with an adapter that is not zero, its base in `dtype` and the adapter in float32."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=10, target_modules=["up", "down"], **lora)
    model = get_peft_model(Model(bias=bias).to(dtype), config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def run(model: torch.nn.Module, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients_are_those_of_peft(bias, rslora):
    model = adapted(bias=bias, use_rslora=rslora)
    wanted = run(copy.deepcopy(model))
    assert fuse(model) == 2
    found = run(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert not any("base_layer" in name for name in found)  # the base is frozen


def test_in_bf16_it_is_no_further_from_the_truth_than_peft():
    model = adapted(dtype=torch.bfloat16)
    truth = run(copy.deepcopy(model).float())
    peft = run(copy.deepcopy(model), dtype=torch.bfloat16)
    fuse(model)
    found = run(model, dtype=torch.bfloat16)
    for name, tensor in truth.items():
        ours, theirs = ((of[name].float() - tensor).square().mean() for of in (found, peft))
        assert ours <= 2 * theirs, name
    assert all(tensor.dtype is torch.float32 for name, tensor in found.items() if "lora" in name)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_more_than_a_product_and_a_term_is_left_to_peft(lora):
    bias = bool(lora.get("lora_bias"))
    assert fuse(adapted(bias=bias, **lora)) == 0


def test_an_adapter_that_is_switched_off_or_merged_is_peft_business():
    model = adapted()
    wanted = run(copy.deepcopy(model))["out"]
    fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(run(model)["out"], run(model.get_base_model())["out"])
        assert not torch.allclose(run(model)["out"], wanted)
    model.merge_adapter()
    torch.testing.assert_close(run(model)["out"], wanted, rtol=1e-4, atol=1e-5)
