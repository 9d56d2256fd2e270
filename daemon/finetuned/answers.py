"""`finetuned predictions`: what a job's model answered before, while and after it learned, and how its benchmark went.
Reads the ledger.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import click

from finetuned.errors import harmless
from finetuned.events import EventType
from finetuned.found import job_named, ledger_to_read
from finetuned.home import Home
from finetuned.scores import headline

_WIDEST = 100  # characters of an answer


def gather(home: Home, name: str) -> dict[str, Any]:
    """Give a job's answers, as `--json` prints them. The newest job is taken whose id begins so. Raises HomeError."""
    with ledger_to_read(home) as ledger:
        job = job_named(ledger, name)
        told = ledger.events(job.id, EventType.BENCHMARK)
        measured = dict(told[-1].data) if told else None
        recipe = str(job.settings.get("recipe", "sft"))
        return {"job": job.id, "recipe": recipe, "predictions": ledger.predictions(job.id), "benchmark": measured}


def render(facts: dict[str, Any]) -> str:
    """Give them for people: a question, what was wanted, and the answer at each step where it changed."""
    measured = [f"benchmark {headline(facts['benchmark'])}"] if facts["benchmark"] else []
    if not facts["predictions"]:
        why = (
            "recipe rft learns answers of its own and asks no held-out rows. Set benchmark to have its model measured."
            if facts["recipe"] == "rft"
            else "no rows were held out, or predictions are off. Drop x.eval.jsonl beside x.jsonl, or set eval_file or "
            "eval_fraction."
        )
        why = f"{facts['job']} was not asked anything: {why}"
        return "\n".join([why, *map(_line, measured)])
    lines = [facts["job"], _score(facts["predictions"]), *map(_line, measured)]
    by_question = sorted(facts["predictions"], key=lambda one: (one["sample"], one["step"]))
    for _, run in groupby(by_question, key=lambda one: one["sample"]):
        answers = list(run)
        width = max(len(_step(one)) for one in answers)
        lines += ["", click.style(_line(answers[0]["prompt"]), bold=True), f"  {'wanted':<{width}}  {_wanted(answers)}"]
        before = None
        for one in answers:
            said = f"({one['error']})" if one["error"] else one["answer"]
            if said != before or one is answers[-1]:
                mark = click.style("  right", fg="green") if one["exact"] else ""
                lines.append(f"  {_step(one):<{width}}  {_line(said)}{mark}")
            before = said
    return "\n".join(lines)


def _score(predictions: list[dict[str, Any]]) -> str:
    steps = []
    for step, run in groupby(predictions, key=lambda one: one["step"]):
        answers = list(run)
        exact, alike = sum(one["exact"] for one in answers), sum(one["similarity"] or 0.0 for one in answers)
        steps.append(f"step {step}: {exact} of {len(answers)} exact, {alike / len(answers):.0%} alike")
    return "; ".join([steps[0], steps[-1]] if len(steps) > 1 else steps)


def _step(one: dict[str, Any]) -> str:
    return "before" if one["step"] == 0 else f"step {one['step']}"


def _wanted(answers: list[dict[str, Any]]) -> str:
    return _line(answers[0]["expected"])


def _line(text: str) -> str:
    flat = " ".join(harmless(text).split())
    return flat if len(flat) <= _WIDEST else f"{flat[:_WIDEST]}..."
