"""finetuned's data door beside `datasets.load_dataset` and `map(apply_chat_template)`. `make bench-door` prints tables.

Same file, same tokenizer, same template, same tokens; whole processes with empty caches, in turns. finetuned also
checks every row, finds its answers and looks for what is odd; its peers only tokenise. Rates are of the work, without
imports and loading the tokenizer. Figures are medians; put them into RESULTS.md with date and device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import CACHE, PEERS, peers_python

from finetuned.asking import environment
from finetuned.config import settings_from
from finetuned.home import Home
from finetuned.trainer.base import find_base

HERE = Path(__file__).parent
UNITS, LICENSE = HERE.parent / "examples" / "units.jsonl", HERE.parent / "LICENSE"
OURS = "finetuned"
CONTENDERS: dict[str, dict[str, Any]] = {  # name -> what `map` is told
    OURS: {},
    "datasets, a row at a time": {},
    "datasets, a row at a time, 2 processes": {"num_proc": 2},
    "datasets, batched": {"batched": True},
    "datasets, batched, 2 processes": {"batched": True, "num_proc": 2},
}
AS_WRITTEN = "datasets, a row at a time"
SPEED_GOAL, MEMORY_GOAL = 3.0, 1 / 3  # beside what people write
SYSTEM = "You are a careful assistant that answers in one sentence."
SHORT_SHARE = 0.8  # of rows, of some 20 words; the others are texts of 20 to 1,000
LOOK_SECONDS = 0.1  # between two looks at the memory


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a contender's name, or the beginning of it")
    parser.add_argument("--large", action="store_true", help="finetuned alone, once, on a large file")
    parser.add_argument("--megabytes", type=int, default=2000, help="of the large file")
    options = parser.parse_args()
    chosen = [name for name in CONTENDERS if not options.only or name.startswith(tuple(options.only))]
    if options.large:
        chosen, options.rounds = [OURS], 1
    peer = peers_python("datasets")
    models = Home(CACHE).models
    models.mkdir(parents=True, exist_ok=True)
    model = find_base(settings_from({}, where="the benchmark"), models=models, base_dir=HERE).source
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as scratch:
        file = Path(scratch) / "chats.jsonl"
        write(file, rows=options.rows, size=options.megabytes * 10**6 if options.large else None)
        order = {"file": str(file), "scratch": scratch, "models": str(models), "model": model}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for _ in range(options.rounds):
            for name in chosen:
                script = [sys.executable, "door_run.py"] if name == OURS else [str(peer), "datasets_run.py"]
                command = [script[0], str(PEERS / script[1]), json.dumps(order | {"map": CONTENDERS[name]})]
                run = measured(command, environment(None) if name == OURS else {})
                runs[name].append(run)
                print(f"  {name}: {run['rows'] / run['seconds']:,.0f} rows/s", file=sys.stderr, flush=True)
        report(runs, megabytes=file.stat().st_size / 1e6)
        if not options.large and not options.only:
            report_parsers(peer, file)


def write(file: Path, *, rows: int, size: int | None) -> None:
    """Write so many rows, or rows of so many bytes together. The same arguments give the same file."""
    with file.open("w") as out:
        for number, row in enumerate(chats()):
            if out.tell() >= size if size else number == rows:
                break
            out.write(json.dumps(row) + "\n")


def chats() -> Iterator[dict[str, Any]]:
    """Give rows of skewed lengths without end, no two alike: short questions, and parts of a text."""
    chance = random.Random(0)
    units = [json.loads(line)["messages"] for line in UNITS.read_text().splitlines()]
    words = LICENSE.read_text().split()
    number = 0
    while True:
        number += 1
        if chance.random() < SHORT_SHARE:
            asked, answer = (turn["content"] for turn in chance.choice(units))
            asked = f"{asked} ({number})"
        else:
            length = min(1000, round(20 * chance.paretovariate(0.7)))
            start = chance.randrange(len(words) - length)
            asked = f"Go on, text {number}: {' '.join(words[start : start + 10])}"
            answer = " ".join(words[start + 10 : start + length])
        turns = zip(("system", "user", "assistant"), (SYSTEM, asked, f"{answer} ({number})"), strict=True)
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def measured(command: list[str], extra: dict[str, str]) -> dict[str, Any]:
    """Run a process to its end: what its last line says, seconds in all and of processors, and the peaks of its and its
    children's memory in bytes: all that is resident, and what no file stands behind; pages that two share count once.
    """
    used = _processor_seconds()
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | extra)
        peaks = _Peaks(process.pid)
        said = process.communicate()[0]
        peaks.end()
        errors.seek(0)
        if process.returncode:
            sys.exit(f"{command} ended with {process.returncode}:\n{errors.read()[-3000:]}")
    found: dict[str, Any] = json.loads(said.strip().rsplit("\n", 1)[-1])
    return found | {
        "whole": time.perf_counter() - began,
        "processors": _processor_seconds() - used,
        "resident": peaks.resident,
        "anonymous": peaks.anonymous,
    }


def _processor_seconds() -> float:
    """Count what processes that have ended used, their children's too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Peaks:
    """Looks at a process and its descendants again and again."""

    def __init__(self, pid: int) -> None:
        self.resident = self.anonymous = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            sizes = [_memory(pid) for pid in _family(self._pid)]
            self.resident = max(self.resident, sum(resident for resident, _ in sizes))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in sizes))


