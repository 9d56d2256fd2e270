"""Distillation under the same troubles as `test_exactness.py`'s trainings: out of memory, stopped, killed; projectors
and their optimizer state among what must come out the same.
"""

import random
from pathlib import Path

import pytest
import torch

from conftest import make_tiny_model
from finetuned.trainer import checkpoint, evaluation
from test_distill import ALL_TERMS, make_other_model
from test_exactness import (
    KINDS,
    MANNERS,
    QUIET,
    SMALL,
    Job,
    Story,
    World,
    assert_bit_exact_if_stopped_after_every_step,
    assert_the_same,
    build_world,
    faults,
    figures_of,
    quick,
)

__all__ = ["faults", "quick"]  # pytest finds them by their names
SEEDS = 10
PLACES = ("probe", "forward", "teacher", "backward", "evaluation")
TAUGHT = {
    "the same vocabulary": {"distill": {"temperature": [3, 1]}},
    "another vocabulary, all terms": {"distill": ALL_TERMS},
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    tiny = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    return build_world(tmp_path_factory.mktemp("student"), tiny, SMALL)


@pytest.fixture(scope="module")
def job_of(tmp_path_factory, world):
    """Make a job with one of the teachers: `job_of(folder, which, **settings)`."""
    teachers = [make_tiny_model(tmp_path_factory.mktemp("same")), make_other_model(tmp_path_factory.mktemp("other"))]
    named = dict(zip(TAUGHT, teachers, strict=True))

    def make(folder: Path, which: str, **settings) -> Job:
        return Job(folder, world, recipe="distill", teacher=str(named[which]), **TAUGHT[which], **settings)

    return make


@pytest.fixture(scope="module", params=TAUGHT)
def which(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, job_of, which) -> Story:
    torch.set_num_threads(1)
    return job_of(tmp_path_factory.mktemp("undisturbed"), which).done()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_memory_that_runs_out_anywhere_changes_nothing(  # noqa: PLR0917, pytest passes fixtures by name
    tmp_path, job_of, which, undisturbed, faults, seed
):
    """Neither a weight nor a figure: halves of a step are the step."""
    rng = random.Random(seed)
    places = rng.sample(PLACES, rng.choice([1, 1, 2]))
    faults.due = {place: (rng.randint(1, 3), rng.random() < 0.5, rng.choice(KINDS)()) for place in places}
    story = job_of(tmp_path, which).done()
    assert faults.raised
    assert_the_same(story, undisturbed)
    told, wanted = (
        {step["step"]: figures_of(step) for attempt in one.attempts for step in attempt.steps}
        for one in (story, undisturbed)
    )
    for number, figures in wanted.items():
        assert told[number] == pytest.approx(figures, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_step_cut_smaller_is_the_same_step(tmp_path, job_of, which, undisturbed, rows):
    job = job_of(tmp_path, which, batch_size=rows, gradient_accumulation=8 // rows)
    assert_the_same(job.done(), undisturbed)


@pytest.mark.parametrize("manner", sorted(MANNERS))
def test_stopped_after_every_single_step_it_is_the_same_to_the_last_bit(tmp_path, job_of, which, manner):
    jobs = [job_of(tmp_path / name, which, **QUIET, **MANNERS[manner]) for name in ("straight", "stopped")]
    jobs[0].done()
    assert_bit_exact_if_stopped_after_every_step(jobs[1], jobs[0])
    weights, _ = jobs[1].state()
    assert any(name.startswith("projectors.") for name in weights) == (which != "the same vocabulary")


def test_a_kill_while_a_checkpoint_is_written_loses_no_more_than_its_steps(
    tmp_path, job_of, which, undisturbed, monkeypatch
):
    class Kill(BaseException):
        """The process is gone."""

    job, save, calls = job_of(tmp_path, which), checkpoint.save_file, []

    def killed(*args, **kwargs) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Kill
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(Kill):
        job.attempt()
    story = job.done()
    assert story.attempts[-1].resumed > 0
    weights, _ = job.state()
    assert_the_same_weights(story, undisturbed)
    assert weights


def assert_the_same_weights(story: Story, wanted: Story) -> None:
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(story.weights[name], tensor, atol=1e-6, rtol=0)


def test_what_is_retained_is_told_the_same_after_a_resume(tmp_path, job_of, which, undisturbed):
    job = job_of(tmp_path, which)
    story = job.stopped_after([4])
    names = ("teacher_valid_loss", "valid_loss", "valid_loss_before", "retained")
    assert "teacher_valid_loss" in story.trained.metrics
    for name in names:
        assert story.trained.metrics.get(name) == undisturbed.trained.metrics.get(name)


def test_the_held_out_loss_is_that_of_the_labels_whatever_is_trained(tmp_path, job_of, which, world, monkeypatch):
    """So that recipes can be compared: before the first step, it is sft's."""
    first = []
    real = evaluation.held_out_loss
    monkeypatch.setattr(evaluation, "held_out_loss", lambda training: first.append(real(training)) or first[-1])
    job_of(tmp_path / "distill", which).done()
    distilled = first[0]
    first.clear()
    Job(tmp_path / "sft", world).done()
    assert distilled == pytest.approx(first[0], rel=1e-6)
