"""The ledger deleted or damaged while no daemon runs: made again from the folders, and only charts are lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.control import order
from finetuned.home import Home
from finetuned.jobs import Outcome, State
from finetuned.spool.orders import Verb
from finetuned.status import gather
from standin_trainer import safetensors, weights_of


def deleted(ledger: Path) -> None:
    for path in ledger.parent.glob("state.db*"):
        path.unlink()


def torn(ledger: Path) -> None:
    """The file is as long as it was, and a page in its middle is not what it was."""
    for path in ledger.parent.glob("state.db-*"):
        path.unlink()
    with ledger.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096 * 8))


def ended(home: Home) -> dict[str, tuple]:
    """What `finetuned status` shows of the jobs that have ended, but for what charts are made of."""
    keys = ("file", "status", "outcome", "adapter", "duplicate_of", "reason", "attempt", "rung")
    return {job["id"]: tuple(job[key] for key in keys) for job in gather(home)["finished"]}


@pytest.mark.parametrize("damage", [deleted, torn])
def test_a_ledger_that_is_lost_is_made_again_and_all_goes_on(home, daemon, standin, damage):
    def drop(name: str, count: int, start: int = 0) -> None:
        write_jsonl(home.root / "staged", chat_rows(count, start=start)).rename(home.inbox / name)

    one = daemon()
    drop("done.jsonl", 8)
    done = one.job("done.jsonl")
    drop("again.jsonl", 8)
    assert one.job("again.jsonl").duplicate_of == done.id
    (home.inbox / "bad.config.json").write_text('{"epochs": -1}')
    drop("bad.jsonl", 2)
    assert one.job("bad.jsonl").outcome is Outcome.FAILED
    drop("running.jsonl", 300)
    one.job("running.jsonl", state=State.RUNNING)
    drop("queued.jsonl", 5, start=90)
    one.job("queued.jsonl", state=State.QUEUED)
    drop("cancelled.jsonl", 5, start=50)
    order(home, Verb.CANCEL, one.job("cancelled.jsonl", state=State.QUEUED).id)
    assert one.job("cancelled.jsonl").outcome is Outcome.CANCELLED
    trainer = one.job("running.jsonl", state=State.RUNNING).trainer_pid
    one.stop(signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    before = ended(home)
    assert len(before) == 4

    damage(home.ledger)
    two = daemon()
    for name in ("running.jsonl", "queued.jsonl"):
        assert two.job(name).outcome is Outcome.SUCCEEDED
        [archived] = home.archive.glob(f"20*/*/{name}")
        rows = archived.read_bytes().splitlines()
        weights = home.adapters / name.removesuffix(".jsonl") / "adapter_model.safetensors"
        assert weights.read_bytes() == safetensors(weights_of(rows, len(rows)))
    assert before.items() <= ended(home).items()
    drop("third.jsonl", 8)
    assert two.job("third.jsonl").duplicate_of == done.id
    order(home, Verb.RETRY, "cancelled")  # its file is found
    eventually(lambda: two.job("cancelled.jsonl").outcome is Outcome.SUCCEEDED, why="the second try")
    assert {path.name for path in home.adapters.iterdir()} == {"done", "running", "queued", "cancelled", "latest"}
    eventually(lambda: not list(home.jobs.iterdir()), why="nothing is left behind")
