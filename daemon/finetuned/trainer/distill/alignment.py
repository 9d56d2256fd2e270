"""Where two tokenizers meet: which of the teacher's tokens begins with the very letter with which a student's token
does. There both models have read the same text, and say what comes next. No torch here.

The text is what the student's tokens decode to, its chat marks among them, for no row is rendered anew with the
teacher's chat template: what is learned is what to say in the student's own form. Of the marks, those that begin and
end a text stand there as the teacher's own, and where its tokenizer begins each text with one, so does this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from finetuned.trainer.tokens import Example

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what a decoder gives for bytes that are no letter yet


class Aligned(NamedTuple):
    """A row in the teacher's tokens."""

    places: Example  # `supervised` where a student's target is matched, in their order
    matched: list[int]  # which of the student's targets these are
    covered: Example  # `supervised` where a token lies in the text that the student learns


class Aligner:
    """Two tokenizers, and what was found out about them."""

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self._student, self._teacher = student.backend_tokenizer, teacher.backend_tokenizer
        self._begin: int | None = teacher.bos_token_id
        self._begins = self._teacher.encode("a").ids[:1] == [self._begin]
        self._marks = {str(student.eos_token): teacher.eos_token or student.eos_token}
        if student.bos_token:
            self._marks = {str(student.bos_token): teacher.bos_token or ""} | self._marks

    def __call__(self, example: Example) -> Aligned:
        """Align a row."""
        pieces = letters_of(self._student, example.ids)
        parts = [self._marks.get(piece, piece) if piece else "" for piece in pieces]
        ends = list(accumulate(map(len, parts)))
        starts = [0, *ends][:-1]
        # Behind half a letter, the student has not read what the teacher has.
        whole = [True, *(piece is not None for piece in pieces[:-1])]
        wanted = [place for place in range(1, len(parts)) if example.supervised[place]]

        ids, bounds, reaches = self._read("".join(parts))
        at = {bound: token for token, bound in enumerate(bounds) if token and bound is not None}
        pairs = [
            (at[starts[place]], number)
            for number, place in enumerate(wanted)
            if whole[place] and starts[place] in at and (parts[place] or pieces[place] is None)
        ]
        learned = bytearray(ends[-1])
        for place in wanted:
            learned[starts[place] : ends[place]] = b"\1" * len(parts[place])
        covered = [t > 0 and any(learned[reaches[t - 1] : reaches[t]]) for t in range(len(ids))]
        places = [False] * len(ids)
        for token, _ in pairs:
            places[token] = True
        return Aligned(Example(ids, places, example.line), [n for _, n in pairs], Example(ids, covered, example.line))

    def _read(self, text: str) -> tuple[list[int], list[int | None], list[int]]:
        """Give the teacher's tokens, where in the text each begins (None: in the middle of a letter), and ends.

        Tokens tile the text: white space that offsets leave out belongs to the token behind it.
        """
        found = self._teacher.encode(text, add_special_tokens=False)
        ids, ends = list(found.ids), list(accumulate((end for _, end in found.offsets), max))
        bounds: list[int | None] = [
            None if start < before else before
            for (start, _), before in zip(found.offsets, [0, *ends][:-1], strict=True)
        ]
        if self._begins and self._begin is not None and ids[:1] != [self._begin]:
            return [self._begin, *ids], [0, *bounds], [0, *ends]
        return ids, bounds, ends


def letters_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str | None]:
    """Give what each token adds to the text; None while bytes are no whole letter yet: the last of them adds it."""
    found: list[str | None] = []
    begin = read = 0  # of a window that is decoded twice, without and with the newest token
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[begin:read], skip_special_tokens=False)
        text = tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        if text.endswith(_HALF):
            found.append(None)
            continue
        found.append(text[len(before) :])
        begin, read = read, end
    return found
