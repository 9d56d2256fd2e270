"""From the inbox into the queue: steps D1 to D5 of docs/protocol.md, each a function."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuned.adapters import belongs_to
from finetuned.config import WHERE, Config, TrainingSettings, read_overrides, resolve
from finetuned.durable import NO_ROOM, make_folder, move, sync_file, sync_folder, write_file
from finetuned.errors import ConfigError, DataError
from finetuned.home import Home, JobFolder, data_extension, printable, safe_name
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
    job, beside = _describe(ledger, home, found, config)
    ledger.add(job)  # D1
    try:
        write_spec(home, job, beside)  # D2
        _take(found.path, input_path(home, job))  # D3
    except OSError:
        if os.path.lexists(found.path):  # still in the inbox: as if nothing had been tried
            forget(ledger, home, job)
        raise
    return take_beside(ledger, home, job, found.path.parent, beside)


def forget(ledger: Ledger, home: Home, job: Job) -> None:
    """Undo a claim whose file is still in the inbox. Its folder goes for good before its row: nothing would tell what
    a copy without a row is.
    """
    shutil.rmtree(home.job(job.id).path, ignore_errors=True)
    sync_folder(home.jobs)
    ledger.drop(job.id)


@dataclass(frozen=True)
class Beside:
    """What lies beside a data file as it is taken, so that recovery takes these files and no newer ones."""

    override_inode: int | None = None
    held_out: FileIdentity | None = None


def _describe(ledger: Ledger, home: Home, found: Found, config: Config) -> tuple[Job, Beside]:
    identity = _identity(found.path)
    held_out = _identity(found.held_out) if found.held_out else None
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
        identity=identity,
        state=State.CLAIMING,
        created_at=time.time(),
        held_out=os.fsencode(found.held_out.name) if found.held_out else None,
        reason=reason,
        **columns,
    )
    return job, Beside(override_inode, held_out)


def _identity(path: Path) -> FileIdentity:
    facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.ELOOP, "it was a regular file a moment ago", str(path))
    return FileIdentity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


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


def write_spec(
    home: Home, job: Job, beside: Beside | None = None, *, processes: int = 1, sharded: bool = False
) -> None:
    """Write job.json with the job as it now is (D2, and again before each attempt, which is of so many processes that
    may share the model's layers).
    """
    folder = home.job(job.id)
    make_folder(folder.path)
    held_out = held_out_path(home, job)
    spec = JobSpec(
        id=job.id,
        name=os.fsdecode(job.name),
        profile=job.profile,
        identity=job.identity,
        created_at=job.created_at,
        input=f"input{data_extension(job.name)}",
        settings=job.settings,
        rung=job.rung,
        override_inode=beside.override_inode if beside else None,
        sha256=job.sha256,
        held_out=held_out.name if held_out else None,
        held_out_name=os.fsdecode(job.held_out) if job.held_out else None,
        held_out_identity=beside.held_out if beside else None,
        held_out_sha256=job.held_out_sha256,
        reason=job.reason,
        attempt=job.attempt,
        priority=job.priority,
        place=job.place,
        base_dir=str(home.root),
        models=str(home.models),
        processes=processes,
        sharded=sharded,
    )
    write_file(folder.spec, spec.encode())


def read_spec(folder: JobFolder) -> JobSpec:
    """Read job.json. Raises OSError, ValueError or TypeError if there is no whole one."""
    return JobSpec.decode(folder.spec.read_bytes())


def read_beside(folder: JobFolder) -> Beside:
    """Give what lay beside the data as it was taken, by job.json; nothing where there is no whole one."""
    try:
        spec = read_spec(folder)
    except (OSError, ValueError, TypeError, KeyError):
        return Beside()
    return Beside(spec.override_inode, spec.held_out_identity)


def input_path(home: Home, job: Job) -> Path:
    """Give the place of a claimed job's input."""
    return home.job(job.id).path / f"input{data_extension(job.name)}"


def held_out_path(home: Home, job: Job) -> Path | None:
    """Give the place of a claimed job's held-out file, or None where it has none."""
    return home.job(job.id).held_out(data_extension(job.held_out)) if job.held_out else None


def _take(source: Path, target: Path) -> None:
    """Move a file into the job's folder (D3). One with other hard links is copied: others can still write to it."""
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


def take_beside(ledger: Ledger, home: Home, job: Job, inbox: Path, beside: Beside) -> Job:
    """Put what lay beside the data beside the input (D3), unless it was replaced by something newer.

    A job whose held-out file is not to be had any more carries that as its reason.
    """
    override = Found(inbox / os.fsdecode(job.name), job.profile).override
    if beside.override_inode is not None and override.is_file() and override.lstat().st_ino == beside.override_inode:
        move(override, home.job(job.id).overrides)
    if job.held_out is None:
        return job
    source, place = inbox / os.fsdecode(job.held_out), home.job(job.id).held_out(data_extension(job.held_out))
    why = "was taken away or changed while its data file was taken"
    try:
        if beside.held_out and _is_still(source, beside.held_out):
            _take_once(source, place)
    except OSError as error:  # it is somebody else's in a folder with the sticky bit, say, or cannot be copied
        if error.errno in NO_ROOM:
            raise
        why = f"cannot be taken: {error.strerror}"
    if place.exists() or job.reason:
        return job
    reason = DataError(
        f"the held-out file {why}",
        where=printable(job.held_out),
        remedy=f"Put it into archive/failed/{job.id}/ and `finetuned retry {job.id}`, or drop both files again.",
        code="no_held_out",
    )
    return ledger.update(job.id, reason=reason.as_dict())


def _take_once(source: Path, place: Path) -> None:
    """Move a file into the job's folder; where a crash left it there already, or a whole copy, remove the original."""
    if place.exists():
        source.unlink()
        sync_folder(source.parent)
    else:
        _take(source, place)


def _is_still(path: Path, before: FileIdentity) -> bool:
    """Whether a file is the one that it was. A power loss may have cut it off, or taken back when it was written."""
    try:
        now = _identity(path)
    except OSError:
        return False
    return (now.device, now.inode) == (before.device, before.inode) and now.mtime_ns <= before.mtime_ns


def files_to_hash(home: Home, job: Job) -> list[Path]:
    """Give a claimed job's input, and its held-out file unless the job is to fail anyway."""
    held_out = None if job.reason else held_out_path(home, job)
    return [input_path(home, job), *([held_out] if held_out else [])]


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


def enqueue(ledger: Ledger, home: Home, config: Config, job: Job, *hashes: str) -> Job:
    """Queue a claimed job (D5) with the hashes of `files_to_hash`, or settle it at once if it was trained before."""
    sha256, held_out_sha256 = (*hashes, None)[:2]
    if job.reason:  # its settings are broken, and a crash came between taking it and failing it
        return ledger.update(job.id, state=State.FAILING, sha256=sha256)
    job = settle_duplicate(ledger, home, config, replace(job, sha256=sha256, held_out_sha256=held_out_sha256))
    if job.state is not State.CLAIMING:
        return job
    return ledger.update(job.id, state=State.QUEUED, sha256=sha256, held_out_sha256=held_out_sha256)


def settle_duplicate(ledger: Ledger, home: Home, config: Config, job: Job) -> Job:
    """Settle a hashed job whose content was trained before with the same settings, as `duplicates` says; any other is
    given back as it is. Asked again before it starts: of two that were dropped together the first may have been
    trained.
    """
    hashes = {"sha256": job.sha256, "held_out_sha256": job.held_out_sha256}
    before = None
    if config.duplicates != "run":
        defaults = columns_of(TrainingSettings())["settings"]
        before = ledger.trained_before(
            str(job.sha256), job.settings, held_out_sha256=job.held_out_sha256, defaults=defaults, apart=WHERE
        )
    kept = before and belongs_to(home.adapters / str(before.adapter), before.id)  # it may have been thrown away
    if before is None or not kept:
        return job
    if config.duplicates == "skip":
        return ledger.update(job.id, state=State.TRAINED, **hashes, duplicate_of=before.id, adapter=before.adapter)
    reason = ConfigError(
        f"the same file was trained with the same settings as job {before.id}",
        remedy='Change a setting, or set "duplicates" to "run" in config.json.',
        code="duplicate",
    ).as_dict()
    return ledger.update(job.id, state=State.FAILING, **hashes, reason=reason)


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
        held_out=os.fsencode(spec.held_out_name) if spec.held_out_name else None,
        held_out_sha256=spec.held_out_sha256,
        attempt=spec.attempt,
        priority=spec.priority,
        place=spec.place,
    )
