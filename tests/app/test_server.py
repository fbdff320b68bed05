"""The server: what it refuses, what it closes, how errors read, and the process around it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fastapi import Request
from pydantic import BaseModel
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from app import guard, server
from app.errors import Problem
from app.paths import Home
from trainer.config.load import ConfigError
from trainer.data.scan import DataError
from trainer.formats.probe import FormatError
from trainer.run_dir import RunError

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:7865"


class Body(BaseModel):
    run: str
    steps: int = 1


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app, with routes that go wrong in every way."""
    built = server.build(Home(tmp_path_factory.mktemp("home")))
    errors = {
        "problem": Problem("No such cat.", 404, {"name": "No such cat."}),
        "config": ConfigError({"adapter.rank": "adapter.rank is 0; it must be 1 or more."}),
        "data": DataError(["No images there."]),
        "format": FormatError("That is a pickle."),
        "run": RunError("Another process is training there."),
        "bug": KeyError("secret detail"),
        "full": OSError(28, "No space left on device"),
    }

    def fail(kind: str) -> None:
        raise errors[kind]

    def take(body: Body) -> dict:
        return body.model_dump()

    async def count(request: Request) -> dict:
        return {"bytes": len(await request.body())}

    for path, call, method in (("/api/fail/{kind}", fail, "GET"), ("/api/take", take, "POST"), ("/api/count", count, "POST")):
        built.add_api_route(path, call, methods=[method])
        built.router.routes.insert(0, built.router.routes.pop())
    return built


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app, URL, raise_server_exceptions=False)  # without the lifespan: no queue is looked after here


# ---- pages, headers, files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/runs", "/results", "/tools", "/settings"])
def test_pages_answer_and_allow_nothing_foreign(client, path):
    answer = client.get(path)
    assert answer.status_code == 200 and "gradio" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"https?:|\*", policy)
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert '"analytics_enabled":false' in answer.text.replace(" ", "")


def test_every_file_that_a_page_names_is_there(client):
    for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', client.get("/").text):
        assert client.get(path).status_code == 200, path


def test_the_queue_of_gradio_is_slowed_down(app):
    queue = app.state.blocks._queue
    assert queue.sleep_when_free == 0.05 and queue.progress_update_sleep_when_free == 0.5
    source = Path(sys.modules[type(queue).__module__].__file__).read_text(encoding="utf-8")
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        assert f"sleep(self.{name})" in source, f"gradio does not read {name} any more: the idle cost has to be looked at again"


def test_a_static_file_is_sent_once_and_then_only_when_it_has_changed(client):
    first = client.get("/static/core.js")
    assert first.headers["content-type"].startswith("text/javascript") and first.headers["cache-control"] == "no-cache"
    again = client.get("/static/core.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    assert client.get("/static/core.js", headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/__init__.py",
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e%2fserver.py",
        "/static/..%5cserver.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/C:%5cWindows%5cwin.ini",
        "/static/core.js%00.png",
        "/help/..%2f..%2fpyproject",
        "/help/../../README",
        "/help/%2fetc%2fpasswd",
        "/help/api.md%00",
        "/assets/../../../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static/fonts/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    ],
)
def test_no_path_leads_out(client, path):
    answer = client.get(path)
    assert answer.status_code in (400, 403, 404), path
    assert "root:" not in answer.text and "from __future__" not in answer.text and "[project]" not in answer.text


def test_help_is_shown_as_a_page_and_as_text_only(client, tmp_path, monkeypatch):
    answer = client.get("/help/api")
    assert answer.status_code == 200 and "<table>" in answer.text and "<title>The HTTP interface" in answer.text
    assert client.get("/help/api.md").text == answer.text
    assert "There are: api" in client.get("/help/none").json()["error"]
    (tmp_path / "x.md").write_text("# A <b>\n\n<script>alert(1)</script> [a](javascript:alert(1))")
    monkeypatch.setattr(server, "HELP", tmp_path)
    shown = client.get("/help/x").text
    assert "<script>" not in shown and 'href="javascript' not in shown and "<title>A &lt;b&gt;" in shown


