"""What each launcher costs: from the order to start a trainer until its first optimizer step is done.

`make bench-launchers` starts a real Ray and a real Slurm of one node each, and lets local, Ray and Slurm take turns on
the same job. The table gives medians and what a launcher takes beyond local in the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # which can start both engines

from finetuned.config import Config, settings_from
from finetuned.engine_settings import Ray, Slurm
from finetuned.events import EventType
from finetuned.home import Home, JobFolder
from finetuned.jobs import FileIdentity, JobSpec
from finetuned.launchers import Needs, Trainer, local
from finetuned.launchers.ray import RayLauncher
from finetuned.launchers.slurm import SlurmLauncher
from finetuned.supervisor import EventTail
from finetuned.trainer import embedded
from fixtures_ray import RayCluster
from fixtures_slurm import SlurmCluster, what_is_missing

UNITS = Path(__file__).parents[1] / "examples" / "units.jsonl"
SETTINGS = {"max_steps": 1, "tuning": "lora", "eval_fraction": 0.0, "batch_size": 8}
_TICK = 0.02  # seconds
_PATIENCE = 300.0

Start = Callable[[JobFolder], Trainer]


@dataclass
class Times:
    """Seconds from the order on."""

    begun: float  # until the trainer says its first word
    step: float  # until its first step is done
    ended: float  # until the launcher says that it has ended


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="finetuned-launchers-") as folder, launchers(Path(folder)) as starts:
        models = Path(folder, "models")
        models.mkdir()
        embedded.unpack(models)
        found: dict[str, list[Times]] = {name: [] for name in starts}
        for number in range(rounds + 1):
            for name, start in starts.items():
                one = measure(prepare(Path(folder, "jobs", f"{name}-{number}"), models), start)
                if number:  # the first round fills the caches
                    found[name].append(one)
    print("\n| launcher | order to first word | order to first step | beyond local | first step to known end |")
    print("| --- | --- | --- | --- | --- |")
    for name, times in found.items():
        beyond = statistics.median(t.step - here.step for t, here in zip(times, found["local"], strict=True))
        begun, step = (statistics.median(getattr(one, key) for one in times) for key in ("begun", "step"))
        known = statistics.median(one.ended - one.step for one in times)
        print(f"| {name} | {begun:.2f} s | {step:.2f} s | {beyond:+.2f} s | {known:.2f} s |")


@contextmanager
def launchers(folder: Path) -> Iterator[dict[str, Start]]:
    """Give how a trainer is started by each that there is on this machine."""
    environment, _ = local.trainer_environment()
    starts: dict[str, Start] = {"local": lambda job: local.start(job, log=log_of(job), environment=environment)}
    needs = Needs("bench", attempt=1, gpus=0)
    running: list[RayCluster | SlurmCluster] = []
    try:
        ray = RayCluster()
        running.append(ray)
        ray.start()
        by_ray = RayLauncher(Ray(address=ray.address, token_file=ray.token_file))
        starts["ray"] = lambda job: by_ray.start(job, log=log_of(job), environment=environment, needs=needs)
        if missing := what_is_missing():
            print(f"no Slurm: {', '.join(missing)}")
        else:
            slurm = SlurmCluster()
            running.append(slurm)
            os.environ["SLURM_CONF"] = str(slurm.conf)
            slurm.start()
            by_slurm = SlurmLauncher(Slurm(), Home(folder))
            starts["slurm"] = lambda job: by_slurm.start(job, log=log_of(job), environment=environment, needs=needs)
        yield starts
    finally:
        for one in running:
            one.discard()


def prepare(path: Path, models: Path) -> JobFolder:
    """Make the folder of a job of one step."""
    folder = JobFolder(path)
    path.mkdir(parents=True)
    settings = settings_from({**Config().training().model_dump(), **SETTINGS}, where="the benchmark")
    (path / "input.jsonl").write_bytes(b"".join(UNITS.read_bytes().splitlines(keepends=True)[:16]))
    spec = JobSpec(
        id=path.name,
        name="units.jsonl",
        profile="",
        identity=FileIdentity(0, 0, 0, 0),
        created_at=0.0,
        input="input.jsonl",
        settings=settings.model_dump(),
        rung=settings.first_rung().as_dict(),
        sha256=path.name,
        attempt=1,
        base_dir=str(path.parent),
        models=str(models),
    )
    folder.spec.write_bytes(spec.encode())
    return folder


def log_of(folder: JobFolder) -> Path:
    """Give where a trainer's output goes."""
    return folder.path.with_suffix(".log")


def measure(folder: JobFolder, start: Start) -> Times:
    """Start a trainer and look on until it has ended."""
    began = time.time()
    trainer = start(folder)
    tail = EventTail(folder.events)
    begun = step = 0.0
    while (status := trainer.poll()) is None and time.time() < began + _PATIENCE:
        for event in tail.read():
            begun = begun or event.created_at
            step = event.created_at if event.type is EventType.METRICS else step
        time.sleep(_TICK)
    ended = time.time()
    for event in tail.read():
        step = event.created_at if event.type is EventType.METRICS else step
    if status or not step:
        sys.exit(f"{folder.path.name} ended with {status}:\n{log_of(folder).read_text()[-3000:]}")
    return Times(begun - began, step - began, ended - began)


if __name__ == "__main__":
    main()
