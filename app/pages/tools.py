"""What a LoRA file is, and rewriting it for other programs."""

from __future__ import annotations

from app.parts import part


def build() -> None:
    part("header")
    part("tools")
