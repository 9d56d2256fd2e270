"""Making a base directory: `finetuned init` and the demo."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from finetuned.config import json_schema
from finetuned.durable import make_folder, write_file
from finetuned.errors import HomeError
from finetuned.home import Home


def make_base_directory(home: Home, config: str) -> None:
    """Make the folders and the schema, and, unless they are there already, config.json with this content and the token
    of the control centre.
    """
    for folder in home.folders:
        make_folder(folder)
    home.schema_file.write_text(json_schema(), encoding="utf-8")
    if not home.config_file.exists():
        home.config_file.write_text(config, encoding="utf-8")
    web_token(home)


def web_token(home: Home) -> str:
    """Give the base directory's token, made at the first call, readable by its owner alone. Raises HomeError for an
    empty one.
    """
    if not home.web_token.exists():
        make_folder(home.machinery)
        whole = home.web_token.with_name(f".web-token.{os.getpid()}")
        write_file(whole, f"{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
        with suppress(FileExistsError):  # another process has made it at this moment
            os.link(whole, home.web_token)
        whole.unlink()
    token = home.web_token.read_text(encoding="ascii").strip()
    if not token:
        raise HomeError("holds no token", where=str(home.web_token), remedy="Remove it; a new one is made.")
    return token
