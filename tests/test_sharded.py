"""A model whose layers are spread over two processes learns what it learns in one, and each holds half of them."""

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from conftest import chat_rows, write_jsonl
from finetuned import sharding
from finetuned.config import settings_from
from finetuned.errors import ConfigError
from finetuned.events import Event, EventType, ExitCode
from finetuned.fallback import Rung, next_rung
from finetuned.home import Home, JobFolder
from finetuned.jobs import FileIdentity, Job, State
from finetuned.spool.claim import read_spec, write_spec
from finetuned.trainer import ranks
from ranks_worker import Ordered, sizes
from test_exactness import MANNERS, QUIET, SMALL, STEPS, Story, World, assert_the_same, build_world, quick
from test_exactness import Job as Training
from test_rank_processes import ranks_of, run_of
from test_ranks import Together, assert_one_weight, assert_trains_as_one, train_together
from test_training import LONG, ROWS, assert_same_weights, when

__all__ = ["quick"]  # pytest finds it by its name
pytestmark = pytest.mark.filterwarnings("ignore")

FULL = QUIET | MANNERS["full"]
SAME = {
    "lora": {},  # with evaluations and checkpoints on the way
    "small batches": QUIET | MANNERS["small batches"],  # with activation checkpointing
    "fewer rows than ranks": QUIET | {"batch_size": 1, "max_steps": STEPS},
    "single rows": {"batch_size": 1, "gradient_accumulation": 7, "max_steps": STEPS},  # 4 for one, 3 for the other
    "dora": QUIET | {"use_dora": True},
    "full": MANNERS["full"],
    "full, small batches": QUIET | MANNERS["full"] | MANNERS["small batches"],
    "full, single rows": FULL | {"batch_size": 1, "gradient_accumulation": 7, "max_steps": STEPS},
    "distill": {"recipe": "distill", "distill": {"temperature": [3, 1], "hidden_weight": 0.1, "norm_steps": 2}},
    "full, clipped": FULL | {"max_grad_norm": 0.1, "weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model) -> World:
    return build_world(tmp_path_factory.mktemp("model"), tiny_model, SMALL | {"num_hidden_layers": 3})


@pytest.fixture(scope="module")
def tied(tmp_path_factory, tiny_model) -> World:
    """A model whose head is its embeddings, of a width that two cannot share evenly."""
    sizes = SMALL | {"num_hidden_layers": 2, "intermediate_size": 33, "tie_word_embeddings": True}
    return build_world(tmp_path_factory.mktemp("tied"), tiny_model, sizes)


@pytest.fixture(scope="module")
def together(tmp_path_factory, world, tied, tiny_model) -> Together:
    torch.set_num_threads(1)
    SAME["distill"]["teacher"] = str(tiny_model)
    folder = tmp_path_factory.mktemp("sharded")
    jobs = {name: Ordered(world, settings, sharded=True) for name, settings in SAME.items()}
    jobs["whole"] = Ordered(world, SAME["small batches"])
    jobs["stopped"] = Ordered(world, QUIET, stopped_after=2, sharded=True)
    jobs["stopped in an evaluation"] = Ordered(world, {}, stopped_after=7, sharded=True)
    jobs["stopped in an answer"] = Ordered(world, {}, stopped_after=2, sharded=True)
    jobs["full, tied"] = Ordered(tied, FULL, sharded=True)
    jobs["full, stopped"] = Ordered(world, FULL, stopped_after=2, sharded=True)
    for name, settings in {"begun alone": QUIET, "full, begun alone": FULL}.items():
        jobs[name] = Ordered(world, settings, sharded=True)
        looks = itertools.count()
        assert Training(folder / name, world, **settings).attempt(lambda looks=looks: next(looks) >= 3) is None
    train_together(folder, jobs)
    return Together(folder, world)


@pytest.mark.parametrize("name", SAME)
def test_two_that_share_the_layers_train_what_one_trains(together, name):
    assert_trains_as_one(together, name, SAME[name])


def test_it_makes_no_difference_to_any_bit(together):
    shared, whole = (together.stories(name)[0].weights for name in ("small batches", "whole"))
    torch.testing.assert_close(shared, whole, rtol=0, atol=0)


def test_weights_that_are_in_two_places_are_trained_as_one(together, tied, tmp_path):
    stories = together.stories("full, tied")
    assert_one_weight(stories)
    assert_the_same(stories[0], Training(tmp_path, tied, **FULL).done())


def test_each_holds_about_half_of_the_layers(together):
    whole = int(sizes(together.folder, "whole", 0).read_text())
    adapters = sum(weight.numel() * weight.element_size() for weight in together.alone(**QUIET).weights.values())
    for rank in range(2):
        assert int(sizes(together.folder, "small batches", rank).read_text()) - adapters == (whole - adapters) / 2
        assert int(sizes(together.folder, "full", rank).read_text()) == (whole - adapters) / 2


@pytest.mark.parametrize(("name", "settings"), [("lora", {}), ("full", MANNERS["full"])])
def test_they_answer_on_the_way_what_one_answers(together, name, settings):
    first, second = (story.attempts[0].of(EventType.PREDICTIONS) for story in together.stories(name))
    alone = together.alone(**settings).attempts[0].of(EventType.PREDICTIONS)
    assert second == []
    assert [answers_of(event) for event in first] == [answers_of(event) for event in alone] != []


def answers_of(event: Event) -> list[tuple[str, str | None]]:
    return [(sample["answer"], sample["error"]) for sample in event.data["samples"]]


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("stopped", QUIET, 2),
        ("stopped in an answer", {}, 0),
        ("stopped in an evaluation", {}, 3),
        ("full, stopped", FULL, 2),
    ],
)
def test_what_two_that_share_the_layers_have_begun_one_can_go_on_with(together, name, settings, steps):
    before = together.stories(name)
    assert [story.attempts[0].ended for story in before] == ["StopAskedError"] * 2
    after = Training(together.folder / name, together.world, **settings).done()
    assert after.attempts[0].resumed == steps
    both = Story(before[0].attempts + after.attempts, after.trained, after.weights)
    assert_the_same(both, together.alone(**settings))


