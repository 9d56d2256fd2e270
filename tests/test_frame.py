"""The frame of `finetuned top`: what is in it, and that it fits."""

from __future__ import annotations

import click
import pytest

from finetuned.curves import Curves
from finetuned.frame import KEYS, Size, bar, choices, cut, frame, meaning_of_keys, sparkline
from finetuned.live import sentence_of_all


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
    "power": 420.0, "throttle_reasons": ["power cap"], "state": "usable", "why": "", "jobs": ["units-1a"],
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
    given_all = (facts(), crowded, many(16, 16), many(4, 8), facts(running=[], queue=[], gpus=[], predictions=[]))
    for given in given_all:
        lines = shown(given, size)
        assert len(lines) == size.lines
        assert all(cut(line, size) == line for line in lines)
        assert not any("\x1b" in line for line in lines)
        if size.plain and given is not crowded:
            assert "".join(lines).isascii()


def many(jobs: int, gpus: int, **more) -> dict:
    """Jobs that run, each on a GPU, and GPUs that no job is on."""
    progress = RUNNING["progress"]
    running = [
        job(f"job-{n}", progress={**progress, "step": n}, where={"short": f"GPU {n}", "id": None}) for n in range(jobs)
    ]
    cards = [{**GPU, "index": n, "jobs": [f"job-{n}"] if n < jobs else []} for n in range(gpus)]
    curves = {one["id"]: Curves([(1, 3.0), (2, 1.0)], [(0, 3.5)], [(1, 1e-4)]) for one in running}
    waiting = [job(f"waiting-{n}") for n in range(9)]
    return facts(running=running, gpus=cards, curves=curves, queue=waiting, **more)


def test_four_jobs_on_four_gpus_are_all_in_sight_in_24_lines_and_the_chosen_one_in_detail():
    lines = shown(many(4, 4), Size(80, 24), chosen="job-2")
    starts = [line[:16] for line in lines if line[2:].startswith("job-")]
    assert starts == ["  job-0 (GPU 0):", "  job-1 (GPU 1):", "> job-2 (GPU 2):", "  job-3 (GPU 3):"]
    detailed = lines.index(next(line for line in lines if line.startswith("> job-2")))
    assert "done at" in lines[detailed + 1]
    assert "loss 3.0000" in lines[detailed + 2]
    assert "\n".join(lines).count("done at") == 1
    assert sum("71 C  420 W" in line for line in lines) == 4
    assert sum("waiting-" in line for line in lines) >= 1


@pytest.mark.parametrize("place", [0, 7, 15])
def test_of_sixteen_jobs_those_around_the_chosen_one_are_in_sight_and_each_gpu_has_a_place(place):
    lines = shown(many(16, 16), Size(80, 24), chosen=f"job-{place}")
    text = "\n".join(lines)
    assert f"> job-{place} (GPU {place}): step {place} of 300" in text
    assert "16 jobs run" in text
    assert all(f"GPU {n}  87% 40/80 GiB" in text for n in range(16))
    assert "queue: 9 waiting" in text
    assert "waiting-0" in text
    assert lines[-1] == KEYS
    every = shown(many(16, 16), Size(100, 90), chosen=f"job-{place}")
    assert sum(line[2:].startswith("job-") for line in every) == 16
    assert "jobs run" not in "\n".join(every)


def test_a_gpu_that_no_job_is_on_says_why():
    states = [("usable", ""), ("busy", "is used by others: 9 GiB"), ("set_aside", "lost"), ("left_alone", "is left")]
    cards = [
        {**GPU, "index": n, "jobs": [], "state": state, "why": why} for n, (state, why) in enumerate([*states, *states])
    ]
    tall = "\n".join(shown(facts(gpus=cards[:4]), Size(80, 50)))
    for words in ("GPU 0 is free", "GPU 1 is used by others: 9 GiB", "GPU 2 is set aside", "GPU 3 is left"):
        assert words in tall
    short = "\n".join(shown(facts(gpus=cards), Size(80, 24)))
    for words in ("GPU 0 free", "GPU 5 busy", "GPU 6 set aside", "GPU 7 left alone"):
        assert words in short


def test_with_an_engine_a_job_says_what_that_calls_it():
    one = {**RUNNING, "where": {"short": "slurm 4711", "id": "4711"}}
    assert "units-1a (slurm 4711): step 120" in "\n".join(shown(facts(running=[one], gpus=[]), Size(80, 24)))


def test_what_many_jobs_do_is_a_line_that_stays_short():
    progress = RUNNING["progress"]
    assert sentence_of_all([("a", False, progress)]).startswith("a: step 120 of 300, loss 0.8400, ")
    jobs = [("a", False, progress), ("b", True, progress), ("c", False, {})]
    assert sentence_of_all(jobs) == "3 jobs: a: step 120 of 300; b: writing a checkpoint; c: starting"
    sixteen = sentence_of_all([(f"job-{n}", False, progress) for n in range(16)])
    assert sixteen.startswith("16 jobs: job-0: step 120 of 300; ")
    assert sixteen.endswith("; and 13 more")


def test_jobs_that_failed_or_were_cancelled_can_be_chosen_to_be_tried_again():
    last = [
        job("good-1", outcome="succeeded", reason=None),
        job("bad-1", outcome="failed", reason={"what": "row 3 is no JSON"}),
        job("gone-1", outcome="cancelled", reason=None),
    ]
    given = facts(finished=last)
    assert list(choices(given))[-2:] == ["bad-1", "gone-1"]
    lines = shown(given, Size(80, 24), chosen="bad-1")
    assert "> failed bad-1: row 3 is no JSON" in lines
    assert "  cancelled gone-1" in lines
    assert "good-1" not in "\n".join(lines)


@pytest.mark.parametrize("size", [Size(80, 24), Size(20, 4)], ids=str)
def test_every_key_is_explained_as_far_as_there_is_room(size):
    lines = meaning_of_keys(size)
    assert len(lines) == size.lines
    assert all(len(line) <= size.columns for line in lines)
    assert len(KEYS) <= 80
    explained = {line.split()[0].rstrip(",") for line in meaning_of_keys(Size(80, 24)) if line}
    assert explained == {words.split()[0].partition("/")[0] for words in KEYS.split("  ")}


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
