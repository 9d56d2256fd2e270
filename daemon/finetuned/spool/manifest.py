"""finetuned.json: the last file that a trainer writes into an adapter. Its presence means whole, its `job_id` whose."""

from __future__ import annotations

import json
from pathlib import Path

MANIFEST = "finetuned.json"


def belongs_to(folder: Path, job_id: str) -> bool:
    """Whether the folder is the finished adapter of this job."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("job_id") == job_id
