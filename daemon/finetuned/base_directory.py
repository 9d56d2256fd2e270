"""Making a base directory: `finetuned init` and the demo."""

from __future__ import annotations

from finetuned.config import json_schema
from finetuned.durable import make_folder
from finetuned.home import Home


def make_base_directory(home: Home, config: str) -> None:
    """Make the folders, the schema, and config.json with this content unless there is one already."""
    for folder in home.folders:
        make_folder(folder)
    home.schema_file.write_text(json_schema(), encoding="utf-8")
    if not home.config_file.exists():
        home.config_file.write_text(config, encoding="utf-8")
