"""Trainers as jobs of a real Ray."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import chat_rows, eventually, write_jsonl
from finetuned.config import Config
from finetuned.engine_settings import Ray
from finetuned.events import ExitCode
from finetuned.home import JobFolder
from finetuned.jobs import FileIdentity, JobSpec
from finetuned.launchers import Needs
from finetuned.launchers.local import start as start_here
from finetuned.launchers.ray import RayLauncher
from finetuned.lifesigns import locked
from fixtures_ray import CACHE, RayCluster
from standin_trainer import safetensors, weights_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LOOK = """
import os, sys
print("GPU", os.environ["CUDA_VISIBLE_DEVICES"], "of", os.environ["COLOUR"], "for", sys.argv[1])
print("threads", os.environ.get("OMP_NUM_THREADS"))
"""
RANK = """
import os, socket, sys, time
rank, gpu, size, gpus, colour, host, port = (os.environ[name] for name in (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "COLOUR", "MASTER_ADDR", "MASTER_PORT"
))
if rank == "0":
    with socket.create_server((host, int(port))) as meeting:
        other = meeting.accept()[0].recv(1).decode()
else:
    with socket.socket() as meeting:
        while meeting.connect_ex((host, int(port))):
            time.sleep(0.1)
        meeting.send(rank.encode())
        other = "0"
