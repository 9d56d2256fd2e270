"""Trainers as jobs of a real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog

from conftest import STANDIN, chat_rows, eventually, write_jsonl
from finetuned.config import settings_from
from finetuned.engine_settings import Slurm
from finetuned.errors import FinetunedError
from finetuned.home import Home, JobFolder
from finetuned.jobs import FileIdentity, JobSpec
from finetuned.launchers import Needs
from finetuned.launchers import slurm as slurm_launcher
from finetuned.launchers.slurm import SlurmLauncher, SlurmTrainer
from finetuned.launchers.slurm_queue import Queue
from finetuned.lifesigns import exit_code, locked, signed
from standin_trainer import safetensors, weights_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

NODES = Path(__file__).parents[2] / "examples/slurm/nodes.sh"
TWO_RANKS = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
# Rank 0 trains, the other waits for it.
RANK = shlex.join(
    [
        "bash",
        "-c",
        """
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE here, by $MASTER_ADDR:$MASTER_PORT"
[ "$RANK" = 0 ] && exec $0 "$@"
trap 'echo rank $RANK was told to stop; exit 130' TERM
until [ -e "$1/out.1/adapter/finetuned.json" ]; do sleep 0.05; done""",
        STANDIN,
    ]
)


@pytest.fixture
def launcher(slurm, standin, tmp_path, monkeypatch):
    """Make launchers; each is one of a daemon of its own, with the patience of one that has nothing else to do."""
    monkeypatch.setattr(slurm_launcher, "_AT_MOST", 30.0)

    def make(**settings) -> SlurmLauncher:
        return SlurmLauncher(Slurm(**settings), Home(tmp_path), Queue(every=0.2))

    return make


@pytest.fixture
def sbatch_says(monkeypatch, tmp_path):
    """Put a script in sbatch's place."""

    def put(script: str) -> None:
        program = tmp_path / "bin/sbatch"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return put


@pytest.fixture
def job(tmp_path):
    """Make folders of jobs of so many rows, which are as many steps."""
    made = []

    def make(rows: int = 10, attempt: int = 1) -> JobFolder:
        folder = JobFolder(tmp_path / "50%j |ä" / f"job-{len(made)}")  # a path may hold anything
        folder.path.mkdir(parents=True)
        write_jsonl(folder.path / "input.jsonl", chat_rows(rows))
        keys = dict.fromkeys(("sha256", "held_out", "held_out_sha256", "profile"), "")
        spec = {**keys, "id": folder.path.name, "attempt": attempt, "input": "input.jsonl", "name": "x.jsonl"}
        folder.spec.write_text(json.dumps({**spec, "settings": {}, "rung": {}}))
        made.append(folder)
        return folder

    return make


def real_job(path: Path, model: Path) -> JobFolder:
    """Make the folder of a job for the real trainer."""
    path.mkdir()
    values = {"dtype": "float32", "batch_size": 4, "epochs": 12, "model": str(model)}
    settings = settings_from(values, where="the test")
    spec = JobSpec(
        id=path.name,
        attempt=1,
        name="x.jsonl",
        profile="",
        identity=FileIdentity(1, 2, 3, 4),
        created_at=0.0,
        input=str(write_jsonl(path / "input.jsonl", chat_rows(24))),
        settings=settings.model_dump(),
        rung=settings.first_rung().as_dict(),
        sha256="0" * 64,
        base_dir=str(path),
        models=str(path),
    )
    folder = JobFolder(path)
    folder.spec.write_bytes(spec.encode())
    return folder


def submit(launcher: SlurmLauncher, folder: JobFolder, *, gpus: int = 0, attempt: int = 1, **ways) -> SlurmTrainer:
    environment = {f"STANDIN_{name.upper()}": str(value) for name, value in ways.items()}
    needs = Needs(job=folder.path.name, attempt=attempt, gpus=gpus)
    return launcher.start(folder, log=log_of(folder), environment=environment, needs=needs)


def log_of(folder: JobFolder) -> Path:
    return folder.path.with_suffix(".log")


