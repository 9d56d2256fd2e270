"""What is asked of a Ray cluster: the Jobs REST API over HTTP. No package of Ray's is needed for that."""

from __future__ import annotations

import json
import threading
import time
from http.client import BadStatusLine, HTTPConnection, HTTPException, HTTPSConnection, RemoteDisconnected
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

import structlog

from finetuned.engine_settings import Ray
from finetuned.errors import FinetunedError

_log = structlog.get_logger()

_LARGEST = 4 * 2**20  # bytes of an answer
_PASSING = frozenset({408, 429})  # of the answers that refuse
_SHOWN = 500  # characters of what the cluster says


class UnsureError(OSError):
    """An order was sent and not answered: the cluster may have taken it."""


class RefusedError(FinetunedError):
    """The cluster will not take an order, however often it is given."""

    code = "ray_refused"


class Cluster:
    """A Ray cluster. Each method may be called from any thread, and raises OSError if there is no good answer."""

    def __init__(self, settings: Ray) -> None:
        """Ask nothing yet."""
        self.address = settings.address
        self.back_at = 0.0
        self._settings = settings
        self._answers = True
        self._noting = threading.Lock()

    def submit(self, order: dict[str, Any], *, seconds: float) -> None:
        """Give an order, which holds its `submission_id`. An answer may take twice `seconds`.

        Raises RefusedError, UnsureError, or OSError if it was surely not taken.
        """
        status, text = self._ask("POST", "/api/jobs/", order, seconds=seconds)
        if status in {401, 403}:  # a token that was changed, most likely: no reason to fail all that waits
            raise ConnectionError(
                f"Ray does not let us in ({status}): {_last_line(text)}; name the file with the cluster's token as "
                "ray.token_file"
            )
        if status == 404:
            raise ConnectionError(
                f"{self._settings.address} does not know Ray's API: {_last_line(text)}; mend ray.address"
            )
        if 300 <= status < 400:  # to a page where people log in, say
            raise ConnectionError(f"{self._settings.address} sends us elsewhere ({status}); mend ray.address")
        if 400 <= status < 500 and status not in _PASSING:
            raise RefusedError(
                f"Ray refuses the job ({status}): {_last_line(text)}",
                where=self._settings.address,
                remedy="Mend `ray` in config.json, the address first.",
            )
        if status != 200:  # it knows such a job already, or cannot start it now
            try:
                known = self.info(order["submission_id"], seconds=seconds)
            except OSError as error:
                raise UnsureError(str(error)) from error
            if known is None:
                raise OSError(f"Ray cannot take the job now ({status}): {_last_line(text)}")

    def info(self, submission: str, *, seconds: float) -> dict[str, Any] | None:
        """Give what the cluster says of a job; None if it knows no such job. Whether it answers is logged."""
        try:
            found = self.look(submission, seconds=seconds)
        except OSError as error:
            self._note(str(error))
            raise
        self._note("")
        return found

    def look(self, submission: str, *, seconds: float) -> dict[str, Any] | None:
        """Do as `info` does, and log nothing."""
        status, text = self._ask("GET", f"/api/jobs/{quote(submission)}", seconds=seconds)
        if status == 404 and "does not exist" in text:  # any other is no answer of this API
            return None
        if status != 200:
            _no_answer(status, text)
        return _object(text)

    def stop(self, submission: str, *, seconds: float) -> None:
        """Have a job ended: SIGTERM, and after Ray's patience SIGKILL. One that waits is ended as soon as it starts."""
        status, text = self._ask("POST", f"/api/jobs/{quote(submission)}/stop", seconds=seconds)
        if status not in {200, 404}:
            _no_answer(status, text)

    def _ask(self, method: str, path: str, order: object = None, *, seconds: float) -> tuple[int, str]:
        parts = urlsplit(self._settings.address)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=seconds)
        headers = {"Content-Type": "application/json"}
        if self._settings.token_file is not None:
            headers["Authorization"] = f"Bearer {_token(self._settings.token_file)}"
        try:
            try:
                connection.connect()
            except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
                raise ConnectionError(f"Ray at {self._settings.address} cannot be reached: {error}") from error
            try:
                body = None if order is None else json.dumps(order).encode()
                connection.request(method, parts.path + path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.read(_LARGEST).decode("utf-8", "replace")
            except (OSError, HTTPException) as error:
                if isinstance(error, BadStatusLine) and not isinstance(error, RemoteDisconnected):
                    address = self._settings.address
                    what = f"what answers at {address} is not Ray's dashboard, whose port is mostly 8265"
                    raise ConnectionError(f"{what}; mend ray.address") from error
                raise UnsureError(f"Ray does not answer: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()

    def _note(self, trouble: str) -> None:
        """Log that the cluster does not answer, and that it does again, once each."""
        with self._noting:
            changed, self._answers = self._answers == bool(trouble), not trouble
        if changed and trouble:
            _log.warning("Ray does not answer", address=self._settings.address, why=trouble, then="it is asked again")
        elif changed:
            self.back_at = time.monotonic()
            _log.info("Ray answers again", address=self._settings.address)


def _token(path: Path) -> str:
    try:
        token = path.read_bytes().strip().decode("ascii", "replace")
    except OSError as error:
        raise ConnectionError(f"ray.token_file {path} cannot be read: {error.strerror}") from error
    if not token.isascii() or not token.isprintable():
        raise ConnectionError(f"ray.token_file {path} holds no token")
    return token


def _no_answer(status: int, text: str) -> NoReturn:
    raise OSError(f"Ray answers {status}: {_last_line(text)}")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise OSError(f"what answers is not Ray: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("status"), str):
        raise OSError(f"what answers is not Ray: {text[:_SHOWN]}")
    return value


def _last_line(text: str) -> str:
    """Give what matters of an answer, which may be a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1][:_SHOWN] if lines else "nothing"
