"""`finetuned plan`: ask a process that has torch what a training would need, and print it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuned.asking import Terms, ask, held_out_beside, terms
from finetuned.errors import counted
from finetuned.gpu import first_gpu
from finetuned.live import duration

_SHOWN = 2**20  # bytes


def plan_file(file: Path, *, base_dir: Path | None, profile: str = "", model: str | None = None) -> dict[str, Any]:
    """Predict with the settings of the base directory, or the defaults where there is none. Raises FinetunedError."""
    gpu = first_gpu()
    return predict(file, terms(file, base_dir=base_dir, profile=profile, model=model), gpu=gpu.uuid if gpu else None)


def predict(file: Path, terms: Terms, *, gpu: str | None, memory: int | None = None) -> dict[str, Any]:
    """Ask a process with a trainer's environment. `memory`, in bytes, stands in for what the machine has."""
    beside = held_out_beside(file)
    return ask("finetuned.trainer.plan", file, terms, gpu=gpu, memory=memory, beside=beside)


def render(facts: dict[str, Any]) -> str:
    """Give the table and the sentences under it."""
    parts = {name.replace("_", " "): value for name, value in facts["parts_bytes"].items()}
    one = facts["peak_bytes"] // facts["processes"]
    parts[f"correction by {facts['correction']:.2f}"] = one - facts["predicted_bytes"]
    if facts["processes"] > 1:
        parts["the other processes"] = facts["peak_bytes"] - one
    parts |= {"predicted peak": facts["peak_bytes"], "memory there is": facts["memory_bytes"]}
    width = max(map(len, parts))
    lines = [f"{facts['file']}: {facts['data_summary']}", *(f"  {line}" for line in facts["data_sentences"]), ""]
    lines += [f"{'part':<{width}}  {'MiB':>9}"]
    lines += [f"{name:<{width}}  {value / _SHOWN:>9,.0f}" for name, value in parts.items()]
    each = f"{facts['peak_on_each'] / _SHOWN:,.0f} MiB on each"
    spread = f"several GPUs: spread over {facts['spread_over']} like this one (gpus_per_job) it takes {each}"
    bound, time = facts["rung"]["micro_batch_tokens"], duration(max(1.0, 60 * facts["minutes"]))
    lines += [
        "",
        f"correction: {facts['corrected_by']}; activations {facts['counted']}",
        *(f"not counted: {one}" for one in facts["not_counted"]),
        f"model: {facts['model']}, {facts['trained_parameters']:,} parameters trained; {facts['device']}",
        f"rung: {facts['rung_name']}: {facts['reason']}",
        *([spread] if facts["spread_over"] > 1 else []),
        f"micro-batch: at most {counted(facts['rung']['batch_size'], 'row')}{f' and {bound} tokens' if bound else ''}",
        f"steps: {facts['steps']:,}, {facts['tokens']:,} tokens of which {facts['supervised_tokens']:,} supervised",
        f"time: about {time} at {facts['tokens_per_second']:,.0f} tokens/s ({facts['speed_from']})",
    ]
    return "\n".join(lines)
