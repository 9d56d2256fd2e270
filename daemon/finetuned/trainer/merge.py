"""`python -m finetuned.trainer.merge ADAPTER OUTPUT`: the adapter's weights added to those of its base model.

The base is loaded anew in 16 or 32 bits, also where the adapter was trained on 4 or 8: merging into such weights would
round what was learned away. The folder appears by rename, its manifest `finetuned.json` written last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from finetuned.adapters import MANIFEST, WEIGHTS, read_adapter, read_story
from finetuned.config import TrainingSettings
from finetuned.durable import make_folder, move, sync_tree, write_file
from finetuned.errors import FinetunedError, HomeError, ModelError
from finetuned.events import ExitCode


def main(arguments: list[str]) -> int:
    """Merge, and give the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--dtype", choices=["bf16", "float32"], required=True)
    parser.add_argument("--model")
    options = parser.parse_args(arguments)
    try:
        merge(options.adapter, options.output, dtype=options.dtype, model=options.model, models=options.models)
    except FinetunedError as error:
        click.echo(f"finetuned: {error}", err=True)
        return ExitCode.BAD_SETTINGS
    return 0


def merge(adapter: Path, output: Path, *, dtype: str, model: str | None, models: Path) -> None:
    """Write the merged model to `output`, in place of what is there. Raises ConfigError, ModelError or HomeError."""
    config, story = read_adapter(adapter, where=str(adapter)), read_story(adapter)
    staged = output.with_name(f".{output.name}.merging")
    try:
        make_folder(output.parent)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        base = _merge(adapter, staged, config, story, dtype=dtype, model=model, models=models)
        told = {"adapter": adapter.name, "base_model": base, "dtype": dtype, "merged_at": time.time()}
        merged = {**told, "adapter_job_id": story.get("job_id"), "chain": story.get("chain", [])}
        for path in staged.iterdir():  # transformers writes some files for the owner alone
            path.chmod(0o640)
        write_file(staged / MANIFEST, json.dumps({"merged": merged}, indent=2, ensure_ascii=False).encode() + b"\n")
        sync_tree(staged)
        if output.exists():
            shutil.rmtree(output)
        move(staged, output)
    except OSError as error:
        raise HomeError(
            f"cannot be written: {error}", where=str(output), remedy="Make room, or name another --output-dir."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    click.echo(f"{output}: {base} with {adapter.name} merged into it, in {dtype}")


def _merge(
    adapter: Path,
    staged: Path,
    config: dict[str, Any],
    story: dict[str, Any],
    *,
    dtype: str,
    model: str | None,
    models: Path,
) -> str:
    """Write weights, tokenizer and template; give the base model's name."""
    import torch
    import transformers
    from peft import PeftModel

    from finetuned.trainer.base import find_base, quiet_libraries
    from finetuned.trainer.model import load_model
    from finetuned.trainer.precision import choose
    from finetuned.trainer.vision import copy_processor

    quiet_libraries()
    tuning = story.get("rung", {}).get("tuning")
    if tuning in {"qlora", "lora-8bit"}:
        click.echo(f"Trained on a {tuning} base; merged into {dtype} weights, never into rounded ones.")
    settings = base_settings(config["base_model_name_or_path"], story, model=model)
    try:
        base = find_base(settings, models=models, base_dir=Path.cwd())
        cpu = torch.device("cpu")
        whole = load_model(base, settings, tuning="lora", precision=choose(cpu, "lora", dtype), device=cpu)
    except ModelError as error:
        raise ModelError(f"the base model: {error.what}", where=error.where, remedy="Name it with --model.") from error
    try:
        merged = PeftModel.from_pretrained(whole, adapter).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the adapter does not fit {base.name}: {text}",
            where=str(adapter / WEIGHTS),
            remedy="Name its base with --model.",
        ) from error
    merged.config.use_cache = True
    merged.save_pretrained(staged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        adapter if (adapter / "tokenizer_config.json").is_file() else base.source
    )
    tokenizer.save_pretrained(staged)
    copy_processor(base.source, settings.revision, staged)
    return base.name


def base_settings(base: str, story: dict[str, Any], *, model: str | None) -> TrainingSettings:
    """Give the settings that load the base model of an adapter, or `model` in its place.

    What runs foreign code is asked of the user, not read from an adapter: that may come from anyone.
    """
    from finetuned.trainer import embedded

    trained = story.get("settings", {})
    named = embedded.NAME if trained.get("model") == embedded.NAME else base
    return TrainingSettings(model=model or named, revision=None if model else trained.get("revision"))


if __name__ == "__main__":
    os.umask(0o027)
    sys.exit(main(sys.argv[1:]))
