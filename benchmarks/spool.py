"""How quick and how small the spool is. `make bench-spool` prints the table; nothing is asserted.

Whole processes, medians. No trainer takes part: the queue is paused. Put the figures into RESULTS.md with date and
device.
"""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from daemon import resident, start_daemon

from finetuned.config import Config
from finetuned.home import Home
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.spool.claim import claim, enqueue, fingerprint, input_path
from finetuned.spool.inbox import Found
from finetuned.spool.orders import pause

QUIET = 0.5  # seconds
DROPS = 20
STORM = int(os.environ.get("STORM", "10000"))
FINISHED = 100_000
DURABLE = 300
ROW = b'{"messages": [{"role": "user", "content": "Say %d"}, {"role": "assistant", "content": "%d."}]}\n'


def main() -> None:
    """Measure and print."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as folder:
        home = base_directory(Path(folder, "storm"))
        daemon = start_daemon(home)
        try:
            time.sleep(3)
            latency = statistics.median(pick_up(home, number) for number in range(DROPS))
            rows.append(("file closed to claimed, above the quiet window", f"{latency * 1000:.0f} ms"))
            before = resident(daemon.pid)
            claimed, queued = storm(home, STORM)
            rows += [
                (f"{STORM:,} files at once: claimed", f"{claimed:.0f} a second"),
                (f"{STORM:,} files at once: claimed, hashed and queued", f"{queued:.0f} a second"),
                ("daemon before the storm, resident", f"{before / 2**20:.1f} MiB"),
                ("daemon after the storm, resident", f"{resident(daemon.pid) / 2**20:.1f} MiB"),
            ]
            rows.append((f"finetuned status with {STORM:,} queued jobs", f"{status_seconds(home) * 1000:.0f} ms"))
        finally:
            daemon.terminate()
            daemon.wait()
        home = base_directory(Path(folder, "finished"))
        fill_ledger(home, FINISHED)
        daemon = start_daemon(home)  # one that has looked at config.json spares `status` to do so
        try:
            time.sleep(3)
            rows.append((f"finetuned status with {FINISHED:,} finished jobs", f"{status_seconds(home) * 1000:.0f} ms"))
        finally:
            daemon.terminate()
            daemon.wait()
        whole = durable_path(base_directory(Path(folder, "durable")))
        os.fsync = lambda _: None
        unsafe = durable_path(base_directory(Path(folder, "unsafe")), synchronous="OFF")
        rows += [
            ("D1 to D5 of one small file", f"{whole * 1000:.1f} ms"),
            ("the same without any fsync", f"{unsafe * 1000:.1f} ms"),
        ]
    for name, figure in rows:
        print(f"| {name} | {figure} |")


def base_directory(folder: Path) -> Home:
    """Make a base directory with a paused queue."""
    home = Home(folder)
    for path in home.folders:
        path.mkdir(parents=True)
    home.config_file.write_text(json.dumps({"quiet_seconds": QUIET, "web": {"enabled": False}}))
    pause(home, "a benchmark")
    return home


def pick_up(home: Home, number: int) -> float:
    """Drop a file beside an idle daemon; the seconds from its close to its leaving the inbox, less the window."""
    time.sleep(1)
    path = home.inbox / f"one-{number}.jsonl"
    path.write_bytes(ROW % (number, number))
    closed = time.perf_counter()
    while path.exists():
        time.sleep(0.001)
    return time.perf_counter() - closed - QUIET


def storm(home: Home, count: int) -> tuple[float, float]:
    """Drop so many files at once; how many were claimed, and how many queued, a second, from the window's end on."""
    staged = home.root / "staged"
    staged.mkdir()
    for number in range(count):
        (staged / f"storm-{number}.jsonl").write_bytes(ROW % (number, -number))
    for path in list(staged.iterdir()):
        path.rename(home.inbox / path.name)
    dropped = time.perf_counter()
    claimed = 0.0
    while True:
        time.sleep(0.2)
        if not claimed and not any(home.inbox.iterdir()):
            claimed = time.perf_counter() - dropped - QUIET
        with closing(sqlite3.connect(f"file:{home.ledger}?mode=ro", uri=True)) as ledger:
            [queued] = ledger.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()
        if claimed and queued == count + DROPS:
            return count / claimed, count / (time.perf_counter() - dropped - QUIET)


def status_seconds(home: Home) -> float:
    """Time `finetuned status`, a whole process, ten times."""
    command = [Path(sys.executable).with_name("finetuned"), "status", "--base-dir", str(home.root)]
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def fill_ledger(home: Home, count: int) -> None:
    """Write a ledger of jobs that have ended."""
    settings = Config().training().model_dump()
    settings.pop("priority")
    now = time.time()
    ledger = Ledger.open(home.ledger)
    ledger.add_all(
        Job(
            id=f"file-{number}-{number:06x}",
            name=b"file.jsonl",
            profile="",
            identity=FileIdentity(1, number, 1000, number),
            state=State.FINISHED,
            created_at=now + number,
            settings=settings,
            rung=Config().first_rung().as_dict(),
            outcome=Outcome.SUCCEEDED,
            sha256=f"{number:064x}",
            attempt=1,
            adapter=f"file-{number}",
            progress={"step": 100, "total_steps": 100, "train_loss": 0.5},
            started_at=now + number,
            finished_at=now + number + 60,
        )
        for number in range(count)
    )
    ledger.close()


def durable_path(home: Home, *, synchronous: str = "FULL") -> float:
    """Take small files into the queue, D1 to D5, one after the other; the median of their seconds."""
    config = Config(quiet_seconds=QUIET)
    ledger = Ledger.open(home.ledger)
    ledger._database.execute(f"PRAGMA synchronous={synchronous}")  # noqa: SLF001, only to be compared with
    seconds = []
    for number in range(DURABLE):
        path = home.inbox / f"{number}.jsonl"
        path.write_bytes(ROW % (number, number))
        began = time.perf_counter()
        job = claim(ledger, home, Found(path, ""), config)
        result = fingerprint(input_path(home, job))
        assert result is not None
        enqueue(ledger, home, config, job, result[1])
        seconds.append(time.perf_counter() - began)
    ledger.close()
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
