"""The ledger as a reader opens it, and in it the job that a user names."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from finetuned.errors import HomeError
from finetuned.home import Home
from finetuned.jobs import Job
from finetuned.ledger import Ledger


@contextmanager
def ledger_to_read(home: Home) -> Iterator[Ledger]:
    """Open the ledger for a while. Raises HomeError if there is none yet."""
    try:
        ledger = Ledger.open_to_read(home.ledger)
    except sqlite3.OperationalError as error:
        raise HomeError(
            "there are no jobs here yet", where=str(home.root), remedy="`finetuned run` makes the ledger."
        ) from error
    try:
        yield ledger
    finally:
        ledger.close()


def job_named(ledger: Ledger, name: str) -> Job:
    """Give the newest job whose id is `name` or begins so. Raises HomeError if there is none."""
    found = ledger.named(name)
    if not found:
        raise HomeError(f"there is no job {name}", remedy="`finetuned status` shows the jobs.")
    return found[0]
