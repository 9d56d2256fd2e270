"""Each format becomes the chat it should, and what is none is refused with its line and a remedy."""

from __future__ import annotations

import json

import pytest

from finetuned.dataset.formats import check_row
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.dataset.rows import Message, Problem, Row
from finetuned.errors import DataError

ASKED, TOLD = {"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Two miles."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chat(value) -> list[tuple[str, str]]:
    """Give a row's turns as roles and texts."""
    return [(turn.role, turn.content) for turn in row_of(value).messages]


def row_of(value) -> Row:
    _, checked = check_row(1, value)
    assert isinstance(checked, Row), checked
    return checked


def problems(value) -> list[Problem]:
    _, checked = check_row(1, value)
    assert not isinstance(checked, Row)
    return checked


def codes(value) -> list[str]:
    return [problem.code for problem in problems(value)]


def answered(content) -> dict:
    return {"messages": [ASKED, {"role": "assistant", "content": content}]}


SAID = [("user", "How far?"), ("assistant", "Two miles.")]
PROMPTED = [("system", "Be brief."), *SAID]


@pytest.mark.parametrize(
    ("name", "value", "turns"),
    [
        ("OpenAI chat", {"messages": [ASKED, TOLD]}, SAID),
        ("OpenAI chat", {"messages": [ASKED, TOLD], "id": 7, "source": "beside"}, SAID),
        (
            "ShareGPT",
            {"conversations": [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "Two miles."}]},
            SAID,
        ),
        (
            "ShareGPT",
            {"conversations": [{"from": "user", "value": "How far?"}, {"from": "assistant", "value": "Two miles."}]},
            SAID,
        ),
        (
            "ShareGPT",
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "Two miles."}],
            },
            PROMPTED,
        ),
        ("ShareGPT", {"conversations": [ASKED, TOLD]}, SAID),
        ("Alpaca", {"instruction": "How far?", "output": "Two miles."}, SAID),
        (
            "Alpaca",
            {"instruction": "How far?", "input": "", "output": "Two miles.", "text": "as it was rendered"},
            SAID,
        ),
        ("Alpaca", {"instruction": "How", "input": "far?", "output": "Two miles."}, [("user", "How\nfar?"), SAID[1]]),
        ("Alpaca", {"instruction": "How far?", "output": "Two miles.", "system": "Be brief."}, PROMPTED),
        (
            "Alpaca",
            {"instruction": "How far?", "output": "Two miles.", "system": "Be brief.", "history": [["Hi", "Ho"]]},
            [PROMPTED[0], ("user", "Hi"), ("assistant", "Ho"), *SAID],
        ),
        ("prompt and completion", {"prompt": "How far?", "completion": "Two miles."}, SAID),
        ("prompt and completion", {"prompt": [ASKED], "completion": [TOLD]}, SAID),
        ("prompt and completion", {"prompt": [ASKED], "completion": "Two miles."}, SAID),
        ("question and answer", {"question": "How far?", "answer": "Two miles."}, SAID),
        ("question and answer", {"question": "How far?", "answer": "Two miles.", "system": "Be brief."}, PROMPTED),
    ],
)
def test_a_row_of_each_format_becomes_the_chat_it_means(name, value, turns):
    found, _ = check_row(1, value)
    assert found.name == name
    assert chat(value) == turns


def test_a_text_is_a_text_and_no_chat():
    row = row_of({"text": "Once upon a time."})
    assert (row.text, row.messages) == ("Once upon a time.", ())
    assert codes({"text": ""}) == codes({"text": None}) == ["missing_content"]
    assert codes({"text": ["a"]}) == ["data_type"]


def test_sharegpt_calls_and_observations_become_tool_calls_and_results():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "How far?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two miles.", "weight": 1},
    ]
    row = row_of({"conversations": turns, "tools": json.dumps([TOOL["function"]])})
    assert [turn.role for turn in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2] == Message("assistant", "", extra={"tool_calls": [CALL]})
    assert row.tools == [TOOL]


