"""What stands before every request: who may ask, where from, how much and how slowly; and what every answer says to browsers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .problems import Problem, problem_of

log = logging.getLogger("mesa_gguf.server")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; "
    "worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
PROTECTED = ("/v1", "/page/", "/metrics", "/docs", "/openapi.json")
MIB = 1024 * 1024
DRAIN_SECONDS = 2.0  # that a refused body is still taken
DRAIN_BYTES = 64 * MIB
CLIENT_GONE = 499  # in the metrics, as nginx has it


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        upload: bytes of a file's upload.
        body: bytes of any other body.
        patience: seconds that a body may take, besides
        rate: bytes a second, the slowest that a client may be.
    """

    upload: int = 256 * MIB
    body: int = 64 * MIB
    patience: float = 30.0
    rate: int = 16 * 1024


class Guard:
    """ASGI middleware.

    Args:
        key: that requests must bear; None: none.
        hosts: names that the server is called by, besides localhost and addresses.
        origins: of pages elsewhere that may ask.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        key: str | None = None,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        limits: Limits | None = None,
    ) -> None:
        self.app, self.metrics, self.limits = app, metrics, limits or Limits()
        self._key = None if key is None else _digest(key.encode())
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket: there are none, and uvicorn refuses it
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        exchange = _Exchange(receive, send, self._limit(scope), self.limits)
        exchange.cors = self._cors(headers)
        try:
            self._check(scope, headers, exchange)
            if scope["method"] == "OPTIONS" and exchange.cors and b"access-control-request-method" in headers:
                await exchange.preflight()
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:  # in the middle of its request
            exchange.status = exchange.status or CLIENT_GONE
        except Exception as err:
            if not exchange.began:
                problem = problem_of(err)
                if problem.status == 500:
                    log.exception("a request failed")
                await exchange.refuse(problem)
            elif not isinstance(err, Problem):
                raise
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(exchange.status)).inc()

    def _limit(self, scope: Scope) -> int:
        return self.limits.upload + MIB if scope["path"] == "/v1/files" else self.limits.body

    def _check(self, scope: Scope, headers: dict[bytes, bytes], exchange: _Exchange) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_own(host):
            raise Problem(403, "this server is not called by this name (--allow-host adds one)", "host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None:
            text = origin.decode("latin-1")
            if _authority(text) != host.lower() and text not in self._origins:
                raise Problem(
                    403, "pages of other sites may not ask here (--allow-origin allows one)", "origin_not_allowed"
                )
        elif headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
            page = headers.get(b"sec-fetch-mode") == b"navigate" and scope["method"] == "GET"
            if not page or not _is_page(scope["path"]):
                raise Problem(
                    403, "pages of other sites may not ask here (--allow-origin allows one)", "origin_not_allowed"
                )
        if self._key is not None and scope["method"] != "OPTIONS" and scope["path"].startswith(PROTECTED):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                raise Problem(401, "this server wants its API key: Authorization: Bearer KEY", "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > exchange.limit:
            raise exchange.too_large()

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server: by an address, which no one can point elsewhere, or by a name of its own."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _cors(self, headers: dict[bytes, bytes]) -> str | None:
        origin = headers.get(b"origin", b"").decode("latin-1")
        return origin if origin in self._origins else None


class _Exchange:
    """A request and its answer: the body is counted and timed, the answer gets its headers."""

    def __init__(self, receive: Receive, send: Send, limit: int, limits: Limits) -> None:
        self._receive, self._send = receive, send
        self.limit, self._limits = limit, limits
        self.status = 0
        self.began = False
        self.cors: str | None = None
        self._failure: Problem | None = None
        self._n_bytes = 0
        self._begin = time.monotonic()
        self._whole = False

    def too_large(self) -> Problem:
        return Problem(413, f"the request is larger than {self.limit} bytes", "too_large")

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        left = self._limits.patience + self._n_bytes / self._limits.rate - (time.monotonic() - self._begin)
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.01))
        except asyncio.TimeoutError:
            self._failure = Problem(408, "the request came too slowly", "too_slow")
            raise self._failure from None
        if message["type"] != "http.request":
            self._whole = True
            return message
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self.limit:
            self._failure = self.too_large()
            raise self._failure
        self._whole = not message.get("more_body", False)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if self._failure is not None and not self.began:  # whatever the application made of it
                await self.refuse(self._failure)
                return
            self.began = True
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers(message)]
        elif self._failure is not None and self.status == self._failure.status:
            return
        await self._send(message)

    def _headers(self, message: MutableMapping[str, Any]) -> list[tuple[bytes, bytes]]:
        there = {name.lower() for name, _ in message.get("headers", ())}
        headers = dict(HEADERS)
        if self.cors is not None:
            headers |= {
                "Access-Control-Allow-Origin": self.cors,
                "Vary": "Origin",
                "Cross-Origin-Resource-Policy": "cross-origin",
            }
        pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        return [(name, value) for name, value in pairs if name not in there]

    async def refuse(self, problem: Problem) -> None:
        response = problem.response()
        self.began, self.status = True, problem.status
        if problem.status != 408:
            await self._drain()
        headers = list(response.raw_headers)
        if not self._whole:  # what is left of the body is not read
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": problem.status, "headers": headers}
        start["headers"] = [*headers, *self._headers(start)]
        await self._send(start)
        await self._send({"type": "http.response.body", "body": bytes(response.body)})

    async def _drain(self) -> None:
        """Take what the client is sending still, within bounds: to hang up on it would lose the answer on its way."""
        end, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
        while not self._whole and left > 0 and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(self._receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            self._whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})


def _authority(origin: str) -> str | None:
    """Host and port of an origin; None: it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _is_page(path: str) -> bool:
    return not path.startswith(PROTECTED)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
