"""Reading an adapter's folder, without torch: what PEFT wrote, and what finetuned did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetuned.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEARNED = "learned.jsonl"  # what was learned from, where a recipe made it itself
MANIFEST = "finetuned.json"  # the last file that is written: its presence means whole, its `job_id` whose


def read_adapter(folder: Path, *, where: str, soft_prompts: bool = False) -> dict[str, Any]:
    """Read the adapter_config.json of a LoRA adapter, or of a soft prompt where that will do.

    Raises ConfigError if the folder holds none.
    """
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=where, remedy="Name an adapter's folder, as in adapters/.")
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise ConfigError(
            "is a whole model and no adapter",
            where=where,
            remedy='Use it as it is; to train it on, name it as "model".',
        )
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        kinds = {"LORA", "PROMPT_TUNING"} if soft_prompts else {"LORA"}
        if config["peft_type"] not in kinds or not (folder / WEIGHTS).is_file():
            raise ValueError(f"a LoRA adapter has {WEIGHTS}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"holds no LoRA adapter: {error}", where=where, remedy="Name an adapter's folder, as in adapters/."
        ) from error
    return dict(config)


def read_story(folder: Path) -> dict[str, Any]:
    """Read finetuned.json; an adapter that was made elsewhere has none, which is an empty story."""
    try:
        story = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return story if isinstance(story, dict) else {}


def belongs_to(folder: Path, job_id: str) -> bool:
    """Whether the folder is the finished adapter of this job."""
    return read_story(folder).get("job_id") == job_id