def end_of(trainer: SlurmTrainer, *, seconds: float = 30) -> int:
    ends = []
    eventually(lambda: (ends.append(trainer.poll()), ends[-1] is not None)[1], seconds=seconds, why="its end")
    return ends[-1]


def begun(folder: JobFolder, *, step: int = 1) -> None:
    """Wait until a trainer has done so many steps."""
    eventually(lambda: folder.events.exists() and f"step {step} of" in folder.events.read_text(), seconds=30)


def is_trained(folder: JobFolder, *, attempt: int = 1) -> bool:
    rows = (folder.path / "input.jsonl").read_bytes().splitlines()
    adapter = folder.staged_adapter(attempt) / "adapter_model.safetensors"
    return adapter.read_bytes() == safetensors(weights_of(rows, len(rows)))


def checkpoint_of(folder: JobFolder) -> int:
    return json.loads((folder.checkpoints / "standin.json").read_text())["step"]


def set_attempt(folder: JobFolder, attempt: int) -> None:
    folder.spec.write_text(json.dumps({**json.loads(folder.spec.read_text()), "attempt": attempt}))


def test_a_job_is_trained_and_its_log_goes_on_where_it_stood(launcher, job):
    folder = job()
    log_of(folder).write_text("what an earlier attempt said\n")
    trainer = submit(launcher(), folder, noise=1)
    assert trainer.id
    assert trainer.pid is None
    assert end_of(trainer) == 0
    assert trainer.taken == ""
    assert is_trained(folder)
    assert log_of(folder).read_text().startswith("what an earlier attempt said\nnoise\n")


def test_the_real_trainer_stops_goes_on_and_comes_to_the_weights_of_this_machine(
    launcher, tmp_path, tiny_model, monkeypatch
):
    monkeypatch.delenv("FINETUNED_TRAINER")
    here, there = (real_job(tmp_path / name, tiny_model) for name in ("here", "there"))
    local = subprocess.Popen([sys.executable, "-m", "finetuned.trainer", here.path])
    one = launcher()
    trainer = submit(one, there)
    eventually(lambda: there.events.exists() and '"step":' in there.events.read_text(), why="its first steps")
    trainer.ask_to_stop()
    assert end_of(trainer) == 130
    set_attempt(there, 2)
    assert end_of(submit(one, there, attempt=2), seconds=90) == 0
    assert local.wait(90) == 0
    weights = [
        (folder.staged_adapter(attempt) / "adapter_model.safetensors").read_bytes()
        for folder, attempt in ((here, 1), (there, 2))
    ]
    assert weights[0] == weights[1]


def test_its_end_is_told_as_of_a_trainer_on_this_machine(launcher, job):
    one = launcher()
    trainers = {end: submit(one, job(), end=end) for end in (1, 65, 70, 75, 78, -signal.SIGKILL, -signal.SIGSEGV)}
    assert {end: end_of(trainer) for end, trainer in trainers.items()} == {end: end for end in trainers}
    assert {trainer.taken for trainer in trainers.values()} == {""}


def test_a_later_daemon_finds_it_by_its_id_and_sees_its_end(launcher, job):
    folder = job(rows=20)
    trainer = submit(launcher(), folder, seconds=0.1)
    begun(folder)
    found = launcher().find(folder, trainer_id=trainer.id, attempt=1)
    assert found.id == trainer.id
    assert found.poll() is None
    assert end_of(found) == 0
    assert is_trained(folder)
    assert end_of(launcher().find(folder, trainer_id=trainer.id, attempt=1)) == 0


def test_it_is_found_without_its_id_but_not_for_another_job_or_attempt(launcher, job):
    folder, other = job(), job()
    trainer = submit(launcher(), folder, seconds=0.1)
    assert launcher().find(folder, trainer_id="", attempt=1).id == trainer.id
    assert launcher().find(folder, trainer_id="", attempt=2) is None
    assert launcher().find(other, trainer_id="", attempt=1) is None
    assert launcher().find(other, trainer_id=trainer.id, attempt=1) is None  # a number that was given anew
    assert launcher().find(folder, trainer_id="999999", attempt=1) is None


