"""The routes."""

from __future__ import annotations

import asyncio
import html
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Match, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..errors import MesaError, PromptError
from .answers import Answers
from .documents import Documents
from .engine import Engine, Job, Work
from .guard import Guard, Limits
from .intake import name_of, understand
from .metrics import Metrics
from .pages import pdf_pages
from .problems import Json, Problem, encode, problem_of
from .records import MAX_CONVERSATION, FileRow, new_file_id
from .schemas import ChatRequest, CompletionRequest, EmbeddingRequest, MemberRequest, Name, StoreRequest

log = logging.getLogger("mesa_gguf.server")

PAGE = Path(__file__).parent / "page"
KEEP_ALIVE_SECONDS = 15.0  # between signs of life where there is nothing to say
POLL_SECONDS = 0.25  # of a document's progress
# between two writes of a stream, where tokens come faster: at each one the model's thread may have to wait for the other
TOGETHER_SECONDS = 0.02
MAX_FIELD = 64 * 1024  # bytes of a form's field that is no file

_EXTENDED_NAME = re.compile(
    rb";\s*filename\*=utf-8'[^';]*'([^;\s]+)", re.IGNORECASE
)  # as some clients send names beyond ASCII

_FIELD = re.compile(r"(?!(?:str|int|float|bool|dict)$)[a-z_0-9]+")

FileId = Annotated[str, Query(max_length=256)]


class Served:
    """What the routes use.

    Args:
        seconds: that a request may take, waiting included.
    """

    def __init__(
        self, engine: Engine, answers: Answers, documents: Documents, metrics: Metrics, *, seconds: float = 600.0
    ) -> None:
        self.engine, self.answers, self.documents, self.metrics, self.seconds = (
            engine,
            answers,
            documents,
            metrics,
            seconds,
        )
        self.created = int(time.time())

    async def run(self, request: Request, work: Work, *, user: str | None, stream: bool) -> Response:
        """Put work into the queue: its answer, or with stream its stream."""
        address = request.client.host if request.client is not None else ""
        client = f"{address} {request.headers.get('user-agent', '')} {user or ''}"
        job = Job(client, work, asyncio.get_running_loop(), self.seconds)
        self.engine.submit(job)
        watch: asyncio.Future[None] | None
        watch = asyncio.ensure_future(_watch(request.receive, lambda: self.engine.cancel(job)))
        try:
            items = await self._first(job, KEEP_ALIVE_SECONDS if stream else None)
            if stream:
                answer = _Stream(self, job, items, watch)
                watch = None
                return answer
            last: Any = None
            while True:
                for kind, item in items:
                    if kind == "error":
                        raise item
                    if kind == "end":
                        return Json(last)
                    last = item
                items = await self._first(job, None)
        finally:
            if watch is not None:
                watch.cancel()

    async def _first(self, job: Job, timeout: float | None) -> list[Any]:
        """What comes next of a job; at its time's end an error, also where it still waits for the model."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = job.deadline - time.monotonic() + 0.5
            if left <= 0 and self.engine.drop(job):
                return [("error", Problem(504, "the time for this request was up before its turn came", "timeout"))]
            wait = max(left, 1.0)
            if end is not None:
                wait = min(wait, max(end - time.monotonic(), 0.01))
            items = await job.channel.take(wait)
            if items or (end is not None and time.monotonic() >= end):
                return items


async def _watch(receive: Receive, gone: Callable[[], object]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


class _Stream(Response):
    """Server-sent events, as they come from the model's thread."""

    media_type = "text/event-stream"

    def __init__(self, served: Served, job: Job, items: list[Any], watch: asyncio.Future[None]) -> None:
        if items and items[0][0] == "error":  # nothing was said yet: the status tells
            watch.cancel()
            raise items[0][1]
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._served, self._job, self._items, self._gone = served, job, items, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            items, more, before = self._items, True, 0.0
            while more and not self._gone.done():
                lines = []
                for kind, item in items:
                    if kind == "item":
                        lines.append(b"data: %b\n\n" % encode(item))
                        continue
                    if kind == "error":
                        lines.append(b"data: %b\n\n" % encode(item.body))
                    lines.append(b"data: [DONE]\n\n")
                    more = False
                if not items:
                    lines.append(b": waiting\n\n")
                await send({"type": "http.response.body", "body": b"".join(lines), "more_body": True})
                if more:
                    now = time.monotonic()
                    if now - before < 1.5 * TOGETHER_SECONDS:  # where they come more slowly, none would come meanwhile
                        await self._job.channel.gather(TOGETHER_SECONDS)
                    before = now
                    items = await self._served._first(self._job, KEEP_ALIVE_SECONDS)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._served.engine.cancel(self._job)
            self._gone.cancel()


