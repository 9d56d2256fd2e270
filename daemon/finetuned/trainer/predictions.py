"""What the model answers while it learns: the same held-out questions each time, before the first step and after.

Asking changes nothing: modes, caches, attention, padding and random states are put back as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from finetuned.config import Predictions
from finetuned.dataset.rows import Row
from finetuned.trainer import memory
from finetuned.trainer.attention import without_flat
from finetuned.trainer.base import without_padding
from finetuned.trainer.chat import Renderer
from finetuned.trainer.model import evaluating

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


def _never() -> bool:
    return False


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: Predictions,
    *,
    seed: int,
    asked_to_stop: Callable[[], bool] = _never,
) -> list[Prediction]:
    """Answer the last assistant turn of each row. What fails, memory too, is told in its own row.

    `seed` decides what is drawn where `settings.temperature` is not 0. Answers end early once `asked_to_stop`.
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
    with _as_it_was(model, tokenizer):
        torch.manual_seed(seed)
        asker = _Asker(model, tokenizer, settings, asked_to_stop)
        told = iter(asker.answer([one for one in questions if isinstance(one, _Question)]))
        return [next(told) if isinstance(one, _Question) else one for one in questions]


@contextmanager
def _as_it_was(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Make the model one that generates, and put everything back.

    Autocast is off: generation runs in the model's own number formats. Attention is transformers' own, as flat rows
    know no cache. Random states are kept, as dropout in the next step draws from them.
    """
    device = next(model.parameters()).device
    padding = {name: getattr(tokenizer, name) for name in ("padding_side", "pad_token")}
    attention, cache = model.config._attn_implementation, model.config.use_cache  # noqa: SLF001
    gpus = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(gpus), evaluating(model), torch.autocast(device.type, enabled=False):
        try:
            tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
            model.set_attn_implementation(without_flat(model))
            model.config.use_cache = True
            yield
        finally:
            for name, value in padding.items():
                setattr(tokenizer, name, value)
            without_padding(tokenizer)  # which the call has switched on, and which would be saved with it
            model.set_attn_implementation(attention)
            model.config.use_cache = cache


class _Asker:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Predictions,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        drawn = settings.temperature > 0
        self._options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": drawn,
            "temperature": settings.temperature if drawn else None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": sorted(turn_ends(model, tokenizer)),
            "stopping_criteria": StoppingCriteriaList([self._stop]),
        }
        self._asked_to_stop = asked_to_stop

    def _stop(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Say for each row whether its answer ends here, as transformers asks after each token."""
        return torch.full((len(input_ids),), self._asked_to_stop(), dtype=torch.bool, device=input_ids.device)

    def answer(self, questions: list[_Question]) -> list[Prediction]:
        """Answer in one batch; where that fails in two halves, and so on down to the one that fails alone."""
        if not questions:
            return []
        began = time.monotonic()
        try:
            texts = self._generate([question.text for question in questions])
            seconds = round(time.monotonic() - began, 3)
            return [self._told(question, text, seconds) for question, text in zip(questions, texts, strict=True)]
        except Exception as error:  # noqa: BLE001, no sample is worth the training
            full = memory.out_of_memory(error) if isinstance(error, RuntimeError | MemoryError) else None
            failed = full or str(error) or type(error).__name__
        memory.give_back()  # out of the except block: the traceback there holds the failed batch's tensors
        if len(questions) == 1:
            return [Prediction(questions[0].asked, questions[0].expected, error=failed[:_ERROR_SHOWN])]
        half = len(questions) // 2
        return self.answer(questions[:half]) + self.answer(questions[half:])

    def _generate(self, texts: list[str]) -> list[str]:
        device = next(self._model.parameters()).device
        encoded = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        generated = self._model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], **self._options
        )
        answers: list[str] = self._tokenizer.batch_decode(
            generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [answer.strip() for answer in answers]

    def _told(self, question: _Question, answer: str, seconds: float) -> Prediction:
        expected = question.expected.strip()
        return Prediction(
            question.asked,
            question.expected,
            answer,
            exact=answer == expected,
            similarity=self._similarity(answer, expected),
            seconds=seconds,
        )

    def _similarity(self, answer: str, expected: str) -> float:
        """Give 2M/T, with M tokens that both have in the same order and T in both together: 1 for equal texts.

        Source: Ratcliff and Metzener, Pattern Matching: The Gestalt Approach, 1988, as difflib counts it.
        """
        if answer == expected:
            return 1.0
        given, wanted = (self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, expected))
        return round(SequenceMatcher(None, given, wanted, autojunk=False).ratio(), 4)


def turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Give the tokens that end an answer: some models end a turn with another token than a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
