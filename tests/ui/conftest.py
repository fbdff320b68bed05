"""A real browser before the real app: one app for each test module, one browser context for each test."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "microsoft-edge", "msedge")


class App:
    """The app as a process of its own, with a data folder and a home folder of its own (so that no model of this machine is found).

    `words` go to the command line, `password` is sent with each request of this class, `environment` goes before the usual one.
    """

    def __init__(self, folder: Path, *words: str, password: str = "", **environment: str) -> None:
        self.folder, self.data, self.words, self.environment = folder, folder / "data", words, environment
        self.headers = {"authorization": f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"} if password else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        environment = {**os.environ, "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
        environment |= self.environment
        words = [sys.executable, "-m", "app", "--no-browser", "--port", str(self.port), "--data-dir", str(self.data), *self.words]
        log = (self.folder / "app.txt").open("ab")
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                assert self.get("/system")["app"] == "lora-atelier"
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self.process.poll() is None, (self.folder / "app.txt").read_text()
                time.sleep(0.2)
        else:
            pytest.fail("the app did not answer within 90 s")
        self.post("/settings", {"run_folders": []}, method="PATCH")  # those of this checkout are not the test's

    def kill(self) -> None:
        """As when the computer takes it away: no time to say goodbye."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api{path}", headers=self.headers), timeout=20) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: dict | None = None, method: str = "POST") -> dict:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self.url}/api{path}", data, {"content-type": "application/json", **self.headers}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def wait(self, run: str, *states: str, seconds: float = 240) -> dict:
        """The view of a run as soon as it is in one of these states."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            view = self.get(f"/runs/{run}?since=-1")
            if view["run"]["state"] in states:
                return view
            time.sleep(0.3)
        pytest.fail(
            f"{run} is {view['run']['state']} and not {states} after {seconds} s; {view['run']['text']} {view['run'].get('log_tail')}"
        )

    def runs(self) -> list[dict]:
        return self.get("/runs")["runs"]


@pytest.fixture(scope="module")
def start_app(tmp_path_factory) -> Iterator[Callable[..., App]]:
    """start_app("--listen", password="...", NAME="..."): an app of its own, see App."""
    started = []

    def start(*words: str, **more: str) -> App:
        it = App(tmp_path_factory.mktemp("app"), *words, **more)
        started.append(it)
        it.start()
        return it

    yield start
    for it in started:
        if it.process.poll() is None:
            for run in it.runs():  # no trainer outlives its test
                if run["state"] in ("running", "starting", "waiting"):
                    it.post(f"/runs/{run['id']}/discard", {"confirm": True})
        it.stop()


@pytest.fixture(scope="module")
def app_environment() -> dict[str, str]:
    """What a module's app finds in its environment beside the usual."""
    return {}


@pytest.fixture(scope="module")
def app(start_app, app_environment) -> App:
    return start_app(**app_environment)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=15_000)  # of two browsers and two trainings on two cores
    path = os.environ.get("LORA_ATELIER_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("No Chrome, Edge or Chromium was found; `python launch.py test` installs one, or set LORA_ATELIER_BROWSER to its path.")
    with sync_playwright() as playwright:
        it = playwright.chromium.launch(
            executable_path=path, headless=True, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield it
        it.close()


@pytest.fixture
def open_page(browser, app) -> Iterator[Callable]:
    """open_page("/runs", width=390, dark=True): a page of its own context. Fails at the end on a script error or a request to anywhere else."""
    contexts, errors, foreign = [], [], []

    def go(path: str = "/", width: int = 1280, dark: bool = False):
        context = browser.new_context(
            viewport={"width": width, "height": 900 if width > 600 else 844},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            accept_downloads=True,
        )
        contexts.append(context)

        def refuse(route) -> None:
            foreign.append(route.request.url)
            route.abort()

        context.route(re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1:)"), refuse)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(app.url + path)
        page.locator("#la-main").wait_for()
        return page

    yield go
    for context in contexts:
        context.close()
    assert errors == []
    assert foreign == []


@pytest.fixture(scope="module")
def zorps() -> list[Path]:
    """The demo's fourteen training pictures."""
    found = sorted((ROOT / "assets/demo/data/zorp/train").glob("*.png"))
    assert len(found) == 14
    return found
