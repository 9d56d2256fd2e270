"""What a recipe needs of a row, beside what every row has to be; else a night of making answers is for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from finetuned.config import TrainingSettings
from finetuned.dataset.rows import Problem, Row
from finetuned.findings import Warned
from finetuned.judges import judge

if TYPE_CHECKING:
    from finetuned.dataset.report import Report

CHECKED = frozenset({"rft", "hybrid"})  # recipes that hold answers against the row's own


def of(settings: TrainingSettings) -> str:
    """Name what is needed: settings with the same name find the same rows good, and say the same of them."""
    return f"{settings.recipe} {settings.judge.model_dump_json()}" if settings.recipe in CHECKED else ""


def beside_the_point(settings: TrainingSettings) -> tuple[Warned, ...]:
    """Name the warnings that say nothing here: rft holds answers against the rows' own, and does not learn those."""
    return ("bare_number_answers", "single_token_answers") if settings.recipe == "rft" else ()


def suited(rows: Iterable[Row], settings: TrainingSettings, report: Report) -> Iterator[Row]:
    """Leave out rows that lack something, and report them."""
    for row in rows:
        problem = unmet(row, settings) if settings.recipe in CHECKED else None
        if problem is None:
            yield row
        else:
            report.add(row.line, [problem])


def unmet(row: Row, settings: TrainingSettings) -> Problem | None:
    """Say what the row lacks for the recipe, or nothing."""
    if len(row.messages) < 2 or row.messages[-1].role != "assistant":
        return Problem("answer_not_checkable", "the row does not end with an answer to a question")
    if not row.messages[-1].content.strip():
        return Problem("answer_not_checkable", "its answer is empty")
    chosen = settings.judge
    if chosen.kind == "auto":
        return None
    reader = judge(chosen.kind, tolerance=chosen.tolerance, pattern=chosen.pattern, choices=chosen.choices)
    if not reader.can_judge(row.messages[-1].content):
        return Problem("answer_not_checkable", f"judge {chosen.kind} cannot read its answer")
    return None
