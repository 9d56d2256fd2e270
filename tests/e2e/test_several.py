"""Several GPUs, as a real NVML binding reads them from a library of ours, and real daemons with stand-in trainers."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.jobs import Outcome, State
from finetuned.places import gpu_states

GIB = 2**30


@pytest.fixture
def drop(home):
    write_config(home)

    def put(*names: str) -> None:
        for name in names:  # each with a content of its own
            (home.inbox / name).parent.mkdir(exist_ok=True)
            rows = chat_rows(20 + int.from_bytes(name.encode()[-7:-6]) % 16)
            write_jsonl(home.root / "staged", rows).rename(home.inbox / name)
            time.sleep(0.01)

    return put


def running(one, count: int, *, seconds: float = 120.0):
    """Wait until so many jobs run and have begun to train; give them."""

    def found():
        jobs = [job for job in one.jobs() if job.state is State.RUNNING and "sees" in job.progress]
        return jobs if len(jobs) == count else None

    return eventually(found, seconds=seconds)


def on(job) -> list[str]:
    """Give the GPUs that the job's trainer was let see, which are those that the daemon meant."""
    assert job.progress["sees"].split(",") == job.progress["devices"]
    return job.progress["devices"]


def test_as_many_jobs_run_at_once_as_there_are_gpus_each_on_its_own(daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=4")
    standin(seconds=0.3)
    one = daemon(environment=fake_nvml.environment())
    drop(*(f"x{n}.jsonl" for n in range(5)))
    at_work = [gpu for job in running(one, 4) for gpu in on(job)]
    assert len(set(at_work)) == 4
    last = one.job("x4.jsonl", state=State.QUEUED)
    assert "waits_for" not in last.progress  # it is only not its turn
    assert all(one.job(f"x{n}.jsonl").outcome is Outcome.SUCCEEDED for n in range(5))


def test_a_job_that_wants_two_gpus_gets_them_and_one_that_wants_five_is_told(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=4")
    standin(seconds=0.3)
    profiles = {"two": {"gpus_per_job": 2}, "five": {"gpus_per_job": 5}}
    write_config(home, tuning="qlora", profiles=profiles)  # never spread over GPUs, so nobody predicts what it needs
    one = daemon(environment=fake_nvml.environment())
    drop("two/a.jsonl", "two/b.jsonl")
    [a, b] = running(one, 2, seconds=200)
    assert len({*on(a), *on(b)}) == 4
    drop("two/c.jsonl")
    one.job("c.jsonl", state=State.QUEUED)
    drop("small.jsonl", "five/x.jsonl")
    failed = one.job("x.jsonl")
    assert failed.reason["code"] == "too_few_gpus"
    assert "this machine has 4" in failed.reason["what"]
    assert one.job("small.jsonl").started_at >= one.job("c.jsonl").started_at, "the small one passed the large one by"


def test_a_gpu_that_others_use_and_one_that_is_to_be_left_alone_are_not_taken(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=3", f"1.memory_used={9 * GIB}")
    standin(seconds=0.3)
    write_config(home, gpus=[0, 1])
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl", "b.jsonl")
    [job] = running(one, 1)
    [first] = on(job)
    waiting = eventually(lambda: (found := one.job("b.jsonl", state=State.QUEUED)).progress.get("waits_for") and found)
    assert "is used by others: 9.0 GiB are taken" in waiting.progress["waits_for"]
    said = subprocess.run(
        [sys.executable, "-m", "finetuned", "status", "--base-dir", str(home.root)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line for line in said.splitlines() if line[10:13] == "GPU"]
    assert lines[0].endswith(f": {job.id}")
    assert "is used by others: 9.0 GiB" in lines[1]
    assert "is left alone by `gpus` in config.json" in lines[2]
    assert [gpu["state"] for gpu in json.loads(home.gpus.read_bytes())] == ["usable", "busy", "left_alone"]
    fake_nvml.set("gpus=3", "1.memory_used=0")
    two = running(one, 2)
    assert len({first, *(gpu for job in two for gpu in on(job))}) == 2


def test_the_state_of_each_gpu_is_there_before_a_job_comes(home, daemon, standin, fake_nvml):
    fake_nvml.set("gpus=3")
    write_config(home, gpus=[0, 1])
    one = daemon(environment=fake_nvml.environment())

    def states() -> list[tuple[str, str]]:
        return [(gpu["state"], gpu["why"]) for gpu in gpu_states(home)]

    eventually(lambda: states() == [("usable", "")] * 2 + [("left_alone", "is left alone by `gpus` in config.json")])
    write_config(home)
    eventually(lambda: states() == [("usable", "")] * 3)
    uuid = gpu_states(home)[1]["uuid"]
    one.stop()
    daemon(environment={**fake_nvml.environment(), "CUDA_VISIBLE_DEVICES": uuid})
    left = ("left_alone", "is left alone by CUDA_VISIBLE_DEVICES")
    eventually(lambda: states() == [left, ("usable", ""), left])


def test_jobs_on_a_gpu_that_is_lost_go_on_on_the_others_and_nothing_is_lost(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    write_config(home, gpu_sample_seconds=1)
    standin(seconds=0.4)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl", "b.jsonl")
    before = {job.id: on(job) for job in running(one, 2)}
    fake_nvml.set("gpus=2", "1.lost=1")
    jobs = [one.job("a.jsonl"), one.job("b.jsonl")]
    assert all(job.outcome is Outcome.SUCCEEDED for job in jobs)
    moved = [job for job in jobs if job.attempt == 2]
    assert len(moved) == 1
    assert on(moved[0]) != before[moved[0].id]


def test_two_files_of_the_same_content_are_trained_once_though_there_is_room_for_both(daemon, home, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    standin(seconds=0.2)
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(home.inbox / name, chat_rows(20))
    one = daemon("--once", environment=fake_nvml.environment())
    assert one.process.wait(120) == 0
    [first, second] = sorted(one.jobs(), key=lambda job: job.created_at)
    assert (first.duplicate_of, second.duplicate_of) == (None, first.id)


def test_every_job_is_adopted_by_the_next_daemon_and_its_gpu_stays_taken(daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    standin(seconds=0.5)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl", "b.jsonl", "c.jsonl")
    before = {job.id: (job.trainer_pid, on(job)) for job in running(one, 2)}
    one.process.kill()
    one.process.wait()
    two = daemon(environment=fake_nvml.environment())
    two.says("trainer adopted")
    after = {job.id: (job.trainer_pid, on(job)) for job in running(two, 2)}
    assert after == before
    assert all(two.job(name).outcome is Outcome.SUCCEEDED for name in ("a.jsonl", "b.jsonl", "c.jsonl"))


def test_pause_cancel_and_stop_reach_the_job_that_is_meant_and_all_of_them(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    standin(seconds=0.5)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl", "b.jsonl")
    a = min(running(one, 2), key=lambda job: job.name)

    def order(*words: str) -> None:
        command = [sys.executable, "-m", "finetuned", *words, "--base-dir", str(home.root)]
        subprocess.run(command, check=True, capture_output=True)

    order("cancel", a.id)
    assert one.job("a.jsonl").outcome is Outcome.CANCELLED
    assert one.job("b.jsonl", state=State.RUNNING).attempt == 1
    drop("c.jsonl")
    running(one, 2)
    order("pause")
    eventually(lambda: {job.state for job in one.jobs() if job.name in {b"b.jsonl", b"c.jsonl"}} == {State.QUEUED})
    order("resume")
    assert len(running(one, 2)) == 2
    assert one.stop() == 0
    assert {job.state for job in one.jobs() if job.name != b"a.jsonl"} == {State.QUEUED}


def test_jobs_share_a_gpu_where_they_are_predicted_to_fit_together(  # noqa: PLR0917, the parts of a machine
    home, daemon, drop, standin, fake_nvml, tiny_model
):
    fake_nvml.set("gpus=1", f"0.memory_total={4 * GIB}")
    write_config(home, model=str(tiny_model), share_gpus=True)
    standin(seconds=600)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl")
    [first] = running(one, 1, seconds=240)

    def held(everybody: int) -> list[str]:
        ours = f"0.process.{first.trainer_pid}={GIB}"
        return ["gpus=1", f"0.memory_total={4 * GIB}", f"0.memory_used={everybody}", ours]

    fake_nvml.set(*held(4 * GIB))  # other people's processes have come meanwhile
    drop("b.jsonl")
    waits = eventually(
        lambda: one.job("b.jsonl", state=State.QUEUED).progress.get("waits_for", "").startswith("others hold"),
        seconds=240,
    )
    assert waits
    fake_nvml.set(*held(GIB))
    two = running(one, 2)
    assert on(two[0]) == on(two[1])


@pytest.mark.parametrize("tuning", ["auto", "full"])
def test_a_job_gets_as_many_gpus_as_its_model_is_predicted_to_need(  # noqa: PLR0917, the parts of a machine
    home, daemon, drop, standin, fake_nvml, tiny_model, tuning
):
    """The process that predicts has about 400 MiB of libraries in it."""
    fake_nvml.set("gpus=4", *(f"{n}.memory_total={GIB // 4}" for n in range(4)))
    write_config(home, model=str(tiny_model), gpus_per_job="auto", tuning=tuning)
    standin(seconds=0.3)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl")
    [job] = running(one, 1, seconds=240)
    assert len(on(job)) > 1
    spec = json.loads(home.job(job.id).spec.read_bytes())
    assert (spec["processes"], spec["sharded"]) == (len(on(job)), True)


def test_a_job_of_two_processes_learns_what_one_of_one_does(home, daemon, tiny_model):
    """The real trainer; without a GPU there are two processes on the processor. Both jobs have the same file."""
    profiles = {"one": {}, "two": {"gpus_per_job": 2}}
    write_config(home, model=str(tiny_model), tuning="lora", dtype="float32", duplicates="run", profiles=profiles)
    one = daemon()
    for folder in profiles:
        (home.inbox / folder).mkdir(exist_ok=True)
        write_jsonl(home.root / "staged", chat_rows(24)).rename(home.inbox / folder / f"{folder}.jsonl")
    jobs = [one.job("one.jsonl"), one.job("two.jsonl")]
    assert [job.outcome for job in jobs] == [Outcome.SUCCEEDED] * 2, [job.reason for job in jobs]
    weights = [load_file(home.adapters / str(job.adapter) / "adapter_model.safetensors") for job in jobs]
    assert max(abs(weights[0][name] - weights[1][name]).max() for name in weights[0]) < 1e-5
    assert any((weights[0][name] != 0).any() for name in weights[0])


def test_a_job_says_that_it_waits_where_all_gpus_are_left_alone(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    standin(seconds=0.05)
    write_config(home, gpus=[9])
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl")

    def waits_for() -> str:
        return one.job("a.jsonl", state=State.QUEUED).progress.get("waits_for", "")

    eventually(lambda: waits_for() == "there is no GPU that it may use")
    one.says("no such GPU")
    write_config(home, gpus=[1])
    assert one.job("a.jsonl").outcome is Outcome.SUCCEEDED


def test_a_job_whose_engine_took_none_says_so_as_soon_as_it_waits_again(home, daemon, drop):
    address = "http://127.0.0.1:9"  # where nobody listens
    write_config(home, launcher="ray", ray={"address": address})
    one = daemon()
    drop("a.jsonl")

    def reasons() -> list[str]:
        return [job.progress.get("waits_for", "") for job in one.jobs() if job.state is State.QUEUED]

    eventually(lambda: any(reasons()))
    until = time.monotonic() + 7  # after 5 it is tried again
    while time.monotonic() < until:
        assert all(f"ray takes no jobs: Ray at {address} cannot be reached" in why for why in reasons())
        time.sleep(0.05)


def test_a_gpu_that_is_gone_while_nothing_runs_gets_no_job(daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    standin(seconds=0.05)
    one = daemon(environment=fake_nvml.environment())
    one.says("GPUs found")
    fake_nvml.set("gpus=2", "0.lost=1")
    drop("a.jsonl")
    job = one.job("a.jsonl")
    assert (job.outcome, job.attempt) == (Outcome.SUCCEEDED, 1)
    assert on(job)[0].endswith("1")
    one.says("GPU set aside")


def test_a_job_for_two_gpus_goes_on_on_the_one_that_is_left(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    write_config(home, gpu_sample_seconds=1, gpus_per_job=2, tuning="qlora")
    standin(seconds=0.4)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl")
    [job] = running(one, 1)
    assert len(on(job)) == 2
    fake_nvml.set("gpus=2", "1.lost=1")
    job = one.job("a.jsonl")
    assert (job.outcome, job.attempt, job.progress["processes"]) == (Outcome.SUCCEEDED, 2, 1)
    assert len(on(job)) == 1


def test_a_job_whose_folder_is_broken_does_not_hold_up_the_ends_of_others(home, daemon, drop, standin, fake_nvml):
    fake_nvml.set("gpus=2")
    standin(seconds=0.2)
    one = daemon(environment=fake_nvml.environment())
    drop("a.jsonl", "b.jsonl")
    jobs = {job.name: job for job in running(one, 2)}
    events = home.job(jobs[b"a.jsonl"].id).events
    events.rename(home.root / "aside")
    events.mkdir()  # which is read as a file
    assert one.job("b.jsonl").outcome is Outcome.SUCCEEDED
    events.rmdir()
    (home.root / "aside").rename(events)
    assert one.job("a.jsonl").outcome is Outcome.SUCCEEDED
