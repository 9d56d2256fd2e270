"""A real control centre in a process of its own, and what a client of it does."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from finetuned.home import Home


class WebServer:
    """`finetuned web` on a free port."""

    def __init__(self, home: Home, *options: str) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetuned", "web", "--base-dir", str(home.root), "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("finetuned web: http://"), line
        self.address = line.split()[-1].rstrip("/")
        self.port = int(self.address.rpartition(":")[2])

    def ask(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str):
        """Ask as a client that is no browser; (status, headers, content). The path goes out as it is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path: str, *, status: int = 200, **request):
        got, _, content = self.ask(path, **request)
        assert got == status, content
        return json.loads(content)

    def stream(self, path: str, **headers: str) -> Iterator[tuple[int | None, str, dict]]:
        """Give the messages of a stream: (number, kind, data). Closing the iterator drops the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            fields: dict[str, str] = {}
            for raw in answer:
                line = raw.decode().rstrip("\n")
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    number = int(fields["id"]) if "id" in fields else None
                    yield number, fields["event"], json.loads(fields["data"])
                    fields = {}
        finally:
            connection.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def web(home) -> Callable[..., WebServer]:
    """Start control centres of the base directory `home`: `web("--host", "0.0.0.0")`."""
    started: list[WebServer] = []

    def start(*options: str) -> WebServer:
        started.append(WebServer(home, *options))
        return started[-1]

    yield start
    for one in started:
        one.stop()
