"""`finetuned train`: the same trainer process and the same ladder as the daemon's, for one file, without a ledger."""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from finetuned.adapters import MANIFEST
from finetuned.config import TrainingSettings, settings_from
from finetuned.drop import parse_settings
from finetuned.durable import sha256_of, sync_tree
from finetuned.errors import ConfigError, FinetunedError, HomeError
from finetuned.events import describe_end, judge
from finetuned.gpu import first_gpu
from finetuned.home import JobFolder, models_folder, safe_name
from finetuned.jobs import FileIdentity, Job, JobSpec, State
from finetuned.launchers.local import LocalTrainer, start, trainer_environment
from finetuned.lifesigns import locked
from finetuned.live import LiveLine
from finetuned.spool.publish import check_output
from finetuned.supervisor import SETTLE_RUNG, EventTail, decide, progress_after, progress_for_next

_WORK = ".finetuned-train"  # in the output folder while it trains
_LOG = "train.log"
_STOP_SECONDS = 120.0
_TICK = 0.1


def train_by_hand(
    *,
    dataset: Path,
    output_dir: Path,
    job_id: str | None,
    skip_validation: bool,
    yes: bool,
    system_prompt: str | None,
    predictions_enabled: bool | None,
    predictions_sample_frequency: str | None,
    settings: tuple[str, ...],
    **options: Any,
) -> int:
    """Train and give the exit code. Raises FinetunedError for settings or folders that cannot be used."""
    values = {name: value for name, value in options.items() if value is not None}
    for name in {"eval_file", "resume_adapter", "benchmark"} & values.keys():
        values[name] = str(values[name].resolve())
    values["predictions"] = _asking(predictions_enabled, predictions_sample_frequency)
    if system_prompt is not None:
        values["system_prompt"] = system_prompt or None
    if skip_validation:
        values["max_bad_rows"] = 1.0
    return _train(
        dataset,
        output_dir,
        settings_from(_joined(values, parse_settings(settings)), where="the command line"),
        job_id=job_id,
        yes=yes,
    )


