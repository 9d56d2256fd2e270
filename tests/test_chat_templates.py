"""What is learned of a row, through templates that behave as those of well-known models do."""

from __future__ import annotations

from itertools import groupby

import pytest

from chat_rows import (
    ASKED,
    CALLS,
    CALLS_BESIDE_TEXT,
    CASES,
    CHATS,
    FORMS,
    ONE_CALL,
    THOUGHT_BESIDE,
    TOLD,
    USER,
    answering,
    result,
    turns,
)
from chat_templates import (
    CHATML,
    CHATML_MARKED,
    DEEPSEEK_R1,
    GEMMA3,
    LLAMA3,
    MISTRAL,
    MISTRAL_V3,
    MISTRAL_V7,
    QWEN3,
    SMOLLM3,
    SMOLVLM,
    tokenizer_for,
)
from finetuned.dataset.rows import Message, Row
from finetuned.findings import ERRORS
from finetuned.trainer.tokens import Example, tokenise


def seen(template, messages, tools=None, *, max_length=10_000, merges=()) -> str:
    """Give a row's text with what is learned in «», or the code of its problem.

    A message is a dict: role, content, `learn` where it is False, and what else the template takes.
    """
    tokenizer = tokenizer_for(template, merges=merges)
    row = Row(1, tuple(message_of(**message) for message in messages), tools)
    (result,) = tokenise([row], tokenizer, max_length=max_length)
    if isinstance(result, Example):
        return marked(result.ids, result.supervised, tokenizer)
    assert result[1].code in ERRORS
    return result[1].code


def message_of(role, content, *, learn=True, **extra) -> Message:
    return Message(role, content, learn, extra or None)


def marked(ids, learned, tokenizer) -> str:
    runs = groupby(zip(ids, learned, strict=True), key=lambda pair: bool(pair[1]))
    texts = [(is_learned, tokenizer.decode([token for token, _ in pairs])) for is_learned, pairs in runs]
    return "".join(f"«{text}»" if is_learned else text for is_learned, text in texts)


def unmarked(text: str) -> str:
    return text.replace("«", "").replace("»", "")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_text_written_down_is_the_templates_own(case):
    """Of the tests themselves: but for what is learned, the rows here are what transformers makes of them."""
    tokenizer = tokenizer_for(case.template)
    messages = case.messages
    if case.template is SMOLVLM:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    ids = tokenizer.apply_chat_template(messages, tools=case.tools, return_dict=False)
    assert tokenizer.decode(ids) == unmarked(case.wanted)


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in CASES])
def test_every_answer_and_its_end_are_learned_and_nothing_else(case):
    assert seen(case.template, case.messages, case.tools) == case.wanted


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        pytest.param(MISTRAL, turns("a?", "a", system="Be brief."), id="mistral, a system prompt"),
        pytest.param(MISTRAL, [*turns("a?"), *turns("b?", "b")], id="mistral, two questions"),
        pytest.param(MISTRAL_V3, [*turns("a?"), *turns("b?", "b")], id="mistral-v3, two questions"),
        pytest.param(MISTRAL_V7, [ASKED, result("7"), TOLD], id="mistral-v7, a tool"),
        pytest.param(GEMMA3, [*turns("a?"), *turns("b?", "b")], id="gemma3, two questions"),
        pytest.param(GEMMA3, [*turns("a?", "a"), TOLD], id="gemma3, two answers"),
        pytest.param(GEMMA3, [TOLD, *turns("a?", "a")], id="gemma3, an answer first"),
        pytest.param(GEMMA3, [ASKED, result("7"), TOLD], id="gemma3, a tool"),
        pytest.param(LLAMA3, CALLS_BESIDE_TEXT, id="llama3, two calls at once"),
        pytest.param(
            MISTRAL_V3,
            [ASKED, answering(tool_calls=[{**CALLS[0], "id": "1"}]), result("7"), TOLD],
            id="mistral-v3, a short id",
        ),
    ],
)
def test_a_row_that_a_template_raises_for_is_refused(template, messages):
    assert seen(template, messages) == "template_refuses_row"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        pytest.param(DEEPSEEK_R1, turns("a?", "<think>Hm.</think>a"), id="deepseek-r1, the last thought"),
        pytest.param(DEEPSEEK_R1, [ASKED, THOUGHT_BESIDE], id="deepseek-r1, a thought beside the content"),
        pytest.param(CHATML, [ASKED, THOUGHT_BESIDE], id="chatml, a thought beside the content"),
        pytest.param(CHATML, ONE_CALL, id="chatml, a call"),
        pytest.param(SMOLLM3, ONE_CALL, id="smollm3, a call"),
        pytest.param(
            LLAMA3,
            [ASKED, answering("Let me look.", tool_calls=CALLS[:1])],
            id="llama3, the text beside a call",
        ),
        pytest.param(MISTRAL_V3, turns("a?", "a", system="Be brief."), id="mistral-v3, the system prompt"),
    ],
)
def test_a_text_that_a_template_drops_is_told(template, messages):
    assert seen(template, messages) == "template_drops_text"


@pytest.mark.parametrize("template", [t for t in FORMS if t is not SMOLLM3], ids=lambda t: t.name)
def test_a_row_is_learned_up_to_where_it_is_cut(template):
    messages = turns("a?", "Yes.", "b?", "No.")
    before, rest = seen(template, messages).split("«", 1)
    length = len(tokenizer_for(template)(before).input_ids)
    assert seen(template, messages, max_length=length) == "no_supervised_tokens"
    first = rest.split("»", 1)[0]  # the answer and its end, a token a letter
    assert seen(template, messages, max_length=length + 2) == f"{before}«{first[:2]}»"
    letters = first.index(".") + 2
    assert seen(template, messages, max_length=length + letters) == f"{before}«{first}»"


@pytest.mark.parametrize("template", [CHATML, QWEN3, SMOLLM3], ids=lambda t: t.name)
def test_an_answer_that_is_not_to_be_learned_is_context(template):
    messages = turns("a?", "a", "b?", "b")
    first, rest = seen(template, messages).split("»", 1)
    messages[1]["learn"] = False
    assert seen(template, messages) == unmarked(first) + rest


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("system", [None, "Be brief.", "Be brief. /no_think"])
@pytest.mark.parametrize("template", [CHATML_MARKED, SMOLLM3], ids=lambda t: t.name)
def test_what_a_templates_generation_marks_enclose_is_learned(template, chat, system):
    messages = turns(*chat, system=system)
    tokenizer = tokenizer_for(template)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert seen(template, messages) == marked(theirs["input_ids"], theirs["assistant_masks"], tokenizer)


@pytest.mark.parametrize(
    ("template", "merges", "answer", "wanted"),
    [
        (MISTRAL_V3, (("Ġ", "Y"),), "Yes.", "<s>[INST] a?[/INST]« Yes.</s>»"),
        (CHATML, (("Ċ", "Ċ"),), "\nYes.", USER.format("a?") + "<|im_start|>assistant«\n\nYes.<|im_end|>»\n"),
    ],
    ids=["a space before the answer", "a line break before the answer"],
)
def test_a_token_that_is_half_the_answers_is_learned(template, merges, answer, wanted):
    assert seen(template, turns("a?", answer), merges=merges) == wanted
