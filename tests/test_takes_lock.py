"""The real trainer where nobody could hand it the job's lock, as on another machine; it ends before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from finetuned.events import ExitCode, parse_event
from finetuned.home import JobFolder
from finetuned.jobs import FileIdentity, JobSpec
from finetuned.lifesigns import TAKES_LOCK, exit_code, take_lock


@pytest.fixture
def folder(tmp_path):
    """A job's folder whose third attempt is wanted; its input is not there."""
    identity = FileIdentity(0, 0, 0, 0)
    spec = JobSpec("x-1", "x.jsonl", "", identity, 0.0, "input.jsonl", settings={}, rung={}, attempt=3)
    made = JobFolder(tmp_path)
    made.spec.write_bytes(spec.encode())
    return made


def trained(folder, *, attempt: int) -> int:
    command = [sys.executable, "-P", "-m", "finetuned.trainer", str(folder.path)]
    return subprocess.run(command, env={**os.environ, TAKES_LOCK: str(attempt)}, check=False, timeout=60).returncode


def test_it_says_that_an_earlier_one_is_still_at_work(folder):
    assert take_lock(folder)
    assert trained(folder, attempt=3) == ExitCode.TEMPORARY
    [event] = map(parse_event, folder.events.read_bytes().splitlines())
    assert event.data["code"] == "still_at_work"
    assert exit_code(folder, 3) is None, "it is the other one's to leave"


def test_one_that_its_engine_begins_too_late_leaves_the_job_alone(folder):
    assert trained(folder, attempt=2) == ExitCode.STOPPED
    assert not folder.events.exists()
    assert not folder.lock.exists()


def test_one_whose_job_was_put_away_meanwhile_or_was_asked_to_stop_before_it_began_leaves_it_alone(folder):
    folder.stop(3).touch()
    assert trained(folder, attempt=3) == ExitCode.STOPPED
    folder.stop(3).unlink()
    folder.spec.unlink()
    assert trained(folder, attempt=3) == ExitCode.STOPPED
    assert not [*folder.path.iterdir()]
