"""A trainer whose daemon was killed goes on under the next one. The trainer computes nothing, all else is real."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.jobs import Outcome, State
from standin_trainer import safetensors, weights_of


@pytest.fixture
def orphan(home, daemon, standin):
    """Start a job, kill its daemon in the middle, and give the trainer's pid."""

    def make(count: int = 24, *, seconds: float = 0.15, environment: dict | None = None, **ways) -> int:
        standin(seconds=seconds, **ways)
        one = daemon(environment=environment)
        write_jsonl(home.root / "staged", chat_rows(count)).rename(home.inbox / "x.jsonl")
        eventually(lambda: one.jobs() and one.jobs()[0].progress.get("step", 0) > 2, why="some steps")
        pid = one.jobs()[0].trainer_pid
        one.stop(signal.SIGKILL)
        return pid

    return make


def alive(pid: int) -> bool:
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def messages(home) -> list[str]:
    with sqlite3.connect(home.ledger) as ledger:
        return [row[0] for row in ledger.execute("SELECT message FROM events ORDER BY id")]


def undisturbed(home) -> bool:
    [archived] = home.archive.glob("20*/*/x.jsonl")
    rows = archived.read_bytes().splitlines()
    return (home.adapters / "x" / "adapter_model.safetensors").read_bytes() == safetensors(weights_of(rows, len(rows)))


def test_it_goes_on_as_if_nothing_had_been(home, daemon, orphan):
    trainer = orphan()
    two = daemon()
    two.says("trainer adopted")
    assert two.job("x.jsonl", state=State.RUNNING).trainer_pid == trainer
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions, job.retries) == (Outcome.SUCCEEDED, 1, 0, 0)
    said = messages(home)
    assert [m for m in said if m.startswith("step ")] == [f"step {n} of 24" for n in range(1, 25)]
    assert undisturbed(home)


def test_one_that_ended_while_no_daemon_was_there_is_published_by_the_next(home, daemon, orphan):
    trainer = orphan(20, seconds=0.05)
    eventually(lambda: not alive(trainer), why="it ends by itself")
    two = daemon("--once")
    assert two.process.wait(60) == 0
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 1, 0)
    assert "trained" in messages(home)  # what it said meanwhile is in the ledger
    assert undisturbed(home)


@pytest.mark.parametrize("adopted", [True, False], ids=["under the next daemon", "without a daemon"])
def test_one_that_is_asked_to_stop_by_others_goes_on_from_its_checkpoint(home, daemon, orphan, adopted):
    trainer = orphan()
    two = daemon() if adopted else None
    if adopted:
        two.says("trainer adopted")
    os.kill(trainer, signal.SIGTERM)
    eventually(lambda: not alive(trainer), why="it ends")
    job = (two or daemon()).job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 0)
    assert any(m.startswith("resumed after step") for m in messages(home))
    assert undisturbed(home)


def test_one_that_ends_without_a_word_was_killed(home, daemon, orphan):
    trainer = orphan()
    two = daemon()
    two.says("trainer adopted")
    os.kill(trainer, signal.SIGKILL)
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 0)
    assert job.rung["batch_size"] == 2  # it was memory, most likely
    assert undisturbed(home)


def test_one_that_is_killed_while_no_daemon_is_there_was_interrupted(home, daemon, orphan):
    trainer = orphan()
    os.kill(trainer, signal.SIGKILL)
    job = daemon().job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 1)
    assert undisturbed(home)


def test_what_it_said_counts_no_longer_once_the_machine_was_started_anew(home, daemon, orphan):
    """A power loss may have taken what it stands for."""
    trainer = orphan()
    os.kill(trainer, signal.SIGTERM)
    eventually(lambda: not alive(trainer), why="it ends")
    assert [path.read_text() for path in home.jobs.glob("*/exit.1")] == ["130\n"]
    with sqlite3.connect(home.ledger) as ledger:
        ledger.execute("UPDATE jobs SET boot_id = 'another'")
    job = daemon().job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 1)


def test_one_that_stands_still_is_killed_and_its_job_resumed(home, daemon, orphan):
    trainer = orphan()
    os.kill(trainer, signal.SIGSTOP)
    two = daemon()
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 0)
    assert "it stands still" in two.log()
    assert not alive(trainer)
    assert undisturbed(home)


def test_one_of_another_version_is_stopped_with_a_checkpoint(home, daemon, orphan):
    trainer = orphan(version="0.0.9")
    os.environ.pop("STANDIN_VERSION")
    two = daemon()
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 0)
    assert "it is of finetuned 0.0.9" in two.log()
    assert not alive(trainer)
    assert any(m.startswith("resumed after step") for m in messages(home))


@pytest.mark.parametrize("stopped_by", ["pause", "cancel", "SIGTERM"])
def test_it_obeys_the_next_daemon(home, daemon, orphan, stopped_by):
    trainer = orphan(100)
    two = daemon()
    two.says("trainer adopted")
    if stopped_by == "SIGTERM":
        assert two.stop() == 0
    else:
        job = two.jobs()[0].id
        command = [sys.executable, "-m", "finetuned", stopped_by, "--base-dir", str(home.root)]
        subprocess.run([*command, job] if stopped_by == "cancel" else command, check=True)
    job = two.job("x.jsonl", state=State.FINISHED if stopped_by == "cancel" else State.QUEUED)
    assert job.outcome is (Outcome.CANCELLED if stopped_by == "cancel" else None)
    assert not alive(trainer)
    assert any(m.startswith("checkpoint after step") for m in messages(home))
    assert (job.interruptions, job.retries) == (0, 0)


def test_a_number_that_another_process_has_by_now_is_left_alone(home, daemon, orphan):
    trainer = orphan()
    os.kill(trainer, signal.SIGKILL)
    eventually(lambda: not alive(trainer))
    with subprocess.Popen(["sleep", "60"]) as stranger:
        [lock] = home.jobs.glob("*/lock")
        lock.write_text(lock.read_text().replace(str(trainer), str(stranger.pid)))
        assert daemon().job("x.jsonl").outcome is Outcome.SUCCEEDED
        assert stranger.poll() is None
        stranger.kill()


def test_gpu_figures_go_on(home, daemon, orphan, fake_nvml):
    write_config(home, gpu_sample_seconds=1)
    fake_nvml.set("gpus=1", "0.utilization=93")
    orphan(60, environment=fake_nvml.environment())
    with sqlite3.connect(home.ledger) as ledger:
        ledger.execute("DELETE FROM gpu_samples")
    two = daemon("--once", environment=fake_nvml.environment())
    assert two.process.wait(60) == 0
    with sqlite3.connect(home.ledger) as ledger:
        data = [json.loads(row[0]) for row in ledger.execute("SELECT data FROM gpu_samples")]
    assert data[0]["utilization"] == 93
