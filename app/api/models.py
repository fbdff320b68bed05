"""Routes on base models, and the form of all settings."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from app import context, draft, forms, models

router = APIRouter()


class Source(BaseModel):
    source: str


@router.get("/models")
def get_models(request: Request, q: str = "", all: bool = False) -> dict[str, Any]:
    return models.listing(context.of(request).home, q, all)


@router.post("/models/check")
def check(request: Request, body: Source) -> dict[str, Any]:
    home = context.of(request).home
    return models.check(home, body.source, draft.load(home)["example"])


@router.post("/models/rescan")
def rescan(request: Request) -> dict[str, Any]:
    home = context.of(request).home
    models.scanner(home).scan(again=True)
    return models.listing(home)


@router.get("/form")
def get_form() -> dict[str, Any]:
    return forms.form()
