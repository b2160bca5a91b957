"""Who may ask, how much, how slowly, and what a fault leaves behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import BUNDLED
from mesa_gguf import Library, cli
from mesa_gguf.errors import ConfigError
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.server.guard import POLICY
from mesa_gguf.server.intake import PASTED_CHARS, name_of, split_pasted
from mesa_gguf.server.run import Settings
from server_process import CODES, Server, facts, form

KEY = "correct-horse-battery-staple"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


ORIGIN = "https://page.example"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def server(library: Path) -> Iterator[Server]:
    options = (
        "--n-ctx",
        "4096",
        "--max-upload",
        "1",
        "--max-queue",
        "1",
        "--allow-origin",
        ORIGIN,
        "--allow-host",
        "box.example",
    )
    with Server(library, *options, env={"MESA_API_KEY": KEY}) as running:
        yield running


def keyed(**more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}", **more}


# Who may.


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/page/conversations"),
     ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/v1/nothing"), ("GET", "//v1/models")],
)  # fmt: skip
def test_without_the_key_nothing_is_told(server: Server, method: str, path: str, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    status, _, data = server.ask(method, path, MESSAGES if method == "POST" else None, headers=headers)
    assert status in (401, 404) and (status == 401 or path == "//v1/models")
    assert KEY.encode() not in data


def test_with_the_key_all_is_there(server: Server) -> None:
    assert server.json("GET", "/v1/models", headers=keyed())["data"]
    assert server.json("POST", "/v1/chat/completions", MESSAGES, headers=keyed())["choices"]
    assert server.ask("GET", "/health")[0] == 200  # which tells nothing
    assert KEY not in server.said


@pytest.mark.parametrize("host", ["127.0.0.1:80", "localhost", "[::1]:8080", "192.168.0.7"])
def test_it_is_called_by_an_address_or_localhost(server: Server, host: str) -> None:
    assert server.ask("GET", "/health", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b"])
def test_another_name_is_refused(server: Server, host: str) -> None:
    """A page elsewhere whose name was pointed at this machine calls it by that name."""
    assert server.error("GET", "/v1/models", headers=keyed(Host=host))[0] == 403


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": ""}, {"Origin": "http://["},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(server: Server, headers: dict[str, str]) -> None:
    assert server.error("POST", "/v1/chat/completions", MESSAGES, headers=keyed(**headers))[0] == 403


def test_its_own_page_may_ask(server: Server) -> None:
    assert server.ask("GET", "/v1/models", headers=keyed(Origin=server.url))[0] == 200
    assert server.ask("GET", "/v1/models", headers=keyed(**{"Sec-Fetch-Site": "same-origin"}))[0] == 200


def test_a_page_that_was_allowed_may_ask(server: Server) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    status, answered, _ = server.ask("OPTIONS", "/v1/chat/completions", headers=asked)
    assert status == 204 and answered["access-control-allow-origin"] == ORIGIN
    status, answered, _ = server.ask("GET", "/v1/models", headers=keyed(Origin=ORIGIN))
    assert status == 200 and answered["access-control-allow-origin"] == ORIGIN
    assert server.ask("GET", "/health", headers={"Host": "box.example"})[0] == 200
    status, answered, _ = server.ask("OPTIONS", "/v1/models", headers={**asked, "Origin": "https://other.example"})
    assert status == 403 and "access-control-allow-origin" not in answered


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/docs", "/v1/nothing", "/nothing", "/"])
def test_every_answer_keeps_browsers_in_bounds(server: Server, path: str) -> None:
    for headers in (keyed(), {}):
        _, answered, _ = server.ask("GET", path, headers=headers)
        assert answered["content-security-policy"] == POLICY and answered["x-content-type-options"] == "nosniff"


def test_docs_load_nothing_from_elsewhere(server: Server) -> None:
    page = server.ask("GET", "/docs", headers=keyed())[2].decode()
    assert "/v1/chat/completions" in page and "://" not in page and "<script" not in page


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        Settings(host=host).check()
    Settings(host=host, key="k").check()
    with pytest.raises(ConfigError, match="API key"):
        Settings(host=host, key=" ").check()
    assert "secret" not in repr(Settings(key="secret"))


def test_an_address_that_is_taken_is_told_at_once(server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "mesa_gguf", "serve", "--port", port, "--library", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1


# How much, and how slowly.


def test_a_body_that_is_too_large(server: Server) -> None:
    body, kind = form(b"x" * (2 * 1024 * 1024 + 1), "large.txt")
    assert server.error("POST", "/v1/files", body, headers=keyed(**{"Content-Type": kind}))[0] == 413
    body, kind = form(b"x" * (1024 * 1024 + 1), "large.txt")  # within what the form may have besides
    assert server.error("POST", "/v1/files", body, headers=keyed(**{"Content-Type": kind}))[0] == 413
    assert server.json("GET", "/v1/files", headers=keyed())["data"] == []


def test_a_body_that_says_nothing_of_its_length(server: Server) -> None:
    with server.connect() as wire:
        wire.sendall(f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n"
                     "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode())  # fmt: skip
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        wire.sendall(b"%x\r\n%b\r\n" % (len(head), head))
        piece = b"x" * 65536
        try:
            for _ in range(64):
                wire.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        except OSError:
            pass  # it has hung up
        assert b" 413 " in wire.recv(65536).splitlines()[0]
    assert server.json("GET", "/v1/files", headers=keyed())["data"] == []


def test_headers_that_are_too_large(server: Server) -> None:
    with server.connect() as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for i in range(100):
                wire.sendall(b"X-%d: %b\r\n" % (i, b"x" * 1000))
        except OSError:
            pass
        assert b" 400 " in wire.recv(65536).splitlines()[0]
    assert server.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"messages": 1}', b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}',
     b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', b"[" * 100_000, b'{"a":' * 100_000,
     b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}',
     b'{"messages": [{"role": "user", "content": "%b\\ud800\\n\\nWhat?"}], "max_tokens": 1}' % (b"a b c. " * 2000)],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/vector_stores"])
def test_malformed_bodies(server: Server, path: str, data: bytes) -> None:
    status, _, answer = server.ask("POST", path, data, headers=keyed())
    assert status == 400 or (status == 200 and path == "/v1/vector_stores"), answer
    assert status == 200 or json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", "multipart/form-data; boundary=b"), (b"x", f"multipart/form-data; boundary={'b' * 3000}"), (b"x", "multipart/form-data; boundary=b"), (b"{}", "application/json"),
     (b"--b\r\n", "multipart/form-data"), (b"--b--\r\n", "multipart/form-data; boundary=b"),
     (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf', "multipart/form-data; boundary=b"),
     (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nx\r\n--b--\r\n', "multipart/form-data; boundary=b"),
     (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n1\r\n'
      b'--b\r\nContent-Disposition: form-data; name="file"; filename="b"\r\n\r\n2\r\n--b--\r\n', "multipart/form-data; boundary=b")],
)  # fmt: skip
def test_malformed_uploads(server: Server, data: bytes, kind: str) -> None:
    assert server.error("POST", "/v1/files", data, headers=keyed(**{"Content-Type": kind}))[0] == 400
    assert server.json("GET", "/v1/files", headers=keyed())["data"] == []


@pytest.mark.parametrize(
    "name",
    ["../../evil.txt", "/etc/passwd", "..", "a/../../b.txt", "..\\..\\evil.txt", "a\x00b.txt", "~/x", "-rf", "é" * 300],
)
def test_a_name_is_never_a_path(server: Server, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    body, kind = form(b"The door code of Mara Lind is 48213.\n", name)
    file = server.json("POST", "/v1/files", body, headers=keyed(**{"Content-Type": kind}))
    assert "/" not in file["filename"] and "\\..\\" not in file["filename"] and file["filename"] not in ("", ".", "..")
    assert file["filename"].isprintable()
    status, headers, data = server.ask("GET", f"/v1/files/{file['id']}/content", headers=keyed())
    assert status == 200 and data.startswith(b"The door code")
    assert headers["content-disposition"].startswith("attachment")
    filename = headers["content-disposition"].partition(";")[2].strip()
    assert unquote(filename.removeprefix("filename*=utf-8''").removeprefix("filename=").strip('"')) == file["filename"]
    assert server.json("DELETE", f"/v1/files/{file['id']}", headers=keyed())["deleted"]


def test_a_name_as_older_clients_send_it(server: Server) -> None:
    data = b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename*=utf-8''H%C3%A4fen%2f..%2f%E2%82%AC.txt\r\n\r\ntext\r\n--b--\r\n"
    headers = keyed(**{"Content-Type": "multipart/form-data; boundary=b"})
    file = server.json("POST", "/v1/files", data, headers=headers)
    assert file["filename"] == "€.txt"
    assert server.json("DELETE", f"/v1/files/{file['id']}", headers=keyed())["deleted"]


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/..%2f..%2fpyproject.toml", "/%2e%2e/app.py", "/v1/files/..%2f..%2fserver.sqlite3/content",
                                  "/page/conversations/..%2fserver.sqlite3"])  # fmt: skip
def test_paths_lead_nowhere(server: Server, path: str) -> None:
    assert server.ask("GET", path, headers=keyed())[0] in (400, 404)


@given(st.text())
def test_names_are_names(name: str) -> None:
    found = name_of(name)
    assert found and found.isprintable() and "/" not in found and found not in (".", "..") and len(found) <= 255


QUICK = (
    "import functools, sys; from mesa_gguf.server import guard, run\n"
    "run.HEADER_SECONDS = 1.0; guard.Limits = functools.partial(guard.Limits, patience=1.0)\n"
    "from mesa_gguf.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With limits of a second."""
    with Server(tmp_path_factory.mktemp("hasty"), "--n-ctx", "32768", "--timeout", "1", program=QUICK) as running:
        yield running


