"""The trainer's process from job.json to its adapter.

Whatever cuts a step smaller, stops the process or kills it: the weights that come out are the same.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import forked
from conftest import chat_rows, eventually, write_jsonl
from finetuned.config import settings_from
from finetuned.errors import FinetunedError
from finetuned.events import Ending, Event, EventType, ExitCode, describe_end, judge, parse_event
from finetuned.home import JobFolder
from finetuned.jobs import FileIdentity, Job, JobSpec, State
from finetuned.supervisor import decide
from forked import ForkedProcess

# One thread: tiny matrices gain nothing from more, and two trainers may run side by side.
# And glibc gives each large block back at once, so that the address space tells what is needed.
TRAINER = [sys.executable, "-m", "finetuned.trainer"]
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
ROWS, BATCH = 24, 8
WIDE_STEPS = 6
LONG = {"epochs": 14, "checkpoint_steps": 5}  # time enough to be stopped in the middle
LONG_STEPS = 42


class Run:
    """A job's folder, and trainers at work on it, one after the other."""

    def __init__(self, folder: Path, data: Path, **settings) -> None:
        self.folder = JobFolder(folder)
        self.command = TRAINER
        self.peak = 0  # the most address space that an attempt had, in bytes
        folder.mkdir(parents=True)
        values = {"dtype": "float32", "batch_size": BATCH, "epochs": 2, "learning_rate": 2e-3, **settings}
        settings = settings_from(values, where="the test")
        self.spec = JobSpec(
            id="a-job",
            name="data.jsonl",
            profile="",
            identity=FileIdentity(1, 2, 3, 4),
            created_at=0.0,
            input=str(data),
            settings=settings.model_dump(),
            rung=settings.first_rung().as_dict(),
            sha256="0" * 64,
            base_dir=str(folder),
            models=str(folder),
        )

    def start(
        self, *, rung: dict | None = None, memory: int | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.Popen | ForkedProcess:
        """Start the next attempt, with no more than `memory` bytes of address space."""
        self.spec = replace(self.spec, attempt=self.spec.attempt + 1, rung=rung or self.spec.rung)
        self.folder.spec.write_bytes(self.spec.encode())
        process = self._fork() if self.command == TRAINER and not environment else None
        process = process or self._spawn(environment or {})
        if memory:
            bound(process, memory)
        return process

    def _fork(self) -> ForkedProcess | subprocess.Popen | None:
        one_alone = self.spec.processes == 1
        return forked.start(self.folder, log=self.folder.path / "log", environment=QUIET) if one_alone else None

    def _spawn(self, environment: dict[str, str]) -> subprocess.Popen:
        with (self.folder.path / "log").open("ab") as log:
            return subprocess.Popen(
                [*self.command, str(self.folder.path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET, **environment},
            )

    def attempt(self, **options) -> int:
        """Make the next attempt, and give its exit code."""
        process = self.start(**options)

        def look() -> bool:
            self.peak = max(self.peak, address_space(process, "VmPeak"))
            return process.poll() is not None

        eventually(look, seconds=200)
        return process.returncode

    def done(self) -> "Run":
        """Run to success."""
        assert self.attempt() == ExitCode.DONE, self.log
        return self

    @property
    def log(self) -> str:
        return (self.folder.path / "log").read_text()

    def events(self, kind: EventType | None = None) -> list[Event]:
        lines = self.folder.events.read_bytes().splitlines() if self.folder.events.exists() else []
        events = [event for line in lines if (event := parse_event(line))]
        return [event for event in events if kind in (None, event.type)]

    def steps(self) -> list[dict]:
        """The figures of every optimizer step, in order."""
        return [dict(event.data) for event in self.events(EventType.METRICS) if "train_loss" in event.data]

    def error(self) -> dict:
        return dict(self.events(EventType.ERROR)[-1].data)

    @property
    def adapter(self) -> Path:
        return self.folder.staged_adapter(self.spec.attempt)

    def weights(self) -> dict[str, torch.Tensor]:
        (file,) = self.adapter.glob("*model.safetensors")
        return load_file(file)


def assert_same_weights(found: Run, wanted: Run, *, tolerance: float = 0.0) -> None:
    """Equal to the last bit, or within `tolerance`; and so were the steps that led there."""
    found_weights, wanted_weights = found.weights(), wanted.weights()
    assert found_weights.keys() == wanted_weights.keys()
    worst = max(float((found_weights[name] - tensor).abs().max()) for name, tensor in wanted_weights.items())
    assert worst <= tolerance
    # Adam forgives a gradient that is too large or too small, its norm does not.
    assert len(found.steps()) == len(wanted.steps())
    for step, other in zip(found.steps(), wanted.steps(), strict=True):
        for figure in ("step", "train_loss", "grad_norm", "learning_rate"):
            assert step[figure] == pytest.approx(other[figure], rel=100 * tolerance), figure


def address_space(process: subprocess.Popen | ForkedProcess, field: str) -> int:
    """Bytes of address space, now (VmSize) or at most so far (VmPeak); 0 for a process that has ended."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def bound(process: subprocess.Popen | ForkedProcess, memory: int) -> None:
    """Let a process have no more than so many bytes of address space."""
    resource.prlimit(process.pid, resource.RLIMIT_AS, (memory, memory))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", chat_rows(ROWS))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", chat_rows(6, start=100))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, tiny_model) -> Path:
    """Small on disk, but a row of a thousand tokens takes 140 MiB to train on."""
    folder = tmp_path_factory.mktemp("wide-model")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 6144, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=258, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, wide_model, data, held_out) -> Iterator[dict[str, Future]]:
    """Trainings that nothing disturbs, begun two at a time before the tests ask for them."""
    folder = tmp_path_factory.mktemp("runs")
    wide = {
        "data": write_jsonl(folder / "long.jsonl", long_rows(8, 900)),
        "model": str(wide_model),
        "max_length": 1024,
        "learning_rate": 5e-4,
        "epochs": WIDE_STEPS / 2,
        "micro_batch_tokens": 10_000,  # rows alone decide
    }
    evaluated = {"eval_file": str(held_out), "eval_steps": 2, "predictions": {"samples": 2, "max_new_tokens": 8}}
    settings = {
        "8x1": {},
        "4x2": {"batch_size": 4, "gradient_accumulation": 2},
        "2x4": {"batch_size": 2, "gradient_accumulation": 4},
        "1x8": {"batch_size": 1, "gradient_accumulation": 8},
        "evaluated": evaluated,
        "bf16": {"dtype": "bf16", **evaluated},
        "checkpointing": {"activation_checkpointing": True},
        "full": {"tuning": "full", "eval_file": str(held_out)},
        "long": LONG,
        "long with dropout": {**LONG, "lora_dropout": 0.2},
        "wide 4x1": {**wide, "batch_size": 4},
        "wide 1x4": {**wide, "batch_size": 1, "gradient_accumulation": 4},
        "qlora": {"tuning": "qlora", **evaluated},
        "lora on a base rounded to 4 bits": {"model": "4"},
        "lora-8bit": {"tuning": "lora-8bit", **evaluated},
        "lora on a base rounded to 8 bits": {"model": "8"},
    }

    def run(name: str) -> Run:
        values = {"data": data, "model": str(tiny_model), **settings[name]}
        if values["model"] in ROUNDED:
            values["model"] = str(rounded(tiny_model, folder / f"base of {name}", ROUNDED[values["model"]]))
        return Run(folder / name, **values).done()

    with ThreadPoolExecutor(2) as two:
        yield {name: two.submit(run, name) for name in settings}
        two.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- a success, and what it leaves


def plain_loss(model, tokenizer, rows: list[dict]) -> float:
    """The mean loss over the answers and their ends, by transformers alone: each answer behind its own prompt."""
    total, count = 0.0, 0
    for row in rows:
        chat = [{"role": "system", "content": "You are a helpful assistant."}, *row["messages"]]
        prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt + chat[-1]["content"] + "<|im_end|>", return_tensors="pt", add_special_tokens=False)
        labels = ids["input_ids"].clone()
        labels[:, : len(tokenizer(prompt, add_special_tokens=False)["input_ids"])] = -100
        targets = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(**ids, labels=labels).loss) * targets
        count += targets
    return total / count


def test_the_adapter_works_in_plain_transformers_and_peft(runs, tiny_model, held_out):
    """Loaded by the libraries alone it has the held-out loss that the trainer reported."""
    from peft import PeftModel

    run = runs["evaluated"].result()
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert config["task_type"] == "CAUSAL_LM"
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template

    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    before = plain_loss(base, tokenizer, rows)
    after = plain_loss(PeftModel.from_pretrained(base, run.adapter), tokenizer, rows)
    (result,) = run.events(EventType.RESULT)
    assert result.data["valid_loss_before"] == pytest.approx(before, rel=1e-5)
    assert result.data["valid_loss"] == pytest.approx(after, rel=1e-5)
    assert after < before - 0.1


def test_a_full_fine_tune_is_a_model_of_its_own(runs, tiny_model, held_out):
    run = runs["full"].result()
    assert not (run.adapter / "adapter_config.json").exists()
    assert (run.adapter / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(run.adapter, dtype=torch.float32)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    (result,) = run.events(EventType.RESULT)
    after = plain_loss(model, AutoTokenizer.from_pretrained(run.adapter), rows)
    assert result.data["valid_loss"] == pytest.approx(after, rel=1e-5)
    assert after < result.data["valid_loss_before"] - 0.1
    before = load_file(tiny_model / "model.safetensors")
    assert all(not torch.equal(before[name], weight) for name, weight in run.weights().items())


def test_a_success_is_told_from_its_beginning_to_its_end(runs):
    run = runs["8x1"].result()
    phases = [event.data["phase"] for event in run.events(EventType.PHASE)]  # it evaluates before and after
    assert list(dict.fromkeys(phases)) == ["validating_files", "loading_model", "evaluating", "training", "saving"]
    assert run.events()[-1].type is EventType.RESULT
    assert run.events(EventType.ERROR) == []
    (plan,) = run.events(EventType.PLAN)
    assert (plan.data["total_steps"], plan.data["rows"]) == (6, ROWS)
    assert all(choice["choice"] and choice["reason"] for choice in plan.data["choices"].values())
    steps = run.steps()
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["epoch"] == 2
    assert all(step["grad_norm"] > 0 and step["learning_rate"] > 0 for step in steps)
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] - 0.1


def test_finetuned_json_tells_the_whole_story(runs):
    run = runs["evaluated"].result()
    story = json.loads((run.adapter / "finetuned.json").read_text())
    assert story["job_id"] == run.spec.id
    assert story["sha256"] == run.spec.sha256
    assert story["settings"] == run.spec.settings
    assert story["rung"] == {**run.spec.rung, "tuning": "lora", "micro_batch_tokens": 1024}
    assert story["data"]["rows"] == ROWS
    assert story["metrics"]["step"] == 6
    assert {"torch", "transformers", "peft", "finetuned"} <= story["versions"].keys()
    assert not list(run.adapter.glob("*.tmp"))
    card = (run.adapter / "README.md").read_text()
    assert f"base_model: {story['base_model']}" in card
    assert f"{story['metrics']['valid_loss']:.4f}" in card
    program = card.partition("```python\n")[2].partition("```")[0].replace('"."', repr(str(run.adapter)))
    assert '{"role": "system", "content": "You are a helpful assistant."}, {"role": "user"' in program
    with redirect_stdout(StringIO()) as said:
        exec(program, {})  # as a user would run it
    assert "<|im_start|>system\nYou are a helpful assistant.<|im_end|>" in said.getvalue()


# ---------------------------------------------------------------- the same weights, however a step is cut


@pytest.mark.parametrize("cut", ["4x2", "2x4", "1x8"])
def test_a_step_cut_smaller_gives_the_same_weights(runs, cut):
    assert_same_weights(runs[cut].result(), runs["8x1"].result(), tolerance=1e-5)


def test_activation_checkpointing_gives_the_same_weights(runs):
    assert_same_weights(runs["checkpointing"].result(), runs["8x1"].result(), tolerance=1e-6)


def test_evaluating_in_between_changes_nothing(runs):
    assert_same_weights(runs["evaluated"].result(), runs["8x1"].result())


def test_the_model_is_asked_before_the_first_step_and_after_the_last(runs, held_out):
    run = runs["evaluated"].result()
    losses = {e.data["step"]: e.data["valid_loss"] for e in run.events(EventType.METRICS) if "valid_loss" in e.data}
    assert list(losses) == [0, 2, 4, 6]
    assert losses[6] < losses[0]
    predictions = run.events(EventType.PREDICTIONS)
    assert [event.data["step"] for event in predictions] == [0, 2, 4, 6]
    rows = [json.loads(line)["messages"] for line in held_out.read_text().splitlines()[:2]]
    for event in predictions:
        asked = [(sample["prompt"], sample["expected"]) for sample in event.data["samples"]]
        assert asked == [(row[0]["content"], row[1]["content"]) for row in rows]
        assert all(isinstance(sample["answer"], str) and not sample["exact"] for sample in event.data["samples"])
    order = [e.data["step"] for e in run.events(EventType.METRICS)]
    assert order == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_in_bf16_it_trains_and_answers_too(runs):
    """Mixed precision in training, none in generation, on the same weights."""
    run, exact = runs["bf16"].result(), runs["evaluated"].result()
    (plan,) = run.events(EventType.PLAN)
    assert plan.data["choices"]["dtype"]["choice"] == "bfloat16"
    for step, other in zip(run.steps(), exact.steps(), strict=True):
        assert step["train_loss"] == pytest.approx(other["train_loss"], rel=0.01)
        assert step["train_loss"] != other["train_loss"]
    assert len(run.events(EventType.PREDICTIONS)) == 4
    assert {tensor.dtype for tensor in run.weights().values()} == {torch.float32}


# ---------------------------------------------------------------- stopped, killed, and gone on


def when(run: Run, process: subprocess.Popen | ForkedProcess, happened: Callable[[], object]) -> None:
    """Wait until something happened to a trainer that still runs."""

    def look() -> object:
        assert process.poll() is None, f"it ended too early: {run.log[-2000:]}"
        return happened()

    eventually(look, why=run.log[-2000:] if run.log else "")


def resumed_after(run: Run) -> int:
    (event,) = [event for event in run.events(EventType.MESSAGE) if "resumed" in event.message]
    return event.data["step"]


def test_stopped_and_started_again_it_ends_with_the_same_weights(runs, tmp_path, tiny_model, data):
    run = Run(tmp_path / "job", data, model=str(tiny_model), **LONG)
    process = run.start()
    when(run, process, lambda: len(run.steps()) >= 7)
    process.terminate()
    assert process.wait(60) == ExitCode.STOPPED
    before = run.steps()[-1]["step"]
    assert before < LONG_STEPS
    assert run.events(EventType.CHECKPOINT)[-1].data["checkpoint_step"] == before
    assert run.events(EventType.ERROR) == []

    assert run.attempt() == ExitCode.DONE
    assert resumed_after(run) == before
    assert [step["step"] for step in run.steps()] == list(range(1, LONG_STEPS + 1))  # none twice, none left out
    assert_same_weights(run, runs["long"].result())


def test_killed_and_started_again_it_ends_with_the_same_weights(runs, tmp_path, tiny_model, data):
    """With dropout, whose choices must be made again as they were."""
    run = Run(tmp_path / "job", data, model=str(tiny_model), **LONG, lora_dropout=0.2)
    process = run.start()
    when(run, process, lambda: len(run.events(EventType.CHECKPOINT)) >= 2)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    saved = run.events(EventType.CHECKPOINT)[-1].data["checkpoint_step"]

    assert run.attempt() == ExitCode.DONE
    assert resumed_after(run) >= saved
    assert_same_weights(run, runs["long with dropout"].result())
    with pytest.raises(AssertionError):  # or dropout would have done nothing
        assert_same_weights(run, runs["long"].result(), tolerance=1e-3)


# ---------------------------------------------------------------- out of memory


def long_rows(count: int, length: int) -> list[dict]:
    """Rows of more than so many tokens of one byte each, their answers short."""
    return [
        {"messages": [{"role": "user", "content": f"{n} " * (length // 3)}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(10, 10 + count)
    ]


def test_when_memory_runs_out_it_goes_on_with_smaller_batches_to_the_same_weights(runs, tmp_path):
    """Real allocation failures in the middle of a training, and again from the start of the attempt that follows."""
    four, one = runs["wide 4x1"].result(), runs["wide 1x4"].result()
    a_row = (four.peak - one.peak) / 3
    assert a_row > 50 * 2**20, "too little to tell apart"
    enough_for_one_row = int(one.peak + a_row / 2)

    run = Run(tmp_path / "job", Path(four.spec.input), **four.spec.settings)
    process = run.start()
    when(run, process, lambda: len(run.steps()) >= 2)
    bound(process, enough_for_one_row)
    status = process.wait(120)
    first_steps = len(run.steps())
    assert first_steps < WIDE_STEPS, "memory did not run out"

    # What the supervisor would do, until the job is done.
    job = Job("a-job", b"data.jsonl", "", run.spec.identity, State.RUNNING, 0.0, run.spec.settings, run.spec.rung)
    while status != ExitCode.DONE:
        assert status == ExitCode.OUT_OF_MEMORY, run.log[-3000:]
        assert run.error()["code"] == "out_of_memory"
        assert judge(status, stopped=False) is Ending.RESOURCE
        decision = decide(job, Ending.RESOURCE, error=run.error(), end=describe_end(status))
        assert decision.rung, decision
        assert decision.rung["batch_size"] < run.error()["rung"]["batch_size"] <= 2
        job = replace(job, rung=decision.rung)
        status = run.attempt(rung=decision.rung, memory=enough_for_one_row)

    fell = [event for event in run.events(EventType.RUNG) if event.data["rung"]["batch_size"] < 4]
    assert fell, "no process helped itself"
    assert "allocate memory" in fell[0].data["reason"]
    assert {e.data["rung"]["batch_size"] * e.data["rung"]["gradient_accumulation"] for e in fell} == {4}
    # The steps that were done stay done.
    assert resumed_after(run) == first_steps
    story = json.loads((run.adapter / "finetuned.json").read_text())
    assert (story["rung"]["batch_size"], story["rung"]["gradient_accumulation"]) == (1, 4)
    for undisturbed in (four, one):
        assert_same_weights(run, undisturbed, tolerance=1e-5)


def test_an_evaluation_that_does_not_fit_is_no_bug(tmp_path, wide_model, data):
    """One held-out row takes more memory than all of the training. That may end the attempt, but not as a bug."""
    rows = write_jsonl(tmp_path / "held-out.jsonl", long_rows(1, 4000))
    settings = {"model": str(wide_model), "max_length": 8192, "eval_file": str(rows), "epochs": 6}
    run = Run(tmp_path / "job", data, batch_size=1, gradient_accumulation=8, **settings)
    process = run.start()
    when(run, process, lambda: len(run.steps()) >= 2)
    bound(process, address_space(process, "VmSize") + 100 * 2**20)  # the evaluation needs 300 MiB
    status = process.wait(120)
    assert len(run.steps()) == 18, run.log[-1000:]
    assert status in {ExitCode.DONE, ExitCode.OUT_OF_MEMORY}, run.log[-1000:]
    assert any("memory" in event.message for event in run.events() if event.level != "info")


def test_an_optimizer_that_does_not_fit_is_no_bug(tmp_path, tiny_model, data):
    """Adam's state is made at the first step, after the largest micro-batch was tried."""
    torch.manual_seed(0)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=200_000, bos_token_id=0, eos_token_id=1, **sizes)).save_pretrained(model)
    settings = {"model": str(model), "tuning": "full", "max_steps": 1, "batch_size": 1, "gradient_accumulation": 2}
    whole = Run(tmp_path / "whole", data, **settings).done()
    state = 2 * 2 * 200_000 * 128 * 4  # bytes: two moments of embedding and head in float32

    run = Run(tmp_path / "job", data, **settings)
    status = run.attempt(memory=whole.peak - state // 2)
    assert [event.data["phase"] for event in run.events(EventType.PHASE)][-1] == "training", "it failed before"
    assert status == ExitCode.OUT_OF_MEMORY, run.log[-1000:]
    assert run.error()["code"] == "out_of_memory"
    assert "rung" in run.error()
    assert re.search(r", and the machine has [\d.]+ [MG]iB in all", run.error()["what"])
    assert 'Set tuning to "lora"' in run.error()["remedy"]


# ---------------------------------------------------------------- quantised bases on a CPU

ROUNDED = {
    "4": "functional.dequantize_4bit(*functional.quantize_4bit(w, quant_type='nf4', compress_statistics=True))",
    "8": "(lambda q, s, _: q.float() * s.unsqueeze(1) / 127)(*functional.int8_vectorwise_quant(w.half()))",
}
ROUND = """
import sys
from bitsandbytes import functional
from safetensors.torch import load_file, save_file

weights = load_file(sys.argv[1])
for name, w in weights.items():
    if "_proj" in name:
        weights[name] = {expression}.float().contiguous()
save_file(weights, sys.argv[1], metadata={{"format": "pt"}})
"""


def rounded(model: Path, folder: Path, expression: str) -> Path:
    """Copy a model, its linear layers rounded as bitsandbytes does, which is imported in a process of its own."""
    shutil.copytree(model, folder)
    script = ROUND.format(expression=expression)
    subprocess.run([sys.executable, "-c", script, str(folder / "model.safetensors")], check=True)
    return folder


@pytest.mark.parametrize(
    ("tuning", "base"),
    [("qlora", "lora on a base rounded to 4 bits"), ("lora-8bit", "lora on a base rounded to 8 bits")],
)
def test_a_quantised_base_is_trained_like_a_rounded_one(runs, tuning, base):
    """The gradient reaches every layer, before, between and after evaluations.

    bitsandbytes repacks 4-bit weights in an evaluation on a CPU, after which a layer has no gradient for its input.
    """
    run, wanted = runs[tuning].result(), runs[base].result()
    steps = run.steps()
    assert all(math.isfinite(step["grad_norm"]) and step["grad_norm"] > 0 for step in steps)
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] - 0.1
    for step, other in zip(steps, wanted.steps(), strict=True):
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert_same_weights(run, wanted, tolerance=1e-3)


