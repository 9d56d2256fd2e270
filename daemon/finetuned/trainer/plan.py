"""`python -m finetuned.trainer.plan`: what a training would need; no weights are loaded. `finetuned.plan` asks and
prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401, a trainer has it in memory
import torch

from finetuned.config import TrainingSettings, settings_from
from finetuned.fallback import Rung, next_rung
from finetuned.sharding import may_be_sharded
from finetuned.trainer import bounds, footprint, history, memory, rehearsal, steps
from finetuned.trainer.base import Base, choose_tuning, find_base, load_tokenizer, quiet_libraries
from finetuned.trainer.data import Source, held_out_file, read_sides
from finetuned.trainer.distill.found import Found, find_teacher
from finetuned.trainer.door import Door
from finetuned.trainer.precision import choose
from finetuned.trainer.reach import reaches
from finetuned.trainer.saying import answer
from finetuned.trainer.store import Examples
from finetuned.trainer.understudy import home_of, longest_question

_MOST_GPUS = 64
_MARGIN = 0.9  # share of the memory there is that a prediction may take
_RARE = {"teacher", "answers"}  # parts that most trainings have not
_SHARE = 0.3  # of the speed of large matrix products that a training comes to; docs/training.md


def plan(order: dict[str, Any]) -> dict[str, Any]:
    """Predict. `memory`, in bytes, may be given in place of what the machine has. Raises FinetunedError."""
    quiet_libraries()
    settings = settings_from(order["settings"], where="the settings").settled()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file, models = Path(order["file"]), Path(order["models"])
    base = find_base(settings, models=models, base_dir=Path(order["base_dir"]))
    door = Door(load_tokenizer(base, settings), settings, cache=models.parent / "tokens")
    found = find_teacher(settings, door.tokenizer, models=models, base_dir=Path(order["base_dir"]))
    held_out = held_out_file(settings, base_dir=Path(order["base_dir"]), beside=_beside(order))
    sides = read_sides(
        Source(file, file.name),
        held_out,
        settings,
        read=lambda one: door.read(one.file, name=one.name),
        reaches=reaches(settings, base, found),
    )
    sides.judge(settings)
    examples, report = sides.train, sides.report

    tuning, _ = choose_tuning(settings.tuning, gpu=device.type == "cuda")
    kind = {"model": base.name, "method": tuning, "device": memory.device_name()}
    records = history.read(history.file_beside(models))
    alike = {**kind, "recipe": history.kind_of(settings)}
    ratio, corrected_by = history.correction(records, **alike)
    room = order.get("memory") or memory.available_bytes()
    # Without GPUs all processes of a job share one memory; each has libraries, weights and a micro-batch of its own.
    sharers = settings.gpus_per_job if device.type == "cpu" and settings.gpus_per_job != "auto" else 1
    each = room / sharers
    forecast = Forecast(settings, base, device, examples, memory.resident_bytes(), teacher=found)
    if settings.recipe == "rft":
        forecast.longest_question = longest_question(settings, door.tokenizer, examples, examples.lengths)
    rung = forecast.settled(replace(settings.first_rung(), tuning=tuning), each / ratio)
    rung, reason, fits = walk(rung, settings, lambda rung: forecast.peak(rung) * ratio <= each * _MARGIN)
    counted, examples = forecast.counted(rung), examples.cut_to(rung.max_length)
    spread, part = 1, round(counted.footprint.peak * ratio)
    if not fits and (order.get("memory") or device.type == "cuda") and may_be_sharded(settings.recipe, rung.tuning):
        spread = gpus_for(counted, room * _MARGIN / ratio)
        part = round((counted.shared / spread + counted.apart) * ratio)
    todo = forecast.steps(examples)
    tokens, targets = (
        sum(each[row] for step in range(todo.total_steps) for row in todo.step(step))
        for each in (examples.lengths, examples.targets)
    )
    speed, speed_from = history.speed(records, **alike), "earlier jobs"
    if speed is None:
        speed, speed_from = _estimated_speed(counted, rung, device, targets / tokens), "arithmetic, not measured yet"
    return {
        "file": file.name,
        **kind,
        "parts_bytes": {name: part for name, part in asdict(counted.footprint).items() if part or name not in _RARE},
        "predicted_bytes": counted.footprint.peak,
        "correction": ratio,
        "corrected_by": corrected_by,
        "counted": counted.method,
        "not_counted": not_counted(settings, counted, device, found),
        "processes": sharers,
        "peak_bytes": sharers * round(counted.footprint.peak * ratio),
        "memory_bytes": room,
        "fits": fits,
        "spread_over": spread,  # GPUs of that memory
        "peak_on_each": part,
        "rung": rung.as_dict(),
        "rung_name": str(rung),
        "reason": reason,
        "parameters": counted.parameters,
        "trained_parameters": counted.trained,
        "steps": todo.total_steps,
        "rows": len(examples),
        "tokens": tokens,
        "supervised_tokens": targets,
        "tokens_per_second": speed,
        "speed_from": speed_from,
        "minutes": tokens / speed / 60,
        "data": report.as_dict(),
        "data_summary": report.summary(),
        "data_sentences": report.sentences(),
    }


def gpus_for(counted: footprint.Counted, room: float) -> int:
    """Give over how many GPUs a training must be spread so that it takes at most `room` bytes of each. Where no number
    is enough, that at which a part is lost in what each has for itself.
    """
    left = room - counted.apart
    return max(2, math.ceil(counted.shared / left)) if left > counted.shared / _MOST_GPUS else _MOST_GPUS


def _beside(order: dict[str, Any]) -> Source | None:
    held_out = order.get("beside")
    return Source(Path(held_out), Path(held_out).name) if held_out else None


def walk(rung: Rung, settings: TrainingSettings, fits: Callable[[Rung], bool]) -> tuple[Rung, str, bool]:
    """Climb down until a rung fits: that rung, the reason, and whether it does. At the foot there is none left."""
    reason = "its predicted peak fits, with a tenth of memory as margin"
    while not fits(rung):
        lower = next_rung(rung, allow_4bit=settings.fallback_4bit, allow_shorter=settings.fallback_max_length)
        if lower is None:
            return rung, "the foot of the ladder, and even this is predicted not to fit", False
        rung, reason = lower[0], f"rungs above are predicted not to fit; {lower[1]}"
    return rung, reason, True


def not_counted(
    settings: TrainingSettings, counted: footprint.Counted, device: torch.device, teacher: Found | None
) -> list[str]:
    """Give what the figures leave out, in words."""
    found = []
    if teacher is not None and home_of(teacher, device).type != device.type:
        found.append(f"memory of the teacher on {teacher.device}")
    if counted.method == rehearsal.BY_FORMULA and settings.recipe in {"distill", "hybrid"}:
        found.append("memory of the teacher's work" if teacher else "memory of making answers")
    if settings.recipe == "hybrid" and settings.hybrid.reward_weight:
        found.append("time of making answers")
        if device.type == "cpu":  # measured, and where it comes from is not known: docs/recipes/hybrid.md
            found.append("what generation leaves behind in a CPU's memory, a gigabyte or more")
    if settings.recipe == "rft":
        found.append("time of making answers; steps and lengths are those of the file's rows, not of what is kept")
    return found


class Forecast:
    """Footprints of one training, rung by rung."""

    def __init__(
        self,
        settings: TrainingSettings,
        base: Base,
        device: torch.device,
        examples: Examples,
        libraries: int,
        *,
        teacher: Found | None = None,
    ) -> None:
        self.settings, self.base, self.device, self.examples = settings, base, device, examples
        self.libraries, self.teacher = libraries, teacher
        self.longest_question = 0  # tokens, of recipe rft
        self._found: dict[Any, footprint.Counted] = {}

    def steps(self, examples: Examples) -> steps.Plan:
        """Plan the steps of rows as a rung leaves them."""
        return steps.plan_steps(
            len(examples),
            effective_batch=self.settings.first_rung().effective_batch,
            epochs=self.settings.epochs,
            max_steps=self.settings.max_steps,
            seed=self.settings.seed,
        )

    def settled(self, rung: Rung, room: float) -> Rung:
        """Bound micro-batches as the loop does; on a GPU it tries what here is predicted."""
        if not rung.micro_batch_tokens and self.settings.micro_batch_tokens == "auto" and self.device.type == "cpu":
            return replace(rung, micro_batch_tokens=bounds.CPU_TOKENS)
        if rung.micro_batch_tokens or self.settings.batch_size != "auto" or self.device.type != "cuda":
            return rung

        def attempt(tokens: int) -> float | None:
            share = self.peak(replace(rung, micro_batch_tokens=tokens)) / room
            return share if share < 1 else None

        enough = sum(sorted(self.examples.lengths, reverse=True)[: rung.effective_batch])
        return replace(rung, micro_batch_tokens=bounds.largest_fitting(bounds.FIRST, enough, attempt)[0])

    def peak(self, rung: Rung) -> int:
        """Give the bytes needed on a rung, uncorrected."""
        return self.counted(rung).footprint.peak

    def counted(self, rung: Rung) -> footprint.Counted:
        """Count what a rung needs. Rungs with the same largest micro-batch need the same."""
        examples = self.examples.cut_to(rung.max_length)
        lengths = examples.lengths
        bound = steps.Bound(rung.batch_size, rung.micro_batch_tokens)
        todo = self.steps(examples)
        largest = steps.largest_cut(todo, lengths, bound)
        accumulated = any(len(steps.cut(todo.step(number), lengths, bound)) > 1 for number in range(todo.total_steps))
        key = (tuple(largest), rung.activation_checkpointing, rung.tuning, rung.max_length, accumulated)
        if key not in self._found:
            precision = choose(self.device, rung.tuning, self.settings.dtype)
            work = footprint.Work(
                self.base,
                self.settings,
                rung.tuning,
                precision,
                self.device,
                rung.activation_checkpointing,
                teacher=self.teacher,
                longest_question=self.longest_question,
            )
            self._found[key] = footprint.count(
                work, [examples[row] for row in largest], accumulated=accumulated, libraries=self.libraries
            )
        return self._found[key]


def _estimated_speed(counted: footprint.Counted, rung: Rung, device: torch.device, supervised: float) -> float:
    """Give tokens a second from the operations that a token needs: 2 a parameter forward, 2 for the gradient of its
    input, 2 for its own where it is trained, 2 more where activations are computed twice, and 2 for a parameter of a
    teacher; attention aside.
    """
    a_parameter = (6 if rung.tuning == "full" else 4) + 2 * rung.activation_checkpointing
    used = counted.parameters - (1 - supervised) * counted.head
    return _SHARE * _matmul_speed(device) / (a_parameter * used + 2 * counted.taught_by)


def _matmul_speed(device: torch.device) -> float:
    """Measure matrix products for a moment, in operations a second."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = choose(device, "lora", "auto").compute
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float(torch.mm(left, right)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    answer(plan, if_memory="Take a smaller file, or add memory.")
