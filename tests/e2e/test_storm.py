"""Very many files, and odd ones, before a real daemon: each is taken once, or left with a word."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.jobs import Outcome, State
from finetuned.spool.orders import pause

STORM = 1000


def lines(count: int, start: int = 0) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in chat_rows(count, start=start)).encode()


def test_a_thousand_files_at_once_are_all_taken_and_none_twice_though_the_daemon_is_killed(home, daemon, standin):
    pause(home, "a test")
    one = daemon()
    one.says("finetuned starts")
    staged = home.root / "staged"
    staged.mkdir()
    for number in range(STORM):
        (staged / f"x{number}.jsonl").write_bytes(lines(1, number))
    for path in list(staged.iterdir()):
        path.rename(home.inbox / path.name)
    eventually(lambda: len(list(home.jobs.iterdir())) > STORM // 10, why="the first are taken")
    one.stop(signal.SIGKILL)
    assert any(home.inbox.iterdir())
    two = daemon()
    eventually(lambda: [job.state for job in two.jobs()] == [State.QUEUED] * STORM, seconds=120, why="all are queued")
    names = {os.fsdecode(job.name): job.id for job in two.jobs()}
    assert names.keys() == {f"x{number}.jsonl" for number in range(STORM)}
    for name, job_id in names.items():
        assert (home.job(job_id).path / "input.jsonl").read_bytes() == lines(1, int(name[1:-6]))
    assert len(list(home.jobs.iterdir())) == STORM
    assert two.stop() == 0


def test_a_storm_does_not_keep_the_daemon_from_ending(home, daemon, standin):
    pause(home, "a test")
    for number in range(STORM):
        (home.inbox / f"x{number}.jsonl").write_bytes(lines(1, number))
    one = daemon()
    one.says("file taken")
    one.stop()
    assert any(home.inbox.iterdir())


def test_an_inbox_that_is_moved_away_with_files_in_it_and_made_again_is_served_on(home, daemon, standin):
    (home.inbox / "old.jsonl").write_bytes(lines(2)[:-9])  # cut off: it waits
    one = daemon()
    one.says("finetuned starts")
    home.inbox.rename(home.root / "moved")
    home.inbox.mkdir()
    (home.inbox / "new.jsonl").write_bytes(lines(3))
    assert one.job("new.jsonl").outcome is Outcome.SUCCEEDED
    assert (home.root / "moved" / "old.jsonl").exists()
    assert [job.name for job in one.jobs()] == [b"new.jsonl"]


def test_odd_files_are_each_taken_whole_and_once_or_left_with_a_word(home, daemon, standin):
    one = daemon()
    one.says("finetuned starts")
    want: dict[bytes, bytes] = {}

    want[b"slow.jsonl"] = lines(12)
    with (home.inbox / "slow.jsonl").open("wb", buffering=0) as slow:
        slow.write(want[b"slow.jsonl"][:500])

        for number in range(8):  # each time another file under the same name
            write_jsonl(home.root / "staged", chat_rows(2, start=number)).replace(home.inbox / "replaced.jsonl")
            time.sleep(0.05)
        want[b"replaced.jsonl"] = lines(2, 7)

        other = home.root / "other-name"
        want[b"linked.jsonl"] = lines(3, 30)
        other.write_bytes(want[b"linked.jsonl"])
        (home.inbox / "linked.jsonl").hardlink_to(other)

        want[b"caf\xe9.jsonl"] = lines(3, 40)
        (home.inbox / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(want[b"caf\xe9.jsonl"])

        (home.inbox / "pointer.jsonl").symlink_to(other)
        os.mkfifo(home.inbox / "pipe.jsonl")
        for name in want.keys() - {b"slow.jsonl"}:
            assert one.job(os.fsdecode(name)).outcome is Outcome.SUCCEEDED
        assert (home.inbox / "slow.jsonl").exists()  # quiet for long, and still open
        slow.write(want[b"slow.jsonl"][500:])
    assert one.job("slow.jsonl").outcome is Outcome.SUCCEEDED

    jobs = {job.name: job for job in one.jobs()}
    assert len(one.jobs()) == len(want)
    for name, content in want.items():
        [archived] = home.archive.glob(f"20*/{jobs[name].id}/{os.fsdecode(name)}")
        assert archived.read_bytes() == content
    other.write_bytes(b"the other name's owner writes on\n")
    [archived] = home.archive.glob("20*/*/linked.jsonl")
    assert archived.read_bytes() == want[b"linked.jsonl"]
    assert sorted(path.name for path in home.inbox.iterdir()) == ["pipe.jsonl", "pointer.jsonl"]
    for name, what in (("pointer.jsonl", "is a symbolic link"), ("pipe.jsonl", "is not a regular file")):
        assert [what in line for line in one.log().splitlines() if name in line] == [True]


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to give a file away, and setpriv"
)
def test_a_file_that_may_not_be_read_is_left_until_it_may(home):
    pause(home, "a test")
    path = home.inbox / "private.jsonl"
    path.write_bytes(lines(2))
    path.chmod(0o600)
    os.chown(path, pwd.getpwnam("nobody").pw_uid, -1)
    without_privileges = ["setpriv", "--bounding-set", "-all"]  # root, but bound by owners and modes like anybody
    command = [*without_privileges, sys.executable, "-m", "finetuned", "run", "--base-dir", str(home.root)]
    one = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def said(text: str) -> bool:
        return any(text in path.read_text() for path in home.logs.glob("daemon_*.log"))

    try:
        eventually(lambda: said("may not be read: owner nobody, mode 0600"), why="a word in the log")
        path.chmod(0o644)
        eventually(lambda: said("event=queued"), why="taken, now that it may be read")
    finally:
        one.kill()
        one.wait()
    [job] = home.jobs.iterdir()
    assert (job / "input.jsonl").read_bytes() == lines(2)
    assert not path.exists()
