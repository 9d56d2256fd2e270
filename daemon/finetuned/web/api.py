"""The JSON API: what is there to be read, and the orders. Each route is a plain function, run in a thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from finetuned.adapters import read_story
from finetuned.attempts import TOLD, timeline
from finetuned.control import order
from finetuned.events import EventType
from finetuned.found import ledger_if_any
from finetuned.guard import daemon_pid
from finetuned.home import Home
from finetuned.jobs import Job, Outcome, State
from finetuned.ledger import SORTS, Ledger
from finetuned.places import gpu_states, gpus_at_work
from finetuned.scores import sentences, table
from finetuned.spool.orders import Verb
from finetuned.web.curves import POINTS, Curves
from finetuned.web.figures import figures
from finetuned.web.reading import look
from finetuned.web.records import STATUSES, job_record
from finetuned.web.replies import Json, Refused, job_of, number
from finetuned.web.stream import job_events, now_events
from finetuned.web.zipped import adapter_of, zipped

_MOST = 200  # jobs a page
_JOB_VERBS = (Verb.CANCEL, Verb.RETRY, Verb.FIRST, Verb.LAST, Verb.BEFORE)


def home_of(request: Request) -> Home:
    """Give the base directory."""
    home: Home = request.app.state.home
    return home


@contextmanager
def job_in(request: Request, job_id: str | None = None) -> Iterator[tuple[Ledger, Job]]:
    """Open the ledger and give it with the job that a request names. Raises Refused if there is none."""
    with ledger_if_any(home_of(request)) as ledger:
        job = job_of(request, ledger, job_id)
        assert ledger is not None
        yield ledger, job


def jobs(request: Request) -> Response:
    """List jobs: `limit`, `offset`, `status`, `text`, `sort` (with a minus: descending)."""
    query = request.query_params
    limit = number(request, "limit", 20, low=1, high=_MOST)
    offset = number(request, "offset", 0, low=0, high=2**62)
    sort = query.get("sort", "-created_at")
    if sort.removeprefix("-") not in SORTS:
        raise Refused(400, f"sort must be one of {', '.join(SORTS)}, with a minus for descending")
    states: list[State] = []
    outcomes: list[Outcome] = []
    if wanted := query.get("status"):
        if wanted not in STATUSES:
            raise Refused(400, f"status must be one of {', '.join(STATUSES)}")
        states, outcomes = map(list, STATUSES[wanted])  # type: ignore[assignment]
    found, total = list[Job](), 0
    with ledger_if_any(home_of(request)) as ledger:
        if ledger is not None:
            found, total = ledger.page(
                states=states,
                outcomes=outcomes,
                text=query.get("text", ""),
                sort=sort.removeprefix("-"),
                descending=sort.startswith("-"),
                limit=limit,
                offset=offset,
            )
    known = gpu_states(home_of(request))
    data = [job_record(job, now=time.time(), gpus=known) for job in found]
    return Json(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": offset + len(data) < total,
            "total": total,
        }
    )


def job(request: Request) -> Response:
    """Give one job, with its data report, plan, benchmark and result."""
    with job_in(request) as (ledger, found):
        record = {**job_record(found, now=time.time(), gpus=gpu_states(home_of(request))), **_story(ledger, found)}
        folder = adapter_of(home_of(request), found)
        record["base_model"] = folder and (read_story(folder).get("base_model") or record["model"])
        plan, epochs = record["plan"] or {}, found.progress.get("epoch")
        if "tokens" in plan and epochs is not None:
            record["trained_tokens"] = round(plan["tokens"] * epochs)
        return Json(record)


def _story(ledger: Ledger, job: Job) -> dict[str, Any]:
    """Give what was said of a job but for its steps: the last of each kind, and all of its time line."""
    once = (EventType.DATA_REPORT, EventType.PLAN, EventType.RESULT)
    events = list(ledger.events(job.id, *once, EventType.BENCHMARK, *TOLD))
    told = {event.type: dict(event.data) for event in events}
    measured = told.get(EventType.BENCHMARK)
    return {
        **{str(kind): told.get(kind) for kind in once},
        "benchmark": _benchmark(measured) if measured else None,
        "timeline": timeline((e for e in events if e.type in TOLD), job),
    }


def _benchmark(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "table": table(facts), "sentences": sentences(facts)}


def job_curves(request: Request) -> Response:
    """Give a job's figures over the steps, thinned to `points`."""
    points = number(request, "points", POINTS, low=10, high=20_000)
    with job_in(request) as (ledger, found):
        drawn: Curves = request.app.state.curves
        inode = home_of(request).ledger.stat().st_ino
        return Json({"job": found.id, "curves": drawn.of_job(ledger, found.id, inode=inode, points=points)})


