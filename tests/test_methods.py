"""Every way to tune: what comes out works in the libraries alone, and is what the trainer measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import chat_rows, write_jsonl
from finetuned.events import EventType, ExitCode
from test_training import Run, plain_loss

METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
}
R, ALPHA = 4, 12.0  # lora's scale is 3, rslora's 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", chat_rows(16))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", chat_rows(4, start=100))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_an_adapter_loads_in_plain_peft_with_the_loss_that_was_measured(tmp_path, tiny_model, data, held_out, settings):
    run = Run(
        tmp_path / "job", data, model=str(tiny_model), lora_r=R, lora_alpha=ALPHA, eval_file=str(held_out), **settings
    ).done()
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert {key for key in ("use_dora", "use_rslora") if config[key]} == settings.keys()

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.adapter)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == (ALPHA / math.sqrt(R) if settings.get("use_rslora") else ALPHA / R)
    assert ("default" in layer.lora_magnitude_vector) == bool(settings.get("use_dora"))
    (result,) = run.events(EventType.RESULT)
    after = plain_loss(model, AutoTokenizer.from_pretrained(run.adapter), read_rows(held_out))
    assert result.data["valid_loss"] == pytest.approx(after, rel=1e-5)
    assert after < result.data["valid_loss_before"] - 0.05
    magnitudes = {name: weight for name, weight in run.weights().items() if "magnitude" in name}
    assert bool(magnitudes) == bool(settings.get("use_dora"))
    for name, magnitude in magnitudes.items():  # it was learned, too
        layer = model.get_submodule(name.removesuffix(".lora_magnitude_vector"))
        assert not torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, METHODS["dora and rslora"], {"tuning": "qlora"}], ids=str)
def test_a_training_goes_on_from_an_adapter(tmp_path, tiny_model, data, held_out, settings):
    """It begins where the earlier one ended, learns further, and both are told of in the chain."""
    settings = {"model": str(tiny_model), "eval_file": str(held_out), "epochs": 1, **settings}
    first = Run(tmp_path / "first", data, **settings).done()
    second = Run(tmp_path / "second", data, resume_adapter=str(first.adapter), **settings).done()
    (one,), (two,) = first.events(EventType.RESULT), second.events(EventType.RESULT)
    assert two.data["valid_loss_before"] == pytest.approx(one.data["valid_loss"], rel=1e-5)
    assert two.data["valid_loss"] < two.data["valid_loss_before"] - 0.01
    story = json.loads((second.adapter / "finetuned.json").read_text())
    assert story["chain"] == [{"adapter": "adapter", "job_id": first.spec.id, "sha256": first.spec.sha256}]
    assert story["choices"]["resume_adapter"]["choice"] == "adapter"
    assert f"1. `adapter`, on data with sha256 {first.spec.sha256}" in (second.adapter / "README.md").read_text()


def test_an_adapter_on_other_layers_is_not_continued(tmp_path, tiny_model, data):
    settings = {"model": str(tiny_model), "max_steps": 1}
    first = Run(tmp_path / "first", data, target_modules=["q_proj"], **settings).done()
    second = Run(tmp_path / "second", data, resume_adapter=str(first.adapter), **settings)
    assert second.attempt() == ExitCode.BAD_SETTINGS, second.log
    assert "other layers" in second.error()["what"]
    assert "target_modules" in second.error()["remedy"]


@pytest.mark.parametrize("settings", [{"dtype": "bf16"}, {"tuning": "qlora"}], ids=str)
def test_dora_learns_and_answers_on_every_base(tmp_path, tiny_model, data, held_out, settings):
    """Its magnitudes come from base weights, whatever these are stored as."""
    asking = {"eval_file": str(held_out), "eval_steps": 2, "predictions": {"samples": 1, "max_new_tokens": 4}}
    run = Run(tmp_path / "job", data, model=str(tiny_model), use_dora=True, **asking, **settings).done()
    (result,) = run.events(EventType.RESULT)
    assert result.data["valid_loss"] < result.data["valid_loss_before"] - 0.05
    assert len(run.events(EventType.PREDICTIONS)) == 3
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in run.weights().values())


def test_dora_on_8_bit_weights_is_refused_without_a_gpu(tmp_path, tiny_model, data):
    run = Run(tmp_path / "job", data, model=str(tiny_model), use_dora=True, tuning="lora-8bit")
    assert run.attempt() == ExitCode.BAD_SETTINGS, run.log
    assert run.error()["where"] == "use_dora"