def test_slow_clients_are_hung_up_on(hasty: Server) -> None:
    """One that sends its headers byte by byte, one that sends its body so, and one that sends nothing at all. Others are served meanwhile."""
    server = hasty
    with contextlib.ExitStack() as open_wires:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        wires = [open_wires.enter_context(server.connect()) for _ in range(3)]
        sent: list[Iterator[int]] = [iter(head), iter(b"{" * 1000), iter(())]
        wires[1].sendall(head)
        begin = time.monotonic()
        ended: dict[int, tuple[float, bytes]] = {}
        for wire in wires:
            wire.settimeout(0.02)
        while len(ended) < 3 and time.monotonic() - begin < 5:
            time.sleep(0.05)
            assert server.ask("GET", "/health")[0] == 200
            for i in {0, 1, 2} - set(ended):
                with contextlib.suppress(TimeoutError):
                    try:
                        byte = next(sent[i], None)
                        if byte is not None:
                            wires[i].sendall(bytes([byte]))
                        ended[i] = (time.monotonic() - begin, wires[i].recv(1000))
                    except ConnectionError:
                        ended[i] = (time.monotonic() - begin, b"")
        assert len(ended) == 3 and all(0.5 < seconds < 4 for seconds, _ in ended.values()), ended
        assert b" 408 " in ended[1][1] and ended[0][1] == ended[2][1] == b""


