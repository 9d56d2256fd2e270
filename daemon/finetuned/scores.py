"""What a measurement found, as a table and in sentences. Pure: the facts of `finetuned eval` in, words out.

Terminal, model card and log have them from here, so that they say the same.
"""

from __future__ import annotations

from typing import Any

_NAMED = 3  # lines of rows that were seen in training


def table(facts: dict[str, Any]) -> list[list[str]]:
    """Give a header, and a line for each model: each figure with its 95% interval."""
    seen = len(facts["overlap"]["rows"])
    header = ["", "loss", "perplexity", "accuracy", "answer rate"]
    lines = [header + [f"accuracy without the {seen} seen"] * bool(seen)]
    for model in facts["models"]:
        line = [model["name"], _number(model["loss"], ".4f"), _number(model["perplexity"], ",.2f")]
        line += [_share(model["accuracy"]), _share(model["answer_rate"])]
        lines.append(line + [_share(model["accuracy_unseen"])] * bool(seen))
    return lines


def sentences(facts: dict[str, Any]) -> list[str]:
    """Give what else is to be said: who is better, what was seen in training, what was cut off."""
    return [*_compared(facts), *_seen(facts), *_troubles(facts)]


def headline(facts: dict[str, Any]) -> str:
    """Give the newest model's figures beside the first one's, in one line."""
    first, last = facts["models"][0], facts["models"][-1]
    parts = []
    for name, shown in (("accuracy", _percent), ("loss", _four)):
        if last[name] is not None:
            beside = f" ({first['name']} {shown(first[name])})" if first is not last else ""
            parts.append(f"{name.replace('_', ' ')} {shown(last[name])}{beside}")
    return f"{facts['data']['file']}: {', '.join(parts)}"


def _compared(facts: dict[str, Any]) -> list[str]:
    return [
        f"{one['name']} against {one['other']}: {one['wins']} wins, {one['losses']} losses, {one['ties']} ties, "
        f"{_chance(one['p'])} (two-sided sign test)"
        for one in facts["compared"]
    ]


def _seen(facts: dict[str, Any]) -> list[str]:
    overlap = facts["overlap"]
    said = []
    if rows := overlap["rows"]:
        named = "; ".join(f"line {row['line']} ({row['file']}:{row['of_line']})" for row in rows[:_NAMED])
        more = ", ..." if len(rows) > _NAMED else ""
        said.append(
            f"CONTAMINATED: {len(rows)} of {facts['data']['rows']} rows stand in the training data: {named}{more}"
        )
    elif overlap["files"]:
        said.append(f"no row stands in the training data ({', '.join(overlap['files'])})")
    if overlap["missing"]:
        named = ", ".join(overlap["missing"])
        said.append(f"not looked for in the training data of {named}, which is not there (--trained-on FILE names it)")
    return said


def _troubles(facts: dict[str, Any]) -> list[str]:
    said = []
    for model in facts["models"]:
        if model["cut_off"]:
            said.append(f"cut off at {facts['max_new_tokens']} tokens: {model['cut_off']} of {model['name']}'s answers")
        if model["errors"]:
            said.append(f"not answered by {model['name']}: {model['errors']} of the questions ({model['first_error']})")
    return said


def _number(figure: dict[str, Any] | None, form: str) -> str:
    if figure is None:
        return "-"
    ends = "" if figure["low"] is None else f" ({figure['low']:{form}} to {figure['high']:{form}})"
    return f"{figure['value']:{form}}{ends}"


def _share(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['count']} of {figure['of']}, {figure['value']:.1%} ({figure['low']:.1%} to {figure['high']:.1%})"


def _percent(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.1%}"


def _four(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.4f}"


def _chance(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
