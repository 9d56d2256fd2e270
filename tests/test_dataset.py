"""Training files: which rows are good, what is said against the others, and on which line."""

from __future__ import annotations

import gzip
import json
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import chat_rows, write_jsonl
from finetuned.dataset import reading
from finetuned.dataset.checks import ROLES
from finetuned.dataset.formats import check_row as check_any_row
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.dataset.rows import Row
from finetuned.errors import DataError
from finetuned.findings import ERRORS

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def read(path: Path, system_prompt: str | None = None) -> tuple[list[Row], Report]:
    report = Report()
    return list(rows_of(RowFile(path, name=path.name), report, system_prompt=system_prompt)), report


def check_row(line: int, value: Any) -> Row | list:
    return check_any_row(line, value)[1]


def pairs(row: Row) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.messages]


def read_bytes(folder: Path, content: bytes, name: str = "x.jsonl") -> tuple[list[Row], Report]:
    path = folder / name
    path.write_bytes(content)
    return read(path)


def refused(folder: Path, content: bytes, name: str = "x.jsonl") -> DataError:
    with pytest.raises(DataError) as caught:
        judge(read_bytes(folder, content, name)[1], name=name, max_bad_rows=1.0)
    assert caught.value.remedy
    return caught.value


def faults(folder: Path, content: bytes) -> dict[str, list[int]]:
    """The kinds of problems in a file, and on which lines."""
    _, report = read_bytes(folder, content)
    return {code: fault.lines for code, fault in report.faults.items()}


# -- what is no chat


def test_preference_rows_are_refused_also_where_messages_stand_beside_them():
    """Half of a comparison must not be trained as if it were the answer."""
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {**json.loads(GOOD), "chosen": "b", "rejected": "c"}):
        problems = check_row(1, row)
        assert isinstance(problems, list)
        assert [problem.code for problem in problems] == ["preference_data"]


def test_utf_16_is_told_for_what_it_is(tmp_path):
    error = refused(tmp_path, GOOD.decode().encode("utf-16"))
    assert (error.code, error.what) == ("not_utf8", "is UTF-16")


# -- good rows


def test_good_rows_are_read_in_order_with_their_lines(tmp_path):
    rows, report = read(write_jsonl(tmp_path / "x.jsonl", chat_rows(20)))
    assert [row.line for row in rows] == list(range(1, 21))
    assert [pairs(row) for row in rows] == [[(m["role"], m["content"]) for m in r["messages"]] for r in chat_rows(20)]
    assert (report.rows, report.bad_rows, report.faults) == (20, 0, {})


@pytest.mark.parametrize("role", sorted(ROLES))
def test_every_role_of_the_format_is_taken(role):
    row = check_row(1, chat((role, "x"), ("assistant", "y")))
    assert isinstance(row, Row)
    assert tuple(pairs(row)) == ((role, "x"), ("assistant", "y"))


def test_text_is_taken_as_it_is(tmp_path):
    text = "  é 漢字 🎉\n\t\\n \u2028 None null "
    rows, _ = read(write_jsonl(tmp_path / "x.jsonl", [chat(("user", text), ("assistant", text))]))
    assert tuple(pairs(rows[0])) == (("user", text), ("assistant", text))


def test_other_keys_of_rows_and_messages_do_not_disturb():
    value = {"id": 3, "messages": [{"role": "assistant", "content": "x", "name": "n", "weight": 1}]}
    row = check_row(1, value)
    assert isinstance(row, Row)
    assert pairs(row) == [("assistant", "x")]


def test_a_last_line_without_newline_is_a_row(tmp_path):
    rows, report = read_bytes(tmp_path, GOOD + b"\n" + GOOD)
    assert [row.line for row in rows] == [1, 2]
    assert not report.faults


def test_a_byte_order_mark_is_passed_over(tmp_path):
    rows, report = read_bytes(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD + b"\n")
    assert (len(rows), report.bad_rows) == (2, 0)


def test_a_byte_order_mark_in_the_middle_is_no_json(tmp_path):
    assert faults(tmp_path, GOOD + b"\n\xef\xbb\xbf" + GOOD + b"\n") == {"not_json": [2]}


