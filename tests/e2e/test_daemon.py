"""A real daemon, real files, a real trainer on a tiny model; a stand-in for it where it is not the subject."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.jobs import Outcome, State

LONG = {"epochs": 30, "checkpoint_steps": 20}  # some seconds of work, so that there is a middle to disturb
LONG_STEPS = 180


@pytest.fixture
def drop(home, tiny_model):
    """Drop rows into the inbox as a file, by rename as careful programs do."""
    write_config(home, model=str(tiny_model))

    def put(name: str, rows=None, *, content: bytes | None = None):
        staged = home.root / f"staged-{Path(name).name}"
        if content is None:
            write_jsonl(staged, chat_rows(24) if rows is None else rows)
        else:
            staged.write_bytes(content)
        return staged.rename(home.inbox / name)

    return put


def reason_of(home, job) -> dict:
    return json.loads((home.failed / job.id / "reason.json").read_bytes())["reason"]


def test_a_dropped_file_becomes_an_adapter(home, daemon, drop, tiny_model):
    one = daemon()
    drop("numbers.jsonl")
    job = one.job("numbers.jsonl")
    assert job.outcome is Outcome.SUCCEEDED
    adapter = home.adapters / "numbers"
    assert (home.adapters / "latest").resolve() == adapter
    story = json.loads((adapter / "finetuned.json").read_bytes())
    assert story["job_id"] == job.id
    assert story["sha256"] == job.sha256
    assert story["data"]["rows"] == 24
    assert json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"] == str(tiny_model)
    assert {"tokenizer.json", "chat_template.jinja", "README.md", "adapter_model.safetensors"} <= {
        p.name for p in adapter.iterdir()
    }
    [archived] = home.archive.glob(f"*/{job.id}/numbers.jsonl")
    assert len(archived.read_text().splitlines()) == 24
    assert not list(home.inbox.iterdir())
    eventually(lambda: not list(home.jobs.iterdir()), why="nothing is left behind")
    assert "step 6 of 6" in home.job_log(job.id).read_text()
    one.says("event=finished")
    assert one.stop() == 0


def test_two_files_dropped_together_are_trained_one_after_the_other(home, daemon, drop, standin):
    drop("first.jsonl", chat_rows(12))
    drop("second.jsonl", chat_rows(12, start=50))
    one = daemon("--once")
    assert one.process.wait(120) == 0
    jobs = sorted(one.jobs(), key=lambda job: job.started_at)
    assert [job.outcome for job in jobs] == [Outcome.SUCCEEDED] * 2
    assert jobs[0].finished_at <= jobs[1].started_at
    assert {"first", "second"} <= {path.name for path in home.adapters.iterdir()}


def test_a_killed_trainer_is_resumed_and_its_job_finished(home, daemon, drop, tiny_model):
    write_config(home, model=str(tiny_model), **LONG)
    one = daemon()
    drop("long.jsonl")
    job = one.job("long.jsonl", state=State.RUNNING)
    eventually(lambda: one.jobs()[0].progress.get("checkpoint_step"), why="a checkpoint")
    os.kill(one.jobs()[0].trainer_pid, signal.SIGKILL)
    job = one.job("long.jsonl")
    assert job.outcome is Outcome.SUCCEEDED
    assert job.attempt == 2
    assert (job.rung["batch_size"], job.rung["gradient_accumulation"]) == (2, 2)  # it was memory, most likely
    assert "resumed after step" in home.job_log(job.id).read_text()
    assert job.progress["step"] == LONG_STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_daemon_that_ends_in_the_middle_goes_on_when_it_is_back(home, daemon, drop, tiny_model, number):
    write_config(home, model=str(tiny_model), **LONG)
    one = daemon()
    drop("long.jsonl")
    one.job("long.jsonl", state=State.RUNNING)
    eventually(lambda: one.jobs()[0].progress.get("step", 0) > 5, why="some steps")
    trainer = one.jobs()[0].trainer_pid
    status = one.stop(number)
    assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert Path(f"/proc/{trainer}").exists() == (number == signal.SIGKILL)
    two = daemon("--once")
    assert two.process.wait(120) == 0
    job = two.job("long.jsonl")
    assert (job.outcome, job.progress["step"], job.interruptions) == (Outcome.SUCCEEDED, LONG_STEPS, 0)
    if number == signal.SIGKILL:
        assert "trainer adopted" in two.log()
        assert job.attempt == 1
    else:
        assert "resumed after step" in home.job_log(job.id).read_text()


def warm_parents(one) -> list[int]:
    """The parents that were ready to be forked, oldest first."""
    return [int(pid) for pid in re.findall(r'"warm parent ready".* pid=(\d+)', one.log())]


def is_forked(pid: int) -> bool:
    return b"finetuned.trainer.warm" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_forked_trainers_train_and_whoever_is_killed_the_next_file_trains_too(home, daemon, drop, tiny_model):
    write_config(home, model=str(tiny_model), warm_trainer=True, profiles={"long": LONG})
    (home.inbox / "long").mkdir()
    one = daemon()
    eventually(lambda: warm_parents(one), seconds=120)
    for name in ("first.jsonl", "second.jsonl"):
        drop(name, chat_rows(8, start=len(name)))
        assert one.job(name).outcome is Outcome.SUCCEEDED
    assert "trainer starts cold" not in one.log()

    os.kill(warm_parents(one)[0], signal.SIGKILL)
    drop("third.jsonl")
    assert one.job("third.jsonl").outcome is Outcome.SUCCEEDED
    assert one.log().count("trainer starts cold") == one.log().count("it ended: killed by SIGKILL") == 1

    eventually(lambda: len(warm_parents(one)) == 2, seconds=120)
    drop("long/fourth.jsonl", chat_rows(24, start=100))
    trainer = eventually(lambda: one.job("fourth.jsonl", state=State.RUNNING).trainer_pid)
    assert is_forked(trainer)
    os.kill(warm_parents(one)[1], signal.SIGKILL)
    eventually(lambda: one.job("fourth.jsonl", state=State.RUNNING).progress.get("checkpoint_step"))
    os.kill(trainer, signal.SIGKILL)
    job = one.job("fourth.jsonl")
    assert (job.outcome, job.attempt, job.progress["step"]) == (Outcome.SUCCEEDED, 2, LONG_STEPS)
    assert (job.rung["batch_size"], job.rung["gradient_accumulation"]) == (2, 2)  # judged as a subprocess's end is
    assert "resumed after step" in home.job_log(job.id).read_text()

    write_config(home, model=str(tiny_model))
    eventually(lambda: one.log().count("config.json read again") == 1)
    drop("fifth.jsonl", chat_rows(4))
    assert one.job("fifth.jsonl").outcome is Outcome.SUCCEEDED
    assert one.log().count("trainer starts cold") == 2
    assert one.stop() == 0


def test_a_forked_trainer_that_outlives_its_daemon_is_adopted_by_the_next(home, daemon, drop, tiny_model):
    write_config(home, model=str(tiny_model), warm_trainer=True, **LONG)
    one = daemon()
    eventually(lambda: warm_parents(one), seconds=120)
    drop("long.jsonl")
    eventually(lambda: one.jobs() and one.jobs()[0].progress.get("step", 0) > 5, why="some steps")
    trainer = one.jobs()[0].trainer_pid
    assert is_forked(trainer)
    one.stop(signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{warm_parents(one)[0]}").exists(), why="the parent ends with its daemon")
    assert is_forked(trainer)
    two = daemon("--once")
    assert two.process.wait(120) == 0
    job = two.job("long.jsonl")
    assert (job.outcome, job.attempt, job.interruptions, job.progress["step"]) == (Outcome.SUCCEEDED, 1, 0, LONG_STEPS)
    assert "trainer adopted" in two.log()


BAD = {
    "binary.jsonl": (bytes(range(256)) * 8 + b"\n", "not_utf8"),
    "broken.jsonl": (b'{"messages": [\n{]\n', "not_json"),
    "shapes.jsonl": (b'[1, 2]\n{"foo": 1}\n', "data_type"),
    "empty.jsonl": (b"", "empty_file"),
    "cut.jsonl": (json.dumps(chat_rows(1)[0]).encode() + b'\n{"messages": [{"role": "us', "truncated_last_line"),
    "damaged.jsonl.gz": (gzip.compress(b"x" * 5000)[:-20], "damaged_archive"),
}


def test_bad_files_are_put_aside_with_a_reason_and_the_next_one_is_trained(home, daemon, drop, tiny_model):
    write_config(home, model=str(tiny_model), empty_seconds=0.5, truncated_seconds=0.5)
    one = daemon()
    for name, (content, _) in BAD.items():
        drop(name, content=content)
    drop("good.jsonl")
    assert one.job("good.jsonl").outcome is Outcome.SUCCEEDED
    for name, (content, code) in BAD.items():
        job = one.job(name)
        assert job.outcome is Outcome.FAILED
        reason = reason_of(home, job)
        assert reason["code"] == code, name
        assert reason["what"]
        assert name in reason["where"]
        assert reason["remedy"]
        assert (home.failed / job.id / name).read_bytes() == content
        assert job.id in one.log()
    assert one.process.poll() is None


def test_a_missing_model_fails_the_job_and_names_the_folder(home, daemon, drop):
    write_config(home, model="/nowhere/at-all")
    drop("x.jsonl")
    assert daemon("--once").process.wait(60) == 1
    [folder] = home.failed.iterdir()
    reason = json.loads((folder / "reason.json").read_bytes())["reason"]
    assert (reason["code"], reason["where"]) == ("bad_model", "/nowhere/at-all")


@pytest.fixture
def unwritable():
    """Make a folder unwritable even for root, until the test ends."""
    locked = []

    def lock(folder) -> None:
        if os.geteuid() != 0:
            folder.chmod(0o555)
        elif subprocess.run(["chattr", "+i", folder], check=False).returncode != 0:
            pytest.skip("this file system has no immutable folders, and root may write to any other")
        locked.append(folder)

    def unlock() -> None:
        while locked:
            folder = locked.pop()
            if os.geteuid() == 0:
                subprocess.run(["chattr", "-i", folder], check=True)
            else:
                folder.chmod(0o755)

    yield lock, unlock
    unlock()


def test_adapters_that_may_not_be_written_fail_the_job_before_it_is_trained(home, daemon, drop, unwritable, standin):
    lock, unlock = unwritable
    lock(home.adapters)
    one = daemon()
    drop("x.jsonl")
    job = one.job("x.jsonl")
    reason = reason_of(home, job)
    assert (reason["code"], reason["where"]) == ("bad_home", str(home.adapters))
    assert (home.failed / job.id / "x.jsonl").is_file()
    unlock()
    drop("y.jsonl", chat_rows(4))
    assert one.job("y.jsonl").outcome is Outcome.SUCCEEDED


def test_profiles_and_overrides_change_the_settings_of_their_files(home, daemon, drop, standin):
    write_config(home, profiles={"small": {"lora_r": 4, "max_steps": 2}})
    (home.inbox / "small").mkdir()
    drop("small/one.jsonl")
    (home.inbox / "two.config.json").write_text('{"lora_r": 2, "max_steps": 1}')
    drop("two.jsonl")
    (home.inbox / "three.config.json").write_text('{"lora_r": "many", "eval_file": "/etc/passwd"}')
    drop("three.jsonl")
    one = daemon("--once")
    assert one.process.wait(120) == 1
    settings = [one.job(name).settings for name in ("one.jsonl", "two.jsonl")]
    assert [(found["lora_r"], found["max_steps"]) for found in settings] == [(4, 2), (2, 1)]
    assert list(home.archive.glob("*/two-*/overrides.json"))
    reason = reason_of(home, one.job("three.jsonl"))
    assert reason["code"] == "bad_settings"
    assert "three.config.json" in reason["where"]
    assert list(home.inbox.iterdir()) == [home.inbox / "small"]


def test_an_edit_of_config_json_counts_from_the_next_job_and_a_broken_one_is_refused(
    home, daemon, drop, tiny_model, standin
):
    one = daemon()
    one.says("finetuned starts")
    write_config(home, model=str(tiny_model), lora_r=3, max_steps=1)
    one.says("config.json read again")
    home.config_file.write_text('{"lora_r": 0, "colour": "red"}')
    one.says("config.json not taken over")
    assert "lora_r: must be at least 1" in one.log()
    assert "colour: no such setting" in one.log()
    drop("x.jsonl")
    assert one.job("x.jsonl").settings["lora_r"] == 3


def test_the_same_file_is_not_trained_twice(home, daemon, drop, standin):
    one = daemon()
    drop("x.jsonl")
    first = one.job("x.jsonl")
    drop("again.jsonl")
    second = one.job("again.jsonl")
    assert second.duplicate_of == first.id
    assert second.attempt == 0
    assert list(home.archive.glob(f"*/{second.id}/again.jsonl"))


def test_an_inbox_deleted_and_made_again_is_watched_again(home, daemon, drop, standin):
    one = daemon()
    one.says("finetuned starts")
    home.inbox.rmdir()
    eventually(home.inbox.is_dir, why="the daemon makes it again")
    drop("x.jsonl", chat_rows(4))
    assert one.job("x.jsonl").outcome is Outcome.SUCCEEDED


def test_gpu_figures_of_a_job_are_in_the_ledger_and_in_the_log(home, daemon, drop, fake_nvml, standin):
    from finetuned.ledger import Ledger

    standin(seconds=0.1)
    write_config(home, gpu_sample_seconds=1)
    fake_nvml.set("gpus=1", "0.utilization=93", "0.power=310000")
    one = daemon(environment=fake_nvml.environment())
    drop("x.jsonl")
    job = one.job("x.jsonl")
    ledger = Ledger.open_to_read(home.ledger)
    samples = list(ledger.gpu_samples(job.id))
    ledger.close()
    assert samples
    assert samples[0]["utilization"] == 93
    one.says("93% util")


def test_without_a_gpu_it_is_said_once(home, daemon, drop, standin):
    one = daemon()
    drop("x.jsonl", chat_rows(4))
    one.job("x.jsonl")
    assert one.log().count("training runs on the CPU") == 1


def test_systemd_hears_ready_status_watchdog_and_stopping(home, daemon, drop):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        address = home.root / "notify"
        inbox.bind(str(address))
        inbox.settimeout(60)
        one = daemon(environment={"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "2000000"})
        assert b"READY=1" in inbox.recv(4096)
        heard = [inbox.recv(4096) for _ in range(3)]
        assert any(b"WATCHDOG=1" in message for message in heard)
        one.process.send_signal(signal.SIGTERM)
        eventually(lambda: b"STOPPING=1" in inbox.recv(4096), why="STOPPING")
        assert one.process.wait(60) == 0


def test_sighup_reads_config_json_again(home, daemon):
    one = daemon()
    one.says("finetuned starts")
    one.process.send_signal(signal.SIGHUP)
    one.says("config.json read again")


def test_status_shows_queue_results_and_reasons(home, daemon, drop):
    drop("good.jsonl", chat_rows(4))
    drop("bad.jsonl", content=b"no\n")
    assert daemon("--once").process.wait(60) == 1

    def status(*options: str) -> str:
        command = [sys.executable, "-m", "finetuned", "status", "--base-dir", str(home.root), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    text = status()
    assert "not running" in text
    assert re.search(r"adapters/good \(training loss \d\.\d{4}, ", text)
    assert "bad.jsonl:1" in text
    facts = json.loads(status("--json"))
    assert {job["outcome"] for job in facts["finished"]} == {"succeeded", "failed"}


def test_what_lies_in_the_inbox_and_a_broken_config_are_in_the_status(home, drop):
    (home.inbox / "link.jsonl").symlink_to("/etc/passwd")
    (home.inbox / "notes.txt").write_text("hello")
    drop("empty.jsonl", content=b"")
    home.config_file.write_text("{broken")
    command = [sys.executable, "-m", "finetuned", "status", "--base-dir", str(home.root)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "config.json is broken" in text
    assert "link.jsonl is a symbolic link. Put the file itself there." in text
    assert "notes.txt is not a training file" in text
    assert "empty.jsonl is empty" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="an immutable file needs root to make")
def test_a_file_that_cannot_be_moved_does_not_hold_up_the_others(home, daemon, drop, standin):
    stuck = drop("a-stuck.jsonl")
    if subprocess.run(["chattr", "+i", stuck], check=False).returncode != 0:
        pytest.skip("this file system has no immutable files")
    try:
        one = daemon()
        drop("b-free.jsonl", chat_rows(4))
        assert one.job("b-free.jsonl").outcome is Outcome.SUCCEEDED
        one.says("cannot be taken")
        assert stuck.exists()
    finally:
        subprocess.run(["chattr", "-i", stuck], check=True)


def test_the_repository_root_is_a_base_directory(tmp_path, tiny_model):
    """Clone, drop, run."""
    repository = Path(__file__).parents[2]
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("inbox", "adapters", "archive", "logs"):
        (clone / name).mkdir()
        shutil.copy(repository / name / ".gitkeep", clone / name)
    for name in ("config.json", "config.schema.json"):
        shutil.copy(repository / name, clone / name)
    settings = json.loads((clone / "config.json").read_text())
    (clone / "config.json").write_text(json.dumps({**settings, "model": str(tiny_model), "max_steps": 2}))
    write_jsonl(clone / "inbox" / "x.jsonl", chat_rows(8))
    done = subprocess.run([sys.executable, "-m", "finetuned", "run", "--once"], cwd=clone, timeout=120, check=False)
    assert done.returncode == 0
    assert (clone / "adapters" / "x" / "adapter_model.safetensors").is_file()
