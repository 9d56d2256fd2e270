"""What the trainer says: events for the supervisor, the same sentences for the job's log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuned.errors import FinetunedError, harmless
from finetuned.events import Event, EventType


class Reporter:
    """Appends events to events.jsonl and prints their messages. Of several ranks, rank 0 alone does, but for an error
    that another is the first to meet.
    """

    def __init__(self, path: Path, *, rank: int = 0) -> None:
        """Open the file. A line torn by a crash before is ended, so that the next one stands alone."""
        self._rank = rank
        self._first_to_fail: Callable[[], bool] = lambda: rank == 0  # until they meet, ranks meet with the same errors
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")
        self._listener: Callable[[EventType, Mapping[str, Any]], None] | None = None

    def hear(self, listener: Callable[[EventType, Mapping[str, Any]], None] | None) -> None:
        """Let somebody hear what is said: its kind and its figures. It must not raise."""
        self._listener = listener

    def share_errors(self, first_to_fail: Callable[[], bool]) -> None:
        """Tell an error only where no other rank has told one."""
        self._first_to_fail = first_to_fail

    def say(self, kind: EventType, message: str, *, level: str = "info", **data: Any) -> None:
        """Say something, with figures for machines in `data`."""
        if self._rank and kind is not EventType.ERROR:
            return
        message = harmless(message)  # it may hold what stands in a row or a model's answer
        event = Event(time.time(), kind, message, level, data)
        os.write(self._descriptor, event.line())
        mark = "" if level == "info" else f"rank {self._rank}: {level}: " if self._rank else f"{level}: "
        sys.stdout.write(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {mark}{message}\n")
        sys.stdout.flush()
        if self._listener:
            self._listener(kind, data)

    def phase(self, name: str, message: str, **data: Any) -> None:
        """Say which part of the work begins, or how far it is."""
        self.say(EventType.PHASE, message, phase=name, **data)

    def warn(self, message: str) -> None:
        """Say something that the user should know but that does not end the job."""
        self.say(EventType.MESSAGE, message, level="warning")

    def error(self, error: FinetunedError, **data: Any) -> None:
        """Say why the attempt ends."""
        if self._first_to_fail():
            self.say(EventType.ERROR, error.sentence(), level="error", **error.as_dict(), **data)
