"""Whatever goes wrong in a training, and whenever: the weights that come out are those of one that nothing disturbed.

The trainer's loop runs in this process, on a model so small that a training takes a tenth of a second.
"""

import functools
import gc
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.optim import optimizer as optimizers

from conftest import chat_rows, row_of
from finetuned.config import settings_from
from finetuned.events import Event, EventType, parse_event
from finetuned.fallback import next_rung
from finetuned.trainer import checkpoint, contest, evaluation, loop, steps
from finetuned.trainer.base import Base
from finetuned.trainer.distill.found import find_teacher
from finetuned.trainer.distill.teacher import Teacher
from finetuned.trainer.ends import OutOfMeansError, StopAskedError
from finetuned.trainer.group import Group
from finetuned.trainer.recipes import distill, hybrid, sft
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.tokens import Example, tokenise

ROWS, BATCH, EPOCHS = 22, 8, 2
STEPS = 6  # three an epoch, the last of each with six rows
SEEDS = 100
SETTINGS = {
    "dtype": "float32", "tuning": "lora", "lora_r": 4, "batch_size": BATCH, "epochs": EPOCHS, "learning_rate": 2e-3,
    "checkpoint_steps": 2, "eval_steps": 3, "predictions": {"samples": 1, "max_new_tokens": 2},
}  # fmt: skip
PLACES = ("probe", "forward", "backward", "optimizer", "evaluation", "prediction", "checkpoint")
KINDS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.05 GiB."),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    MemoryError,
)
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Faults:
    """Errors to come: in each place one, before or after the call of this number."""

    due: dict[str, tuple[int, bool, Exception]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    raised: list[str] = field(default_factory=list)
    probing: bool = False

    def around(self, place: str, call: Callable):
        """Make a call, unless its time has come."""
        number = self.calls[place] = self.calls.get(place, 0) + 1
        fault = self.due.get(place)
        mine = fault is not None and fault[0] == number
        if mine and not fault[1]:
            self._raise(place)
        result = call()
        if mine:
            self._raise(place)
        return result

    def _raise(self, place: str) -> None:
        self.raised.append(place)
        raise self.due.pop(place)[2]


@pytest.fixture
def faults(monkeypatch) -> Iterator[Faults]:
    """Faults that strike in the real calls of the loop."""
    faults = Faults()

    def wrap(owner, name: str, place: Callable[[], str]) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: faults.around(place(), lambda: real(*a, **k)))

    def training(place: str) -> str:
        if not torch.is_grad_enabled():
            return "evaluation"
        return "probe" if faults.probing else place

    for recipe in (sft, distill, hybrid):
        wrap(recipe.Objective, "forward", lambda: training("forward"))
    wrap(Teacher, "read", lambda: training("teacher"))
    wrap(contest, "answers", lambda: "drawing")
    wrap(accelerate.Accelerator, "backward", lambda: training("backward"))
    wrap(transformers.GenerationMixin, "generate", lambda: "prediction")
    for name in ("save_file", "write_file", "sync_tree", "move"):
        wrap(checkpoint, name, lambda: "checkpoint")
    wrap(torch, "save", lambda: "checkpoint")
    prepare = loop.Training.prepare

    def probing(training: loop.Training) -> None:
        faults.probing = True
        prepare(training)
        faults.probing = False

    monkeypatch.setattr(loop.Training, "prepare", probing)
    hooks = [
        optimizers.register_optimizer_step_pre_hook(lambda *_: strike(faults, after=False)),
        optimizers.register_optimizer_step_post_hook(lambda *_: strike(faults, after=True)),
    ]
    yield faults
    for hook in hooks:
        hook.remove()


def strike(faults: Faults, *, after: bool) -> None:
    """Let an optimizer step fail before anything has changed, or after everything has: the loop cannot tell."""
    if not after:
        faults.calls["optimizer"] = faults.calls.get("optimizer", 0) + 1
    number, late, _ = faults.due.get("optimizer", (0, after, None))
    if late is after and number == faults.calls["optimizer"]:
        faults._raise("optimizer")


@dataclass
class World:
    """A model on disk and rows for it."""

    base: Base
    tokenizer: transformers.PreTrainedTokenizerBase
    train: list[Example]
    held_out: list[Example]


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDER = {**SMALL, "hidden_size": 64, "intermediate_size": 64}  # 4-bit weights come in blocks of 64