def test_windows_line_ends_are_line_ends(tmp_path):
    rows, report = read_bytes(tmp_path, b"\r\n".join([GOOD, GOOD, b"", GOOD, b""]))
    assert [row.line for row in rows] == [1, 2, 4]
    assert report.bad_rows == 0


def test_blank_lines_are_no_rows_but_keep_the_line_numbers(tmp_path):
    rows, report = read_bytes(tmp_path, b"\n  \n" + GOOD + b"\n\n\t\nnonsense\n" + GOOD + b"\n\n")
    assert [row.line for row in rows] == [3, 7]
    assert report.rows == 3
    assert report.faults["not_json"].lines == [6]


# -- content that is no string


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", ""),
        (7, "7"),
        (0, "0"),
        (-1.5, "-1.5"),
        (0.1, "0.1"),
        (True, "true"),
        (False, "false"),
        ({}, "{}"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ([], "[]"),
        ([1, "a"], '[1,"a"]'),
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
    ],
)
def test_content_becomes_text_as_json_writes_it_and_text_parts_are_joined(tmp_path, content, text):
    rows, _ = read(write_jsonl(tmp_path / "x.jsonl", [chat(("user", content), ("assistant", content))]))
    assert tuple(pairs(rows[0])) == (("user", text), ("assistant", text))


@pytest.mark.parametrize("content", [[{"type": "text", "text": 1}], [{"type": "image_url", "image_url": "u"}], 1e300])
def test_content_that_could_not_be_trained_as_it_is_is_an_error(content):
    problems = check_row(1, chat(("user", content), ("assistant", "a")))
    assert isinstance(problems, list)
    assert [problem.code for problem in problems] == ["data_type"]


def test_null_as_content_is_an_error_and_never_the_word_none(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*chat_rows(1), chat(("user", "a"), ("assistant", None))])
    rows, report = read(path)
    assert report.faults["missing_content"].lines == [2]
    assert not any("None" in text or "null" in text for row in rows for _, text in pairs(row))


def test_content_nested_as_deep_as_the_parser_allows_ends_in_a_row_or_a_fault(tmp_path):
    for depth in (200, 500, 1000, 5000):
        deep = b"[" * depth + b"]" * depth
        line = b'{"messages": [{"role": "assistant", "content": ' + deep + b"}]}\n"
        rows, report = read_bytes(tmp_path, line)
        assert len(rows) + report.bad_rows == 1


# -- bad rows, one kind after the other


BAD_ROWS = [
    (b"nonsense", "not_json"),
    (b"{'messages': []}", "not_json"),
    (b'{"messages": NaN}', "not_json"),
    (b'{"messages": "\xff\xfe"}', "not_utf8"),
    (b"[1]", "data_type"),
    (b"null", "data_type"),
    (b'"text"', "data_type"),
    (b'{"messages": ["hello"]}', "data_type"),
    (b"{}", "missing_messages_list"),
    (b'{"messages": []}', "missing_messages_list"),
    (b'{"messages": null}', "missing_messages_list"),
    (b'{"messages": {"role": "user"}}', "missing_messages_list"),
    (b'{"prompt": "a", "completion": "b"}', "mixed_formats"),
    (b'{"messages": [{"role": "assistant", "content": "a", "mood": "b"}]}', "message_unrecognized_key"),
    (b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "data_type"),
    (b'{"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}', "message_missing_key"),
    (b'{"messages": [{"role": "assistant"}]}', "message_missing_key"),
    (b'{"messages": [{"role": "human", "content": "a"}]}', "unrecognized_role"),
    (b'{"messages": [{"role": "Assistant", "content": "a"}]}', "unrecognized_role"),
    (b'{"messages": [{"role": null, "content": "a"}]}', "unrecognized_role"),
    (b'{"messages": [{"role": ["assistant"], "content": "a"}]}', "unrecognized_role"),
    (b'{"messages": [{"role": {}, "content": "a"}]}', "unrecognized_role"),
    (b'{"messages": [{"role": "assistant", "content": null}]}', "missing_content"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "example_missing_assistant_message"),
]


