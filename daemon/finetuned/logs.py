"""structlog, set up once: logfmt into logs/daemon_YYYYMMDD.log, and onto the terminal in colour (logfmt where it is no
terminal).
"""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TextIO, cast

# structlog takes rich for tracebacks wherever it is installed: 6 MB more in a daemon that lives for weeks.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]

import structlog  # noqa: E402
from structlog.typing import EventDict, Processor, WrappedLogger  # noqa: E402

from finetuned.errors import harmless  # noqa: E402

_LOGFMT = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)


class DailyFile:
    """A log file a day, `daemon_YYYYMMDD.log`, opened anew when the date changes or the file was taken away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None
        self._path: Path | None = None

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        """Write the line and pass the event on; a processor of structlog."""
        path = self._folder / f"daemon_{datetime.now().astimezone():%Y%m%d}.log"
        line = str(_LOGFMT(None, "", dict(event))) + "\n"
        try:
            if self._file is None or path != self._path or not path.exists():
                if self._file is not None:
                    self._file.close()
                self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
                self._path = path
            self._file.write(line)
        except OSError:  # a full disk must not take the daemon with it; the terminal or the journal has the line
            self._file = None
        return event


def _harmless(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Let a terminal only show what names, rows and models brought along; a processor of structlog."""
    return {key: harmless(value) if isinstance(value, str) else value for key, value in event.items()}


class _Forgiving:
    """A stream whose full disk or closed terminal must not end the daemon."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write, if that can be."""
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        """Flush, if that can be."""
        with suppress(OSError):
            self._stream.flush()


def set_up_logging(folder: Path | None = None) -> None:
    """Send log lines to stderr and, if a folder is given, to its daily file."""
    to_terminal = sys.stderr.isatty()
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=False),
        structlog.processors.format_exc_info,
        _harmless,
    ]
    if folder is not None:
        processors.append(DailyFile(folder))
    processors.append(structlog.dev.ConsoleRenderer() if to_terminal else _LOGFMT)
    structlog.configure(
        processors=processors,
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Forgiving(sys.stderr))),
        cache_logger_on_first_use=False,
    )
