"""`finetuned chat`: this process becomes one that has torch, with the terminal as it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from finetuned.asking import find_adapter
from finetuned.errors import HomeError
from finetuned.gpu import first_gpu
from finetuned.home import Home, find_home, models_folder
from finetuned.launchers.local import trainer_environment


def talk(
    adapter: Path | None,
    *,
    base_dir: Path | None,
    compare: bool,
    model: str | None,
    max_new_tokens: int,
    temperature: float,
) -> NoReturn:
    """Find the adapter and go over to the process that talks. Raises ConfigError or HomeError."""
    home: Home | None = None
    try:
        home = find_home(base_dir)
    except HomeError:
        if base_dir or adapter is None:
            raise
    folder = find_adapter(adapter, home)
    models = home.models if home else models_folder()
    models.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "finetuned.trainer.chatting", str(folder), "--models", str(models)]
    command += ["--longest", str(max_new_tokens), "--temperature", str(temperature)]
    command += ["--compare"] if compare else []
    command += ["--model", model] if model else []
    gpu = first_gpu()
    environment, _ = trainer_environment(gpu.uuid if gpu else None)
    os.execve(sys.executable, command, {**os.environ, **environment})  # noqa: S606, our own program
