"""The normal form of a row: a chat, or a plain text. Every format ends here, and the trainer knows no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson


class Problem(NamedTuple):
    """Why a row cannot be used: a code of `findings.ERRORS`."""

    code: str
    detail: str = ""


class Message(NamedTuple):
    """One turn. `learn` counts for the assistant's alone."""

    role: str
    content: str
    learn: bool = True
    extra: Mapping[str, Any] | None = None  # what a template takes beside: tool_calls, name, reasoning_content, ...


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row. `line` is where it begins in the file, from 1."""

    line: int
    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None  # of continued pre-training, where there are no messages
    prompted: bool = False  # whether its system message is the configured one

    @property
    def answers(self) -> list[Message]:
        """Turns that are learned."""
        return [message for message in self.messages if message.role == "assistant" and message.learn]

    def hashes(self) -> tuple[int, int]:
        """Give two numbers of 64 bits: one that equal rows share, and one that rows with the same question share.

        The configured system prompt counts for neither.
        """
        if self.text is not None:
            number = _number(self.text.encode())
            return number, number
        turns = self.messages[1:] if self.prompted else self.messages
        whole = [_bytes_of(turn) for turn in turns]
        if self.tools:
            whole.append(orjson.dumps(self.tools, option=orjson.OPT_SORT_KEYS))
        last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
        asked = [part for part, turn in zip(whole[:last], turns, strict=False) if turn.role != "system"]
        return _number(b"\0".join(whole)), _number(b"\0".join(asked or whole))


def _bytes_of(turn: Message) -> bytes:
    text = f"{turn.role}\1{turn.content}\1{turn.learn}".encode()
    return text if turn.extra is None else text + orjson.dumps(turn.extra, option=orjson.OPT_SORT_KEYS)


def _number(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


def with_system_prompt(row: Row, prompt: str | None) -> Row:
    """Put the system prompt before a chat that has none."""
    if prompt is None or not row.messages or any(turn.role in {"system", "developer"} for turn in row.messages):
        return row
    return replace(row, messages=(Message("system", prompt), *row.messages), prompted=True)
