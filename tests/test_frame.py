"""The frame of `finetuned top`: what is in it, and that it fits."""

from __future__ import annotations

import click
import pytest

from finetuned.curves import Curves
from finetuned.frame import KEYS, Size, bar, choices, cut, frame, sparkline


def job(name: str, **more) -> dict:
    return {"id": name, "profile": None, "progress": {}, "rung": {"batch_size": 4}, "outcome": None, **more}


RUNNING = job(
    "units-1a",
    progress={
        "phase": "training", "step": 120, "total_steps": 300, "train_loss": 0.84, "tokens_per_second": 1240.0,
        "seconds_left": 185, "grad_norm": 1.25,
    },
)  # fmt: skip
GPU = {
    "index": 0, "utilization": 87, "memory_used": 40 * 2**30, "memory_total": 80 * 2**30, "temperature": 71,
    "power": 420.0, "throttle_reasons": ["power cap"],
}  # fmt: skip
ANSWER = {"prompt": "What is\n2 + 2?", "answer": "4", "exact": 1, "error": None, "step": 100}


def facts(**more) -> dict:
    curves = Curves([(n, 3.0 / n) for n in range(1, 121)], [(0, 3.5), (100, 0.9)], [(n, 1e-4) for n in range(1, 121)])
    return {
        "base_dir": "/srv/finetuned",
        "daemon_pid": 42,
        "config_error": None,
        "waits": None,
        "paused": None,
        "running": [RUNNING],
        "queue": [job(f"job-{n}") for n in range(3)],
        "finished": [],
        "curves": {"units-1a": curves},
        "gpus": [GPU],
        "predictions": [ANSWER, {**ANSWER, "answer": "", "exact": 0, "error": "out of memory"}],
        **more,
    }


def shown(given: dict, size: Size, **more) -> list[str]:
    return [click.unstyle(line) for line in frame(given, size, **more)]


def test_it_tells_the_running_job_its_curve_the_gpu_the_queue_and_the_answers():
    text = "\n".join(shown(facts(), Size(80, 24), chosen="job-1", note="job-1 is first in the queue"))
    for words in (
        "finetuned is running, pid 42; in /srv/finetuned",
        "units-1a: step 120 of 300, loss 0.8400, 1,240 tokens/s, 3 min 5 s left",
        "40%, done at",
        "held out 0.9000",
        "gradient norm 1.25",
        "GPU 0  █████████░  87%  memory █████░░░░░ 40.0 of 80 GiB  71 C  420 W",
        "queue: 3 waiting",
        "> job-1",
        "answers after step 100: 1 of 2 exact",
        "What is 2 + 2?",
        "(out of memory)",
        "job-1 is first in the queue",
        KEYS,
    ):
        assert words in text


@pytest.mark.parametrize(
    "size",
    [Size(80, 24), Size(40, 10), Size(20, 4), Size(10, 1), Size(12, 30), Size(200, 60), Size(80, 24, plain=True)],
    ids=str,
)
def test_it_fits_the_terminal_whatever_it_tells(size):
    wide = "漢字" * 60 + "\x1b[2J\x07\n"
    crowded = facts(
        base_dir="/a" * 100,
        paused=wide,
        running=[{**RUNNING, "id": "x" * 200}],
        queue=[job(f"{wide}-{n}", progress={"waits": wide}) for n in range(500)],
        gpus=[GPU] * 12,
        predictions=[{**ANSWER, "prompt": wide, "answer": wide}] * 20,
    )
    for given in (facts(), crowded, facts(running=[], queue=[], gpus=[], predictions=[])):
        lines = shown(given, size)
        assert len(lines) == size.lines
        assert all(cut(line, size) == line for line in lines)
        assert not any("\x1b" in line for line in lines)
        if size.plain and given is not crowded:
            assert "".join(lines).isascii()


@pytest.mark.parametrize("left", [0, 10**12, 1e300])
def test_a_time_left_that_is_none_has_no_end(left):
    progress = {**RUNNING["progress"], "seconds_left": left}
    assert "done at" not in "\n".join(shown(facts(running=[{**RUNNING, "progress": progress}]), Size(80, 24)))


def test_the_chosen_job_is_in_sight_however_long_the_queue():
    given = facts(queue=[job(f"job-{n}") for n in range(500)])
    for number in (0, 250, 499):
        assert f"> job-{number}" in shown(given, Size(80, 24), chosen=f"job-{number}")
    assert list(choices(given))[:2] == ["units-1a", "job-0"]


def test_without_lines_everything_is_there_and_no_keys():
    lines = shown(facts(queue=[job(f"job-{n}") for n in range(50)]), Size(80))
    assert sum("job-" in line for line in lines) == 50
    assert KEYS not in lines


def test_with_nothing_to_do_it_says_so():
    nothing = facts(running=[], queue=[], gpus=[], predictions=[], daemon_pid=None)
    text = "\n".join(shown(nothing, Size(80, 24)))
    assert "not running; start it with `finetuned run`" in text
    assert "no job is running" in text
    assert "queue: empty" in text
    last = {**nothing, "finished": [job("old-1", outcome="succeeded")]}
    assert "the last was old-1, it succeeded" in "\n".join(shown(last, Size(80, 24)))


def test_a_sparkline_goes_from_the_least_to_the_most():
    assert sparkline([(n, float(n)) for n in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(n, float(-n)) for n in range(16)], 4) == "█▆▃▁"
    assert sparkline([(1, 2.0), (2, 2.0)], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert sparkline([(n, float(n)) for n in range(8)], 8, plain=True) == "_.-=+*%#"


def test_a_bar_is_filled_to_its_share():
    assert bar(0.5, 4, plain=True) == "[##..]"
    assert bar(7.0, 4, plain=False) == "████"


def test_letters_of_two_columns_and_of_none_are_counted():
    assert cut("漢字かな", Size(5)) == "漢字"
    assert cut("e\u0301e\u0301e\u0301", Size(2)) == "e\u0301e\u0301"
    assert cut("a\tb\nc", Size(80)) == "a b c"
