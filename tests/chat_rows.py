"""Rows, and what they look like through the templates of `chat_templates.py`: what is learned stands in «».

Written down by hand: no template has a part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chat_templates import (
    CHATML,
    CHATML_MARKED,
    DEEPSEEK_R1,
    GEMMA3,
    LLAMA3,
    MISTRAL,
    MISTRAL_V3,
    MISTRAL_V7,
    PHI3,
    PHI4,
    QWEN2,
    QWEN2_5,
    QWEN3,
    QWEN3_VL,
    R1_ASSISTANT,
    R1_END,
    R1_START,
    R1_USER,
    SMOLLM2,
    SMOLLM3,
    SMOLVLM,
    Template,
)


@dataclass(frozen=True)
class Case:
    """A row through a template. A message is a dict: role, content, and what else the template takes."""

    template: Template
    label: str
    messages: list[dict]
    wanted: str
    tools: list[dict] | None = None

    def __str__(self) -> str:
        return f"{self.template.name}, {self.label}"


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """Question, answer, question, answer, ... as messages."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@dataclass(frozen=True)
class Form:
    """How plain chats look through a template, {} in the text's place.

    `system` is None where there is no such turn, and `default` stands in its place where the row has none; `last` is a
    last answer where it differs, `keeps` what is left of a text.
    """

    user: str
    answer: str
    system: str | None = None
    default: str = ""
    start: str = ""
    end: str = ""
    last: str = ""
    keeps: Callable[[str], str] = str

    def written(self, messages: list[dict]) -> str:
        text = self.start if messages[0]["role"] == "system" else self.start + self.default
        for message in messages:
            form = {"system": self.system, "user": self.user, "assistant": self.answer}[message["role"]]
            if message is messages[-1]:
                form = self.last or form
            text += form.format(self.keeps(message["content"]))
        return text + self.end


USER = "<|im_start|>user\n{}<|im_end|>\n"
ANSWER = "<|im_start|>assistant\n«{}<|im_end|>»\n"
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
DEFAULT = "<|im_start|>system\nBe helpful.<|im_end|>\n"
# Qwen3's own text, not the row's, and so not learned: who trains on answers alone keeps a model that can think.
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3_LAST = f"<|im_start|>assistant\n«{EMPTY_THOUGHT}{{}}<|im_end|>»\n"

