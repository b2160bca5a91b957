"""PDF, page by page, by PDFium."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import DocumentError, Remedy, missing_package
from ..text import counted
from .document import Builder, Headings, Limits, LoadedDocument, Place, clean, listed, one_line

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

_HYPHEN = re.compile("[\x02\ufffe]\\s*")  # PDFium's mark where a line ends in a hyphen
_NO_LETTERS = re.compile(
    "[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f]"
)  # what comes of a font that does not name its letters
_GARBLED = 0.3  # of a page's characters
_MAX_BOOKMARKS = 20_000
_MAX_DEPTH = 15  # of the outline

_NEEDS_OCR = "scanned, need OCR, with ocrmypdf for example"


def read_pdf(data: bytes, name: str, password: str | None, limits: Limits) -> LoadedDocument:
    """A PDF file and its places.

    Raises:
        DocumentError: it is damaged, locked, beyond a limit, or has no page with a text layer.
        MissingPackageError: pypdfium2 is not there.
    """
    try:
        import pypdfium2
    except ImportError:
        raise missing_package("PDF", "pypdfium2", "documents") from None

    try:
        pdf = pypdfium2.PdfDocument(data, password=password)
    except pypdfium2.PdfiumError as err:
        if err.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            said = "is locked with a password" if password is None else "is locked, and not with that password"
            raise DocumentError(f"{name} {said}", Remedy("password")) from None
        if err.err_code == pypdfium2.raw.FPDF_ERR_SECURITY:
            raise DocumentError(
                f"{name} is locked in a way that PDFium does not know: save it without that first"
            ) from None
        raise DocumentError(f"{name} is a damaged PDF file, or none") from None
    try:
        return _read(pdf, name, limits)
    finally:
        pdf.close()


def _read(pdf: PdfDocument, name: str, limits: Limits) -> LoadedDocument:
    import pypdfium2

    n_pages = len(pdf)
    limits.check("pages", n_pages, f"{name} has {n_pages:,} pages")
    builder = Builder(name, limits)
    form = pdf.get_formtype()
    if form == pypdfium2.raw.FORMTYPE_ACRO_FORM:
        pdf.init_forms()
    elif form != pypdfium2.raw.FORMTYPE_NONE:
        builder.notes.append("it is a form in XFA, of which only the printed part was read")
    outline = _outline(pdf, n_pages)
    headings = Headings()
    heading: tuple[str, ...] = ()
    damaged, scanned, garbled = [], [], []
    for number in range(1, n_pages + 1):
        try:
            text, is_blank = _page_text(pdf, number - 1)
        except pypdfium2.PdfiumError:
            damaged.append(number)
            text, is_blank = "", True
        if len(_NO_LETTERS.findall(text)) > _GARBLED * len(text):
            garbled.append(number)
        text = clean(_HYPHEN.sub(_unbroken, text)).strip("\n\f ")
        if not text and not is_blank:
            scanned.append(number)
        builder.place(number, heading)
        for place in _headings_in(text, number, outline.get(number, ()), headings, heading):
            heading = place.heading
            builder.place(number, heading, place.start)
        if text:
            builder.add(text + "\n")
    if scanned and len(scanned) + len(damaged) == n_pages:
        raise DocumentError(f"{name}: no page has a text layer: {_NEEDS_OCR}")
    if damaged and len(damaged) == n_pages:
        raise DocumentError(f"{name} is a damaged PDF file: no page can be read")
    for numbers, what in (
        (scanned, f"no text layer: {_NEEDS_OCR}"),
        (damaged, "damage, and could not be read"),
        (garbled, f"a font that does not name its letters: {_NEEDS_OCR.removeprefix('scanned, ')}"),
    ):
        if numbers:
            pages, have = ("pages", "have") if len(numbers) > 1 else ("page", "has")
            builder.notes.append(f"{pages} {listed(numbers)} of {n_pages} {have} {what}")
    if n := max(pdf.count_attachments(), 0):
        builder.notes.append(f"{counted(n, 'attached file')} not read")
    return builder.document("pdf", pdf.get_metadata_value("Title"))


def _page_text(pdf: PdfDocument, index: int) -> tuple[str, bool]:
    """A page's text, and whether nothing at all is on it."""
    page = pdf.get_page(index)
    try:
        if pdf.formenv is not None:
            page.flatten()  # what was filled in becomes text
            page.close()
            page = pdf.get_page(index)
        textpage = page.get_textpage()
        try:
            # note: get_text_range ends characters beyond 16 bits; get_text_bounded leaves out what lies beside the page
            text = textpage.get_text_bounded() or textpage.get_text_range()
        finally:
            textpage.close()
        return text, not text.strip() and _is_blank(page)
    finally:
        page.close()


def _is_blank(page: PdfPage) -> bool:
    return next(iter(page.get_objects(max_depth=1)), None) is None


def _unbroken(hyphen: re.Match[str]) -> str:
    """What stands for a hyphen at the end of a line: nothing within a word."""
    following = hyphen.string[hyphen.end() : hyphen.end() + 1]
    return "" if following.islower() else "-"


def _outline(pdf: PdfDocument, n_pages: int) -> dict[int, list[tuple[int, str]]]:
    """The bookmarks' levels and titles by page."""
    found: dict[int, list[tuple[int, str]]] = {}
    for level, title, page in _bookmarks(pdf):
        if title and 1 <= page <= n_pages:
            found.setdefault(page, []).append((level, title))
    return found


def _bookmarks(pdf: PdfDocument) -> Iterator[tuple[int, str, int]]:
    import pypdfium2

    for n, bookmark in enumerate(pdf.get_toc(max_depth=_MAX_DEPTH)):
        if n >= _MAX_BOOKMARKS:
            return
        try:
            dest = bookmark.get_dest()
            index = dest.get_index() if dest else None
            yield bookmark.level + 1, one_line(bookmark.get_title()), -1 if index is None else index + 1
        except pypdfium2.PdfiumError:
            continue  # it helps only


def _headings_in(
    text: str, page: int, bookmarks: list[tuple[int, str]] | tuple[()], headings: Headings, before: tuple[str, ...]
) -> Iterator[Place]:
    """The places of a page's bookmarks: where their title stands at a line's beginning, else the page's.

    Args:
        before: the headings in force at its beginning.
    """
    if not bookmarks:
        return
    lines = [0, *(found.end() for found in re.finditer("\n", text))]
    at = 0
    for level, title in bookmarks:
        # titles are broken over lines, and numbered on the page alone or in the outline alone
        words = r"\s+".join(map(re.escape, title.split()[:12]))
        found = re.compile(rf"^[ \t]*(?:[\w.]{{1,10}}[ \t]+)?{words}", re.MULTILINE | re.IGNORECASE).search(text, at)
        if found:
            at = lines[bisect_right(lines, found.start()) - 1]
        yield Place(at, page, headings.enter(level, title))
