"""What reading gets right that a fuzzer found wrong: a plain test of each."""

from __future__ import annotations

import json

import pytest

from chat_templates import CHATML, tokenizer_for
from finetuned.config import TrainingSettings
from finetuned.dataset.reading import BadLine, RowFile
from finetuned.dataset.report import Report, rows_of
from finetuned.dataset.rows import Row
from finetuned.trainer.door import Door


@pytest.fixture
def door(tmp_path):
    return Door(tokenizer_for(CHATML), TrainingSettings(max_length=400), cache=tmp_path / "cache")


def chat(question, answer="Yes.", **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def checked(path) -> tuple[list[Row], Report]:
    report = Report()
    return list(rows_of(RowFile(path, name=path.name), report, system_prompt=None)), report


def bad_lines(path) -> list[tuple[int, str]]:
    rows = RowFile(path, name=path.name).rows()
    return [(line, value.code) for line, value in rows if isinstance(value, BadLine)]


def test_an_array_on_one_line_is_judged_row_by_row(tmp_path, door):
    path = tmp_path / "rows.json"
    rows = [chat(f"How far is it from {place} to the sea, in miles?") for place in ("Ulm", "Bonn", "Ulm", "Bonm")]
    path.write_text(json.dumps(rows))
    examples, report = door.read(path, name=path.name)
    assert [example.line for example in examples] == [1, 1, 1, 1]
    assert report.warnings["exact_duplicates"].count == 1
    assert report.warnings["near_duplicates"].count >= 1


def test_a_row_with_one_fault_in_many_messages_counts_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user"}, {"role": "assistant"}]}) + "\n")
    _, report = checked(path)
    assert report.faults["message_missing_key"].count == report.bad_rows == 1
    assert report.faults["message_missing_key"].detail == "message 1"
