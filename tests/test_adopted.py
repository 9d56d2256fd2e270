"""A trainer that is no child of ours, with a real process in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import eventually
from finetuned import __version__
from finetuned.home import JobFolder
from finetuned.launchers.adopted import AdoptedTrainer
from finetuned.lifesigns import leave_exit_code, locked

HOLDER = """
import fcntl, os, subprocess, sys, time
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
child = subprocess.Popen(["sleep", "600"]) if "child" in sys.argv else None
lock.write(f"{os.getpid()} {sys.argv[2]} {sys.argv[3]}\\n")
lock.flush()
print(child.pid if child else 0, flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    return JobFolder(tmp_path)


@pytest.fixture
def hold(folder):
    """Let a process hold the lock, signed so; the process and its child's pid."""
    held = []

    def start(attempt: int = 1, version: str = __version__, *words: str) -> tuple[subprocess.Popen, int]:
        command = [sys.executable, "-c", HOLDER, str(folder.lock), str(attempt), version, *words]
        held.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        return held[-1], int(held[-1].stdout.readline())

    yield start
    for process in held:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_is_found_by_the_lock_that_it_holds_and_by_its_attempt(folder, hold):
    assert AdoptedTrainer.find(folder, 2) is None
    process, _ = hold(attempt=2)
    found = AdoptedTrainer.find(folder, 2)
    assert found.pid == process.pid
    assert found.poll() is None
    assert found.why_unfit() == ""
    assert AdoptedTrainer.find(folder, 3) is None


def test_a_process_that_does_not_hold_the_lock_is_not_it(folder, tmp_path):
    folder.lock.write_text(f"{os.getpid()} 1 {__version__}\n")
    assert AdoptedTrainer.find(folder, 1) is None
    folder.lock.write_text(f"{2**22 + 1} 1 {__version__}\n")
    assert AdoptedTrainer.find(folder, 1) is None
    folder.lock.write_text("")
    assert AdoptedTrainer.find(folder, 1) is None


@pytest.mark.parametrize(("said", "status"), [(0, 0), (70, 70), (None, -signal.SIGKILL)])
def test_its_end_is_what_it_said_and_without_a_word_sigkill(folder, hold, said, status):
    process, _ = hold()
    found = AdoptedTrainer.find(folder, 1)
    if said is not None:
        leave_exit_code(folder, 1, said)
    assert found.poll() is None  # it has said so, and still runs
    process.kill()
    assert eventually(lambda: found.poll() is not None)
    assert found.poll() == status
    found.ask_to_stop()
    found.kill()


def test_one_that_has_ended_is_found_by_what_it_said(folder, hold):
    process, _ = hold()
    process.kill()
    process.wait()
    assert AdoptedTrainer.find(folder, 1) is None
    leave_exit_code(folder, 1, 75)
    found = AdoptedTrainer.find(folder, 1)
    assert (found.poll(), found.why_unfit()) == (75, "")


def test_it_is_killed_with_its_children_even_where_it_stands_still(folder, hold):
    process, child = hold(1, __version__, "child")
    process.send_signal(signal.SIGSTOP)
    found = AdoptedTrainer.find(folder, 1)
    eventually(lambda: found.stands_still)
    assert "stands still" in found.why_unfit()
    found.kill()
    assert eventually(found.poll) == -signal.SIGKILL
    eventually(lambda: not Path(f"/proc/{child}").exists() or b") Z " in Path(f"/proc/{child}/stat").read_bytes())
    assert not locked(folder)


def test_one_of_another_version_or_long_silent_is_unfit(folder, hold):
    hold(1, "0.0.9")
    assert "0.0.9" in AdoptedTrainer.find(folder, 1).why_unfit()
    folder.lock.unlink()
    hold()
    found = AdoptedTrainer.find(folder, 1)
    folder.events.touch()
    assert found.why_unfit() == ""
    os.utime(folder.events, (0, 0))
    assert "it has said nothing for" in found.why_unfit()
