"""finetuned's trainer beside trl's and LLaMA-Factory's on the same work. `make bench-train` prints the table.

Same rows, same tokens, same supervised positions, same weights, same LoRA, same effective batch, same schedule; whole
processes, one after the other, in turns. Peers live in a virtual environment of their own, made the first time.
Figures are medians; put them into RESULTS.md with date and device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import CACHE, PEERS, peers_python

from finetuned.config import settings_from
from finetuned.events import EventType, parse_event
from finetuned.home import Home, JobFolder
from finetuned.jobs import FileIdentity, JobSpec
from finetuned.launchers.local import trainer_environment

HERE = Path(__file__).parent
UNITS, LICENSE = HERE.parent / "examples" / "units.jsonl", HERE.parent / "LICENSE"
ROWS_A_STEP = 8
SHORT, LONG = 48, 16  # rows: chats of some 50 tokens, and texts of 100 to 1,700
SETTINGS = {
    "epochs": 1,
    "batch_size": ROWS_A_STEP,
    "max_length": 2048,
    "learning_rate": 2e-4,
    "warmup_ratio": 0.0,
    "tuning": "lora",
    "checkpoint_minutes": 1000,
}
OURS = "finetuned"
FACTORY = {"batch": 1, "accumulation": 8, "cpu": True}
CONTENDERS = {  # name -> the peer and what it is told
    OURS: (OURS, {}),
    "trl, its defaults": ("trl", {}),
    "trl, best unpacked": ("trl", {"pure": True, "batch": 2, "accumulation": 4}),
    "trl, packed": ("trl", {"pure": True, "batch": 1, "accumulation": 1, "packed": True}),
    "LLaMA-Factory, as in its examples": ("llamafactory", FACTORY | {"keep_activations": False}),
    "LLaMA-Factory, activations kept": ("llamafactory", FACTORY | {"keep_activations": True}),
}
GOALS = {"trl, its defaults": (7.0, 10.0), "trl, best unpacked": (2.8, 4.0), "trl, packed": (1.5, 2.2)}
MEMORY_GOAL = 0.4  # of trl's defaults


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a contender's name, or the beginning of it")
    options = parser.parse_args()
    chosen = [name for name in CONTENDERS if not options.only or name.startswith(tuple(options.only))]
    for peer in {CONTENDERS[name][0] for name in chosen} - {OURS}:
        peers_python(peer)
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as folder:
        work = Work(Path(folder))
        print(work.describe(), flush=True)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for number in range(options.rounds):
            for name in chosen:
                run = work.ours(number) if name == OURS else work.peer(name)
                runs[name].append(run)
                print(f"  {name}: {run['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    report(work, runs)


class Work:
    """The work that all do: a file of chats for finetuned, the same rows as tokens for its peers."""

    def __init__(self, folder: Path) -> None:
        """Write both files."""
        self.folder = folder
        self.data, self.tokens = folder / "chats.jsonl", folder / "tokens.jsonl"
        self.models = Home(CACHE).models
        self.models.mkdir(parents=True, exist_ok=True)
        self.data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()))

        from finetuned.dataset.reading import RowFile
        from finetuned.dataset.report import Report, rows_of
        from finetuned.trainer.base import find_base, load_tokenizer
        from finetuned.trainer.steps import plan_steps
        from finetuned.trainer.tokens import Example, tokenise

        settings = settings_from(SETTINGS, where="benchmarks/train.py")
        base = find_base(settings, models=self.models, base_dir=folder)
        self.model = base.source
        chats = list(rows_of(RowFile(self.data, name="the data"), Report(), system_prompt=settings.system_prompt))
        tokenizer = load_tokenizer(base, settings)
        examples = [e for e in tokenise(chats, tokenizer, max_length=settings.max_length) if isinstance(e, Example)]
        plan = plan_steps(len(examples), effective_batch=ROWS_A_STEP, epochs=1, max_steps=None, seed=settings.seed)
        planned = [examples[row] for step in range(plan.total_steps) for row in plan.step(step)]
        with self.tokens.open("w") as file:
            for e in planned:
                labels = [token if wanted else -100 for token, wanted in zip(e.ids, e.supervised, strict=True)]
                file.write(json.dumps({"input_ids": e.ids, "labels": labels}) + "\n")
        self.lengths = [len(e.ids) for e in planned]
        self.targets = sum(e.targets for e in planned)
        self.seed = settings.seed

    def describe(self) -> str:
        """Say what the work is."""
        steps = [self.lengths[at : at + ROWS_A_STEP] for at in range(0, len(self.lengths), ROWS_A_STEP)]
        padded = sum(len(step) * max(step) for step in steps)
        return (
            f"{len(self.lengths)} rows, {sum(self.lengths)} tokens, {self.targets} supervised, {len(steps)} steps of "
            f"{ROWS_A_STEP} rows; padded as they come, {sum(self.lengths) / padded:.0%} of a batch would be tokens"
        )

    def ours(self, number: int) -> dict[str, Any]:
        """Run finetuned's trainer as the daemon does."""
        folder = JobFolder(self.folder / f"job-{number}")
        began, run = train_as_daemon(folder, self.data, SETTINGS, models=self.models)
        events = [event for line in folder.events.read_bytes().splitlines() if (event := parse_event(line))]
        steps = [e for e in events if e.type is EventType.METRICS and "train_loss" in e.data]
        training = next(e.created_at for e in events if e.data.get("phase") == "training")
        return run | {
            "tokens_per_second": sum(self.lengths) / (steps[-1].created_at - training),
            "first_step": steps[0].created_at - began,
            "losses": [e.data["train_loss"] for e in steps],
        }

    def peer(self, name: str) -> dict[str, Any]:
        """Run a peer."""
        peer, told = CONTENDERS[name]
        order = {"model": self.model, "tokens": str(self.tokens), "seed": self.seed, **told}
        command = [str(peers_python(peer)), str(PEERS / f"{peer}_run.py"), json.dumps(order)]
        began, run = whole_process(command, dict(os.environ))
        said = json.loads(run.pop("last_line"))
        return run | {
            "tokens_per_second": sum(self.lengths) / (said["ended"] - said["training"]),
            "first_step": said["first_step"] - began,
            "losses": said["losses"],
        }


