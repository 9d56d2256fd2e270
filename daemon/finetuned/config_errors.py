"""What is wrong with settings, in the words of somebody who writes a config.json; pydantic has some for programmers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_BRANCH = re.compile(r"\[|^(float|int|str|bool)$|^constrained-")  # names a branch of a union, no key of the user's
_SHOWN = 60  # characters of what was given
_TEXT, _NUMBER, _WHOLE, _SWITCH, _LIST, _TABLE = (
    "a text",
    "a number",
    "a whole number",
    "true or false",
    "a list",
    'a table, {"key": value}',
)
_KINDS: dict[
    str, str | Callable[[dict[str, Any]], str | list[str]]
] = {  # what a value must be, by pydantic's name for the error
    "string_type": _TEXT,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": _NUMBER,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "list_type": _LIST,
    "tuple_type": _LIST,
    "dict_type": _TABLE,
    "model_type": _TABLE,
    "literal_error": lambda context: [f'"{word}"' for word in re.findall("'([^']*)'", context["expected"])],
    "greater_than": lambda context: f"more than {context['gt']:g}",
    "greater_than_equal": lambda context: f"at least {context['ge']:g}",
    "less_than": lambda context: f"less than {context['lt']:g}",
    "less_than_equal": lambda context: f"at most {context['le']:g}",
    "string_too_short": lambda context: _long("a text", context["min_length"], "characters"),
    "too_short": lambda context: _long("a list", context["min_length"], "entries"),
    "too_long": lambda context: f"a list of at most {context['max_length']}",
    "string_pattern_mismatch": lambda context: _alternatives(context["pattern"]),
}
_USUAL = {  # told with a bad value
    "learning_rate": "usual are 2e-4 for adapters and 1e-5 for tuning full",
    "gpus": "leave it out for all",
}


def lines(error: ValidationError, model: type[BaseModel], *, whole: type[BaseModel] | None = None) -> list[str]:
    """Give a line for each setting that cannot be used: its place, what it must be, and what it is.

    Where `model` is a part of config.json, `whole` has the settings that belong elsewhere in it.
    """
    wanted: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    said: dict[str, list[str]] = {}
    near: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        keys = [str(part) for part in takewhile(lambda part: not _BRANCH.search(str(part)), problem["loc"])]
        place = ".".join(keys)
        found = _KINDS.get(problem["type"])
        if found is not None:
            kinds = wanted.setdefault(place, [])
            kind = found if isinstance(found, str) else found(problem.get("ctx", {}))
            kinds += [kind] if isinstance(kind, str) else kind
            given[place] = _shown(problem["input"])
            if problem["type"] == "literal_error":
                words = [word.strip('"') for word in kind]
                near.setdefault(place, []).extend(get_close_matches(str(problem["input"]).lower(), words, 1))
        else:
            said.setdefault(place, []).append(_sentence(problem, keys, model, whole or model))
    for place, kinds in wanted.items():
        usual = f"; {_USUAL[place]}" if place in _USUAL else ""
        meant = f"; did you mean {near[place][0]}?" if near.get(place) else ""
        said.setdefault(place, []).append(f"must be {_any_of(kinds)}, not {given[place]}{meant}{usual}")
    return [f"{place}: {'; or: '.join(texts)}" if place else "; or: ".join(texts) for place, texts in said.items()]


def _sentence(problem: Any, keys: Sequence[str], model: type[BaseModel], whole: type[BaseModel]) -> str:
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] == "extra_forbidden":
        if model is not whole and len(keys) == 1 and keys[0] in whole.model_fields:
            return "no such setting here; it belongs at the top of config.json"
        near = get_close_matches(keys[-1], _known(model, keys[:-1]), 1)
        return "no such setting" + (f"; did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else "")
    return str(problem["msg"]).removeprefix("Value error, ")


def _known(model: type[BaseModel], keys: Sequence[str]) -> list[str]:
    """Give the settings that there are in a table, by the keys that lead to it."""
    for key in keys:
        field = model.model_fields.get(key)
        tables = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = next((one for one in tables if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _any_of(kinds: Sequence[str]) -> str:
    *others, last = dict.fromkeys(kinds)
    return f"{', '.join(others)} or {last}" if others else last


def _long(what: str, least: int, of: str) -> str:
    return f"{what} that is not empty" if least == 1 else f"{what} of at least {least} {of}"


def _alternatives(pattern: str) -> list[str]:
    """Read a pattern of alternatives, ^(auto|cpu)$; what may stand behind one is left out."""
    words = re.sub(r"\([^()]*\)\?", "", pattern).removeprefix("^(").removesuffix(")$")
    return [f'"{word}"' for word in words.split("|")]
