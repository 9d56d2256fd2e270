"""A real Slurm of one node on this machine, with two GPUs that are none, in a folder that is thrown away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import eventually

# KillWait: seconds between SIGTERM and SIGKILL. The node has four processors, however many the machine has.
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=2
KillWait=3
SlurmdTimeout=300
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=low Nodes={host} Default=YES PriorityTier=1
PartitionName=scrap Nodes={host} PriorityTier=1 PreemptMode=CANCEL
PartitionName=high Nodes={host} PriorityTier=10
"""
GPUS = """\
AutoDetect=off
NodeName={host} Name=gpu File=/dev/null
NodeName={host} Name=gpu File=/dev/zero
"""


def what_is_missing() -> list[str]:
    """Say what this machine lacks to run a Slurm."""
    programs = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
    missing = [f"{name} (apt install {package})" for name, package in programs.items() if not shutil.which(name)]
    return [*missing, "root"] if os.geteuid() != 0 else missing


class SlurmCluster:
    """munged, slurmctld and slurmd."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short, as the paths of sockets must be
        self.host = socket.gethostname().partition(".")[0]
        self.conf = self.folder / "slurm.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        controller, daemon = _free_ports(2)
        self.conf.write_text(CONF.format(host=self.host, folder=self.folder, controller=controller, daemon=daemon))
        (self.folder / "gres.conf").write_text(GPUS.format(host=self.host))

    def start(self) -> None:
        """Start all, and wait until the node takes jobs."""
        munge = self.folder / "munge"
        files = (f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed"))
        self._start("munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        eventually((munge / "socket").exists, why="munged's socket")
        self.start_controller()
        self.start_node()

    def start_controller(self) -> None:
        self._start("slurmctld", "-D")
        eventually(lambda: "UP" in self.run("scontrol", "ping", check=False), why="a controller that answers")

    def stop_controller(self) -> None:
        self._stop("slurmctld", signal.SIGTERM)

    def start_node(self) -> None:
        self._start("slurmd", "-D")
        self.ready()

    def ready(self) -> None:
        """Wait until the node takes jobs, and see to it if somebody has set it down."""
        states = {"idle", "mixed", "allocated"}

        def takes_jobs() -> bool:
            if "down" in (now := self.run("sinfo", "-h", "-o", "%T").split()[0]):
                self.run("scontrol", "update", f"NodeName={self.host}", "State=RESUME", check=False)
            return now in states

        eventually(takes_jobs, why="a node that takes jobs")

    def kill_node(self) -> None:
        """End the node's daemon; its jobs live."""
        self._stop("slurmd", signal.SIGKILL)

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; what it prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", job).strip()

    def run_again(self, job: str) -> None:
        """Have a job run that Slurm has put back: by itself it would have to wait two minutes.

        Not within the second in which it ended: Slurm 22.05 would take its new credential for the old one.
        """
        eventually(lambda: self.state(job) == "PENDING", why="a job that is put back")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
        eventually(lambda: self.state(job) in {"RUNNING", "COMPLETED"}, seconds=20, why="a job that runs again")

    def empty(self) -> None:
        """Cancel all jobs."""
        self.run("scancel", "--user=root", check=False)
        self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        eventually(lambda: not self.run("squeue", "-h"), why="an empty queue")

    def discard(self) -> None:
        """Leave nothing behind."""
        with suppress(AssertionError):
            self.empty()
        for name in ("slurmctld", "slurmd", "munged"):
            self._stop(name, signal.SIGTERM)
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._processes[command[0]] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SLURM_CONF": str(self.conf)},
                start_new_session=True,
            )

    def _stop(self, name: str, number: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _left(self) -> list[int]:
        """Give what the node's daemon started and left."""
        left = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"SLURM_CONF={self.conf}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    left.append(int(folder.name))
        return left


@pytest.fixture(scope="module")
def slurm_cluster():
    """A Slurm that the tests of a module share."""
    if missing := what_is_missing():
        pytest.skip(f"needs {', '.join(missing)}")
    cluster = SlurmCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.discard()


@pytest.fixture
def slurm(slurm_cluster, monkeypatch):
    """The same with an empty queue, and known to all commands of this process."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    slurm_cluster.ready()
    yield slurm_cluster
    slurm_cluster.empty()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
