"""The model is asked while it learns: what comes out, and that asking changes nothing."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import chat_rows, row_of, write_config, write_jsonl
from finetuned.config import settings_from
from finetuned.dataset.formats import check_row
from finetuned.events import Event, EventType, parse_event
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.ledger_tables import MIGRATIONS
from finetuned.section_settings import Predictions
from finetuned.trainer import generate as room
from finetuned.trainer import loop
from finetuned.trainer.base import Base
from finetuned.trainer.ends import StopAskedError
from finetuned.trainer.predictions import predict
from finetuned.trainer.reporter import Reporter
from finetuned.trainer.tokens import tokenise

STEPS = 8


@pytest.fixture
def training(tmp_path, tiny_model, monkeypatch):
    """Train eight steps in this process; the weights and what was said: `training(predictions=...)`."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # which the trainer hides as well, but for good

    def start(*, rows=None, asked_to_stop=lambda: False, **settings):
        told = tmp_path / f"events-{len(list(tmp_path.iterdir()))}.jsonl"
        values = {"dtype": "float32", "tuning": "lora", "epochs": 4, "learning_rate": 2e-3, **settings}
        settings = settings_from(values, where="the test")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        rows = [check_row(number, row)[1] for number, row in enumerate(rows or chat_rows(16))]
        examples = list(tokenise(rows, tokenizer, max_length=200))
        trained = loop.train(
            loop.Task(
                settings=settings,
                rung=settings.first_rung(),
                base=Base(str(tiny_model), str(tiny_model)),
                tokenizer=tokenizer,
                train=examples,
                held_out=examples[:5],
                asked=rows[: settings.predictions.samples],
                device=torch.device("cpu"),
                checkpoints=tmp_path / told.stem,
                bounds=tmp_path / "micro-batches.json",
                say=Reporter(told),
                asked_to_stop=asked_to_stop,
            )
        )
        events = [parse_event(line) for line in told.read_bytes().splitlines()]
        return {name: p.detach() for name, p in trained.model.named_parameters() if p.requires_grad}, events

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


ROWS = [row_of(("user", f"Say {n}" + "!" * n), ("assistant", f"{n}")) for n in range(5)]


def asked_at(events: list[Event]) -> list[int]:
    return [event.data["step"] for event in events if event.type is EventType.PREDICTIONS]


# ---------------------------------------------------------------- asking changes nothing


@pytest.mark.parametrize(
    "settings", [{}, {"lora_dropout": 0.3}, {"activation_checkpointing": True, "lora_dropout": 0.3}], ids=str
)
def test_a_model_that_was_asked_learns_the_same_to_the_last_bit(training, settings):
    """Also where dropout and the answers are both drawn: at every step, from the states that each would have alone."""
    asked = {"frequency": 1, "temperature": 0.9, "max_new_tokens": 6}
    quiet, events = training(predictions={"enabled": False}, **settings)
    assert asked_at(events) == []
    curious, events = training(predictions=asked, **settings)
    assert asked_at(events) == list(range(STEPS + 1))
    assert quiet.keys() == curious.keys()
    assert all(torch.equal(quiet[name], curious[name]) for name in quiet)


def test_random_states_modes_caches_and_padding_are_put_back(model, tokenizer):
    model.train()
    model.model.layers[0].eval()  # a mode of its own
    model.config.use_cache = False
    before = torch.get_rng_state(), [m.training for m in model.modules()], model.config._attn_implementation
    sides = tokenizer.padding_side, tokenizer.pad_token
    predict(model, tokenizer, ROWS, Predictions(max_new_tokens=4, temperature=1.0), seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [m.training for m in model.modules()] == before[1]
    assert model.config._attn_implementation == before[2]
    assert model.config.use_cache is False
    assert (tokenizer.padding_side, tokenizer.pad_token) == sides
    assert all(parameter.grad is None for parameter in model.parameters())


def test_drawn_answers_are_the_same_each_time_for_a_seed(model, tokenizer):
    def answers(seed: int) -> list[str]:
        settings = Predictions(max_new_tokens=8, temperature=1.5)
        return [one.answer for one in predict(model, tokenizer, ROWS, settings, seed=seed)]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_a_row_is_answered_in_a_batch_as_alone(model, tokenizer):
    settings = Predictions(max_new_tokens=8)
    together = predict(model, tokenizer, ROWS, settings, seed=1)
    alone = [one for row in ROWS for one in predict(model, tokenizer, [row], settings, seed=1)]
    assert [one.answer for one in together] == [one.answer for one in alone]
    assert any(one.answer for one in together)


# ---------------------------------------------------------------- when it is asked


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"frequency": "eval"}, [0, 3, 6, 8]),
        ({"frequency": "epoch"}, [0, 2, 4, 6, 8]),
        ({"frequency": 5}, [0, 5, 8]),
        ({"frequency": 50}, [0, 8]),
    ],
    ids=str,
)
def test_the_frequency_says_when(training, asked, steps):
    _, events = training(eval_steps=3, predictions={"max_new_tokens": 2, **asked})
    assert asked_at(events) == steps
    assert [e.data["step"] for e in events if "valid_loss" in e.data and e.type is EventType.METRICS] == [0, 3, 6, 8]


