"""What an adapter can be turned into: a merged model. The work is done in other processes: none here imports torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from finetuned.adapters import read_adapter, read_story
from finetuned.by_hand import models_folder
from finetuned.errors import HomeError


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
