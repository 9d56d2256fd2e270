"""Telling that a job has ended: to a real HTTP server, and whatever goes wrong there is a warning alone."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.config import load_config
from finetuned.jobs import FileIdentity, Job, Outcome, State
from finetuned.ledger import Ledger
from finetuned.on_finish import News, Teller
from finetuned.section_settings import OnFinish
from finetuned.spool.publish import publish

POST = (
    f'{sys.executable} -c "import os, json, urllib.request as r; '
    "told = {k: v for k, v in os.environ.items() if 'FINETUNED_' in k}; "
    "r.urlopen(r.Request('URL', json.dumps(told).encode()))\""
)
NEWS = News("units-1a", "units; $(rm).jsonl", "succeeded", "units-1a: it \"succeeded\" & 'well'")


class Server:
    def __init__(self) -> None:
        self.got: list[dict] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def told(capsys):
    """Tell news and wait until they are told; what was warned of."""

    def tell(settings: OnFinish, news: News = NEWS, *, seconds: float = 60) -> str:
        teller = Teller()
        teller.tell(settings, news)
        teller.close(seconds=seconds)
        return capsys.readouterr().out

    return tell


def test_a_command_gets_the_news_in_its_environment_whatever_they_say(server, told):
    warned = told(OnFinish(command=POST.replace("URL", server.url)))
    assert "did not work" not in warned
    (got,) = server.got
    assert {"FINETUNED_JOB": NEWS.job, "FINETUNED_FILE": NEWS.file, "FINETUNED_LINE": NEWS.line}.items() <= got.items()
    assert got["FINETUNED_RESULT"] == "succeeded"


def test_services_get_a_title_and_the_line(server, told):
    pytest.importorskip("apprise")
    warned = told(OnFinish(urls=[f"json://127.0.0.1:{server.port}/"]))
    assert "did not work" not in warned
    (got,) = server.got
    assert (got["title"], got["message"], got["type"]) == ("finetuned: units-1a succeeded", NEWS.line, "success")


def test_a_service_that_is_none_or_does_not_answer_is_a_warning_and_the_others_are_told(server, told):
    pytest.importorskip("apprise")
    assert "no such services: nonsense" in told(OnFinish(urls=["nonsense://x", f"json://127.0.0.1:{server.port}/"]))
    assert len(server.got) == 1
    assert "did not take it" in told(OnFinish(urls=["json://127.0.0.1:9/"]))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"command": "echo oh no; exit 3"}, ["exit code 3", "oh no"]),
        ({"command": "no-such-program-anywhere"}, ["exit code 127", "not found"]),
        ({"command": "sleep 1000", "seconds": 0.2}, ["took longer than 0.2 s"]),
        ({"command": "sleep 1000 & sleep 1000", "seconds": 0.2}, ["took longer than 0.2 s"]),
    ],
    ids=str,
)
def test_a_command_that_fails_or_hangs_is_a_warning(told, settings, why):
    warned = told(OnFinish(**settings))
    assert all(word in warned for word in ["on_finish.command did not work", "units-1a", *why])


def test_what_is_not_told_when_the_daemon_ends_is_given_up(capsys):
    teller = Teller()
    for _ in range(3):
        teller.tell(OnFinish(command="sleep 1000", seconds=1000), NEWS)
    began = time.monotonic()
    teller.close(seconds=0.2)
    assert time.monotonic() - began < 60
    assert "not told any more" in capsys.readouterr().out


def test_a_daemon_tells_how_each_job_ended(home, daemon, standin, server, monkeypatch):
    write_config(home, on_finish={"command": POST.replace("URL", server.url)})
    one = daemon()
    write_jsonl(home.root / "a", chat_rows(3)).rename(home.inbox / "good.jsonl")
    job = one.job("good.jsonl")
    eventually(lambda: len(server.got) == 1)
    one.stop()
    standin(end=65)
    two = daemon()
    write_jsonl(home.root / "c", chat_rows(4)).rename(home.inbox / "bad.jsonl")
    assert two.job("bad.jsonl").outcome is Outcome.FAILED
    eventually(lambda: len(server.got) == 2)
    good, bad = server.got
    assert (good["FINETUNED_JOB"], good["FINETUNED_RESULT"]) == (job.id, "succeeded")
    assert good["FINETUNED_LINE"].startswith(f"{job.id}: good.jsonl succeeded: adapters/good")
    assert bad["FINETUNED_RESULT"] == "failed"
    assert "told to end so. mend it" in bad["FINETUNED_LINE"]
    assert two.stop() == 0
    three = daemon()
    eventually(lambda: three.log().count("finetuned starts") == 3)
    assert three.stop() == 0
    assert len(server.got) == 2  # each end is told once


def test_what_a_killed_daemon_did_not_tell_is_told_by_the_next_and_nothing_for_ever(home, daemon, standin, server):
    write_config(home, on_finish={"command": "echo > $(mktemp begun.XXXXXX); sleep 1000", "seconds": 1000})
    one = daemon(cwd=home.root)
    for number, name in enumerate(("a", "b")):
        write_jsonl(home.root / "staged", chat_rows(3, start=10 * number)).rename(home.inbox / f"{name}.jsonl")
        one.job(f"{name}.jsonl")
    for times in (1, 2):  # the end of `a` is being told, that of `b` waits for its turn
        eventually(lambda n=times: len(list(home.root.glob("begun.*"))) == n, why=f"telling begins, {times}")
        one.stop(signal.SIGKILL)
        if times == 1:
            one = daemon(cwd=home.root)
    write_config(home, on_finish={"command": POST.replace("URL", server.url)})
    last = daemon()
    eventually(lambda: server.got, why="the other end is told")
    last.says("given up")
    assert [got["FINETUNED_FILE"] for got in server.got] == ["b.jsonl"]
    assert "b.jsonl succeeded: adapters/b" in server.got[0]["FINETUNED_LINE"]


def test_an_end_that_recovery_brought_about_is_told_too(home, daemon, standin, server):
    """The daemon died between publishing and putting the input away."""
    write_config(home)
    standin(seconds=0.05)
    one = daemon()
    write_jsonl(home.root / "staged", chat_rows(20)).rename(home.inbox / "x.jsonl")
    trainer = one.job("x.jsonl", state=State.RUNNING)
    one.stop(signal.SIGKILL)
    eventually((home.job(trainer.id).path / "exit.1").exists, why="the trainer's end")
    write_config(home, on_finish={"command": POST.replace("URL", server.url)})
    ledger = Ledger.open(home.ledger)
    job = publish(ledger, home, ledger.job(trainer.id))
    assert job.state is State.TRAINED
    ledger.close()
    daemon()
    eventually(lambda: server.got, why="it is told")
    assert server.got[0]["FINETUNED_LINE"].startswith(f"{job.id}: x.jsonl succeeded: adapters/x")


def test_with_once_all_is_told_before_the_daemon_ends(home, daemon, standin, server):
    write_config(home, on_finish={"command": "sleep 0.3; " + POST.replace("URL", server.url)})
    for number in range(3):
        write_jsonl(home.inbox / f"{number}.jsonl", chat_rows(3, start=10 * number))
    assert daemon("--once").process.wait(60) == 0
    assert sorted(got["FINETUNED_FILE"] for got in server.got) == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_a_job_that_is_tried_again_is_told_once_more(tmp_path):
    ledger = Ledger.open(tmp_path / "state.db")
    ledger.add(Job("x-1", b"x.jsonl", "", FileIdentity(1, 2, 3, 4), State.QUEUED, 1.0))

    def ends() -> int:
        for state in (State.FAILING, State.FINISHED):
            ledger.update("x-1", state=state)
        return ledger.next_news()[0]

    first = ends()
    for state in (State.CLAIMING, State.QUEUED):
        ledger.update("x-1", state=state)
    assert ledger.next_news() is None
    second = ends()
    ledger.drop_news(first)  # of the end before, told late
    assert ledger.next_news()[0] == second
    ledger.close()


def test_a_job_is_not_held_up_by_a_command_that_hangs(home, daemon, standin):
    write_config(home, on_finish={"command": "sleep 1000", "seconds": 1000})
    one = daemon()
    for number in range(3):
        write_jsonl(home.root / "a", chat_rows(3, start=10 * number)).rename(home.inbox / f"{number}.jsonl")
        assert one.job(f"{number}.jsonl").state is State.FINISHED
    assert one.stop() == 0


def test_an_inbox_cannot_say_who_is_told(home):
    config = load_config(home.config_file)
    assert "on_finish" not in type(config.training()).model_fields
