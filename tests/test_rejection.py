"""Answers that a model makes itself, and which of them are kept. The model draws bytes at random: some are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import CHATML, answers_kept, row_of
from finetuned.config import TrainingSettings, settings_from
from finetuned.errors import ConfigError, DataError
from finetuned.judges import judge
from finetuned.recipe_settings import Rft
from finetuned.trainer.rejection import Yield, ask_and_keep, chosen

ROWS = [row_of(("user", f"Question {n}?"), ("assistant", str(n % 10)), line=n + 1) for n in range(12)]
SHOTS = [{"question": "2 + 2?", "answer": "It is 4."}]


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def settings(**rft) -> TrainingSettings:
    usual = {"samples": 6, "keep": 2, "temperature": 1.0, "max_new_tokens": 40, "least_yield": 0.0}
    values = {"recipe": "rft", "judge": {"kind": "number"}, "rft": {**usual, **rft}}
    return settings_from(values, where="the test")


@pytest.fixture
def make(model, tokenizer, tmp_path):
    """Make answers: what came of it. The file is `make.out`, and `make.told` counts the answers as they came."""

    def one(chosen: TrainingSettings, rows=ROWS) -> Yield:
        told = make_told(one.told)
        return ask_and_keep(
            model,
            tokenizer,
            rows,
            chosen,
            seed=1,
            made_by=one.model,
            answers=tmp_path / "answers.jsonl",
            out=one.out,
            tell=told,
        )

    def make_told(counts: list[int]):
        return lambda made, _: counts.append(made)

    one.out, one.told, one.answers, one.model = tmp_path / "kept.jsonl", [], tmp_path / "answers.jsonl", "tiny"
    return one


def chats(file: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def test_what_is_kept_is_right_and_under_the_prompt_that_it_was_made_with(make):
    found = make(settings(prompt="Be quick.", examples=SHOTS))
    reader, expected = judge("number"), {row.messages[0].content: row.messages[-1].content for row in ROWS}
    kept = chats(make.out)
    assert 0 < found.solved <= found.kept == len(kept) <= found.right < found.samples == 72
    for system, question, answer in kept:
        assert (system["role"], system["content"]) == ("system", "Be quick.")
        assert reader.verdict(answer["content"], expected[question["content"]]).right
    per_question = [question["content"] for _, question, _ in kept]
    assert max(map(per_question.count, per_question)) <= 2


def test_the_rows_answers_never_reach_the_model(make):
    """Else what it answers would not be its own."""
    make(settings())
    first = answers_kept(make.answers)
    make.answers.unlink()
    other = [row_of(("user", row.messages[0].content), ("assistant", "77777")) for row in ROWS]
    make(settings(), other)
    assert answers_kept(make.answers) == first


def test_after_a_kill_no_answer_is_asked_for_twice_and_the_others_are_what_they_would_have_been(make):
    whole = make(settings())
    kept, lines = make.out.read_bytes(), make.answers.read_bytes().splitlines(keepends=True)
    make.out.unlink()
    answers = answers_kept(make.answers)
    make.answers.write_bytes(b"".join(lines[:5]) + lines[5][:7])  # torn in the middle of a line
    made = len(answers_kept(make.answers))
    make.told.clear()
    assert make(settings()) == whole
    assert make.told[0] == made > 5
    assert len(make.answers.read_bytes().splitlines()) == len(lines) + 1
    assert answers_kept(make.answers) == answers
    assert make.out.read_bytes() == kept


def test_what_another_model_answered_or_at_another_temperature_is_asked_anew(make):
    make(settings())
    for made_by, temperature in (("another", 1.0), ("tiny", 0.5)):
        make.told.clear()
        make.model = made_by
        make(settings(temperature=temperature))
        assert make.told[0] == 0


def test_a_row_that_the_template_refuses_is_named_by_its_line(make, tokenizer):
    tokenizer.chat_template = (
        CHATML + "{% if messages[-1]['content'] == 'Question 3?' %}{{ raise_exception('no') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"line 4: .*refuses the question: no"):
        make(settings())


def test_a_model_that_cannot_answer_is_no_low_yield(make, model, monkeypatch):
    def broken(**_):
        raise ValueError("no such kernel")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="12 of 12 answers could not be made: no such kernel"):
        make(settings(), ROWS[:2])


def test_a_template_without_a_system_role_gets_the_prompt_in_the_question(make, tokenizer):
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    make(settings(prompt="Be quick."))
    kept = chats(make.out)
    assert kept
    assert all([turn["role"] for turn in chat] == ["user", "assistant"] for chat in kept)
    assert all(chat[0]["content"].startswith("Be quick.\n\nQuestion") for chat in kept)


def test_a_rows_own_system_message_stays(make):
    rows = [row_of(("system", "You count."), ("user", "How many?"), ("assistant", str(n)), line=n) for n in range(10)]
    make(settings(prompt="Be quick."), rows)
    assert all(chat[0] == {"role": "system", "content": "You count.\n\nBe quick."} for chat in chats(make.out))


@given(st.lists(st.text("ab ", max_size=6), max_size=8), st.integers(1, 4), st.sampled_from(["shortest", "varied"]))
def test_no_two_kept_answers_have_the_same_words(good, keep, pick):
    found = chosen(good, Rft(keep=keep, pick=pick))
    words = [tuple(text.split()) for text in found]
    assert len(set(words)) == len(words) == min(keep, len({tuple(text.split()) for text in good}))
    assert set(found) <= set(good)
    assert [len(found[0])] == [min(map(len, good))] if good else not found


def test_varied_takes_what_is_least_like_the_shortest():
    good = ["3 + 4 = 7", "3 + 4 = 7 7", "seven, as three and four make it"]
    assert chosen(good, Rft(keep=2, pick="varied")) == [good[0], good[2]]
    assert chosen(good, Rft(keep=2, pick="shortest")) == good[:2]


@pytest.mark.parametrize(
    ("unread", "advice"), [(90, "rft.max_new_tokens"), (10, "rft.samples")], ids=["unreadable", "wrong"]
)
def test_too_low_a_yield_is_told_with_advice(unread, advice):
    found = Yield(questions=25, solved=1, samples=100, unread=unread, right=1, kept=1)
    with pytest.raises(DataError, match="1 of 25 questions") as caught:
        found.judge(Rft(), name="x.jsonl")
    assert caught.value.code == "yield_too_low"
    assert advice in caught.value.remedy
    found.judge(Rft(least_yield=0.04), name="x.jsonl")


def test_nothing_right_is_too_little_however_low_the_bar():
    with pytest.raises(DataError, match="0 of 3"):
        Yield(questions=3, solved=0, samples=3, unread=0, right=0, kept=0).judge(Rft(least_yield=0), name="x.jsonl")


def test_the_same_answer_is_not_asked_for_several_times():
    with pytest.raises(ConfigError, match=r"rft: temperature 0 gives 4 times the same answer; raise it, or set "):
        settings_from({"recipe": "rft", "rft": {"temperature": 0}}, where="the test")
    settings_from({"recipe": "rft", "rft": {"temperature": 0, "samples": 1}}, where="the test")
