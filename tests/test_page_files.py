"""The page's files, without a browser: nothing from elsewhere, nothing that its policy forbids; and the pages of PDF files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import make_documents
import mesa_gguf
from server_process import Server

pytest.importorskip("fastapi", reason="the server is the extra [server]")

PAGE = Path(mesa_gguf.__file__).parent / "server" / "page"
FILES = sorted(PAGE.iterdir())
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LINES = [[f"Line {n} of page {page}." for n in range(40)] for page in range(3)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("library"), "--n-ctx", "8192") as running:
        yield running


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere(file: Path) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", file.read_text(encoding="utf-8")))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("file", [file for file in FILES if file.suffix == ".js"], ids=lambda file: file.name)
def test_text_stays_text(file: Path) -> None:
    """No way from a text to markup or code is used, and what is imported is there."""
    source = file.read_text(encoding="utf-8")
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\b|new Function|createContextualFragment"
    assert re.findall(ways, source) == []
    assert [name for name in re.findall(r"from \"\./([^\"]+)\"", source) if not (PAGE / name).is_file()] == []


class Attributes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_policy_forbids_nothing_that_is_there() -> None:
    parser = Attributes()
    parser.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    for tag, attributes in parser.found:
        assert tag != "style" and (tag != "script" or "src" in attributes)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    ids = [attributes["id"] for _, attributes in parser.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {name for file in FILES for name in re.findall(r"byId\(\"([\w-]+)\"\)", file.read_text(encoding="utf-8"))}
    assert wanted <= {*ids, "source-title"}  # which the page makes itself


def test_every_file_is_served_as_what_it_is(server: Server) -> None:
    for file in FILES:
        status, headers, body = server.ask("GET", f"/{file.name}")
        assert (status, body) == (200, file.read_bytes())
        assert headers["content-type"].split(";")[0] in (KINDS[file.suffix], "application/javascript")
        assert "default-src 'none'" in headers["content-security-policy"]


def test_a_page_of_a_pdf_and_a_passage_on_it(server: Server) -> None:
    file = server.wait_for(server.upload(make_documents.pdf(LINES), "lines.pdf")["id"])["id"]
    status, headers, picture = server.ask("GET", f"/v1/files/{file}/pages/2.png")
    assert (status, headers["content-type"], picture[:4]) == (200, "image/png", b"\x89PNG")

    text = server.json("GET", f"/v1/files/{file}/text")["text"]
    start = text.index("Line 38 of page 1.")
    stop = text.index("Line 2 of page 2.")
    found = server.json("GET", f"/v1/files/{file}/pages/2?start={start}&stop={stop}")
    assert (found["page"], found["pages"], found["goes_on"]) == (2, 3, 3)
    assert found["text"].split("\n") == ["Line 38 of page 1.", "Line 39 of page 1.", ""]
    (left, top, width, height), second = found["rectangles"]
    assert 70 < left < 75 and 80 < width < 120 and 5 < height < 16 and top < second[1] < found["height"]
    later = server.json("GET", f"/v1/files/{file}/pages/3?start={start}&stop={stop}")
    assert later["text"].split("\n") == ["Line 0 of page 2.", "Line 1 of page 2.", ""] and later["goes_on"] is None
    assert len(later["rectangles"]) == 2
    assert server.json("GET", f"/v1/files/{file}/pages/1?start={start}&stop={stop}")["rectangles"] == []
    assert server.json("GET", f"/v1/files/{file}/pages/1")["text"] == ""

    assert [line[4] for line in found["lines"]] == [f"Line {n} of page 1." for n in range(40)]

    _, _, small = server.ask("GET", f"/v1/files/{file}/pages/2.png?width=200")
    assert int.from_bytes(small[16:20], "big") == 200 < int.from_bytes(picture[16:20], "big") == 1400
    for width in (0, 4201, "x"):
        assert server.error("GET", f"/v1/files/{file}/pages/2.png?width={width}")[0] == 400
    assert server.error("GET", f"/v1/files/{file}/pages/4.png")[0] == 400
    assert server.error("GET", f"/v1/files/{file}/pages/0")[0] == 400
    assert server.error("GET", "/v1/files/file-0/pages/1")[0] == 404


def test_what_is_no_pdf_has_no_pages(server: Server) -> None:
    file = server.wait_for(server.upload(b"It rained.\n", "rain.txt")["id"])["id"]
    for path in ("1", "1.png"):
        status, error = server.error("GET", f"/v1/files/{file}/pages/{path}")
        assert status == 400 and "no PDF file" in error["message"]