def test_one_that_slurm_has_forgotten_has_ended_as_it_said_itself(launcher, job):
    folder = job()
    assert end_of(submit(launcher(), folder, end=70)) == 70
    assert end_of(launcher().find(folder, trainer_id="999999", attempt=1)) == 70


def test_a_stop_writes_a_checkpoint_and_the_next_attempt_goes_on_from_it(launcher, job):
    one, folder = launcher(), job(rows=30)
    trainer = submit(one, folder, seconds=0.2)
    begun(folder, step=2)
    trainer.ask_to_stop()
    assert end_of(trainer) == 130
    assert trainer.taken == ""
    step = checkpoint_of(folder)
    set_attempt(folder, 2)
    assert end_of(submit(one, folder, attempt=2)) == 0
    assert f"resumed after step {step}" in folder.events.read_text()
    assert is_trained(folder, attempt=2)


def test_a_signal_tells_it_too_as_a_file_may_take_its_time_on_a_shared_disk(launcher, job, monkeypatch):
    monkeypatch.setenv("FINETUNED_TRAINER", "bash -c 'trap \"exit 130\" TERM; echo up; while :; do sleep 0.05; done'")
    folder = job()
    trainer = submit(launcher(), folder)
    eventually(lambda: log_of(folder).exists() and "up" in log_of(folder).read_text())
    trainer.ask_to_stop()
    assert end_of(trainer) == 130


def test_before_its_time_limit_it_is_told_and_what_does_not_hear_was_taken(launcher, job, slurm):
    told, deaf = job(rows=9000), job(rows=9000)
    wise = submit(launcher(options=["--time=1"], signal_seconds=60), told, seconds=0.1)
    late = submit(launcher(options=["--time=5"], signal_seconds=1), deaf, seconds=0.1, deaf=1)
    begun(deaf, step=5)
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 1))
    slurm.run("scontrol", "update", f"JobId={late.id}", f"EndTime={soon}")  # Slurm looks every half minute
    assert end_of(wise, seconds=60) == 130
    assert wise.taken == "Slurm asked it to stop, as it does before a time limit"
    assert end_of(late, seconds=60) == -signal.SIGTERM
    assert late.taken == "its time limit was reached"
    assert checkpoint_of(told) >= 5
    assert checkpoint_of(deaf) >= 5


def test_one_job_over_several_nodes_has_a_rank_for_each_task_and_all_are_told_to_stop(
    launcher, job, slurm, monkeypatch
):
    monkeypatch.setenv("FINETUNED_TRAINER", RANK)
    folder = job(rows=9000)
    trainer = submit(launcher(template=str(NODES), options=TWO_RANKS), folder, seconds=0.1)
    begun(folder, step=2)
    trainer.ask_to_stop()
    assert end_of(trainer) == 130
    port = 20000 + int(trainer.id) % 20000
    ranks = sorted(line for line in log_of(folder).read_text().splitlines() if line.startswith("rank"))
    assert ranks[:2] == [f"rank {n} of 2, {n} of 2 here, by {slurm.host}:{port}" for n in range(2)]
    assert ranks[2:] == ["rank 1 was told to stop"]


def test_ranks_that_train_to_the_end_end_their_job(launcher, job, monkeypatch):
    monkeypatch.setenv("FINETUNED_TRAINER", RANK)
    folder = job()
    assert end_of(submit(launcher(template=str(NODES), options=TWO_RANKS), folder)) == 0
    assert is_trained(folder)


def test_a_job_that_waits_is_taken_out_of_the_queue(launcher, job, slurm):
    folder = job()
    trainer = submit(launcher(options=["--hold"]), folder)
    eventually(lambda: trainer.poll() is None and "PENDING (JobHeldUser)" in trainer.waits)
    trainer.ask_to_stop()
    assert end_of(trainer) != 0
    assert slurm.state(trainer.id) == "CANCELLED"
    assert not folder.events.exists()


