"""Files as text with places: what each format gives, what is refused, and that damaged and hostile files do no harm."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import make_documents as make
from mesa_gguf import Library
from mesa_gguf.errors import DocumentError, MesaError, MissingPackageError
from mesa_gguf.loaders import Limits, LoadedDocument, Place, load, load_bytes, walk
from mesa_gguf.loaders.formats import foreign
from mesa_gguf.loaders.plain import markdown_places

pytest.importorskip("pypdfium2")
pytest.importorskip("trafilatura")
pytest.importorskip("mammoth")

HERE = Limits(seconds=None)
"""Read in this process, where a test can watch."""

DAMAGE = Path(__file__).parent / "loader_damage.py"
FORMATS = ("pdf", "html", "docx", "epub", "markdown", "text")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a loader uses the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def read(data: bytes | str, name: str = "file", **options: Any) -> LoadedDocument:
    options.setdefault("limits", HERE)
    return load_bytes(data.encode() if isinstance(data, str) else data, name, **options)


def error(data: bytes | str, name: str = "file", **options: Any) -> str:
    with pytest.raises(DocumentError) as caught:
        read(data, name, **options)
    said = str(caught.value)
    assert said.startswith(name) and "\n" not in said
    return said


def outcome(data: bytes | str, name: str = "file", **options: Any) -> str:
    """The text, or the error."""
    try:
        document = read(data, name, **options)
    except MesaError as err:
        said = str(err)
        assert "\n" not in said
        return said
    assert document.text.strip() and document.places[0].start == 0
    return document.text


def heading_at(document: LoadedDocument, words: str) -> tuple[str, ...]:
    return document.place_at(document.text.index(words)).heading


def page_at(document: LoadedDocument, words: str) -> int | None:
    return document.place_at(document.text.index(words)).page


#
# places
#


def test_place_at() -> None:
    document = LoadedDocument("abcdef", (Place(0, 1), Place(2, 1, ("h",)), Place(5, 2, ("h",))), "pdf")
    assert [document.place_at(i).start for i in range(7)] == [0, 0, 2, 2, 2, 5, 5]
    for offset in (-1, 7):
        with pytest.raises(DocumentError, match="outside"):
            document.place_at(offset)


#
# PDF
#


def test_pdf_pages() -> None:
    document = read(make.pdf([["First page,", "two lines"], [], ["Third (page) \\ äöü"]], title="Ein Bericht: Zürich"))
    assert (
        document.text == "First page,\ntwo lines\nThird (page) \\ äöü\n" or "First page, two lines\n" in document.text
    )
    assert [place.page for place in document.places] == [1, 2, 3] or [place.page for place in document.places] == [1, 3]
    assert page_at(document, "First") == 1
    assert page_at(document, "Third") == 3
    assert (document.kind, document.title, document.notes) == ("pdf", "Ein Bericht: Zürich", ())


def test_pdf_is_known_by_its_content() -> None:
    assert read(make.pdf([["text"]]), "notes.txt").kind == "pdf"
    assert read(b"\r\n\r\n" + make.pdf([["text"]]), "notes.txt").text.strip() == "text"
    assert read("A text on %PDF-1.4 files", "a.txt").kind == "text"
    assert "is no PDF file, though its name says so" in error("A text on %PDF-1.4 files", "a.pdf")


def test_pdf_words_broken_over_lines_are_whole() -> None:
    text = read(make.pdf([["the exam-", "ple of Mesa-", "Extrapolation"]])).text
    assert "example of Mesa-Extrapolation" in text.replace("\n", " ")


def test_pdf_outline_gives_headings() -> None:
    pages = [["Report", "One Beginning", "text a"], ["text b", "1.1 Detail", "text c"], ["Two Ende", "text d"]]
    outline = [(1, "One Beginning", 1), (2, "Detail", 2), (1, "Zwei (Über)", 3)]
    document = read(make.pdf(pages, outline=outline))
    assert heading_at(document, "text a") == ("One Beginning",)
    assert heading_at(document, "text c") == ("One Beginning", "Detail")
    assert heading_at(document, "text d") == ("Zwei (Über)",)
    assert page_at(document, "text c") == 2


def test_pdf_heading_begins_at_its_line() -> None:
    lines = ["before", "One Beginning", "behind"]
    document = read(make.pdf([lines], outline=[(1, "One  Beginning", 1)]))
    if "\n" in document.text.strip():
        assert heading_at(document, "before") == ()
    assert heading_at(document, "behind") == ("One Beginning",)


def test_pdf_scanned_pages_are_told() -> None:
    pages = [["text"], make.SCANNED, make.SCANNED, [], ["more"], make.SCANNED]
    document = read(make.pdf(pages))
    assert document.notes == ("pages 2-3, 6 of 6 have no text layer: scanned, need OCR, with ocrmypdf for example",)
    assert page_at(document, "more") == 5
    assert "no page has a text layer: scanned, need OCR" in error(make.pdf([make.SCANNED, make.SCANNED]))
    assert "has no text" in error(make.pdf([[], []]))


def test_pdf_fonts_without_letters_are_told() -> None:
    document = read(make.pdf([["no letter of this has a name"]], nameless=True))
    assert document.notes[0].startswith("page 1 of 1 has a font that does not name its letters")


def test_pdf_password() -> None:
    locked = make.pdf([["a secret"]], password="open sesame")
    assert error(locked) == "file is locked with a password: give another password"
    assert "is locked, and not with that password" in error(locked, password="wrong")
    document = read(locked, password="open sesame")
    assert document.text.strip() == "a secret"
    with pytest.raises(DocumentError) as caught:
        read(locked)
    assert caught.value.remedies[0].option == "password"
    assert read(make.pdf([["open"]]), password="needless").text.strip() == "open"


def test_pdf_form_fields_are_read() -> None:
    assert "filled in" in read(make.pdf([["Name:"]], field="filled in")).text


def test_pdf_attached_files_are_told() -> None:
    assert read(make.pdf([["text"]], attached=True)).notes == ("1 attached file not read",)


def test_pdf_damaged() -> None:
    assert "is a damaged PDF file" in error(b"%PDF-1.4\nnothing")
    assert (
        read(make.pdf([["text"]]).replace(b"startxref\n", b"startxref\n9")).text.strip() == "text"
    )  # PDFium finds the objects


#
# HTML
#


def test_html_main_text_and_everything() -> None:
    main = read(make.page())
    assert main.kind == "html" and main.title == "The harvest"
    assert "Home" not in main.text and "Imprint" not in main.text and "secret" not in main.text
    assert main.notes[0].startswith("what looks like the main text of the page was read, 9")
    assert "It was number 2 of them." in main.text  # no stars, no link
    everything = read(make.page(), everything=True)
    assert "Home" in everything.text and "Imprint and privacy" in everything.text and "secret" not in everything.text
    assert everything.notes == ()


@pytest.mark.parametrize("everything", [False, True])
def test_html_headings(everything: bool) -> None:
    document = read(make.page(), everything=everything)
    for i in (1, 2, 3):
        assert heading_at(document, f"It was number {i}") == ("The harvest", f"Section {i}")
    for place in document.places[-3:]:
        line = document.text[place.start :].split("\n", 1)[0]
        assert line.lstrip("# ") == place.heading[-1]


def test_html_tables_lists_and_code() -> None:
    extra = (
        "<table><tr><th>Name</th><th>A long head</th></tr><tr><td>x</td><td>1</td></tr></table>"
        "<pre><code>def f():\n    return 1\n\ny = 2</code></pre><ul><li>one</li><li>two</li></ul>"
        "<dl><dt>term</dt><dd>meaning</dd></dl><div><div>in<span>side</span></div></div><noscript>no</noscript>"
    )
    document = read(make.page(extra=extra), everything=True)
    assert "Name | A long head\nx | 1\n" in document.text
    assert "```\ndef f():\n    return 1\n\ny = 2\n```\n" in document.text
    assert "\nterm\nmeaning\ninside\n" in document.text
    main = read(make.page(extra=extra)).text
    assert "| x | 1 |" in main and "```\ndef f():\n    return 1\n" in main


@pytest.mark.parametrize("everything", [False, True])
def test_html_text_is_literal(everything: bool) -> None:
    words = r"snake_case *not* [x] <T> `tick` ~a~ C:\\dir\*.txt \(a_1\) 50\% ⧵ a | b"
    starts = ["# no heading", "> no quote", "- no list", "1. no list", "+ no list"]
    extra = f"<h3>{escape(words)}</h3><p>{escape(words)} and <code>{escape(words)}</code> are words of a paragraph like any other.</p>"
    extra += "".join(f"<p>{escape(start)}, but a paragraph like any other.</p>" for start in starts)
    document = read(make.page(extra=extra), everything=everything)
    assert document.text.count(words) == 3
    for start in starts:
        assert f"\n{start}, but" in document.text
    assert heading_at(document, f"{words} and")[-1] == words


def test_html_without_a_main_text_is_read_whole() -> None:
    document = read(f"<html><body><footer><p>{make.SENTENCES[0]}</p><p>{make.SENTENCES[1]}</p></footer></body></html>")
    assert make.SENTENCES[1] in document.text
    assert document.notes == ("no main text was found in the page, so everything in it was read",)


def test_html_cells_of_a_layout_follow_each_other() -> None:
    left, right = (f"<p>{make.SENTENCES[i]}</p><p>{make.SENTENCES[i + 1]} {make.SENTENCES[i]}</p>" for i in (0, 2))
    data = "<table><tr><td><p>x</p></td><td><p>1</p><p>2</p></td></tr></table>"
    text = read(
        f"<html><body><table><tr><td>{left}</td><td>{right}{data}</td></tr></table></body></html>", everything=True
    ).text
    places = [text.index(sentence) for sentence in make.SENTENCES]
    assert places == sorted(places)
    assert make.SENTENCES[0] + "\n" in text and "\nx | 1 2\n" in text


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        ("<meta charset=windows-1251>", "cp1251"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=koi8-r">', "koi8-r"),
        ("<meta charset=iso-2022-jp>", "iso2022_jp"),
        ("<meta charset=utf-8>", "utf-8"),
        ("<meta charset=nonsense>", "utf-8"),
        ("<meta charset=windows-1251>", "utf-8"),
        ("", "utf-16"),
    ],
)
def test_html_encodings(head: str, encoding: str) -> None:
    words = "日本語の文章です" if "jp" in encoding else "Привет, мир"
    html = f"<!doctype html><html><head>{head}<title>{words}</title></head><body><p>{words} {words}</p></body></html>"
    document = read(html.encode(encoding))
    assert document.title == words and words in document.text


def test_html_own_marks_are_no_headings() -> None:
    text = " ".join(make.SENTENCES)
    document = read(
        f"<html><body><article><h1>A</h1><p>⧼0:0⧽ {text} &#x29fc;1:0⧽</p></article></body></html>", everything=True
    )
    assert "⧼0:0⧽" in document.text and "⧼1:0⧽" in document.text
    assert [place.heading for place in document.places] == [("A",)]


def test_html_refused() -> None:
    assert "has no text" in error("<html><!-- nothing --></html>")
    assert "has pictures only" in error("<html><body><img src='http://127.0.0.1:9/x.png'></body></html>")


@pytest.mark.parametrize(
    "text",
    [
        "<p>A note</p>",
        "<!-- x --><?xml version='1.0'?>\n<html><body>a</body>",
        "<DIV class=x>a</DIV>",
        "<!DOCTYPE html>\na",
    ],
)
def test_html_is_known_by_its_content(text: str) -> None:
    assert read(text, "a.txt").kind == "html"


@pytest.mark.parametrize(
    "text", ["<T> means a type", "<p is less", "< p > x", "a <p>b</p>", "<stdio.h> x", "<root><a/></root>"]
)
def test_html_is_not_seen_where_it_is_not(text: str) -> None:
    assert read(text, "a.html").kind == "text"


#
# DOCX
#


def test_docx() -> None:
    body = (
        make.docx_paragraph("The Report", "Title")
        + make.docx_paragraph("Before.")
        + make.docx_paragraph("One", "Heading1")
        + make.docx_paragraph("Body &amp; one.")
        + make.docx_paragraph("Detail", "Heading2")
        + make.docx_table([["Name", "Value"], ["x", "1"]])
        + '<w:p><w:r><w:t>With a note</w:t></w:r><w:r><w:footnoteReference w:id="1"/></w:r></w:p>'
    )
    notes = f'<w:footnote w:id="1">{make.docx_paragraph("What the note says.")}</w:footnote>'
    document = read(make.docx(body, title="Set in the file", notes=notes), "a.bin")
    assert (document.kind, document.title) == ("docx", "Set in the file")
    assert heading_at(document, "Before") == ("The Report",)
    assert heading_at(document, "Body & one") == ("One",)
    assert heading_at(document, "x | 1") == ("One", "Detail")
    assert "Name | Value\nx | 1\n" in document.text
    assert "What the note says." in document.text


def test_docx_tells_what_it_did_not_read() -> None:
    math = '<w:p><w:r><w:t>x</w:t></w:r><m:oMath xmlns:m="urn:math"><m:r/></m:oMath></w:p>'
    assert read(make.docx(math)).notes == ("not read: 1 element oMath",)


def test_docx_never_opens_what_it_links_to(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    members = make.docx_members(
        make.docx_paragraph("text")
        + '<w:p><w:r><w:drawing><wp:inline xmlns:wp="http://schemas.openxmlformats.org/drawingml/2006/wordprocessingDrawing">'
        '<a:graphic xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"><a:graphicData>'
        '<pic:pic xmlns:pic="http://schemas.openxmlformats.org/drawingml/2006/picture"><pic:blipFill>'
        '<a:blip xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships" r:link="r9"/>'
        "</pic:blipFill></pic:pic></a:graphicData></a:graphic></wp:inline></w:drawing></w:r></w:p>"
    )
    rels = str(members["word/_rels/document.xml.rels"])
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/image"
    link = f'<Relationship Id="r9" Type="{kind}" Target="{secret.as_uri()}" TargetMode="External"/>'
    members["word/_rels/document.xml.rels"] = rels.replace("</Relationships>", link + "</Relationships>")
    document = read(make.packed(members))
    assert "secret" not in document.text
    assert document.notes == ("1 picture in it was not read",)


def test_docx_without_text() -> None:
    assert "has no text" in error(make.docx(""))


#
# EPUB
#

PARTS = {
    "cover.xhtml": '<img src="http://127.0.0.1:9/cover.png"/>',
    "one.xhtml": f"<h1>Chapter One</h1><p>First&nbsp;part &mdash; begins.</p><h2>Detail</h2><p>{make.SENTENCES[0]}</p>",
    "two.xhtml": f"<p>No heading here. {make.SENTENCES[1]}</p><?pi x?><!-- c -->tail",
    "three.xhtml": f"<p>unclosed <b>and broken & {make.SENTENCES[2]}",
}


def test_epub() -> None:
    document = read(
        make.epub(PARTS, title="The Book", toc=[("two.xhtml#x", "Chapter Two"), ("one.xhtml", "Another name")])
    )
    assert (document.kind, document.title) == ("epub", "The Book")
    assert heading_at(document, "First part — begins") == ("Chapter One",)
    assert heading_at(document, make.SENTENCES[0]) == ("Chapter One", "Detail")
    assert heading_at(document, make.SENTENCES[1]) == ("Chapter Two",)
    assert document.text.index("First") < document.text.index("No heading") < document.text.index("unclosed")
    assert "tail" in document.text
    assert document.notes == ("parts without text, pictures for example: 1 of 4",)
    line = document.text[document.places[1].start :].split("\n", 1)[0]
    assert line == document.places[1].heading[-1]


def test_epub_order_is_the_spine_s() -> None:
    members = make.epub_members({"a.xhtml": "<p>first</p>", "b.xhtml": "<p>second</p>"})
    opf = str(members["OEBPS/content.opf"])
    members["OEBPS/content.opf"] = (
        opf.replace('idref="i0"', 'idref="X"').replace('idref="i1"', 'idref="i0"').replace('"X"', '"i1"')
    )
    text = read(make.packed(members)).text
    assert text.index("second") < text.index("first")


def test_epub_missing_parts_are_told() -> None:
    members = make.epub_members(PARTS)
    del members["OEBPS/two.xhtml"]
    assert "parts that are missing in the file: 3 of 4" in read(make.packed(members)).notes


@pytest.mark.parametrize(
    "link", ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x", "//[", "%00"]
)
def test_epub_links_stay_in_the_file(link: str) -> None:
    members = make.epub_members({"a.xhtml": "<p>inside</p>", "b.xhtml": "<p>b</p>"})
    members["OEBPS/content.opf"] = str(members["OEBPS/content.opf"]).replace('href="b.xhtml"', f'href="{link}"')
    members["../../etc/passwd"] = "root:x"
    document = read(make.packed(members))
    assert document.text.strip() == "inside"
    assert "missing" in document.notes[0]


def test_epub_with_drm_is_refused() -> None:
    encrypted = (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container" xmlns:enc="http://www.w3.org/2001/04/xmlenc#">'
        '<enc:EncryptedData><enc:EncryptionMethod Algorithm="{}"/><enc:CipherData><enc:CipherReference URI="OEBPS/one.xhtml"/>'
        "</enc:CipherData></enc:EncryptedData></encryption>"
    )
    members = make.epub_members(PARTS)
    members["META-INF/encryption.xml"] = encrypted.format("http://www.w3.org/2001/04/xmlenc#aes128-cbc")
    assert "is protected (DRM)" in error(make.packed(members))
    members["META-INF/encryption.xml"] = encrypted.format("http://www.idpf.org/2008/embedding")  # fonts
    assert "Chapter One" in read(make.packed(members)).text


def test_epub_of_one_part_many_times_is_read_once() -> None:
    members = make.epub_members({"a.xhtml": "<p>once</p>"})
    opf = str(members["OEBPS/content.opf"])
    members["OEBPS/content.opf"] = opf.replace("<spine>", "<spine>" + '<itemref idref="i0"/>' * 5000)
    assert read(make.packed(members)).text.count("once") == 1


#
# plain text, Markdown, code
#

MARKDOWN = """---
title: "From the front"
---
# One #

