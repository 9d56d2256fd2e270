"""`python -m finetuned.trainer JOB_DIR`: job.json in, events and an adapter out, and an exit code (`events.ExitCode`).

A file that is bad at a glance is refused before torch is imported, any other before the model's weights are read.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from finetuned import sharding
from finetuned.config import TrainingSettings, settings_from
from finetuned.dataset.reading import RowFile
from finetuned.dataset.report import glance
from finetuned.durable import NO_ROOM, OTHERS_NOTHING
from finetuned.errors import DataError, FinetunedError, ModelError, OutOfMemoryError
from finetuned.events import EventType, ExitCode
from finetuned.fallback import Rung
from finetuned.home import JobFolder, printable
from finetuned.jobs import JobSpec
from finetuned.lifesigns import TAKES_LOCK, leave_exit_code, sign, take_lock
from finetuned.trainer import ranks
from finetuned.trainer.ends import OutOfMeansError, RankLostError, StopAskedError
from finetuned.trainer.reporter import Reporter

if TYPE_CHECKING:
    from finetuned.trainer.distill.found import Found
    from finetuned.trainer.distill.teacher import Teacher
    from finetuned.trainer.group import Group
    from finetuned.trainer.loop import Task, Trained
    from finetuned.trainer.store import Examples

_WORTH_KEEPING = 60.0  # seconds of steps; the count behind a record takes a few itself
_LAST_WAIT = 10.0  # seconds for what libraries do at the end of a process
_stop_asked = False


def end(folder: JobFolder) -> NoReturn:
    """Run one attempt and end, also where a library has left a thread that does not: the next job waits for that."""
    code, leads = 1, ranks.rank() == 0
    try:
        code = main(folder)
    except Exception:
        if not leads:
            traceback.print_exc()
            os._exit(code)  # the others wait for its sockets to close, which a library's own end may hold up
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python unhears it as it ends, and the code would be lost
        late = threading.Timer(_LAST_WAIT, os._exit, [code])
        late.daemon = True
        late.start()
    if not leads:  # libraries that take their time to end, or crash there, are not to disturb the others
        os._exit(code)
    sys.exit(code)


def main(folder: JobFolder) -> int:
    """Run one attempt, or one rank of it, and give the exit code."""
    if ranks.has_agent():
        ranks.end_with_agent()
    else:
        _hear_stops()
    try:
        return _attempt(folder)
    finally:
        if ranks.awaited():
            _tell_the_others()


def _tell_the_others() -> None:
    """Meet the other ranks to let them know that this one has ended: they would wait for half an hour."""
    with suppress(Exception):
        from finetuned.trainer.group import meet

        meet(well=False)


def _attempt(folder: JobFolder) -> int:
    """Say who runs the attempt and how it ended, for a daemon that comes after ours and is not our parent."""
    attempt = os.environ.get(TAKES_LOCK)
    try:
        if ranks.signs() and attempt is None:
            sign(folder)
        if attempt is not None and not ranks.has_agent() and not _is_wanted(folder, attempt):
            return ExitCode.STOPPED
        spec = JobSpec.decode(folder.spec.read_bytes())
        if not ranks.signs():
            return int(_run(folder, spec))
        if attempt is not None and not take_lock(folder):
            return _still_at_work(folder)
        sign(folder, spec.attempt)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return ExitCode.TEMPORARY
    code = 1  # Python's own, when an exception gets as far as here
    try:
        code = int(_run(folder, spec))
    finally:
        leave_exit_code(folder, spec.attempt, code)
    if code == -signal.SIGKILL:  # a rank was, for memory most likely: who waits for us is to see that
        os.kill(os.getpid(), signal.SIGKILL)
    return code if code >= 0 else 1


def _is_wanted(folder: JobFolder, attempt: str) -> bool:
    """Whether an engine has begun us in time: the job is still there, at this attempt, and nobody has stopped it."""
    try:
        now = JobSpec.decode(folder.spec.read_bytes()).attempt
    except FileNotFoundError:
        return False
    return attempt == str(now) and not folder.stop(now).exists()


def _still_at_work(folder: JobFolder) -> ExitCode:
    what = "an earlier trainer of this job holds its lock: its engine took it for dead, and it is not, or its node is"
    remedy = "It is tried again; end it on its node if it stays."
    with suppress(OSError):
        Reporter(folder.events).error(FinetunedError(what, remedy=remedy, code="still_at_work"))
    return ExitCode.TEMPORARY


def _run(folder: JobFolder, spec: JobSpec) -> int:
    spec = replace(spec, name=printable(os.fsencode(spec.name)))  # what is said must be text
    try:
        say = Reporter(folder.events, rank=ranks.rank())
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return ExitCode.TEMPORARY
    with _no_room_told(say) as end, _told(say, end):
        settings = settings_from(spec.settings, where=spec.name)
        if spec.sharded:
            sharding.check(settings.recipe, spec.rung["tuning"])
        if ranks.started_by_somebody() or spec.processes <= 1:
            _train(folder, spec, settings, say=say)
        else:
            end.code = ranks.run(folder, spec.processes, sharded=spec.sharded, asked_to_stop=lambda: _stop_asked)
    return end.code


def _train(folder: JobFolder, spec: JobSpec, settings: TrainingSettings, *, say: Reporter) -> None:
    """Do all that needs the libraries."""
    say.phase("validating_files", f"opening {spec.name}")
    if ranks.rank() == 0:
        glance(RowFile(folder.path / spec.input, name=spec.name), max_bad_rows=settings.max_bad_rows)
    from finetuned.trainer import memory
    from finetuned.trainer.adapter import write_adapter
    from finetuned.trainer.base import quiet_libraries
    from finetuned.trainer.benchmark import benchmark, file_of
    from finetuned.trainer.group import join
    from finetuned.trainer.rejection import Yield
    from finetuned.trainer.trackers import reporting

    quiet_libraries()
    say.share_errors(lambda: True)  # what goes wrong now is of this process alone, its GPU say
    group = join(sharded=spec.sharded)
    _hear_stops()
    say.share_errors(group.first_to_fail)
    with group.leader_first():
        task, rows, report = _prepare(folder, spec, settings.settled(), group, say=say)
    settings, libraries = task.settings, memory.resident_bytes()
    measured_by = file_of(task, spec)
    if measured_by is not None and group.lockstep:
        say.warn(sharding.NO_BENCHMARK)
        measured_by = None
    with reporting(
        say,
        settings.report_to if group.leads else [],
        job=spec.id,
        settings=settings.model_dump(),
        folder=Path(spec.base_dir) / "logs" / "tracking",
        cpu=task.device.type == "cpu",
    ):
        task, trained, learned = _learn(task, rows, folder, spec)
    alone, leads = group.size == 1, group.leads
    group.leave()
    if not leads:
        return
    measured = benchmark(measured_by, folder, spec, task, trained)
    say.phase("saving", "writing the adapter")
    write_adapter(folder.staged_adapter(spec.attempt), spec, task, trained, report, measured=measured, learned=learned)
    told = ("loss", "before", "retained")
    figures = ", ".join(f"{name} {value:.4f}" for name, value in trained.metrics.items() if name.endswith(told))
    if alone and trained.seen.seconds >= _WORTH_KEEPING:
        _remember(task, trained, libraries=libraries, models=Path(spec.models))
    figures += f"; {Yield(**trained.metrics['rft'][-1])}" if "rft" in trained.metrics else ""
    say.say(EventType.RESULT, f"trained: {figures}", **trained.metrics)


def _prepare(
    folder: JobFolder, spec: JobSpec, settings: TrainingSettings, group: Group, *, say: Reporter
) -> tuple[Task, Examples, dict[str, Any]]:
    """Settle what is trained and read the data; give the task, its rows and their report."""
    from finetuned.trainer.base import choose_tuning, find_base, load_tokenizer
    from finetuned.trainer.chain import settle
    from finetuned.trainer.data import cut, read_data
    from finetuned.trainer.distill.found import find_teacher
    from finetuned.trainer.loop import Task
    from finetuned.trainer.reach import reaches

    asked_to_stop = partial(_is_stop_asked, folder.stop(spec.attempt))
    tuning, why = choose_tuning(spec.rung["tuning"], gpu=group.device.type == "cuda", sharded=group.lockstep)
    rung = replace(Rung(**spec.rung), tuning=tuning)
    if tuning != spec.rung["tuning"]:
        say.say(EventType.RUNG, f"tuning {tuning}: {why}", rung=rung.as_dict(), reason=why)
    base = find_base(settings, models=Path(spec.models), base_dir=Path(spec.base_dir))
    tokenizer = load_tokenizer(base, settings)
    found = find_teacher(settings, tokenizer, models=Path(spec.models), base_dir=Path(spec.base_dir))
    data = read_data(
        folder,
        spec,
        settings,
        tokenizer,
        reaches=reaches(settings, base, found),
        say=say,
        asked_to_stop=asked_to_stop,
    )
    data = cut(data, settings, rung.max_length, name=spec.name, say=say)
    settings = settings.model_copy(update={"system_prompt": data.system_prompt})
    earlier = settle(folder, spec, settings, base.name)
    if earlier is not None:
        say.say(EventType.MESSAGE, f"resume_adapter: {earlier} ({earlier.reason})", chain=earlier.chain)
    task = Task(
        settings=settings,
        rung=rung,
        base=base,
        tokenizer=tokenizer,
        train=data.train,
        held_out=data.held_out if data.held_out is not None else [],
        asked=data.asked,
        device=group.device,
        checkpoints=folder.checkpoints,
        bounds=Path(spec.models).parent / "micro-batches.json",
        say=say,
        asked_to_stop=asked_to_stop,
        earlier=earlier,
        teacher=_teacher(found, say) if found else None,
        group=group,
    )
    return task, data.train, data.report


def _learn(task: Task, rows: Examples, folder: JobFolder, spec: JobSpec) -> tuple[Task, Trained, Path | None]:
    """Train; give the task of the last round, what came of it, and where rft's own answers are."""
    from finetuned.trainer.loop import train
    from finetuned.trainer.rounds import Questions, train_in_rounds
    from finetuned.trainer.store import IDENTITY

    if task.settings.recipe != "rft":
        return task, train(task), None
    learnable = frozenset(rows.column(IDENTITY).tolist())
    questions = Questions(folder.path / spec.input, spec.name, learnable)
    return train_in_rounds(task, questions, cache=Path(spec.models).parent / "tokens")


