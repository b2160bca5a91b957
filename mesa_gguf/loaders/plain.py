"""Markdown, source code and other plain text: as they are; only where the headings and pages lie is found."""

from __future__ import annotations

import re

from .document import Builder, Headings, Limits, LoadedDocument, Place

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\n`]*)$")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_CLOSING = re.compile(r"(?:^|[ \t])#+$")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_NO_PARAGRAPH = re.compile(r" {0,3}(?:[-*+>|]|\d+[.)][ \t])| {4}|\t")  # what an underline makes no heading of
_FRONT = re.compile(r"---[ \t]*\n(.{0,10000}?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*(\S[^\n]*)$", re.MULTILINE)

# a definition at the left margin, in most languages that have a word for it
_DEFINITION = re.compile(
    r"""^(?:(?:export|default|pub(?:\([a-z]+\))?|public|private|protected|internal|abstract|final|sealed|static|async|unsafe|open|
    data|inline|extern|declare|local)[ ]+)*
    (?:def|class|func|fn|fun|function\*?|sub|struct|enum|trait|impl|interface|module|namespace|protocol|extension|object|record)
    [ ]+[^\W\d]""",
    re.VERBOSE,
)
_HEADING_END = re.compile(r"[({=:]|[ ]+where\b|[ ]+extends\b")


def read_plain(text: str, name: str, kind: str, notes: tuple[str, ...], limits: Limits) -> LoadedDocument:
    """A plain text and its places.

    Args:
        kind: "markdown", "code" or "text".
        notes: on how it was decoded.

    Raises:
        DocumentError: it is too long, or empty.
    """
    builder = Builder(name, limits)
    builder.notes.extend(notes)
    title = None
    if kind == "markdown":
        places = markdown_places(text)
        front = _FRONT.match(text)
        said = _FRONT_TITLE.search(front[1]) if front else None
        title = said[1].strip("\"' ") if said else next((p.heading[0] for p in places if p.heading), None)
    elif kind == "code":
        places = _definitions(text)
    else:
        places = _pages(text)
    builder.add(text, places)
    return builder.document(kind, title)


def markdown_places(text: str) -> list[Place]:
    """The headings of a Markdown text, of both forms, outside of code fences."""
    places: list[Place] = []
    headings = Headings()
    front = _FRONT.match(text)
    at = front.end() if front else 0
    fence = ""
    paragraph: int | None = None  # where the paragraph began that an underline would make a heading
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line = text[at : min(end, at + 2000)]
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark:
            fence, paragraph = mark[1], None
        elif found := _ATX.match(line):
            if title := _CLOSING.sub("", (found[2] or "").rstrip()).strip():
                places.append(Place(at, None, headings.enter(len(found[1]), title)))
            paragraph = None
        elif paragraph is not None and (found := _SETEXT.match(line)):
            places.append(Place(paragraph, None, headings.enter(1 if "=" in found[1] else 2, text[paragraph:at])))
            paragraph = None
        elif not line.strip() or _NO_PARAGRAPH.match(line):
            paragraph = None
        elif paragraph is None:
            paragraph = at
        at = end + 1
    return places


def _definitions(text: str) -> list[Place]:
    """What a source file defines at the left margin."""
    places: list[Place] = []
    at = 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line = text[at : min(end, at + 300)]
        if found := _DEFINITION.match(line):
            stop = _HEADING_END.search(line, found.end())
            places.append(Place(at, None, (line[: stop.start() if stop else None].strip(),)))
        at = end + 1
    return places


def _pages(text: str) -> list[Place]:
    """The pages of a text with form feeds, as RFCs and what pdftotext writes have them."""
    feeds = [found.end() for found in re.finditer("\f", text)]
    if not feeds or not text[feeds[-1] :].strip():
        feeds = feeds[:-1]  # the last one ends the last page
    return [Place(start, page) for page, start in enumerate([0, *feeds], 1)] if feeds else []
