"""How a page of a PDF looks, and where on it a passage of its text lies, by PDFium in a process of its own."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import struct
import zlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import DocumentError, missing_package
from .apart import run_apart
from .document import LIMITS, Limits

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

_PIXELS = (1400, 4200)  # of a picture, at most: in width, and in height
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
    """

    number: int
    pages: int
    width: float
    height: float
    rectangles: tuple[tuple[float, float, float, float], ...] = ()


def find_on_page(
    data: bytes, name: str, number: int, passage: str = "", *, before: str = "", limits: Limits = LIMITS
) -> Page:
    """A page's size, and where a passage lies on it.

    Args:
        passage: a part of the page's text, as the loader gives it; white space and hyphens need not be the same.
        before: the page's text before it, to tell it from the same words elsewhere.

    Raises:
        DocumentError: it is no PDF file that can be read, or has no such page.
        MissingPackageError: pypdfium2 is not there.
    """
    task = {"what": "find", "number": number, "passage": passage, "before": before}
    answer = run_apart("pdf_page", task, data, name, limits)
    return Page(**{**answer, "rectangles": tuple(tuple(rectangle) for rectangle in answer["rectangles"])})


def draw_page(data: bytes, name: str, number: int, *, limits: Limits = LIMITS) -> bytes:
    """A picture of a page, as a PNG file.

    Raises:
        DocumentError: as `find_on_page` does.
        MissingPackageError: as there.
    """
    answer = run_apart("pdf_page", {"what": "draw", "number": number}, data, name, limits)
    return base64.b64decode(answer["png"])


def warm_up(**_: object) -> None:
    """Import what it takes, before memory is limited."""
    with contextlib.suppress(ImportError):  # told where it is needed
        import pypdfium2  # noqa: F401


def apart(data: bytes, name: str, *, what: str, number: int, passage: str = "", before: str = "") -> dict[str, Any]:
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
                return {"png": base64.b64encode(_picture(page)).decode()}
            return asdict(_find(pdf, page, number, passage, before))
        finally:
            page.close()
    finally:
        pdf.close()


def _picture(page: PdfPage) -> bytes:
    width, height = page.get_size()
    scale = min(_PIXELS[0] / max(width, 1), _PIXELS[1] / max(height, 1))
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

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows, 6)) + part(b"IEND", b"")


def _find(pdf: PdfDocument, page: PdfPage, number: int, passage: str, before: str) -> Page:
    width, height = page.get_size()
    found = Page(number, len(pdf), width, height)
    if not passage.strip():
        return found
    from pypdfium2 import raw

    textpage = page.get_textpage()
    try:
        n_chars = textpage.count_chars()
        # note: one by one, because only so the place of a character in the text is its number on the page
        characters = [chr(raw.FPDFText_GetUnicode(textpage, n)) for n in range(n_chars)]
        span = _span(characters, passage, before)
        if span is None:
            return found
        rectangles = []
        for n in range(textpage.count_rects(span[0], span[1] - span[0])):
            left, bottom, right, top = textpage.get_rect(n)
            rectangles.append(_on_picture(page, width, height, left, bottom, right, top))
        return replace(found, rectangles=tuple(rectangles))
    finally:
        textpage.close()


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
