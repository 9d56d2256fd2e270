"""What `finetuned top` shows, as lines of text. Pure: facts and a size in, lines out, none wider than the size."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import click

from finetuned.curves import Points
from finetuned.errors import counted, harmless
from finetuned.live import sentence, why_waiting

KEYS = "p pause  r resume  c cancel  t retry  f first  l last  j/k pick  ? keys  q quit"
_MEANING = {
    "p": "pause: no job starts, and those that run write a checkpoint",
    "r": "resume: jobs start again",
    "c c": "cancel the chosen job",
    "t": "try the chosen job again, which failed or was cancelled",
    "f": "let the chosen job start first",
    "l": "let the chosen job start last",
    "j, k": "choose a job; so do the arrows",
    "?": "these words; any key ends them",
    "q": "quit; jobs go on",
}
_LEVELS = "▁▂▃▄▅▆▇█"
_PLAIN_LEVELS = "_.-=+*%#"  # where the terminal's letters are fewer
_GIB = 2**30
_YEAR = 365 * 86400  # seconds; whatever takes longer has no date
_MOST_ANSWERS, _MOST_FAILED = 5, 3
_LEAST_QUEUE = 3  # lines
_CELL = 26  # columns of a GPU where several are on a line
_RETRIED = ("failed", "cancelled")
_STATES = {"usable": "free", "set_aside": "set aside", "left_alone": "left alone"}


@dataclass(frozen=True)
class Size:
    """A terminal's columns and lines; lines 0: as many as it takes. `plain` ones know no block letters."""

    columns: int = 80
    lines: int = 0
    plain: bool = False


