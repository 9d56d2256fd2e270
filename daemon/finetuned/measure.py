"""`finetuned eval`: ask a process that has torch to measure an adapter and its base model, and print what it found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from finetuned.asking import Terms, ask, find_adapter
from finetuned.config import Config, load_config, settings_from
from finetuned.errors import ConfigError, HomeError, harmless
from finetuned.gpu import first_gpu
from finetuned.home import Home, find_home, models_folder
from finetuned.live import DoingLine
from finetuned.scores import sentences, table

_KIND_OF = {"tolerance": "number", "pattern": "regex", "choices": "choice"}  # which each option belongs to


def measure(
    adapter: Path | None,
    *,
    data: Path,
    base_dir: Path | None,
    model: str | None,
    against: Path | None,
    judge: Mapping[str, Any],
    max_new_tokens: int | None,
    trained_on: Sequence[Path],
) -> dict[str, Any]:
    """Measure an adapter beside its base model: the newest one if none is named. A model that is named without an
    adapter is measured alone. Raises FinetunedError.
    """
    home = _home(base_dir)
    alone = model is not None and adapter is None
    if alone and against:
        raise ConfigError(
            "--against needs an adapter beside it", where="the command line", remedy="Name ADAPTER first."
        )
    folders = [] if alone else [find_adapter(adapter, home)]
    folders += [find_adapter(against, home)] if against else []
    config = load_config(home.config_file) if home else Config()
    changes = {"judge": {**config.judge.model_dump(), **judge}, **({"model": model} if alone else {})}
    settings = settings_from({**config.training().model_dump(), **changes}, where="the command line")
    models = home.models if home else models_folder()
    models.mkdir(parents=True, exist_ok=True)
    gpu = first_gpu()
    line = DoingLine()
    try:
        return ask(
            "finetuned.trainer.eval",
            data,
            Terms(settings, home.root if home else Path.cwd(), models),
            gpu=gpu.uuid if gpu else None,
            heard=line.show,
            adapters=_named(folders),
            model=None if alone else model,
            judge=dict(judge),
            max_new_tokens=max_new_tokens,
            archive=str(home.archive) if home else None,
            trained_on=[str(path.expanduser().absolute()) for path in trained_on],
        )
    finally:
        line.end()


def judge_named(kind: str | None, **options: Any) -> dict[str, Any]:
    """Give the judge's settings that a command line names. An option that one kind alone knows names that kind.

    Raises ConfigError where they are of another kind than is asked for: they would count for nothing.
    """
    named = {name: value for name, value in options.items() if value is not None}
    for name in named:
        kind = kind or _KIND_OF[name]
        if kind != _KIND_OF[name]:
            raise ConfigError(
                f"--{name} is for judge {_KIND_OF[name]}, and the judge is {kind}",
                where="the command line",
                remedy=f"Say --judge {_KIND_OF[name]}, or leave --{name} out.",
            )
    return named | ({"kind": kind} if kind else {})


def _home(base_dir: Path | None) -> Home | None:
    try:
        return find_home(base_dir)
    except HomeError:
        if base_dir or os.environ.get("FINETUNED_HOME"):
            raise
        return None


def _named(folders: Sequence[Path]) -> dict[str, str]:
    """Name each folder, by its whole path where a name would stand for two."""
    names = [folder.name for folder in folders]
    return {folder.name if names.count(folder.name) == 1 else str(folder): str(folder) for folder in folders}


def render(facts: dict[str, Any]) -> str:
    """Give it for people."""
    data, kind = facts["data"], facts["judge"]
    counts = f"{data['rows']} rows, {data['questions']} questions"
    lines = [harmless(f"{data['file']}: {counts}, judged by {kind['kind']} ({kind['reason']})"), ""]
    cells = table(facts)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for number, line in enumerate(cells):
        text = "  ".join(f"{harmless(cell):<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        lines.append(click.style(text, bold=True) if number == 0 else text)
    return "\n".join(
        [*lines, "", *map(harmless, sentences(facts)), "In brackets: where the true figure lies, with 95% confidence."]
    )
