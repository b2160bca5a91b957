"""Errors as OpenAI's API has them: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import errno
import json
from typing import Any

from starlette.responses import JSONResponse

from ..errors import ConfigError, DeviceError, DocumentError, MesaError, MissingPackageError, ModelError, PromptError
from ..library.store import LibraryError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
}


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # a stream encodes each token


class Problem(Exception):
    """An answer that says what is wrong.

    Args:
        status: of HTTP.
        message: for the user.
        code: for programs.
        param: the field that is wrong.
        retry_after: seconds after which it is worth another try.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> JSONResponse:
        return Json(self.body, self.status, self.headers)


class Json(JSONResponse):
    """JSON of any text, halves of characters included: they come back as they were sent, as escapes."""

    def render(self, content: Any) -> bytes:
        return encode(content)


def encode(content: Any) -> bytes:
    # backslashreplace: what UTF-8 cannot hold becomes \udXXX, which is JSON's own escape
    return _ENCODER.encode(content).encode("utf-8", "backslashreplace")


def problem_of(err: BaseException) -> Problem:
    """What an exception of the library says to a client."""
    if isinstance(err, Problem):
        return err
    message = str(err)
    if isinstance(err, PromptError):
        too_long = err.needed is not None
        return Problem(400, message, "context_length_exceeded" if too_long else "invalid_value")
    if isinstance(err, (ConfigError, DocumentError)):
        return Problem(400, message, "invalid_value")
    if isinstance(err, LibraryError):
        return Problem(507 if "full" in message else 503, message, "library_unavailable")
    if isinstance(err, MissingPackageError):
        return Problem(501, message, "missing_package")
    if isinstance(err, ModelError):
        return Problem(400, message, "model_cannot")
    if isinstance(err, DeviceError):
        return Problem(503, message, "device_lost")
    if isinstance(err, MesaError):
        return Problem(400, message, "cannot_be_done")
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Problem(507, "the server's disk is full: free some of it", "disk_full")
    if isinstance(err, RecursionError):
        return Problem(400, "the request is nested too deeply", "invalid_value")
    return Problem(500, "the server failed: its log says why", "internal_error")
