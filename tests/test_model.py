"""Loading a base model: what is refused, and what an error says."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoConfig

from finetuned.config import settings_from
from finetuned.errors import ModelError
from finetuned.trainer import memory, model
from finetuned.trainer.precision import choose

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path, tiny_model):
    """The tiny model with changes in its config.json."""

    def change(**values):
        folder = shutil.copytree(tiny_model, tmp_path / "base")
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        return model.Base(str(folder), str(folder))

    return change


def load(base, tuning: str):
    settings = settings_from({"tuning": tuning}, where="the test")
    return model.load_model(base, settings, tuning=tuning, precision=choose(CPU, tuning, "float32"), device=CPU)


@pytest.mark.parametrize("tuning", ["full", "lora", "lora-8bit"])
def test_weights_that_are_quantised_already_are_not_trained_as_if_they_were_not(base, tuning):
    quantised = base(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match="quantised already"):
        load(quantised, tuning)


def test_the_base_s_own_dropout_is_off(base):
    """With it a step would depend on how it is cut into micro-batches."""
    before = base(attention_dropout=0.1)
    assert AutoConfig.from_pretrained(before.source).attention_dropout == 0.1
    assert load(before, "lora").config.attention_dropout == 0.0


def test_memory_that_runs_out_in_a_conversion_is_recognised():
    """transformers logs the cause and raises an error without one."""

    def convert() -> None:
        with model._conversion_told():
            logging.getLogger("transformers.modeling_utils").warning("OutOfMemoryError: CUDA out of memory. Tried ...")
            raise RuntimeError("We encountered some issues during automatic conversion of the weights.")

    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        convert()
    assert memory.out_of_memory(caught.value)
