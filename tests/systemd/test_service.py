"""The service under a real systemd: what it does by itself at boot, at a stop, and after every way to die."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.home import Home
from fixtures_debian import CACHE, PYTHON, Debian, make_debian, what_is_missing
from standin_trainer import safetensors, weights_of

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(1200)]

BASE = "/var/lib/finetuned"
UNIT = "finetuned.service"
SETTINGS = {"quiet_seconds": 0.2, "rescan_seconds": 1, "stop_seconds": 60, "epochs": 1, "duplicates": "run"}
STANDIN = f'Environment="FINETUNED_TRAINER={PYTHON} /opt/finetuned/standin_trainer.py"'
QUICK = ("WatchdogSec=15", "RestartSec=1", "TimeoutStopSec=5", STANDIN, "Environment=STANDIN_SECONDS=0.1")


class Machine(Debian):
    """A machine on which finetuned is a service."""

    base = BASE

    @property
    def home(self) -> Home:
        """The base directory, seen from outside."""
        return Home(self.root / self.base.removeprefix("/"))

    def finetuned(self, *words: str) -> str:
        return self.run(PYTHON, "-P", "-m", "finetuned", *words)

    def install(self, base: str) -> None:
        """Make it a service in this base directory."""
        self.base = base
        self.finetuned("init", base)
        self.home.config_file.write_text(json.dumps(SETTINGS))
        before = self.show(UNIT, "ActiveState")
        said = self.finetuned("service", "install", "--base-dir", base)
        assert "verified  by systemd-analyze" in said
        assert self.show(UNIT, "ActiveState") == before  # nothing starts by itself
        for step in re.findall(r"^    (.+)$", said, flags=re.MULTILINE):
            self.run("sh", "-c", step)

    def drop_in(self, name: str, *lines: str) -> None:
        """Add lines to the unit's [Service]; none takes the file away."""
        folder = self.root / f"etc/systemd/system/{UNIT}.d"
        folder.mkdir(exist_ok=True)
        if lines:
            (folder / f"{name}.conf").write_text("\n".join(["[Service]", *lines, ""]))
        else:
            (folder / f"{name}.conf").unlink()
        self.run("systemctl", "daemon-reload")

    def restart(self) -> None:
        self.run("systemctl", "reset-failed", UNIT, check=False)
        self.run("systemctl", "restart", UNIT)

    def drop(self, name: str, rows: int) -> None:
        """Put a file into the inbox, as its owner would."""
        staged = write_jsonl(self.home.root / f"staged-{name}", chat_rows(rows))
        owner = self.home.inbox.stat()
        shutil.chown(staged, owner.st_uid, owner.st_gid)
        staged.rename(self.home.inbox / name)

    def jobs(self) -> list[dict]:
        facts = json.loads(self.finetuned("status", "--base-dir", self.base, "--json"))
        return [*facts["running"], *facts["queue"], *facts["finished"]]

    def job(self, name: str) -> dict:
        return next((job for job in self.jobs() if job["file"] == name), {})

    def in_the_middle(self, name: str) -> int:
        """Wait until some steps are done; give how many."""
        eventually(lambda: self.job(name).get("progress", {}).get("step", 0) > 6, why=f"some steps of {name}")
        return self.job(name)["progress"]["step"]

    def finished(self, name: str) -> dict:
        try:
            eventually(lambda: self.job(name).get("outcome"), seconds=120, why=f"{name} finished")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.run('journalctl', '-u', UNIT, '-n', '40')}") from None
        return self.job(name)

    def undisturbed(self, name: str) -> bool:
        """Whether the adapter is that of a training with no step lost and none twice."""
        [archived] = self.home.archive.glob(f"20*/*/{name}")
        rows = archived.read_bytes().splitlines()
        weights = self.home.adapters / name.removesuffix(".jsonl") / "adapter_model.safetensors"
        return weights.read_bytes() == safetensors(weights_of(rows, len(rows)))

    def said_by_trainers(self) -> list[str]:
        ledger = sqlite3.connect(f"{self.home.ledger.as_uri()}?mode=ro", uri=True)
        try:
            return [row[0] for row in ledger.execute("SELECT message FROM events ORDER BY id")]
        finally:
            ledger.close()

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.home.logs.glob("daemon_*.log")))

    def restarts(self) -> int:
        return int(self.show(UNIT, "NRestarts"))

    def pid(self) -> int:
        return int(self.show(UNIT, "MainPID"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Install as docs/systemd.md says, with the commands that `service install` prints."""
    if missing := what_is_missing():
        pytest.fail(f"not here: {', '.join(missing)}")
    make_debian(CACHE)
    machine = Machine(tmp_path_factory.mktemp("machine") / "root")
    try:
        machine.copy(CACHE)
        machine.install_package()
        machine.boot()
        machine.drop_in("0-quick", *QUICK)
        machine.install(BASE)
        yield machine
    finally:
        machine.discard()


@pytest.fixture(autouse=True)
def ready(machine):
    """Let every test begin with a running daemon that has not failed yet."""
    machine.restart()
    assert machine.show(UNIT, "ActiveState") == "active"


def test_it_starts_at_boot_and_a_file_becomes_an_adapter(machine):
    machine.power_off()
    machine.boot()
    eventually(lambda: machine.show(UNIT, "ActiveState") == "active", why="started at boot")
    assert machine.show(UNIT, "StatusText") == "waiting for files"
    machine.drop("boot.jsonl", 20)
    assert machine.finished("boot.jsonl")["outcome"] == "succeeded"
    assert machine.undisturbed("boot.jsonl")


def test_the_gpu_s_nodes_are_made_by_root_before_the_daemon_starts(machine):
    """A program of the test's own for nvidia-modprobe; without one, as before, the unit does nothing."""
    nodes = "finetuned-gpu-nodes.service"
    assert machine.show(nodes, "Result") == "success"
    program = machine.root / "usr/bin/nvidia-modprobe"
    program.write_text('#!/bin/sh\necho "$(id -u) $*" > /dev/finetuned-probe; sleep 2\n')
    program.chmod(0o755)
    try:
        machine.run("systemctl", "stop", UNIT, nodes)
        machine.run("systemctl", "start", UNIT)
    finally:
        program.unlink()
    assert machine.run("cat", "/dev/finetuned-probe") == "0 -c0 -u\n"
    made = int(machine.show(nodes, "ActiveEnterTimestampMonotonic"))
    assert 0 < made < int(machine.show(UNIT, "ExecMainStartTimestampMonotonic"))


def test_systemctl_status_tells_job_step_and_time_left(machine):
    machine.drop("told.jsonl", 100)
    machine.in_the_middle("told.jsonl")
    status = r"told-\w+: step \d+ of 100, .* \d+ s left"
    eventually(lambda: re.fullmatch(status, machine.show(UNIT, "StatusText")), why="a status with step and time")
    machine.finished("told.jsonl")


def test_a_stop_in_the_middle_writes_a_checkpoint_and_the_next_start_goes_on_from_it(machine):
    """The checkpoint takes longer than TimeoutStopSec=, so systemd must hear that it is being written."""
    machine.drop_in("slow", "Environment=STANDIN_SAVE=12")
    machine.restart()
    machine.drop("stopped.jsonl", 100)
    step = machine.in_the_middle("stopped.jsonl")
    machine.run("systemctl", "stop", UNIT)
    assert machine.show(UNIT, "Result") == "success"
    machine.drop_in("slow")
    job = machine.job("stopped.jsonl")
    saved = job["progress"]["checkpoint_step"]
    assert job["status"] == "queued"
    assert saved >= step
    machine.run("systemctl", "start", UNIT)
    assert machine.finished("stopped.jsonl")["outcome"] == "succeeded"
    assert f"resumed after step {saved} of 100" in machine.said_by_trainers()
    assert machine.undisturbed("stopped.jsonl")


def test_a_killed_daemon_is_started_again_and_its_job_goes_on(machine):
    machine.drop("killed.jsonl", 100)
    machine.in_the_middle("killed.jsonl")
    before = machine.restarts()
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    eventually(lambda: machine.restarts() > before, why="a restart")
    assert machine.finished("killed.jsonl")["outcome"] == "succeeded"
    assert machine.undisturbed("killed.jsonl")


def test_a_hung_loop_is_noticed_by_the_watchdog_and_started_again(machine):
    machine.drop("hung.jsonl", 400)
    machine.in_the_middle("hung.jsonl")
    before, pid = machine.restarts(), machine.pid()
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", UNIT)
    eventually(lambda: machine.restarts() > before, seconds=120, why="a restart by the watchdog")
    assert "Watchdog timeout" in machine.run("journalctl", "-u", UNIT, "--grep", "Watchdog timeout")
    eventually(lambda: machine.pid() not in {0, pid}, why="another daemon")
    assert machine.finished("hung.jsonl")["outcome"] == "succeeded"
    assert machine.undisturbed("hung.jsonl")


def test_a_trainer_killed_for_memory_leaves_the_daemon_alive(machine):
    machine.drop_in("hungry", "Environment=STANDIN_EAT_MB=600")
    machine.restart()
    pid, before = machine.pid(), machine.restarts()
    machine.limit_memory(UNIT, 300)
    machine.drop("hungry.jsonl", 20)
    job = machine.finished("hungry.jsonl")
    assert job["outcome"] == "failed"
    assert job["reason"]["code"] == "killed"
    assert "ran out of memory" in job["reason"]["what"]
    machine.drop_in("hungry")
    assert (machine.pid(), machine.restarts(), machine.show(UNIT, "ActiveState")) == (pid, before, "active")


@pytest.mark.parametrize("base", ["/srv/my 100% tuning", "/home/alice/tuning"])
def test_a_base_directory_elsewhere_works_as_well(machine, base):
    """Nothing else of /home is seen, and nothing else of the disk is written to."""
    machine.run("systemctl", "stop", UNIT)
    machine.install(base)
    try:
        machine.drop("elsewhere.jsonl", 10)
        assert machine.finished("elsewhere.jsonl")["outcome"] == "succeeded"
        assert machine.undisturbed("elsewhere.jsonl")
        assert machine.show(UNIT, "User") == "finetuned"
    finally:
        machine.run("systemctl", "stop", UNIT)
        machine.install(BASE)


# -- the hardening

# What `systemctl show` calls by another name, or says in other words.
ELSEWHERE = {
    "RestartSec": ("RestartUSec", "1s"),
    "WatchdogSec": ("WatchdogUSec", "15s"),
    "TimeoutStartSec": ("TimeoutStartUSec", "10min"),
    "TimeoutStopSec": ("TimeoutStopUSec", "5s"),
    "SystemCallErrorNumber": ("SystemCallErrorNumber", "1"),
    "RestrictAddressFamilies": ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
}
AMONG_OTHERS = {"ExecStart", "ExecReload", "DeviceAllow", "Environment"}
CALLS_REFUSED = {"ptrace", "mount", "bpf", "init_module", "setuid", "reboot", "settimeofday", "chroot"}


def test_every_line_of_the_unit_is_in_force(machine):
    unit = (machine.root / f"etc/systemd/system/{UNIT}").read_text()
    lines = re.findall(r"^(\w+)=(.*)$", unit.split("[Service]")[1].split("[Install]")[0], flags=re.MULTILINE)
    assert len(lines) > 35
    for name, value in lines:
        shown = machine.show(UNIT, ELSEWHERE.get(name, (name, ""))[0])
        if name in AMONG_OTHERS:
            assert value in shown, name
        elif name == "SystemCallFilter":
            assert not CALLS_REFUSED & set(shown.split())
            assert {"pidfd_getfd", "memfd_create", "sched_setaffinity"} <= set(shown.split())
        else:
            assert shown == ELSEWHERE.get(name, (name, value))[1], name


def test_what_the_unit_forbids_is_refused_within_it_and_what_training_needs_is_not(machine):
    """Tried in the trainer's place. Many would be refused to any user; these errors are those of the sandbox."""
    machine.drop_in("probe", STANDIN.replace("standin_trainer", "probing_trainer"))
    machine.restart()
    machine.drop("probe.jsonl", 3)
    machine.finished("probe.jsonl")
    machine.drop_in("probe")
    found = json.loads((machine.home.logs / "probe.json").read_text())
    assert found == {
        "write to the base directory": "allowed",
        "write to /tmp": "allowed",
        "write to /etc": "EROFS",
        "write to /usr": "EROFS",
        "write to /var/lib": "EROFS",
        "write to the code": "EROFS",
        "write to /proc/sys": "EROFS",
        "write to a control group": "EROFS",
        "homes": "hidden",
        "other users' processes": "hidden",
        "mount": "EPERM",
        "a user namespace": "EPERM",
        "a netlink socket": "EAFNOSUPPORT",
        "an internet socket": "allowed",
        "a set-user-id file": "EPERM",
        "real-time scheduling": "EPERM",
        "another personality": "EPERM",
        "ptrace": "EPERM",
        "kernel log": "EPERM",
        "another user": "EPERM",
        "host name": "EPERM",
        "own code": "allowed",
        "own thread's name": "allowed",
        "shared memory by descriptor": "allowed",
        "capabilities": "0" * 32,
        "no new privileges": "1",
        "core size": 0,
        "user": "finetuned",
        "umask": "0027",
        "home": f"{BASE}/.finetuned",
    }
    assert not (machine.root / "tmp/finetuned-probe").exists()  # its /tmp is its own
