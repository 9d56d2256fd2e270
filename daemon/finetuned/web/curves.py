"""A job's curves, thinned so that a browser draws them at once: of each stretch of steps its lowest and highest
value stay, so no spike is lost. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from finetuned.curves import Points, gathered

NAMES = ("train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory")
OF_RECIPES = ("loss_", "grad_norm_")  # how the names of a recipe's own figures begin
POINTS = 2000  # of a curve, at most


def curves(metrics: Iterable[dict[str, Any]], *, points: int = POINTS) -> dict[str, dict[str, list[float]]]:
    """Give each figure over the steps, those that there are."""
    told = list(metrics)
    own = sorted({name for figures in told for name in figures if name.startswith(OF_RECIPES)})
    return {name: thin(series, points=points) for name, series in gathered(told, (*NAMES, *own)).items() if series}


def thin(pairs: Points, *, points: int = POINTS) -> dict[str, list[float]]:
    """Give at most about so many of the pairs, first and last among them, as two lists."""
    if len(pairs) > points:
        stretch = math.ceil(len(pairs) / max(1, points // 2 - 1))
        kept = [pairs[0]]
        for begin in range(1, len(pairs) - 1, stretch):
            part = range(begin, min(begin + stretch, len(pairs) - 1))
            ends = {min(part, key=lambda n: pairs[n][1]), max(part, key=lambda n: pairs[n][1])}
            kept += [pairs[n] for n in sorted(ends)]
        pairs = [*kept, pairs[-1]]
    return {"step": [step for step, _ in pairs], "value": [value for _, value in pairs]}
