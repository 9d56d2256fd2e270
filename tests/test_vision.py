"""Models that also see: their text decoder is trained, on text rows, and nothing else of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3VLConfig,
)

from conftest import CHATML, chat_rows, row_of, write_jsonl
from finetuned.dataset.rows import Problem
from finetuned.events import EventType, ExitCode
from finetuned.trainer.chat import takes_parts
from finetuned.trainer.layout import choose_layout
from finetuned.trainer.tokens import Example, tokenise
from finetuned.trainer.vision import text_layers, tower
from test_layout import check_every_way
from test_training import Run, plain_loss

TURN = "<|im_start|>{{ message['role'] }}\n"
PART = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LISTS = "{% for message in messages %}" + TURN + PART + "<|im_end|>\n{% endfor %}" + ASK  # as SmolVLM's
EITHER = (
    "{% for message in messages %}" + TURN + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    + PART + "{% endif %}<|im_end|>\n{% endfor %}" + ASK
)  # fmt: skip  # as Qwen3-VL's
ADDING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}{% endfor %}"  # Qwen2's
)
WITHOUT_USER = (
    "{% for message in messages %}{% if message['role'] != 'user' %}"
    + TURN
    + "{{ message['content'] }}{% endif %}{% endfor %}"
)
TEXT = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 48}


def build():
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        vision_config={
            **SIGHT,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def seeing_model(tmp_path_factory, tiny_model) -> Path:
    """A random Qwen3-VL with the tiny model's tokenizer and a template that takes lists of parts alone."""
    folder = tmp_path_factory.mktemp("seeing-model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = LISTS
    tokenizer.save_pretrained(folder)
    build().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 16}')
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory, seeing_model) -> dict:
    held_out = write_jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", chat_rows(4, start=100))
    asking = {"eval_file": str(held_out), "predictions": {"samples": 1, "max_new_tokens": 4}}
    return {"data": write_jsonl(held_out.with_name("data.jsonl"), chat_rows(16)), "model": str(seeing_model), **asking}


def check_loss(run: Run, model, settings: dict) -> None:
    """The loss by transformers and peft alone, the chat put into words by another template, is what was reported."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert tokenizer.chat_template == LISTS
    tokenizer.chat_template = CHATML
    rows = [json.loads(line) for line in Path(settings["eval_file"]).read_text().splitlines()]
    (result,) = run.events(EventType.RESULT)
    assert result.data["valid_loss"] == pytest.approx(plain_loss(model, tokenizer, rows), rel=1e-5)
    assert result.data["valid_loss"] < result.data["valid_loss_before"] - 0.1
    assert len(run.events(EventType.PREDICTIONS)) == 2


def test_an_adapter_is_on_the_text_decoder_alone_and_loads_in_plain_peft(tmp_path, settings):
    run = Run(tmp_path / "job", **settings).done()
    assert {name.split(".layers.")[0] for name in run.weights()} == {"base_model.model.model.language_model"}
    base = AutoModelForImageTextToText.from_pretrained(settings["model"], dtype=torch.float32)
    frozen = sum(parameter.numel() for parameter in base.model.visual.parameters())
    (plan,) = run.events(EventType.PLAN)
    assert plan.data["frozen_vision_parameters"] == frozen
    assert f"{frozen:,} vision parameters frozen" in plan.message
    assert "AutoModelForImageTextToText.from_pretrained" in (run.adapter / "README.md").read_text()
    check_loss(run, PeftModel.from_pretrained(base, run.adapter), settings)


def test_a_full_tuning_leaves_the_vision_tower_as_it_was(tmp_path, settings):
    run = Run(tmp_path / "job", tuning="full", **settings).done()
    before = load_file(Path(settings["model"]) / "model.safetensors")
    same = {name for name, weight in run.weights().items() if torch.equal(weight, before[name])}
    (plan,) = run.events(EventType.PLAN)
    assert plan.data["trainable_parameters"] == plan.data["parameters"] - plan.data["frozen_vision_parameters"]
    assert same == {name for name in before if ".visual." in name}
    assert (run.adapter / "preprocessor_config.json").read_text() == '{"patch_size": 16}'
    check_loss(run, AutoModelForImageTextToText.from_pretrained(run.adapter, dtype=torch.float32), settings)


def test_layers_of_the_vision_tower_cannot_be_named(tmp_path, settings):
    run = Run(tmp_path / "job", target_modules=["qkv"], **settings)
    assert run.attempt() == ExitCode.BAD_SETTINGS, run.log
    assert "qkv" in run.error()["what"]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1"]], ids=str)
def test_layers_of_the_same_name_in_the_vision_tower_get_no_adapter(targets):
    """Gemma 3's tower has a q_proj too."""
    config = Gemma3Config(
        text_config={**TEXT, "num_hidden_layers": 3},
        vision_config={**SIGHT, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 16},
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    wrapped = get_peft_model(model, LoraConfig(target_modules=text_layers(model, targets)))
    adapted = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 3 * 2 * (7 if targets == "all-linear" else 1)
    assert all(".language_model." in name for name in adapted)


def test_micro_batches_of_text_are_right():
    """Flat and padded against transformers' own forward, one row at a time."""
    model = build().train()
    frozen = tower(model)
    assert {id(p) for p in frozen} == {id(p) for p in model.model.visual.parameters()}
    for parameter in frozen:
        parameter.requires_grad = False
    check_every_way(model, choose_layout(model, torch.float32))


@pytest.mark.parametrize(
    ("template", "parts"), [(CHATML, False), (EITHER, False), (ADDING, False), (WITHOUT_USER, False), (LISTS, True)]
)
def test_a_template_gets_a_text_in_the_form_that_it_takes(tiny_model, template, parts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    assert takes_parts(tokenizer) is parts


def test_parts_and_plain_text_come_out_the_same(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [row_of(("system", "Be brief."), ("user", "type"), ("assistant", "text"))]
    (wanted,) = tokenise(rows, tokenizer, max_length=100)
    for template in (LISTS, EITHER):
        tokenizer.chat_template = template
        assert list(tokenise(rows, tokenizer, max_length=100)) == [wanted]
    assert isinstance(wanted, Example)


def test_a_template_that_drops_the_users_text_is_told(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = WITHOUT_USER
    ((_, problem),) = tokenise([row_of(("user", "question"), ("assistant", "answer"))], tokenizer, max_length=100)
    assert problem == Problem("template_drops_text", "a user's text")
