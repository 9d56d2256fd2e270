"""What people have, dropped into a real inbox: every format trains, rows are held out, `fail_on` stops a job."""

from __future__ import annotations

import json

import pytest

from conftest import chat_rows, write_config, write_jsonl
from finetuned.jobs import Outcome, State

PAIRS = [(f"Say the number {n}", f"The number is {n}.") for n in range(8)]
FORMATS = {
    "OpenAI chat": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a, "weight": 1}]}
        for q, a in PAIRS
    ],
    "ShareGPT": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
    "Alpaca": [{"instruction": "Say the number", "input": q, "output": a} for q, a in PAIRS],
    "prompt and completion": [{"prompt": q, "completion": a} for q, a in PAIRS],
    "question and answer": [{"question": q, "answer": a} for q, a in PAIRS],
    "plain text": [{"text": f"{q}. {a}"} for q, a in PAIRS],
}


@pytest.fixture
def settings(home, tiny_model):
    """Change config.json: `settings(eval_fraction=0.5)`."""

    def change(**settings) -> None:
        quick = {"warm_trainer": True, "max_steps": 1, "duplicates": "run"}
        write_config(home, model=str(tiny_model), **{**quick, **settings})

    change()
    return change


def drop(home, name: str, rows: list) -> None:
    write_jsonl(home.root / "staged", rows).rename(home.inbox / name)


def test_every_format_that_people_have_trains(home, daemon, settings):
    one = daemon()
    for number, rows in enumerate(FORMATS.values()):
        drop(home, f"rows-{number}.jsonl", rows)
    for number, name in enumerate(FORMATS):
        job = one.job(f"rows-{number}.jsonl")
        assert job.outcome is Outcome.SUCCEEDED, job.reason
        data = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())["data"]
        assert (data["format"], data["rows"], data["errors"]) == (name, len(PAIRS), {})
        assert 0 < data["tokens"]["supervised"] <= data["tokens"]["tokens"]


def test_a_share_of_the_rows_is_held_back_and_asked(home, daemon, settings):
    settings(eval_fraction=0.5, predictions={"samples": 2, "max_new_tokens": 4})
    one = daemon()
    drop(home, "rows.jsonl", chat_rows(20))
    job = one.job("rows.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    story = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())
    held_out = story["data"]["held_out"]["rows"]
    assert 0 < held_out < 20
    assert {"valid_loss", "valid_loss_before"} <= story["metrics"].keys()


def test_a_warning_that_the_user_cares_about_stops_the_job_by_its_name(home, daemon, settings):
    settings(fail_on=["bare_number_answers"])
    one = daemon()
    drop(home, "numbers.jsonl", [{"prompt": f"{n} + 1?", "completion": str(n + 1)} for n in range(10)])
    job = one.job("numbers.jsonl")
    assert job.outcome is Outcome.FAILED
    assert job.reason["code"] == "bare_number_answers"
    assert "10 rows (100.0%)" in job.reason["what"]
    assert "fail_on" in job.reason["remedy"]


def test_the_same_rows_are_tokenised_once_whatever_else_changes(home, daemon, settings):
    one = daemon()
    drop(home, "first.jsonl", chat_rows(12))
    one.job("first.jsonl")
    (kept,) = (home.models.parent / "tokens").iterdir()
    before = (kept / "tokens.int32").stat()
    settings(seed=1)
    drop(home, "again.jsonl", chat_rows(12))
    assert one.job("again.jsonl").outcome is Outcome.SUCCEEDED
    assert [path.name for path in (home.models.parent / "tokens").iterdir()] == [kept.name]
    assert (kept / "tokens.int32").stat() == before


def test_a_broken_file_is_told_while_another_trains(home, daemon, settings):
    settings(max_steps=1_000_000)
    one = daemon()
    drop(home, "long.jsonl", chat_rows(8))
    one.job("long.jsonl", state=State.RUNNING)
    drop(home, "good.jsonl", chat_rows(4))
    drop(home, "bad.jsonl", [{"messages": []}])
    write_jsonl(home.inbox / "half.eval.jsonl", [{"messages": []}])
    drop(home, "half.jsonl", chat_rows(4, start=50))
    bad, half = one.job("bad.jsonl"), one.job("half.jsonl")
    assert (bad.outcome, bad.reason["code"], bad.reason["where"]) == (
        Outcome.FAILED,
        "missing_messages_list",
        "bad.jsonl:1",
    )
    assert (half.outcome, half.reason["where"]) == (Outcome.FAILED, "half.eval.jsonl:1")
    assert {job.name: job.state for job in one.jobs() if job.outcome is None} == {
        b"long.jsonl": State.RUNNING,
        b"good.jsonl": State.QUEUED,
    }
    assert (home.failed / bad.id / "bad.jsonl").exists()