def test_one_that_hears_nothing_is_killed(launcher, job):
    folder = job(rows=500)
    trainer = submit(launcher(), folder, deaf=1, seconds=1)
    begun(folder)
    for _ in range(5):
        trainer.kill()
    assert end_of(trainer) != 0
    assert not locked(folder)


def test_what_somebody_else_cancels_was_taken(launcher, job, slurm):
    folder = job(rows=500)
    trainer = submit(launcher(), folder, seconds=0.1)
    begun(folder)
    slurm.run("scancel", trainer.id)
    assert end_of(trainer) == 130
    assert trainer.taken == "somebody cancelled it in Slurm"


def test_a_job_that_is_preempted_and_cancelled_was_taken_and_has_a_checkpoint(launcher, job, slurm):
    folder = job(rows=500)
    trainer = submit(launcher(options=["--partition=scrap"]), folder, seconds=0.1, gpus=2)
    begun(folder, step=7)
    assert end_of(submit(launcher(options=["--partition=high"]), job(), gpus=2)) == 0
    assert end_of(trainer) == 130
    assert trainer.taken == "another job was preferred to it"
    assert checkpoint_of(folder) >= 7


def test_a_job_that_slurm_puts_back_goes_on_and_nothing_has_ended(launcher, job, slurm):
    folder = job(rows=40)
    trainer = submit(launcher(), folder, seconds=0.1, gpus=2)
    begun(folder, step=7)
    assert end_of(submit(launcher(options=["--partition=high"]), job(), gpus=2)) == 0
    eventually(lambda: exit_code(folder, 1) == 130)
    eventually(lambda: trainer.poll() is None and trainer.waits.startswith("PENDING"))
    slurm.run_again(trainer.id)
    assert end_of(trainer) == 0
    assert trainer.taken == ""
    assert "resumed after step" in folder.events.read_text()
    assert is_trained(folder)


def test_the_end_of_a_run_before_a_requeue_is_not_the_end(launcher, job, slurm):
    folder = job(rows=500)
    trainer = submit(launcher(), folder, seconds=0.1)
    begun(folder)
    first = signed(folder).pid
    slurm.run("scontrol", "requeue", trainer.id)
    eventually(lambda: exit_code(folder, 1) == 130)
    slurm.run_again(trainer.id)
    eventually(lambda: locked(folder) and (now := signed(folder)) and now.pid != first, seconds=30)
    assert trainer.poll() is None
    os.kill(signed(folder).pid, signal.SIGKILL)
    assert end_of(trainer) == -signal.SIGKILL


def test_while_the_controller_is_away_jobs_are_kept_and_none_is_started(launcher, job, slurm):
    one, folder, other = launcher(), job(rows=500), job()
    trainer = submit(one, folder, seconds=0.02)
    begun(folder)
    assert trainer.poll() is None
    with structlog.testing.capture_logs() as said:
        slurm.stop_controller()
        eventually(lambda: trainer.poll() is None and said)
        with pytest.raises(ConnectionError, match="Slurm does not answer"):
            submit(one, other)
        late = launcher().find(folder, trainer_id=trainer.id, attempt=1)
        assert late.poll() is None
        assert trainer.poll() is None
        slurm.start_controller()
        assert end_of(trainer) == end_of(late) == 0
    assert is_trained(folder)
    assert end_of(submit(one, other)) == 0
    told = [line["event"] for line in said if "answer" in line["event"]]
    assert sorted(told) == sorted(2 * ["Slurm does not answer", "Slurm answers again"])  # once for each launcher


def test_the_nodes_daemon_may_be_killed_and_started_anew(launcher, job, slurm):
    folder = job(rows=40)
    trainer = submit(launcher(), folder, seconds=0.1)
    begun(folder)
    slurm.kill_node()
    assert trainer.poll() is None
    slurm.start_node()
    assert end_of(trainer) == 0
    assert is_trained(folder)


