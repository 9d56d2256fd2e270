"""Recipe rft, whatever goes wrong and whenever: the answers that are drawn, what is learned of them, and the weights
are those of a job that nothing disturbed. The world and its faults are those of test_exactness.py.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from conftest import answers_kept, row_of, write_jsonl
from finetuned.config import settings_from
from finetuned.trainer import generate, loop, rejection, rounds
from finetuned.trainer.door import Door
from test_exactness import KINDS, SETTINGS, SMALL, Faults, Job, World, build_world, faults, quick

__all__ = ["faults", "quick"]  # pytest finds them by their names
pytestmark = pytest.mark.filterwarnings("ignore")

# Any number is right, and a model that has learned nothing writes one now and then.
RFT = {
    "recipe": "rft", "judge": {"kind": "number", "tolerance": 1e6}, "eval_steps": None, "checkpoint_steps": 1,
    "rft": {"rounds": 2, "samples": 4, "keep": 2, "max_new_tokens": 12, "temperature": 1.0},
}  # fmt: skip
TURNS = [(("user", f"Question {n}?"), ("assistant", str(n))) for n in range(12)]
BATCHES, STEPS = 6, 4  # at least, of a round: 48 answers, and at least nine of them kept


@dataclass
class Rounds(Job):
    """Trainings of a job that draws what it learns from."""

    def __init__(self, folder: Path, world: World, **settings) -> None:
        super().__init__(folder, world, **{**RFT, **settings})
        rows = [row_of(*turns, line=line) for line, turns in enumerate(TURNS, 1)]
        chats = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in TURNS]
        file = write_jsonl(folder / "questions.jsonl", chats)
        self.questions = rounds.Questions(file, file.name, frozenset(row.hashes()[0] for row in rows))

    def train(self, task: loop.Task) -> loop.Trained:
        return rounds.train_in_rounds(task, self.questions, cache=self.folder / "tokens")[1]

    def made(self) -> list[tuple[list, bytes]]:
        """Of each round the answers, and what was learned of them."""
        folder = self.folder / "checkpoints" / "rft"
        return [
            (sorted(answers_kept(folder / f"round-{n}.answers.jsonl")), (folder / f"round-{n}.jsonl").read_bytes())
            for n in (1, 2)
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model) -> World:
    return build_world(tmp_path_factory.mktemp("model"), tiny_model, SMALL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world) -> Rounds:
    torch.set_num_threads(1)
    job = Rounds(tmp_path_factory.mktemp("undisturbed"), world)
    job.weights = job.done().weights
    return job


def assert_done_the_same(job: Rounds, wanted: Rounds, *, tolerance: float = 0.0) -> None:
    """Let the job go on to its end, and look at what came of it."""
    weights = job.done().weights
    assert job.made() == wanted.made()
    torch.testing.assert_close(weights, wanted.weights, rtol=0, atol=tolerance)


def test_the_second_round_draws_others_than_the_first(undisturbed):
    (first, learned), (second, learned_then) = undisturbed.made()
    assert len(first) == len(second) == 48
    assert {answer["text"] for _, answer in first} != {answer["text"] for _, answer in second}
    assert learned != learned_then
    assert all(len(lines.splitlines()) > 8 for lines in (learned, learned_then)), "too few steps to tell anything"


def test_it_learns_what_a_plain_training_on_its_answers_learns(tmp_path, world, undisturbed):
    kept = undisturbed.folder / "checkpoints" / "rft" / "round-2.jsonl"
    plain = settings_from({**SETTINGS, **RFT, "recipe": "sft"}, where="the test")
    examples, _ = Door(world.tokenizer, plain, cache=tmp_path / "tokens").read(kept, name="kept")
    job = Job(tmp_path, replace(world, train=examples), **{**RFT, "recipe": "sft"})
    torch.testing.assert_close(job.done().weights, undisturbed.weights, rtol=0, atol=0)


class Kill(BaseException):
    """The process is gone."""


@pytest.fixture
def drawing(faults: Faults, monkeypatch) -> Faults:
    """Faults in the drawing of answers and in the choosing too."""

    def wrap(owner, name: str, place: str) -> None:
        real: Callable = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: faults.around(place, lambda: real(*a, **k)))

    wrap(generate.Asker, "_generate", "drawing")
    wrap(rejection, "write_file", "choosing")
    return faults


@pytest.mark.parametrize(
    ("place", "call", "late"),
    [
        ("drawing", 1, False), ("drawing", 3, False), ("drawing", 3, True), ("choosing", 1, False),
        ("choosing", 1, True), ("forward", 2, False), ("checkpoint", 3, True), ("optimizer", 2, False),
        ("drawing", BATCHES + 1, False), ("drawing", BATCHES + 4, True), ("choosing", 2, True),
        ("optimizer", STEPS + 3, False),
    ],
)  # fmt: skip
def test_a_kill_anywhere_changes_nothing(  # noqa: PLR0917, pytest passes fixtures by name
    tmp_path, world, undisturbed, drawing, place, call, late
):
    """Neither an answer nor a weight, to the last bit."""
    job = Rounds(tmp_path, world)
    drawing.due[place] = (call, late, Kill())
    with pytest.raises(Kill):
        job.attempt()
    assert_done_the_same(job, undisturbed)
    assert drawing.calls["drawing"] <= 2 * BATCHES + 1, "what was kept is asked again"


@pytest.mark.parametrize("counts", [[0, 0], [5, 30, 50], [80, 1, 80], [100]], ids=str)
def test_a_stop_anywhere_changes_nothing(tmp_path, world, undisturbed, counts):
    job = Rounds(tmp_path, world)
    for count in counts:
        looks = itertools.count()
        assert job.attempt(lambda looks=looks, count=count: next(looks) >= count) is None
    assert_done_the_same(job, undisturbed)


@pytest.mark.parametrize(
    ("calls", "kind"),
    zip([{"drawing": 1}, {"drawing": BATCHES + 2}, {"drawing": 3, "backward": 2, "optimizer": 6}], KINDS, strict=True),
)
def test_memory_that_runs_out_anywhere_changes_nothing(  # noqa: PLR0917, pytest passes fixtures by name
    tmp_path, world, undisturbed, drawing, calls, kind
):
    """Not an answer, and weights but for their rounding."""
    job = Rounds(tmp_path, world)
    drawing.due = {place: (call, False, kind()) for place, call in calls.items()}
    assert_done_the_same(job, undisturbed, tolerance=1e-5)
    assert sorted(drawing.raised) == sorted(calls)
