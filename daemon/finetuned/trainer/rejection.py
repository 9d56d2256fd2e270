"""Rejection sampling: a model answers each question several times, and the answers that a judge finds right are kept as
rows to learn from.

Source: Yuan et al., Scaling Relationship on Learning Mathematical Reasoning with Large Language Models,
arXiv:2308.01825 (RFT); with rounds it is STaR without its hints, Zelikman et al., arXiv:2203.14465.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuned.config import TrainingSettings
from finetuned.dataset.rows import Message, Row
from finetuned.durable import write_file
from finetuned.errors import DataError
from finetuned.judges import Judge
from finetuned.recipe_settings import Rft
from finetuned.trainer.chat import Renderer
from finetuned.trainer.generate import Asker, ask, generating, key_of, never

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Yield:
    """What came of asking."""

    questions: int
    solved: int  # with at least one right answer
    samples: int
    unread: int  # of them, in which the judge found no answer
    right: int
    kept: int

    @property
    def share(self) -> float:
        """Share of the questions that were solved."""
        return self.solved / self.questions

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"{self.solved} of {self.questions} questions answered right at least once ({self.share:.1%}); "
            f"{self.right} of {self.samples} answers right, {self.unread} without an answer in them, {self.kept} kept"
        )

    def as_dict(self) -> dict[str, int]:
        """Give it as it is stored."""
        return asdict(self)

    def judge(self, rft: Rft, *, name: str) -> None:
        """Raise DataError where there is too little to learn from."""
        if self.kept and self.share >= rft.least_yield:
            return
        remedy = f"{self.advice} What it answered is in checkpoints/rft/."
        raise DataError(f"too low a yield: {self}", where=name, remedy=remedy, code="yield_too_low")

    @property
    def advice(self) -> str:
        """What to do about too few right answers."""
        if self.samples - self.unread < self.samples / 2:
            return (
                "Most answers hold none that the judge can read: say in rft.prompt how to end, show it in "
                "rft.examples, or raise rft.max_new_tokens."
            )
        return (
            "Show how to answer in rft.examples, raise rft.samples, take another judge, a larger model or easier "
            "questions."
        )


def ask_and_keep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: TrainingSettings,
    *,
    seed: int,
    made_by: str,
    answers: Path,
    out: Path,
    tell: Callable[[int, int], None],
    asked_to_stop: Callable[[], bool] = never,
) -> Yield:
    """Answer each row's question `rft.samples` times and write those that are right, as chats, to `out`.

    `answers` keeps every answer as it comes, so that after a kill none is asked for twice; `made_by` names the model.
    `tell` hears how many there are, of how many. Raises DataError, OSError, and StopAskedError once `asked_to_stop`.
    """
    rft = settings.rft
    judge, _ = settings.judge.settle(row.messages[-1].content for row in rows)
    renderer = Renderer(tokenizer)
    takes_system = renderer.takes_system()
    texts: dict[str, str] = {}
    keys: list[list[str]] = []  # of each row's answers
    for row in rows:
        shots = [
            turn
            for shot in rft.examples
            for turn in (Message("user", shot.question), Message("assistant", shot.answer))
        ]
        turns = _posed(row, rft, shots, system=takes_system)
        try:
            asked = renderer.render(turns, row.tools, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"the model's chat template refuses the question: {error}",
                where=f"line {row.line}",
                remedy="Mend the row, or take it out.",
                code="template_refuses_row",
            ) from error
        drawn = (str(seed), made_by, str(rft.temperature), str(rft.max_new_tokens))
        keys.append([key_of(asked, str(sample), *drawn) for sample in range(rft.samples)])
        texts |= dict.fromkeys(keys[-1], asked)
    found: dict[str, str] = {}
    failed: list[str] = []
    with generating(model, tokenizer):
        asker = Asker(
            model,
            tokenizer,
            max_new_tokens=rft.max_new_tokens,
            temperature=rft.temperature,
            seed=seed,
            asked_to_stop=asked_to_stop,
        )
        for batch in ask(asker, texts, answers):
            found |= {key: one.text for key, one in batch.items() if one.error is None}
            failed += [one.error for one in batch.values() if one.error is not None]
            tell(len(found), len(texts))
    if 2 * len(failed) > len(texts):  # the model does not work here, which no yield would tell
        raise RuntimeError(f"{len(failed)} of {len(texts)} answers could not be made: {failed[0]}")
    said = [[found.get(key, "") for key in own] for own in keys]
    return _keep(rows, said, judge, rft, out, system=takes_system)


def _posed(row: Row, rft: Rft, shots: Sequence[Message], *, system: bool) -> list[Message]:
    """Give what is asked: the prompt that makes it reason behind the row's own, examples, and the row's turns but the
    last. Where the template takes no system message the first question begins with it.
    """
    own = [turn.content for turn in row.messages if turn.role in {"system", "developer"}]
    turns = [*shots, *(turn for turn in row.messages[:-1] if turn.role not in {"system", "developer"})]
    prompt = "\n\n".join([*own, rft.prompt])
    if system:
        return [Message("system", prompt), *turns]
    return [turns[0]._replace(content=f"{prompt}\n\n{turns[0].content}"), *turns[1:]]


def _keep(rows: Sequence[Row], said: Sequence[list[str]], judge: Judge, rft: Rft, out: Path, *, system: bool) -> Yield:
    """Judge and choose, and write the file in one move."""
    lines: list[bytes] = []
    right = unread = solved = 0
    for row, texts in zip(rows, said, strict=True):
        verdicts = [judge.verdict(text, row.messages[-1].content) for text in texts]
        good = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict.right]
        unread += sum(not verdict.parsed for verdict in verdicts)
        right += len(good)
        solved += bool(good)
        lines += [_line(row, text, rft, system=system) for text in chosen(good, rft)]
    write_file(out, b"".join(lines))
    return Yield(len(rows), solved, len(rows) * rft.samples, unread, right, len(lines))


def _line(row: Row, answer: str, rft: Rft, *, system: bool) -> bytes:
    turns = [*_posed(row, rft, (), system=system), Message("assistant", answer)]
    chat: dict[str, Any] = {"messages": [{"role": m.role, "content": m.content, **(m.extra or {})} for m in turns]}
    if row.tools is not None:
        chat["tools"] = row.tools
    return json.dumps(chat, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def chosen(good: Sequence[str], rft: Rft) -> list[str]:
    """Choose at most `rft.keep` of a question's right answers, no two with the same words."""
    different: dict[str, str] = {}
    for text in sorted(good, key=lambda text: (len(text), text)):
        different.setdefault(" ".join(text.split()), text)
    rest = list(different.values())
    if rft.pick == "shortest":
        return rest[: rft.keep]
    taken = rest[:1]
    while len(taken) < min(rft.keep, len(rest)):
        left = [text for text in rest if text not in taken]
        taken.append(max(left, key=lambda text: min(_distance(text, other) for other in taken)))
    return taken


def _distance(first: str, second: str) -> float:
    """Give 1 less the share of word pairs that two texts have in common (Jaccard's)."""
    one, other = (set(pairwise(["", *text.split(), ""])) for text in (first, second))
    return 1 - len(one & other) / len(one | other)
