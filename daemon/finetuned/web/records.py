"""What the API says of jobs and events, in the shape of OpenAI's fine-tuning API where it has one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetuned.errors import FinetunedError
from finetuned.events import Event
from finetuned.home import printable
from finetuned.jobs import Job, Outcome, State
from finetuned.live import why_waiting
from finetuned.places import Gpu, place_of

_STATUS = {
    State.CLAIMING: "validating_files",
    State.QUEUED: "queued",
    State.RUNNING: "running",
    State.TRAINED: "running",
    State.FAILING: "running",
}
# What a list of jobs may be filtered by.
STATUSES: dict[str, tuple[tuple[State, ...], tuple[Outcome, ...]]] = {
    "validating_files": ((State.CLAIMING,), ()),
    "queued": ((State.QUEUED,), ()),
    "running": ((State.RUNNING, State.TRAINED, State.FAILING), ()),
    "succeeded": ((State.FINISHED,), (Outcome.SUCCEEDED,)),
    "failed": ((State.FINISHED,), (Outcome.FAILED,)),
    "cancelled": ((State.FINISHED,), (Outcome.CANCELLED,)),
}


def job_record(job: Job, *, now: float | None = None, gpus: Sequence[Gpu] = ()) -> dict[str, Any]:
    """Give a job: OpenAI's fields first, then ours. With `now` it says when it will be done; `gpus` are those that it
    may have run on.
    """
    succeeded = job.outcome is Outcome.SUCCEEDED
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": job.settings.get("model"),
        "created_at": _whole(job.created_at),
        "finished_at": _whole(job.finished_at),
        "fine_tuned_model": job.adapter if succeeded else None,
        "organization_id": "local",
        "result_files": [f"adapters/{job.adapter}"] if succeeded and job.adapter else [],
        "status": status(job),
        "training_file": printable(job.name),
        "validation_file": printable(job.held_out) if job.held_out else None,
        "hyperparameters": {**job.settings, "n_epochs": job.settings.get("epochs")},
        "trained_tokens": None,
        "error": _error(job),
        "seed": job.settings.get("seed"),
        "estimated_finish": _estimate(job, now),
        "metadata": None,
        # ours
        "started_at": job.started_at,
        "seconds": job.finished_at - job.started_at if job.started_at and job.finished_at else None,
        "profile": job.profile or None,
        "priority": job.priority,
        "attempt": job.attempt,
        "retries": job.retries,
        "interruptions": job.interruptions,
        "not_before": job.not_before,
        "where": place_of(job, gpus),
        "why_waiting": (job.state is State.QUEUED and why_waiting(job.progress)) or None,
        "rung": job.rung,
        "progress": {key: value for key, value in job.progress.items() if key != "error"},
        "duplicate_of": job.duplicate_of,
        "reason": job.reason,
        "bytes": job.identity.size,
    }


def status(job: Job) -> str:
    """Say where a job is or how it ended, in one of OpenAI's words."""
    return str(job.outcome or _STATUS.get(job.state, "failed"))


def _error(job: Job) -> dict[str, Any] | None:
    if not job.reason or job.outcome is Outcome.SUCCEEDED:
        return None
    return {
        "code": job.reason.get("code"),
        "message": FinetunedError(job.reason.get("what") or "", remedy=job.reason.get("remedy") or "").sentence(),
        "param": job.reason.get("where") or None,
    }


def _estimate(job: Job, now: float | None) -> int | None:
    left = job.progress.get("seconds_left")
    return _whole(now + left) if job.state is State.RUNNING and now is not None and left is not None else None


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def event_record(number: int, event: Event) -> dict[str, Any]:
    """Give one thing that a job's trainer said."""
    return {
        "object": "fine_tuning.job.event",
        "id": f"ftevent-{number}",
        "created_at": event.created_at,
        "level": event.level,
        "type": event.type,
        "message": event.message,
        "data": dict(event.data),
    }
