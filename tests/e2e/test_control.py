"""Each control verb against a real running daemon, whose trainer computes nothing."""

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


def finetuned(home, *words: str, code: int = 0) -> str:
    """Run a verb; its output, errors included."""
    command = [sys.executable, "-m", "finetuned", words[0], "--base-dir", str(home.root), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def drop(home):
    dropped: list[str] = []

    def put(name: str, count: int = 20):
        dropped.append(name)  # no two files alike, or the second would not be trained
        rows = chat_rows(count, start=1000 * len(dropped))
        staged = write_jsonl(home.root / f"staged-{Path(name).name}", rows)
        return staged.rename(home.inbox / name)

    return put


def undisturbed(home, name: str, adapter: str | None = None) -> bool:
    """Whether an adapter is what a training without any disturbance gives: no step lost and none twice."""
    [archived] = home.archive.glob(f"20*/*/{name}")
    rows = archived.read_bytes().splitlines()
    weights = home.adapters / (adapter or name.removesuffix(".jsonl")) / "adapter_model.safetensors"
    return weights.read_bytes() == safetensors(weights_of(rows, len(rows)))


def said_by_trainers(home) -> list[str]:
    with sqlite3.connect(home.ledger) as ledger:
        return [row[0] for row in ledger.execute("SELECT message FROM events ORDER BY id")]


def in_the_middle(one, name: str) -> None:
    eventually(
        lambda: any(j.name == os.fsencode(name) and j.progress.get("step", 0) > 2 for j in one.jobs()), why="some steps"
    )


def test_pause_frees_the_gpu_and_resume_goes_on_from_that_step(home, daemon, drop, standin):
    standin(seconds=0.1)
    one = daemon()
    drop("long.jsonl")
    in_the_middle(one, "long.jsonl")
    finetuned(home, "pause")
    job = one.job("long.jsonl", state=State.QUEUED)
    step = job.progress["checkpoint_step"]
    assert not job.trainer_pid
    drop("other.jsonl", 3)
    one.job("other.jsonl", state=State.QUEUED)  # taken, and not started
    assert "paused" in finetuned(home, "status")
    finetuned(home, "resume")
    assert one.job("long.jsonl").outcome is Outcome.SUCCEEDED
    assert f"resumed after step {step} of 20" in said_by_trainers(home)
    assert undisturbed(home, "long.jsonl")
    assert one.job("other.jsonl").outcome is Outcome.SUCCEEDED


def test_a_pause_outlives_the_daemon(home, daemon, drop, standin):
    one = daemon()
    one.says("finetuned starts")
    finetuned(home, "pause")
    one.says("paused")
    one.stop(signal.SIGKILL)
    two = daemon()
    drop("a.jsonl", 3)
    two.job("a.jsonl", state=State.QUEUED)
    assert json.loads(finetuned(home, "status", "--json"))["paused"]
    finetuned(home, "resume")
    two.job("a.jsonl")


def test_a_trainer_that_does_not_hear_is_off_the_gpu_after_the_grace(home, daemon, drop, standin):
    standin(seconds=0.1, deaf=1)
    write_config(home, pause_grace=1)
    one = daemon()
    drop("deaf.jsonl", 100)
    in_the_middle(one, "deaf.jsonl")
    finetuned(home, "pause")
    job = one.job("deaf.jsonl", state=State.QUEUED)
    assert job.retries == job.interruptions == 0


def test_orders_given_while_the_daemon_is_down_take_effect_when_it_is_back(home, daemon, drop, standin):
    one = daemon()
    one.says("finetuned starts")
    finetuned(home, "pause")
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        drop(name, 3)
        job = one.job(name, state=State.QUEUED)
    one.stop()
    a, b, c = (job.id for job in one.jobs())
    said = finetuned(home, "cancel", b)
    assert "takes effect when it starts" in said
    finetuned(home, "move", c, "--first")
    finetuned(home, "resume")
    assert "asked for" in finetuned(home, "status")
    two = daemon("--once")
    assert two.process.wait(60) == 0
    jobs = {job.id: job for job in two.jobs()}
    assert jobs[b].outcome is Outcome.CANCELLED
    assert jobs[c].finished_at < jobs[a].started_at
    assert job.id == c


def test_a_waiting_job_is_put_right_before_another_one(home, daemon, drop, standin):
    one = daemon()
    finetuned(home, "pause")
    ids = {}
    for name in ("a", "b", "c", "d"):
        drop(f"{name}.jsonl", 3)
        ids[name] = one.job(f"{name}.jsonl", state=State.QUEUED).id

    def order() -> str:
        queue = json.loads(finetuned(home, "status", "--json"))["queue"]
        return "".join(job["file"][0] for job in queue)

    assert order() == "abcd"
    for moved, other, then in (("d", "b", "adbc"), ("c", "a", "cadb"), ("c", "b", "adcb"), ("a", "b", "dcab")):
        said = finetuned(home, "move", ids[moved], "--before", ids[other])
        assert said.strip() == f"{ids[moved]} comes before {ids[other]}"
        eventually(lambda then=then: order() == then, why=then)
    finetuned(home, "move", ids["a"], "--before", ids["a"])
    assert "there is no job" in finetuned(home, "move", ids["a"], "--before", "none-1", code=78)
    finetuned(home, "move", ids["a"], "--before", ids["b"], "--first", code=2)
    places = [json.loads(home.job(ids[name]).spec.read_bytes())["place"] for name in "dcab"]
    assert places == sorted(set(places))  # the folders know it too, should the ledger be lost


def test_a_waiting_job_is_cancelled_and_its_file_kept(home, daemon, drop, standin):
    one = daemon()
    finetuned(home, "pause")
    drop("a.jsonl", 3)
    job = one.job("a.jsonl", state=State.QUEUED)
    finetuned(home, "cancel", "a-")  # the beginning of its id
    job = one.job("a.jsonl")
    assert job.outcome is Outcome.CANCELLED
    folder = home.failed / job.id
    assert len((folder / "a.jsonl").read_text().splitlines()) == 3
    assert json.loads((folder / "reason.json").read_bytes())["outcome"] == "cancelled"
    assert f"finetuned retry {job.id}" in finetuned(home, "status")


def test_a_running_job_is_cancelled_and_can_be_taken_up_from_its_checkpoint(home, daemon, drop, standin):
    standin(seconds=0.1)
    one = daemon()
    drop("long.jsonl")
    in_the_middle(one, "long.jsonl")
    assert "will be cancelled when its trainer has ended" in finetuned(home, "cancel", "long")
    job = one.job("long.jsonl")
    assert job.outcome is Outcome.CANCELLED
    assert "goes on from its checkpoint" not in one.log()
    assert (home.failed / job.id / "checkpoints").is_dir()
    step = job.progress["checkpoint_step"]
    finetuned(home, "retry", job.id)
    eventually(lambda: one.jobs()[0].outcome is Outcome.SUCCEEDED, why="the second try")
    assert undisturbed(home, "long.jsonl")
    assert not (home.failed / job.id).exists()
    assert f"resumed after step {step} of 20" in said_by_trainers(home)


def test_a_failed_job_is_tried_again_with_the_settings_of_now(home, daemon, drop, standin):
    standin(end=65)
    one = daemon()
    drop("bad.jsonl", 4)
    job = one.job("bad.jsonl")
    assert job.outcome is Outcome.FAILED
    one.stop()
    write_config(home, epochs=3)
    os.environ.pop("STANDIN_END")
    two = daemon()
    finetuned(home, "retry", job.id)
    eventually(lambda: two.jobs()[0].outcome is Outcome.SUCCEEDED, why="the second try")
    job = two.job("bad.jsonl")
    assert job.settings["epochs"] == 3
    assert job.progress["step"] == 12
    assert job.reason is None


def test_what_cannot_be_done_is_said_at_once(home, daemon, drop, standin):
    one = daemon()
    drop("a.jsonl", 3)
    drop("ab.jsonl", 3)
    job = one.job("a.jsonl")
    one.job("ab.jsonl")
    assert "there is no job nothing" in finetuned(home, "cancel", "nothing", code=78)
    assert "has ended" in finetuned(home, "cancel", job.id, code=78)
    assert "has succeeded" in finetuned(home, "retry", job.id, code=78)
    assert "Write more of it" in finetuned(home, "cancel", "a", code=78)
    finetuned(home, "pause")
    drop("abc.jsonl", 3)
    waiting = one.job("abc.jsonl", state=State.QUEUED)
    assert waiting.id in finetuned(home, "cancel", "ab"), "the other one has ended"
    assert "has ended" in finetuned(home, "move", job.id, "--first", code=78)
    assert "--first or --last" in finetuned(home, "move", job.id, code=2)
    assert one.process.poll() is None


def test_a_retry_of_settings_that_are_broken_now_is_refused(home, daemon, drop, standin):
    standin(end=65)
    one = daemon()
    drop("bad.jsonl", 4)
    job = one.job("bad.jsonl")
    home.config_file.write_text('{"epochs": -1}')
    assert "epochs" in finetuned(home, "retry", job.id, code=78)
    assert (home.failed / job.id / "bad.jsonl").exists()


def test_profiles_give_priorities(home, daemon, drop, standin):
    write_config(home, profiles={"high": {"priority": 10}, "low": {"priority": -10}})
    for profile in ("high", "low"):
        (home.inbox / profile).mkdir()
    finetuned(home, "pause")
    one = daemon()
    for name in ("low/l.jsonl", "n.jsonl", "high/h.jsonl"):
        drop(name, 3)
        one.job(Path(name).name, state=State.QUEUED)
    queue = [job["id"][0] for job in json.loads(finetuned(home, "status", "--json"))["queue"]]
    assert queue == ["h", "n", "l"]
    finetuned(home, "move", "l-", "--first")
    finetuned(home, "move", "h-", "--last")
    finetuned(home, "resume")
    jobs = {job.name: job for job in (one.job(name) for name in ("l.jsonl", "n.jsonl", "h.jsonl"))}
    assert sorted(jobs, key=lambda name: jobs[name].started_at) == [b"l.jsonl", b"n.jsonl", b"h.jsonl"]


def test_add_drops_a_file_with_its_settings_and_never_over_another(home, daemon, standin, tmp_path):
    write_config(home, profiles={"night": {"epochs": 2}})
    finetuned(home, "pause")
    one = daemon()
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(3))
    first = finetuned(home, "add", str(file), "--set", "epochs=3", "--set", "system_prompt=Be kind").strip()
    assert first == str(home.inbox / "x.jsonl")
    one.job("x.jsonl", state=State.QUEUED)
    finetuned(home, "add", str(file), "--profile", "night")
    jobs = eventually(lambda: (found := one.jobs()) and len(found) == 2 and found, why="both")
    settings = {job.profile: job.settings for job in jobs}
    assert settings[""]["epochs"] == 3
    assert settings[""]["system_prompt"] == "Be kind"
    assert settings["night"]["epochs"] == 2
    one.stop()
    places = [finetuned(home, "add", str(file)).strip() for _ in range(3)]
    assert [Path(place).name for place in places] == ["x.jsonl", "x-2.jsonl", "x-3.jsonl"]


