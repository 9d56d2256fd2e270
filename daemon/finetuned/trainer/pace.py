"""How fast a training goes, and how long it will take."""

from __future__ import annotations

import time


class Pace:
    """Speed and time left, smoothed over the last steps."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._step_seconds: float | None = None
        self._sum_tokens, self.seconds = 0, 0.0  # of all steps so far

    @property
    def overall(self) -> float:
        """Tokens per second of all steps so far."""
        return self._sum_tokens / self.seconds if self.seconds else 0.0

    def start(self) -> None:
        """Leave out what was done between two steps."""
        self._last = time.monotonic()

    def after(self, tokens: int, steps_left: int) -> tuple[float, float]:
        """Give the step's tokens per second and the seconds left."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._sum_tokens, self.seconds = self._sum_tokens + tokens, self.seconds + seconds
        smooth = self._step_seconds
        self._step_seconds = seconds if smooth is None else 0.8 * smooth + 0.2 * seconds
        return tokens / max(seconds, 1e-9), self._step_seconds * steps_left
