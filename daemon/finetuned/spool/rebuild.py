"""After the ledger was lost: its rows made again from the folders, for recovery to go on with. Only charts are lost.

Jobs that are not finished have their folder, which is looked for at every start. Finished ones are read from
archive/ and adapters/ when the ledger is new, for there may be very many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from finetuned.adapters import read_story
from finetuned.home import Home, JobFolder
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.spool.claim import read_spec, restore
from finetuned.spool.inbox import is_held_out
from finetuned.spool.publish import OURS, REASON, STORY

_BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError)  # what a file that is no story of a job raises

_log = structlog.get_logger()


def rebuild(ledger: Ledger, home: Home) -> None:
    """Add a row for every job that the folders know and the ledger does not."""
    lost = sorted(path for path in home.jobs.iterdir() if holds_input(path) and not _known(ledger, path.name))
    new = ledger.is_empty()
    adapters = dict(_adapters(home)) if lost or new else {}
    if new:
        finished = _finished(home, adapters)
        for path in lost:
            finished.pop(path.name, None)
        ledger.add_all(sorted(finished.values(), key=lambda job: job.created_at))
        if finished:
            _log.warning("finished jobs rebuilt from archive/ and adapters/", jobs=len(finished))
    for path in lost:
        try:
            job = _unfinished(home, JobFolder(path), adapters)
        except _BROKEN:
            _log.error(
                "job folder without a readable job.json", folder=str(path), remedy="Move its input back into inbox/."
            )
            continue
        if job.id != path.name:
            _log.error("job folder of another job", folder=str(path), remedy="Move its input back into inbox/.")
            continue
        _log.warning("job rebuilt from its folder", job=job.id)
        ledger.add(job)


def holds_input(folder: Path) -> bool:
    """Whether a job's input lies in this folder."""
    return any(folder.glob("input.*"))


def _known(ledger: Ledger, job_id: str) -> bool:
    try:
        ledger.job(job_id)
    except KeyError:
        return False
    return True


def _unfinished(home: Home, folder: JobFolder, adapters: dict[str, tuple[str, dict[str, Any]]]) -> Job:
    """Give the row of a job with a folder, as far on its way as can be told. Raises one of _BROKEN."""
    spec = read_spec(folder)
    job = restore(spec)
    reason = home.failed / spec.id / REASON
    if reason.exists() and spec.id not in adapters:  # or it is left of an earlier end, before a retry
        return replace(job, state=State.FAILING, sha256=spec.sha256, reason=json.loads(reason.read_bytes())["reason"])
    if spec.attempt and spec.sha256:
        adapter = adapters[spec.id][0] if spec.id in adapters else None
        return replace(job, state=State.RUNNING, sha256=spec.sha256, adapter=adapter)
    return job


def _adapters(home: Home) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """Give, for each job that published an adapter, the adapter's name and its finetuned.json."""
    for folder in sorted(home.adapters.iterdir(), reverse=True):  # of copies the first name counts
        if folder.is_dir() and not folder.is_symlink() and (story := read_story(folder)).get("job_id"):
            yield str(story["job_id"]), (folder.name, story)


def _finished(home: Home, adapters: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Job]:
    """Give the rows of all jobs that have ended, by id: from adapters/, and from archive/ where that is not cleared."""
    jobs: dict[str, Job] = {}
    for job_id, (name, story) in adapters.items():
        with suppress(*_BROKEN):
            whole = {**story, "adapter": name, "outcome": Outcome.SUCCEEDED, "attempts": 1}
            jobs[job_id] = _row({"created_at": story["finished_at"], **whole})
    for path in (*home.failed.glob(f"*/{REASON}"), *home.archive.glob(f"[0-9]*/*/{STORY}")):
        try:
            story = json.loads(path.read_bytes())
            metrics = adapters[story["job_id"]][1].get("metrics", {}) if story["job_id"] in adapters else {}
            story |= {"metrics": metrics, "finished_at": path.stat().st_mtime}  # it is written at a job's end
            job = _row(story, path.parent)
            jobs[job.id] = job
        except _BROKEN as error:
            _log.warning("a finished job is not known again", path=str(path), error=str(error))
    return jobs


def _row(story: dict[str, Any], folder: Path | None = None) -> Job:
    """Give the row of a job that has ended, from what was written then. Raises one of _BROKEN."""
    name, identity, held_out = os.fsencode(str(story["file"])), FileIdentity(0, 0, 0, 0), None
    for path in folder.iterdir() if folder else ():
        if "held_out" in story and is_held_out(path.name):
            held_out = os.fsencode(path.name)
        elif path.is_file() and path.name not in OURS:
            plain = path.name.removeprefix("input-")
            name = os.fsencode(plain if plain in OURS else path.name)
            facts = path.stat()
            identity = FileIdentity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return Job(
        id=str(story["job_id"]),
        name=name,
        profile=str(story["profile"]),
        identity=identity,
        state=State.FINISHED,
        created_at=float(story["created_at"]),
        settings={key: value for key, value in story["settings"].items() if key != "priority"},
        rung=dict(story["rung"]),
        outcome=Outcome(story["outcome"]),
        sha256=story["sha256"] and str(story["sha256"]),
        held_out=held_out,
        held_out_sha256=story.get("held_out_sha256") and str(story["held_out_sha256"]),
        attempt=int(story["attempts"]),
        adapter=story["adapter"] and str(story["adapter"]),
        duplicate_of=story.get("duplicate_of") and str(story["duplicate_of"]),
        reason=story.get("reason") and dict(story["reason"]),
        progress=dict(story["metrics"]),
        started_at=story.get("started_at") and float(story["started_at"]),
        finished_at=float(story["finished_at"]),
    )
