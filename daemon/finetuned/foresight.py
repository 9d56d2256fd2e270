"""How much memory a waiting job will need, asked of `finetuned plan` beside the daemon's loop, one job at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import structlog

from finetuned.asking import Terms, ask
from finetuned.config import TrainingSettings, settings_from
from finetuned.errors import FinetunedError
from finetuned.home import Home
from finetuned.jobs import Job
from finetuned.sharding import may_be_sharded
from finetuned.spool.claim import held_out_path, input_path

_PATIENCE = 600.0  # seconds for an answer

_log = structlog.get_logger()


@dataclass(frozen=True)
class Forecast:
    """What a job will need."""

    peak: int  # bytes on one GPU
    spread: int = 1  # over how many GPUs its model must be spread for it to fit; 1: it fits on one


class Foresight:
    """Remembers what was predicted of each job as long as it waits or runs."""

    def __init__(self, home: Home, *, wake: Callable[[], None]) -> None:
        """Begin with nothing asked; `wake` is called, from a thread, when an answer has come."""
        self._home, self._wake = home, wake
        self._answers: dict[str, Forecast | None] = {}
        self._thread: threading.Thread | None = None
        self._until = 0.0

    def knows(self, job: Job, *, gpu: str | None, memory: int | None) -> bool:
        """Whether a job's need is known. If not it is asked, for a GPU of so much memory, after those asked before."""
        if job.id in self._answers:
            return True
        if self._thread is not None and self._thread.is_alive() and time.monotonic() > self._until:
            self._answers[self._thread.name] = None  # it hangs
            self._thread = None
        if self._thread is None or not self._thread.is_alive():
            self._until = time.monotonic() + _PATIENCE
            # A daemon's thread that nobody waits for: the process that it asks ends by itself.
            self._thread = threading.Thread(target=self._ask, args=(job, gpu, memory), name=job.id, daemon=True)
            self._thread.start()
        return False

    def of(self, job_id: str) -> Forecast | None:
        """Give what a job will need; None where it is not known, or nobody can say."""
        return self._answers.get(job_id)

    def forget(self, *, but: Collection[str]) -> None:
        """Forget all jobs but these."""
        self._answers = {job_id: answer for job_id, answer in self._answers.copy().items() if job_id in but}

    def _ask(self, job: Job, gpu: str | None, memory: int | None) -> None:
        answer = None
        try:
            answer = _predict(self._home, job, gpu, memory)
        finally:
            self._answers[job.id] = answer
            self._wake()


def _predict(home: Home, job: Job, gpu: str | None, memory: int | None) -> Forecast | None:
    held_out = held_out_path(home, job)
    beside = str(held_out) if held_out else None

    def plan(settings: TrainingSettings) -> dict[str, Any]:
        terms = Terms(settings, home.root, home.models)
        module = "finetuned.trainer.plan"
        return ask(module, input_path(home, job), terms, gpu=gpu, memory=memory, beside=beside)

    try:
        settings = settings_from({**job.settings}, where=job.id)
        facts = plan(settings)
        spread = 1
        if memory and not facts["fits"] and may_be_sharded(settings.recipe, settings.tuning):
            if settings.tuning != "full":  # 4-bit weights cannot be spread
                facts = plan(settings.model_copy(update={"tuning": "lora", "fallback_4bit": False}))
            spread = int(facts["spread_over"])
    except (FinetunedError, OSError) as error:  # the trainer will say it with all that belongs to it
        _log.warning("not predicted", job=job.id, error=str(error), then="it gets a GPU of its own")
        return None
    needed = int(facts["peak_bytes"])
    _log.info("predicted", job=job.id, gib=round(needed / 2**30, 2), rung=facts["rung_name"], gpus=spread)
    return Forecast(needed, spread)
