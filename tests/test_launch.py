"""Starting a trainer while the ledger takes no writes: nothing is lost, and nothing counts as an interruption."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from conftest import STANDIN, chat_rows, write_jsonl
from finetuned import crew
from finetuned.jobs import State
from finetuned.launchers import local
from finetuned.ledger import Ledger
from finetuned.service import Service


@contextmanager
def taking_no_writes(home) -> Iterator[None]:
    with closing(sqlite3.connect(home.ledger, isolation_level=None)) as somebody:
        somebody.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture
def one_job(home, standin, monkeypatch):
    """A daemon in this process, not started yet, and a file in its inbox."""
    standin(seconds=0)
    opened = Ledger.open

    def impatient(*words, **options):
        ledger = opened(*words, **options)
        ledger._database.execute("PRAGMA busy_timeout=50")
        return ledger

    monkeypatch.setattr(Ledger, "open", impatient)
    write_jsonl(home.root / "staged", chat_rows(3)).rename(home.inbox / "x.jsonl")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGIO, signal.SIGCHLD, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield Service(home, once=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def facts(home) -> tuple[State, int, int]:
    with closing(Ledger.open_to_read(home.ledger)) as ledger:
        [job] = ledger.jobs(*State)
    return job.state, job.interruptions, job.attempt


def test_a_trainer_that_started_while_its_pid_could_not_be_noted_is_tended_to_its_end(
    home, one_job, standin, monkeypatch
):
    standin(seconds=0.3)
    monkeypatch.setenv("FINETUNED_TRAINER", f"sh -c 'sleep 2; exec {STANDIN} \"$0\"'")  # it says late who it is
    locks: list = []

    def start(*words, **options):
        trainer = local.start(*words, **options)
        lock = taking_no_writes(home)
        lock.__enter__()
        locks.append((lock, time.monotonic() + 0.5))
        return trainer

    tend = Service._tend_attempts

    def tend_later(daemon):
        if locks and time.monotonic() > locks[0][1]:
            locks.pop()[0].__exit__(None, None, None)
        tend(daemon)

    monkeypatch.setattr(crew, "start", start)
    monkeypatch.setattr(Service, "_tend_attempts", tend_later)
    assert one_job.run() == 0
    assert facts(home) == (State.FINISHED, 0, 1)


def test_a_trainer_that_could_not_be_started_nor_its_job_put_back_interrupts_nothing(home, one_job, monkeypatch):
    locks: list = []

    def start(*words, **options):
        if not locks:
            locks.append(taking_no_writes(home))
            locks[0].__enter__()
            raise OSError(28, "No space left on device")
        return local.start(*words, **options)

    finish = Service._finish_held

    def finish_later(daemon):
        if locks and locks[-1] is not None:
            locks[-1].__exit__(None, None, None)
            locks.append(None)
        finish(daemon)

    monkeypatch.setattr(crew, "start", start)
    monkeypatch.setattr(Service, "_finish_held", finish_later)
    assert one_job.run() == 0
    assert facts(home) == (State.FINISHED, 0, 2)
