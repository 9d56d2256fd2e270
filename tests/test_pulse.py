"""What keeps the sign of life back from systemd, and what does not."""

from __future__ import annotations

import errno
import sqlite3
import threading

import pytest

from conftest import eventually
from finetuned.ledger import Ledger
from finetuned.pulse import Signs, no_room, trouble
from finetuned.spool.watch import Watch

WELL = {"watching": True, "since_look": 1.0, "look_every": 30.0}
FULL = OSError(errno.ENOSPC, "No space left on device")


def test_all_is_well():
    assert trouble(Signs(**WELL)) is None


def test_a_watcher_that_died_is_trouble():
    assert "watches the inbox" in trouble(Signs(**WELL | {"watching": False}))


@pytest.mark.parametrize(("since", "every", "well"), [(59, 1, True), (61, 1, False), (89, 30, True), (91, 30, False)])
def test_an_inbox_not_looked_into_for_three_rescans_is_trouble(since, every, well):
    assert (trouble(Signs(**WELL | {"since_look": since, "look_every": every})) is None) == well


def test_a_ledger_that_takes_no_writes_is_trouble():
    why = trouble(Signs(**WELL, unwritten=sqlite3.OperationalError("database is locked")))
    assert "database is locked" in why


@pytest.mark.parametrize("sign", ["waits_for", "unwritten"])
def test_a_full_disk_is_not_for_a_restart_would_not_make_room(sign):
    assert trouble(Signs(**WELL | {"since_look": 9999.0}, **{sign: FULL})) is None


def test_another_error_that_holds_the_queue_for_long_is():
    assert trouble(Signs(**WELL | {"since_look": 9999.0}, waits_for=OSError(errno.EIO, "Input/output error")))


@pytest.mark.parametrize(
    ("error", "room"),
    [
        (FULL, True),
        (OSError(errno.EROFS, ""), True),
        (OSError(errno.EIO, ""), False),
        (ValueError(), False),
        (None, False),
    ],
)
def test_which_errors_speak_of_a_disk_without_room(error, room):
    assert no_room(error) is room


def test_a_ledger_that_may_not_grow_says_so_by_its_code(tmp_path):
    database = sqlite3.connect(tmp_path / "small.db")
    database.execute("PRAGMA max_page_count=1")
    with pytest.raises(sqlite3.OperationalError) as full:
        database.execute("CREATE TABLE t (x)")
    database.close()
    assert no_room(full.value)


# -- the signs


def test_the_proof_of_a_writable_ledger_is_a_write(home):
    ledger = Ledger.open(home.ledger)
    wal = home.ledger.with_name("state.db-wal")
    before = wal.stat().st_size
    ledger.prove_writable()
    assert wal.stat().st_size > before
    ledger.close()


def test_a_ledger_that_somebody_else_keeps_locked_is_not_writable(home):
    ledger = Ledger.open(home.ledger)
    ledger._database.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(home.ledger, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        ledger.prove_writable()
    other.close()
    ledger.prove_writable()
    ledger.close()


def test_a_watcher_of_which_a_thread_ended_is_dead_until_it_is_renewed(tmp_path):
    """As when the watched folder is deleted: the observer lives on, and nothing is seen any more."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    changed = threading.Event()
    watch = Watch(inbox, changed)
    assert watch.alive  # nothing asked for yet
    watch.renew()
    assert watch.alive
    for emitter in watch._observer.emitters:
        emitter.stop()
    eventually(lambda: not watch.alive, why="its thread ended")
    watch.renew()
    assert watch.alive
    changed.clear()
    (inbox / "x.jsonl").touch()
    assert changed.wait(60)
    watch.stop()
