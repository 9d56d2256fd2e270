"""`finetuned eval`: a model that learned one answer is measured, and nothing on the way looks an answer up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from conftest import answers_kept, eventually, make_home, write_jsonl
from finetuned.measure import render
from test_training import Run


def rows(answer: str, *, start: int = 0, count: int = 12) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is the number of day {n}?" + " Please." * (n % 3)},
                {"role": "assistant", "content": f"<answer>{answer}</answer>"},
            ]
        }
        for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def loud_model(tmp_path_factory, tiny_model) -> Path:
    """The tiny model with logits large enough that an adapter can make it sure of something."""
    folder = tmp_path_factory.mktemp("loud-model")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, loud_model) -> Path:
    """An adapter that says 7 to everything."""
    folder = tmp_path_factory.mktemp("eval")
    data = write_jsonl(folder / "data.jsonl", rows("7", count=16))
    settings = {"model": str(loud_model), "learning_rate": 1e-2, "epochs": 15, "max_length": 128}
    return Run(folder / "job", data, **settings).done().adapter


@pytest.fixture
def seven(home, trained) -> Path:
    folder = home.adapters / "seven"
    shutil.copytree(trained, folder)
    return folder


def command(base, *words: object) -> list[str]:
    root = base.root if hasattr(base, "root") else base
    return [sys.executable, "-m", "finetuned", "eval", "--base-dir", str(root), *map(str, words)]


def measured(base, *words: object, code: int = 0) -> dict:
    done = subprocess.run(command(base, *words, "--json"), capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else {"said": done.stderr}


def said_by(facts: dict, model: str) -> list[str]:
    return [row["models"][model]["answer"] for row in facts["answers"]]


def test_what_was_learned_is_told_from_what_was_not_with_intervals_beside_the_base(home, seven, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", rows("7", start=100, count=6) + rows("8", start=200, count=4))
    facts = measured(home, "seven", "--data", held, "--max-new-tokens", 24)
    base, adapter = facts["models"]
    assert (base["name"], adapter["name"], facts["judge"]["kind"]) == ("base", "seven", "number")
    assert (adapter["accuracy"]["count"], adapter["accuracy"]["of"]) == (6, 10)
    assert adapter["accuracy"]["low"] < 0.6 < adapter["accuracy"]["high"]
    assert adapter["answer_rate"]["count"] == 10
    assert base["accuracy"]["count"] == 0
    assert adapter["loss"]["high"] < base["loss"]["low"]
    assert adapter["loss"]["low"] < adapter["loss"]["value"] < adapter["loss"]["high"]
    (compared,) = facts["compared"]
    assert (compared["wins"], compared["losses"], compared["ties"]) == (6, 0, 4)
    assert compared["p"] == pytest.approx(2 / 64)
    assert facts["overlap"]["missing"] == ["seven"]  # its training data is in no archive

    text = render(facts)
    assert "6 of 10, 60.0% (31.3% to 83.2%)" in text
    assert "seven against base: 6 wins, 0 losses, 4 ties" in text


def test_other_expected_answers_change_the_marks_and_no_answer(seven, home, tmp_path):
    """Each in a base directory of its own, so that nothing is kept from the one for the other."""
    answers = []
    for expected, right in (("7", 6), ("31", 0)):
        base = make_home(tmp_path / expected)
        held = write_jsonl(tmp_path / f"{expected}.jsonl", rows(expected, start=100, count=6))
        facts = measured(base, seven, "--data", held, "--max-new-tokens", 24)
        assert facts["models"][1]["accuracy"]["count"] == right
        answers.append([said_by(facts, name) for name in ("base", "seven")])
        for file in (base.machinery / "evaluations").iterdir():
            assert {frozenset(one) for _, one in answers_kept(file)} == {frozenset({"text", "ended", "error"})}
    assert answers[0] == answers[1]


def test_a_planted_leak_is_flagged_and_the_accuracy_without_it_told(home, seven, tmp_path):
    leak = rows("7", start=3, count=2)
    held = write_jsonl(tmp_path / "held.jsonl", rows("8", start=100, count=4) + leak)
    words = ("seven", "--data", held, "--max-new-tokens", 24)
    trained_on = write_jsonl(tmp_path / "train.jsonl", rows("7", count=16))
    facts = measured(home, *words, "--trained-on", trained_on)
    assert [(row["line"], row["file"], row["of_line"]) for row in facts["overlap"]["rows"]] == [
        (5, "train.jsonl", 4),
        (6, "train.jsonl", 5),
    ]
    adapter = facts["models"][1]
    assert (adapter["accuracy"]["count"], adapter["accuracy"]["of"]) == (2, 6)
    assert (adapter["accuracy_unseen"]["count"], adapter["accuracy_unseen"]["of"]) == (0, 4)
    assert [row["seen_in_training"] for row in facts["answers"]] == [False] * 4 + [True] * 2
    text = render(facts)
    assert "CONTAMINATED: 2 of 6 rows stand in the training data: line 5 (train.jsonl:4)" in text
    assert "accuracy without the 2 seen" in text


def test_an_evaluation_that_is_killed_asks_nothing_twice(home, seven, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", rows("7", start=100, count=40))
    words = ("seven", "--data", held, "--max-new-tokens", 100)
    kept = home.machinery / "evaluations"
    home.machinery.joinpath("evaluations").mkdir()
    process = subprocess.Popen(command(home, *words), start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: any(file.read_bytes().count(b"\n") for file in kept.glob("*.jsonl")))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {file: file.read_bytes() for file in kept.glob("*.jsonl")}
    facts = measured(home, *words)
    for file in kept.glob("*.jsonl"):
        assert file.read_bytes().startswith(before.get(file, b""))
        keys = [key for key, _ in answers_kept(file)]
        assert len(keys) == len(set(keys)) == 40
    anew = measured(make_home(tmp_path / "anew"), seven, *words[1:])
    assert said_by(anew, "seven") == said_by(facts, "seven")


def test_two_adapters_are_held_against_each_other_and_a_model_stands_alone(home, seven, loud_model, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", rows("7", start=100, count=5))
    shutil.copytree(seven, tmp_path / "seven")
    facts = measured(home, "seven", "--against", tmp_path / "seven", "--data", held, "--max-new-tokens", 24)
    assert [model["name"] for model in facts["models"]] == ["base", str(tmp_path / "seven"), str(seven)]
    last = facts["compared"][-1]
    assert (last["name"], last["other"]) == (str(seven), str(tmp_path / "seven"))
    assert (last["wins"], last["losses"], last["ties"], last["p"]) == (0, 0, 5, 1.0)

    words = ("--max-new-tokens", 24, "--pattern", r"<answer>(\d)")  # an option of one judge alone names the judge
    alone = measured(home, "--model", loud_model, "--data", held, *words)
    assert alone["judge"]["kind"] == "regex"
    assert [model["name"] for model in alone["models"]] == [str(loud_model)]
    assert alone["models"][0]["loss"] == facts["models"][0]["loss"]
    assert alone["compared"] == []
    assert (
        len(list(home.machinery.glob("evaluations/*"))) == 2
    )  # the base is asked once, and weights are told by themselves


def test_texts_have_a_loss_and_no_accuracy(home, seven, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": f"Day {n} had a number."} for n in range(5)])
    facts = measured(home, "seven", "--data", held)
    assert facts["models"][1]["accuracy"] is None
    assert facts["models"][1]["loss"]["value"] > 0


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("seven", "--judge", "json"), (1, "held.jsonl:1: 3 of 3 expected answers cannot be judged by json")),
        (("seven", "--judge", "regex"), (78, "kind regex needs a pattern")),
        (("seven", "--judge", "exact", "--tolerance", "0.1"), (78, "--tolerance is for judge number")),
        (
            ("seven", "--pattern", "x", "--choices", "a,b"),
            (78, "--choices is for judge choice, and the judge is regex"),
        ),
        (("eight",), (78, "there is no adapter in such a folder")),
        (("seven", "--judge", "exact"), (1, "1 of 4 rows cannot be used")),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(home, seven, tmp_path, words, refused):
    """Every row must be good."""
    code, said = refused
    held = write_jsonl(tmp_path / "held.jsonl", rows("seven", count=3) + [{"messages": []}] * ("exact" in words))
    assert said in measured(home, *words, "--data", held, code=code)["said"]


def test_without_an_adapter_or_a_base_directory_it_says_what_to_name(tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", rows("7", count=3))
    words = [sys.executable, "-m", "finetuned", "eval", "--data", held]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert done.stderr.startswith(f"finetuned: {tmp_path}: there is no adapter yet. This is no base directory")
