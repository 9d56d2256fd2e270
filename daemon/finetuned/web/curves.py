"""Curves for the browser, thinned so that it draws them at once: of each stretch of steps its lowest and highest value
stay, so no spike is lost.

They are made one at a time and grow as a job does: fifty pages that open together cost what one of them does.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from finetuned.curves import Series, note_all
from finetuned.ledger import Ledger

NAMES = ("train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory")
OF_A_GPU = ("utilization", "memory_used", "power", "temperature", "sm_clock")
OF_RECIPES = ("loss_", "grad_norm_", "reward")  # how the names of a recipe's own figures begin
POINTS = 2000  # of a curve, at most
_OF_GPUS = 500  # for each of five figures of each GPU
_KEPT = 1_500_000  # points of jobs that were looked at lately, 16 bytes each
_THROTTLED = 200  # times at which a GPU was held back, the newest

Curve = dict[str, list[float]]


@dataclass
class _Drawn:
    """What was gathered of one job, and up to where."""

    seen: float = 0  # the number of the newest event, or the time of the newest sample
    of: dict[str, dict[str, Series]] = field(default_factory=dict)  # by GPU; of the job itself under no name
    throttled: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def points(self) -> int:
        return sum(len(one.steps) for series in self.of.values() for one in series.values())


class Curves:
    """The curves of one base directory's jobs. `inode` tells their ledger from one before it."""

    def __init__(self) -> None:
        self._one_at_a_time = Lock()
        self._kept: OrderedDict[tuple[str, str, int], _Drawn] = OrderedDict()

    def of_job(self, ledger: Ledger, job_id: str, *, inode: int, points: int = POINTS) -> dict[str, Curve]:
        """Give each figure over the steps, those that there are."""
        with self._drawn("job", job_id, inode) as drawn:
            series = drawn.of.setdefault("", {name: Series() for name in NAMES})
            for number, figures in ledger.metrics(job_id, after=int(drawn.seen)):
                drawn.seen = number
                series |= {name: Series() for name in figures.keys() - series.keys() if name.startswith(OF_RECIPES)}
                note_all(series, figures)
            return {name: thin(one, points=points, whole=True) for name, one in series.items() if one.steps}

    def of_gpus(self, ledger: Ledger, job_id: str, *, inode: int) -> dict[str, dict[str, Any]]:
        """Give what each GPU did while a job ran, over the time, by its UUID."""
        with self._drawn("gpus", job_id, inode) as drawn:
            for sample in ledger.gpu_samples(job_id, after=drawn.seen):
                uuid, drawn.seen = sample["uuid"], sample["created_at"]
                for name, series in drawn.of.setdefault(uuid, {name: Series() for name in OF_A_GPU}).items():
                    if sample.get(name) is not None:
                        series.note(drawn.seen, sample[name])
                if why := sample.get("throttle_reasons"):
                    drawn.throttled[uuid] = [*drawn.throttled[uuid], {"at": drawn.seen, "why": why}][-_THROTTLED:]
            return {
                uuid: {
                    **{name: thin(one, points=_OF_GPUS) for name, one in series.items()},
                    "throttled": drawn.throttled[uuid],
                }
                for uuid, series in drawn.of.items()
            }

    @contextmanager
    def _drawn(self, kind: str, job_id: str, inode: int) -> Iterator[_Drawn]:
        with self._one_at_a_time:
            drawn = self._kept.pop((kind, job_id, inode), None) or _Drawn()
            yield drawn
            self._kept[kind, job_id, inode] = drawn  # the newest; of one that broke off nothing is kept
            while len(self._kept) > 1 and sum(one.points() for one in self._kept.values()) > _KEPT:
                self._kept.popitem(last=False)


def thin(series: Series, *, points: int = POINTS, whole: bool = False) -> Curve:
    """Give at most about so many of the points, first and last among them, as two lists; with `whole` the steps are
    whole numbers.
    """
    count, values = len(series.steps), series.values
    kept: list[int] = list(range(count))
    if count > points:
        stretch = math.ceil(count / max(1, points // 2 - 1))
        kept = [0]
        for begin in range(1, count - 1, stretch):
            part = values[begin : min(begin + stretch, count - 1)]
            kept += sorted({begin + part.index(min(part)), begin + part.index(max(part))})
        kept.append(count - 1)
    steps = [series.steps[place] for place in kept]
    return {"step": [int(step) for step in steps] if whole else steps, "value": [values[place] for place in kept]}
