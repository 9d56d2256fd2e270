"""Measuring a model on rows that it did not learn: the loss on their answers, and how many it gets right by itself.

The way of a question is: rendered, put to the model, answered, and only then judged. What answers gets nothing but the
rendered questions, so nothing on that way could look an answer up.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuned import intervals
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import Report, judge, rows_of
from finetuned.dataset.rows import Row
from finetuned.durable import sha256_of
from finetuned.errors import DataError
from finetuned.judges import Judge, Verdict
from finetuned.section_settings import JudgeSettings
from finetuned.trainer import memory, steps
from finetuned.trainer.chat import Renderer
from finetuned.trainer.generate import Answered, Asker, ask, generating, key_of, never
from finetuned.trainer.layout import Layout, rows_stand_alone
from finetuned.trainer.loss import each_loss
from finetuned.trainer.model import causal, evaluating
from finetuned.trainer.overlap import Learned, Seen
from finetuned.trainer.prompted import Prompted
from finetuned.trainer.soft_prompt import soft_tokens
from finetuned.trainer.tokens import Example, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BOUND = 8, 4096  # rows and tokens of a batch whose loss is measured
_KEPT_DAYS = 14.0  # after the last use
_HASHED = 2**24  # elements at once

Told = Callable[[str, float], None]  # what is done, and the share of it; may raise to end it


@dataclass(frozen=True)
class Question:
    """What is asked about a row, as the model sees it, and as people do."""

    row: int  # its place among the rows
    text: str
    asked: str
    expected: str


@dataclass(frozen=True)
class Exam:
    """Rows to measure models by. Of a plain text the loss alone is measured."""

    name: str
    sha256: str
    rows: list[Row]
    examples: list[Example]
    questions: list[Question]
    judge: Judge
    why: str  # it is that judge
    max_new_tokens: int


def read_exam(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None,
    max_length: int,
    judged: JudgeSettings,
    max_new_tokens: int,
) -> Exam:
    """Read the rows. Raises DataError where one cannot be used or judged, ModelError without a template, OSError."""
    report, renderer = Report(), Renderer(tokenizer)
    prompt = system_prompt if renderer.takes_system() else None
    rows = list(rows_of(RowFile(file, name=file.name), report, system_prompt=prompt))
    examples = []
    for one in tokenise(rows, tokenizer, max_length=max_length):
        if isinstance(one, Example):
            examples.append(one)
        else:
            report.add(one[0].line, [one[1]])
    judge(report, name=file.name, max_bad_rows=0.0, held_out=True)
    questions = [asked for place, row in enumerate(rows) if (asked := _question(place, row, renderer, file.name))]
    settled, why = judged.settle(one.expected for one in questions)
    unfit = [rows[one.row].line for one in questions if not settled.can_judge(one.expected)]
    if unfit:
        raise DataError(
            f"{len(unfit)} of {len(questions)} expected answers cannot be judged by {settled.kind}",
            where=f"{file.name}:{unfit[0]}",
            remedy="Take another judge, or mend them.",
        )
    return Exam(file.name, sha256_of(file), rows, examples, questions, settled, why, max_new_tokens)


def _question(place: int, row: Row, renderer: Renderer, name: str) -> Question | None:
    """Ask for the last turn of the assistant, with all that comes before it. Raises DataError."""
    turn = max((n for n, one in enumerate(row.messages) if one.role == "assistant"), default=0)
    if not turn:
        return None
    try:
        text = renderer.render(row.messages[:turn], row.tools, add_generation_prompt=True)
    except Exception as error:
        raise DataError(
            f"the model's chat template refuses the question: {error}",
            where=f"{name}:{row.line}",
            remedy="Mend the row, or take it out.",
            code="template_refuses_row",
        ) from error
    return Question(place, text, row.messages[turn - 1].content, row.messages[turn].content)


@dataclass(frozen=True)
class Candidate:
    """A model that is measured. `plain`: without its adapter."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    plain: bool = False

    @property
    def causal(self) -> PreTrainedModel:
        """Give the model without PEFT's outer shell; the adapter stays in it."""
        return causal(self.model)

    def itself(self) -> AbstractContextManager[Any]:
        """Make the model be this candidate."""
        without: AbstractContextManager[Any] = self.model.disable_adapter() if self.plain else nullcontext()
        return without

    def fingerprint(self) -> str:
        """Name the weights, whatever they are called and wherever they came from."""
        found = blake2b(digest_size=16)
        for name, weights in self.model.named_parameters():
            if self.plain and ("lora_" in name or "prompt_encoder" in name):
                continue
            plain = name.replace("base_model.model.", "", 1).replace(".base_layer", "")
            found.update(f"{plain} {tuple(weights.shape)} {weights.dtype}".encode())
            for part in torch.split(weights.data.flatten(), _HASHED):
                found.update(_hashed(part))
        return found.hexdigest()


