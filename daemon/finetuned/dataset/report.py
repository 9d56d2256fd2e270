"""The data report: what was read, what is wrong where, and whether it will do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuned.dataset.checks import REMEDIES, Problem, Row, check_row, with_system_prompt
from finetuned.dataset.formats import BadLine, read_rows
from finetuned.errors import DataError

_LINES_NAMED = 3


@dataclass
class Fault:
    """One kind of problem: how often, and where first."""

    count: int = 0
    lines: list[int] = field(default_factory=list)
    detail: str = ""


@dataclass
class Report:
    """Everything found in one pass over a file."""

    rows: int = 0
    bad_rows: int = 0
    system_prompts_added: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, line: int, problems: Iterable[Problem]) -> None:
        """Count a bad row."""
        self.bad_rows += 1
        for problem in problems:
            fault = self.faults.setdefault(problem.code, Fault())
            fault.count += 1
            if len(fault.lines) < _LINES_NAMED and line not in fault.lines:
                fault.lines.append(line)
                fault.detail = fault.detail or problem.detail

    def as_dict(self) -> dict[str, Any]:
        """Give the report as it is stored."""
        return {
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "system_prompts_added": self.system_prompts_added,
            "errors": {
                code: {"count": f.count, "lines": f.lines, "detail": f.detail, "remedy": REMEDIES[code]}
                for code, f in self.faults.items()
            },
        }

    def sentences(self) -> list[str]:
        """Give a line for each kind of problem, most frequent first."""
        lines = []
        for code, fault in sorted(self.faults.items(), key=lambda item: -item[1].count):
            rows = "1 row" if fault.count == 1 else f"{fault.count} rows"
            first = f"{'' if fault.count == len(fault.lines) else 'first '}at line {', '.join(map(str, fault.lines))}"
            detail = f" ({fault.detail})" if fault.detail else ""
            lines.append(f"{code}: {rows}, {first}{detail}. {REMEDIES[code]}")
        return lines

    def summary(self) -> str:
        """Give the report in one line."""
        bad = f", {self.bad_rows} bad and left out" if self.bad_rows else ""
        prompts = f", system prompt added to {self.system_prompts_added}" if self.system_prompts_added else ""
        return f"{self.rows} rows{bad}{prompts}"


def read_file(path: Path, *, name: str, system_prompt: str | None) -> tuple[list[Row], Report]:
    """Read a file and check every row. Raises DataError if it is empty or cut off.

    `name` is what the user calls the file. The caller asks `judge` when all checks are done.
    """
    report = Report()
    rows: list[Row] = []
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=name, remedy="Fill it and drop it again.", code="empty_file")
    for line, value in read_rows(path, name=name):
        report.rows += 1
        checked = [Problem(value.code, value.detail)] if isinstance(value, BadLine) else check_row(line, value)
        if isinstance(checked, Row):
            row = with_system_prompt(checked, system_prompt)
            report.system_prompts_added += row is not checked
            rows.append(row)
        else:
            report.add(line, checked)
            if checked[0].code == "truncated_last_line":
                raise DataError(
                    "the last line is cut off",
                    where=f"{name}:{line}",
                    remedy=REMEDIES["truncated_last_line"],
                    code="truncated_last_line",
                )
    if not report.rows:
        raise DataError("the file holds no rows", where=name, remedy="Fill it and drop it again.", code="empty_file")
    return rows, report


def judge(report: Report, *, name: str, max_bad_rows: float) -> None:
    """Raise DataError with all that was found if too many rows are bad, or none is good."""
    if report.bad_rows == 0 or (report.bad_rows < report.rows and report.bad_rows <= max_bad_rows * report.rows):
        return
    first = next(iter(report.faults.values())).lines[0]
    raise DataError(
        f"{report.bad_rows} of {report.rows} rows cannot be used:\n  " + "\n  ".join(report.sentences()),
        where=f"{name}:{first}",
        remedy="Mend them."
        if report.bad_rows == report.rows
        else f"Mend them, or raise max_bad_rows (now {max_bad_rows:g}; by hand: --skip-validation) to leave them out.",
        code=max(report.faults, key=lambda code: report.faults[code].count),
    )
