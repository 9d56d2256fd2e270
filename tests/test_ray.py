"""What a launcher of Ray's makes of the answers that it gets, and of those that it does not get: a server that answers
as it is told, in Ray's place. The real Ray is in `tests/cluster`.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from conftest import eventually
from finetuned.engine_settings import Ray
from finetuned.errors import FinetunedError
from finetuned.events import ExitCode, parse_event
from finetuned.home import JobFolder
from finetuned.launchers import Needs, ray, ray_train
from finetuned.launchers.ray import RayLauncher
from finetuned.launchers.ray_ends import NOT_SHARED, end_of
from finetuned.lifesigns import leave_exit_code, locked
from fixtures_pretended import UNKNOWN, answering
from fixtures_ray import free_ports

HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def answers():
    with answering() as one:
        yield one


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    path = tmp_path / "job-1"
    path.mkdir()
    return JobFolder(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ray, "_PAUSE", 0.02)


@pytest.fixture
def hold():
    """Let a process hold a job's lock."""
    held = []

    def start(folder: JobFolder) -> subprocess.Popen:
        held.append(subprocess.Popen([sys.executable, "-c", HOLDER, folder.lock], stdout=subprocess.PIPE))
        held[-1].stdout.readline()
        return held[-1]

    yield start
    for process in held:
        process.kill()
        process.wait()
        process.stdout.close()


def start(address, folder, *, gpus=1, **settings):
    needs = Needs(job="job-1", attempt=1, gpus=gpus)
    log = folder.path.with_suffix(".log")
    return RayLauncher(Ray(address=address, **settings)).start(folder, log=log, environment={"A": "b"}, needs=needs)


def status_of(trainer) -> int:
    eventually(lambda: trainer.poll() is not None)
    return trainer.poll()


def test_an_order_holds_what_was_set_and_what_the_trainer_needs(answers, folder):
    settings = {
        "python": "/opt/python",
        "resources": {"CPU": 4, "memory": 2e9, "fast": 0.5},
        "runtime_env": {"working_dir": "/x", "env_vars": {"C": "d", "A": "e"}},
    }
    trainer = start(answers.address, folder, gpus=1, **settings)
    (order,) = answers.orders
    assert order["submission_id"] == trainer.id
    assert f"exec /opt/python -P -m finetuned.trainer {folder.path} >> {folder.path}.log 2>&1" in order["entrypoint"]
    assert (order["entrypoint_num_gpus"], order["entrypoint_num_cpus"], order["entrypoint_memory"]) == (1, 4, 2 * 10**9)
    assert order["entrypoint_resources"] == {"fast": 0.5}
    assert order["runtime_env"]["working_dir"] == "/x"
    variables = order["runtime_env"]["env_vars"]
    assert variables.items() >= {"A": "b", "C": "d", "FINETUNED_TAKES_LOCK": "1"}.items()


def test_an_entry_point_runs_the_trainer_unless_its_folder_is_not_there_or_it_was_stopped_before(
    answers, folder, monkeypatch
):
    monkeypatch.setenv("FINETUNED_TRAINER", "sh -c 'echo at work in $0; exit 3'")
    start(answers.address, folder)

    def run() -> int:
        return subprocess.run(answers.orders[0]["entrypoint"], shell=True, check=False).returncode

    log = folder.path.with_suffix(".log")
    assert run() == 3
    assert log.read_text() == f"at work in {folder.path}\n"
    folder.stop(1).touch()
    assert run() == ExitCode.STOPPED
    folder.path.rename(folder.path.with_name("gone"))
    assert run() == NOT_SHARED
    assert log.read_text().count("at work") == 1


def test_two_base_directories_never_share_an_id_and_two_daemons_in_one_find_the_same(answers, folder, tmp_path):
    other = JobFolder(tmp_path / "other" / "job-1")
    other.path.mkdir(parents=True)
    ids = [start(answers.address, one).id for one in (folder, other, folder)]
    assert ids[0] == ids[2] != ids[1]


