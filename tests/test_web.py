"""The control centre's API: a real server process, a real ledger, asked over real sockets."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import socket
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from finetuned.curves import Series
from finetuned.events import Event, EventType
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.web.curves import thin
from test_scores import measurement

IDENTITY = FileIdentity(1, 2, 3, 4)
SETTINGS = {"model": "smollm2-135m", "epochs": 2.0, "seed": 42}


@pytest.fixture
def ledger(home):
    ledger = Ledger.open(home.ledger)
    yield ledger
    ledger.close()


def job(job_id: str, state: State = State.QUEUED, **more) -> Job:
    more = {"created_at": 1000.0, "settings": SETTINGS, **more}
    return Job(job_id, f"{job_id}.jsonl".encode(), "", IDENTITY, state, **more)


def steps(*numbers: int, **figures) -> list[Event]:
    return [
        Event(1000.0 + n, EventType.METRICS, f"step {n}", "info", {"step": n, "train_loss": 1 / n, **figures})
        for n in numbers
    ]


DONE = {"outcome": Outcome.SUCCEEDED, "adapter": "units", "started_at": 1001.0, "finished_at": 1060.9}


# -- reading


def test_without_a_ledger_everything_is_empty_and_well(web):
    server = web()
    assert server.json("/api/jobs")["data"] == []
    assert server.json("/api/now")["running"] == []
    assert server.json("/api/gpus")["data"] == []
    assert server.json("/healthz") == {"status": "ok", "daemon": False}
    assert b"finetuned_daemon_up 0\n" in server.ask("/metrics")[2]


def test_a_job_has_the_fields_of_openai_s_api(web, ledger):
    ledger.add(job("units-1", State.FINISHED, **DONE))
    reason = {"code": "c", "what": "w", "where": "x:1", "remedy": "Mend it."}
    ledger.add(job("bad-1", State.FINISHED, outcome=Outcome.FAILED, reason=reason))
    server = web()
    found = server.json("/api/jobs/units-1")
    assert found["seconds"] == pytest.approx(59.9)
    expected = {
        "object": "fine_tuning.job",
        "id": "units-1",
        "model": "smollm2-135m",
        "created_at": 1000,
        "finished_at": 1060,
        "status": "succeeded",
        "error": None,
        "seed": 42,
        "result_files": ["adapters/units"],
        "training_file": "units-1.jsonl",
        "fine_tuned_model": "units",
    }
    assert found | expected == found
    assert found["hyperparameters"]["n_epochs"] == 2.0
    assert server.json("/api/jobs/bad-1")["error"] == {"code": "c", "message": "w. Mend it.", "param": "x:1"}


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("", ["d", "c", "b", "a"]),
        ("sort=created_at&limit=2", ["a", "b"]),
        ("sort=created_at&limit=2&offset=2", ["c", "d"]),
        ("sort=created_at&offset=4", []),
        ("status=queued&sort=name", ["a", "b"]),
        ("status=running", ["c"]),
        ("status=failed", ["d"]),
        ("status=succeeded", []),
        ("text=B.JSON", ["b"]),
        ("limit=-5", ["d"]),
    ],
)
def test_jobs_are_listed_page_by_page_filtered_and_sorted(web, ledger, query, ids):
    states = {"a": State.QUEUED, "b": State.QUEUED, "c": State.RUNNING}
    ledger.add_all(job(name, state, created_at=float(n)) for n, (name, state) in enumerate(states.items()))
    ledger.add(job("d", State.FINISHED, created_at=9.0, outcome=Outcome.FAILED))
    answer = web().json(f"/api/jobs?{query}")
    assert [found["id"] for found in answer["data"]] == ids


@pytest.mark.parametrize("query", ["sort=settings", "status=great", "limit=many", "sort=created_at;DROP"])
def test_a_list_that_cannot_be_made_is_refused(web, ledger, query):
    assert web().json(f"/api/jobs?{query}", status=400)["error"]["message"]


def test_a_hundred_thousand_jobs_are_paged(web, ledger):
    ledger.add_all(
        job(f"j-{n}", State.FINISHED, created_at=float(n), outcome=Outcome.SUCCEEDED, finished_at=n + 9.0)
        for n in range(100_000)
    )
    server = web()
    answer = server.json("/api/jobs?sort=name&offset=99000&limit=100&text=j-9")
    assert answer["total"] == 11_111
    assert server.json("/api/jobs?offset=99999")["data"][0]["id"] == "j-0"


def test_predictions_and_curves_are_given(web, ledger):
    ledger.add(job("x", State.RUNNING))
    sample = {"prompt": "p", "expected": "e", "answer": "a", "exact": False, "similarity": 0.5, "seconds": 0.1}
    asked = Event(1.0, EventType.PREDICTIONS, "asked", "info", {"step": 0, "epoch": 0.0, "samples": [sample]})
    ledger.record("x", [asked, *steps(1, 2, 3, 2, learning_rate=0.1), *steps(3, grad_norm=float("nan"))], offset=1)
    server = web()
    assert server.json("/api/predictions?job=x")["data"][0]["answer"] == "a"
    drawn = server.json("/api/jobs/x/curves")["curves"]
    assert drawn["train_loss"] == {"step": [1, 2, 3], "value": [1, 1 / 2, 1 / 3]}
    assert "grad_norm" not in drawn
    for path in ("/api/jobs/y", "/api/jobs/y/curves", "/api/predictions?job=y", "/api/predictions", "/api/gpus?job=y"):
        assert server.json(path, status=404)["error"]["code"] == "not_found"


def test_a_benchmark_is_given_in_figures_and_in_words(web, ledger):
    ledger.add(job("x"))
    server = web()
    assert server.json("/api/jobs/x")["benchmark"] is None
    ledger.record("x", [Event(1.0, EventType.BENCHMARK, "measured", "info", measurement())], offset=2)
    found = server.json("/api/jobs/x")["benchmark"]
    assert found["models"][1]["accuracy"]["count"] == 3
    assert found["table"][2][:2] == ["x", "1.5000 (1.2500 to 1.7500)"]
    assert found["sentences"][-1] == "no row stands in the training data (x.jsonl)"


def test_gpus_are_given_as_the_daemon_saw_them_in_base_units(web, ledger):
    ledger.add(job("x", State.RUNNING, progress={"step": 7, "train_loss": 0.5}))
    sample = {"uuid": "GPU-1", "index": 0, "name": "H", "utilization": 50, "sm_clock": 1500, "created_at": 5.0}
    ledger.record_gpu("x", [(5.0, "GPU-1", {**sample, "throttle_reasons": ["power cap"]})])
    server = web()
    [gpu] = server.json("/api/gpus")["data"]
    assert gpu["utilization"] == 50
    assert server.json("/api/gpus?job=x")["curves"]["GPU-1"]["throttled"] == [{"at": 5.0, "why": ["power cap"]}]
    said = server.ask("/metrics")[2].decode()
    assert 'finetuned_gpu_utilization_ratio{gpu="0",uuid="GPU-1",name="H"} 0.5\n' in said
    assert 'finetuned_gpu_sm_clock_hertz{gpu="0",uuid="GPU-1",name="H"} 1500000000\n' in said
    assert 'finetuned_job_train_loss{job="x"} 0.5\n' in said
    assert 'finetuned_jobs{status="running"} 1\n' in said


def test_several_jobs_are_told_each_with_where_it_runs(web, ledger, home):
    states = [{"uuid": f"GPU-{n}", "index": n, "name": "H", "state": "usable", "why": ""} for n in range(2)]
    home.gpus.write_text(json.dumps([*states, {**states[0], "uuid": "GPU-2", "index": 2, "state": "busy"}]))
    for n in range(2):
        more = {"devices": [f"GPU-{n}"], "processes": n + 1, "step": n}
        ledger.add(job(f"x-{n}", State.RUNNING, attempt=1, progress=more))
        sample = {"uuid": f"GPU-{n}", "index": n, "name": "H", "utilization": 50 + n, "created_at": 5.0}
        ledger.record_gpu(f"x-{n}", [(5.0, f"GPU-{n}", sample)])
    settings = {**SETTINGS, "launcher": "ray"}
    ledger.add(job("far", State.RUNNING, attempt=1, settings=settings, trainer_id="raysubmit_1"))
    ledger.add(job("waits", progress={"waits_for": "GPU 2 H is used by others"}))
    server = web()
    now = server.json("/api/now")
    assert [one["where"]["words"] for one in now["running"]] == [
        "on GPU 0 H",
        "on GPU 1 H, 2 processes",
        "with ray as raysubmit_1",
    ]
    assert now["queue"][0]["why_waiting"] == "GPU 2 H is used by others"
    assert [(gpu["state"], gpu["jobs"]) for gpu in now["gpus"]] == [
        ("usable", ["x-0"]),
        ("usable", ["x-1"]),
        ("busy", []),
    ]
    assert server.json("/api/gpus")["data"] == now["gpus"]
    assert server.json("/api/jobs/far")["where"]["id"] == "raysubmit_1"
    said = server.ask("/metrics")[2].decode()
    for line in (
        'finetuned_job_step{job="x-1"} 1',
        'finetuned_job_info{job="far",launcher="ray",id="raysubmit_1"} 1',
        'finetuned_job_processes{job="x-1"} 2',
        'finetuned_gpu_jobs{gpu="0",uuid="GPU-0",name="H"} 1',
        'finetuned_gpu_usable{gpu="2",uuid="GPU-2",name="H"} 0',
        'finetuned_gpu_utilization_ratio{gpu="0",uuid="GPU-0",name="H"} 0.5',
        'finetuned_gpu_utilization_ratio{gpu="1",uuid="GPU-1",name="H"} 0.51',
    ):
        assert f"{line}\n" in said


def test_an_adapter_is_downloaded_as_a_zip(web, ledger, home):
    folder = home.adapters / "units"
    (folder / "inner").mkdir(parents=True)
    (folder / "finetuned.json").write_text('{"job_id": "units-1"}')
    (folder / "inner" / "weights").write_bytes(bytes(3_000_000))
    (folder / "secret").symlink_to("/etc/passwd")
    ledger.add(job("units-1", State.FINISHED, **DONE))
    ledger.add(job("other-1", State.FINISHED, **DONE))  # whose adapter is not the one of that name
    server = web()
    status, headers, content = server.ask("/api/jobs/units-1/adapter.zip")
    assert status == 200
    assert 'filename="units.zip"' in headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["units/finetuned.json", "units/inner/weights"]
    assert server.ask("/api/jobs/other-1/adapter.zip")[0] == 404


def test_a_job_names_the_base_model_that_its_adapter_is_to_be_loaded_with(web, ledger, home):
    """Not the alias in the settings, which no hub knows; and none where the adapter is gone."""
    folder = home.adapters / "units"
    folder.mkdir(parents=True)
    (folder / "finetuned.json").write_text('{"job_id": "units-1", "base_model": "org/Model"}')
    ledger.add(job("units-1", State.FINISHED, **DONE))
    ledger.add(job("other-1", State.FINISHED, **DONE))
    server = web()
    assert server.json("/api/jobs/units-1")["base_model"] == "org/Model"
    assert server.json("/api/jobs/other-1")["base_model"] is None


def test_what_no_text_can_hold_is_told_all_the_same(web, ledger):
    """Half a character of a broken data file, a number beyond 64 bits, a loss that is no number."""
    odd = {"where": "caf\udce9", "seed": 2**70, "grad_norm": float("nan"), "\ud800": [float("inf")]}
    reason = {"code": "c", "what": "caf\udce9", "where": "x", "remedy": ""}
    ledger.add(job("x", State.FINISHED, outcome=Outcome.FAILED, reason=reason))
    ledger.record("x", [Event(1.0, EventType.ERROR, "odd", "error", odd)], offset=1)
    server = web()
    [(_, _, said), (_, kind, _)] = server.stream("/api/jobs/x/events")
    assert (said["data"]["where"], said["data"]["seed"], said["data"]["grad_norm"]) == ("caf?", 2**70, None)
    assert kind == "end"
    assert server.json("/api/jobs/x")["error"]["code"] == "c"


def test_a_damaged_ledger_is_said_and_so_is_its_remedy(web, home):
    home.ledger.write_bytes(b"no database at all " * 100)
    server = web()
    for path in ("/api/jobs", "/api/gpus", "/metrics"):
        assert "damaged" in server.json(path, status=400)["error"]["message"]
    assert "damaged" in server.json("/api/now")["waits"]
    assert "damaged" in next(server.stream("/api/now/events"))[2]["waits"]


# -- streams


def test_a_stream_gives_what_was_said_and_what_is_said_then(web, ledger):
    ledger.add(job("x", State.RUNNING))
    ledger.record("x", steps(1, 2), offset=1)
    stream = web().stream("/api/jobs/x/events")
    first = [next(stream) for _ in range(2)]
    assert [data["message"] for _, _, data in first] == ["step 1", "step 2"]
    assert first[0][2]["object"] == "fine_tuning.job.event"
    ledger.record("x", steps(3), offset=2)
    assert next(stream)[2]["message"] == "step 3"
    ledger.update("x", state=State.TRAINED)
    ledger.update("x", state=State.FINISHED, outcome=Outcome.SUCCEEDED)
    assert next(stream)[1] == "end"
    assert next(stream, None) is None


def test_a_dropped_stream_goes_on_without_loss_or_repetition(web, ledger):
    ledger.add(job("x", State.RUNNING))
    ledger.add(job("y", State.RUNNING))
    server = web()
    seen: list[str] = []
    last = None
    for turn in range(5):
        ledger.record("x", steps(turn * 3 + 1, turn * 3 + 2), offset=1)
        ledger.record("y", steps(turn + 1), offset=1)  # another job's events lie between
        ledger.record("x", steps(turn * 3 + 3), offset=1)
        stream = server.stream("/api/jobs/x/events", **({"Last_Event_ID": str(last)} if last else {}))
        for number, _, data in itertools.islice(stream, 2 if turn < 4 else 7):
            last = number
            seen.append(data["message"])
        stream.close()
    assert seen == [f"step {n}" for n in range(1, 16)]


def test_a_stream_may_begin_with_the_last_events(web, ledger):
    ledger.add(job("x", State.FINISHED))
    ledger.record("x", steps(*range(1, 1201)), offset=1)
    server = web()
    assert [data["message"] for _, kind, data in server.stream("/api/jobs/x/events?last=2") if kind == "event"] == [
        "step 1199",
        "step 1200",
    ]
    assert sum(kind == "event" for _, kind, _ in server.stream("/api/jobs/x/events")) == 1200
    assert server.ask("/api/jobs/x/events", Last_Event_ID="1 OR 1=1")[0] == 400
    assert server.ask("/api/jobs/none/events")[0] == 404


def test_a_stream_does_not_say_that_it_ended_when_the_ledger_cannot_be_read(web, ledger, home):
    ledger.add(job("x", State.RUNNING))
    ledger.record("x", steps(1), offset=1)
    stream = web().stream("/api/jobs/x/events")
    assert next(stream)[2]["message"] == "step 1"
    home.ledger.rename(home.root / "elsewhere")
    assert next(stream, None) is None  # so a browser comes back; after "end" it would not


def test_the_situation_is_told_when_it_changes(web, ledger):
    stream = web().stream("/api/now/events")
    assert next(stream)[2]["queue"] == []
    ledger.add(job("x"))
    assert [waiting["id"] for waiting in next(stream)[2]["queue"]] == ["x"]


def test_fifty_open_pages_cost_little(web, ledger):
    ledger.add(job("x", State.RUNNING))
    ledger.record("x", steps(*range(1, 200)), offset=1)
    server = web()
    streams = [server.stream("/api/now/events") for _ in range(50)]
    streams += [server.stream("/api/jobs/x/events?last=100") for _ in range(50)]
    for stream in streams:
        next(stream)
    facts = Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", facts)[1]) < 100 * 1024


# -- orders


def test_orders_stand_in_the_ledger_for_the_daemon(web, ledger):
    ledger.add(job("x"))
    server = web()
    for path in ("/api/jobs/x/first", "/api/jobs/x/cancel", "/api/queue/pause"):
        assert server.json(path, method="POST", status=202)["said"]
    assert [(verb, job_id) for _, verb, job_id, _ in ledger.orders()] == [
        ("first", "x"),
        ("cancel", "x"),
        ("pause", ""),
    ]


def test_an_order_that_cannot_be_carried_out_is_refused_with_its_remedy(web, ledger):
    ledger.add(job("x", State.FINISHED, **DONE))
    server = web()
    assert "has ended" in server.json("/api/jobs/x/cancel", method="POST", status=409)["error"]["message"]
    assert server.ask("/api/jobs/x/delete", method="POST")[0] == 404
    assert server.ask("/api/jobs/y/cancel", method="POST")[0] == 404
    assert server.ask("/api/queue/cancel", method="POST")[0] == 404
    assert server.ask("/api/jobs/x/cancel")[0] == 405
    assert ledger.orders() == []


# -- safety


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.4", ""]
)
def test_a_request_that_names_another_host_is_refused(web, host):
    assert web().ask("/api/jobs", Host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1", "[::1]:1"])
def test_a_request_by_one_of_this_machine_s_names_is_met(web, host):
    assert web().ask("/api/jobs", Host=host)[0] == 200


def test_only_our_own_pages_and_no_browsers_may_give_orders(web, ledger):
    server = web()
    foreign = [{"Origin": origin} for origin in ("http://evil.example", "null", "http://localhost:1", "localhost:7")]
    foreign += [{"Sec_Fetch_Site": site} for site in ("cross-site", "same-site", "none")]
    for headers in foreign:
        assert server.ask("/api/queue/pause", method="POST", Host="localhost:7", **headers)[0] == 403, headers
    assert ledger.orders() == []
    own = [{"Sec_Fetch_Site": "same-origin"}, {"Sec_Fetch_Site": "same-origin", "Origin": "http://localhost:7"}, {}]
    own.append({"Sec_Fetch_Site": "same-origin", "Origin": "https://proxy.example"})
    for headers in own:
        assert server.ask("/api/queue/pause", method="POST", Host="localhost:7", **headers)[0] == 202, headers
    assert len(ledger.orders()) == len(own)


def test_no_id_leads_out_of_the_ledger(web, ledger):
    ledger.add(job("x"))
    server = web()
    tricks = (
        "..",
        "%2e%2e",
        "..%2f..%2fconfig",
        "%2e%2e%2f%2e%2e%2fconfig.json",
        "x%00",
        "x%0a",
        "*",
        "x'--",
        "a" * 300,
    )
    for job_id in tricks:
        for path in ("", "/events", "/curves", "/adapter.zip"):
            assert server.ask(f"/api/jobs/{job_id}{path}")[0] in {404, 307}, (job_id, path)


def test_every_answer_has_a_strict_policy(web):
    server = web()
    for path in ("/api/jobs", "/nowhere", "/metrics"):
        headers = server.ask(path)[1]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_where_other_machines_can_ask_a_token_is_needed(web, ledger, home):
    server = web("--host", "0.0.0.0")
    assert stat.S_IMODE(home.web_token.stat().st_mode) == 0o600
    token = home.web_token.read_text().strip()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}, {"Cookie": "a=b"}):
        assert server.ask("/api/jobs", **headers)[0] == 401
        assert server.ask("/api/queue/pause", method="POST", **headers)[0] == 401
    assert ledger.orders() == []
    assert server.ask("/api/jobs", Authorization=f"Bearer {token}")[0] == 200
    assert server.ask("/api/jobs", Cookie=f"finetuned-token={token}")[0] == 200
    assert server.ask("/healthz")[0] == 200
    assert server.ask("/api/jobs", Authorization=f"Bearer {token}", Host="evil.example")[0] == 421
    assert server.ask("/api/jobs", Authorization=f"Bearer {token}", Host="192.168.1.4:80")[0] == 200


def test_a_port_in_use_is_an_error_that_names_the_holder(home):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "finetuned", "web", "--base-dir", str(home.root), "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 78
    [line] = done.stderr.splitlines()
    assert f"port {port} is in use already by pid {os.getpid()} (" in line


def test_the_token_is_taken_by_a_form_and_kept_as_a_cookie_that_no_script_reads(web, home):
    server = web("--host", "0.0.0.0")
    status, headers, _ = server.ask("/", Accept="text/html")
    assert (status, headers["location"]) == (303, "/login?next=%2F")
    assert server.ask("/jobs/x?with=y", Accept="text/html")[1]["location"] == "/login?next=%2Fjobs%2Fx%3Fwith%3Dy"
    token = home.web_token.read_text().strip()
    assert server.ask("/login", method="POST", body=b"token=wrong")[0] == 401
    assert server.ask("/login", method="POST", body=b"token=" + b"x" * 9999)[0] == 413
    status, headers, _ = server.ask("/login", method="POST", body=f"token={token}".encode())
    assert status == 303
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert server.ask("/", Cookie=cookie.partition(";")[0])[0] == 200


@pytest.mark.parametrize(
    ("wanted", "place"), [("/jobs/x?with=y", "/jobs/x?with=y"), ("//evil.example", "/"), ("x", "/")]
)
def test_the_token_leads_to_the_page_that_was_asked_for_and_never_to_another_site(web, home, wanted, place):
    server = web("--host", "0.0.0.0")
    path = f"/login?next={quote(wanted, safe='')}"
    token = home.web_token.read_text().strip()
    assert server.ask(path, method="POST", body=f"token={token}".encode())[1]["location"] == place


def test_an_empty_token_opens_nothing(home):
    home.web_token.touch()
    words = ["web", "--base-dir", str(home.root), "--port", "0", "--host", "0.0.0.0"]
    done = subprocess.run([sys.executable, "-m", "finetuned", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "holds no token" in done.stderr


# -- pages


def test_pages_and_their_files_are_served_and_nothing_besides(web, ledger):
    ledger.add(job("x"))
    server = web()
    for path in ("/", "/drop", "/history", "/config", "/jobs/x", "/login"):
        status, _, content = server.ask(path)
        assert status == 200
        assert b"<script>" not in content
        assert b"style=" not in content
    for path in ("/static/style.css", "/static/now.js", "/static/plotly.min.js"):
        assert server.ask(path)[0] == 200
    for path in (
        "/jobs/y",
        "/static/../pages.py",
        "/static/%2e%2e/pages.py",
        "/static/..%2fpages.py",
        "/static//etc/passwd",
    ):
        assert server.ask(path)[0] == 404


def test_an_error_is_json_for_programs_and_a_page_for_people(web):
    server = web()
    for path in ("/api/nowhere", "/nowhere", "/jobs/none", "/static/none.js"):
        assert server.json(path, status=404)["error"]["code"] == "not_found"
    assert server.json("/api/jobs", method="PUT", status=405)["error"]["message"] == "Method Not Allowed"
    status, headers, content = server.ask("/jobs/none", Accept="text/html")
    assert (status, headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert b"<h1>There is no such job</h1>" in content


def test_a_file_that_cannot_be_read_is_said_without_its_path(web, home):
    server = web()
    home.config_file.unlink()
    home.config_file.mkdir()
    told = server.json("/api/config", status=503)["error"]
    assert (told["code"], told["message"]) == ("unavailable", "this cannot be read or written now: Is a directory")


# -- thinning


def series(values: list[float]) -> Series:
    made = Series()
    for step, value in enumerate(values):
        made.note(step, value)
    return made


def test_thinning_keeps_the_ends_and_every_spike():
    values = [0.0] * 100_000
    values[31_416], values[77_777] = 50.0, -50.0
    thinned = thin(series(values), points=1000)
    assert len(thinned["step"]) <= 1000
    assert {max(thinned["value"]), min(thinned["value"])} == {50.0, -50.0}
    assert thinned["step"] == sorted(set(thinned["step"]))
    assert (thinned["step"][0], thinned["step"][-1]) == (0, 99_999)


def test_a_short_curve_is_given_as_it_is_and_grows_with_its_job(web, ledger):
    ledger.add(job("x", State.RUNNING))
    figures = ({"step": 1, "train_loss": 2.0}, {"step": 1, "valid_loss": 3.0}, {"train_loss": 1.0})
    ledger.record("x", [Event(1.0, EventType.METRICS, "", "info", data) for data in figures], offset=1)
    server = web()
    drawn = {"train_loss": {"step": [1], "value": [2.0]}, "valid_loss": {"step": [1], "value": [3.0]}}
    assert server.json("/api/jobs/x/curves")["curves"] == drawn
    ledger.record("x", [*steps(2, 4), *steps(1, 3)], offset=2)
    drawn["train_loss"] = {"step": [1, 2, 3, 4], "value": [1.0, 1 / 2, 1 / 3, 1 / 4]}
    assert server.json("/api/jobs/x/curves")["curves"] == drawn


def test_what_a_recipe_tells_beside_the_loss_has_curves_too(web, ledger):
    ledger.add(job("x", State.RUNNING))
    own = {"loss_risk": 1.5, "grad_norm_policy": 0.2, "reward": -0.1, "reward_plain": 0.5}
    told = ({"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": 1.0, **own, "seconds_left": 3.0, "word": "x"})
    ledger.record("x", [Event(1.0, EventType.METRICS, "", "info", data) for data in told], offset=1)
    drawn = web().json("/api/jobs/x/curves")["curves"]
    assert drawn.pop("train_loss")["step"] == [1, 2]
    assert drawn == {name: {"step": [2], "value": [value]} for name, value in own.items()}


def test_fifty_pages_of_a_long_job_that_open_together_cost_little(web, ledger):
    ledger.add(job("x", State.RUNNING))
    ledger.record("x", steps(*range(1, 100_001), learning_rate=1e-4, grad_norm=1.0, tokens_per_second=5.0), offset=1)
    sample = {"index": 0, "utilization": 50, "memory_used": 2**30, "power": 99.0, "temperature": 50}
    given = [(float(n), "G", {**sample, "uuid": f"G{n % 8}", "created_at": float(n)}) for n in range(20_000)]
    ledger.record_gpu("x", given)
    server = web()
    for path in ("/api/jobs/x/curves", "/api/gpus?job=x"):
        with ThreadPoolExecutor(50) as pages:
            answers = list(pages.map(lambda _, path=path: server.ask(path)[0], range(50)))
        assert set(answers) == {200}
    facts = Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", facts)[1]) < 100 * 1024


def test_a_curve_of_a_hundred_thousand_steps_comes_thinned(web, ledger):
    ledger.add(job("x", State.RUNNING))
    ledger.record("x", steps(*range(1, 100_001), learning_rate=1e-4, grad_norm=1.0, tokens_per_second=5.0), offset=1)
    drawn = web().json("/api/jobs/x/curves")["curves"]
    assert all(len(curve["step"]) <= 2000 for curve in drawn.values())
    assert drawn["train_loss"]["step"][-1] == 100_000
    assert json.dumps(drawn)


def test_a_recipe_s_own_losses_and_norms_have_curves_too(web, ledger):
    ledger.add(job("x", State.RUNNING))
    ledger.record("x", steps(1, 2, loss_teacher=2.0, grad_norm_projector=3.0, alpha=1), offset=1)
    assert web().json("/api/jobs/x/curves")["curves"] == {
        "train_loss": {"step": [1, 2], "value": [1.0, 0.5]},
        "loss_teacher": {"step": [1, 2], "value": [2.0, 2.0]},
        "grad_norm_projector": {"step": [1, 2], "value": [3.0, 3.0]},
    }
