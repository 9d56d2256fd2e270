"""What people have, dropped into a real inbox: every format trains, rows are held out, `fail_on` stops a job."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard

from conftest import Daemon, chat_rows, make_home, write_config
from finetuned.jobs import Outcome

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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("data") / "base")


@pytest.fixture(scope="module")
def one(home, tiny_model):
    """A daemon for all tests here, with a parent of trainers that has torch loaded."""
    configure(home, tiny_model)
    one = Daemon(home)
    one.says("warm parent ready", seconds=120)
    yield one
    one.stop()


def configure(home, model, **settings) -> None:
    quick = {"warm_trainer": True, "max_steps": 1, "duplicates": "run"}
    write_config(home, model=str(model), **{**quick, **settings})


@pytest.fixture
def settings(home, one, tiny_model):
    """Change config.json, until the test ends: `settings(eval_fraction=0.5)`."""
    yield lambda **settings: configure(home, tiny_model, **settings)
    configure(home, tiny_model)


def drop(home, name: str, rows: list) -> None:
    put(home, name, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def put(home, name: str, content: bytes) -> None:
    staged = home.root / "staged"
    staged.write_bytes(content)
    staged.rename(home.inbox / name)


def test_every_format_that_people_have_trains(home, one, settings):
    for number, rows in enumerate(FORMATS.values()):
        drop(home, f"rows-{number}.jsonl", rows)
    for number, name in enumerate(FORMATS):
        job = one.job(f"rows-{number}.jsonl")
        assert job.outcome is Outcome.SUCCEEDED, job.reason
        data = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())["data"]
        assert (data["format"], data["rows"], data["errors"]) == (name, len(PAIRS), {})
        assert 0 < data["tokens"]["supervised"] <= data["tokens"]["tokens"]


def test_compressed_files_are_trained_like_plain_ones(home, one, settings):
    plain = b"".join(json.dumps(row).encode() + b"\n" for row in chat_rows(8))
    files = {
        "packed.jsonl.gz": gzip.compress(plain),
        "dense.jsonl.zst": zstandard.compress(plain),
        "array.json": json.dumps(chat_rows(8)).encode(),
    }
    for name, content in files.items():
        put(home, name, content)
    stories = []
    for name in files:
        job = one.job(name)
        assert job.outcome is Outcome.SUCCEEDED, job.reason
        assert job.adapter == name.partition(".")[0]
        stories.append(json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes()))
    assert [story["data"]["rows"] for story in stories] == [8, 8, 8]


def test_files_of_one_profile_build_on_each_other(home, one, settings):
    """Though they were dropped together, the second waits for the first one's adapter."""
    settings(profiles={"growing": {"resume_adapter": "latest"}, "other": {"resume_adapter": "latest"}})
    for profile in ("growing", "other"):
        (home.inbox / profile).mkdir(exist_ok=True)
    names = ["growing/a.jsonl", "growing/b.jsonl", "other/c.jsonl"]
    for start, name in enumerate(names):
        drop(home, name, chat_rows(8, start=8 * start))
    jobs = {name: one.job(f"{name}.jsonl") for name in "abc"}
    stories = {name: json.loads((home.adapters / name / "finetuned.json").read_bytes()) for name in "abc"}
    [first] = [name for name in "ab" if not stories[name]["chain"]]
    [second] = {"a", "b"} - {first}
    job = jobs[first]
    assert stories[second]["chain"] == [{"adapter": first, "job_id": job.id, "sha256": job.sha256}]
    assert stories["c"]["chain"] == []
    assert "starting fresh" in home.job_log(jobs["c"].id).read_text()


def test_a_share_of_the_rows_is_held_back_and_asked(home, one, settings):
    settings(eval_fraction=0.5, predictions={"samples": 2, "max_new_tokens": 4})
    drop(home, "rows.jsonl", chat_rows(20))
    job = one.job("rows.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    story = json.loads((home.adapters / job.adapter / "finetuned.json").read_bytes())
    held_out = story["data"]["held_out"]["rows"]
    assert 0 < held_out < 20
    assert {"valid_loss", "valid_loss_before"} <= story["metrics"].keys()


def test_a_warning_that_the_user_cares_about_stops_the_job_by_its_name(home, one, settings):
    settings(fail_on=["bare_number_answers"])
    drop(home, "numbers.jsonl", [{"prompt": f"{n} + 1?", "completion": str(n + 1)} for n in range(10)])
    job = one.job("numbers.jsonl")
    assert job.outcome is Outcome.FAILED
    assert job.reason["code"] == "bare_number_answers"
    assert "10 rows (100.0%)" in job.reason["what"]
    assert "fail_on" in job.reason["remedy"]


def test_the_same_rows_are_tokenised_once_whatever_else_changes(home, one, settings):
    tokens = home.models.parent / "tokens"
    before = set(tokens.iterdir()) if tokens.exists() else set()
    drop(home, "first.jsonl", chat_rows(12, start=500))
    one.job("first.jsonl")
    (kept,) = set(tokens.iterdir()) - before
    made = (kept / "tokens.int32").stat()
    settings(seed=1)
    drop(home, "again.jsonl", chat_rows(12, start=500))
    assert one.job("again.jsonl").outcome is Outcome.SUCCEEDED
    assert set(tokens.iterdir()) - before == {kept}
    assert (kept / "tokens.int32").stat() == made
