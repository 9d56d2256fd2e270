"""What earlier trainings of this machine needed, beside what was predicted for them. Kept next to the models, newest
last.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetuned.config import TrainingSettings
from finetuned.durable import write_file

_KEPT, _NEWEST = 100, 5  # records kept, and asked


@dataclass(frozen=True)
class Record:
    """One training that came to its end."""

    model: str
    method: str  # full, lora, lora-8bit or qlora
    device: str
    predicted: int  # bytes, uncorrected
    peak: int  # bytes, measured
    tokens_per_second: float
    recipe: str = "sft"  # as `kind_of` names it


def file_beside(models: Path) -> Path:
    """Name the file."""
    return models.parent / "trainings.json"


def kind_of(settings: TrainingSettings) -> str:
    """Name the recipe, with its teacher: trainings of another are no measure."""
    return settings.recipe + (f" from {settings.teacher}" if settings.recipe == "distill" else "")


def read(file: Path) -> list[Record]:
    """Give what there is; what cannot be read is left out, as it can only make a prediction worse."""
    try:
        entries = json.loads(file.read_bytes())
        return [Record(**entry) for entry in entries]
    except (OSError, ValueError, TypeError):
        return []


def remember(file: Path, record: Record) -> None:
    """Add a training."""
    records = [*read(file), record][-_KEPT:]
    write_file(file, json.dumps([asdict(one) for one in records], indent=1).encode() + b"\n")


def correction(records: Sequence[Record], *, model: str, method: str, device: str, recipe: str) -> tuple[float, str]:
    """Give what to multiply a prediction with, and why: the median of measured over predicted."""
    near, what = _near(records, model=model, method=method, device=device, recipe=recipe)
    ratios = [one.peak / one.predicted for one in near if one.predicted > 0 and one.peak > 0]
    return (statistics.median(ratios), what) if ratios else (1.0, "no earlier job of a minute or more on this device")


def speed(records: Sequence[Record], *, model: str, method: str, device: str, recipe: str) -> float | None:
    """Give tokens a second of earlier trainings of the same model, method and recipe here."""
    alike = _alike(records, model=model, method=method, device=device, recipe=recipe)
    speeds = [one.tokens_per_second for one in alike if one.tokens_per_second > 0]
    return statistics.median(speeds) if speeds else None


def peak(records: Sequence[Record], *, model: str, method: str, device: str, recipe: str) -> tuple[int, int]:
    """Give the most memory in bytes that earlier trainings of the same model and method took here, and how many
    these are.
    """
    alike = _alike(records, model=model, method=method, device=device, recipe=recipe)
    return max((one.peak for one in alike), default=0), len(alike)


def _alike(records: Sequence[Record], *, model: str, method: str, device: str, recipe: str) -> list[Record]:
    wanted = (model, method, device, recipe)
    return [one for one in records if (one.model, one.method, one.device, one.recipe) == wanted][-_NEWEST:]


def _near(records: Sequence[Record], **wanted: Any) -> tuple[list[Record], str]:
    here = [one for one in records if (one.device, one.recipe) == (wanted["device"], wanted["recipe"])]
    alike = _alike(here, **wanted)
    if alike:
        return alike, f"earlier jobs of this model and method: {len(alike)}"
    return here[-_NEWEST:], f"earlier jobs of other models or methods: {len(here[-_NEWEST:])}"