@pytest.mark.parametrize(("name", "settings"), [("begun alone", QUIET), ("full, begun alone", FULL)])
def test_what_one_has_begun_two_that_share_the_layers_can_go_on_with(together, name, settings):
    stories = together.stories(name)
    assert stories[0].attempts[0].resumed == 3
    assert_one_weight(stories)
    alone = together.alone(**settings)
    worst = max(float((stories[0].weights[name] - one).abs().max()) for name, one in alone.weights.items())
    assert worst <= 1e-5


NO_MEMORY = """
import os

if os.environ.get("RANK") == "{rank}":
    import accelerate

    calls, real = [], accelerate.Accelerator.backward

    def backward(*arguments, **named):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        real(*arguments, **named)

    accelerate.Accelerator.backward = backward
"""


@pytest.mark.parametrize(("rank", "tuning"), [(0, "lora"), (1, "lora"), (1, "full")])
def test_where_memory_runs_out_on_one_the_attempt_ends_and_the_next_goes_on_a_rung_lower(
    tmp_path, tiny_model, rank, tuning
):
    """The others are in the middle of a pass that this one will never join."""
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY.format(rank=rank))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(ROWS))
    settings = {"tuning": tuning, "checkpoint_steps": 1}
    run = run_of(tmp_path / "job", data, tiny_model, **settings)
    run.spec = replace(run.spec, sharded=True)
    assert run.attempt(environment={"PYTHONPATH": path}) == ExitCode.OUT_OF_MEMORY, run.log[-3000:]
    assert "Traceback" not in run.log
    done = len(run.steps())
    assert done > 0

    lower = next_rung(Rung(**run.error()["rung"]))
    assert lower
    if rank == 0:
        return  # the attempt that follows knows nothing of who it was
    alone = run_of(tmp_path / "alone", data, tiny_model, processes=1, **settings)
    assert run.attempt(rung=lower[0].as_dict()) == ExitCode.DONE, run.log[-3000:]
    assert [e.data["step"] for e in run.events(EventType.MESSAGE) if "resumed" in e.message] == [done]
    assert_same_weights(run, alone.done(), tolerance=1e-5)


def test_where_one_is_killed_that_shares_all_weights_one_alone_goes_on(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(ROWS))
    settings = LONG | {"tuning": "full", "checkpoint_steps": 1}
    run, alone = (run_of(tmp_path / name, data, tiny_model, **settings) for name in ("job", "alone"))
    run.spec = replace(run.spec, sharded=True)
    agent = run.start()
    when(run, agent, lambda: len(run.steps()) >= 4)
    os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
    assert agent.wait(60) == -signal.SIGKILL, run.log
    assert "Traceback" not in run.log
    done = len(run.steps())

    run.spec = replace(run.spec, processes=1)
    assert run.attempt() == ExitCode.DONE, run.log[-3000:]
    (resumed,) = [e.data["step"] for e in run.events(EventType.MESSAGE) if "resumed" in e.message]
    assert resumed in {done - 1, done}  # the last one's checkpoint may not be written yet
    found, wanted = run.weights(), alone.done().weights()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


RANK_1_OUT_OF_MEMORY = """
import os, signal, sys, time

if os.environ["RANK"] == "1":
    sys.exit(70)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def test_a_rank_that_is_stuck_on_its_gpu_is_not_waited_for(tmp_path, monkeypatch):
    """A sum on the GPU does not notice who is gone, and a process that waits for it hears no signal."""
    start = lambda _, environment: subprocess.Popen([sys.executable, "-c", RANK_1_OUT_OF_MEMORY], env=environment)  # noqa: E731
    monkeypatch.setattr(ranks, "_start", start)
    monkeypatch.setattr(ranks, "_PATIENCE", 0.5)
    assert ranks.run(JobFolder(tmp_path), 2, sharded=True, asked_to_stop=lambda: False) == ExitCode.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tuning": "qlora"}, "bitsandbytes"),
        ({"tuning": "lora-8bit"}, "bitsandbytes"),
        ({"tuning": "full", "recipe": "distill", "teacher": "larger"}, "teacher"),
        ({"tuning": "lora", "recipe": "rft", "judge": {"kind": "number"}}, "rft"),
    ],
)
def test_what_cannot_be_spread_is_refused_with_what_to_do(settings, told):
    with pytest.raises(ConfigError, match=told) as refused:
        sharding.check(settings_from(settings, where="the test").recipe, settings["tuning"])
    assert "Set " in refused.value.remedy


def test_job_json_says_so(tmp_path):
    home = Home(tmp_path)
    job = Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.RUNNING, 0.0)
    write_spec(home, job)
    assert not read_spec(home.job(job.id)).sharded
    write_spec(home, job, processes=2, sharded=True)
    assert read_spec(home.job(job.id)).sharded


def test_what_cannot_be_spread_is_refused_before_any_rank_imports_torch(tmp_path, tiny_model):
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    data = write_jsonl(tmp_path / "data.jsonl", chat_rows(ROWS))
    run = run_of(tmp_path / "job", data, tiny_model, tuning="qlora")
    run.spec = replace(run.spec, sharded=True)
    assert run.attempt(environment={"PYTHONPATH": path}) == ExitCode.BAD_SETTINGS, run.log