def _hashed(part: torch.Tensor) -> bytes:
    """Hash numbers where they are, or where the device cannot, here."""
    try:
        return bytes(torch.hash_tensor(part).cpu().numpy().tobytes())
    except RuntimeError:
        return bytes(torch.hash_tensor(part.cpu()).numpy().tobytes())


@dataclass(frozen=True)
class Marks:
    """What a candidate did: for each example the summed loss and its tokens, for each question answer and verdict."""

    name: str
    losses: list[tuple[float, int]]
    answers: list[Answered]
    verdicts: list[Verdict]
    seconds: float

    def facts(self, unseen: Sequence[bool]) -> dict[str, Any]:
        """Give the figures with their intervals. `unseen` says for each question whether it was not trained on."""
        loss = intervals.mean_loss(self.losses) if self.losses else None
        errors = [one.error for one in self.answers if one.error is not None]
        fresh = [one for one, new in zip(self.verdicts, unseen, strict=True) if new]
        return {
            "name": self.name,
            "loss": loss and loss.as_dict(),
            "perplexity": loss and intervals.perplexity(loss).as_dict(),
            "accuracy": _share([one.right for one in self.verdicts]),
            "answer_rate": _share([one.parsed for one in self.verdicts]),
            "accuracy_unseen": _share([one.right for one in fresh]),
            "cut_off": sum(not one.ended for one in self.answers) - len(errors),
            "errors": len(errors),
            "first_error": errors[0] if errors else None,
            "seconds": self.seconds,
        }


def _share(found: Sequence[bool]) -> dict[str, Any] | None:
    return (
        {"count": sum(found), "of": len(found), **intervals.share(sum(found), len(found)).as_dict()} if found else None
    )


def facts_of(exam: Exam, marks: Sequence[Marks], learned: Learned, seen: Mapping[int, Seen]) -> dict[str, Any]:
    """Give a whole measurement as it is stored and shown (`finetuned.scores`). The second candidate and those behind it
    are compared with the ones before them.
    """
    unseen = [question.row not in seen for question in exam.questions]
    return {
        "data": {"file": exam.name, "sha256": exam.sha256, "rows": len(exam.rows), "questions": len(exam.questions)},
        "judge": {"kind": exam.judge.kind, "reason": exam.why},
        "max_new_tokens": exam.max_new_tokens,
        "models": [one.facts(unseen) for one in marks],
        "compared": [
            _compared(one, other) for place, one in enumerate(marks) for other in marks[:place] if one.verdicts
        ],
        "overlap": {
            "files": [one.name for one in learned.files],
            "missing": learned.missing,
            "rows": [
                {"line": exam.rows[place].line, "file": one.file, "of_line": one.line, "share": one.share}
                for place, one in sorted(seen.items())
            ],
        },
    }


