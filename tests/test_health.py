"""Trainings that could not teach anything are named at once, each by really breaking something."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import chat_rows
from finetuned.config import settings_from
from finetuned.dataset.checks import check_row
from finetuned.errors import ConfigError, ModelError, UnhealthyError
from finetuned.events import EventType, parse_event
from finetuned.trainer.batches import tokenise
from finetuned.trainer.health import check_step, check_trainable
from finetuned.trainer.loop import Task, train
from finetuned.trainer.model import Base
from finetuned.trainer.reporter import Reporter


@pytest.fixture
def training(tmp_path, tiny_model, monkeypatch):
    """Train in this process: `training(model=..., **settings)`."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # which the trainer hides as well, but for good

    def start(model: Path = tiny_model, **settings):
        settings = settings_from({"dtype": "float32", "tuning": "lora", "epochs": 10, **settings}, where="the test")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        rows = [check_row(number, row) for number, row in enumerate(chat_rows(16))]
        examples = list(tokenise(rows, tokenizer, max_length=200))
        return train(
            Task(
                settings=settings,
                rung=settings.first_rung(),
                base=Base(str(model), str(model)),
                tokenizer=tokenizer,
                train=examples,
                held_out=examples[: settings.predictions.samples],
                device=torch.device("cpu"),
                checkpoints=tmp_path / "checkpoints",
                bounds=tmp_path / "micro-batches.json",
                say=Reporter(tmp_path / "events.jsonl"),
                asked_to_stop=lambda: False,
            )
        )

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def steps_done(folder: Path) -> int:
    events = [parse_event(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    return sum(event.type is EventType.METRICS and "train_loss" in event.data for event in events)


def test_a_sound_training_passes(training, tmp_path):
    trained = training()
    assert trained.metrics["step"] == steps_done(tmp_path) == 20


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("gemma2", {"sliding_window": 16}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 16}),
    ],
)
def test_a_family_whose_attention_is_not_sdpa_is_trained_and_asked_too(training, tmp_path, tiny_model, family, extra):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = AutoConfig.for_model(
        family, **{"vocab_size": 258, "num_key_value_heads": 2, "head_dim": 8, **sizes, **extra}
    )
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("generation_config.json"))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    trained = training(tmp_path / "model", epochs=1, predictions={"samples": 2, "max_new_tokens": 4})
    assert trained.metrics["step"] == 2
    assert trained.metrics["valid_loss"] < trained.metrics["valid_loss_before"]


def test_layers_that_are_not_there_are_named(training):
    with pytest.raises(ConfigError, match="no_such_layer") as caught:
        training(target_modules=["no_such_layer"])
    assert caught.value.where == "target_modules"
    assert "all-linear" in caught.value.remedy


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_learning_rate_that_blows_up_ends_the_training(training, tmp_path, tuning):
    with pytest.raises(UnhealthyError, match=r"nan|inf") as caught:
        training(tuning=tuning, learning_rate=1e30, max_grad_norm=0)
    assert "learning_rate" in caught.value.remedy
    assert caught.value.where == f"step {steps_done(tmp_path) + 1}"
    assert 1 <= steps_done(tmp_path) < 20


def spoilt(model: Path, folder: Path, spoil) -> Path:
    """A copy of a model with its weights spoilt."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_that_cannot_reach_the_answer_is_told_at_the_first_step(training, tmp_path, tiny_model):
    """Queries that no output listens to: there is a loss, but nothing flows back to the adapter."""

    def deafen(weights: dict) -> None:
        for name, weight in weights.items():
            if "o_proj" in name:
                weight.zero_()

    model = spoilt(tiny_model, tmp_path / "model", deafen)
    with pytest.raises(UnhealthyError, match="gradient is exactly zero") as caught:
        training(model, target_modules=["q_proj"])
    assert caught.value.where == "step 1"
    assert steps_done(tmp_path) == 0


def test_weights_that_are_not_numbers_are_told_at_the_first_step(training, tmp_path, tiny_model):
    model = spoilt(tiny_model, tmp_path / "model", lambda weights: weights["model.norm.weight"].fill_(math.nan))
    with pytest.raises((UnhealthyError, ModelError)):
        training(model)
    assert steps_done(tmp_path) == 0


def test_nothing_to_train_is_told():
    with pytest.raises(UnhealthyError, match="no parameter"):
        check_trainable([])
    check_trainable([torch.nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize(
    ("number", "loss", "grad_norm", "scaled", "sick"),
    [
        (1, 2.5, 1.0, False, None),
        (7, 2.5, 1.0, False, None),
        (1, math.nan, 1.0, False, "loss is nan"),
        (7, math.inf, 1.0, True, "loss is inf"),
        (7, 2.5, math.nan, False, "gradient is nan"),
        (1, 2.5, math.inf, False, "gradient is inf"),
        (1, 2.5, math.inf, True, None),  # the scaler skips the step and lowers its scale
        (1, 0.0, 1.0, False, "loss is exactly zero"),
        (7, 0.0, 0.0, False, None),  # learned by heart
        (1, 2.5, 0.0, False, "gradient is exactly zero"),
    ],
)
def test_what_a_step_may_look_like(number, loss, grad_norm, scaled, sick):
    if sick is None:
        check_step(number, loss, grad_norm, scaled=scaled)
        return
    with pytest.raises(UnhealthyError, match=sick) as caught:
        check_step(number, loss, grad_norm, scaled=scaled)
    assert caught.value.where == f"step {number}"
    assert caught.value.remedy
