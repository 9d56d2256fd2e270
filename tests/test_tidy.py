"""What is thrown away and what never is."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import structlog

from conftest import chat_rows, eventually, write_jsonl
from finetuned.config import Config
from finetuned.events import Event, EventType
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.supervisor import EventTail
from finetuned.tail import tail
from finetuned.tidy import keep_ends, release, tidy

DAY = 86400.0


@pytest.fixture
def ledger(home):
    ledger = Ledger.open(home.ledger)
    yield ledger
    ledger.close()


def add(ledger: Ledger, name: str, state: State = State.FINISHED) -> Job:
    job = Job(name, name.encode(), "", FileIdentity(1, 2, 3, 4), state, 1.0, outcome=Outcome.FAILED)
    ledger.add(job)
    return job


def aged(path, days: float):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_logs_are_kept_for_so_many_days_and_those_of_unfinished_jobs_longer(home, ledger):
    add(ledger, "waits-1", State.QUEUED)
    old = [aged(home.logs / "daemon_20200101.log", 8), aged(home.job_logs / "done-1.log", 8)]
    old.append(aged(home.machinery / "state.damaged-1.db", 8))
    kept = [
        aged(home.logs / "daemon_20200108.log", 6),
        aged(home.job_logs / "done-2.log", 6),
        aged(home.job_logs / "waits-1.log", 800),
        aged(home.logs / "mine.log", 800),
    ]
    tidy(home, ledger, Config(keep_logs_days=7))
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in kept)


def test_what_a_failed_job_had_computed_goes_after_so_many_days_its_input_and_reason_never(home, ledger):
    for name, days in (("old-1", 31), ("new-1", 29), ("retried-1", 31)):
        folder = home.failed / name
        for kept in ("checkpoints/step-1/trained.safetensors", "adapter/adapter_model.safetensors", "x.jsonl"):
            aged(folder / kept, days)
        aged(folder / "reason.json", days)
    add(ledger, "retried-1", State.CLAIMING)
    tidy(home, ledger, Config(keep_failed_days=30))
    assert sorted(path.name for path in (home.failed / "old-1").iterdir()) == ["reason.json", "x.jsonl"]
    for name in ("new-1", "retried-1"):
        assert len(list((home.failed / name).iterdir())) == 4


def test_a_link_that_somebody_put_there_is_not_followed(home, ledger, tmp_path):
    precious = aged(tmp_path / "precious" / "file", 100)
    aged(home.failed / "x-1" / "reason.json", 100)
    (home.failed / "x-1" / "checkpoints").symlink_to(precious.parent)
    tidy(home, ledger, Config())
    assert precious.exists()


def test_figures_get_thinner_with_age_and_evaluations_stay(ledger):
    now = 1_800_000_000.0 // 3600 * 3600
    job = add(ledger, "x-1")
    ages = {"today": 0.5 * DAY, "week": 7 * DAY, "year": 300 * DAY}
    events, samples = [], []
    for age in ages.values():
        for second in range(0, 7200, 10):  # two hours
            at = now - age + second
            samples += [(at, uuid, {"at": at}) for uuid in ("GPU-1", "GPU-2")]
            events.append(Event(at, EventType.METRICS, "m", "info", {"step": second}))
        events.append(Event(now - age, EventType.METRICS, "m", "info", {"valid_loss": 1.0}))
        events.append(Event(now - age, EventType.MESSAGE, "m", "info", {}))
    ledger.record(job.id, events, offset=0)
    ledger.record_gpu(job.id, samples)
    for _ in range(2):  # a second time changes nothing
        ledger.thin(now)

        def count(things, age):
            return sum(now - age <= at < now - age + 7200 for at in things)

        told = ledger.events(job.id)
        steps = [event.created_at for event in told if "step" in event.data]
        sampled = [sample["at"] for sample in ledger.gpu_samples(job.id)]
        assert [count(steps, age) for age in ages.values()] == [720, 120, 2]
        assert [count(sampled, age) for age in ages.values()] == [1440, 240, 4]
        assert sum("valid_loss" in event.data for event in told) == 3
        assert sum(event.type is EventType.MESSAGE for event in told) == 3


# -- a job's log


def test_a_log_that_is_too_large_keeps_head_and_tail_in_whole_lines(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {n}\n" for n in range(10_000)))
    assert not keep_ends(log, 10**6)
    assert keep_ends(log, 50_000, head=1000, tail=2000)
    lines = log.read_text().splitlines()
    assert 2900 < log.stat().st_size < 3200
    [mark] = [n for n, line in enumerate(lines) if "are left out here" in line]
    assert lines[: mark - 1] == [f"line {n}" for n in range(mark - 1)]
    assert lines[-1] == "line 9999"
    assert all(line.startswith("line ") for line in lines[mark + 2 :])
    with structlog.testing.capture_logs() as said:
        assert not keep_ends(tmp_path / "none.log")
    assert said == []  # a job may be in a cluster's queue for days


WRITER = """
import sys
with open(sys.argv[1], "ab", buffering=0) as log:
    for number in range(400_000):
        log.write(b"line %d\\n" % number)
