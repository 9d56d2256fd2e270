"""`finetuned top`: a live view of the queue in the terminal, and keys that give orders. In a pipe it shows one frame.

It reads the ledger as `finetuned status` does, and orders as the control verbs do.
"""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import signal
import sqlite3
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from finetuned.control import order
from finetuned.curves import curves_of
from finetuned.errors import FinetunedError
from finetuned.found import ledger_if_any
from finetuned.frame import Size, choices, frame, in_detail, meaning_of_keys
from finetuned.home import Home
from finetuned.spool.orders import Verb
from finetuned.status import gather as gather_status

_EVERY = 1.0  # seconds between two frames
_POINTS = 2000  # of the newest steps, in the curve
# Also without a cursor and without wrapping: a terminal of 8 columns cuts off what is too long.
_FULL_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_LEAST = Size(10, 1)
_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|\x1b[^\[]|.", re.DOTALL)  # a key may be several bytes
_ARROWS = {"\x1b[A": "k", "\x1b[B": "j", "\x1bOA": "k", "\x1bOB": "j"}
_OF_A_JOB = {"c": Verb.CANCEL, "t": Verb.RETRY, "f": Verb.FIRST, "l": Verb.LAST}


def gather(home: Home, chosen: str = "") -> dict[str, Any]:
    """Collect what a frame shows: what `finetuned status` knows, and figures of the job that is shown in detail."""
    facts = {**gather_status(home), "curves": {}, "predictions": []}
    if not facts["daemon_pid"]:  # how it is with the others is old news
        facts["gpus"] = [gpu for gpu in facts["gpus"] if gpu["jobs"]]
    shown = in_detail(facts["running"], chosen) or next((job["id"] for job in facts["finished"]), "")
    if not shown:
        return facts
    with ledger_if_any(home) as ledger:
        if ledger is not None:
            facts["curves"] = {shown: curves_of(ledger.newest_metrics(shown, _POINTS))}
            facts["predictions"] = ledger.newest_predictions(shown)
    return facts


def show(home: Home) -> None:
    """Show the live view until q or Ctrl-C; one frame where there is no terminal that can show it.

    Raises HomeError if the ledger is damaged.
    """
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        size = Size(max(_LEAST.columns, shutil.get_terminal_size().columns), plain=plain)
        lines = [line.rstrip() for line in _coloured(frame(gather(home), size))]
        click.echo(_writable("\n".join(lines)), color=False if os.environ.get("TERM") == "dumb" else None)
        return
    try:
        with suppress(KeyboardInterrupt), _whole_terminal():
            _View(home, plain=plain).run()
    except OSError as error:
        if error.errno != errno.EIO:  # the terminal is gone
            raise


def _coloured(lines: list[str]) -> list[str]:
    return [click.unstyle(line) for line in lines] if "NO_COLOR" in os.environ else lines


def _writable(text: str) -> str:
    return text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding)


class _View:
    def __init__(self, home: Home, *, plain: bool) -> None:
        self._home, self._plain = home, plain
        self._chosen, self._note, self._sure, self._stale = "", "", "", ""
        self._asked = False  # what the keys mean

    def run(self) -> None:
        facts = gather(self._home)
        while True:
            jobs = choices(facts)
            if self._chosen not in jobs:
                self._chosen = jobs[0] if jobs else ""
            self._draw(facts)
            if select.select([sys.stdin], [], [], _EVERY)[0]:
                typed = os.read(sys.stdin.fileno(), 64)
                for key in _keys(typed):
                    self._press(key, jobs)
                if not typed or "q" in _keys(typed):
                    return
            try:
                facts, self._stale = gather(self._home, self._chosen), ""
            except sqlite3.OperationalError as error:  # somebody has locked it, say
                self._stale = f"not up to date: {error}"

    def _draw(self, facts: dict[str, Any]) -> None:
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        columns, lines = columns or 80, lines or 24  # a serial line does not know its own
        size = Size(max(_LEAST.columns, columns), max(_LEAST.lines, lines), plain=self._plain)
        shown = frame(facts, size, chosen=self._chosen, note=self._stale or self._note)
        drawn = _coloured(meaning_of_keys(size) if self._asked else shown)
        sys.stdout.write(_writable("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in drawn) + "\x1b[J"))
        sys.stdout.flush()

    def _press(self, key: str, jobs: Any) -> None:
        sure, self._sure = self._sure, ""
        if self._asked or key == "?":
            self._asked = not self._asked
            return
        if key in "jk" and jobs:
            place = jobs.index(self._chosen) + (1 if key == "j" else -1)
            self._chosen, self._note = jobs[max(0, min(place, len(jobs) - 1))], ""
        elif key in "pr":
            self._order(Verb.PAUSE if key == "p" else Verb.RESUME)
        elif key == "c" and self._chosen and sure != self._chosen:
            self._sure, self._note = self._chosen, f"c once more cancels {self._chosen}"
        elif key in _OF_A_JOB and self._chosen:
            self._order(_OF_A_JOB[key], self._chosen)
        else:
            self._note = ""

    def _order(self, verb: Verb, job: str = "") -> None:
        try:
            self._note = order(self._home, verb, job)
        except FinetunedError as error:
            self._note = error.sentence()


def _keys(typed: bytes) -> list[str]:
    """Give the keys that were pressed; an arrow is several bytes, and means j or k."""
    found = _KEY.findall(typed.decode("ascii", "ignore"))
    return [_ARROWS.get(key, key) for key in found]


@contextmanager
def _whole_terminal() -> Iterator[None]:
    """Take the whole terminal and each key as it is pressed; put all back, also where the process is told to end."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    told = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    told[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would stop with the terminal in disorder
    try:
        tty.setcbreak(descriptor)
        sys.stdout.write(_FULL_SCREEN)
        yield
    finally:
        with suppress(OSError, termios.error):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
            sys.stdout.write(_BACK)
            sys.stdout.flush()
        for number, handler in told.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)
