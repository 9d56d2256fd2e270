"""The ledger as a reader opens it, and in it the job that a user names."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from finetuned.errors import HomeError
from finetuned.home import Home
from finetuned.jobs import Job
from finetuned.ledger import Ledger


@contextmanager
def ledger_if_any(home: Home) -> Iterator[Ledger | None]:
    """Open the ledger for a while; None where no daemon has made one yet. Raises HomeError if it is damaged."""
    ledger = None
    try:
        with suppress(sqlite3.OperationalError):  # there is none, or its tables are being made at this moment
            ledger = Ledger.open_to_read(home.ledger)
    except sqlite3.DatabaseError as error:
        raise damaged(home, error) from error
    try:
        yield ledger
    finally:
        if ledger is not None:
            ledger.close()


@contextmanager
def ledger_to_read(home: Home) -> Iterator[Ledger]:
    """Open the ledger for a while. Raises HomeError if there is none yet, or it is damaged."""
    with ledger_if_any(home) as ledger:
        if ledger is None:
            raise HomeError(
                "there are no jobs here yet", where=str(home.root), remedy="`finetuned run` makes the ledger."
            )
        yield ledger


def damaged(home: Home, error: sqlite3.DatabaseError) -> HomeError:
    """Give what to tell a user whose ledger cannot be read."""
    return HomeError(
        f"the ledger is damaged: {error}",
        where=str(home.ledger),
        remedy="The daemon puts it aside when it starts, and makes a new one from the folders: `finetuned run`.",
    )


def job_named(ledger: Ledger, name: str) -> Job:
    """Give the newest job whose id is `name` or begins so. Raises HomeError if there is none."""
    found = ledger.named(name)
    if not found:
        raise HomeError(f"there is no job {name}", remedy="`finetuned status` shows the jobs.")
    return found[0]