def _teacher(found: Found, say: Reporter) -> Teacher:
    from finetuned.trainer.distill.teacher import Teacher

    say.say(EventType.MESSAGE, f"teacher: {found}")
    return Teacher(found)


def _remember(task: Task, trained: Trained, *, libraries: int, models: Path) -> None:
    """Keep what the training took beside what is predicted for such a one, so that `finetuned plan` gets better."""
    from finetuned.trainer import footprint, history, memory, precision
    from finetuned.trainer.store import lengths_of
    from finetuned.trainer.understudy import longest_question

    rung, seen, settings = trained.rung, trained.seen, task.settings
    try:
        formats = precision.choose(task.device, rung.tuning, task.settings.dtype)
        asked = settings.recipe == "rft"
        work = footprint.Work(
            task.base,
            settings,
            rung.tuning,
            formats,
            task.device,
            rung.activation_checkpointing,
            teacher=task.teacher.found if task.teacher else None,
            longest_question=longest_question(settings, task.tokenizer, task.train, lengths_of(task.train))
            if asked
            else 0,
        )
        counted = footprint.count(
            work, [task.train[row] for row in seen.largest], accumulated=seen.accumulated, libraries=libraries
        )
        record = history.Record(
            model=task.base.name,
            method=rung.tuning,
            device=memory.device_name(),
            predicted=counted.footprint.peak,
            peak=seen.peak,
            tokens_per_second=round(seen.tokens_per_second, 1),
            recipe=history.kind_of(settings),
        )
        history.remember(history.file_beside(models), record)
    except Exception as error:  # noqa: BLE001, the adapter is done: no record is worth losing it
        task.say.warn(f"nothing was kept for the predictions of `finetuned plan`: {error}")


