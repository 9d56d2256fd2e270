"""Who may ask: the checks that every request passes before a page or a route sees it.

A page of another site can make a browser ask this server, but it cannot choose the Host header (so DNS that is bent to
this machine is found out), nor hide where a POST comes from. Where other machines can ask, a token is needed as well.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetuned.web.replies import Json

COOKIE = "finetuned-token"
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_WITHOUT_TOKEN = frozenset({"/login", "/healthz"})
_EMPTY = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"  # plotly adds an empty style element, which it fills
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self' {_EMPTY}; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser hides the Origin of our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_token(given: str, token: str) -> bool:
    """Compare in a time that tells nothing."""
    return bool(token) and hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


class Guarded:
    """The checks, around the application. `token` is None where none is needed."""

    def __init__(self, app: ASGIApp, *, host: str, token: str | None) -> None:
        self._app = app
        self._host = host
        self._token = token
        self._names = _LOCAL | {host.lower()}
        if not is_local(host):  # asked once: a name server may be slow
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return _no(421, "wrong_host", f"this server is not {host[:100]}", "Ask it by its address, or set web.host.")
        if scope["method"] not in _SAFE and not _same_origin(headers, host):
            return _no(403, "cross_origin", "another site may not give orders here")
        if self._token is not None and scope["path"] not in _WITHOUT_TOKEN and not scope["path"].startswith("/static/"):
            if is_token(_given(headers), self._token):
                return None
            if "text/html" in headers.get("accept", ""):
                return RedirectResponse(f"/login?{urlencode({'next': _wanted(scope)})}", 303)
            return _no(
                401, "no_token", "a token is needed", "It is in .finetuned/web-token; send Authorization: Bearer."
            )
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server: an address cannot be bent by DNS, a name must be one of ours."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._names:
            return True
        with suppress(ValueError):
            return not is_local(self._host) and bool(ipaddress.ip_address(name))
        return False


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request that changes something comes from our own pages, or from no browser at all."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:  # no page can forge it, and it holds behind a proxy that has another name than we
        return site == "same-origin"
    return origin is None or (origin != "null" and urlsplit(origin).netloc == host)


def _given(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def _wanted(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def _no(status: int, code: str, message: str, remedy: str = "") -> Response:
    error = {"message": message, "code": code, "param": None, "remedy": remedy, "type": "invalid_request_error"}
    return Json({"error": error}, status)
