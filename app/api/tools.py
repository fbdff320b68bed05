"""Inspect and convert LoRA files. assets/help/api.md says what each route takes and answers."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from app import tools
from app.api.runs import Strict
from app.context import of
from app.errors import Problem

router = APIRouter()


class Source(Strict):
    path: str = ""
    upload: str = ""
    run: str = ""
    file: str = ""

    def asked(self) -> dict[str, str]:
        return {"path": self.path, "upload": self.upload, "run": self.run, "file": self.file}


class Conversion(Source):
    to: Literal["kohya", "diffusers", "comfy"]
    beside: bool = False


@router.post("/tools/files")
async def send(request: Request) -> Any:
    context = of(request)
    try:
        async with request.form(max_files=1, max_fields=1) as form:  # the part lies on disk; app/guard.py limits its size
            part = form.get("file")
            if not isinstance(part, UploadFile):
                raise Problem("There is no file in the request. Send it as multipart/form-data, in a field called file.")
            return await run_in_threadpool(tools.take, context.home, context.runner, part.filename or "", part.file, part.size or 0)
    except ClientDisconnect:  # cancelled: nobody hears the answer
        return Response(status_code=400)


@router.get("/tools/exports")
def exports(request: Request) -> dict[str, Any]:
    return {"files": tools.exports(of(request).home)}


@router.post("/tools/inspect")
def inspect(request: Request, body: Source) -> dict[str, Any]:
    context = of(request)
    return tools.inspect(context.home, context.runner, body.asked())


@router.post("/tools/convert")
def convert(request: Request, body: Conversion) -> dict[str, Any]:
    context = of(request)
    return tools.convert(context.home, context.runner, body.asked(), body.to, body.beside)


@router.get("/tools/{id}")
def view(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    return tools.view(context.home, context.runner, id)


@router.get("/tools/{id}/file")
def file(request: Request, id: str) -> FileResponse:
    context = of(request)
    path = tools.converted_file(context.home, context.runner, id)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.post("/tools/{id}/cancel")
def cancel(request: Request, id: str) -> dict[str, Any]:
    context = of(request)
    return tools.cancel(context.home, context.runner, id)
