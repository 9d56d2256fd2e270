"""Recipe rft as its users meet it: a real daemon and a real trainer, on a model that draws bytes at random."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from conftest import answers_kept, eventually, write_config, write_jsonl
from finetuned.control import order
from finetuned.jobs import Outcome, State
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
        usual["warm_trainer"] = True  # several trainers cost the start of one
        write_config(home, **usual, recipe="rft", judge={"kind": "number"}, rft={**RFT, **rft})

    change()
    return change


def drop(home, name: str, rows: list = ROWS) -> None:
    write_jsonl(home.root / "staged", rows).rename(home.inbox / name)


def test_two_rounds_are_trained_and_what_was_learned_is_kept(home, daemon, settings):
    """Of the rows that are not held back."""
    settings(rounds=2, samples=20)
    write_config(home, **{**json.loads(home.config_file.read_bytes()), "eval_fraction": 0.4})
    one = daemon()
    one.says("warm parent ready")
    drop(home, "sums.jsonl")
    job = one.job("sums.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    adapter = home.adapters / job.adapter
    story = json.loads((adapter / "finetuned.json").read_bytes())
    rounds, learnable = story["metrics"]["rft"], 12 - story["data"]["held_out"]["rows"]
    assert [(found["questions"], found["samples"]) for found in rounds] == [(learnable, 20 * learnable)] * 2
    assert learnable < 12
    assert story["settings"]["system_prompt"] == story["settings"]["rft"]["prompt"]
    learned = (adapter / "learned.jsonl").read_bytes()
    assert len(learned.splitlines()) == rounds[-1]["kept"] > 0
    [folder] = home.archive.glob(f"20*/{job.id}")
    assert (folder / "learned.jsonl").read_bytes() == learned
    story = home.job_log(job.id).read_text()
    assert "round 1 of 2: " in story
    assert "judged by number (as set)" in story
    told = f"of {learnable} questions answered right at least once"
    assert told in next(line for line in story.splitlines() if " trained: " in line)
    assert told in (adapter / "README.md").read_text()


def drawn(home, daemon, name: str, *, kill: bool) -> tuple[list, bytes, dict]:
    """Let a daemon draw answers and learn from them, and kill the trainer once in between: the answers, of them what
    was learned, and the weights.
    """
    drop(home, name)
    answers = eventually(lambda: next(iter(home.jobs.glob("*/checkpoints/rft/round-1.answers.jsonl")), None))
    copy = home.root / f"{name}.answers"  # as the job's folder goes when it is done
    os.link(answers, copy)
    if kill:
        eventually(lambda: copy.read_bytes().count(b"\n") >= 3)
        eventually(lambda: "making answers, round 1: " in sentence(daemon.jobs()[0].progress))
        [job] = [job for job in daemon.jobs() if job.state is State.RUNNING]
        os.killpg(job.trainer_pid, signal.SIGKILL)
        assert len(answers_kept(copy)) < 96, "too late"
    job = daemon.job(name)
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    assert (job.attempt > 1) is kill
    adapter = home.adapters / job.adapter
    weights = load_file(adapter / "adapter_model.safetensors")
    return sorted(answers_kept(copy)), (adapter / "learned.jsonl").read_bytes(), weights


def test_killed_while_it_draws_answers_it_draws_and_learns_what_one_does_that_nothing_disturbed(home, daemon, settings):
    """And draws none twice. A trainer that is killed is taken for one that had too little memory, and goes on with
    smaller batches: so weights are the same but for their rounding.
    """
    settings(samples=8, max_new_tokens=100)
    one = daemon()
    one.says("warm parent ready")
    killed, undisturbed = (drawn(home, one, name, kill=name == "a.jsonl") for name in ("a.jsonl", "b.jsonl"))
    assert killed[:2] == undisturbed[:2]
    assert len(killed[0]) == len({key for key, _ in killed[0]}) == 96
    assert max(abs(killed[2][name] - weights).max() for name, weights in undisturbed[2].items()) < 1e-5


def test_too_few_right_answers_fail_the_job_with_advice_and_a_retry_with_other_settings_makes_others(
    home, daemon, settings
):
    """What was made is kept until then. Rows without a checkable answer are refused before any is made."""
    settings(least_yield=1.0)
    one = daemon()
    one.says("warm parent ready")
    drop(home, "sums.jsonl")
    job = one.job("sums.jsonl")
    assert (job.outcome, job.reason["code"]) == (Outcome.FAILED, "yield_too_low")
    assert "rft." in job.reason["remedy"]
    assert "checkpoints/rft/" in job.reason["remedy"]
    kept = home.failed / job.id / "checkpoints" / "rft"
    assert len(answers_kept(kept / "round-1.answers.jsonl")) == 72

    settings(least_yield=0.0, temperature=1.5)
    order(home, Verb.RETRY, job.id)
    drop(home, "words.jsonl", [{"prompt": "Who?", "completion": "Nobody."}] * 3)
    job = eventually(lambda: next((j for j in one.jobs() if j.outcome is Outcome.SUCCEEDED), None))
    story = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())
    assert story["settings"]["rft"]["temperature"] == 1.5
    assert home.job_log(job.id).read_text().count("round 1 of 1: ") == 2
    refused = one.job("words.jsonl")
    assert refused.outcome is Outcome.FAILED
    assert "answer_not_checkable" in json.dumps(refused.reason)


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
