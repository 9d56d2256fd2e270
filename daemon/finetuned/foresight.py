"""How much memory a waiting job will need, asked of `finetuned plan` beside the daemon's loop, one job at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from finetuned.asking import Terms, ask
from finetuned.beside import PATIENCE, Beside
from finetuned.config import TrainingSettings, settings_from
from finetuned.errors import FinetunedError
from finetuned.home import Home
from finetuned.jobs import Job
from finetuned.sharding import may_be_sharded
from finetuned.spool.claim import held_out_path, input_path

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
        self._home = home
        self._forecasts: Beside[Forecast] = Beside(wake=wake)

    def knows(self, job: Job, *, gpu: str | None, memory: int | None) -> bool:
        """Whether a job's need is known. If not it is asked, for a GPU of so much memory, after those asked before."""
        return self._forecasts.knows(job, partial(_predict, self._home, job, gpu, memory))

    def of(self, job: Job) -> Forecast | None:
        """Give what a job will need; None where it is not known, or nobody can say."""
        return self._forecasts.of(job)

    def forget(self, *, but: Collection[Job]) -> None:
        """Forget all jobs but these."""
        self._forecasts.forget(but=but)


def _predict(home: Home, job: Job, gpu: str | None, memory: int | None) -> Forecast | None:
    held_out = held_out_path(home, job)
    beside = str(held_out) if held_out else None

    def plan(settings: TrainingSettings) -> dict[str, Any]:
        terms = Terms(settings, home.root, home.models)
        module = "finetuned.trainer.plan"
        return ask(module, input_path(home, job), terms, gpu=gpu, limit=PATIENCE, memory=memory, beside=beside)

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
