"""What a finished run gave, and trying it out."""

from __future__ import annotations

from app.parts import part


def build() -> None:
    part("header")
    part("results")
