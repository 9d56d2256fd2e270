"""The ledger's tables, as steps that bring its file from one version to the next: `PRAGMA user_version` counts them. A
step that has been released never changes; what is new is a step more.
"""

from __future__ import annotations

_TABLES = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    name BLOB NOT NULL,
    profile TEXT NOT NULL,
    device INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    settings TEXT NOT NULL,
    rung TEXT NOT NULL,
    outcome TEXT,
    sha256 TEXT,
    attempt INTEGER NOT NULL,
    retries INTEGER NOT NULL,
    interruptions INTEGER NOT NULL,
    boot_id TEXT,
    trainer_pid INTEGER,
    not_before REAL NOT NULL,
    events_offset INTEGER NOT NULL,
    adapter TEXT,
    duplicate_of TEXT,
    reason TEXT,
    progress TEXT NOT NULL,
    started_at REAL,
    finished_at REAL
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, created_at);
CREATE INDEX jobs_by_end ON jobs (finished_at);
CREATE INDEX jobs_by_content ON jobs (sha256);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    created_at REAL NOT NULL,
    level TEXT NOT NULL,
    type TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_job ON events (job_id, id);
CREATE TABLE gpu_samples (
    id INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    created_at REAL NOT NULL,
    uuid TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT;
CREATE INDEX gpu_samples_by_job ON gpu_samples (job_id, created_at);
"""

_ORDERS = """
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN place REAL NOT NULL DEFAULT 0;
CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    created_at REAL NOT NULL,
    verb TEXT NOT NULL,
    job_id TEXT NOT NULL
) STRICT;
"""
_HELD_OUT = """
ALTER TABLE jobs ADD COLUMN held_out BLOB;
ALTER TABLE jobs ADD COLUMN held_out_sha256 TEXT;
"""
_PREDICTIONS = """
CREATE TABLE training_predictions (
    id INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    created_at REAL NOT NULL,
    step INTEGER NOT NULL,
    epoch REAL,
    sample INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    expected TEXT NOT NULL,
    answer TEXT NOT NULL,
    exact INTEGER NOT NULL,
    similarity REAL,
    seconds REAL,
    error TEXT
) STRICT;
CREATE UNIQUE INDEX predictions_by_job ON training_predictions (job_id, step, sample);
"""
# Whatever the list of all jobs is filtered and sorted by: the index alone answers, however many jobs there are.
_HISTORY = """
CREATE INDEX jobs_in_history ON jobs (created_at, state, outcome, name, profile, id, started_at, finished_at);
"""
_BEFORE = """
ALTER TABLE orders ADD COLUMN before TEXT NOT NULL DEFAULT '';
"""
# Jobs that ended and whose end `on_finish` is still to tell. A number is never given twice: a job may end again.
_NEWS = """
CREATE TABLE news (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE REFERENCES jobs (id) ON DELETE CASCADE,
    tries INTEGER NOT NULL DEFAULT 0
) STRICT;
"""
_TRAINER_ID = """
ALTER TABLE jobs ADD COLUMN trainer_id TEXT NOT NULL DEFAULT '';
"""
MIGRATIONS = [_TABLES, _ORDERS, _HELD_OUT, _PREDICTIONS, _HISTORY, _BEFORE, _NEWS, _TRAINER_ID]