def gpus(request: Request) -> Response:
    """Give each GPU, its newest sample and who is at work on it; with `job`, what they did while it ran, thinned."""
    with ledger_if_any(home_of(request)) as ledger:
        data = gpus_at_work(gpu_states(home_of(request)), ledger)
        if ledger is None:
            return Json({"object": "list", "data": data, "curves": {}})
        job_id = request.query_params.get("job")
        drawn: Curves = request.app.state.curves
        inode = home_of(request).ledger.stat().st_ino
        curves = drawn.of_gpus(ledger, job_of(request, ledger, job_id).id, inode=inode) if job_id else {}
        return Json({"object": "list", "data": data, "curves": curves})


def predictions(request: Request) -> Response:
    """Give what a job's model answered while it learned."""
    with job_in(request, request.query_params.get("job", "")) as (ledger, found):
        return Json({"object": "list", "job": found.id, "data": ledger.predictions(found.id)})


def now(request: Request) -> Response:
    """Give what the page Now shows."""
    return Json(look(home_of(request)))


def job_order(request: Request) -> Response:
    """Order that something be done with a job."""
    verb = request.path_params["verb"]
    if verb not in _JOB_VERBS:
        raise Refused(404, f"an order is one of {', '.join(_JOB_VERBS)}", code="not_found")
    with job_in(request) as (ledger, found):
        before = request.query_params.get("job", "")
        if verb == Verb.BEFORE:
            before = job_of(request, ledger, before).id
        return Json({"said": order(home_of(request), Verb(verb), found.id, before=before)}, 202)


def queue_order(request: Request) -> Response:
    """Pause the queue, or let it go on."""
    verb = request.path_params["verb"]
    if verb not in (Verb.PAUSE, Verb.RESUME):
        raise Refused(404, "an order for the queue is pause or resume", code="not_found")
    return Json({"said": order(home_of(request), Verb(verb))}, 202)


def job_adapter(request: Request) -> Response:
    """Give a job's adapter as a zip file."""
    home = home_of(request)
    with ledger_if_any(home) as ledger:
        found = job_of(request, ledger)
    return zipped(home, found)


def metrics(request: Request) -> Response:
    """Give figures for Prometheus."""
    with ledger_if_any(home_of(request)) as ledger:
        text = figures(home_of(request), ledger)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def health(request: Request) -> Response:
    """Say that this process is well, and whether the daemon is at work."""
    return Json({"status": "ok", "daemon": daemon_pid(home_of(request)) is not None})


ROUTES = [
    Route("/api/jobs", jobs),
    Route("/api/jobs/{job}", job),
    Route("/api/jobs/{job}/events", job_events),
    Route("/api/jobs/{job}/curves", job_curves),
    Route("/api/jobs/{job}/adapter.zip", job_adapter),
    Route("/api/jobs/{job}/{verb}", job_order, methods=["POST"]),
    Route("/api/queue/{verb}", queue_order, methods=["POST"]),
    Route("/api/gpus", gpus),
    Route("/api/predictions", predictions),
    Route("/api/now", now),
    Route("/api/now/events", now_events),
    Route("/metrics", metrics),
    Route("/healthz", health),
]
