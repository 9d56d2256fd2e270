"""A job's curves: what is gathered, and the picture of it."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest

from finetuned.curves import curves_of, smoothed
from finetuned.events import Event, EventType
from finetuned.jobs import FileIdentity, Job, State
from finetuned.ledger import Ledger


def metrics(**data) -> Event:
    return Event(1.5, EventType.METRICS, "m", "info", data)


def a_training(steps: int) -> list[Event]:
    events = [metrics(step=0, valid_loss=3.0)]
    for step in range(1, steps + 1):
        events.append(metrics(step=step, train_loss=3.0 / step, learning_rate=1e-4 * step))
        if step % 10 == 0:
            events.append(metrics(step=step, valid_loss=2.0 / step))
    return events


def test_a_step_that_was_done_again_counts_as_it_was_done_last_and_what_is_no_number_not_at_all():
    events = [
        metrics(step=0, valid_loss=3.0),
        metrics(step=1, train_loss=2.0, learning_rate=0.1),
        metrics(step=2, train_loss=9.0, learning_rate=0.2),
        Event(1.5, EventType.CHECKPOINT, "m", "info", {"step": 1, "train_loss": 77.0}),
        metrics(step=2, train_loss=1.0, learning_rate=0.2),
        metrics(step=3, train_loss=math.nan, learning_rate=0.1),
        metrics(step=3, valid_loss=2.5),
    ]
    curves = curves_of(events)
    assert curves.train_loss == [(1, 2.0), (2, 1.0)]
    assert curves.valid_loss == [(0, 3.0), (3, 2.5)]
    assert curves.learning_rate == [(1, 0.1), (2, 0.2), (3, 0.1)]
    assert not curves_of([])


def test_a_running_mean_begins_with_what_there_is():
    assert smoothed([(1, 4.0), (2, 2.0), (3, 0.0), (4, 10.0)], 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 5.0)]


@pytest.fixture
def trained(home):
    with_steps = Ledger.open(home.ledger)
    for job_id, steps in (("many-1", 200), ("few-1", 3), ("one-1", 1), ("none-1", 0)):
        with_steps.add(Job(job_id, b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.RUNNING, 1.0))
        if steps:
            with_steps.record(job_id, a_training(steps), offset=1)
    with_steps.close()
    return home


def plot(home, *words, prefix: str = "") -> subprocess.CompletedProcess[str]:
    script = f"{prefix}\nfrom finetuned.cli import main; main()"
    command = [sys.executable, "-c", script, "plot", "--base-dir", str(home.root), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("job", ["many", "few"])
@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_says_of_which_kind_the_picture_is(trained, tmp_path, job, ending, begins):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"loss.{ending}"
    said = plot(trained, job, "-o", picture)
    assert said.returncode == 0, said.stderr
    assert picture.read_bytes().startswith(begins)
    assert f"of {job}-1" in said.stdout
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [picture.name]


def test_a_single_step_is_seen(trained, tmp_path):
    pytest.importorskip("matplotlib")
    assert plot(trained, "one", "-o", tmp_path / "loss.svg").returncode == 0
    assert re.search(r"<use [^>]*#3b6fb6", (tmp_path / "loss.svg").read_text())


def test_what_cannot_be_drawn_is_told(trained, tmp_path):
    pytest.importorskip("matplotlib")
    for words, reason in (
        (["many", "-o", tmp_path / "loss.docx"], "End its name with one of"),
        (["many", "-o", tmp_path / "nowhere" / "loss.png"], "cannot be written"),
        (["many", "-o", "/dev/null/loss.png"], "cannot be written"),
        (["none", "-o", tmp_path / "loss.png"], "has done no step yet"),
        (["other", "-o", tmp_path / "loss.png"], "there is no job other"),
    ):
        said = plot(trained, *words)
        assert said.returncode == 78
        assert reason in said.stderr
        assert "Traceback" not in said.stderr


def test_without_matplotlib_it_says_how_to_get_it(trained, tmp_path):
    said = plot(trained, "many", "-o", tmp_path / "loss.png", prefix="import sys; sys.modules['matplotlib'] = None")
    assert said.returncode == 78
    assert "pip install 'finetuned[plot]'" in said.stderr
