"""What the trainer says, and what its end means. Pure: the trainer and the supervisor both read this page.

An event is one JSON line in the job's events.jsonl. Its fields are those of OpenAI's fine-tuning events
(`created_at`, `level`, `type`, `message`, `data`), and metric names are OpenAI's where it has one.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from typing import Any


class EventType(StrEnum):
    """The kinds of events, in the order in which a job meets them."""

    ATTEMPT = "attempt"  # the daemon's own: one begins (rung, settings), or is over (ending, how, then, step)
    PHASE = "phase"  # data: phase (validating_files, loading_model, generating, training, evaluating, saving); counted
    DATA_REPORT = "data_report"  # data: the data report
    PLAN = "plan"  # data: steps, tokens, parameters, and every automatic choice with its reason
    RUNG = "rung"  # data: rung, reason; the trainer climbed down by itself
    METRICS = "metrics"  # data: step, total_steps, epoch, train_loss, ... or valid_loss
    PREDICTIONS = "predictions"  # data: step, epoch, samples
    BENCHMARK = (
        "benchmark"  # data: what was measured at the end, as `finetuned eval --json` has it, without the answers
    )
    CHECKPOINT = "checkpoint"  # data: step
    MESSAGE = "message"  # anything worth a line
    ERROR = "error"  # data: code, what, where, remedy
    RESULT = "result"  # data: the adapter's metrics; the last event of a success


class ExitCode(IntEnum):
    """How a trainer ends. Anything else is a bug."""

    DONE = 0
    BAD_DATA = 65
    OUT_OF_MEMORY = 70
    TEMPORARY = 75
    BAD_SETTINGS = 78
    STOPPED = 130  # asked to stop, and a checkpoint is written


class Ending(StrEnum):
    """What an attempt's end means for its job."""

    SUCCEEDED = "succeeded"
    PERMANENT = "permanent"  # the same input will fail again
    RESOURCE = "resource"  # out of memory, and the trainer said so
    HOST_MEMORY = "host_memory"  # killed, most likely by the kernel for memory
    DEVICE = "device"  # the GPU failed
    TRANSIENT = "transient"
    INTERRUPTED = "interrupted"  # stopped by us
    BUG = "bug"


def judge(returncode: int, *, stopped: bool, gpu_failed: bool = False) -> Ending:
    """Say what an attempt's end means.

    `returncode` is as subprocess gives it: the exit code, or minus the signal's number. `stopped` says that somebody
    wanted the end: we, or an engine that needed the machine.
    """
    if returncode == ExitCode.DONE:
        return Ending.SUCCEEDED
    if gpu_failed and returncode not in {ExitCode.BAD_DATA, ExitCode.BAD_SETTINGS}:
        return Ending.DEVICE
    if stopped or returncode == ExitCode.STOPPED:
        return Ending.INTERRUPTED
    return {
        ExitCode.BAD_DATA: Ending.PERMANENT,
        ExitCode.BAD_SETTINGS: Ending.PERMANENT,
        ExitCode.OUT_OF_MEMORY: Ending.RESOURCE,
        ExitCode.TEMPORARY: Ending.TRANSIENT,
        -signal.SIGKILL: Ending.HOST_MEMORY,
    }.get(returncode, Ending.BUG)


def describe_end(returncode: int) -> str:
    """Name an exit in words: `exit code 65 (bad data)` or `killed by SIGKILL`."""
    if returncode < 0:
        known_signals = {number.value: number.name for number in signal.Signals}
        return f"killed by {known_signals.get(-returncode, f'signal {-returncode}')}"
    known = {int(code): code.name.lower().replace("_", " ") for code in ExitCode}
    return f"exit code {returncode} ({known.get(returncode, 'a bug')})"


@dataclass(frozen=True)
class Event:
    """One thing the trainer said. `created_at` is in seconds since 1970."""

    created_at: float
    type: EventType
    message: str
    level: str = "info"
    data: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> bytes:
        """Give the event as one line of events.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


def parse_event(line: bytes) -> Event | None:
    """Read one line of events.jsonl; None for a line that is no event (torn by a crash, say), or one that does not hold
    what its readers rely on: no trainer can bring its daemon down with what it says.
    """
    try:
        fields = json.loads(line)
        event = Event(
            created_at=float(fields["created_at"]),
            type=EventType(fields["type"]),
            message=str(fields["message"]),
            level=str(fields["level"]),
            data=dict(fields["data"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    sound = math.isfinite(event.created_at) and event.level in _LEVELS and _sound(event.type, event.data)
    return event if sound else None


_LEVELS = frozenset({"info", "warning", "error"})
_COUNTS = frozenset({"step", "total_steps", "checkpoint_step"})
_FIGURES = frozenset({"train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds_left"})
_TEXTS = frozenset({"prompt", "expected", "answer"})


def _sound(kind: EventType, data: Mapping[str, Any]) -> bool:
    """Whether an event's data are of the kinds that they must be."""
    if not all(_is_count(data[name]) for name in _COUNTS & data.keys()):
        return False
    if not all(_is_number(data[name]) for name in _FIGURES & data.keys()):
        return False
    if not math.isfinite(data.get("seconds_left", 0)):
        return False
    if not all(isinstance(data.get(name, ""), str) for name in ("phase", "counted")):
        return False
    match kind:
        case EventType.METRICS:
            return "step" in data
        case EventType.PLAN | EventType.RUNG:
            return isinstance(data.get("rung"), dict)
        case EventType.PREDICTIONS:
            samples = data.get("samples")
            epoch = _is_number(data.get("epoch", 0))
            return epoch and "step" in data and isinstance(samples, list) and all(map(_is_sample, samples))
        case _:
            return True


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_count(value)


def _is_sample(sample: object) -> bool:
    return (
        isinstance(sample, dict)
        and all(isinstance(sample.get(name), str) for name in _TEXTS)
        and isinstance(sample.get("exact"), bool)
        and all(_is_number(sample.get(name, 0)) for name in ("similarity", "seconds"))
        and isinstance(sample.get("error"), str | None)
    )
