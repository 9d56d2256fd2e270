"""Bad input, much of it: no file may end in a traceback, hang, take memory without bound, or be told of a wrong line.

`make fuzz N=1000000` tries more, from another seed each time. What fails says how it is seen again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from bad_input import Input, make, make_array, told_by_python
from chat_templates import CHATML, LLAMA3, QWEN2_5, QWEN3, tokenizer_for
from finetuned.config import TrainingSettings
from finetuned.dataset.reading import BadLine, RowFile
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.dataset.rows import Row
from finetuned.errors import DataError
from finetuned.findings import ERRORS
from finetuned.trainer.door import Door

SEED = int(os.environ.get("FINETUNED_FUZZ_SEED", "5"))
COUNT = int(os.environ.get("FINETUNED_FUZZ", "20000"))
# Of the files: read, arrays read, rows near a format read, and through the trainer's door. Each test counts its own, as
# they may run in processes of their own.
READ, ARRAYS, NEAR, TRAINED = COUNT * 3 // 4, COUNT // 5, COUNT // 40, COUNT // 25
assert READ + ARRAYS + NEAR + TRAINED >= COUNT or COUNT < 100
MAX_LENGTH = 20_000


@contextmanager
def told(seed: int) -> Iterator[None]:
    """Say of what fails inside how to see it again."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"again with FINETUNED_FUZZ_SEED={seed} FINETUNED_FUZZ=1")
        raise


def written(folder: Path, given: Input) -> Path:
    path = folder / f"bad{given.suffix}"
    path.write_bytes(given.content)
    return path


def check_error(error: DataError, name: str) -> None:
    """An error says where and what to do, and names a line that is there."""
    assert error.code
    assert error.remedy
    assert error.where == name or error.where.removeprefix(f"{name}:").isdecimal()


def entries(path: Path) -> list[tuple[int, object]] | None:
    try:
        return list(RowFile(path, name=path.name).rows())
    except DataError as error:
        check_error(error, path.name)
        return None


def read(path: Path, prompt: str | None = None) -> tuple[list[Row], Report] | None:
    """Read as the trainer does; None for a file that is refused as a whole."""
    report = Report()
    try:
        rows = list(rows_of(RowFile(path, name=path.name), report, system_prompt=prompt))
    except DataError as error:
        check_error(error, path.name)
        return None
    check_report(report, {row.line for row in rows}, path)
    assert report.good_rows == len(rows)
    return rows, report


def check_report(report: Report, good: set[int], path: Path) -> None:
    """Its figures fit each other, and no row is both counted bad and trained."""
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert Report.from_dict(report.as_dict()) == report
    assert report.sentences() is not None
    for code, fault in report.faults.items():
        assert code in ERRORS
        assert fault.lines == sorted(set(fault.lines))
        assert len(fault.lines) <= fault.count <= report.bad_rows
        assert path.suffix == ".json" or not good & set(fault.lines)
    try:
        judge(report, name=path.name, max_bad_rows=0.5)
    except DataError as error:
        check_error(error, path.name)
        assert report.bad_rows


def check_lines(path: Path, content: bytes) -> None:
    """A file of lines holds what Python finds in it, line for line."""
    found = entries(path)
    if found is None:
        return
    wanted = told_by_python(content)
    assert [(line, value.code if isinstance(value, BadLine) else "") for line, value in found] == [
        (told.line, told.code) for told in wanted
    ]
    assert [value for _, value in found if not isinstance(value, BadLine)] == [t.value for t in wanted if not t.code]


def test_a_damaged_file_is_read_to_its_end_or_refused_with_a_reason(tmp_path):
    seen = refused = rows = bad = 0
    for seed in range(SEED, SEED + max(1, READ)):
        given = make(Random(seed))
        with told(seed):
            path = written(tmp_path, given)
            if given.suffix == ".jsonl":
                check_lines(path, given.content)
            result = read(path)
        seen += 1
        refused += result is None
        if result is not None:
            rows, bad = rows + result[1].good_rows, bad + result[1].bad_rows
    print(f"{seen:,} files read: {refused:,} refused as a whole, {rows:,} good rows, {bad:,} bad ones")
    assert seen == max(1, READ)
    assert COUNT < 1000 or (rows > seen // 2 and bad > seen // 2)


def test_the_rows_of_an_array_are_told_by_the_lines_where_they_begin(tmp_path):
    for seed in range(SEED, SEED + max(1, ARRAYS)):
        with told(seed):
            content, wanted = make_array(Random(seed))
            found = entries(written(tmp_path, Input(".json", content)))
            assert found is not None
            assert [(line, value.code if isinstance(value, BadLine) else "") for line, value in found] == [
                (one.line, one.code) for one in wanted
            ]
            assert [v for _, v in found if not isinstance(v, BadLine)] == [one.value for one in wanted if not one.code]


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_CONTENT = st.text(max_size=20) | _ANY | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _ANY}))
_ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation"])
_CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text(), "arguments": _ANY})})