def test_add_takes_several_files_and_says_which_of_them_it_refuses(home, tmp_path):
    good = [write_jsonl(tmp_path / name, chat_rows(3)) for name in ("a.jsonl", "c.jsonl")]
    (tmp_path / "b.txt").write_text("no")
    files = [str(good[0]), str(tmp_path / "b.txt"), str(good[1])]
    said = finetuned(home, "add", *files, "--set", "epochs=1", code=78)
    assert f"{tmp_path / 'b.txt'}: is not a training file. finetuned takes" in said
    names = {path.name for path in home.inbox.iterdir()}
    assert names == {"a.jsonl", "a.config.json", "c.jsonl", "c.config.json"}
    assert "belongs to one file" in finetuned(home, "add", *files, "--eval-file", files[0], code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "epochs=-1"], "epochs"),
        (["--set", "epoch=1"], "did you mean epochs"),
        (["--set", "epochs"], "key=value"),
        (["--set", "predictions=1", "--set", "predictions.samples=2"], "a value already"),
        (["--set", "model=/etc"], "may not name a folder"),
        (["--set", "trust_remote_code=true"], "may not set trust_remote_code"),
        (["--set", "priority=9"], "may not set priority"),
        (["--profile", "none"], "no profile"),
    ],
)
def test_add_refuses_what_the_daemon_would(home, tmp_path, words, said):
    file = write_jsonl(tmp_path / "x.jsonl", chat_rows(3))
    assert said in finetuned(home, "add", str(file), *words, code=78)
    assert not list(home.inbox.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", ".hidden.jsonl", "x.jsonl.part", "x.config.json"])
def test_add_takes_training_files_only(home, tmp_path, name):
    other = tmp_path / name
    other.write_text("no")
    assert "is not a training file" in finetuned(home, "add", str(other), code=78)


def test_add_says_what_is_wrong_with_an_empty_file_and_with_a_table(home, tmp_path):
    empty, table, rows = tmp_path / "x.jsonl", tmp_path / "x.csv", tmp_path / "y.jsonl"
    empty.touch()
    table.write_text("prompt,completion\n1,2\n")
    rows.write_text("{}\n")
    assert "x.jsonl: the file is empty. Fill it" in finetuned(home, "add", str(empty), code=78)
    assert "the file is empty" in finetuned(home, "add", str(rows), "--eval-file", str(empty), code=78)
    assert "csv.DictReader" in finetuned(home, "add", str(table), code=78)
    assert not list(home.inbox.iterdir())


def test_once_ends_with_an_error_where_the_queue_is_paused(home, daemon, drop, standin):
    finetuned(home, "pause")
    drop("x.jsonl", 3)
    one = daemon("--once")
    assert one.process.wait(60) == 1
    one.says("the queue is paused")
    finetuned(home, "resume")
    assert daemon("--once").process.wait(60) == 0
    finetuned(home, "pause")
    assert daemon("--once").process.wait(60) == 0, "there is nothing left to do"


def test_a_pause_file_of_anything_is_a_pause(home, daemon, drop, standin):
    home.paused.write_bytes(b"\xff by hand")
    one = daemon()
    drop("x.jsonl", 3)
    one.job("x.jsonl", state=State.QUEUED)
    assert "by hand" in finetuned(home, "status")


def test_status_watch_shows_it_again_and_again(home):
    command = [sys.executable, "-m", "finetuned", "status", "--watch", "--json", "--base-dir", str(home.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert [json.loads(process.stdout.readline())["base_dir"] for _ in range(2)] == [str(home.root)] * 2
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 1, -signal.SIGINT)


def test_a_broken_file_is_told_while_another_trains_and_tried_again_once_it_is_mended(home, daemon, drop, tiny_model):
    write_config(home, model=str(tiny_model), epochs=1_000_000, learning_rate=1e-7)
    one = daemon()
    drop("long.jsonl")
    one.job("long.jsonl", state=State.RUNNING)
    drop("good.jsonl", 4)
    (home.inbox / "half.eval.jsonl").write_text('{"messages": []}\n')
    drop("half.jsonl", 4)
    (home.inbox / "bad.jsonl").write_text('{"messages": []}\n')
    bad, half = one.job("bad.jsonl"), one.job("half.jsonl")
    assert bad.outcome is half.outcome is Outcome.FAILED
    assert (bad.reason["code"], bad.reason["where"]) == ("missing_messages_list", "bad.jsonl:1")
    assert half.reason["where"] == "half.eval.jsonl:1"

    write_jsonl(home.failed / bad.id / "bad.jsonl", chat_rows(4, start=5000))
    finetuned(home, "retry", bad.id)
    (home.inbox / "worse.jsonl").write_text("no JSON\n")
    assert one.job("worse.jsonl").outcome is Outcome.FAILED  # it was looked at after the others
    assert {os.fsdecode(job.name): job.state for job in one.jobs() if job.outcome is None} == {
        "long.jsonl": State.RUNNING,
        "good.jsonl": State.QUEUED,
        "bad.jsonl": State.QUEUED,
    }