@pytest.mark.parametrize(("line", "code"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_kind_and_its_line(tmp_path, line, code):
    content = b"\n".join([GOOD, b"", GOOD, line, GOOD, b""])
    rows, report = read_bytes(tmp_path, content)
    assert {kind: fault.lines for kind, fault in report.faults.items()} == {code: [4]}
    assert [row.line for row in rows] == [1, 3, 5]
    assert (report.rows, report.bad_rows) == (4, 1)


def test_a_row_that_is_too_large_is_passed_over_and_the_lines_still_count(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_ROW", 100)
    long = GOOD.replace(b'"a"', b'"' + b"a" * 1000 + b'"')
    fits = GOOD.ljust(99) + b"\n"
    over = GOOD.ljust(100) + b"\n"
    assert len(fits) == 100
    rows, report = read_bytes(tmp_path, GOOD + b"\n" + long + b"\n" + fits + over + GOOD + b"\n" + long)
    assert report.faults.keys() == {"row_too_large"}
    assert report.faults["row_too_large"].lines == [2, 4, 6]
    assert [row.line for row in rows] == [1, 3, 5]


def test_everything_wrong_with_one_row_is_counted_and_the_row_once(tmp_path):
    line = (
        b'{"messages": [{"role": "x", "content": "a"}, {"role": "user"}, {"role": "assistant", "content": null}, 3]}\n'
    )
    _, report = read_bytes(tmp_path, line + GOOD + b"\n")
    assert report.faults.keys() == {"unrecognized_role", "message_missing_key", "missing_content", "data_type"}
    assert report.bad_rows == 1


def test_a_report_names_the_first_lines_of_each_kind_and_counts_all(tmp_path):
    content = b"".join(b"bad\n" if n % 2 else GOOD + b"\n" for n in range(1, 21))
    _, report = read_bytes(tmp_path, content)
    assert report.faults["not_json"].lines == [1, 3, 5]
    assert report.faults["not_json"].count == 10
    assert report.as_dict()["errors"]["not_json"]["count"] == 10


def test_every_kind_of_problem_has_a_remedy():
    assert {code for _, code in BAD_ROWS} <= ERRORS.keys()


# -- files that cannot be used as a whole


@pytest.mark.parametrize("tail", [GOOD[:-1], GOOD[:20], b"{", b'{"messages": [{"role": "assistant", "content": "\xc3'])
def test_a_last_line_that_is_cut_off_fails_the_file(tmp_path, tail):
    error = refused(tmp_path, GOOD + b"\n\n" + GOOD + b"\n" + tail)
    assert error.code == "truncated_last_line"
    assert error.where == "x.jsonl:4"


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_an_empty_file(tmp_path, content):
    assert refused(tmp_path, content).code == "empty_file"


def test_an_empty_array_is_an_empty_file(tmp_path):
    assert refused(tmp_path, b"[]", "x.json").code == "empty_file"


# -- arrays and archives


def test_rows_of_an_array_are_named_by_the_lines_where_they_begin(tmp_path):
    content = json.dumps([*chat_rows(2), 3, *chat_rows(1)], indent=2).encode()
    rows, report = read_bytes(tmp_path, b"\xef\xbb\xbf" + content, "x.json")
    begins = [n for n, line in enumerate(content.split(b"\n"), 1) if line in {b"  {", b"  3,"}]
    assert [row.line for row in rows] == [begins[0], begins[1], begins[3]]
    assert report.faults["data_type"].lines == [begins[2]]


def test_a_json_file_with_a_row_a_line_is_read_so(tmp_path):
    rows, report = read_bytes(tmp_path, GOOD + b"\nbad\n" + GOOD + b"\n", "x.json")
    assert [row.line for row in rows] == [1, 3]
    assert report.faults["not_json"].lines == [2]


def test_an_array_under_a_jsonl_name_is_told_for_what_it_is(tmp_path):
    assert refused(tmp_path, b"[\n" + GOOD + b"]", "x.jsonl").remedy.startswith("Name it .json")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "truncated_last_line"),
        (b'["\xff"]', "not_utf8"),
        (b"[" + GOOD, "truncated_last_line"),
        (b"{\n}", "data_type"),
        (b"1", "data_type"),
    ],
)
def test_a_json_file_that_is_no_whole_array_is_refused(tmp_path, content, code):
    assert refused(tmp_path, content, "x.json").code == code


def many_lines(count: int = 3000) -> bytes:
    """Rows that do not compress to nothing, so that a damage hits something."""
    chance = random.Random(1)
    return b"".join(orjson.dumps(chat(("user", chance.random()), ("assistant", str(n)))) + b"\n" for n in range(count))


