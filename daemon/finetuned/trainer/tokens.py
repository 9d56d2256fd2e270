"""From rows to tokens: a chat is rendered (`chat.py`) and tokenised as a whole, and its answers are found in them.

No torch here: the data is checked before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetuned.dataset.rows import Problem, Row
from finetuned.trainer.chat import Rendered, Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 1024  # tokenised at once
_HEADS = 256  # different system prompts whose tokens are kept
_LONGEST_TOKEN = 256  # characters; of a chat no more is looked at than can fill max_length
_AT_ONCE = 2**20  # characters of a plain text
_PROBE = "A small probe: 12.5 % of naïve 漢字, 🎉\n\tand 'quoted'  spaces."


@dataclass(frozen=True)
class Example:
    """A tokenised row. `supervised[i]` says whether token i is to be learned."""

    ids: list[int]
    supervised: list[bool]
    line: int  # where its row begins in the file

    @property
    def targets(self) -> int:
        """Tokens that are learned. The first token of a row has nothing before it to predict it from."""
        return sum(self.supervised[1:])


class Encoded(NamedTuple):
    """The tokens of a row, at most max_length of them."""

    row: Row
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    lost: int = 0  # tokens behind max_length
    begin: int = 0  # the token where the system prompt is over
    short_answer: bool = False  # whether an answer is a single token

    @property
    def targets(self) -> int:
        """Tokens that are learned."""
        return int(self.supervised[1:].sum())


class Refused(NamedTuple):
    """A row that cannot be learned from."""

    row: Row
    problem: Problem


class Tokens(NamedTuple):
    """The tokens of a text: token i is its units from starts[i] to ends[i], bytes or characters, counted from `base`
    where the text begins.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    bytes: bool
    base: int


class _Head(NamedTuple):
    """So many characters of a chat's beginning, as tokens."""

    size: int
    ids: list[int]


_NO_HEAD = _Head(0, [])


