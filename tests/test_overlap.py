"""A leak into the training data is found, and what only looks like one is not."""

from __future__ import annotations

import json
import random

import pytest

from conftest import row_of, write_jsonl
from finetuned.adapters import MANIFEST
from finetuned.durable import sha256_of
from finetuned.trainer.data import Source
from finetuned.trainer.overlap import learned_by, learned_from, overlapping


def sentence(seed: int, words: int = 30) -> str:
    draws = random.Random(seed)
    return " ".join(f"w{draws.randrange(9999)}" for _ in range(words))


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def held(*pairs: tuple[str, str]) -> list:
    return [row_of(("system", "Be brief."), ("user", q), ("assistant", a), line=n) for n, (q, a) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    "leaked",
    [
        chat("How tall is the oak?", "20 m"),
        chat("  how TALL is\nthe oak", "some other answer"),
        {"instruction": "How tall is the oak?", "output": "x"},
    ],
    ids=["the row", "its question in other letters", "its question in another format"],
)
def test_a_question_that_was_trained_on_is_found_with_its_line(tmp_path, leaked):
    file = write_jsonl(tmp_path / "train.jsonl", [leaked])
    rows = held(("How tall is the fir?", "30 m"), ("How tall is the oak?", "20 m"), ("How tall is the elm?", "10 m"))
    found = overlapping(rows, [Source(file, file.name)])
    assert {place: (seen.file, seen.line, seen.share) for place, seen in found.items()} == {1: ("train.jsonl", 1, 1.0)}


def test_a_long_row_is_found_though_words_were_changed_and_inside_a_longer_text(tmp_path):
    question, answer = sentence(1), sentence(2)
    words = f"{question} {answer}".split()
    words[20] = "changed"
    rows = held((question, answer), (sentence(3), sentence(4)))
    reworded = write_jsonl(tmp_path / "reworded.jsonl", [chat("What?", sentence(7)), chat("Say:", " ".join(words))])
    text = write_jsonl(
        tmp_path / "text.jsonl", [{"text": f"{sentence(5, 900)} {question} {answer} {sentence(6, 900)}"}]
    )
    assert [(place, seen.line) for place, seen in overlapping(rows, [Source(reworded, reworded.name)]).items()] == [
        (0, 2)
    ]
    assert list(overlapping(rows, [Source(text, text.name)])) == [0]
    assert overlapping(rows, []) == {}


def test_what_all_questions_share_makes_none_of_them_a_leak(tmp_path):
    """Long instructions that stand before every question, and the same form with another number."""
    instructions = sentence(1, 60)
    rows = held(*((f"{instructions} Number {n}?", f"It is {n * 7}.") for n in range(20)))
    file = write_jsonl(
        tmp_path / "train.jsonl", [chat(f"{instructions} Number {n}?", f"{n * 7}") for n in range(50, 90)]
    )
    assert overlapping(rows, [Source(file, file.name)]) == {}


def test_signs_and_digits_tell_questions_apart(tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", [chat("What is 3+4?", "7")])
    assert overlapping(held(("What is 3-4?", "-1"), ("What is 3+5?", "8")), [Source(file, file.name)]) == {}


def test_progress_is_told_and_may_end_it(tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", [chat(f"{n}?", "x") for n in range(2000)])

    def stop(share: float) -> None:
        assert 0 <= share <= 1
        raise InterruptedError

    with pytest.raises(InterruptedError):
        overlapping(held(("1?", "x")), [Source(file, file.name)], stop)


# -- what an adapter was trained on


def archived(archive, job: str, rows: list) -> dict:
    folder = archive / "2026-11" / job
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    file = write_jsonl(folder / f"{job}.jsonl", rows)
    return {"adapter": job, "job_id": job, "sha256": sha256_of(file)}


def test_all_that_an_adapter_builds_on_is_found_in_the_archive_of_its_base_directory(tmp_path):
    first = archived(tmp_path / "archive", "one", [chat("1?", "x")])
    second = archived(tmp_path / "archive", "two", [chat("2?", "x")])
    adapter = tmp_path / "adapters" / "two"
    adapter.mkdir(parents=True)
    (adapter / MANIFEST).write_text(json.dumps({**second, "chain": [first]}))
    learned = learned_by(adapter, None)
    assert [one.name for one in learned.files] == ["one.jsonl", "two.jsonl"]
    assert learned.missing == []


def test_data_that_is_gone_or_is_not_what_was_trained_on_is_told(tmp_path):
    first = archived(tmp_path / "archive", "one", [chat("1?", "x")])
    second = archived(tmp_path / "archive", "two", [chat("2?", "x")])
    own = write_jsonl(tmp_path / "own.jsonl", [chat("3?", "x")])
    chain = [{**first, "sha256": "0" * 64}, second, {"adapter": "elsewhere", "job_id": None, "sha256": None}]
    learned = learned_from({"chain": chain}, own=Source(own, "own.jsonl"), archive=tmp_path / "archive")
    assert [one.name for one in learned.files] == ["two.jsonl", "own.jsonl"]
    assert learned.missing == ["one", "elsewhere"]
    assert learned_from(second, name="two", archive=None).missing == ["two"]
