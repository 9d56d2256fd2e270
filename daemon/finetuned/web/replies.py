"""How the control centre answers: JSON that never fails on a NaN, and errors in OpenAI's shape."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from finetuned.durable import NO_ROOM
from finetuned.errors import FinetunedError
from finetuned.jobs import Job
from finetuned.ledger import Ledger

_LONGEST = 2**20  # bytes of a body that is no file
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


class Json(Response):
    """JSON; what is no number becomes null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Give the bytes."""
        return as_json(content)


def as_json(content: Any) -> bytes:
    """Give JSON, whatever was said: NaN becomes null, and halves of characters, which data may hold, question marks."""
    try:
        return orjson.dumps(content, default=str)
    except TypeError:  # such a half, or a number of more than 64 bits
        return json.dumps(_without_nan(content), default=str, ensure_ascii=False).encode("utf-8", "replace")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class Refused(Exception):  # noqa: N818, it is an answer
    """A request that cannot be met: HTTP status, and what to tell."""

    def __init__(self, status: int, message: str, *, code: str = "invalid_request", remedy: str = "") -> None:
        self.status = status
        self.error = {
            "message": message,
            "code": code,
            "param": None,
            "remedy": remedy,
            "type": "invalid_request_error",
        }
        super().__init__(message)


def told_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Give the HTTP status of an error and what to tell of it."""
    if isinstance(error, Refused):
        return error.status, error.error
    told = {"param": None, "remedy": "", "type": "invalid_request_error"}
    if isinstance(error, FinetunedError):
        told |= {"message": error.sentence(), "code": error.code, "param": error.where or None, "remedy": error.remedy}
        return 409 if error.code == "cannot_be_done" else 400, told
    if isinstance(error, HTTPException):
        code = "not_found" if error.status_code == 404 else "invalid_request"
        return error.status_code, {**told, "message": error.detail, "code": code}
    told["type"] = "server_error"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return 507, {**told, "message": "there is no room on the disk", "code": "no_room", "remedy": "Make room on it."}
    if isinstance(error, OSError | sqlite3.Error):  # of the first the words alone: a path is nobody's business
        what = error.strerror if isinstance(error, OSError) else error
        return 503, {**told, "message": f"this cannot be read or written now: {what}", "code": "unavailable"}
    remedy = "The control centre's log, logs/web.log, says more."
    return 500, {**told, "message": "this is a bug in finetuned", "code": "bug", "remedy": remedy}


async def json_of(request: Request) -> dict[str, Any]:
    """Read the JSON object in a request's body; none is an empty one. Raises Refused for anything else."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LONGEST:
            raise Refused(413, "this is too long")
    try:
        given = orjson.loads(body or b"{}")
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refused(400, "the body must be one JSON object")
    return given


def number(request: Request, name: str, default: int, *, low: int, high: int) -> int:
    """Read a whole number from the query; raises Refused where it is none, and keeps it within bounds."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise Refused(400, f"{name} must be a whole number")
    return min(max(int(text), low), high)


def job_of(request: Request, ledger: Ledger | None, job_id: str | None = None) -> Job:
    """Give the job that a request names. An id is looked up in the ledger before anything else is made of it."""
    name = request.path_params["job"] if job_id is None else job_id
    if ledger is not None and _ID.fullmatch(name):
        try:
            return ledger.job(name)
        except KeyError:
            pass
    raise Refused(404, "there is no such job", code="not_found", remedy="The page History has them all.")