def _turns(role: str, content: str):
    beside = dict.fromkeys(("weight", "name", "tool_calls", "reasoning_content"), _ANY) | {"odd": st.just(1)}
    beside["tool_calls"] |= st.lists(_CALL, max_size=2)
    whole = st.fixed_dictionaries({role: _ROLES, content: _CONTENT})
    return st.lists(whole | whole | st.fixed_dictionaries({role: _ROLES | _ANY, content: _CONTENT}, optional=beside))


def _row(**keys):
    beside = {"tools": _ANY | st.lists(_ANY), "system": _CONTENT, "label": _ANY, "text": _ANY}
    optional = {key: value for key, value in beside.items() if key not in keys}
    return st.fixed_dictionaries(keys) | st.fixed_dictionaries(keys, optional=optional) | _ANY


_NEAR_ROWS = st.one_of(
    _row(messages=_turns("role", "content") | _ANY),
    _row(conversations=_turns("from", "value") | _ANY),
    _row(instruction=_CONTENT, input=_CONTENT, output=_CONTENT, history=st.lists(st.lists(_CONTENT))),
    _row(prompt=_CONTENT | _turns("role", "content"), completion=_CONTENT | _turns("role", "content")),
    _row(question=_CONTENT, answer=_CONTENT),
    _row(text=_CONTENT),
)


@settings(
    max_examples=max(1, NEAR),
    deadline=None,
    derandomize=SEED == 5,
    database=None,
    suppress_health_check=[*HealthCheck],
)
@given(rows=st.lists(_NEAR_ROWS, min_size=1, max_size=3))
def test_a_row_that_is_nearly_of_a_format_is_a_chat_or_a_fault(tmp_path_factory, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = written(tmp_path_factory.getbasetemp(), Input(".jsonl", content))
    check_lines(path, content)
    result = read(path)
    assert result is not None
    for row in result[0]:
        assert row.text or row.answers or any(turn.role == "assistant" for turn in row.messages)
        assert all(isinstance(turn.content, str) for turn in row.messages)
        assert len(row.hashes()) == 2


TEMPLATES = (CHATML, QWEN2_5, QWEN3, LLAMA3)


def test_the_trainer_gets_every_good_row_of_a_damaged_file_and_no_bad_one(tmp_path):
    long, short = TrainingSettings(max_length=MAX_LENGTH, system_prompt=None), TrainingSettings(max_length=40)
    doors = [
        Door(tokenizer_for(template), chosen, cache=tmp_path / f"{template.name} {chosen.max_length}")
        for template in TEMPLATES
        for chosen in (long, short, long.model_copy(update={"system_prompt": "Be brief."}))
    ]
    trained = 0
    for seed in range(SEED, SEED + max(1, TRAINED)):
        with told(seed):
            path = written(tmp_path, make(Random(seed)))
            door = doors[seed % len(doors)]
            trained += check_door(door, door.tokenizer, path)
        if seed % 50 == 0:
            for door in doors:
                shutil.rmtree(door._cache, ignore_errors=True)
    print(f"{TRAINED:,} files through the door, {trained:,} rows trained")
    assert trained or COUNT < 1000


def check_door(door: Door, tokenizer, path: Path) -> int:
    """What is trained are the file's good rows, as the template writes them, with their answers learned.

    A second reading gives the same.
    """
    result = read(path, door.system_prompt)
    try:
        examples, report = door.read(path, name=path.name)
    except DataError as error:
        check_error(error, path.name)
        assert result is None
        return 0
    assert result is not None
    rows, before = result
    good = list(examples)
    check_report(report, {example.line for example in good}, path)
    assert report.rows == before.rows
    assert {code: fault for code, fault in report.faults.items() if code in before.faults} == before.faults
    again, as_before = door.read(path, name=path.name)
    assert list(again) == good
    assert as_before == report
    most = door._settings.max_length
    for example in good:
        assert example.targets
        assert len(example.ids) == len(example.supervised) <= most
    if most < MAX_LENGTH:  # rows are cut, and long texts are in pieces
        return len(good)
    assert report.good_rows == len(good)
    assert len(rows) == len(good) + report.bad_rows - before.bad_rows
    written_down = iter(rows)
    for example in good:
        text = tokenizer.decode(example.ids)
        own = (row for row in written_down if row.line == example.line and as_text(row, tokenizer) == text)
        row = next(own, None)
        assert row is not None, text
        pairs = zip(example.ids, example.supervised, strict=True)
        learned = tokenizer.decode([token for token, is_learned in pairs if is_learned])
        assert all(answer.content.rpartition("</think>")[2].strip() in learned for answer in row.answers)
    return len(good)


def as_text(row: Row, tokenizer) -> str:
    if row.text is not None:
        return row.text + tokenizer.eos_token
    chat = [{"role": m.role, "content": m.content, **(m.extra or {})} for m in row.messages]
    try:
        return tokenizer.apply_chat_template(chat, tools=row.tools, tokenize=False)
    except (TemplateError, TypeError, ValueError, AttributeError, RecursionError):
        return ""
