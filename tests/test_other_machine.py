"""Orders where the daemon is in another container, or on another machine with which the base directory is shared."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import pytest

from finetuned.control import order
from finetuned.errors import HomeError
from finetuned.guard import only_daemon, say_waiting, why_paused, why_waiting
from finetuned.ledger import Ledger
from finetuned.lifesigns import boot_id
from finetuned.spool.orders import Verb
from finetuned.status import gather, render


@pytest.fixture
def victim():
    """A process that has nothing to do with any of this, and would die of a signal."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@contextmanager
def daemon_with_pid(home, said: str):
    """Hold the lock as a daemon does that says this of itself."""
    with home.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{said}\n")
        lock.flush()
        yield


def orders(home) -> list[str]:
    with closing(Ledger.open(home.ledger)) as ledger:
        return [verb for _, verb, _, _ in ledger.orders()]


def is_unharmed(process: subprocess.Popen) -> bool:
    time.sleep(0.2)
    return process.poll() is None


def test_a_daemon_in_another_container_is_not_signalled_by_a_pid_that_is_somebody_elses_here(home, victim):
    with daemon_with_pid(home, f"{victim.pid} container {boot_id()}"):
        assert order(home, Verb.PAUSE).endswith("the daemon hears it at its next look")
    assert orders(home) == [Verb.PAUSE]
    assert is_unharmed(victim)


def test_a_daemon_on_another_machine_is_paused_without_its_ledger_and_without_a_signal(home, victim):
    with daemon_with_pid(home, f"{victim.pid} far-away another-boot"):
        assert order(home, Verb.PAUSE).endswith("the daemon hears it at its next look")
        assert why_paused(home) == "a user asked for it"
        assert order(home, Verb.RESUME).endswith("the daemon hears it at its next look")
        assert why_paused(home) is None
    assert not home.ledger.exists()
    assert is_unharmed(victim)


def test_an_order_that_needs_the_ledger_is_refused_on_another_machine_than_the_daemons(home, victim):
    with daemon_with_pid(home, f"{victim.pid} far-away another-boot"):
        with pytest.raises(HomeError, match=r"at work on far-away.*Run this on far-away"):
            order(home, Verb.CANCEL, "x-1")
        assert f"running, pid {victim.pid} on far-away" in render(gather(home))
        refused = pytest.raises(HomeError, match=rf"pid {victim.pid} on far-away.*`kill {victim.pid}` on far-away")
        with refused, only_daemon(home):
            pass
    assert is_unharmed(victim)


def test_a_daemon_here_says_who_it_is_and_keeps_that_while_it_waits(home):
    with only_daemon(home):
        say_waiting(home, "no room")
        assert gather(home)["daemon_pid"] == os.getpid()
        assert gather(home)["daemon_host"] is None
        assert why_waiting(home) == "no room"


def test_a_daemon_of_an_earlier_version_says_its_pid_alone(home):
    with daemon_with_pid(home, "4711"):
        assert gather(home)["daemon_pid"] == 4711
        assert order(home, Verb.PAUSE).endswith("the daemon hears it at its next look")
    assert orders(home) == [Verb.PAUSE]
