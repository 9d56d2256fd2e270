"""Kill a real daemon and its trainers again and again while files keep dropping and orders come, then count.

`python tests/torture.py 300` (`make torture N=300`), with `--seed` to begin the same way. The trainer is the stand-in,
whose weights tell every step that was lost, done twice or torn. tests/e2e/test_torture.py runs a little of it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from conftest import STANDIN, Daemon, chat_rows, eventually, make_home, write_config
from finetuned.control import order
from finetuned.errors import FinetunedError
from finetuned.guard import why_paused
from finetuned.home import Home
from finetuned.jobs import Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.spool.inbox import is_held_out, relatives
from finetuned.spool.orders import Verb
from finetuned.spool.publish import OURS
from standin_trainer import safetensors, weights_of

LONGEST_LIFE = 2.0  # seconds between a daemon's start and the next kill
MOST_WAITING = 12  # jobs; more files drop when some of these are done
EXPLAINED = {"killed", "interrupted_too_often", "cancelled"}  # ends that kills and orders lead to


@dataclass
class Torture:
    """A base directory under torture, and what was done to it."""

    home: Home
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    orders: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[str, str]] = field(default_factory=list)  # name and sha256 of each file
    held_out: list[tuple[str, str]] = field(default_factory=list)  # likewise, of those dropped beside one
    faults: list[str] = field(default_factory=list)
    explained: int = 0  # failures that were tried again
    daemon: Daemon | None = None
    slow: list[threading.Thread] = field(default_factory=list)

    def run(self, kills: int) -> None:
        settings = {"most_crashes": 0, "stop_seconds": 5, "pause_grace": 5, "profiles": {"high": {"priority": 5}}}
        write_config(self.home, **settings)
        (self.home.inbox / "high").mkdir()
        while self.kills.total() < kills:
            self.daemon = self.daemon or Daemon(self.home)
            end = time.monotonic() + self.random.uniform(0, LONGEST_LIFE)
            while time.monotonic() < end:
                if self.waiting() < MOST_WAITING:
                    self.drop()
                if self.random.random() < 0.1:
                    self.give_order()
                time.sleep(self.random.uniform(0, 0.3))
            if self.daemon.process.poll() is not None:
                self.faults.append(f"the daemon ended by itself, {self.daemon.process.returncode}")
                break
            self.kill()
        self.settle()
        self.count()

    # -- what is done to it

    def drop(self) -> None:
        """Drop a file in one of the ways in which people do, now and then one that was dropped before."""
        number = len(self.dropped)
        rows = chat_rows(self.random.randint(1, 40), start=1000 * number)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        name = f"{self.random.choice('abcdef')}{self.random.choice(['', number])}.jsonl"
        folder = self.home.inbox / self.random.choice(["", "", "high"])
        if self.random.random() < 0.2:
            name, content = f"{name}.gz", gzip.compress(content)
        target = folder / name
        stem = name.partition(".")[0]
        staged = self.home.root / "staged"
        staged.write_bytes(content)
        way = self.random.choice(["rename", "rename", "copy", "slow", "again", "override", "held out"])
        if any(os.path.lexists(folder / other) for other in relatives(name)):
            return  # a file of that name waits there: people do not replace what they have just dropped
        if way == "override":
            (folder / f"{stem}.config.json").write_text(json.dumps({"epochs": 2, "seed": number}))
        if way == "held out":
            rows = json.dumps(chat_rows(1, start=1000 * number + 500)[0]).encode() + b"\n"
            (folder / f"{stem}.eval.jsonl").write_bytes(rows)
            self.held_out.append((f"{stem}.eval.jsonl", hashlib.sha256(rows).hexdigest()))
        if way == "copy":
            shutil.copyfile(staged, target)
        elif way == "slow":
            self.slow.append(threading.Thread(target=self.write_slowly, args=(target, content)))
            self.slow[-1].start()
        else:
            staged.rename(target)
        self.dropped.append((name, hashlib.sha256(content).hexdigest()))
        if way == "again" and not os.path.lexists(folder / f"again-{name}"):
            staged.write_bytes(content)
            staged.rename(folder / f"again-{name}")
            self.dropped.append((f"again-{name}", self.dropped[-1][1]))

    def write_slowly(self, path: Path, content: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(content), 500):
                file.write(content[start : start + 500])
                time.sleep(0.1)

    def give_order(self) -> None:
        verb = self.random.choice([Verb.PAUSE, Verb.RESUME, Verb.RESUME, Verb.CANCEL, Verb.RETRY, Verb.FIRST])
        jobs = self.jobs() if verb not in {Verb.PAUSE, Verb.RESUME} else []
        if verb in {Verb.CANCEL, Verb.FIRST}:
            jobs = [job for job in jobs if job.state in {State.QUEUED, State.RUNNING}]
        elif verb is Verb.RETRY:
            jobs = [job for job in jobs if job.outcome not in {None, Outcome.SUCCEEDED}]
        if not jobs and verb not in {Verb.PAUSE, Verb.RESUME}:
            return
        with suppress(FinetunedError):  # the job has gone on in the meantime
            order(self.home, verb, self.random.choice(jobs).id if jobs else "")
            self.orders[verb] += 1

    def kill(self) -> None:
        """Kill the daemon, the trainer at work, or both."""
        whom = self.random.choice(["daemon", "daemon", "trainer", "both"])
        if whom != "daemon" and self.kill_trainer():
            self.kills["trainer"] += 1
        if whom != "trainer":
            self.daemon.stop(signal.SIGKILL)
            self.daemon = None
            self.kills["daemon"] += 1

    def kill_trainer(self) -> bool:
        for lock in self.home.jobs.glob("*/lock"):
            with suppress(OSError, TypeError):  # not written yet
                pid = int(re.search(r"\d+", lock.read_text())[0])
                if b"standin_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    # -- what is left

    def jobs(self) -> list[Job]:
        return self.daemon.jobs() if self.daemon else []

    def waiting(self) -> int:
        return sum(1 for job in self.jobs() if job.state is not State.FINISHED)

    def settle(self) -> None:
        """Let all be done without further disturbance, and what failed for a reason that we know be tried again."""
        for thread in self.slow:
            thread.join()
        self.daemon = self.daemon or Daemon(self.home)
        while True:
            order(self.home, Verb.RESUME)
            eventually(self.is_quiet, seconds=120 + 2 * len(self.dropped), why="all jobs finished")
            failed = [job for job in self.jobs() if job.outcome is not Outcome.SUCCEEDED]
            again = [job for job in failed if job.reason["code"] in EXPLAINED]
            self.faults += [f"{job.id} failed: {job.reason}" for job in failed if job not in again]
            if not again or self.faults:
                break
            self.explained += len(again)
            for job in again:
                order(self.home, Verb.RETRY, job.id)
        assert self.daemon.stop() == 0

    def is_quiet(self) -> bool:
        inbox = [path for path in self.home.inbox.rglob("*") if path.is_file()]
        ledger = Ledger.open_to_read(self.home.ledger)
        try:
            to_do = ledger.orders() or ledger.unfinished()
        finally:
            ledger.close()
        return not inbox and not to_do and why_paused(self.home) is None

    def count(self) -> None:
        """Compare what is there with what was dropped."""
        jobs = self.jobs()
        archived = {path: path.read_bytes() for path in self.home.archive.glob("*/*/*") if path.name not in OURS}
        inputs = {path: content for path, content in archived.items() if not is_held_out(path.name)}
        beside = {(path.name, hashlib.sha256(archived[path]).hexdigest()) for path in archived.keys() - inputs.keys()}
        known = {(os.fsdecode(job.held_out), job.held_out_sha256) for job in jobs if job.held_out}
        self.faults += [f"held out: {one} is not in all places" for one in {*self.held_out} ^ beside | beside ^ known]
        kept = Counter((path.name, hashlib.sha256(content).hexdigest()) for path, content in inputs.items())
        rows = Counter((os.fsdecode(job.name), job.sha256) for job in jobs)
        dropped = Counter(self.dropped)
        self.lost = (dropped - kept).total() + (dropped - rows).total()
        self.duplicated = (kept - dropped).total() + (rows - dropped).total()
        by_id = {job.id: job for job in jobs}
        owners = Counter()
        self.torn = 0
        for folder in self.home.adapters.iterdir():
            if folder.is_symlink():
                continue
            story = json.loads((folder / "finetuned.json").read_bytes())
            job = by_id[story["job_id"]]
            owners[job.id] += 1
            [path] = (path for path in inputs if path.parent.name == job.id)
            lines = inputs[path].splitlines()
            whole = safetensors(weights_of(lines, max(1, int(len(lines) * job.settings["epochs"]))))
            self.torn += (folder / "adapter_model.safetensors").read_bytes() != whole or folder.name != job.adapter
        trained = Counter(job.id for job in jobs if job.duplicate_of is None)
        self.lost += (trained - owners).total()
        self.duplicated += (owners - trained).total()
        self.faults += [f"left behind: {path}" for path in self.home.jobs.iterdir()]
        self.faults += [f"left behind: {path}" for path in self.home.failed.iterdir()]
        self.faults += [
            f"{job.id}: {job.adapter} is not that of {job.duplicate_of}"
            for job in jobs
            if job.duplicate_of and by_id[job.duplicate_of].adapter != job.adapter
        ]

    @property
    def passed(self) -> bool:
        return not (self.lost or self.duplicated or self.torn or self.faults)

    def close(self) -> None:
        if self.daemon:
            self.daemon.process.kill()
            self.daemon.process.wait()
        while self.kill_trainer():
            time.sleep(0.05)


def torture(root: Path, *, kills: int, seed: int) -> Torture:
    """Do it all in an empty folder, and give what was found."""
    one = Torture(make_home(root), random.Random(seed))
    try:
        one.run(kills)
    finally:
        one.close()
    return one


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("kills", type=int, nargs="?", default=300)
    options.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = options.parse_args()
    os.environ |= {"FINETUNED_TRAINER": STANDIN, "STANDIN_SECONDS": "0.03"}
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="finetuned-torture-"))
    print(f"seed {given.seed}, in {folder}", flush=True)
    found = torture(folder / "base", kills=given.kills, seed=given.seed)
    killed = ", ".join(f"{who} {count}" for who, count in sorted(found.kills.items()))
    ordered = ", ".join(f"{verb} {count}" for verb, count in sorted(found.orders.items()))
    for fault in found.faults:
        print(fault)
    print(
        f"kills {found.kills.total()} ({killed}), orders {found.orders.total()} ({ordered}), "
        f"files {len(found.dropped)}, failures explained by kills or orders and tried again {found.explained}: "
        f"lost {found.lost}, duplicated {found.duplicated}, torn {found.torn}, {time.monotonic() - began:.0f} s"
    )
    if not found.passed:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
