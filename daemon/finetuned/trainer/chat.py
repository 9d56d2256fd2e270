"""Putting a chat into the model's words: rendering it with the tokenizer's template, and finding the answers in it.

Where the assistant turns are is found by rendering the chat once more with marks in place of the answers: what stands
between the marks is the template's own text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from finetuned.dataset.checks import Problem, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000{}\ue001"  # private-use characters: no template treats them in a special way


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template takes a text as a list of parts alone, as those of some models with vision do.

    Tried out: such a template drops plain strings without a word, and one for strings prints a list as Python does.
    """
    marks = [_MARK.format(number) for number in range(2)]
    for parts in (False, True):
        try:
            text = render([("user", marks[0]), ("assistant", marks[1])], tokenizer, parts=parts)
        except (TemplateError, TypeError):
            continue
        if all(mark in text for mark in marks) and not re.search("['\"]type['\"]", text):
            return parts
    return False


def render(
    messages: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, parts: bool, **options: Any
) -> str:
    """Render (role, text) pairs. Raises TemplateError where the template refuses them."""
    chat = [{"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in messages]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def render_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, parts: bool
) -> tuple[str, list[tuple[int, int]] | Problem]:
    """Give the rendered chat and the span of each assistant text in it, or why the template does not do."""
    try:
        text = render(row.messages, tokenizer, parts=parts)
    except TemplateError as error:  # templates raise for roles that they do not know, or in an order they do not like
        return "", Problem("template_refuses_row", str(error))
    if any(role == "user" and content.strip() not in text for role, content in row.messages):
        return text, Problem("template_drops_text", "a user's text")
    answers = [content for role, content in row.messages if role == "assistant"]
    marks = iter(_MARK.format(number) for number in range(len(answers)))
    marked = [(role, next(marks) if role == "assistant" else content) for role, content in row.messages]
    pieces = re.split("\ue000\\d+\ue001", render(marked, tokenizer, parts=parts))
    if len(pieces) != len(answers) + 1:
        return text, Problem("template_drops_text")
    for trimmed in (str, str.strip):  # many templates trim the content
        spans, end = [], 0
        for piece, answer in zip(pieces, answers, strict=False):
            start = end + len(piece)
            end = start + len(trimmed(answer))
            spans.append((start, end))
        if "".join(p + trimmed(a) for p, a in zip(pieces, [*answers, ""], strict=True)) == text:
            return text, spans
    return text, Problem("template_drops_text")
