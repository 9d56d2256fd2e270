"""How light the daemon is and how soon it starts. `make bench` prints the table; nothing is asserted.

Figures are medians over runs of whole processes on this machine; put them into RESULTS.md with date and device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetuned.events import EventType
from finetuned.home import Home
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger

UNITS = Path(__file__).parents[1] / "examples" / "units.jsonl"
QUIET = 1.0  # seconds
IDLE = 30.0  # seconds over which the idle daemon is watched
RUNS = 3


def main() -> None:
    """Measure and print."""
    rows = [("finetuned --help", f"{statistics.median(help_seconds() for _ in range(10)) * 1000:.0f} ms")]
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as folder:
        home = base_directory(Path(folder))
        daemon = start_daemon(home)
        try:
            time.sleep(3)
            memory, load = idle(daemon.pid)
            rows += [
                ("idle daemon, resident", f"{memory / 2**20:.1f} MiB"),
                ("idle daemon, CPU", f"{load * 100:.2f} %"),
            ]
            jobs = [drop_and_wait(home, run) for run in range(RUNS + 1)][1:]  # the first unpacks the model
            parent = warm_parent(home)
            forked = [drop_and_wait(home, RUNS + 1 + run) for run in range(RUNS)]
            rows += [("warm parent, resident", f"{resident(parent) / 2**20:.0f} MiB")]
        finally:
            daemon.terminate()
            daemon.wait()
    rows += [
        ("file closed to claimed, above the quiet window", f"{median(jobs, 'claimed') * 1000:.0f} ms"),
        ("claimed to trainer started", f"{median(jobs, 'started') * 1000:.0f} ms"),
        ("trainer started to first step begun", f"{median(jobs, 'ready'):.2f} s"),
        ("trainer started to first step of 8 rows done", f"{median(jobs, 'stepped'):.2f} s"),
        ("the same with warm_trainer: first step begun", f"{median(forked, 'ready'):.2f} s"),
        ("with warm_trainer: first step of 8 rows done", f"{median(forked, 'stepped'):.2f} s"),
    ]
    for name, figure in rows:
        print(f"| {name} | {figure} |")


def help_seconds() -> float:
    """Time `finetuned --help` once."""
    began = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("finetuned"), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def base_directory(folder: Path) -> Home:
    """Make a base directory whose jobs are three steps of the embedded model."""
    home = Home(folder)
    for path in home.folders:
        path.mkdir(parents=True, exist_ok=True)
    configure(home)
    return home


def configure(home: Home, **settings: bool) -> None:
    """Write config.json."""
    home.config_file.write_text(
        json.dumps({"quiet_seconds": QUIET, "max_steps": 3, "duplicates": "run", "web": {"enabled": False}, **settings})
    )


def warm_parent(home: Home) -> int:
    """Switch warm_trainer on, wait until it can be forked, and give the parent's pid."""
    configure(home, warm_trainer=True)
    while True:
        time.sleep(0.2)
        log = "".join(path.read_text() for path in home.logs.glob("daemon_*.log"))
        if found := re.search(r'"warm parent ready".* pid=(\d+)', log):
            return int(found[1])


def start_daemon(home: Home) -> subprocess.Popen[bytes]:
    """Start the daemon."""
    command = [sys.executable, "-m", "finetuned", "run", "--base-dir", str(home.root)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def idle(pid: int) -> tuple[int, float]:
    """Give the daemon's resident bytes, and the share of one core that it uses while nothing happens."""
    before = cpu_seconds(pid)
    time.sleep(IDLE)
    used = cpu_seconds(pid) - before
    return resident(pid), used / IDLE


def resident(pid: int) -> int:
    """Give the bytes of a process that are in memory, shared ones included."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Give the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drop_and_wait(home: Home, run: int) -> dict[str, float]:
    """Drop the example file and give the seconds between the stations of its job."""
    name = f"run{run}.jsonl"
    shutil.copyfile(UNITS, home.inbox / name)
    dropped = time.time()
    while True:
        time.sleep(0.2)
        ledger = Ledger.open_to_read(home.ledger)
        try:
            job = next((job for job in ledger.jobs(State.FINISHED) if job.name == name.encode()), None)
            if job is not None:
                return stations(ledger, job, dropped)
        finally:
            ledger.close()


def stations(ledger: Ledger, job: Job, dropped: float) -> dict[str, float]:
    """Read a finished job's stations from the ledger."""
    events = ledger.events(job.id)
    phases = {event.data["phase"]: event.created_at for event in events if event.type is EventType.PHASE}
    steps = [e.created_at for e in events if e.type is EventType.METRICS and "train_loss" in e.data]
    started = float(job.started_at or 0)
    return {
        "claimed": job.created_at - dropped - QUIET,
        "started": started - job.created_at,
        "ready": phases["training"] - started,
        "stepped": steps[0] - started,
    }


def median(jobs: list[dict[str, float]], station: str) -> float:
    """Give the median over the runs."""
    return statistics.median(job[station] for job in jobs)


if __name__ == "__main__":
    main()
