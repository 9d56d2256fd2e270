"""What is odd in rows that can be trained: the warnings of the report."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from finetuned.dataset.report import Fault, Report
from finetuned.dataset.rows import Message, Row
from finetuned.errors import counted
from finetuned.findings import Warned
from finetuned.trainer.near import ALIKE, MOST_ROWS, NearDuplicates

# The share of rows from which these are told; a few such answers are nothing to speak of.
_TOLD_FROM: dict[Warned, float] = {"bare_number_answers": 0.01, "single_token_answers": 0.01}
_DOMINANT, _FEWEST = 0.1, 20  # share of rows with the same answer, and how many it must be at least
_PROMPTS_READ, _PROMPT_READ = 1000, 1000  # different system prompts, and characters of each
_NUMBER = re.compile(r"[-+]?(\d+([.,]\d+)?|\d{1,3}([,.]\d{3})+([.,]\d+)?|[.,]\d+) ?%?")
_LONGEST_NUMBER = 40  # characters
# Marks of widely used chat templates; those of the model's own tokenizer come to them.
_MARKS: tuple[str, ...] = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end|>",
    "<|user|>",
)
_MARKS += ("<|assistant|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")


@dataclass
class _Prompt:
    text: str  # its beginning
    line: int  # of the first row that has it
    rows: int = 1


class Quality:
    """Looks at rows one by one, and at all of them at the end."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        """Begin. `special_tokens` are those of the model's tokenizer."""
        marks = sorted({*_MARKS, *filter(str.strip, special_tokens)}, key=len, reverse=True)
        self._leak = re.compile("|".join(map(re.escape, marks)))
        self._leak_starts = {mark[0] for mark in marks}
        self.near = NearDuplicates()
        self._answers = array("q")  # hashes of last answers
        self._answered = array("q")  # their lines
        self._prompts: dict[int, _Prompt] = {}  # different system prompts, by hash

    def see(self, row: Row, report: Report) -> None:
        """Look at a row that will be trained."""
        line = row.line
        if row.text is not None:
            self._look_for_marks(line, row.text, report)
            return
        self._look_for_marks(line, "\n".join([turn.content for turn in row.messages]), report)
        answers = row.answers
        if number := next((answer.content for answer in answers if _is_number(answer.content)), ""):
            report.warn("bare_number_answers", line, number.strip())
        if any(not answer.content.strip() and not answer.extra for answer in answers):
            report.warn("empty_answers", line)
        if any(
            answer.role == "assistant"
            and asked.role == "user"
            and answer.content.strip() == asked.content.strip() != ""
            for asked, answer in pairwise(row.messages)
        ):
            report.warn("answer_equals_prompt", line)
        if why := out_of_order(row.messages):
            report.warn("roles_out_of_order", line, why)
        if row.prompted:
            report.warn("system_prompt_added", line)
        elif row.messages[0].role == "system":
            self._see_prompt(row.messages[0].content, line)
        if answers:
            self._answers.append(hash(answers[-1].content))
            self._answered.append(line)

    def conclude(self, report: Report, *, lines: NDArray[np.int64], identities: NDArray[np.int64]) -> None:
        """Look at all rows together: `lines` and `identities` of those that will be trained, one each."""
        _exact(report, lines, identities)
        self._near(report, lines, identities)
        self._dominant(report, len(lines))
        self._languages(report)
        for code, share in _TOLD_FROM.items():
            if code in report.warnings and report.warnings[code].count < share * len(lines):
                del report.warnings[code]

    def _see_prompt(self, prompt: str, line: int) -> None:
        known = self._prompts.get(hash(prompt))
        if known is not None:
            known.rows += 1
        elif len(self._prompts) < _PROMPTS_READ:
            self._prompts[hash(prompt)] = _Prompt(prompt[:_PROMPT_READ], line)

    def _look_for_marks(self, line: int, text: str, report: Report) -> None:
        if any(start in text for start in self._leak_starts) and (found := self._leak.search(text)):
            report.warn("leaked_special_tokens", line, found.group())

    def _near(self, report: Report, lines: NDArray[np.int64], identities: NDArray[np.int64]) -> None:
        found = self.near.found()
        found = found[~_repeated(identities)[found]]  # told as exact ones already
        if len(found):
            among = f"among the first {MOST_ROWS:,}, " if len(lines) > MOST_ROWS else ""
            detail = f"{among}at least {ALIKE:.0%} of the token sequences are shared"
            report.warnings["near_duplicates"] = Fault(len(found), lines[found][:3].tolist(), detail)

    def _dominant(self, report: Report, rows: int) -> None:
        if not self._answers:
            return
        _, first, counts = np.unique(np.frombuffer(self._answers, np.int64), return_index=True, return_counts=True)
        most = int(counts.argmax())
        if counts[most] >= max(_FEWEST, _DOMINANT * rows):
            report.warnings["dominant_answer"] = Fault(int(counts[most]), [self._answered[int(first[most])]])

    def _languages(self, report: Report) -> None:
        if len(self._prompts) < 2:
            return
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        tell = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        first: dict[str, int] = {}
        counts: dict[str, int] = {}  # rows
        for prompt in self._prompts.values():
            language, sure = tell.classify(prompt.text)
            if sure > 0.9 and len(prompt.text) >= 20:
                first.setdefault(language, prompt.line)
                counts[language] = counts.get(language, 0) + prompt.rows
        if len(first) > 1:
            usual = max(counts, key=lambda language: counts[language])
            others = sum(counts.values()) - counts[usual]
            lines = sorted(line for language, line in first.items() if language != usual)[:3]
            detail = ", ".join(f"{name}: {counted(counts[name], 'row')}" for name in sorted(counts))
            report.warnings["mixed_system_languages"] = Fault(others, lines, detail)


def _is_number(answer: str) -> bool:
    return len(answer) <= _LONGEST_NUMBER and _NUMBER.fullmatch(answer.strip()) is not None


def out_of_order(messages: Collection[Message]) -> str:
    """Say what is odd in the order of roles; nothing where a chat goes as chats do."""
    before = ""
    for number, turn in enumerate(messages, start=1):
        role = {"developer": "system", "function": "tool"}.get(turn.role, turn.role)
        if role == "system" and number > 1:
            return f"message {number} is a system message behind others"
        if role == "tool" and before not in {"assistant", "tool"}:
            return f"message {number} is a tool's, and no call stands before it"
        if role == before and role != "tool":
            return f"messages {number - 1} and {number} are both the {role}'s"
        if role == "assistant" and before in {"", "system"}:
            return "it begins with an answer"
        before = role
    return "" if before == "assistant" else "the last message is not the assistant's"


def _repeated(identities: NDArray[np.int64]) -> NDArray[np.bool_]:
    _, first = np.unique(identities, return_index=True)
    again = np.ones(len(identities), bool)
    again[first] = False
    return again


def _exact(report: Report, lines: NDArray[np.int64], identities: NDArray[np.int64]) -> None:
    again = np.flatnonzero(_repeated(identities))
    if len(again):
        line = int(lines[int(np.flatnonzero(identities == identities[again[0]])[0])])
        detail = f"line {lines[again[0]]} repeats line {line}"
        report.warnings["exact_duplicates"] = Fault(len(again), lines[again][:3].tolist(), detail)
