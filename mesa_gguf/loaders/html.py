"""HTML: the main text by trafilatura, or everything by inscriptis. DOCX and EPUB come through here too, all of them."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import DocumentError, missing_package
from .document import Builder, Headings, Limits, LoadedDocument, Place, beyond, clean, one_line

if TYPE_CHECKING:
    from lxml.etree import _Element as Element

NEARLY_NOTHING = 0.1  # of a page's words: what trafilatura found is not its text then
_ALL = 0.98  # of them: what is missing is not worth a line

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
# emphasis, which would come as Markdown's stars between the letters of a sentence
_EMPHASIS = ("b", "strong", "i", "em", "u", "s", "del", "strike", "font", "big", "small", "tt")
# blocks that inscriptis does not know
_OWN_LINES = "section dl dt dd form fieldset legend details summary caption center option hr".split()
_UNSEEN = ("script", "style", "template", "noscript")
_PARTS = ("thead", "tbody", "tfoot", "tr", "td", "th")
_BLOCKS = ("table", "ul", "ol", "pre", *_HEADINGS)
_LONG_CELL = 300  # characters: of a longer one with blocks in it, the table is no table of data
_CELL = "\ufdd0"  # no character: between cells until the columns' padding is gone
_PADDED = re.compile(f" *{_CELL} *")


def read_html(text: str, name: str, notes: tuple[str, ...], everything: bool, limits: Limits) -> LoadedDocument:
    """A page and its places.

    Args:
        notes: on how it was decoded.
        everything: menus and footers too.

    Raises:
        DocumentError: it has no text, or is beyond a limit.
        MissingPackageError: trafilatura, inscriptis or lxml is not there.
    """
    tree = parse_html(text, name, limits)
    title = next((one_line("".join(el.itertext())) for el in tree.iter("title")), None)
    builder = Builder(name, limits)
    builder.notes.extend(notes)
    marks = Marks(tree)
    found = ""
    if not everything:
        found, places = marks.take_out(_main_text(tree))
        n_found, n_all = _n_words(found), sum(map(_n_words, _words(tree)))
        if n_found < NEARLY_NOTHING * n_all:
            found = ""
            builder.notes.append("no main text was found in the page, so everything in it was read")
        elif n_found < _ALL * n_all:
            share = round(100 * n_found / n_all)
            builder.notes.append(f"what looks like the main text of the page was read, {share} % of its words")
    if not found:
        found, places = marks.take_out(whole_text(tree))
    if not found.strip() and next(tree.iter("img", "svg", "canvas"), None) is not None:
        raise DocumentError(f"{name} has pictures only, and no text")
    builder.add(found, places)
    return builder.document("html", title or next((p.heading[0] for p in places if p.heading), None))


def parse_html(text: str, name: str, limits: Limits) -> Element:
    """The tree of a page.

    Raises:
        DocumentError: elements are nested beyond the limit.
    """
    try:
        import lxml.html
    except ImportError:
        raise missing_package("HTML", "lxml", "documents") from None

    # note: without huge_tree libxml2 drops everything beyond a depth of 256, and says nothing
    parser = lxml.html.HTMLParser(
        huge_tree=True, remove_comments=True, remove_pis=True, encoding="utf-8", no_network=True
    )
    tree: Element | None = None
    if text := _no_declaration(clean(text)):
        with suppress(lxml.etree.ParserError):  # nothing but comments
            tree = lxml.html.document_fromstring(text.encode(), parser=parser)
    if tree is None:
        raise DocumentError(f"{name} has no text")
    check_depth(tree, name, limits)
    return tree


def check_depth(tree: Element, name: str, limits: Limits) -> None:
    """Refuse a tree that what walks over it could not.

    Raises:
        DocumentError: its elements are nested beyond the limit.
    """
    from lxml import etree

    depth = 0
    for event, _ in etree.iterwalk(tree, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > limits.depth:
            raise beyond("depth", f"{name} has elements nested {depth:,} deep or deeper", limits.depth)


class Marks:
    """Numbers at the beginning of headings, by which they are found again in the text that a tree becomes.

    Args:
        tree: gets them.
    """

    def __init__(self, tree: Element) -> None:
        text = "".join(tree.itertext("*"))  # what they must not be taken for
        n = 0
        while f"\u29fc{n}:" in text:
            n += 1
        self._form = re.compile(f"\u29fc{n}:(\\d+)\u29fd ?")
        self._headings: list[tuple[int, str]] = []
        for heading in tree.iter(*_HEADINGS):
            if title := one_line("".join(heading.itertext())):
                heading.text = f"\u29fc{n}:{len(self._headings)}\u29fd{heading.text or ''}"
                self._headings.append((_HEADINGS[heading.tag], title))

    def take_out(self, text: str, headings: Headings | None = None) -> tuple[str, list[Place]]:
        """The text without them, and its places.

        Args:
            headings: those in force before it.
        """
        headings = headings or Headings()
        parts: list[str] = []
        places: list[Place] = []
        seen: set[int] = set()
        end = length = 0
        for found in self._form.finditer(text):
            parts.append(text[end : found.start()])
            length += len(parts[-1])
            number, end = int(found[1]), found.end()
            if number not in seen and number < len(self._headings):
                seen.add(number)
                line = length - (found.start() - (text.rfind("\n", 0, found.start()) + 1))
                # other marks in the same line are out already, so the line may begin later than that
                line = max(line, places[-1].start if places else 0)
                places.append(Place(line, None, headings.enter(*self._headings[number])))
        parts.append(text[end:])
        return "".join(parts), places


def whole_text(tree: Element) -> str:
    """Everything in a tree, laid out: rows of tables on lines, preformatted text in fences."""
    try:
        from inscriptis.css_profiles import CSS_PROFILES
        from inscriptis.html_engine import Inscriptis
        from inscriptis.html_properties import Display
        from inscriptis.model.config import ParserConfig
        from inscriptis.model.html_element import HtmlElement
    except ImportError:
        raise missing_package("the whole text of a page", "inscriptis", "documents") from None
    from lxml import etree

    for pre in list(tree.iter("pre")):
        etree.strip_tags(pre, "*")  # inscriptis lays out what is in elements in it
        if "\n" in (pre.text or "").strip("\n"):
            pre.text = "```\n" + (pre.text or "").strip("\n") + "\n```"
    for table in list(tree.iter("table")):
        _arrange(table)
    css = {
        **CSS_PROFILES["strict"],
        **{tag: HtmlElement(display=Display.block) for tag in _OWN_LINES},
        **{tag: HtmlElement(display=Display.none) for tag in _UNSEEN},
    }
    config = ParserConfig(css=css, table_cell_separator=_CELL)
    text = Inscriptis(tree, config).get_text()
    return _tidy(clean(_PADDED.sub(" | ", text) if _CELL in text else text))


def _arrange(table: Element) -> None:
    """Rows of a table on lines of their own. One that lays out a page has none: its cells follow each other."""
    from lxml import etree

    inside = table.iterdescendants(*_PARTS)
    own = [table, *(part for part in inside if next(part.iterancestors("table")) is table)]
    cells = [part for part in own if part.tag in ("td", "th")]
    for cell in cells:
        n_blocks = sum(1 for _ in cell.iter("p", "div"))
        if sum(map(len, cell.itertext())) > _LONG_CELL and (
            n_blocks > 1 or next(cell.iter(*_BLOCKS), None) is not None
        ):
            for part in own:
                part.tag = "div"
            return
    for cell in cells:
        for block in cell.iter("p", "div"):
            block.tail = f" {block.tail or ''}"
        etree.strip_tags(cell, "p", "div")


def _main_text(tree: Element) -> str:
    try:
        import trafilatura
    except ImportError:
        raise missing_package("the main text of a page", "trafilatura", "documents") from None
    from copy import deepcopy

    from lxml import etree

    tree = deepcopy(tree)
    etree.strip_tags(tree, *_EMPHASIS)
    # what it puts before characters that mean something in Markdown has to go again, and it alone
    text = "".join(tree.itertext("*"))
    backslash = next(chr(code) for code in range(0x29F5, 0x10000) if chr(code) not in text)
    for el in tree.iter("*"):
        if "\\" in (el.text or ""):
            el.text = el.text.replace("\\", backslash)
        if "\\" in (el.tail or ""):
            el.tail = el.tail.replace("\\", backslash)
    options: dict[str, Any] = {"output_format": "markdown", "include_tables": True, "include_links": False}
    found = trafilatura.extract(tree, with_metadata=False, **options) or ""
    return _tidy(clean(found.replace("\\", "").replace(backslash, "\\")))


def _tidy(text: str) -> str:
    """No spaces at line ends, and no more than one blank line."""
    text = re.sub(r"[ \t\u00a0]+\n", "\n", text + "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _no_declaration(text: str) -> str:
    """A page without the line that says its encoding: it is text by now."""
    return re.sub(r"\A\s*<\?xml[^>]{0,200}\?>", "", text)


def _words(tree: Element) -> list[str]:
    """The texts that a reader of the page sees."""
    texts: list[str] = []
    body = tree.find("body")
    for el in (tree if body is None else body).iter():
        if isinstance(el.tag, str) and el.tag not in _UNSEEN and el.text:
            texts.append(el.text)
        if el.tail:
            texts.append(el.tail)
    return texts


def _n_words(text: str) -> int:
    """Letters and digits that begin a word, or are one, as in scripts without spaces."""
    return len(re.findall(r"[A-Za-z0-9_\u00c0-\u024f\u0370-\u07ff]+|[^\W\d_]", text))
