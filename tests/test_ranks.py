"""One job on several processes: what comes out is what one process makes, whatever happens to one of them."""

import itertools
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuned.events import EventType
from ranks_worker import JOBS, Ordered, outcome
from test_exactness import MANNERS, QUIET, SMALL, STEPS, Job, Story, World, assert_the_same, build_world, quick

__all__ = ["quick"]  # pytest finds it by its name
pytestmark = pytest.mark.filterwarnings("ignore")

SAME = {
    "lora": {},  # with evaluations, answers and checkpoints on the way
    "full": QUIET | MANNERS["full"],
    "small batches": QUIET | MANNERS["small batches"],
    "fewer rows than ranks": QUIET | {"batch_size": 1, "max_steps": STEPS},
    # By this seed the first row is the longest, so that nothing is tried before the first step.
    "fp16, fewer rows than ranks": QUIET | {"batch_size": 1, "max_steps": STEPS, "dtype": "fp16", "seed": 0},
    "hybrid": QUIET
    | {"recipe": "hybrid", "judge": {"kind": "number", "tolerance": 1e6}, "hybrid": {"max_new_tokens": 4}},
    "distill": {"recipe": "distill", "distill": {"temperature": [3, 1]}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model) -> World:
    return build_world(tmp_path_factory.mktemp("model"), tiny_model, SMALL)


class Together:
    """Jobs that two processes trained together, and the same ones trained by one."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self._alone: dict[str, Story] = {}

    def stories(self, name: str) -> list[Story]:
        """What came of a job, as each rank has it."""
        return [pickle.loads(outcome(self.folder, name, rank).read_bytes()) for rank in range(2)]

    def alone(self, **settings) -> Story:
        key = repr(settings)
        if key not in self._alone:
            self._alone[key] = Job(self.folder / f"alone-{len(self._alone)}", self.world, **settings).done()
        return self._alone[key]


@pytest.fixture(scope="module")
def together(tmp_path_factory, world, tiny_model) -> Together:
    """All that two processes do in these tests, in one go: to import torch takes longest."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("together")
    SAME["distill"]["teacher"] = str(tiny_model)
    jobs = {name: Ordered(world, settings) for name, settings in SAME.items()}
    jobs["full"] = replace(jobs["full"], bucket=600)  # tensors of 16 to 4,000 numbers: some together, some alone
    jobs["memory"] = Ordered(world, {}, out_of_memory=(3,))
    jobs["memory, twice in a row"] = Ordered(world, {}, out_of_memory=(3, 4))
    jobs["no memory for zeros"] = replace(jobs["fewer rows than ranks"], no_zeros=(2,))
    jobs["stopped"] = Ordered(world, QUIET, stopped_after=2)
    jobs["stopped in an evaluation"] = Ordered(world, {}, stopped_after=4)
    jobs["begun alone"] = Ordered(world, QUIET)
    looks = itertools.count()
    assert Job(folder / "begun alone", world, **QUIET).attempt(lambda: next(looks) >= 3) is None
    train_together(folder, jobs)
    return Together(folder, world)


def train_together(folder: Path, jobs: dict[str, Ordered]) -> None:
    """Let two processes train jobs, one after the other."""
    (folder / JOBS).write_bytes(pickle.dumps(jobs))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["PMI_SIZE"] = "2"  # as srun says to programs of MPI; accelerate would wrap the model where it finds it
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ranks_worker", str(folder)],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=250)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)[-5000:]


def assert_one_weight(stories: list[Story]) -> None:
    """Ranks have the same weights to the last bit, though each has seen other rows."""
    first, *others = (story.weights for story in stories)
    assert first
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def assert_trains_as_one(together: Together, name: str, settings: dict[str, Any]) -> None:
    """Two ranks end with the weights of one process, and told the same held-out losses on the way."""
    stories = together.stories(name)
    assert_one_weight(stories)
    assert_the_same(stories[0], together.alone(**settings))
    told, alone = (
        [e.data["valid_loss"] for e in story.attempts[0].of(EventType.METRICS) if "valid_loss" in e.data]
        for story in (stories[0], together.alone(**settings))
    )
    assert told == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", SAME)
def test_two_train_what_one_trains(together, name):
    assert_trains_as_one(together, name, SAME[name])


def test_rank_0_alone_speaks(together):
    first, second = (story.attempts[0] for story in together.stories("lora"))
    kinds = {event.type for event in first.events}
    assert {EventType.PLAN, EventType.METRICS, EventType.PREDICTIONS, EventType.CHECKPOINT} <= kinds
    assert first.of(EventType.PLAN)[0].data["processes"] == 2
    assert second.events == []


def test_where_memory_runs_out_on_one_all_climb_down_together(together):
    stories = together.stories("memory")
    assert_one_weight(stories)
    assert_the_same(stories[0], together.alone())
    (fell,) = stories[0].attempts[0].of(EventType.RUNG)
    assert fell.data["rung"]["batch_size"] == 4
    assert "rank 1" in fell.data["reason"]
    assert len(stories[0].attempts) == 1, "the process can help itself"


def test_where_one_has_no_memory_for_gradients_that_it_lacks_all_climb_down_together(together):
    stories = together.stories("no memory for zeros")
    assert_one_weight(stories)
    assert_the_same(stories[0], together.alone(**SAME["fewer rows than ranks"]))
    (fell,) = stories[0].attempts[0].of(EventType.RUNG)
    assert "rank 1" in fell.data["reason"]
    assert len(stories[0].attempts) == 1


def test_where_no_process_can_help_itself_all_end_with_what_is_done(together):
    stories = together.stories("memory, twice in a row")
    assert_one_weight(stories)
    assert_the_same(stories[0], together.alone())
    assert [[attempt.ended for attempt in story.attempts] for story in stories] == [["OutOfMeansError", None]] * 2


@pytest.mark.parametrize(("name", "steps"), [("stopped", 2), ("stopped in an evaluation", 3)])
def test_a_stop_that_one_hears_ends_all_at_the_same_step_and_one_can_go_on(together, name, steps):
    settings = QUIET if name == "stopped" else {}
    before = together.stories(name)
    assert [story.attempts[0].ended for story in before] == ["StopAskedError"] * 2
    job = Job(together.folder / name, together.world, **settings)
    after = job.done()
    assert after.attempts[0].resumed == steps
    both = Story(before[0].attempts + after.attempts, after.trained, after.weights)
    assert_the_same(both, together.alone(**settings))


def test_what_one_has_begun_two_can_go_on_with(together):
    stories = together.stories("begun alone")
    assert stories[0].attempts[0].resumed == 3
    assert_one_weight(stories)
    alone = together.alone(**QUIET)
    worst = max(float((stories[0].weights[name] - one).abs().max()) for name, one in alone.weights.items())
    assert worst <= 1e-5
