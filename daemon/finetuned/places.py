"""Where jobs run: the GPUs of this machine as the daemon sees them, and the jobs at work on each. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from finetuned.home import Home
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.scheduler import CPU, LOCAL

_WAITING = (State.CLAIMING, State.QUEUED)

Gpu = dict[str, Any]


def gpu_states(home: Home) -> list[Gpu]:
    """Read how the daemon sees each GPU: uuid, index, name, state and, where no job is started on it, why.

    States are usable, busy (others use it), left_alone (by `gpus` or CUDA_VISIBLE_DEVICES), set_aside (it failed).
    """
    try:
        return [dict(one) for one in json.loads(home.gpus.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def gpus_at_work(states: Iterable[Gpu], ledger: Ledger | None) -> list[Gpu]:
    """Give each GPU with its state, the ids of the jobs at work on it, and the newest sample that a running job has of
    it; while none runs, of the job that ran last.
    """
    known = {one["uuid"]: {**one, "jobs": []} for one in states}
    if ledger is None:
        return list(known.values())
    running = {job.id: _on(job) for job in ledger.jobs(State.RUNNING)}
    newest: dict[str, Gpu] = {}
    for job_id, devices in running.items() or ((ledger.last_sampled() or "", []),):
        samples = ledger.newest_gpu_samples(job_id)
        if {*known, *(sample["uuid"] for sample in samples)} & {*devices}:  # else nobody can tell which it is on
            samples = [sample for sample in samples if sample["uuid"] in devices]
        for sample in samples:
            uuid = sample["uuid"]
            known.setdefault(uuid, {"uuid": uuid, "state": "usable", "why": "", "jobs": []})
            if sample["created_at"] >= newest.get(uuid, sample)["created_at"]:
                newest[uuid] = sample
        on = {*devices, *(sample["uuid"] for sample in samples)} if job_id in running else {}
        for uuid in on:
            if uuid in known:
                known[uuid]["jobs"].append(job_id)
    every = [{**newest.get(uuid, {}), **one} for uuid, one in known.items()]
    return sorted(every, key=lambda one: one.get("index") or 0)


def place_of(job: Job, gpus: Sequence[Gpu]) -> dict[str, Any] | None:
    """Say where a job runs, or ran last: in words, and shortly. None for one that waits."""
    if not job.attempt or job.state in _WAITING:
        return None
    launcher, devices = job.launcher, _on(job)
    numbers = {gpu["uuid"]: gpu for gpu in gpus}
    if launcher != LOCAL:
        short = f"{launcher} {job.trainer_id}".strip()
        words = f"with {launcher}" + (f" as {job.trainer_id}" if job.trainer_id else "")
    elif devices == [CPU]:
        short, words = "processor", "on the processor"
    else:
        named = [str(numbers[one]["index"]) if one in numbers else one for one in devices]
        short = f"GPU{'s' if len(named) > 1 else ''} {', '.join(named)}" if named else ""
        model = f" {numbers[devices[0]]['name']}" if len(devices) == 1 and devices[0] in numbers else ""
        words = f"on {short}{model}" if short else ""
    processes = int(job.progress.get("processes") or 1)
    if processes > 1 and (launcher != LOCAL or processes != len(devices)):
        words = f"{words}, {processes} processes"
    return {
        "launcher": launcher,
        "id": job.trainer_id or None,
        "devices": devices,
        "processes": processes,
        "words": words,
        "short": short,
    }


def _on(job: Job) -> list[str]:
    """Give the devices that a job was started on: UUIDs, what CUDA_VISIBLE_DEVICES names else, or the processor."""
    return list(job.progress.get("devices") or filter(None, str(job.progress.get("gpu", "")).split(",")))
