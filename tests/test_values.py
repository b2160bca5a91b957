"""What sentences mean, by the values that are kept of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf import Library, MesaLlama
from mesa_gguf.library.store import LibraryError
from mesa_gguf.reading.citations import Passage
from mesa_gguf.reading.other_words import OtherWords
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Piece, Shelf
from mesa_gguf.reading.similar import sentences_of
from mesa_gguf.reading.values import MOST_WIDTH, N_LAYERS, Meanings, ReadChunk, Written, folded, starts_of

SENTENCES = (
    "The ferry to the northern island leaves the old harbour early. ",
    "Ünïcödé wörds are länger in bytes than they are in letters, said she. ",
    "金閣寺の庭は毎年春に新しい苔で覆われ、多くの人がそれを見に来る。",
    "A king who sat on his throne ate a soup that the cook had made. ",
)


@given(
    st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=6),
    st.lists(st.integers(1, 9), min_size=200, max_size=200),
    st.integers(0, 2),
)
def test_each_sentence_begins_with_its_first_token(parts: list[str], cuts: list[int], n_before: int) -> None:
    """Each byte of the text counts as the number of its sentence; tokens over a border belong to where their middle lies."""
    text = "".join(parts)
    data = text.encode()
    sentences = sentences_of(0, text)
    of_byte = np.zeros(len(data), int)
    for i, sentence in enumerate(sentences):
        of_byte[len(text[: sentence.start].encode()) :] = i
    sizes, at = [], 0
    while at < len(data):
        sizes.append(min(cuts[len(sizes) % len(cuts)], len(data) - at))
        at += sizes[-1]
    ends = np.cumsum(sizes)
    expected = of_byte[np.floor(ends - np.array(sizes) / 2).astype(int)]
    sizes[0] += n_before  # a space before the text
    starts = starts_of(text, sentences, np.array(sizes))
    assert len(starts) == len(sentences)
    found = np.searchsorted(starts, np.arange(len(sizes)), side="right") - 1
    assert (found[1:] == expected[1:]).all() and found[0] in (expected[0], -1 if n_before else 0)


def test_wide_values_are_folded() -> None:
    rng = np.random.default_rng(1)
    narrow = rng.normal(size=(3, MOST_WIDTH)).astype(np.float32)
    assert folded(narrow) is narrow
    common = rng.normal(size=5000)
    wide = np.stack([common, common + 0.3 * rng.normal(size=5000), rng.normal(size=5000)]).astype(np.float32)
    found = folded(wide)
    assert found.shape == (3, MOST_WIDTH)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, wide @ wide.T, atol=0.12)


def read_chunk(tokens: npt.NDArray[np.integer], values: npt.NDArray[np.float32] | None, size: int = 10) -> ReadChunk:
    """Of sentences of so many tokens."""
    return ReadChunk(tokens, np.arange(0, len(tokens), size), lambda: values)


@pytest.fixture
def meant() -> tuple[list[ReadChunk | None], npt.NDArray[np.float32]]:
    """Chunks of 100 sentences together, and the values of their tokens."""
    rng = np.random.default_rng(2)
    own = rng.normal(size=(1000, 64)).astype(np.float32)
    shared = 5 + 9 * rng.normal(size=(1000, 2)) @ rng.normal(size=(2, 64))
    rows = (own + shared).astype(np.float32)
    tokens = rng.integers(50, 400, size=1000)
    borders = [(0, 300), None, (300, 340), (340, 340), (340, 1000)]
    return [None if one is None else read_chunk(tokens[slice(*one)], rows[slice(*one)]) for one in borders], rows


def test_a_sentence_is_near_that_has_a_token_near_each(
    meant: tuple[list[ReadChunk | None], npt.NDArray[np.float32]],
) -> None:
    chunks, rows = meant
    meanings = Meanings(chunks)
    rng = np.random.default_rng(4)
    for i, chunk, nth in ((7, 0, 7), (32, 2, 2), (90, 4, 56)):
        values = rows[10 * i : 10 * i + 10][rng.permutation(10)] + 0.3 * rng.normal(size=(10, 64)).astype(np.float32)
        written = Written([1] * 10, values)  # in another order, and of tokens that stand nowhere
        found = meanings.near([written])
        assert [None if own is None else len(own) for own in found] == [30, None, 4, 0, 66]
        best = np.concatenate([own for own in found if own is not None])
        assert found[chunk] is not None and found[chunk][nth] == best.max() > 3
        assert abs(float(best.mean())) < 0.01 and abs(float(best.std()) - 1) < 0.01
        # of two sentences what is near to both
        twice = np.concatenate([own for own in meanings.near([written] * 2) if own is not None])
        np.testing.assert_allclose(twice, 2 * best, rtol=1e-4, atol=1e-4)


def test_rare_tokens_count_more(meant: tuple[list[ReadChunk | None], npt.NDArray[np.float32]]) -> None:
    chunks, rows = meant
    tokens = np.concatenate([chunk.tokens for chunk in chunks if chunk is not None])
    often = np.where(np.arange(1000) % 10 < 5, 7, tokens)  # half of all
    (found,) = Meanings([read_chunk(often, rows)]).near([Written([7, 3], rows[[101, 508]])])
    assert found is not None and found.argmax() == 50 and found[10] < found[50]


@pytest.mark.filterwarnings("error")
def test_of_damaged_wide_values_the_others_stay() -> None:
    rows = np.random.default_rng(5).normal(size=(2, 3 * MOST_WIDTH)).astype(np.float32)
    damaged = rows.copy()
    damaged[1, 7::MOST_WIDTH] = np.inf, -np.inf, np.nan
    damaged[1, 8::MOST_WIDTH] = 3e38
    found, whole = folded(damaged), folded(rows)
    assert (np.delete(found, (7, 8), axis=1) == np.delete(whole, (7, 8), axis=1)).all()


@pytest.mark.filterwarnings("error")
def test_chunks_without_sentences_are_like_nothing() -> None:
    rows = np.random.default_rng(6).normal(size=(9, 64)).astype(np.float32)
    found = Meanings([ReadChunk(np.arange(9), np.arange(0), lambda: rows), None]).near([Written([1], rows[:1])])
    assert found[0] is not None and len(found[0]) == 0 and found[1] is None


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf, 6e6])
def test_damaged_values_are_no_likeness(
    meant: tuple[list[ReadChunk | None], npt.NDArray[np.float32]], damage: float
) -> None:
    """What is read of a chunk is not checked. A chunk whose values are gone, or are of another size, is not known."""
    chunks, rows = meant
    damaged = rows[:300].copy()
    damaged[5:9, 3] = damage
    first = chunks[0]
    assert first is not None
    gone = [read_chunk(first.tokens, None), read_chunk(first.tokens, rows[:299])]
    found = Meanings([read_chunk(first.tokens, damaged), *gone, *chunks[2:]]).near([Written([1] * 10, rows[900:910])])
    assert found[0] is not None and np.isfinite(np.concatenate([own for own in found if own is not None])).all()
    assert found[1] is None and found[2] is None
    last = found[-1]
    assert last is not None and last[56] == max(own.max(initial=-9) for own in found if own is not None)
    assert Meanings(gone).near([Written([1], rows[:1])]) == [None, None]


TEXTS = [
    "The lawyer of the old town took his dog to a doctor for animals, who gave it a pill. Nobody else was there that morning at all.\n\n",
    "The ferry to the island leaves the harbour at nine in the evening. A sailor rings a bell before the ropes are taken in at last.\n\n",
    "The queen ate a soup of pumpkins on her throne every Friday. The cook who made it had learned that from his mother in the south.\n\n",
    "A thief broke into the bank and stole the gold from its safe. The police found his hat in the street behind the station later.\n\n",
]
QUESTIONS = {
    "Which medicine did the attorney's hound get from the vet?": 0,
    "Which meal was served to Her Majesty?": 2,
    "What did the burglar take out of the vault?": 3,
}


@pytest.fixture(scope="module")
def small(smollm2: Path) -> Iterator[MesaLlama]:
    llm = MesaLlama(smollm2, n_ctx=768, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


def pieces_of(llm: MesaLlama, library: Library) -> tuple[Catalogue, list[Piece]]:
    catalogue = Catalogue(llm, PromptForm(llm), library)
    documents = [library.add_text(text, f"{n}") for n, text in enumerate(TEXTS)]
    return catalogue, [catalogue.piece(one, row) for one in documents for row in catalogue.rows(one)]


def chunks_by_values(shelf: Shelf, question: str, pieces: Sequence[Piece]) -> list[int]:
    """The chunks of the sentences that are nearest by values, each once."""
    found = shelf.by_values(question, pieces, [sentences_of(i, piece.text) for i, piece in enumerate(pieces)])
    assert all(own is None or len(own) == len(sentences_of(0, piece.text)) for own, piece in zip(found, pieces))
    best = {i: float(own.max()) for i, own in enumerate(found) if own is not None}
    return sorted(best, key=lambda i: -best[i])


def test_chunks_are_found_by_values(small: MesaLlama, tmp_path: Path) -> None:
    with Library(tmp_path) as library:
        catalogue, pieces = pieces_of(small, library)
        assert len(pieces) == len(TEXTS)
        shelf = Shelf(small, catalogue)
        question = next(iter(QUESTIONS))
        assert chunks_by_values(shelf, question, pieces) == []  # nothing was read
        shelf.read(pieces[:3])
        assert (
            3 not in chunks_by_values(shelf, question, pieces) and len(chunks_by_values(shelf, question, pieces)) == 3
        )
        shelf.read(pieces)
        orders = {question: chunks_by_values(shelf, question, pieces) for question in QUESTIONS}
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders.values())
        assert sum(orders[question][0] == chunk for question, chunk in QUESTIONS.items()) >= 2

        def another() -> Shelf:
            new = Shelf(small, catalogue)
            new._other_words, new._avoiding = shelf._other_words, shelf._avoiding  # as it would ask for them again
            return new

        # another process finds the same, by what is kept
        loaded: list[str] = []
        again = another()
        rows = library.rows
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "rows", lambda key, n: loaded.append(key) or rows(key, n))
            assert chunks_by_values(again, question, pieces) == orders[question]
        assert not {shelf.key(piece) for piece in pieces} & set(loaded)

        # it can be interrupted
        class Stop(Exception):
            pass

        def stop() -> None:
            raise Stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(small, "interrupt", stop)
            with pytest.raises(Stop):
                chunks_by_values(again, question, pieces)
        assert chunks_by_values(again, question, pieces) == orders[question]

        # nothing lies beside chunks, so that those of an older version serve too; a damaged one is noticed when it is loaded
        assert {row.key for row in library.index.kept() if row.n_tokens == 0} == set(shelf._own)
        path = library.store.path(shelf.key(pieces[1]))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert len(chunks_by_values(another(), question, pieces)) == 4
        path.write_bytes(path.read_bytes()[:-1])
        assert sorted(chunks_by_values(another(), question, pieces)) == [0, 2, 3]
        with pytest.MonkeyPatch.context() as patch:  # gone between two looks
            patch.setattr(library.store, "part", lambda *args: None)
            assert another().by_values(question, pieces, [sentences_of(0, piece.text) for piece in pieces]) == []

        # what the library could not take is held
        def full(*args: object, **kwargs: object) -> None:
            raise LibraryError("full")

        for piece in pieces:
            library.store.remove(shelf.key(piece))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "keep", full)
            held = another()
            held.read(pieces)
            assert chunks_by_values(held, question, pieces) == orders[question]
            held.release()
            assert chunks_by_values(held, question, pieces) == []


def test_some_bytes_of_a_chunk(small: MesaLlama, tmp_path: Path) -> None:
    """They are those of its rows, or nothing."""
    with Library(tmp_path) as library:
        catalogue, (piece, *_) = pieces_of(small, library)
        shelf = Shelf(small, catalogue)
        shelf.read([piece])
        key, n = shelf.key(piece), len(piece.tokens)
        rows = library.rows(key, n)
        assert rows is not None
        ranges = small.chunk_values_at(n, N_LAYERS)
        assert library.store.part(key, n, ranges) == b"".join(rows[at : at + size] for at, size in ranges)
        assert library.store.part(key, n + 1, ranges) is None
        assert library.store.part(key, n, [(len(rows) - 1, 2)]) is None
        assert library.store.part(key[::-1], n, ranges) is None and library.store.part("../x", n, ranges) is None


def test_a_collection_is_not_tokenized_for_its_values(
    small: MesaLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of its chunks are kept, as long as their texts are the same."""
    monkeypatch.setattr("mesa_gguf.reading.shelf.LEAST_TOKENIZED", 2)
    question = next(iter(QUESTIONS))
    tokenized: list[str] = []
    tokenize = PromptForm.tokenize
    monkeypatch.setattr(PromptForm, "tokenize", lambda form, text: tokenized.append(text) or tokenize(form, text))
    with Library(tmp_path) as library:

        def another() -> tuple[Shelf, list[Piece]]:
            """As a process of its own, that asks the same."""
            catalogue, pieces = pieces_of(small, library)
            shelf = Shelf(small, catalogue)
            shelf._other_words = {question: OtherWords(nothing[None], "", nothing, written)}
            shelf._avoiding = {question: None}
            return shelf, pieces

        def counted() -> tuple[list[int], int]:
            shelf, pieces = another()
            tokenized.clear()
            order = chunks_by_values(shelf, question, pieces)
            return order, len({piece.text for piece in pieces} & set(tokenized))

        nothing = np.zeros(small.n_vocab(), np.float32)
        width = small.chunk_values(bytes(sum(n for _, n in small.chunk_values_at(1, N_LAYERS))), 1, N_LAYERS).shape[1]
        written = Written([1, 2], np.random.default_rng(3).normal(size=(2, width)).astype(np.float32))
        shelf, pieces = another()
        assert counted() == ([], 0)  # nothing was read, as the number of what is kept tells
        shelf.read(pieces[:2])
        counted()
        assert counted() == ([], 0)  # too few were
        shelf.read(pieces)
        order, _ = counted()
        assert sorted(order) == [0, 1, 2, 3]
        assert counted() == (order, 0)

        # what is damaged, or of something else, is made anew
        chunks = {shelf.key(piece) for piece in pieces}
        n_bytes = 4 * (len(pieces) + sum(len(piece.tokens) for piece in pieces))
        kept = [row.key for row in library.index.kept() if row.n_tokens == 0]
        lists = [key for key in kept if len(library.store.get(key, 0) or b"") == n_bytes]
        assert len(lists) == 1

        def of_one_token(token: int) -> bytes:
            """What is kept, but for one token."""
            return b"".join((whole[-n_bytes:-4], np.array([token], np.int32).tobytes()))

        path = library.store.path(lists[0])
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-32], b""):
            path.write_bytes(damaged)
            assert counted() == (order, 4)
            assert path.read_bytes() == whole
            assert counted() == (order, 0)
        for other in (
            b"too short",
            b"",
            np.array([2**31 - 1] * 8, np.int32).tobytes(),
            np.array([-1, 1, 0, 0], np.int32).tobytes(),
            *(of_one_token(token) for token in (-1, small.n_vocab(), 2**31 - 1)),
        ):
            library.store.remove(lists[0])
            library.store.put(lists[0], 0, other)
            assert counted() == (order, 4)

        # of another text they are others: a chunk goes by its own tokens
        monkeypatch.setitem(globals(), "TEXTS", [*TEXTS[1:], TEXTS[0] + "The dog was well again on the next day.\n\n"])
        shelf, pieces = another()
        assert [ids.tolist() for ids in shelf._tokens_of(pieces)] == [piece.tokens for piece in pieces]
        found, n = counted()
        assert sorted(found) == [0, 1, 2] and n == 0

        # nothing is lost where they cannot be kept
        def full(*args: object, **kwargs: object) -> None:
            raise LibraryError("full")

        library.store.remove(lists[0])
        monkeypatch.undo()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mesa_gguf.reading.shelf.LEAST_TOKENIZED", 2)
            patch.setattr(library, "keep", full)
            shelf, pieces = another()
            assert chunks_by_values(shelf, question, pieces) == order
        assert lists[0] not in library.store and all(key in library.store for key in chunks)


