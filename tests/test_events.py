"""What the trainer says, line by line, and what its end means."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from finetuned.events import Ending, Event, EventType, describe_end, judge, parse_event

EVENT = Event(
    1_700_000_000.25, EventType.METRICS, "step 3\nof 7", "info", {"step": 3, "train_loss": 0.1, "text": "é\n"}
)


@pytest.mark.parametrize("kind", EventType)
@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_an_event_read_back_is_the_one_that_was_written(kind, level):
    data = {"step": 3, "rung": {"batch_size": 4}, "samples": [], "list": [1, None]}
    event = Event(1.5, kind, "a message", level, data)
    assert parse_event(event.line()) == event


def test_an_event_is_one_line():
    assert EVENT.line().count(b"\n") == 1
    assert EVENT.line().endswith(b"\n")
    assert parse_event(EVENT.line()) == EVENT


def test_the_fields_are_those_of_openai():
    assert json.loads(EVENT.line()).keys() == {"created_at", "level", "type", "message", "data"}


def test_figures_that_json_does_not_know_are_written_as_text():
    event = parse_event(Event(1.0, EventType.RESULT, "m", data={"path": Path("/x")}).line())
    assert event is not None
    assert event.data == {"path": "/x"}


def test_a_file_name_that_is_no_utf8_does_not_stop_an_event():
    name = os.fsdecode(b"caf\xe9.jsonl")
    event = parse_event(Event(1.0, EventType.ERROR, f"reading {name}", "error", {"where": name}).line())
    assert event is not None
    assert "caf" in event.message


def test_a_line_torn_anywhere_is_no_event():
    whole = EVENT.line().rstrip(b"\n")
    for length in range(len(whole)):
        assert parse_event(whole[:length]) is None
        assert parse_event(whole[: length // 2] + whole[length:]) is None or length < 2


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"3",
        b"{}",
        b"\xff\xff",
        b'{"created_at": 1, "level": "info", "type": "song", "message": "m", "data": {}}',
        b'{"created_at": "x", "level": "info", "type": "metrics", "message": "m", "data": {}}',
        b'{"created_at": 1, "level": "info", "type": "metrics", "message": "m", "data": 3}',
        b'{"created_at": 1, "level": "info", "type": "metrics", "message": "m"}',
    ],
)
def test_what_is_no_event_is_none(line):
    assert parse_event(line) is None


SAMPLE = {"prompt": "a", "expected": "b", "answer": "c", "exact": False, "similarity": 0.5, "seconds": 1.5}


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("metrics", {"train_loss": 1.0}),
        ("metrics", {"step": "3", "train_loss": 1.0}),
        ("metrics", {"step": 2**63}),
        ("metrics", {"step": True}),
        ("metrics", {"step": 3, "train_loss": "low"}),
        ("metrics", {"step": 3, "train_loss": None}),
        ("metrics", {"step": 3, "seconds_left": float("inf")}),
        ("checkpoint", {"step": -1}),
        ("phase", {"phase": ["training"]}),
        ("phase", {"phase": "generating", "counted": 7}),
        ("plan", {}),
        ("rung", {"rung": 4}),
        ("predictions", {"step": 3}),
        ("predictions", {"samples": [SAMPLE]}),
        ("predictions", {"step": 3, "samples": {"0": SAMPLE}}),
        ("predictions", {"step": 3, "samples": ["x"]}),
        ("predictions", {"step": 3, "epoch": "one", "samples": [SAMPLE]}),
        ("predictions", {"step": 3, "samples": [{**SAMPLE, "answer": None}]}),
        ("predictions", {"step": 3, "samples": [{**SAMPLE, "similarity": "much"}]}),
        ("predictions", {"step": 3, "samples": [{**SAMPLE, "exact": 2}]}),
        ("predictions", {"step": 3, "samples": [{**SAMPLE, "error": {}}]}),
    ],
    ids=str,
)
def test_what_does_not_hold_what_its_readers_rely_on_is_none(kind, data):
    assert parse_event(Event(1.0, EventType(kind), "m", data=data).line()) is None


def test_a_time_or_a_level_that_is_none_is_no_event():
    assert parse_event(Event(float("nan"), EventType.MESSAGE, "m").line()) is None
    assert parse_event(Event(1.0, EventType.MESSAGE, "m", "\ud800").line()) is None


def test_a_loss_that_is_no_number_is_told_all_the_same():
    told = parse_event(Event(1.0, EventType.METRICS, "m", data={"step": 3, "train_loss": float("nan")}).line())
    assert told is not None
    answers = parse_event(Event(1.0, EventType.PREDICTIONS, "m", data={"step": 3, "samples": [SAMPLE]}).line())
    assert answers is not None


@pytest.mark.parametrize(
    ("returncode", "ending"),
    [
        (0, Ending.SUCCEEDED),
        (65, Ending.PERMANENT),
        (78, Ending.PERMANENT),
        (70, Ending.RESOURCE),
        (75, Ending.TRANSIENT),
        (130, Ending.INTERRUPTED),
        (-signal.SIGKILL, Ending.HOST_MEMORY),
        (1, Ending.BUG),
        (2, Ending.BUG),
        (127, Ending.BUG),
        (-signal.SIGSEGV, Ending.BUG),
        (-signal.SIGTERM, Ending.BUG),
    ],
)
def test_an_exit_means(returncode, ending):
    assert judge(returncode, stopped=False) is ending


@pytest.mark.parametrize("returncode", [130, -signal.SIGKILL, -signal.SIGTERM, 1, 65, 70, 75])
def test_whatever_ends_a_trainer_that_we_stopped_is_an_interruption(returncode):
    assert judge(returncode, stopped=True) is Ending.INTERRUPTED


def test_a_trainer_that_was_done_before_it_was_stopped_has_succeeded():
    assert judge(0, stopped=True) is Ending.SUCCEEDED


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (65, "exit code 65 (bad data)"),
        (70, "exit code 70 (out of memory)"),
        (78, "exit code 78 (bad settings)"),
        (3, "exit code 3 (a bug)"),
        (-signal.SIGKILL, "killed by SIGKILL"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
    ],
)
def test_an_end_in_words(returncode, words):
    assert describe_end(returncode) == words


def test_a_realtime_signal_has_words_too():
    assert describe_end(-(signal.SIGRTMIN + 1)).startswith("killed by ")
