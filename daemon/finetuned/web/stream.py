"""Server-Sent Events: what a job's trainer says, and the situation whenever it changes.

The number of an event is its row's in the ledger, so a browser that comes back with Last-Event-ID gets exactly what it
missed. All streams read through one connection, in the event loop: the reads are small, and fifty pages cost one cache.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from finetuned.home import Home
from finetuned.jobs import State
from finetuned.ledger import Ledger
from finetuned.web.reading import look
from finetuned.web.records import event_record
from finetuned.web.replies import Refused, as_json, job_of, number

_EVERY = 0.5  # seconds between two looks
_QUIET = 15.0  # seconds, after which a sign of life is sent
_AT_ONCE = 500  # events
_ALL = 10**12  # events; more than any job says


class Streams:
    """What the open streams share."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._ledger: Ledger | None = None
        self._inode = 0
        self._situation = b"{}"
        self._look_again = 0.0
        self._looking = asyncio.Lock()

    def ledger(self) -> Ledger | None:
        """Give the one connection; a new one when the daemon has put a new ledger in the old one's place."""
        try:
            inode = self._home.ledger.stat().st_ino
            if self._ledger is None or inode != self._inode:
                self.close()
                self._ledger, self._inode = Ledger.open_to_read(self._home.ledger), inode
        except (OSError, sqlite3.DatabaseError):
            self.close()
        return self._ledger

    async def situation(self) -> bytes:
        """Give what the page Now shows, as JSON; made in a thread, once for all who ask at about that time."""
        async with self._looking:
            if time.monotonic() >= self._look_again:
                began = time.monotonic()
                self._situation = await asyncio.to_thread(self._look)
                took = time.monotonic() - began  # an inbox of a hundred thousand files is looked at less often
                self._look_again = began + max(0.9 * _EVERY, 10 * took)
        return self._situation

    def _look(self) -> bytes:
        return as_json(look(self._home))

    def close(self) -> None:
        """Close the connection."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


def _streams(request: Request) -> Streams:
    streams: Streams = request.app.state.streams
    return streams


def _stream(content: AsyncIterator[bytes]) -> Response:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(content, media_type="text/event-stream", headers=headers)


def message(kind: str, data: bytes, number: int | None = None) -> bytes:
    """Give one message of a stream. JSON holds no raw line break, so one data line is enough."""
    named = b"" if number is None else b"id: %d\n" % number
    return b"%bevent: %b\ndata: %b\n\n" % (named, kind.encode(), data)


async def job_events(request: Request) -> Response:
    """Stream what a job's trainer says, behind Last-Event-ID, or `after`, or from the `last` so many on."""
    streams = _streams(request)
    ledger = streams.ledger()
    job = job_of(request, ledger)
    assert ledger is not None  # job_of has refused
    last_id = request.headers.get("last-event-id", request.query_params.get("after"))
    if last_id is None:
        seen = ledger.number_before(job.id, number(request, "last", _ALL, low=0, high=_ALL))
    elif re.fullmatch(r"[0-9]{1,18}", last_id):
        seen = int(last_id)
    else:
        raise Refused(400, "Last-Event-ID is a number")
    return _stream(_events(streams, job.id, seen))


async def _events(streams: Streams, job_id: str, seen: int) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    spoken = time.monotonic()
    while True:
        try:
            if (ledger := streams.ledger()) is None:
                return  # without a word of an end: who listens comes back, and perhaps the ledger
            # The state first: what is said after it was read is said in the next round.
            ended = ledger.job(job_id).state is State.FINISHED
            found = ledger.events_after(job_id, seen, limit=_AT_ONCE)
        except (KeyError, sqlite3.DatabaseError):
            return
        for number_of_it, event in found:
            seen = number_of_it
            yield message("event", as_json(event_record(seen, event)), seen)
        if ended and not found:
            yield message("end", b"{}")
            return
        if found:
            spoken = time.monotonic()
        elif time.monotonic() - spoken > _QUIET:
            spoken = time.monotonic()
            yield b": here\n\n"
        await asyncio.sleep(_EVERY if len(found) < _AT_ONCE else 0)


async def now_events(request: Request) -> Response:
    """Stream the situation: at once, and whenever it has changed."""
    return _stream(_situations(_streams(request)))


async def _situations(streams: Streams) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    told, spoken = b"", time.monotonic()
    while True:
        said = await streams.situation()
        if said != told:
            yield message("now", said)
            told, spoken = said, time.monotonic()
        elif time.monotonic() - spoken > _QUIET:
            spoken = time.monotonic()
            yield b": here\n\n"
        await asyncio.sleep(_EVERY)
