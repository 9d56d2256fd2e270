"""Answers to many questions: the same ones in any batch, and none asked twice."""

from __future__ import annotations

from collections import ChainMap
from itertools import chain, islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import answers_kept
from finetuned.trainer.generate import Answered, Asker, ask, generating, key_of

TEXTS = {key_of(f"Say {n}"): f"Say {n}" + " please" * (n % 4) for n in range(10)}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def posed(model, tokenizer, monkeypatch):
    """A way to ask `TEXTS`; the texts of every batch are in `posed.batches`."""
    generate = model.generate

    def watched(*, input_ids, **options):
        one.batches.append(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return generate(input_ids=input_ids, **options)

    def one(file, texts=TEXTS, *, batches=None, **options) -> dict[str, Answered]:
        with generating(model, tokenizer):
            asker = Asker(model, tokenizer, max_new_tokens=8, **options)
            return dict(ChainMap(*islice(ask(asker, texts, file), batches)))

    one.batches = []
    monkeypatch.setattr(model, "generate", watched)
    return one


def texts_of(found: dict[str, Answered]) -> dict[str, str]:
    return {key: one.text for key, one in found.items()}


def test_a_batch_is_of_like_length_and_changes_no_answer(posed, tmp_path):
    alone = posed(tmp_path / "alone", rows=1)
    posed.batches.clear()
    together = posed(tmp_path / "together", rows=4)
    assert texts_of(together) == texts_of(alone)
    assert sorted(together) == sorted(TEXTS)
    assert any(one.text for one in together.values())
    assert [len(batch) for batch in posed.batches] == [4, 4, 2]
    lengths = [len(text) for text in chain(*posed.batches)]
    assert lengths == sorted(lengths, reverse=True)


def test_what_was_answered_before_a_kill_is_not_asked_again(posed, tmp_path):
    whole = posed(tmp_path / "whole", rows=2)
    posed.batches.clear()
    file = tmp_path / "kept"
    posed(file, rows=2, batches=3)  # the first is what was kept, which is nothing
    file.write_bytes(file.read_bytes() + b'{"torn')
    assert len(posed.batches) == 2
    again = posed(file, rows=2)
    assert texts_of(again) == texts_of(whole)
    assert sorted(chain(*posed.batches)) == sorted(TEXTS.values())
    posed.batches.clear()
    assert posed(file) == again
    assert posed.batches == []


def test_an_answer_says_whether_the_model_ended_it(posed, tokenizer, model, tmp_path, monkeypatch):
    def ends_at_once(*, input_ids, **_):
        answers = torch.tensor([[5, tokenizer.eos_token_id], [5, 6]])[: len(input_ids)]
        return torch.cat([input_ids, answers], dim=1)

    monkeypatch.setattr(model, "generate", ends_at_once)
    two = dict(list(TEXTS.items())[:2])
    assert sorted(one.ended for one in posed(tmp_path / "kept", two).values()) == [False, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_that_memory_did_not_hold_makes_the_ones_after_it_smaller(
    posed, model, tmp_path, monkeypatch, temperature
):
    undisturbed = posed(tmp_path / "undisturbed", temperature=temperature)
    generate, sizes = model.generate, []

    def short_of_memory(*, input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", short_of_memory)
    assert texts_of(posed(tmp_path / "kept", rows=4, temperature=temperature)) == texts_of(undisturbed)
    assert sizes == [4, 2, 2, 2, 2, 2]


def test_a_half_that_was_kept_moves_no_question_into_another_batch(posed, model, tmp_path, monkeypatch):
    posed(tmp_path / "undisturbed", rows=4)
    undisturbed, posed.batches = posed.batches, []
    generate = model.generate

    def short_of_memory(*, input_ids, **options):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return generate(input_ids=input_ids, **options)

    with monkeypatch.context() as short:
        short.setattr(model, "generate", short_of_memory)
        posed(tmp_path / "kept", rows=4, batches=2)  # the first is what was kept, which is nothing
    posed(tmp_path / "kept", rows=4)
    assert posed.batches == [undisturbed[0][:2], undisturbed[0][2:], *undisturbed[1:]]


def test_an_error_is_told_and_not_kept(posed, model, tmp_path, monkeypatch):
    file = tmp_path / "kept"
    one = dict(list(TEXTS.items())[:1])
    with monkeypatch.context() as broken:
        broken.setattr(model, "generate", lambda **_: 1 / 0)
        assert [answer.error for answer in posed(file, one).values()] == ["division by zero"]
    assert [answer.error for answer in posed(file, one).values()] == [None]
    assert [answer["error"] for _, answer in answers_kept(file)] == [None]


@pytest.mark.parametrize("batches", range(1, 5))
def test_after_a_kill_the_answers_are_drawn_that_would_have_been_drawn(posed, tmp_path, batches):
    """Killed after so many batches, in the middle of a line. What is left comes in the same batches as undisturbed."""
    drawn = {"rows": 3, "temperature": 1.0, "seed": 5}
    whole = posed(tmp_path / "whole", **drawn)
    undisturbed, posed.batches = posed.batches, []
    file = tmp_path / "kept"
    posed(file, batches=batches + 1, **drawn)
    file.write_bytes(file.read_bytes()[:-7])  # the last of them is torn
    del posed.batches[-1]
    assert texts_of(posed(file, **drawn)) == texts_of(whole)
    assert posed.batches == undisturbed
    assert len(set(texts_of(whole).values())) > 1, "nothing is drawn"
    assert sorted(answers_kept(file)) == sorted(answers_kept(tmp_path / "whole"))


def test_what_is_drawn_for_a_question_does_not_follow_from_those_beside_it(posed, tmp_path):
    drawn = {"temperature": 1.0, "seed": 5}
    found = [texts_of(posed(tmp_path / str(rows), rows=rows, **drawn)) for rows in (1, 2, 10)]
    assert found[0] == found[1] == found[2]
    few = dict(list(TEXTS.items())[3:5])
    assert texts_of(posed(tmp_path / "few", few, **drawn)).items() <= found[0].items()
    assert texts_of(posed(tmp_path / "seed", temperature=1.0, seed=6)) != found[0]