class _End:
    code: int = ExitCode.DONE


@contextmanager
def _no_room_told(say: Reporter) -> Iterator[_End]:
    """Turn a full disk into its exit code, and tell it as an event if there is room for that."""
    end = _End()
    try:
        yield end
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        with suppress(OSError):
            say.error(
                FinetunedError(f"no room on the disk: {error}", remedy="Make room; it is tried again.", code="no_space")
            )
        end.code = ExitCode.TEMPORARY


@contextmanager
def _told(say: Reporter, end: _End) -> Iterator[None]:
    """Turn every other way to end into its exit code, and tell it as an event. Raises OSError."""
    try:
        yield
    except DataError as error:
        say.error(error)
        end.code = ExitCode.BAD_DATA
    except FinetunedError as error:
        say.error(error)
        temporary = isinstance(error, ModelError) and error.code in {"hub_unreachable", "gpu_gone"}
        end.code = ExitCode.TEMPORARY if temporary else ExitCode.BAD_SETTINGS
    except MemoryError as error:
        say.error(OutOfMemoryError(f"memory ran out: {error}", remedy="Take a smaller file or model, or add memory."))
        end.code = ExitCode.OUT_OF_MEMORY
    except StopAskedError:
        end.code = ExitCode.STOPPED
    except OutOfMeansError as error:
        say.error(error.for_user(), rung=error.rung.as_dict())
        end.code = ExitCode.OUT_OF_MEMORY
    except RankLostError as error:
        say.warn(f"another process of this training is gone: {error}")
        end.code = ExitCode.TEMPORARY


def _hear_stops() -> None:
    signal.signal(signal.SIGTERM, _ask_to_stop)
    signal.signal(signal.SIGINT, _ask_to_stop)


def _ask_to_stop(_: int, __: object) -> None:
    global _stop_asked  # noqa: PLW0603, a signal handler sets a flag
    _stop_asked = True


def _is_stop_asked(word: Path) -> bool:
    return _stop_asked or word.exists()


if __name__ == "__main__":
    os.umask(OTHERS_NOTHING)
    end(JobFolder(Path(sys.argv[1]).resolve()))