text a

## Two

```
# no heading
```

Three
over lines
===

text b

- item
---
    # no heading
text c | #
###### Six
#nothing
"""


def test_markdown() -> None:
    document = read(MARKDOWN, "a.md")
    assert (document.text, document.kind, document.title) == (MARKDOWN, "markdown", "From the front")
    assert [place.heading for place in document.places] == [
        (), ("One",), ("One", "Two"), ("Three over lines",), ("Three over lines", "Six"),
    ]  # fmt: skip
    for place in document.places[1:]:
        assert document.text[place.start - 1] == "\n" and document.text[place.start :].lstrip("# ").startswith(
            place.heading[-1][:3]
        )
    assert heading_at(document, "# no heading\n```") == ("One", "Two")
    assert read("# A\n\n## B\n\ntext\n", "notes").kind == "markdown"
    assert read("import os\n\n# A\n\nx = 1\n", "notes").kind == "text"
    assert read("no. # A\n\ntext\n", "notes.txt").kind == "text"


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("## A ##", "A"),
        ("# A #b", "A #b"),
        ("# A#", "A#"),
        ("#", None),
        ("## ##", None),
        ("####### A", None),
        ("   # A  ", "A"),
    ],
)
def test_markdown_headings(line: str, title: str | None) -> None:
    assert [place.heading[-1] for place in markdown_places(f"{line}\n\ntext\n")] == ([title] if title else [])


@pytest.mark.parametrize(
    "line",
    [
        "# " + " #" * 999,
        "```" + " " * 1990 + "`",
        "- " * 1000,
        "=" * 1999 + "x",
        "pub " * 500,
        "#" * 2000,
        "\t" * 2000,
        "|x" * 999,
    ],
)
@pytest.mark.parametrize("ending", ["md", "py", "txt"])
def test_hostile_lines_take_linear_time(line: str, ending: str) -> None:
    before = time.process_time()
    outcome(f"{line}\n" * 300, f"file.{ending}")
    assert time.process_time() - before < 3  # quadratic ones took minutes


def test_source_code() -> None:
    code = "import os\n\nclass A(B):\n    def f(self):\n        pass\n\nasync def g(x: int) -> None:\n    pass\n\nclassic = 1\n"
    document = read(code, "a.py")
    assert (document.text, document.kind) == (code, "code")
    assert [place.heading for place in document.places] == [(), ("class A",), ("async def g",)]
    rust = read("pub(crate) fn f<T>(x: T) {\n}\n\npub struct S {\n}\nimpl S {\n    fn g() {}\n}\n", "a.rs")
    assert [place.heading for place in rust.places] == [("pub(crate) fn f<T>",), ("pub struct S",), ("impl S",)]


def test_form_feeds_are_pages() -> None:
    document = read("one\ftwo\fthree\f\n")
    assert [page_at(document, word) for word in ("one", "two", "three")] == [1, 2, 3]
    assert document.places[-1].page == 3
    assert read("no pages\n").places == (Place(0),)


def test_line_ends_and_marks() -> None:
    assert read(b"\xef\xbb\xbfa\r\nb\rc\n").text == "a\nb\nc\n"
    assert read("a\nb".encode("utf-16")).text == "a\nb"
    assert read("plain letters to see".encode("utf-16-be")).text == "plain letters to see"


GERMAN = "Die Prüfung der Überschüsse ergab, daß größere Beträge für Straßen ausgegeben wurden. " * 8
RUSSIAN = "Комитет собрался в старом зале у реки и три часа говорил об урожае и новой дороге. " * 8

JAPANESE = "委員会は川沿いの古い会館で会合を開き、収穫と新しい道路について三時間話し合った。" * 8
CHINESE = "委员会在河边的旧大厅里开会，就收成和新路谈了三个小时。" * 8


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(GERMAN, "cp1252"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "cp932"), (CHINESE, "gb18030")],
)
def test_encodings_are_guessed_and_told(text: str, encoding: str) -> None:
    document = read(text.encode(encoding))
    assert document.text == text
    assert len(document.notes) == 1 and document.notes[0].startswith("the encoding was guessed: ")
    assert read(text.encode(encoding), encoding=encoding).notes == ()


def test_damaged_utf8_is_utf8() -> None:
    data = bytearray(RUSSIAN.encode())
    data[101] = 0xFF
    document = read(bytes(data))
    assert document.text[80:] == RUSSIAN[80:] or document.text[-200:] == RUSSIAN[-200:]
    assert "UTF-8 with" in document.notes[0] and "damaged place" in document.notes[0]


MOSTLY_ASCII = "The committee met in the old hall by the river. " * 40 + "It was about the caf\u00e9."


@pytest.mark.parametrize(
    ("data", "text", "said"),
    [
        (f"{MOSTLY_ASCII} Then \u00e9".encode()[:-1], f"{MOSTLY_ASCII} Then ", "its last byte left out"),
        (f"{MOSTLY_ASCII} Then \u2019".encode()[:-1], f"{MOSTLY_ASCII} Then ", "its last 2 bytes left out"),
        (f"\u2019{MOSTLY_ASCII}".encode()[1:], MOSTLY_ASCII, "its first 2 bytes left out"),
        (f"\U0001f600{MOSTLY_ASCII}\u2019".encode()[1:-1], MOSTLY_ASCII, "its first 3 bytes and last 2 bytes left out"),
        (b"plain words\xe2", "plain words", "its last byte left out"),
        ("plain words".encode("utf-16")[:-1], "plain word", "UTF-16 that was cut within a character"),
        ("plain letters to see".encode("utf-16-le")[:-1], "plain letters to se", "UTF-16-LE that was cut"),
        (
            f"<html><meta charset=latin-1><p>{MOSTLY_ASCII}\u2019".encode()[:-1],
            MOSTLY_ASCII,
            "its last 2 bytes left out",
        ),
    ],
)
def test_a_text_that_was_cut_within_a_character(data: bytes, text: str, said: str) -> None:
    document = read(data)
    assert document.text.rstrip() == text.rstrip() and len(document.notes) == 1
    assert "that was cut within a character" in document.notes[0] and said in document.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "In the caf\u00e9",
        "\u201cIn the caf\u00e9\u201d, he said",
        "\u201cquoted",
        "In the caf\u00e9.\n",
        "The hall has 90 m\u00b2.",
    ],
)
def test_the_last_letter_of_an_older_encoding_is_a_letter(text: str) -> None:
    assert read(text.encode("cp1252")).text == text


def test_where_a_text_that_was_cut_is_not_taken() -> None:
    """By a name that is given, it is told what to do."""
    assert "is not utf-16: byte 0x73 at offset 4" in error(b"h\0i\0s", encoding="utf-16")
    assert "is utf-8, but ends within a character: cut off its last byte" in error(
        "caf\u00e9".encode()[:-1], encoding="utf-8"
    )


def test_given_encodings_are_kept_to() -> None:
    assert "is not utf-8" in error(GERMAN.encode("cp1252"), encoding="utf-8")
    with pytest.raises(DocumentError, match="there is no encoding 'nonsense'"):
        read("text", encoding="nonsense")


#
# what is no document
#


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"GIF89a\x01\x00\x01\x00", "a picture"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "a picture"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF model"),
        (b"\x1f\x8b\x08\x00", "a gzip file, which is not read: unpack it"),
        (b"\x00" * 257 + b"ustar\x00", "a tar archive"),
        (b"\x7fELF\x02\x01", "a program"),
        (b"MZ\x90\x00\x03\x00", "a program"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "a model in safetensors"),
        (b"{\\rtf1 text}", "an RTF file, which is not read: save it as text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file"),
        (b"\xd0\xcf\x11\xe0" + "EncryptedPackage".encode("utf-16-le"), "locked with a password"),
        (b"%!PS-Adobe-3.0\n", "a PostScript file"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>', "a drawing"),
        (
            b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made -->\n<!DOCTYPE svg PUBLIC "a" "b">\n<svg:svg width="1">',
            "a drawing",
        ),
        (b"/* XPM */\nstatic char *icon[] = {", "a picture"),
        (bytes(range(256)) * 4, "a binary file of no kind that is read"),
        (b"", "is empty"),
        (b" \n\n", "has no text"),
    ],
)
def test_other_files_are_named(data: bytes, says: str) -> None:
    assert says in error(data, "a.txt")


@pytest.mark.parametrize(
    "text", ["About <svg> files", "<p>A <svg></svg> drawing</p>", "<svgs>", "<!--" * 9999, "<!-- -->" * 9999]
)
def test_texts_about_drawings_are_texts(text: str) -> None:
    assert foreign(text.encode()) is None


@pytest.mark.parametrize(
    ("member", "says"),
    [
        ("xl/workbook.xml", "an Excel workbook, which is not read: save its sheets as CSV"),
        ("ppt/presentation.xml", "a PowerPoint presentation"),
        ("content.xml", "an OpenDocument file"),
        ("readme.txt", "a ZIP archive, which is not read: unpack it"),
    ],
)
def test_other_packed_files_are_named(member: str, says: str) -> None:
    assert says in error(make.packed({member: "x"}))


@pytest.mark.parametrize("name", ["a.pdf", "a.EPUB", "a.docx", "b.c.odt", "a.rtf", "a.xlsx", "a.zip"])
@pytest.mark.parametrize("data", [b"plain words", "caf\u00e9".encode("cp1252"), b"<html><p>a page</p></html>"])
def test_a_file_that_is_not_what_its_name_says(name: str, data: bytes) -> None:
    assert "though its name says so: it is damaged, or of another kind" in error(data, name)
    assert read(data, name, encoding="cp1252").text  # who says so knows it
    assert read(data, f"{name}.txt").text


@pytest.mark.parametrize("form", ["pdf", "docx", "epub"])
@pytest.mark.parametrize("named", [True, False])
def test_damaged_marks_make_no_texts(form: str, named: bool) -> None:
    """Whatever becomes of the first bytes: what the format is, or an error."""
    data = {
        "pdf": make.pdf([["Harvest was good."]]),
        "docx": make.docx(make.docx_paragraph("Harvest was good.")),
        "epub": make.epub(PARTS),
    }[form]
    whole = read(data).text
    for n in (1, 2, 4, 9, 40):
        for begin in (b"", b"\xff" * n, b"x" * n, b"\n" * n):
            said = outcome(begin + data[n:], f"a.{form}" if named else "a")
            assert said == whole or said.startswith("a"), said[:80]


def test_texts_about_formats_are_texts() -> None:
    for text in (
        "A PDF file ends with startxref, a number such as 116, and %%EOF. Readers look there first.",
        "startxref\n116\n%%EOF\nThat is how it ends.",
        "PK stands for Phil Katz.",
    ):
        assert read(text).text == text


@pytest.mark.parametrize("text", ["GGUF is a format", "BM was a firm", "RIFF RAFF", "ID3 tags", "MZ", "PK", "wOF"])
def test_texts_that_begin_like_other_files_are_texts(text: str) -> None:
    assert read(text).text == text


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="there is no such file"):
        load(tmp_path / "none")
    with pytest.raises(DocumentError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(DocumentError, match="cannot be read"):
        load(Path("a\0b"))
    with pytest.raises(DocumentError, match="is no regular file"):
        load(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DocumentError, match="is no regular file"):
        load(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(DocumentError, match="cannot be read"):
        load(tmp_path / "loop")
    (tmp_path / "a.txt").write_text("text")
    assert load(tmp_path / "a.txt").text == "text"


#
# limits
#


def limited(data: bytes | str, name: str = "file", **limits: Any) -> str:
    with pytest.raises(DocumentError) as caught:
        read(data, name, limits=replace(HERE, **limits))
    (limit,) = limits
    assert caught.value.remedies[0].option == f"limits.{limit}"
    assert caught.value.available == int(limits[limit])
    return str(caught.value)


def test_limits_are_named(tmp_path: Path) -> None:
    assert limited("x" * 11, file_bytes=10) == (
        "file has 11 bytes, and 10 is the limit: make limits.file_bytes 11 or more, if you trust the file"
    )
    assert limited("x" * 11, characters=10).startswith(
        "file has 11 characters of text or more, and 10 is the limit: make"
    )
    limited(make.pdf([["a"]] * 6), pages=5)
    limited(make.pdf([["many words"]] * 6), characters=20)
    limited(make.page(), characters=100)
    limited(make.docx(make.docx_paragraph("x" * 200)), characters=100)
    limited(make.epub(PARTS), characters=100)
    limited(make.epub(PARTS), unpacked_bytes=1000)
    limited(make.epub(PARTS), members=3)
    (tmp_path / "a").write_text("x" * 11)
    with pytest.raises(DocumentError, match=r"limits\.file_bytes"):
        load(tmp_path / "a", limits=replace(HERE, file_bytes=10))


def test_nesting_is_limited() -> None:
    limited("<html><body>" + "<div>" * 300 + "deep" + "</div>" * 300, depth=256)
    limited("<html><body>" + "<div>" * 100_000 + "deep", depth=256)
    nested = make.docx_paragraph("x")
    for _ in range(100):
        nested = f"<w:tbl><w:tr><w:tc>{nested}</w:tc></w:tr></w:tbl>"
    limited(make.docx(nested), depth=256)
    limited(make.epub({"a.xhtml": "<div>" * 300 + "deep" + "</div>" * 300}), depth=256)
    assert "deep" in read("<html><body>" + "<div>" * 200 + "deep" + "</div>" * 200).text
    assert "deep" in read("<html><body>" + "<div>" * 250 + "deep" + "</div>" * 250 + "<p>after").text


def test_zip_bombs() -> None:
    bomb = make.epub_members(PARTS)
    bomb["OEBPS/one.xhtml"] = "<p>" + "0" * (8 << 20)
    assert "unpacks one member to" in limited(make.packed(bomb), ratio=200)
    word = make.docx_members(make.docx_paragraph("0" * (8 << 20)))
    assert "unpacks one member to" in limited(make.packed(word), ratio=200)
    many = make.epub_members(PARTS) | {f"x{i}": "" for i in range(2000)}
    limited(make.packed(many), members=1000)


def test_a_page_that_takes_too_long_can_be_read_whole() -> None:
    with pytest.raises(DocumentError, match="everything=True, which is read faster") as caught:
        load_bytes(make.page().encode(), "file", limits=Limits(seconds=0.001))
    assert [remedy.option for remedy in caught.value.remedies] == ["limits.seconds", "everything"]


def test_a_zip_that_lies_about_its_sizes() -> None:
    data = bytearray(make.packed(make.epub_members(PARTS) | {"OEBPS/one.xhtml": "<p>" + "0" * (4 << 20)}))
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"OEBPS/one.xhtml"))
    struct.pack_into("<I", data, at + 24, 100)  # says that it unpacks to 100 bytes
    said = error(bytes(data))
    assert "is damaged" in said


def test_members_that_overlap_count_each() -> None:
    data = bytearray(make.packed({"mimetype": "application/epub+zip", "META-INF/container.xml": "0" * 900_000}))
    entry_at = data.rindex(b"PK\1\2")
    end_at = data.rindex(b"PK\5\6")
    entry = bytes(data[entry_at:end_at])
    count, size = 2 + 800, (end_at - data.index(b"PK\1\2")) + 800 * len(entry)
    data[end_at:end_at] = entry * 800
    struct.pack_into("<HHI", data, len(data) - 14, count, count, size)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert len(file.infolist()) == count
    assert "unpacks to 72" in limited(bytes(data), unpacked_bytes=512 << 20)


LAUGHS = (
    '<!DOCTYPE x [<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)) + "]>"
)


def test_entities_do_not_multiply() -> None:
    members = make.docx_members("&a9;")
    members["word/document.xml"] = str(members["word/document.xml"]).replace("?>", "?>" + LAUGHS)
    assert "has a document type in word/document.xml" in error(make.packed(members))
    for at in ("OEBPS/content.opf", "OEBPS/one.xhtml", "META-INF/container.xml"):
        book = make.epub_members(PARTS)
        text = str(book[at]).replace("<!DOCTYPE html>", "")
        book[at] = text.replace("?>", "?>" + LAUGHS).replace("</", "&a9;</", 1)
        try:
            assert len(read(make.packed(book)).text) < 100_000
        except DocumentError:
            continue


def test_external_entities_are_not_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    for uri in (secret.as_uri(), "http://127.0.0.1:9/x"):
        doctype = f'<!DOCTYPE html [<!ENTITY e SYSTEM "{uri}"><!ENTITY % p SYSTEM "{uri}"> %p;]>'
        for at in ("OEBPS/content.opf", "OEBPS/one.xhtml", "META-INF/container.xml"):
            book = make.epub_members(PARTS)
            text = str(book[at]).replace("<!DOCTYPE html>", "")
            book[at] = text.replace("?>", "?>" + doctype).replace("</", "&e;</", 1)
            assert "the secret" not in outcome(make.packed(book))
        word = make.docx_members(make.docx_paragraph("&e;"))
        word["word/document.xml"] = str(word["word/document.xml"]).replace("?>", "?>" + doctype)
        assert "document type" in error(make.packed(word))


#
# a process of its own
#


@pytest.mark.parametrize(
    "data",
    [make.pdf([["text"]], title="T", outline=[(1, "text", 1)]), make.page().encode(), make.docx(make.docx_paragraph("text")), make.epub(PARTS)],
    ids=["pdf", "html", "docx", "epub"],
)  # fmt: skip
def test_the_same_from_another_process(data: bytes) -> None:
    assert load_bytes(data, "file") == read(data)


def test_errors_come_from_another_process() -> None:
    locked = make.pdf([["a secret"]], password="open sesame")
    with pytest.raises(DocumentError, match="is locked with a password") as caught:
        load_bytes(locked, "file")
    assert caught.value.remedies[0].option == "password"
    assert load_bytes(locked, "file", password="open sesame").text.strip() == "a secret"


def fake(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pypdfium2 that does something else."""
    (folder / "pypdfium2.py").write_text(
        "import os, socket, sys, time\nclass PdfiumError(Exception): pass\ndef PdfDocument(data, password):\n    "
        + code
    )
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("time.sleep(60)", "was not read in time, and 1.0 is the limit: give another limits.seconds"),
        ("os.abort()", "the process that read it ended with signal SIGABRT"),
        ("os._exit(7)", "ended with status 7"),
        ("x = bytearray(3 << 30)", "needs more bytes of memory"),
        ("raise KeyError('a\\nb')", "is damaged: KeyError: "),
        ("open('written', 'w').write('x' * 9999)", "is damaged: OSError: [Errno 27]"),
        ("raise ValueError('llama_cpp' in sys.modules or 'mesa_gguf.llama' in sys.modules)", "ValueError: False"),
    ],
)
def test_what_happens_there_stays_there(code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, code, monkeypatch)
    monkeypatch.chdir(tmp_path)
    if "3 << 30" in code and sys.platform != "linux":
        pytest.skip("only Linux limits a process's memory")
    seconds = 1.0 if "sleep" in code else 60.0
    with pytest.raises(DocumentError) as caught:
        load_bytes(b"%PDF-1.4", "file", limits=Limits(seconds=seconds, memory=1 << 30))
    assert says in str(caught.value)
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


