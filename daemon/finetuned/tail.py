"""Reading log files as they grow."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from finetuned.errors import HomeError, harmless
from finetuned.home import Home

_PAUSE = 0.25  # seconds between two looks


def find_log(home: Home, job: str | None) -> Path:
    """Give the daemon's newest log, or that of a job by the beginning of its id. Raises HomeError if there is none."""
    folder, pattern = (home.logs, "daemon_*.log") if job is None else (home.job_logs, "*.log")
    found = [path for path in sorted(folder.glob(pattern)) if job is None or path.name.startswith(job)]
    if not found:
        remedy = (
            "It appears when `finetuned run` has been started." if job is None else "`finetuned status` shows the jobs."
        )
        raise HomeError(
            f"there is no log of {'the daemon' if job is None else job} yet", where=str(folder), remedy=remedy
        )
    exact = [path for path in found if path.stem == job]
    return exact[0] if exact else max(found, key=lambda path: path.stat().st_mtime)


def tail(find: Callable[[], Path], *, lines: int, follow: bool) -> Iterator[str]:
    """Give the last lines of a file and, if asked, each new one; goes over to a newer file when `find` names one."""
    path = find()
    file = path.open("rb")
    torn = b""
    for line in deque(file, maxlen=lines):
        if follow and not line.endswith(b"\n"):
            torn = line
        else:
            yield _text(line)
    while follow:
        if line := file.readline():
            torn += line
            if torn.endswith(b"\n"):
                yield _text(torn)
                torn = b""
        elif file.tell() > os.fstat(file.fileno()).st_size:  # its middle was cut out: go on behind its newest line
            file.seek(0, os.SEEK_END)
        elif (newest := find()) != path:
            path = newest
            file.close()
            file = path.open("rb")
        else:
            time.sleep(_PAUSE)
    file.close()


def _text(line: bytes) -> str:
    return harmless(line.decode("utf-8", "replace").rstrip("\r\n"))
