"""The processes of one job: who starts them, what becomes of them when one is gone, and how the attempt ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.events import EventType, ExitCode
from finetuned.home import JobFolder
from finetuned.lifesigns import TAKES_LOCK, exit_code, locked, signed, take_lock
from finetuned.trainer import ranks
from finetuned.trainer.ranks import verdict
from test_training import LONG, LONG_STEPS, ROWS, Run, assert_same_weights, when

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", chat_rows(ROWS))


def run_of(folder: Path, data: Path, model: Path, *, processes: int = 2, **settings) -> Run:
    run = Run(folder, data, model=str(model), **settings)
    run.spec = replace(run.spec, processes=processes)
    return run


def ranks_of(agent: int) -> list[int]:
    """Process ids of an agent's children, rank 0 first."""
    try:
        return [int(word) for word in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    except OSError:
        return []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def test_killed_in_part_stopped_and_gone_on_with_by_another_number_the_weights_are_the_same(tmp_path, data, tiny_model):
    run = run_of(tmp_path / "job", data, tiny_model, **LONG)

    agent = run.start()
    when(run, agent, lambda: len(run.steps()) >= 4)
    signature, ranks = signed(run.folder), ranks_of(agent.pid)
    assert (signature.pid, len(ranks)) == (agent.pid, 2)
    os.kill(ranks[1], signal.SIGKILL)
    assert agent.wait(60) == KILLED, run.log
    assert all(gone(rank) for rank in ranks)
    assert not locked(run.folder)
    assert exit_code(run.folder, run.spec.attempt) == KILLED  # for a daemon that is not its parent
    done = run.steps()[-1]["step"]
    assert "Traceback" not in run.log

    agent = run.start()
    when(run, agent, lambda: run.steps()[-1]["step"] >= done + 4)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(60) == ExitCode.STOPPED, run.log
    assert exit_code(run.folder, run.spec.attempt) == ExitCode.STOPPED
    resumed = [done]  # rank 0 has kept what was done when it lost the other
    done = run.steps()[-1]["step"]

    run.command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "finetuned.trainer"]
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]
    assert [e.data["step"] for e in run.events(EventType.MESSAGE) if "resumed" in e.message] == [*resumed, done]
    assert exit_code(run.folder, run.spec.attempt) == ExitCode.DONE
    assert [step["step"] for step in run.steps()] == list(range(1, LONG_STEPS + 1))

    alone = run_of(tmp_path / "alone", data, tiny_model, processes=1, **LONG).done()
    assert_same_weights(run, alone, tolerance=1e-5)


def test_ranks_end_with_the_process_that_started_them(tmp_path, data, tiny_model):
    """Those that have imported nothing yet, too."""
    run = run_of(tmp_path / "job", data, tiny_model, **LONG)
    agent = run.start()
    ranks = eventually(lambda: len(found := ranks_of(agent.pid)) == 2 and found)
    agent.kill()
    agent.wait()
    eventually(lambda: all(gone(rank) for rank in ranks))


BUG = """
import os, sys

if os.environ.get("RANK") == "1":
    sys.modules["finetuned.trainer.precision"] = None  # what it would import is not there
"""


def test_a_bug_in_one_rank_ends_all_of_them_as_that(tmp_path, data, tiny_model):
    (tmp_path / "sitecustomize.py").write_text(BUG)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = run_of(tmp_path / "job", data, tiny_model)
    assert run.attempt(environment={"PYTHONPATH": path}) == 1, run.log
    assert "ModuleNotFoundError" in run.log
    assert run.steps() == []


def test_what_is_wrong_for_all_ranks_is_told_once(tmp_path, data, tiny_model):
    run = run_of(tmp_path / "job", data, tiny_model, tuning="lora", target_modules=["no_such_layer"])
    assert run.attempt() == ExitCode.BAD_SETTINGS, run.log
    (error,) = run.events(EventType.ERROR)
    assert error.data["where"] == "target_modules"
    assert "Traceback" not in run.log


def test_bad_data_is_told_before_any_rank_imports_torch_and_ends_all(tmp_path, tiny_model):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = run_of(tmp_path / "job", write_jsonl(tmp_path / "data.jsonl", [{"messages": []}]), tiny_model)
    assert run.attempt(environment={"PYTHONPATH": path}) == ExitCode.BAD_DATA, run.log
    assert [error.data["code"] for error in run.events(EventType.ERROR)] == ["missing_messages_list"]