def build_world(folder: Path, tiny_model: Path, sizes: dict[str, int]) -> World:
    """Write a random model of these sizes, and tokenise rows; a long one is in the second step, so that the largest
    micro-batch is tried before the first.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes)
    ).save_pretrained(folder)

    def examples(chats: list[dict]) -> list[Example]:
        rows = [
            row_of(*((turn["role"], turn["content"]) for turn in chat["messages"]), line=number)
            for number, chat in enumerate(chats, 1)
        ]
        return list(tokenise(rows, tokenizer, max_length=256))

    chats = chat_rows(ROWS)
    plan = steps.plan_steps(ROWS, effective_batch=BATCH, epochs=EPOCHS, max_steps=None, seed=42)
    chats[plan.step(1)[0]]["messages"][1]["content"] = "1, 2, 3. " * 12
    chats[plan.step(1)[0]]["messages"][0]["content"] = "Count. " * 20
    return World(Base(str(folder), "tiny"), tokenizer, examples(chats), examples(chat_rows(3, start=100)))


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model) -> World:
    return build_world(tmp_path_factory.mktemp("model"), tiny_model, SMALL)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> Iterator[None]:
    """One thread, no waiting for the disk, and little to look through where memory is given back."""
    gc.collect()
    gc.freeze()
    monkeypatch.setattr("os.fsync", lambda _: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Attempt:
    """One call of the loop, and what it said."""

    resumed: int  # steps that were done before
    events: list[Event]
    ended: Exception | None

    @property
    def steps(self) -> list[dict]:
        return [dict(event.data) for event in self.events if "train_loss" in event.data and event.type == "metrics"]

    def of(self, kind: EventType) -> list[Event]:
        return [event for event in self.events if event.type is kind]


@dataclass
class Story:
    """A job from its first attempt to its last."""

    attempts: list[Attempt]
    trained: loop.Trained
    weights: dict[str, torch.Tensor]

    @property
    def rungs(self) -> list[dict]:
        return [dict(event.data["rung"]) for attempt in self.attempts for event in attempt.of(EventType.RUNG)]


class Job:
    """Trainings of one job, one after the other, in a folder of its own."""

    def __init__(self, folder: Path, world: World, *, group: Group | None = None, **settings) -> None:
        self.folder, self.world, self.group = folder, world, group or Group()
        self.settings = settings_from({**SETTINGS, **settings}, where="the test")
        self.rung = self.settings.first_rung()
        self.attempts: list[Attempt] = []
        folder.mkdir(parents=True, exist_ok=True)

    def attempt(self, asked_to_stop: Callable[[], bool] = lambda: False) -> loop.Trained | None:
        """Make the next attempt: what it trained, or None."""
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier job's precision was another, it may be
        rank = self.group.rank
        events = self.folder / f"events-{rank}-{len(list(self.folder.glob(f'events-{rank}-*')))}.jsonl"
        trained, ended = None, None
        task = loop.Task(
            settings=self.settings,
            rung=self.rung,
            base=self.world.base,
            tokenizer=self.world.tokenizer,
            train=self.world.train,
            held_out=self.world.held_out if self.settings.eval_steps else [],
            asked=[row_of(("user", "Say the number 100"), ("assistant", "The number is 100."))]
            if self.settings.eval_steps
            else [],
            device=torch.device("cpu"),
            checkpoints=self.folder / "checkpoints",
            bounds=self.folder / "bounds.json",
            say=Reporter(events, rank=rank),
            asked_to_stop=asked_to_stop,
            teacher=self.teacher(),
            group=self.group,
        )
        try:
            trained = self.train(task)
        except (OutOfMeansError, StopAskedError) as error:
            ended = error
        said = [event for line in events.read_bytes().splitlines() if (event := parse_event(line))]
        resumed = [event.data["step"] for event in said if "resumed" in event.message]
        self.attempts.append(Attempt(resumed[0] if resumed else 0, said, ended))
        return trained

    def train(self, task: loop.Task) -> loop.Trained:
        """Train as the trainer does."""
        return loop.train(task)

    def teacher(self) -> Teacher | None:
        """Find the teacher that the settings name."""
        found = find_teacher(self.settings, self.world.tokenizer, models=self.folder, base_dir=self.folder)
        return Teacher(found) if found else None

    def done(self) -> Story:
        """Do what the supervisor does until the job is done."""
        while (trained := self.attempt()) is None:
            ended = self.attempts[-1].ended
            assert isinstance(ended, OutOfMeansError)
            lower = next_rung(ended.rung)
            assert lower, "the foot of the ladder, with errors left"
            self.rung = lower[0]
        return self.story(trained)

    def stopped_after(self, counts: list[int]) -> Story:
        """Stop the first attempts after so many steps each, and then let one run to its end."""
        for count in counts:
            looks = itertools.count()
            if trained := self.attempt(lambda looks=looks, count=count: next(looks) >= count):
                return self.story(trained)
            assert isinstance(self.attempts[-1].ended, StopAskedError)
        return self.done()

    def state(self) -> tuple[dict, dict]:
        """Weights and optimizer state of the newest checkpoint, which after the end is that of the last step."""
        plan = f"{ROWS} examples, {BATCH} a step, seed {self.settings.seed}"
        found, _ = checkpoint.newest(self.folder / "checkpoints", plan=plan)
        assert found.step == STEPS
        return checkpoint.load(found, device=torch.device("cpu"))

    def story(self, trained: loop.Trained) -> Story:
        weights = {n: p.detach().clone() for n, p in trained.model.named_parameters() if p.requires_grad}
        return Story(self.attempts, trained, weights)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world) -> Story:
    torch.set_num_threads(1)
    return Job(tmp_path_factory.mktemp("undisturbed"), world).done()


@pytest.fixture
def counted(tmp_path, world, faults) -> dict[str, int]:
    """How often an undisturbed training calls in each place."""
    if not _counted:
        Job(tmp_path / "counted", world).done()
        _counted.update(faults.calls)
        faults.calls.clear()
    return _counted


_counted: dict[str, int] = {}


def test_the_steps_are_all_there_once(undisturbed):
    (only,) = undisturbed.attempts
    assert [step["step"] for step in only.steps] == list(range(1, STEPS + 1))
    assert undisturbed.rungs == []


def assert_the_same(story: Story, wanted: Story, *, tolerance: float = 1e-5) -> None:
    """The weights are those of the undisturbed job, and so is each step that led there, in whatever attempt."""
    assert story.weights.keys() == wanted.weights.keys()
    worst = max(float((story.weights[n] - tensor).abs().max()) for n, tensor in wanted.weights.items())
    assert worst <= tolerance
    expected = {step["step"]: step for step in wanted.attempts[0].steps}
    done = 0
    for attempt in story.attempts:
        assert attempt.resumed <= done, "steps were skipped"
        numbers = [step["step"] for step in attempt.steps]
        assert numbers == list(range(attempt.resumed + 1, attempt.resumed + 1 + len(numbers)))
        for step in attempt.steps:
            for figure in ("train_loss", "grad_norm", "learning_rate"):
                assert step[figure] == pytest.approx(expected[step["step"]][figure], rel=1e-4), figure
        done = attempt.resumed + len(attempt.steps)
    assert done == STEPS


@pytest.mark.parametrize("seed", range(SEEDS))
def test_memory_that_runs_out_anywhere_changes_nothing(  # noqa: PLR0917, pytest passes fixtures by name
    tmp_path, world, undisturbed, counted, faults, seed
):
    """One to three errors at random places and steps. An attempt that ends goes on where it was; only when an optimizer
    step was torn, which leaves nothing to save, at its last checkpoint.
    """
    rng = random.Random(seed)
    places = rng.sample(PLACES, rng.choice([1, 1, 2, 3]))
    faults.due = {place: (rng.randint(1, counted[place]), rng.random() < 0.5, rng.choice(KINDS)()) for place in places}
    story = Job(tmp_path, world).done()
    assert sorted(faults.raised) == sorted(places)
    assert_the_same(story, undisturbed)

    assert {rung["batch_size"] * rung["gradient_accumulation"] for rung in story.rungs} <= {BATCH}
    for earlier, later in itertools.pairwise(story.attempts):
        lost = earlier.resumed + len(earlier.steps) - later.resumed
        assert lost == 0 or (lost < SETTINGS["checkpoint_steps"] and "optimizer" in places), "work was lost"
    if not {"probe", "forward", "backward", "optimizer"} & set(places):
        assert story.rungs == [], "smaller batches help neither an evaluation nor a checkpoint"
        assert len(story.attempts) == 1
    if places in (["probe"], ["forward"], ["backward"]):
        assert len(story.attempts) == 1, "the process can help itself"
        assert len(story.rungs) == 1


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_failed_step_gives_all_its_memory_back(tmp_path, world, faults, monkeypatch):
    """The graph of the failed micro-batch holds 64 MiB in small blocks, which the allocator likes to keep."""
    held: dict[str, int] = {}
    gradient, climb, forward = loop.Training._gradient, loop.Training._climb_down, sft.Objective.forward

    def heavy(objective: sft.Objective, batch) -> torch.Tensor:
        loss = forward(objective, batch)
        if torch.is_grad_enabled() and faults.calls.get("forward") == 3 and "after" not in held:
            weight = next(p for p in objective.parameters() if p.requires_grad).flatten()[0]
            loss = loss + sum((weight * torch.ones(16 * 1024)).square().sum() * 0 for _ in range(1024))
            held["full"] = resident()
        return loss

    def watched_gradient(training: loop.Training, rows: list[int]) -> float:
        held.setdefault("before", resident()) if training.done == 2 else None
        return gradient(training, rows)

    def watched_climb(training: loop.Training, detail: str, *, again: bool) -> None:
        held["after"] = resident()
        climb(training, detail, again=again)

    monkeypatch.setattr(sft.Objective, "forward", heavy)
    monkeypatch.setattr(loop.Training, "_gradient", watched_gradient)
    monkeypatch.setattr(loop.Training, "_climb_down", watched_climb)
    faults.due["backward"] = (3, False, MemoryError())
    Job(tmp_path, world, eval_steps=None).done()
    assert held["full"] - held["before"] > 60 * 2**20, "too little to tell"
    assert held["after"] - held["before"] < 8 * 2**20


# ---------------------------------------------------------------- stopped, anywhere and however often

QUIET = {"eval_steps": None, "checkpoint_steps": 100}
MANNERS = {
    "lora": {},
    "lora with dropout": {"lora_dropout": 0.3},
    "full": {"tuning": "full", "learning_rate": 1e-3},
    "small batches": {"batch_size": 2, "gradient_accumulation": 4, "activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, world) -> Callable[[str], Job]:
    """Trainings that nobody stops, each done once."""

    @functools.cache
    def train(manner: str) -> Job:
        job = Job(tmp_path_factory.mktemp("straight"), world, **QUIET, **MANNERS[manner])
        job.done()
        return job

    return train


def figures_of(step: dict) -> dict:
    """All that is told of a step but its times and what follows from them."""
    told = (
        "step",
        "epoch",
        "train_loss",
        "learning_rate",
        "loss_",
        "grad_norm",
        "alpha",
        "temperature",
        "matched",
        "reward",
    )
    return {name: figure for name, figure in step.items() if name.startswith(told)}


def assert_bit_exact(found: Job, wanted: Job) -> None:
    torch.testing.assert_close(found.state(), wanted.state(), rtol=0, atol=0)
    told, expected = (
        [figures_of(step) for attempt in job.attempts for step in attempt.steps] for job in (found, wanted)
    )
    assert told == expected


def assert_bit_exact_if_stopped_after_every_step(job: Job, wanted: Job) -> None:
    job.stopped_after([1] * (STEPS - 1))
    assert [attempt.resumed for attempt in job.attempts] == list(range(STEPS))
    assert_bit_exact(job, wanted)


@pytest.mark.parametrize("manner", MANNERS)
def test_stopped_after_every_single_step_it_is_the_same_to_the_last_bit(tmp_path, world, straight, manner):
    assert_bit_exact_if_stopped_after_every_step(Job(tmp_path, world, **QUIET, **MANNERS[manner]), straight(manner))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manner=st.sampled_from(sorted(MANNERS)), counts=st.lists(st.integers(0, STEPS), max_size=3))
@example(manner="lora with dropout", counts=[0, 0, STEPS])
@example(manner="full", counts=[2, 2])
def test_stopped_anywhere_it_is_the_same_to_the_last_bit(tmp_path_factory, world, straight, manner, counts):
    job = Job(tmp_path_factory.mktemp("stopped"), world, **QUIET, **MANNERS[manner])
    job.stopped_after(counts)
    assert_bit_exact(job, straight(manner))


def test_a_stop_is_heard_in_an_evaluation_which_is_then_made_again(tmp_path, world, undisturbed):
    job, heard = Job(tmp_path, world), []

    def asked() -> bool:
        """Once, in the evaluation after the second step."""
        if not heard and not torch.is_grad_enabled() and len(list(tmp_path.glob("**/step-*"))) >= 1:
            heard.append(True)
            return True
        return False

    assert job.attempt(asked) is None
    assert isinstance(job.attempts[0].ended, StopAskedError)
    story = job.done()
    assert_the_same(story, undisturbed, tolerance=0.0)
    evaluated = [e.data["step"] for a in story.attempts for e in a.of(EventType.METRICS) if "valid_loss" in e.data]
    wanted = [e.data["step"] for e in undisturbed.attempts[0].of(EventType.METRICS) if "valid_loss" in e.data]
    assert evaluated == wanted


# Any number is right, and a model that has learned nothing writes one now and then.
DRAWN = {"max_new_tokens": 12, "ambiguity": 0.2}
HYBRID = {"recipe": "hybrid", "judge": {"kind": "number", "tolerance": 1e6}, "hybrid": DRAWN}


def stop_quantised(folder: Path, tiny_model: Path) -> None:
    """In a process of its own, for bitsandbytes is hidden where a dense base was trained."""
    torch.set_num_threads(1)
    world = build_world(folder / "model", tiny_model, WIDER)
    recipes = {"sft": {}, "hybrid": HYBRID, "distill": {"recipe": "distill", "teacher": str(tiny_model)}}
    for (recipe, own), tuning in itertools.product(recipes.items(), ("qlora", "lora-8bit")):
        print(recipe, tuning)  # noqa: T201, which of them fails
        values = {**QUIET, **own, "tuning": tuning, "lora_dropout": 0.3}
        jobs = [Job(folder / recipe / tuning / name, world, **values) for name in ("straight", "stopped")]
        jobs[0].done()
        jobs[1].stopped_after([1, 1, 3])
        assert_bit_exact(jobs[1], jobs[0])


def test_on_a_quantised_base_too_whatever_the_recipe(tmp_path, tiny_model):
    call = f"import test_exactness as t; t.stop_quantised(t.Path({str(tmp_path)!r}), {str(tiny_model)!r})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-100:] + done.stderr[-3000:]


# ---------------------------------------------------------------- the last step and the best


class Stop(Exception):  # noqa: N818, a kill is no error
    """The process is gone."""


def losses(*values: float) -> Callable:
    """Held-out losses for one evaluation after the other."""
    left = iter(values)
    return lambda _: next(left)


EVALUATED = {"eval_file": "held-out.jsonl", "eval_steps": 2, "predictions": {}, "checkpoint_steps": 1}


@pytest.mark.parametrize("publish", ["last", "best"])
def test_the_best_step_is_kept_and_published_where_that_is_asked_for(tmp_path, world, monkeypatch, publish):
    """Held-out losses of steps 0, 2, 4 and 6: the lowest is that of step 2, which would be long gone."""
    monkeypatch.setattr(evaluation, "held_out_loss", losses(3.0, 1.0, 1.0, 2.0))
    job = Job(tmp_path, world, **EVALUATED, publish=publish, keep_checkpoints=2)
    story = job.done()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000005", "step-00000006"]
    step, loss = (2, 1.0) if publish == "best" else (6, 2.0)
    assert story.trained.metrics["published_step"] == step
    assert story.trained.metrics["valid_loss"] == loss
    assert (story.trained.metrics["best_step"], story.trained.metrics["step"]) == (2, 6)
    plan = f"{ROWS} examples, {BATCH} a step, seed 42"
    found = checkpoint.of_step(tmp_path / "checkpoints", step, plan=plan)
    weights, _ = checkpoint.load(found, device=torch.device("cpu"))
    assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in story.weights.items())


def test_the_best_step_has_a_checkpoint_though_none_is_due(tmp_path, world, monkeypatch):
    monkeypatch.setattr(evaluation, "held_out_loss", losses(3.0, 1.0, 2.0, 2.0))
    story = Job(tmp_path, world, **{**EVALUATED, "checkpoint_steps": 100}, publish="best").done()
    assert story.trained.metrics["published_step"] == 2
    assert [e.data["checkpoint_step"] for e in story.attempts[0].of(EventType.CHECKPOINT)] == [2, 6]


def test_a_damaged_best_step_is_told_and_the_last_published(tmp_path, world, monkeypatch):
    def last(training: loop.Training) -> float:
        if training.done == STEPS:
            (tmp_path / "checkpoints" / "step-00000002" / "trained.safetensors").write_bytes(b"")
        return 1.0 + (training.done != 2)

    monkeypatch.setattr(evaluation, "held_out_loss", last)
    story = Job(tmp_path, world, **EVALUATED, publish="best").done()
    assert story.trained.metrics["published_step"] == STEPS
    assert any("damaged" in e.message and e.level == "warning" for e in story.attempts[0].events)


def test_a_kill_in_the_last_evaluation_loses_no_step(tmp_path, world, monkeypatch):
    """And which step was the best is still known."""
    job = Job(tmp_path, world, **{**EVALUATED, "checkpoint_steps": 100}, publish="best")

    def killed(training: loop.Training) -> float:
        if training.done == STEPS:
            raise Stop
        return 1.0 + (training.done != 2)

    monkeypatch.setattr(evaluation, "held_out_loss", killed)
    with pytest.raises(Stop):
        job.attempt()
    monkeypatch.setattr(evaluation, "held_out_loss", lambda _: 9.0)
    story = job.done()
    assert story.attempts[-1].resumed == STEPS
    assert story.attempts[-1].steps == []
    assert story.trained.metrics["published_step"] == 2
