"""A server in a process of its own, for tests: on a free port, with a library of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

STARTED = re.compile(r" at (http://\S+) ")
START_SECONDS = 60.0
END_SECONDS = 60.0


class Server:
    """A running server.

    Attributes:
        url: where it listens.
        said: what it wrote to standard error.
    """

    def __init__(
        self,
        library: Path,
        *args: str,
        model: Path | None = None,
        env: Mapping[str, str] | None = None,
        program: str | None = None,
    ) -> None:
        command = [
            sys.executable,
            *(("-c", program) if program is not None else ("-m", "mesa_gguf")),
            "serve",
            "--port",
            "0",
            "--threads",
            "1",
            "--library",
            str(library),
        ]
        command += [*(("-m", str(model)) if model is not None else ()), *args]
        given = {**os.environ, "PYTHONSAFEPATH": "1", **(env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=given)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self._lines)

    def _wait(self) -> str:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            found = STARTED.search(self.said)
            if found is not None:
                with contextlib.suppress(OSError), urlopen(f"{found[1]}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the server did not start:\n{self.said}")

    def stop(self) -> int:
        """End it as a service manager does -> its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    #
    # requests, without a client in between
    #

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> tuple[int, dict[str, str], bytes]:
        """A request -> status, headers with small letters, and body."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        request = Request(f"{self.url}{path}", data=data, method=method, headers=given)
        try:
            answer = urlopen(request, timeout=timeout)
        except HTTPError as err:
            answer = err
        with answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()

    def json(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """What a request that must succeed answers."""
        status, _, data = self.ask(method, path, body, **options)
        assert status == 200, (status, data)
        return json.loads(data)

    def error(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that must fail."""
        status, _, data = self.ask(method, path, body, **options)
        error = json.loads(data)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return status, error

    def events(
        self,
        body: Mapping[str, Any],
        path: str = "/v1/chat/completions",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Iterator[dict[str, Any]]:
        """The objects of a stream."""
        data = json.dumps({**body, "stream": True}).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        request = Request(f"{self.url}{path}", data=data, headers=given)
        with urlopen(request, timeout=timeout) as answer:
            for line in answer:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line[6:])

    def upload(self, data: bytes, filename: str = "document.txt") -> dict[str, Any]:
        """A file that is uploaded."""
        body, kind = form(data, filename)
        found: dict[str, Any] = self.json("POST", "/v1/files", body, headers={"Content-Type": kind})
        return found

    def wait_for(
        self, file_id: str, states: tuple[str, ...] = ("ready", "error"), seconds: float = 60.0
    ) -> dict[str, Any]:
        """A file, once it is in one of some states."""
        end = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.json("GET", f"/v1/files/{file_id}")
            if found["mesa"]["state"] in states:
                return found
            assert time.monotonic() < end, found
            time.sleep(0.05)

    def connect(self) -> socket.socket:
        """A bare connection."""
        parts = urlsplit(self.url)
        return socket.create_connection((parts.hostname, parts.port), timeout=60)


def form(data: bytes, filename: str) -> tuple[bytes, str]:
    """A multipart form with one file -> body and content type."""
    boundary = "mesa-test-boundary"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode() + data
    return body + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


CODES = {"Mara Lind": 48213, "Tom Hale": 17052, "Ida Frost": 90431, "Ben Moor": 66120, "Eva Stone": 35877}
"""Facts that `facts` has; the bundled model finds them."""


def facts(n_lines: int = 60, codes: Mapping[str, int] = CODES) -> str:
    """A text with facts at its beginning, its end, and between."""
    lines = [f"It rained on day {i} until noon, and the ferry was late." for i in range(n_lines)]
    step = max(1, n_lines // len(codes))
    for n, (name, code) in enumerate(codes.items()):
        lines.insert(n * (step + 1), f"The door code of {name} is {code}.")
    return "\n".join(lines) + "\n"
