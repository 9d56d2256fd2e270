"""A real daemon whose jobs run on a real Ray and a real Slurm. The trainer is the real one where its weights matter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Daemon, chat_rows, eventually, make_home, write_config, write_jsonl
from finetuned.jobs import Outcome, State
from finetuned.lifesigns import exit_code, locked, signed
from fixtures_engines import RayEngine, SlurmEngine
from fixtures_ray import RayCluster
from standin_trainer import safetensors, weights_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", params=["ray", "slurm"])
def shared_engine(request):
    """An engine that the tests of this module share."""
    if request.param == "slurm":
        yield SlurmEngine(request.getfixturevalue("slurm_cluster"))
        return
    cluster = RayCluster()
    try:
        cluster.start()
        yield RayEngine(cluster)
    finally:
        cluster.discard()


@pytest.fixture
def engine(shared_engine, monkeypatch):
    """The same without a job."""
    if shared_engine.name == "slurm":
        monkeypatch.setenv("SLURM_CONF", str(shared_engine.cluster.conf))
    shared_engine.ready()
    yield shared_engine
    shared_engine.empty()


@pytest.fixture
def config(home, engine, standin):
    """Have jobs run there, by a stand-in with these ways."""

    def write(*, profiles=None, remote_jobs=16, most_crashes=3, **ways) -> None:
        where = {"profiles": profiles} if profiles else {"launcher": engine.name}
        where |= engine.settings(**ways)
        write_config(home, **where, remote_jobs=remote_jobs, most_crashes=most_crashes)

    return write


@pytest.fixture
def drop(home):
    dropped: list[str] = []

    def put(name: str, count: int = 20) -> None:
        dropped.append(name)  # no two files alike, or the second would not be trained
        staged = write_jsonl(home.root / "staged", chat_rows(count, start=1000 * len(dropped)))
        (home.inbox / name).parent.mkdir(exist_ok=True)
        staged.rename(home.inbox / name)

    return put


def finetuned(home, *words: str) -> str:
    """Run a verb; its output."""
    command = [sys.executable, "-m", "finetuned", words[0], "--base-dir", str(home.root), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def undisturbed(home, name: str = "x.jsonl") -> bool:
    """Whether an adapter is what a training without any disturbance gives: no step lost and none twice."""
    [archived] = home.archive.glob(f"20*/*/{name}")
    rows = archived.read_bytes().splitlines()
    weights = home.adapters / name.removesuffix(".jsonl") / "adapter_model.safetensors"
    return weights.read_bytes() == safetensors(weights_of(rows, len(rows)))


def said_by_trainers(home) -> list[str]:
    with sqlite3.connect(home.ledger) as ledger:
        return [row[0] for row in ledger.execute("SELECT message FROM events ORDER BY id")]


def forget_id(home, other: str = "") -> None:
    """Leave the ledger as if the daemon had died before it noted the id."""
    with sqlite3.connect(home.ledger) as ledger:
        ledger.execute("UPDATE jobs SET trainer_id = ?", (other,))


def resumed(home) -> bool:
    return any(said.startswith("resumed after step") for said in said_by_trainers(home))


def begun(one: Daemon, *, step: int = 6, name: str = "x.jsonl"):
    """Wait until a job has trained so many steps, of which five are in a checkpoint; give it."""

    def found():
        return next((j for j in one.jobs() if j.name == os.fsencode(name) and j.progress.get("step", 0) >= step), None)

    return eventually(found, why=f"step {step} of {name}\n{one.log()[-3000:]}")


@pytest.fixture(scope="module")
def weights_from_here(tiny_model, tmp_path_factory) -> bytes:
    """What this machine makes of a file."""
    home = make_home(tmp_path_factory.mktemp("here") / "base")
    return really_train(home, tiny_model, lambda *options: Daemon(home, *options))


def really_train(home, model: Path, daemon, **settings) -> bytes:
    write_config(home, model=str(model), **settings)
    write_jsonl(home.inbox / "x.jsonl", chat_rows(24))
    one = daemon("--once")
    assert one.process.wait(150) == 0, one.log()[-3000:]
    return (home.adapters / "x" / "adapter_model.safetensors").read_bytes()


def test_the_real_trainer_makes_the_same_weights_there_as_here(home, daemon, engine, tiny_model, weights_from_here):
    there = really_train(home, tiny_model, daemon, launcher=engine.name, **engine.settings())
    assert there == weights_from_here
    assert engine.at_work() == []


def test_a_cancelled_job_is_gone_there_and_can_be_taken_up_from_its_checkpoint(home, daemon, engine, config, drop):
    config(seconds=0.2)
    one = daemon()
    drop("x.jsonl", 60)
    job = begun(one)
    assert engine.at_work() == [job.trainer_id]
    finetuned(home, "cancel", job.id)
    assert one.job("x.jsonl").outcome is Outcome.CANCELLED
    assert (home.failed / job.id / "x.jsonl").exists()
    assert engine.at_work() == []
    finetuned(home, "retry", job.id)
    eventually(lambda: one.jobs()[0].outcome is Outcome.SUCCEEDED, why="the second try")
    assert resumed(home)
    assert undisturbed(home)


def test_a_preempted_job_was_interrupted_and_goes_on_from_its_checkpoint(home, daemon, engine, config, drop):
    config(seconds=0.2)
    one = daemon()
    drop("x.jsonl")
    engine.take(begun(one).trainer_id)
    job = one.job("x.jsonl")
    assert (job.outcome, job.attempt, job.retries) == (Outcome.SUCCEEDED, 2, 0)
    assert job.rung["batch_size"] == 4  # it was not for memory
    assert any("interrupted" in said for said in said_by_trainers(home))
    assert resumed(home)
    assert undisturbed(home)


def test_a_job_of_which_the_engine_loses_sight_is_trained_once_to_the_end(home, daemon, engine, config, drop):
    config(seconds=0.2)
    one = daemon()
    drop("x.jsonl")
    begun(one)
    engine.lose_node()
    begun(one, step=8)
    engine.mend_node()
    job = one.job("x.jsonl")
    assert (job.outcome, job.retries) == (Outcome.SUCCEEDED, 0)
    assert undisturbed(home)


def test_while_the_engine_is_away_its_jobs_wait_and_say_so_and_others_go_on(home, daemon, engine, config, drop):
    config(profiles={"there": {"launcher": engine.name}}, seconds=0.3)
    one = daemon()
    drop("there/x.jsonl", 40)
    begun(one)
    engine.go_away()
    drop("there/late.jsonl", 3)
    drop("here.jsonl", 3)
    assert one.job("here.jsonl").outcome is Outcome.SUCCEEDED
    eventually(lambda: engine.says_why(finetuned(home, "status")), why="a reason")
    assert one.job("x.jsonl", state=State.RUNNING).attempt == 1
    engine.come_back()
    for name in ("x.jsonl", "late.jsonl"):
        job = one.job(name)
        assert (job.outcome, job.interruptions, job.retries) == (Outcome.SUCCEEDED, 0, 0)
        assert undisturbed(home, name)


@pytest.mark.parametrize("ended", [False, True], ids=["stopped, at work", "killed, ended since"])
def test_the_next_daemon_finds_its_job_by_the_id(home, daemon, config, drop, ended):
    config(seconds=0.05 if ended else 0.2)
    one = daemon()
    drop("x.jsonl")
    job = begun(one, step=2)
    one.stop(signal.SIGKILL if ended else signal.SIGTERM, seconds=10)
    if ended:
        eventually(lambda: exit_code(home.job(job.id), 1) is not None, why="its end")
    else:
        one.says("it goes on without a daemon")
        assert locked(home.job(job.id))
    two = daemon()
    two.says("trainer found again")
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 1, 0)
    said = said_by_trainers(home)
    assert [line for line in said if line.startswith("step ")] == [f"step {n} of 20" for n in range(1, 21)]
    assert undisturbed(home)


def test_a_job_whose_id_the_daemon_had_no_time_to_note_is_found_too(home, daemon, engine, config, drop):
    config(seconds=0.2)
    one = daemon()
    drop("x.jsonl")
    trainer = begun(one, step=2).trainer_id
    one.stop(signal.SIGKILL)
    forget_id(home)
    two = daemon()
    eventually(lambda: two.jobs()[0].trainer_id == trainer, why="its id")
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 1, 0)
    assert undisturbed(home)


@pytest.mark.parametrize("shared_engine", ["slurm"], indirect=True)
def test_a_daemon_that_dies_as_its_job_is_submitted_has_submitted_it_once(home, daemon, engine, config, drop):
    config(seconds=0.2)
    deadly = home.root / "bin/sbatch"
    deadly.parent.mkdir()
    deadly.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\nkill -KILL $PPID\n')
    deadly.chmod(0o755)
    one = daemon(environment={"PATH": f"{deadly.parent}:{os.environ['PATH']}"})
    drop("x.jsonl")
    assert one.process.wait(60) == -signal.SIGKILL
    assert one.jobs()[0].trainer_id == ""
    [trainer] = engine.at_work()
    two = daemon()
    eventually(lambda: two.jobs()[0].trainer_id == trainer, why="its id")
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 1, 0)
    assert undisturbed(home)


@pytest.mark.parametrize("shared_engine", ["slurm"], indirect=True)
def test_one_that_cannot_be_found_as_the_engine_is_away_keeps_no_other_job_waiting(home, daemon, engine, config, drop):
    config(profiles={"there": {"launcher": engine.name}}, seconds=0.2)
    one = daemon()
    drop("there/x.jsonl")
    begun(one)
    one.stop(signal.SIGKILL)
    forget_id(home)
    engine.go_away()
    two = daemon()
    drop("here.jsonl", 3)
    assert two.job("here.jsonl").outcome is Outcome.SUCCEEDED
    assert two.job("x.jsonl", state=State.RUNNING).attempt == 1
    engine.come_back()
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 1, 0)
    assert undisturbed(home)


def test_one_that_the_engine_knows_no_more_was_interrupted_and_this_machine_is_not_to_blame(
    home, daemon, engine, config, drop
):
    config(seconds=0.2, most_crashes=1)
    one = daemon()
    drop("x.jsonl")
    job = begun(one)
    one.stop(signal.SIGKILL)
    os.kill(signed(home.job(job.id)).pid, signal.SIGKILL)
    forget_id(home, "999999")
    two = daemon()
    job = two.job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 1)
    assert resumed(home)
    assert undisturbed(home)


@pytest.mark.parametrize("shared_engine", ["slurm"], indirect=True)
def test_a_job_that_slurm_puts_back_goes_on_in_the_same_attempt(home, daemon, engine, config, drop):
    config(seconds=0.2, partition="low")
    one = daemon()
    drop("x.jsonl")
    job = begun(one)
    trainer = job.trainer_id
    engine.cluster.run("scontrol", "requeue", trainer)
    eventually(lambda: exit_code(home.job(job.id), 1) == 130, why="its checkpoint")
    engine.cluster.run_again(trainer)
    job = one.job("x.jsonl")
    assert (job.outcome, job.attempt, job.trainer_id) == (Outcome.SUCCEEDED, 1, trainer)
    assert resumed(home)
    assert undisturbed(home)


def test_a_job_that_is_preempted_while_no_daemon_is_there_goes_on_under_the_next(home, daemon, engine, config, drop):
    config(seconds=0.2)
    one = daemon()
    drop("x.jsonl")
    job = begun(one)
    one.stop(signal.SIGKILL)
    engine.take(job.trainer_id)
    eventually(lambda: exit_code(home.job(job.id), 1) == 130, why="its checkpoint")
    job = daemon().job("x.jsonl")
    assert (job.outcome, job.attempt, job.interruptions) == (Outcome.SUCCEEDED, 2, 0)
    assert resumed(home)
    assert undisturbed(home)


def test_pause_frees_the_engine_and_resume_goes_on_from_that_step(home, daemon, engine, config, drop):
    config(seconds=0.2)
    one = daemon()
    drop("x.jsonl", 80)  # a verb may take seconds on a busy machine
    begun(one)
    finetuned(home, "pause")
    job = one.job("x.jsonl", state=State.QUEUED)
    assert job.trainer_id == ""
    eventually(lambda: engine.at_work() == [], why="an engine without jobs")
    finetuned(home, "resume")
    assert one.job("x.jsonl").outcome is Outcome.SUCCEEDED
    assert f"resumed after step {job.progress['checkpoint_step']} of 80" in said_by_trainers(home)
    assert undisturbed(home)


def test_what_the_engine_refuses_is_told_in_its_words_with_a_remedy(home, daemon, engine, config, drop):
    config(wrong=True)
    one = daemon()
    drop("x.jsonl")
    if engine.name == "ray":  # a token that is wrong is no fault of the jobs that wait
        eventually(lambda: engine.refusal[0] in one.job("x.jsonl", state=State.QUEUED).progress.get("waits_for", ""))
        config()
        assert one.job("x.jsonl").outcome is Outcome.SUCCEEDED
        return
    job = one.job("x.jsonl")
    assert job.outcome is Outcome.FAILED
    reason = json.loads((home.failed / job.id / "reason.json").read_bytes())["reason"]
    what, remedy = engine.refusal
    assert what in reason["what"]
    assert remedy in reason["remedy"]


def test_a_profiles_jobs_are_there_and_no_more_at_once_than_may_be(home, daemon, engine, config, drop):
    config(profiles={"there": {"launcher": engine.name}}, remote_jobs=2, seconds=0.1)
    one = daemon()
    names = ("a.jsonl", "b.jsonl", "c.jsonl")
    for name in names:
        drop(f"there/{name}", 40)
    eventually(lambda: len(engine.at_work()) == 2, why="two jobs")
    third = one.job("c.jsonl", state=State.QUEUED)
    eventually(lambda: f"2 jobs are with {engine.name} already" in finetuned(home, "status"), why="a reason")
    drop("here.jsonl", 3)
    assert one.job("here.jsonl").progress["devices"]
    jobs = [one.job(name) for name in names]
    assert all(job.outcome is Outcome.SUCCEEDED for job in jobs)
    assert all(undisturbed(home, name) for name in names)
    assert third.id == jobs[2].id
    assert jobs[2].started_at >= min(job.finished_at for job in jobs[:2])
