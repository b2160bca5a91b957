"""What a loader gives: a text, and where in it the pages and headings lie. And what it refuses to spend."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import DocumentError, Remedy

MIB = 1 << 20

# what no text needs and what would break those that read it: controls, halves of characters, noncharacters
_UNWANTED = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_TITLE_LENGTH = 200  # characters of a heading; longer ones are paragraphs in the clothes of one


@dataclass(frozen=True)
class Limits:
    """What one file may cost. More is an error that names the limit.

    Attributes:
        file_bytes: of the file.
        unpacked_bytes: of what lies in a packed file (DOCX, EPUB), all together.
        ratio: unpacked to packed bytes of a member, where that has more than a MiB.
        members: of a packed file.
        pages: of a PDF.
        characters: of the text.
        depth: of elements in elements.
        files: of a folder.
        seconds: of reading, in a process of its own, which may die of a damaged file where this one must not; None: in this
            process and as long as it takes. Plain text, Markdown and code are always read here.
        memory: bytes of that process's address space, where the system can limit it (Linux).
    """

    file_bytes: int = 256 * MIB
    unpacked_bytes: int = 512 * MIB
    ratio: int = 200
    members: int = 20_000
    pages: int = 20_000
    characters: int = 50_000_000
    depth: int = 256
    files: int = 100_000
    seconds: float | None = 120.0
    memory: int = 4096 * MIB

    def check(self, limit: str, needed: int, what: str) -> None:
        """Refuse what is beyond a limit.

        Args:
            limit: its name.
            needed: how much there is,
            what: in words: "report.pdf has 30,000 pages".

        Raises:
            DocumentError: there is more than the limit.
        """
        allowed: int = getattr(self, limit)
        if needed > allowed:
            raise beyond(limit, what, allowed, needed)


LIMITS = Limits()


def beyond(limit: str, what: str, allowed: float, needed: int | None = None) -> DocumentError:
    """The error for what is beyond a limit."""
    remedy = Remedy(f"limits.{limit}", needed, "or more" if needed is not None else "", "if you trust the file")
    return DocumentError(f"{what}, and {allowed:,} is the limit", remedy, needed=needed, available=int(allowed))


@dataclass(frozen=True)
class Place:
    """Where a stretch of a text comes from.

    Attributes:
        start: its first character in the text; it goes on to the next place.
        page: counted from 1; None where there are no pages.
        heading: the headings in force from there on, the outermost first.
    """

    start: int
    page: int | None = None
    heading: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedDocument:
    """A file as text.

    Attributes:
        text: line ends are \\n.
        places: by start; the first is at 0.
        kind: "pdf", "html", "docx", "epub", "markdown", "code" or "text".
        title: as the file gives it.
        notes: what one should know of the reading, a line each: what was guessed, and what is not in the text.
    """

    text: str
    places: tuple[Place, ...]
    kind: str
    title: str | None = None
    notes: tuple[str, ...] = ()

    def place_at(self, offset: int) -> Place:
        """The place of a character.

        Args:
            offset: in `text`; its length is the end's.

        Raises:
            DocumentError: it is outside of the text.
        """
        if not 0 <= offset <= len(self.text):
            raise DocumentError(f"offset {offset} is outside of the text, which has {len(self.text):,} characters")
        return self.places[bisect_right(self.places, offset, key=lambda place: place.start) - 1]


class Headings:
    """The headings in force, as they come."""

    def __init__(self) -> None:
        self._open: list[tuple[int, str]] = []

    def enter(self, level: int, title: str) -> tuple[str, ...]:
        """The headings in force after this one.

        Args:
            level: 1 for the outermost.
        """
        while self._open and self._open[-1][0] >= level:
            self._open.pop()
        self._open.append((level, one_line(title)))
        return tuple(title for _, title in self._open)


class Builder:
    """Puts a text together from parts, and notes their places."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.notes: list[str] = []
        self.n_characters = 0
        self._name, self._limits = name, limits
        self._parts: list[str] = []
        self._places: list[Place] = []

    def add(self, text: str, places: Iterable[Place] = ()) -> None:
        """Append text.

        Args:
            places: in it, by its own offsets.
        """
        for place in places:
            self.place(place.page, place.heading, place.start)
        self._parts.append(text)
        self.n_characters += len(text)
        self._limits.check(
            "characters", self.n_characters, f"{self._name} has {self.n_characters:,} characters of text or more"
        )

    def place(self, page: int | None, heading: tuple[str, ...], offset: int = 0) -> None:
        """Begin a place, so many characters behind what is there."""
        place = Place(self.n_characters + offset, page, heading)
        if self._places and self._places[-1].start == place.start:
            self._places.pop()
        if not self._places or (self._places[-1].page, self._places[-1].heading) != (page, heading):
            self._places.append(place)

    def document(self, kind: str, title: str | None = None) -> LoadedDocument:
        """What has come together.

        Raises:
            DocumentError: no text has.
        """
        text = "".join(self._parts)
        if not text.strip():
            raise DocumentError(f"{self._name} has no text")
        places = tuple(self._places)
        if not places or places[0].start > 0:
            first_page = places[0].page if places else None
            places = (Place(0, first_page), *places)
        return LoadedDocument(text, places, kind, one_line(title or "") or None, tuple(self.notes))


def clean(text: str) -> str:
    """Line ends as \\n, and nothing that is no text."""
    return _UNWANTED.sub("", _LINE_ENDS.sub("\n", text))


def one_line(text: str) -> str:
    """A title or heading: on one line, and not too long."""
    line = " ".join(clean(text[: 8 * _TITLE_LENGTH]).split())
    return line if len(line) <= _TITLE_LENGTH else line[: _TITLE_LENGTH - 1] + "…"


def printable(name: str) -> str:
    """A file's name on one line: whoever made it may have called it anything."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def listed(numbers: Iterable[int]) -> str:
    """Numbers in short: "3-7, 9"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    said = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(said if len(said) <= 20 else [*said[:20], "…"])
