"""Pages of PDF files as pictures, with a passage's place on them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi import Path as InPath
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ..loaders.document import Limits
from ..loaders.pdf_page import MOST_WIDTH, WIDTH, draw_page, find_on_page
from .documents import Documents
from .problems import Json, Problem
from .records import FileRow

LIMITS = Limits(seconds=20.0, memory=1 << 30)  # of one page
AT_ONCE = 2  # processes that look at pages

Number = Annotated[int, InPath(ge=1, le=2**31 - 1)]
Width = Annotated[int, Query(ge=1, le=MOST_WIDTH, description="Of the picture, in pixels.")]
Place = Annotated[int, Query(ge=0, le=2**53)]


def pdf_pages(documents: Documents) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["documents"])
    turns = asyncio.Semaphore(AT_ONCE)  # who waits for a turn keeps no thread

    def content(file_id: str) -> tuple[FileRow, Path]:
        row = documents.file(file_id)
        path = documents.records.content(row)
        if path is None:
            raise Problem(404, f"the bytes of {row.filename} are not kept here: its text is at /text", "not_found")
        return row, path

    def draw(file_id: str, number: int, width: int) -> bytes:
        row, path = content(file_id)
        return draw_page(path.read_bytes(), row.filename, number, width, limits=LIMITS)

    def find(file_id: str, number: int, start: int, stop: int) -> dict[str, Any]:
        row, path = content(file_id)
        before, passage, to = _on_page(documents, row, number, start, stop)
        found = find_on_page(path.read_bytes(), row.filename, number, passage, before=before, limits=LIMITS)
        return {
            "file_id": row.id, "filename": row.filename, "page": found.number, "pages": found.pages,
            "width": found.width, "height": found.height, "text": passage, "rectangles": found.rectangles, "goes_on": to,
            "lines": found.lines,
        }  # fmt: skip

    @router.get(
        "/v1/files/{file_id}/pages/{number}.png", summary="A page of a PDF as a picture",
        response_class=Response, responses={200: {"content": {"image/png": {}}}},
    )  # fmt: skip
    async def picture(file_id: str, number: Number, width: Width = WIDTH) -> Response:
        async with turns:
            return Response(await run_in_threadpool(draw, file_id, number, width), media_type="image/png")

    @router.get(
        "/v1/files/{file_id}/pages/{number}",
        summary="A page of a PDF: its size and text, and where a passage lies on it",
    )
    async def page(file_id: str, number: Number, start: Place = 0, stop: Place = 0) -> Json:
        async with turns:
            return Json(await run_in_threadpool(find, file_id, number, start, stop))

    return router


def _on_page(documents: Documents, row: FileRow, number: int, start: int, stop: int) -> tuple[str, str, int | None]:
    """The text of a page before a passage, what of the passage is on it, and the page that it goes on on.

    Args:
        start, stop: of the passage, in characters of the document's text.
    """
    document = documents.library.index.document(row.document) if row.document is not None else None
    if document is None or stop <= start:
        return "", "", None
    first = min((at for at, page, _ in document.places if page == number), default=None)
    if first is None:
        return "", "", None
    later = [(at, page) for at, page, _ in document.places if page is not None and page > number]
    end, following = min(later, default=(len(document.text), None))
    goes_on = following if start < end < stop and document.text[end:stop].strip() else None
    start, stop = min(max(start, first), end), max(min(stop, end), first)
    return document.text[first:start], document.text[start:stop], goes_on