def train_as_daemon(
    folder: JobFolder,
    data: Path,
    values: dict[str, Any],
    *,
    models: Path,
    processes: int = 1,
    environment: dict[str, str] | None = None,
) -> tuple[float, dict[str, Any]]:
    """Run finetuned's trainer as the daemon does: when it began, and what `whole_process` gives."""
    folder.path.mkdir()
    settings = settings_from(values, where="the benchmark")
    spec = JobSpec(
        id="bench",
        name=data.name,
        profile="",
        identity=FileIdentity(0, 0, 0, 0),
        created_at=0.0,
        input=str(data),
        settings=settings.model_dump(),
        rung=settings.first_rung().as_dict(),
        sha256="0" * 64,
        base_dir=str(data.parent),
        models=str(models),
        processes=processes,
    )
    folder.spec.write_bytes(spec.encode())
    usual, _ = trainer_environment()
    command = [sys.executable, "-m", "finetuned.trainer", str(folder.path)]
    return whole_process(command, {**os.environ, **usual, **(environment or {})})


def whole_process(command: list[str], environment: dict[str, str]) -> tuple[float, dict[str, Any]]:
    """Run a process to its end: when it began, and its seconds, its peak memory in bytes and its last line."""
    with tempfile.TemporaryFile() as output:
        began = time.time()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.time() - began
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
    if status:
        sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(status)}:\n{said[-3000:]}")
    return began, {"seconds": seconds, "peak": used.ru_maxrss * 1024, "last_line": said.rsplit("\n", 1)[-1]}


def rows() -> Iterator[dict[str, Any]]:
    """Give rows of skewed lengths, as instruction data has them: many short questions and a few long texts."""
    chats = [json.loads(line) for line in UNITS.read_text().splitlines()[:SHORT]]
    text = " ".join(LICENSE.read_text().split())
    for number in range(LONG):
        start, length = 300 * number, round(500 * 1.2**number)
        said, rest = text[start : start + 80], text[start + 80 : start + length]
        chats.append(
            {
                "messages": [
                    {"role": "user", "content": f"Go on with the license: {said}"},
                    {"role": "assistant", "content": rest},
                ]
            }
        )
    random.Random(0).shuffle(chats)
    yield from chats


def report(work: Work, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, the goals, and the share of the matmul peak."""
    medians = {
        name: {key: statistics.median(run[key] for run in of) for key in ("tokens_per_second", "peak", "first_step")}
        for name, of in runs.items()
    }
    print("\n| run | tokens/s | finetuned is | peak | start to first step done | loss, last step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in medians.items():
        ours = medians.get(OURS, found)
        ratio = ours["tokens_per_second"] / found["tokens_per_second"]
        print(
            f"| {name} | {found['tokens_per_second']:.0f} | {'' if name == OURS else f'{ratio:.2f}x'} | "
            f"{found['peak'] / 2**20:,.0f} MiB | {found['first_step']:.1f} s | {runs[name][-1]['losses'][-1]:.4f} |"
        )
    print()
    for name, (goal, aim) in GOALS.items():
        if name in medians and OURS in medians:
            ratio = medians[OURS]["tokens_per_second"] / medians[name]["tokens_per_second"]
            word = "aim reached" if ratio >= aim else "goal reached" if ratio >= goal else "NOT REACHED"
            print(f"{word}: {ratio:.2f}x {name} (goal {goal}x, aim {aim}x)")
    defaults = medians.get("trl, its defaults")
    if defaults and OURS in medians:
        share = medians[OURS]["peak"] / defaults["peak"]
        word = "goal reached" if share <= MEMORY_GOAL else "NOT REACHED"
        print(f"{word}: {share:.2f} of the peak memory of trl's defaults (goal {MEMORY_GOAL})")
    if OURS in medians:
        peak = matmul_peak()
        used = flops_a_token(work) * medians[OURS]["tokens_per_second"]
        print(f"finetuned computes {used / 1e9:.0f} GFLOP/s, {used / peak:.0%} of the measured peak {peak / 1e9:.0f}")


def flops_a_token(work: Work) -> float:
    """Give the floating-point operations that a token needs at least, attention aside.

    Two for a weight in the forward pass and two in the backward pass for the gradient of its input; the head at
    supervised positions only.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.model)
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().parameters() if p.dim() > 1) - head
    return 4 * (body + head * work.targets / sum(work.lengths))


def matmul_peak() -> float:
    """Measure bf16 matrix products, in FLOP/s."""
    import torch

    size = 2048
    left, right = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    main()
