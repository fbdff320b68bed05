"""What every route needs, built once at start and kept in `app.state.context`."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from app.paths import Home
from app.runner import Runner


@dataclass
class Context:
    home: Home
    runner: Runner


def of(request: Request) -> Context:
    return request.app.state.context
