"""A job's progress as a sentence, and as a line that renews itself on a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from finetuned.errors import harmless

_PHASES = {
    "validating_files": "checking the data",
    "loading_model": "loading the model",
    "generating": "making answers",
    "evaluating": "evaluating",
    "saving": "writing the adapter",
}
_BAR = 24  # characters
_NAMED = 3  # jobs of many that a line names
_EVERY = 5.0  # seconds between two lines where there is no terminal


def duration(seconds: float) -> str:
    """Give a length of time: `48 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def sentence(progress: dict[str, Any]) -> str:
    """Give a running job's newest figures."""
    phase = progress.get("phase")
    if progress.get("waits_for"):
        return f"waits for the cluster: {progress['waits_for']}"
    if phase == "generating" and "counted" in progress:
        return f"{_PHASES[phase]}, {progress['counted']}"
    if phase in _PHASES or "train_loss" not in progress:
        return "the first step" if phase == "training" else _PHASES.get(str(phase), "starting")
    return (
        f"step {progress['step']} of {progress.get('total_steps', '?')}, loss {progress['train_loss']:.4f}, "
        f"{progress.get('tokens_per_second', 0):,.0f} tokens/s, {duration(progress.get('seconds_left', 0))} left"
    )


def brief(progress: dict[str, Any]) -> str:
    """Give it in a few words."""
    if progress.get("phase") in _PHASES or "train_loss" not in progress:
        return sentence(progress)
    return f"step {progress['step']} of {progress.get('total_steps', '?')}"


def sentence_of_all(jobs: Sequence[tuple[str, bool, dict[str, Any]]]) -> str:
    """Say what running jobs do: one at length, several in a line that stays short. (id, is it stopped, progress)."""
    say = sentence if len(jobs) == 1 else brief
    said = [f"{job}: {'writing a checkpoint' if stops else say(progress)}" for job, stops, progress in jobs[:_NAMED]]
    more = [f"and {len(jobs) - _NAMED} more"] if len(jobs) > _NAMED else []
    return (f"{len(jobs)} jobs: " if len(jobs) > 1 else "") + "; ".join([*said, *more])


def why_waiting(progress: dict[str, Any]) -> str:
    """Say why a queued job does not run: how its last attempt ended, and what it waits for."""
    return "; ".join(filter(None, (progress.get("waits"), progress.get("waits_for"))))


class LiveLine:
    """One line on stderr that is written over, or a new line now and then where stderr is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = ""
        self._said_at = 0.0

    def show(self, progress: dict[str, Any]) -> None:
        """Show the newest figures."""
        text = sentence(progress)
        total = progress.get("total_steps") or 0
        steps = total and progress.get("phase") == "training" and "train_loss" in progress
        if steps:
            filled = _BAR * progress.get("step", 0) // total
            text = f"[{'#' * filled}{'.' * (_BAR - filled)}] {text}"
        if text == self._said:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{text[:width]}")
        elif not steps or time.monotonic() - self._said_at >= _EVERY:
            sys.stderr.write(f"{text}\n")
            self._said_at = time.monotonic() if steps else 0.0
        self._said = text
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line as it is and go on below it."""
        if self._terminal and self._said:
            sys.stderr.write("\n")


class DoingLine:
    """What a process that was asked does, and how far it is, as one line on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def show(self, said: dict[str, Any]) -> None:
        """Take what was heard."""
        if not self._shown or "doing" not in said:
            return
        text = str(said["doing"])
        if "share" in said:
            bar = "#" * int(_BAR * said["share"])
            counted = f", {said['counted']}" if "counted" in said else ""
            text = f"[{bar:.<{_BAR}}] {text}: {said['share']:.0%}{counted}"
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{harmless(text)[:width]}")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave nothing of it."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
