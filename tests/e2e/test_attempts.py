"""The time line of a job's attempts, as a real daemon notes it."""

from __future__ import annotations

import os
import signal

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.attempts import TOLD, timeline
from finetuned.control import order
from finetuned.found import ledger_to_read
from finetuned.jobs import Outcome, State
from finetuned.spool.orders import Verb


def drop(home, count: int = 20) -> None:
    write_jsonl(home.root / "staged", chat_rows(count)).rename(home.inbox / "x.jsonl")


def told(home, job) -> list[dict]:
    with ledger_to_read(home) as ledger:
        return timeline(ledger.events(job.id, *TOLD), job)


def test_each_attempt_that_runs_out_of_memory_is_told_with_its_rung_and_why_the_next_has_another(home, daemon, standin):
    standin(end=70)
    one = daemon()
    drop(home)
    job = one.job("x.jsonl")
    assert job.outcome is Outcome.FAILED
    rows = told(home, job)
    assert [row["attempt"] for row in rows] == list(range(1, job.attempt + 1))
    assert {row["outcome"] for row in rows} == {"resource"}
    assert [row["rung"]["batch_size"] for row in rows][:3] == [4, 2, 1]
    assert rows[-1]["rung"]["activation_checkpointing"]
    assert rows[0]["why"] == ""
    assert "batch halved" in rows[1]["why"]
    assert rows[0]["then"].endswith(rows[1]["why"])
    assert "told to end so" in rows[-1]["then"]


def test_settings_that_a_retry_brings_are_told_as_they_were_and_are(home, daemon, standin, monkeypatch):
    standin(end=65)
    one = daemon()
    drop(home)
    one.job("x.jsonl")
    one.stop()
    monkeypatch.delenv("STANDIN_END")
    write_config(home, learning_rate=0.5)
    two = daemon()
    order(home, Verb.RETRY, one.jobs()[0].id)
    two.says("finished")
    first, second = told(home, two.job("x.jsonl"))
    assert (first["outcome"], second["outcome"]) == ("permanent", "succeeded")
    assert (first["changed"], second["changed"]) == ({}, {"learning_rate": ["auto", 0.5]})
    assert second["step"] == 20
    assert first["at"] < first["ended_at"] < second["at"]


def test_an_attempt_that_went_down_with_the_machine_is_told_as_interrupted(home, daemon, standin):
    standin(seconds=0.3)
    one = daemon()
    drop(home)
    job = one.job("x.jsonl", state=State.RUNNING)
    one.says("training starts")
    one.stop(signal.SIGKILL)
    os.killpg(job.trainer_pid or one.jobs()[0].trainer_pid, signal.SIGKILL)
    two = daemon()
    first, second = eventually(lambda: len(rows := told(home, two.jobs()[0])) == 2 and rows)
    assert (first["outcome"], second["outcome"]) == ("interrupted", None)
    assert first["then"] == "the daemon or the machine went down"
