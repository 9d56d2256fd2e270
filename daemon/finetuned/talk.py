"""`finetuned chat`: this process becomes one that has torch, with the terminal as it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from finetuned.adapters import CONFIG
from finetuned.by_hand import first_gpu, models_folder
from finetuned.errors import ConfigError, HomeError
from finetuned.home import Home, find_home
from finetuned.launchers.local import trainer_environment

_LATEST = "latest"


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
    folder = _find(adapter, home)
    models = home.models if home else models_folder()
    models.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "finetuned.trainer.chatting", str(folder), "--models", str(models)]
    command += ["--longest", str(max_new_tokens), "--temperature", str(temperature)]
    command += ["--compare"] if compare else []
    command += ["--model", model] if model else []
    gpu = first_gpu()
    environment, _ = trainer_environment(gpu.uuid if gpu else None)
    os.execve(sys.executable, command, {**os.environ, **environment})  # noqa: S606, our own program


def _find(adapter: Path | None, home: Home | None) -> Path:
    """Find the adapter's folder: as a path, or by its name in adapters/."""
    given = adapter or Path(_LATEST)
    candidates = [Path(os.path.expanduser(given))] if adapter else []  # noqa: PTH111, as it is if nobody is called so
    candidates += [home.adapters / given] if home else []
    for folder in candidates:
        if any((folder / name).is_file() for name in (CONFIG, "config.json")):
            return folder.resolve()
    if adapter is None:
        raise HomeError(
            "there is no adapter yet",
            where=str(candidates[0].parent),
            remedy="Drop a file into inbox/ with the daemon running, or name an adapter's folder.",
        )
    raise ConfigError(
        "there is no adapter in such a folder",
        where=str(adapter),
        remedy="Name a folder, or one of those in adapters/.",
    )