def test_the_log_has_a_line_of_figures_and_the_answers_get_right(training):
    """Few rows, learned by heart and asked."""
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "me"}]}
    settings = {
        "tuning": "full",
        "epochs": 30,
        "learning_rate": 1e-2,
        "predictions": {"samples": 2, "max_new_tokens": 8},
    }
    _, events = training(rows=[row] * 8, **settings)
    before, after = (event for event in events if event.type is EventType.PREDICTIONS)
    assert before.message == "predictions saved=2 errors=0 exact=0/2 step=0"
    assert after.message == "predictions saved=2 errors=0 exact=2/2 step=30"
    assert after.data["epoch"] == 30
    for sample in after.data["samples"]:
        assert {**sample, "seconds": 0} == {
            "prompt": "Who?", "expected": "me", "answer": "me", "exact": True, "similarity": 1.0, "seconds": 0,
            "error": None,
        }  # fmt: skip
        assert sample["seconds"] > 0
    assert all(0 <= sample["similarity"] < 1 for sample in before.data["samples"])


# ---------------------------------------------------------------- what goes wrong stays in its row


REFUSING = (
    "{% for m in messages %}{% if 'Say 2' in m['content'] %}{{ raise_exception('not that one') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def test_a_row_that_the_template_refuses_is_told_and_the_others_are_answered(model, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = REFUSING
    answers = predict(model, tokenizer, ROWS, Predictions(max_new_tokens=4), seed=1)
    assert [one.prompt for one in answers] == [row.messages[0].content for row in ROWS]
    assert [bool(one.error) for one in answers] == [False, False, True, False, False]
    assert "not that one" in answers[2].error
    assert answers[2].answer == ""


@pytest.fixture
def stumbling(model, tokenizer, monkeypatch):
    """A model whose generation fails as it is told to; the sizes of the batches that came."""
    generate, sizes = model.generate, []

    def stumble(fails, error):
        def generates(*, input_ids, **options):
            sizes.append(len(input_ids))
            if fails(tokenizer.batch_decode(input_ids)):
                raise error
            return generate(input_ids=input_ids, **options)

        monkeypatch.setattr(model, "generate", generates)
        return sizes

    return stumble


def test_a_row_whose_generation_fails_is_told_and_the_others_are_answered(model, tokenizer, stumbling):
    settings = Predictions(max_new_tokens=4)
    undisturbed = [one.answer for one in predict(model, tokenizer, ROWS, settings, seed=1)]
    stumbling(lambda texts: any("Say 3!!!" in text for text in texts), RuntimeError("a kernel that fails"))
    answers = predict(model, tokenizer, ROWS, settings, seed=1)
    assert [one.error for one in answers] == [None, None, None, "a kernel that fails", None]
    assert [one.answer for one in answers] == [*undisturbed[:3], "", undisturbed[4]]


def test_memory_that_runs_out_halves_the_batch(model, tokenizer, stumbling):
    settings = Predictions(max_new_tokens=4)
    undisturbed = [one.answer for one in predict(model, tokenizer, ROWS, settings, seed=1)]
    sizes = stumbling(lambda texts: len(texts) > 2, torch.OutOfMemoryError("out of memory"))
    answers = predict(model, tokenizer, ROWS, settings, seed=1)
    assert [one.answer for one in answers] == undisturbed
    assert sizes == [5, 2, 3, 1, 2]


def test_a_training_goes_on_where_no_question_can_be_answered(training, monkeypatch):
    from transformers import LlamaForCausalLM

    def fails(*_, **__):
        raise RuntimeError("no generation today")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    _, events = training(predictions={"samples": 3})
    last = [event for event in events if event.type is EventType.PREDICTIONS][-1]
    assert last.message == f"predictions saved=3 errors=3 exact=0/3 step={STEPS}"
    assert {sample["error"] for sample in last.data["samples"]} == {"no generation today"}


def test_an_expected_answer_that_cannot_be_compared_is_told_and_the_others_are(model, tokenizer):
    rows = [*ROWS[:2], row_of(("user", "Say 2!!"), ("assistant", "half of a letter: \ud83d")), *ROWS[3:]]
    answers = predict(model, tokenizer, rows, Predictions(max_new_tokens=4), seed=1)
    assert [bool(one.error) for one in answers] == [False, False, True, False, False]


def test_a_training_goes_on_where_the_model_cannot_be_asked_at_all(training, monkeypatch):
    def fails(*_, **__):
        raise ValueError("no such attention here")

    monkeypatch.setattr(room, "without_flat", fails)
    _, events = training(predictions={"samples": 3})
    assert asked_at(events) == []
    warned = [event.message for event in events if event.level == "warning" and "predictions" in event.message]
    assert warned == [f"predictions after step {step} are left out: no such attention here" for step in (0, STEPS)]


def test_a_stop_is_heard_in_the_middle_of_an_answer(training, monkeypatch):
    from transformers import LlamaForCausalLM

    forward, tokens, heard = LlamaForCausalLM.forward, [], []

    def counts(model, *words, **options):
        tokens.extend([1] if options.get("past_key_values") is not None else [])
        return forward(model, *words, **options)

    def stop() -> bool:
        heard.extend([len(tokens)] if len(tokens) > 20 and not heard else [])
        return bool(heard)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counts)
    with pytest.raises(StopAskedError):
        training(predictions={"samples": 2, "max_new_tokens": 800}, asked_to_stop=stop)
    assert 20 < len(tokens) < 30