# ---------------------------------------------------------------- what cannot be trained


def refused(tmp_path: Path, data: Path, **settings) -> tuple[int, dict]:
    run = Run(tmp_path / "job", data, **settings)
    code = run.attempt()
    assert run.events(EventType.RESULT) == []
    assert "Traceback" not in run.log
    error = run.error()
    assert error["remedy"]
    assert str(FinetunedError(**error)) in run.log
    return code, error


def test_a_missing_model_is_named(tmp_path, data):
    code, error = refused(tmp_path, data, model="/no/such/model")
    assert code == ExitCode.BAD_SETTINGS
    assert "/no/such/model" in error["where"]


def test_a_model_without_a_chat_template_is_refused(tmp_path, tiny_model, data):
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template*"))
    code, error = refused(tmp_path, data, model=str(tmp_path / "model"))
    assert code == ExitCode.BAD_SETTINGS
    assert error["code"] == "no_chat_template"
    assert str(tmp_path / "model") in error["where"]


def test_bad_data_is_refused_before_torch_is_imported(tmp_path, tiny_model):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": []}, *chat_rows(2)])
    run = Run(tmp_path / "job", data, model=str(tiny_model))
    assert run.attempt(environment={"PYTHONPATH": path}) == ExitCode.BAD_DATA, run.log
    assert run.error()["code"] == "missing_messages_list"
    assert run.error()["where"] == "data.jsonl:1"
