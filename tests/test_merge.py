"""`finetuned merge`: a model that answers as base and adapter do together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import CHATML, chat_rows, write_jsonl
from test_training import Run

IDS = torch.arange(2, 130).reshape(4, 32)


def merge(adapter: Path, output: Path, *options: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetuned", "merge", str(adapter), "--output-dir", str(output), *options]
    return subprocess.run(command, input=said, capture_output=True, text=True, check=False, cwd=adapter.parent)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    data = write_jsonl(folder / "data.jsonl", chat_rows(16))
    kinds = {"qlora": {"tuning": "qlora"}, "dora": {"use_dora": True, "use_rslora": True, "lora_r": 4}}
    return {
        name: Run(folder / name, data, model=str(tiny_model), learning_rate=1e-2, **settings).done()
        for name, settings in kinds.items()
    }


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", ["qlora", "dora"])
def test_the_merged_model_s_logits_are_those_of_base_and_adapter(tmp_path, runs, tiny_model, kind):
    dtype, tolerance = {"qlora": ("bf16", 0.03), "dora": ("float32", 1e-5)}[kind]
    adapter = runs[kind].adapter
    done = merge(adapter, tmp_path / "merged", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert ("never into rounded ones" in done.stdout) == (kind == "qlora")
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert stored["dtype"] == {"bf16": "bfloat16"}.get(dtype, dtype)
    assert "quantization_config" not in stored

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    change = (wanted - before).norm()
    assert change > 0.1 * before.norm()  # so that the adapter shows
    assert (found - wanted).norm() < tolerance * change
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML
    story = json.loads((tmp_path / "merged" / "finetuned.json").read_text())
    assert story["merged"]["adapter_job_id"] == runs[kind].spec.id
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_only_a_merged_model_is_replaced_and_only_after_asking(tmp_path, runs):
    adapter, output = runs["dora"].adapter, tmp_path / "merged"
    output.mkdir()
    (output / "finetuned.json").write_text('{"merged": {}}')
    (output / "old").touch()
    said = merge(adapter, output, said="n\n")
    assert said.returncode == 1
    assert "Replace it?" in said.stderr
    assert (output / "old").exists()
    assert merge(adapter, output, "--yes").returncode == 0
    assert not (output / "old").exists()
    assert "Replace it?" in merge(adapter, output, said="n\n").stderr

    said = merge(adapter, adapter, "--yes")
    assert said.returncode == 78
    assert "Name another folder" in said.stderr
    assert (adapter / "adapter_model.safetensors").is_file()


def test_what_cannot_be_merged_is_told(tmp_path, runs, tiny_model):
    (tmp_path / "empty").mkdir()
    for adapter, text in (
        (tmp_path / "empty", "holds no LoRA adapter"),
        (tiny_model, "is a whole model and no adapter"),
    ):
        said = merge(adapter, tmp_path / "out")
        assert said.returncode == 78
        assert text in said.stderr
    moved = tmp_path / "adapter"
    shutil.copytree(runs["dora"].adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/model"}))
    said = merge(moved, tmp_path / "out")
    assert said.returncode == 78
    assert "/no/such/model" in said.stderr
    assert "Name it with --model" in said.stderr
    assert "Traceback" not in said.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty"]
    assert merge(moved, tmp_path / "out", "--model", str(tiny_model)).returncode == 0
