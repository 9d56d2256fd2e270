"""A job's figures over its steps, from what its trainers said."""

from __future__ import annotations

import math
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


def gathered(metrics: Iterable[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Points]:
    """Give the named figures over the steps. Of a step that was done again after a resume, the newer figure counts."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for figures in metrics:
        step = figures.get("step")
        if not isinstance(step, int):
            continue
        for name, points in found.items():
            value = figures.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                points[step] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def smoothed(points: Points, span: int) -> Points:
    """Give the mean over the last `span` points at each of them."""
    means, total = [], 0.0
    for place, (step, value) in enumerate(points):
        total += value - (points[place - span][1] if place >= span else 0.0)
        means.append((step, total / min(place + 1, span)))
    return means
