"""Texts side by side on a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest

_BETWEEN = " | "
LEAST = 60  # columns of a terminal on which two texts side by side can be read


def side_by_side(texts: Sequence[str], width: int) -> list[str]:
    """Give the lines of texts in columns, all of one width, `width` characters wide together at most."""
    own = (width - len(_BETWEEN) * (len(texts) - 1)) // len(texts)
    columns = [[piece for line in text.splitlines() for piece in _broken(line, own)] for text in texts]
    rows = zip_longest(*columns, fillvalue="")
    return [_BETWEEN.join(piece + " " * (own - _cells(piece)) for piece in row).rstrip() for row in rows]


def _broken(line: str, width: int) -> Iterator[str]:
    """Break a line between words, or within a word that is too long."""
    while _cells(line) > width:
        place = next(place for place in range(1, len(line) + 1) if _cells(line[: place + 1]) > width)
        space = line.rfind(" ", 1, place + 1)
        place = space if space > 0 and line[:space].strip() else place
        yield line[:place].rstrip()
        line = line[place:].lstrip()
    yield line


def _cells(text: str) -> int:
    """Count the cells that a text takes: letters of East Asia take two, marks on letters none."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )
