"""Chunks by content: they tile the text, keep their limits, and survive edits."""

from __future__ import annotations

import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf import ConfigError
from mesa_gguf.lab.documents import make_document
from mesa_gguf.library.chunking import SPARE, Span, split
from mesa_gguf.loaders import Place
from mesa_gguf.loaders.plain import markdown_places


@lru_cache(maxsize=1 << 17)
def count(text: str) -> int:
    """About what a tokenizer says: pieces of words, each other character alone."""
    return len(re.findall(r" ?[A-Za-z0-9]{1,6}|[^A-Za-z0-9\s]|\n+|\s+", text))


def chunks(text: str, places: list[Place] | None = None, **limits: int) -> list[str]:
    return [text[span.start : span.stop] for span in split(text, places or [], count, **limits)]


def check(
    text: str, spans: list[Span], count: Callable[[str], int] = count, most: int = 1024, least: int = 256
) -> None:
    """Spans are the text, and as long as they may be."""
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])][: len(spans)]
    assert (spans[-1].stop if spans else 0) == len(text)
    assert all(span.stop > span.start for span in spans)
    assert all(span.n_tokens <= most - SPARE for span in spans)
    assert all(span.n_tokens >= least for span in spans[:-1])
    for span in spans:  # by the tokenizer, as a whole
        assert count(text[span.start : span.stop]) <= span.n_tokens


#
# texts
#

WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than into them can
only other time new some could these two may first then do any like my now over such our man me even most made after also did many
river committee harvest engine window measure authority translation ambassador winter laboratory parliament""".split()


def sentence(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=max(3, int(rng.gauss(16, 7))))
    return " ".join(words).capitalize() + rng.choice([".", ".", ".", "?", "!"])


def paragraph(rng: random.Random) -> str:
    return " ".join(sentence(rng) for _ in range(max(1, int(rng.lognormvariate(1.5, 0.6)))))


def prose(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [paragraph(rng) for _ in range(n)]


def markdown(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    blocks = []
    for i in range(n):
        if rng.random() < 0.1:
            blocks.append(f"{'#' * rng.randint(1, 3)} {' '.join(rng.choices(WORDS, k=4)).title()} {i}")
        elif rng.random() < 0.1:
            blocks.append(
                "```python\n"
                + "\n".join(f"x{j} = {rng.random()}" + "\n" * rng.randint(0, 1) for j in range(12))
                + "\n```"
            )
        elif rng.random() < 0.1:
            blocks.append(
                "\n".join(f"| {rng.choice(WORDS)}. Yes | {rng.random():.4f} |" for _ in range(rng.randint(3, 30)))
            )
        else:
            blocks.append(paragraph(rng))
    return blocks


#
# the rule
#


def test_empty_and_short_texts() -> None:
    assert split("", [], count) == []
    assert split("word", [], count) == [Span(0, 4, 1)]
    assert split("\n\n \n", [], count)[0].stop == 4


def test_a_text_that_fits_is_one_chunk() -> None:
    text = "\n\n".join(prose(4))
    assert count(text) < 900
    assert chunks(text) == [text]


@pytest.mark.parametrize(("least", "most"), [(0, 1024), (900, 1024), (256, 256), (-1, 1024)])
def test_limits_that_leave_no_room_are_refused(least: int, most: int) -> None:
    with pytest.raises(ConfigError, match="no room for a border"):
        split("text", [], count, min_tokens=least, max_tokens=most)


def test_paragraphs_come_before_sentences() -> None:
    text = "\n\n".join(prose(300))
    found = chunks(text)
    assert len(found) > 20
    assert all(chunk.endswith("\n\n") for chunk in found[:-1])


def test_headings_come_before_paragraphs() -> None:
    blocks = []
    for i, body in enumerate(prose(300)):
        blocks.extend([f"# Heading {i}", body] if i % 5 == 0 else [body])
    text = "\n\n".join(blocks)
    places = markdown_places(text)
    spans = split(text, places, count)
    begins = [text[span.start : span.start + 9] for span in spans]
    assert sum(begin == "# Heading" for begin in begins) == len(spans)
    assert [span.heading for span in spans] == [
        (text[span.start + 2 : text.index("\n", span.start)],) for span in spans
    ]


def test_no_chunk_ends_with_a_heading() -> None:
    text = "\n\n".join(markdown(1500))
    places = markdown_places(text)
    titles = {text[place.start :].split("\n", 1)[0] for place in places}
    assert len(titles) > 100
    found = chunks(text, places)
    assert not [chunk for chunk in found if chunk.rstrip().rsplit("\n", 1)[-1] in titles]


def test_pages_are_told() -> None:
    pages = ["\n".join(sentence(random.Random(i * 99 + j)) for j in range(25)) + "\n" for i in range(40)]
    places, at = [], 0
    for number, page in enumerate(pages, 1):
        places.append(Place(at, number))
        at += len(page)
    spans = split("".join(pages), places, count)
    check("".join(pages), spans)
    assert spans[0].page_first == 1 and spans[-1].page_last == 40
    for span in spans:
        inside = [place.page for place in places if span.start <= place.start < span.stop]
        assert span.page_last == (inside[-1] if inside else span.page_first)
        assert (span.page_first in inside) == (span.start in [place.start for place in places])


def test_fences_are_not_cut() -> None:
    text = "\n\n".join(markdown(800))
    n = text.count("```") // 2
    assert n > 40
    found = chunks(text, markdown_places(text))
    assert all(chunk.count("```") % 2 == 0 for chunk in found)


def test_a_fence_longer_than_a_chunk_is_cut_at_its_blank_lines() -> None:
    body = "\n".join(f"value_{i} = compute({i}, {i * i})" + ("\n" if i % 10 == 9 else "") for i in range(400))
    found = chunks(f"Before.\n\n```python\n{body}\n```\n\nAfter.")
    assert len(found) > 4
    assert all(chunk.endswith("\n\n") for chunk in found[:-1])


def test_a_fence_that_is_never_closed_is_text() -> None:
    text = "```\n\n" + "\n\n".join(prose(100))
    assert all(chunk.endswith("\n\n") for chunk in chunks(text)[:-1])


def test_tables_are_cut_between_rows() -> None:
    rng = random.Random(3)
    rows = [f"| {sentence(rng)} {sentence(rng)} | {rng.random()} |\n" for _ in range(300)]
    found = chunks("".join(rows))
    assert len(found) > 5
    assert all(chunk.startswith("|") and chunk.endswith("|\n") for chunk in found)


def test_long_paragraphs_are_cut_at_sentences() -> None:
    rng = random.Random(5)
    sentences = [sentence(rng) for _ in range(400)]
    text = " ".join(sentences)
    found = chunks(text)
    assert len(found) > 5
    assert all(chunk.rstrip()[-1] in ".?!" and not chunk[0].isspace() for chunk in found)


def test_sentences_do_not_end_at_initials_or_before_small_letters() -> None:
    text = " ".join(f"J. R. Smith said no. {i} e.g. this one." for i in range(2000))
    assert all(not re.search(r"(\b[JR]|e\.g)\.\s*$", chunk) for chunk in chunks(text))


@pytest.mark.parametrize(
    "text",
    [
        "我们今天去了市场。你好吗？他说：“很好。”然后他们一起回家了！" * 400,
        "ภาษาไทยไม่มีช่องว่างระหว่างคำและไม่มีเครื่องหมายจบประโยค" * 300,
        "これは長い文です。" * 1200,
        "नमस्ते दुनिया। यह एक वाक्य है। " * 600,
        "မင်္ဂလာပါ။ " * 2000,
    ],
    ids=["chinese", "thai", "japanese", "hindi", "burmese"],
)  # fmt: skip
def test_scripts_of_all_kinds(text: str) -> None:
    spans = split(text, [], count)
    check(text, spans)
    assert len(spans) > 3
    for span in spans[1:]:
        assert unicodedata.category(text[span.start])[0] != "M", "a mark without its letter"
    if "。" in text or "।" in text:
        assert all(text[: span.stop].rstrip()[-1] in "。？！”।" for span in spans)


@pytest.mark.parametrize("piece", ["👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "한국", "e\u0301", "a\u0300\u0301\u0302"])
def test_no_border_within_what_people_see_as_one(piece: str) -> None:
    text = piece * 3000
    letters = {i for i in range(0, len(text) + 1, len(piece))}
    if piece == "한국":
        letters = set(range(len(text) + 1))
    assert {span.stop for span in split(text, [], count)} <= letters


def test_long_lines_without_sentences_are_cut_between_words() -> None:
    rng = random.Random(7)
    text = " ".join(rng.choices(WORDS, k=20_000))
    found = chunks(text)
    assert all(chunk.endswith(" ") for chunk in found[:-1])


def test_a_place_within_a_line_is_a_border_at_most() -> None:
    text = " ".join(prose(50))
    for start in (0, 1, 777, len(text) - 1, len(text), len(text) + 5):
        check(text, split(text, [Place(0), Place(start, 2, ("x",))], count))


def test_source_code_is_cut_between_definitions() -> None:
    functions = [
        f"int f{i}(int n) {{\n" + "".join(f"    n += {j} * f{i}(n - {j});\n" for j in range(12)) + "}\n"
        for i in range(60)
    ]
    assert all(chunk.startswith("int f") and chunk.endswith("}\n") for chunk in chunks("".join(functions)))


#
# properties
#

TEXTS = st.lists(
    st.one_of(
        st.text(max_size=300),
        st.sampled_from(["\n\n", "\n", "```\n", "~~~~ py\n", "| a | b. C |\n", "# Heading\n", "    ", "。", ". ", "\f", "\u0301" * 400]),
        st.builds(lambda word, n: word * n, st.text(min_size=1, max_size=4), st.integers(1, 1500)),
    ),
    max_size=20,
).map("".join)  # fmt: skip


@given(TEXTS, st.data())
def test_any_text(text: str, data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    places = [Place(start, i // 2 + 1, (f"h{i // 3}",) if i else ()) for i, start in enumerate(starts)]
    for count_ in (
        count,
        len,
        lambda piece: len(piece.encode("utf-8", "surrogatepass")),
        lambda piece: 2 * len(piece) + 1,
    ):
        spans = split(text, places, count_)
        check(text, spans, count_)
        assert spans == split(text, places, count_)


@given(TEXTS, st.integers(40, 400), st.data())
def test_any_limits(text: str, most: int, data: st.DataObject) -> None:
    room = most - SPARE - most // 8
    if room < 1:
        return
    least = data.draw(st.integers(1, room))
    check(text, split(text, [], len, max_tokens=most, min_tokens=least), len, most, least)


def test_strange_counts_end() -> None:
    text = "\n\n".join(prose(20))
    for count_ in (lambda _: 0, lambda _: 5000, lambda piece: 3000 * len(piece)):
        spans = split(text, [], count_)
        assert "".join(text[span.start : span.stop] for span in spans) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "a" * n,
        lambda n: " " * n,
        lambda n: "\n" * n,
        lambda n: "." * n,
        lambda n: ".)" * (n // 2),
        lambda n: "a\n" * (n // 2),
        lambda n: "a\n\n" * (n // 3),
        lambda n: "```\n" * (n // 4),
        lambda n: "```" + " " * n + "`",
        lambda n: "| a. B " * (n // 7),
        lambda n: "| a. B |\n" * (n // 9),
        lambda n: "\u0301" * n,
        lambda n: "\u200d" * n,
        lambda n: "🇩" * n,
        lambda n: "e. " * (n // 3),
        lambda n: "\n" + " " * (n // 2) + "\n" + "\t" * (n // 2),
    ],
)
def test_time_is_linear(make: Callable[[int], str]) -> None:
    """Four times the text takes about four times the steps; by calls and by characters counted, which a busy machine leaves alone."""

    def cost(n: int) -> tuple[int, float]:
        seen = 0

        def counted(piece: str) -> int:
            nonlocal seen
            seen += len(piece) + 1
            return len(piece)

        before = time.process_time()
        split(make(n), [], counted)
        return seen, time.process_time() - before

    small, large = cost(20_000), cost(80_000)
    assert large[0] <= 6 * small[0]
    assert large[1] < 20 * small[1] + 0.5


#
# edits
#


def changed(before: Counter[str], after: list[str]) -> int:
    """The chunks that would have to be read again."""
    return sum((Counter(after) - before).values())


def edits(
    blocks: list[str], joined: Callable[[list[str]], list[str]], n: int, seed: int, at: int | None = None
) -> list[int]:
    rng = random.Random(seed)
    before = Counter(joined(blocks))
    found = []
    for _ in range(n):
        edited = list(blocks)
        place = rng.randrange(len(blocks)) if at is None else at
        what = rng.choice(["insert", "delete", "replace"])
        if what != "insert":
            del edited[place]
        if what != "delete":
            edited.insert(place, paragraph(rng))
        found.append(changed(before, joined(edited)))
    return found


@pytest.mark.parametrize("kind", ["prose", "markdown", "generated", "one line", "long paragraphs"])
@pytest.mark.parametrize("at", [None, 0], ids=["anywhere", "at the beginning"])
def test_an_edit_changes_one_or_two_chunks(kind: str, at: int | None) -> None:
    mark = "\n\n"
    if kind == "generated":
        blocks = make_document(seed=4, n_tokens=30_000, depth=0.5).text.split("\n")
    elif kind == "markdown":
        blocks = markdown(400, seed=8)
    elif kind == "one line":
        blocks, mark = prose(300, seed=9), " "
    elif kind == "long paragraphs":
        rng = random.Random(10)
        blocks = [" ".join(sentence(rng) for _ in range(40)) for _ in range(60)]
    else:
        blocks = prose(250, seed=11)

    def joined(blocks: list[str]) -> list[str]:
        text = mark.join(blocks)
        return chunks(text, markdown_places(text) if kind == "markdown" else None)

    assert len(joined(blocks)) > 20
    n = 200 if (kind, at) == ("prose", None) else 40
    found = sorted(edits(blocks, joined, n, seed=12, at=at))
    assert found[len(found) // 2] <= 2
    assert found[int(0.95 * len(found))] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_hundred_edits(seed: int) -> None:
    blocks = markdown(1500, seed=seed)

    def joined(blocks: list[str]) -> list[str]:
        text = "\n\n".join(blocks)
        return chunks(text, markdown_places(text))

    found = sorted(edits(blocks, joined, 200, seed=seed + 100))
    assert found[100] <= 2
    assert found[190] <= 3
