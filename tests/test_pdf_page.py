"""Pages of a PDF as pictures, and where on them a passage lies."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from make_documents import pdf
from mesa_gguf.errors import DocumentError
from mesa_gguf.loaders import Limits, load_bytes
from mesa_gguf.loaders.pdf_page import _span, draw_page, find_on_page

LINES = (
    ["The harbour was closed in March.", "It was opened again."],
    ["It rained on Monday until", "noon. The count was 12.", "It rained on Monday until", "noon. The count was 34."],
)
FILE = pdf(LINES)
TEXT = load_bytes(FILE, "log.pdf")


def ink(number: int) -> np.ndarray:
    """Where the picture of a page is dark."""
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(draw_page(FILE, "log.pdf", number))).convert("L")) < 128


def covered(number: int, passage: str, before: str = "") -> np.ndarray:
    """What the rectangles of a passage cover of that picture."""
    page = find_on_page(FILE, "log.pdf", number, passage, before=before)
    dark = ink(number)
    scale = dark.shape[1] / page.width
    mask = np.zeros_like(dark)
    for left, top, width, height in page.rectangles:
        mask[
            int(top * scale) - 1 : int((top + height) * scale) + 2,
            int(left * scale) - 1 : int((left + width) * scale) + 2,
        ] = True
    return mask


def test_a_picture_shows_the_page() -> None:
    dark = ink(1)
    assert dark.shape == (round(1400 * 792 / 612), 1400)
    rows = np.flatnonzero(dark.any(axis=1))
    assert 0.08 < rows[0] / dark.shape[0] < rows[-1] / dark.shape[0] < 0.15  # two lines at the page's upper end


def test_all_text_of_a_page_is_all_ink_of_it() -> None:
    first = TEXT.text[: TEXT.places[1].start]
    assert not (ink(1) & ~covered(1, first)).any()


def test_a_passage_over_two_lines_has_a_rectangle_on_each() -> None:
    page = find_on_page(FILE, "log.pdf", 2, "on Monday until\nnoon.", before="It rained ")
    (left, top, _, height), (left2, top2, *_) = page.rectangles
    assert left > 72 + 40 and abs(left2 - 72) < 2 and top2 > top + height / 2
    assert (page.number, page.pages, page.width, page.height) == (2, 2, 612, 792)


def test_the_same_words_elsewhere_are_not_marked() -> None:
    words = "It rained on Monday until\nnoon."
    first = find_on_page(FILE, "log.pdf", 2, words, before="").rectangles
    second = find_on_page(FILE, "log.pdf", 2, words, before=f"{words} The count was 12.\n").rectangles
    assert first[0][1] < second[0][1] and len(first) == len(second) == 2


def test_what_is_not_on_the_page_is_not_marked() -> None:
    assert find_on_page(FILE, "log.pdf", 1, "The count was 12.").rectangles == ()
    assert find_on_page(FILE, "log.pdf", 1, " \n").rectangles == ()


def test_the_words_of_a_page_lie_where_they_are_shown() -> None:
    page = find_on_page(FILE, "log.pdf", 2)
    assert [text for *_, text in page.lines] == LINES[1]
    dark = ink(2)
    scale = dark.shape[1] / page.width
    for left, top, width, height, _ in page.lines:
        rows, columns = (slice(int(a * scale), int((a + n) * scale)) for a, n in ((top, height), (left, width)))
        inside = np.flatnonzero(dark[rows, columns].any(axis=0))
        assert dark[rows, columns].any() and inside[-1] - inside[0] > 0.95 * (columns.stop - columns.start)
        dark[rows, columns] = False
    assert not dark.any()


def test_columns_are_apart() -> None:
    row = b"BT /F1 12 Tf 72 720 Td (Left words) Tj 300 0 Td (right words) Tj ET"
    content = pdf([["one line"]]).replace(b"BT /F1 12 Tf 72 720 Td 14 TL (one line) Tj T* ET", row)
    lines = find_on_page(content, "columns.pdf", 1).lines
    assert [text.strip() for *_, text in lines] == ["Left words", "right words"]
    assert lines[0][0] + lines[0][2] < 200 and lines[1][0] > 350


def test_a_page_that_is_turned_has_its_words_turned() -> None:
    content = FILE.replace(b"/Type /Page ", b"/Type /Page /Rotate 90 ")
    page = find_on_page(content, "turned.pdf", 1)
    assert (page.width, page.height) == (792, 612) and sorted(text for *_, text in page.lines) == LINES[0][::-1]
    assert all(height > 2 * width for _, _, width, height, _ in page.lines)


@pytest.mark.parametrize("width", [1, 700, 4200, 10_000])
def test_a_picture_is_as_wide_as_it_should_be(width: int) -> None:
    image = pytest.importorskip("PIL.Image")
    drawn = image.open(io.BytesIO(draw_page(FILE, "log.pdf", 1, width)))
    assert drawn.width <= min(width, 4200) and drawn.width * drawn.height <= 16_100_000
    assert drawn.width >= min(width, 3500)


@pytest.mark.parametrize(
    ("data", "number", "said"),
    [(FILE, 3, "has no page 3"), (FILE, 0, "has no page 0"), (b"%PDF-1.4 and no more", 1, "damaged or locked"),
     (pdf(LINES, password="secret"), 1, "damaged or locked")],
)  # fmt: skip
def test_what_cannot_be_shown_is_told(data: bytes, number: int, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        find_on_page(data, "log.pdf", number, "harbour")
    with pytest.raises(DocumentError, match=said):
        draw_page(data, "log.pdf", number)


def test_a_page_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(DocumentError, match="not read in time"):
        draw_page(FILE, "log.pdf", 1, limits=Limits(seconds=0.001))


WORDS = st.lists(st.text("abß-\x02\u00ad\nſ é😀", min_size=0, max_size=6), min_size=1, max_size=12)


@given(WORDS, st.data())
def test_every_passage_is_found_where_it_is(words: list[str], data: st.DataObject) -> None:
    text = " ".join(words)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    span = _span(list(text), text[start:stop], text[:start])
    bare = [
        n
        for n in range(start, stop)
        if text[n].isprintable() and not text[n].isspace() and text[n] not in "-\x02\u00ad"
    ]
    assert span == ((bare[0], bare[-1] + 1) if bare else None)