# Faults.


def test_killed_while_reading_and_answering_nothing_is_lost(tmp_path: Path) -> None:
    server = Server(tmp_path, "--n-ctx", "4096")
    file_id = server.upload(facts(600).encode(), "long.txt")["id"]
    while server.json("GET", f"/v1/files/{file_id}")["mesa"]["tokens_read"] == 0:
        time.sleep(0.02)
    server.json("PUT", "/page/conversations/c", {"title": "kept"})
    events = server.events({"prompt": "The", "max_tokens": 3000, "temperature": 2}, "/v1/completions")
    next(events)
    server.kill()
    with contextlib.suppress(OSError):  # however the connection breaks
        assert not any(event["choices"][0]["finish_reason"] for event in events)
    with Server(tmp_path, "--n-ctx", "4096") as server:
        file = server.wait_for(file_id)
        assert file["status"] == "processed" and file["mesa"]["tokens_read"] == file["mesa"]["tokens"]
        computed = float(metric(server, 'mesa_tokens_computed_total{of="document"}'))
        assert computed < file["mesa"]["tokens"]  # it went on where it was
        assert server.json("GET", "/page/conversations/c") == {"title": "kept"}
        question = {"role": "user", "content": "What is the door code of Ida Frost?"}
        answer = server.json("POST", "/v1/chat/completions", {"messages": [question], "documents": [file_id]})
        assert str(CODES["Ida Frost"]) in answer["choices"][0]["message"]["content"]


def test_kept_chunks_are_embedded(tmp_path: Path) -> None:
    """While nobody asks: those that the command line read before, without an embedding model."""
    (tmp_path / "kept.txt").write_text(facts(40), encoding="utf-8")
    folder = tmp_path / "library"
    command = ("library", "add", str(tmp_path / "kept.txt"), "-m", str(BUNDLED), "--threads", "1")
    assert cli.main([*command, "--library", str(folder)]) == 0
    with Library(folder) as library:
        n_chunks = sum(row.n_tokens > 0 for row in library.index.kept())
        n_others = sum(row.n_tokens == 0 for row in library.index.kept())
        assert n_chunks > 2
        with Server(folder, "--n-ctx", "4096", "--embedding-model", str(BUNDLED)):
            end = time.monotonic() + 30
            while sum(row.n_tokens == 0 for row in library.index.kept()) < n_others + n_chunks:
                assert time.monotonic() < end
                time.sleep(0.05)


