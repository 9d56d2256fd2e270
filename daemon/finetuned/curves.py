"""A job's figures over its steps, from what its trainers said."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetuned.events import Event, EventType

Points = list[tuple[int, float]]  # step and figure, by steps


@dataclass(frozen=True)
class Curves:
    """Losses in nats a token. A step that was done again is there once, as it was done last."""

    train_loss: Points
    valid_loss: Points
    learning_rate: Points

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.train_loss or self.valid_loss)


def curves_of(events: Iterable[Event]) -> Curves:
    """Gather the curves of one job."""
    metrics = (event.data for event in events if event.type is EventType.METRICS)
    return Curves(**gathered(metrics, ("train_loss", "valid_loss", "learning_rate")))


class Series:
    """Steps and figures, in 16 bytes each: of a hundred thousand steps, too. Of a step noted twice the newer counts."""

    def __init__(self) -> None:
        self.steps: array[float] = array("d")
        self.values: array[float] = array("d")

    def note(self, step: float, value: float) -> None:
        """Add one; mostly it is the last."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            return
        place = bisect_left(self.steps, step)
        if self.steps[place] == step:
            self.values[place] = value
        else:
            self.steps.insert(place, step)
            self.values.insert(place, value)


def note_all(series: Mapping[str, Series], figures: Mapping[str, Any]) -> None:
    """Add the named ones of a step's figures."""
    step = figures.get("step")
    if isinstance(step, int):
        for name, one in series.items():
            value = figures.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                one.note(step, value)


def gathered(metrics: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Points]:
    """Give the named figures over the steps. Of a step that was done again after a resume, the newer figure counts."""
    found = {name: Series() for name in names}
    for figures in metrics:
        note_all(found, figures)
    return {name: [(int(s), v) for s, v in zip(one.steps, one.values, strict=True)] for name, one in found.items()}


def smoothed(points: Points, span: int) -> Points:
    """Give the mean over the last `span` points at each of them."""
    means, total = [], 0.0
    for place, (step, value) in enumerate(points):
        total += value - (points[place - span][1] if place >= span else 0.0)
        means.append((step, total / min(place + 1, span)))
    return means
