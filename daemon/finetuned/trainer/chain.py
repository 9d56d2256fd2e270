"""The adapter that a job builds on: which one it is, whether it fits, and what it was built from in turn. No torch.

It is settled once, by the job's first attempt, when the job's turn has come: of two files dropped together the second
builds on the first one's adapter. A copy in the job's folder is what every attempt loads, so it may be removed
from adapters/ meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuned.adapters import CONFIG, WEIGHTS, read_adapter, read_story
from finetuned.config import LATEST, TrainingSettings
from finetuned.durable import move, sync_tree
from finetuned.errors import ConfigError
from finetuned.home import Home, JobFolder
from finetuned.jobs import JobSpec

_CHAIN = "chain.json"
_START_FRESH = "or set resume_adapter to null to start fresh"


@dataclass(frozen=True)
class Earlier:
    """What a job builds on. Without `folder` there was nothing yet."""

    folder: Path | None
    chain: list[dict[str, Any]]  # adapter (its folder's name), job_id, sha256 of its data; oldest first
    reason: str

    def __str__(self) -> str:
        """Name it in a log line."""
        return self.chain[-1]["adapter"] if self.chain else "none"


def settle(folder: JobFolder, spec: JobSpec, settings: TrainingSettings, base_model: str) -> Earlier | None:
    """Give what the job builds on, or None if its settings name nothing. Raises ConfigError if it does not fit."""
    if settings.resume_adapter is None:
        return None
    if not folder.earlier.is_dir():
        source, reason = _choose(spec, settings.resume_adapter)
        chain = [] if source is None else _check(source, settings, base_model)
        staged = folder.path / f".{folder.earlier.name}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        if source is not None:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(source / name, staged / name)
        (staged / _CHAIN).write_text(json.dumps({"chain": chain, "reason": reason}), encoding="utf-8")
        sync_tree(staged)
        move(staged, folder.earlier)
    kept = json.loads((folder.earlier / _CHAIN).read_bytes())
    return Earlier(folder.earlier if kept["chain"] else None, **kept)


def _choose(spec: JobSpec, setting: str) -> tuple[Path | None, str]:
    """Find the adapter that the setting names: its folder and why."""
    if setting != LATEST:
        return (Path(spec.base_dir) / Path(setting).expanduser()).resolve(), "resume_adapter names it"
    profile = f"profile {spec.profile}" if spec.profile else "files without a profile"
    finished = {
        folder: story["finished_at"]
        for folder in Home(Path(spec.base_dir)).adapters.glob("[!.]*")
        if not folder.is_symlink() and (story := read_story(folder)).get("profile") == spec.profile
    }
    if not finished:
        return None, f"there is no earlier adapter of {profile}: starting fresh"
    return max(finished, key=lambda folder: (finished[folder], folder.name)), f"the newest of {profile}"


def _check(source: Path, settings: TrainingSettings, base_model: str) -> list[dict[str, Any]]:
    """Give the chain that ends with this adapter. Raises ConfigError with all that keeps it from being continued.

    Whether its layers are the same is seen when it is loaded (`lora.py`).
    """
    config, story = read_adapter(source, where=f"resume_adapter {source}"), read_story(source)
    revision = story.get("settings", {}).get("revision")
    pairs = {
        "model": (config.get("base_model_name_or_path"), base_model),
        "revision": (revision if story else settings.revision, settings.revision),
        "lora_r": (config.get("r"), settings.lora_r),
        "lora_alpha": (config.get("lora_alpha"), settings.lora_alpha),
        "use_rslora": (config.get("use_rslora", False), settings.use_rslora),
        "use_dora": (config.get("use_dora", False), settings.use_dora),
    }
    plain: dict[str, list[Any]] = {
        "alpha_pattern": [{}],
        "rank_pattern": [{}],
        "modules_to_save": [[]],
        "bias": ["none"],
    }
    plain["init_lora_weights"] = [True, False, "gaussian"]
    special = [key for key, usual in plain.items() if config.get(key) and config[key] not in usual]
    if special:
        raise ConfigError(
            f"was made with {', '.join(special)}, with which it cannot be continued",
            where=f"resume_adapter {source}",
            remedy=f"Merge it into its base model and name that, {_START_FRESH}.",
        )
    other = [f"{key} {was} (now {now})" for key, (was, now) in pairs.items() if not _same(was, now)]
    if other:
        raise ConfigError(
            f"was trained with other settings: {', '.join(other)}",
            where=f"resume_adapter {source}",
            remedy=f"Set them as they were, {_START_FRESH}.",
        )
    own = {"adapter": source.name, "job_id": story.get("job_id"), "sha256": story.get("sha256")}
    return [*story.get("chain", []), own]


def _same(was: Any, now: Any) -> bool:
    if isinstance(was, str) and isinstance(now, str) and was.startswith("/"):
        return os.path.realpath(was) == os.path.realpath(now)
    return bool(was == now)
