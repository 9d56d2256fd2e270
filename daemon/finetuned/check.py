"""`finetuned check`: ask a process that has the model's tokenizer what a file would be as a job, and print it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from finetuned.asking import ask, held_out_beside, terms
from finetuned.dataset.report import Fault, Report
from finetuned.errors import DataError, counted, harmless
from finetuned.findings import ERRORS, WARNINGS, Finding
from finetuned.gpu import first_gpu
from finetuned.home import printable
from finetuned.live import DoingLine, duration
from finetuned.spool.inbox import TABLES, remedy_for

_BAR = 40  # characters of a histogram's longest bar


def check_file(
    file: Path,
    *,
    base_dir: Path | None,
    profile: str = "",
    model: str | None = None,
    held_out: Path | None = None,
) -> dict[str, Any]:
    """Examine a file, and its held-out file, with the settings of the base directory, or the defaults where there is
    none. Without `held_out` the one that lies beside the file is taken.

    Raises FinetunedError; what is wrong with the file is in the answer.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise DataError("is no regular file", where=str(file), remedy="Save it as one first.", code="unreadable")
    for one in filter(None, (file, held_out)):
        if one.suffix.lower() in TABLES:
            raise DataError("is a table", where=str(one), remedy=remedy_for(one.name), code="unknown_format")
    found = terms(file, base_dir=base_dir, profile=profile, model=model)
    gpu = first_gpu()
    device = gpu.name if gpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu"
    line = DoingLine()
    try:
        answer = ask(
            "finetuned.trainer.check",
            file,
            found,
            gpu=gpu.uuid if gpu else None,
            heard=line.show,
            beside=str(held_out.absolute()) if held_out else held_out_beside(file),
            device=device,
        )
        return {**answer, "settings_from": found.source}
    finally:
        line.end()


def render(facts: dict[str, Any], *, colour: bool) -> str:
    """Give the report for people. Without colour what is learned stands between guillemets."""
    name = printable(os.fsencode(facts["file"]))
    lines: list[str] = []
    if "format" in facts:
        report = Report.from_dict(facts)
        lines += [f"{name}: {report.summary()}", f"model: {harmless(facts['model'])}"]
        lines.append(f"settings: {harmless(facts['settings_from'])}")
        lines += [f"teacher: {harmless(facts['teacher'])}"] if "teacher" in facts else []
        lines += _recipe(facts)
        lines += _findings("errors", report.faults, ERRORS, rows=0)
        lines += _findings("warnings", report.warnings, WARNINGS, rows=report.good_rows)
        lines += _held_out_findings(facts.get("held_out"))
        lines += _trained(facts)
        lines += _sample(facts["sample"], colour=colour, asked=bool(facts.get("answers")))
    if facts["unchecked"]:
        lines += ["", harmless(facts["unchecked"])]
    return "\n".join([*lines, "", _verdict(facts, name)]).lstrip("\n")


def _recipe(facts: dict[str, Any]) -> list[str]:
    """Name the recipe where it is not the usual one, or where settings of another were made."""
    judged = f", answers judged by {facts['judge']}" if "judge" in facts else ""
    idle = " and ".join(facts["idle"])
    unused = f"; {idle} in the settings {'counts' if len(facts['idle']) == 1 else 'count'} for nothing" if idle else ""
    return [f"recipe: {facts['recipe']}{judged}{unused}"] if unused or facts["recipe"] != "sft" else []


def _findings(title: str, found: dict[Any, Fault], table: Mapping[Any, Finding], *, rows: int) -> list[str]:
    lines = ["", title] if found else []
    for code, fault in sorted(found.items(), key=lambda item: -item[1].count):
        lines += [f"  {harmless(fault.sentence(code, '', rows=rows)).removesuffix('. ')}", f"    {table[code].remedy}"]
    return lines


def _held_out_findings(held_out: dict[str, Any] | None) -> list[str]:
    if held_out is None:
        return []
    name = harmless(held_out["file"])
    lines: list[str] = []
    for kind, table in (("errors", ERRORS), ("warnings", WARNINGS)):
        found = {code: Fault(one["count"], one["lines"], one["detail"]) for code, one in held_out[kind].items()}
        lines += _findings(f"{kind} in {name}", found, table, rows=0)
    return lines


