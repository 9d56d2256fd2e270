"""A Debian with systemd as its PID 1, in a container that is thrown away: what `make test-systemd` tests in.

Everything happens within the container's own root: nothing of this machine is visible in it, and no unit of this
machine is touched.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

from conftest import eventually

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetuned/debian"
PACKAGES = "systemd,systemd-sysv,dbus,procps,python3,python3-venv"
PYTHON = "/opt/finetuned/bin/python"
_MACHINE = f"finetuned-test-{os.getpid()}"
_CONTAINER = (
    "systemd-nspawn",
    "--quiet",
    "--register=no",
    "--keep-unit",
    "--private-network",
    f"--machine={_MACHINE}",
)
_PROPAGATE = Path("/run/systemd/nspawn/propagate", _MACHINE)  # what a container leaves of itself where /run is a disk
_V1_MEMORY = Path("/sys/fs/cgroup/memory")


def make_debian(folder: Path) -> None:
    """Make a small Debian, unless it is there. Needs root, debootstrap and a network; a minute or two."""
    if folder.exists():
        return
    staged = folder.with_name(f"{folder.name}.{os.getpid()}")
    mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", staged, mirror]
    try:
        staged.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(staged / "var/cache/apt")
        staged.rename(folder)  # so that a half-made one is never used
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class Debian:
    """One container, its root in `root` on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of its PID 1, seen from here
        self._group: Path | None = None

    def copy(self, debian: Path) -> None:
        """Begin with a copy of a Debian."""
        subprocess.run(["cp", "-a", "--reflink=auto", debian, self.root], check=True)

    def install_package(self) -> None:
        """Install the wheel of this checkout and the daemon's dependencies into /opt/finetuned: no torch."""
        self.offline("/usr/bin/python3", "-m", "venv", "--without-pip", "/opt/finetuned")
        version = (self.root / "usr/bin/python3").readlink().name  # python3.11
        target = self.root / "opt/finetuned/lib" / version / "site-packages"
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
        into = [*pip, "install", "--quiet", "--target", target, "--python-version", version.removeprefix("python")]
        pinned = ["--only-binary", ":all:", "--constraint", REPOSITORY / "constraints.txt"]
        subprocess.run([*into, *pinned, *project["dependencies"]], check=True)
        subprocess.run([*into, "--no-deps", REPOSITORY], check=True)
        for name in ("standin_trainer.py", "systemd/probing_trainer.py"):
            shutil.copy(REPOSITORY / "tests" / name, self.root / "opt/finetuned")

    def offline(self, *command: str) -> None:
        """Run a command in the root, with no systemd."""
        subprocess.run([*_CONTAINER, "--pipe", "-D", self.root, *command], check=True, stdin=subprocess.DEVNULL)

    def boot(self) -> None:
        """Start, and wait until systemd has started all that is enabled."""
        console = (self.root.parent / "console.log").open("ab")
        with console:
            self._nspawn = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *_CONTAINER, "--boot", "-D", self.root],  # ends with the tests
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pid = eventually(self._find_init, why="the container's PID 1")
        eventually(lambda: self._state() in {"running", "degraded"}, seconds=120, why="a booted systemd")

    def _find_init(self) -> int:
        pid = self._nspawn.pid
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            with suppress(OSError):
                names = Path(f"/proc/{child}/status").read_text().split("NSpid:")[1].split("\n")[0].split()
                if names[-1] == "1" and "systemd" in Path(f"/proc/{child}/comm").read_text():
                    return child
        return 0

    def _state(self) -> str:
        return self.run("systemctl", "is-system-running", check=False).strip()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside, as root; its output."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._pid), "-m", "-p", "-u", "-i", "-n", "-C", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """Give a property of a unit, as systemd holds it."""
        return self.run("systemctl", "show", "--property", name, "--value", unit).strip()

    def limit_memory(self, unit: str, megabytes: int) -> None:
        """See to it that the kernel kills in this unit what takes more memory.

        MemoryMax= does it where systemd has the memory controller; under cgroup v1 a container may not limit itself,
        so it is done from outside.
        """
        self.run("systemctl", "set-property", "--runtime", unit, f"MemoryMax={megabytes}M", "MemorySwapMax=0")
        if not _V1_MEMORY.is_dir():
            return
        self._group = _V1_MEMORY / f"finetuned-test-{os.getpid()}"
        self._group.mkdir()
        (self._group / "memory.limit_in_bytes").write_text(str(megabytes << 20))
        inside = self.show(unit, "MainPID")
        (pid,) = (pid for pid in self._processes() if self._inside(pid) == inside)
        (self._group / "cgroup.procs").write_text(str(pid))

    def _processes(self) -> list[int]:
        namespace = Path(f"/proc/{self._pid}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (folder / "ns/pid").readlink() == namespace:
                    found.append(int(folder.name))
        return found

    def _inside(self, pid: int) -> str:
        with suppress(OSError):
            return Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1]
        return ""

    def power_off(self) -> None:
        """Shut down as a machine does; by force if it will not."""
        if self._nspawn is None:
            return
        self._nspawn.terminate()
        try:
            self._nspawn.wait(90)
        except subprocess.TimeoutExpired:
            if self._pid:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, 9)  # and with PID 1 everything in it
            self._nspawn.kill()
            self._nspawn.wait()
        self._nspawn, self._pid = None, 0
        if self._group is not None:
            eventually(lambda: not (self._group / "cgroup.procs").read_text(), why="an empty group")
            self._group.rmdir()
            self._group = None

    def discard(self) -> None:
        """Leave nothing behind."""
        self.power_off()
        shutil.rmtree(self.root, ignore_errors=True)
        with suppress(OSError):
            _PROPAGATE.rmdir()


def what_is_missing() -> list[str]:
    """Say what this machine lacks to run containers."""
    programs = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}
    missing = [f"{name} (apt install {package})" for name, package in programs.items() if not shutil.which(name)]
    if os.geteuid() != 0:
        missing.append("root")
    return missing