class Believing:
    """A model that takes the second sentence of the fourth chunk for the answer, so surely, and finds the question likely behind passages that
    have a word."""

    def __init__(self, surely: float, word: str) -> None:
        self.surely, self.word = surely, word
        self.asked: list[str] = []

    def other_words(self, question: str) -> None:
        return None

    def likelihoods(self, question: str, passages: Sequence[str]) -> list[float]:
        self.asked = list(passages)
        return [-1.0 if self.word in passage else -9.0 for passage in passages]

    def by_values(
        self, question: str, pieces: Sequence[Piece], sentences: Sequence[Sequence[Passage]]
    ) -> list[npt.NDArray[np.float32] | None]:
        found = [np.zeros(len(own), np.float32) for own in sentences]
        found[3][1] = self.surely
        return [*found[:1], None, *found[2:]]  # of the second chunk nothing is known


@pytest.mark.parametrize(
    ("likely", "score", "first"),
    [
        ("hat in the street", 3.0, 3),  # behind what the values found
        ("lawyer", 3.0, 0),  # behind what the words found
        ("lawyer", 12.0, 0),  # whatever stands out more
        ("nowhere", 99.0, 3),  # behind none of them more than behind the others: what stands out most
        ("nowhere", -9.0, 0),
    ],
)
def test_words_and_values_find_passages_and_the_likelihood_decides(
    smollm2: Path, tmp_path: Path, likely: str, score: float, first: int
) -> None:
    """Near words find the lawyer, values the hat of the thief."""
    vocabulary = load_vocabulary(smollm2)
    question = "Which attorney?"
    with Library(tmp_path) as library:
        catalogue = Catalogue(vocabulary, PromptForm(vocabulary), library)
        documents = [library.add_text(text * 3, f"{n}") for n, text in enumerate(TEXTS)]
        assert [piece.document for piece in catalogue.select(question, documents, 1).pieces] == [documents[0]]
        model = Believing(score, likely)
        selection = catalogue.select(question, documents, 1, model=model)
        assert [piece.document for piece in selection.pieces] == [documents[first]]
        assert selection.compared == len(model.asked) == len(set(model.asked))
        # the sentence is compared with what stands around it
        assert any("his hat in the street behind the station later." in passage for passage in model.asked)
        assert any("The lawyer of the old town" in passage for passage in model.asked)
        assert catalogue.select(question, documents, "all", model=model).pieces[-1].document == documents[first]
        # where the question's own words are enough, neither is asked for
        model.asked.clear()
        known = catalogue.select("When does the ferry leave the harbour?", documents, 200, model=model)
        assert [piece.document for piece in known.pieces[-1:]] == [documents[1]]
        assert known.compared == 0 and not model.asked