line = f"RANK {rank} of {size}, GPU {gpu} of {gpus}, {colour}, met {other}, {sys.argv[2]}"
os.write(1, line.encode() + b"\\n")
sys.exit(int(sys.argv[1]) if rank == "0" else 0)
"""


@pytest.fixture(scope="module")
def cluster():
    """A cluster that the tests share."""
    one = RayCluster()
    try:
        one.start()
        yield one
    finally:
        one.discard()


@pytest.fixture
def launcher(cluster, standin):
    return RayLauncher(Ray(address=cluster.address, token_file=cluster.token_file))


@pytest.fixture
def job(tmp_path):
    """Make folders of jobs of ten rows; what runs in them ends with the test."""
    made: list[JobFolder] = []

    def make(attempt: int = 1) -> JobFolder:
        folder = JobFolder(tmp_path / f"job{len(made)}")
        folder.path.mkdir()
        write_jsonl(folder.path / "input.jsonl", chat_rows(10))
        keys = dict.fromkeys(("sha256", "held_out", "held_out_sha256", "profile"), "")
        spec = {**keys, "id": folder.path.name, "attempt": attempt, "input": "input.jsonl", "name": "x.jsonl"}
        folder.spec.write_text(json.dumps({**spec, "settings": {}, "rung": {}}))
        made.append(folder)
        return folder

    yield make
    for folder in made:
        for attempt in range(1, 4):
            folder.stop(attempt).touch()


def start(launcher, folder, *, attempt=1, gpus=1, **environment):
    log = folder.path.with_suffix(".log")
    needs = Needs(job=folder.path.name, attempt=attempt, gpus=gpus)
    trainer = launcher.start(folder, log=log, environment=environment, needs=needs)
    eventually(lambda: trainer.poll() is not None or not trainer.in_doubt, why="Ray's answer, which may take its time")
    return trainer


def end_of(trainer) -> int:
    eventually(lambda: trainer.poll() is not None, seconds=240, why=f"the end of {trainer.id}")
    return trainer.poll()


def runs(folder) -> bool:
    return eventually(lambda: folder.events.exists() and b"metrics" in folder.events.read_bytes() and locked(folder))


def test_a_trainer_trains_to_the_end_with_its_lock_its_gpu_and_its_log(launcher, job, monkeypatch):
    folder = job()
    trainer = start(launcher, folder, STANDIN_NOISE="1", STANDIN_SECONDS="0.2")
    assert trainer.pid is None
    assert trainer.poll() is None
    runs(folder)
    assert end_of(trainer) == 0
    assert trainer.taken == ""
    assert not locked(folder)
    rows = (folder.path / "input.jsonl").read_bytes().splitlines()
    adapter = folder.staged_adapter(1) / "adapter_model.safetensors"
    assert adapter.read_bytes() == safetensors(weights_of(rows, 10))
    log = folder.path.with_suffix(".log")
    assert log.read_text().startswith("noise")

    monkeypatch.setenv("FINETUNED_TRAINER", shlex.join([sys.executable, "-c", LOOK]))
    before = log.stat().st_size
    assert end_of(start(launcher, folder, attempt=2, COLOUR="blue", CUDA_VISIBLE_DEVICES="GPU-of-the-daemon")) == 0
    assert log.read_text()[before:].splitlines() == [f"GPU 0 of blue for {folder.path}", "threads None"]


@pytest.mark.parametrize(
    ("ways", "status"),
    [
        ({"STANDIN_END": "70"}, ExitCode.OUT_OF_MEMORY),
        ({"STANDIN_END": "1"}, 1),
        ({"STANDIN_END": "-9"}, -signal.SIGKILL),
    ],
)
def test_its_exit_code_is_the_trainers(launcher, job, ways, status):
    trainer = start(launcher, job(), gpus=0, **ways)
    assert end_of(trainer) == status
    assert trainer.taken == ""


def test_one_that_is_asked_to_stop_leaves_a_checkpoint_and_another_daemon_finds_it_before(launcher, cluster, job):
    folder = job()
    trainer = start(launcher, folder, STANDIN_SECONDS="0.5")
    runs(folder)
    later = RayLauncher(Ray(address=cluster.address, token_file=cluster.token_file))
    found = later.find(folder, trainer_id=trainer.id, attempt=1)
    assert found.poll() is None
    assert later.find(folder, trainer_id="", attempt=1).id == trainer.id  # the daemon died before it noted the id
    assert later.find(job(), trainer_id="", attempt=1) is None
    found.ask_to_stop()
    assert [end_of(found), end_of(trainer)] == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert (folder.checkpoints / "standin.json").exists()
    assert later.find(folder, trainer_id=trainer.id, attempt=1).poll() is None
    assert end_of(later.find(folder, trainer_id=trainer.id, attempt=1)) == ExitCode.STOPPED


def test_one_that_hears_nothing_is_killed(launcher, job):
    folder = job()
    trainer = start(launcher, folder, STANDIN_SECONDS="0.5", STANDIN_DEAF="1", RAY_JOB_STOP_WAIT_TIME_S="1")
    runs(folder)
    trainer.kill()
    trainer.kill()
    assert end_of(trainer) == -signal.SIGKILL
    assert trainer.taken == ""


def test_one_that_waits_for_a_gpu_is_stopped_at_once_and_never_begins(launcher, job):
    first, second, third = job(), job(), job()
    at_work = start(launcher, first, gpus=2, STANDIN_SECONDS="0.5")
    runs(first)
    waiting = start(launcher, second)
    waiting.ask_to_stop()
    assert end_of(waiting) == ExitCode.STOPPED
    at_work.ask_to_stop()
    assert end_of(at_work) == ExitCode.STOPPED
    assert end_of(start(launcher, third, gpus=2)) == 0  # behind the second in Ray's queue
    assert not second.events.exists()


def test_the_same_order_twice_is_one_job(launcher, job):
    folder = job()
    trainer, again = start(launcher, folder, STANDIN_SECONDS="0.1"), start(launcher, folder)
    assert trainer.id == again.id
    assert [end_of(trainer), end_of(again)] == [0, 0]
    assert folder.events.read_text().count('"phase"') == 2  # its type and its figure, of one event


def test_one_that_somebody_stops_through_ray_was_taken(launcher, job):
    folder = job()
    trainer = start(launcher, folder, STANDIN_SECONDS="0.5", STANDIN_DEAF="1", RAY_JOB_STOP_WAIT_TIME_S="1")
    runs(folder)
    launcher._cluster.stop(trainer.id, seconds=5)
    assert end_of(trainer) == -signal.SIGTERM
    assert "somebody stopped it" in trainer.taken


def test_one_whose_supervisor_died_was_taken(launcher, cluster, job):
    folder = job()
    trainer = start(launcher, folder, STANDIN_SECONDS="0.5")
    runs(folder)
    os.kill(cluster.pid_of("ray::JobSupervisor"), signal.SIGKILL)
    end_of(trainer)
    assert "Ray lost it" in trainer.taken
    assert not locked(folder)


def test_a_node_without_the_folder_or_the_python_is_told_as_the_reason(launcher, cluster, job, monkeypatch):
    folder = job()
    elsewhere = JobFolder(Path("/nowhere/job"))
    trainer = start(launcher, folder)
    assert end_of(trainer) == 0
    monkeypatch.delenv("FINETUNED_TRAINER")
    settings = Ray(address=cluster.address, token_file=cluster.token_file, python="/nowhere/python")
    trainer = start(RayLauncher(settings), folder, attempt=2)
    assert end_of(trainer) == ExitCode.TEMPORARY
    assert "ray.python" in folder.events.read_text()
    log = folder.path / "other.log"
    trainer = launcher.start(elsewhere, log=log, environment={}, needs=Needs(job="j", attempt=1, gpus=0))
    assert end_of(trainer) == ExitCode.TEMPORARY


def test_without_a_good_token_or_address_nothing_is_submitted_and_the_remedy_is_said(cluster, job, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("b" * 64)
    with pytest.raises(ConnectionError, match=r"403.*ray.token_file"):
        start(RayLauncher(Ray(address=cluster.address, token_file=wrong)), job())
    with pytest.raises(ConnectionError, match=r"401.*ray.token_file"):
        start(RayLauncher(Ray(address=cluster.address)), job())
    with pytest.raises(ConnectionError, match=r"404.*mend ray.address"):
        start(RayLauncher(Ray(address=f"{cluster.address}/elsewhere", token_file=cluster.token_file)), job())


def test_the_trainer_of_a_cluster_that_is_started_anew_was_taken_and_the_next_attempt_goes_on(launcher, cluster, job):
    folder = job()
    trainer = start(launcher, folder, STANDIN_SECONDS="0.5")
    runs(folder)
    eventually(lambda: b"checkpoint_step" in folder.events.read_bytes())
    cluster.kill()
    with pytest.raises(OSError, match="Ray"):
        start(launcher, job())
    assert trainer.poll() is None  # nobody answers, which says nothing
    cluster.start()
    end_of(trainer)
    assert "knows the job no more" in trainer.taken
    assert launcher.find(folder, trainer_id=trainer.id, attempt=1) is None
    folder.spec.write_text(folder.spec.read_text().replace('"attempt": 1', '"attempt": 2'))
    assert end_of(start(launcher, folder, attempt=2)) == 0
    assert "resumed after step" in folder.events.read_text()


def test_a_job_on_several_gpus_is_a_group_of_ranks_that_ray_train_starts(cluster, job, monkeypatch):
    folder = job()
    monkeypatch.setenv("FINETUNED_TRAINER", shlex.join([sys.executable, "-c", RANK, "70"]))
    python = str(CACHE / "bin/python")
    settings = Ray(address=cluster.address, token_file=cluster.token_file, across_nodes=True, ray_python=python)
    assert end_of(start(RayLauncher(settings), folder, gpus=2, COLOUR="blue")) == ExitCode.OUT_OF_MEMORY
    said = folder.path.with_suffix(".log").read_text().splitlines()
    assert sorted(line for line in said if line.startswith("RANK")) == [
        f"RANK {rank} of 2, GPU {rank} of 0,1, blue, met {1 - rank}, {folder.path}" for rank in (0, 1)
    ]


def test_two_processes_of_the_real_trainer_train_there_what_one_trains_here(cluster, tiny_model, tmp_path):
    here = real_job(tmp_path / "here", tiny_model, processes=1)
    there = real_job(tmp_path / "there", tiny_model, processes=2)
    python = str(CACHE / "bin/python")
    settings = Ray(address=cluster.address, token_file=cluster.token_file, across_nodes=True, ray_python=python)
    trainer = start(RayLauncher(settings), there, gpus=2, OMP_NUM_THREADS="1")
    local = start_here(here, log=here.path.with_suffix(".log"), environment={"OMP_NUM_THREADS": "1"})
    assert [end_of(local), end_of(trainer)] == [0, 0], there.path.with_suffix(".log").read_text()
    one, two = (load_file(folder.staged_adapter(1) / "adapter_model.safetensors") for folder in (here, there))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def real_job(path: Path, model: Path, *, processes: int) -> JobFolder:
    path.mkdir()
    settings = Config(model=str(model), dtype="float32", batch_size=4, epochs=1, learning_rate=2e-3).training()
    spec = JobSpec(
        id=path.name,
        name="x.jsonl",
        profile="",
        identity=FileIdentity(1, 2, 3, 4),
        created_at=1.0,
        input=str(write_jsonl(path / "input.jsonl", chat_rows(16))),
        settings=settings.model_dump(),
        rung=settings.first_rung().as_dict(),
        sha256="0" * 64,
        attempt=1,
        base_dir=str(path),
        models=str(path),
        processes=processes,
    )
    (path / "job.json").write_bytes(spec.encode())
    return JobFolder(path)
