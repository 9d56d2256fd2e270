"""A model's answers to many questions: in batches of like length, halved where memory runs out, kept as they come.

Nothing here knows what the right answer would be: texts go in, texts come out.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from finetuned.trainer import memory
from finetuned.trainer.attention import without_flat
from finetuned.trainer.base import without_padding
from finetuned.trainer.ends import StopAskedError
from finetuned.trainer.lots import AsTold, ByLot, cast
from finetuned.trainer.model import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ERROR_SHOWN = 300  # characters
# Rows of a batch. A CPU is as fast with a few, which end sooner and leave less to be asked again.
_ROWS = {"cpu": 8, "cuda": 32}
_TOKENS = 2**14  # of a batch, answers included

Key = TypeVar("Key", int, str)  # names a question


def never() -> bool:
    """Nobody asks it to stop."""
    return False


@dataclass(frozen=True)
class Answered:
    """The answer that came, or the error that came in its place."""

    text: str = ""
    ended: bool = False  # by the model itself, and not because it had reached the longest answer
    seconds: float = 0.0  # of the batch that it was answered in
    error: str | None = None


@contextmanager
def generating(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
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


def most_at_once(device: torch.device, question: int, answer: int) -> int:
    """Give how many questions of so many tokens are put at once, for answers of so many."""
    return min(_rows_of(device), _fitting(question, answer))


def _rows_of(device: torch.device) -> int:
    return _ROWS.get(device.type, _ROWS["cuda"])


def _fitting(question: int, answer: int) -> int:
    return max(1, _TOKENS // (question + answer))


class Asker:
    """Puts questions to a model, within `generating`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        rows: int | None = None,
        asked_to_stop: Callable[[], bool] = never,
        tell: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        """Begin. `seed` decides what is drawn where `temperature` is not 0; a batch has at most so many `rows`.

        Where processes share the model, all ask the same questions, and `tell` gives them all one's tokens, so that
        they make the same passes. Then whatever fails is raised.
        """
        self._model, self._tokenizer, self._seed, self._temperature = model, tokenizer, seed, temperature
        self._rows = rows or _rows_of(model.device)
        self._held = self._rows  # so many memory holds at once, as far as is known
        self._asked_to_stop, self._tell = asked_to_stop, tell
        self._options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": sorted(turn_ends(model, tokenizer)),
            "stopping_criteria": StoppingCriteriaList([self._stop]),
        }

    def answers(self, texts: Mapping[Key, str], known: Collection[Key] = ()) -> Iterator[dict[Key, Answered]]:
        """Answer rendered chats that are not `known`, the longest first: of each batch the answers by their keys.

        What is drawn for a question follows from the seed and its key. Batches are cut over all questions, so that what
        is left after some of them is answered as it would have been, to the bit; in smaller batches than these it is
        to rounding, as other rows beside mean other sums.

        A batch that fails is halved, down to the question that fails alone and is told with its error. Where memory
        was short the batches that follow are cut into parts that are no larger than the halves. Raises StopAskedError
        once somebody asks for it, in the middle of an answer too.
        """
        if not texts:
            return
        encoded = self._tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
        lengths = {key: len(ids) for key, ids in zip(texts, encoded, strict=True)}
        left = deque(sorted(texts, key=lambda key: -lengths[key]))
        while left:
            size = min(self._rows, len(left), _fitting(lengths[left[0]], self._options["max_new_tokens"]))
            batch = [left.popleft() for _ in range(size)]
            if asked := [key for key in batch if key not in known]:
                yield from self._batch(asked, texts)

    def _stop(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Say for each row whether its answer ends here, as transformers asks after each token."""
        return torch.full((len(input_ids),), self._asked_to_stop(), dtype=torch.bool, device=input_ids.device)

    def _batch(self, keys: list[Key], texts: Mapping[Key, str]) -> Iterator[dict[Key, Answered]]:
        if len(keys) > self._held:
            yield from self._halves(keys, texts)
            return
        began = time.monotonic()
        try:
            found = self._generate({key: texts[key] for key in keys})
        except Exception as error:  # one question is not worth the others
            if self._tell is not None:
                raise
            full = memory.out_of_memory(error) if isinstance(error, RuntimeError | MemoryError) else None
            failed = full or str(error) or type(error).__name__
        else:
            if self._asked_to_stop():
                raise StopAskedError
            seconds = round(time.monotonic() - began, 3)
            yield {key: Answered(*one, seconds) for key, one in zip(keys, found, strict=True)}
            return
        if full:
            memory.give_back()  # out of the except block: the traceback there holds the failed batch's tensors
            self._held = (len(keys) + 1) // 2
        if len(keys) == 1:
            yield {keys[0]: Answered(error=failed[:_ERROR_SHOWN])}
            return
        yield from self._halves(keys, texts)

    def _halves(self, keys: list[Key], texts: Mapping[Key, str]) -> Iterator[dict[Key, Answered]]:
        half = len(keys) // 2
        yield from self._batch(keys[:half], texts)
        yield from self._batch(keys[half:], texts)

    def _generate(self, texts: Mapping[Key, str]) -> list[tuple[str, bool]]:
        """Give each answer, and whether the model itself ended it."""
        device = next(self._model.parameters()).device
        encoded = self._tokenizer(list(texts.values()), return_tensors="pt", padding=True, add_special_tokens=False)
        asked = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
        options, chosen = dict(self._options), LogitsProcessorList()
        if self._temperature > 0:
            lots = cast([(self._seed, key) for key in texts], options["max_new_tokens"]).to(device)
            chosen.append(ByLot(lots, self._temperature))
        if self._tell is not None:
            chosen.append(AsTold(self._tell))
        generated = self._model.generate(**asked, **options, logits_processor=chosen)[:, asked["input_ids"].shape[1] :]
        ended = torch.isin(generated, torch.tensor(options["eos_token_id"], device=device)).any(dim=1)
        found = self._tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [(text.strip(), end) for text, end in zip(found, ended.tolist(), strict=True)]


def ask(asker: Asker, texts: Mapping[str, str], file: Path) -> Iterator[dict[str, Answered]]:
    """Answer rendered chats by their keys, a batch at a time, and keep the answers in a file as they come: what a
    process that was killed has asked is read there and not asked again. Errors are not kept.

    A batch is a line, `{KEY: answer, ...}`. So it is kept as a whole or not at all, and a process that was killed makes
    the answers of one that was not. Keys must say all that an answer depends on, or the file's name. Raises OSError.
    """
    kept = _kept(file)
    yield {key: kept[key] for key in texts if key in kept}
    with file.open("ab") as lines:
        if lines.tell() and not file.read_bytes().endswith(b"\n"):
            lines.write(b"\n")  # the last line was torn
        for batch in asker.answers(texts, kept):
            if told := {key: asdict(one) for key, one in batch.items() if one.error is None}:
                lines.write(json.dumps(told).encode() + b"\n")
                lines.flush()
            yield batch


def _kept(file: Path) -> dict[str, Answered]:
    """Read what is there; the questions of a line that is torn are asked again."""
    found: dict[str, Answered] = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            found |= {key: Answered(**fields) for key, fields in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):
            continue
    return found


def key_of(*parts: str) -> str:
    """Make a key of all that an answer depends on."""
    return blake2b("\0".join(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def turn_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Give the tokens that end an answer: some models end a turn with another token than a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
