"""`finetuned top` on a real terminal (a pty), beside a real daemon."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios

import pytest

from conftest import chat_rows, eventually, write_jsonl
from finetuned.jobs import Outcome, State

LEAVES = "\x1b[?1049l"


class Terminal:
    """A terminal with `finetuned top` on it. The slave end stays open, so that its modes can be read afterwards."""

    def __init__(self, home, columns: int = 80, lines: int = 24, **environment: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.said = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetuned", "top", "--base-dir", str(home.root)],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environment},
            start_new_session=True,
        )

    def read(self) -> None:
        while select.select([self.master], [], [], 0)[0]:
            self.said += os.read(self.master, 2**16).decode("utf-8", "replace")

    def lines(self) -> list[str]:
        """The newest frame that is there as a whole, without colours."""
        self.read()
        frames = [part.partition("\x1b[J")[0] for part in self.said.split("\x1b[H")[1:] if "\x1b[J" in part]
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frames[-1]).split("\r\n") if frames else []

    def shows(self, *words: str, seconds: float = 15) -> None:
        def there() -> bool:
            text = "\n".join(self.lines())
            return all(word in text for word in words)

        try:
            eventually(there, seconds=seconds)
        except AssertionError:
            raise AssertionError(f"{words} not in\n" + "\n".join(self.lines()) + f"\n{self.said[-500:]!r}") from None

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def has_put_back(self) -> bool:
        """Whether modes, screen and cursor are what they were."""
        self.read()
        screen = self.said.rstrip().endswith(LEAVES) and "\x1b[?25h" in self.said.rpartition("\x1b[H")[2]
        return screen and termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(home):
    opened: list[Terminal] = []

    def start(**size) -> Terminal:
        opened.append(Terminal(home, **size))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def drop(home):
    def put(name: str, count: int, start: int):
        staged = write_jsonl(home.root / f"staged-{name}", chat_rows(count, start=start))
        staged.rename(home.inbox / name)

    return put


def test_a_queue_is_watched_and_ordered_by_keys(home, daemon, terminal, drop, standin):
    standin(seconds=0.05)
    one = daemon()
    drop("long.jsonl", 2000, 0)
    long = one.job("long.jsonl", state=State.RUNNING)
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        drop(name, 3, 5000 + 100 * number)
        one.job(name, state=State.QUEUED)
    a, b, c = (one.job(f"{name}.jsonl", state=State.QUEUED).id for name in "abc")

    top = terminal()
    top.shows(f"> {long.id}: step", "of 2000", "queue: 3 waiting", "loss 1.0000", "q quit")
    top.press("j")
    top.shows(f"> {a}")
    top.press("\x1b[Bj")  # an arrow, and j once more
    top.shows(f"> {c}")
    top.press("f")
    top.shows(f"{c} is first in the queue")
    eventually(lambda: [job for job in top.lines() if job[2:] in {a, b, c}][:1] == [f"> {c}"], why="c is first")
    top.press("c")
    top.shows(f"c once more cancels {c}")
    top.press("c")
    assert one.job("c.jsonl").outcome is Outcome.CANCELLED
    top.press("p")
    job = one.job("long.jsonl", state=State.QUEUED)
    top.shows("paused", "no job is running", "queue: 3 waiting")
    assert job.progress["checkpoint_step"]
    top.press("r")
    top.shows(f"{long.id}: step")
    assert one.job("long.jsonl", state=State.RUNNING)
    assert len(top.lines()) == 24
    assert max(map(len, top.lines())) <= 80
    top.press("q")
    assert top.process.wait(60) == 0
    assert top.has_put_back()


def test_a_job_that_was_cancelled_is_tried_again_by_a_key(home, daemon, terminal, drop, standin):
    standin(seconds=0.1)
    one = daemon()
    drop("long.jsonl", 1000, 0)
    job = one.job("long.jsonl", state=State.RUNNING)
    top = terminal()
    top.shows(f"> {job.id}")
    top.press("t")  # what runs needs no other try
    top.shows("is running")
    top.press("cc")
    assert one.job("long.jsonl").outcome is Outcome.CANCELLED
    top.shows(f"> cancelled {job.id}")
    top.press("?")
    top.shows("try the chosen job again")
    top.press("t")  # any key ends the explanation, and does no more
    top.shows(f"> cancelled {job.id}")
    assert one.job("long.jsonl").state is State.FINISHED
    top.press("t")
    top.shows(f"{job.id} is tried again")
    one.job("long.jsonl", state=State.RUNNING)


def test_an_order_that_cannot_be_carried_out_is_told_and_the_view_goes_on(home, daemon, terminal, drop, standin):
    standin(seconds=0.1)
    one = daemon()
    drop("long.jsonl", 1000, 0)
    one.job("long.jsonl", state=State.RUNNING)
    top = terminal(columns=100)
    top.shows("long")
    top.press("f")  # what runs has no turn
    top.shows("queue", "is running")
    assert top.process.poll() is None


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "q", "\x04q"], ids=str)
def test_the_terminal_is_put_back_whatever_ends_it(home, terminal, end):
    top = terminal(columns=60, lines=8)
    top.shows("not running")
    assert termios.tcgetattr(top.slave) != top.before
    if isinstance(end, str):
        top.press(end)
    else:
        top.process.send_signal(end)
    top.process.wait(60)
    assert "Traceback" not in top.said
    assert top.has_put_back()


@pytest.mark.parametrize("size", [(0, 0), (12, 3), (7, 2), (1, 1)], ids=str)
def test_a_terminal_that_is_tiny_or_does_not_know_its_size_is_no_trouble(home, terminal, size):
    top = terminal(columns=size[0], lines=size[1])
    eventually(lambda: len(top.lines()) == (size[1] or 24), why="a frame of as many lines")
    assert "\x1b[?7l" in top.said  # what is too long for 7 columns is cut off there
    top.press("q")
    assert top.process.wait(60) == 0
    assert top.has_put_back()
    assert "\x1b[?7h" in top.said


def test_a_terminal_that_cannot_move_its_cursor_gets_one_frame(home, terminal):
    top = terminal(TERM="dumb")
    assert top.process.wait(60) == 0
    top.read()
    assert "no job is running" in top.said
    assert "\x1b" not in top.said


def test_without_colour_there_is_none(home, terminal):
    top = terminal(NO_COLOR="1")
    top.shows("not running")
    assert not re.search(r"\x1b\[\d+m", top.said)


def test_keys_that_mean_nothing_here_order_nothing(home, daemon, terminal, drop, standin):
    standin(seconds=0.1)
    one = daemon()
    drop("long.jsonl", 1000, 0)
    job = one.job("long.jsonl", state=State.RUNNING)
    top = terminal()
    top.shows(f"> {job.id}")
    top.press("\x1bp\x1b[1;5c\x1b[15~\x1bOP")  # Alt-p, Ctrl and a key, F5, F1
    top.press("c\x1b[Cc")  # an arrow between two c
    top.shows("c once more cancels")
    top.press("x")
    assert not home.paused.exists()
    assert one.job("long.jsonl", state=State.RUNNING)


def test_a_damaged_ledger_is_told_in_a_sentence(home, terminal):
    home.ledger.write_bytes(b"no ledger" * 1000)
    top = terminal()
    assert top.process.wait(60) == 78
    top.read()
    assert "the ledger is damaged" in top.said
    assert "Traceback" not in top.said
    for verb in ("status", "top"):
        words = [sys.executable, "-m", "finetuned", verb, "--base-dir", str(home.root)]
        said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (said.returncode, "Traceback" in said.stderr) == (78, False)
        assert "`finetuned run`" in said.stderr


def test_in_a_pipe_it_shows_one_frame_and_ends(home):
    said = subprocess.run(
        [sys.executable, "-m", "finetuned", "top", "--base-dir", str(home.root)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=True,
    )
    assert "no job is running" in said.stdout
    assert "\x1b" not in said.stdout
    assert "q quit" not in said.stdout
