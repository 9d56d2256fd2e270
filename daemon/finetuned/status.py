"""What `finetuned status` says: the queue, the running job, the last results. Reads the ledger, changes nothing."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuned.checked import is_checked
from finetuned.errors import ConfigError, harmless
from finetuned.found import ledger_if_any
from finetuned.guard import daemon_at_work, why_no_centre, why_paused, why_waiting
from finetuned.home import Home, printable
from finetuned.jobs import Job, Outcome, State
from finetuned.lifesigns import locked
from finetuned.live import duration, sentence
from finetuned.live import why_waiting as why_it_waits
from finetuned.places import Gpu, gpu_states, gpus_at_work, place_of
from finetuned.scheduler import LOCAL
from finetuned.spool.inbox import Complaint, Found, list_inbox

_LAST = 10  # finished jobs
_FIRST = 30  # waiting jobs, for people; machines get all
_SEVERAL = 2  # GPUs that are worth a list
_LONGEST_REASON = 300  # characters


def gather(home: Home) -> dict[str, Any]:
    """Collect everything, as `--json` prints it. Raises HomeError if the ledger is damaged."""
    daemon = daemon_at_work(home)
    facts: dict[str, Any] = {
        "base_dir": str(home.root),
        "daemon_pid": int(daemon.pid) if daemon else None,
        "daemon_host": daemon.host if daemon and daemon.elsewhere else None,
        "config_error": None,
        "paused": why_paused(home),
        "gpus": gpus_at_work(states := gpu_states(home), None),
        "waits": None,
        "web_down": None,
        "orders": [],
        "inbox": [],
        "running": [],
        "queue": [],
        "finished": [],
    }
    if facts["daemon_pid"]:
        facts["waits"], facts["web_down"] = why_waiting(home), why_no_centre(home)
    profiles: Collection[str] = ()
    try:
        profiles = _profiles(home)
    except ConfigError as error:
        facts["config_error"] = error.sentence()
    facts["inbox"] = [_lying(entry) for entry in list_inbox(home.inbox, profiles)]
    with ledger_if_any(home) as ledger:
        if ledger is None:
            return facts
        facts["running"] = [
            {
                **_facts(job),
                "where": place_of(job, states),
                "trainer_alive": locked(home.job(job.id)),
                "with_engine": job.state is State.RUNNING and job.launcher != LOCAL,
            }
            for job in ledger.jobs(State.RUNNING, State.TRAINED, State.FAILING)
        ]
        facts["queue"] = [_facts(job) for job in ledger.queue()]
        facts["orders"] = [{"verb": verb, "job": job_id or None} for _, verb, job_id, _ in ledger.orders()]
        facts["finished"] = [_facts(job) for job in ledger.last_finished(_LAST)]
        facts["gpus"] = gpus_at_work(states, ledger)
    return facts


def _profiles(home: Home) -> Collection[str]:
    """Give the names of the profiles. Raises ConfigError with everything that is wrong in config.json."""
    if is_checked(home):
        return dict(json.loads(home.config_file.read_bytes()).get("profiles", {}))
    from finetuned.config import load_config

    return load_config(home.config_file).profiles


def _lying(entry: Found | Complaint) -> dict[str, str]:
    """Say why something is still in the inbox."""
    if isinstance(entry, Complaint):
        return _said(entry.path, entry.what, entry.remedy)
    for path in filter(None, (entry.path, entry.held_out)):
        if path.is_symlink():
            return _said(path, "is a symbolic link", "Put the file itself there.")
        if path.is_file() and path.stat().st_size == 0:
            return _said(path, "is empty", "Fill it; after empty_seconds its job fails.")
    if entry.held_out:
        both = f"waits until it and {printable(os.fsencode(entry.held_out.name))} are whole and quiet"
        return _said(entry.path, both)
    return _said(entry.path, "waits until it is whole and quiet")


def _said(path: Path, what: str, remedy: str = "") -> dict[str, str]:
    return {"path": printable(os.fsencode(path)), "what": what, "remedy": remedy}


def _facts(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "file": printable(job.name),
        "held_out": printable(job.held_out) if job.held_out else None,
        "profile": job.profile or None,
        "status": job.status,
        "outcome": job.outcome,
        "adapter": job.adapter if job.outcome is Outcome.SUCCEEDED else None,
        "duplicate_of": job.duplicate_of,
        "reason": job.reason,
        "attempt": job.attempt,
        "rung": job.rung,
        "progress": {key: value for key, value in job.progress.items() if key != "error"},
        "priority": job.priority,
        "not_before": job.not_before,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def render(facts: dict[str, Any]) -> str:
    """Give it as text for a terminal."""
    pid = facts["daemon_pid"]
    lines = [
        f"finetuned in {facts['base_dir']}: "
        + (f"running, pid {pid}{_host(facts)}" if pid else "not running; start it with `finetuned run`")
    ]
    lines += [""] if facts["running"] else []
    for job in facts["running"]:
        where = f" {job['where']['words']}".rstrip() if job["where"] else ""
        lines += [f"running   {job['id']}{where}", f"          {sentence(job['progress'])}"]
        if not pid:
            lines.append(f"          {_without_daemon(job)}")
    lines[1:1] = _hindrances(facts)
    if gpus := _gpus(facts):
        lines += ["", *gpus]
    if facts["inbox"]:
        lines += ["", *(f"in inbox  {e['path']} {e['what']}. {e['remedy']}".rstrip() for e in facts["inbox"])]
    if queue := facts["queue"]:
        more = [f"          and {len(queue) - _FIRST:,} more"] if len(queue) > _FIRST else []
        lines += ["", *map(_waiting, queue[:_FIRST]), *more]
    if facts["orders"]:
        asked = (f"{order['verb']} {order['job'] or ''}".strip() for order in facts["orders"])
        lines += ["", f"asked for {', '.join(asked)}"]
    if facts["finished"]:
        lines += ["", *map(_result, facts["finished"])]
    if len(lines) == 1:
        lines += ["", "nothing yet: drop a .jsonl file into inbox/"]
    return harmless("\n".join(lines))


def _host(facts: dict[str, Any]) -> str:
    return f" on {facts['daemon_host']}" if facts["daemon_host"] else ""


def _without_daemon(job: dict[str, Any]) -> str:
    """Say what becomes of a running job while no daemon is there."""
    if job["with_engine"]:
        return f"{job['where']['launcher']} goes on with it without a daemon; the next `finetuned run` finds it again"
    if job["trainer_alive"]:
        return "its trainer is at work without a daemon; `finetuned run` goes on with it"
    return "it stands still; `finetuned run` goes on with it"


def _hindrances(facts: dict[str, Any]) -> list[str]:
    """Say what keeps jobs from starting, or from starting as they should."""
    lines = []
    if facts["config_error"]:
        then = "the last good one is in use" if facts["daemon_pid"] else "the daemon will not start with it"
        lines.append(f"config.json is broken, {then}: {facts['config_error']}")
    if facts["waits"]:
        lines.append(f"waiting: {facts['waits']}; it goes on by itself when that is over")
    if facts["paused"]:
        lines.append(f"paused: {facts['paused']}; `finetuned resume` lets jobs start again")
    if facts["web_down"]:
        lines.append(f"control centre down: {facts['web_down']}")
    if facts["daemon_pid"]:
        remedy = "Jobs use another GPU or wait; see `dmesg`, and start the daemon anew to use this one again."
        lines += [f"GPU set aside: {gpu['why']} {remedy}" for gpu in facts["gpus"] if gpu["state"] == "set_aside"]
    return lines


def _gpus(facts: dict[str, Any]) -> list[str]:
    """Say of each GPU what is done on it, or why nothing is; not of one alone that jobs may use."""
    gpus: list[Gpu] = facts["gpus"]
    if not facts["daemon_pid"] or (len(gpus) < _SEVERAL and all(gpu["state"] == "usable" for gpu in gpus)):
        return []
    words = {"set_aside": "is set aside", "usable": "is free"}
    lines = []
    for gpu in gpus:
        doing = ", ".join(gpu["jobs"])
        is_so = words.get(gpu["state"], gpu["why"])
        lines.append(f"GPU {gpu.get('index', '?')} {gpu.get('name', '')}" + (f": {doing}" if doing else f" {is_so}"))
    return [f"{'gpu' if not n else '':9} {line}" for n, line in enumerate(lines)]


def _waiting(job: dict[str, Any]) -> str:
    """Say that a job waits, and where it has tried already, until when and why."""
    line = f"queued    {job['id']}"
    why = why_it_waits(job["progress"])
    if job["not_before"] > time.time():
        line += f", again at {datetime.fromtimestamp(job['not_before']).astimezone():%H:%M:%S}"
    return f"{line}: {why}" if why else line


def _result(job: dict[str, Any]) -> str:
    at = f"{datetime.fromtimestamp(job['finished_at']).astimezone():%Y-%m-%d %H:%M}"
    if job["outcome"] != Outcome.SUCCEEDED:
        reason = job["reason"] or {}
        what = textwrap.shorten(str(reason.get("what", "")), _LONGEST_REASON, placeholder=" ...")
        where = f"{reason['where']}: " if reason.get("where") else ""
        remedy = f"\n          {reason['remedy']}" if reason.get("remedy") else ""
        return f"{job['outcome']:9} {at}  {job['id']}: {where}{what}{remedy}\n          archive/failed/{job['id']}/"
    if job["duplicate_of"]:
        return f"duplicate {at}  {job['id']}: trained before as {job['duplicate_of']}, adapters/{job['adapter']}"
    took = duration(job["finished_at"] - job["started_at"]) if job["started_at"] else ""
    named = (("held-out loss", "valid_loss"), ("training loss", "train_loss"))
    losses = [f"{name} {job['progress'][key]:.4f}" for name, key in named if job["progress"].get(key) is not None]
    figures = ", ".join(filter(None, (*losses[:1], took)))
    return f"{job['outcome']:9} {at}  {job['id']}: adapters/{job['adapter']} ({figures})"