def metric(server: Server, name: str) -> str:
    lines = server.ask("GET", "/metrics", headers=keyed())[2].decode().splitlines()
    return next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} "))


def test_two_servers_do_not_share_a_library(server: Server, library: Path) -> None:
    """Each would sweep away what is being sent to the other."""
    assert server.ask("GET", "/health")[0] == 200
    with pytest.raises(AssertionError, match="another server uses this library"):
        Server(library)
    assert server.ask("GET", "/health")[0] == 200


@pytest.mark.slow
def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """The answer that is being given is finished; what is read goes on at the next start; the process ends well."""
    server = Server(tmp_path, "--n-ctx", "4096")
    file_id = server.upload(facts(300).encode(), "long.txt")["id"]
    events = server.events({"prompt": "The", "max_tokens": 300, "temperature": 2, "seed": 1, "stream_options": {"include_usage": True}},
                           "/v1/completions")  # fmt: skip
    next(events)
    server.process.terminate()
    *_, last = events
    assert last["usage"]["completion_tokens"] > 0
    assert server.stop() == 0, server.said
    assert "Traceback" not in server.said
    with Server(tmp_path, "--n-ctx", "4096") as server:
        assert server.wait_for(file_id)["status"] == "processed"


def test_a_full_disk(tmp_path: Path) -> None:
    """As a limit of a file's size has it: what cannot be kept is told, and questions are answered."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "from mesa_gguf.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with Server(tmp_path, "--n-ctx", "4096", program=program) as server:
        body, kind = form(b"x" * 600_000, "large.txt")
        status, error = server.error("POST", "/v1/files", body, headers={"Content-Type": kind})
        assert status == 507, error
        assert server.json("GET", "/v1/files")["data"] == []
        file = server.wait_for(server.upload(facts().encode(), "codes.txt")["id"])
        assert file["mesa"]["state"] == "ready" and "cannot be kept" in file["mesa"]["notes"][0]
        body = {
            "messages": [{"role": "user", "content": "What is the door code of Ida Frost?"}],
            "documents": [file["id"]],
        }
        for _ in range(2):
            answer = server.json("POST", "/v1/chat/completions", body)
            assert str(CODES["Ida Frost"]) in answer["choices"][0]["message"]["content"]
        assert server.ask("GET", "/health")[0] == 200


def test_the_queue_has_an_end(server: Server) -> None:
    body: dict[str, Any] = {"prompt": "The", "max_tokens": 1}
    long = server.events({**body, "max_tokens": 3000, "temperature": 2}, "/v1/completions", headers=keyed())
    next(long)
    waiting = server.events({**body, "user": "b"}, "/v1/completions", headers=keyed())
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(waiting))
    thread.start()
    while metric(server, "mesa_queue_waiting") != "1.0":
        time.sleep(0.02)
    status, headers, data = server.ask("POST", "/v1/completions", body, headers=keyed())
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert json.loads(data)["error"]["type"] == "rate_limit_error"
    long.close()  # type: ignore[attr-defined]
    thread.join()
    assert got


def test_a_request_has_an_end(hasty: Server) -> None:
    vocabulary = load_vocabulary(BUNDLED)
    endless = {
        "prompt": "The",
        "max_tokens": 30_000,
        "temperature": 2,
        "seed": 1,
        "logit_bias": {vocabulary.token_eos(): -100},
    }
    vocabulary.close()
    status, error = hasty.error("POST", "/v1/completions", endless)
    assert status == 504 and error["code"] == "timeout"
    assert hasty.json("POST", "/v1/completions", {"prompt": "The", "max_tokens": 1})["choices"]


# What is pasted.


def test_a_question_is_found_beside_what_was_pasted() -> None:
    document = "\n\n".join(f"Paragraph {i} is about the harbour." for i in range(300))
    assert len(document) > PASTED_CHARS
    assert split_pasted(f"{document}\n\nWhat is it about?") == (document, "What is it about?")
    assert split_pasted(f"Summarize this:\n\n{document}") == (document, "Summarize this:")
    assert split_pasted(f"What is it about?\n\n{document}") == (document, "What is it about?")
    assert split_pasted("What is it about?") == ("", "What is it about?")
    assert split_pasted("x" * (2 * PASTED_CHARS)) == ("", "x" * (2 * PASTED_CHARS))


@given(st.lists(st.text(alphabet="ab?:\n ", max_size=3000), max_size=8))
def test_nothing_of_a_text_is_lost_but_space(parts: list[str]) -> None:
    text = "\n\n".join(parts)
    document, question = split_pasted(text)
    assert sorted("".join((document + question).split())) == sorted("".join(text.split()))
