"""What makes a row usable, and its normal form. Pure: a value in, a row or its problems out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

REMEDIES = {
    "not_json": "Each line must be one whole JSON object.",
    "not_utf8": "Save the file as UTF-8.",
    "row_too_large": "Split the row.",
    "truncated_last_line": "The upload or export was cut off; make the file again.",
    "data_type": "Each row must be a JSON object.",
    "preference_data": "Chats are trained here, comparisons are not; keep the wanted answer as a chat.",
    "missing_messages_list": 'Write each row as {"messages": [{"role": "user", "content": "..."}, ...]}.',
    "message_missing_key": 'Each message needs "role" and "content".',
    "unrecognized_role": f"Roles are {', '.join(sorted(ROLES))}.",
    "missing_content": 'Give the message a "content"; null cannot be learned.',
    "example_missing_assistant_message": "Without an assistant turn there is nothing to learn from the row.",
    "template_refuses_row": "The model's chat template takes no such row; mend it, or take another model.",
    "template_drops_text": "The model's chat template changes or leaves out a text; another model may keep it.",
    "no_supervised_tokens": "The answer lies behind max_length; raise it or shorten the question.",
}


_OTHER_FORMATS = (
    ({"instruction", "output"}, "Alpaca"),
    ({"conversations"}, "ShareGPT"),
    ({"prompt", "completion"}, "prompt and completion"),
    ({"text"}, "plain text"),
)


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used."""

    code: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A usable row: `line` in the file, and its messages as (role, text)."""

    line: int
    messages: tuple[tuple[str, str], ...]


def check_row(line: int, value: Any) -> Row | list[Problem]:
    """Bring one row into its normal form, or say all that is wrong with it."""
    if not isinstance(value, dict):
        return [Problem("data_type", f"a {type(value).__name__}")]
    if {"chosen", "rejected"} & value.keys():  # also where "messages" stand beside them: half a comparison is no answer
        return [Problem("preference_data", f"keys: {', '.join(map(str, value))}")]
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        known = next((f"looks like {name}; " for keys, name in _OTHER_FORMATS if keys <= value.keys()), "")
        return [Problem("missing_messages_list", f"{known}keys: {', '.join(map(str, value))}")]
    problems, normal = _check_messages(messages)
    if not problems and not any(role == "assistant" for role, _ in normal):
        problems.append(Problem("example_missing_assistant_message"))
    return problems or Row(line, tuple(normal))


def _check_messages(messages: list[Any]) -> tuple[list[Problem], list[tuple[str, str]]]:
    problems: list[Problem] = []
    normal: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            problems.append(Problem("data_type", f"message {number} is a {type(message).__name__}"))
        elif "role" not in message or "content" not in message:
            problems.append(Problem("message_missing_key", f"message {number}"))
        elif not isinstance(message["role"], str) or message["role"] not in ROLES:
            problems.append(Problem("unrecognized_role", f"message {number}: {message['role']!r}"))
        elif message["content"] is None:
            problems.append(Problem("missing_content", f"message {number}"))
        else:
            try:
                normal.append((message["role"], text_of(message["content"])))
            except orjson.JSONEncodeError:
                problems.append(Problem("data_type", f"message {number}: content is nested too deep"))
    return problems, normal


def text_of(content: Any) -> str:
    """Give content as the trained text: a string as it is, a list of text parts joined, anything else as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    return orjson.dumps(content).decode()


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def with_system_prompt(row: Row, prompt: str | None) -> Row:
    """Put the system prompt before a row that has none."""
    if prompt is None or any(role in {"system", "developer"} for role, _ in row.messages):
        return row
    return Row(row.line, (("system", prompt), *row.messages))
