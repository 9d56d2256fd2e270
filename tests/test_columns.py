"""Texts side by side: nothing is lost, and no line is too long."""

from hypothesis import given
from hypothesis import strategies as st

from finetuned.trainer.columns import side_by_side

WORDS = st.text(st.sampled_from("ab 漢é\u0301\n"), max_size=200)


def test_lines_are_broken_between_words():
    assert side_by_side(["one two three", "four"], 19) == ["one two  | four", "three    |"]


def test_a_word_that_is_too_long_is_broken_within():
    assert side_by_side(["abcdefghij", "漢字漢字"], 13) == ["abcde | 漢字", "fghij | 漢字"]


@given(WORDS, WORDS, st.integers(9, 40))
def test_nothing_but_white_space_is_lost(one, other, width):
    lines = side_by_side([one, other], width)
    own = (width - 3) // 2
    left, right = ("".join(line.partition(" | " if " | " in line else " |")[part] for line in lines) for part in (0, 2))
    assert "".join(left.split()) == "".join(one.split())
    assert "".join(right.split()) == "".join(other.split())
    wide = [sum(2 if letter == "漢" else 0 if letter == "\u0301" else 1 for letter in line) for line in lines]
    assert all(cells <= 2 * own + 3 for cells in wide)
