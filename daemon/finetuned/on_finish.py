"""Telling others that a job has ended: a command, or services that apprise knows. Beside the daemon's loop, one after
the other, each with a limit of time; what goes wrong is a warning and nothing more.

Each end is told at least once, and twice only where the daemon died while it told it: the ledger notes with a job's end
that it is to be told, then that telling begins, then that it is told.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import structlog

from finetuned.home import printable
from finetuned.jobs import Job, Outcome
from finetuned.section_settings import OnFinish

_log = structlog.get_logger()

MOST_TRIES = 2  # of telling one end: a command that ends the daemon, or the machine, must not do so for ever
_SHOWN = 300  # characters of what a command said
# Reads the order from standard input, as a command line is seen by all users of the machine, and URLs hold passwords.
_SEND = """
import json, sys
try:
    import apprise
except ImportError:
    sys.exit("apprise is not installed: pip install 'finetuned[notify]'")
order = json.load(sys.stdin)
service = apprise.Apprise()
bad = [url.partition(":")[0] for url in order["urls"] if not service.add(url)]
kinds = {"succeeded": "success", "failed": "failure"}
sent = service.notify(title=order["title"], body=order["line"], notify_type=kinds.get(order["result"], "warning"))
sys.exit(f"no such services: {', '.join(bad)}" if bad else None if sent else "some of the services did not take it")
"""


@dataclass(frozen=True)
class News:
    """How a job ended."""

    job: str
    file: str
    result: str  # succeeded, failed, cancelled
    line: str

    def environment(self) -> dict[str, str]:
        """Give it as a command sees it."""
        facts = {"JOB": self.job, "FILE": self.file, "RESULT": self.result, "LINE": self.line}
        return {f"FINETUNED_{name}": value.replace("\0", "") for name, value in facts.items()}


def news_of(job: Job) -> News:
    """Give the news of a job that has ended."""
    name, outcome = printable(job.name), job.outcome or Outcome.FAILED
    if outcome is Outcome.SUCCEEDED:
        figures = {key: job.progress[key] for key in ("train_loss", "valid_loss") if key in job.progress}
        told = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in figures.items())
        what = f"adapters/{job.adapter}" + (f" ({told})" if told else "")
    else:
        reason = job.reason or {}
        what = f"{reason.get('what', '')}. {reason.get('remedy', '')}".strip()
    return News(job.id, name, outcome, f"{job.id}: {name} {outcome}: {what}")


class Teller:
    """Tells one piece of news after the other, in a thread of its own."""

    def __init__(self, told: Callable[[], None] = lambda: None) -> None:
        """Prepare; `told` is called, in that thread, when a piece of news is told."""
        self._when_told = told
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tell")
        self._told: set[Future[None]] = set()
        self._process: subprocess.Popen[str] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is news that is not told yet."""
        return any(not future.done() for future in self._told)

    def tell(self, settings: OnFinish, news: News) -> None:
        """Have news told as the settings say; returns at once."""
        self._told = {future for future in self._told if not future.done()}
        future = self._pool.submit(self._tell, settings, news)
        future.add_done_callback(lambda _: self._when_told())
        self._told.add(future)

    def close(self, *, seconds: float) -> bool:
        """Wait at most so long for what is not told yet, then give up. Whether all was told."""
        late = wait(self._told, timeout=seconds).not_done
        self._pool.shutdown(wait=False, cancel_futures=True)
        if late:
            _log.warning("on_finish: not told any more", news=len(late))
            if self._process is not None:
                _kill(self._process)
        return not late

    def _tell(self, settings: OnFinish, news: News) -> None:
        if settings.command:
            self._run("command", ["/bin/sh", "-c", settings.command], "", news, settings.seconds)
        if settings.urls:
            title = f"finetuned: {news.job} {news.result}"
            order = {"urls": settings.urls, "title": title, "line": news.line, "result": news.result}
            self._run("urls", [sys.executable, "-P", "-c", _SEND], json.dumps(order), news, settings.seconds)

    def _run(self, what: str, command: list[str], said: str, news: News, seconds: float) -> None:
        """Run a command to its end, or to the end of its time; a warning if it does not succeed."""
        try:
            # A file, as a pipe would be held open by whatever the command leaves running.
            with tempfile.TemporaryFile("w+", errors="replace") as output:
                why = self._attend(command, said, output, news.environment(), seconds)
                output.seek(0)
                words = output.read(2**20).strip()[-_SHOWN:]
        except Exception as error:  # noqa: BLE001, a thread's exceptions are heard by nobody
            why, words = str(error), ""
        if why:
            _log.warning(f"on_finish.{what} did not work", job=news.job, why=why, said=words)

    def _attend(
        self,
        command: list[str],
        said: str,
        output: IO[str],
        more: Mapping[str, str],
        seconds: float,
    ) -> str:
        self._process = process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, **more},
            text=True,
            start_new_session=True,
        )
        try:
            process.communicate(said, timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"it took longer than {seconds:g} s and was ended"
        finally:
            self._process = None
        return f"exit code {process.returncode}" if process.returncode else ""


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
