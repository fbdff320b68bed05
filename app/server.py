"""The server around it all: our routes, Gradio's pages behind them, and the guards in front."""

from __future__ import annotations

import hashlib
import html
import logging
import os
import re
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from app import machine, pictures
from app.auth import Auth, Door
from app.context import Context
from app.errors import Problem
from app.guard import LOCAL, Hosts, Known, Outermost, Sizes
from app.paths import ROOT, Home
from app.runner import Runner
from trainer.config.load import ConfigError
from trainer.data.scan import DataError
from trainer.formats.probe import FormatError
from trainer.run_dir import RunError

PARTS, HELP = ROOT / "app/parts", ROOT / "assets/help"
TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
}
OWN = ("/api/", "/help/")  # and /static/NAME, which is read only; /login and /logout are app/auth.py's
GRADIO_FILES = ("/static/", "/assets/")  # all that the browser asks of Gradio beside the pages; their configuration stands in the page
READS = ("/favicon.ico", "/theme.css")
log = logging.getLogger("app")


def build(home: Home, hosts: Callable[[str], bool] = LOCAL.__contains__, password: Auth | None = None) -> FastAPI:
    """The app of one data folder. `hosts` says whether a name of this server (lower case, no port) is one; with `password` all ask for it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["GRADIO_TEMP_DIR"] = str(home.cache / "gradio")
    home.create()
    from app.api import router

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner = app.state.context.runner
        runner.start()
        pictures.prune(home.cache)
        if machine.info(home) is None:
            machine.refresh(home, runner)
        try:
            yield
        finally:
            runner.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.context = Context(home, Runner(home))
    app.state.asks_password = password is not None
    _answer_errors(app)
    app.include_router(router)
    app.add_api_route("/static/{name}", static)
    app.add_api_route("/help/{name}", help_page)
    app.add_api_route("/favicon.ico", favicon)
    for prefix in OWN:  # what is left of these would go to Gradio
        app.add_api_route(prefix + "{rest:path}", no_such_route, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    pages = _mount_gradio(app)

    def readable(path: str) -> bool:
        return (path.rstrip("/") or "/") in pages or path in READS or path.startswith(GRADIO_FILES)

    # The last one added is the first one that a request meets.
    app.add_middleware(Sizes)
    app.add_middleware(Known, own=OWN, read=readable)
    if password:
        app.add_middleware(Door, auth=password)
    app.add_middleware(Hosts, allowed=hosts)
    app.add_middleware(Outermost, log_file=str(home.log))
    return app


def _mount_gradio(app: FastAPI) -> set[str]:
    """Put the pages of app/ui.py behind our routes; their addresses."""
    import gradio as gr

    from app import ui

    demo = ui.build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SSR mode is not supported with multi-page apps")  # nobody asked for it
        gr.mount_gradio_app(
            app,
            demo,
            path="/",
            theme=ui.THEME,
            css=getattr(ui, "CSS", None),
            head=ui.HEAD,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size="64mb",
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
        )
    # No page uses Gradio's queue, and at its own pace (1 ms) it costs 5 % of a core; so 1 %. A test says when the names have changed.
    if hasattr(demo._queue, "sleep_when_free"):
        demo._queue.sleep_when_free = 0.05
    if hasattr(demo._queue, "progress_update_sleep_when_free"):
        demo._queue.progress_update_sleep_when_free = 0.5
    app.state.blocks = demo
    return {"/" + page[0].strip("/") for page in demo.pages}


# ---- errors as sentences ------------------------------------------------------------------------------------------------------------


def _answer_errors(app: FastAPI) -> None:
    def answer(status: int, text: str, errors: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": text, "errors": errors or {}}, status)

    @app.exception_handler(Problem)
    def problem(_: Request, error: Problem) -> JSONResponse:
        return answer(error.status, error.text, error.errors)

    @app.exception_handler(ConfigError)
    def config(_: Request, error: ConfigError) -> JSONResponse:
        return answer(400, str(error), error.errors)

    @app.exception_handler(DataError)
    @app.exception_handler(FormatError)
    def data(_: Request, error: ValueError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(RunError)
    def run(_: Request, error: RunError) -> JSONResponse:
        return answer(409, str(error))

    @app.exception_handler(RequestValidationError)
    def request(_: Request, error: RequestValidationError) -> JSONResponse:
        sentences = dict(map(_sentence, error.errors()))
        return answer(400, " ".join(sentences.values()), sentences)

    @app.exception_handler(AnyHTTPException)
    def http(request: Request, error: AnyHTTPException) -> JSONResponse:
        texts = {404: f"There is no {request.url.path} here.", 405: f"{request.url.path} does not take {request.method}."}
        text = texts.get(error.status_code) if error.detail in ("Not Found", "Method Not Allowed") else None
        return answer(error.status_code, text or str(error.detail))


def _sentence(error: dict[str, Any]) -> tuple[str, str]:
    """(field, sentence) of one of pydantic's errors about a request."""
    place, *names = error["loc"]
    name = ".".join(map(str, names)) or f"the {place}"
    if error["type"] == "json_invalid":
        return "", f"The body is no valid JSON: {error.get('ctx', {}).get('error', error['msg'])}."
    if error["type"] == "missing":
        return name, f"{name} is missing."
    given = repr(error.get("input"))
    said = error["msg"].removeprefix("Value error, ").rstrip(".")
    return name, f"{name} is {given[:80]}{'...' if len(given) > 80 else ''}: {said}."


