"""Putting a file into the inbox so that the daemon can never see half of it, with the settings for it alone."""

from __future__ import annotations

import json
import os
import shutil
from itertools import chain, count
from pathlib import Path
from typing import Any

from finetuned.config import check_overrides, load_config
from finetuned.durable import make_folder, sync_file, sync_folder, write_file
from finetuned.errors import DataError, HomeError
from finetuned.home import Home, data_extension
from finetuned.spool.claim import settings_for
from finetuned.spool.inbox import EXTENSIONS, Found, is_data


def parse_settings(given: tuple[str, ...]) -> dict[str, Any]:
    """Read `key=value`s: the value as JSON, and as text where it is none. Raises HomeError for one without `=`."""
    settings: dict[str, Any] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if not (key and equals):
            raise HomeError(f"--set {item} is not key=value", remedy="For instance --set epochs=2.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        place = settings
        *tables, name = key.split(".")
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise HomeError(f"--set {item}: {table} is set to a value already", remedy="Leave one of them out.")
        place[name] = value
    return settings


def add(home: Home, file: Path, *, profile: str, settings: dict[str, Any]) -> Path:
    """Copy a file into the inbox under a name that is free; its place there.

    The override comes first and the file last, by one step each. Raises DataError for a file that is no training file,
    ConfigError for settings that cannot be used, HomeError where the inbox cannot be written.
    """
    if not (is_data(file.name) and file.is_file()):
        raise DataError("is not a training file", where=str(file), remedy=f"finetuned takes {', '.join(EXTENSIONS)}.")
    config = load_config(home.config_file)
    settings_for(home, config, profile, check_overrides(settings, where="--set"), where="--set")
    folder = home.inbox / profile if profile else home.inbox
    try:
        make_folder(folder)
        return _put(file, folder, profile, settings)
    except OSError as error:
        raise HomeError(
            f"the file cannot be put there: {error.strerror}",
            where=str(error.filename or folder),
            remedy="Make room on the disk, or do it as a user who may write there.",
        ) from error


def _put(file: Path, folder: Path, profile: str, settings: dict[str, Any]) -> Path:
    partial = folder / f".{os.getpid()}-{file.name}.part"
    try:
        shutil.copyfile(file, partial)
        sync_file(partial)
        extension = data_extension(os.fsencode(file.name))
        stem = file.name[: len(file.name) - len(extension)]
        for name in chain([file.name], (f"{stem}-{number}{extension}" for number in count(2))):
            target = folder / name
            override = Found(target, profile).override
            if os.path.lexists(target) or os.path.lexists(override):
                continue
            if settings:
                write_file(override, json.dumps(settings, indent=2).encode() + b"\n")
            try:
                os.link(partial, target)  # unlike a rename it never replaces a file that came in the meantime
            except FileExistsError:
                if settings:  # else it is another's
                    override.unlink(missing_ok=True)
                continue
            sync_folder(folder)
            return target
        raise AssertionError("numbers do not end")
    finally:
        partial.unlink(missing_ok=True)
