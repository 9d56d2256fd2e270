"""What the model answers while it learns: the same held-out questions each time, before the first step and after.

Asking changes nothing: modes, caches, attention, padding and random states are put back as they were.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from finetuned.dataset.rows import Row
from finetuned.section_settings import Predictions
from finetuned.trainer.chat import Renderer
from finetuned.trainer.generate import Answered, Asker, generating, never

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ERROR_SHOWN = 300  # characters


@dataclass(frozen=True)
class Prediction:
    """One question, the answer that was wanted, and the one that came, or the error that came in its place."""

    prompt: str
    expected: str
    answer: str = ""
    exact: bool = False
    similarity: float = 0.0
    seconds: float = 0.0  # of the batch that it was answered in
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give it as it is stored."""
        return asdict(self)


@dataclass(frozen=True)
class _Question:
    text: str  # rendered, up to where the model goes on
    asked: str
    expected: str


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: Predictions,
    *,
    seed: int,
    asked_to_stop: Callable[[], bool] = never,
    tell: Callable[[list[int]], list[int]] | None = None,
) -> list[Prediction]:
    """Answer the last assistant turn of each row. What fails, memory too, is told in its own row; it is raised where
    processes `tell` each other tokens, as `Asker` has it.

    `seed` decides what is drawn where `settings.temperature` is not 0. Raises StopAskedError once `asked_to_stop`.
    """
    renderer = Renderer(tokenizer)
    answers = []
    for row in rows:
        turn = max((n for n, one in enumerate(row.messages) if one.role == "assistant"), default=0)
        if turn > 0:
            answers.append((row, turn))
    if not answers:
        return []
    questions: list[_Question | Prediction] = []
    for row, turn in answers:
        asked, expected = row.messages[turn - 1].content, row.messages[turn].content
        try:
            text = renderer.render(row.messages[:turn], row.tools, add_generation_prompt=True)
        except Exception as error:  # noqa: BLE001, a template may raise anything; it is told and the others go on
            questions.append(Prediction(asked, expected, error=f"{error}"[:_ERROR_SHOWN]))
        else:
            questions.append(_Question(text, asked, expected))
    posed = [one for one in questions if isinstance(one, _Question)]
    with generating(model, tokenizer):
        asker = Asker(
            model,
            tokenizer,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            asked_to_stop=asked_to_stop,
            tell=tell,
        )
        found = dict(ChainMap(*asker.answers({place: one.text for place, one in enumerate(posed)})))
    told = (_told(question, found[place], tokenizer) for place, question in enumerate(posed))
    return [next(told) if isinstance(one, _Question) else one for one in questions]


def _told(question: _Question, answered: Answered, tokenizer: PreTrainedTokenizerBase) -> Prediction:
    if answered.error is not None:
        return Prediction(question.asked, question.expected, error=answered.error)
    expected = question.expected.strip()
    try:
        similarity = _similarity(answered.text, expected, tokenizer)
    except Exception as error:  # noqa: BLE001, what was wanted may be no text that can be tokenised
        return Prediction(question.asked, question.expected, error=f"{error}"[:_ERROR_SHOWN])
    return Prediction(
        question.asked,
        question.expected,
        answered.text,
        exact=answered.text == expected,
        similarity=similarity,
        seconds=answered.seconds,
    )


def _similarity(answer: str, expected: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """Give 2M/T, with M tokens that both have in the same order and T in both together: 1 for equal texts.

    Source: Ratcliff and Metzener, Pattern Matching: The Gestalt Approach, 1988, as difflib counts it.
    """
    if answer == expected:
        return 1.0
    given, wanted = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, expected))
    return round(SequenceMatcher(None, given, wanted, autojunk=False).ratio(), 4)
