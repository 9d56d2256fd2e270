"""From the inbox into the queue: steps D1 to D5 of docs/protocol.md, each a function."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from finetuned.adapters import belongs_to
from finetuned.config import Config, TrainingSettings, read_overrides, resolve
from finetuned.durable import make_folder, move, sync_file, sync_folder, write_file
from finetuned.errors import ConfigError
from finetuned.home import Home, JobFolder, data_extension, safe_name
from finetuned.jobs import FileIdentity, Job, JobSpec, State
from finetuned.ledger import Ledger
from finetuned.spool.inbox import Found
from finetuned.spool.settle import has_writer

_BLOCK = 256 * 2**10


def claim(ledger: Ledger, home: Home, found: Found, config: Config) -> Job:
    """Take a ready file out of the inbox (D1 to D3). The job is left in state claiming.

    Settings that cannot be used do not stop the claim: the job carries the reason and is failed by the caller.
    Raises OSError if the file went away or the disk is full; recovery and the next look put that right.
    """
    job, override_inode = _describe(ledger, home, found, config)
    ledger.add(job)  # D1
    try:
        write_spec(home, job, override_inode=override_inode)  # D2
        _take(home, job, found.path)  # D3
    except OSError:
        if os.path.lexists(found.path):  # still in the inbox: as if nothing had been tried
            forget(ledger, home, job)
        raise
    take_override(home.job(job.id), found.override, override_inode)
    return job


def forget(ledger: Ledger, home: Home, job: Job) -> None:
    """Undo a claim whose file is still in the inbox. Its folder goes for good before its row: nothing would tell what
    a copy without a row is.
    """
    shutil.rmtree(home.job(job.id).path, ignore_errors=True)
    sync_folder(home.jobs)
    ledger.drop(job.id)


def _describe(ledger: Ledger, home: Home, found: Found, config: Config) -> tuple[Job, int | None]:
    facts = found.path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.ELOOP, "it was a regular file a moment ago", str(found.path))
    columns: dict[str, Any] = {}
    reason = override_inode = None
    try:
        if os.path.lexists(found.override):
            override_inode = _regular(found.override).st_ino
        columns = columns_of(settings_beside(home, config, found.profile, found.override))
    except ConfigError as error:
        reason = error.as_dict()
        if override_inode is not None:
            kept = "It lies beside this reason as overrides.json; drop settings and data again."
            reason["remedy"] = f"{reason['remedy']} {kept}".strip()
    job = Job(
        id=_new_id(ledger, safe_name(found.name)),
        name=found.name,
        profile=found.profile,
        identity=FileIdentity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns),
        state=State.CLAIMING,
        created_at=time.time(),
        reason=reason,
        **columns,
    )
    return job, override_inode


def columns_of(training: TrainingSettings) -> dict[str, Any]:
    """Give what a job's row holds of its settings. The priority is apart: it makes no other training."""
    settings = training.model_dump()
    return {"priority": settings.pop("priority"), "settings": settings, "rung": training.first_rung().as_dict()}


def _new_id(ledger: Ledger, stem: str) -> str:
    """Give an id that no job has, of those that the ledger has known for years."""
    while True:
        job_id = f"{stem}-{secrets.token_hex(3)}"
        try:
            ledger.job(job_id)
        except KeyError:
            return job_id


def settings_beside(home: Home, config: Config, profile: str, override: Path) -> TrainingSettings:
    """Give the settings of a file with this profile and, if it is there, this override. Raises ConfigError."""
    overrides = read_overrides(override) if os.path.lexists(override) else {}
    return settings_for(home, config, profile, overrides, where=str(override if overrides else home.config_file))


def settings_for(
    home: Home, config: Config, profile: str, overrides: dict[str, Any], *, where: str
) -> TrainingSettings:
    """Give the settings of a file with this profile and override. Raises ConfigError if they cannot be used."""
    if "model" in overrides and _is_there(home, str(overrides["model"])):
        raise ConfigError("an override may not name a folder as its model", where=where)
    return resolve(config, profile, overrides, where=where)


def _is_there(home: Home, model: str) -> bool:
    """Whether a model's name is also that of a folder, seen from the base directory or from where the daemon runs."""
    try:
        return any(place.exists() for place in (home.root / model, Path(model)))
    except (OSError, ValueError):  # a name that no file can have
        return False


def _regular(path: Path) -> os.stat_result:
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError("is not a regular file", where=str(path), remedy="Put the file itself there.")
    return facts


