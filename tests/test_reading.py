"""What reading gets right that a fuzzer found wrong: a plain test of each."""

from __future__ import annotations

import json

import pytest

from chat_templates import CHATML, tokenizer_for
from finetuned.config import TrainingSettings
from finetuned.dataset.reading import BadLine, RowFile
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.dataset.rows import Row
from finetuned.errors import DataError
from finetuned.trainer.door import Door, rows_known_by, split
from finetuned.trainer.store import IDENTITY


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


def test_a_cut_array_is_told_by_the_line_where_the_cut_row_begins(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[\n" + json.dumps(chat("a")) + ",\n\n" + json.dumps(chat("b"))[:-9])
    assert bad_lines(path) == [(4, "truncated_last_line")]


def test_what_stands_behind_an_array_is_told_by_its_own_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[\n" + json.dumps(chat("a")) + "\n]\n\nwhat")
    assert bad_lines(path) == [(5, "not_json")]


def test_white_space_before_an_array_is_skipped_however_long(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n" * 400_000 + json.dumps([chat("a")]))
    rows, _ = checked(path)
    assert [row.line for row in rows] == [400_001]


def test_a_file_of_nothing_but_bad_rows_is_given_up_after_many(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b"," * 1_100_000 + b"]")
    _, report = checked(path)
    assert report.bad_rows == report.rows == 1_000_000
    with pytest.raises(DataError, match="nothing stands before a comma"):
        judge(report, name=path.name, max_bad_rows=1.0)


DEEP = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": DEEP, "content": "a"}]},
        chat("a", weight=DEEP),
        chat("a", [{"type": DEEP}]),
        chat("a", DEEP),
        chat("a", reasoning_content=DEEP),
        chat("a", tool_calls=[{"function": {"name": "look", "arguments": DEEP}}]),
        {**chat("a"), "tools": [{"name": "look", "parameters": DEEP}]},
    ],
    ids=("role", "weight", "part", "content", "reasoning", "call", "tool"),
)
def test_values_nested_deep_are_a_rows_fault(tmp_path, door, row):
    path = tmp_path / "rows.jsonl"
    deeper = json.dumps(row).replace("[" * 900, "[" * 1000).replace("]" * 900, "]" * 1000)
    path.write_text(json.dumps(chat("a")) + "\n" + deeper + "\n")
    examples, report = door.read(path, name=path.name)
    assert [example.line for example in examples] == [1]
    assert {line for fault in report.faults.values() for line in fault.lines} == {2}


def test_an_input_that_is_a_number_is_not_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Is this nothing?", "input": 0, "output": "It is."}) + "\n")
    rows, report = checked(path)
    assert not rows
    assert "data_type" in report.faults


def test_system_prompts_in_two_languages_are_told(tmp_path, door):
    path = tmp_path / "rows.jsonl"
    prompts = [
        "You are a helpful assistant who answers every question in few words.",
        "Du bist ein hilfreicher Assistent und beantwortest jede Frage mit wenigen Worten.",
    ]
    rows = [{"messages": [{"role": "system", "content": prompt}, *chat("a")["messages"]]} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = door.read(path, name=path.name)
    assert report.warnings["mixed_system_languages"].detail == "de: 1 row, en: 1 row"


def test_a_refused_file_is_read_anew_under_the_name_it_should_have(tmp_path, door):
    rows = json.dumps([chat("a"), chat("b")])
    for name, good in (("rows.jsonl", 0), ("rows.json", 2)):
        path = tmp_path / name
        path.write_text(rows)
        examples, report = door.read(path, name=name)
        assert len(examples) == report.good_rows == good


@pytest.mark.parametrize("size", range(32, 43))
def test_a_chat_cut_off_anywhere_is_trained_as_far_as_it_is_seen(tmp_path, size):
    """No more of a row than can fill max_length is looked at; a mark that this cuts in two is still a mark."""
    door = Door(tokenizer_for(CHATML), TrainingSettings(max_length=120, system_prompt=None), cache=tmp_path / "cache")
    path = tmp_path / "rows.jsonl"
    rest = [turn for _ in range(1000) for turn in chat("b")["messages"]]
    path.write_text(json.dumps({"messages": [*chat("a" * size)["messages"], *rest]}) + "\n")
    examples, report = door.read(path, name=path.name)
    assert not report.faults
    assert len(examples) == 1


def test_held_out_rows_of_an_array_on_one_line_are_found_again(tmp_path, door):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([chat(f"question {number}") for number in range(100)]))
    _, held_out = split(door.read(path, name=path.name)[0], 0.2)
    first = held_out.column(IDENTITY)[:5].tolist()
    found = rows_known_by(first, path, name=path.name, system_prompt=door.system_prompt)
    assert len(found) == 5
    for row, example in zip(found, held_out, strict=False):
        assert row.messages[-2].content + "<|im_end|>" in tokenizer_for(CHATML).decode(example.ids)


def test_a_long_chat_whose_calls_the_template_drops_is_refused_without_rendering_it_a_thousand_times(tmp_path, door):
    """With the chat rendered up to each of its answers this took minutes."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": [*chat("a")["messages"], *[call, {"role": "tool", "content": "b"}] * 4000]})
    )
    _, report = door.read(path, name=path.name)
    assert report.faults["template_drops_text"].detail == "message 3"
