"""Putting a file into the inbox so that the daemon can never see half of it, with settings and held-out data for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from finetuned.config import check_overrides, load_config
from finetuned.durable import make_folder, sync_file, sync_folder, write_file
from finetuned.errors import DataError, HomeError
from finetuned.home import Home, data_extension
from finetuned.spool.claim import settings_for
from finetuned.spool.inbox import EXTENSIONS, Found, held_out_of, is_data, is_held_out, relatives, remedy_for


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


def add(
    home: Home,
    file: Path,
    *,
    profile: str,
    settings: dict[str, Any],
    held_out: Path | None = None,
    staged: bool = False,
) -> Path:
    """Copy a file into the inbox under a name that is free; its place there. One that is `staged` in the base directory
    is moved there, with its held-out file.

    Held-out file and override come first and the file last, by one step each. Raises DataError for files that cannot
    be taken, ConfigError for settings that cannot be used, HomeError where the inbox cannot be written.
    """
    _check(file, held_out)
    config = load_config(home.config_file)
    settings_for(home, config, profile, check_overrides(settings, where="--set"), where="--set")
    folder = home.inbox / profile if profile else home.inbox
    try:
        make_folder(folder)
        return _put(file, folder, profile, settings, held_out, bring=_moved if staged else _copy)
    except OSError as error:
        raise HomeError(
            f"the file cannot be put there: {error.strerror}",
            where=str(error.filename or folder),
            remedy="Make room on the disk, or do it as a user who may write there.",
        ) from error


def _check(file: Path, held_out: Path | None) -> None:
    if is_held_out(file.name):
        raise DataError(
            "is held-out data by its name",
            where=str(file),
            remedy="Add it with the file it belongs to, as its --eval-file, or rename it.",
        )
    if not (is_data(file.name) and file.is_file()):
        raise DataError("is not a training file", where=str(file), remedy=remedy_for(file.name))
    if held_out and not (data_extension(os.fsencode(held_out.name)) in EXTENSIONS and held_out.is_file()):
        raise DataError("is not a file of rows", where=str(held_out), remedy=remedy_for(held_out.name))
    for path in filter(None, (file, held_out)):
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), remedy="Fill it and add it again.", code="empty_file")


def _put(
    file: Path,
    folder: Path,
    profile: str,
    settings: dict[str, Any],
    held_out: Path | None,
    *,
    bring: Callable[[Path, Path], AbstractContextManager[Path]],
) -> Path:
    with ExitStack() as partials:
        data = partials.enter_context(bring(file, folder / f".{os.getpid()}.part"))
        rows = partials.enter_context(bring(held_out, folder / f".{os.getpid()}.eval.part")) if held_out else None
        extension = data_extension(os.fsencode(file.name))
        stem = file.name[: len(file.name) - len(extension)]
        for name in chain([file.name], (f"{stem}-{number}{extension}" for number in count(2))):
            target = folder / name
            if any(os.path.lexists(folder / other) for other in (name, *relatives(name))):
                continue
            with ExitStack() as undo:  # what is put there for a file that then does not come
                if rows and held_out:
                    beside = folder / held_out_of(name, data_extension(os.fsencode(held_out.name)))
                    if not _linked(rows, beside):
                        continue
                    undo.callback(beside.unlink, missing_ok=True)
                    sync_folder(folder)
                if settings:
                    override = Found(target, profile).override
                    undo.callback(override.unlink, missing_ok=True)
                    write_file(override, json.dumps(settings, indent=2).encode() + b"\n")
                if not _linked(data, target):
                    continue
                undo.pop_all()
            sync_folder(folder)
            return target
        raise AssertionError("numbers do not end")


@contextmanager
def _copy(file: Path, partial: Path) -> Iterator[Path]:
    """Give a whole, durable copy under a name that the daemon passes over, which is removed in the end."""
    try:
        shutil.copyfile(file, partial)
        sync_file(partial)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _moved(file: Path, _: Path) -> Iterator[Path]:
    """Give a file that is whole and ours, made durable, and remove its old name once it has its new one."""
    sync_file(file)
    yield file
    file.unlink()


def _linked(partial: Path, target: Path) -> bool:
    """Whether the file could get that name: unlike a rename, this never replaces one that came in the meantime."""
    try:
        os.link(partial, target)
    except FileExistsError:
        return False
    return True