def write_spec(home: Home, job: Job, *, override_inode: int | None = None) -> None:
    """Write job.json with the job as it now is (D2, and again before each attempt)."""
    folder = home.job(job.id)
    make_folder(folder.path)
    spec = JobSpec(
        id=job.id,
        name=os.fsdecode(job.name),
        profile=job.profile,
        identity=job.identity,
        created_at=job.created_at,
        input=f"input{data_extension(job.name)}",
        settings=job.settings,
        rung=job.rung,
        override_inode=override_inode,
        sha256=job.sha256,
        reason=job.reason,
        attempt=job.attempt,
        priority=job.priority,
        place=job.place,
        base_dir=str(home.root),
        models=str(home.models),
    )
    write_file(folder.spec, spec.encode())


def read_spec(folder: JobFolder) -> JobSpec:
    """Read job.json. Raises OSError, ValueError or TypeError if there is no whole one."""
    return JobSpec.decode(folder.spec.read_bytes())


def input_path(home: Home, job: Job) -> Path:
    """Give the place of a claimed job's input."""
    return home.job(job.id).path / f"input{data_extension(job.name)}"


def _take(home: Home, job: Job, source: Path) -> None:
    """Move the file into the job's folder (D3). One with other hard links is copied: others can still write to it."""
    target = input_path(home, job)
    if source.lstat().st_nlink == 1:
        move(source, target)
        return
    partial = target.with_name("copy.partial")
    shutil.copyfile(source, partial, follow_symlinks=False)
    shutil.copystat(source, partial, follow_symlinks=False)
    sync_file(partial)
    move(partial, target)
    source.unlink()
    sync_folder(source.parent)


def take_override(folder: JobFolder, override: Path, inode: int | None) -> None:
    """Put the spent override beside the input, unless it has been replaced by a newer one."""
    if inode is not None and override.is_file() and override.lstat().st_ino == inode:
        move(override, folder.overrides)


def fingerprint(path: Path) -> tuple[FileIdentity, str] | None:
    """Make a claimed file durable and hash it (D4): its identity and sha256, or None while somebody still writes to
    it.

    A rename does not stop a writer that has the file open, so it is looked at before and after. Takes as long as
    reading the file does: call it beside the loop.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as file:  # noqa: PTH123, a descriptor
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # put there between the look and the claim
            raise OSError(errno.ELOOP, "is not a regular file", str(path))
        if has_writer(file.fileno()):
            return None
        before = os.fstat(file.fileno())
        os.fsync(file.fileno())  # uploaders do not
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or has_writer(file.fileno()):
            return None
    return FileIdentity(after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns), digest.hexdigest()


def enqueue(ledger: Ledger, home: Home, config: Config, job: Job, sha256: str) -> Job:
    """Queue a claimed and hashed job (D5), or settle it at once if it was trained before."""
    if job.reason:  # its settings are broken, and a crash came between taking it and failing it
        return ledger.update(job.id, state=State.FAILING, sha256=sha256)
    job = settle_duplicate(ledger, home, config, job, sha256)
    return ledger.update(job.id, state=State.QUEUED, sha256=sha256) if job.state is State.CLAIMING else job


def settle_duplicate(ledger: Ledger, home: Home, config: Config, job: Job, sha256: str) -> Job:
    """Settle a job whose content was trained before with the same settings, as `duplicates` says; any other is given
    back as it is. Asked again before it starts: of two that were dropped together the first may have been trained.
    """
    before = None if config.duplicates == "run" else ledger.trained_before(sha256, job.settings)
    kept = before and belongs_to(home.adapters / str(before.adapter), before.id)  # it may have been thrown away
    if before is None or not kept:
        return job
    if config.duplicates == "skip":
        return ledger.update(job.id, state=State.TRAINED, sha256=sha256, duplicate_of=before.id, adapter=before.adapter)
    reason = ConfigError(
        f"the same file was trained with the same settings as job {before.id}",
        remedy='Change a setting, or set "duplicates" to "run" in config.json.',
        code="duplicate",
    ).as_dict()
    return ledger.update(job.id, state=State.FAILING, sha256=sha256, reason=reason)


def restore(spec: JobSpec) -> Job:
    """Make a job's row again from its job.json, for when the ledger was lost."""
    return Job(
        id=spec.id,
        name=os.fsencode(spec.name),
        profile=spec.profile,
        identity=spec.identity,
        state=State.CLAIMING,
        created_at=spec.created_at,
        settings=spec.settings,
        rung=spec.rung,
        reason=spec.reason,
        sha256=spec.sha256,
        attempt=spec.attempt,
        priority=spec.priority,
        place=spec.place,
    )
