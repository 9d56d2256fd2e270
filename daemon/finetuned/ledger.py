"""The ledger: what finetuned knows of its jobs, in SQLite. The only file that asks it anything.

The daemon is its only writer, but for the orders of users, which the control verbs add. Times are seconds since 1970.
`synchronous=FULL` is part of the spool protocol: with NORMAL a power loss can take back a commit that the folders
already rely on.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import orjson

from finetuned.durable import FILE_MODE
from finetuned.errors import encodable
from finetuned.events import Event, EventType
from finetuned.jobs import FileIdentity, Job, Outcome, State, check_transition
from finetuned.ledger_tables import MIGRATIONS

_JSON_COLUMNS = frozenset({"settings", "rung", "reason", "progress"})
_DAY = 86400.0

_LAST_CHARACTER = "\U0010ffff"
_IN_TURN = "ORDER BY priority DESC, place, created_at, rowid"
_SORTS = {
    "created_at": "created_at",
    "finished_at": "finished_at",
    "seconds": "finished_at - started_at",
    "name": "name",
    "profile": "profile",
    "status": "coalesce(outcome, state)",
}
SORTS = tuple(_SORTS)  # what a page of jobs can be sorted by


class Ledger:
    """One connection to the ledger. Use it from one thread."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._database.row_factory = sqlite3.Row

    @classmethod
    def open(cls, path: Path, *, check: bool = True) -> Self:
        """Open for writing, making or upgrading the file. Raises sqlite3.DatabaseError if it is damaged.

        Without `check` only the worst damage is found, but the file is not read as a whole.
        """
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
        database = sqlite3.connect(path, isolation_level=None)
        for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            database.execute(f"PRAGMA {pragma}")
        verdict = database.execute("PRAGMA quick_check(1)").fetchone()[0] if check else "ok"
        if verdict != "ok":
            database.close()
            raise sqlite3.DatabaseError(verdict)
        ledger = cls(database)
        with ledger._transaction():  # a user's order may open the file in the same moment as the daemon
            done = database.execute("PRAGMA user_version").fetchone()[0]
            for migration in MIGRATIONS[done:]:
                for statement in migration.split(";\n"):
                    database.execute(statement)
            if done < len(MIGRATIONS):
                database.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
        return ledger

    @classmethod
    def open_to_read(cls, path: Path) -> Self:
        """Open a ledger that somebody else writes. Raises sqlite3.OperationalError if there is none, or none yet."""
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        database.execute("PRAGMA busy_timeout=5000")
        if database.execute("PRAGMA user_version").fetchone()[0] < len(MIGRATIONS):
            database.close()
            raise sqlite3.OperationalError("the daemon is making its tables at this moment")
        return cls(database)

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    def prove_writable(self) -> None:
        """Commit what is there already. Raises sqlite3.Error if the file takes no writes."""
        with self._transaction():
            self._database.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._database.in_transaction:  # SQLite has taken it back itself where the disk was full
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def add(self, job: Job) -> None:
        """Commit a new job. Raises sqlite3.IntegrityError if its id is taken."""
        row = _row(job)
        marks = ", ".join("?" * len(row))
        self._database.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", list(row.values()))

    def add_all(self, jobs: Iterable[Job]) -> None:
        """Commit new jobs, all or none of them."""
        with self._transaction():
            for job in jobs:
                self.add(job)

    def drop(self, job_id: str) -> None:
        """Forget a job whose file never left the inbox."""
        self._database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def update(self, job_id: str, **changes: Any) -> Job:
        """Commit changes to a job and return it as it now is. A change of state must be a legal one."""
        with self._transaction():
            self._change(job_id, changes)
        return self.job(job_id)

    def _change(self, job_id: str, changes: dict[str, Any]) -> None:
        if not changes:
            return
        if "state" in changes:
            before = self.job(job_id).state
            check_transition(before, changes["state"])
            if before is not changes["state"]:
                self._note_end(job_id, ended=changes["state"] is State.FINISHED)
        settings = ", ".join(f"{name} = ?" for name in changes)
        values = [_stored(name, value) for name, value in changes.items()]
        self._database.execute(f"UPDATE jobs SET {settings} WHERE id = ?", [*values, job_id])

    def _note_end(self, job_id: str, *, ended: bool) -> None:
        self._database.execute("DELETE FROM news WHERE job_id = ?", (job_id,))
        if ended:
            self._database.execute("INSERT INTO news (job_id) VALUES (?)", (job_id,))

    def next_news(self) -> tuple[int, int, Job] | None:
        """Give the job that ended first among those whose end is not told: the news' number, how often telling it was
        begun, and the job.
        """
        row = self._database.execute("SELECT * FROM news ORDER BY id LIMIT 1").fetchone()
        return (row["id"], row["tries"], self.job(row["job_id"])) if row else None

    def begin_to_tell(self, number: int) -> None:
        """Commit that telling a piece of news begins."""
        self._database.execute("UPDATE news SET tries = tries + 1 WHERE id = ?", (number,))

    def drop_news(self, number: int | None = None) -> None:
        """Forget a piece of news that is told, or all of them."""
        self._database.execute("DELETE FROM news WHERE ? IS NULL OR id = ?", (number, number))

    def record(self, job_id: str, events: Sequence[Event], *, offset: int, **changes: Any) -> Job:
        """Commit what the trainer said, how far it was read, and what changed by it, all or nothing."""
        with self._transaction():
            self._database.executemany(
                "INSERT INTO events (job_id, created_at, level, type, message, data) VALUES (?, ?, ?, ?, ?, ?)",
                [(job_id, e.created_at, e.level, e.type, encodable(e.message), _data(e)) for e in events],
            )
            for event in events:
                if event.type is EventType.PREDICTIONS:
                    self._record_predictions(job_id, event)
            self._change(job_id, {"events_offset": offset, **changes})
        return self.job(job_id)

    def _record_predictions(self, job_id: str, event: Event) -> None:
        """Note each answer. Those of later steps go: a trainer that went back to a checkpoint has left them behind."""
        self._database.execute(
            "DELETE FROM training_predictions WHERE job_id = ? AND step >= ?", (job_id, event.data["step"])
        )
        for number, sample in enumerate(event.data["samples"]):
            row = {
                "job_id": job_id,
                "created_at": event.created_at,
                "step": event.data["step"],
                "epoch": event.data.get("epoch"),
                "sample": number,
                **{name: encodable(str(sample[name])) for name in ("prompt", "expected", "answer")},
                **{name: sample.get(name) for name in ("exact", "similarity", "seconds")},
                "error": sample.get("error") and encodable(sample["error"]),
            }
            marks = ", ".join("?" * len(row))
            self._database.execute(
                f"INSERT INTO training_predictions ({', '.join(row)}) VALUES ({marks})", list(row.values())
            )

    def predictions(self, job_id: str) -> list[dict[str, Any]]:
        """Give what a job's model answered while it learned, by steps and then by questions."""
        rows = self._database.execute(
            "SELECT * FROM training_predictions WHERE job_id = ? ORDER BY step, sample", (job_id,)
        )
        return [{name: row[name] for name in row.keys() if name != "id"} for row in rows]  # noqa: SIM118

    def newest_predictions(self, job_id: str) -> list[dict[str, Any]]:
        """Give what a job's model answered last, by questions."""
        rows = self._database.execute(
            "SELECT * FROM training_predictions WHERE job_id = :job AND step ="
            " (SELECT max(step) FROM training_predictions WHERE job_id = :job) ORDER BY sample",
            {"job": job_id},
        )
        return [{name: row[name] for name in row.keys() if name != "id"} for row in rows]  # noqa: SIM118

    def record_gpu(self, job_id: str, samples: Iterable[tuple[float, str, dict[str, Any]]]) -> None:
        """Commit GPU samples taken while a job ran: (time, uuid, fields)."""
        with self._transaction():
            self._database.executemany(
                "INSERT INTO gpu_samples (job_id, created_at, uuid, data) VALUES (?, ?, ?, ?)",
                [(job_id, at, uuid, json.dumps(data)) for at, uuid, data in samples],
            )

    def job(self, job_id: str) -> Job:
        """Give one job. Raises KeyError if there is none of that id."""
        row = self._database.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise KeyError(job_id)
        return _job(row)

    def jobs(self, *states: State) -> list[Job]:
        """Give all jobs in these states, oldest first."""
        marks = ", ".join("?" * len(states))
        rows = self._database.execute(
            f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY created_at, rowid", [str(s) for s in states]
        )
        return [_job(row) for row in rows]

    def is_empty(self) -> bool:
        """Whether it knows no job at all."""
        return self._database.execute("SELECT 1 FROM jobs LIMIT 1").fetchone() is None

    def unfinished(self) -> bool:
        """Whether any job is left to do."""
        states = [str(state) for state in State if state is not State.FINISHED]
        marks = ", ".join("?" * len(states))
        return self._database.execute(f"SELECT 1 FROM jobs WHERE state IN ({marks})", states).fetchone() is not None

    def may_start(self, now: float, *, limit: int, launcher: str | None = None) -> list[Job]:
        """Give the first so many jobs of the queue among those that may start now, or of those for one launcher."""
        only = "AND coalesce(json_extract(settings, '$.launcher'), 'local') = ?" if launcher else ""
        rows = self._database.execute(
            f"SELECT * FROM jobs WHERE state = ? AND not_before <= ? {only} {_IN_TURN} LIMIT ?",
            (State.QUEUED, now, *([launcher] if launcher else []), limit),
        )
        return [_job(row) for row in rows]

    def queue(self, limit: int = -1) -> list[Job]:
        """Give the jobs that wait, or the first of them, in the order in which they start."""
        rows = self._database.execute(
            f"SELECT * FROM jobs WHERE state IN (?, ?) {_IN_TURN} LIMIT ?", (State.CLAIMING, State.QUEUED, limit)
        )
        return [_job(row) for row in rows]

    def page(
        self,
        *,
        states: Collection[State] = (),
        outcomes: Collection[Outcome] = (),
        text: str = "",
        sort: str = "created_at",
        descending: bool = True,
        limit: int,
        offset: int = 0,
    ) -> tuple[list[Job], int]:
        """Give so many of the jobs in these states, with these outcomes, with `text` in file name or id, and how many
        there are. None named: all of them. Raises KeyError for a sort that is none of `SORTS`.
        """
        wanted, values = ["1"], list[Any]()
        for column, chosen in (("state", states), ("outcome", outcomes)):
            if chosen:
                wanted.append(f"{column} IN ({', '.join('?' * len(chosen))})")
                values += map(str, chosen)
        if text:
            wanted.append("(instr(lower(CAST(name AS TEXT)), lower(?)) OR instr(id, ?))")
            values += [text, text]
        where, way = " AND ".join(wanted), "DESC" if descending else "ASC"
        count = self._database.execute(f"SELECT count(*) FROM jobs WHERE {where}", values).fetchone()[0]
        ids = [
            row["id"]
            for row in self._database.execute(
                f"SELECT id FROM jobs WHERE {where} ORDER BY {_SORTS[sort]} {way}, id LIMIT ? OFFSET ?",
                [*values, limit, offset],
            )
        ]
        rows = self._database.execute(f"SELECT * FROM jobs WHERE id IN ({', '.join('?' * len(ids))})", ids)
        jobs = {row["id"]: _job(row) for row in rows}
        return [jobs[one] for one in ids if one in jobs], count

    def counts(self) -> dict[tuple[State, Outcome | None], int]:
        """Give how many jobs are in each state, the finished ones by their outcome."""
        rows = self._database.execute("SELECT state, outcome, count(*) FROM jobs GROUP BY state, outcome")
        return {(State(state), Outcome(outcome) if outcome else None): count for state, outcome, count in rows}

    def named(self, name: str) -> list[Job]:
        """Give the jobs whose id is `name` or begins with it: the one of exactly that id alone, if there is one."""
        rows = self._database.execute(
            "SELECT * FROM jobs WHERE id >= ? AND id < ? ORDER BY id = ? DESC, created_at DESC LIMIT 10",
            (name, f"{name}{_LAST_CHARACTER}", name),
        ).fetchall()
        return [_job(row) for row in rows if row["id"] == name] or [_job(row) for row in rows]

    def order(self, verb: str, job_id: str, at: float, *, before: str = "") -> None:
        """Commit what a user wants done, and before which other job, where that is it."""
        row = (at, verb, job_id, before)
        self._database.execute("INSERT INTO orders (created_at, verb, job_id, before) VALUES (?, ?, ?, ?)", row)

    def orders(self) -> list[tuple[int, str, str, str]]:
        """Give what users want done and is not done yet, oldest first: (number, verb, job's id or nothing, id of that
        before which it is to come or nothing).
        """
        return [tuple(row) for row in self._database.execute("SELECT id, verb, job_id, before FROM orders ORDER BY id")]

    def drop_order(self, number: int) -> None:
        """Forget what is done."""
        self._database.execute("DELETE FROM orders WHERE id = ?", (number,))

    def last_finished(self, count: int) -> list[Job]:
        """Give the jobs that ended last, newest first."""
        rows = self._database.execute(
            "SELECT * FROM jobs WHERE finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT ?", (count,)
        )
        return [_job(row) for row in rows]

    def trained_before(
        self,
        sha256: str,
        settings: dict[str, Any],
        *,
        held_out_sha256: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        apart: Collection[str] = (),
    ) -> Job | None:
        """Give the newest job that succeeded on the same content, held-out data included, with the same settings.

        `defaults` stand for settings that did not exist when a job was done; those in `apart` may differ.
        """
        rows = self._database.execute(
            "SELECT * FROM jobs WHERE sha256 = ? AND held_out_sha256 IS ? AND outcome = ? AND duplicate_of IS NULL"
            " ORDER BY finished_at DESC",
            (sha256, held_out_sha256, Outcome.SUCCEEDED),
        )
        jobs = (_job(row) for row in rows)
        ours = {key: settings[key] for key in apart if key in settings}
        return next((job for job in jobs if {**(defaults or {}), **job.settings, **ours} == settings), None)

    def events(self, job_id: str, *kinds: EventType) -> list[Event]:
        """Give what was said of a job, or of these kinds only, in order."""
        some = f"AND type IN ({', '.join('?' * len(kinds))})" if kinds else ""
        rows = self._database.execute(f"SELECT * FROM events WHERE job_id = ? {some} ORDER BY id", (job_id, *kinds))
        return [_event(row) for row in rows]

    def newest_metrics(self, job_id: str, count: int) -> list[Event]:
        """Give the newest so many figures of a job, in order."""
        rows = self._database.execute(
            "SELECT * FROM events WHERE job_id = ? AND type = ? ORDER BY id DESC LIMIT ?",
            (job_id, EventType.METRICS, count),
        ).fetchall()
        return [_event(row) for row in reversed(rows)]

    def events_after(self, job_id: str, number: int, *, limit: int) -> list[tuple[int, Event]]:
        """Give the first so many of a job's events that came after the one of that number, each with its number."""
        rows = self._database.execute(
            "SELECT * FROM events WHERE job_id = ? AND id > ? ORDER BY id LIMIT ?", (job_id, number, limit)
        )
        return [(row["id"], _event(row)) for row in rows]

    def number_before(self, job_id: str, count: int) -> int:
        """Give the number of the event before a job's last so many; 0 if there are no more than these."""
        row = self._database.execute(
            "SELECT id FROM events WHERE job_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?", (job_id, count)
        ).fetchone()
        return row["id"] if row else 0

    def metrics(self, job_id: str, *, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give the figures of a job's steps and evaluations behind the event of a number, in order, with theirs."""
        for row in self._database.execute(
            "SELECT id, data FROM events WHERE job_id = ? AND id > ? AND type = 'metrics' ORDER BY id", (job_id, after)
        ):
            yield row["id"], _figures(row["data"])

    def last_sampled(self) -> str | None:
        """Give the job during which the GPUs were sampled last."""
        row = self._database.execute("SELECT job_id FROM gpu_samples ORDER BY id DESC LIMIT 1").fetchone()
        return row["job_id"] if row else None

    def gpu_samples(self, job_id: str, *, after: float = 0.0) -> Iterator[dict[str, Any]]:
        """Give a job's GPU samples that were taken after a time, oldest first."""
        for row in self._database.execute(
            "SELECT data FROM gpu_samples WHERE job_id = ? AND created_at > ? ORDER BY created_at, id", (job_id, after)
        ):
            yield _figures(row["data"])

    def newest_gpu_samples(self, job_id: str) -> list[dict[str, Any]]:
        """Give the newest sample of each GPU that a job has one of, by their numbers."""
        rows = self._database.execute(
            "SELECT data FROM gpu_samples WHERE job_id = ? ORDER BY created_at DESC, id DESC LIMIT 64", (job_id,)
        )
        newest: dict[str, dict[str, Any]] = {}
        for sample in map(json.loads, (row["data"] for row in rows)):
            newest.setdefault(sample["uuid"], sample)
        return sorted(newest.values(), key=lambda sample: sample.get("index") or 0)

    def thin(self, now: float) -> None:
        """Keep figures of steps and GPUs for a day, then one a minute, after a month one an hour. Evaluations stay."""
        for older, span in ((now - _DAY, 60), (now - 30 * _DAY, 3600)):
            with self._transaction():
                self._database.execute(
                    "DELETE FROM gpu_samples WHERE created_at < :older AND id NOT IN (SELECT min(id) FROM gpu_samples"
                    " WHERE created_at < :older GROUP BY job_id, uuid, CAST(created_at / :span AS INTEGER))",
                    {"older": older, "span": span},
                )
                metrics = "created_at < :older AND type = 'metrics' AND data NOT LIKE '%\"valid_loss\"%'"
                self._database.execute(
                    f"DELETE FROM events WHERE {metrics} AND id NOT IN (SELECT max(id) FROM events"
                    f" WHERE {metrics} GROUP BY job_id, CAST(created_at / :span AS INTEGER))",
                    {"older": older, "span": span},
                )


def _event(row: sqlite3.Row) -> Event:
    return Event(row["created_at"], EventType(row["type"]), row["message"], row["level"], json.loads(row["data"]))


def _figures(data: str) -> dict[str, Any]:
    try:
        figures = orjson.loads(data)
    except ValueError:  # it holds NaN, which only Python's own reader takes
        figures = json.loads(data)
    return dict(figures)


def _stored(name: str, value: Any) -> Any:
    if name in _JSON_COLUMNS:
        return None if value is None else encodable(json.dumps(value, sort_keys=True, ensure_ascii=False))
    return value


def _data(event: Event) -> str:
    return json.dumps(dict(event.data), default=str)


def _row(job: Job) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in fields(job):
        value = getattr(job, column.name)
        if isinstance(value, FileIdentity):
            row |= {part.name: _signed(getattr(value, part.name)) for part in fields(value)}
        else:
            row[column.name] = _stored(column.name, value)
    return row


def _signed(number: int) -> int:
    """Give a number of 64 bits as SQLite takes it; some network file systems count inodes from the top."""
    return number - 2**64 if number >= 2**63 else number


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    device, inode = (values.pop(name) % 2**64 for name in ("device", "inode"))
    identity = FileIdentity(device, inode, values.pop("size"), values.pop("mtime_ns"))
    for name in _JSON_COLUMNS:
        values[name] = json.loads(values[name]) if values[name] is not None else None
    values["state"] = State(values["state"])
    values["outcome"] = Outcome(values["outcome"]) if values["outcome"] else None
    return Job(identity=identity, **values)
