"""Recipe hybrid, whatever goes wrong and whenever: model, soft prompt, policy and their optimizer state come out as
those of a training that nothing disturbed. The world and its faults are those of test_exactness.py.
"""

import functools
import random
from collections.abc import Callable

import pytest
import torch

from test_exactness import (
    DRAWN,
    HYBRID,
    KINDS,
    QUIET,
    SMALL,
    STEPS,
    Job,
    Story,
    World,
    assert_bit_exact_if_stopped_after_every_step,
    assert_the_same,
    build_world,
    faults,
    quick,
)

__all__ = ["faults", "quick"]  # pytest finds them by their names
pytestmark = pytest.mark.filterwarnings("ignore")

MANNERS = {
    "lora": {},
    "lora with dropout": {"lora_dropout": 0.3},
    "full": {"tuning": "full", "learning_rate": 1e-3},
    "soft prompt": {"hybrid": {**DRAWN, "prompt_tokens": 9}},
    "small batches": {"batch_size": 2, "gradient_accumulation": 4, "activation_checkpointing": True},
}
PLACES = ("probe", "drawing", "forward", "backward", "optimizer", "checkpoint")
CALLS = {"probe": 1, "checkpoint": 3}  # that there are at least; elsewhere nearly as many as steps


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model) -> World:
    return build_world(tmp_path_factory.mktemp("model"), tiny_model, SMALL)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, world) -> Callable[[str], tuple[Job, Story]]:
    """Trainings that nothing disturbs, each done once."""

    @functools.cache
    def train(manner: str) -> tuple[Job, Story]:
        torch.set_num_threads(1)
        job = Job(tmp_path_factory.mktemp("straight"), world, **{**QUIET, **HYBRID, **MANNERS[manner]})
        return job, job.done()

    return train


@pytest.mark.parametrize("manner", MANNERS)
def test_a_part_is_what_it_is_called(straight, manner):
    job, _ = straight(manner)
    steps = job.attempts[0].steps
    beside = {"grad_norm_soft_prompt"} if manner == "soft prompt" else {"grad_norm_model"}
    assert {name for name in steps[0] if name.startswith("grad_norm_")} == {"grad_norm_policy", *beside}
    assert any(step["reward"] for step in steps), "the reward never differs, so nothing here tells anything"
    weights, state = job.state()
    assert any(name.startswith("policy.") for name in weights)
    assert len(state["optimizer"]["state"]) == len(weights)


@pytest.mark.parametrize("manner", MANNERS)
def test_stopped_after_every_single_step_it_is_the_same_to_the_last_bit(tmp_path, world, straight, manner):
    job = Job(tmp_path, world, **{**QUIET, **HYBRID, **MANNERS[manner]})
    assert_bit_exact_if_stopped_after_every_step(job, straight(manner)[0])


@pytest.mark.parametrize("manner", ["lora", "full", "soft prompt"])
@pytest.mark.parametrize("seed", range(8))
def test_memory_that_runs_out_anywhere_changes_nothing(  # noqa: PLR0917, pytest passes fixtures by name
    tmp_path, world, straight, faults, seed, manner
):
    rng = random.Random(f"{manner}/{seed}")
    places = rng.sample(PLACES, rng.choice([1, 2, 3]))
    faults.due = {
        place: (rng.randint(1, CALLS.get(place, STEPS - 1)), rng.random() < 0.5, rng.choice(KINDS)())
        for place in places
    }
    job = Job(tmp_path, world, **{**QUIET, **HYBRID, **MANNERS[manner], "checkpoint_steps": 2})
    story = job.done()
    assert sorted(faults.raised) == sorted(places)
    wanted, wanted_story = straight(manner)
    assert_the_same(story, wanted_story)
    torch.testing.assert_close(job.state(), wanted.state(), rtol=1e-3, atol=1e-5)