class Encoder:
    """A tokenizer, its template, and what was found out about both."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        self.renderer = Renderer(tokenizer)
        self.special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._most = max_length
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = np.zeros(max(tokenizer.get_vocab().values()) + 1, bool)
        self._special[list(added | set(tokenizer.all_special_ids))] = True
        self._widths = self._byte_widths()
        self._marks = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        ]
        self._heads: dict[str, _Head] = {}

    def render(self, rows: Sequence[Row]) -> list[Rendered | Problem | None]:
        """Put chats into the model's words, in order; None for a plain text."""
        chats = [row for row in rows if row.text is None]
        found = iter(self.renderer.render_rows(chats) if chats else ())
        return [next(found) if row.text is None else None for row in rows]

    def tokenise(self, rendered: Sequence[Rendered | Problem | None]) -> list[Tokens]:
        """Tokenise the chats in what `render` gave, on all cores, nearly all of the time without Python's lock.

        Where tokens stand follows from how many bytes each is, which is faster than to ask; where the sum says that
        this does not hold, it is asked.
        """
        texts = [one.text[: self._most * _LONGEST_TOKEN] for one in rendered if isinstance(one, Rendered)]
        if self._widths is None:
            return self._with_offsets(texts)
        heads = [self._head(one.text[: one.begin]) for one in rendered if isinstance(one, Rendered)]
        tails = [text[head.size :] for text, head in zip(texts, heads, strict=True)]
        tokenised = self._backend.encode_batch_fast(tails, add_special_tokens=False)
        rows = [head.ids + one.ids for head, one in zip(heads, tokenised, strict=True)]
        ids = np.fromiter(chain.from_iterable(rows), np.int32)
        ends = np.cumsum(self._widths[ids])
        starts = ends - self._widths[ids]
        found: list[Tokens] = []
        odd = []
        begin = base = 0
        for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
            own = slice(begin, begin + len(row))
            found.append(Tokens(ids[own], starts[own], ends[own], bytes=True, base=base))
            begin, before = own.stop, base
            base = int(ends[begin - 1]) if begin else 0
            if base - before != (len(text) if text.isascii() else len(text.encode())):
                odd.append(number)
        if odd:
            for number, tokens in zip(odd, self._with_offsets([texts[number] for number in odd]), strict=True):
                found[number] = tokens
        return found

    def _head(self, text: str) -> _Head:
        """Give what many chats begin with as tokens, up to the last mark of `text`, their system prompt: it is
        tokenised once. What begins with a mark gives the same tokens whatever stands before it; tried out all the same.
        """
        head = self._heads.get(text)
        if head is None and len(self._heads) < _HEADS:
            size = max([0, *(text.rfind(mark) for mark in self._marks)])
            parts = (text[:size], text[size:], text)
            ids, behind, whole = (self._backend.encode(part, add_special_tokens=False).ids for part in parts)
            head = self._heads[text] = _Head(size, ids) if ids + behind == whole else _NO_HEAD
        return head or _NO_HEAD

    def _with_offsets(self, texts: list[str]) -> list[Tokens]:
        found = []
        for one in self._backend.encode_batch(texts, add_special_tokens=False):
            offsets = np.array(one.offsets, np.int64).reshape(-1, 2)
            found.append(Tokens(np.array(one.ids, np.int32), offsets[:, 0], offsets[:, 1], bytes=False, base=0))
        return found

    def encode(
        self, rows: Sequence[Row], rendered: Sequence[Rendered | Problem | None], tokenised: Iterable[Tokens]
    ) -> Iterator[Encoded | Refused]:
        """Find in the tokens what is learned, in order. A long plain text gives several rows of max_length tokens."""
        tokens = iter(tokenised)
        for row, one in zip(rows, rendered, strict=True):
            if one is None:
                yield from self._plain(row)
            elif isinstance(one, Problem):
                yield Refused(row, one)
            else:
                yield self._chat(row, one, next(tokens))

    def _chat(self, row: Row, rendered: Rendered, tokens: Tokens) -> Encoded | Refused:
        text, spans = rendered.text, rendered.spans
        places = [rendered.begin, *chain.from_iterable(spans)]
        if tokens.bytes and not text.isascii():
            places = [len(text[: rendered.begin].encode()), *_in_bytes(text, places[1:])]
        places = [tokens.base + place for place in places]
        begin, *firsts = np.searchsorted(tokens.ends, places[:1] + places[1::2], "right").tolist()
        behinds = np.searchsorted(tokens.starts, places[2::2], "left").tolist()
        supervised = np.zeros(len(tokens.ids), bool)
        short = False
        for (_, end), start, overlapping, behind in zip(spans, places[1::2], firsts, behinds, strict=True):
            first = overlapping
            while first < behind and tokens.starts[first] < start and self._special[tokens.ids[first]]:
                first += 1  # a mark that takes the white space behind it along
            last = self._end_of_turn(text, end, tokens, first, behind)
            if last is None:
                return Refused(
                    row, Problem("no_end_of_turn", f"behind {text[:end][-20:]!r} stands {text[end:][:20]!r}")
                )
            supervised[first : last + 1] = True
            short |= behind - first == 1
        ids, kept = tokens.ids[: self._most], supervised[: self._most]
        if not kept[1:].any():
            return Refused(row, Problem("no_supervised_tokens"))
        return Encoded(row, ids, kept, max(0, len(tokens.ids) - self._most), begin, short)

    def _end_of_turn(self, text: str, end: int, tokens: Tokens, first: int, behind: int) -> int | None:
        """Give the place of the special token that ends an answer, with nothing but white space between; None where
        there is none. The answer ends with character `end` of the text; its tokens are those from `first`, before
        `behind`, and where a template marks what is learned the end may be among them.
        """
        for place in range(behind - 1, first - 1, -1):
            if self._special[tokens.ids[place]]:
                return behind - 1
            if text[max(0, end - int(tokens.ends[behind - 1] - tokens.starts[place])) : end].strip():
                break
        for place in range(behind, len(tokens.ids)):
            if self._special[tokens.ids[place]] or place >= self._most:  # what lies behind is not seen, or cut off
                return place
            width = int(tokens.ends[place] - tokens.starts[behind])
            between = text[end : end + width].encode()
            if (between[:width] if tokens.bytes else between).strip():
                return None
        return len(tokens.ids) if len(tokens.ids) >= self._most else None  # the text itself was cut

    def _plain(self, row: Row) -> Iterator[Encoded | Refused]:
        """Give a text for continued pre-training: all of it is learned; what is too long goes on in a next row."""
        text = row.text or ""
        parts = [
            self._tokenizer(text[place : place + _AT_ONCE], add_special_tokens=place == 0)["input_ids"]
            for place in range(0, len(text), _AT_ONCE)
        ]
        ids = np.fromiter(chain.from_iterable(parts), np.int32)
        end = self._tokenizer.eos_token_id
        if end is not None and (not len(ids) or ids[-1] != end):
            ids = np.append(ids, np.int32(end))
        if len(ids) < 2:
            yield Refused(row, Problem("no_supervised_tokens", "the text is too short"))
            return
        for place in range(0, len(ids), self._most):
            piece = ids[place : place + self._most]
            if len(piece) > 1:
                yield Encoded(row, piece, np.ones(len(piece), bool))

    def _byte_widths(self) -> NDArray[np.int64] | None:
        """Give how many bytes of a text each token is, or None where its words do not tell: tried out on a text."""
        added = {number: token.content for number, token in self._tokenizer.added_tokens_decoder.items()}
        words = self._tokenizer.get_vocab().items()
        for width in (len, _metaspace_width):  # in byte-level vocabularies each character is a byte
            widths = np.zeros(len(self._special), np.int64)
            for word, number in words:
                widths[number] = len(added[number].encode()) if number in added else width(word)
            ids = self._backend.encode(_PROBE, add_special_tokens=False).ids
            if widths[ids].sum() == len(_PROBE.encode()):
                return widths
        return None


def _in_bytes(text: str, places: list[int]) -> list[int]:
    """Give places in a text, in order, counted in bytes."""
    parts = (len(text[start:end].encode()) for start, end in pairwise([0, *places]))
    return list(accumulate(parts))


def _metaspace_width(word: str) -> int:
    """Bytes of a word of SentencePiece's kind: ▁ is a space, and <0xE4> a byte."""
    return 1 if len(word) == 6 and word.startswith("<0x") else len(word.replace("\u2581", " ").encode())


def tokenise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Iterator[Example | tuple[Row, Problem]]:
    """Render and tokenise rows in order; a row that cannot be learned from comes back with its problem."""
    encoder = Encoder(tokenizer, max_length=max_length)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        rendered = encoder.render(part)
        for one in encoder.encode(part, rendered, encoder.tokenise(rendered)):
            if isinstance(one, Refused):
                yield one.row, one.problem
            else:
                yield Example(one.ids.tolist(), one.supervised.tolist(), one.row.line)