def test_a_job_whose_node_is_lost_was_taken(launcher, job, slurm):
    folder = job(rows=500)
    trainer = submit(launcher(options=["--no-requeue"]), folder, seconds=0.1)
    begun(folder)
    slurm.run("scontrol", "update", f"NodeName={slurm.host}", "State=DOWN", "Reason=tested")
    assert end_of(trainer) in {130, -signal.SIGTERM}
    assert trainer.taken == "its node failed"
    eventually(lambda: not locked(folder))


def test_what_slurm_will_never_take_is_refused_in_its_own_words(launcher, job):
    with pytest.raises(FinetunedError, match="invalid partition specified: nowhere") as refusal:
        submit(launcher(options=["--partition=nowhere"]), job())
    assert "options" in refusal.value.remedy
    with pytest.raises(FinetunedError, match="Requested node configuration is not available"):
        submit(launcher(), job(), gpus=9)


def test_a_machine_without_slurm_says_so(launcher, job, monkeypatch):
    with monkeypatch.context() as here:
        here.setenv("PATH", "/nowhere")
        with pytest.raises(FinetunedError, match="this machine has no sbatch"):
            submit(launcher(), job())


def test_a_job_whose_id_was_lost_on_its_way_is_not_submitted_twice(launcher, job, slurm, sbatch_says):
    sbatch_says('/usr/bin/sbatch "$@" && echo "Socket timed out on send/recv operation" >&2; exit 1')
    folder = job()
    assert end_of(submit(launcher(), folder)) == 0
    assert slurm.run("squeue", "-h", "-t", "all", "-o", "%k").count(f"finetuned {folder.path} 1") == 1


def test_what_slurm_refuses_for_the_moment_is_no_error_of_the_job(launcher, job, sbatch_says):
    sbatch_says("cat >/dev/null; echo 'Job violates accounting/QOS policy (job submit limit, ...)' >&2; exit 1")
    with pytest.raises(BlockingIOError, match="job submit limit"):
        submit(launcher(), job())


def test_an_earlier_trainer_of_the_job_is_cancelled_before_another_is_submitted(launcher, job, slurm):
    folder = job()
    earlier = submit(launcher(options=["--hold"]), folder)
    set_attempt(folder, 2)
    late, trainers = launcher(), []

    def submitted() -> bool:
        try:
            trainers.append(submit(late, folder, attempt=2))
        except BlockingIOError:
            time.sleep(0.2)
        return bool(trainers)

    eventually(submitted)
    assert slurm.state(earlier.id) == "CANCELLED"
    assert end_of(trainers[0]) == 0


def test_it_has_the_gpus_that_it_needs_and_none_of_this_machine(launcher, job, monkeypatch):
    monkeypatch.setenv("FINETUNED_TRAINER", "/bin/sh -c 'echo GPUs: $CUDA_VISIBLE_DEVICES'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-of-this-machine")
    two, none = job(), job()
    one = launcher()
    trainers = [submit(one, two, gpus=2), submit(one, none)]
    assert [end_of(trainer) for trainer in trainers] == [0, 0]
    assert log_of(two).read_text() == "GPUs: 0,1\n"
    assert log_of(none).read_text().strip() in {"GPUs:", "GPUs: NoDevFiles"}


def test_a_template_of_ones_own_is_read_at_each_submission(launcher, job, tmp_path):
    template = tmp_path / "slurm.sh"
    template.write_text(
        "#!/bin/bash\n#SBATCH --signal=B:TERM@{signal_seconds}\necho for {job} on ${HOSTNAME}\n{command}\n"
    )
    one, folder = launcher(template="slurm.sh"), job()
    assert end_of(submit(one, folder, end=65)) == 65
    assert log_of(folder).read_text() == f"for {folder.path.name} on {os.uname().nodename}\n"
    template.write_text("#!/bin/bash\n{command} {cuda}\n")
    with pytest.raises(FinetunedError, match=r"\{cuda\} is no placeholder"):
        submit(one, folder)
