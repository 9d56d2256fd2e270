"""What can go wrong, said so that the reader knows what happened, where, and what to do.

Every error a user can meet is a `FinetunedError`. Bugs stay ordinary exceptions with their traceback.
"""

from __future__ import annotations

import re

# What moves a terminal's cursor, ends a line of a log in its middle, or turns the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Give text that a terminal only shows: control characters as backslash sequences, but for line ends and tabs."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(number: int, noun: str) -> str:
    """Give `1 row`, `2 rows`, `1,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def encodable(text: str) -> str:
    """Give text that SQLite and UTF-8 take: names that are no UTF-8 are in a `str` as surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


class FinetunedError(Exception):
    """Something a user can mend.

    `code` is a short stable name for machines, `what` happened, `where` (a file, a line, a setting; may be
    empty) and the `remedy`.
    """

    code = "error"

    def __init__(self, what: str, *, where: str = "", remedy: str = "", code: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        if code:
            self.code = code
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """Give the whole error as text: `where: what. remedy`."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text.rstrip('.')}. {self.remedy}".rstrip() if self.remedy else text

    def as_dict(self) -> dict[str, str]:
        """Give the error as it is stored in the ledger, in events and in `reason.json`."""
        said = {"code": self.code, "what": self.what, "where": self.where, "remedy": self.remedy}
        return {key: harmless(text) for key, text in said.items()}


class ConfigError(FinetunedError):
    """config.json, a profile or an override holds something that cannot be used."""

    code = "bad_settings"


class DataError(FinetunedError):
    """The training file cannot be used."""

    code = "bad_data"


class ModelError(FinetunedError):
    """The base model is missing or cannot be loaded."""

    code = "bad_model"


class HomeError(FinetunedError):
    """The base directory is missing, in use, or not as it must be."""

    code = "bad_home"


class OutOfMemoryError(FinetunedError):
    """The trainer ran out of memory and has no means of its own left."""

    code = "out_of_memory"


class UnhealthyError(FinetunedError):
    """The training ran but could not have taught the model anything."""

    code = "unhealthy"
