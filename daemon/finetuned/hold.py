"""When the queue waits: for room on the disk most often. Nothing is lost, and it goes on by itself."""

from __future__ import annotations

import time

import structlog

from finetuned.guard import say_waiting
from finetuned.home import Home

FIRST_RETRY, LAST_RETRY = 1.0, 15.0  # seconds, after the disk was full or read-only; doubled each time
_LONG_AGO = 600.0  # seconds without trouble, after which the first retry comes soon again

_log = structlog.get_logger()


class Hold:
    """Whether the queue waits, for what, and until when."""

    def __init__(self, home: Home) -> None:
        self.on = False  # and what it stopped is still to be put right
        self.until = 0.0  # by the monotonic clock; steps that need the disk rest until then
        self.by: Exception | str | None = None  # stays until a round of the loop has gone well
        self._home = home
        self._seconds = 0.0

    @property
    def resting(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() < self.until

    def begin(self, error: Exception | str, *, doing: str) -> None:
        """Let the queue wait, each time in a row for twice as long; `doing` says what could not be done."""
        now = time.monotonic()
        if self.on and now < self.until:
            return
        if now - self.until > _LONG_AGO:
            self._seconds = 0.0
        self._seconds = min(2 * self._seconds or FIRST_RETRY, LAST_RETRY)
        self.on, self.until = True, now + self._seconds
        if str(error) != str(self.by):
            _log.error("the queue waits", doing=doing, error=str(error), then="it goes on by itself")
        self.by = error
        say_waiting(self._home, f"{doing}: {error}")

    def end_if_over(self) -> None:
        """Say that the queue goes on, after a round in which nothing stopped it again."""
        if self.by and not self.on:
            self.by = None
            say_waiting(self._home, "")
            _log.info("the queue goes on")
