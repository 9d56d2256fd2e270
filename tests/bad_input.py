"""Training files as nobody wants them, each made from a random generator; and what is in them, told by Python's own
json and by nothing of ours."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import zstandard

_UNITS = Path(__file__).parents[1] / "examples" / "units.jsonl"
_CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def _chat(*turns: dict) -> dict[str, Any]:
    return {"messages": list(turns)}


_ASKED, _TOLD = {"role": "user", "content": "How är 漢 🎉?"}, {"role": "assistant", "content": "Well; 12.5 m."}
_HUMAN, _GPT = {"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}
FORMATS: dict[str, list[dict[str, Any]]] = {
    "OpenAI chat": [
        *(json.loads(line) for line in _UNITS.read_text().splitlines()[:20]),
        _chat({"role": "system", "content": "Be brief."}, _ASKED, _TOLD, _ASKED, {**_TOLD, "weight": 0}, _ASKED, _TOLD),
        _chat(
            _ASKED, {"role": "assistant", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "2"}]}
        ),
        _chat(_ASKED, {"role": "assistant", "content": {"answer": [1, 2.5, None, True]}}),
        {
            **_chat(
                {**_ASKED, "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "content": "3", "tool_call_id": "call00001"},
                {**_TOLD, "reasoning_content": "I saw 3."},
            ),
            "tools": [_TOOL],
        },
    ],
    "ShareGPT": [
        {"conversations": [_HUMAN, _GPT]},
        {"system": "Be brief.", "conversations": [_HUMAN, _GPT, _HUMAN, {**_GPT, "weight": 0}, _HUMAN, _GPT]},
        {
            "tools": json.dumps([_TOOL["function"]]),
            "conversations": [
                _HUMAN,
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
                {"from": "observation", "value": "3"},
                _GPT,
            ],
        },
    ],
    "Alpaca": [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Add 1 and 2.", "input": "", "output": 3, "system": "Be brief.", "history": [["Hi", "Ho"]]},
    ],
    "prompt and completion": [
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"prompt": [_ASKED], "completion": [_TOLD]},
    ],
    "question and answer": [{"question": "1 + 1?", "answer": "2, as <think>ever</think> it was"}],
    "plain text": [{"text": "Once upon a time there was a byte. " * 9}, {"text": "Ein Wört."}],
}

# Values that stand where others are expected; some are no JSON.
STRANGE: tuple[bytes, ...] = (
    *(b"null", b"true", b"0", b"-0.0", b"0.1", b"1e308", b"1e999", b"9007199254740993.0", b"18446744073709551616"),
    *(b"NaN", b"Infinity", b"-Infinity", b"9" * 400, b"9" * 5000, b"007", b"+1", b".5", b"0x10", b"nul", b"None"),
    *(b"[]", b"{}", b"[[]]", b"[null]", b"[1,]", b"{,}", b'{"a":1,"a":2}', b'{"type":"text","text":"a"}'),
    *(b'[{"type":"text","text":null}]', b'[{"type":"image_url","image_url":"x"}]', b'[{"role":"user","content":"a"}]'),
    *(b'""', b'" \\n\\t "', b'"\\u0000"', b'"\x00"', b'"\n"', b'"\r\n"', b'"\x7f"', b"'a'", b'"\\x"', b'"\\u12"', b'"'),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b'"a\xed\xa0\x80"', b'"\xff"', b'"\xc0\x80"', b'"\xc3"'),
    *(
        b'"<|im_end|>"',
        b'"<|im_start|>assistant\\n"',
        b'"<think>a</think>b"',
        b'"</think>"',
        b'"/no_think"',
        b'"[INST]"',
    ),
    *('"\ue0000\ue001"'.encode(), '"\ue0001\ue001"'.encode(), '"\u2028\u202e\ufeff"'.encode(), b'"{{ messages }}"'),
    *(b"[" * deep + b"]" * deep for deep in (10, 200, 300, 600, 5000)),
    *(b'{"a":' * deep + b"1" + b"}" * deep for deep in (10, 200, 300, 600, 5000)),
    *(b'"assistant"', b'"tool"', b'"gpt"', b'"function_call"', b'"robot"', b'"' + b"long " * 2000 + b'"'),
)
_BYTES = (
    *(b"\x00", b"\r", b"\n", b"\t", b"\x0b", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" "),
    b"\xef\xbb\xbf",
)
_KEYS = (
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "text",
    "label",
    "chosen",
    "weight",
    "tools",
    "a",
)


class Input(NamedTuple):
    """A file: what its name ends with, and what is in it."""

    suffix: str
    content: bytes


def make(random: Random) -> Input:
    """Give a file with some rows of a format, mostly damaged."""
    rows = _rows(random)
    kind = random.choice(("lines", "lines", "lines", "lines", "array", "lines in .json", "gz", "zst"))
    if kind == "array":
        return Input(".json", _damaged(random, _array(random, rows)))
    content = _damaged(random, _lines(random, rows))
    if kind == "gz":
        return Input(".jsonl.gz", _damaged(random, _gzipped(random, content)))
    if kind == "zst":
        return Input(".jsonl.zst", _damaged(random, _zstandard(random, content)))
    return Input(".json" if kind == "lines in .json" else ".jsonl", content)


def _rows(random: Random) -> list[bytes]:
    pool = random.choice(list(FORMATS.values()))
    rows = [_row(random, random.choice(pool)) for _ in range(random.randrange(7))]
    if random.random() < 0.1:
        rows.append(_row(random, random.choice(random.choice(list(FORMATS.values())))))
    return rows


def _row(random: Random, row: dict[str, Any]) -> bytes:
    if random.random() < 0.4:
        return json.dumps(row, ensure_ascii=random.random() < 0.5).encode()
    copy = json.loads(json.dumps(row))
    places = list(_places(copy))
    strange = {}
    for _ in range(random.choice((1, 1, 1, 2))):
        holder, key = random.choice(places)
        mark = f"@{len(strange)}@"
        match random.randrange(4):
            case 0 if isinstance(holder, dict):
                holder.pop(key, None)
            case 1 if isinstance(holder, dict):
                holder[random.choice(_KEYS)] = holder.get(key, mark)
            case _ if isinstance(holder, dict) or key < len(holder):
                holder[key] = mark
                strange[mark] = random.choice(STRANGE)
    text = json.dumps(copy).encode()
    for mark, value in strange.items():
        text = text.replace(json.dumps(mark).encode(), value)
    if random.random() < 0.1:  # the same key twice
        text = text[:-1] + b', "' + random.choice(_KEYS).encode() + b'": ' + random.choice(STRANGE) + b"}"
    return _damaged(random, text)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give every place of a value where another could stand."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _damaged(random: Random, content: bytes) -> bytes:
    """Flip, cut, insert or repeat some bytes; three times of four none."""
    if not content or random.random() < 0.75:
        return content
    at = random.randrange(len(content))
    match random.randrange(5):
        case 0:
            return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
        case 1:
            return content[:at]
        case 2:
            return content[:at] + random.choice(_BYTES) * random.choice((1, 1, 3)) + content[at:]
        case 3:
            return content[:at] + content[at + random.randrange(1, 20) :]
        case _:
            return content[:at] + content[max(0, at - random.randrange(1, 50)) :]


def _lines(random: Random, rows: list[bytes]) -> bytes:
    end = random.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b" \n\t\n", b"\r"))
    start = random.choice((b"", b"", b"", b"", b"\xef\xbb\xbf", b"\n", b"\xff\xfe", b"["))
    return start + end.join(rows) + random.choice((end, end, b"", b"\n\x00\n", b"\n]"))


def _array(random: Random, rows: list[bytes]) -> bytes:
    space = random.choice((b"", b" ", b"\n", b"\n  ", b"\r\n"))
    comma = random.choice((b",", b",", b",", b",", b"", b",,", b", what ,", b" what ", b"]", b"}"))
    start = random.choice((b"[", b"[", b"[", b"\xef\xbb\xbf[", b"\n\n[", b"{}[", b"["))
    if random.random() < 0.3:
        rows = [_pretty(row) for row in rows]
    return (
        start + space + (comma + space).join(rows) + space + random.choice((b"]", b"]\n", b"", b",]", b"]]", b"]\n{}"))
    )


def _pretty(row: bytes) -> bytes:
    try:
        return json.dumps(json.loads(row), indent=2).encode()
    except (ValueError, RecursionError):
        return row


def _gzipped(random: Random, content: bytes) -> bytes:
    middle = random.randrange(len(content) + 1) if random.random() < 0.3 else len(content)
    members = (content[:middle], content[middle:]) if middle < len(content) else (content,)
    return b"".join(gzip.compress(member, 1) for member in members) + random.choice((b"", b"", b"", b"\x00" * 9, b"x"))


def _zstandard(random: Random, content: bytes) -> bytes:
    middle = random.randrange(len(content) + 1) if random.random() < 0.3 else len(content)
    packer = zstandard.ZstdCompressor(level=1, write_checksum=random.random() < 0.5)
    frames = b"".join(packer.compress(part) for part in (content[:middle], content[middle:]))
    return frames + random.choice((b"", b"", b"", b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab", b"x"))


class Told(NamedTuple):
    """What stands in a line: the code of its fault, or its value."""

    line: int
    code: str
    value: Any = None


def told_by_python(content: bytes) -> list[Told]:
    """Say what stands in each line of a file of lines."""
    lines = content.split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if not text:
            continue
        try:
            found.append(Told(number, "", _value(text.decode())))
        except (ValueError, RecursionError) as error:
            fault = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"
            found.append(Told(number, "truncated_last_line" if number == len(lines) else fault))
    return found


# What may stand in an array without spoiling what stands beside it, with its code; the last are rows that are good.
_ELEMENTS: tuple[tuple[bytes, str], ...] = (
    *(
        (text, "not_json")
        for text in (b"NaN", b"what", b'{"a" 1}', b'{"a":1} {"a":2}', b'{"a":[1}]', b'"\\ud800"', b'"\n"', b"")
    ),
    (b'{"a":"\xff,]"}', "not_utf8"),
    *((json.dumps(row, ensure_ascii=False).encode(), "") for row in FORMATS["OpenAI chat"][-4:]),
    *((json.dumps(row, indent=1).encode(), "") for row in FORMATS["OpenAI chat"][-4:]),
    (b'{"text": "a, ] [ \\" \\\\"}', ""),
)


def make_array(random: Random) -> tuple[bytes, list[Told]]:
    """Give an array, in one of three cut off somewhere, and what is to be told of it."""
    content, wanted = random.choice((b"[", b"\xef\xbb\xbf[", b" \n\n[")), []
    first, ends = len(content), []
    for _ in range(random.randrange(1, 9)):
        text, code = random.choice(_ELEMENTS)
        content += random.choice((b"", b" ", b"\n", b"\r\n\t", b"\n" * 40))
        wanted.append(Told(content.count(b"\n") + 1, code, None if code else json.loads(text)))
        content += text + (random.choice((b"", b"\n ")) if text else b"") + b","
        ends.append(len(content))
    if random.random() < 0.66:  # a comma before the end is let pass
        wanted = wanted if text else wanted[:-1]
        return content[:-1] + b"]" + random.choice((b"", b"\n\n")), wanted
    cut = random.randrange(first, len(content))
    whole = [end for end in ends if end <= cut]
    begun = content[max([first, *whole]) : cut]
    line = 1 + content.count(b"\n", 0, cut - len(begun.lstrip()))
    return content[:cut], [*wanted[: len(whole)], Told(line, "truncated_last_line")]


def _value(text: str) -> Any:
    """Parse as Python does, and raise ValueError for what orjson does not take: NaN, infinities, numbers that overflow,
    lone surrogates. Whole numbers of more than 64 bits are floats to it. (Both stop at a depth of about a thousand.)
    """
    value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole, object_pairs_hook=_object)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    json.dumps(pairs, ensure_ascii=False).encode()  # of a key that comes twice the first value too
    return dict(pairs)


def _refuse(text: str) -> None:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(text)
    return number


def _whole(text: str) -> int | float:
    number = float(text) if len(text) > 25 else int(text)
    if math.isinf(number):
        raise ValueError(text)
    return number if -(2**63) <= number < 2**64 and isinstance(number, int) else float(text)
