"""What every page and route reads: the ledger, and the files that say what the daemon is doing. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from finetuned import __version__
from finetuned.errors import HomeError
from finetuned.found import ledger_if_any
from finetuned.guard import daemon_pid, why_paused, why_waiting
from finetuned.home import Home, printable
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.live import sentence
from finetuned.places import Gpu, gpu_states, gpus_at_work
from finetuned.spool.inbox import Complaint, list_inbox
from finetuned.web.records import job_record

_FIRST = 100  # waiting jobs that a page shows
_LAST = 8  # finished ones


def look(home: Home) -> dict[str, Any]:
    """Give what the page Now shows, and where the ledger is damaged, that."""
    try:
        with ledger_if_any(home) as ledger:
            return situation(home, ledger)
    except HomeError as error:
        return {**situation(home, None), "waits": error.sentence()}


def situation(home: Home, ledger: Ledger | None) -> dict[str, Any]:
    """Give what the page Now shows."""
    pid, states = daemon_pid(home), gpu_states(home)
    facts: dict[str, Any] = {
        "version": __version__,
        "base_dir": printable(os.fsencode(home.root)),
        "daemon_pid": pid,
        "paused": why_paused(home),
        "waits": why_waiting(home) if pid else None,
        "inbox": _inbox(home),
        "running": [],
        "queue": [],
        "queued": 0,
        "orders": [],
        "finished": [],
        "gpus": gpus_at_work(states, ledger),
    }
    if ledger is None:
        return facts
    running = ledger.jobs(State.RUNNING, State.TRAINED, State.FAILING)
    running.sort(key=lambda job: job.state is not State.RUNNING)  # one that is being put away comes behind
    facts["running"] = [{**_brief(job, states), "sentence": sentence(job.progress)} for job in running]
    facts["queue"] = [_brief(job, states) for job in ledger.queue(_FIRST)]
    _, facts["queued"] = ledger.page(states=(State.CLAIMING, State.QUEUED), limit=0)
    facts["orders"] = [
        {"verb": verb, "job": job_id or None, "before": before or None} for _, verb, job_id, before in ledger.orders()
    ]
    facts["finished"] = [_brief(job, states) for job in ledger.last_finished(_LAST)]
    return facts


def _brief(job: Job, states: Sequence[Gpu]) -> dict[str, Any]:
    """Give a job without its settings: this is sent to every page, twice a second."""
    return {key: value for key, value in job_record(job, gpus=states).items() if key != "hyperparameters"}


def _inbox(home: Home) -> list[dict[str, str]]:
    """Give what lies in the inbox, the first of it. Folders of profiles are the daemon's business."""
    said = []
    folders = [entry.name for entry in home.inbox.iterdir() if entry.is_dir()] if home.inbox.is_dir() else []
    for entry in list_inbox(home.inbox, folders):
        if isinstance(entry, Complaint):
            said.append({"file": entry.path.name, "what": entry.what, "remedy": entry.remedy})
        else:
            said.append({"file": entry.path.name, "what": "waits until it is whole and quiet", "remedy": ""})
        if len(said) == _FIRST:
            break
    return [{key: text.encode("utf-8", "backslashreplace").decode() for key, text in one.items()} for one in said]
