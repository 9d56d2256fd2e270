"""A job's data: the training file and what is held out, read, judged and told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuned.config import TrainingSettings
from finetuned.dataset.formats import TEXT
from finetuned.dataset.report import Report, judge
from finetuned.dataset.rows import Row
from finetuned.errors import ConfigError, DataError, counted
from finetuned.events import EventType
from finetuned.findings import ERRORS
from finetuned.home import JobFolder, printable
from finetuned.jobs import JobSpec
from finetuned.trainer.door import Door, rows_known_by, split, tell_overlap
from finetuned.trainer.ends import StopAskedError
from finetuned.trainer.reach import Reach, tell_beyond
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
class Source:
    """Where rows come from."""

    file: Path
    name: str
    sha256: str | None = None


def read_data(
    folder: JobFolder,
    spec: JobSpec,
    settings: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reaches: Sequence[Reach],
    say: Reporter,
    asked_to_stop: Callable[[], bool],
) -> Data:
    """Read, judge and tell a job's data. Raises DataError, ConfigError, OSError or StopAskedError."""
    door = Door(tokenizer, settings, cache=Path(spec.models).parent / "tokens")
    progress = _Progress(say, asked_to_stop)
    beside = None
    if spec.held_out:
        name = printable(os.fsencode(spec.held_out_name or spec.held_out))
        beside = Source(folder.path / spec.held_out, name, spec.held_out_sha256)
    sides = read_sides(
        Source(folder.path / spec.input, spec.name, spec.sha256),
        held_out_file(settings, base_dir=Path(spec.base_dir), beside=beside),
        settings,
        read=lambda source: door.read(
            source.file, name=source.name, sha256=source.sha256, progress=progress.of(source.name)
        ),
        reaches=reaches,
    )
    facts = _tell(say, sides)
    if door.system_prompt != settings.system_prompt and sides.report.format != TEXT.name:
        say.warn("system_prompt is not added: the model's chat template takes no system message")
    sides.judge(settings)
    return Data(sides.train, sides.held_out, sides.asked(door, settings), facts, door.system_prompt)


def held_out_file(settings: TrainingSettings, *, base_dir: Path, beside: Source | None) -> Source | None:
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
    return Source(path, path.name)


@dataclass(frozen=True)
class Sides:
    """What is trained and what is held out, and what was found in both."""

    own: Source
    train: Examples
    report: Report
    source: Source | None = None  # of held-out rows: a file of their own, or the training file
    held_out: Examples | None = None
    held_out_report: Report | None = None  # of a file of their own

    def facts(self) -> dict[str, Any]:
        """Give the report as it is stored."""
        facts = self.report.as_dict()
        if self.held_out is not None and self.source is not None:
            rows, tokens = len(self.held_out.rows()), sum(self.held_out.lengths)
            facts["held_out"] = {"file": self.source.name, "rows": rows, "tokens": tokens, "errors": {}, "warnings": {}}
            if self.held_out_report is not None:
                found = self.held_out_report.as_dict()
                facts["held_out"] |= {kind: found[kind] for kind in ("errors", "warnings")}
        return facts

    def summary(self) -> str:
        """Give it in one line."""
        held_out = f"; held out: {counted(len(self.held_out.rows()), 'row')}" if self.held_out is not None else ""
        return f"{self.report.summary()}{held_out}"

    def warning_sentences(self) -> list[str]:
        """Give a line for each kind of warning, in either file."""
        own = self.report.warning_sentences()
        if self.held_out_report is None or self.source is None:
            return own
        return own + [f"{self.source.name}: {one}" for one in self.held_out_report.warning_sentences()]

    def judge(self, settings: TrainingSettings) -> None:
        """Raise DataError or ConfigError where they will not do. A figure over some held-out rows would mislead, so all
        of them must be good.
        """
        judge(self.report, name=self.own.name, max_bad_rows=settings.max_bad_rows, fail_on=settings.fail_on)
        if self.held_out_report is not None and self.source is not None:
            judge(self.held_out_report, name=self.source.name, max_bad_rows=0.0, held_out=True)
        check_sides(self.train, self.held_out, settings, name=self.own.name)

    def asked(self, door: Door, settings: TrainingSettings) -> list[Row]:
        """Give the held-out rows whose questions are put to the model, always the same."""
        if self.held_out is None or self.source is None:
            return []
        first = self.held_out.column(IDENTITY)[: settings.predictions.samples].tolist()
        return rows_known_by(first, self.source.file, name=self.source.name, system_prompt=door.system_prompt)


def read_sides(
    own: Source,
    source: Source | None,
    settings: TrainingSettings,
    *,
    read: Callable[[Source], tuple[Examples, Report]],
    reaches: Sequence[Reach],
) -> Sides:
    """Read the training file, and hold rows back: those of `source`, or a share of its own. Nothing is judged yet, but
    that the models can read them. Raises DataError.
    """
    train, report = read(own)
    sides = Sides(own, train, report)
    if source is not None:
        held_out, found = read(source)
        sides = Sides(own, train, report, source, held_out, found)
    elif settings.eval_fraction:
        train, held_out = split(train, settings.eval_fraction)
        sides = Sides(own, train, report, own, held_out)
    if sides.held_out is not None:
        tell_overlap(train, sides.held_out, report)
    tell_beyond(reaches, train, sides.held_out, report, name=own.name)
    return sides


def _tell(say: Reporter, sides: Sides) -> dict[str, Any]:
    """Say what was found, and give it as it is stored."""
    facts = sides.facts()
    say.say(EventType.DATA_REPORT, f"data: {sides.summary()}", **facts)
    for sentence in sides.report.sentences():
        say.warn(f"left out: {sentence}")
    for sentence in sides.warning_sentences():
        say.warn(sentence)
    return facts


def check_sides(train: Examples, held_out: Examples | None, settings: TrainingSettings, *, name: str) -> None:
    """Raise DataError or ConfigError where nothing is left to train, or nothing to measure by."""
    if not len(train):
        held = f"all rows are held back by eval_fraction {settings.eval_fraction:g}" if held_out else ""
        raise DataError(
            held or "no row is left to train on",
            where=name,
            remedy="Lower it, or add rows." if held else ERRORS["no_supervised_tokens"].remedy,
            code="no_rows",
        )
    if held_out is not None and not len(held_out):
        raise DataError(
            f"eval_fraction {settings.eval_fraction:g} holds none of {counted(len(train), 'row')} back"
            if settings.eval_fraction
            else "no held-out row has a token to learn within max_length",
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


def cut(data: Data, settings: TrainingSettings, most: int, *, name: str, say: Reporter) -> Data:
    """Cut rows to what a rung of the memory ladder lets them be, and tell what that costs. Raises DataError."""
    if most >= settings.max_length:
        return data
    train = data.train.cut_to(most)
    held_out = data.held_out.cut_to(most) if data.held_out is not None else None
    check_sides(train, held_out, settings, name=name)
    rows, tokens = len(data.train) - len(train), sum(data.train.lengths) - sum(train.lengths)
    say.warn(f"max_length is {most} on this rung: {tokens:,} tokens are cut off, and {rows:,} rows lose their answers")
    return replace(data, train=train, held_out=held_out)


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
