"""The pages: templates that scripts fill from the API, and the files they load. Nothing comes from another host."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from finetuned import __version__
from finetuned.config import Config, load_config
from finetuned.errors import ConfigError
from finetuned.home import printable
from finetuned.spool.inbox import EXTENSIONS
from finetuned.web.api import home_of, job_in
from finetuned.web.forms import config_fields, override_fields
from finetuned.web.records import STATUSES
from finetuned.web.replies import Json, Refused, told_of
from finetuned.web.safety import COOKIE, is_token

HERE = Path(__file__).parent
_PAGES = [("/", "Now"), ("/drop", "Drop"), ("/history", "History"), ("/config", "Config")]
_COLUMNS = [
    ("name", "File"),
    ("status", "Status"),
    ("created_at", "Dropped"),
    ("finished_at", "Ended"),
    ("seconds", "Took"),
    ("", "Loss"),
    ("profile", "Profile"),
    ("", "Result"),
]
_LONGEST_FORM = 4096  # bytes

templates = Jinja2Templates(HERE / "templates")


def page(request: Request, name: str, *, status: int = 200, **facts: Any) -> Response:
    """Give a page."""
    shared = {
        "pages": _PAGES,
        "here": request.url.path,
        "version": __version__,
        "base_dir": printable(os.fsencode(home_of(request).root)),
    }
    return templates.TemplateResponse(request, name, {**shared, **facts}, status_code=status)


def now(request: Request) -> Response:
    """Give the page Now."""
    return page(request, "now.html", plotly_styles=plotly_styles())


def history(request: Request) -> Response:
    """Give the page History."""
    return page(request, "history.html", statuses=STATUSES, columns=_COLUMNS)


def drop(request: Request) -> Response:
    """Give the page Drop, with a form of all that a file may bring."""
    error, settings = "", Config()
    try:
        settings = load_config(home_of(request).config_file)
    except ConfigError as broken:
        error = broken.sentence()
    return page(
        request,
        "drop.html",
        error=error,
        profiles=sorted(settings.profiles),
        current=settings.model_dump(),
        fields=override_fields(),
        endings=EXTENSIONS,
    )


def config(request: Request) -> Response:
    """Give the page Config, with the meaning of every setting."""
    return page(request, "config.html", fields=config_fields())


def job(request: Request) -> Response:
    """Give the page of one job."""
    with job_in(request) as (_, found):
        return page(request, "job.html", job=found.id, plotly_styles=plotly_styles())


async def tell(request: Request, error: Exception) -> Response:
    """Answer with an error: a page for who looks at pages, JSON for all others."""
    status, told = told_of(error)
    if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/"):
        return page(request, "error.html", status=status, told=told)
    return Json({"error": told}, status)


async def login(request: Request) -> Response:
    """Ask for the token, and keep it as a cookie that no script and no other site can use."""
    wanted = request.query_params.get("next", "/")
    if request.method != "POST":
        return page(request, "login.html", wrong=False, wanted=wanted)
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _LONGEST_FORM:
            raise Refused(413, "no token is as long")
    given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0].strip()
    if not is_token(given, request.app.state.token or ""):
        return page(request, "login.html", status=401, wrong=True, wanted=wanted)
    answer = RedirectResponse(wanted if re.match(r"/(?![/\\])", wanted) else "/", 303)  # no other site's page
    answer.set_cookie(COOKIE, given, max_age=365 * 86400, httponly=True, samesite="strict")
    return answer


@cache
def plotly_script() -> Path | None:
    """Give plotly's script in the installed package; None where there is none."""
    found = find_spec("plotly")
    script = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    return script if script and script.is_file() else None


@cache
def plotly_styles() -> list[str]:
    """Give the ids of the inline styles that plotly's script brings for maps, which the policy would block with an
    error. It leaves out those that the page has already.
    """
    script = plotly_script()
    text = script.read_text(encoding="utf-8") if script else ""
    return re.findall(r'getElementById\("([0-9a-f]{64})"\)', text)


def plotly(_: Request) -> Response:
    """Give plotly's script."""
    script = plotly_script()
    if script is None:
        raise Refused(404, "plotly is not installed", code="not_found", remedy="pip install 'finetuned[web]'")
    return FileResponse(script, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})


ROUTES = [
    Route("/", now),
    Route("/history", history),
    Route("/drop", drop),
    Route("/config", config),
    Route("/jobs/{job}", job),
    Route("/login", login, methods=["GET", "POST"]),
    Route("/static/plotly.min.js", plotly),
    Mount("/static", StaticFiles(directory=HERE / "static")),
]
