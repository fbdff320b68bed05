"""The password of --listen: nothing answers without it, it is nowhere in the clear, and guessing is slow."""

import json
import os
import re
import socket
import stat
import time

import pytest
from starlette.testclient import TestClient
from test_server import Process, ask, free_port, gradio_routes

from app import __main__ as main
from app import auth, server
from app.auth import Auth
from app.errors import Problem
from app.paths import Home

PASSWORD = "correct horse 'battery' \u00fc"
URL = "http://192.168.1.5:7865"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock():
    return Clock()


@pytest.fixture(scope="module")
def app(tmp_path_factory, clock):
    home = Home(tmp_path_factory.mktemp("home"))
    door = Auth(home, clock)
    door.set(PASSWORD)
    built = server.build(home, main.host_check("0.0.0.0", ["lora.example"]), door)
    built.state.door = door
    return built


@pytest.fixture
def client(app, clock):
    """Somebody who has not logged in."""
    clock.now += 10_000  # what other tests guessed is forgotten
    return TestClient(app, URL, follow_redirects=False)


def log_in(client, password=PASSWORD, target="/"):
    return client.post("/login", data={"password": password, "next": target})


# ---- what stands on the disk --------------------------------------------------------------------------------------------------------


def test_the_password_is_kept_as_a_salted_hash_that_its_owner_alone_may_read(tmp_path):
    home = Home(tmp_path)
    one = Auth(home)
    assert not one.is_set and not one.is_right("")
    with pytest.raises(Problem, match="has 5 characters; it needs at least 8"):
        one.set("short")
    one.set(PASSWORD)
    first = json.loads(home.password.read_text())
    one.set(PASSWORD)
    assert json.loads(home.password.read_text())["hash"] != first["hash"], "two equal passwords have two salts"
    token = one.log_in()
    for path in tmp_path.iterdir():
        if path.is_file():
            assert token not in path.read_text() and "battery" not in path.read_text()
            assert os.name == "nt" or stat.S_IMODE(path.stat().st_mode) == 0o600
    assert one.is_right(PASSWORD) and not one.is_right(PASSWORD + " ") and not one.is_right("")


def test_a_session_outlives_a_restart_and_ends_with_the_password_or_its_time(tmp_path, monkeypatch):
    home = Home(tmp_path)
    running = Auth(home)
    running.set(PASSWORD)
    token, other = running.log_in(), running.log_in()
    assert Auth(home).knows(token) and not Auth(home).knows(token[:-1]) and not Auth(home).knows("")
    running.log_out(other)
    assert Auth(home).knows(token) and not Auth(home).knows(other)
    now = time.time()
    monkeypatch.setattr(auth.time, "time", lambda: now + auth.SESSION_S + 1)
    assert not running.knows(token)
    monkeypatch.undo()
    assert running.knows(token)
    Auth(home).set("another password")  # --set-password while the server runs
    assert not running.knows(token) and not running.is_right(PASSWORD) and running.is_right("another password")


def test_a_damaged_password_file_lets_nobody_in(tmp_path):
    Home(tmp_path).password.write_text("{")
    with pytest.raises(Problem, match=r"is damaged\. Set the password again with --set-password"):
        Auth(Home(tmp_path))


def test_wrong_passwords_slow_down_their_address_and_many_slow_down_all():
    clock = Clock()
    attempts = auth.Attempts(clock)
    for _ in range(auth.WRONG_FROM_ONE):
        assert attempts.wait("a") == 0
        attempts.failed("a")
    assert attempts.wait("a") == auth.PAUSE_S and attempts.wait("b") == 0
    clock.now += auth.PAUSE_S
    assert attempts.wait("a") == 0
    attempts.failed("a")
    assert attempts.wait("a") == auth.PAUSE_S, "each further one waits again"
    for k in range(auth.WRONG_IN_ALL):
        attempts.failed(f"bot {k}")
    assert attempts.wait("b") == auth.PAUSE_S
    clock.now += auth.WINDOW_S
    assert attempts.wait("a") == attempts.wait("b") == 0


# ---- without the password -----------------------------------------------------------------------------------------------------------


def test_nothing_answers_without_the_password(app, client):
    own = [(m, re.sub(r"{.*?}", "x", r.path)) for r in app.routes for m in getattr(r, "methods", None) or ()]
    gradios = gradio_routes(app)
    every = {
        *own,
        *gradios,
        *((m, f"/gradio_api{p}") for m, p in gradios),
        ("GET", "/static/core.js"),
        ("POST", "/api/images"),
        ("GET", "/x"),
    }
    assert len(every) > 80
    for method, path in sorted(every):
        if (method, path) in (("GET", "/login"), ("POST", "/login"), ("POST", "/logout")) or path.startswith("/login"):
            continue
        answer = client.request(method, path)
        assert answer.status_code == 401, (method, path)
        if method != "HEAD":
            assert answer.json()["app"] == "lora-atelier" and "Log in first" in answer.json()["error"]


def test_a_browser_is_shown_the_login_page_in_place_of_the_page(client):
    answer = client.get("/runs?run=a%22b&x=1", headers={"accept": "text/html,*/*"})
    assert answer.status_code == 401 and answer.headers["content-type"].startswith("text/html")
    assert '<input id="password"' in answer.text and '<label for="password">' in answer.text and "<script" not in answer.text
    assert re.search(r'name="next" value="(.*?)"', answer.text).group(1) == "/runs?run=a%22b&amp;x=1"
    assert "prefers-color-scheme: dark" in answer.text
    assert client.get("/login?next=/runs").status_code == 200
    assert not re.findall(r'(?:src|href)="(?!data:)', answer.text), "nothing may stand behind the login that the login page needs"


