"""What systemd hears from a real daemon, through a notification socket of the test's own."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
from collections import Counter

import pytest

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.jobs import State

WATCHDOG = {"WATCHDOG_USEC": "2000000"}


class Ear:
    """Everything the daemon says to systemd."""

    def __init__(self, address) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": str(address), **WATCHDOG}

    def lines(self) -> list[str]:
        """Give what was said since the last call."""
        heard: list[str] = []
        while True:
            try:
                heard += self._socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                return heard

    def hears(self, pattern: str, *, seconds: float = 30.0) -> str:
        """Wait for a line that matches, and give it."""
        return eventually(
            lambda: next((line for line in self.lines() if re.search(pattern, line)), None),
            seconds=seconds,
            why=pattern,
        )


@pytest.fixture
def ear(tmp_path):
    """A socket with a short path."""
    return Ear(tmp_path / "notify")


@pytest.fixture
def drop(home):
    def put(name: str, count: int):
        return write_jsonl(home.root / f"staged-{name}", chat_rows(count)).rename(home.inbox / name)

    return put


def test_ready_then_the_job_its_step_and_the_time_left(home, daemon, drop, standin, ear):
    standin(seconds=0.2)
    one = daemon(environment=ear.environment)
    assert ear.hears("^(READY|STATUS)=") == "READY=1"
    ear.hears("^STATUS=waiting for files$")
    drop("x.jsonl", 60)
    status = ear.hears(r"^STATUS=x-\w+: step \d+ of 60, .* left$")
    assert re.search(r", \d+ s left$", status)
    assert one.stop() == 0


def test_nothing_is_said_where_nobody_listens(home, daemon, ear, tmp_path):
    one = daemon(environment={"NOTIFY_SOCKET": str(tmp_path / "nobody"), **WATCHDOG})
    one.says("finetuned starts")
    assert one.stop() == 0


def test_a_stop_asks_for_patience_while_the_checkpoint_is_written(home, daemon, drop, standin, ear):
    standin(seconds=0.1, save=6)
    one = daemon(environment=ear.environment)
    drop("x.jsonl", 500)
    ear.hears("step [1-9]")
    one.process.send_signal(signal.SIGTERM)
    ear.hears("^STOPPING=1$")
    heard: Counter[str] = Counter()

    def ended() -> bool:
        heard.update(ear.lines())
        return one.process.poll() is not None

    eventually(ended, why="the daemon's end")
    assert one.process.returncode == 0
    assert heard["EXTEND_TIMEOUT_USEC=60000000"] > 2  # again and again, so that a stuck daemon gets no hour
    assert heard["WATCHDOG=1"] > 2
    assert heard["STOPPING=1"] <= 1
    assert any("writing a checkpoint" in line for line in heard)
    assert one.job("x.jsonl", state=State.QUEUED).interruptions == 0


def test_the_watchdog_is_not_fed_while_the_ledger_takes_no_writes(home, daemon, ear):
    one = daemon(environment=ear.environment)
    ear.hears("^WATCHDOG=1$")
    somebody = sqlite3.connect(home.ledger, isolation_level=None)
    somebody.execute("BEGIN IMMEDIATE")
    one.says("not well", seconds=30)
    assert "database is locked" in one.log()
    ear.lines()
    one_more = one.log().count("not well") + 1
    eventually(lambda: one.log().count("not well") >= one_more, why="it is still not well")
    assert "WATCHDOG=1" not in ear.lines()
    somebody.execute("ROLLBACK")
    somebody.close()
    ear.hears("^WATCHDOG=1$")


def test_a_stopped_loop_is_silent(home, daemon, ear):
    one = daemon(environment=ear.environment)
    ear.hears("^WATCHDOG=1$")
    one.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, one.process.pid, os.WSTOPPED | os.WNOWAIT)
    ear.lines()
    with pytest.raises(AssertionError, match="not within"):
        ear.hears("WATCHDOG|STATUS", seconds=3)
    one.process.send_signal(signal.SIGCONT)
    ear.hears("^WATCHDOG=1$")
    assert one.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root to mount")
def test_a_full_disk_is_told_and_does_not_starve_the_watchdog(home, daemon, standin, ear):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", home.root], check=True)
    try:
        for folder in home.folders:
            folder.mkdir(parents=True)
        write_config(home)
        staged = write_jsonl(home.root / "staged.jsonl", chat_rows(3))
        one = daemon(environment=ear.environment)
        ear.hears("^WATCHDOG=1$")
        filler = home.root / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(4 << 20))
        staged.rename(home.inbox / "x.jsonl")
        ear.hears("^STATUS=waiting: ")
        ear.hears("^WATCHDOG=1$")
        ear.hears("^WATCHDOG=1$")
        filler.unlink()
        assert one.stop() == 0
    finally:
        subprocess.run(["umount", "--lazy", home.root], check=True)


def test_pauses_are_told(home, daemon, ear):
    write_config(home)
    home.paused.parent.mkdir(exist_ok=True)
    home.paused.write_text("a user asked for it")
    one = daemon(environment=ear.environment)
    ear.hears("^STATUS=paused$")
    assert one.stop() == 0
