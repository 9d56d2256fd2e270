"""A real browser, Debian's chromium, and a watch on all that it does: no error, and no request to another host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from fixtures_web import WebServer

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="session")
def chromium():
    """The browser, or no test where it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as running:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []  # chromium refuses to be root in one
        browser = running.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def server(request, home, chromium):
    one = WebServer(home, *getattr(request, "param", ()))
    one.address = f"http://127.0.0.1:{one.port}"
    yield one
    one.stop()


@pytest.fixture
def visit(server, chromium) -> Callable:
    """Open pages of the server; whatever went wrong in one of them fails the test when it ends."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: str, *, scheme: str = "light", width: int = 1280, fine: bool = True):
        """With `fine` false, what the browser says of answers that are errors is no fault."""
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        if fine:
            page.on("console", lambda said: wrong.append(said.text) if said.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: (
                wrong.append(asked.url)
                if urlsplit(asked.url).scheme not in {"data", "blob"} and not asked.url.startswith(server.address + "/")
                else None
            ),
        )
        page.goto(server.address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
