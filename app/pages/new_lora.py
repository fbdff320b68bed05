"""The page on which a training is prepared."""

from __future__ import annotations

from app.parts import part


def build() -> None:
    part("header")
    part("new_lora")
