"""Putting a chat into the model's words: rendering it with the tokenizer's template, and finding in it what the model
has to write itself.

A template is rendered once for each *shape* of chat (its roles in order) with marks in place of the texts. What stands
between the marks is the template's own text; a row whose rendering is just that with the row's texts in place of the
marks has been understood. Rows for which this is not so, because the template cuts thoughts or writes out tool calls,
are looked at one by one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import orjson
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from finetuned.dataset.rows import Message, Problem, Row
from finetuned.errors import ModelError

# What templates raise, on purpose and by calling what a value does not have.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_MARK = "\ue000{}\ue001"  # private-use characters: no template treats them in a special way
_MARKS = re.compile("\ue000\\d+\ue001")
_MOST_SHAPES = 1000
_THOUGHT_END = "</think>"
_SWITCHES = re.compile(r"/(no_)?think\b")  # in a system prompt; templates obey them and leave them out
_GENERATION = re.compile(r"\{%-?\s*generation\b")

Span = tuple[int, int]  # of characters


class Rendered(NamedTuple):
    """A chat in the model's words. `spans` are what is learned, in order; at `begin` the system prompt is over."""

    text: str
    spans: list[Span]
    begin: int
    ended: bool = False  # whether the spans hold the ends of their turns


class _Skeleton(NamedTuple):
    """What a template writes around texts: before each of them, and behind the last."""

    pieces: list[str]
    leads: list[int]  # characters at the end of each piece that the model has to write itself, before an answer