# ---------------------------------------------------------------- in the ledger, and out of it


def finetuned(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetuned", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_job_s_answers_are_kept_and_shown(home, daemon, tiny_model):
    write_config(home, model=str(tiny_model), epochs=2, eval_steps=2, predictions={"samples": 2, "max_new_tokens": 4})
    write_jsonl(home.inbox / "x.eval.jsonl", chat_rows(4, start=100))
    staged = write_jsonl(home.root / "x.jsonl", chat_rows(8))
    one = daemon()
    staged.rename(home.inbox / "x.jsonl")
    job = one.job("x.jsonl")
    assert job.outcome is Outcome.SUCCEEDED, job.reason
    assert "predictions saved=2 errors=0 exact=0/2 step=4" in home.job_log(job.id).read_text()

    said = json.loads(finetuned("predictions", "--base-dir", home.root, "x", "--json").stdout)
    assert said["job"] == job.id
    assert [(one["step"], one["sample"]) for one in said["predictions"]] == [
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
        (4, 0),
        (4, 1),
    ]
    first = said["predictions"][0]
    assert first["prompt"].startswith("Say the number 10")
    assert first["expected"].startswith("The number is 10")
    assert (first["exact"], first["error"]) == (0, None)
    text = finetuned("predictions", "--base-dir", home.root, "x").stdout
    assert text.startswith(f"{job.id}\nstep 0: 0 of 2 exact, ")
    for words in (first["prompt"], "wanted", "before", "step 4"):
        assert words in text


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.open(tmp_path / "state.db")
    ledger.add(Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.RUNNING, 1.0))
    yield ledger
    ledger.close()


def told(step: int, *answers: str, **more) -> Event:
    samples = [
        {"prompt": "a?", "expected": "b", "answer": answer, "exact": answer == "b", "similarity": 0.5, "seconds": 0.1,
         "error": None, **more}
        for answer in answers
    ]  # fmt: skip
    return Event(1.5, EventType.PREDICTIONS, "asked", "info", {"step": step, "epoch": step / 2, "samples": samples})