def _joined(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Put what `--set` gave beside the options. Raises ConfigError for what is in both."""
    joined = dict(options)
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            joined[name] = _joined(options[name], value)
        elif options.get(name, value) != value:
            raise ConfigError(
                f"{name} is set to {options[name]} and to {value}", where="the command line", remedy="Leave one out."
            )
        else:
            joined[name] = value
    return joined


def _train(dataset: Path, output_dir: Path, chosen: TrainingSettings, *, job_id: str | None, yes: bool) -> int:
    settings = chosen.model_dump()
    output = output_dir.expanduser().resolve()
    if not yes and output.is_dir() and any(path.name != _WORK for path in output.iterdir()):
        click.confirm(f"{output_dir} is not empty. Replace what is there?", abort=True, err=True)

    data = dataset.expanduser().resolve()
    facts = data.stat()
    job = Job(
        id=job_id or safe_name(data.name.encode()),
        name=data.name.encode(),
        profile="",
        identity=FileIdentity(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns),
        sha256=sha256_of(data),
        state=State.RUNNING,
        created_at=time.time(),
        settings=settings,
        rung=chosen.first_rung().as_dict(),
    )
    folder = JobFolder(output / _WORK)
    _keep_or_clear(folder, job)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HomeError(
            f"cannot be made: {error.strerror}", where=str(output), remedy="Name another --output-dir."
        ) from error

    while True:
        job = replace(job, attempt=job.attempt + 1)
        _write_spec(folder, job, data)
        job, status, stopped = _attempt(folder, job)
        ending = judge(status, stopped=stopped)
        decision = decide(job, ending, error=job.progress.get("error"), end=describe_end(status))
        if decision.publish:
            return _finish(folder, output, job)
        if stopped:
            click.echo("Stopped with a checkpoint. The same command goes on from there.", err=True)
            return 130
        # By hand nobody waits for a hub that is out of reach, or for room: the user tries again.
        reason = decision.reason or (job.progress.get("error") if decision.delay or decision.no_room else None)
        if reason:
            click.echo(f"finetuned: {FinetunedError(**_spoken(reason))}", err=True)
            click.echo(f"The trainer's log: {folder.path / _LOG}", err=True)
            return 1
        click.echo(f"Going on: {decision.why}", err=True)
        job = replace(
            job,
            rung=decision.rung or job.rung,
            retries=job.retries + decision.counted,
            progress=progress_for_next(job.progress, ending),
        )


def _asking(enabled: bool | None, frequency: str | None) -> dict[str, Any]:  # noqa: FBT001
    often = int(frequency) if frequency and frequency.isdigit() else frequency
    return {name: value for name, value in (("enabled", enabled), ("frequency", often)) if value is not None}


def _spoken(reason: dict[str, Any]) -> dict[str, str]:
    return {key: reason[key] for key in ("what", "where", "remedy")}


def _keep_or_clear(folder: JobFolder, job: Job) -> None:
    """Keep what a stopped training of the same file with the same settings left; clear anything else."""
    try:
        before = JobSpec.decode(folder.spec.read_bytes())
    except (OSError, ValueError, TypeError, KeyError):
        before = None
    if before is None or (before.identity, before.settings) != (job.identity, job.settings):
        if locked(folder):
            raise _busy(folder)
        shutil.rmtree(folder.path, ignore_errors=True)
    elif not folder.checkpoints.is_dir():
        shutil.rmtree(folder.earlier, ignore_errors=True)  # nothing stands on it yet, and it may have been mended


def _busy(folder: JobFolder) -> HomeError:
    remedy = "Wait for it, or name another --output-dir."
    return HomeError("a training is at work in this folder already", where=str(folder.path.parent), remedy=remedy)


def _write_spec(folder: JobFolder, job: Job, data: Path) -> None:
    spec = JobSpec(
        id=job.id,
        name=data.name,
        profile="",
        identity=job.identity,
        created_at=job.created_at,
        input=str(data),
        settings=job.settings,
        rung=job.rung,
        sha256=job.sha256,
        attempt=job.attempt,
        base_dir=str(Path.cwd()),
        models=str(models_folder()),
    )
    folder.spec.write_bytes(spec.encode())


def _attempt(folder: JobFolder, job: Job) -> tuple[Job, int, bool]:
    """Run one trainer to its end: the job with its newest figures, the exit status, and whether it was stopped by the
    user.
    """
    gpu = first_gpu()
    environment, _ = trainer_environment(gpu.uuid if gpu else None)
    tail = EventTail(folder.events, folder.events.stat().st_size if folder.events.exists() else 0)
    try:
        trainer = start(folder, log=folder.path / _LOG, environment=environment)
    except BlockingIOError as error:
        raise _busy(folder) from error
    stopper = _Stopper(trainer)
    before = signal.signal(signal.SIGINT, stopper)
    line = LiveLine()
    try:
        while True:
            status = trainer.poll()
            events = tail.read()
            job = replace(job, progress=progress_after(job.progress, events))
            for event in events:
                if event.type in SETTLE_RUNG:
                    job = replace(job, rung=dict(event.data["rung"]))
            line.show(job.progress)
            if status is not None and tail.drained:
                return job, status, stopper.asked
            stopper.lose_patience()
            time.sleep(_TICK)
    finally:
        line.end()
        signal.signal(signal.SIGINT, before)


class _Stopper:
    """Ctrl-C asks for a checkpoint; a second one, or too long a wait, ends the trainer."""

    def __init__(self, trainer: LocalTrainer) -> None:
        self.asked = False
        self._trainer = trainer
        self._by = 0.0

    def __call__(self, *_: object) -> None:
        self._by = time.monotonic() + (0 if self.asked else _STOP_SECONDS)
        self.asked = True
        self._trainer.ask_to_stop()

    def lose_patience(self) -> None:
        """Kill the trainer if its time is up."""
        if self.asked and time.monotonic() >= self._by:
            self._trainer.kill()


def _finish(folder: JobFolder, output: Path, job: Job) -> int:
    """Move the adapter into the output folder, its manifest last."""
    staged = folder.staged_adapter(job.attempt)
    check_output(staged)
    sync_tree(staged)
    (output / MANIFEST).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == MANIFEST):
        path.replace(output / path.name)
    (folder.path / _LOG).replace(output / _LOG)
    shutil.rmtree(folder.path)
    figures = ", ".join(
        f"{name.replace('_', ' ')} {job.progress[name]:.4f}"
        for name in ("train_loss", "valid_loss_before", "valid_loss")
        if name in job.progress
    )
    click.echo(f"{output}: {figures}")
    return 0