@pytest.mark.parametrize(
    ("package", "data"),
    [
        ("pypdfium2", make.pdf([["text"]])),
        ("trafilatura", make.page().encode()),
        ("lxml", make.page().encode()),
        ("inscriptis", make.epub(PARTS)),
        ("mammoth", make.docx(make.docx_paragraph("text"))),
        ("charset_normalizer", "Кот и кит, и ещё раз кот.".encode("koi8-r")),
    ],
)
def test_missing_packages_are_told(package: str, data: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"needs {package.replace('_', '-')}, which is not installed: pip install 'mesa-gguf\[documents\]'"
    with pytest.raises(MissingPackageError, match=said):
        read(data)
    if package != "charset_normalizer":  # which is used here
        (tmp_path / f"{package}.py").write_text("raise ImportError")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(MissingPackageError, match=said):
            load_bytes(data, "file")


def test_plain_text_needs_no_package() -> None:
    code = (
        "import sys\nfor p in ('pypdfium2', 'trafilatura', 'inscriptis', 'lxml', 'mammoth', 'charset_normalizer'): sys.modules[p] = None\n"
        "from mesa_gguf.loaders import load_bytes\nprint(load_bytes(b'# A\\n\\ntext', 'a.md').places[0].heading)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "('A',)\n"


#
# folders
#


def test_walk(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    for name in ("b/2.md", "b/10.txt", "a.txt", "b/deep/x.py", ".git/config", ".hidden", "Z.txt", "ä.txt"):
        (folder / name).write_text("text")
    (folder / "b.pdf").write_bytes(make.pdf([["x"]]))
    (folder / "empty").touch()
    (folder / "picture.txt").write_bytes(b"\x89PNG\r\n")
    (folder / "junk").write_bytes(bytes(range(256)))
    (folder / "junk.docx").write_bytes(bytes(range(256)))
    (folder / "large.txt").write_text("x" * 2000)
    os.mkfifo(folder / "pipe")
    os.symlink(outside, folder / "out")
    os.symlink(tmp_path, folder / "up")
    os.symlink(folder, folder / "b" / "round")
    os.symlink(folder / "a.txt", folder / "again.txt")
    os.symlink(folder / ".hidden", folder / "shown.txt")
    os.symlink("nowhere", folder / "broken")
    os.symlink("loop", folder / "loop")
    found = walk(folder, limits=Limits(file_bytes=1500))
    assert all(note.startswith(f"{folder}/") for note in found.notes)  # as it was called
    names = [path.relative_to(folder).as_posix() for path in found.files]
    assert names == ["Z.txt", "a.txt", "b/10.txt", "b/2.md", "b/deep/x.py", "b.pdf", "ä.txt"]
    assert all(load(path).text for path in found.files)
    assert [note.removeprefix(f"{folder}/").split()[0] for note in found.notes] == [
        "broken",
        "empty",
        "junk",
        "junk.docx",
        "large.txt",
        "loop",
        "out",
        "picture.txt",
        "pipe",
        "up",
    ]
    assert found == walk(folder, limits=Limits(file_bytes=1500))
    with pytest.raises(DocumentError, match=r"limits\.files"):
        walk(folder, limits=Limits(files=5))
    with pytest.raises(DocumentError, match="is no folder"):
        walk(outside)
    with pytest.raises(DocumentError, match="no such folder"):
        walk(tmp_path / "none")


@pytest.mark.parametrize("lost", [None, "index.sqlite3", "chunks"])
def test_walk_leaves_libraries_out(tmp_path: Path, lost: str | None) -> None:
    """What mesa-gguf keeps is no document, even where half of it is lost."""
    papers = tmp_path / "papers"
    with Library(papers / "kept" / "library") as library:
        library.store.put("ab" * 32, 3, b"rows")
        library.add_text("A text that is kept.", "text")
    (papers / "a.txt").write_text("text")
    (papers / "chunks").mkdir()  # somebody else's
    (papers / "chunks" / "b.txt").write_text("text")
    if lost == "index.sqlite3":
        (papers / "kept" / "library" / lost).unlink()
    elif lost is not None:
        shutil.rmtree(papers / "kept" / "library" / lost / "ab")
    found = walk(papers)
    assert [path.name for path in found.files] == ["a.txt", "b.txt"]
    assert found.notes == (f"{papers}/kept/library is a library of mesa-gguf",)
    with pytest.raises(DocumentError, match="is a library of mesa-gguf"):
        walk(papers / "kept" / "library")


def test_walk_of_hostile_names(tmp_path: Path) -> None:
    names = ["a\nb.txt", "-rf", "$(x).txt", "‮gpj.txt", "x" * 255]
    for name in names:
        (tmp_path / name).write_text("text")
    if sys.platform == "linux":  # elsewhere names are Unicode
        names.append(os.fsdecode(b"\xff\xfe.txt"))
        (tmp_path / names[-1]).write_text("text")
    found = walk(tmp_path)
    assert len(found.files) == len(names)
    (tmp_path / "a\n\x1b[31mb").touch()
    assert walk(tmp_path).notes == (f"{tmp_path}/a\\n\\x1b[31mb is empty",)
    with pytest.raises(DocumentError, match=r"a\\n\\x1b\[31mb is empty"):
        load(tmp_path / "a\n\x1b[31mb")
    for path in found.files:
        assert load(path).text == "text"


#
# any bytes
#


@given(
    st.binary(max_size=400), st.sampled_from([b"", b"%PDF-1.7\n", b"PK\3\4", b"<html>", b"# A\n", b"\xff\xfe", b"<p>"])
)
def test_any_bytes(data: bytes, mark: bytes) -> None:
    assert outcome(mark + data, everything=len(data) % 2 == 0)


@given(st.text(max_size=400))
def test_any_text_is_its_own(text: str) -> None:
    try:
        document = read(text.encode("utf-8", "surrogatepass"))
    except MesaError:
        return
    if document.kind != "html" and not document.notes and "\0" not in text:  # "0\\0" is a text of UTF-16 too
        assert document.text == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@given(st.text(alphabet="# \n=-`~ab>|\t", max_size=200))
def test_markdown_places_are_in_order(text: str) -> None:
    places = markdown_places(text)
    assert all(a.start < b.start for a, b in pairwise(places))
    assert all(place.start == 0 or text[place.start - 1] == "\n" for place in places)


def damaged(form: str, seed: int, begin: int, end: int) -> str:
    done = subprocess.run(
        [sys.executable, str(DAMAGE), form, str(seed), str(begin), str(end)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(DAMAGE.parent)},
    )
    assert done.returncode == 0, f"{done.stdout.splitlines()[-2:]}\n{done.stderr[-4000:]}"
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files(form: str) -> None:
    assert damaged(form, 1, 0, 300).startswith("done: ")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(2, 5))
def test_many_damaged_files(form: str, seed: int) -> None:
    assert damaged(form, seed, 0, 4000).startswith("done: ")


@pytest.mark.slow
def test_ten_thousand_pages() -> None:
    data = make.pdf([[f"This is page {i}", *make.SENTENCES] for i in range(1, 10_001)], outline=[(1, "Last", 10_000)])
    document = load_bytes(data, "file")
    assert len(document.places) >= 10_000
    for page in (1, 5000, 10_000):
        assert page_at(document, f"This is page {page}") == page
    assert document.place_at(len(document.text)).heading == ("Last",)
    with pytest.raises(DocumentError, match=r"limits\.pages"):
        load_bytes(data, "file", limits=Limits(pages=9999))


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        "<html><body>" + "<table><tr><td>" * 3000,
        "<html><body>" + "<a href=x>" * 300_000,
        "<html><body>" + "<b><i>" * 100_000 + "x",
        "<html><body><p>" + "&amp;" * 2_000_000,
        "<html><body>" + "<p>x</p>" * 500_000,
        "<!--" * 1_000_000,
        "<html><body>" + "<!-- x" * 500_000,
        "<html>" + "</p>" * 1_000_000,
        "<html " + "a=1 " * 1_000_000,
        "<" * 5_000_000,
        "<p>" + "a" * 20_000_000,
    ],
    ids=range(11),
)  # fmt: skip
def test_hostile_pages_end(data: str) -> None:
    """With the text or an error, in time."""
    assert outcome(data, limits=Limits(seconds=20.0))
