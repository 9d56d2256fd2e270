"""Where jobs run, as `finetuned status` and the API tell it, from a real ledger and the daemon's file of GPUs."""

from __future__ import annotations

import json

import pytest

from finetuned.guard import only_daemon
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.places import gpu_states, gpus_at_work, place_of
from finetuned.status import gather, render

GPUS = [
    {"uuid": "GPU-a", "index": 0, "name": "H100", "state": "usable", "why": ""},
    {"uuid": "GPU-b", "index": 1, "name": "H100", "state": "usable", "why": ""},
    {"uuid": "GPU-c", "index": 2, "name": "H100", "state": "busy", "why": "is used by others: 9.0 GiB are taken"},
    {"uuid": "GPU-d", "index": 3, "name": "H100", "state": "set_aside", "why": "GPU 3 H100 does not answer any more."},
    {"uuid": "GPU-e", "index": 4, "name": "H100", "state": "left_alone", "why": "is left alone by `gpus`"},
]


def job(job_id: str, *devices: str, state: State = State.RUNNING, **more) -> Job:
    name = f"{job_id}.jsonl".encode()
    fields = {"created_at": 1.0, "attempt": 1, "progress": {"devices": list(devices)}, **more}
    return Job(job_id, name, "", FileIdentity(1, 2, 3, 4), state, **fields)


def sample(ledger: Ledger, job_id: str, uuid: str, utilization: int, *, at: float = 5.0) -> None:
    facts = {"uuid": uuid, "index": "abcde".index(uuid[-1]), "name": "H100", "utilization": utilization}
    ledger.record_gpu(job_id, [(at, uuid, {**facts, "created_at": at})])


@pytest.fixture
def ledger(home):
    ledger = Ledger.open(home.ledger)
    yield ledger
    ledger.close()


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (job("x", "cpu"), "on the processor"),
        (job("x", "GPU-b"), "on GPU 1 H100"),
        (job("x", progress={"devices": ["GPU-a", "GPU-b"], "processes": 2}), "on GPUs 0, 1"),
        (job("x", "GPU-of-an-earlier-machine"), "on GPU GPU-of-an-earlier-machine"),
        (job("x", "cpu", progress={"devices": ["cpu"], "processes": 2}), "on the processor, 2 processes"),
        (job("x", settings={"launcher": "slurm"}, trainer_id="4711"), "with slurm as 4711"),
        (job("x", settings={"launcher": "ray"}), "with ray"),
        (job("x", progress={}), ""),
        (job("x", "GPU-b", state=State.FINISHED, outcome=Outcome.SUCCEEDED), "on GPU 1 H100"),
        (job("x", "GPU-b", state=State.QUEUED), None),
        (job("x", attempt=0), None),
    ],
)
def test_a_job_says_where_it_runs_or_ran(one, words):
    place = place_of(one, GPUS)
    assert (place and place["words"]) == words


def test_each_gpu_has_the_jobs_at_work_on_it_and_their_newest_sample(home, ledger):
    home.gpus.write_text(json.dumps(GPUS))
    for one in (
        job("one", "GPU-a"),
        job("two", "GPU-b"),
        job("beside", "GPU-b"),
        job("far", settings={"launcher": "ray"}),
    ):
        ledger.add(one)
    sample(ledger, "two", "GPU-a", 99, at=3.0)  # by its attempt before, on another GPU
    sample(ledger, "two", "GPU-b", 50, at=4.0)
    sample(ledger, "beside", "GPU-b", 60, at=5.0)
    found = gpus_at_work(gpu_states(home), ledger)
    assert [(gpu["index"], gpu["jobs"], gpu.get("utilization")) for gpu in found] == [
        (0, ["one"], None),
        (1, ["two", "beside"], 60),
        (2, [], None),
        (3, [], None),
        (4, [], None),
    ]


def test_gpus_that_nobody_can_tell_apart_are_those_that_were_sampled(ledger):
    ledger.add(job("x", "0,1", progress={"devices": ["0,1"]}))
    sample(ledger, "x", "GPU-a", 50)
    [gpu] = gpus_at_work([], ledger)
    assert (gpu["uuid"], gpu["jobs"], gpu["state"]) == ("GPU-a", ["x"], "usable")


def test_while_nothing_runs_the_last_samples_are_given_and_nobody_is_at_work(home, ledger):
    ledger.add(job("x", "GPU-a", state=State.FINISHED, outcome=Outcome.SUCCEEDED))
    sample(ledger, "x", "GPU-a", 50)
    assert [(gpu["utilization"], gpu["jobs"]) for gpu in gpus_at_work(GPUS[:1], ledger)] == [(50, [])]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"GPU-a": "lost"}', None])
def test_a_file_of_gpus_that_is_none_is_no_trouble(home, content):
    if content is not None:
        home.gpus.write_text(content)
    assert gpu_states(home) == []


def test_status_says_where_each_job_runs_and_of_each_gpu_why_no_job_is_on_it(home, ledger):
    home.gpus.write_text(json.dumps(GPUS))
    ledger.add(job("one-1", "GPU-a"))
    ledger.add(job("far-1", settings={"launcher": "slurm"}, trainer_id="4711"))
    with only_daemon(home):
        facts = gather(home)
        text = render(facts)
    for line in (
        "running   one-1 on GPU 0 H100",
        "running   far-1 with slurm as 4711",
        "gpu       GPU 0 H100: one-1",
        "          GPU 1 H100 is free",
        "          GPU 2 H100 is used by others: 9.0 GiB are taken",
        "          GPU 3 H100 is set aside",
        "          GPU 4 H100 is left alone by `gpus`",
    ):
        assert line in text.splitlines()
    assert "GPU set aside: GPU 3 H100 does not answer any more." in text
    assert [one["where"]["id"] for one in facts["running"]] == [None, "4711"]
    assert "GPU 2" not in render(gather(home)), "without a daemon that is old news"


def test_one_gpu_that_is_in_order_is_not_worth_a_line(home, ledger):
    home.gpus.write_text(json.dumps(GPUS[:1]))
    ledger.add(job("one-1", "GPU-a"))
    with only_daemon(home):
        assert "gpu  " not in render(gather(home))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"launcher": "slurm"}, "slurm goes on with it without a daemon; the next `finetuned run` finds it again"),
        ({}, "it stands still; `finetuned run` goes on with it"),
    ],
)
def test_a_running_job_without_a_daemon_goes_on_with_its_engine_and_stands_still_here(ledger, home, settings, words):
    ledger.add(job("x", settings=settings, trainer_id="4711"))
    assert words in render(gather(home))
