"""Judges: what is right, what can be read, and what no text can do to them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetuned.config import settings_from
from finetuned.errors import ConfigError
from finetuned.judges import KINDS, answer_in, judge, suits

WAYS = {"regex": {"pattern": r"Answer: (\w+)"}}
JUDGES = {kind: judge(kind, **WAYS.get(kind, {})) for kind in KINDS}

RIGHT, WRONG, UNREAD = "right", "wrong", "unread"
TABLE = [
    ("exact", " Paris\n", "Paris", RIGHT),
    ("exact", "paris", "Paris", WRONG),
    ("exact", "I say <answer> Paris </answer>.", "Paris", RIGHT),
    ("exact", "Paris", "So <answer>Paris</answer> it is", RIGHT),
    ("exact", "<answer>Rome</answer> no, <answer>Paris</answer>", "Paris", RIGHT),
    ("exact", "<answer>Par", "Par", UNREAD),  # cut off
    ("exact", " \n", "Paris", UNREAD),
    ("number", "89 cm x 0.01 = <answer>0.89</answer> m", "0.89", RIGHT),
    ("number", "5 and then 7.", "7", RIGHT),
    ("number", "7 and then 5", "7", WRONG),
    ("number", "about 27.9400001", "27.94", RIGHT),
    ("number", "about 27.95", "27.94", WRONG),
    ("number", "0.0000002", "0.0000001", WRONG),  # the tolerance is a share
    ("number", "1,234.50", "1234.5", RIGHT),
    ("number", "1.234,5", "1234.5", RIGHT),
    ("number", "0,5", "0.5", RIGHT),
    ("number", "0,125", "0.125", RIGHT),
    ("number", "1/4", "3/4", WRONG),
    ("number", "0.75", "3/4", RIGHT),
    ("number", "2 x 10^3", "3 x 10^3", WRONG),
    ("number", r"$1.5 \times 10^{-3}$", "0.0015", RIGHT),
    ("number", "5 m2", "5", RIGHT),
    ("number", "it fell by -3", "3", WRONG),
    ("number", "10-3", "3", RIGHT),
    ("number", "\u22124", "-4", RIGHT),
    ("number", "none at all", "3", UNREAD),
    ("number", "1, 2 and 3,4,5", "2", RIGHT),  # a list is no number
    ("number", "1/0", "0", UNREAD),
    ("contains", "It is New  York!", "new york", RIGHT),
    ("contains", "15", "5", WRONG),
    ("contains", "", "5", UNREAD),
    ("regex", "Answer: Rome\nAnswer: Paris", "Paris", RIGHT),
    ("regex", "Answer: Rome", "so: Answer: Rome", RIGHT),
    ("regex", "Rome", "Rome", UNREAD),
    ("json", '{"a": [1, true], "b": "x"}', '{"b":"x","a":[1.0,true]}', RIGHT),
    ("json", "[true]", "[1]", WRONG),
    ("json", "[1, 2]", "[2, 1]", WRONG),
    ("json", 'It is\n```json\n{"a": 1}\n```', '{"a": 1}', RIGHT),
    ("json", 'First {"a": 0} and at last {"a": {"b": 1}}.', '{"a": {"b": 1}}', RIGHT),
    ("json", "null", "null", RIGHT),
    ("json", '{"a": ', '{"a": 1}', UNREAD),
    ("json", "NaN", "NaN", UNREAD),
    ("json", '{"a": 1e99999999999999999999}', '{"a": 1}', UNREAD),
    ("choice", "B", "B", RIGHT),
    ("choice", "(b)", "B", RIGHT),
    ("choice", "B) because A is too small", "B", RIGHT),
    ("choice", "The answer is **C**, not A.", "C", RIGHT),
    ("choice", "I think a B is right", "B", RIGHT),
    ("choice", "Answer:B", "B", RIGHT),
    ("choice", "So: **Answer:**B", "B", RIGHT),
    ("choice", "B.Paris", "B", RIGHT),
    ("choice", "A or B", "B", UNREAD),
    ("choice", "E", "B", UNREAD),
]


@pytest.mark.parametrize(("kind", "answer", "expected", "verdict"), TABLE)
def test_a_judge_tells_right_from_wrong_from_what_cannot_be_read(kind, answer, expected, verdict):
    found = JUDGES[kind].verdict(answer, expected)
    assert (found.right, found.parsed) == {RIGHT: (True, True), WRONG: (False, True), UNREAD: (False, False)}[verdict]
    assert (found.extracted is not None) == found.parsed


def test_without_tolerance_numbers_are_compared_to_the_last_digit():
    strict = judge("number", tolerance=0)
    assert strict.verdict("0.890", "0.89").right
    assert not strict.verdict("9007199254740993", "9007199254740992.0").right


def test_choices_may_be_words():
    yes_or_no = judge("choice", choices=["yes", "no"])
    assert yes_or_no.verdict("Yes, it is.", "yes").right
    assert not yes_or_no.verdict("I know", "no").parsed


def test_a_judge_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'fair' is none of exact, number"):
        judge("fair")
    with pytest.raises(re.error):
        judge("regex", pattern="(")


@pytest.mark.parametrize(
    ("expected", "kind"),
    [
        (["<answer>0.89</answer> meters", "3"], "number"),
        (["A", "D"], "choice"),
        (['{"a": 1}', "[2]"], "json"),
        (["3", "Paris"], "exact"),
        ([], "exact"),
    ],
)
def test_a_judge_is_chosen_by_the_expected_answers_with_a_reason(expected, kind):
    assert suits(expected)[0] == kind
    assert suits(expected)[1]


def test_a_few_texts_among_numbers_are_told():
    assert suits(["1", "2", "Because."]) == ("exact", "2 of 3 expected answers are numbers")


TEXTS = st.text() | st.text('<>/answer0123456789.,-+eE*^x{}[]" :\n`AB|()')


@given(st.sampled_from(KINDS), TEXTS, TEXTS)
def test_no_text_breaks_a_judge_and_right_is_always_parsed(kind, answer, expected):
    found = JUDGES[kind].verdict(answer, expected)
    assert found.parsed or not found.right
    assert found.parsed == (found.extracted is not None)
    assert JUDGES[kind].can_judge(expected) or not found.right


@given(st.sampled_from(KINDS), TEXTS)
def test_an_answer_that_can_be_read_is_right_where_it_was_expected(kind, text):
    found = JUDGES[kind].verdict(text, text)
    assert found.right == found.parsed


@given(st.sampled_from(["exact", "number", "contains", "json", "choice"]), TEXTS, TEXTS)
def test_a_tag_says_the_same_as_its_content_alone_whatever_stands_around_it(kind, text, around):
    assume(answer_in(text) == text.strip() != "")
    assume("<" not in around)
    tagged = f"{around}<answer>{text}</answer>"
    assert JUDGES[kind].read(tagged) == JUDGES[kind].read(text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12))
def test_a_number_is_the_same_however_it_is_written(number):
    for written in (f"{number}", f"{number:,}", f"about {number:.4f}!", f"{number:.20e}"):
        assert JUDGES["number"].verdict(written, f"{number}").right, written


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.floats(0, 1))
def test_a_number_is_right_exactly_within_its_tolerance(given_number, expected, tolerance):
    found = judge("number", tolerance=tolerance).verdict(str(given_number), str(expected))
    assert found.right == (abs(given_number - expected) <= tolerance * abs(expected))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_is_equal_however_it_is_written(value):
    assume("answer>" not in json.dumps(value))
    written = json.dumps(value, indent=3, ensure_ascii=False, sort_keys=True)
    assert JUDGES["json"].verdict(written, json.dumps(value)).right


# -- in config.json


def test_a_judge_is_set_in_config_json_and_settled_by_the_expected_answers():
    judged, why = settings_from({"judge": {"kind": "number", "tolerance": 0.1}}, where="").judge.settle(["x"])
    assert (judged.kind, why) == ("number", "as set")
    assert judged.verdict("1.05", "1").right
    assert settings_from({}, where="").judge.settle(["1", "2"])[0].kind == "number"


@pytest.mark.parametrize(
    "wrong", [{"kind": "regex"}, {"pattern": "("}, {"kind": "fair"}, {"choices": ["A"]}, {"tolerance": -1}]
)
def test_a_judge_that_cannot_judge_is_refused_in_config_json(wrong):
    with pytest.raises(ConfigError, match="judge"):
        settings_from({"judge": wrong}, where="config.json")
