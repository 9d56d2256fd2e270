"""The control centre beside a real daemon."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.request

from conftest import chat_rows, eventually, write_config, write_jsonl
from finetuned.centre import ControlCentre
from finetuned.jobs import Outcome
from finetuned.section_settings import Web
from finetuned.status import gather, render


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def healthy(port: int) -> dict | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            return json.load(answer)
    except OSError:
        return None


def pids(one) -> list[int]:
    return [int(pid) for pid in re.findall(r"control centre starts.* pid=(\d+)", one.log())]


def test_the_daemon_starts_it_and_starts_it_again_and_neither_minds_the_other(home, daemon, standin):
    port = free_port()
    write_config(home, web={"port": port})
    one = daemon()
    assert eventually(lambda: healthy(port)) == {"status": "ok", "daemon": True}
    os.kill(pids(one)[0], signal.SIGKILL)
    write_jsonl(home.root / "staged", chat_rows(3)).rename(home.inbox / "x.jsonl")
    assert one.job("x.jsonl").outcome is Outcome.SUCCEEDED
    eventually(lambda: len(pids(one)) == 2 and healthy(port))
    write_config(home, web={"enabled": False})
    eventually(lambda: healthy(port) is None)
    assert one.stop() == 0


def test_it_ends_with_its_daemon_however_that_ends(home, daemon):
    port = free_port()
    write_config(home, web={"port": port})
    one = daemon()
    eventually(lambda: healthy(port))
    one.stop(signal.SIGKILL)
    eventually(lambda: healthy(port) is None)


def test_a_port_that_is_taken_is_said_with_its_holder_and_the_daemon_goes_on(home, daemon, standin):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        write_config(home, web={"port": port})
        one = daemon()
        one.says(f"port {port} is in use already by pid {os.getpid()}")
        write_jsonl(home.root / "staged", chat_rows(3)).rename(home.inbox / "x.jsonl")
        assert one.job("x.jsonl").outcome is Outcome.SUCCEEDED
        down = f"control centre down: it ended: port {port} is in use already by pid {os.getpid()}"
        assert down in render(gather(home))
    eventually(lambda: healthy(port))
    eventually(lambda: "control centre down" not in render(gather(home)))


def test_where_it_is_not_installed_that_is_said_once(home, monkeypatch, capsys):
    monkeypatch.setattr("finetuned.centre._NEEDED", ("starlette", "no_such_package"))
    centre = ControlCentre(home)
    for _ in range(3):
        centre.tend(Web())
    assert capsys.readouterr().out.count("no_such_package") == 1
    assert not home.web_down.exists()  # who does without it is not told at every `finetuned status`
    assert not (home.logs / "web.log").exists()
