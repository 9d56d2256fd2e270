"""A daemon whose jobs are with a cluster that does not answer for long, or for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned import control, crew, engines, supervisor
from finetuned.events import EventType
from finetuned.found import ledger_if_any, ledger_to_read
from finetuned.jobs import Job, Outcome, State
from finetuned.launchers import ray
from finetuned.service import Service
from finetuned.spool.orders import Verb
from finetuned.status import gather, render
from fixtures_pretended import answering


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ray, "_PAUSE", 0.05)
    monkeypatch.setattr(engines, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(engines, "_LAST_PAUSE", 0.1)
    monkeypatch.setattr(crew, "_FIRST_REFUSAL", 0.05)
    monkeypatch.setattr(crew, "_LAST_REFUSAL", 0.1)


@pytest.fixture
def serve(home):
    """Let a daemon work in this process until nothing is left to do, while somebody does something beside it."""

    def run(meanwhile: Callable[[], None]) -> None:
        service, troubles = Service(home, once=True), []

        def act() -> None:
            try:
                meanwhile()
            except (Exception, pytest.fail.Exception) as trouble:  # noqa: BLE001, raised below
                troubles.append(trouble)
                service._stop = True

        beside = threading.Thread(target=act)
        beside.start()
        service.run()
        beside.join()
        if troubles:
            raise troubles[0]

    write_jsonl(home.root / "staged", chat_rows(3)).rename(home.inbox / "x.jsonl")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGIO, signal.SIGCHLD, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def all_jobs(home) -> list[Job]:
    with ledger_if_any(home) as ledger:
        return ledger.jobs(*State) if ledger else []


def the_job(home) -> Job | None:
    jobs = all_jobs(home)
    return jobs[0] if jobs else None


def is_so(home, state: State) -> None:
    eventually(lambda: (job := the_job(home)) and job.state is state, why=str(state))


def attempt_events(home) -> list[str]:
    """Give what the daemon noted of attempts, and what of the engine."""
    with ledger_to_read(home) as ledger:
        events = ledger.events(the_job(home).id)
    return [one.message for one in events if one.type is EventType.ATTEMPT or "take" in one.message]


@pytest.mark.parametrize("refusal", [(503, "busy"), (401, "no token")])
def test_a_night_in_which_the_cluster_takes_no_job_is_one_attempt_and_two_events(home, serve, standin, refusal):
    standin(seconds=0)
    with answering() as answers:
        write_config(home, launcher="ray", ray={"address": answers.address})
        answers.submit = refusal

        def night() -> None:
            eventually(lambda: len(answers.orders) > 5)
            answers.submit = 200, "{}"
            number = len(answers.orders)
            answers.say("RUNNING")
            eventually(lambda: len(answers.orders) > number)
            order = answers.orders[-1]
            variables = {**os.environ, **order["runtime_env"]["env_vars"]}
            subprocess.run(order["entrypoint"], shell=True, check=True, env=variables)
            answers.say("SUCCEEDED")

        serve(night)
        assert len({order["submission_id"] for order in answers.orders}) == 1
    job = the_job(home)
    assert (job.outcome, job.attempt, job.retries, job.interruptions) == (Outcome.SUCCEEDED, 1, 0, 0)
    begun, refused, taken, ended = attempt_events(home)
    assert begun.startswith("attempt 1 begins with ray")
    assert refused.startswith("ray does not take it")
    assert refusal[1] in refused
    assert taken == "ray takes it now"
    assert ended.startswith("attempt 1 ends: succeeded")


def test_a_cluster_that_is_full_for_days_costs_a_job_nothing_and_status_says_what_it_waits_for(
    home, serve, standin, monkeypatch
):
    """Ray gives up what waits for its turn for 15 minutes."""
    monkeypatch.setattr(supervisor, "MOST_IN_VAIN", 3)
    standin(seconds=0)
    with answering() as answers:
        write_config(home, launcher="ray", ray={"address": answers.address})
        answers.say("FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT", message="No start within 900 s.")

        def days() -> None:
            eventually(lambda: len(answers.orders) > 6)
            answers.say("PENDING", message="Job has not started yet. It may be waiting for GPUs.")
            eventually(lambda: "waits for the cluster: Job has not started yet. It may be wait" in render(gather(home)))
            order = answers.orders[-1]
            answers.say("RUNNING")
            variables = {**os.environ, **order["runtime_env"]["env_vars"]}
            subprocess.run(order["entrypoint"], shell=True, check=True, env=variables)
            answers.say("SUCCEEDED")

        serve(days)
    assert the_job(home).outcome is Outcome.SUCCEEDED


def test_a_job_that_waits_for_a_silent_cluster_is_ordered_as_soon_as_another_job_hears_it_again(
    home, serve, standin, monkeypatch
):
    monkeypatch.setattr(engines, "_FIRST_PAUSE", 600.0)
    standin(seconds=0)
    with answering() as answers, capture_logs() as logs:
        write_config(home, launcher="ray", ray={"address": answers.address})
        answers.say("RUNNING")

        def user() -> None:
            is_so(home, State.RUNNING)
            answers.close()
            eventually(lambda: any(line["event"] == "Ray does not answer" for line in logs))
            write_jsonl(home.root / "staged", chat_rows(3, start=5)).rename(home.inbox / "y.jsonl")
            eventually(lambda: "ray takes no jobs" in render(gather(home)))
            with answering(int(answers.address.rpartition(":")[2])) as again:
                again.say("RUNNING")
                eventually(lambda: again.orders, why="the order of the second job")
                again.say("STOPPED")
                for job in all_jobs(home):
                    control.order(home, Verb.CANCEL, job.id)
                eventually(lambda: all(job.outcome is Outcome.CANCELLED for job in all_jobs(home)))

        serve(user)


def test_a_job_that_is_cancelled_on_a_cluster_that_is_gone_for_ever_ends_as_cancelled(
    home, serve, standin, monkeypatch
):
    monkeypatch.setattr(ray, "GIVEN_UP_SECONDS", 0.5)
    with answering() as answers:
        write_config(home, launcher="ray", ray={"address": answers.address}, pause_grace=1)
        answers.say("RUNNING")

        def user() -> None:
            is_so(home, State.RUNNING)
            answers.close()
            control.order(home, Verb.CANCEL, the_job(home).id)

        serve(user)
    job = the_job(home)
    assert job.outcome is Outcome.CANCELLED
    assert (home.failed / job.id / "x.jsonl").exists()
    assert f"ray job status --address {answers.address}" in attempt_events(home)[-1]
