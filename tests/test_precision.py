"""Every dtype decision: as it is made, and as it comes out in the tensors of a model that is trained and asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import precision_facts
from finetuned.errors import ConfigError
from finetuned.trainer import precision as room
from finetuned.trainer.precision import choose, in_force

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # only named, so a machine without one will do
BF16, FP16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
TUNINGS = ["full", "lora", "qlora", "lora-8bit"]
SETTINGS = {"bf16": BF16, "fp16": FP16, "float32": FLOAT32}
FAST_BF16 = {"avx512_bf16", "amx_tile"} & set(Path("/proc/cpuinfo").read_text().split())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_what_is_set_is_what_is_chosen(device, tuning, setting):
    precision = choose(device, tuning, setting)
    assert precision.compute is SETTINGS[setting]
    assert precision.mixed == {"float32": "no"}.get(setting, setting)
    assert precision.reason == f"dtype is {setting}"
    assert precision.scaled == (setting == "fp16")
    assert all(choice["choice"] and choice["reason"] for choice in precision.choices().values())


@pytest.mark.parametrize("tuning", TUNINGS)
def test_auto_takes_bf16_where_the_processor_multiplies_in_it(tuning):
    precision = choose(CPU, tuning, "auto")
    assert precision.compute is (BF16 if FAST_BF16 else FLOAT32)
    assert "CPU" in precision.reason


@pytest.mark.parametrize("setting", ["fp16", "bf16"])
def test_an_accelerator_that_would_not_do_as_told_is_refused(monkeypatch, setting):
    """accelerate trains in float32, without a word, what it does not know."""
    plain = room.Accelerator
    monkeypatch.setattr(room, "Accelerator", lambda **_: plain(mixed_precision="no", cpu=True))
    try:
        with pytest.raises(ConfigError, match=setting) as caught:
            in_force(choose(GPU, "lora", setting), GPU)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert caught.value.where == "dtype"
    assert "float32" in caught.value.remedy


# ---------------------------------------------------------------- the whole matrix, on real models


def facts_of(model: Path, tuning: str, device: str, folder: Path) -> dict[str, dict]:
    """What the tensors of one tuning are, in every setting."""
    command = [sys.executable, precision_facts.__file__, str(model), tuning, device, str(folder)]
    search = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_as_the_table_says(facts: dict, tuning: str, computed: str) -> None:
    """Hold a model's tensors against the documented table, which is written out here once more."""
    fp16 = computed == "float16"
    packed = {"qlora": ["uint8"], "lora-8bit": ["int8"]}.get(tuning, [])
    assert facts["trained"] == facts["optimizer"] == ["float32"]
    assert facts["stored"] == ([] if tuning == "full" else sorted([computed, *packed]))
    assert facts["computed"] == [computed]
    assert facts["generated"] == ["float32" if tuning == "full" else computed]
    assert facts["answers"] == 2
    assert facts["unchanged"]  # the next gradient by what was asked: on a CPU to the last bit
    assert facts["repacked"] == []  # bitsandbytes, left to itself, would, and the next gradients would be wrong
    assert (facts["scale"] is not None) == fp16
    assert facts["steps_taken"] >= (5 if fp16 else 8)  # a scaler may look for its scale first
    assert facts["losses"][-1] < facts["losses"][0] - 0.3
    said = {name: choice["choice"] for name, choice in facts["choices"].items()}
    assert said == {
        "dtype": computed,
        "weights": "float32" if tuning == "full" else computed,
        "trained": "float32",
        "optimizer": "float32",
        "gradient_scaling": "on" if fp16 else "off",
        "generation": facts["generated"][0],
    }


@pytest.fixture(scope="module", params=TUNINGS)
def of_a_tuning(request, tiny_model, tmp_path_factory) -> tuple[str, dict]:
    return request.param, facts_of(tiny_model, request.param, "cpu", tmp_path_factory.mktemp("facts"))


@pytest.mark.parametrize("setting", precision_facts.SETTINGS)
def test_tensors_are_what_the_table_says_on_a_cpu(of_a_tuning, setting):
    tuning, facts = of_a_tuning
    automatic = "bfloat16" if FAST_BF16 else "float32"
    computed = {"auto": automatic, "bf16": "bfloat16", "fp16": "float16", "float32": "float32"}[setting]
    assert_as_the_table_says(facts[setting], tuning, computed)


def test_number_formats_differ_in_rounding_alone(of_a_tuning):
    """A setting that fell back without a word would give the very figures of another."""
    losses = {setting: of_a_tuning[1][setting]["losses"] for setting in SETTINGS}
    for setting in ("bf16", "fp16"):
        assert losses[setting] == pytest.approx(losses["float32"], rel=0.01)
        assert losses[setting] != losses["float32"]
    assert losses["bf16"] != losses["fp16"]
