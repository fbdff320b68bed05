"""What stands between the network and the routes: pure ASGI, so that nothing is read or held that need not be.

From outside in: headers and last errors, host and origin, (the password, app/auth.py), known addresses, size of the body.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "[::1]")
# Gradio's page has scripts and styles in its text, compiles each part's js_on_load, and shows data: and blob: pictures.
# Nothing may come from, or go to, another origin.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # no-referrer would make the login form's Origin "null"
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
SMALL, LARGE = 8 * 2**20, 2 * 2**30 + 2**20  # bytes of a body: any route, and those that take files (2 GB and the multipart's own lines)
TAKE_FILES = ("/api/images", "/api/datasets/import", "/api/tools/files")
DRAIN, DRAIN_S = 256 * 2**20, 10  # how much of a body that is too large is still read, so that the browser gets to see the answer
log = logging.getLogger("app")


def refusal(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text, "errors": {}}, status)


class Outermost:
    """Puts the headers on every answer, and turns an error that nobody caught into a sentence; the traceback goes to the log alone."""

    def __init__(self, app: ASGIApp, log_file: str) -> None:
        self.app, self.log_file = app, log_file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:
            log.exception("%s %s", scope["method"], scope["path"])
            if begun:
                raise  # the connection is cut: half an answer must not look like a whole one
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            text = f"Something went wrong that should not have: {type(error).__name__}. What happened is written in {self.log_file}."
            text = "The disk is full. Free some space, then try again." if full else text
            await refusal(500, text)(scope, receive, with_headers)


class Hosts:
    """Refuses requests by which a foreign web page could act here: other names for this address (DNS rebinding), and other origins."""

    def __init__(self, app: ASGIApp, allowed: Callable[[str], bool]) -> None:
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            why = self._why_not(scope)
            if why and scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            if why:
                return await refusal(403, why)(scope, receive, send)
        await self.app(scope, receive, send)

    def _why_not(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        host, origin, site = headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if not self.allowed(name.lower()):
            return f"This server is not known as {host!r}. Use the address that it printed when it started."
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return f"This request comes from a page of {origin!r}; only this server's own pages may ask."
        if (scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")) and site in ("cross-site", "same-site"):
            return "This request comes from a page of another site; only this server's own pages may ask."
        return ""


class Known:
    """Lets through our own routes and what the browser needs of Gradio's; the rest of Gradio's routes (upload, file=, queue, ...) is closed."""

    def __init__(self, app: ASGIApp, own: tuple[str, ...], read: Callable[[str], bool]) -> None:
        self.app, self.own, self.read = app, own, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if not path.startswith(self.own) and not (scope["method"] in ("GET", "HEAD") and self.read(path)):
                return await refusal(404, f"There is no {scope['method']} {path} here.")(scope, receive, send)
        elif scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await self.app(scope, receive, send)


class Sizes:
    """Answers 413 to a body that is too large: by its stated length before anything is kept, else at the byte that is one too many."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = LARGE if scope["method"] == "POST" and scope["path"].rstrip("/") in TAKE_FILES else SMALL
        text = f"That is too large: at most {'2 GB' if limit == LARGE else '8 MB'} can be sent at once."
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal():
            return await refusal(400, "The length of the body is not a number.")(scope, receive, send)
        if int(length) > limit:
            await _drain(receive)
            return await refusal(413, text)(scope, receive, send)
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:
                raise HTTPException(413, text)
            return message

        await self.app(scope, counted, send)


async def _drain(receive: Receive) -> None:
    got, end = 0, time.monotonic() + DRAIN_S
    while got < DRAIN and time.monotonic() < end:
        message = await receive()
        got += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return
