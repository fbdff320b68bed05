"""Folders, hub token, theme, captioners, about."""

from __future__ import annotations

from app.parts import part


def build() -> None:
    part("header")
    part("settings")
