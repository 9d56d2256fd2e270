"""The formats that people's files have, told by the keys of a row, and how each becomes our normal form.

Pure: a value in, a row or its problems out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from finetuned.dataset.checks import check_messages, to_json
from finetuned.dataset.rows import Problem, Row

_Messages = list[Any] | list[Problem]


@dataclass(frozen=True)
class Format:
    """One of them. A row of this format has all of `keys`; `read` gives its messages in OpenAI's form."""

    name: str
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], list[Any]]


def check_row(line: int, value: Any, expected: Format | None = None) -> tuple[Format | None, Row | list[Problem]]:
    """Bring one row into its normal form, or say all that is wrong with it. Gives the row's format too.

    `expected` is the format of the rows before it; a row of another one is refused.
    """
    if not isinstance(value, dict):
        return None, [Problem("data_type", f"a {type(value).__name__}")]
    if why := _preference(value):
        return None, [Problem("preference_data", why)]
    found = expected if expected and expected.keys <= value.keys() else recognise(value)
    if found is None:
        return None, _unknown(value, expected)
    if expected and found is not expected:
        return found, [Problem("mixed_formats", f"{found.name}, and {expected.name} before it")]
    return found, _chat(line, value, found) if found is not TEXT else _text(line, value)


def recognise(value: dict[str, Any]) -> Format | None:
    """Give the first format whose keys a row has."""
    return next((format_ for format_ in FORMATS if format_.keys <= value.keys()), None)


def _preference(value: dict[str, Any]) -> str:
    """Say why a row is a comparison and no example, if it is one: half of a comparison is no answer."""
    pair = {"chosen", "rejected"} & value.keys()
    if pair:
        return f"keys: {_names(value)}"
    if "label" in value and (isinstance(value["label"], bool) or not {"messages", "conversations"} & value.keys()):
        return f"a label beside {_names({key: 0 for key in value if key != 'label'})}"
    return ""


def _unknown(value: dict[str, Any], expected: Format | None) -> list[Problem]:
    if expected and expected.keys & value.keys():
        missing = ", ".join(sorted(expected.keys - value.keys()))
        return [Problem("message_missing_key", f"{expected.name}, and no {missing}")]
    return [Problem("missing_messages_list", f"keys: {_names(value) or 'none'}")]


def _names(value: dict[str, Any]) -> str:
    return ", ".join(map(str, value))[:200]


def _text(line: int, value: dict[str, Any]) -> Row | list[Problem]:
    text = value["text"]
    if text is None or text == "":
        return [Problem("missing_content", "text")]
    if not isinstance(text, str):
        return [Problem("data_type", f"text is a {type(text).__name__}")]
    return Row(line, (), text=text)


def _chat(line: int, value: dict[str, Any], format_: Format) -> Row | list[Problem]:
    try:
        messages = format_.read(value)
        tools = _tools(value)
    except _WrongError as error:
        return [error.problem]
    problems, normal = check_messages(messages)
    if not problems and not any(message.role == "assistant" for message in normal):
        problems.append(Problem("example_missing_assistant_message"))
    return problems or Row(line, tuple(normal), tools)


class _WrongError(Exception):
    """A row of a known format that cannot be read."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(detail)
        self.problem = Problem(code, detail)


def _list_of(value: dict[str, Any], key: str) -> list[Any]:
    turns = value[key]
    if not isinstance(turns, list) or not turns:
        raise _WrongError(
            "missing_messages_list", f"{key} is {'empty' if turns == [] else f'a {type(turns).__name__}'}"
        )
    return turns


def _tools(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Give the tools that a row offers; some files hold them as JSON in a string, and older ones as functions."""
    tools = value.get("tools") or value.get("functions")
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools) if tools.strip() else None
        except orjson.JSONDecodeError:
            raise _WrongError("data_type", "tools is no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _WrongError("data_type", "tools is no list of objects")
    try:
        to_json(tools)
    except ValueError as error:
        raise _WrongError("data_type", f"tools: {error}") from None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _openai(value: dict[str, Any]) -> list[Any]:
    return _list_of(value, "messages")


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_SHAREGPT_ROLES |= {"observation": "tool", "function_response": "tool"}


def _sharegpt(value: dict[str, Any]) -> list[Any]:
    turns = _list_of(value, "conversations")
    return _system(value) + [_turn(turn) for turn in turns]


def _turn(turn: Any) -> Any:
    """Give a ShareGPT turn as a message; what it lacks is found by the check of messages."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    message = {"weight": turn.get("weight")} if "weight" in turn else {}
    if "value" in turn:
        message["content"] = turn["value"]
    if turn["from"] != "function_call":
        role = turn["from"]
        return {**message, "role": _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role}
    calls = turn.get("value")
    if isinstance(calls, str):
        try:
            calls = orjson.loads(calls)
        except orjson.JSONDecodeError:
            return {**message, "role": "assistant"}  # a call in a language of its own is a text
    calls = calls if isinstance(calls, list) else [calls]
    return {**message, "role": "assistant", "content": None, "tool_calls": calls}


def _alpaca(value: dict[str, Any]) -> list[Any]:
    turns: list[Any] = []
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _WrongError("data_type", "history is no list of pairs")
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = value["instruction"]
    if value.get("input") not in (None, ""):  # as LLaMA-Factory joins them
        if not isinstance(question, str) or not isinstance(value["input"], str):
            raise _WrongError("data_type", "instruction or input is no string")
        question = f"{question}\n{value['input']}" if question else value["input"]
    return [*_system(value), *turns, *_pair(question, value["output"])]


def _prompt_completion(value: dict[str, Any]) -> list[Any]:
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _system(value) + _pair(prompt, completion)
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    given = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return _system(value) + asked + given


def _question_answer(value: dict[str, Any]) -> list[Any]:
    return _system(value) + _pair(value["question"], value["answer"])


def _system(value: dict[str, Any]) -> list[Any]:
    return [{"role": "system", "content": value["system"]}] if value.get("system") not in (None, "") else []


def _pair(question: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TEXT = Format("plain text", frozenset({"text"}), lambda _: [])

FORMATS = (  # a row with the keys of two is of the first: some Alpaca files hold the rendered text as well
    Format("OpenAI chat", frozenset({"messages"}), _openai),
    Format("ShareGPT", frozenset({"conversations"}), _sharegpt),
    Format("Alpaca", frozenset({"instruction", "output"}), _alpaca),
    Format("prompt and completion", frozenset({"prompt", "completion"}), _prompt_completion),
    Format("question and answer", frozenset({"question", "answer"}), _question_answer),
    TEXT,
)
