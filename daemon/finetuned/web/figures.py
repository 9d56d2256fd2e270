"""Figures for Prometheus: base units, one line a figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetuned import __version__
from finetuned.guard import daemon_pid, why_paused
from finetuned.home import Home
from finetuned.jobs import Job, State
from finetuned.ledger import Ledger
from finetuned.places import gpu_states, gpus_at_work, place_of
from finetuned.web.records import STATUSES

_JOB = {
    "step": ("step", 1.0, "Optimizer steps done."),
    "steps_planned": ("total_steps", 1.0, "Optimizer steps of the whole training."),
    "train_loss": ("train_loss", 1.0, "Mean loss of the newest step, in nats a token."),
    "valid_loss": ("valid_loss", 1.0, "Mean loss of the held-out rows, in nats a token."),
    "learning_rate": ("learning_rate", 1.0, "Learning rate of the newest step."),
    "grad_norm": ("grad_norm", 1.0, "Norm of the newest step's gradient."),
    "tokens_per_second": ("tokens_per_second", 1.0, "Tokens a second."),
    "seconds_left": ("seconds_left", 1.0, "Seconds that the training will still take."),
    "peak_memory_bytes": ("peak_memory", 1.0, "Most memory that the trainer had, in bytes."),
}
_GPU = {
    "utilization_ratio": ("utilization", 0.01, "Share of the time in which a kernel ran."),
    "memory_used_bytes": ("memory_used", 1.0, "Memory in use, in bytes."),
    "memory_total_bytes": ("memory_total", 1.0, "Memory that is there, in bytes."),
    "power_watts": ("power", 1.0, "Power, in watts."),
    "temperature_celsius": ("temperature", 1.0, "Temperature, in degrees Celsius."),
    "sm_clock_hertz": ("sm_clock", 1e6, "Clock of the multiprocessors, in hertz."),
    "memory_clock_hertz": ("memory_clock", 1e6, "Clock of the memory, in hertz."),
}


def figures(home: Home, ledger: Ledger | None) -> str:
    """Give everything in Prometheus's text format."""
    lines = _family("build_info", "The version of finetuned.", [({"version": __version__}, 1)])
    lines += _family("daemon_up", "1 while the daemon runs.", [({}, daemon_pid(home) is not None)])
    lines += _family("queue_paused", "1 while the queue is paused.", [({}, why_paused(home) is not None)])
    if ledger is None:
        return "\n".join(lines) + "\n"
    counts = ledger.counts()
    by_status = [
        (
            {"status": status},
            sum(counts.get((state, outcome), 0) for state in states for outcome in (outcomes or (None,))),
        )
        for status, (states, outcomes) in STATUSES.items()
    ]
    lines += _family("jobs", "Jobs by status.", by_status)
    running = ledger.jobs(State.RUNNING)
    for name, (field, unit, meaning) in _JOB.items():
        lines += _family(f"job_{name}", meaning, [({"job": j.id}, j.progress.get(field), unit) for j in running])
    lines += _places(home, ledger, running)
    return "\n".join(lines) + "\n"


def _places(home: Home, ledger: Ledger, running: list[Job]) -> list[str]:
    """Tell where jobs run, and of the GPUs."""
    states = gpu_states(home)
    places = [(job, place) for job in running if (place := place_of(job, states))]
    lines = _family(
        "job_info",
        "Where a job runs: the launcher, and what it calls the job.",
        [({"job": job.id, "launcher": place["launcher"], "id": place["id"] or ""}, 1) for job, place in places],
    )
    by_job = [({"job": job.id}, place["processes"]) for job, place in places]
    lines += _family("job_processes", "Processes that train a job.", by_job)
    gpus = [
        ({"gpu": str(gpu.get("index", "")), "uuid": gpu["uuid"], "name": str(gpu.get("name", ""))}, gpu)
        for gpu in gpus_at_work(states, ledger)
    ]
    lines += _family("gpu_jobs", "Jobs at work on a GPU.", [(labels, len(gpu["jobs"])) for labels, gpu in gpus])
    usable = [(labels, gpu["state"] == "usable") for labels, gpu in gpus]
    lines += _family("gpu_usable", "0 where a GPU is set aside, left alone or used by others.", usable)
    for name, (field, unit, meaning) in _GPU.items():
        samples = [(labels, gpu.get(field), unit) for labels, gpu in gpus if gpu["jobs"]]  # nobody looks at others
        lines += _family(f"gpu_{name}", meaning, samples)
    return lines


def _family(name: str, meaning: str, samples: Iterable[tuple[Any, ...]]) -> list[str]:
    """Give a figure with its meaning; nothing where there is no value."""
    lines = []
    for labels, value, *unit in samples:
        if value is not None:
            inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            lines.append(
                f"finetuned_{name}{f'{{{inner}}}' if inner else ''} {float(value) * (unit[0] if unit else 1):.10g}"
            )
    return [f"# HELP finetuned_{name} {meaning}", f"# TYPE finetuned_{name} gauge", *lines] if lines else []


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
