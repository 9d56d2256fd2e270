"""The ledger: what is committed is kept, what fails leaves nothing behind."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuned.events import Event, EventType
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger

IDENTITY = FileIdentity(device=2**63 + 1, inode=2**64 - 1, size=2**40, mtime_ns=1_700_000_000_123_456_789)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def ledger(path):
    ledger = Ledger.open(path)
    yield ledger
    ledger.close()


def job(job_id: str = "x-1", *, state: State = State.QUEUED, created_at: float = 1.0, **more: Any) -> Job:
    return Job(job_id, b"x.jsonl", "", IDENTITY, state, created_at, **more)


FULL = Job(
    id="full-1",
    name=b"caf\xe9 \xff\n.jsonl",
    profile="fast",
    identity=IDENTITY,
    state=State.FAILING,
    created_at=1_700_000_000.25,
    settings={"system_prompt": "é 漢字", "epochs": 0.5, "revision": None, "predictions": {"samples": 1}},
    rung={"batch_size": 4},
    outcome=Outcome.FAILED,
    sha256="ab" * 32,
    held_out=b"caf\xe9 \xff\n.eval.jsonl",
    held_out_sha256="cd" * 32,
    attempt=3,
    retries=2,
    interruptions=1,
    boot_id="b",
    trainer_pid=4_000_000,
    not_before=5.5,
    events_offset=2**40,
    adapter="x",
    duplicate_of="y",
    reason={"code": "c", "what": "w", "where": "", "remedy": "r"},
    progress={"step": 3, "train_loss": 0.1},
    started_at=6.5,
    finished_at=7.5,
)


def event(message: str = "m", kind: EventType = EventType.METRICS, **data: Any) -> Event:
    return Event(1.5, kind, message, "info", data)


# -- rows


@pytest.mark.parametrize("row", [job(), FULL])
def test_a_job_comes_back_as_it_went_in(ledger, row):
    ledger.add(row)
    assert ledger.job(row.id) == row


def test_an_id_is_taken_once(ledger):
    ledger.add(job())
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add(job(state=State.RUNNING))
    assert ledger.job("x-1").state is State.QUEUED


def test_an_unknown_job_is_a_key_error(ledger):
    with pytest.raises(KeyError):
        ledger.job("x-1")
    with pytest.raises(KeyError):
        ledger.update("x-1", attempt=1)


def test_an_update_changes_what_it_names_and_nothing_else(ledger):
    ledger.add(FULL)
    changes = {"state": State.FINISHED, "attempt": 4, "reason": None, "progress": {"step": 4}, "trainer_pid": None}
    changed = ledger.update("full-1", **changes)
    assert changed == replace(FULL, **changes) == ledger.job("full-1")


def test_a_step_that_the_protocol_does_not_know_changes_nothing(ledger):
    ledger.add(job(state=State.QUEUED))
    with pytest.raises(ValueError, match="from queued to finished"):
        ledger.update("x-1", attempt=7, state=State.FINISHED)
    assert ledger.job("x-1") == job()
    assert ledger.update("x-1", state=State.RUNNING).state is State.RUNNING  # the transaction is over


def test_a_dropped_job_is_forgotten_with_its_events(ledger):
    ledger.add(job())
    ledger.record("x-1", [event()], offset=3)
    ledger.record_gpu("x-1", [(1.0, "GPU-1", {"power": 3})])
    ledger.drop("x-1")
    assert ledger.jobs(*State) == []
    ledger.add(job())
    assert ledger.events("x-1") == []
    assert list(ledger.gpu_samples("x-1")) == []


@pytest.mark.parametrize("name", [b"\xff.jsonl", b"caf\xe9.jsonl", "漢字.jsonl".encode(), b"a\nb'\"\\.jsonl"])
def test_names_are_bytes(ledger, name):
    ledger.add(replace(job(), name=name))
    assert ledger.job("x-1").name == name


def test_text_made_from_a_name_that_is_no_utf8_can_be_stored(ledger):
    """A reason's place, an event's message: a path as Python gives it holds surrogates, which SQLite refuses."""
    where = os.fsdecode(b"/inbox/caf\xe9.config.json")
    ledger.add(job(state=State.CLAIMING, reason={"code": "c", "what": "w", "where": where, "remedy": "r"}))
    ledger.record("x-1", [event(f"reading {where}", where=where)], offset=1, progress={"error": {"where": where}})
    assert "caf" in ledger.job("x-1").reason["where"]
    assert "caf" in ledger.events("x-1")[0].message


# -- events


def test_what_the_trainer_said_comes_back_in_order(ledger):
    ledger.add(job(state=State.RUNNING))
    said = [event(str(n), step=n) for n in range(5)] + [event("end", EventType.RESULT)]
    ledger.record("x-1", said[:3], offset=30)
    after = ledger.record("x-1", said[3:], offset=60, progress={"step": 4})
    assert ledger.events("x-1") == said
    assert ledger.events("x-1", EventType.RESULT) == said[5:]
    assert (after.events_offset, after.progress) == (60, {"step": 4})


@pytest.mark.parametrize(
    ("events", "changes"),
    [
        ([event("a"), event("b")], {"state": State.CLAIMING}),  # an illegal step
        ([event("a")], {"colour": "red"}),  # no such column
        ([event("a"), Event("never", EventType.METRICS, "b")], {}),  # a time that is none
    ],
)
def test_events_are_recorded_all_or_nothing(ledger, events, changes):
    ledger.add(job(state=State.RUNNING))
    with pytest.raises((ValueError, sqlite3.Error)):
        ledger.record("x-1", events, offset=99, **changes)
    assert ledger.events("x-1") == []
    assert ledger.job("x-1").events_offset == 0
    ledger.record("x-1", [event("a")], offset=10)
    assert len(ledger.events("x-1")) == 1


def test_events_of_a_job_that_is_not_there_are_refused(ledger):
    with pytest.raises((sqlite3.IntegrityError, KeyError)):
        ledger.record("x-1", [event()], offset=1)


def test_gpu_samples_come_back_in_order(ledger):
    ledger.add(job())
    ledger.record_gpu("x-1", [(2.0, "GPU-1", {"power": 2}), (1.0, "GPU-1", {"power": 1})])
    assert list(ledger.gpu_samples("x-1")) == [{"power": 1}, {"power": 2}]


# -- questions


def test_jobs_are_given_by_state_oldest_first(ledger):
    for number, state in [(3, State.QUEUED), (1, State.RUNNING), (2, State.QUEUED), (4, State.FINISHED)]:
        ledger.add(job(f"x-{number}", state=state, created_at=float(number)))
    assert [one.id for one in ledger.jobs(State.QUEUED)] == ["x-2", "x-3"]
    assert [one.id for one in ledger.jobs(*State)] == ["x-1", "x-2", "x-3", "x-4"]
    assert ledger.jobs(State.FAILING) == []


def test_the_oldest_queued_job_is_next_and_of_two_as_old_the_first_in(ledger):
    assert ledger.may_start(9.0, limit=1) == []
    ledger.add(job("running", state=State.RUNNING, created_at=0.0))
    for name, created_at in [("late", 3.0), ("b", 2.0), ("a", 2.0)]:
        ledger.add(job(name, created_at=created_at))
    for name in ("b", "a", "late"):
        [following] = ledger.may_start(9.0, limit=1)
        assert following.id == name
        ledger.update(name, state=State.RUNNING)
    assert ledger.may_start(9.0, limit=1) == []


def test_a_job_that_waits_lets_younger_ones_pass(ledger):
    ledger.add(job("old", created_at=1.0, not_before=100.0))
    ledger.add(job("young", created_at=2.0))
    assert [one.id for one in ledger.may_start(99.0, limit=1)] == ["young"]
    assert [one.id for one in ledger.may_start(100.0, limit=1)] == ["old"]


def test_the_jobs_that_ended_last_come_newest_first(ledger):
    for number in range(5):
        ledger.add(job(f"x-{number}", state=State.FINISHED, finished_at=float(number)))
    ledger.add(job("open"))
    assert [one.id for one in ledger.last_finished(3)] == ["x-4", "x-3", "x-2"]


SETTINGS = {"epochs": 3, "model": "m"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"settings": {"model": "m", "epochs": 3}}, True),  # the order of keys is no difference
        ({"settings": {"model": "m", "epochs": 4}}, False),
        ({"sha256": "other"}, False),
        ({"held_out_sha256": "h"}, False),
        ({"outcome": Outcome.FAILED}, False),
        ({"outcome": None, "state": State.RUNNING}, False),
        ({"duplicate_of": "older"}, False),
    ],
)
def test_trained_before_means_the_same_bytes_with_the_same_settings_and_success(ledger, change, found):
    row = job(state=State.FINISHED, outcome=Outcome.SUCCEEDED, sha256="s", settings=SETTINGS, finished_at=1.0)
    ledger.add(replace(row, **change))
    before = ledger.trained_before("s", SETTINGS)
    assert (before is not None) is found


@pytest.mark.parametrize(("held_out", "found"), [("h", True), ("other", False), (None, False)])
def test_trained_before_with_held_out_data_means_the_same_held_out_data(ledger, held_out, found):
    row = job(state=State.FINISHED, outcome=Outcome.SUCCEEDED, sha256="s", held_out_sha256="h", finished_at=1.0)
    ledger.add(row)
    assert (ledger.trained_before("s", {}, held_out_sha256=held_out) is not None) is found


def test_of_several_trainings_the_newest_counts(ledger):
    for number in (1, 3, 2):
        row = job(f"x-{number}", state=State.FINISHED, outcome=Outcome.SUCCEEDED, sha256="s", finished_at=float(number))
        ledger.add(row)
    assert ledger.trained_before("s", {}).id == "x-3"


# -- the file


def test_commits_are_durable_by_pragma(ledger):
    """The spool protocol breaks with synchronous=NORMAL: a power loss would take a commit back."""

    def ask(pragma: str) -> object:
        return ledger._database.execute(f"PRAGMA {pragma}").fetchone()[0]

    assert ask("journal_mode") == "wal"
    assert ask("synchronous") == 2  # FULL
    assert ask("foreign_keys") == 1
    assert ask("busy_timeout") >= 1000


def test_a_ledger_opened_again_has_everything(path):
    first = Ledger.open(path)
    first.add(FULL)
    first.record("full-1", [event("said")], offset=5)
    first.close()
    again = Ledger.open(path)
    assert again.job("full-1") == replace(FULL, events_offset=5)
    assert again.events("full-1") == [event("said")]
    again.close()


def test_a_ledger_from_before_there_were_held_out_files_is_brought_up_to_date(path):
    older = Ledger.open(path)
    older.add(job())
    older._database.execute("DROP TABLE training_predictions")
    older._database.execute("DROP TABLE news")
    older._database.execute("DROP INDEX jobs_in_history")
    older._database.execute("ALTER TABLE orders DROP COLUMN before")
    older._database.execute("ALTER TABLE jobs DROP COLUMN trainer_id")
    for statement in ("DROP COLUMN held_out", "DROP COLUMN held_out_sha256"):
        older._database.execute(f"ALTER TABLE jobs {statement}")
    older._database.execute("PRAGMA user_version=2")
    older.close()
    ledger = Ledger.open(path)
    assert ledger.jobs(*State) == [job()]
    assert ledger.update("x-1", held_out=b"x.eval.jsonl").held_out == b"x.eval.jsonl"
    ledger.close()


def test_what_was_committed_survives_a_kill(path):
    script = (
        "import os, sys, signal; from pathlib import Path; from finetuned.ledger import Ledger;"
        "from finetuned.jobs import *; ledger = Ledger.open(Path(sys.argv[1]));"
        "ledger.add(Job('a', b'a', '', FileIdentity(1, 2, 3, 4), State.QUEUED, 1.0));"
        "ledger._database.execute('BEGIN IMMEDIATE');"
        "ledger._change('a', {'attempt': 9}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert ended.returncode == -9
    ledger = Ledger.open(path)
    assert [one.attempt for one in ledger.jobs(*State)] == [0]
    ledger.close()


def test_the_file_is_not_for_everybody(ledger, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("content", [b"this is no database", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_file_that_is_no_ledger_is_an_error(path, content):
    path.write_bytes(content)
    with pytest.raises(sqlite3.DatabaseError):
        Ledger.open(path)


def test_a_damaged_page_is_found_when_the_ledger_is_opened(path):
    ledger = Ledger.open(path)
    for number in range(20):
        ledger.add(job(f"x-{number}", settings={"system_prompt": "x" * 4000}))
    ledger.close()
    with path.open("r+b") as file:
        file.seek(4096 * 8)
        file.write(os.urandom(4096 * 4))
    with pytest.raises(sqlite3.DatabaseError):
        Ledger.open(path)


def test_a_reader_sees_what_is_committed_and_changes_nothing(ledger, path):
    ledger.add(job())
    reader = Ledger.open_to_read(path)
    assert reader.job("x-1") == job()
    with pytest.raises(sqlite3.OperationalError):
        reader.update("x-1", attempt=1)
    ledger.update("x-1", attempt=5)
    assert reader.job("x-1").attempt == 5
    reader.close()


def test_a_reader_of_no_ledger_is_told_so_and_makes_none(path):
    with pytest.raises(sqlite3.OperationalError):
        Ledger.open_to_read(path)
    assert not path.exists()


def test_a_base_directory_may_have_any_name(tmp_path):
    folder = tmp_path / "a b?c#d%20é"
    folder.mkdir()
    ledger = Ledger.open(folder / "state.db")
    ledger.add(job())
    reader = Ledger.open_to_read(folder / "state.db")
    assert reader.job("x-1") == job()
    reader.close()
    ledger.close()
