"""The application: routes, pages and files, behind the checks of `safety`."""

from __future__ import annotations

import sqlite3

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from finetuned.errors import FinetunedError
from finetuned.home import Home
from finetuned.web import api, pages, settings, uploads
from finetuned.web.curves import Curves
from finetuned.web.pages import tell
from finetuned.web.replies import Refused
from finetuned.web.safety import Guarded
from finetuned.web.stream import Streams


def make_app(home: Home, *, host: str, token: str | None) -> ASGIApp:
    """Make the application of one base directory."""
    app = Starlette(
        routes=[*api.ROUTES, *uploads.ROUTES, *settings.ROUTES, *pages.ROUTES],
        exception_handlers=dict.fromkeys(
            (Refused, FinetunedError, HTTPException, sqlite3.Error, OSError, Exception), tell
        ),
    )
    app.state.home = home
    app.state.token = token
    app.state.curves = Curves()
    app.state.streams = Streams(home)
    return Guarded(app, host=host, token=token)
