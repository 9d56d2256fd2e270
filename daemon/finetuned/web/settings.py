"""config.json in the browser: the file stays the truth, and only what the daemon could use is written."""

from __future__ import annotations

import hashlib
import stat
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from finetuned.config import Config, json_schema, parse_config
from finetuned.durable import write_file
from finetuned.errors import ConfigError
from finetuned.web.api import home_of
from finetuned.web.replies import Json, Refused, json_of


def version_of(content: bytes) -> str:
    """Name a content, so that a save tells whether it is made on top of it."""
    return hashlib.sha256(content).hexdigest()


def config(request: Request) -> Response:
    """Give config.json as it stands in the file."""
    content = home_of(request).config_file.read_bytes()
    return Json({"text": content.decode("utf-8", "replace"), "version": version_of(content)})


async def save(request: Request) -> Response:
    """Write config.json, if it can be used and nobody else has changed it since `version`."""
    given = await json_of(request)
    text, seen = given.get("text"), given.get("version")
    if not isinstance(text, str):
        raise Refused(400, "text must hold config.json")
    content = text.encode()
    wanted = parse_config(content, where="config.json")
    file = home_of(request).config_file.resolve()
    before = file.read_bytes()
    if version_of(before) != seen:
        raise Refused(409, "config.json was changed meanwhile", remedy="Load it again, and make your change there.")
    if request.app.state.token is None and (programs := _programs(wanted)) and programs != _programs(_known(before)):
        raise Refused(
            403,
            "on_finish.command and trust_remote_code run programs, and whoever can log in on this machine can ask here",
            code="not_here",
            remedy="Change them in config.json itself.",
        )
    write_file(file, content, mode=stat.S_IMODE(file.stat().st_mode))
    said = f"config.json is saved; the next job uses it{_moves(_known(before), wanted)}"
    return Json({"said": said, "version": version_of(content)})


def _moves(before: Config, wanted: Config) -> str:
    """Say what becomes of the control centre, where it is the daemon's."""
    if before.web == wanted.web:
        return ""
    if not wanted.web.enabled:
        return ". The daemon's control centre ends, as web.enabled is false"
    host = wanted.web.host
    return f". The daemon's control centre moves to http://{f'[{host}]' if ':' in host else host}:{wanted.web.port}/"


def _programs(config: Config) -> list[Any]:
    """Give what of it makes the daemon or a trainer run other people's programs; nothing if nothing does."""
    top = config.training().model_dump()
    tables = {"": top, **{name: {**top, **profile} for name, profile in config.profiles.items()}}
    trusting = [
        [name, table["model"], table["revision"]] for name, table in tables.items() if table["trust_remote_code"]
    ]
    return [one for one in (config.on_finish.command, trusting) if one]


def _known(content: bytes) -> Config:
    """Read a config.json that may be broken: then it allows nothing."""
    try:
        return parse_config(content, where="config.json")
    except ConfigError:
        return Config()


def schema(_: Request) -> Response:
    """Give the JSON Schema of config.json."""
    return Response(json_schema(), media_type="application/schema+json")


ROUTES = [
    Route("/api/config", config),
    Route("/api/config", save, methods=["POST"]),
    Route("/api/config/schema", schema),
]
