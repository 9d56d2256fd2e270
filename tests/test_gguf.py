"""`finetuned gguf`: what it refuses before it starts llama.cpp's converter, which is not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetuned.cli import cli
from finetuned.errors import FinetunedError


@pytest.fixture(autouse=True)
def no_converter(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def adapter(folder: Path, **changes) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "hub/model", "r": 16, "lora_alpha": 32, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return folder


def refused(folder: Path) -> FinetunedError:
    output = folder.parent / "x.gguf"
    result = CliRunner().invoke(cli, ["gguf", str(folder), "--output", str(output)])
    assert isinstance(result.exception, FinetunedError), result.output
    assert not output.exists()
    return result.exception


def test_where_the_converter_is_missing_it_says_what_to_install(tmp_path):
    error = refused(adapter(tmp_path / "adapter"))
    assert "convert_lora_to_gguf.py" in str(error)
    assert "set LLAMA_CPP" in error.remedy


def test_a_folder_that_holds_no_converter_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", "/no/such/folder")
    assert refused(adapter(tmp_path / "adapter")).where == "/no/such/folder/convert_lora_to_gguf.py"


@pytest.mark.parametrize("key", ["use_dora", "use_rslora"])
def test_what_llama_cpp_would_lose_is_refused(tmp_path, key):
    error = refused(adapter(tmp_path / "adapter", **{key: True}))
    assert key in error.what
    assert "finetuned merge" in error.remedy


def test_what_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no LoRA adapter" in str(refused(tmp_path / "empty"))