def zst(content: bytes) -> bytes:
    """Pack as the zstd program does."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


PACKED = {"x.jsonl.gz": gzip.compress, "x.jsonl.zst": zst, "X.JSONL.GZ": gzip.compress}


@pytest.mark.parametrize("name", PACKED)
def test_packed_files_are_read_as_what_is_in_them(tmp_path, name):
    rows, report = read_bytes(tmp_path, PACKED[name](GOOD + b"\n\nbad\n" + GOOD), name)
    assert [row.line for row in rows] == [1, 4]
    assert report.faults["not_json"].lines == [3]


@pytest.mark.parametrize("name", PACKED)
def test_archives_put_one_behind_the_other_are_one_file(tmp_path, name):
    half = len(GOOD) // 2
    parts = [GOOD + b"\n" + GOOD[:half], GOOD[half:] + b"\n", b"", GOOD + b"\n"]
    rows, report = read_bytes(tmp_path, b"".join(PACKED[name](part) for part in parts), name)
    assert [row.line for row in rows] == [1, 2, 3]
    assert report.bad_rows == 0


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("keep", [0.001, 0.25, 0.5, 0.9, -1])
def test_an_archive_that_is_cut_off_is_damaged_wherever_the_cut_is(tmp_path, name, keep):
    whole = PACKED[name](many_lines())
    cut = whole[: int(len(whole) * keep)] if keep > 0 else whole[:keep]
    assert refused(tmp_path, cut, name).code == "damaged_archive"


def test_a_zst_file_cut_at_the_end_of_a_line_does_not_lose_the_rest_in_silence(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    first = packer.compress(GOOD + b"\n") + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert refused(tmp_path, first, "x.jsonl.zst").code == "damaged_archive"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_an_archive_with_a_wrong_byte_is_damaged(tmp_path, name):
    whole = bytearray(PACKED[name](many_lines()))
    whole[len(whole) // 2] ^= 0xFF
    assert refused(tmp_path, bytes(whole), name).code == "damaged_archive"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_something_else_under_an_archives_name_is_damaged(tmp_path, name):
    assert refused(tmp_path, GOOD + b"\n", name).code == "damaged_archive"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_an_archive_that_unpacks_without_end_is_stopped(tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading, "MAX_UNPACKED", 2**20)
    monkeypatch.setattr(reading, "MAX_ROW", 2**16)
    assert refused(tmp_path, PACKED[name](b" " * 2**23), name).code == "too_large"
    assert refused(tmp_path, PACKED[name]((GOOD + b"\n") * 20_000), name).code == "too_large"


# -- how many bad rows are too many


def judged(folder: Path, *, good: int, bad: int, max_bad_rows: float) -> DataError | None:
    _, report = read_bytes(folder, (GOOD + b"\n") * good + b"bad\n" * bad)
    try:
        judge(report, name="x.jsonl", max_bad_rows=max_bad_rows)
    except DataError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("good", "bad", "share", "fails"),
    [
        (100, 0, 0.0, False),
        (99, 1, 0.01, False),
        (98, 1, 0.01, True),
        (198, 2, 0.01, False),
        (99, 2, 0.01, True),
        (99, 1, 0.0, True),
        (1, 99, 1.0, False),
        (0, 1, 1.0, True),
    ],
)
def test_so_many_bad_rows_are_left_out_and_no_more(tmp_path, good, bad, share, fails):
    assert (judged(tmp_path, good=good, bad=bad, max_bad_rows=share) is not None) is fails


def test_too_many_bad_rows_are_all_listed_in_one_error(tmp_path):
    content = b"\n".join([GOOD, b"bad", b"worse", b"{}", b"[]", b""])
    _, report = read_bytes(tmp_path, content)
    with pytest.raises(DataError) as caught:
        judge(report, name="x.jsonl", max_bad_rows=0.01)
    said = str(caught.value)
    assert "4 of 5 rows" in said
    assert re.search(r"not_json: 2\b.* line 2, 3", said)
    assert re.search(r"missing_messages_list: 1\b.* line 4", said)
    assert re.search(r"data_type: 1\b.* line 5", said)
    assert caught.value.where == "x.jsonl:2"
    assert caught.value.code == "not_json"
    assert "max_bad_rows" in caught.value.remedy


# -- the system prompt


@pytest.mark.parametrize(
    ("messages", "first"),
    [
        ([("user", "a"), ("assistant", "b")], ("system", "Be brief.")),
        ([("assistant", "b")], ("system", "Be brief.")),
        ([("system", "Mine."), ("user", "a"), ("assistant", "b")], ("system", "Mine.")),
        ([("developer", "Mine."), ("assistant", "b")], ("developer", "Mine.")),
        ([("system", ""), ("assistant", "b")], ("system", "")),
        ([("user", "a"), ("system", "Mine."), ("assistant", "b")], ("user", "a")),
    ],
)
def test_the_system_prompt_is_added_only_where_a_row_has_none(tmp_path, messages, first):
    rows, report = read(write_jsonl(tmp_path / "x.jsonl", [chat(*messages)]), "Be brief.")
    added = first == ("system", "Be brief.")
    assert tuple(pairs(rows[0])) == ((first,) if added else ()) + tuple(messages)
    assert report.system_prompts_added == added


def test_null_switches_the_system_prompt_off(tmp_path):
    rows, report = read(write_jsonl(tmp_path / "x.jsonl", chat_rows(3)), None)
    assert all(row.messages[0].role == "user" for row in rows)
    assert report.system_prompts_added == 0


# -- anything at all

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.fixed_dictionaries({}, optional={"role": st.sampled_from(sorted(ROLES)) | JSON, "content": JSON}) | JSON
ROW = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4) | JSON}) | JSON
LINE = st.one_of(
    st.just(GOOD),
    st.just(b""),
    st.integers(0, len(GOOD)).map(lambda length: GOOD[:length]),
    st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
    ROW.map(lambda row: json.dumps(row).encode()),
)


def parses(line: bytes) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(line.decode(), parse_constant=refuse)
    except ValueError:
        return False
    return True


def usable(line: bytes) -> bool:
    """Whether a line holds a row, told in another way than the product does."""
    try:
        messages = json.loads(line.decode())["messages"]
        roles = [message["role"] for message in messages if message["content"] is not None]
        exact = all(abs(m["content"]) < 2**53 for m in messages if isinstance(m["content"], float))
        return exact and bool(roles) and len(roles) == len(messages) and set(roles) <= ROLES and "assistant" in roles
    except (ValueError, KeyError, TypeError, IndexError):
        return False


@settings(deadline=None)
@given(lines=st.lists(LINE, max_size=8), ending=st.sampled_from([b"\n", b"\r\n"]), last=st.sampled_from([b"", b"\n"]))
def test_no_bytes_end_in_anything_but_rows_and_faults_on_their_lines(tmp_path_factory, lines, ending, last):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(ending.join(lines) + last)
    numbered = [(number, line) for number, line in enumerate(lines, start=1)]
    if numbered and numbered[0][1].startswith(b"\xef\xbb\xbf"):
        numbered[0] = (1, numbered[0][1][3:])
    first = numbered[0][1].strip() if numbered else b""
    assume(
        not first.startswith(b"[") or first.endswith(b"]")
    )  # an array over several lines, which has a test of its own
    numbered = [(number, line) for number, line in numbered if line.strip()]
    cut_off = numbered and numbered[-1][0] == len(lines) and not last and not parses(numbered[-1][1])
    if cut_off or not numbered:
        with pytest.raises(DataError) as caught:
            judge(read(path)[1], name=path.name, max_bad_rows=1.0)
        assert caught.value.code == ("truncated_last_line" if cut_off else "empty_file")
        assert caught.value.where == (f"fuzz.jsonl:{len(lines)}" if cut_off else "fuzz.jsonl")
        return
    rows, report = read(path)
    assert [row.line for row in rows] == [number for number, line in numbered if usable(line)]
    assert report.rows == len(numbered)
    assert report.bad_rows == report.rows - len(rows)
    bad = {number for number, line in numbered if not usable(line)}
    assert all(set(fault.lines) <= bad for fault in report.faults.values())


@settings(deadline=None)
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["fuzz.jsonl", "fuzz.json", "fuzz.jsonl.gz", "fuzz.jsonl.zst"]),
)
def test_no_file_ends_in_anything_but_a_report_or_a_data_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    with suppress(DataError):
        rows, report = read(path)
        assert len(rows) + report.bad_rows == report.rows
