"""Questions in other words than their answers: word vectors, passages that are near, and what the model makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import BUNDLED
from mesa_gguf import Library, MesaLlama, Reader, _core
from mesa_gguf.lab.documents import is_right, make_document
from mesa_gguf.lab.facts import Haystack, default_text
from mesa_gguf.lab.facts import make_document as make_real_document
from mesa_gguf.library.index import terms_of
from mesa_gguf.reading.other_words import OtherWords, Thesaurus, _begins
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Piece, Shelf
from mesa_gguf.reading.similar import TABLE, Near, SimilarPassages, WordVectors, evidence, names_of

WORDS = "boat ferry island harbour depart leave hour time king throne soup broth".split()


@pytest.mark.parametrize("name", ["mesa-reader-q4_0.gguf", "mesa-reader-q8_0.gguf"])
def test_rows_are_those_of_the_file(name: str) -> None:
    path = BUNDLED.parent / name
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == TABLE)
    table = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    ids = [0, len(table) - 1, 7, 7]
    rows = _core.tensor_rows(str(path), TABLE, ids)
    assert rows is not None
    np.testing.assert_allclose(rows, table[ids], rtol=1e-5, atol=1e-6)
    assert _core.tensor_rows(str(path), "no such tensor", ids) is None
    for bad in (-1, len(table)):
        with pytest.raises(ValueError, match=f"and no row {bad}"):
            _core.tensor_rows(str(path), TABLE, [bad])


def test_files_that_are_no_models_have_no_rows(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        _core.tensor_rows(str(tmp_path / "none.gguf"), TABLE, [0])
    (tmp_path / "cut.gguf").write_bytes(BUNDLED.read_bytes()[:200_000])
    with pytest.raises(RuntimeError):
        _core.tensor_rows(str(tmp_path / "cut.gguf"), TABLE, [1999])


def test_word_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    form = PromptForm(load_vocabulary(BUNDLED))
    vectors = WordVectors(BUNDLED, form.vocabulary.n_vocab(), form.tokenize)
    found = vectors.of([*WORDS, WORDS[0]])
    assert found is not None
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-4)
    assert np.array_equal(found[0], found[-1])
    # what is remembered does not change what is found
    monkeypatch.setattr("mesa_gguf.reading.similar.N_CACHED", 5 * found.shape[1])
    few = WordVectors(BUNDLED, form.vocabulary.n_vocab(), form.tokenize)
    for n in (2, 4, len(WORDS), 3):
        # to rounding: BLAS computes few rows otherwise than many on some machines
        np.testing.assert_allclose(few.of(WORDS[:n]), found[:n], atol=1e-6)  # type: ignore[arg-type]
        assert len(few._kept) <= 5
    assert vectors.of([]).shape == (0, found.shape[1])  # type: ignore[union-attr]


class Same(WordVectors):
    """Words that begin with the same two letters mean the same."""

    def __init__(self) -> None:
        pass

    def of(self, words: Sequence[str]) -> Any:
        table = np.random.default_rng(1).normal(size=(4096, 64)).astype(np.float32)
        rows = table[[hash_of(word[:2]) for word in words]]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[:4], "little") * 2654435761 % 2**32 % 4096


FILLER = (
    "It rained on Monday and the market closed at noon. The bread was good, and nobody came to see the old bridge. "
)


def nearest(similar: SimilarPassages, question: str, vectors: Any, other: OtherWords | None = None) -> list[Near]:
    scores = similar.scores(question, vectors, other)
    return [] if scores is None else similar.best(scores)


def test_the_nearest_passage_has_other_words() -> None:
    texts = [FILLER * 5, f"{FILLER * 3}A ferry leaves the island at nine. {FILLER * 2}", FILLER * 4]
    similar = SimilarPassages(texts)
    scores = similar.scores("feast leather islam?", Same())
    assert scores is not None
    found = similar.best(scores)
    assert found[0].source == 1 and "ferry" in found[0].text and scores[found[0].number] == scores.max() > 0
    assert similar.best(scores, 1) == found[:1]
    assert {one.source for one in similar.best(scores, 100)} == {0, 1, 2} != {one.source for one in found}
    assert nearest(SimilarPassages([]), "Who?", Same()) == []
    assert nearest(SimilarPassages(["…", " \n"]), "Who?", Same()) == []


@given(st.lists(st.text("abc é漢.\n", max_size=60), max_size=6), st.text("abc é漢?", max_size=20))
def test_nearest_passages_of_any_text(texts: list[str], question: str) -> None:
    """Each text at most three times, in order, by passages of its own."""
    similar = SimilarPassages(texts)
    near = similar.scores(question, Same())
    found = [] if near is None else similar.best(near)
    assert max(Counter(one.source for one in found).values(), default=0) <= 3
    assert near is None or all(one.text in texts[one.source] and near[one.number] > 0 for one in found)
    scores = [] if near is None else [near[one.number] for one in found]
    assert scores == sorted(scores, reverse=True)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), st.lists(st.sampled_from(WORDS), max_size=6))
def test_evidence(asked: list[str], there: list[str]) -> None:
    question = " ".join(asked)
    found = evidence(question, [" ".join(there)], 10, lambda word: 1)
    expected = len(set(asked) & set(there)) / len(set(asked))
    assert found == pytest.approx(expected)
    # a word of every text says less than one of none
    assert evidence("king throne", ["king"], 10, lambda word: 10 if word == "king" else 0) < 0.2
    assert evidence("", ["king"], 10, lambda word: 1) == 1
    # two rare ones in one passage are enough, unless they are few of what is asked
    often = {"hair": 3, "ears": 4}
    texts = ["Her ears were under the hair."]
    assert evidence("hair over both ears, violet curls", texts, 100, lambda word: often.get(word, 2)) == 1
    long = "hair over both ears, violet curls, golden shoes, linen coats"
    assert evidence(long, texts, 100, lambda word: often.get(word, 0)) < 0.3


def test_a_name_is_evidence() -> None:
    """Two words that few texts have, in one passage; whatever else is asked."""
    question = "For how many of these does the text state an age: Mara Lind, Otto Falk and Ines Brandt?"

    def found_in(word: str) -> int:
        return {"mara": 1, "lind": 2, "otto": 1, "falk": 0, "ines": 0, "brandt": 0}.get(word, 40)

    assert evidence(question, [f"{FILLER}Mara Lind was there."], 50, found_in) == 1
    assert evidence(question, [f"Mara came. {FILLER * 4}Nobody was there."], 50, found_in) < 0.4


def test_names() -> None:
    for question, expected in (
        ("Which attorney spoke for Mara Lind?", {"mara", "lind"}),
        ("For how many is there a mayor: Fernwick and Cold-Mere?", {"fernwick", "cold", "mere"}),
        ("Where does B123 go? In May", {"b123", "may"}),
        ("Qui était Élodie ?", {"élodie"}),
        ("Who leads? Nobody. 漢字", set()),
    ):
        assert names_of(question).keys() == expected
    assert names_of("Who is Élodie?") == {"élodie": "Élodie"}
    # one of them is some evidence, two are enough, wherever they stand; those that the texts have not are none
    question = (
        "For how many of these does the text state a mayor: Fernwick, Coldmere, Amberdale, Gorsefell and Hazelham?"
    )

    def found_in(word: str) -> int:
        return 1 if word in ("fernwick", "coldmere") else 0 if word.endswith(("dale", "fell", "ham")) else 40

    texts = [f"{FILLER}It was in Fernwick.", FILLER, f"The fair in Coldmere. {FILLER}"]
    assert evidence(question, texts, 50, found_in) == 1
    assert 0.2 < evidence(question, texts[:2], 50, found_in) < 0.4
    assert evidence(question, texts[1:2], 50, found_in) < 0.2


# what the model makes of a question


@pytest.fixture(scope="module")
def small(smollm2: Path) -> Iterator[MesaLlama]:
    llm = MesaLlama(smollm2, n_ctx=768, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


def test_other_words(small: MesaLlama, tmp_path: Path) -> None:
    """The model knows words for words, whichever question was asked before, and from what is kept as from the examples."""
    form = PromptForm(small)
    with Library(tmp_path) as library:
        catalogue = Catalogue(small, form, library)
        shelf = Shelf(small, catalogue)
        question = "Which attorney healed the hound?"
        found = shelf.other_words(question)
        assert found is not None and found.likely.shape == (3, small.n_vocab())

        def rank(row: Any, word: str) -> int:
            return int((row > row[form.tokenize(f" {word}")[0]]).sum())

        assert rank(found.likely[0], "lawyer") < 20 and rank(found.likely[2], "dog") < 20
        assert rank(found.likely[0], "dog") > 100 and rank(found.likely[2], "lawyer") > 100
        assert len(found.expected) == small.n_vocab() and 0 < len(form.tokenize(found.sentence)) <= 20
        assert shelf.other_words(question) is found
        assert found.written is not None and len(found.written.tokens) == len(found.written.values) <= 20
        assert shelf.other_words("Why? " * 300) is None

        # kept: another process reads no examples
        (key,) = [row.key for row in library.index.kept()]
        again = Shelf(small, catalogue)
        learned: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Thesaurus, "learn", lambda self: learned.append(1))
            other = again.other_words(question)
        assert other is not None and not learned
        assert other.sentence == found.sentence
        np.testing.assert_allclose(other.likely, found.likely, atol=0.01)

        # a damaged file is read again
        path = library.store.path(key)
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        mended = Shelf(small, catalogue).other_words(question)
        assert mended is not None
        np.testing.assert_allclose(mended.likely, found.likely, atol=0.01)


def test_a_sentence_without_the_words_of_the_question(small: MesaLlama) -> None:
    """It is another one, whose words are none of those, nor forms of them."""
    said: list[str] = []
    thesaurus = Thesaurus(small, PromptForm(small).tokenize, small.train_length)
    small.reset()
    thesaurus.learn()
    write = thesaurus._write

    def written(*args: Any) -> Any:
        found = write(*args)
        said.append(found[0])
        return found

    thesaurus._write = written  # type: ignore[method-assign]
    for question in ("How did the woman who helps at births get there?", "Where did the secret agent live?"):
        said.clear()
        other, avoiding = thesaurus.ask(question), thesaurus.avoiding(question)
        asked = terms_of(question)
        first, second = (terms_of(sentence) for sentence in said)
        assert other.sentence == said[0] and first != second
        assert second and not set(second) & set(asked)
        assert not any(own.startswith(word[:5]) for own in second for word in asked if len(word) > 5)
        for one, sentence in ((other.written, said[0]), (avoiding, said[1])):
            assert one is not None and len(one.tokens) == len(one.values)
            text = b"".join(small.token_bytes(token) for token in one.tokens).decode()
            assert text.strip() == sentence
    assert _begins(b" births", ["births"]) and _begins(b" birth", ["births"]) and _begins(b" helping", ["helped"])
    assert not any(_begins(piece, ["births", "ship"]) for piece in (b" bird", b" bi", b"ship", b"\xff", b""))


def test_other_words_bring_a_passage_forward() -> None:
    """What the model says of a word counts for the texts that have what it says."""
    texts = [f"{FILLER}The king sat on it.", f"{FILLER}A lawyer spoke in the soup.", FILLER]
    tokens = {word: i for i, word in enumerate(sorted({w for text in texts for w in terms_of(text)}))}

    class Vectors(Same):
        def beginnings(self, words: Sequence[str]) -> Any:
            return np.array([tokens[word] for word in words]), np.ones(len(words), np.float32)

    rows = np.zeros((1, len(tokens)), np.float32)
    rows[0, tokens["lawyer"]] = 12
    nothing = np.zeros(len(tokens), np.float32)
    similar = SimilarPassages(texts)
    assert nearest(similar, "zz?", Vectors()) == []
    (found,) = nearest(similar, "zz?", Vectors(), OtherWords(rows, "", nothing))
    assert found.source == 1 and "lawyer" in found.text
    (found,) = nearest(similar, "zz?", Vectors(), OtherWords(0 * rows, "", rows[0]))
    assert found.source == 1
    (found,) = nearest(similar, "zz?", Vectors(), OtherWords(0 * rows, "kilt", nothing))
    assert found.source == 0


def test_passages_are_sentences_with_their_neighbours() -> None:
    text = (
        "A first sentence of some length stands here at the beginning. "
        + FILLER
        + "A last one of some length stands at its end."
    )
    for near in nearest(SimilarPassages([text]), "lain firm larva", Same()):
        assert near.text in text and len(near.text) <= 200


# in a library


def test_questions_in_other_words(smollm2: Path, tmp_path: Path) -> None:
    """Eight sentences in 24,000 characters of a manual, each asked for in words that it has not."""
    made = make_real_document(
        Haystack(default_text()[20_000:44_000]), 5, n_unlike=8, n_alike=0, n_links=0, n_counts=0, n_absent=0
    )
    vocabulary = load_vocabulary(smollm2)
    with Library(tmp_path / "library") as library:
        document = library.add_text(made.text, "manual")
        catalogue = Catalogue(vocabulary, PromptForm(vocabulary), library)
        first = {row.id: made.text[row.start : row.stop] for row in catalogue.rows(document)}
        n_found = n_matched = 0
        for question in made.questions:
            fact = made.facts[question.facts[0]].sentence
            (piece, *_) = catalogue.select(question.text, [document], 1).pieces
            if question.form == "literal":
                assert fact in piece.text
                continue
            assert not set(terms_of(question.text)) & set(terms_of(fact))
            ((matched, _),) = library.index.search(question.text, catalogue._cut, [document.id], 1) or [(0, 0.0)]
            n_found += fact in piece.text
            n_matched += fact in first.get(matched, "")
        assert n_found >= 4 > n_matched


MADE = make_document(4711, 4000, n_facts=8)


@pytest.fixture
def library(library: Library) -> Library:
    library.add_text(MADE.text, "log")
    return library


STRANGE = "Which zebra xylophone gleams quietly?"


class Liking:
    """A model that finds the question likely after one of the passages."""

    best = 0

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def other_words(self, question: str) -> OtherWords | None:
        return None

    def likelihoods(self, question: str, passages: Sequence[str]) -> list[float]:
        self.asked.append(list(passages))
        return [1e3 * (n == self.best) for n in range(len(passages))]

    def by_values(self, question: str, pieces: Sequence[Piece], sentences: object) -> list[Any]:
        return []


def test_auto_reads_more_where_the_words_tell_little(
    llm: MesaLlama, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesa_gguf.reading.shelf.AUTO_TOKENS", 1000)
    monkeypatch.setattr("mesa_gguf.reading.shelf.MOST_AUTO_TOKENS", 2000)
    catalogue = Catalogue(llm, PromptForm(llm), library)
    documents = library.documents()
    for question, budget in ((MADE.facts[0].question, 1000), (STRANGE, 2000)):
        for room in (None, 10_000, 1500, 700):
            auto = catalogue.select(question, documents, "auto", room=room)
            same = catalogue.select(question, documents, budget if room is None else min(budget, room))
            assert auto.pieces == same.pieces
            assert auto.n_tokens <= budget
    assert catalogue.select(STRANGE, documents, "auto").n_tokens > 1000
    assert catalogue.select(STRANGE, documents, 1000).n_tokens <= 1000  # a number is what it says


def test_the_likeliest_passage_comes_first(llm: MesaLlama, library: Library) -> None:
    catalogue = Catalogue(llm, PromptForm(llm), library)
    documents = library.documents()
    model = Liking()
    for model.best in (0, 3):
        selection = catalogue.select(STRANGE, documents, 1, model=model)
        assert len(model.asked[-1]) == selection.compared > model.best
        assert " ".join(model.asked[-1][model.best].split()) in " ".join(selection.pieces[0].text.split())
    assert model.asked[0] == model.asked[1]
    # not for a question in the text's own words, nor where every chunk is read alone
    for question, mode in ((MADE.facts[0].question, "auto"), (STRANGE, "each")):
        assert catalogue.select(question, documents, mode, model=model).compared == 0  # type: ignore[arg-type]
    assert len(model.asked) == 2
    # where everything is read, its chunk is the last one
    selection = catalogue.select(STRANGE, documents, "all", model=model)
    assert len(selection.pieces) == selection.of_chunks and selection.compared > model.best
    assert " ".join(model.asked[-1][model.best].split()) in " ".join(selection.pieces[-1].text.split())


def test_likelihoods_are_remembered(llm: MesaLlama, library: Library) -> None:
    """An interruption loses one passage at most, and the context is as good as before."""
    reader = Reader(llm, library, cite_by="words")
    assert reader.shelf is not None
    expected = reader.ask(MADE.facts[0].question, read=500).answer
    assert is_right(MADE.facts[0], expected.text)
    steps: list[tuple[int, int]] = []

    def stop(done: int, of: int) -> None:
        steps.append((done, of))
        raise KeyboardInterrupt

    for n in range(3):
        with pytest.raises(KeyboardInterrupt):
            reader.ask(STRANGE, read=400, progress=stop).answer  # noqa: B018
        assert len(reader.shelf._likelihoods) == n + 1
    assert [of for _, of in steps] == sorted({of for _, of in steps}, reverse=True)
    assert reader.ask(MADE.facts[0].question, read=500).answer.tokens == expected.tokens
    answer = reader.ask(STRANGE, read=400).answer
    assert answer.read is not None and answer.read.compared == len(reader.shelf._likelihoods) > 3
    assert f"of {answer.read.compared} passages" in str(answer.read)
    n_before = len(reader.shelf._likelihoods)
    assert reader.ask(STRANGE, read=400).answer.tokens == answer.tokens
    assert len(reader.shelf._likelihoods) == n_before


def test_likelihoods_are_those_of_the_question(llm: MesaLlama, library: Library) -> None:
    """log p(question | passage), with nothing else in the context."""
    reader = Reader(llm, library)
    assert reader.shelf is not None
    question, passage = MADE.facts[0].question, "The bread was good."
    (found, other) = reader.shelf.likelihoods(question, [passage, MADE.text[:200]])
    form, llm_tokens = reader.form, reader.shelf.catalogue.preamble
    before, asked = form.tokenize("\n\nQuestion:"), form.tokenize(f"\n\nQuestion: {question}")
    llm.reset()
    values = llm.log_likelihoods([*llm_tokens, *form.tokenize(passage), *asked])
    assert found == pytest.approx(float(values[-(len(asked) - len(before)) :].sum()), rel=0.01)
    assert found != other
    reader.shelf.forget()
    # a question that leaves no room for passages is not looked at
    assert reader.shelf.likelihoods("Why? " * 1000, [passage]) == [0.0]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, None])
def test_a_model_without_its_table_still_selects(
    llm: MesaLlama, library: Library, monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    """The file is gone, is another one by now, or has the table elsewhere."""

    def gone(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(_core, "tensor_rows", gone)
    catalogue = Catalogue(llm, PromptForm(llm), library)
    selection = catalogue.select(STRANGE, library.documents(), 1, model=Liking())
    assert len(selection.pieces) == 1 and selection.compared == 0


def test_names_that_no_document_has(library: Library, llm: MesaLlama) -> None:
    """They are said, whatever is read."""
    reader = Reader(llm, library, cite_by="words")
    known = MADE.facts[0].key
    for mode in ("auto", "all", 400):
        read = reader.ask(f"What is said of {known} and Zaphod B77?", read=mode, max_tokens=2).answer.read  # type: ignore[arg-type]
        assert read is not None
        assert read.notes == ("the documents do not have these words of the question: Zaphod, B77",)
        read = reader.ask(f"What is said of {known}?", read=mode, max_tokens=2).answer.read  # type: ignore[arg-type]
        assert read is not None and read.notes == ()
