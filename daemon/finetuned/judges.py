"""Judges of answers: is this one right, and could it be read at all? Pure, standard library only: an answer and the
expected one in, a verdict out. For `finetuned eval`, and for whatever learns from answers that were checked.

Where a text holds `<answer>...</answer>` the last such tag is its answer; one that is opened and never closed was cut
off and cannot be read. The expected answer is read in the same way, so that a row of training data will do for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import partial
from operator import eq
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["exact", "number", "contains", "regex", "json", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LETTERS = ("A", "B", "C", "D")
TOLERANCE = 1e-6

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_OPENED = re.compile("<answer>", re.IGNORECASE)
_STRUCTURE = re.compile(r"[{\[]")
_FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_LONGEST_NUMBER = 300  # characters
_MINUS = "\u2212"
# A sign is one where nothing stands before it; digits behind a letter belong to a name (m2, H2O).
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.,)\]])[-+\u2212])?(?<![A-Za-z_\d])(?P<digits>(?:\d|(?<![\d.,])[.,](?=\d))[\d.,]*(?<![.,]))"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\d)"
    r"|\s*(?:x|\*|\u00d7|\u00b7|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<power>[-+\u2212]?\d{1,3})(?!\d)\}?)?"
    r"(?:\s*/\s*(?P<below>\d+)(?![\d.,]*[\d/]))?"
)
_COMMAS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")  # 1,234.5; but 0,125 is little
_POINTS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}\.\d{3},\d+")  # 1.234,5; but 1.234 is little


class Verdict(NamedTuple):
    """What a judge says: whether an answer is right, whether one could be read at all, and what was read."""

    right: bool
    parsed: bool
    extracted: str | None


class Judge(NamedTuple):
    """Reads what is answered and what was expected, None where nothing can be read, and compares the two."""

    kind: Kind
    read: Callable[[str], str | None]
    wanted: Callable[[str], str | None]
    same: Callable[[str, str], bool] = eq

    def verdict(self, answer: str, expected: str) -> Verdict:
        """Judge an answer. None is right where the expected one cannot be read."""
        found, wanted = self.read(answer), self.wanted(expected)
        right = found is not None and wanted is not None and self.same(found, wanted)
        return Verdict(right, found is not None, found)

    def can_judge(self, expected: str) -> bool:
        """Whether an answer can be held against this expected one."""
        return self.wanted(expected) is not None


def judge(
    kind: Kind, *, tolerance: float = TOLERANCE, pattern: str | None = None, choices: Sequence[str] = LETTERS
) -> Judge:
    """Give a judge. All compare what was read of the answer with what was read of the expected one.

    - exact: the text, without white space around it
    - number: the last number, at most `tolerance` times the expected one away
    - contains: the expected text stands in the answer, whole words, in upper or lower case
    - regex: what `pattern` captures (its first group, or all) where it matches last, in the whole text with its tags;
      an expected text that it does not match is taken as it is
    - json: a value that is equal as JSON; in a longer text the last object or list
    - choice: one of `choices`, and no other of them

    Raises ValueError for another kind, re.error for a pattern that is none.
    """
    if kind == "exact":
        return Judge(kind, answer_in, answer_in)
    if kind == "number":
        return Judge(kind, _number, _number, partial(_close, Fraction(tolerance)))
    if kind == "contains":
        return Judge(kind, _folded, _folded, _holds)
    if kind == "regex":
        captured = partial(_captured, re.compile(pattern or "(?!)", re.MULTILINE))
        return Judge(kind, captured, lambda text: captured(text) or answer_in(text))
    if kind == "json":
        return Judge(kind, _json, _json)
    if kind == "choice":
        chosen = partial(_choice, tuple(choices))
        return Judge(kind, chosen, chosen)
    raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")


def suits(expected: Iterable[str]) -> tuple[Kind, str]:
    """Choose a kind by the expected answers: the kind and why."""
    texts = [answer_in(text) or "" for text in expected]
    if texts and all(_value(_NUMBER.fullmatch(text)) is not None for text in texts):
        return "number", "every expected answer is a number"
    if texts and all(text in LETTERS for text in texts):
        return "choice", "every expected answer is one of these letters"
    if texts and all(text[:1] in {"{", "["} and _json(text) for text in texts):
        return "json", "every expected answer is JSON"
    numbers = sum(_value(_NUMBER.fullmatch(text)) is not None for text in texts)
    return (
        "exact",
        f"{numbers} of {len(texts)} expected answers are numbers" if numbers else "the expected answers are texts",
    )


def answer_in(text: str) -> str | None:
    """Give what a text answers, without white space around it: in its last tag, or all of it where there is none."""
    tagged = _TAG.findall(text)
    if not tagged and _OPENED.search(text):
        return None
    return (tagged[-1] if tagged else text).strip() or None


def _folded(text: str) -> str | None:
    found = answer_in(text)
    return found and " ".join(found.casefold().split())


def _holds(found: str, wanted: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", found) is not None


def _captured(pattern: re.Pattern[str], text: str) -> str | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007, the last one is wanted
        pass
    found = last and (last[1] if pattern.groups else last[0])
    return found and (found.strip() or None)


def _number(text: str) -> str | None:
    """Give the last number as it is written. `1,234`, `3/4`, `1.5 x 10^3` are one each, and so is `0,5`."""
    written = [match[0] for match in _NUMBER.finditer(answer_in(text) or "") if _value(match) is not None]
    return written[-1] if written else None


def _value(match: re.Match[str] | None) -> Fraction | None:
    if match is None or len(match[0]) > _LONGEST_NUMBER:
        return None
    digits = match["digits"]
    if _COMMAS.fullmatch(digits):
        digits = digits.replace(",", "")
    elif _POINTS.fullmatch(digits):
        digits = digits.replace(".", "").replace(",", ".")
    elif digits.count(".") + digits.count(",") <= 1:
        digits = digits.replace(",", ".")
    else:
        return None  # a list or a date
    below = int(match["below"] or 1)
    if not below:
        return None
    sign = "-" if match["sign"] in {"-", _MINUS} else ""
    power = (match["exponent"] or match["power"] or "0").replace(_MINUS, "-")
    return Fraction(f"{sign}{digits}e{power}") / below


def _close(tolerance: Fraction, found: str, wanted: str) -> bool:
    given, expected = (_value(_NUMBER.fullmatch(text)) for text in (found, wanted))
    return given is not None and expected is not None and abs(given - expected) <= tolerance * abs(expected)


def _json(text: str) -> str | None:
    """Give the JSON in a text in one way of writing it: of equal values the same."""
    answer = answer_in(text) or ""
    for candidate in (answer, *reversed(_FENCE.findall(answer))):
        try:
            return _written(_DECODER.decode(candidate))
        except (ValueError, ArithmeticError, RecursionError):
            continue
    found, place = None, 0
    while start := _STRUCTURE.search(answer, place):
        try:
            value, place = _DECODER.raw_decode(answer, start.start())
            found = _written(value)
        except (ValueError, ArithmeticError, RecursionError):
            place = start.end()
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal, parse_constant=_no_number)


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)}: {_written(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, Decimal):
        return str(value.normalize()) if value else "0"
    return json.dumps(value, ensure_ascii=False)


def _choice(choices: tuple[str, ...], text: str) -> str | None:
    """Give the choice that a text names: alone, in front of all else (`B) because`), behind the word answer, or as the
    only one of them that occurs. A single letter counts in upper case alone: a is a word.
    """
    answer = answer_in(text)
    if answer is None:
        return None
    alone = answer.strip("()[]*.:, \t\n").casefold()
    for one in choices:
        if alone == one.casefold():
            return one
    names = {one if len(one) == 1 else one.casefold(): one for one in choices}
    flat = " ".join(re.sub(r"\w\w+", lambda word: word[0].casefold(), answer).split())
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    one = rf"\(?\*{{0,2}}(?P<name>{either})(?!\w)"
    if first := re.match(rf"{one}\*{{0,2}}[).:]", flat):
        return names[first["name"]]
    said = list(re.finditer(rf"\banswer(?: is)?:?\*{{0,2}} ?{one}", flat))
    if said:
        return names[said[-1]["name"]]
    found = {match[0] for match in re.finditer(rf"(?<!\w)(?:{either})(?!\w)", flat)}
    return names[found.pop()] if len(found) == 1 else None
