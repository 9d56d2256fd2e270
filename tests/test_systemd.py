"""The units are valid, as tight as docs/systemd.md says, and keep the promises the daemon needs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICE = ROOT / "systemd/finetuned.service"
GPU_NODES = ROOT / "systemd/finetuned-gpu-nodes.service"
USER_SERVICE = ROOT / "systemd/user/finetuned.service"

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str | Path, runtime: Path) -> str:
    """Run systemd-analyze to success, with `runtime` for XDG_RUNTIME_DIR, and give its output."""
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runnable(unit: str) -> str:
    """Point ExecStart= at a program that exists: a missing one is an error to `verify`."""
    return re.sub(r"^ExecStart=-?\S+", f"ExecStart={sys.executable}", unit, flags=re.MULTILINE)


def settings(unit: Path) -> dict[str, list[str]]:
    """Read a unit's settings; a name may come more than once."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), flags=re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


@needs_analyze
@pytest.mark.parametrize("unit", [SERVICE, GPU_NODES], ids=lambda unit: unit.name)
def test_systemd_accepts_every_line(unit: Path, tmp_path: Path) -> None:
    """A misspelt setting is a failure here; systemd itself would log it and carry on without."""
    (tmp_path / unit.name).write_text(runnable(unit.read_text()))
    analyze("verify", "--recursive-errors=no", tmp_path / unit.name, runtime=tmp_path)


@needs_analyze
def test_systemd_accepts_the_user_unit(tmp_path: Path) -> None:
    """Without root, and with the same promises."""
    unit = tmp_path / "finetuned.service"
    unit.write_text(runnable(USER_SERVICE.read_text()))
    analyze("verify", "--user", "--recursive-errors=no", unit, runtime=tmp_path)
    alike = {"Type", "NotifyAccess", "Restart", "WatchdogSec", "KillMode", "TimeoutStopSec", "OOMPolicy", "LimitCORE"}
    assert {name: settings(SERVICE)[name] for name in alike} == {name: settings(USER_SERVICE)[name] for name in alike}


@needs_analyze
def test_little_is_exposed(tmp_path: Path) -> None:
    """At most 1.8 of 10, by systemd's own count (--threshold= is in tenths)."""
    analyze("security", "--offline=yes", "--threshold=18", SERVICE, runtime=tmp_path)


@needs_analyze
def test_the_filter_lets_through_what_cuda_calls(tmp_path: Path) -> None:
    """Resolved as systemd does: each line adds its calls or, with ~, takes them away."""
    groups: dict[str, set[str]] = {}
    for line in analyze("syscall-filter", runtime=tmp_path).splitlines():
        if line.startswith("@"):
            calls = groups.setdefault(line.strip(), set())
        elif not line.strip().startswith("#"):
            calls.update(line.split())

    def expand(name: str) -> set[str]:
        return set().union(*map(expand, groups[name])) if name in groups else {name}

    allowed: set[str] = set()
    for line in settings(SERVICE)["SystemCallFilter"]:
        named = set().union(*map(expand, line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    assert {"memfd_create", "pidfd_getfd", "ioctl", "mbind", "sched_setaffinity"} <= allowed
    assert not {"ptrace", "mount", "bpf", "init_module", "setuid", "reboot"} & allowed


def test_pytorch_may_run_the_code_it_writes() -> None:
    """MemoryDenyWriteExecute= lowers the exposure and breaks every GPU job."""
    assert "MemoryDenyWriteExecute" not in settings(SERVICE)


def test_the_daemon_outlives_its_trainers_and_stops_after_them() -> None:
    """An OOM-killed trainer is the daemon's to judge, and a stop leaves time for a checkpoint."""
    service = settings(SERVICE)
    assert service["OOMPolicy"] == ["continue"]
    assert service["KillMode"] == ["mixed"]
    assert service["TimeoutStopSec"] == ["10min"]
    assert service["NotifyAccess"] == ["main"]
    assert "WatchdogSec" in service


def test_the_whole_base_directory_is_one_mount() -> None:
    """Two writable paths would be two mounts, between which no rename works (EXDEV)."""
    service = settings(SERVICE)
    (base,) = (f"/var/lib/{name}" for name in service["StateDirectory"])
    (start,) = service["ExecStart"]
    assert start.endswith(f" --base-dir {base}")
    assert not {"ReadWritePaths", "BindPaths"} & service.keys()
    assert [f"HOME={base}/.finetuned"] == service["Environment"]


def test_the_drivers_are_loaded_before_the_device_list_is_made() -> None:
    """DeviceAllow=char-nvidia* knows only what is loaded when the daemon starts."""
    assert settings(SERVICE)["Wants"] == [GPU_NODES.name]
    assert GPU_NODES.name in settings(SERVICE)["After"]
    assert settings(GPU_NODES)["Before"] == [SERVICE.name]
    assert all(command.startswith("-") for command in settings(GPU_NODES)["ExecStart"])