def test_openais_tools_calls_names_and_weights_are_kept():
    stored = {**CALL, "id": "call1", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages = [
        {**ASKED, "name": "ann"},
        {"role": "assistant", "tool_calls": [stored]},
        {"role": "tool", "content": "2", "tool_call_id": "call1"},
        {**TOLD, "weight": 0},
        ASKED,
        {**TOLD, "weight": 1, "refusal": None},
    ]
    row = row_of({"messages": messages, "tools": [TOOL]})
    assert row.tools == [TOOL]
    assert row.messages[0].extra == {"name": "ann"}
    assert row.messages[1] == Message("assistant", "", extra={"tool_calls": [{**CALL, "id": "call1"}]})
    assert row.messages[2].extra == {"tool_call_id": "call1"}
    assert [turn.learn for turn in row.messages if turn.role == "assistant"] == [True, False, True]
    assert len(row.answers) == 2


def test_calls_and_tools_of_openais_first_form_are_taken_too():
    called = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": 1}'}}
    row = row_of({"messages": [ASKED, called], "functions": [TOOL["function"]]})
    assert row.messages[1].extra == {"tool_calls": [CALL]}
    assert row.tools == [TOOL]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (3, "3"),
        (0, "0"),
        (2.5, "2.5"),
        (True, "true"),
        ({"a": [1, None], "ä": "ß"}, '{"a":[1,null],"ä":"ß"}'),
        ([1, "None"], '[1,"None"]'),
        ([], "[]"),
        ([{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}], "One, two."),
    ],
)
def test_content_that_is_no_string_becomes_json_and_parts_are_joined(content, text):
    assert chat(answered(content))[-1] == ("assistant", text)


@pytest.mark.parametrize(
    "value",
    [
        answered(None),
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
        {"instruction": "a", "output": None},
        {"instruction": None, "output": "a"},
        {"instruction": "a", "output": "b", "history": [["a", None]]},
        {"prompt": "a", "completion": None},
        {"question": "a", "answer": None},
        {"text": None},
    ],
)
def test_none_is_a_fault_and_never_a_word(value):
    assert codes(value) == ["missing_content"]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (3, "data_type"),
        ([ASKED, TOLD], "data_type"),
        ({}, "missing_messages_list"),
        ({"dialog": []}, "missing_messages_list"),
        ({"messages": []}, "missing_messages_list"),
        ({"messages": "How far?"}, "missing_messages_list"),
        ({"messages": [ASKED, "Two miles."]}, "data_type"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "message_missing_key"),
        ({"messages": [ASKED, {"content": "Two miles."}]}, "message_missing_key"),
        ({"messages": [ASKED, {**TOLD, "mood": "good"}]}, "message_unrecognized_key"),
        ({"messages": [ASKED, {**TOLD, "role": "robot"}]}, "unrecognized_role"),
        ({"messages": [ASKED, {**TOLD, "weight": 0.5}]}, "data_type"),
        ({"messages": [ASKED, {**TOLD, "tool_calls": [{}]}]}, "data_type"),
        ({"messages": [ASKED]}, "example_missing_assistant_message"),
        ({"messages": [ASKED, TOLD], "tools": "no json"}, "data_type"),
        (answered([{"type": "image_url", "image_url": "x"}]), "data_type"),
        (answered(1e300), "data_type"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "unrecognized_role"),
        ({"conversations": [{"from": "human"}]}, "message_missing_key"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "data_type"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference_data"),
        ({"chosen": [ASKED, TOLD], "rejected": [ASKED, TOLD], "messages": [ASKED, TOLD]}, "preference_data"),
        ({"prompt": "a", "completion": "b", "label": True}, "preference_data"),
        ({"text": "a", "label": 1}, "preference_data"),
        ({"messages": [ASKED, TOLD], "label": False}, "preference_data"),
    ],
)
def test_what_cannot_be_a_chat_is_told_by_its_code(value, code):
    assert codes(value) == [code]


def test_a_label_that_names_a_chats_topic_is_no_preference():
    assert chat({"messages": [ASKED, TOLD], "label": "travel"}) == SAID


def test_all_faults_of_a_row_are_told_with_the_message_that_has_them():
    row = {"messages": [{"role": "robot", "content": None}, {**TOLD, "mood": 1}]}
    assert problems(row) == [
        Problem("unrecognized_role", "message 1: 'robot'"),
        Problem("missing_content", "message 1"),
        Problem("message_unrecognized_key", "message 2: 'mood'"),
    ]


def judged(tmp_path, rows) -> DataError:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Report()
    list(rows_of(RowFile(path, name="rows.jsonl"), report, system_prompt=None))
    with pytest.raises(DataError) as refused:
        judge(report, name="rows.jsonl", max_bad_rows=0.9)
    return refused.value


def test_a_file_of_two_formats_is_refused_with_the_first_line_that_differs(tmp_path):
    one, other = {"messages": [ASKED, TOLD]}, {"question": "a", "answer": "b"}
    error = judged(tmp_path, [one, one, other, one, other])
    assert (error.code, error.where) == ("mixed_formats", "rows.jsonl:3")
    assert "question and answer, and OpenAI chat before it" in error.what
    assert error.remedy


def test_comparisons_are_refused_even_among_many_chats(tmp_path):
    error = judged(tmp_path, [*[{"messages": [ASKED, TOLD]}] * 9, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert (error.code, error.where) == ("preference_data", "rows.jsonl:10")
    assert "comparisons are not" in error.what
