"""`finetuned web`: the process. Binds its port first, so that the one error people meet names who has it."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path

import click
import uvicorn

from finetuned.base_directory import web_token
from finetuned.errors import HomeError
from finetuned.home import Home
from finetuned.web.app import make_app
from finetuned.web.safety import is_local
from finetuned.web.uploads import forget_old

_GRACE = 1  # seconds for open streams when it ends


def serve(home: Home, *, host: str, port: int, with_daemon: bool = False) -> None:
    """Serve until a signal comes; with the daemon, also until its end of standard input closes.

    Raises HomeError if the port cannot be had.
    """
    listening = listen(host, port)
    token = None if is_local(host) else web_token(home)
    forget_old(home)
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"finetuned web: http://{shown}:{listening.getsockname()[1]}/")
    if token:
        click.echo(f"other machines can reach it, so it asks for the token in {home.web_token}")
    sys.stdout.flush()
    settings = uvicorn.Config(
        make_app(home, host=host, token=token),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    with suppress(KeyboardInterrupt):  # the way in which people end it
        asyncio.run(_serve(uvicorn.Server(settings), listening, with_daemon=with_daemon))


async def _serve(server: uvicorn.Server, listening: socket.socket, *, with_daemon: bool) -> None:
    if with_daemon:
        loop = asyncio.get_running_loop()

        def heard() -> None:
            if not os.read(0, 1024):  # the daemon is gone, however it ended
                loop.remove_reader(0)
                server.should_exit = True

        loop.add_reader(0, heard)
    await server.serve(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Bind the port. Raises HomeError that names who has it already."""
    remedy = 'Set "web": {"port": ...} in config.json to another one, or use --port.'
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise HomeError(f"cannot listen on {host}:{port}: {error.strerror}", remedy=remedy) from error
        holder = holder_of(port)
        by = f" by {holder}" if holder else ""
        raise HomeError(f"port {port} is in use already{by}", remedy=remedy, code="port_in_use") from error
    return listening


def holder_of(port: int) -> str | None:
    """Name the process that listens on a port: `pid 123 (python3 -m http.server)`. None if it cannot be seen."""
    sockets = {f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening(Path("/proc/net", table), port)}
    for link in Path("/proc").glob("[0-9]*/fd/*") if sockets else ():
        with suppress(OSError):
            if os.readlink(link) in sockets:  # noqa: PTH115, it is no path
                process = link.parents[1]
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                return f"pid {process.name} ({words[:120]})"
    return None


def _listening(table: Path, port: int) -> list[str]:
    """Give the inodes of the sockets of a table of the kernel that listen on a port."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return []
    return [row[9] for row in rows if row[3] == "0A" and re.search(rf":{port:04X}$", row[1])]
