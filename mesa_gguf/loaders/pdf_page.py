"""How a page of a PDF looks, and where on it a passage of its text lies, by PDFium in a process of its own."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import math
import struct
import zlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DocumentError, missing_package
from .apart import run_apart
from .document import LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pypdfium2 import PdfDocument, PdfPage

WIDTH = 1400  # pixels of a picture
MOST_WIDTH = 4200
_MOST_PIXELS = 16_000_000  # of a picture in all: a strip of paper may be long
_MOST_CHARACTERS = 50_000  # of a page whose lines are told
_HYPHENS = "-\x02\xad\u2010\u2011\ufffe"  # PDFium's marks of a broken word among them: in a text they may be left out
_SCALE = 16  # PDFium gives places on a picture as whole numbers: of a large picture


@dataclass(frozen=True)
class Page:
    """A page of a PDF.

    Attributes:
        number: counted from 1.
        pages: of the document.
        width, height: in points, as it is shown.
        rectangles: where the passage lies: left, top, width and height of each line, in points from the upper left.
        lines: the page's text: of each piece of a line where it lies, as a rectangle has it, and the text.
    """

    number: int
    pages: int
    width: float
    height: float
    rectangles: tuple[tuple[float, float, float, float], ...] = ()
    lines: tuple[tuple[float, float, float, float, str], ...] = ()


def find_on_page(
    data: bytes, name: str, number: int, passage: str = "", *, before: str = "", limits: Limits = LIMITS
) -> Page:
    """A page's size and text, and where a passage lies on it.

    Args:
        passage: a part of the page's text, as the loader gives it; white space and hyphens need not be the same.
        before: the page's text before it, to tell it from the same words elsewhere.

    Raises:
        DocumentError: it is no PDF file that can be read, or has no such page.
        MissingPackageError: pypdfium2 is not there.
    """
    task = {"what": "find", "number": number, "passage": passage, "before": before}
    answer = run_apart("pdf_page", task, data, name, limits)
    return Page(**{**answer, **{name: tuple(map(tuple, answer[name])) for name in ("rectangles", "lines")}})


def draw_page(data: bytes, name: str, number: int, width: int = WIDTH, *, limits: Limits = LIMITS) -> bytes:
    """A picture of a page, as a PNG file.

    Args:
        width: of the picture in pixels; of a page that is very long less.

    Raises:
        DocumentError: as `find_on_page` does.
        MissingPackageError: as there.
    """
    task = {"what": "draw", "number": number, "pixels": min(width, MOST_WIDTH)}
    answer = run_apart("pdf_page", task, data, name, limits)
    return base64.b64decode(answer["png"])


def warm_up(**_: object) -> None:
    """Import what it takes, before memory is limited."""
    with contextlib.suppress(ImportError):  # told where it is needed
        import pypdfium2  # noqa: F401


def apart(
    data: bytes, name: str, *, what: str, number: int, pixels: int = WIDTH, passage: str = "", before: str = ""
) -> dict[str, Any]:
    """What that process does."""
    try:
        import pypdfium2
    except ImportError:
        raise missing_package("PDF", "pypdfium2", "documents") from None

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError:
        raise DocumentError(f"{name} is no PDF file that can be shown: it is damaged or locked") from None
    try:
        if not 1 <= number <= len(pdf):
            raise DocumentError(f"{name} has no page {number}: it has {len(pdf):,}")
        if pdf.get_formtype() == pypdfium2.raw.FORMTYPE_ACRO_FORM:
            pdf.init_forms()
        try:
            page = pdf.get_page(number - 1)
        except pypdfium2.PdfiumError:
            raise DocumentError(f"page {number} of {name} is damaged") from None
        try:
            if what == "draw":
                return {"png": base64.b64encode(_picture(page, pixels)).decode()}
            return asdict(_find(pdf, page, number, passage, before))
        finally:
            page.close()
    finally:
        pdf.close()


def _picture(page: PdfPage, pixels: int) -> bytes:
    width, height = (max(size, 1) for size in page.get_size())
    scale = min(pixels / width, math.sqrt(_MOST_PIXELS / (width * height)))
    bitmap = page.render(scale=scale, rev_byteorder=True, prefer_bgrx=False)
    try:
        return _png(bytes(bitmap.buffer), bitmap.width, bitmap.height, bitmap.stride, bitmap.n_channels)
    finally:
        bitmap.close()


def _png(pixels: bytes, width: int, height: int, stride: int, channels: int) -> bytes:
    """A PNG file.

    Args:
        pixels: rows of stride bytes, red first.
        channels: bytes of a pixel: 1 (grey), 3, or 4 of which the last is not used.
    """
    rows = bytearray()
    for at in range(0, height * stride, stride):
        row = pixels[at : at + width * channels]
        if channels == 4:
            colours = bytearray(3 * width)
            for n in range(3):
                colours[n::3] = row[n::4]
            row = bytes(colours)
        rows += b"\0" + row  # 0: as it is, without a filter

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    # note: level 2 takes a third of the time of the default, and 5 % more bytes, which go through the machine's own wires
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows, 2)) + part(b"IEND", b"")


def _find(pdf: PdfDocument, page: PdfPage, number: int, passage: str, before: str) -> Page:
    from pypdfium2 import raw

    width, height = page.get_size()
    found = Page(number, len(pdf), width, height)
    textpage = page.get_textpage()
    try:
        n_chars = textpage.count_chars()
        # note: one by one, because only so the place of a character in the text is its number on the page
        characters = [chr(raw.FPDFText_GetUnicode(textpage, n)) for n in range(n_chars)]
        lines = tuple(
            (*_on_picture(page, width, height, *box), text)
            for box, text in _lines(textpage, characters[:_MOST_CHARACTERS])
        )
        found = replace(found, lines=lines)
        span = _span(characters, passage, before) if passage.strip() else None
        if span is None:
            return found
        rectangles = []
        for n in range(textpage.count_rects(span[0], span[1] - span[0])):
            left, bottom, right, top = textpage.get_rect(n)
            rectangles.append(_on_picture(page, width, height, left, bottom, right, top))
        return replace(found, rectangles=tuple(rectangles))
    finally:
        textpage.close()


def _lines(textpage: Any, characters: list[str]) -> Iterator[tuple[tuple[float, float, float, float], str]]:
    """A page's text in pieces that lie beside each other: of each its left, bottom, right and top on the page, and the text."""
    from pypdfium2 import raw

    box = raw.FS_RECTF()
    text, around = "", (0.0, 0.0, 0.0, 0.0)
    for n, character in enumerate(characters):
        if character in "\r\n":
            if text.strip():
                yield around, text
            text = ""
            continue
        if character == "\0" or not raw.FPDFText_GetLooseCharBox(textpage, n, box):
            continue
        left, bottom, right, top = box.left, box.bottom, box.right, box.top
        if text and left - around[2] > 2 * (around[3] - around[1]):  # another column, or the next cell of a table
            if text.strip():
                yield around, text
            text = ""
        if right > left and top > bottom:  # not the spaces and breaks that PDFium adds
            around = (left, bottom, right, top) if not text.strip() else (
                min(around[0], left), min(around[1], bottom), max(around[2], right), max(around[3], top)
            )  # fmt: skip
        text += character
    if text.strip():
        yield around, text