def test_a_token_is_read_at_each_question(answers, folder, tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")
    trainer = start(answers.address, folder, token_file=token)
    answers.say("RUNNING")
    eventually(lambda: trainer.poll() is None and answers.headers.get("Authorization") == "Bearer first")
    token.write_text("second\n")
    eventually(lambda: trainer.poll() is None and answers.headers.get("Authorization") == "Bearer second")
    token.unlink()
    with pytest.raises(ConnectionError, match=r"ray\.token_file .* cannot be read"):
        start(answers.address, folder, token_file=token)


def test_an_order_whose_answer_is_lost_is_given_again_until_the_cluster_knows_it(answers, folder, monkeypatch):
    monkeypatch.setattr(ray, "_AT_MOST", 0.05)
    answers.late = 0.3
    trainer = start(answers.address, folder)
    assert trainer.poll() is None
    eventually(lambda: trainer.poll() is None and len(answers.orders) > 1)
    assert len({order["submission_id"] for order in answers.orders}) == 1
    answers.say("RUNNING")
    eventually(lambda: trainer.poll() is None and trainer.order is None)
    answers.info = UNKNOWN  # now it was known
    status_of(trainer)
    assert "knows the job no more" in trainer.taken


def test_while_an_order_is_in_doubt_the_daemon_gives_no_other(answers, folder, monkeypatch):
    monkeypatch.setattr(ray, "_AT_MOST", 0.05)
    answers.late = 0.3
    launcher = RayLauncher(Ray(address=answers.address))

    def submit(attempt: int) -> ray.RayTrainer:
        needs = Needs(job="job-1", attempt=attempt, gpus=1)
        return launcher.start(folder, log=folder.path.with_suffix(".log"), environment={}, needs=needs)

    first = submit(1)
    with pytest.raises(ConnectionError, match="has not answered yet"):
        submit(2)
    answers.late = 0.0
    answers.say("RUNNING")
    eventually(lambda: first.poll() is None and not first.in_doubt)
    assert submit(2).id != first.id


def test_an_order_in_doubt_that_is_refused_fails_with_the_reason_and_one_that_is_stopped_is_given_no_more(
    answers, folder, monkeypatch
):
    monkeypatch.setattr(ray, "_AT_MOST", 0.05)
    answers.late = 0.3
    trainer = start(answers.address, folder)
    trainer.ask_to_stop()
    assert status_of(trainer) == ExitCode.STOPPED
    assert len(answers.orders) == 1
    answers.submit = 400, "Traceback\nValueError: no such field\n"
    assert status_of(start(answers.address, folder)) == ExitCode.BAD_SETTINGS
    (event,) = map(parse_event, folder.events.read_bytes().splitlines())
    assert "no such field" in event.data["what"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, FinetunedError), (401, ConnectionError), (404, ConnectionError), (429, OSError), (500, OSError)],
)
def test_what_never_can_be_is_told_apart_from_what_cannot_be_now(answers, folder, status, kind):
    answers.submit = status, "Traceback\nValueError: because\n.\n"
    with pytest.raises(kind, match="because"):
        start(answers.address, folder)


def test_an_address_that_sends_elsewhere_has_surely_not_taken_the_order(answers, folder):
    answers.submit = 302, "a page where people log in"
    with pytest.raises(ConnectionError, match=r"sends us elsewhere \(302\); mend ray\.address"):
        start(answers.address, folder)


