"""A Ray and a Slurm that answer as they are told, for what real ones, which are in `tests/cluster`, do seldom."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

UNKNOWN = 404, "Job x does not exist"


class Answers:
    """A server that gives to each method and path the answer that it holds, late if told so, and keeps the orders."""

    def __init__(self, port: int = 0) -> None:
        self.submit = 200, "{}"
        self.info = UNKNOWN
        self.late = 0.0
        self.orders: list[dict] = []
        self.stopped = 0
        self.headers: dict[str, str] = {}
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers.headers = dict(self.headers)
                self.reply(*answers.info)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.endswith("/stop"):
                    answers.stopped += 1
                    self.reply(200, "{}")
                else:
                    answers.orders.append(json.loads(content))
                    time.sleep(answers.late)
                    self.reply(*answers.submit)

            def reply(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def say(self, state: str, **more) -> None:
        self.info = 200, json.dumps({"status": state, **more})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def answering(port: int = 0):
    answers = Answers(port)
    try:
        yield answers
    finally:
        answers.close()


class PretendedSlurm:
    """Slurm's commands as scripts in a folder for PATH. What is submitted waits in the queue, and is never run."""

    AWAY = "Unable to contact slurm controller (connect failure)"

    _SQUEUE = """
[ -e "$0.says" ] && { cat "$0.says" >&2; exit 1; }
cat "$here/queue"
"""
    _SBATCH = """
cat > "$here/script"
for word; do case $word in --job-name=*) name=${word#*=};; --comment=*) comment=${word#*=};; esac; done
echo "$comment" >> "$here/submitted"
number=$(grep -c . "$here/submitted")
sleep "$(cat "$here/late")"
[ -e "$here/loses" ] || [ ! -e "$0.says" ] && echo "$number|PENDING|0|None|$name|$comment|" >> "$here/queue"
[ -e "$0.says" ] && { cat "$0.says" >&2; exit 1; }
echo "$number"
"""
    _SCANCEL = 'echo "$@" >> "$here/cancelled"'
    _SACCT = 'cat "$here/accounting"'

    def __init__(self, folder: Path) -> None:
        """Begin with an empty queue."""
        self.folder = folder
        folder.mkdir()
        self.takes(0)
        for name in ("queue", "submitted", "cancelled", "accounting"):
            (folder / name).touch()
        for name in ("squeue", "sbatch", "scancel", "sacct"):
            program = folder / name
            program.write_text(f"#!/bin/sh\nhere={folder}\n{getattr(self, '_' + name.upper())}\n")
            program.chmod(0o755)

    def says(self, name: str, error: str) -> None:
        """Let a command fail with these words; without words it works again."""
        path = self.folder / f"{name}.says"
        path.write_text(f"{name}: error: {error}\n") if error else path.unlink(missing_ok=True)

    def goes_away(self) -> None:
        self.says("squeue", self.AWAY)
        self.says("sbatch", self.AWAY)

    def comes_back(self) -> None:
        self.says("squeue", "")
        self.says("sbatch", "")

    def takes(self, seconds: float) -> None:
        """Have sbatch answer so late."""
        (self.folder / "late").write_text(str(seconds))

    def loses_answers(self) -> None:
        """Take what is submitted, also where sbatch fails."""
        (self.folder / "loses").touch()

    def lists(self, *lines: str) -> None:
        """Have squeue print this."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def accounts(self, text: str) -> None:
        """Have sacct print this."""
        (self.folder / "accounting").write_text(text)

    def has(self, name: str) -> list[str]:
        """Give the lines of `submitted`, `cancelled` or `queue`."""
        return (self.folder / name).read_text().splitlines()
