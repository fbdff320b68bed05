"""Queue, history, and one run in detail."""

from __future__ import annotations

from app.parts import part


def build() -> None:
    part("header")
    part("runs")