def test_answers_of_a_step_that_was_done_again_take_the_place_of_the_first(ledger):
    ledger.record("x-1", [told(0, "x", "y"), told(2, "c", "d")], offset=1)
    ledger.record("x-1", [told(2, "b", "\ud800")], offset=2)
    rows = ledger.predictions("x-1")
    assert [(row["step"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert (rows[2]["answer"], rows[2]["exact"], rows[2]["epoch"]) == ("b", 1, 1.0)
    ledger.drop("x-1")
    assert ledger.predictions("x-1") == []


def test_answers_after_a_checkpoint_that_was_gone_back_to_are_no_longer_shown(ledger):
    """A trainer was killed after step 9 and goes on from its start, with fewer samples, as a retry may have it."""
    ledger.record("x-1", [told(0, "x", "y"), told(4, "c", "d"), told(9, "e", "f")], offset=1)
    ledger.record("x-1", [told(4, "b")], offset=2)
    rows = ledger.predictions("x-1")
    assert [(row["step"], row["answer"]) for row in rows] == [(0, "x"), (0, "y"), (4, "b")]
    assert [row["answer"] for row in ledger.newest_predictions("x-1")] == ["b"]


def test_a_ledger_from_before_there_were_predictions_is_upgraded(tmp_path, ledger):
    old = tmp_path / "old.db"
    database = sqlite3.connect(old)
    for migration in MIGRATIONS[:3]:
        database.executescript(migration)
    columns = [row[1] for row in database.execute("PRAGMA table_info(jobs)")]
    here = sqlite3.connect(tmp_path / "state.db")
    values = here.execute(f"SELECT {', '.join(columns)} FROM jobs").fetchone()
    database.execute(f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", values)
    database.execute("PRAGMA user_version=3")
    database.commit()
    database.close()
    upgraded = Ledger.open(old)
    assert upgraded.job("x-1") == ledger.job("x-1")
    assert upgraded.predictions("x-1") == []
    upgraded.record("x-1", [told(0, "b")], offset=1)
    assert [row["answer"] for row in upgraded.predictions("x-1")] == ["b"]
    upgraded.close()


def test_answers_are_shown_in_what_letters_and_colours_there_are(home):
    ledger = Ledger.open(home.ledger)
    ledger.add(Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.RUNNING, 1.0))
    ledger.record("x-1", [told(0, "\u6f22 \x1b[2J\ud83d\n\u202eb"), told(2, "b", similarity=None)], offset=1)
    ledger.close()
    words = [sys.executable, "-m", "finetuned", "predictions", "--base-dir", str(home.root), "x"]
    few = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    said = subprocess.run(words, env=few, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "before  \\u6f22 \\x1b[2J\\ud83d \\u202eb" in said
    for no_colour in (True, False):
        environment = {**os.environ, **({"NO_COLOR": "1"} if no_colour else {})}
        master, slave = pty.openpty()
        subprocess.run(words, env=environment, stdout=slave, check=True, timeout=60)
        os.close(slave)
        shown = os.read(master, 2**16)
        os.close(master)
        assert (b"\x1b[" not in shown) is no_colour


def test_a_job_that_was_not_asked_and_one_that_is_not_there_are_told(home):
    said = finetuned("predictions", "--base-dir", home.root, "x")
    assert (said.returncode, "no jobs here yet" in said.stderr) == (78, True)
    ledger = Ledger.open(home.ledger)
    ledger.add(Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.QUEUED, 1.0))
    ledger.add(Job("r-1", b"r.jsonl", "", FileIdentity(1, 2, 3, 5), State.QUEUED, 1.0, settings={"recipe": "rft"}))
    ledger.close()
    assert "Set benchmark" in finetuned("predictions", "--base-dir", home.root, "r").stdout
    said = finetuned("predictions", "--base-dir", home.root, "y")
    assert (said.returncode, "there is no job y" in said.stderr) == (78, True)
    assert "no rows were held out" in finetuned("predictions", "--base-dir", home.root, "x").stdout


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--no-predictions-enabled"], []),
        (["--predictions-sample-frequency", "3"], [0, 3, 4]),
    ],
    ids=str,
)
def test_a_training_by_hand_is_asked_as_it_is_told(tmp_path: Path, tiny_model, options, asked):
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(4))
    held_out = write_jsonl(tmp_path / "y.jsonl", chat_rows(1, start=9))
    out = tmp_path / "out"
    words = ["--dataset", data, "--output-dir", out, "--model", tiny_model, "--eval-file", held_out]
    done = finetuned("train", *words, "--epochs", 2, "--batch-size", 2, *options)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (out / "train.log").read_text().splitlines() if "predictions saved=1" in line]
    assert [int(line.rpartition("step=")[2]) for line in lines] == asked


def test_a_frequency_that_is_none_is_refused_before_anything_is_trained(tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", chat_rows(4))
    words = ["--dataset", data, "--output-dir", tmp_path / "out", "--predictions-sample-frequency", "often"]
    said = finetuned("train", *words)
    assert said.returncode == 78
    assert "predictions.frequency" in said.stderr
