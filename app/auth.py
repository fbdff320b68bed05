"""The password of `--listen`: kept as a scrypt hash, asked for by a login page or by Basic authentication.

password.json  {"salt", "hash", "n", "r", "p"}
sessions.json  {"salt": the password's, "sessions": {sha256 of the cookie's token: when it ends, seconds since 1970}}

Both are readable by their owner alone. A new password ends all sessions.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import html
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import Problem
from app.paths import Home
from trainer.run_dir import replace

COOKIE = "lora-atelier"
SESSION_S = 30 * 24 * 3600
SHORTEST = 8
COST = {"n": 2**14, "r": 8, "p": 5}  # 16 MB and about 0.2 s: OWASP's Password Storage Cheat Sheet
WINDOW_S, PAUSE_S = 900, 30
WRONG_FROM_ONE, WRONG_IN_ALL = 5, 50  # wrong passwords within the window before every further try has to wait for the pause


def write_private(path: Path, value: Any) -> None:
    """JSON into a file that its owner alone may read, whole or not at all."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temp.unlink(missing_ok=True)
    with os.fdopen(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file)
    replace(temp, path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Attempts:
    """Wrong passwords of the last quarter of an hour, by address."""

    def __init__(self, clock: Any = time.monotonic) -> None:
        self.clock, self.wrong = clock, []  # (when, address)

    def wait(self, address: str) -> float:
        """Seconds until this address may try again."""
        now = self.clock()
        self.wrong = [(at, who) for at, who in self.wrong if now - at < WINDOW_S]
        every, own = [at for at, _ in self.wrong], [at for at, who in self.wrong if who == address]
        ends = [0.0]
        ends += [own[-1] + PAUSE_S - now] if len(own) >= WRONG_FROM_ONE else []
        ends += [every[-1] + PAUSE_S - now] if len(every) >= WRONG_IN_ALL else []
        return max(ends)

    def failed(self, address: str) -> None:
        self.wrong.append((self.clock(), address))


class Auth:
    """The password and the sessions of one data folder."""

    def __init__(self, home: Home, clock: Any = time.monotonic) -> None:
        self.password_file = home.password
        self.sessions_file = home.password.with_name("sessions.json")
        self.attempts = Attempts(clock)
        self.one_at_a_time = asyncio.Lock()  # so that parallel tries cannot pass the count of wrong ones
        self.key = secrets.token_bytes(32)
        self.basic: set[bytes] = set()  # MACs of Basic credentials that were right: scrypt once, not at each request
        self.seen = -1
        self._read()

    def _read(self) -> None:
        """Take over what another process may have written (--set-password beside a running server)."""
        stamp = self.password_file.stat().st_mtime_ns if self.password_file.exists() else 0
        if stamp == self.seen:
            return
        self.seen, self.record, self.sessions = stamp, None, {}
        self.basic.clear()
        if not stamp:
            return
        try:
            self.record = json.loads(self.password_file.read_text(encoding="utf-8"))
        except ValueError:
            raise Problem(f"{self.password_file} is damaged. Set the password again with --set-password.") from None
        try:
            kept = json.loads(self.sessions_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or torn: those who are logged in log in again
            return
        if kept.get("salt") == self.record["salt"]:
            self.sessions = {token: end for token, end in kept["sessions"].items() if end > time.time()}

    @property
    def is_set(self) -> bool:
        self._read()
        return self.record is not None

    def set(self, password: str) -> None:
        """Keep a new password and end all sessions. Raises Problem for one that is too short."""
        if len(password) < SHORTEST:
            raise Problem(f"The password has {len(password)} characters; it needs at least {SHORTEST}. A few words in a row are good.")
        salt = secrets.token_bytes(16)
        write_private(self.password_file, {"salt": salt.hex(), "hash": self._hash(password, salt, COST).hex(), **COST})
        self.sessions_file.unlink(missing_ok=True)
        self.seen = -1
        self._read()

    def is_right(self, password: str) -> bool:
        """Takes about 0.2 s."""
        if not self.is_set:
            return False
        cost = {name: self.record[name] for name in COST}
        return hmac.compare_digest(self._hash(password, bytes.fromhex(self.record["salt"]), cost), bytes.fromhex(self.record["hash"]))

    @staticmethod
    def _hash(password: str, salt: bytes, cost: dict[str, int]) -> bytes:
        return hashlib.scrypt(password.encode(), salt=salt, maxmem=2**27, **cost)

    def log_in(self) -> str:
        """A new session's token."""
        token = secrets.token_urlsafe(32)
        self.sessions = {kept: end for kept, end in self.sessions.items() if end > time.time()} | {_digest(token): time.time() + SESSION_S}
        self._write_sessions()
        return token

    def log_out(self, token: str) -> None:
        if self.sessions.pop(_digest(token), None):
            self._write_sessions()

    def _write_sessions(self) -> None:
        write_private(self.sessions_file, {"salt": self.record["salt"], "sessions": self.sessions})

    def knows(self, token: str) -> bool:
        self._read()
        return self.sessions.get(_digest(token), 0) > time.time()

    async def check(self, password: str, address: str) -> float | bool:
        """True for the right password, False for a wrong one, seconds to wait where there were too many wrong ones."""
        async with self.one_at_a_time:
            wait = self.attempts.wait(address)
            if wait:
                return wait
            right = await run_in_threadpool(self.is_right, password)
            if not right:
                self.attempts.failed(address)
            return right

    async def check_basic(self, header: str, address: str) -> float | bool:
        """The same for an Authorization header; any user name will do."""
        kind, _, coded = header.partition(" ")
        try:
            password = base64.b64decode(coded, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
        if kind.lower() != "basic":
            return False
        self._read()
        mac = hmac.digest(self.key, password.encode(), "sha256")
        if any(hmac.compare_digest(mac, known) for known in self.basic):
            return True
        answer = await self.check(password, address)
        if answer is True:
            self.basic.add(mac)
        return answer


class Door:
    """Lets in who has the cookie or sends the password; shows the others the login page, or a JSON answer of status 401."""

    def __init__(self, app: ASGIApp, auth: Auth) -> None:
        self.app, self.auth = app, auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":  # the page uses none
            return await send({"type": "websocket.close", "code": 1008})
        request = Request(scope, receive)
        path, token = scope["path"], request.cookies.get(COOKIE, "")
        if path == "/login":
            answer = await self._login(request)
        elif path == "/logout" and request.method == "POST":
            self.auth.log_out(token)
            answer = RedirectResponse("/login", 303)
            answer.delete_cookie(COOKIE)
        elif token and self.auth.knows(token):
            return await self.app(scope, receive, send)
        else:
            header = request.headers.get("authorization", "")
            allowed = await self.auth.check_basic(header, _address(request)) if header else False
            if allowed is True:
                return await self.app(scope, receive, send)
            answer = _refusal(request, allowed)
        await answer(scope, receive, send)

    async def _login(self, request: Request) -> Response:
        if request.method != "POST":
            return page(local_path(request.query_params.get("next", "/")))
        form = await request.form(max_files=0, max_fields=8)
        target = local_path(str(form.get("next", "/")))
        answer = await self.auth.check(str(form.get("password", "")), _address(request))
        if answer is False:
            return page(target, "That is not the password.", 401)
        if answer is not True:
            return page(target, _too_many(answer), 429, {"retry-after": str(round(answer) or 1)})
        response = RedirectResponse(target, 303)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, self.auth.log_in(), max_age=SESSION_S, httponly=True, samesite="strict", secure=secure)
        return response


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _too_many(wait: float) -> str:
    return f"Too many wrong passwords. Try again in {round(wait) or 1} seconds."


def _refusal(request: Request, wait: float | bool) -> Response:
    text = "Log in first, at /login, or send the password as Basic authentication." if wait is False else _too_many(wait)
    status = 401 if wait is False else 429
    if request.method in ("GET", "HEAD") and "text/html" in request.headers.get("accept", ""):
        query = f"?{request.url.query}" if request.url.query else ""
        return page(local_path(request.url.path + query), "" if wait is False else text, status)
    return JSONResponse({"error": text, "errors": {}, "app": "lora-atelier"}, status)


def local_path(target: str) -> str:
    """`target` if it is a path of this server, else "/": a login must not lead to a foreign page."""
    parts = urlsplit(target)
    good = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.netloc and target.isprintable()
    return quote(target, safe="/?&=%:@!$'()*+,;~-._") if good else "/"


def page(target: str, error: str = "", status: int = 200, headers: dict[str, str] | None = None) -> HTMLResponse:
    """The login page. It needs no script and nothing that stands behind the login."""
    said = f'<p id="error" role="alert">{html.escape(error)}</p>' if error else ""
    return HTMLResponse(PAGE.replace("{target}", html.escape(target)).replace("{error}", said), status, headers)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Log in - LoRA Atelier</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #f8fafc; --card: #fff; --text: #0f172a; --line: #94a3b8; --accent: #4f46e5; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0f172a; --card: #1e293b; --text: #f1f5f9; --line: #64748b; --accent: #4f46e5; --bad: #fca5a5; }
}
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
main { box-sizing: border-box; width: min(24rem, 100vw - 2rem); padding: 2rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
h1 { margin: 0 0 1rem; font-size: 1.25rem; }
input, button { box-sizing: border-box; width: 100%; padding: .6rem .75rem; font: inherit; border-radius: 8px; }
input { margin: .25rem 0 1rem; color: inherit; background: transparent; border: 1px solid var(--line); }
button { color: #fff; background: var(--accent); border: 0; font-weight: 600; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
#error { color: var(--bad); }
</style>
</head>
<body>
<main>
<h1>LoRA Atelier</h1>
<form method="post" action="/login">
<input type="hidden" name="next" value="{target}">
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required autofocus>
{error}
<button>Log in</button>
</form>
</main>
</body>
</html>
"""