def make_app(
    served: Served,
    *,
    key: str | None = None,
    hosts: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> FastAPI:
    """The application.

    Args:
        key: that requests must bear; None: none.
        hosts: names that the server is called by, besides localhost and addresses.
        origins: of pages elsewhere that may ask.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        if served.documents.shelf is not None:
            served.documents.wake = served.engine.wake
            await run_in_threadpool(served.documents.start)
        yield
        await run_in_threadpool(served.engine.close)
        await run_in_threadpool(served.documents.close)

    errors: dict[int | str, dict[str, Any]] = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in (
            ("4XX", "The request is wrong, refused, or about something that is not there."),
            ("5XX", "The server cannot do it now."),
        )
    }
    app = FastAPI(
        title="mesa-gguf", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=errors,
        default_response_class=Json, description="OpenAI's API for one local model and long documents. See docs/SERVER.md.",
    )  # fmt: skip
    app.add_middleware(Guard, metrics=served.metrics, key=key, hosts=hosts, origins=origins, limits=limits)
    _handle_errors(app)
    _add_model_routes(app, served)
    _add_file_routes(app, served, limits)
    app.include_router(pdf_pages(served.documents))
    _add_store_routes(app, served)
    _add_page_routes(app, served)
    _add_own_routes(app, served)
    _describe_errors(app)
    if PAGE.is_dir():
        app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, err: RequestValidationError) -> Response:
        errors = [(_place(one["loc"]), str(one["msg"])) for one in err.errors()] or [("", "it cannot be understood")]
        # of the kinds of values that a field may have, the one that was meant is understood furthest
        param = max(
            (place for place, _ in errors if place.startswith(errors[0][0])), key=lambda place: place.count(".")
        )
        said = [message for place, message in errors if place == param]
        message = ", or: ".join(dict.fromkeys(said))
        return Problem(
            400, f"{param}: {message}" if param else message, "invalid_value", param=param or None
        ).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, err: HTTPException) -> Response:
        if err.status_code not in (404, 405):
            problem = Problem(err.status_code, str(err.detail), "refused").response()
            problem.headers.update(err.headers or {})
            return problem
        # note: the page's files are at "/", so what is nowhere else, or of another method, ends there
        path = request.url.path
        methods = sorted({
            method for route in app.routes if isinstance(route, Route) and route.matches(request.scope)[0] == Match.PARTIAL
            for method in route.methods or ()
        })  # fmt: skip
        if methods:
            wrong = Problem(405, f"{path} takes {' and '.join(methods)}, not {request.method}", "method_not_allowed")
            answer = wrong.response()
            answer.headers["Allow"] = ", ".join(methods)
            return answer
        beside = "" if path.startswith("/v1/") else ": the API is under /v1"
        return Problem(404, f"there is nothing at {path}{beside}", "not_found").response()

    @app.exception_handler(Problem)
    @app.exception_handler(MesaError)
    @app.exception_handler(OSError)
    async def wrong(_: Request, err: Exception) -> Response:
        problem = problem_of(err)
        if problem.status == 500:
            log.error("a request failed", exc_info=err)
        return problem.response()


def _place(loc: Sequence[str | int]) -> str:
    """A field by its name in the request, without what pydantic calls the kinds of values that it may have."""
    own: list[str] = []
    for part in map(str, loc):
        # the kind of a message's part has the name of its only field
        if part not in ("body", "query", "path", *own[-1:]) and _FIELD.fullmatch(part):
            own.append(part)
    return ".".join(own)


def _describe_errors(app: FastAPI) -> None:
    """Errors as they are, in the description of the API: FastAPI's own are of another form and status."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = describe()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            text = {"type": ["string", "null"]}
            error = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
            schemas["Error"] = {
                "type": "object", "required": ["error"],
                "properties": {"error": {"type": "object", "required": list(error), "properties": error}},
            }  # fmt: skip
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _add_model_routes(app: FastAPI, served: Served) -> None:
    def model() -> dict[str, Any]:
        return {"id": served.answers.name, "object": "model", "created": served.created, "owned_by": "mesa-gguf"}

    @app.get("/v1/models", tags=["models"], summary="The model")
    async def models() -> Json:
        return Json({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", tags=["models"], summary="The model by its name")
    async def one_model(name: str) -> Json:
        if name != served.answers.name:
            raise Problem(
                404, f"there is no model {name}: this one is {served.answers.name}", "model_not_found", param="model"
            )
        return Json(model())

    @app.post(
        "/v1/chat/completions",
        tags=["answers"],
        summary="An answer in a conversation, about documents where it names some",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        asked = await understand(body, served.documents, min(120.0, served.seconds))
        work = served.answers.chat(body) if asked is None else served.answers.ask(body, asked)
        return await served.run(request, work, user=body.user, stream=bool(body.stream))

    @app.post("/v1/completions", tags=["answers"], summary="How a text goes on")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        work = served.answers.complete(body)
        return await served.run(request, work, user=body.user, stream=bool(body.stream))

    @app.post("/v1/embeddings", tags=["answers"], summary="Texts as vectors")
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        return await served.run(request, served.answers.embed(body), user=body.user, stream=False)


def _add_file_routes(app: FastAPI, served: Served, limits: Limits) -> None:
    documents = served.documents

    form = {"multipart/form-data": {"schema": {
        "type": "object", "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}},
    }}}  # fmt: skip

    @app.post(
        "/v1/files", tags=["documents"], summary="Upload a document",
        openapi_extra={"requestBody": {"content": form, "required": True}},
    )  # fmt: skip
    async def upload(request: Request) -> Json:
        documents.require()
        row = await _take_upload(request, documents, limits)
        documents.add(row)
        return Json(documents.described(row))

    @app.get("/v1/files", tags=["documents"], summary="All documents")
    def files(
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        after: Annotated[str | None, Query(max_length=256)] = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Json:
        documents.meet_library()
        rows = [row for row in documents.records.files() if purpose in (None, row.purpose)]
        page, more = _page(rows if order == "asc" else rows[::-1], [row.id for row in rows], limit, after, order)
        return Json(_list([documents.described(row) for row in page], more))

    @app.get("/v1/files/{file_id}", tags=["documents"], summary="A document, and how far it is read")
    def file(file_id: str) -> Json:
        return Json(documents.described(documents.file(file_id)))

    @app.delete("/v1/files/{file_id}", tags=["documents"], summary="Forget a document")
    def remove(file_id: str) -> Json:
        documents.remove(documents.file(file_id))
        return Json({"id": file_id, "object": "file", "deleted": True})

    @app.get("/v1/files/{file_id}/content", tags=["documents"], summary="The bytes that were uploaded")
    def content(file_id: str) -> Response:
        row = documents.file(file_id)
        path = documents.records.content(row)
        if path is None:
            raise Problem(404, f"the bytes of {row.filename} are not kept here: its text is at /text", "not_found")
        # never shown as what it says it is: a document may be a page with scripts
        kind = "application/pdf" if row.filename.lower().endswith(".pdf") else "application/octet-stream"
        return FileResponse(path, media_type=kind, filename=row.filename, content_disposition_type="attachment")

    @app.get("/v1/files/{file_id}/text", tags=["documents"], summary="A document's text, with pages and headings")
    def text(
        file_id: str,
        start: Annotated[int, Query(ge=0, le=2**53)] = 0,
        stop: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    ) -> Json:
        return Json(documents.text(documents.file(file_id), start, stop))

    @app.get(
        "/v1/files/{file_id}/events", tags=["documents"], summary="How a document's reading goes on, as server-sent events",
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )  # fmt: skip
    async def events(file_id: str, request: Request) -> Response:
        await run_in_threadpool(documents.file, file_id)
        return _Events(served, file_id)


class _Events(Response):
    """A file's state as server-sent events, until it is read."""

    media_type = "text/event-stream"

    def __init__(self, served: Served, file_id: str) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._served, self._file_id = served, file_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(_watch(receive, lambda: None))
        documents = self._served.documents
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            said: dict[str, Any] | None = None
            spoke = time.monotonic()
            while not watch.done() and not self._served.engine.closing:
                row = await run_in_threadpool(documents.records.file, self._file_id)
                if row is None:  # it was deleted
                    break
                now = await run_in_threadpool(documents.described, row)
                if _without_time(now) != _without_time(said):
                    said, spoke = now, time.monotonic()
                    event = b"event: file\ndata: %b\n\n" % encode(now)
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    if now["mesa"]["state"] in ("ready", "error"):
                        break
                elif time.monotonic() - spoke > KEEP_ALIVE_SECONDS:
                    spoke = time.monotonic()
                    await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                await asyncio.wait({watch}, timeout=POLL_SECONDS)
            await send({"type": "http.response.body", "body": b""})
        finally:
            watch.cancel()


def _without_time(described: dict[str, Any] | None) -> dict[str, Any] | None:
    if described is None:
        return None
    return {**described, "mesa": {**described["mesa"], "seconds_left": None}}


def _page(rows: list[Any], ids: list[str], limit: int, after: str | None, order: str) -> tuple[list[Any], bool]:
    """The rows after one, at most so many, and whether there are more."""
    if after is not None:
        ids = ids if order == "asc" else ids[::-1]
        if after not in ids:
            raise Problem(400, f"after is {after}, which is not in the list", "invalid_value", param="after")
        rows = rows[ids.index(after) + 1 :]
    return rows[:limit], len(rows) > limit


def _list(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "has_more": more, "first_id": first, "last_id": last}


async def _take_upload(request: Request, documents: Documents, limits: Limits) -> FileRow:
    """A form's file, straight to the disk."""
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    boundary = parameters.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Problem(400, "an upload is multipart/form-data with the parts file and purpose", "invalid_value")
    file_id = new_file_id()
    path = documents.records.new_path(file_id)
    form = _Form(path, limits.upload)
    try:
        try:
            parser = MultipartParser(boundary, form.callbacks())
            async for data in request.stream():
                # note: a thread for each piece; a disk that is slow must not stop the others
                await run_in_threadpool(parser.write, data)
            parser.finalize()
        except FormParserError as err:
            raise Problem(400, f"the upload is no multipart/form-data: {err}", "invalid_value") from None
        form.close()
        if form.filename is None:
            raise Problem(400, "the upload has no file", "invalid_value", param="file")
        if not form.ended:
            raise Problem(400, "the upload ends in the middle", "invalid_value", param="file")
        purpose = form.fields.get("purpose", b"user_data").decode("utf-8", "replace")[:64]
        name = name_of(form.filename)
        add = documents.records.add_file
        return await run_in_threadpool(lambda: add(file_id, name, purpose=purpose or "user_data", n_bytes=form.n_bytes))
    finally:
        form.close()
        path.unlink(missing_ok=True)


class _Form:
    """What a multipart form's parser calls: one file, which goes to a path, and small fields."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        self._file: Any = None
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None
        self._is_file = False
        self.filename: str | None = None
        self.n_bytes = 0
        self.fields: dict[str, bytes] = {}
        self.ended = False

    def callbacks(self) -> Any:
        names = (
            "part_begin",
            "part_data",
            "part_end",
            "header_field",
            "header_value",
            "header_end",
            "headers_finished",
            "end",
        )
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self) -> None:
        self._headers, self._header, self._value = {}, b"", b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = self._within(self._header + data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value = self._within(self._value + data[start:end])

    def header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self.filename is not None:
                raise Problem(400, "an upload has one file", "invalid_value", param="file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            extended = _EXTENDED_NAME.search(disposition)
            if extended is not None:
                self.filename = unquote(extended[1].decode("latin-1"), errors="replace")
            self._file = open(self._path, "xb")  # noqa: SIM115 - closed by close()
        elif len(self.fields) >= 32:
            raise Problem(400, "the form has too many fields", "invalid_value")
        else:
            self.fields[self._name] = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            assert self._name is not None
            self.fields[self._name] = self._within(self.fields.get(self._name, b"") + data[start:end])
            return
        self.n_bytes += end - start
        if self.n_bytes > self._limit:
            raise Problem(413, f"the file is larger than {self._limit} bytes", "too_large", param="file")
        self._file.write(data[start:end])

    def part_end(self) -> None:
        if self._is_file and self._file is not None:
            self._file.flush()

    def end(self) -> None:
        self.ended = True

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    @staticmethod
    def _within(value: bytes) -> bytes:
        if len(value) > MAX_FIELD:
            raise Problem(413, f"a field of the form is larger than {MAX_FIELD} bytes", "too_large")
        return value


def _add_store_routes(app: FastAPI, served: Served) -> None:
    documents = served.documents
    records = documents.records

    @app.post("/v1/vector_stores", tags=["vector stores"], summary="Make a collection of documents")
    def make(body: StoreRequest) -> Json:
        rows = [documents.file(file_id) for file_id in body.file_ids or ()]
        name = body.name if body.name is not None else f"collection {time.strftime('%Y-%m-%d %H:%M:%S')}"
        _check_name(name)
        store = records.add_store(name)
        documents.make_collection(store)
        for row in rows:
            documents.join_store(store, row)
        return Json(documents.store_described(store))

    @app.get("/v1/vector_stores", tags=["vector stores"], summary="All collections")
    def stores(
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        after: Annotated[str | None, Query(max_length=256)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Json:
        documents.meet_library()
        found = records.stores()
        page, more = _page(found if order == "asc" else found[::-1], [s.id for s in found], limit, after, order)
        return Json(_list([documents.store_described(store) for store in page], more))

    @app.get("/v1/vector_stores/{store_id}", tags=["vector stores"], summary="A collection")
    def store(store_id: str) -> Json:
        return Json(documents.store_described(documents.store(store_id)))

    @app.delete(
        "/v1/vector_stores/{store_id}", tags=["vector stores"], summary="Forget a collection; its documents stay"
    )
    def remove(store_id: str) -> Json:
        found = documents.store(store_id)
        documents.remove_store(found)
        return Json({"id": found.id, "object": "vector_store.deleted", "deleted": True})

    @app.post("/v1/vector_stores/{store_id}/files", tags=["vector stores"], summary="Put a document into a collection")
    def join(store_id: str, body: MemberRequest) -> Json:
        found, row = documents.store(store_id), documents.file(body.file_id)
        return Json(documents.member_described(found, row, documents.join_store(found, row)))

    @app.get("/v1/vector_stores/{store_id}/files", tags=["vector stores"], summary="The documents of a collection")
    def members(
        store_id: str,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        after: Annotated[str | None, Query(max_length=256)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Json:
        found = documents.store(store_id)
        rows = records.members(found)
        page, more = _page(rows if order == "asc" else rows[::-1], [row.id for row, _ in rows], limit, after, order)
        return Json(_list([documents.member_described(found, row, created) for row, created in page], more))

    @app.get(
        "/v1/vector_stores/{store_id}/files/{file_id}", tags=["vector stores"], summary="A document of a collection"
    )
    def member(store_id: str, file_id: str) -> Json:
        found = documents.store(store_id)
        for row, created in records.members(found):
            if row.id == file_id:
                return Json(documents.member_described(found, row, created))
        raise Problem(404, f"{file_id} is not in this vector store", "not_found", param="file_id")

    @app.delete(
        "/v1/vector_stores/{store_id}/files/{file_id}",
        tags=["vector stores"],
        summary="Take a document out of a collection",
    )
    def leave(store_id: str, file_id: str) -> Json:
        found, row = documents.store(store_id), documents.file(file_id)
        if not documents.leave_store(found, row):
            raise Problem(404, f"{file_id} is not in this vector store", "not_found", param="file_id")
        return Json({"id": file_id, "object": "vector_store.file.deleted", "deleted": True})


def _check_name(name: Name) -> None:
    if not name.strip() or not name.isprintable() or name.startswith("."):
        raise PromptError("a vector store's name is printable text that does not begin with a dot")


def _add_page_routes(app: FastAPI, served: Served) -> None:
    records = served.documents.records

    @app.get("/page/conversations", tags=["page"], summary="The page's conversations")
    def conversations() -> Json:
        return Json({"conversations": records.conversations()})

    @app.get("/page/conversations/{number}", tags=["page"], summary="A conversation")
    def conversation(number: str) -> Response:
        body = records.conversation(number)
        if body is None:
            raise Problem(404, "there is no such conversation", "not_found")
        return Response(body, media_type="application/json")

    @app.put(
        "/page/conversations/{number}", tags=["page"], summary="Keep a conversation",
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}},
    )  # fmt: skip
    async def keep(number: str, request: Request) -> Json:
        body = b""
        async for data in request.stream():
            body += data
            if len(body) > MAX_CONVERSATION:
                raise Problem(413, f"a conversation has at most {MAX_CONVERSATION} bytes", "too_large")
        return Json(await run_in_threadpool(records.put_conversation, number, body))

    @app.delete("/page/conversations/{number}", tags=["page"], summary="Forget a conversation")
    def forget(number: str) -> Json:
        if not records.remove_conversation(number):
            raise Problem(404, "there is no such conversation", "not_found")
        return Json({"id": number, "deleted": True})


def _add_own_routes(app: FastAPI, served: Served) -> None:
    @app.get("/health", tags=["server"], summary="Whether the server answers")
    async def health() -> Json:
        if served.engine.closing or not served.engine.alive:
            raise Problem(503, "the server is shutting down", "shutting_down", retry_after=10)
        return Json({"status": "ok"})

    @app.get("/metrics", tags=["server"], summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_docs(app.openapi()))


def _docs(schema: dict[str, Any]) -> str:
    """The description of the API as a page, without scripts."""
    rows = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            fields = _fields(schema, operation)
            items = "".join(f"<li><code>{html.escape(name)}</code>{html.escape(text)}</li>" for name, text in fields)
            rows.append(
                f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}</p>"
                f"{f'<ul>{items}</ul>' if items else ''}</section>"
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>mesa-gguf's API</title></head><body><main><h1>mesa-gguf {html.escape(__version__)}: the API</h1>"
        '<p>The whole of it, for programs: <a href="/openapi.json">openapi.json</a>.</p>'
        f"{''.join(rows)}</main></body></html>"
    )


def _fields(schema: dict[str, Any], operation: dict[str, Any]) -> list[tuple[str, str]]:
    """The fields of a request, each with what there is to say of it."""
    found = [(p["name"], f" ({p['in']})") for p in operation.get("parameters", ())]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        body = content["schema"]
        if "$ref" in body:
            body = schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
        required = body.get("required", ())
        for name, value in body.get("properties", {}).items():
            about = f": {value['description']}" if "description" in value else ""
            found.append((name, f"{' (required)' if name in required else ''}{about}"))
    return found
