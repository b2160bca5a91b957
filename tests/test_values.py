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
from mesa_gguf.reading.other_words import OtherWords
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Piece, Shelf
from mesa_gguf.reading.similar import sentences_of
from mesa_gguf.reading.values import MOST_WIDTH, Meanings, folded, of_sentences

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
def test_each_sentence_has_the_mean_of_its_tokens(parts: list[str], cuts: list[int], n_before: int) -> None:
    """Each byte of the text counts as the number of its sentence; tokens over a border belong to where their middle lies."""
    text = "".join(parts)
    data = text.encode()
    sentences = sentences_of(0, text)
    of_byte = np.zeros(len(data))
    for i, sentence in enumerate(sentences):
        start = len(text[: sentence.start].encode())
        of_byte[start : start + len(sentence.text.encode())] = i + 1
    sizes, at = [], 0
    while at < len(data):
        sizes.append(min(cuts[len(sizes) % len(cuts)], len(data) - at))
        at += sizes[-1]
    ends = np.cumsum(sizes)
    middle = of_byte[np.minimum(np.ceil(ends - np.array(sizes) / 2).astype(int), len(data) - 1)]
    sizes[0] += n_before  # a space before the text
    values = np.stack([middle, np.arange(len(sizes))], axis=1).astype(np.float32)
    found = of_sentences(text, sizes, values)
    assert found.shape == (len(sentences), 2) and found.dtype == np.float16
    np.testing.assert_allclose(found[:, 0], np.arange(1, len(sentences) + 1), atol=0.35)
    assert (np.diff(found[:, 1]) > 0).all()


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


def test_what_all_sentences_share_counts_little() -> None:
    rng = np.random.default_rng(2)
    meaning = rng.normal(size=(400, 32)).astype(np.float32)
    shared = 3 * rng.normal(size=(400, 1)) * rng.normal(size=32)
    rows = (5 + meaning + shared).astype(np.float16)
    chunks = [rows[:100], None, rows[100:130], rows[:0], rows[130:]]
    meanings = Meanings(chunks)
    usual = np.full(32, 7, np.float32)
    for i, chunk, nth in ((30, 0, 30), (110, 2, 10), (300, 4, 170)):
        found = meanings.near([usual + meaning[i]], usual)
        assert [None if own is None else len(own) for own in found] == [100, None, 30, 0, 270]
        known = [own for own in found if own is not None]
        best = np.concatenate(known)
        assert found[chunk] is not None and found[chunk][nth] == best.max() > 3
        assert abs(float(best.mean())) < 0.01 and abs(float(best.std()) - 1) < 0.01
        # of two sentences what is near to both
        twice = np.concatenate([own for own in meanings.near([usual + meaning[i]] * 2, usual) if own is not None])
        np.testing.assert_allclose(twice, 2 * best, rtol=1e-4, atol=1e-4)


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
    found = shelf.by_values(question, pieces)
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

        # they count to the budget, and not as chunks
        beside = [row for row in library.index.kept() if row.n_tokens == 0]
        assert {row.key for row in beside} == {shelf._values_key(piece) for piece in pieces} | shelf._own
        assert library.verify().n_chunks == len(pieces)

        # of a store without them, or with damaged ones, they are taken from the chunks
        library.store.remove(shelf._values_key(pieces[0]))
        path = library.store.path(shelf._values_key(pieces[1]))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        old = another()
        assert chunks_by_values(old, question, pieces) == orders[question]
        assert all(shelf._values_key(piece) in library.store for piece in pieces)

        # where nothing can be kept any more, they are held; and a question looks at few old chunks
        def full(*args: object, **kwargs: object) -> None:
            raise LibraryError("full")

        for piece in pieces:
            library.store.remove(shelf._values_key(piece))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mesa_gguf.reading.shelf.MOST_MADE", 2)
            patch.setattr(library, "keep", full)
            held = another()
            assert chunks_by_values(held, question, pieces) == []
            assert chunks_by_values(held, question, pieces) == orders[question]
        assert chunks_by_values(another(), question, pieces) == orders[question]

        # without both, the chunk was not read
        for key in (shelf.key(pieces[0]), shelf._values_key(pieces[0])):
            library.store.remove(key)
        assert sorted(chunks_by_values(another(), question, pieces)) == [1, 2, 3]


