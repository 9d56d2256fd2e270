"""The same file with the same settings, one time more: a real daemon whose trainer computes nothing."""

from __future__ import annotations

import json

import pytest

from conftest import chat_rows, write_config, write_jsonl
from finetuned.jobs import Outcome, State


@pytest.fixture
def drop(home, standin):
    def put(name: str):
        return write_jsonl(home.root / "staged", chat_rows(3)).rename(home.inbox / name)

    return put


def trained(one) -> int:
    return sum(job.attempt for job in one.jobs())


def test_of_two_equal_files_dropped_together_one_is_trained(home, daemon, drop):
    drop("a.jsonl")
    drop("b.jsonl")
    one = daemon("--once")
    assert one.process.wait(60) == 0
    first, second = sorted(one.jobs(), key=lambda job: job.duplicate_of is not None)
    assert (first.outcome, second.outcome) == (Outcome.SUCCEEDED, Outcome.SUCCEEDED)
    assert (second.duplicate_of, second.adapter, second.attempt) == (first.id, first.adapter, 0)
    assert {path.name for path in home.adapters.iterdir()} == {str(first.adapter), "latest"}
    [archived] = home.archive.glob(f"20*/{second.id}")
    assert (archived / second.name.decode()).exists()
    assert json.loads((archived / "job.json").read_bytes())["duplicate_of"] == first.id


def test_with_run_each_is_trained_also_when_dropped_together(home, daemon, drop):
    write_config(home, duplicates="run")
    drop("a.jsonl")
    drop("b.jsonl")
    one = daemon("--once")
    assert one.process.wait(60) == 0
    assert trained(one) == 2
    assert {"a", "b"} <= {path.name for path in home.adapters.iterdir()}


def test_with_fail_the_second_is_put_aside_with_the_first_ones_name(home, daemon, drop):
    write_config(home, duplicates="fail")
    drop("a.jsonl")
    drop("b.jsonl")
    one = daemon("--once")
    assert one.process.wait(60) == 1
    [first] = [job for job in one.jobs() if job.outcome is Outcome.SUCCEEDED]
    [second] = [job for job in one.jobs() if job.outcome is Outcome.FAILED]
    assert second.state is State.FINISHED
    reason = json.loads((home.failed / second.id / "reason.json").read_bytes())["reason"]
    assert reason["code"] == "duplicate"
    assert first.id in reason["what"]
    assert '"duplicates" to "run"' in reason["remedy"]
    assert (home.failed / second.id / second.name.decode()).exists()


def test_other_settings_make_it_another_job(home, daemon, drop):
    (home.inbox / "b.config.json").write_text('{"epochs": 2}')
    drop("a.jsonl")
    drop("b.jsonl")
    one = daemon("--once")
    assert one.process.wait(60) == 0
    assert trained(one) == 2
