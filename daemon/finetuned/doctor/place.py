"""The checks of the base directory, and of what the kernel lets the daemon do there."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from finetuned.config import load_config
from finetuned.doctor.finding import Finding, Verdict, failed
from finetuned.errors import FinetunedError
from finetuned.guard import check_one_mount, daemon_at_work
from finetuned.home import Home

_GIB = 2**30
_LEAST_FREE = 1 * _GIB  # below it no checkpoint fits
_ENOUGH_FREE = 10 * _GIB
_WATCHES = 8192
_INSTANCES = 128


def check_config(home: Home) -> Finding:
    """Whether config.json can be used, and only its owner and group can change it."""
    try:
        config = load_config(home.config_file)
    except FinetunedError as error:
        return failed("config", error)
    if home.config_file.stat().st_mode & 0o002:
        return Finding(
            "config",
            Verdict.WARN,
            "everybody may change config.json, and with it whose code is run",
            f"`chmod o-w {home.config_file}`.",
        )
    return Finding(
        "config", Verdict.OK, f"model {config.model}, tuning {config.tuning}, {len(config.profiles)} profiles"
    )


def check_folders(home: Home) -> Finding:
    """Whether this user may work in every folder. Those that are missing are made when the daemon starts."""
    wanted = (home.root, home.machinery, home.archive, *home.folders)
    there = [folder for folder in wanted if folder.exists()]
    barred = [folder for folder in there if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)]
    if barred:
        names = ", ".join(str(folder) for folder in barred)
        return Finding(
            "folders",
            Verdict.FAIL,
            f"user {os.geteuid()} may not write to {names}",
            f"`chown -R {os.geteuid()} {home.root}`, or run doctor as the daemon's user; a read-only disk says so too.",
        )
    said = f"user {os.geteuid()} may write to all of {home.root}"
    if there != list(wanted):
        said += "; folders that are missing are made when the daemon starts"
    return Finding("folders", Verdict.OK, said)


def check_one_mount_holds(home: Home) -> Finding:
    """Whether a file can be renamed all the way from inbox to archive."""
    if not all(folder.is_dir() for folder in home.folders) or check_folders(home).verdict is Verdict.FAIL:
        return Finding(
            "one mount", Verdict.OK, "not tried: the folders are not ready, the daemon tries it at its start"
        )
    try:
        check_one_mount(home)
    except FinetunedError as error:
        return failed("one mount", error)
    return Finding("one mount", Verdict.OK, "a file can be renamed from inbox/ to archive/")


def check_disk(home: Home) -> Finding:
    """Whether there is room for checkpoints and adapters."""
    free = shutil.disk_usage(home.root).free
    said = f"{free / _GIB:.1f} GiB free"
    if free < _LEAST_FREE:
        return Finding("disk", Verdict.FAIL, said, "Make room: old adapters and archive/ are yours to delete.")
    if free < _ENOUGH_FREE:
        return Finding("disk", Verdict.WARN, said, "Checkpoints of a large model may not fit.")
    return Finding("disk", Verdict.OK, said)


def check_daemon(home: Home) -> Finding:
    """Who holds the lock of the base directory."""
    holder = daemon_at_work(home)
    if holder is None:
        return Finding("daemon", Verdict.OK, "none is at work here")
    if holder.elsewhere:
        return Finding("daemon", Verdict.OK, f"at work: pid {holder}")
    command = ""
    with suppress(OSError):
        words = Path(f"/proc/{holder.pid}/cmdline").read_text(encoding="utf-8", errors="replace")
        command = words.replace("\0", " ").strip()
    if "finetuned" not in command:
        return Finding(
            "daemon",
            Verdict.FAIL,
            f"the lock is held, and not by a daemon that can be seen from here (it says pid {holder.pid})",
            f"Another container or machine may be at work here: stop its daemon. `fuser {home.lock}` may name it.",
        )
    return Finding("daemon", Verdict.OK, f"at work: pid {holder.pid}, {command}")


def check_inotify(home: Home) -> Finding:
    """Whether the kernel lets another program watch a folder. Without it a file is found at the next rescan."""
    remedy = "`sysctl fs.inotify.max_user_instances=512 fs.inotify.max_user_watches=524288`, and in /etc/sysctl.d/."
    limits = {name: _limit(name) for name in ("max_user_instances", "max_user_watches")}
    said = ", ".join(f"{name} {value}" for name, value in limits.items())
    error = _watch_once(home.inbox if home.inbox.is_dir() else home.root)
    if error:
        return Finding("inotify", Verdict.WARN, f"no folder can be watched: {os.strerror(error)} ({said})", remedy)
    if limits["max_user_instances"] < _INSTANCES or limits["max_user_watches"] < _WATCHES:
        return Finding("inotify", Verdict.WARN, f"low limits: {said}", remedy)
    return Finding("inotify", Verdict.OK, said)


def _limit(name: str) -> int:
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/fs/inotify", name).read_text(encoding="ascii"))
    return 0


def _watch_once(folder: Path) -> int:
    """Watch a folder for a moment; give the error's number, 0 if it went well."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_CLOEXEC)
    if descriptor < 0:
        return ctypes.get_errno()
    try:
        creations = 0x100  # IN_CREATE
        return 0 if libc.inotify_add_watch(descriptor, os.fsencode(folder), creations) >= 0 else ctypes.get_errno()
    finally:
        os.close(descriptor)
