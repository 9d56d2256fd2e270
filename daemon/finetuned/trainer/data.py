"""A job's data: the training file and what is held out, read, judged and told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuned.config import TrainingSettings
from finetuned.dataset.report import Report, judge
from finetuned.dataset.rows import Row
from finetuned.errors import ConfigError, DataError
from finetuned.events import EventType
from finetuned.findings import ERRORS
from finetuned.home import JobFolder, printable
from finetuned.jobs import JobSpec
from finetuned.trainer.door import Door, rows_known_by, split, tell_overlap
from finetuned.trainer.ends import StopAskedError
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.store import IDENTITY, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOLD_SECONDS = 2.0  # at most so often it is said how far the reading is


@dataclass(frozen=True)
class Data:
    """What a training learns from, and what it is measured by."""

    train: Examples
    held_out: Examples | None
    asked: list[Row]  # held-out rows whose questions are put to the model while it learns
    report: dict[str, Any]
    system_prompt: str | None  # as it was used


@dataclass(frozen=True)
class HeldOut:
    """Where held-out rows come from."""

    file: Path
    name: str
    sha256: str | None = None


def read_data(
    folder: JobFolder,
    spec: JobSpec,
    settings: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    say: Reporter,
    asked_to_stop: Callable[[], bool],
) -> Data:
    """Read, judge and tell a job's data. Raises DataError, ConfigError, OSError or StopAskedError."""
    door = Door(tokenizer, settings, cache=Path(spec.models).parent / "tokens")
    if door.system_prompt != settings.system_prompt:
        say.warn("system_prompt is not added: the model's chat template takes no system message")
    progress = _Progress(say, asked_to_stop)
    path = folder.path / spec.input
    train, report = door.read(path, name=spec.name, sha256=spec.sha256, progress=progress.of(spec.name))
    beside = None
    if spec.held_out:
        name = printable(os.fsencode(spec.held_out_name or spec.held_out))
        beside = HeldOut(folder.path / spec.held_out, name, spec.held_out_sha256)
    train, held_out, source = hold_back(
        train,
        settings,
        own=HeldOut(path, spec.name),
        source=held_out_file(settings, base_dir=Path(spec.base_dir), beside=beside),
        read=lambda source: door.read(
            source.file, name=source.name, sha256=source.sha256, progress=progress.of(source.name)
        ),
    )
    facts = tell(say, train, held_out, report, source)
    judge(report, name=spec.name, max_bad_rows=settings.max_bad_rows, fail_on=settings.fail_on)
    check_sides(train, held_out, settings, name=spec.name)
    asked: list[Row] = []
    if held_out is not None and source is not None:
        first = held_out.column(IDENTITY)[: settings.predictions.samples].tolist()
        asked = rows_known_by(first, source.file, name=source.name, system_prompt=door.system_prompt)
    return Data(train, held_out, asked, facts, door.system_prompt)


def held_out_file(settings: TrainingSettings, *, base_dir: Path, beside: HeldOut | None) -> HeldOut | None:
    """Give the held-out file: the one that came with the data, else the configured one. Raises ConfigError."""
    if beside is not None:
        return beside
    if settings.eval_file is None:
        return None
    path = base_dir / Path(settings.eval_file).expanduser()
    if not path.is_file():
        raise ConfigError(
            "there is no such file",
            where=f"eval_file {path}",
            remedy="Mend the path in config.json, or set it to null.",
        )
    return HeldOut(path, path.name)


def hold_back(
    train: Examples,
    settings: TrainingSettings,
    *,
    own: HeldOut,
    source: HeldOut | None,
    read: Callable[[HeldOut], tuple[Examples, Report]],
) -> tuple[Examples, Examples | None, HeldOut | None]:
    """Give what is trained, what is held out, and where that comes from: `source`, or a share of the file's own rows.

    Raises DataError if a row of `source` is bad: a figure over some of the rows would mislead.
    """
    if source is not None:
        held_out, found = read(source)
        judge(found, name=source.name, max_bad_rows=0.0)
        return train, held_out, source
    if settings.eval_fraction:
        return *split(train, settings.eval_fraction), own
    return train, None, None


def facts_of(train: Examples, held_out: Examples | None, report: Report, source: HeldOut | None) -> dict[str, Any]:
    """Give the report as it is stored, once it is known which rows are held out."""
    if held_out is not None:
        tell_overlap(train, held_out, report)
    facts = report.as_dict()
    if held_out is not None and source is not None:
        facts["held_out"] = {"file": source.name, "rows": len(held_out), "tokens": sum(held_out.lengths)}
    return facts


def tell(
    say: Reporter, train: Examples, held_out: Examples | None, report: Report, source: HeldOut | None
) -> dict[str, Any]:
    """Say what was found, and give it as it is stored."""
    facts = facts_of(train, held_out, report, source)
    say.say(EventType.DATA_REPORT, f"data: {report.summary()}", **facts)
    for sentence in report.sentences():
        say.warn(f"left out: {sentence}")
    for sentence in report.warning_sentences():
        say.warn(sentence)
    return facts


def check_sides(train: Examples, held_out: Examples | None, settings: TrainingSettings, *, name: str) -> None:
    """Raise DataError or ConfigError where nothing is left to train, or nothing to measure by."""
    if not len(train):
        raise DataError(
            "no row is left to train on", where=name, remedy=ERRORS["no_supervised_tokens"].remedy, code="no_rows"
        )
    if held_out is not None and not len(held_out):
        raise DataError(
            f"eval_fraction {settings.eval_fraction:g} holds none of {len(train):,} rows back",
            where=name,
            remedy="Raise it, or give a held-out file.",
            code="no_rows",
        )
    if held_out is None and settings.publish == "best":
        raise ConfigError(
            "publish best needs held-out rows, and there are none",
            where=name,
            remedy="Drop x.eval.jsonl beside x.jsonl, or set eval_file or eval_fraction.",
        )


class _Progress:
    """Says how far the reading is, and hears when somebody wants it to stop."""

    def __init__(self, say: Reporter, asked_to_stop: Callable[[], bool]) -> None:
        self._say, self._asked_to_stop = say, asked_to_stop
        self._told = 0.0

    def of(self, name: str) -> Callable[[float, int], None]:
        """Begin with a file."""
        self._say.phase("validating_files", f"reading {name}")
        self._told = time.monotonic()

        def told(share: float, rows: int) -> None:
            if self._asked_to_stop():
                raise StopAskedError
            if time.monotonic() - self._told >= _TOLD_SECONDS:
                self._told = time.monotonic()
                self._say.phase("validating_files", f"reading {name}: {share:.0%}, {rows:,} rows")

        return told
