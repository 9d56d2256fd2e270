"""The teacher before it is loaded: where it lies, its tokenizer, and whether it speaks in the student's tokens. No
torch here: `finetuned check` asks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuned.config import TrainingSettings
from finetuned.errors import ModelError
from finetuned.trainer.base import Base, find_base, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Found:
    """A teacher that is there, and the two tokenizers."""

    settings: TrainingSettings  # with the teacher as the model
    base: Base
    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedTokenizerBase
    same_vocabulary: bool
    device: str  # as set

    def __str__(self) -> str:
        """Name it in a log line."""
        return f"{self.base.name} ({'the same' if self.same_vocabulary else 'another'} vocabulary)"


def find_teacher(
    settings: TrainingSettings, student: PreTrainedTokenizerBase, *, models: Path, base_dir: Path
) -> Found | None:
    """Find the teacher that the settings name, where the recipe has one. Raises ModelError if it is not there."""
    if settings.recipe != "distill" or settings.teacher is None:
        return None
    four_bit = settings.teacher_dtype == "4bit"
    own = settings.model_copy(
        update={
            "model": settings.teacher,
            "revision": settings.teacher_revision,
            "tuning": "qlora" if four_bit else "lora",  # as such a base would be loaded, but nothing is tuned
            "dtype": "auto" if four_bit else settings.teacher_dtype,
        }
    )
    with _named():
        base = find_base(own, models=models, base_dir=base_dir)
        folder = Path(base.source)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ModelError(
                "it has no weights in safetensors",
                where=base.name,
                remedy="Name a folder with config.json, weights and tokenizer, or a hub id.",
                code="no_safetensors",
            )
        tokenizer = load_tokenizer(base, own)
    return Found(own, base, tokenizer, student, knows_all(tokenizer, student), settings.teacher_device)


def knows_all(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> bool:
    """Whether the teacher has every token of the student, by the same number: then it reads the student's tokens."""
    known = teacher.get_vocab()
    return all(known.get(word) == number for word, number in student.get_vocab().items())


@contextmanager
def _named() -> Iterator[None]:
    """Let an error say that it is the teacher that cannot be had."""
    try:
        yield
    except ModelError as error:
        error.where = f"teacher {error.where}"
        error.args = (error.sentence(),)
        raise
