"""Predictions before training: what is counted is what a real pass keeps, and the ladder is walked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from conftest import chat_rows, write_config, write_jsonl
from finetuned.cli import cli
from finetuned.config import load_config, settings_from
from finetuned.fallback import Rung
from finetuned.plan import render
from finetuned.trainer import attention, footprint, history, plan, rehearsal
from finetuned.trainer.base import Base
from finetuned.trainer.layout import Layout
from finetuned.trainer.lora import add_adapter
from finetuned.trainer.model import load_model
from finetuned.trainer.precision import choose
from finetuned.trainer.recipes.sft import Objective
from finetuned.trainer.tokens import Example

CPU = torch.device("cpu")


def rows(*lengths: int) -> list[Example]:
    return [Example([5 + n] * 2 + [7] * (length - 2), [True] * length, 0) for n, length in enumerate(lengths)]


def work(folder, tuning: str) -> footprint.Work:
    settings = settings_from({"dtype": "float32", "tuning": tuning}, where="")
    return footprint.Work(Base(str(folder), "tiny"), settings, tuning, choose(CPU, tuning, "float32"), CPU, False)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_is_counted_is_what_a_real_forward_keeps(tiny_model, tuning):
    what, batch = work(tiny_model, tuning), rows(40, 30)
    counted = footprint.count(what, batch, accumulated=False, libraries=0)
    model = load_model(what.base, what.settings, tuning=tuning, precision=what.precision, device=CPU)
    attention.register()
    model.set_attn_implementation(attention.FLAT)
    if tuning == "lora":
        from finetuned.trainer import fused

        model = add_adapter(model, what.base, what.settings, precision=what.precision)
        fused.fuse(model)
    objective = Objective(model, Layout(True, True, "", attention.FLAT)).train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(objective.layout.collate(batch))
    assert counted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.footprint.activations == pytest.approx(sum(kept.values()), rel=0.03)


def test_more_tokens_need_more(tiny_model):
    few, many = (
        footprint.count(work(tiny_model, "lora"), rows(*lengths), accumulated=False, libraries=0).footprint.peak
        for lengths in ([50], [50, 60, 70])
    )
    assert many > few


def test_the_ladder_is_walked_until_a_rung_fits():
    rung = Rung(8, 1, False, "lora", 512)
    settings = settings_from({}, where="")
    assert plan.walk(rung, settings, lambda _: True)[0] == rung
    found, reason, fits = plan.walk(rung, settings, lambda one: one.batch_size <= 2)
    assert (found.batch_size, found.gradient_accumulation, fits) == (2, 4, True)
    assert "halved" in reason
    foot, _, fits = plan.walk(rung, settings, lambda _: False)
    assert not fits
    assert foot == replace(rung, batch_size=1, gradient_accumulation=8, activation_checkpointing=True)


def test_earlier_jobs_correct_the_same_method_first(tmp_path):
    file = tmp_path / "trainings.json"
    assert history.correction(history.read(file), model="m", method="lora", device="cpu", recipe="sft")[0] == 1
    history.remember(file, history.Record("m", "full", "cpu", 100, 150, 10.0))
    assert history.correction(history.read(file), model="m", method="lora", device="cpu", recipe="sft")[0] == 1.5
    history.remember(file, history.Record("m", "lora", "cpu", 100, 120, 20.0))
    assert history.correction(history.read(file), model="m", method="lora", device="cpu", recipe="sft")[0] == 1.2
    assert history.speed(history.read(file), model="m", method="lora", device="cpu", recipe="sft") == 20


def ask(*words: object):
    return CliRunner().invoke(cli, ["plan", *map(str, words)])


def test_the_verb_answers_for_machines_and_names_what_is_wrong(home, tmp_path, tiny_model):
    write_config(home, model=str(tiny_model))
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(20))
    said = ask(data, "--base-dir", home.root, "--json")
    facts = json.loads(said.output)
    assert sum(facts["parts_bytes"].values()) == facts["predicted_bytes"]
    assert (facts["spread_over"], facts["peak_on_each"]) == (1, facts["peak_bytes"])
    assert (facts["steps"], facts["fits"], facts["rung"]["batch_size"]) == (5, True, 4)

    missing = ask(data, "--base-dir", home.root, "--model", "./nowhere")
    assert missing.exit_code == 1
    assert "no such folder" in missing.output
    assert ask(tmp_path / "none.jsonl").exit_code == 2
    write_config(home, epochs=-1)
    assert "epochs" in str(ask(data, "--base-dir", home.root).exception)


@pytest.mark.parametrize(("minutes", "time"), [(0.0001, "about 1 s"), (0.7, "about 42 s"), (90, "about 1 h 30 min")])
def test_a_short_time_is_told_in_seconds_and_one_row_is_one(minutes, time):
    text = render(
        {
            "not_counted": ["the moon"],
            "parts_bytes": {}, "correction": 1.0, "corrected_by": "nothing", "counted": "by hand", "peak_bytes": 1,
            "processes": 1, "predicted_bytes": 1, "memory_bytes": 1, "file": "x", "data_summary": "",
            "data_sentences": [],
            "rung": {"batch_size": 1, "micro_batch_tokens": 0}, "rung_name": "", "reason": "", "model": "",
            "device": "", "trained_parameters": 1, "steps": 1, "tokens": 1, "supervised_tokens": 1,
            "tokens_per_second": 1.0, "speed_from": "earlier jobs", "minutes": minutes,
            "spread_over": 3, "peak_on_each": 7 * 2**20,
        }
    )  # fmt: skip
    assert f"time: {time} at" in text
    assert "at most 1 row\n" in text
    assert "not counted: the moon\n" in text
    assert "spread over 3 like this one (gpus_per_job) it takes 7 MiB on each\n" in text


def planned(home, data, tiny_model, *, memory: int | None = None, **settings) -> dict:
    write_config(home, model=str(tiny_model), dtype="float32", tuning="lora", **settings)
    order = {"file": str(data), "models": str(home.models), "base_dir": str(home.root), "memory": memory}
    return plan.plan({**order, "settings": load_config(home.config_file).training().model_dump()})


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_does_not_fit_on_one_gpu_says_over_how_many_it_must_be_spread(tmp_path, tiny_model, tuning):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_bytes())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    (model / "config.json").write_text(json.dumps(config | sizes))
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(20))
    settings = settings_from({"model": str(model), "dtype": "float32", "tuning": tuning}, where="").model_dump()
    order = {"file": str(data), "models": str(tmp_path / "models"), "base_dir": str(tmp_path), "settings": settings}
    foot = plan.plan({**order, "memory": 2**20})
    assert (foot["fits"], foot["spread_over"]) == (False, 64)
    before, least, most = 1, foot["peak_on_each"], foot["peak_bytes"]
    for share in (0.7, 0.3):  # of what several GPUs can share
        memory = round((least + share * (most - least)) / 0.9)
        found = plan.plan({**order, "memory": memory})
        assert found["peak_on_each"] <= 0.9 * memory
        assert before < found["spread_over"] < 10
        before = found["spread_over"]


def test_processes_without_gpus_share_one_memory(home, tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(8))
    alone, three = (planned(home, data, tiny_model, gpus_per_job=number) for number in (1, 3))
    assert three["peak_bytes"] == pytest.approx(3 * alone["peak_bytes"], rel=0.1)
    assert "the other processes" in render(three)
    assert not planned(home, data, tiny_model, gpus_per_job=3, memory=2 * alone["peak_bytes"])["fits"]


def work_of(facts: dict) -> int:
    return facts["parts_bytes"]["activations"] + facts["parts_bytes"]["working"]


def test_every_recipe_is_counted_on_its_own_objective(home, tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(8))
    taught = {"recipe": "distill", "teacher": str(tiny_model)}
    terms = {"hidden_weight": 0.1, "attention_weight": [0, 0.1], "contrastive_weight": 0.1}
    sft, distill, more, hybrid = (
        planned(home, data, tiny_model, **settings)
        for settings in ({}, taught, {**taught, "distill": terms}, {"recipe": "hybrid"})
    )
    assert all(facts["counted"] == rehearsal.COUNTED for facts in (sft, distill, more, hybrid))
    assert work_of(sft) < work_of(distill) < work_of(more)  # terms that begin at 0 are counted as well
    assert 1.5 * work_of(sft) < work_of(hybrid)  # two passes of each row
    assert distill["trained_parameters"] == sft["trained_parameters"]  # of one vocabulary: there is no projector
    assert more["trained_parameters"] == sft["trained_parameters"] + 3 * 64 * 64  # two layers' and the contrast's
    assert hybrid["trained_parameters"] > sft["trained_parameters"]  # the policy
    assert (sft["not_counted"], distill["not_counted"]) == ([], [])
    assert any("time of making answers" in one for one in hybrid["not_counted"])


def test_of_rft_the_larger_of_answering_and_training_counts(home, tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(8))
    short, long = (planned(home, data, tiny_model, recipe="rft", rft={"max_new_tokens": n}) for n in (8, 100_000))
    assert "answers" not in short["parts_bytes"]
    cache = (
        2 * 2 * 32 * 4 * 100_000
    )  # keys and values of two layers, two heads of 16 numbers, float32, one row at a time
    assert long["parts_bytes"]["answers"] > cache / 2
    assert long["predicted_bytes"] == sum(long["parts_bytes"].values())
    assert any("not of what is kept" in one for one in long["not_counted"])


def test_jobs_of_another_recipe_or_teacher_correct_nothing(tmp_path):
    file = tmp_path / "trainings.json"
    (tmp_path / "trainings.json").write_text(
        '[{"model": "m", "method": "lora", "device": "cpu", "predicted": 100, "peak": 150, "tokens_per_second": 9.0}]'
    )  # as before there were recipes
    for teacher in ("a", "b"):
        settings = settings_from({"recipe": "distill", "teacher": teacher}, where="")
        kind = {"model": "m", "method": "lora", "device": "cpu", "recipe": history.kind_of(settings)}
        assert history.speed(history.read(file), **kind) is None
        assert history.peak(history.read(file), **kind) == (0, 0)
        history.remember(file, history.Record("m", "lora", "cpu", 100, 300, 2.0, kind["recipe"]))
        assert history.correction(history.read(file), **kind)[0] == 3
    assert history.correction(history.read(file), model="m", method="lora", device="cpu", recipe="sft")[0] == 1.5


def test_a_teacher_beside_the_model_is_counted_as_it_is_stored(home, tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(8))
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    for dtype, device, wanted in (("float32", "auto", 4 * size), ("fp16", "cpu", 2 * size), ("fp16", "cuda", None)):
        teacher = {"recipe": "distill", "teacher": str(tiny_model), "teacher_dtype": dtype, "teacher_device": device}
        write_config(home, model=str(tiny_model), **teacher)
        order = {"file": str(data), "models": str(home.models), "base_dir": str(home.root)}
        order["settings"] = load_config(home.config_file).training().model_dump()
        parts = plan.plan(order)["parts_bytes"]
        assert parts.get("teacher") == wanted
