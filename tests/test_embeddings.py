"""An embedding model as an extra: its vectors, what is kept of them, and sentences that are found by nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import llama_cpp
import numpy as np
import pytest

import arch_models
from conftest import BUNDLED, ModelPath, worst
from make_models import write_bert, write_synonyms
from mesa_gguf import ConfigError, EmbeddingModel, Library, MesaLlama, ModelError, Reader, cli
from mesa_gguf.lab.documents import make_document
from mesa_gguf.library.store import LibraryError
from mesa_gguf.reading.embeddings import Embeddings, prefixes_of
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.shelf import Catalogue, Model, Piece, Selection, Shelf
from mesa_gguf.reading.similar import sentences_of
from mesa_gguf.server.run import _reader

ONE = dict(n_threads=1, n_threads_batch=1)
NONE, MEAN, CLS, LAST, RANK = range(5)  # enum llama_pooling_type
WORDS = "the a lawyer attorney dog hound took his doctor vet ferry island".split()
TEXTS = ["The lawyer took his dog", "the ferry", "a vet took the island ferry " * 6]


def stock(path: Path, pooling_type: int, texts: list[str]) -> Any:
    """Each text alone, by llama_cpp.Llama."""
    options = dict(n_ctx=512, n_batch=512, n_ubatch=512, flash_attn=True, verbose=False, **ONE)
    llm = llama_cpp.Llama(str(path), embedding=True, pooling_type=pooling_type, **options)
    try:
        return [llm.embed(text, normalize=True) for text in texts]
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("said", "pooling_type"),
    [({}, MEAN), ({"pooling_type": NONE}, MEAN), ({"pooling_type": CLS}, CLS), ({"pooling_type": LAST}, LAST)],
)
def test_an_encoder_embeds_as_llama_does(tmp_path: Path, said: dict[str, int], pooling_type: int) -> None:
    path = write_bert(tmp_path / "bert.gguf", words=WORDS, **said)
    with EmbeddingModel(path, **ONE) as model:
        found = model.embed(TEXTS)  # beside each other in one batch
        assert worst(found, stock(path, pooling_type, TEXTS)) < 1e-5
        assert worst(np.linalg.norm(found, axis=1), 1) < 1e-6
        many = model.embed(TEXTS * 30)  # in several
        assert worst(many, np.tile(found, (30, 1))) < 1e-5


@pytest.mark.parametrize("pooling_type", [CLS, LAST])
def test_long_texts_are_cut(tmp_path: Path, pooling_type: int) -> None:
    """To the trained length of 128 tokens, behind which BERT has no positions. The token that ends a text stays."""
    path = write_bert(tmp_path / "bert.gguf", words=WORDS, pooling_type=pooling_type)
    with EmbeddingModel(path, **ONE) as model:
        long, fits, nothing = model.embed(["dog hound " * 500, "dog hound " * 63, ""])
        assert worst(long, fits) < 1e-6
        assert abs(float(np.linalg.norm(nothing)) - 1) < 1e-6  # of the tokens around it


def test_a_decoder_embeds_as_llama_does() -> None:
    """The bundled model says nothing of how: the mean."""
    texts = ["The door code of Mara Lind is 4711.", "x", "Olaf Berg lives in Kiel. " * 20]
    with EmbeddingModel(BUNDLED, **ONE) as model:
        assert worst(model.embed(texts), stock(BUNDLED, MEAN, texts)) < 1e-3


@pytest.mark.parametrize(
    ("names", "query", "passage"),
    [
        ({"name": "nomic-embed-text-v1.5"}, "search_query: ", "search_document: "),
        ({"name": "Nomic Embed Text v2 Moe"}, "search_query: ", "search_document: "),
        ({"basename": "multilingual-e5"}, "", ""),
        ({"name": "Multilingual E5 Small", "basename": "multilingual-e5"}, "query: ", "passage: "),
        ({"name": "e5-base-v2"}, "query: ", "passage: "),
        ({"name": "multilingual-e5-large-instruct"}, "", ""),
        ({"name": "bge-small-en-v1.5"}, "Represent this sentence for searching relevant passages: ", ""),
        ({"name": "Bge Large En v1.5"}, "Represent this sentence for searching relevant passages: ", ""),
        ({"name": "bge-m3"}, "", ""),
        ({"name": "snowflake-arctic-embed-l-v2.0"}, "", ""),
        ({"name": "Embeddinggemma 300M"}, "task: search result | query: ", "title: none | text: "),
        ({"name": "all-MiniLM-L6-v2"}, "", ""),
        ({}, "", ""),
    ],
)
def test_what_stands_before_texts_of_known_families(names: dict[str, str], query: str, passage: str) -> None:
    assert prefixes_of({f"general.{key}": name for key, name in names.items()}) == (query, passage)


def test_what_stands_before_texts_counts(tmp_path: Path) -> None:
    path = write_synonyms(tmp_path / "e.gguf", [("query", "dog"), ("passage", "ferry")], general__name="e5-small-v2")
    with EmbeddingModel(path, **ONE) as known:
        assert worst(known.of_question("nothing"), known.embed(["dog"])[0]) < 1e-6
        assert worst(known.of_sentences("nothing"), known.embed(["ferry"])) < 1e-3
    with EmbeddingModel(path, query="", passage="dog ", **ONE) as given:
        assert worst(given.of_question("nothing"), 0) == 0
        assert worst(given.of_sentences("nothing"), given.embed(["dog"])) < 1e-3


def test_files_that_make_no_embeddings(tmp_path: Path, model_path: ModelPath) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    for path, said in (
        (tmp_path / "none.gguf", "no such file"),
        (text, "not a GGUF file"),
        (write_bert(tmp_path / "rank.gguf", words=WORDS, pooling_type=RANK), "ranks passages"),
        (model_path("bert"), "no vocabulary"),
        (arch_models.write(arch_models.find("t5"), tmp_path / "t5.gguf"), "t5"),
    ):
        with pytest.raises(ModelError, match=said):
            EmbeddingModel(path)


def test_a_file_that_is_gone_or_another_one(tmp_path: Path) -> None:
    path = write_synonyms(tmp_path / "e.gguf", [("dog", "hound")])
    with EmbeddingModel(path, **ONE) as loaded:
        loaded.embed(["dog"])
        waiting = EmbeddingModel(path, **ONE)
        path.rename(tmp_path / "moved.gguf")
        assert loaded.embed(["hound"]).any()  # what is in memory stays
        with pytest.raises(ModelError, match="No such file"):
            waiting.embed(["dog"])
        write_synonyms(path, [("dog", "cat")])
        with pytest.raises(ModelError, match="another file"):
            waiting.embed(["dog"])
        (tmp_path / "moved.gguf").replace(path)
        assert waiting.embed(["dog"]).any()
        waiting.close()


def test_a_signal_ends_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddingModel(BUNDLED, **ONE) as model:
        before = model.embed(TEXTS)
        assert model._llm is not None
        monkeypatch.setattr("mesa_gguf.llama.LOOK_SECONDS", 1e-4)
        model.interrupt = Mock(side_effect=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            model.embed([TEXTS[2] * 20] * 8)
        model.interrupt = None
        assert worst(model.embed(TEXTS), before) == 0


# A document of the bundled model's kind, in which one sentence tells what a question asks in other words.

MADE = make_document(4711, 1600, n_facts=4)
TOLD = "The quokka's glockenspiel shines in utter silence beneath a distant pagoda."
QUESTION = "Which zebra xylophone gleams?"
SYNONYMS = [("zebra", "quokka"), ("xylophone", "glockenspiel"), ("gleams", "shines")]


@pytest.fixture(scope="module")
def synonyms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingModel]:
    path = write_synonyms(tmp_path_factory.mktemp("models") / "synonyms.gguf", SYNONYMS)
    with EmbeddingModel(path, **ONE) as model:
        yield model


def document() -> str:
    """The sentence stands in the middle of it."""
    parts = MADE.text.split("\n\n")
    return "\n\n".join([*parts[: len(parts) // 2], TOLD, *parts[len(parts) // 2 :]])


class Undecided:
    """A model that finds the question as likely behind any passage."""

    asked: Sequence[str] = ()

    def other_words(self, question: str) -> None:
        return None

    def likelihoods(self, question: str, passages: Sequence[str]) -> list[float]:
        self.asked = passages
        return [0.0] * len(passages)

    def by_values(self, question: str, pieces: object, sentences: object) -> list[Any]:
        return []


def is_told(pieces: Iterable[Piece]) -> bool:
    return any(TOLD in piece.text for piece in pieces)


def is_found(catalogue: Catalogue, model: Model | None = None) -> bool:
    selection = catalogue.select(QUESTION, catalogue.library.documents(), 500, model=model)
    assert len(selection.pieces) < selection.of_chunks / 2
    return is_told(selection.pieces)


def test_a_sentence_is_found_by_its_embedding_alone(
    llm: MesaLlama, library: Library, synonyms: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add_text(document(), "log")
    form = PromptForm(llm)
    without, found = Catalogue(llm, form, library), Catalogue(llm, form, library, synonyms)
    model = Undecided()
    assert without.embeddings is None and not is_found(without) and not is_found(without, model)
    assert is_found(found) and is_found(found, model) and any(TOLD in passage for passage in model.asked)
    # also of documents that are too long to be compared by values
    monkeypatch.setattr("mesa_gguf.reading.shelf.MOST_MEANT", 1)
    assert is_found(Catalogue(llm, form, library, synonyms), model)
    # a question whose words are enough embeds nothing
    monkeypatch.setattr(EmbeddingModel, "embed", lambda *_: pytest.fail("nothing is to be embedded"))
    found.select(MADE.facts[0].question, library.documents(), 500)
    found.select(QUESTION, library.documents(), "each")


def test_a_reader_embeds(
    llm: MesaLlama, library: Library, synonyms: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add_text(document(), "log")
    monkeypatch.setattr(Shelf, "likelihoods", lambda _, question, passages, progress: [0.0] * len(passages))
    reader = Reader(llm, library, embedding=synonyms)
    moved: list[tuple[int, int]] = []
    reader.ask(QUESTION, read=500, max_tokens=1, progress=lambda *done: moved.append(done)).close()
    assert reader._sources is not None and is_told(reader._sources.pieces)
    assert reader.shelf is not None
    chunks = chunks_of(reader.shelf.catalogue)
    assert moved[: len(chunks)] == [(done, sum(chunks.values())) for done in np.cumsum(list(chunks.values()))]
    # reading ahead embeds too
    with Library(library.folder.parent / "other", budget=10**9) as other:
        other.add_text(document(), "log")
        reader = Reader(llm, other, embedding=synonyms)
        assert reader.shelf is not None and reader.shelf.catalogue.embeddings is not None
        catalogue = reader.shelf.catalogue
        (one,) = other.documents()
        pieces = [catalogue.piece(one, row) for row in catalogue.rows(one)]
        reader.shelf.read(pieces[:2], ahead=())
        assert reader.shelf.catalogue.embeddings.n_kept(chunks) == 2
        reader.shelf.read(pieces[2:3])  # a question waits
        assert reader.shelf.catalogue.embeddings.n_kept(chunks) == 2
        # what is lacking beside kept chunks is made when nobody asks
        assert all(reader.shelf.complete(piece) for piece in pieces)
        assert reader.shelf.catalogue.embeddings.n_kept(chunks) == 3
    with pytest.raises(ConfigError, match="must be an EmbeddingModel"):
        Reader(llm, library, embedding="model.gguf")  # type: ignore[arg-type]


def chunks_of(catalogue: Catalogue) -> dict[str, int]:
    return {
        catalogue.piece(one, row).text: row.n_tokens
        for one in catalogue.library.documents()
        for row in catalogue.rows(one)
    }


def test_each_sentence_is_embedded(synonyms: EmbeddingModel) -> None:
    text = f"{TOLD} Nobody else is there at this hour, and nothing at all can be heard. " + "It shines a lot. " * 4
    sentences = sentences_of(0, text)
    assert len(sentences) > 2
    found = synonyms.of_sentences(text)
    assert found.dtype == np.float16 and found.shape == (len(sentences), 64)
    assert worst(found, synonyms.embed([sentence.text for sentence in sentences])) < 1e-3
    assert worst(np.linalg.norm(found, axis=1)[:3], [1, 0, 1]) < 1e-2  # nothing of the neighbours


def test_embeddings_are_kept_beside_chunks(
    llm: MesaLlama, library: Library, synonyms: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add_text(document(), "log")
    chunks = chunks_of(Catalogue(llm, PromptForm(llm), library))
    embedded: list[str] = []
    of_sentences = EmbeddingModel.of_sentences

    def note(model: EmbeddingModel, text: str) -> Any:
        embedded.append(text)
        return of_sentences(model, text)

    monkeypatch.setattr(EmbeddingModel, "of_sentences", note)

    def near(model: EmbeddingModel = synonyms) -> tuple[Any, list[str]]:
        """What another process finds, and what it has to embed."""
        embedded.clear()
        found = Embeddings(model, library).near(QUESTION, list(chunks.items()))
        assert len(found) == sum(len(sentences_of(0, text)) for text in chunks)
        assert abs(float(found.mean())) < 1e-3 and abs(float(found.std()) - 1) < 1e-3
        return found, list(embedded)

    # an interruption loses one chunk
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == sum(chunks.values())
        if len(embedded) == 3:
            raise Stop

    with pytest.raises(Stop):
        Embeddings(synonyms, library).make(chunks, stop)
    assert embedded == list(chunks)[:3]
    first, made = near()
    assert made == list(chunks)[3:]
    again, made = near()
    assert made == [] and worst(first, again) == 0
    texts = list(chunks)
    best = np.concatenate([[i] * len(sentences_of(0, text)) for i, text in enumerate(texts)])[first.argmax()]
    assert TOLD in texts[best]

    # they count to the budget, and not as chunks
    kept = library.index.kept()
    assert len(kept) == len(chunks) and all(row.n_tokens == 0 for row in kept)
    report = library.verify()
    assert report.n_chunks == 0 and report.n_bytes > 64 * 2 * len(first)

    # what is damaged, gone, of another length, or no number is made again
    store, key = library.store, Embeddings(synonyms, library).key
    path = store.path(key(texts[0]))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    store.remove(key(texts[1]))
    store.remove(key(texts[2]))
    store.put(key(texts[2]), 0, b"short")
    n_bytes = len(store.get(key(texts[3]), 0) or b"")
    store.remove(key(texts[3]))
    store.put(key(texts[3]), 0, b"\xff" * n_bytes)
    again, made = near()
    assert sorted(made) == sorted(texts[:4]) and worst(first, again) == 0
    assert near()[1] == []

    # of another model, or with something else before passages, they are others
    other = EmbeddingModel(synonyms.path, passage="the ", **ONE)
    assert near(other)[1] == texts
    other.close()

    # what cannot be kept is held
    def full(*args: object, **kwargs: object) -> None:
        raise LibraryError("full")

    for text in texts:
        store.remove(key(text))
    with monkeypatch.context() as patch:
        patch.setattr(library, "keep", full)
        embeddings = Embeddings(synonyms, library)
        embedded.clear()
        assert embeddings.make(chunks, ahead=True) == ["full"] and embedded == texts[:1]
        assert worst(embeddings.near(QUESTION, list(chunks.items())), first) == 0
        embedded.clear()
        assert worst(embeddings.near(QUESTION, list(chunks.items())), first) == 0
        assert embedded == []


def test_the_model_that_answers_embeds_too(llm: MesaLlama, library: Library) -> None:
    library.add_text(MADE.text, "log")
    with EmbeddingModel(BUNDLED, **ONE) as same:
        reader = Reader(llm, library, embedding=same)
        fact = MADE.facts[0]
        assert fact.answer in reader.ask(fact.question, read=500, max_tokens=12).answer.text
        answer = reader.ask(QUESTION, read=500, max_tokens=1).answer
        assert reader.shelf is not None and reader.shelf.catalogue.embeddings is not None
        chunks = chunks_of(reader.shelf.catalogue)
        assert reader.shelf.catalogue.embeddings.n_kept(chunks) == len(chunks)
    assert answer.read is not None and answer.read.compared > 0


def test_a_server_embeds(llm: MesaLlama, library: Library, synonyms: EmbeddingModel) -> None:
    reader, _ = _reader(llm, library, False, synonyms)
    assert reader is not None and reader.shelf is not None
    assert reader.shelf.catalogue.embeddings is not None and reader.shelf.catalogue.embeddings.model is synonyms


# The command line.


def test_the_command_line_embeds(
    tmp_path: Path, synonyms: EmbeddingModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESA_LIBRARY", str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.txt").write_text(document(), encoding="utf-8")
    shutil.copy(synonyms.path, tmp_path / "e.gguf")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    reads = ("-m", BUNDLED, "--threads", "1")
    code, out, _ = run("library", "add", "log.txt", *reads, "--embedding-model", "e.gguf")
    n = int(out.splitlines()[1].split()[1])  # "log.txt: 12 chunks, …"
    assert code == 0 and out.splitlines()[-1] == f"e.gguf: {n} chunks embedded, 0 kept before"
    assert run("library", "add", "log.txt", *reads, "--embedding-model", "e.gguf")[1].endswith(
        f"0 chunks embedded, {n} kept before\n"
    )
    out = run("library", "list")[1]
    assert f"\ne.gguf: {n} chunks are embedded, " in out and f"\n{BUNDLED.name}: {n} chunks are kept, " in out

    ask = ("ask", *reads, "-f", "log.txt", QUESTION, "--max-tokens", "1", "--read", "500")
    monkeypatch.setattr(EmbeddingModel, "of_sentences", lambda *_: pytest.fail("they are kept"))
    monkeypatch.setattr(Shelf, "likelihoods", lambda _, question, passages, progress: [0.0] * len(passages))
    monkeypatch.setattr("mesa_gguf.reading.shelf.MOST_MEANT", 1)
    selected: list[Selection] = []
    select = Catalogue.select

    def note(*args: Any, **options: Any) -> Selection:
        selected.append(select(*args, **options))
        return selected[-1]

    monkeypatch.setattr(Catalogue, "select", note)
    for name, option, is_there in (("", (), False), ("e.gguf", (), True), ("", ("--embedding-model", "e.gguf"), True)):
        monkeypatch.setenv("MESA_EMBEDDING_MODEL", name)
        assert run(*ask, *option)[0] == 0
        assert is_told(selected[-1].pieces) == is_there
    lines = iter((QUESTION, "/read 500", QUESTION))
    monkeypatch.setattr("mesa_gguf.cli.chat._line_reader", lambda: lambda: next(lines, "/exit"))
    chat = ("chat", *reads, "-f", "log.txt", "--max-tokens", "1", "--embedding-model", "e.gguf")
    assert run(*chat)[0] == 0 and is_told(selected[-1].pieces)
    monkeypatch.setenv("MESA_EMBEDDING_MODEL", "none.gguf")
    code, _, err = run(*ask)
    assert code == 2 and "MESA_EMBEDDING_MODEL in the environment: none.gguf: there is no such file" in err
    assert run("library", "add", "log.txt")[0] == 0  # which needs none
    assert run("ask", *reads, "-f", "log.txt", "Who?", "--max-tokens", "1", "--no-library")[0] == 0
    monkeypatch.delenv("MESA_EMBEDDING_MODEL")
    for wrong, said in (
        (("ask", *reads, "-f", "log.txt", "Who?", "--no-library", "--embedding-model", "e.gguf"), "--no-library"),
        (("ask", *reads, "-f", "log.txt", "Who?", "--embedding-query", "q: "), "--embedding-model"),
        (("library", "add", "log.txt", "--embedding-model", "e.gguf"), "-m"),
        (("chat", *reads, "-f", "log.txt", "--embedding-model", "log.txt"), "not a GGUF file"),
        (("serve", *reads, "--port", "0", "--embedding-model", "log.txt"), "not a GGUF file"),
    ):
        code, out, err = run(*wrong)
        assert code == 2 and not out and said in err, wrong
