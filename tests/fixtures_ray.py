"""A real Ray cluster of one node, as if on another machine: in an environment of its own, made the first time."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from conftest import eventually

VERSION = "2.60.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"finetuned/ray-{VERSION}"
TOKEN = "a-token-of-the-tests-" + "0" * 43
_MARK = "FINETUNED_TEST_RAY"  # in the environment of all that a cluster starts
_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


def install_ray() -> Path:
    """Give the folder of Ray's programs; install it the first time. Needs a network then, for a minute.

    torch, which Ray Train wants, is the one that runs the tests.
    """
    ready = CACHE / "ready"
    if not ready.exists() or ready.read_text() != sys.version:
        subprocess.run([sys.executable, "-m", "venv", "--clear", CACHE], check=True)
        pip = [CACHE / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"ray[default,train]=={VERSION}"], check=True)
        ready.write_text(sys.version)
    (libraries,) = CACHE.glob("lib/python3*/site-packages")
    torch = Path(find_spec("torch").origin).parents[1]
    (libraries / "torch-of-the-tests.pth").write_text(f"{torch}\n")
    return CACHE / "bin"


class RayCluster:
    """A head node with two processors and two GPUs, which are numbers and nothing more. It wants a token."""

    def __init__(self) -> None:
        self._programs = install_ray()
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, as the paths of sockets must be
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"http://127.0.0.1:{self._ports['dashboard-port']}"
        self.token_file = self._folder / "token"
        self.token_file.write_text(f"{TOKEN}\n")

    def start(self) -> None:
        """Start, and wait until it takes jobs."""
        options = [f"--{name}={port}" for name, port in self._ports.items()]
        options += ["--num-cpus=2", "--num-gpus=2", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
        options += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self._folder}/t"]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {_MARK: str(self._folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        console = (self._folder / "console.log").open("ab")
        with console:
            self._process = subprocess.Popen(
                [self._programs / "ray", "start", "--head", "--block", "--disable-usage-stats", *options],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        eventually(self._answers, why=f"a Ray that answers; {(self._folder / 'console.log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
        with suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        """End it as a power cut does, with all that it started."""
        if self._process is None:
            return
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        eventually(lambda: not self._processes(), why="no process of Ray's")
        self._process = None

    def _processes(self) -> list[int]:
        """Give all that it started: by their session, or by the environment, which some overwrite."""
        mark = f"{_MARK}={self._folder}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                facts = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                ours = int(facts[3]) == self._process.pid or mark in (folder / "environ").read_bytes()
                if ours and facts[0] != b"Z":
                    found.append(int(folder.name))
        return found

    def pid_of(self, title: str) -> int:
        """Give its one process that calls itself so."""
        (pid,) = (pid for pid in self._processes() if title in Path(f"/proc/{pid}/cmdline").read_text())
        return pid

    def discard(self) -> None:
        """Leave nothing behind."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Give ports that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
