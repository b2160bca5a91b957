"""From a model's file to a server that listens, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import rpc
from ..errors import ConfigError, MesaError
from ..library.library import Library
from ..reading.embeddings import EmbeddingModel
from ..reading.prompts import PromptForm
from ..reading.reader import Reader, load_vocabulary
from ..reading.shelf import Catalogue
from .answers import Answers
from .app import Served, make_app
from .documents import Documents
from .engine import Engine
from .guard import Limits
from .metrics import Metrics
from .records import Records
from .served import ServedLlama

log = logging.getLogger("mesa_gguf.server")

HEADER_SECONDS = 30.0  # that a request's first line and headers may take
WRITE_SECONDS = 60.0  # that a client may leave an answer in the wires
GRACE_SECONDS = 30  # that requests may go on after the server was told to end
MAX_HEADERS = 32 * 1024  # bytes
MAX_CONNECTIONS = 512


@dataclass
class Settings:
    """How a server is run.

    Attributes:
        key: that requests must bear.
        allow_hosts, allow_origins: see `Guard`.
        max_waiting: requests in the queue.
        seconds: that a request may take, waiting included.
        plain: prompts without the model's chat template.
        max_tokens: of an answer in a chat that names none; None: to the end of the context, or the reader's about documents.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = field(default=None, repr=False)
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_waiting: int = 64
    seconds: float = 600.0
    limits: Limits = field(default_factory=Limits)
    plain: bool = False
    max_tokens: int | None = None

    def check(self) -> None:
        """Raise ConfigError for what would let anyone in."""
        if self.key is not None and (not self.key.strip() or not self.key.isascii() or not self.key.isprintable()):
            raise ConfigError("the API key is empty, or has characters that no header can hold: use letters and digits")
        if self.key is None and not rpc.is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} can be reached from other machines, so requests must bear an API key: set one, such as "
                f"{secrets.token_urlsafe(24)}"
            )


def open_records(library: Library) -> contextlib.closing[Records]:
    """What a server keeps in a library's folder, for it alone; before a model is loaded, as `listen`.

    Raises:
        LibraryError: it cannot be used, or another server uses it.
    """
    library.check_writable()
    return contextlib.closing(Records(library.folder / "server"))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; before a model is loaded, so that an address that is taken is told at once.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(256)
    except (OSError, OverflowError) as err:
        raise ConfigError(
            f"port {port} of host {host} cannot be used: {getattr(err, 'strerror', None) or err}"
        ) from None
    return found


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    llm: ServedLlama,
    library: Library,
    records: Records,
    settings: Settings,
    listener: socket.socket,
    *,
    name: str | None = None,
    embedding: EmbeddingModel | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Takes over the model, and closes it.

    Args:
        records: what the server keeps in the library's folder.
        name: the model's, in answers; default: its file's.
        embedding: finds questions in other words in documents, too.

    Raises:
        ConfigError: the settings would let anyone in.
    """
    settings.check()
    path = Path(llm.model_path)
    metrics = Metrics()
    try:
        reader, reason = _reader(llm, library, settings.plain, embedding)

        def open_catalogue() -> Catalogue:
            form = PromptForm(load_vocabulary(path), plain=settings.plain)
            return Catalogue(form.vocabulary, form, library)

        documents = Documents(library, records, reader.shelf if reader is not None else None, open_catalogue, reason)
        engine = Engine(llm, metrics, documents if reader is not None else None, max_waiting=settings.max_waiting)
        if embedding is not None:
            embedding.interrupt = llm.interrupt
        answers = Answers(engine, reader, documents, name or path.stem, settings.max_tokens)
        served = Served(engine, answers, documents, metrics, seconds=settings.seconds)
        app = make_app(
            served, key=settings.key, hosts=settings.allow_hosts, origins=settings.allow_origins, limits=settings.limits
        )
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=15,
            timeout_graceful_shutdown=GRACE_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADERS,
            limit_concurrency=MAX_CONNECTIONS,
        )
        asyncio.run(_Server(config, engine).serve(sockets=[listener]))
    finally:
        listener.close()


def _reader(
    llm: ServedLlama, library: Library, plain: bool, embedding: EmbeddingModel | None
) -> tuple[Reader | None, str]:
    """A reader of documents, or why this model reads none."""
    try:
        return Reader(llm, library, form=PromptForm(llm, plain=plain), embedding=embedding), ""
    except MesaError as err:
        log.warning("documents cannot be asked about: %s", err)
        return None, str(err)


class _Server(uvicorn.Server):
    """uvicorn's, which ends on SIGINT and SIGTERM; the queue hears of it at once, and the process ends as it began."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.refuse_more()
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


class _Protocol(H11Protocol):
    """uvicorn's, with an end to headers that never come, and to clients that do not take their answer."""

    _headers: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._headers = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _asks(self) -> bool:
        """A request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _too_slow(self) -> None:
        self._headers = None
        if not self._asks():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asks() or self.transport.is_closing():
            self._forget(self._headers)
            self._headers = None
        elif self._headers is None:
            self._headers = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget(self._writing)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget(self._headers)
        self._forget(self._writing)
        super().connection_lost(exc)

    @staticmethod
    def _forget(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


@contextlib.contextmanager
def logging_to_stderr() -> Iterator[None]:
    """What the server has to say, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mesa-gguf: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("mesa_gguf.server", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