class Renderer:
    """A tokenizer's chat template, and what was found out about it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        self._parts = takes_parts(tokenizer)
        usual = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        self._compiled = _compile_jinja_template(self._template) if usual and not self._parts else None
        self._constants = {"tools": None, "documents": None, "add_generation_prompt": False}
        self._constants |= tokenizer.special_tokens_map
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}
        self._prompt = self._generation_prompt()
        self._says_what_is_learned = bool(_GENERATION.search(self._template))

    def takes_system(self) -> bool:
        """Whether the template takes a system message, and writes it down."""
        turns = [Message(role, _MARK.format(number)) for number, role in enumerate(("system", "user", "assistant"))]
        try:
            return _MARK.format(0) in self.render(turns)
        except _REFUSALS:
            return False

    def render(self, messages: Iterable[Message], tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
        """Render one chat. Raises what a template raises that refuses it."""
        offered = {"tools": tools} if tools else {}
        chat = self._chat(messages)
        return str(self._tokenizer.apply_chat_template(chat, tokenize=False, **offered, **options))

    def render_rows(self, rows: Sequence[Row]) -> list[Rendered | Problem]:
        """Render rows and find what is to be learned, or why the template does not do.

        Raises ModelError where there is none: a base model learns plain texts alone.
        """
        if not self._template:
            raise ModelError(
                "the model has no chat template, so chats cannot be put into its words",
                where=self._tokenizer.name_or_path,
                remedy="Take its instruct or chat variant; without one it can learn plain texts.",
                code="no_chat_template",
            )
        return [self._row(row, self._plain(row)) for row in rows]

    def _plain(self, row: Row) -> str | None:
        """Render a chat of texts alone with the compiled template: `apply_chat_template` copies what it is given, which
        takes as long as the rendering. None where it has to do it, or where the template refuses the row.
        """
        if self._compiled is None or row.tools is not None or any(turn.extra for turn in row.messages):
            return None
        chat = [{"role": turn.role, "content": turn.content} for turn in row.messages]
        try:
            return str(self._compiled.render(messages=chat, **self._constants))
        except _REFUSALS:
            return None

    def _row(self, row: Row, text: str | None) -> Rendered | Problem:
        try:
            if self._says_what_is_learned:
                return self._by_generation_marks(row)
            if text is None:
                try:
                    text = self.render(row.messages, row.tools)
                except TypeError:
                    row = self._with_arguments_as_text(row)
                    text = self.render(row.messages, row.tools)
            if found := self._by_skeleton(row, text):
                return found
            marked = self._by_marks(row, text)
            if isinstance(marked, Rendered):
                return marked
            cut = self._by_prefixes(row, text)
            return cut if marked is None or isinstance(cut, Rendered) else marked
        except _REFUSALS as error:
            return Problem("template_refuses_row", f"{error}"[:200])

    def _with_arguments_as_text(self, row: Row) -> Row:
        """Some templates take the arguments of a tool call as JSON in a string, and refuse an object."""

        def texts(call: dict[str, Any]) -> dict[str, Any]:
            arguments = orjson.dumps(call["function"]["arguments"]).decode()
            return {**call, "function": {**call["function"], "arguments": arguments}}

        turns = [
            turn._replace(extra={**turn.extra, "tool_calls": [texts(call) for call in turn.extra["tool_calls"]]})
            if turn.extra and "tool_calls" in turn.extra
            else turn
            for turn in row.messages
        ]
        return replace(row, messages=tuple(turns))

    def _chat(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        if self._parts:
            return [
                {"role": m.role, "content": [{"type": "text", "text": m.content}], **(m.extra or {})} for m in messages
            ]
        return [{"role": m.role, "content": m.content, **(m.extra or {})} for m in messages]

    def _generation_prompt(self) -> str:
        """Give what the template writes before a model's turn: what comes behind it the model writes itself."""
        asked = [Message("user", _MARK.format(0))]
        try:
            without, prompted = self.render(asked), self.render(asked, add_generation_prompt=True)
        except _REFUSALS:
            return ""
        return prompted.removeprefix(without) if prompted.startswith(without) else ""

    def _lead(self, piece: str) -> int:
        """Count the characters at the end of a piece that come behind the generation prompt."""
        place = piece.rfind(self._prompt) if self._prompt else -1
        return len(piece) - place - len(self._prompt) if place >= 0 else 0

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if roles not in self._skeletons:
            if len(self._skeletons) >= _MOST_SHAPES:
                self._skeletons.clear()
            self._skeletons[roles] = self._find_skeleton(roles)
        return self._skeletons[roles]

    def _find_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        try:
            text = self.render(Message(role, _MARK.format(number)) for number, role in enumerate(roles))
        except _REFUSALS:
            return None
        if _MARKS.findall(text) != [_MARK.format(number) for number in range(len(roles))]:
            return None
        pieces = _MARKS.split(text)
        return _Skeleton(pieces, [self._lead(piece) for piece in pieces])

    def _by_skeleton(self, row: Row, text: str) -> Rendered | None:
        """Find the answers where the template writes texts as they are, or without white space around them."""
        if row.tools or any(turn.extra for turn in row.messages):
            return None
        skeleton = self._skeleton(tuple([turn.role for turn in row.messages]))
        if skeleton is None:
            return None
        for trimmed in (_as_it_is, str.strip):
            parts: list[str] = []
            spans, end, begin = [], 0, -1
            for piece, lead, turn in zip(skeleton.pieces, skeleton.leads, row.messages, strict=False):
                content = trimmed(turn.content)
                parts += (piece, content)
                start = end + len(piece)
                end = start + len(content)
                if turn.role == "assistant" and turn.learn:
                    spans.append((start - lead, end))
                if begin < 0 and turn.role not in {"system", "developer"}:
                    begin = start
            parts.append(skeleton.pieces[-1])
            if "".join(parts) == text:
                return Rendered(text, spans, max(begin, 0))
        return None

    def _by_marks(self, row: Row, text: str) -> Rendered | Problem | None:
        """Find the answers of one row by rendering it with marks in place of them.

        A thought and the answer behind it are marked apart, as templates write them apart or leave the thought out.
        """
        turns, marks = [], 0
        for turn in row.messages:
            if turn.role != "assistant":
                turns.append(turn)
                continue
            thought, answer = _MARK.format(marks), _MARK.format(marks + 1)
            marks += 2
            extra = {
                name: thought for name in turn.extra or () if name in {"reasoning_content", "reasoning", "thinking"}
            }
            written = f"<think>\n{thought}\n{_THOUGHT_END}\n\n{answer}" if _THOUGHT_END in turn.content else answer
            turns.append(turn._replace(content=written, extra=extra or None))
        try:
            marked = self.render(turns, row.tools)
        except _REFUSALS:
            return None
        pieces = _MARKS.split(marked)
        numbers = [int(mark[1:-1]) for mark in _MARKS.findall(marked)]
        if [number for number in numbers if number % 2] != list(range(1, marks, 2)):
            return None
        spans, place = [], 0
        for index, number in enumerate(numbers):
            piece = pieces[index]
            if number % 2 == 0:  # a thought: the answer begins with the mark that opens it
                continue
            thinks = index > 0 and numbers[index - 1] == number - 1
            before = pieces[index - 1] if thinks else piece
            opening = before.rfind("<think>") if thinks and "<think>" in before else len(before) - self._lead(before)
            start = _follow(text, place, before[:opening])
            behind = pieces[index + 1]
            end = text.rfind(behind) if index + 1 == len(numbers) else _place_of(text, start, behind)
            if start < 0 or end < start:
                return None
            spans.append((start, end))
            place = end
        return _checked(row, text, spans)

    def _by_prefixes(self, row: Row, text: str) -> Rendered | Problem:
        """Find the answers of one row by rendering what comes before each, and each with what comes before it."""
        spans = []
        for index, turn in enumerate(row.messages):
            if turn.role == "assistant":
                before = self._prefix(row, index, text, add_generation_prompt=True)
                behind = self._prefix(row, index + 1, text)
                if behind <= before or not _holds(text[before:behind], turn, last=index + 1 == len(row.messages)):
                    return _dropped(row, index + 1)
                spans.append((before, behind))
        return _ended(_checked(row, text, spans))

    def _by_generation_marks(self, row: Row) -> Rendered | Problem:
        """Take what the template itself says is the model's."""
        (text,), (spans,) = render_jinja_template(
            [self._chat(row.messages)],
            tools=row.tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return _ended(_checked(row, text, spans))

    def _prefix(self, row: Row, turns: int, text: str, **options: Any) -> int:
        """Count the characters that a chat cut short has in common with the whole."""
        try:
            cut = self.render(row.messages[:turns], row.tools, **options)
        except _REFUSALS:
            return 0
        alike = bisect_left(range(len(cut) + 1), True, key=lambda size: not text.startswith(cut[:size]))
        return alike - 1


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template takes a text as a list of parts alone, as those of some models with vision do.

    Tried out: such a template drops plain strings without a word, and one for strings prints a list as Python does.
    """
    marks = [_MARK.format(number) for number in range(2)]
    for parts in (False, True):
        chat = [
            {"role": role, "content": [{"type": "text", "text": mark}] if parts else mark}
            for role, mark in zip(("user", "assistant"), marks, strict=True)
        ]
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        except _REFUSALS:
            continue
        if all(mark in text for mark in marks) and not re.search("['\"]type['\"]", text):
            return parts
    return False


def _ended(found: Rendered | Problem) -> Rendered | Problem:
    return found._replace(ended=True) if isinstance(found, Rendered) else found


def _as_it_is(text: str) -> str:
    return text


def _follow(text: str, place: int, piece: str) -> int:
    """Give where a piece of the template ends that begins at `place`; white space at its end may be missing."""
    for wanted in (piece, piece.rstrip()):
        if text.startswith(wanted, place):
            return place + len(wanted)
    return -1


def _place_of(text: str, start: int, piece: str) -> int:
    found = text.find(piece, start) if piece else -1
    return found if found >= 0 else text.find(piece.rstrip(), start)


def _checked(row: Row, text: str, spans: list[Span]) -> Rendered | Problem:
    """Look whether every text of a row is where it belongs."""
    for turn in row.messages:
        configured = row.prompted and turn.role == "system"
        if turn.role == "assistant" or configured:
            continue
        said = _SWITCHES.sub("", turn.content).strip()
        if said not in text and orjson.dumps(said).decode()[1:-1] not in text:  # some write results of tools as JSON
            return Problem("template_drops_text", f"a {turn.role}'s text")
    for tool in row.tools or ():
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if isinstance(name, str) and name not in text:
            return Problem("template_drops_text", f"the tool {name:.40}")
    answers = [(number, turn) for number, turn in enumerate(row.messages, 1) if turn.role == "assistant"]
    if len(spans) != len(answers):
        return Problem("template_drops_text", f"{len(spans)} answers of {len(answers)} are marked")
    for (number, turn), (start, end) in zip(answers, spans, strict=True):
        if not _holds(text[start:end], turn, last=number == len(row.messages)):
            return _dropped(row, number)
    learned = [span for (_, turn), span in zip(answers, spans, strict=True) if turn.learn]
    first = next((turn.content.strip() for turn in row.messages if turn.role not in {"system", "developer"}), "")
    return Rendered(text, learned, max(0, text.find(first)))


def _dropped(row: Row, number: int) -> Problem:
    """Name the message as the file counts it, which does not hold the configured system prompt."""
    return Problem("template_drops_text", f"message {number - row.prompted}")


def _holds(written: str, turn: Message, *, last: bool) -> bool:
    """Whether all that an answer says is in what the template wrote for it."""
    thought, _, answer = turn.content.rpartition(_THOUGHT_END)
    wanted = [answer.strip()]
    if last:  # of earlier turns templates leave thoughts out on purpose, and so they do when the model is used
        wanted.append(thought.strip().removeprefix("<think>").strip())
        wanted += [(turn.extra or {}).get(name) or "" for name in ("reasoning_content", "reasoning", "thinking")]
    wanted += [call["function"]["name"] for call in (turn.extra or {}).get("tool_calls", [])]
    return all(part.strip() in written for part in wanted)
