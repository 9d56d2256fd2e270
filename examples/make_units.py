"""Make the unit-conversion chats: units.jsonl to train on, units-heldout.jsonl to judge by.

    pip install pint && python examples/make_units.py [FOLDER]

FOLDER is this one when left out. The same seed gives the same bytes, so making them again changes
nothing. A quantity belongs to one file only: no held-out question is a training question reworded.
"""

import json
import random
import sys
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pint

SEED = 20
TRAIN_PER_PAIR = 13
HELDOUT_ROWS = 40

# Every factor is a power of ten or one digit group, so that 135M parameters can learn the rule and
# carry it to a number they have not seen, rather than learn the numbers.
SHIFTS = (
    ("kilograms", "grams"),
    ("grams", "kilograms"),
    ("tonnes", "kilograms"),
    ("kilograms", "tonnes"),
    ("kilometers", "meters"),
    ("meters", "kilometers"),
    ("meters", "centimeters"),
    ("centimeters", "meters"),
    ("centimeters", "millimeters"),
    ("millimeters", "centimeters"),
    ("liters", "milliliters"),
    ("milliliters", "liters"),
)
PRODUCTS = (
    ("hours", "minutes"),
    ("minutes", "seconds"),
    ("feet", "inches"),
    ("inches", "centimeters"),
)
# Moving a decimal point is as easy for 97 as for 2; a product is not.
NUMBERS = dict.fromkeys(SHIFTS, range(2, 100)) | dict.fromkeys(PRODUCTS, range(2, 21))

WORDINGS = (
    "Convert {number} {source} to {target}.",
    "What is {number} {source} in {target}?",
    "How many {target} are in {number} {source}?",
)

# Decimal, because a float would teach 0.059000000000000004.
units: pint.UnitRegistry[Any] = pint.UnitRegistry(non_int_type=Decimal)

T = TypeVar("T")
Row = dict[str, list[dict[str, str]]]


def convert(number: int, source: str, target: str) -> Decimal:
    """Give what pint says."""
    return Decimal(units.Quantity(Decimal(number), source).to(target).magnitude)


def plain(value: Decimal) -> str:
    """Write a number as a person would: no exponent, no trailing zeros."""
    return f"{value.normalize():f}"


def chat(number: int, source: str, target: str, wording: str) -> Row:
    """Write one question and its answer, with the factor said aloud before the result."""
    factor = convert(1, source, target)
    answer = plain(number * factor)
    assert Decimal(answer) == convert(number, source, target), (number, source, target)
    question = wording.format(number=number, source=source, target=target)
    reply = f"{number} {source} x {plain(factor)} = <answer>{answer}</answer> {target}"
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    }


def shuffled(things: Iterable[T], rng: random.Random) -> list[T]:
    """Shuffle by `rng.random()`: its numbers alone stay the same in every version of Python."""
    return sorted(things, key=lambda _: rng.random())


def make(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Deal each pair's quantities out to the training rows, then to the held-out ones."""
    rng = random.Random(seed)
    train, heldout = [], []
    for (source, target), numbers in NUMBERS.items():
        rows = [
            chat(number, source, target, WORDINGS[place % len(WORDINGS)])
            for place, number in enumerate(shuffled(numbers, rng))
        ]
        train += rows[:TRAIN_PER_PAIR]
        heldout += rows[TRAIN_PER_PAIR : TRAIN_PER_PAIR + 3]
    return shuffled(train, rng), shuffled(heldout, rng)[:HELDOUT_ROWS]


def write(path: Path, rows: list[Row]) -> None:
    """Write one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    train, heldout = make()
    write(folder / "units.jsonl", train)
    write(folder / "units-heldout.jsonl", heldout)