def _compared(one: Marks, other: Marks) -> dict[str, Any]:
    pairs = [(a.right, b.right) for a, b in zip(one.verdicts, other.verdicts, strict=True)]
    wins, losses = pairs.count((True, False)), pairs.count((False, True))
    return {
        "name": one.name,
        "other": other.name,
        "wins": wins,
        "losses": losses,
        "ties": len(pairs) - wins - losses,
        "p": intervals.sign_test(wins, losses),
    }


def sit(
    exam: Exam, candidate: Candidate, *, kept: Path, told: Told, asked_to_stop: Callable[[], bool] = never
) -> Marks:
    """Measure a model. Its answers are kept in the folder `kept`, so that a killed process has asked none in vain.

    Raises StopAskedError, OSError, and RuntimeError where memory does not hold a single row.
    """
    began = time.monotonic()
    with candidate.itself():
        losses = _losses(exam.examples, candidate, told)
        answers = _answers(exam, candidate, kept, told, asked_to_stop)
    verdicts = [
        exam.judge.verdict(answered.text, question.expected)
        for question, answered in zip(exam.questions, answers, strict=True)
    ]
    return Marks(candidate.name, losses, answers, verdicts, round(time.monotonic() - began, 1))


@torch.no_grad()
def _losses(examples: Sequence[Example], candidate: Candidate, told: Told) -> list[tuple[float, int]]:
    """Give each example's summed loss in nats and the number of its tokens that count."""
    causal, soft = candidate.causal, 0 if candidate.plain else soft_tokens(candidate.model)
    layout = replace(candidate.layout, lead=soft)
    prompted = Prompted(candidate.model, layout)
    device = next(causal.parameters()).device
    lengths = [len(example.ids) for example in examples]
    rows = 1 if rows_stand_alone(causal, max(lengths)) else _BOUND[0]
    left = deque(steps.cut(list(range(len(examples))), lengths, steps.Bound(rows, _BOUND[1], padded=not layout.flat)))
    found: dict[int, tuple[float, int]] = {}
    with evaluating(candidate.model), torch.autocast(device.type, enabled=False):
        while left:
            told(f"{candidate.name}: loss", len(found) / len(examples))
            part = left.popleft()
            batch = layout.collate([examples[row] for row in part])
            try:
                each = each_loss(*prompted.plain(batch.to(device)), batch.targets.to(device))
                counts = [examples[row].targets for row in part]
                sums = [float(one.sum(dtype=torch.float64)) for one in torch.split(each, counts)]
            except (RuntimeError, MemoryError) as error:
                if memory.out_of_memory(error) is None or len(part) == 1:
                    raise
            else:
                found |= zip(part, zip(sums, counts, strict=True), strict=True)
                continue
            memory.give_back()
            half = len(part) // 2
            left.extendleft([part[half:], part[:half]])
    return [found[row] for row in range(len(examples))]


def _answers(
    exam: Exam, candidate: Candidate, kept: Path, told: Told, asked_to_stop: Callable[[], bool]
) -> list[Answered]:
    """Give the answer to each question."""
    texts = {key_of(question.text): question.text for question in exam.questions}
    kept.mkdir(parents=True, exist_ok=True)
    _prune(kept)
    file = kept / f"{key_of(candidate.fingerprint(), str(exam.max_new_tokens))}.jsonl"
    file.touch()  # it was used
    found: dict[str, Answered] = {}
    with generating(candidate.model, candidate.tokenizer):
        asker = Asker(
            candidate.model, candidate.tokenizer, max_new_tokens=exam.max_new_tokens, asked_to_stop=asked_to_stop
        )
        for batch in ask(asker, texts, file):
            found |= batch
            told(f"{candidate.name}: answers", len(found) / max(1, len(texts)))
    return [found[key_of(question.text)] for question in exam.questions]


def _prune(kept: Path) -> None:
    with suppress(OSError):
        for file in kept.glob("*.jsonl"):
            if time.time() - file.stat().st_mtime > _KEPT_DAYS * 86400:
                file.unlink()