def test_an_address_that_speaks_no_http_has_surely_not_taken_the_order(folder):
    """Ray's own port, say, in place of its dashboard's."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\r\n")
                connection.recv(2**16)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match=r"is not Ray's dashboard.*; mend ray\.address"):
            start(f"http://127.0.0.1:{server.getsockname()[1]}", folder)


def test_an_order_that_the_cluster_has_already_is_no_error(answers, folder):
    answers.submit = 500, "ValueError: Job already exists"
    answers.say("SUCCEEDED")
    assert status_of(start(answers.address, folder)) == 0


def test_a_cluster_that_does_not_answer_is_waited_for_and_logged_once(folder):
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    with pytest.raises(OSError, match="cannot be reached"):
        start(address, folder)
    with capture_logs() as logs:
        with answering(port) as answers:
            answers.say("RUNNING")
            trainer = start(address, folder)
            eventually(lambda: trainer.poll() is None and answers.headers)
        eventually(lambda: trainer.poll() is None and logs)
        ask_often(trainer)
        with answering(port) as answers:
            answers.info = 503, "busy"
            eventually(lambda: trainer.poll() is None and answers.headers)
            ask_often(trainer)
            answers.say("SUCCEEDED")
            assert status_of(trainer) == 0
    assert [line["event"] for line in logs] == ["Ray does not answer", "Ray answers again"]


def ask_often(trainer, *, seconds: float = 0.2) -> None:
    for _ in range(int(seconds / 0.01)):
        assert trainer.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("answer", [(503, "busy"), (404, "a proxy without its server"), (200, "<html>"), (403, "")])
def test_a_daemon_that_finds_no_good_answer_takes_the_trainer_to_be_there(answers, folder, answer):
    launcher = RayLauncher(Ray(address=answers.address))
    assert launcher.find(folder, trainer_id="x", attempt=1) is None
    answers.info = answer
    found = launcher.find(folder, trainer_id="x", attempt=1)
    assert found.poll() is None
    answers.say("SUCCEEDED")
    assert status_of(found) == 0


def test_a_lost_trainer_that_still_holds_its_lock_is_asked_to_stop_and_waited_for(answers, folder, hold):
    trainer = RayLauncher(Ray(address=answers.address)).find(folder, trainer_id="x", attempt=1)
    assert trainer is None
    holder = hold(folder)
    trainer = RayLauncher(Ray(address=answers.address)).find(folder, trainer_id="x", attempt=1)
    eventually(lambda: trainer.poll() is None and folder.stop(1).exists())
    ask_often(trainer)
    leave_exit_code(folder, 1, ExitCode.STOPPED)
    assert trainer.poll() is None
    holder.kill()
    holder.wait()
    assert status_of(trainer) == ExitCode.STOPPED


def test_a_lost_trainer_whose_lock_is_never_free_is_given_up_in_the_end(answers, folder, hold, monkeypatch):
    monkeypatch.setattr(ray, "GHOST_SECONDS", 0.2)
    hold(folder)
    trainer = RayLauncher(Ray(address=answers.address)).find(folder, trainer_id="x", attempt=1)
    status_of(trainer)
    assert trainer.taken
    assert locked(folder)


def test_one_that_waits_for_its_turn_ends_as_soon_as_it_is_asked_to(answers, folder):
    trainer = start(answers.address, folder)
    answers.say("PENDING")
    ask_often(trainer)
    trainer.ask_to_stop()
    assert status_of(trainer) == ExitCode.STOPPED
    assert folder.stop(1).exists()  # for the entry point, should its turn come
    assert answers.stopped


OOM = "Unexpected error occurred: 1 worker(s) were killed due to the node running low on memory. Memory on the node"
DIED = "Job supervisor actor died: The actor died unexpectedly before finishing this task.\n\tclass_name: JobSupervisor"
ERRORS = {
    "killed": ({"driver_exit_code": -9}, -9, "", ""),
    "killed below a shell": ({"driver_exit_code": 137}, -9, "", ""),
    "a crash of a rank on another node": ({"driver_exit_code": 139}, -11, "", ""),
    "stopped": ({"driver_exit_code": 130}, 130, "", ""),
    "a bug": ({"driver_exit_code": 1}, 1, "", ""),
    "memory": (
        {"error_type": "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE", "message": OOM, "driver_node_id": "a"},
        -9,
        "",
        "",
    ),
    "memory before it began": ({"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": OOM}, -9, "low on memory", ""),
    "lost": ({"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": DIED}, -9, "before finishing this task.", ""),
    "no turn": ({"error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "message": "in 900 s"}, -9, "in 900 s", ""),
    "no environment": ({"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no pip"}, 75, "", "no pip"),
    "no folder": ({"driver_exit_code": 72}, 75, "", "does not see"),
    "no python": ({"driver_exit_code": 127}, 75, "", "ray.python"),
    "a worker": ({"driver_exit_code": 74}, -9, "one of its workers", ""),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_failed_job_is_the_trainers_end_or_was_taken_or_never_began(name):
    info, status, taken, error = ERRORS[name]
    end = end_of({"status": "FAILED", **info})
    assert end.status == status
    assert taken in end.taken
    assert bool(end.taken) == bool(taken)
    assert error in str(end.error)
    assert (end.error is not None) == bool(error)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Training failed:\n[Rank 1 Error]: rank 1 ended with -9\n[Rank 0 Error]: rank 0 ended with 75", 75),
        ("RuntimeError: rank 1 ended with -9", 137),
        ("The actor died because its node has died.", 74),
    ],
)
def test_a_group_of_ranks_ends_as_its_first_or_was_taken_where_none_could_say(said, code):
    assert ray_train.exit_code(said) == code


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_what_waits_or_runs_has_no_end(state):
    assert end_of({"status": state}) is None


def test_what_the_trainer_said_itself_counts_more_than_what_ray_says(answers, folder):
    leave_exit_code(folder, 1, 70)
    answers.say("FAILED", driver_exit_code=-9)
    assert status_of(start(answers.address, folder)) == 70


def test_an_end_after_a_kill_is_the_kill(answers, folder):
    trainer = start(answers.address, folder)
    answers.say("RUNNING")
    ask_often(trainer)
    trainer.kill()
    eventually(lambda: trainer.poll() is None and answers.stopped)
    answers.say("STOPPED")
    assert (status_of(trainer), trainer.taken) == (-signal.SIGKILL, "")


@pytest.mark.parametrize("said", [None, 70])
def test_one_that_is_killed_on_a_cluster_that_is_gone_ends_in_the_end_and_the_log_says_where_it_may_be(
    folder, monkeypatch, said
):
    monkeypatch.setattr(ray, "GIVEN_UP_SECONDS", 0.3)
    with answering() as answers:
        trainer = start(answers.address, folder)
        answers.say("RUNNING")
        ask_often(trainer)
    if said:
        leave_exit_code(folder, 1, said)
    ask_often(trainer, seconds=0.6)
    trainer.kill()
    with capture_logs() as logs:
        assert status_of(trainer) == (said or -signal.SIGKILL)
    if said is None:
        assert f"ray job status --address {answers.address} {trainer.id}" in trainer.taken
        assert [line["look"] in trainer.taken for line in logs if line["event"] == "given up"] == [True]


@pytest.mark.parametrize("sign", ["lock", "events", "answers"])
def test_one_that_is_killed_is_not_given_up_while_anybody_gives_a_sign_of_life(folder, hold, monkeypatch, sign):
    monkeypatch.setattr(ray, "GIVEN_UP_SECONDS", 0.3)
    with answering() as answers:
        trainer = start(answers.address, folder)
        answers.say("RUNNING")
        ask_often(trainer)
        if sign == "answers":
            trainer.kill()
            ask_often(trainer, seconds=0.6)
    holder = hold(folder) if sign == "lock" else None
    trainer.kill()
    for _ in range(6):
        if sign == "events":
            with folder.events.open("a") as file:
                file.write("a step\n")
            ask_often(trainer, seconds=0.1)
        if sign == "lock":
            ask_often(trainer, seconds=0.1)
    if holder:
        holder.kill()
        holder.wait()
    assert status_of(trainer) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("says", "exits"), [("FAILED", 1), ("FAILED", -9), ("FAILED", 143), ("SUCCEEDED", 0), ("STOPPED", None)]
)
@pytest.mark.parametrize("said", [-11, 0, 130])
def test_what_the_trainer_left_stands_above_the_exit_code_that_ray_saw(answers, folder, says, exits, said):
    leave_exit_code(folder, 1, said)
    answers.say(says, driver_exit_code=exits)
    assert status_of(start(answers.address, folder)) == said


@pytest.mark.parametrize(
    "bad",
    [
        {"address": "127.0.0.1:8265"},
        {"address": "http://x:99999"},
        {"resources": {"GPU": 1}},
        {"resources": {"CPU": -1}},
        {"runtime_env": {"env_vars": {"A": 1}}},
        {"adress": "http://x"},
    ],
)
def test_settings_that_cannot_be_used_are_refused(bad):
    with pytest.raises(ValidationError):
        Ray(**bad)
