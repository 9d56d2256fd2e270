"""Recipe rft as its users meet it: a real daemon and a real trainer, on a model that draws bytes at random."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from conftest import eventually, write_config, write_jsonl
from finetuned.control import order
from finetuned.jobs import Outcome
from finetuned.live import sentence
from finetuned.spool.orders import Verb

ROWS = [
    {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": str(n % 10)}]}
    for n in range(12)
]
RFT = {"samples": 6, "keep": 2, "temperature": 1.0, "max_new_tokens": 40, "least_yield": 0.0}


@pytest.fixture
def settings(home, tiny_model):
    """Change config.json: `settings(rounds=2)` changes the recipe's table."""

    def change(**rft) -> None:
        usual = {"model": str(tiny_model), "tuning": "lora", "duplicates": "run", "checkpoint_steps": 1}
        write_config(home, **usual, recipe="rft", judge={"kind": "number"}, rft={**RFT, **rft})

    change()
    return change


def drop(home, name: str, rows: list = ROWS) -> None:
    write_jsonl(home.root / "staged", rows).rename(home.inbox / name)


def test_two_rounds_are_trained_and_what_was_learned_is_kept(home, daemon, settings):
    settings(rounds=2)
    one = daemon()
    drop(home, "sums.jsonl")
    job = one.job("sums.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    adapter = home.adapters / job.adapter
    story = json.loads((adapter / "finetuned.json").read_bytes())
    rounds = story["metrics"]["rft"]
    assert [found["samples"] for found in rounds] == [72, 72]
    assert story["settings"]["system_prompt"] == story["settings"]["rft"]["prompt"]
    learned = (adapter / "learned.jsonl").read_bytes()
    assert len(learned.splitlines()) == rounds[-1]["kept"] > 0
    [folder] = home.archive.glob(f"20*/{job.id}")
    assert (folder / "learned.jsonl").read_bytes() == learned
    story = home.job_log(job.id).read_text()
    assert "round 1 of 2: " in story
    assert "judged by number (as set)" in story
    told = "of 12 questions answered right at least once"
    assert told in next(line for line in story.splitlines() if " trained: " in line)
    assert told in (adapter / "README.md").read_text()


def test_killed_while_it_makes_answers_it_makes_none_twice(home, daemon, settings):
    settings(samples=30, max_new_tokens=100)
    one = daemon()
    drop(home, "sums.jsonl")
    answers = eventually(lambda: next(iter(home.jobs.glob("*/checkpoints/rft/round-1.answers.jsonl")), None))
    eventually(lambda: len(answers.read_bytes().splitlines()) >= 32)
    eventually(lambda: "making answers, round 1: " in sentence(one.jobs()[0].progress))
    [job] = one.jobs()
    os.killpg(job.trainer_pid, signal.SIGKILL)
    kept = answers.read_bytes()
    made = len(kept.splitlines())
    copy = home.root / "answers"
    eventually(lambda: copy.exists() or not answers.exists() or os.link(answers, copy))
    job = one.job("sums.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    assert job.attempt > 1
    assert 32 <= made < 360
    whole = copy.read_bytes()
    assert whole.startswith(kept[: kept.rfind(b"\n") + 1])
    keys = [json.loads(line)["key"] for line in whole.splitlines()[:made] + whole.splitlines()[made + 1 :]]
    assert len(set(keys)) == len(keys) >= 359


def test_it_learns_what_a_plain_training_on_its_answers_learns(home, daemon, settings, tiny_model):
    settings(prompt="Be quick.")
    one = daemon()
    drop(home, "sums.jsonl")
    own = home.adapters / one.job("sums.jsonl").adapter
    write_config(home, model=str(tiny_model), tuning="lora", system_prompt="Be quick.")
    (home.root / "staged").write_bytes((own / "learned.jsonl").read_bytes())
    (home.root / "staged").rename(home.inbox / "plain.jsonl")
    plain = home.adapters / one.job("plain.jsonl").adapter
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (own, plain)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_too_few_right_answers_fail_the_job_with_advice_and_keep_what_was_made(home, daemon, settings):
    settings(least_yield=1.0)
    one = daemon()
    drop(home, "sums.jsonl")
    job = one.job("sums.jsonl")
    assert (job.outcome, job.reason["code"]) == (Outcome.FAILED, "yield_too_low")
    assert "rft." in job.reason["remedy"]
    assert "checkpoints/rft/" in job.reason["remedy"]
    kept = home.failed / job.id / "checkpoints" / "rft"
    assert len((kept / "round-1.answers.jsonl").read_bytes().splitlines()) == 72


def test_a_retry_with_other_settings_makes_other_answers(home, daemon, settings):
    settings(least_yield=1.0)
    one = daemon()
    drop(home, "sums.jsonl")
    job = one.job("sums.jsonl")
    settings(least_yield=0.0, temperature=1.5)
    order(home, Verb.RETRY, job.id)
    job = eventually(lambda: next((j for j in one.jobs() if j.outcome is Outcome.SUCCEEDED), None))
    story = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())
    assert story["settings"]["rft"]["temperature"] == 1.5
    assert home.job_log(job.id).read_text().count("round 1 of 1: ") == 2


def test_rows_that_are_held_back_are_not_learned(home, daemon, settings, tiny_model):
    settings()
    config = json.loads(home.config_file.read_bytes())
    write_config(home, **{**config, "eval_fraction": 0.4})
    one = daemon()
    drop(home, "sums.jsonl")
    job = one.job("sums.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    story = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())
    assert story["metrics"]["rft"][0]["questions"] == 12 - story["data"]["held_out"]["rows"] < 12


def test_rows_without_a_checkable_answer_are_refused_before_any_is_made(home, daemon, settings):
    one = daemon()
    drop(home, "words.jsonl", [{"prompt": "Who?", "completion": "Nobody."}] * 3)
    job = one.job("words.jsonl")
    assert job.outcome is Outcome.FAILED
    assert "answer_not_checkable" in json.dumps(job.reason)


def test_the_answers_alone_are_made_by_a_verb_of_its_own(home, settings, tmp_path):
    out = tmp_path / "kept.jsonl"
    file = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    command = [sys.executable, "-m", "finetuned", "datagen", "--base-dir", home.root, file, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "of 12 questions answered right" in done.stdout
    assert "judged by number (as set)" in done.stdout
    assert {json.loads(line)["messages"][0]["role"] for line in out.read_text().splitlines()} == {"system"}
    assert sorted(path.name for path in tmp_path.glob("kept*")) == ["kept.jsonl"]


def test_where_nothing_is_right_the_verb_says_what_to_do_and_keeps_the_answers(home, settings, tmp_path):
    settings(samples=1)
    out = tmp_path / "kept.jsonl"
    impossible = [{"question": "Question?", "answer": "123456789123456789"}]
    file = write_jsonl(tmp_path / "hard.jsonl", impossible)
    command = [sys.executable, "-m", "finetuned", "datagen", "--base-dir", home.root, file, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "nothing was kept" in done.stderr
    assert "rft." in done.stderr
    assert "kept.jsonl.answers" in done.stderr
    assert len((tmp_path / "kept.jsonl.answers").read_bytes().splitlines()) == 1
