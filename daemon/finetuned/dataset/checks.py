"""What makes a message usable, and its text. Pure: a value in, messages or their problems out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from finetuned.dataset.rows import Message, Problem

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

# Beside role and content. Those of the second line go to the chat template as they are.
_KEYS = frozenset({"role", "content", "weight", "tool_calls", "function_call", "refusal"})
_FOR_TEMPLATES = frozenset({"name", "tool_call_id", "reasoning_content", "reasoning", "thinking"})
_KNOWN = _KEYS | _FOR_TEMPLATES
_EXACT = 2**53  # from there on a number with a fraction's format has lost digits


def check_messages(messages: list[Any]) -> tuple[list[Problem], list[Message]]:
    """Bring messages of OpenAI's form into ours, or say all that is wrong with them."""
    problems: list[Problem] = []
    normal: list[Message] = []
    for number, message in enumerate(messages, start=1):
        checked = _check(message)
        if isinstance(checked, Message):
            normal.append(checked)
        else:
            problems += [Problem(code, f"message {number}{detail}") for code, detail in checked]
    return problems, normal


def _check(message: Any) -> Message | list[tuple[str, str]]:
    if not isinstance(message, dict):
        return [("data_type", f" is a {type(message).__name__}")]
    called = bool(message.get("tool_calls") or message.get("function_call"))
    if "role" not in message or ("content" not in message and not called):
        return [("message_missing_key", "")]
    role, content = message["role"], message.get("content")
    problems = []
    if not isinstance(role, str) or role not in ROLES:
        problems.append(("unrecognized_role", f": {_shown(role)}"))
    if not _KNOWN.issuperset(message):
        unknown = sorted(message.keys() - _KNOWN)
        problems.append(("message_unrecognized_key", f": {', '.join(map(repr, unknown))[:100]}"))
    if message.get("weight") not in (None, 0, 1):
        problems.append(("data_type", f": weight {_shown(message['weight'])} is neither 0 nor 1"))
    if content is None and not called:
        problems.append(("missing_content", ""))
    if problems:
        return problems
    try:
        text = "" if content is None else text_of(content)
        extra = _extra(message)
    except ValueError as error:
        return [("data_type", f": {error}")]
    return Message(role, text, message.get("weight") != 0, extra)


def _extra(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give what a template takes beside role and content. Raises ValueError."""
    extra = {name: value for name, value in message.items() if name in _FOR_TEMPLATES and value is not None}
    if message.get("tool_calls") or message.get("function_call"):
        extra["tool_calls"] = _calls(message)
    if extra:
        to_json(extra)  # or else it cannot be compared with others
    return extra or None


def text_of(content: Any) -> str:
    """Give content as the trained text: a string as it is, a list of text parts joined, anything else as JSON.

    Raises ValueError for what would not come out as it was.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        for part in content:
            if part["type"] != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"a part of type {_shown(part['type'])}; texts alone are trained")
        return "".join(part["text"] for part in content)
    if isinstance(content, float) and abs(content) >= _EXACT:
        raise ValueError("a number too large to be kept exactly; write it as a string")
    return to_json(content)


def to_json(value: Any) -> str:
    """Give a value that came from JSON as JSON. Raises ValueError where it is nested deeper than templates can go."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise ValueError("it is nested too deep") from None


def _shown(value: Any) -> str:
    """Give a value for a sentence; of lists and objects, which may be deep and large, the kind."""
    return f"{value!r:.60}" if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give tool calls as chat templates take them, arguments as objects. Raises ValueError."""
    calls = message.get("tool_calls") or [{"type": "function", "function": message["function_call"]}]
    if not isinstance(calls, list):
        raise ValueError("tool_calls is no list")  # noqa: TRY004, of the data, not of the program
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call has no function name")  # noqa: TRY004
        normal = {"type": "function", "function": {**function, "arguments": _arguments(function.get("arguments"))}}
        if isinstance(call.get("id"), str):
            normal["id"] = call["id"]
        found.append(normal)
    return found


def _arguments(value: Any) -> Any:
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
