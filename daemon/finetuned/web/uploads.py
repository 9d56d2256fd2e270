"""Files that come through the browser: streamed to a place of their own in the base directory, checked there by a
process of its own, and moved into the inbox when the user says so.

A request names a file, never a path: the name is judged, the place is ours.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from finetuned.config import check_overrides, load_config
from finetuned.drop import add
from finetuned.durable import FILE_MODE, make_folder
from finetuned.home import Home, data_extension
from finetuned.spool.claim import settings_for
from finetuned.spool.inbox import EXTENSIONS, Found, held_out_of, is_data, is_held_out, remedy_for
from finetuned.web.api import home_of
from finetuned.web.replies import Json, Refused, json_of

_PIECE = 2**20  # bytes that are written at once
_KEPT_FREE = 2**30  # bytes of the disk that an upload must leave, or a twentieth of it
_KEPT = 86400.0  # seconds for which a file waits to be confirmed
_CHECK_SECONDS = 900.0
_ID = re.compile(r"[0-9a-f]{16}")
_LONGEST_NAME = 180  # bytes; the archive adds to it

_busy: set[str] = set()  # numbers of files that are being changed
_checking = asyncio.Semaphore(1)  # a check may take a gigabyte


def drops(request: Request) -> Response:
    """List the files that were sent and are not confirmed, the newest first."""
    found = []
    for folder in home_of(request).uploads.glob("*"):
        with suppress(Refused, OSError):  # one that is still coming in, or on its way into the inbox
            file, held_out = _files(folder)
            facts = file.stat()
            held_out_name = held_out.name if held_out else None
            found.append((facts.st_mtime, folder.name, file.name, facts.st_size, held_out_name))
    names = ("created_at", "id", "file", "bytes", "held_out")
    data = [dict(zip(names, one, strict=True)) for one in sorted(found, key=lambda one: one[:2], reverse=True)]
    return Json({"object": "list", "data": data})


async def upload(request: Request) -> Response:
    """Take the request's body as the file `name`; 201 with the number under which it waits."""
    name = _name(request)
    if is_held_out(name):
        raise Refused(
            400,
            f"{name} is held-out data by its name",
            remedy="Send the file that is to be trained on first, or rename it.",
        )
    if not is_data(name):
        raise Refused(400, f"{name} is not a training file", remedy=remedy_for(name))
    home = home_of(request)
    await asyncio.to_thread(forget_old, home)
    number = secrets.token_hex(8)
    folder = home.uploads / number
    make_folder(folder)
    try:
        size = await _receive(request, folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Json({"id": number, "file": name, "bytes": size}, 201)


async def upload_held_out(request: Request) -> Response:
    """Take the request's body as the held-out rows of a file that waits."""
    file, earlier = _waiting(request)
    name = _name(request)
    extension = data_extension(os.fsencode(name))
    if extension not in EXTENSIONS:
        raise Refused(400, "this is not a file of rows", remedy=remedy_for(name))
    target = file.with_name(held_out_of(file.name, extension))
    with _alone(request):
        size = await _receive(request, target)
        if earlier and earlier != target:
            earlier.unlink()
    return Json({"file": target.name, "bytes": size}, 201)


async def check(request: Request) -> Response:
    """Say what `finetuned check` says of a file that waits, with the profile and settings that are chosen for it."""
    file, _ = _waiting(request)
    given = await json_of(request)
    profile, settings = _chosen(given)
    await asyncio.to_thread(_judge, home_of(request), profile, settings)
    words = [
        sys.executable,
        "-P",
        "-m",
        "finetuned",
        "check",
        str(file),
        "--base-dir",
        str(home_of(request).root),
        "--json",
    ]
    words += [f"--profile={profile}"] if profile else []
    async with _checking:
        if not file.exists():
            raise Refused(404, "no such file waits", code="not_found", remedy="Upload it again.")
        override = Found(file, profile).override
        override.write_bytes(orjson.dumps(settings))
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            said, errors = await asyncio.wait_for(_unless_gone(request, process), _CHECK_SECONDS)
        except TimeoutError:
            minutes = _CHECK_SECONDS / 60
            raise Refused(
                504, f"the check took longer than {minutes:.0f} minutes", remedy="Train the file, or check it by hand."
            ) from None
        finally:
            override.unlink(missing_ok=True)
            if process.returncode is None:
                process.kill()
                await process.wait()
    try:
        return Json({**orjson.loads(said), "file": file.name})
    except ValueError:
        text = errors.decode("utf-8", "replace").strip().removeprefix("finetuned: ")
        raise Refused(422, text[-2000:] or "the check gave no answer") from None


def _chosen(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Give the profile and the settings that a request brings. Raises Refused."""
    profile, settings = given.get("profile") or "", given.get("settings") or {}
    if not isinstance(profile, str) or not isinstance(settings, dict) or "/" in profile:
        raise Refused(400, "profile must be a name, and settings an object")
    return profile, settings


def _judge(home: Home, profile: str, settings: dict[str, Any]) -> None:
    """Raise ConfigError for a profile that there is not, and for settings that an override may not hold."""
    changes = check_overrides(settings, where="settings")
    settings_for(home, load_config(home.config_file), profile, changes, where="settings")


async def _unless_gone(request: Request, process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """Wait for a process, and not in vain: who asked may have left the page. Raises Refused then."""
    ended = asyncio.ensure_future(process.communicate())
    try:
        while not ended.done():
            await asyncio.wait([ended], timeout=1)
            if await request.is_disconnected():
                raise Refused(499, "nobody waits for it")
        return ended.result()
    finally:
        ended.cancel()


async def confirm(request: Request) -> Response:
    """Move a file that waits into the inbox, with the settings and the profile that were chosen for it."""
    profile, settings = _chosen(await json_of(request))
    with _alone(request):  # a second click finds it gone, and does not train it twice
        file, held_out = _waiting(request)
        place = await asyncio.to_thread(
            add, home_of(request), file, profile=profile, settings=settings, held_out=held_out, staged=True
        )
        await asyncio.to_thread(shutil.rmtree, file.parent, ignore_errors=True)
    return Json({"said": f"{place.name} is in the inbox", "file": place.name})


async def forget(request: Request) -> Response:
    """Throw a file away that waits."""
    with _alone(request):
        file, _ = _waiting(request)
        await asyncio.to_thread(shutil.rmtree, file.parent, ignore_errors=True)
    return Json({"said": f"{file.name} is not trained"})


@contextmanager
def _alone(request: Request) -> Iterator[None]:
    """Change what waits under a number, and let nobody else do so meanwhile. Raises Refused if somebody does."""
    number = request.path_params["number"]
    if number in _busy:
        raise Refused(409, "this file is not all here yet, or on its way into the inbox", remedy="Wait a moment.")
    _busy.add(number)
    try:
        yield
    finally:
        _busy.discard(number)


def _name(request: Request) -> str:
    """Give the name that a file shall have. Raises Refused for one that could mean anything but a plain name."""
    name = request.query_params.get("name", "")
    plain = name.isprintable() and not re.search(r"[/\\]", name) and not name.startswith((".", "#", "-"))
    if not name or not plain or len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        raise Refused(400, "this is no name for a file", remedy="Rename it, with letters and digits.")
    return name


def _waiting(request: Request) -> tuple[Path, Path | None]:
    """Give the file that waits under a number, and its held-out file. Raises Refused."""
    return _files(home_of(request).uploads / request.path_params["number"])


def _files(folder: Path) -> tuple[Path, Path | None]:
    files = sorted(folder.iterdir()) if _ID.fullmatch(folder.name) and folder.is_dir() else []
    data = [file for file in files if is_data(file.name)]
    if len(data) != 1:
        raise Refused(404, "no such file waits", code="not_found", remedy="Upload it again.")
    return data[0], next((file for file in files if is_held_out(file.name)), None)


async def _receive(request: Request, target: Path) -> int:
    """Write a request's body to a file that is there when it is whole, as long as the disk has room. Gives its size."""
    partial = target.with_name(f".{target.name}.part")
    try:
        size = await _written(request, partial)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return size


async def _written(request: Request, target: Path) -> int:
    announced = int(length) if (length := request.headers.get("content-length", "")).isdecimal() else 0
    _check_room(target.parent, announced)
    size, pending = 0, bytearray()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        try:
            async for piece in request.stream():
                pending += piece
                if len(pending) >= _PIECE:
                    size += await asyncio.to_thread(_write, file, bytes(pending))
                    pending.clear()
        except ClientDisconnect:
            raise Refused(499, "the upload broke off") from None
        size += await asyncio.to_thread(_write, file, bytes(pending))
    return size


def _write(file: BinaryIO, content: bytes) -> int:
    _check_room(file.fileno(), len(content))
    return file.write(content)


def _check_room(where: Path | int, more: int) -> None:
    disk = os.statvfs(where)
    free, kept = disk.f_bavail * disk.f_frsize, min(_KEPT_FREE, disk.f_blocks * disk.f_frsize // 20)
    if more > free - kept:
        raise Refused(507, "there is no room on the disk for this file", code="no_room", remedy="Make room on it.")


def forget_old(home: Home) -> None:
    """Throw away what was never confirmed."""
    for folder in home.uploads.glob("*"):
        with suppress(OSError):  # another request was quicker
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))  # one may still be coming in
            if time.time() - newest > _KEPT:
                shutil.rmtree(folder)


ROUTES = [
    Route("/api/drops", drops, methods=["GET"]),
    Route("/api/drops", upload, methods=["POST"]),
    Route("/api/drops/{number}", forget, methods=["DELETE"]),
    Route("/api/drops/{number}/eval", upload_held_out, methods=["POST"]),
    Route("/api/drops/{number}/check", check, methods=["POST"]),
    Route("/api/drops/{number}/confirm", confirm, methods=["POST"]),
]