def frame(facts: dict[str, Any], size: Size, *, chosen: str = "", note: str = "") -> list[str]:
    """Draw one frame: facts as `finetuned.top` gathers them, the chosen job marked, a note above the keys."""
    lines = [_head(facts, size), ""]
    foot = ["", cut(note, size) if note else "", click.style(cut(KEYS, size), dim=True)] if size.lines else []
    gpus = _gpus(facts["gpus"], size)
    room = size.lines - len(lines) - len(foot) if size.lines else 10**6
    of_queue = max(_LEAST_QUEUE, min(len(facts["queue"]) + 2, (room - len(gpus)) // 3))
    lines += _running(facts, size, chosen=chosen, room=room - len(gpus) - of_queue)
    lines += gpus
    answers = _answers(facts, size)
    room = size.lines - len(lines) - len(foot) if size.lines else 10**6
    failed = _failed(facts, size, chosen=chosen)
    queue = _queue(facts, size, chosen=chosen, room=max(_LEAST_QUEUE, room - len(answers) - len(failed)))
    body = [*lines, *queue, *failed, *answers]
    if not size.lines:
        return body
    body = body[: max(0, size.lines - len(foot))]
    return [*body, *[""] * (size.lines - len(foot) - len(body)), *foot][: size.lines]


def meaning_of_keys(size: Size) -> list[str]:
    """Draw the frame that says what the keys do."""
    lines = [cut(f"{key:6}{meaning}", size) for key, meaning in _MEANING.items()]
    return [*lines, *[""] * (size.lines - len(lines))][: size.lines]


def cut(text: str, size: Size, *, room: int | None = None) -> str:
    """Give text on one line that takes at most `room` columns, of which some letters take two and some none."""
    left = size.columns if room is None else room
    kept = []
    for letter in " ".join(harmless(text).split("\n")).replace("\t", " "):
        left -= 0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if left < 0:
            break
        kept.append(letter)
    return "".join(kept)


def bar(share: float, width: int, *, plain: bool) -> str:
    """Give a bar that is filled to this share of 1."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return f"[{'#' * filled}{'.' * (width - filled)}]" if plain else "█" * filled + "░" * (width - filled)


def sparkline(points: Points, width: int, *, plain: bool = False) -> str:
    """Give the course of a figure in so many letters: the mean of what falls on each, between least and most."""
    if not points or width < 1:
        return ""
    values = [value for _, value in points]
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    levels, least, span = _PLAIN_LEVELS if plain else _LEVELS, min(means), max(means) - min(means)
    return "".join(levels[round((mean - least) / span * (len(levels) - 1)) if span else 0] for mean in means)


def _head(facts: dict[str, Any], size: Size) -> str:
    """Say what matters most first: a narrow terminal shows only that."""
    pid = facts["daemon_pid"]
    hindered = [f"paused: {facts['paused']}"] if facts["paused"] else []
    hindered += ["config.json is broken"] if facts["config_error"] else []
    hindered += [facts["waits"]] if facts["waits"] else []
    state = f"running, pid {pid}" if pid else "not running; start it with `finetuned run`"
    text = cut("; ".join([f"finetuned is {state}", *hindered, f"in {facts['base_dir']}"]), size, room=size.columns - 10)
    colour = "yellow" if hindered or not pid else "green"
    return click.style(text, fg=colour) + f"  {datetime.now().astimezone():%H:%M:%S}"


def in_detail(running: Sequence[dict[str, Any]], chosen: str) -> str:
    """Give the running job that is shown in detail: the chosen one, or the first; nothing where none runs."""
    ids = [job["id"] for job in running]
    return chosen if chosen in ids else next(iter(ids), "")


def _running(facts: dict[str, Any], size: Size, *, chosen: str, room: int) -> list[str]:
    """Give a line a job, and below that of one its details; where there is no room for all, those around it."""
    jobs = facts["running"]
    if not jobs:
        last = facts["finished"][0] if facts["finished"] else None
        return [cut("no job is running" + (f"; the last was {last['id']}, it {last['outcome']}" if last else ""), size)]
    shown = in_detail(jobs, chosen)
    place = next(n for n, job in enumerate(jobs) if job["id"] == shown)
    details = _details(jobs[place], facts, size)
    rows = max(1, room - len(details))
    if rows < len(jobs):
        rows = max(1, rows - 1)  # one line says how many there are
    start = max(0, min(place - rows // 2, len(jobs) - rows))
    lines = []
    for job in jobs[start : start + rows]:
        where = (job.get("where") or {}) if len(jobs) > 1 or _elsewhere(job) else {}
        name = f"{job['id']} ({where['short']})" if where.get("short") else job["id"]
        text = cut(f"{name}: {sentence(job['progress'])}", size, room=size.columns - 2)
        lines += [_marked(text, job["id"] == chosen), *(details if job["id"] == shown else [])]
    more = cut(f"{len(jobs)} jobs run", size, room=size.columns - 2)
    return [*lines, *([click.style(f"  {more}", dim=True)] if rows < len(jobs) else [])]


def _elsewhere(job: dict[str, Any]) -> bool:
    return (job.get("where") or {}).get("id") is not None


def _details(job: dict[str, Any], facts: dict[str, Any], size: Size) -> list[str]:
    progress, lines = job["progress"], []
    total, step = progress.get("total_steps") or 0, progress.get("step") or 0
    if total:
        at = f" {step / total:4.0%}"
        if 0 < (left := progress.get("seconds_left") or 0) < _YEAR:
            at += f", done at {datetime.fromtimestamp(time.time() + left).astimezone():%H:%M}"
        lines.append(
            "  "
            + cut(bar(step / total, min(40, size.columns // 2), plain=size.plain) + at, size, room=size.columns - 2)
        )
    curves = facts["curves"].get(job["id"])
    if curves and curves.train_loss:
        first, last = curves.train_loss[0][1], curves.train_loss[-1][1]
        rest = f"  held out {curves.valid_loss[-1][1]:.4f}" if curves.valid_loss else ""
        room = max(4, min(40, size.columns - 30 - len(rest)))
        line = f"loss {first:.4f} {sparkline(curves.train_loss, room, plain=size.plain)} {last:.4f}{rest}"
        lines.append("  " + cut(line, size, room=size.columns - 2))
    if curves and curves.learning_rate:
        rung = job["rung"]
        told = f"learning rate {curves.learning_rate[-1][1]:.2e}, {_rows(rung)} at once"
        norm = progress.get("grad_norm")
        told += f", gradient norm {norm:.3g}" if norm is not None else ""
        lines.append("  " + cut(told, size, room=size.columns - 2))
    return lines


def _rows(rung: dict[str, Any]) -> str:
    return counted(rung["batch_size"], "row") if "batch_size" in rung else "? rows"


def _gpus(gpus: Sequence[dict[str, Any]], size: Size) -> list[str]:
    """Give a line a GPU, or where that would take much of the terminal, several GPUs a line."""
    if not size.lines or len(gpus) <= max(2, size.lines // 6):
        return [_gpu(gpu, size) for gpu in gpus]
    across = max(1, (size.columns - 2) // _CELL)
    cells = [_filled(cut(_short(gpu), size, room=_CELL - 2), _CELL) for gpu in gpus]
    lines = ["".join(cells[start : start + across]) for start in range(0, len(cells), across)]
    return ["  " + cut(line.rstrip(), size, room=size.columns - 2) for line in lines]


def _gpu(sample: dict[str, Any], size: Size) -> str:
    parts = [f"GPU {sample.get('index', '?')}"]
    if why := _idle(sample):
        return "  " + cut(f"{parts[0]} {why}", size, room=size.columns - 2)
    width = 10
    if sample.get("utilization") is not None:
        parts.append(f"{bar(sample['utilization'] / 100, width, plain=size.plain)} {sample['utilization']:3d}%")
    used, total = sample.get("memory_used"), sample.get("memory_total")
    if used is not None and total:
        parts.append(f"memory {bar(used / total, width, plain=size.plain)} {used / _GIB:.1f} of {total / _GIB:.0f} GiB")
    if sample.get("temperature") is not None:
        parts.append(f"{sample['temperature']} C")
    if sample.get("power") is not None:
        parts.append(f"{sample['power']:.0f} W")
    parts += sample.get("throttle_reasons") or []
    return "  " + cut("  ".join(parts), size, room=size.columns - 2)


def _idle(gpu: dict[str, Any]) -> str:
    """Say why nothing is done on a GPU; nothing where a job is at work on it."""
    if gpu["jobs"]:
        return ""
    return str({"usable": "is free", "set_aside": "is set aside"}.get(gpu["state"], gpu["why"]))


def _short(gpu: dict[str, Any]) -> str:
    name = f"GPU {gpu.get('index', '?')}"
    if _idle(gpu):
        return f"{name} {_STATES.get(gpu['state'], gpu['state'])}"
    used, total = gpu.get("memory_used"), gpu.get("memory_total")
    percent = f" {gpu['utilization']:3d}%" if gpu.get("utilization") is not None else ""
    return f"{name}{percent}" + (f" {used / _GIB:.0f}/{total / _GIB:.0f} GiB" if used is not None and total else "")


def _queue(facts: dict[str, Any], size: Size, *, chosen: str, room: int) -> list[str]:
    queue = facts["queue"]
    lines = ["", click.style(cut(f"queue: {len(queue):,} waiting" if queue else "queue: empty", size), bold=True)]
    rows = max(1, room - len(lines))
    place = next((n for n, job in enumerate(queue) if job["id"] == chosen), 0)
    start = max(0, min(place - rows // 2, len(queue) - rows))
    for job in queue[start : start + rows]:
        waits = why_waiting(job["progress"])
        text = job["id"] + (f" ({job['profile']})" if job["profile"] else "") + (f": {waits}" if waits else "")
        lines.append(_marked(cut(text, size, room=size.columns - 2), job["id"] == chosen))
    return lines


def _to_retry(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the jobs among the last results that may be tried again, the newest of them."""
    return [job for job in facts["finished"] if job["outcome"] in _RETRIED][:_MOST_FAILED]


def _failed(facts: dict[str, Any], size: Size, *, chosen: str) -> list[str]:
    lines = []
    for job in _to_retry(facts):
        text = f"{job['outcome']} {job['id']}: {(job.get('reason') or {}).get('what', '')}".removesuffix(": ")
        lines.append(_marked(cut(text, size, room=size.columns - 2), job["id"] == chosen))
    return ["", *lines] if lines else []


def _answers(facts: dict[str, Any], size: Size) -> list[str]:
    answers = facts["predictions"]
    if not answers:
        return []
    exact = sum(bool(one["exact"]) for one in answers)
    title = f"answers after step {answers[0]['step']}: {exact} of {len(answers)} exact"
    lines = ["", click.style(cut(title, size), bold=True)]
    asked = size.columns // 2 - 4
    for one in answers[:_MOST_ANSWERS]:
        said = f"({one['error']})" if one["error"] else one["answer"]
        prompt = cut(_flat(one["prompt"]), size, room=asked)
        answer = cut(_flat(said), size, room=size.columns - 4 - asked)
        lines.append(f"  {_filled(prompt, asked)}  " + click.style(answer, fg="green" if one["exact"] else None))
    return lines


def _marked(text: str, chosen: bool) -> str:  # noqa: FBT001
    return click.style(f"> {text}", bold=True) if chosen else f"  {text}"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _filled(text: str, width: int) -> str:
    taken = sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return text + " " * (width - taken)


def choices(facts: dict[str, Any]) -> Sequence[str]:
    """Give the jobs that can be chosen, from the top of the frame to its end."""
    return [job["id"] for job in (*facts["running"], *facts["queue"], *_to_retry(facts))]
