"""Chunks whose borders the content decides, so that an edit changes the chunks around it and no others.

A text is cut into units: paragraphs with the blank lines behind them; those that are long into sentences, these into lines,
these into runs of characters. As long as more is left than one chunk holds, the next chunk ends where, between the least and
the most tokens that it may have, a unit ends best: before a heading rather than after a paragraph, and so on (`End`). Of those
that end alike it is the one whose text has the least hash, which is the same wherever it stands and whatever stands before it.
So two texts that are equal from some place on soon have the same borders, and keep them.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..loaders import Place

SPARE = 32  # tokens: units are counted one by one, and a chunk is tokenized as a whole
UNITS = 8  # a chunk has room for so many of the longest at least

_RUN = 16, 64  # code points: of a run of characters, at least and at most
_RUN_HASH = 8  # graphemes that decide where it ends
_RUN_ONE_IN = 16  # of the places where it may
_TO_SPACE = 24  # code points: as far as a run goes on for a space
_UNCOUNTED = 32  # code points a token: longer text is too long for a unit whatever its tokens


class End(IntEnum):
    """How good a place is to end a chunk at, the best first."""

    HEADING = 0
    """A heading follows."""
    PARAGRAPH = 1
    """A blank line lies between, or what is at the left margin of a source file."""
    INDENTED = 2
    """A blank line, and what follows is indented: in the body of a function for example."""
    SENTENCE = 3
    """A sentence or a page ends."""
    LINE = 4
    """A line, such as a row of a table."""
    FENCED_BLANK = 5
    """A blank line in a fence of code, which is cut only where it is longer than a chunk."""
    FENCED_LINE = 6
    """A line in such a fence; or a heading ends, whose text follows."""
    RUN = 7
    """Anywhere in a line."""


@dataclass(frozen=True)
class Span:
    """A chunk of a text.

    Attributes:
        start: its first character.
        stop: the one behind its last.
        n_tokens: the sum of its units' tokens.
        heading: those in force at its beginning.
        page_first: the page that it begins on; None where there are no pages.
        page_last: the page that it ends on.
    """

    start: int
    stop: int
    n_tokens: int
    heading: tuple[str, ...] = ()
    page_first: int | None = None
    page_last: int | None = None


def split(
    text: str,
    places: Sequence[Place],
    count: Callable[[str], int],
    *,
    max_tokens: int = 1024,
    min_tokens: int = 256,
) -> list[Span]:
    """Cut a text into chunks, which together are the text.

    Args:
        places: of its pages and headings, by start. A border may lie at each.
        count: how many tokens a piece of text has.
        max_tokens: that a chunk may have, `SPARE` of them left free.
        min_tokens: that a chunk has at least, the last one excepted.

    Raises:
        ConfigError: the least is too near to the most, so that there might be no border between them.
    """
    longest = max_tokens // UNITS
    most = max_tokens - SPARE
    if not 0 < min_tokens <= most - longest:
        raise ConfigError(
            f"min_tokens={min_tokens} and max_tokens={max_tokens} leave no room for a border: min_tokens must be 1 ... "
            f"{max(most - longest, 0)}"
        )
    stops, ends, tokens = _units(text, places, count, longest)
    before = [0]  # tokens before each unit
    for n in tokens:
        before.append(before[-1] + n)

    spans: list[Span] = []
    hashes: dict[int, bytes] = {}
    first = 0
    while first < len(stops):
        last = len(stops) - 1
        if before[-1] - before[first] > most:
            # units that end a chunk of at least min_tokens and at most `most` tokens
            low = bisect_left(before, before[first] + min_tokens, first + 1) - 1
            high = bisect_right(before, before[first] + most, first + 1) - 1
            last = _best(text, stops, ends, hashes, low, high) if low < high else max(high - 1, first)
        start = stops[first - 1] if first else 0
        spans.append(_span(start, stops[last], before[last + 1] - before[first], places))
        first = last + 1
    return spans


def _best(text: str, stops: list[int], ends: list[End], hashes: dict[int, bytes], low: int, high: int) -> int:
    """The unit of low ... high - 1 that ends best."""
    best_end = min(ends[low:high])
    best, least = low, b"\xff" * 9
    for unit in range(low, high):
        if ends[unit] == best_end:
            if unit not in hashes:
                hashes[unit] = _hash(text[stops[unit - 1] if unit else 0 : stops[unit]])
            if hashes[unit] <= least:
                best, least = unit, hashes[unit]
    return best


def _hash(text: str) -> bytes:
    """The same for the same words, however they are spaced."""
    return blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _span(start: int, stop: int, n_tokens: int, places: Sequence[Place]) -> Span:
    if not places:
        return Span(start, stop, n_tokens)
    first = places[max(bisect_right(places, start, key=lambda place: place.start) - 1, 0)]
    last = places[max(bisect_right(places, stop - 1, key=lambda place: place.start) - 1, 0)]
    return Span(start, stop, n_tokens, first.heading, first.page, last.page)


#
# units
#


def _units(
    text: str, places: Sequence[Place], count: Callable[[str], int], longest: int
) -> tuple[list[int], list[End], list[int]]:
    """Where the units stop, how well each ends, and its tokens.

    Args:
        longest: tokens of a unit.
    """
    stops: list[int] = []
    ends: list[End] = []
    tokens: list[int] = []
    for block in _blocks(text, places):
        # pieces still to be cut, the next one last: start, stop, how it ends, which kind of cut is the next to try
        todo = [(block.start, block.stop, block.end, 0)]
        while todo:
            start, stop, end, way = todo.pop()
            short = stop - start <= longest * _UNCOUNTED
            n = count(text[start:stop]) if short else longest + 1
            if n <= longest or stop - start == 1:
                stops.append(stop)
                ends.append(end)
                tokens.append(n)
                continue
            cuts, cut_end, way = _cut(text, start, stop, block.fenced, way)
            bounds = [start, *cuts, stop]
            ends_in = [*(_margin(text, at, cut_end) for at in cuts), end]
            todo.extend((a, b, e, way) for (a, b), e in reversed([*zip(pairwise(bounds), ends_in)]))
    return stops, ends, tokens


def _cut(text: str, start: int, stop: int, fenced: bool, way: int) -> tuple[list[int], End, int]:
    """Where a piece that is too long is cut, how units end there, and which way to cut is the next to try."""
    if fenced:
        ways = (_blank_lines, End.FENCED_BLANK), (_lines, End.FENCED_LINE), (_runs, End.RUN)
    else:
        ways = (_sentences, End.SENTENCE), (_lines, End.LINE), (_runs, End.RUN)
    for number in range(way, len(ways)):
        find, end = ways[number]
        if cuts := find(text, start, stop):
            return cuts, end, number + 1
    return [_middle(text, start, stop)], End.RUN, len(ways)


_CLOSED = re.compile(r"\n[)}\]]+[;,]?[ \t]*\n\Z")


def _margin(text: str, at: int, end: End) -> End:
    """How a unit ends at a place: behind a bracket at the left margin a definition of a source file does."""
    if end == End.LINE and _CLOSED.search(text, max(at - 20, 0), at) and not text[at : at + 1].isspace():
        return End.PARAGRAPH
    return end


@dataclass
class _Block:
    """A paragraph or a fence of code, with the blank lines behind it.

    Attributes:
        end: how well a chunk ends with it.
        fenced: it lies in a fence of code.
    """

    start: int
    stop: int
    end: End
    fenced: bool


_BLANK = re.compile(r"\n(?:[ \t]*\n)+")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n`]*)(?:\n|\Z)", re.MULTILINE)
_SHORT_HEADING = 240  # characters: what begins as a heading and is longer has its text in it


def _blocks(text: str, places: Iterable[Place]) -> Iterator[_Block]:
    """The blocks of a text, in order."""
    borders: dict[int, End] = {}  # where a block stops, and how well
    for found in _BLANK.finditer(text):
        at = found.end()
        borders[at] = End.INDENTED if text[at : at + 1] in ("", " ", "\t") else End.PARAGRAPH
    fences = _fences(text)
    for start, stop in fences:
        borders.setdefault(start, End.PARAGRAPH)
        if not _BLANK.match(text, stop - 1):
            borders[stop] = End.PARAGRAPH
    titles = set()
    before: Place | None = None
    for place in places:
        if place.heading and (before is None or place.heading != before.heading):
            titles.add(place.start)
            borders[place.start] = End.HEADING
        else:
            borders.setdefault(place.start, End.SENTENCE)
        before = place
    borders[len(text)] = End.PARAGRAPH

    start = fence = 0
    for stop in sorted(borders):
        if not 0 < stop <= len(text):
            continue
        end = borders[stop]
        while fence < len(fences) and fences[fence][1] <= start:
            fence += 1
        fenced = fence < len(fences) and fences[fence][0] <= start
        if fenced and stop < fences[fence][1]:
            if end in (End.PARAGRAPH, End.INDENTED):
                continue  # a blank line in a fence, which is kept whole where it can be
            end = End.FENCED_LINE
        elif start in titles and stop - start <= _SHORT_HEADING and _is_title(text[start:stop]):
            end = End.FENCED_LINE
        yield _Block(start, stop, end, fenced)
        start = stop


def _fences(text: str) -> list[tuple[int, int]]:
    """The fences of code: from the line that opens one behind the line that closes it. One that is never closed is none."""
    found = []
    mark, start = "", 0
    for fence in _FENCE.finditer(text):
        says = fence[2].strip()
        if mark and fence[1].startswith(mark) and not says:
            found.append((start, fence.end()))
            mark = ""
        elif not mark or (
            says and fence[1][0] == mark[0]
        ):  # one that says its language opens, so the last was left open
            mark, start = fence[1], fence.start()
    return found


def _is_title(block: str) -> bool:
    """Whether a block that begins with a heading has nothing but that: one line, or one that is underlined."""
    lines = block.strip().split("\n")
    return len(lines) == 1 or (len(lines) == 2 and not lines[1].strip("=- \t"))


#
# cuts within a block
#

_MARKS = ".!?…؟۔։।॥።፧"
_ENDS = re.compile(
    # in scripts with spaces: marks, whatever closes, and white space; not before a small letter, nor behind an initial
    rf"(?<![{_MARKS}])(?<![\s.][A-Z])[{_MARKS}]+[)\]}}\"'”’»›]*\s+(?=[^\sa-z]|\Z)"
    # in those without
    r"|[。！？｡][」』）”’\s]*"
    # in Burmese, Khmer and Tibetan
    r"|[။។៕།]\s*"
)
_ROW = re.compile(r"[ \t]*\|.*\|[ \t]*|[^|\n]* \| [^\n]*")
_LONG_ROW = 4000  # characters: a longer line is cut like any other text
_LINE = re.compile(r"\n(?=[^\n])")
_LINE_BEHIND_BLANK = re.compile(r"\n[ \t]*\n(?=[^\n])")


def _sentences(text: str, start: int, stop: int) -> list[int]:
    """Where sentences begin in a piece, the first one left out; none within a row of a table."""
    cuts = [found.end() for found in _ENDS.finditer(text, start, stop) if found.end() < stop]
    if not cuts or text.find("|", start, stop) < 0:
        return cuts
    outside = []
    begin, end, is_row = start, start, False  # the line
    for at in cuts:
        while at > end:
            begin = end
            end = text.find("\n", begin, stop) + 1 or stop
            is_row = end - begin <= _LONG_ROW and bool(_ROW.fullmatch(text, begin, end - (text[end - 1] == "\n")))
        if at == end or not is_row:
            outside.append(at)
    return outside


def _lines(text: str, start: int, stop: int) -> list[int]:
    """Where lines begin in a piece, the first one left out."""
    return [found.end() for found in _LINE.finditer(text, start, stop) if found.end() < stop]


def _blank_lines(text: str, start: int, stop: int) -> list[int]:
    """Where lines begin behind blank ones."""
    return [found.end() for found in _LINE_BEHIND_BLANK.finditer(text, start, stop) if found.end() < stop]


def _runs(text: str, start: int, stop: int) -> list[int]:
    """Where runs of characters begin in a line, the first one left out: where the last few of them say so, behind a space if
    there is one near."""
    cuts: list[int] = []
    least, most = _RUN
    run = start
    window = [start]
    at = start
    while at < stop:
        at = _next_grapheme(text, at, stop)
        window.append(at)
        if at - run < least:
            continue
        here = zlib.crc32(text[window[max(len(window) - 1 - _RUN_HASH, 0)] : at].encode("utf-8", "surrogatepass"))
        if here % _RUN_ONE_IN and at - run < most:
            continue
        if at >= stop:
            break
        space = next((i for i in range(at, min(at + _TO_SPACE, stop)) if text[i].isspace()), None)
        if space is not None:
            while space < stop and text[space].isspace():
                space += 1
            at = space
        if at >= stop:
            break
        cuts.append(at)
        run, window = at, [at]
    return cuts


def _middle(text: str, start: int, stop: int) -> int:
    """About the middle of a piece of two code points or more, between graphemes if it has two."""
    middle = start + (stop - start) // 2
    at = before = start
    while at < middle:
        before, at = at, _next_grapheme(text, at, stop)
    return at if at < stop else before if before > start else middle


def _next_grapheme(text: str, at: int, stop: int) -> int:
    """Where the next character as people see it begins: a letter with its marks, an emoji with what is joined to it."""
    first = text[at]
    at += 1
    most = at + _RUN[1]  # nobody sees a letter with more marks
    flag = "\U0001f1e6" <= first <= "\U0001f1ff"
    while at < min(stop, most):
        char = text[at]
        if (char < "\u0300" and not (first == "\r" and char == "\n")) or (
            char > "\u3000" and "\u3400" <= char <= "\ud7a3"
        ):
            break
        before = text[at - 1]
        joined = (
            before == "\u200d"
            or char == "\u200d"
            or "\U0001f3fb" <= char <= "\U0001f3ff"  # colours of skin
            or "\U000e0020" <= char <= "\U000e007f"  # flags of regions
            or "\u1160" <= char <= "\u11ff"  # vowels and ends of Korean syllables
            or unicodedata.category(char)[0] == "M"
            or before == "\r"
        )
        if flag and "\U0001f1e6" <= char <= "\U0001f1ff":
            joined, flag = True, False
        if not joined:
            break
        at += 1
    return at
