"""How each kind of end is told and what follows it: a real daemon, with a trainer that ends as it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.jobs import Outcome, State


@pytest.fixture
def drop(home):
    def put(name: str = "x.jsonl", count: int = 20, start: int = 0):
        return write_jsonl(home.root / "staged", chat_rows(count, start=start)).rename(home.inbox / name)

    return put


def finetuned(home, *words: str) -> str:
    command = [sys.executable, "-m", "finetuned", words[0], "--base-dir", str(home.root), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def slow(home, standin):
    """A base directory whose trainer takes its time and whose GPUs are looked at every second."""
    standin(seconds=0.1)
    write_config(home, gpu_sample_seconds=1)
    return home


ENDS = {  # exit code or signal: (attempts, code of the reason, a word of it, a word of the remedy)
    "65": (1, "told_to", "told to end so", "mend it"),
    "78": (1, "told_to", "told to end so", "mend it"),
    "70": (4, "told_to", "told to end so", "mend it"),  # at 4, 2 and 1 rows, and with activation checkpointing
    "1": (2, "bug", "exit code 1 (a bug)", "This is a bug"),
    "-11": (2, "bug", "killed by SIGSEGV", "This is a bug"),
    "-9": (2, "killed", "ran out of memory", "Lower max_length or batch_size"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_job_that_cannot_succeed_fails_with_what_happened_and_what_to_do(home, daemon, drop, standin, end):
    standin(end=end)
    drop()
    one = daemon("--once")
    assert one.process.wait(60) == 1
    attempts, code, what, remedy = ENDS[end]
    job = one.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.FAILED, attempts, 0)
    story = json.loads((home.failed / job.id / "reason.json").read_bytes())
    assert story["reason"]["code"] == code
    assert what in story["reason"]["what"]
    assert remedy in story["reason"]["remedy"]
    assert ("log" in story) == (code == "bug")
    status = finetuned(home, "status")
    assert what in status
    assert remedy in status
    assert (home.failed / job.id / "x.jsonl").exists()


def test_what_may_pass_by_itself_is_tried_again_later_and_status_says_when_and_why(home, daemon, drop, standin):
    standin(end=75)
    one = daemon()
    drop()
    job = eventually(lambda: next((j for j in one.jobs() if j.retries), None), why="the first try")
    assert (job.state, job.retries) == (State.QUEUED, 1)
    assert job.not_before > job.started_at + 20
    eventually(lambda: ", again at " in (said := finetuned(home, "status")) and "told to end so" in said)


# -- the crash-loop guard


def crash(one, attempt: int) -> None:
    """End trainer and daemon at once, as a machine that goes down does."""

    def at_work() -> int | None:
        pids = [job.trainer_pid for job in one.jobs() if (job.state, job.attempt) == (State.RUNNING, attempt)]
        return pids[0] if pids else None

    pid = eventually(at_work, why=f"attempt {attempt}")
    one.process.send_signal(signal.SIGSTOP)  # or it would see the trainer's end
    os.kill(pid, signal.SIGKILL)
    one.stop(signal.SIGKILL)


def test_after_three_crashes_the_queue_pauses_until_resume(home, daemon, drop, standin):
    standin(seconds=0.1)
    drop("a.jsonl")
    drop("b.jsonl", start=50)
    for attempt in (1, 2, 3):
        crash(daemon(), attempt)
    one = daemon()
    one.says("`finetuned resume` lets jobs start again")
    paused = finetuned(home, "status")
    assert "paused: 3 attempts died with the daemon or the machine within 30 minutes, the last one at a-" in paused
    assert "`finetuned resume` lets jobs start again" in paused
    assert all(job.state is not State.RUNNING for job in one.jobs())
    one.stop()
    assert json.loads(finetuned(home, "status", "--json"))["paused"]
    finetuned(home, "resume")
    crash(daemon(), 4)
    two = daemon()  # the count begins anew
    for name in ("a.jsonl", "b.jsonl"):
        assert two.job(name).outcome is Outcome.SUCCEEDED


def test_the_guard_can_be_switched_off(home, daemon, drop, standin):
    standin(seconds=0.1)
    write_config(home, most_crashes=0)
    drop()
    for attempt in (1, 2, 3):
        crash(daemon(), attempt)
    assert daemon().job("x.jsonl").outcome is Outcome.SUCCEEDED


# -- GPUs that fail


def on(one, gpu: str) -> None:
    one.says(f'where="on GPU {gpu}"')


@pytest.mark.parametrize("trouble", ["0.xid=79", "0.lost=1"])
def test_a_job_on_a_gpu_that_fails_goes_on_on_another_one(daemon, drop, slow, fake_nvml, trouble):
    home = slow
    fake_nvml.set("gpus=2")
    one = daemon(environment=fake_nvml.environment())
    drop(count=30)
    job = one.job("x.jsonl", state=State.RUNNING)
    first = job.progress["gpu"]
    on(one, first)
    eventually(lambda: one.jobs()[0].progress.get("step", 0) > 2, why="some steps")
    fake_nvml.set("gpus=2", trouble)
    one.says("GPU set aside")
    job = one.job("x.jsonl")
    assert (job.outcome, job.attempt, job.retries, job.interruptions) == (Outcome.SUCCEEDED, 2, 0, 0)
    assert job.progress["gpu"] != first
    assert job.rung["batch_size"] == 4
    on(one, job.progress["gpu"])
    status = finetuned(home, "status")
    assert "GPU set aside: GPU 0" in status
    assert "start the daemon anew" in status


def test_an_end_that_a_failed_gpu_explains_is_no_bug(home, daemon, drop, standin, fake_nvml):
    """The trainer dies of it before the next sample is due."""
    standin(seconds=0.1)
    write_config(home, gpu_sample_seconds=600)
    fake_nvml.set("gpus=1")
    one = daemon(environment=fake_nvml.environment())
    drop()
    eventually(lambda: one.jobs() and one.jobs()[0].progress.get("step", 0) > 2, why="some steps")
    fake_nvml.set("gpus=1", "0.lost=1")
    os.kill(one.jobs()[0].trainer_pid, signal.SIGSEGV)
    job = one.job("x.jsonl", state=State.QUEUED)
    assert "its GPU failed" in job.progress["waits"]
    assert "bugs" not in job.progress
    status = finetuned(home, "status")
    assert "its GPU failed; it goes on from its checkpoint on another one, or waits for one" in status
    assert "GPU set aside" in status
    drop("y.jsonl", 3)  # nor does another job fall back to the CPU
    one.job("y.jsonl", state=State.QUEUED)
    one.stop()
    assert "GPU set aside" not in finetuned(home, "status")
    fake_nvml.set("gpus=1")
    two = daemon(environment=fake_nvml.environment())
    for name in ("x.jsonl", "y.jsonl"):
        assert two.job(name).outcome is Outcome.SUCCEEDED


@pytest.mark.usefixtures("slow")
def test_once_ends_where_no_gpu_is_left(daemon, drop, fake_nvml):
    fake_nvml.set("gpus=1")
    one = daemon("--once", environment=fake_nvml.environment())
    drop()
    eventually(lambda: one.jobs() and one.jobs()[0].progress.get("step", 0) > 2, why="some steps")
    fake_nvml.set("gpus=1", "0.lost=1")
    assert one.process.wait(60) == 1
    assert one.jobs()[0].state is State.QUEUED


@pytest.mark.usefixtures("slow")
def test_a_harmless_xid_stops_nothing(daemon, drop, fake_nvml):
    fake_nvml.set("gpus=1")
    one = daemon(environment=fake_nvml.environment())
    drop()
    eventually(lambda: one.jobs() and one.jobs()[0].progress.get("step", 0) > 2, why="some steps")
    fake_nvml.set("gpus=1", "0.xid=31")
    one.says("Xid 31")
    assert one.job("x.jsonl").attempt == 1
