"""Shared by the tests of the app: a data folder, a runner that starts nothing, and all routes over them."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.api import router
from app.context import Context
from app.paths import Home
from app.runner import Runner
from app.server import _answer_errors


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def runner(home) -> Runner:
    return Runner(home)  # not started: what is submitted stays in the queue


@pytest.fixture
def client(home, runner) -> TestClient:
    app = FastAPI()
    app.state.context = Context(home, runner)
    app.include_router(router)
    _answer_errors(app)
    return TestClient(app)