def test_the_guard_stands_in_front_of_the_login(client):
    assert client.get("/login", headers={"host": "evil.example"}).status_code == 403
    foreign = {"origin": "http://evil.example"}
    assert client.post("/login", data={"password": PASSWORD}, headers=foreign).status_code == 403
    for host in ("lora.example", socket.gethostname(), "10.0.0.7:7865", "[fd00::1]:7865"):
        assert client.get("/login", headers={"host": host}).status_code == 200


# ---- with it ------------------------------------------------------------------------------------------------------------------------


def test_logging_in_and_out(client):
    wrong = log_in(client, "not it at all")
    assert wrong.status_code == 401 and "That is not the password." in wrong.text and "set-cookie" not in wrong.headers
    right = log_in(client, target="/runs?run=1")
    assert right.status_code == 303 and right.headers["location"] == "/runs?run=1"
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "max-age=2592000" in cookie and "secure" not in cookie
    assert client.get("/").status_code == client.get("/api/settings").status_code == 200
    assert client.get("/gradio_api/info").status_code == 404, "what is closed stays closed"
    assert client.get("/logout").status_code == 404, "a link or a picture must not log out"
    token = client.cookies[auth.COOKIE]
    assert client.post("/logout").status_code == 303
    client.cookies.set(auth.COOKIE, token)
    assert client.get("/api/settings").status_code == 401, "the session itself has ended, not only the cookie"


@pytest.mark.parametrize(
    "target", ["//evil.example", "http://evil.example", "/\\evil.example", "\\\\evil", "javascript:x", "/a\r\nset-cookie: x=1", ""]
)
def test_a_login_leads_to_no_foreign_page(client, target):
    answer = log_in(client, target=target)
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    assert "evil" not in client.get("/login", params={"next": target}).text


def test_scripts_use_basic_authentication(client, app):
    assert client.get("/api/settings", auth=("anyone", PASSWORD)).status_code == 200
    began = time.perf_counter()
    for _ in range(20):
        assert client.get("/api/settings", auth=("", PASSWORD)).status_code == 200
    assert time.perf_counter() - began < 2, "the slow hash is made once, not at each request"
    assert client.get("/api/settings", auth=("anyone", "wrong password")).status_code == 401
    for header in ("Basic", "Basic ???", "Bearer x", "Basic " + "w7w=" * 2):
        assert client.get("/api/settings", headers={"authorization": header}).status_code == 401
    app.state.door.set(PASSWORD)  # even the same one, set anew
    assert not app.state.door.basic


def test_guessing_has_to_wait_and_the_right_password_too(client, clock):
    assert client.get("/api/settings", auth=("", PASSWORD)).status_code == 200
    for k in range(auth.WRONG_FROM_ONE):
        assert log_in(client, f"guess number {k}").status_code == 401
    page = log_in(client)
    assert page.status_code == 429 and page.headers["retry-after"] == "30" and "Try again in 30 seconds" in page.text
    script = client.get("/api/settings", auth=("", "guess"))
    assert script.status_code == 429 and "Try again in 30 seconds" in script.json()["error"]
    assert client.get("/api/settings", auth=("", PASSWORD)).status_code == 200, "who was known before is not locked out by a guesser"
    clock.now += 31
    assert log_in(client).status_code == 303


# ---- the process --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="starts a second process group")
def test_listen_says_what_it_exposes_and_asks_for_the_password(tmp_path):
    port = free_port()
    words = ("--listen", "127.0.0.1", "--port", str(port))
    first = Process(tmp_path / "data", *words, LORA_ATELIER_PASSWORD=PASSWORD)
    url = first.until(r"LoRA Atelier is at (\S+)").group(1)
    for text in (
        "It lets others in, at:",
        url,
        "knows the password",
        "see your images",
        "no encryption",
        "network that you trust",
    ):
        assert text in first.output
    assert PASSWORD not in first.output
    status, said = ask(f"{url}/api/system")
    assert status == 401 and said["app"] == "lora-atelier"
    assert ask(f"{url}/")[0] == 401
    second = Process(tmp_path / "data", *words)
    assert second.end() == 0 and f"It is running already: {url}" in second.output
    assert PASSWORD not in (tmp_path / "data/server.log").read_text()
    first.process.terminate()
    assert first.end() == 0
    kept = Process(tmp_path / "data", *words)  # the password is asked for once in a lifetime
    kept.until(r"LoRA Atelier is at (\S+)")
    kept.process.terminate()
    kept.end()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_a_password_is_asked_for_on_the_terminal(tmp_path):
    import pty
    import subprocess
    import sys

    def answer(*lines: str) -> tuple[int, str]:
        """What `--set-password` says to these lines, typed one after each question."""
        ours, theirs = pty.openpty()
        words = [sys.executable, "-m", "app", "--set-password", "--data-dir", str(tmp_path)]
        process = subprocess.Popen(
            words, cwd=main.Path(main.__file__).parents[1], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        said, todo = "", list(lines)
        while True:
            try:
                said += os.read(ours, 1024).decode()
            except OSError:  # the other side is closed
                break
            if todo and re.search(r"(characters\)|more): $", said):
                os.write(ours, f"{todo.pop(0)}\n".encode())
                said += "\n"
        os.close(ours)
        return process.wait(30), said

    code, said = answer("one password", "another one", "short", "short", "a good password", "a good password")
    assert code == 0 and "two different ones" in said and "needs at least 8" in said and "The password is set." in said
    assert "good password" not in said
    assert Auth(Home(tmp_path)).is_right("a good password")
