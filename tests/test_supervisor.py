"""What follows an attempt's end, and reading what a trainer says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetuned.events import Ending, Event, EventType
from finetuned.fallback import Rung
from finetuned.jobs import FileIdentity, Job, State
from finetuned.ledger import Ledger
from finetuned.supervisor import (
    FIRST_DELAY,
    LONGEST_DELAY,
    MOST_IN_VAIN,
    MOST_TRANSIENT,
    Attempt,
    EventTail,
    decide,
    progress_after,
    progress_for_next,
)

TOP = Rung(batch_size=4, gradient_accumulation=2, activation_checkpointing=False, tuning="lora", max_length=1024)
FOOT = Rung(batch_size=1, gradient_accumulation=8, activation_checkpointing=True, tuning="lora", max_length=1024)
SAID = {"code": "some_code", "what": "it broke", "where": "line 3", "remedy": "mend it"}


def job(*, rung: Rung = TOP, **changes: Any) -> Job:
    made = Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.RUNNING, 1.0, rung=rung.as_dict())
    return replace(made, **changes)


def decided(ending: Ending, *, error: dict | None = None, rung: Rung = TOP, **changes: Any):
    return decide(job(rung=rung, **changes), ending, error=error, end="exit code 1 (a bug)")


# -- decide


@pytest.mark.parametrize("ending", Ending)
def test_every_ending_publishes_fails_or_queues_again_and_never_two_of_them(ending):
    for retries in range(MOST_TRANSIENT + 2):
        for error in (None, SAID):
            for rung in (TOP, FOOT):
                decision = decided(ending, error=error, rung=rung, retries=retries)
                assert not (decision.publish and decision.reason)
                assert decision.publish is (ending is Ending.SUCCEEDED)
                if decision.reason:
                    assert decision.reason.keys() == {"code", "what", "where", "remedy"}
                    assert decision.reason["what"]
                    assert decision.reason["remedy"]
                elif not decision.publish:
                    assert decision.why


def test_a_success_is_published():
    assert decided(Ending.SUCCEEDED).publish


def test_an_interruption_queues_again_and_is_not_counted():
    decision = decided(Ending.INTERRUPTED, error=SAID, retries=9)
    assert (decision.reason, decision.counted, decision.delay, decision.rung) == (None, False, 0, None)


def test_a_permanent_end_fails_at_once_with_what_the_trainer_said():
    assert decided(Ending.PERMANENT, error={**SAID, "rung": {}}).reason == SAID


def test_a_permanent_end_without_a_word_is_explained_by_its_exit():
    reason = decided(Ending.PERMANENT).reason
    assert reason
    assert "exit code 1" in reason["what"]
    assert reason["where"] == "x.jsonl"


def test_out_of_memory_goes_one_rung_down_and_is_not_counted():
    decision = decided(Ending.RESOURCE, error=SAID)
    assert decision.rung == {**TOP.as_dict(), "batch_size": 2, "gradient_accumulation": 4}
    assert (decision.reason, decision.counted, decision.delay) == (None, False, 0)
    assert "batch halved" in decision.why


def test_out_of_memory_goes_down_from_the_rung_that_the_trainer_had_reached():
    reached = replace(TOP, batch_size=1, gradient_accumulation=8)
    decision = decided(Ending.RESOURCE, error={**SAID, "rung": reached.as_dict()})
    assert decision.rung == {**reached.as_dict(), "activation_checkpointing": True}


def test_at_the_foot_of_the_ladder_out_of_memory_fails_with_what_the_trainer_said():
    assert decided(Ending.RESOURCE, error=SAID, rung=FOOT).reason == SAID


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"fallback_4bit": True}, {"tuning": "qlora"}),
        ({"fallback_max_length": True}, {"max_length": 512}),
        ({"fallback_4bit": True, "fallback_max_length": True}, {"tuning": "qlora"}),
    ],
)
def test_rungs_that_change_the_numbers_need_leave(settings, changed):
    assert decided(Ending.RESOURCE, error=SAID, rung=FOOT, settings=settings).rung == {**FOOT.as_dict(), **changed}
    assert decided(Ending.RESOURCE, error=SAID, rung=FOOT).rung is None


def test_the_whole_way_down_keeps_the_rows_of_a_step_and_ends():
    settings = {"fallback_4bit": True, "fallback_max_length": True}
    rung, seen = Rung(6, 3, activation_checkpointing=False, tuning="lora", max_length=1024), []
    while (decision := decided(Ending.RESOURCE, error=SAID, rung=rung, settings=settings)).rung:
        rung = Rung(**decision.rung)
        seen.append(rung)
        assert rung.effective_batch == 18
    assert len(set(seen)) == len(seen)
    assert seen[-1] == Rung(1, 18, activation_checkpointing=True, tuning="qlora", max_length=256)
    assert decision.reason == SAID


def test_a_first_sigkill_goes_one_rung_down():
    decision = decided(Ending.HOST_MEMORY)
    assert decision.rung == {**TOP.as_dict(), "batch_size": 2, "gradient_accumulation": 4}
    assert not decision.reason


def test_a_second_sigkill_fails_with_what_to_change():
    progress = progress_for_next({"step": 3}, Ending.HOST_MEMORY)
    reason = decided(Ending.HOST_MEMORY, progress=progress).reason
    assert reason
    assert reason["code"] == "killed"
    assert "memory" in reason["what"]
    assert "max_length" in reason["remedy"]
    assert "batch_size" in reason["remedy"]


def test_a_sigkill_at_the_foot_of_the_ladder_fails_with_what_to_change():
    reason = decided(Ending.HOST_MEMORY, rung=FOOT).reason
    assert reason
    assert reason["code"] == "killed"


@pytest.mark.parametrize(
    ("retries", "delay"), [(0, FIRST_DELAY), (1, 2 * FIRST_DELAY), (2, 4 * FIRST_DELAY), (4, 16 * FIRST_DELAY)]
)
def test_a_transient_end_is_tried_again_later_and_later(retries, delay):
    decision = decided(Ending.TRANSIENT, error=SAID, retries=retries)
    assert (decision.delay, decision.counted, decision.reason) == (delay, True, None)
    assert decision.delay <= LONGEST_DELAY
    assert decision.why == "line 3: it broke"


def test_a_transient_end_too_many_fails():
    assert decided(Ending.TRANSIENT, error=SAID, retries=MOST_TRANSIENT).reason == SAID


def test_a_bug_is_tried_once_more_and_then_fails():
    first = decided(Ending.BUG, retries=MOST_TRANSIENT)  # whatever else it has been tried again for
    assert first.reason is None
    assert "exit code 1" in first.why
    second = decided(Ending.BUG, progress=progress_for_next({}, Ending.BUG)).reason
    assert second
    assert second["code"] == "bug"
    assert "exit code 1" in second["what"]


def test_a_file_name_that_is_no_utf8_can_be_in_a_reason():
    reason = decided(Ending.BUG, progress={"bugs": 1}, name=b"\xff.jsonl").reason
    assert reason
    assert reason["where"] == "\\xff.jsonl"


def test_a_gpu_that_failed_is_not_counted_and_the_rung_stays():
    decision = decided(Ending.DEVICE, error=SAID, retries=9, progress={"bugs": 1, "host_kills": 1})
    assert (decision.reason, decision.counted, decision.delay, decision.rung) == (None, False, 0, None)


# -- from attempt to attempt


def test_the_next_attempt_does_not_inherit_the_error():
    assert progress_for_next({"step": 3, "error": SAID}, Ending.TRANSIENT) == {"step": 3}


def test_a_sigkill_is_remembered_and_not_forgotten_by_another_end():
    progress = progress_for_next({"step": 3}, Ending.HOST_MEMORY)
    assert progress_for_next(progress, Ending.INTERRUPTED)["host_kills"] == 1


def event(kind: EventType, **data: Any) -> Event:
    return Event(1.0, kind, "m", "info", data)


def test_events_fold_into_the_newest_figures():
    events = [
        event(EventType.PHASE, phase="training"),
        event(EventType.PLAN, total_steps=7, device="cpu", reasons={"dtype": "because"}),
        event(EventType.METRICS, step=1, train_loss=2.0),
        event(EventType.METRICS, step=2, valid_loss=3.0),
        event(EventType.MESSAGE, step=99),
        event(EventType.ERROR, **SAID),
    ]
    before = {"step": 0, "kept": 1}
    assert progress_after(before, events) == {
        "step": 2,
        "kept": 1,
        "phase": "training",
        "total_steps": 7,
        "device": "cpu",
        "train_loss": 2.0,
        "valid_loss": 3.0,
        "error": SAID,
    }
    assert before == {"step": 0, "kept": 1}


# -- the tail of events.jsonl


@pytest.fixture
def said(tmp_path):
    return tmp_path / "events.jsonl"


def append(path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def steps(events: list[Event]) -> list[int]:
    return [event.data["step"] for event in events]


def line(step: int) -> bytes:
    return event(EventType.METRICS, step=step, text="é\r\u2028").line()


def test_before_the_trainer_speaks_there_is_nothing(said):
    assert EventTail(said).read() == []


def test_each_event_is_given_once(said):
    tail = EventTail(said)
    append(said, line(1) + line(2))
    assert steps(tail.read()) == [1, 2]
    assert tail.read() == []
    append(said, line(3))
    assert steps(tail.read()) == [3]


def test_half_a_line_waits_for_its_other_half_wherever_it_is_cut(said):
    whole = line(2)
    for cut in range(len(whole)):
        said.unlink(missing_ok=True)
        tail = EventTail(said)
        append(said, line(1) + whole[:cut])
        assert steps(tail.read()) == [1]
        assert tail.offset == len(line(1))
        append(said, whole[cut:] + line(3))
        assert steps(tail.read()) == [2, 3]


def test_a_new_daemon_goes_on_where_the_old_one_stopped(said):
    first = EventTail(said)
    append(said, line(1) + line(2)[:10])
    first.read()
    append(said, line(2)[10:])
    assert steps(EventTail(said, first.offset).read()) == [2]


def test_what_nobody_listened_to_for_long_is_given_piece_by_piece(said):
    text = event(EventType.MESSAGE, text="x" * 1000)
    append(said, text.line() * 10_000 + event(EventType.MESSAGE, text="x" * 10**7).line() + line(1))
    tail, given = EventTail(said), []
    while not tail.drained:
        given.append(tail.read())
    assert sum(map(len, given)) == 10_002
    assert len(given) >= 3
    assert steps(given[-1][-1:]) == [1]
    append(said, line(2))
    assert steps(tail.read()) == [2]


def test_a_torn_line_in_the_middle_costs_only_itself(said):
    append(said, line(1) + line(2)[:20] + b"\n" + line(3))
    tail = EventTail(said)
    assert steps(tail.read()) == [1, 3]
    assert tail.offset == said.stat().st_size


# -- trainers that an engine takes away


class Taken:
    """A trainer on another machine that its engine has ended."""

    pid, id, taken, waits = None, "7", "PREEMPTED", ""

    def poll(self) -> int:
        return 143


def test_a_trainer_that_is_taken_away_goes_on_but_not_for_ever_where_it_writes_no_checkpoint(home):
    """Steps without one are done in vain: the next attempt begins before them."""
    ledger = Ledger.open(home.ledger)
    ledger.add(job())
    events = home.job("x-1").events
    events.parent.mkdir(parents=True)

    def attempt(*said: Event):
        append(events, b"".join(one.line() for one in said))
        one = Attempt(ledger, home, ledger.job("x-1"), Taken())
        one.tend()
        return one.conclude(143)

    def steps_without_checkpoint(number: int):
        return attempt(event(EventType.METRICS, step=50 + number))  # it comes further than before, now and then

    for number in range(MOST_IN_VAIN - 1):
        decision, ending = steps_without_checkpoint(number)
        assert (ending, decision.reason) == (Ending.INTERRUPTED, None), number
    assert attempt(event(EventType.CHECKPOINT, checkpoint_step=100))[0].reason is None
    told = [steps_without_checkpoint(number)[0].reason for number in range(MOST_IN_VAIN - 1)]
    assert told[:-1] == [None] * (MOST_IN_VAIN - 2)
    assert told[-1]["code"] == "taken_too_often"
    assert "PREEMPTED" in told[-1]["what"]
