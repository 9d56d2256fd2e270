"""The crash-loop guard: attempts that died with the daemon or the machine, over all jobs.

When they were is kept in a file, which outlives the daemon, the machine and a lost ledger.
"""

from __future__ import annotations

import json

from finetuned.durable import write_file
from finetuned.guard import why_paused
from finetuned.home import Home
from finetuned.spool.orders import pause

WINDOW = 1800.0  # seconds


def crashes(home: Home, now: float) -> list[tuple[float, str]]:
    """Give those of the last half hour: (time, job's id), oldest first."""
    try:
        known = [(float(at), str(job_id)) for at, job_id in json.loads(home.crashes.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []
    return [(at, job_id) for at, job_id in known if abs(now - at) < WINDOW]


def note_crash(home: Home, job_id: str, now: float) -> None:
    """Remember that an attempt at this job died with the daemon or the machine."""
    write_file(home.crashes, json.dumps([*crashes(home, now), (now, job_id)]).encode() + b"\n")


def pause_if_too_many(home: Home, most: int, now: float) -> str | None:
    """Pause the queue after `most` crashes within half an hour, and say why; 0 switches that off."""
    known = crashes(home, now)
    if not 0 < most <= len(known) or why_paused(home) is not None:
        return None
    why = (
        f"{len(known)} attempts died with the daemon or the machine within {WINDOW / 60:.0f} minutes, the last one at "
        f"{known[-1][1]}; look into its log and the machine's for the cause (memory, power, a GPU)"
    )
    pause(home, why)
    return why
