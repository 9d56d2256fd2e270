"""From a trained job to its place: steps D8 to D13 of docs/protocol.md, and the failure steps, each a function.

Every function may be called again after a crash in its middle.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuned.adapters import LEARNED, MANIFEST, belongs_to
from finetuned.durable import make_folder, move, sync_tree, write_file
from finetuned.errors import FinetunedError
from finetuned.home import Home, printable, safe_name
from finetuned.jobs import Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.spool.claim import held_out_path, input_path

STORY, REASON = "job.json", "reason.json"  # beside an input in archive/, and in archive/failed/
OURS = frozenset({STORY, REASON, LEARNED, "overrides.json", "checkpoints", "adapter"})  # names there
CANCELLED = "cancelled"  # code of the reason of a job that a user did not want any longer
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_LOG_LINES, _LOG_BYTES = 200, 256 * 1024  # of a bug, kept in reason.json
_LONGEST_HEADER = 100 * 2**20  # bytes, as safetensors itself bounds it


class BadOutputError(FinetunedError):
    """The trainer said that it succeeded, but what it left is not an adapter."""

    code = "bad_output"


def check_output(folder: Path) -> None:
    """Look at what a trainer left (D8). Raises BadOutputError."""
    remedy = "This is a bug in finetuned; the job's log says more."
    if not (folder / MANIFEST).is_file():
        raise BadOutputError(f"there is no {MANIFEST}", where=str(folder), remedy=remedy)
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise BadOutputError("there are no weights", where=str(folder), remedy=remedy)
    for path in folder.glob("*.safetensors"):
        if not _whole_safetensors(path):
            raise BadOutputError("is not a whole safetensors file", where=str(path), remedy=remedy)


def _whole_safetensors(path: Path) -> bool:
    """Whether the header is JSON and the file as long as the header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _LONGEST_HEADER:
            return False
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
        return path.stat().st_size == 8 + length + end


def choose_name(ledger: Ledger, home: Home, job: Job) -> Job:
    """Settle the adapter's name before anything is moved: the file's stem, or the job's id where that is taken."""
    if published(home, job):
        return job
    stem = safe_name(job.name)
    taken = stem == "latest" or os.path.lexists(home.adapters / stem)
    return ledger.update(job.id, adapter=job.id if taken else stem)


def published(home: Home, job: Job) -> bool:
    """Whether this job's adapter is in adapters/ already."""
    return bool(job.adapter) and belongs_to(home.adapters / str(job.adapter), job.id)


def publish(ledger: Ledger, home: Home, job: Job) -> Job:
    """Check, make durable and publish the adapter by one rename (D8 to D10). Raises BadOutputError or OSError."""
    job = choose_name(ledger, home, job)
    target = home.adapters / str(job.adapter)
    if not published(home, job):
        staged = home.job(job.id).staged_adapter(job.attempt)
        check_output(staged)
        sync_tree(staged)
        move(staged, target)  # D9: this is publication
    point_latest(home, target.name)
    return ledger.update(job.id, state=State.TRAINED)  # D10


def point_latest(home: Home, adapter: str) -> None:
    """Let adapters/latest name the newest adapter. A convenience: it is not part of the promise."""
    temporary = home.adapters / ".latest.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(adapter, target_is_directory=True)
        temporary.replace(home.adapters / "latest")
    except OSError:  # something of the user's has that name, or the disk is full
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def archive_folder(home: Home, job: Job) -> Path:
    """Give archive/YYYY-MM/ID, by the month in which the job was made, so that a repetition finds the same place."""
    month = datetime.fromtimestamp(job.created_at).astimezone().strftime("%Y-%m")
    return home.archive / month / job.id


def archive(ledger: Ledger, home: Home, job: Job) -> Job:
    """Put the input away and finish the job (D11, D12)."""
    folder = archive_folder(home, job)
    make_folder(folder)
    write_file(folder / STORY, _story(job, Outcome.SUCCEEDED))
    learned = home.adapters / str(job.adapter) / LEARNED
    if learned.is_file() and not (folder / LEARNED).exists():
        write_file(folder / LEARNED, learned.read_bytes())
    _put_away(home, job, folder)
    return _finish(ledger, home, job, Outcome.SUCCEEDED)


def fail(ledger: Ledger, home: Home, job: Job, reason: dict[str, str] | None = None) -> Job:
    """Record why a job failed or was cancelled, put its input into archive/failed/ with the reason, and finish it."""
    if job.state is not State.FAILING:
        job = ledger.update(job.id, state=State.FAILING, reason=reason or job.reason)
    folder = home.failed / job.id
    make_folder(folder)
    outcome = Outcome.CANCELLED if (job.reason or {}).get("code") == CANCELLED else Outcome.FAILED
    write_file(folder / REASON, _story(job, outcome, log=home.job_log(job.id)))
    checkpoints = home.job(job.id).checkpoints
    if checkpoints.is_dir() and not (folder / checkpoints.name).exists():
        move(checkpoints, folder / checkpoints.name)  # hours of work may be in them
    adapter = home.job(job.id).staged_adapter(job.attempt)
    if belongs_to(adapter, job.id):  # trained, but it could not be published
        kept = folder / adapter.name
        if kept.exists():  # of before it was tried again
            move(kept, folder / f"{kept.name}.before-{job.attempt}")
        move(adapter, kept)
    _put_away(home, job, folder)
    return _finish(ledger, home, job, outcome)


def _finish(ledger: Ledger, home: Home, job: Job, outcome: Outcome) -> Job:
    job = ledger.update(job.id, state=State.FINISHED, outcome=outcome, finished_at=time.time(), trainer_pid=None)
    sweep(home, job)
    return job


def _put_away(home: Home, job: Job, folder: Path) -> None:
    overrides = home.job(job.id).overrides
    if overrides.exists():
        move(overrides, folder / overrides.name)
    for source, name in users_files(home, job):
        if source.exists():
            move(source, folder / name)


def users_files(home: Home, job: Job) -> list[tuple[Path, str]]:
    """Give the place in the job's folder and the name in the archive of the held-out file, if any, and of the input.

    The input is the last to leave a folder and the first to come back: where it is, a lost ledger finds the job.
    """
    name = os.fsdecode(job.name)
    files = [(input_path(home, job), f"input-{name}" if name in OURS else name)]
    if held_out := held_out_path(home, job):
        files.insert(0, (held_out, os.fsdecode(job.held_out or b"")))  # none of ours ends so, nor does an input
    return files


def _story(job: Job, outcome: Outcome, *, log: Path | None = None) -> bytes:
    story = {
        "job_id": job.id,
        "file": printable(job.name),
        "outcome": outcome,
        **({"reason": job.reason} if job.reason else {}),
        **({"duplicate_of": job.duplicate_of} if job.duplicate_of else {}),
        "adapter": job.adapter if outcome is Outcome.SUCCEEDED else None,
        "profile": job.profile,
        "sha256": job.sha256,
        **_told_of_held_out(job),
        "attempts": job.attempt,
        "rung": job.rung,
        "settings": job.settings,
        "created_at": job.created_at,
        "started_at": job.started_at,
        **({"log": _last_lines(log)} if log and job.reason and job.reason["code"] == "bug" else {}),
    }
    return json.dumps(story, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _told_of_held_out(job: Job) -> dict[str, str | None]:
    if job.held_out is None:
        return {}
    return {"held_out": printable(job.held_out), "held_out_sha256": job.held_out_sha256}


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []


def sweep(home: Home, job: Job) -> None:
    """Remove what a finished job leaves (D13). Best effort: recovery repeats it."""
    shutil.rmtree(home.job(job.id).path, ignore_errors=True)