# ---- guards -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7865", "127.0.0.1.evil.example", "", "localhost.evil", "192.168.1.5:7865"])
def test_a_foreign_host_is_refused(client, host):
    for path in ("/", "/api/system", "/static/core.js", "/theme.css"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403 and "not known as" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:7865", "localhost:9", "LOCALHOST", "[::1]:7865", "[::1]"])
def test_own_hosts_are_let_in(client, host):
    assert client.get("/api/settings", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_post_from_another_site_is_refused(client, headers):
    before = client.get("/api/settings").json()
    answer = client.patch("/api/settings", json={"lora_folder": "/evil"}, headers=headers)
    assert answer.status_code == 403 and "only this server's own pages may ask" in answer.json()["error"]
    assert client.get("/api/settings").json() == before
    assert client.post("/gradio_api/upload", files={"files": b"x"}, headers=headers).status_code == 403


def test_the_pages_own_requests_are_let_in(client):
    headers = {"origin": URL, "sec-fetch-site": "same-origin"}
    assert client.post("/api/count", content=b"abc", headers=headers).json() == {"bytes": 3}
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200, "a link from elsewhere may lead here"


def gradio_routes(app) -> list[tuple[str, str]]:
    """(method, path) of every route of the mounted Gradio app, parameters filled in."""
    mounted = next(route for route in app.routes if type(route).__name__ == "Mount" and route.path == "")
    found, todo = [], [mounted.app.router]
    while todo:
        for route in todo.pop().routes:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            if getattr(route, "methods", None):
                found += [(method, re.sub(r"{.*?}", "x", route.path)) for method in route.methods]
            elif inner:
                todo.append(route if hasattr(route, "routes") else route.original_router)
    return found


def test_what_gradio_brings_beside_its_pages_is_closed(app, client):
    routes = gradio_routes(app)
    paths = {path for _, path in routes} | {f"/gradio_api{path}" for _, path in routes}
    assert any(path.endswith("/upload") for path in paths) and len(paths) > 40
    pages = {"/", "/runs", "/runs/", "/results", "/results/", "/tools", "/tools/", "/settings", "/settings/"}
    opened = set()
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE"):
            answer = client.request(method, path, follow_redirects=False)
            if not (answer.status_code == 404 and f'"There is no {method} ' in answer.text):
                opened.add((method, path))
    allowed = {("GET", path) for path in pages} | {("GET", p) for p in ("/theme.css", "/favicon.ico", "/assets/x", "/static/x")}
    assert opened <= allowed
    assert ("GET", "/") in opened and ("GET", "/theme.css") in opened
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://x", "/file=/etc/passwd", "/config"):
        assert client.get(path).status_code == 404
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/x", "/gradio_api/component_server", "/login"):
        assert client.post(path, json={}).status_code == 404


def test_a_websocket_is_refused(client):
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/queue/join"):
        pass
    assert refused.value.code == 1008


# ---- sizes --------------------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_in_words(client):
    big = b" " * (guard.SMALL + 1)
    stated = client.post("/api/count", content=big)
    unstated = client.post("/api/count", content=iter([big[:1000]] * (guard.SMALL // 1000 + 1)))
    for answer in (stated, unstated):
        assert answer.status_code == 413 and "at most 8 MB" in answer.json()["error"] and answer.json()["errors"] == {}
    assert client.post("/api/count", content=big[:-1]).json() == {"bytes": guard.SMALL}
    images = client.post("/api/images", content=b"x", headers={"content-length": str(guard.LARGE + 1)})
    assert images.status_code == 413 and "at most 2 GB" in images.json()["error"]
    assert client.post("/api/count", content=b"x", headers={"content-length": "many"}).status_code == 400


# ---- errors -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "text", "errors"),
    [
        ("problem", 404, "No such cat.", {"name": "No such cat."}),
        ("config", 400, "adapter.rank is 0; it must be 1 or more.", {"adapter.rank": "adapter.rank is 0; it must be 1 or more."}),
        ("data", 400, "No images there.", {}),
        ("format", 400, "That is a pickle.", {}),
        ("run", 409, "Another process is training there.", {}),
        ("full", 500, "The disk is full. Free some space, then try again.", {}),
    ],
)
def test_an_error_is_a_sentence_and_its_fields(client, kind, status, text, errors):
    answer = client.get(f"/api/fail/{kind}")
    assert (answer.status_code, answer.json()) == (status, {"error": text, "errors": errors})


def test_a_bug_is_a_sentence_and_its_traceback_is_in_the_log_alone(app, client, caplog):
    answer = client.get("/api/fail/bug")
    assert answer.status_code == 500
    assert str(app.state.context.home.log) in answer.json()["error"] and "KeyError" in answer.json()["error"]
    assert "secret detail" not in answer.text and "Traceback" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret detail" in caplog.text and "GET /api/fail/bug" in caplog.text


def test_a_request_of_the_wrong_form_is_answered_in_sentences(client):
    def post(content):
        answer = client.post("/api/take", content=content, headers={"content-type": "application/json"})
        return answer.status_code, answer.json()

    assert post('{"steps": "many"}') == (
        400,
        {
            "error": "run is missing. steps is 'many': Input should be a valid integer, unable to parse string as an integer.",
            "errors": {
                "run": "run is missing.",
                "steps": "steps is 'many': Input should be a valid integer, unable to parse string as an integer.",
            },
        },
    )
    assert post("{")[1]["error"].startswith("The body is no valid JSON: ")
    assert post("")[1]["error"] == "the body is missing."
    assert client.get("/api/nothing").json()["error"].startswith("There is no GET /api/nothing here.")
    assert client.get("/nothing").json()["error"] == "There is no GET /nothing here."


# ---- settings -----------------------------------------------------------------------------------------------------------------------


def test_settings_are_changed_one_by_one_and_kept(client, tmp_path):
    a, b, loras = (str(tmp_path / name) for name in ("a", "b", "my loras"))
    for folder in (a, b, loras):
        Path(folder).mkdir()
    assert client.patch("/api/settings", json={"theme": "dark", "model_folders": [a, f' "{b}" ', ""]}).json()["theme"] == "dark"
    assert client.patch("/api/settings", json={"lora_folder": f'"{loras}"'}).status_code == 200
    kept = client.get("/api/settings").json()
    assert (kept["theme"], kept["model_folders"], kept["lora_folder"]) == ("dark", [a, b], loras)
    wrong = client.patch("/api/settings", json={"theme": "pink", "notify": True})
    assert wrong.status_code == 400 and "theme is 'pink'" in wrong.json()["errors"]["theme"]
    assert client.patch("/api/settings", json={"colour": 1}).json()["error"].startswith("There is no setting 'colour'. There are: ")
    assert client.patch("/api/settings", json=[1]).status_code == 400
    assert client.get("/api/settings").json() == kept


def test_a_folder_that_is_not_there_is_refused_with_a_sentence(client, tmp_path):
    there, gone, file = tmp_path / "there", tmp_path / "disk", tmp_path / "file.safetensors"
    there.mkdir()
    gone.mkdir()
    file.touch()
    assert client.patch("/api/settings", json={"model_folders": [str(gone)], "lora_folder": str(gone)}).status_code == 200
    gone.rmdir()
    before = client.get("/api/settings").json()
    for key, value, said in (
        ("lora_folder", str(tmp_path / "no such"), "There is no folder"),
        ("run_folders", [str(there), str(tmp_path / "no such")], "There is no folder"),
        ("model_folders", [str(file)], "is a file"),
        ("model_folders", ["models"], "is not a full path"),
        ("lora_folder", "~nobody-at-all/x", "Give the folder's whole path"),
    ):
        answer = client.patch("/api/settings", json={"theme": "dark", key: value})
        assert answer.status_code == 400 and said in answer.json()["errors"][key], answer.text
        assert client.get("/api/settings").json() == before
    # one that is gone since does not stand in the way of another, and may be emptied
    kept = client.patch("/api/settings", json={"model_folders": [str(gone), str(there)], "lora_folder": ""})
    assert kept.status_code == 200 and kept.json()["model_folders"] == [str(gone), str(there)] and kept.json()["lora_folder"] == ""


def test_system_says_what_is_here(app, client):
    said = client.get("/api/system").json()
    assert (said["app"], said["version"], said["data_dir"]) == ("lora-atelier", "0.1.0", str(app.state.context.home.root))
    assert 0 < said["free_memory_gib"] < said["memory_gib"] and said["disk_free_gb"] > 0
    assert said["active"] is None and said["waiting"] == 0 and said["password"] is False


# ---- the process --------------------------------------------------------------------------------------------------------------------


class Process:
    """`python -m app` with what it printed so far."""

    def __init__(self, home: Path, *words: str, **environment: str) -> None:
        cleared = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_ATELIER", "HF_", "DISPLAY", "WAYLAND", "BROWSER"))}
        self.opened = home.parent / f"opened-{time.monotonic_ns()}"
        script = home.parent / "browser"
        script.write_text(f"#!{sys.executable}\nimport os, sys\nopen(os.environ['OPENED'], 'w').write(sys.argv[1])\n")
        script.chmod(0o755)
        named = {"BROWSER": f"{script} %s", "OPENED": str(self.opened), "HF_HOME": str(home.parent / "hf"), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", "--data-dir", str(home), *words],
            cwd=ROOT, env={**cleared, **named, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        self.output = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output += line

    def until(self, pattern: str, seconds: float = 60) -> re.Match:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = re.search(pattern, self.output)
            if found:
                return found
            if self.process.poll() is not None and not self.reader.is_alive():
                break
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} was not printed:\n{self.output}")

    def end(self) -> int:
        code = self.process.wait(60)
        self.reader.join(10)
        return code


def ask(url: str, body: dict | None = None, method: str | None = None, **headers: str):
    """(status, JSON or text) of a request over the network."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Hub(BaseHTTPRequestHandler):
    """A hub that knows one token."""

    def do_GET(self):
        good = self.headers.get("authorization") == "Bearer hf_rightone"
        body = {"name": "zoe", "auth": {"accessToken": {"role": "read", "displayName": "laptop"}}} if good else {"error": "Invalid token"}
        self.send_response(200 if good else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A running app with a hub of its own, on a port of its own; (process, URL, data folder)."""
    hub = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("live") / "data"
    for name, age in (("old.webp", 10**8), ("new.webp", 0)):
        kept = home / "cache" / "pictures" / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
        os.utime(kept, (time.time() - age,) * 2)
    started = Process(home, "--port", str(free_port()), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HTTP_PROXY="http://127.0.0.1:9")
    url = started.until(r"LoRA Atelier is at (\S+)").group(1)
    started.hub = hub
    yield started, url, home
    started.process.kill()
    started.process.wait()


def test_pictures_that_were_not_looked_at_for_long_go_at_the_start(live):
    assert [path.name for path in (live[2] / "cache" / "pictures").iterdir()] == ["new.webp"]


def test_it_says_that_it_starts_and_opens_its_page(live):
    started, url, home = live
    assert started.output.startswith("LoRA Atelier is starting ...")
    deadline = time.monotonic() + 10
    while not started.opened.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.opened.read_text() == url
    status, said = ask(f"{url}/api/system")
    assert status == 200 and said["data_dir"] == str(home)
    assert ask(url)[0] == 200
    assert json.loads((home / "server.json").read_text())["pid"] == started.process.pid


def test_it_refuses_what_comes_from_elsewhere(live):
    _, url, _ = live
    assert ask(url, host="evil.example")[0] == 403
    assert ask(f"{url}/api/settings", {"theme": "dark"}, "PATCH", origin="http://evil.example")[0] == 403
    assert ask(f"{url}/api/settings", {"theme": "dark"}, "PATCH", sec_fetch_site="cross-site")[0] == 403


@pytest.mark.parametrize(
    "path", ["/static/../../app/paths.py", "/static/..\\paths.py", "/help/../../pyproject.toml", "/../../etc/passwd", "//etc/passwd"]
)
def test_no_raw_path_leads_out(live, path):
    """As bytes on the wire: clients tidy `..` away."""
    port = int(live[1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.split()[1] in (b"400", b"403", b"404"), answer[:200]


def test_a_body_that_is_too_large_is_answered_while_it_is_being_sent(live):
    """A browser that is still sending must get to see the answer, not a broken connection."""
    status, said = ask(f"{live[1]}/api/settings", {"lora_folder": "x" * 20_000_000}, "PATCH")
    assert status == 413 and "at most 8 MB" in said["error"]


def test_a_second_start_opens_the_first_ones_page(live):
    _, url, home = live
    second = Process(home)
    assert second.end() == 0
    assert f"It is running already: {url}" in second.output
    assert second.opened.read_text() == url
    quiet = Process(home, "--no-browser")
    assert quiet.end() == 0 and not quiet.opened.exists()


def test_a_token_is_kept_only_if_the_hub_takes_it_and_never_said(live):
    started, url, home = live
    patch = f"{url}/api/settings"
    assert ask(patch)[1]["token"] is False
    status, said = ask(patch, {"token": "hf_wrongone"}, "PATCH")
    assert status == 400 and "does not accept this token" in said["errors"]["token"] and "wrongone" not in json.dumps(said)
    assert ask(patch)[1]["token"] is False
    status, said = ask(patch, {"token": " hf_rightone\n"}, "PATCH")
    assert status == 200 and said["token"] is True and "rightone" not in json.dumps(said)
    assert "rightone" in (home.parent / "hf/token").read_text()
    assert ask(patch, {"token": ""}, "PATCH")[1]["token"] is False
    assert not (home.parent / "hf/token").exists()
    started.hub.shutdown()
    started.hub.server_close()
    status, said = ask(patch, {"token": "hf_rightone"}, "PATCH")
    assert status == 400 and "cannot be reached" in said["error"] and ask(patch)[1]["token"] is False
    log = (home / "server.log").read_text()
    assert "rightone" not in log and "wrongone" not in log


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that could be sent to one console process alone")
def test_ctrl_c_ends_it_cleanly_within_two_seconds(live):
    started, url, home = live
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):  # somebody who is connected and says nothing
        began = time.monotonic()
        started.process.send_signal(signal.SIGINT)
        assert started.end() == 0
        assert time.monotonic() - began < 2.5
    assert "A training that runs goes on by itself" in started.output and "Traceback" not in started.output
    assert not (home / "server.json").exists()
    with pytest.raises(OSError):
        ask(url)


def test_a_busy_default_port_is_passed_over_and_a_busy_named_one_is_an_error(tmp_path):
    from app import __main__ as main

    with main.bind("127.0.0.1", None) as first:
        first.listen()
        port = first.getsockname()[1]
        assert main.PORT <= port < main.PORT + main.TRIES
        with main.bind("127.0.0.1", None) as second:
            assert port < second.getsockname()[1] < main.PORT + main.TRIES
        busy = Process(tmp_path / "data", "--port", str(port), "--no-browser")
        assert busy.end() == 1
        assert f"Port {port} is in use by another program. Choose another with --port" in busy.output and "Traceback" not in busy.output
    with pytest.raises(Problem, match=r"'192\.0\.2\.1' is no address of this machine"):
        main.bind("192.0.2.1", None)


def test_words_that_make_no_sense_end_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    folder = Process(tmp_path / "file")
    assert folder.end() == 1 and "cannot be made" in folder.output and "--data-dir" in folder.output and "Traceback" not in folder.output
    port = Process(tmp_path / "data", "--port", "99999")
    assert port.end() == 2 and "it must be 1 to 65535" in port.output
    nobody = Process(tmp_path / "data", "--listen")
    assert nobody.end() == 1 and "A password is needed, and there is no terminal to ask for it" in nobody.output
