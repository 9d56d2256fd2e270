"""`finetuned datagen`: ask a process that has torch to answer a file's questions; what is right is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuned.asking import ask, terms
from finetuned.errors import ConfigError
from finetuned.gpu import first_gpu
from finetuned.live import DoingLine


def make_file(
    file: Path, out: Path, *, base_dir: Path | None, profile: str = "", model: str | None = None
) -> dict[str, Any]:
    """Write `out` with the settings of the base directory, or the defaults where there is none.

    What was broken off goes on from `OUT.answers`. Raises FinetunedError.
    """
    if out.exists() and out.samefile(file):
        raise ConfigError("is the file of the questions itself", where=str(out), remedy="Name another with -o.")
    gpu = first_gpu()
    line = DoingLine()
    try:
        return ask(
            "finetuned.trainer.datagen",
            file,
            terms(file, base_dir=base_dir, profile=profile, model=model),
            gpu=gpu.uuid if gpu else None,
            heard=line.show,
            out=str(out.absolute()),
        )
    finally:
        line.end()
