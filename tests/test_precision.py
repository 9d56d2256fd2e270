"""Every dtype decision."""

from pathlib import Path

import pytest
import torch

from finetuned.errors import ConfigError
from finetuned.trainer.precision import choose

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # only named, so a machine without one will do
BF16, FP16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
ADAPTERS = ["lora", "lora-8bit", "qlora"]


@pytest.mark.parametrize(
    ("device", "setting", "compute", "mixed"),
    [
        (CPU, "float32", FLOAT32, "no"),
        (CPU, "bf16", BF16, "bf16"),
        (GPU, "float32", FLOAT32, "no"),
        (GPU, "bf16", BF16, "bf16"),
        (GPU, "fp16", FP16, "fp16"),
    ],
)
@pytest.mark.parametrize("tuning", [*ADAPTERS, "full"])
def test_what_is_set_is_what_is_computed_in(device, tuning, setting, compute, mixed):
    precision = choose(device, tuning, setting)
    assert precision.compute is compute
    assert precision.mixed == mixed
    assert precision.reason == f"dtype is {setting}"


@pytest.mark.parametrize("setting", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("tuning", [*ADAPTERS, "full"])
def test_what_is_trained_stays_float32(tuning, setting):
    """Adam's small steps round to nothing in bf16, and fp16 gradients cannot be unscaled into fp16 weights."""
    precision = choose(GPU, tuning, setting)
    assert precision.trained is FLOAT32
    # A frozen base is stored as it is computed; one that is trained is not.
    assert precision.weights is (FLOAT32 if tuning == "full" else precision.compute)


@pytest.mark.parametrize("tuning", [*ADAPTERS, "full"])
def test_auto_takes_bf16_where_the_processor_multiplies_in_it(tuning):
    flags = Path("/proc/cpuinfo").read_text().split()
    fast = "avx512_bf16" in flags or "amx_tile" in flags
    precision = choose(CPU, tuning, "auto")
    assert precision.compute is (BF16 if fast else FLOAT32)
    assert "CPU" in precision.reason


@pytest.mark.parametrize("tuning", [*ADAPTERS, "full"])
def test_fp16_without_a_gpu_is_refused_with_a_remedy(tuning):
    with pytest.raises(ConfigError) as caught:
        choose(CPU, tuning, "fp16")
    assert caught.value.where == "dtype"
    assert "GPU" in caught.value.what
    assert "auto" in caught.value.remedy
