"""The REST routes that the page, scripts and tests share; assets/help/api.md documents them."""

from __future__ import annotations

from fastapi import APIRouter

from app.api import batch, datasets, draft, images, masks, models, results, runs, settings, tools

router = APIRouter(prefix="/api")
for module in (batch, draft, masks, images, datasets, models, runs, results, settings, tools):
    router.include_router(module.router)
