"""What an adapter can be turned into: a merged model, or a GGUF file. The work is done in other processes: nothing
here imports torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from finetuned.adapters import read_adapter, read_story
from finetuned.errors import ConfigError, FinetunedError, HomeError
from finetuned.home import models_folder

_CONVERTER = "convert_lora_to_gguf.py"  # of llama.cpp


def merge_adapter(adapter: Path, output_dir: Path, *, model: str | None, dtype: str, yes: bool) -> int:
    """Merge an adapter into its base model and give the exit code. Raises ConfigError or HomeError."""
    folder, output = adapter.expanduser().resolve(), output_dir.expanduser().resolve()
    read_adapter(folder, where=str(adapter))
    if output.is_dir() and any(output.iterdir()):
        if "merged" not in read_story(output):
            raise HomeError(
                "is not empty, and what is there is no merged model",
                where=str(output_dir),
                remedy="Name another folder.",
            )
        if not yes:
            click.confirm(f"{output_dir} holds a merged model. Replace it?", abort=True, err=True)
    command = [sys.executable, "-m", "finetuned.trainer.merge", str(folder), str(output), "--dtype", dtype]
    options = ["--models", str(models_folder()), *(["--model", model] if model else [])]
    return subprocess.run([*command, *options], check=False).returncode


def convert_adapter(adapter: Path, output: Path, *, model: str | None) -> int:
    """Have llama.cpp's converter write an adapter as GGUF, and give the exit code. Raises ConfigError or HomeError.

    DoRA and rsLoRA are refused: the format holds no magnitudes, and llama.cpp scales by lora_alpha / r alone.
    """
    folder, target = adapter.expanduser().resolve(), output.expanduser().resolve()
    config = read_adapter(folder, where=str(adapter))
    if lost := [key for key in ("use_dora", "use_rslora") if config.get(key)]:
        raise ConfigError(
            f"a GGUF adapter cannot hold {' and '.join(lost)}",
            where=str(adapter),
            remedy="Merge it with `finetuned merge`, and convert the model with llama.cpp's convert_hf_to_gguf.py.",
        )
    base = ["--base-model-id", model] if model and not Path(model).is_dir() else []
    if known := _base_folder(folder, str(model or config["base_model_name_or_path"])):
        base = ["--base", str(known)]  # else it asks the hub
    if not target.parent.is_dir():
        raise HomeError(
            "there is no such folder", where=str(target.parent), remedy="Make it, or name another --output."
        )
    staged = target.with_name(f".{target.name}.partial")
    command = [sys.executable, str(_converter()), "--outfile", str(staged), *base, str(folder)]
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        staged.replace(target)
    staged.unlink(missing_ok=True)
    return status


def _base_folder(adapter: Path, name: str) -> Path | None:
    """Find the base model on this machine, if it is a folder."""
    trained = read_story(adapter).get("settings", {}).get("model")
    folders = (Path(name), models_folder() / str(trained))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _converter() -> Path:
    named = os.environ.get("LLAMA_CPP")
    path = Path(named).expanduser() / _CONVERTER if named else Path(shutil.which(_CONVERTER) or "")
    if path.is_file():
        return path
    raise FinetunedError(
        "llama.cpp's converter is not there",
        where=str(path) if named else _CONVERTER,
        remedy="Clone github.com/ggml-org/llama.cpp and set LLAMA_CPP to its folder, or put the script in PATH.",
    )