# ---- files --------------------------------------------------------------------------------------------------------------------------


def static(name: str, request: Request) -> Response:
    """A script, style or picture of a part. The browser asks each time whether it has changed, so that an update shows at once."""
    path = PARTS / name
    if not re.fullmatch(r"[\w-]+\.\w+", name) or path.suffix not in TYPES or not path.is_file():
        raise HTTPException(404)
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=TYPES[path.suffix], headers=headers)


def favicon(request: Request) -> Response:
    return static("icon.svg", request)


def no_such_route(rest: str, request: Request) -> Response:
    raise HTTPException(404, f"There is no {request.method} {request.url.path} here. See /help/api for what there is.")


HELP_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - LoRA Atelier</title>
<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif; }}
pre, code {{ font-family: ui-monospace, monospace; font-size: .9em; }}
pre {{ overflow-x: auto; padding: 1rem; border: 1px solid #8886; border-radius: 8px; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .3rem .6rem; border: 1px solid #8886; text-align: left; vertical-align: top; }}
.wide {{ overflow-x: auto; }}
@media (max-width: 40rem) {{ td:not(:first-child) {{ min-width: 7rem; }} }}
</style>
</head>
<body><header><p><a href="/">LoRA Atelier</a></p></header>
<main>
{body}
</main>
</body>
</html>
"""


def help_page(name: str) -> HTMLResponse:
    """A page of assets/help, by its name with or without `.md`."""
    from markdown_it import MarkdownIt

    stem = name.removesuffix(".md")
    path = HELP / f"{stem}.md"
    if not re.fullmatch(r"[\w-]+", stem) or not path.is_file():
        raise HTTPException(404, f"There is no help page {stem!r}. There are: {', '.join(sorted(p.stem for p in HELP.glob('*.md')))}.")
    text = path.read_text(encoding="utf-8")
    title = next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), stem)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    wide = '<div class="wide" role="group" aria-label="Table" tabindex="0">'  # scrolls by itself on a phone, also by the keyboard
    body = body.replace("<table>", f"{wide}<table>").replace("</table>", "</table></div>").replace("<pre>", '<pre tabindex="0">')
    return HTMLResponse(HELP_PAGE.format(title=html.escape(title), body=body))


def log_to(path: Path) -> None:
    """Send what is logged to a file of at most 1 MB, beside the one before it."""
    from logging.handlers import RotatingFileHandler

    handler = RotatingFileHandler(path, maxBytes=2**20, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