def test_answers_that_rank_0_makes_are_learned_by_all(tmp_path, tiny_model):
    """Recipe rft, on a model that draws bytes at random: any of them that ends in a number is right. Each answer is its
    own, so some gradients are next to nothing; Adam makes a step of them whose sign is chance, hence its small rate.
    """
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": str(n % 10)}]}
        for n in range(12)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    rft = {"samples": 6, "keep": 2, "temperature": 1.0, "max_new_tokens": 40, "least_yield": 0.0}
    settings = {"tuning": "lora", "recipe": "rft", "rft": rft, "judge": {"kind": "number", "tolerance": 1e6}}
    settings["learning_rate"] = 1e-4
    run, alone = (
        run_of(tmp_path / f"{number}", data, tiny_model, processes=number, **settings).done() for number in (2, 1)
    )
    learned, wanted = ((one.adapter / "learned.jsonl").read_bytes() for one in (run, alone))
    assert learned == wanted
    assert_same_weights(run, alone, tolerance=1e-5)


@pytest.mark.parametrize(
    ("endings", "stopped", "wanted"),
    [
        ([(1, 0), (0, 0)], False, 0),
        ([(0, ExitCode.TEMPORARY), (1, KILLED)], False, KILLED),  # who has lost another is not the cause
        ([(1, 1), (0, ExitCode.TEMPORARY)], False, 1),
        ([(0, ExitCode.TEMPORARY), (1, ExitCode.TEMPORARY)], False, ExitCode.TEMPORARY),  # no room on the disk, say
        ([(0, ExitCode.BAD_DATA), (1, -signal.SIGTERM)], False, ExitCode.BAD_DATA),
        ([(1, ExitCode.STOPPED), (0, ExitCode.STOPPED)], True, ExitCode.STOPPED),
        ([(1, -signal.SIGTERM), (0, ExitCode.TEMPORARY)], True, ExitCode.STOPPED),  # before they could hear it
        ([(0, ExitCode.OUT_OF_MEMORY), (1, ExitCode.TEMPORARY)], True, ExitCode.OUT_OF_MEMORY),
        ([(1, -signal.SIGABRT), (0, KILLED)], False, KILLED),  # what came of it may be seen first
        ([(1, 0), (0, 1)], False, 1),
        ([(1, -signal.SIGSEGV), (0, 0)], False, 0),  # as it ended: the adapter is whole
    ],
)
def test_an_attempt_ends_as_the_rank_that_failed_for_its_own_reason(endings, stopped, wanted):
    assert verdict(endings, stopped=stopped) == wanted


WRITING = """
import os, pathlib, signal, sys, time

if os.environ["RANK"] == "1":
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: None)
time.sleep(2)
pathlib.Path("{}").touch()
sys.exit(75)
"""


def test_rank_0_has_time_to_write_a_checkpoint_when_another_has_failed(tmp_path, monkeypatch):
    written = tmp_path / "checkpoint"
    command = [sys.executable, "-c", WRITING.format(written)]
    monkeypatch.setattr(ranks, "_start", lambda _, environment: subprocess.Popen(command, env=environment))
    monkeypatch.setattr(ranks, "_PATIENCE", 0.2)
    assert ranks.run(JobFolder(tmp_path), 2, asked_to_stop=lambda: False) == 1
    assert written.exists()


NO_GPU = """
import torch

torch.version.cuda = "13.0"  # as in a torch for GPUs
"""


def test_a_gpu_that_is_given_and_not_there_is_told_and_waited_for(tmp_path, data, tiny_model):
    (tmp_path / "sitecustomize.py").write_text(NO_GPU)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = run_of(tmp_path / "job", data, tiny_model, processes=1)
    given = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert run.attempt(environment=given) == ExitCode.TEMPORARY, run.log
    assert codes(run) == ["gpu_gone"]


