"""Rows longer than a model was made to read, or its teacher: told before any weights are. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from finetuned.config import TrainingSettings
from finetuned.dataset.report import Fault, Report
from finetuned.errors import DataError, counted
from finetuned.trainer import store
from finetuned.trainer.base import Base, hub_options, loading

if TYPE_CHECKING:
    from finetuned.trainer.distill.found import Found
    from finetuned.trainer.store import Examples

_TRIED = 256  # rows that are put into a teacher's own tokens: the longest in the student's


@dataclass(frozen=True)
class Reach:
    """How many tokens of a row a model was made to read."""

    who: str
    most: int
    to_the_last: bool  # it fails on one more: it has learned each place by itself
    lengths: Callable[[Examples], NDArray[np.int64]]  # of rows in its own tokens


def reaches(settings: TrainingSettings, base: Base, teacher: Found | None) -> list[Reach]:
    """Give those of the model and of its teacher, where they are known. Raises ModelError."""
    found = [_reach("the model", base, settings, lambda rows: rows.column(store.LENGTH) + settings.soft_prompt)]
    if teacher is not None:
        found.append(_reach("the teacher", teacher.base, teacher.settings, lambda rows: _read_by(teacher, rows)))
    return [one for one in found if one is not None]


def tell_beyond(
    known: Sequence[Reach], train: Examples, held_out: Examples | None, report: Report, *, name: str
) -> None:
    """Warn of rows that are too long, in the report. Raises DataError where a model fails on them."""
    for reach in known:
        for rows in filter(None, (train, held_out)):
            lengths = reach.lengths(rows)
            beyond = lengths > reach.most
            if not beyond.any():
                continue
            what = f"the longest has {lengths.max():,} tokens, and {reach.who} was made for {reach.most:,}"
            if reach.to_the_last:
                raise DataError(
                    f"{counted(int(beyond.sum()), 'row')} cannot be read: {what}",
                    where=name,
                    remedy=f"Set max_length to {reach.most} or less, or take another model for longer rows.",
                    code="beyond_reach",
                )
            if rows is train:
                lines = rows.column(store.LINE)[beyond][:3].tolist()
                report.warnings["beyond_reach"] = Fault(int(beyond.sum()), lines, what)


# Models with a table of places, which is at its end there; others go on, as far as sense goes.
_TABLES = frozenset({"biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "opt"})


def _reach(
    who: str, base: Base, settings: TrainingSettings, lengths: Callable[[Examples], NDArray[np.int64]]
) -> Reach | None:
    with loading(base):
        config = AutoConfig.from_pretrained(base.source, **hub_options(settings)).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if most and rope.get("rope_type") in {"yarn", "linear"}:  # whose cards leave the old length beside the factor
        most = max(most, round(rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or most)))
    fatal = config.model_type in _TABLES
    return Reach(f"{who} {base.name}", most, fatal, lengths) if most and most > 0 else None


def _read_by(teacher: Found, rows: Examples) -> NDArray[np.int64]:
    """Give the lengths in a teacher's tokens; those of all but the longest rows in the student's, which are shorter."""
    lengths = rows.column(store.LENGTH).copy()
    if teacher.same_vocabulary:
        return lengths
    mine, theirs = teacher.student.backend_tokenizer, teacher.tokenizer.backend_tokenizer
    for place in np.argsort(-lengths)[:_TRIED].tolist():
        lengths[place] = len(theirs.encode(mine.decode(rows[place].ids, skip_special_tokens=False)).ids)
    return lengths
