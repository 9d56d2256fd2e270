"""Trainers forked from a parent that has torch loaded: real processes, on jobs that need no training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import structlog

from conftest import eventually
from finetuned.config import Config
from finetuned.jobs import FileIdentity, Job, JobSpec, State
from finetuned.launchers import local, warm
from finetuned.lifesigns import locked, signed
from finetuned.supervisor import stop_orphan

# Runs in the parent before anything else; a fork runs what is registered when it ends. Of the libraries torch is enough
# here, and loaded in a quarter of the time; e2e/test_daemon.py has a parent with all of them.
SITE = """
import atexit, os, sys, threading, time
sys.modules |= dict.fromkeys(("transformers", "accelerate", "peft"))
if path := os.environ.get("TELL_ENVIRONMENT"):
    atexit.register(lambda: open(path, "w").write(repr(dict(os.environ))))
if os.environ.get("START_THREAD"):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What all trainers of this page are given."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": path,
        "TELL_ENVIRONMENT": str(folder / "told"),
        "PYTEST_CURRENT_TEST": "",  # pytest changes it with every test
    }


@pytest.fixture(scope="module")
def shared(environment):
    """One parent for all tests that leave it alive."""
    parent = warm.WarmParent()
    parent.open(environment)
    yield parent
    parent.close()


def heard(parent: warm.WarmParent) -> bool:
    parent.listen()
    return parent._ready or bool(parent._unfit)


@pytest.fixture
def parent(shared, environment):
    """The parent, ready to be asked."""
    shared.open(environment)
    eventually(lambda: heard(shared), seconds=120, why="torch is loaded")
    return shared


@pytest.fixture
def job(home):
    """Make a job: its input holds these bytes, or with None its job.json never comes, so that its trainer waits."""
    made = []

    def make(content: bytes | None = None):
        folder = home.job(f"x-{len(made)}")
        folder.path.mkdir(parents=True)
        made.append(folder)
        if content is None:
            os.mkfifo(folder.spec)
            return folder
        (folder.path / "input.jsonl").write_bytes(content)
        settings = Config().training()
        spec = JobSpec(
            id=folder.path.name,
            name="x.jsonl",
            profile="",
            identity=FileIdentity(1, 2, 3, 4),
            created_at=1.0,
            input="input.jsonl",
            settings=settings.model_dump(),
            rung=asdict(settings.first_rung()),
            attempt=1,
            base_dir=str(home.root),
            models=str(home.models),
        )
        folder.spec.write_bytes(spec.encode())
        return folder

    return make


@pytest.fixture
def start(home, environment):
    """Start trainers; what still runs is killed when the test ends."""
    started = []

    def begin(how, folder, **extra: str):
        started.append(how(folder, log=home.job_log("x"), environment={**environment, **extra}))
        return started[-1]

    yield begin
    for trainer in started:
        trainer.kill()


def at_work(folder) -> bool:
    """Whether its trainer has told its pid and waits for job.json."""
    return bool(folder.lock.read_text())