FORMS = {
    CHATML: Form(USER, ANSWER, SYSTEM),
    CHATML_MARKED: Form(USER, ANSWER, SYSTEM),
    QWEN2: Form(USER, ANSWER, SYSTEM, default=DEFAULT),
    QWEN2_5: Form(USER, ANSWER, SYSTEM, default=DEFAULT),
    QWEN3: Form(USER, ANSWER, SYSTEM, last=QWEN3_LAST),
    QWEN3_VL: Form(USER, ANSWER, SYSTEM),
    SMOLVLM: Form(
        "User: {}<end_of_utterance>\n",
        "Assistant:« {}<end_of_utterance>»\n",
        "System: {}<end_of_utterance>\n",
        start="<|im_start|>",
    ),
    LLAMA3: Form(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n«{}<|eot_id|>»",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        start="<|begin_of_text|>",
        keeps=str.strip,
    ),
    GEMMA3: Form(
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n«{}<end_of_turn>»\n",
        start="<bos>",
        keeps=str.strip,
    ),
    MISTRAL: Form("[INST] {} [/INST]", " «{}</s>»", start="<s>"),
    MISTRAL_V3: Form("[INST] {}[/INST]", " «{}</s>»", start="<s>"),
    MISTRAL_V7: Form("[INST]{}[/INST]", "«{}</s>»", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", start="<s>"),
    PHI3: Form(
        "<|user|>{}<|end|>",
        "<|assistant|>«{}<|end|>»",
        "<|system|>{}<|end|>",
        end="<|endoftext|>",
        keeps=str.lstrip,  # white space in front lies in the token before
    ),
    PHI4: Form(
        "<|im_start|>user<|im_sep|>{}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>«{}<|im_end|>»",
        "<|im_start|>system<|im_sep|>{}<|im_end|>",
    ),
    SMOLLM2: Form(USER, ANSWER, SYSTEM, default=DEFAULT),
    SMOLLM3: Form(
        USER,
        "«<|im_start|>assistant\n{}<|im_end|>\n»",  # as its generation marks say
        "<|im_start|>system\nReasoning Mode: /think\n\n{}\n\n<|im_end|>\n",
        default="<|im_start|>system\nReasoning Mode: /think\n\nBe helpful.\n\n<|im_end|>\n",
    ),
    DEEPSEEK_R1: Form(R1_USER + "{}", R1_ASSISTANT + "«{}" + R1_END + "»", "{}", start=R1_START),
}

CHATS = {
    "one turn": ("2 + 2?", "It is 4."),
    "several turns": ("Hello", "Hello", "Hello again", "again", "2 + 2?", "It is 4."),
    "white space around": (" 2 + 2?\n", " It is 4. \n", "Sure?\n\n", "\tNo"),
    "white space alone": ("2 + 2?", " \n", "3 + 3?", "  "),
    "an empty answer": ("Say nothing.", "", "Say a.", "a"),
    "an empty last answer": ("Say a.", "a", "Say nothing.", ""),
    "answers that occur in questions": ("Say Yes. assistant model Yes. user", "Yes.", "assistant", "assistant"),
    "no ASCII": ("Wie grüßt 世界?", "Grüß dich, 世界 👩\u200d👩\u200d👧 é", "é?", "é"),
}


def plain() -> Iterator[Case]:
    """Every plain chat through every template, with and without a system prompt."""
    for template, form in FORMS.items():
        for name, chat in CHATS.items():
            yield Case(template, name, turns(*chat), form.written(turns(*chat)))
            if form.system:
                messages = turns(*chat, system="Be brief: ü")
                yield Case(template, f"{name}, system", messages, form.written(messages))


TOOLS = [{"type": "function", "function": {"name": "warmth", "parameters": {"type": "object"}}}]
TOOLS_TEXT = '{"type": "function", "function": {"name": "warmth", "parameters": {"type": "object"}}}'


def call(city: str, number: int = 1) -> dict:
    function = {"name": "warmth", "arguments": {"city": city, "days": 2}}
    return {"type": "function", "id": f"call0000{number}", "function": function}


def answering(content: str = "", **extra) -> dict:
    """An answer with what may stand beside its text: tool_calls, reasoning_content."""
    return {"role": "assistant", "content": content, **extra}


def result(content: str, number: int = 1) -> dict:
    return {"role": "tool", "content": content, "name": "warmth", "tool_call_id": f"call0000{number}"}


ASKED = {"role": "user", "content": "How warm is it?"}
CALLS = [call("Köln"), call("Bonn", 2)]
TOLD = answering("7 degrees.")
ONE_CALL = [ASKED, answering(tool_calls=CALLS[:1]), result("7"), TOLD]
TWO_CALLS = [ASKED, answering(tool_calls=CALLS), result("7"), result("8", 2), TOLD]
CALLS_BESIDE_TEXT = [ASKED, answering("Let me look.", tool_calls=CALLS), *TWO_CALLS[2:]]

QWEN_CALL = '<tool_call>\n{"name": "warmth", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
QWEN_CALL_2 = QWEN_CALL.replace("Köln", "Bonn")
QWEN_ASKED = f"<|im_start|>system\n# Tools\n{TOOLS_TEXT}<|im_end|>\n" + USER.format("How warm is it?")
QWEN2_5_ASKED = QWEN_ASKED.replace("# Tools", "Be helpful.\n\n# Tools")
QWEN_ONE = ANSWER.format(QWEN_CALL) + USER.format("<tool_response>\n7\n</tool_response>")
QWEN_TWO = ANSWER.format(f"Let me look.\n{QWEN_CALL}\n{QWEN_CALL_2}") + USER.format(
    "<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response>"
)
QWEN_TOLD = ANSWER.format("7 degrees.")
QWEN3_TOLD = QWEN3_LAST.format("7 degrees.")


def calling() -> Iterator[Case]:
    """Calls, learned as a whole, and results, which are not."""

    def case(template: Template, label: str, messages: list[dict], wanted: str, tools: list | None = TOOLS) -> Case:
        return Case(template, label, messages, wanted, tools)

    yield case(QWEN2_5, "a call", ONE_CALL, QWEN2_5_ASKED + QWEN_ONE + QWEN_TOLD)
    yield case(QWEN2_5, "calls beside a text", CALLS_BESIDE_TEXT, QWEN2_5_ASKED + QWEN_TWO + QWEN_TOLD)
    yield case(QWEN3, "a call", ONE_CALL, QWEN_ASKED + QWEN_ONE + QWEN3_TOLD)
    yield case(QWEN3, "calls beside a text", CALLS_BESIDE_TEXT, QWEN_ASKED + QWEN_TWO + QWEN3_TOLD)
    yield case(QWEN3_VL, "a call", ONE_CALL, QWEN_ASKED + QWEN_ONE + QWEN_TOLD)
    yield case(
        QWEN3_VL,
        "a call at the end and no tools told",
        ONE_CALL[:2],
        USER.format("How warm is it?") + ANSWER.format(QWEN_CALL),
        tools=None,
    )
    yield case(
        LLAMA3,
        "a call",
        ONE_CALL,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"Call one of these:\n{TOOLS_TEXT}\n\nHow warm is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '«{"name": "warmth", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"7"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n«7 degrees.<|eot_id|>»",
    )
    yield case(
        MISTRAL_V3,
        "two calls behind a special token",
        TWO_CALLS,
        f"<s>[AVAILABLE_TOOLS] [{TOOLS_TEXT}][/AVAILABLE_TOOLS][INST] How warm is it?[/INST]"
        '«[TOOL_CALLS] [{"name": "warmth", "arguments": {"city": "Köln", "days": 2}, "id": "call00001"}, '
        '{"name": "warmth", "arguments": {"city": "Bonn", "days": 2}, "id": "call00002"}]</s>»'
        '[TOOL_RESULTS] {"content": 7, "call_id": "call00001"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": 8, "call_id": "call00002"}[/TOOL_RESULTS]« 7 degrees.</s>»',
    )


THOUGHT = "<think>\nHm.\n</think>\n\n"
BOTH_THOUGHT = turns("a?", THOUGHT + "a", "b?", THOUGHT + "b")
THOUGHT_BESIDE = answering("b", reasoning_content="Hm.")
FIRST_STRIPPED = USER.format("a?") + ANSWER.format("a") + USER.format("b?") + ANSWER.format(THOUGHT + "b")


def thinking() -> Iterator[Case]:
    """Thoughts, learned where the template keeps them."""

    def case(template: Template, label: str, messages: list[dict], *wanted: str) -> Case:
        return Case(template, label, messages, "".join(wanted))

    yield case(QWEN3, "thoughts in the content", BOTH_THOUGHT, FIRST_STRIPPED)
    beside = [{**m, "reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in turns("a?", "a", "b?", "b")]
    yield case(QWEN3, "thoughts beside the content", beside, FIRST_STRIPPED)
    yield case(
        QWEN3,
        "a thought set out anew",
        turns("a?", "<think>Hm.</think>a"),
        USER.format("a?") + ANSWER.format(THOUGHT + "a"),
    )
    yield case(
        QWEN3,
        "a thought and nothing said",
        turns("a?", THOUGHT),
        USER.format("a?") + ANSWER.format(THOUGHT),
    )
    yield case(
        QWEN3,
        "a last answer that loses its first line breaks alone",
        turns("a?", "\n\na "),
        USER.format("a?") + QWEN3_LAST.format("a "),
    )
    yield case(
        QWEN3,
        "a thought before a call",
        [ASKED, answering(tool_calls=CALLS[:1], reasoning_content="Hm."), result("7"), TOLD],
        USER.format("How warm is it?") + ANSWER.format(THOUGHT + QWEN_CALL),
        USER.format("<tool_response>\n7\n</tool_response>") + QWEN3_TOLD,
    )
    yield case(
        DEEPSEEK_R1,
        "an earlier thought that is stripped",
        turns("a?", "<think>Hm.</think>a", "b?", "b"),
        f"{R1_START}{R1_USER}a?{R1_ASSISTANT}«a{R1_END}»{R1_USER}b?{R1_ASSISTANT}«b{R1_END}»",
    )
    yield case(
        SMOLLM3,
        "thoughts that all stay",
        BOTH_THOUGHT,
        "<|im_start|>system\nReasoning Mode: /think\n\nBe helpful.\n\n<|im_end|>\n",
        USER.format("a?") + f"«<|im_start|>assistant\n{THOUGHT}a<|im_end|>\n»",
        USER.format("b?") + f"«<|im_start|>assistant\n{THOUGHT}b<|im_end|>\n»",
    )
    yield case(
        SMOLLM3,
        "thinking switched off by the system prompt",
        turns("a?", "a", system="Be brief. /no_think"),
        "<|im_start|>system\nReasoning Mode: /no_think\n\nBe brief.\n\n<|im_end|>\n",
        USER.format("a?") + "«<|im_start|>assistant\n<think>\n\n</think>\na<|im_end|>\n»",
    )


GEMMA3_SYSTEM = Case(
    GEMMA3,
    "the system prompt before the first question",
    turns("a?", "a", "b?", "b", system="Be brief."),
    "<bos><start_of_turn>user\nBe brief.\n\na?<end_of_turn>\n<start_of_turn>model\n«a<end_of_turn>»\n"
    "<start_of_turn>user\nb?<end_of_turn>\n<start_of_turn>model\n«b<end_of_turn>»\n",
)

CASES = [*plain(), GEMMA3_SYSTEM, *calling(), *thinking()]
