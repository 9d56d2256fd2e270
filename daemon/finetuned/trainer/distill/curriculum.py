"""A weight or a temperature over the steps of a training. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def value(course: float | Sequence[float], step: int, total: int) -> float:
    """Give its value at a step, from 0, of so many: a number stays, a list is run through evenly from first to last."""
    if not isinstance(course, Sequence):
        return course
    place = (len(course) - 1) * step / max(1, total - 1)
    before = min(int(place), len(course) - 2)
    share = place - before
    return course[before] * (1 - share) + course[before + 1] * share


def highest(course: float | Sequence[float]) -> float:
    """Give its highest value: 0 is never switched on."""
    return max(course) if isinstance(course, Sequence) else course
