"""A job's attempts: what the daemon notes when one begins and ends, and the time line that comes of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetuned.events import Ending, Event, EventType
from finetuned.jobs import Job

TOLD = (EventType.ATTEMPT, EventType.RUNG)  # the events of which a time line is made


def began(job: Job, *, at: float, on: str = "") -> Event:
    """Note that the attempt begins whose number the job has now; `on` says where."""
    data = {"attempt": job.attempt, "rung": job.rung, "settings": job.settings}
    return Event(at, EventType.ATTEMPT, f"attempt {job.attempt} begins{f' {on}' if on else ''}", data=data)


def ended(job: Job, ending: Ending, *, at: float, how: str, then: str = "") -> Event:
    """Note that it is over: what that means, how its process ended, and what follows where that is not plain."""
    quiet = ending in {Ending.SUCCEEDED, Ending.INTERRUPTED}
    words = f"attempt {job.attempt} ends: {ending.replace('_', ' ')}, {how}"
    data = {"attempt": job.attempt, "ending": ending, "how": how, "then": then, "step": job.progress.get("step")}
    return Event(at, EventType.ATTEMPT, f"{words}; {then}" if then else words, "info" if quiet else "warning", data)


def timeline(events: Iterable[Event], job: Job) -> list[dict[str, Any]]:
    """Give a row for each attempt, and behind it one for each rung that it climbed down, oldest first.

    `outcome` is None of what goes on; `why` says how a row came to its rung, `changed` which settings are others than
    in the attempt before, as pairs. Jobs of earlier versions have only the rungs.
    """
    rows: list[dict[str, Any]] = []
    attempt: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    then = ""
    for event in events:
        data = event.data
        row = {
            "at": event.created_at,
            "attempt": None,
            "what": event.message,
            "outcome": None,
            "step": data.get("step"),
        }
        row |= {"rung": data.get("rung"), "why": "", "changed": {}}
        if event.type is EventType.RUNG:
            rows.append({**row, "attempt": attempt and attempt["attempt"], "outcome": "fallback", "why": event.message})
        elif "ending" not in data:
            if attempt is not None and attempt["outcome"] is None:
                attempt["outcome"] = "broke off"
            now = data.get("settings", {})
            changed = _changed(settings, now) if settings is not None else {}
            attempt, settings = {**row, "attempt": data["attempt"], "why": then, "changed": changed}, now
            rows.append(attempt)
        elif attempt is not None and attempt["attempt"] == data["attempt"]:
            then = data["then"]
            attempt |= {"outcome": data["ending"], "step": data["step"], "ended_at": event.created_at}
            attempt["then"] = f"{data['how']}; {then}" if then else data["how"]
    if attempt is not None and attempt["outcome"] is None and job.outcome is not None:
        attempt["outcome"] = str(job.outcome)  # the daemon went down meanwhile
    return rows


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    names = sorted(before.keys() | now.keys())
    return {name: [before.get(name), now.get(name)] for name in names if before.get(name) != now.get(name)}
