"""What ends the daemon's rest: a signal, a hint from the inbox, a finished hash."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress


class Wake:
    """A pipe to rest at. A lock would not do: a signal handler may run while the loop itself holds it."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def set(self) -> None:
        """End the rest now, or the next one at once. Safe from any thread and in a signal handler."""
        with suppress(BlockingIOError):
            os.write(self._write, b"\0")

    def rest(self, seconds: float) -> None:
        """Wait for `set`, at most so long."""
        if select.select([self._read], [], [], max(0.0, seconds))[0]:
            with suppress(BlockingIOError):
                while os.read(self._read, 4096):
                    pass


class Hints(threading.Event):
    """The inbox watch's flag, which also ends the rest."""

    def __init__(self, wake: Wake) -> None:
        super().__init__()
        self._wake = wake

    def set(self) -> None:
        """Note that the inbox changed."""
        super().set()
        self._wake.set()