def facts(pid: int) -> dict:
    """What a process was given at its birth, as the kernel tells it."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = {path.name: str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return {
        "session": os.getsid(pid) == os.getpgid(pid) == pid,
        "parent": int(status["PPid"]),
        "files": sorted(Path(target).name for target in files.values()),
        "standard": [files[name] for name in "012"],
        "folder": str(Path(f"/proc/{pid}/cwd").readlink()),
        **{name: status[name] for name in ("Umask", "SigBlk", "SigIgn", "SigCgt", "Uid", "Gid")},
    }


def test_a_forked_trainer_is_given_what_a_subprocess_is(parent, start, job, home):
    found = []
    for how, kind in ((local.start, local.LocalTrainer), (parent.start, local.ForkedTrainer)):
        folder = job()
        trainer = start(how, folder)
        assert isinstance(trainer, kind)
        eventually(lambda folder=folder: at_work(folder))
        assert locked(folder)
        assert trainer.poll() is None
        with pytest.raises(BlockingIOError):
            start(how, folder)
        found.append(facts(trainer.pid))
        trainer.kill()
        assert trainer.poll() == -signal.SIGKILL
        assert not locked(folder)
    plain, forked = found
    assert forked == plain
    assert forked["session"]
    assert forked["parent"] == os.getpid()
    assert forked["standard"] == ["/dev/null", str(home.job_log("x")), str(home.job_log("x"))]


def test_the_exit_code_and_the_words_of_a_fork_arrive(parent, start, job, home):
    trainer = start(parent.start, job(b"no\n"))
    assert isinstance(trainer, local.ForkedTrainer)
    assert eventually(trainer.poll) == 65
    assert "error: x.jsonl" in home.job_log("x").read_text()


def test_a_bug_in_a_fork_is_in_the_log_and_exits_with_1(parent, start, job, home):
    folder = job(b"")
    folder.spec.write_text("no json")
    trainer = start(parent.start, folder)
    assert eventually(trainer.poll) == 1
    assert "Traceback" in home.job_log("x").read_text()


def test_a_fork_that_a_signal_ends_says_which(parent, start, job):
    folder = job()
    trainer = start(parent.start, folder)
    eventually(lambda: at_work(folder))
    os.kill(trainer.pid, signal.SIGSEGV)
    assert eventually(trainer.poll) == -signal.SIGSEGV


def test_each_fork_has_its_own_gpu_and_else_the_environment_of_the_parent(parent, start, job, environment):
    for gpu in ("GPU-1", "GPU-2"):
        trainer = start(parent.start, job(b"no\n"), CUDA_VISIBLE_DEVICES=gpu)
        assert isinstance(trainer, local.ForkedTrainer)
        assert eventually(trainer.poll) == 65
        told = eval(Path(environment["TELL_ENVIRONMENT"]).read_text())
        assert told.items() >= {**os.environ, **environment, "CUDA_VISIBLE_DEVICES": gpu}.items()
        assert "OPENBLAS_NUM_THREADS" not in told.keys() - os.environ.keys()


def test_a_fork_that_outlived_its_daemon_is_found_by_the_lock_that_it_holds(parent, start, job, home):
    folder = job()
    trainer = start(parent.start, folder)
    eventually(lambda: at_work(folder))
    stranger = job()
    stranger.lock.write_text(f"{trainer.pid} 1 0\n")  # a pid that was given again after a restart
    row = Job(folder.path.name, b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.RUNNING, 1.0, trainer_pid=trainer.pid)
    stop_orphan(home, Job(**{**row.__dict__, "id": stranger.path.name}), seconds=0)
    assert trainer.poll() is None
    stop_orphan(home, row, seconds=0.3)
    assert not locked(folder)
    assert eventually(trainer.poll) == -signal.SIGKILL


def test_another_environment_gets_a_subprocess_and_a_new_parent(environment, parent, start, job):
    with structlog.testing.capture_logs() as log:
        trainer = start(parent.start, job(b"no\n"), COLOUR="red")
    assert isinstance(trainer, local.LocalTrainer)
    [line] = [line for line in log if line["event"] == "trainer starts cold"]
    assert line["why"] == "the warm parent: it was started with another environment"
    with structlog.testing.capture_logs() as log:
        assert isinstance(start(parent.start, job(b"no\n"), COLOUR="red"), local.LocalTrainer)
    assert "still loading" in log[0]["why"]
    eventually(lambda: heard(parent), seconds=120)
    assert isinstance(start(parent.start, job(b"no\n"), COLOUR="red"), local.ForkedTrainer)
    parent.close()


def test_a_parent_that_is_killed_costs_its_trainer_nothing(parent, start, job):
    folder = job()
    trainer = start(parent.start, folder)
    eventually(lambda: at_work(folder))
    os.kill(parent._process.pid, signal.SIGKILL)
    parent._process.wait()
    assert trainer.poll() is None
    with structlog.testing.capture_logs() as log:
        second = start(parent.start, job(b"no\n"))
    assert isinstance(second, local.LocalTrainer)
    assert log[0]["why"] == "the warm parent: it ended: killed by SIGKILL"
    assert eventually(second.poll) == 65
    os.kill(trainer.pid, signal.SIGKILL)
    assert eventually(trainer.poll) == -signal.SIGKILL


def test_a_parent_that_does_not_answer_is_ended_and_one_trainer_starts(parent, start, job):
    os.kill(parent._process.pid, signal.SIGSTOP)
    stopped = parent._process.pid
    folder = job()
    with structlog.testing.capture_logs() as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "_PATIENCE", 0.5)
        trainer = start(parent.start, folder)
    assert isinstance(trainer, local.LocalTrainer)
    assert log[0]["why"] == "the warm parent: timed out"
    assert not Path(f"/proc/{stopped}").exists()
    eventually(lambda: at_work(folder))
    trainer.kill()
    assert not locked(folder)  # no fork is left that holds it
    assert signed(folder).pid == trainer.pid


def test_a_parent_with_a_second_thread_is_not_forked(environment, start, job):
    parent = warm.WarmParent()
    try:
        parent.open({**environment, "START_THREAD": "1"})
        eventually(lambda: heard(parent), seconds=120)
        with structlog.testing.capture_logs() as log:
            trainer = start(parent.start, job(b"no\n"), START_THREAD="1")
        assert isinstance(trainer, local.LocalTrainer)
        assert log[0]["why"] == "the warm parent: it runs 2 threads, which a fork would lose"
    finally:
        parent.close()


def test_the_parent_ends_with_its_daemon_also_when_that_is_killed(environment):
    script = (
        "import json, sys, time; from finetuned.launchers.warm import WarmParent\n"
        "parent = WarmParent(); parent.open(json.loads(sys.argv[1])); print(parent._process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, json.dumps(environment)], stdout=subprocess.PIPE) as daemon:
        pid = int(daemon.stdout.readline())
        daemon.kill()
    status = Path(f"/proc/{pid}/status")
    eventually(lambda: not status.exists() or "zombie" in status.read_text(), seconds=120, why="the parent ends")
