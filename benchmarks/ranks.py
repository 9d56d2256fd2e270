"""One job on two processes beside one, on the same cores. `make bench-ranks` prints the table.

Whole trainings of the embedded model, as the daemon starts them, in turns; ratios are taken within a turn, so that what
else the machine does meets all of them. Put medians into RESULTS.md with date and device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from environments import CACHE
from train import ROWS_A_STEP, SETTINGS, rows, train_as_daemon

from finetuned.events import Event, EventType, parse_event
from finetuned.home import Home, JobFolder

CONTENDERS = {  # name -> processes, threads of each
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
TUNINGS = ("lora", "full")


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="no more than so many, for a quick look")
    parser.add_argument("--tuning", choices=TUNINGS, action="append", help="both where it is left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as place:
        folder = Path(place)
        data = folder / "chats.jsonl"
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))
        models = Home(CACHE).models
        models.mkdir(parents=True, exist_ok=True)
        for tuning in options.tuning or TUNINGS:
            settings = {**SETTINGS, "tuning": tuning, "max_steps": options.steps}
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
            for turn in range(options.rounds):
                for name, (processes, threads) in CONTENDERS.items():
                    job = JobFolder(folder / f"{tuning}-{turn}-{processes}-{threads}")
                    runs[name].append(measure(job, data, models, settings, processes=processes, threads=threads))
                    print(f"  {tuning}, {name}: {runs[name][-1][0]:.0f} tokens/s", file=sys.stderr, flush=True)
            report(tuning, runs)


def measure(
    job: JobFolder, data: Path, models: Path, settings: dict[str, Any], *, processes: int, threads: int
) -> tuple[float, float]:
    """Train once: tokens a second over all steps, and seconds from the start to the first step's end."""
    environment = {"OMP_NUM_THREADS": str(threads)}
    began, _ = train_as_daemon(job, data, settings, models=models, processes=processes, environment=environment)
    events: list[Event] = [event for line in job.events.read_bytes().splitlines() if (event := parse_event(line))]
    steps = [event for event in events if event.type is EventType.METRICS and "train_loss" in event.data]
    training = next(event.created_at for event in events if event.data.get("phase") == "training")
    ends = [training, *(step.created_at for step in steps)]
    seconds = [end - before for before, end in pairwise(ends)]
    tokens = sum(step.data["tokens_per_second"] * took for step, took in zip(steps, seconds, strict=True))
    return tokens / sum(seconds), ends[1] - began


def report(tuning: str, runs: dict[str, list[tuple[float, float]]]) -> None:
    """Print medians, and how much faster each is than the first within its turn."""
    first = next(iter(runs.values()))
    print(f"\n{tuning}, {ROWS_A_STEP} rows a step, {len(first)} turns\n")
    print("| | tokens/s | times the first | first step after |\n| --- | --- | --- | --- |")
    for name, found in runs.items():
        ratios = sorted(speed / other for (speed, _), (other, _) in zip(found, first, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed, seconds = (statistics.median(figures) for figures in zip(*found, strict=True))
        print(f"| {name} | {speed:.0f} | {spread} | {seconds:.1f} s |")


if __name__ == "__main__":
    main()
