"""`report_to`: figures of a training for trackers that people have, through accelerate. A thread of its own tells them,
so that one that is slow, or cannot reach its server, holds nothing up; one that fails is left out with a warning.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetuned.events import EventType
from finetuned.trainer.reporter import Reporter

_PROJECT = "finetuned"
_RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}
_LAST_WAIT = 30.0  # seconds for what is on its way at the end

_Figures = tuple[int, dict[str, float]]  # step, and what was measured there


@contextmanager
def reporting(
    say: Reporter, names: Sequence[str], *, job: str, settings: Mapping[str, Any], folder: Path, cpu: bool
) -> Iterator[None]:
    """Report what `say` says to these trackers for a while. `folder` is for those that write files."""
    if not names:
        yield
        return
    trackers = _Trackers(say, names, job=job, settings=settings, folder=folder, cpu=cpu)
    say.hear(trackers.hear)
    try:
        yield
    finally:
        say.hear(None)
        trackers.finish()


class _Trackers:
    def __init__(
        self, say: Reporter, names: Sequence[str], *, job: str, settings: Mapping[str, Any], folder: Path, cpu: bool
    ) -> None:
        self._say, self._names, self._job, self._folder = say, names, job, folder
        self._settings = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
        self._news: queue.SimpleQueue[_Figures | None] = queue.SimpleQueue()
        from accelerate.state import PartialState

        PartialState(cpu=cpu)  # trackers ask it, and it must be as the training's
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def hear(self, kind: EventType, data: Mapping[str, Any]) -> None:
        """Note the figures of an event; they are told by and by."""
        figures = figures_of(kind, data)
        if figures:
            self._news.put((int(data["step"]), figures))

    def finish(self) -> None:
        """Wait a while for what is on its way."""
        self._news.put(None)
        self._thread.join(_LAST_WAIT)
        if self._thread.is_alive():
            self._say.warn(f"report_to: not all was reported within {_LAST_WAIT:g} s")

    def _work(self) -> None:
        trackers = {
            name: tracker for name in self._names if (tracker := self._try(name, lambda n=name: self._start(n)))
        }
        while (news := self._news.get()) is not None:
            step, figures = news
            for name, tracker in list(trackers.items()):
                if not self._try(name, lambda t=tracker: (t.log(figures, step=step), True)):  # noqa: B023, called at once
                    del trackers[name]
        for name, tracker in trackers.items():
            self._try(name, tracker.finish)

    def _start(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        run = _RUN_NAMES.get(name)
        title, more = (_PROJECT, {run: self._job}) if run else (self._job, {})
        if kind.requires_logging_directory or name == "mlflow":
            folder = self._folder / name
            folder.mkdir(parents=True, exist_ok=True)
            more["logging_dir"] = str(folder)
        tracker = kind(title, **more)
        tracker.start()
        tracker.store_init_configuration(self._settings)
        return tracker

    def _try(self, name: str, work: Any) -> Any:
        """Do something with a tracker; a warning and nothing where it fails."""
        try:
            return work()
        except ImportError as error:
            self._say.warn(f"report_to {name}: not installed ({error}); the training goes on without it")
        except BaseException as error:  # noqa: BLE001, a tracker may raise anything, SystemExit too
            why = str(error).strip().split("\n")[0] or type(error).__name__
            self._say.warn(f"report_to {name}: {why}; the training goes on without it")
        return None


def figures_of(kind: EventType, data: Mapping[str, Any]) -> dict[str, float]:
    """Give the numbers of an event that belong to a step."""
    if kind is EventType.METRICS and "step" in data:
        numbers = {name: value for name, value in data.items() if name not in {"step", "total_steps"}}
    elif kind is EventType.PREDICTIONS and data["samples"]:
        samples = data["samples"]
        numbers = {
            f"predictions_{name}": sum(float(sample[name]) for sample in samples) / len(samples)
            for name in ("exact", "similarity")
        }
    else:
        return {}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float) and math.isfinite(value)}