def _span(characters: list[str], passage: str, before: str) -> tuple[int, int] | None:
    """The first character of a passage and the one behind it; the nearest to where it should be, if there are several."""
    kept = [n for n, character in enumerate(characters) if _counts(character)]
    text = "".join(characters[n].casefold()[:1] or " " for n in kept)
    wanted, expected = _bare(passage), len(_bare(before))
    if not wanted:
        return None
    best = None
    at = text.find(wanted)
    while at >= 0:
        if best is None or abs(at - expected) < abs(best - expected):
            best = at
        at = text.find(wanted, at + 1)
    if best is None:
        return None
    return kept[best], kept[best + len(wanted) - 1] + 1


def _counts(character: str) -> bool:
    return character.isprintable() and not character.isspace() and character not in _HYPHENS


def _bare(text: str) -> str:
    return "".join(character.casefold()[:1] or " " for character in text if _counts(character))


def _on_picture(
    page: PdfPage, width: float, height: float, left: float, bottom: float, right: float, top: float
) -> tuple[float, float, float, float]:
    """A rectangle of the page's own coordinates as it is shown: turned and cut as the page says."""
    from pypdfium2 import raw

    x, y = ctypes.c_int(), ctypes.c_int()
    corners = []
    for across, up in ((left, top), (right, bottom)):
        raw.FPDF_PageToDevice(page, 0, 0, round(width * _SCALE), round(height * _SCALE), 0, across, up, x, y)
        corners.append((x.value / _SCALE, y.value / _SCALE))
    (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(*corners))
    return x0, y0, x1 - x0, y1 - y0
