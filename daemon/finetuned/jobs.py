"""A job: what it is, where it is, how it ended, and which step may follow which. Pure, standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a job is in the spool protocol (docs/protocol.md). The ledger stores this."""

    CLAIMING = "claiming"  # the file is on its way from inbox/ into the job's folder
    QUEUED = "queued"
    RUNNING = "running"
    TRAINED = "trained"  # the adapter is published, the input not yet archived
    FAILING = "failing"  # the reason is known, the input not yet in archive/failed/
    FINISHED = "finished"


class Status(StrEnum):
    """Where a job is, in the user's words."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


class Outcome(StrEnum):
    """How a job ended. An interruption is not an end: such a job is queued again."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FOLLOWS: dict[State, frozenset[State]] = {
    State.CLAIMING: frozenset({State.QUEUED, State.TRAINED, State.FAILING}),  # trained: a duplicate, nothing to do
    State.QUEUED: frozenset({State.RUNNING, State.TRAINED, State.FAILING}),  # trained: by another job meanwhile
    State.RUNNING: frozenset({State.QUEUED, State.TRAINED, State.FAILING}),
    State.TRAINED: frozenset({State.FINISHED}),
    State.FAILING: frozenset({State.FINISHED}),
    State.FINISHED: frozenset({State.CLAIMING}),  # the user wants it tried again
}

_STATUS = {
    State.CLAIMING: Status.QUEUED,
    State.QUEUED: Status.QUEUED,
    State.RUNNING: Status.RUNNING,
    State.TRAINED: Status.RUNNING,
    State.FAILING: Status.RUNNING,
    State.FINISHED: Status.FINISHED,
}


@dataclass(frozen=True)
class FileIdentity:
    """What tells one file from another, and from itself after a change. Times in nanoseconds, size in bytes."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Job:
    """One row of the ledger."""

    id: str
    name: bytes  # the file's name as it was in inbox/; file names are bytes
    profile: str  # the sub-folder of inbox/ it came from; empty for inbox/ itself
    identity: FileIdentity
    state: State
    created_at: float  # seconds since 1970, like every time here
    priority: int = 0  # higher ones start first
    place: float = 0.0  # among those of one priority: lower ones first, then the older
    settings: dict[str, Any] = field(default_factory=dict)
    rung: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None
    sha256: str | None = None
    held_out: bytes | None = None  # the name of the held-out file that was dropped beside it
    held_out_sha256: str | None = None
    attempt: int = 0
    retries: int = 0  # after transient ends
    interruptions: int = 0  # of attempts that died with the daemon or the machine; counted apart from failures
    boot_id: str | None = None
    trainer_pid: int | None = None
    trainer_id: str = ""  # what an engine on other machines calls the trainer
    not_before: float = 0.0  # do not start again earlier than this
    events_offset: int = 0  # bytes of events.jsonl that are in the ledger already
    adapter: str | None = None  # the name of the folder in adapters/
    duplicate_of: str | None = None  # the job that trained the same files with the same settings
    reason: dict[str, str] | None = None  # why it failed: code, what, where, remedy
    progress: dict[str, Any] = field(default_factory=dict)  # the newest figures of every kind
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def status(self) -> Status:
        """Give the job's place in the user's words."""
        return _STATUS[self.state]

    @property
    def launcher(self) -> str:
        """Name what starts its trainer: `local`, or an engine on other machines."""
        return str(self.settings.get("launcher", "local"))


@dataclass(frozen=True)
class JobSpec:
    """The content of job.json: all that a trainer needs to know, wherever it runs. Paths in it are relative to the
    job's folder unless they start with a slash."""

    id: str
    name: str  # of the input as it was dropped; bytes that are no UTF-8 as surrogates
    profile: str
    identity: FileIdentity
    created_at: float
    input: str
    settings: dict[str, Any]
    rung: dict[str, Any]
    override_inode: int | None = None  # of x.config.json, so that recovery takes that file and no newer one
    sha256: str | None = None
    held_out: str | None = None  # the held-out file that was dropped beside the input
    held_out_name: str | None = None  # as it was dropped
    held_out_identity: FileIdentity | None = None  # as it was in inbox/, for the same reason as the override's
    held_out_sha256: str | None = None
    reason: dict[str, str] | None = None  # why it cannot be trained, where its settings are broken
    attempt: int = 0
    priority: int = 0
    place: float = 0.0
    base_dir: str = ""
    models: str = ""
    processes: int = 1  # that train it together, each on a GPU of its own where there are any
    sharded: bool = False  # whether they share the model's layers too, and none holds all of it

    def encode(self) -> bytes:
        """Give the file's content."""
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> JobSpec:
        """Read the file's content. Raises ValueError or TypeError if it is no job."""
        fields = json.loads(content)
        fields["identity"] = FileIdentity(**fields["identity"])
        if held_out := fields.get("held_out_identity"):
            fields["held_out_identity"] = FileIdentity(**held_out)
        return cls(**fields)


def check_transition(old: State, new: State) -> None:
    """Raise ValueError if `new` may not follow `old`."""
    if new is not old and new not in FOLLOWS[old]:
        raise ValueError(f"a job cannot go from {old} to {new}")
