"""DOCX: mammoth makes HTML of it, all of which is read."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any
from xml.parsers import expat

from ..errors import DocumentError, missing_package
from ..text import counted
from .document import Builder, Limits, LoadedDocument, beyond, one_line
from .html import Marks, parse_html, whole_text
from .packed import Packed

# besides what mammoth does by itself
_STYLES = """
p[style-name='Title'] => h1:fresh
p[style-name='Subtitle'] => p:fresh
comment-reference => sup
"""
_NOT_READ = "An unrecognised element was ignored: "


def read_docx(packed: Packed, limits: Limits) -> LoadedDocument:
    """A DOCX file and its places.

    Raises:
        DocumentError: it is damaged, has no text, or is beyond a limit.
        MissingPackageError: mammoth, inscriptis or lxml is not there.
    """
    try:
        import mammoth
    except ImportError:
        raise missing_package("DOCX", "mammoth", "documents") from None

    name = packed.name
    title = ""
    for info in packed.infos:
        if packed.read(info, 64).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"<"):
            found = _check_xml(packed.read(info), info.filename, name, limits)
            title = found if info.filename == "docProps/core.xml" else title
    result = mammoth.convert_to_html(
        io.BytesIO(packed.data),
        convert_image=mammoth.images.img_element(lambda _: {}),  # never opens one
        external_file_access=False,
        include_embedded_style_map=False,
        style_map=_STYLES,
    )
    builder = Builder(name, limits)
    ignored = Counter(m.message.removeprefix(_NOT_READ) for m in result.messages if m.message.startswith(_NOT_READ))
    for element, n in sorted(ignored.items()):
        builder.notes.append(f"not read: {counted(n, 'element')} {one_line(element.rpartition('}')[2])}")
    if not result.value:
        raise DocumentError(f"{name} has no text")
    tree = parse_html(f"<html><body>{result.value}</body></html>", name, limits)
    if n := sum(1 for _ in tree.iter("img")):
        builder.notes.append(f"{counted(n, 'picture')} in it {'were' if n > 1 else 'was'} not read")
    for link in tree.iter("a"):
        if link.text == "↑":
            link.text = ""  # mammoth's way back from a note
    marks = Marks(tree)
    text, places = marks.take_out(whole_text(tree))
    builder.add(text, places)
    return builder.document("docx", title or next((p.heading[0] for p in places if p.heading), None))


def _check_xml(data: bytes, member: str, name: str, limits: Limits) -> str:
    """What its dc:title says. By the parser that mammoth uses, so that both see the same.

    Raises:
        DocumentError: it is damaged, declares entities, which no DOCX does, or is nested too deep.
    """
    depth = 0
    titles: list[str] = []
    inside = False

    def start(tag: str, _: dict[str, Any]) -> None:
        nonlocal depth, inside
        depth += 1
        inside = tag == "dc:title"
        if depth > limits.depth:
            raise beyond("depth", f"{name} has elements nested {depth:,} deep or deeper", limits.depth)

    def end(_: str) -> None:
        nonlocal depth, inside
        depth -= 1
        inside = False

    def doctype(*_: Any) -> None:
        raise DocumentError(f"{name} has a document type in {one_line(member)}, which no DOCX has: it may be an attack")

    def characters(text: str) -> None:
        if inside:
            titles.append(text)

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler, parser.CharacterDataHandler = doctype, characters
    try:
        parser.Parse(data, True)
    except DocumentError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as err:  # the latter two: an encoding that is none
        raise DocumentError(f"{name}: its member {one_line(member)} is damaged: {err}") from None
    return "".join(titles)
