"""Whether the daemon may tell systemd's watchdog that it works. Pure: what the loop sees of itself comes in, the reason
against it comes out.

A loop that turns is not yet a daemon that works: it may have lost its watcher, never come to the inbox, or be unable to
note anything. A restart mends all of these, so they keep the sign of life back. It does not mend a full disk.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from finetuned.durable import NO_ROOM

_NO_ROOM_SQLITE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY})
_LOOKS_MISSED = 3
_PATIENCE = 60.0  # seconds; a storm of files, or a large adapter on its way to the disk, holds the loop for a while


@dataclass(frozen=True)
class Signs:
    """What the main loop sees of itself. Times in seconds."""

    watching: bool  # the inbox watch's threads live
    since_look: float  # time since the inbox was last listed
    look_every: float  # rescan_seconds
    unwritten: Exception | None = None  # why the ledger did not take a write
    waits_for: Exception | str | None = None  # what the queue is held by


def trouble(signs: Signs) -> str | None:
    """Say why the daemon does not work, None if it does."""
    if any(no_room(error) for error in (signs.waits_for, signs.unwritten)):
        return None  # it goes on by itself once there is room; a restart would only end the trainer that runs
    if signs.unwritten:
        return f"the ledger takes no writes: {signs.unwritten}"
    if not signs.watching:
        return "a thread that watches the inbox has ended"
    if signs.since_look > max(_LOOKS_MISSED * signs.look_every, _PATIENCE):
        return f"the inbox was not looked into for {signs.since_look:.0f} s"
    return None


def no_room(error: Exception | str | None) -> bool:
    """Whether a disk that is full or read-only is behind an error."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _NO_ROOM_SQLITE
    return isinstance(error, OSError) and error.errno in NO_ROOM
