"""The measurement at a job's end, on rows that config.json names. Whatever goes wrong in it costs no job its adapter.

An attempt that it takes down with it leaves a mark, and the next one goes without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuned.errors import FinetunedError
from finetuned.events import EventType
from finetuned.home import Home, JobFolder
from finetuned.jobs import JobSpec
from finetuned.scores import headline
from finetuned.trainer import memory
from finetuned.trainer.data import Source
from finetuned.trainer.ends import StopAskedError
from finetuned.trainer.exam import Candidate, facts_of, read_exam, sit
from finetuned.trainer.layout import choose_layout
from finetuned.trainer.model import load_model
from finetuned.trainer.overlap import learned_from, overlapping
from finetuned.trainer.precision import choose

if TYPE_CHECKING:
    from finetuned.trainer.loop import Task, Trained

_MARK = "benchmark.begun"
_ERROR_SHOWN = 300  # characters


def file_of(task: Task, spec: JobSpec) -> Path | None:
    """Give the file that the settings name, and warn where it is not there while there is time to mend that."""
    if task.settings.benchmark is None:
        return None
    file = Path(spec.base_dir) / Path(task.settings.benchmark).expanduser()
    if not file.is_file():
        task.say.warn(f"benchmark {file}: there is no such file yet; without it the job ends unmeasured")
    return file


def benchmark(file: Path | None, folder: JobFolder, spec: JobSpec, task: Task, trained: Trained) -> dict[str, Any]:
    """Measure what was trained beside its base model; the facts, or why there are none. Raises StopAskedError alone."""
    if file is None:
        return {}
    mark, say = folder.path / _MARK, task.say
    if mark.exists():
        return _left_out(task, "an attempt ended in it")
    say.phase("evaluating", f"measuring by {file.name}")
    memory.give_back()  # the training's optimizer, which cycles keep
    try:
        mark.touch()
        facts = _measure(file, folder, spec, task, trained)
    except StopAskedError:
        mark.unlink(missing_ok=True)
        raise
    except FinetunedError as error:
        why = error.sentence()
    except Exception as error:  # noqa: BLE001, no measurement is worth the adapter
        why = f"{type(error).__name__}: {error}"
    else:
        _remove(mark)
        say.say(EventType.BENCHMARK, f"benchmark {headline(facts)}", **facts)
        return facts
    _remove(mark)
    memory.give_back()  # out of the except block: the traceback there holds what did not fit
    return _left_out(task, why)


def _remove(mark: Path) -> None:
    with suppress(OSError):
        mark.unlink(missing_ok=True)


def _left_out(task: Task, why: str) -> dict[str, Any]:
    task.say.warn(f"the benchmark is left out: {why[:_ERROR_SHOWN]}")
    return {"error": why[:_ERROR_SHOWN]}


def _measure(file: Path, folder: JobFolder, spec: JobSpec, task: Task, trained: Trained) -> dict[str, Any]:
    settings = task.settings
    told = _teller(task)
    exam = read_exam(
        file,
        task.tokenizer,
        system_prompt=settings.system_prompt,
        max_length=settings.max_length,
        judged=settings.judge,
        max_new_tokens=settings.benchmark_tokens,
    )
    chain = task.earlier.chain if task.earlier else []
    own = Source(folder.path / spec.input, spec.name)
    learned = learned_from({"chain": chain}, own=own, archive=Home(Path(spec.base_dir)).archive)
    seen = overlapping(exam.rows, learned.files, lambda share: told("overlap", share))
    kept = Path(spec.models).parent / "evaluations"
    sits = partial(sit, exam, kept=kept, told=told, asked_to_stop=task.asked_to_stop)
    candidate = Candidate("trained", trained.model, task.tokenizer, trained.layout)
    return facts_of(exam, [sits(_base(candidate, task)), sits(candidate)], learned, seen)


def _base(trained: Candidate, task: Task) -> Candidate:
    """Give the base model: the trained one without its adapter, or where all of it was trained, loaded anew."""
    if hasattr(trained.model, "peft_config"):
        return replace(trained, name="base", plain=True)
    precision = choose(task.device, "full", task.settings.dtype)
    model = load_model(task.base, task.settings, tuning="full", precision=precision, device=task.device)
    return Candidate("base", model, task.tokenizer, choose_layout(model, model.dtype, name=task.base.name))


def _teller(task: Task) -> Callable[[str, float], None]:
    """Hear between two batches whether somebody wants the GPU."""

    def told(_doing: str, _share: float) -> None:
        if task.asked_to_stop():
            raise StopAskedError

    return told
