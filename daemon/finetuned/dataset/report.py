"""The data report: what was read, what is wrong or odd where, what will be trained, and whether it will do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from finetuned.dataset.formats import Format, check_row
from finetuned.dataset.reading import BadLine, RowFile
from finetuned.dataset.rows import Problem, Row, with_system_prompt
from finetuned.errors import DataError, counted
from finetuned.findings import ERRORS, FATAL, WARNINGS, Warned

_LINES_NAMED = 3
_DETAIL_SHOWN = 300  # characters
_GLANCED_AT = 10_000  # rows, in about a twentieth of a second
_GIVEN_UP = 1_000_000  # bad rows, with no good one among them


@dataclass
class Fault:
    """One kind of problem: in how many rows, and where first."""

    count: int = 0
    lines: list[int] = field(default_factory=list)
    detail: str = ""
    of: int = 0  # rows among which it was looked for, where these are not the good rows of the file

    def see(self, line: int, detail: str = "") -> None:
        """Count a row."""
        self.count += 1
        if len(self.lines) < _LINES_NAMED and line not in self.lines:
            self.lines.append(line)
            self.detail = self.detail or detail[:_DETAIL_SHOWN]

    def sentence(self, code: str, remedy: str, *, rows: int = 0) -> str:
        """Give it as a line of a log. `rows` are those among which it was found, unless it knows better."""
        many = counted(self.count, "row")
        rows = self.of or rows
        share = f" ({self.count / rows:.1%})" if rows else ""
        if not self.lines:
            return f"{code}: {many}{share}{f', {self.detail}' if self.detail else ''}. {remedy}"
        first = f"{'' if self.count <= len(self.lines) else 'first '}at line {', '.join(map(str, self.lines))}"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{code}: {many}{share}, {first}{detail}. {remedy}"


@dataclass
class Report:
    """Everything found in one pass over a file."""

    rows: int = 0
    bad_rows: int = 0
    format: str = ""
    system_prompts_added: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)
    warnings: dict[Warned, Fault] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)  # what will be trained
    sample: dict[str, Any] = field(default_factory=dict)  # a row as the model sees it: its line, and (text, learned)

    @property
    def good_rows(self) -> int:
        """Rows that can be trained."""
        return self.rows - self.bad_rows

    def add(self, line: int, problems: Iterable[Problem]) -> None:
        """Count a bad row, each kind of problem in it once."""
        self.bad_rows += 1
        first: dict[str, str] = {}
        for problem in problems:
            first.setdefault(problem.code, problem.detail)
        for code, detail in first.items():
            self.faults.setdefault(code, Fault()).see(line, detail)

    def warn(self, code: Warned, line: int, detail: str = "") -> None:
        """Count a row that is trained all the same."""
        self.warnings.setdefault(code, Fault()).see(line, detail)

    def as_dict(self) -> dict[str, Any]:
        """Give the report as it is stored and printed for machines."""
        good = max(1, self.good_rows)
        return {
            "format": self.format,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "system_prompts_added": self.system_prompts_added,
            "errors": {code: {**asdict(f), "remedy": ERRORS[code].remedy} for code, f in self.faults.items()},
            "warnings": {
                code: {**asdict(f), "share": round(f.count / (f.of or good), 6), "remedy": WARNINGS[code].remedy}
                for code, f in self.warnings.items()
            },
            "tokens": self.tokens,
            "sample": self.sample,
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """Make a report of what `as_dict` gave. Raises KeyError or TypeError if it is something else."""

        def faults(kind: str) -> dict[Any, Fault]:
            return {code: Fault(f["count"], f["lines"], f["detail"], f["of"]) for code, f in stored[kind].items()}

        plain = ("rows", "bad_rows", "format", "system_prompts_added", "tokens", "sample")
        return cls(faults=faults("errors"), warnings=faults("warnings"), **{name: stored[name] for name in plain})

    def sentences(self) -> list[str]:
        """Give a line for each kind of error, most frequent first."""
        return [fault.sentence(code, ERRORS[code].remedy) for code, fault in _by_count(self.faults)]

    def warning_sentences(self) -> list[str]:
        """Give a line for each kind of warning, most frequent first."""
        good = self.good_rows
        return [fault.sentence(code, WARNINGS[code].remedy, rows=good) for code, fault in _by_count(self.warnings)]

    def summary(self) -> str:
        """Give the report in one line."""
        bad = f", {self.bad_rows:,} bad and left out" if self.bad_rows else ""
        kind = f" of {self.format}" if self.format else ""
        prompts = f", system prompt added to {self.system_prompts_added:,}" if self.system_prompts_added else ""
        tokens = f", {self.tokens['tokens']:,} tokens, {self.tokens['supervised']:,} supervised" if self.tokens else ""
        return f"{counted(self.rows, 'row')}{kind}{bad}{prompts}{tokens}"


def _by_count(faults: dict[Any, Fault]) -> list[tuple[Any, Fault]]:
    return sorted(faults.items(), key=lambda item: -item[1].count)


def rows_of(file: RowFile, report: Report, *, system_prompt: str | None) -> Iterator[Row]:
    """Read a file and check every row; bad ones go into the report. Raises DataError if there are none.

    The caller asks `judge` when all checks are done. Of a file without a good row the first million are read.
    """
    expected: Format | None = None
    for line, value in file.rows():
        if report.bad_rows == report.rows >= _GIVEN_UP:
            break
        report.rows += 1
        if isinstance(value, BadLine):
            report.add(line, [Problem(value.code, value.detail)])
            continue
        found, checked = check_row(line, value, expected)
        if not isinstance(checked, Row):
            report.add(line, checked)
            continue
        if expected is None and found is not None:
            expected, report.format = found, found.name
        row = with_system_prompt(checked, system_prompt)
        report.system_prompts_added += row.prompted
        yield row
    if not report.rows:
        raise DataError(
            "the file holds no rows", where=file.name, remedy="Fill it and drop it again.", code="empty_file"
        )


def glance(file: RowFile, *, max_bad_rows: float, held_out: bool = False) -> None:
    """Raise DataError where a file will not do, if that can be told in a moment: a small one, or one with no good row.

    It spares a user with a bad file the seconds in which libraries are loaded; others are read in earnest anyway.
    """
    report = Report()
    for seen, _ in enumerate(rows_of(file, report, system_prompt=None), 1):
        if seen == _GLANCED_AT:
            return
    judge(report, name=file.name, max_bad_rows=max_bad_rows, held_out=held_out)


def judge(
    report: Report, *, name: str, max_bad_rows: float, fail_on: Collection[str] = (), held_out: bool = False
) -> None:
    """Raise DataError with all that was found if too many rows are bad, none is good, or `fail_on` names a warning."""
    fatal = [code for code in report.faults if code in FATAL]
    few = report.bad_rows < report.rows and report.bad_rows <= max_bad_rows * report.rows
    if report.bad_rows and (fatal or not few):
        first = report.faults[fatal[0]] if fatal else next(iter(report.faults.values()))
        if fatal:
            remedy = "Nothing is trained of such a file."
        elif held_out:
            remedy = "Mend them: of a held-out file every row must be good, as a figure over some would mislead."
        elif report.bad_rows == report.rows:
            remedy = "Mend them."
        else:
            remedy = f"Mend them, or raise max_bad_rows (now {max_bad_rows:g}) to leave them out."
        raise DataError(
            f"{report.bad_rows:,} of {counted(report.rows, 'row')} cannot be used:\n  "
            + "\n  ".join(report.sentences()),
            where=f"{name}:{first.lines[0]}",
            remedy=remedy,
            code=fatal[0] if fatal else max(report.faults, key=lambda code: report.faults[code].count),
        )
    refused = [(code, fault) for code, fault in report.warnings.items() if code in fail_on]
    if refused:
        said = [fault.sentence(code, WARNINGS[code].remedy, rows=report.good_rows) for code, fault in refused]
        raise DataError(
            "fail_on names what was found:\n  " + "\n  ".join(said),
            where=f"{name}:{refused[0][1].lines[0]}" if refused[0][1].lines else name,
            remedy="Mend the file, or take the code out of fail_on.",
            code=refused[0][0],
        )
