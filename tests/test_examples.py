"""The example data is what its generator writes, and it is right."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pint
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = ("units.jsonl", "units-heldout.jsonl")
REPLY = re.compile(r"(\d+) (\w+) x ([\d.]+) = <answer>([\d.]+)</answer> (\w+)")

# Fractions are exact, and not the arithmetic the generator uses.
units: pint.UnitRegistry[Any] = pint.UnitRegistry(non_int_type=Fraction)


class Exchange(NamedTuple):
    """One row, taken apart."""

    question: str
    number: str
    source: str
    factor: str
    answer: str
    target: str


def read(name: str) -> list[Exchange]:
    """Read a file's rows; a row of another shape is an error."""
    exchanges = []
    for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        reply = REPLY.fullmatch(assistant["content"])
        assert reply, line
        exchanges.append(Exchange(user["content"], *reply.groups()))
    return exchanges


def test_the_generator_reproduces_the_committed_files(tmp_path: Path) -> None:
    """Anyone who runs it gets these very bytes."""
    subprocess.run([sys.executable, EXAMPLES / "make_units.py", tmp_path], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_there_is_enough_to_learn_from_and_to_judge_by() -> None:
    """Training has 200 different questions or more, held-out 40 on the same conversions."""
    train, heldout = map(read, FILES)
    assert len({row.question for row in train}) == len(train) >= 200
    assert len({row.question for row in heldout}) == len(heldout) == 40
    assert {(row.source, row.target) for row in heldout} <= {(r.source, r.target) for r in train}


def test_nothing_held_out_was_trained_on() -> None:
    """No held-out question is a training question, nor one in other words."""
    train, heldout = map(read, FILES)
    assert not {row.question for row in heldout} & {row.question for row in train}
    assert not {row[1:] for row in heldout} & {row[1:] for row in train}


@pytest.mark.parametrize("name", FILES)
def test_every_answer_is_right(name: str) -> None:
    """The factor and the answer are pint's, exactly, and answer the question that was asked."""
    for row in read(name):
        assert f" {row.number} {row.source}" in row.question, row
        assert row.target in re.findall(r"\w+", row.question), row
        quantity = units.Quantity(Fraction(row.number), row.source)
        assert quantity.to(row.target).magnitude == Fraction(row.answer), row
        assert Fraction(row.number) * Fraction(row.factor) == Fraction(row.answer), row


def test_the_sums_of_recipe_hybrid_are_right_and_reproduced(tmp_path: Path) -> None:
    """A judge that reads the last number finds the sum, and no sum that is held out is trained."""
    subprocess.run([sys.executable, EXAMPLES / "hybrid" / "make_sums.py", tmp_path], check=True)
    sums: list[set[str]] = []
    for name in ("sums.jsonl", "sums.eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "hybrid" / name).read_bytes()
        rows = [json.loads(line)["messages"] for line in (tmp_path / name).read_text().splitlines()]
        for asked, told in rows:
            one, other = map(int, re.findall(r"\d+", asked["content"]))
            assert int(re.findall(r"\d+", told["content"])[-1]) == one + other
        sums.append({asked["content"] for asked, _ in rows})
    assert len(sums[0]) == 48
    assert not sums[0] & sums[1]