def started(*command: str | Path, environment: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
    """Start two ranks with no process of ours above them, as srun would."""
    given = {**ranks._environment(2), **(environment or {})}
    del given[ranks._AGENT]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=given | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def said(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What ranks said until they ended."""
    try:
        return [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


UNABLE = """
import os, sys

if os.environ.get("RANK") == "1":
    sys.modules["finetuned.trainer.trackers"] = None  # what it imports before it meets the others
"""
TRAINER = ("-P", "-m", "finetuned.trainer")
EARLY = {  # what ranks end with, and what is told
    "bad data": ([ExitCode.BAD_DATA, ExitCode.TEMPORARY], ["missing_messages_list"]),
    "locked": ([ExitCode.TEMPORARY] * 2, ["still_at_work"]),
    "too late": ([ExitCode.STOPPED] * 2, []),
    "settings": ([ExitCode.BAD_SETTINGS] * 2, ["bad_settings"]),
    "rank 1 alone": ([ExitCode.TEMPORARY, 1], []),
}


@pytest.mark.parametrize("what", EARLY)
def test_who_ends_before_the_ranks_have_met_does_not_keep_the_others_waiting(what, tmp_path, data, tiny_model):
    (tmp_path / "sitecustomize.py").write_text(UNABLE if what == "rank 1 alone" else "")
    if what == "bad data":
        data = write_jsonl(tmp_path / "data.jsonl", [{"messages": []}])
    run = run_of(tmp_path / "job", data, tiny_model, **({"tuning": "qlora"} if what == "settings" else {}))
    run.spec = replace(run.spec, attempt=1, sharded=what == "settings")
    run.folder.spec.write_bytes(run.spec.encode())
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    environment[TAKES_LOCK] = "0" if what == "too late" else "1"
    if what == "locked":
        assert take_lock(run.folder)
    processes = started(*TRAINER, run.folder.path, environment=environment)
    told = said(processes)
    assert ([process.returncode for process in processes], codes(run)) == EARLY[what], told


def codes(run: Run) -> list[str]:
    return [error.data["code"] for error in run.events(EventType.ERROR)]


IN_THE_SUM = """
import os

if os.environ.get("RANK") == "1":
    from finetuned.trainer import group

    calls, real = [], group.Group._sum

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise {}
        real(*arguments)

    group.Group._sum = fail
"""


@pytest.mark.parametrize(("error", "code"), [("MemoryError", ExitCode.OUT_OF_MEMORY), ("ValueError", 1)])
def test_an_error_in_the_sum_of_one_rank_ends_it_and_so_the_others(error, code, tmp_path, data, tiny_model):
    """Nobody can do that sum again together, nor is there anybody who would end the others."""
    (tmp_path / "sitecustomize.py").write_text(IN_THE_SUM.format(error))
    run = run_of(tmp_path / "job", data, tiny_model, tuning="lora")
    run.folder.spec.write_bytes(run.spec.encode())
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    processes = started(*TRAINER, run.folder.path, environment=environment)
    told = said(processes)
    assert [process.returncode for process in processes] == [ExitCode.TEMPORARY, code], told
    assert [event.data["checkpoint_step"] for event in run.events(EventType.CHECKPOINT)] == [len(run.steps())]
    assert run.steps()


GONE = """
import os, signal, socket
from finetuned.trainer.ends import RankLostError
from finetuned.trainer.group import join

def is_connection(entry):
    try:
        return os.readlink(entry.path).startswith("socket:")
    except OSError:
        return False

group = join()
group.wait()  # until all are through with joining
if group.leads:  # it is killed while it makes answers, say
    sockets = [socket.socket(fileno=int(entry.name)) for entry in os.scandir("/proc/self/fd") if is_connection(entry)]
    print(*(one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for one in sockets), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    group.wait()
except RankLostError:
    print("lost")
"""

AWAY = """
import time
from datetime import timedelta
import torch
from finetuned.trainer import group as module
from finetuned.trainer.ends import RankLostError

module._SUMS = timedelta(seconds=3)
group = module.join()
weight = torch.nn.Parameter(torch.ones(5))
weight.grad = torch.ones(5)
group.make_room([weight])
if not group.leads:
    time.sleep(6)
group.wait()  # for as long as it takes
print("waited")
group.complete([weight])
if group.leads:
    try:
        group.sum_gradients([weight])
    except RankLostError:
        print("lost")
else:
    time.sleep(20)
"""


def test_who_is_killed_is_noticed_by_those_who_wait_for_it():
    processes = started("-c", GONE)
    kept_alive, lost = said(processes)
    assert "lost" in lost.splitlines(), lost  # beside what torch has to say
    assert processes[0].returncode == KILLED
    assert set(kept_alive.split()) == {"1"}, "of a machine without power the kernel hears only where it asks"


def test_a_word_is_waited_for_without_an_end_and_a_sum_is_not():
    """What NCCL sums on GPUs would be waited for after the other process is gone, too."""
    told = said(started("-c", AWAY))
    assert [words.split() for words in told] == [["waited", "lost"], ["waited"]]