def _trained(facts: dict[str, Any]) -> list[str]:
    if "training" not in facts:
        return []
    training, tokens, held_out = facts["training"], facts["tokens"], facts.get("held_out")
    if facts.get("answers"):
        return _asked(facts)
    lines = ["", "what would be trained", f"  rows          {training['rows']:>12,}"]
    if tokens:
        share = training["supervised"] / training["tokens"]
        lines += [
            f"  tokens        {training['tokens']:>12,}",
            f"  supervised    {training['supervised']:>12,}  ({share:.1%})",
            "",
            f"  tokens a row: {', '.join(f'{part} {value:,}' for part, value in tokens['lengths'].items())}",
            *_histogram(tokens["histogram"]),
        ]
    epochs = f"{training['epochs']:g} epoch{'s' * (training['epochs'] != 1)}"
    lines += [
        "",
        f"  {counted(training['steps'], 'step')} of {counted(training['rows_a_step'], 'row')}, {epochs}",
        f"  {_estimate(facts)}",
    ]
    if held_out:
        lines.append(f"  held out: {counted(held_out['rows'], 'row')} of {harmless(held_out['file'])}")
    return lines


def _asked(facts: dict[str, Any]) -> list[str]:
    """Tell what the model would answer; what it would learn of that nobody knows yet."""
    return [
        "",
        "what would be asked",
        f"  questions     {facts['training']['rows']:>12,}",
        f"  answers       {facts['answers']:>12,}",
        "",
        "  the right ones are learned; how many, and in how many steps, is known when they are made",
    ]


def _histogram(bars: list[list[int]]) -> list[str]:
    most = max(count for _, count in bars)
    wide = max(len(f"{to:,}") for to, _ in bars)
    return [f"  to {to:>{wide},}  {'#' * -(-count * _BAR // most):<{_BAR}}  {count:,}" for to, count in bars]


def _estimate(facts: dict[str, Any]) -> str:
    training, found = facts["training"], facts["estimate"]
    if not found:
        kind = harmless(f"{training['method']} on {training['model']} on this {training['device']}")
        return f"time and memory: no earlier job of {kind} to tell; `finetuned plan` predicts both"
    jobs = "the earlier job" if found["jobs"] == 1 else f"{found['jobs']} earlier jobs"
    return (
        f"time and memory: about {duration(found['minutes'] * 60)} at {found['tokens_per_second']:,.0f} tokens/s, and "
        f"{found['peak_bytes'] / 2**20:,.0f} MiB at the peak, as {jobs} of this model"
    )


def _sample(sample: dict[str, Any], *, colour: bool, asked: bool) -> list[str]:
    if not sample:
        return []
    pieces = [(harmless(piece), learned) for piece, learned in sample["pieces"]]
    text = "".join(_marked(piece, colour=colour) if learned else piece for piece, learned in pieces).rstrip()
    how = _learned("so") if colour else "«so»"
    what = "what its answers are held against" if asked else "what is learned"
    return [
        "",
        f"the row of line {sample['line']:,} as the model sees it; {what} is marked {how}",
        "",
        *(f"  {line}" for line in text.split("\n")),
    ]


def _marked(text: str, *, colour: bool) -> str:
    """Mark what is learned, in colour line by line: each is indented."""
    return "\n".join(_learned(line) for line in text.split("\n")) if colour else f"«{text}»"


def _learned(text: str) -> str:
    return click.style(text, fg="green", bold=True)


def _verdict(facts: dict[str, Any], name: str) -> str:
    if facts["verdict"] == "usable":
        return f"{name} is usable{', as far as was checked' if facts['unchecked'] else ''}."
    reason = facts["reason"]
    what, _, found = reason["what"].partition(":\n")
    first = found.strip().split("\n")[0]
    error = DataError(f"{what}: {first}" if first else what, where=reason["where"], remedy=reason["remedy"])
    return f"refused: {error}" if "format" in facts else f"finetuned: {error}"
