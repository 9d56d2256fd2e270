"""What `finetuned plan` predicts beside what the trainer then needs. `make bench-plan` prints the table.

Each case is predicted without any earlier job to correct it, and then trained by the real process, whose peak is that
of the whole process as the kernel counted it. Peaks do not depend on the machine's load, so one run a case is enough.
Put the table into RESULTS.md with date and device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import CACHE, rows, train_as_daemon

from finetuned.asking import Terms
from finetuned.config import settings_from
from finetuned.home import Home, JobFolder
from finetuned.plan import predict

STEPS = 2  # the optimizer has its state from the second on
LONGEST = 512  # tokens; a longer row would stand alone, whatever the bound
TUNINGS, BOUNDS, CHECKPOINTING = ("lora", "full"), (512, 1024, 2048), (False, True)
RECIPES: dict[str, dict[str, Any]] = {  # the teacher is a second copy of the model
    "distill": {"recipe": "distill", "teacher": "smollm2-135m"},
    "distill, all terms": {
        "recipe": "distill",
        "teacher": "smollm2-135m",
        "distill": {"hidden_weight": 0.1, "attention_weight": 0.1, "contrastive_weight": 0.1},
    },
    "hybrid": {"recipe": "hybrid", "hybrid": {"max_new_tokens": 32}},
    "hybrid, soft prompt": {"recipe": "hybrid", "hybrid": {"max_new_tokens": 32, "prompt_tokens": 8}},
    "rft": {
        "recipe": "rft",
        "rft": {"samples": 1, "max_new_tokens": 32},
        "judge": {"kind": "regex", "pattern": "()"},  # all answers are right
    },
}
CLOSE = 0.15  # the goal: as far as a prediction may be off


def main() -> None:
    """Predict, measure and print, case by case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="a part of the cases' names")
    parser.add_argument("--measured", type=Path, help="keep what was measured in this file, and take it from there")
    options = parser.parse_args()
    known = json.loads(options.measured.read_bytes()) if options.measured and options.measured.exists() else {}
    print("| case | predicted | measured | error |\n| --- | --- | --- | --- |")
    errors = []
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as folder:
        bench = Bench(Path(folder))
        for case, own in cases():
            if options.only and options.only not in case:
                continue
            settings = {"max_steps": STEPS, "max_length": LONGEST, **own}
            predicted = bench.predicted(settings)
            measured = known[case] = known.get(case) or bench.measured(settings)
            if options.measured:
                options.measured.write_text(json.dumps(known, indent=2))
            errors.append(predicted / measured - 1)
            print(
                f"| {case} | {predicted / 2**20:,.0f} MiB | {measured / 2**20:,.0f} MiB | {errors[-1]:+.1%} |",
                flush=True,
            )
    worst = max(map(abs, errors))
    print(f"\n{'goal reached' if worst <= CLOSE else 'NOT REACHED'}: at most {worst:.1%} off (goal {CLOSE:.0%})")


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each case's name and settings."""
    for tuning, bound, checkpointing in itertools.product(TUNINGS, BOUNDS, CHECKPOINTING):
        case = f"{tuning}, {bound} tokens{', activation checkpointing' if checkpointing else ''}"
        yield case, {"tuning": tuning, "micro_batch_tokens": bound, "activation_checkpointing": checkpointing}
    for recipe, own in RECIPES.items():
        yield f"{recipe}, lora, 1024 tokens", {"tuning": "lora", "micro_batch_tokens": 1024, **own}


class Bench:
    """A folder with the data, and the models that the user's cache has."""

    def __init__(self, folder: Path) -> None:
        """Write the data."""
        self.folder = folder
        self.data = folder / "chats.jsonl"
        self.data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))
        cached = Home(CACHE).models
        cached.mkdir(parents=True, exist_ok=True)
        self.number = itertools.count()
        self.cached = cached

    def _models(self) -> Path:
        """Give the models in a folder beside which no earlier job has left a record."""
        models = self.folder / str(next(self.number)) / "models"
        models.parent.mkdir()
        models.symlink_to(self.cached)
        return models

    def predicted(self, values: dict[str, Any]) -> int:
        """Ask for a prediction, in bytes."""
        settings = settings_from(values, where="benchmarks/plan.py")
        plan = predict(self.data, Terms(settings, self.folder, self._models()), gpu=None)
        return int(plan["peak_bytes"])

    def measured(self, values: dict[str, Any]) -> int:
        """Train as the daemon does, and give the peak in bytes."""
        models = self._models()
        _, run = train_as_daemon(JobFolder(models.parent / "job"), self.data, values, models=models)
        return int(run["peak"])


if __name__ == "__main__":
    main()