"""


def test_whoever_writes_to_it_goes_on_behind_the_tail(tmp_path):
    log = tmp_path / "x.log"
    log.touch()
    largest = 0
    with subprocess.Popen([sys.executable, "-c", WRITER, str(log)]) as writer:
        while writer.poll() is None:
            keep_ends(log, 200_000, head=20_000, tail=20_000)
            largest = max(largest, log.stat().st_size)
    keep_ends(log, 200_000, head=20_000, tail=20_000)
    assert writer.returncode == 0
    assert b"\0" not in log.read_bytes()
    lines = log.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("line 0", "line 399999")
    numbers = [int(line[5:]) for line in lines if line.startswith("line ")]
    assert numbers == sorted(set(numbers))
    assert all(not line or line.startswith(("line ", "[...")) for line in lines)
    assert log.stat().st_size <= 200_000


def test_who_follows_a_log_that_is_cut_goes_on_with_its_newest_lines(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("old\n" * 1000)
    following = tail(lambda: log, lines=1, follow=True)
    assert next(following) == "old"
    keep_ends(log, 1000, head=100, tail=100)
    script = f"import time; time.sleep(1)\nopen({str(log)!r}, 'a').write('new\\n')"
    with subprocess.Popen([sys.executable, "-c", script]):
        assert next(following) == "new"


# -- events.jsonl


def test_what_is_in_the_ledger_is_given_back_to_the_disk_and_the_rest_is_read_on(tmp_path):
    path = tmp_path / "events.jsonl"
    line = Event(1.0, EventType.MESSAGE, "m" * 1000, "info", {}).line()
    path.write_bytes(line * 3000)
    reader = EventTail(path)
    assert len(reader.read()) == 3000
    assert not release(path, reader.offset)  # it is not that large
    path.open("ab").write(line)
    before = path.stat()
    if not release(path, reader.offset, largest=2**20):
        pytest.skip("this file system cannot give a part of a file back")
    after = path.stat()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 < 2**16
    assert len(reader.read()) == 1
    path.open("ab").write(line)
    assert len(reader.read()) == 1
    assert len(EventTail(path).read()) == 2  # the ledger was lost: what is still there counts


def test_a_job_that_prints_without_end_leaves_a_log_within_its_bounds(home, daemon, standin):
    standin(noise=70)
    write_jsonl(home.inbox / "x.jsonl", chat_rows(3))
    job = daemon().job("x.jsonl")
    assert job.outcome is Outcome.SUCCEEDED
    log = home.job_log(job.id)
    assert log.stat().st_size < 64 * 2**20
    assert b"are left out here" in log.read_bytes()


def test_a_daemon_tidies_when_it_starts(home, daemon):
    old = aged(home.job_logs / "done-1.log", 8000)
    one = daemon()
    eventually(lambda: not old.exists())
    one.says("old file removed")
    assert one.stop() == 0
