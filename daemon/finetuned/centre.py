"""The control centre as a child of the daemon: started, and started again with a growing delay when it ends. Whatever
becomes of it, the daemon goes on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec

import structlog

from finetuned.home import Home
from finetuned.section_settings import Web

_FIRST_PAUSE, _LAST_PAUSE = 2.0, 300.0  # seconds before it is started again, doubled each time
_UP = 5.0  # seconds after which one that has not ended is taken to be up
_STEADY = 60.0  # seconds that it must have run for the next pause to be short again
_LAST_WORDS = 2000  # bytes of its log
_NEEDED = ("starlette", "uvicorn", "jinja2")

_log = structlog.get_logger()


class ControlCentre:
    """Keeps `finetuned web` running as config.json says."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._down = ""  # why, where it is
        self._log_file = home.logs / "web.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: Web | None = None
        self._started = self._next_start = 0.0
        self._pause = _FIRST_PAUSE

    def tend(self, wanted: Web) -> None:
        """Start it, start it anew with other settings, or notice that it ended. Raises OSError if it cannot start."""
        if wanted != self._wanted:
            self.close()
            self._say_down("")
            self._wanted, self._next_start, self._pause = wanted, 0.0, _FIRST_PAUSE
            if wanted.enabled and (missing := [name for name in _NEEDED if find_spec(name) is None]):
                then = "there is no control centre; pip install 'finetuned[web]' brings it"
                _log.info("not installed", packages=", ".join(missing), then=then)
                self._next_start = float("inf")
        if self._process is not None and (status := self._process.poll()) is not None:
            self._note_end(status)
        elif self._process is not None and self._down and time.monotonic() - self._started >= _UP:
            self._say_down("")
        if wanted.enabled and self._process is None and time.monotonic() >= self._next_start:
            self._start(wanted)

    def _start(self, wanted: Web) -> None:
        self._next_start = time.monotonic() + self._pause  # also where it cannot be started at all
        command = [sys.executable, "-P", "-m", "finetuned", "web", "--base-dir", str(self._home.root), "--with-daemon"]
        command += ["--host", wanted.host, "--port", str(wanted.port)]
        with self._log_file.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed by the kernel with the daemon: its sign to end
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the daemon
            )
        self._started = time.monotonic()
        _log.info("control centre starts", at=f"http://{wanted.host}:{wanted.port}/", pid=self._process.pid)

    def _note_end(self, status: int) -> None:
        now = time.monotonic()
        if now - self._started >= _STEADY:
            self._pause = _FIRST_PAUSE
        why = self._last_words()
        _log.warning("control centre ended", status=status, why=why, again_in_seconds=self._pause)
        self._say_down(f"it ended{f': {why}' if why else ''}; it is started again, and logs/web.log says more")
        self._next_start, self._pause = now + self._pause, min(2 * self._pause, _LAST_PAUSE)
        self._forget()

    def _say_down(self, why: str) -> None:
        """Leave for `finetuned status` why there is none; nothing where it is up, or not wanted."""
        self._down = why
        with suppress(OSError):  # the log has it too
            if why:
                self._home.web_down.write_text(why, encoding="utf-8")
            else:
                self._home.web_down.unlink(missing_ok=True)

    def _last_words(self) -> str:
        try:
            lines = self._log_file.read_bytes()[-_LAST_WORDS:].decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return lines[-1].removeprefix("finetuned: ") if lines else ""

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._forget()

    def _forget(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