def _family(pid: int) -> list[int]:
    """Give a process and its descendants."""
    found = [pid]
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (folder / "children").read_text().split()
        except OSError:  # it has ended
            continue
        found += [one for child in children for one in _family(int(child))]
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Give the bytes of a process's share of resident memory, and those that no file stands behind."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(size.split()[0]) * 1024 for name, size in (line.split(":") for line in lines)}
    return sizes.get("Pss", 0), sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)


def report(runs: dict[str, list[dict[str, Any]]], *, megabytes: float) -> None:
    """Print the table and the goals."""
    medians = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    first = next(iter(medians.values()))
    print(f"\n{first['rows']:,.0f} rows, {megabytes:,.0f} MB, {first['tokens']:,.0f} tokens\n")
    print("| run | rows/s | MB/s | tokens/s | finetuned is | whole process | CPU | peak memory | of it no file's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in medians.items():
        seconds = found["seconds"]
        ratio = f"{seconds / medians[OURS]['seconds']:.1f}x" if OURS in medians and name != OURS else ""
        print(
            f"| {name} | {found['rows'] / seconds:,.0f} | {megabytes / seconds:.1f} | {found['tokens'] / seconds:,.0f} "
            f"| {ratio} | {found['whole']:.1f} s | {found['processors']:.1f} s "
            f"| {found['resident'] / 2**20:,.0f} MiB "
            f"| {found['anonymous'] / 2**20:,.0f} MiB |"
        )
    print()
    if len({(found["rows"], found["tokens"]) for found in medians.values()}) > 1:
        print(f"NOT THE SAME WORK: { ({name: (of['rows'], of['tokens']) for name, of in medians.items()}) }")
    if {OURS, AS_WRITTEN} <= medians.keys():
        ours, theirs = medians[OURS], medians[AS_WRITTEN]
        speed = theirs["seconds"] / ours["seconds"]
        print(f"{_word(speed >= SPEED_GOAL)}: {speed:.1f}x as fast as {AS_WRITTEN} (goal {SPEED_GOAL:g}x)")
        for kind, said in (("resident", "peak memory"), ("anonymous", "peak memory that is no file's")):
            share = ours[kind] / theirs[kind]
            print(f"{_word(share <= MEMORY_GOAL)}: {share:.2f} of its {said} (goal {MEMORY_GOAL:.2f})")


def _word(reached: bool) -> str:  # noqa: FBT001
    return "goal reached" if reached else "NOT REACHED"


def report_parsers(python: Path, file: Path) -> None:
    """Print how fast parsers of JSON read the same lines."""
    command = [str(python), str(PEERS / "parsers_run.py"), str(file)]
    seconds = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    with file.open("rb") as lines:
        rows = sum(1 for _ in lines)
    print("\n| parser | rows/s | MB/s |\n| --- | --- | --- |")
    for name, taken in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"| {name} | {rows / taken:,.0f} | {file.stat().st_size / taken / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
