"""`finetuned train` without a daemon, and the model that comes with finetuned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.home import JobFolder
from finetuned.supervisor import EventTail, progress_after


def command(dataset, output, *options) -> list[str]:
    main = [sys.executable, "-m", "finetuned", "train", "--dataset", str(dataset), "--output-dir", str(output)]
    return [*main, *map(str, options)]


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "numbers.jsonl", chat_rows(24))


def test_training_by_hand_leaves_an_adapter_and_its_log(tmp_path, data, tiny_model):
    output = tmp_path / "out"
    options = (
        "--model",
        tiny_model,
        "--epochs",
        2,
        "--batch-size",
        4,
        "--lora-r",
        2,
        "--max-length",
        512,
        "--job-id",
        "mine",
    )
    done = subprocess.run(command(data, output, *options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train loss" in done.stdout
    assert "step" in done.stderr
    story = json.loads((output / "finetuned.json").read_bytes())
    assert story["job_id"] == "mine"
    assert story["settings"]["lora_r"] == 2
    assert (output / "adapter_model.safetensors").is_file()
    assert "plan: 12 steps of 4 rows" in (output / "train.log").read_text()
    assert not (output / ".finetuned-train").exists()


def test_a_training_by_hand_goes_on_from_an_adapter(tmp_path, data, tiny_model):
    options = ("--model", tiny_model, "--max-steps", 2)
    for output, more in (("first", ()), ("second", ("--resume-adapter", "first"))):
        done = subprocess.run(
            command(data, output, *options, *more), capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
    story = json.loads((tmp_path / "second" / "finetuned.json").read_bytes())
    assert [link["adapter"] for link in story["chain"]] == ["first"]
    assert "resume_adapter: first" in (tmp_path / "second" / "train.log").read_text()


def test_any_recipe_is_trained_by_hand_with_any_setting(tmp_path, data, tiny_model):
    output, rows = tmp_path / "out", write_jsonl(tmp_path / "measure.jsonl", chat_rows(2, start=50))
    recipe = ("--recipe", "distill", "--teacher", tiny_model, "--set", "distill.alpha=0.75", "--benchmark", rows)
    options = ("--model", tiny_model, "--max-steps", 1, "--set", "benchmark_tokens=4", *recipe)
    done = subprocess.run(command(data, output, *options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    story = json.loads((output / "finetuned.json").read_bytes())
    assert (story["settings"]["recipe"], story["settings"]["distill"]["alpha"]) == ("distill", 0.75)
    assert story["benchmark"]["models"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--epochs", 2, "--set", "epochs=3"), "epochs is set to 2.0 and to 3. Leave one out."),
        (("--recipe", "distill"), "recipe distill needs a teacher"),
        (("--set", "rft.sample=3"), "rft.sample: no such setting; did you mean rft.samples"),
    ],
)
def test_settings_by_hand_that_cannot_be_used_are_named(tmp_path, data, options, said):
    done = subprocess.run(command(data, tmp_path / "out", *options), capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert said in done.stderr


def test_a_folder_with_something_in_it_is_not_replaced_without_asking(tmp_path, data, tiny_model):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    done = subprocess.run(
        command(data, output, "--model", tiny_model, "--max-steps", 1),
        input="n\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(tmp_path, data, tiny_model):
    output = tmp_path / "out"
    options = ("--model", tiny_model, "--epochs", 40, "--batch-size", 4)
    with subprocess.Popen(command(data, output, *options), stderr=subprocess.PIPE, text=True) as process:
        tail = EventTail(JobFolder(output / ".finetuned-train").events)
        eventually(lambda: progress_after({}, tail.read()).get("step", 0) > 3, why="some steps")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "The same command goes on from there" in process.stderr.read()
    done = subprocess.run(command(data, output, *options, "--yes"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed after step" in (output / "train.log").read_text()


def test_bad_rows_fail_the_training_unless_validation_is_skipped(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "half.jsonl", [*chat_rows(4), {"foo": 1}])
    options = ("--model", tiny_model, "--max-steps", 1)
    done = subprocess.run(command(data, tmp_path / "a", *options), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "half.jsonl:5" in done.stderr
    assert "missing_messages_list" in done.stderr
    done = subprocess.run(
        command(data, tmp_path / "a", *options, "--skip-validation"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_base_directory_as_output_folder_keeps_its_ledger(tmp_path, home):
    """Its machinery has nothing to do with a training by hand."""
    (home.machinery / "state.db").write_bytes(b"precious")
    done = subprocess.run(
        command(write_jsonl(tmp_path / "x.jsonl", [{"foo": 1}]), home.root, "--yes"), capture_output=True, check=False
    )
    assert done.returncode == 1
    assert (home.machinery / "state.db").read_bytes() == b"precious"


def test_an_output_folder_that_cannot_be_made_is_a_sentence(data):
    done = subprocess.run(command(data, data / "sub"), capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "Name another --output-dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_out_of_reach_is_told_at_once(tmp_path, data):
    done = subprocess.run(
        command(data, tmp_path / "out", "--model", "nobody/nothing"),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr


@pytest.mark.model
def test_the_embedded_model_needs_no_network_and_adapters_name_its_hub_id(tmp_path, data):
    """Unpacked once, trained, and its adapter says where the weights come from."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    for name in ("first", "second"):
        output = tmp_path / name
        options = ("--model", "smollm2-135m", "--max-steps", 1, "--batch-size", 2)
        done = subprocess.run(
            command(data, output, *options), capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr + (output / ".finetuned-train" / "train.log").read_text()
        config = json.loads((output / "adapter_config.json").read_bytes())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert "dequantised from Q4_1" in (output / "README.md").read_text()
    unpacked = tmp_path / ".cache" / "finetuned" / ".finetuned" / "models" / "smollm2-135m"
    assert "quantization_config" not in json.loads((unpacked / "config.json").read_bytes())