def test_what_is_lacking_is_made_where_there_is_room(llm: MesaLlama, library: Library) -> None:
    """Of chunks that are kept, and nothing is dropped or read for it."""
    catalogue = Catalogue(llm, PromptForm(llm), library)
    document = library.add_text("\n\n".join(TEXTS * 6), "text")
    assert list(catalogue.kept_pieces(document)) == []  # not cut yet
    assert len(catalogue.rows(document)) > 1
    first, *others = pieces = list(catalogue.kept_pieces(document))
    assert pieces == [catalogue.piece(document, row) for row in catalogue.rows(document)]
    shelf = Shelf(llm, catalogue)
    assert shelf.complete(first) and list(library.store.files()) == []
    shelf.read(others)
    held = llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()
    beside = [shelf._values_key(piece) for piece in others]
    rows = [library.rows(key, 0) for key in beside]
    for key in beside:
        library.store.remove(key)
    library.verify()  # the index has seen it
    library.set_budget(library.index.kept_bytes() + 1000)
    library._budget = None
    assert not shelf.complete(others[0]) and beside[0] not in library.store
    library.set_budget(10**9)
    assert all(shelf.complete(piece) for piece in pieces)
    assert [library.rows(key, 0) for key in beside] == rows
    assert (llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()) == held
    assert shelf._values_key(first) not in library.store


def test_a_collection_is_not_tokenized_for_its_values(
    small: MesaLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of what lies beside chunks are kept, as long as their texts are the same."""
    monkeypatch.setattr("mesa_gguf.reading.shelf.LEAST_NAMED", 2)
    monkeypatch.setattr("mesa_gguf.reading.shelf.MOST_WIDTH", 1)  # of one layer, so that the test is fast
    question = next(iter(QUESTIONS))
    tokenized: list[str] = []
    tokenize = PromptForm.tokenize
    monkeypatch.setattr(PromptForm, "tokenize", lambda form, text: tokenized.append(text) or tokenize(form, text))
    with Library(tmp_path) as library:

        def another() -> tuple[Shelf, list[Piece]]:
            """As a process of its own, that asks the same."""
            catalogue, pieces = pieces_of(small, library)
            shelf = Shelf(small, catalogue)
            shelf._other_words = {question: OtherWords(nothing[None], "", nothing, written, usual)}
            shelf._avoiding = {question: None}
            return shelf, pieces

        def counted() -> tuple[list[int], int]:
            shelf, pieces = another()
            tokenized.clear()
            order = chunks_by_values(shelf, question, pieces)
            return order, len({piece.text for piece in pieces} & set(tokenized))

        nothing = np.zeros(small.n_vocab(), np.float32)
        small.reset()
        small.eval(small.tokenize(b"The ferry"))
        width = small.chunk_values(small.save_chunk(0, small.n_tokens), 1).shape[1]
        written, usual = np.random.default_rng(3).normal(size=(2, width)).astype(np.float32)
        shelf, pieces = another()
        assert counted() == ([], 0)  # nothing was read, as the number of what is kept tells
        shelf.read(pieces[:2])
        counted()
        assert counted() == ([], 0)  # too few were
        shelf.read(pieces)
        order, _ = counted()
        assert sorted(order) == [0, 1, 2, 3]
        assert counted() == (order, 0)

        # a list that is damaged, or of something else, is made anew
        beside = {shelf._values_key(piece) for piece in pieces}
        chunks = {shelf.key(piece) for piece in pieces}
        kept = [row.key for row in library.index.kept() if row.n_tokens == 0]
        lists = [key for key in kept if key not in beside and len(library.store.get(key, 0) or b"") == 64 * len(pieces)]
        assert len(lists) == 1
        path = library.store.path(lists[0])
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-32], b""):
            path.write_bytes(damaged)
            assert counted() == (order, 4)
            assert path.read_bytes() == whole
            assert counted() == (order, 0)
        library.store.remove(lists[0])
        library.store.put(lists[0], 0, b"too short")
        assert counted() == (order, 4)

        # of another text it is another one: the names are those of its own tokens
        monkeypatch.setitem(globals(), "TEXTS", [*TEXTS[1:], TEXTS[0] + "The dog was well again on the next day.\n\n"])
        shelf, pieces = another()
        assert shelf._names(pieces) == [(shelf.key(piece), shelf._values_key(piece)) for piece in pieces]
        found, n = counted()
        assert sorted(found) == [0, 1, 2] and n == 0

        # nothing is lost where it cannot be kept
        def full(*args: object, **kwargs: object) -> None:
            raise LibraryError("full")

        library.store.remove(lists[0])
        monkeypatch.undo()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mesa_gguf.reading.shelf.LEAST_NAMED", 2)
            patch.setattr("mesa_gguf.reading.shelf.MOST_WIDTH", 1)
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

    def by_values(self, question: str, pieces: Sequence[Piece]) -> list[npt.NDArray[np.float32] | None]:
        found = [np.zeros(len(sentences_of(0, piece.text)), np.float32) for piece in pieces]
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
