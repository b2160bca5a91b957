"""Documents of a library: read once, kept, put together for a question, cited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import BUNDLED
from mesa_gguf import MesaConfig, MesaLlama, PromptError, Reader, Turn, cli
from mesa_gguf.errors import ConfigError
from mesa_gguf.lab.documents import WATCHWORDS, is_right, make_document
from mesa_gguf.library.library import Document, Library, default_folder
from mesa_gguf.library.store import LibraryError
from mesa_gguf.reading.citations import cite, first_statement, is_literal, passages
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.shelf import Catalogue

MADE = make_document(4711, 4000, n_facts=8)
FACT = MADE.facts[3]


def put(library: Library, folder: Path, text: str = MADE.text, name: str = "log.txt", **kwargs: Any) -> Document:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return library.add(path, **kwargs)


def chunk_files(library: Library) -> list[Path]:
    """The files of documents' chunks: not that of the preamble, and not their values."""
    return [library.store.path(row.key) for row in library.index.kept() if row.n_tokens > 0]


def test_a_question_reads_the_chunks_that_matter(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    reader = Reader(llm, library)
    for fact in MADE.facts:
        stream = reader.ask(fact.question)
        pieces = list(stream)
        answer = stream.answer
        assert is_right(fact, answer.text) and "".join(pieces) == answer.text
        read = answer.read
        assert read is not None and read.mode == "auto" and 1 < read.chunks < read.of_chunks
        assert read.documents == ("log.txt",) and str(read).startswith(f"read {read.chunks} of {read.of_chunks} chunks")
        best = answer.citations[0]
        assert fact.answer in best.text and best.literal and MADE.text[best.start : best.stop] == best.text
        assert sum(c.weight for c in answer.citations) == pytest.approx(1)


def test_nothing_is_read_twice(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    document = put(library, tmp_path)
    first = Reader(llm, library).ask(FACT.question, read="all").answer
    again = Reader(llm, library).ask(MADE.facts[0].question, read="all").answer
    assert first.read is not None and again.read is not None
    n_all = first.read.tokens_computed
    assert n_all > 3000 and first.read.tokens_reused == 0
    assert (again.read.tokens_computed, again.read.tokens_reused) == (0, n_all)
    assert is_right(FACT, first.text) and is_right(MADE.facts[0], again.text)
    # another collection, a subset, another order
    other = library.add_text("Nothing is known of the ship.\n", "note")
    library.index.add_to_collection("both", [document.id, other.id])
    both = Reader(llm, library).ask(FACT.question, documents=[other, document], read="all").answer
    assert both.read is not None and both.read.tokens_computed < 20 and is_right(FACT, both.text)


def test_an_edit_costs_what_it_changes(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    whole = Reader(llm, library).ask(FACT.question, read="all").answer.read
    assert whole is not None
    lines = MADE.text.split("\n")
    for where in (0, len(lines) // 2):
        edited = [*lines[:where], "The cook said that nobody came. It rained all day.", *lines[where:]]
        document = put(library, tmp_path, "\n".join(edited))
        answer = Reader(llm, library).ask(FACT.question, read="all").answer
        assert answer.read is not None and is_right(FACT, answer.text)
        assert answer.read.tokens_computed < 0.35 * whole.tokens_computed  # chunks of T = 512 are long beside this text
        assert [d.id for d in library.documents()] == [document.id]  # in place of what it was


@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.reset(),
        lambda llm: llm.eval(llm.tokenize(MADE.text[-3000:].encode())),
        lambda llm: llm.reconfigure(MesaConfig(chunk=128)),
        lambda llm: setattr(llm, "n_tokens", 5),
        lambda llm: list(islice(llm.generate(llm.tokenize(b"It rained."), temp=0), 3)),
    ],
    ids=["reset", "eval", "reconfigure", "roll back", "generate"],
)
def test_the_model_may_read_something_else_between(
    library: Library, llm: MesaLlama, tmp_path: Path, use: Callable[[MesaLlama], object]
) -> None:
    """What the context holds is what it is asked about, not what was put there once."""
    put(library, tmp_path, MADE.text[:3000])
    reader = Reader(llm, library, cite_by="words")
    mesa = llm.mesa
    try:
        for read in ("all", 100, "all", "each"):
            first = reader.ask(MADE.facts[0].question, read=read, max_tokens=4).answer
            use(llm)
            again = reader.ask(MADE.facts[0].question, read=read, max_tokens=4).answer
            use(llm)
            if llm.mesa == mesa:
                assert again.tokens == first.tokens
            put(library, tmp_path, f"{MADE.text[3000:3300]} {read}", "other.txt")  # to be read, behind the preamble
    finally:
        llm.reconfigure(mesa)


def test_by_a_method_that_keeps_no_chunks(library: Library, tmp_path: Path) -> None:
    put(library, tmp_path, MADE.text[:1000])
    llm = MesaLlama(BUNDLED, n_ctx=1024, n_threads=1, n_threads_batch=1)
    try:
        reader = Reader(llm, library)
        expected = reader.ask(FACT.question, max_tokens=2).answer.tokens
        llm.reconfigure(MesaConfig(method="rerope"))
        with pytest.raises(ConfigError, match="the method rerope keeps no chunks"):
            reader.ask(FACT.question, max_tokens=2)
        llm.reconfigure(MesaConfig())
        assert reader.ask(FACT.question, max_tokens=2).answer.tokens == expected
    finally:
        llm.close()


def test_one_reader_sees_an_edit(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    """A number that was a document's is never another one's: what is remembered by it stays true."""
    reader = Reader(llm, library)
    put(library, tmp_path)
    assert is_right(FACT, reader.ask(FACT.question).answer.text)
    other = next(word for word in WATCHWORDS if word not in MADE.text)
    put(library, tmp_path, MADE.text.replace(FACT.answer, other))
    assert reader.ask(FACT.question).answer.text == FACT.answer_sentence.replace(FACT.answer, other)


def test_kept_chunks_give_what_reading_gives(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    """The logits behind chunks from the disk are those behind chunks that were computed just now."""
    document = put(library, tmp_path)
    reader = Reader(llm, library)
    assert reader.shelf is not None
    selection = reader.shelf.catalogue.select(FACT.question, [document], "all")
    tail = reader.form.tail(FACT.question)

    def logits() -> np.ndarray[Any, Any]:
        head, _, notes = reader.shelf.put_together(selection.pieces)  # type: ignore[union-attr]
        assert notes == [] and llm.n_tokens == len(head)
        llm.eval(tail)
        return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()

    computed, kept = logits(), None
    reader.shelf.forget()
    kept = logits()
    np.testing.assert_array_equal(computed, kept)


def test_the_preamble_is_kept(
    library: Library, llm: MesaLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another reader computes nothing of what stands before the chunks, unless its file is damaged."""
    put(library, tmp_path, MADE.text[:2500])
    reader = Reader(llm, library, cite_by="words")
    expected = reader.ask(MADE.facts[0].question, read="all").answer
    assert reader.shelf is not None
    (file,) = map(library.store.path, reader.shelf._own)
    read: list[int] = []
    before = MesaLlama.eval
    monkeypatch.setattr(MesaLlama, "eval", lambda self, tokens: read.append(len(tokens)) or before(self, tokens))
    for damaged in (False, True):
        if damaged:
            file.write_bytes(file.read_bytes()[:-1])
        read.clear()
        answer = Reader(llm, library, cite_by="words").ask(MADE.facts[0].question, read="all").answer
        assert answer.tokens == expected.tokens
        n_preamble = len(PromptForm(llm).preamble)
        assert read[:2] == ([n_preamble, answer.n_question] if damaged else [answer.n_question, 1])
    assert library.verify().damaged == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "swapped"])
def test_damaged_chunks_are_read_again(library: Library, llm: MesaLlama, tmp_path: Path, damage: str) -> None:
    put(library, tmp_path)
    expected = Reader(llm, library).ask(FACT.question, read="all").answer
    first, second, *_ = chunk_files(library)
    data = bytearray(first.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    elif damage == "cut":
        first.write_bytes(data[:-7])
    elif damage == "removed":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
    answer = Reader(llm, library).ask(FACT.question, read="all").answer
    assert answer.tokens == expected.tokens and answer.read is not None and answer.read.tokens_computed > 0
    if damage != "removed":
        assert any("damaged or gone: it was read again" in note for note in answer.read.notes)
    assert library.verify().damaged == []


def test_every_chunk_alone(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path, MADE.text[:3000])
    answer = Reader(llm, library).ask(FACT.question, read="each", max_tokens=24).answer
    assert answer.read is not None and answer.read.mode == "each" and answer.read.chunks == answer.read.of_chunks
    assert answer.read.tokens_computed > 500 and answer.read.tokens_reused == 0
    again = Reader(llm, library).ask(MADE.facts[0].question, read="each", max_tokens=24).answer
    assert again.read is not None and again.read.tokens_computed == 0


def test_a_number_of_tokens(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    few = Reader(llm, library).ask(FACT.question, read=700).answer
    assert few.read is not None and few.read.tokens_computed <= 700 and is_right(FACT, few.text)


def test_a_question_that_follows(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    reader = Reader(llm, library)
    assert reader.ask(FACT.question).answer.text
    assert reader.ask(FACT.question, follow_up=True).answer.text


def test_stopping_and_reading_something_else(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    reader = Reader(llm, library)
    stream = reader.ask(FACT.question)
    list(islice(stream, 2))
    stream.close()
    assert is_right(FACT, reader.ask(FACT.question).answer.text)
    reader.read(MADE.text)  # whole, without the library
    assert reader.ask(FACT.question).answer.read is None
    answer = reader.ask(FACT.question, collection=None, documents=library.documents()).answer
    assert answer.read is not None and is_right(FACT, answer.text)


def test_an_interrupted_reading_goes_on(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)

    def interrupt(n_done: int, n_all: int) -> None:
        if n_done > n_all // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reader(llm, library).ask(FACT.question, read="all", progress=interrupt)
    answer = Reader(llm, library).ask(FACT.question, read="all").answer
    assert answer.read is not None and is_right(FACT, answer.text)
    assert 0 < answer.read.tokens_computed < answer.read.tokens_reused


def test_every_border_is_a_place_to_stop(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    """Wherever a callback raises, what was read is kept, and the next question is answered as ever."""
    log = put(library, tmp_path, MADE.text[:5000])
    fact = MADE.facts[0]
    reader = Reader(llm, library)
    expected = reader.ask(fact.question, read="all").answer
    n_chunks = expected.read.chunks  # type: ignore[union-attr]
    library.prune(0)
    other = library.add_text("Nothing is known of the ship.", "other")
    assert reader.ask("Who?", documents=[other]).answer.text
    library.prune(0)
    for n in range(min(n_chunks, 4)):

        def interrupt(n_done: int, n_all: int) -> None:
            raise ValueError("the client has gone")

        with pytest.raises(ValueError, match="has gone"):
            reader.ask(fact.question, documents=[log], read="all" if n % 2 else "each", progress=interrupt)
        assert len(chunk_files(library)) == n + 1 + (n > 1)  # the other document's among them
        if n == 1:
            assert reader.ask("Who?", documents=[other]).answer.text
    answer = reader.ask(fact.question, documents=[log], read="all").answer
    assert answer.tokens == expected.tokens and answer.read is not None and answer.read.tokens_reused > 0


def test_a_conversation_about_a_library(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    one, two = MADE.facts[0], MADE.facts[1]
    reader = Reader(llm, library)
    first = reader.ask(one.question, read=600).answer
    plain = reader.ask(one.question, read=600, history=[], instructions=None).answer
    assert plain.tokens == first.tokens and plain.n_question == first.n_question
    history = [Turn(one.question, first.text)]
    reader.ask(one.question, read="all").answer  # noqa: B018
    second = reader.ask(two.question, read="all", history=history).answer
    assert is_right(two, second.text) and second.citations
    assert second.n_question < second.n_prompt
    longer = [*history, Turn(two.question, second.text)]
    third = reader.ask(two.question, read="all", history=longer).answer  # the same chunk stands in front of it
    assert third.n_question <= len(reader.form.follow_up(two.question, second.written)) + 2
    # in a new process, as it were: the same answer
    again = Reader(llm, library).ask(two.question, read="all", history=longer).answer
    assert again.tokens == third.tokens and again.n_question > third.n_question
    # and what was not part of a conversation leaves nothing behind
    assert Reader(llm, library).ask(one.question, read=600).answer.tokens == first.tokens
    with pytest.raises(
        PromptError, match=r"and the 30 turns before it have .* or give another history, with fewer turns"
    ):
        reader.ask(two.question, history=[Turn(one.question, "The bread was good. " * 60)] * 30)


def test_a_second_hop_is_found(library: Library, llm: MesaLlama) -> None:
    """What the best chunk says of the question names another one, which the question does not."""
    filler = "It rained on Monday, and the market was closed until noon. The bread was good. " * 30
    facts = ("The doctor of Mara Lind is Otto Falk.", "Nothing was known.", "The door code of Otto Falk is 48152.")
    document = library.add_text("\n\n".join(f"{filler}{fact} {filler}" for fact in (*facts, "It was late.")), "codes")
    catalogue = Catalogue(llm, Reader(llm).form, library)
    longest = max(row.n_tokens for row in catalogue.rows(document))
    pieces = catalogue.select("What is the doctor of Mara Lind asked at the door?", [document], 2 * longest).pieces
    assert all(any(fact in piece.text for piece in pieces) for fact in (facts[0], facts[2]))


def test_what_the_best_chunk_says_besides_outweighs_no_word_of_the_question(library: Library, llm: MesaLlama) -> None:
    filler = "It rained on Monday, and the market was closed until noon. The bread was good. " * 30
    flowers = "violets, tulips, asters, poppies, lilies and roses"
    facts = (
        f"They grow and grow {flowers} there, as all do who grow them.",
        f"Who sold {flowers}?",
        "The executioner grew ferns.",
    )
    document = library.add_text("\n\n".join(f"{filler}{fact} {filler}" for fact in (*facts, "It was late.")), "garden")
    catalogue = Catalogue(llm, Reader(llm).form, library)
    longest = max(row.n_tokens for row in catalogue.rows(document))
    pieces = catalogue.select("What did the executioner grow?", [document], 2 * longest).pieces
    assert any(facts[2] in piece.text for piece in pieces)


def test_the_best_chunk_stands_in_front_of_the_question(library: Library, llm: MesaLlama) -> None:
    """All others in the text's order where everything is read; of chunks that were chosen, the better ones later."""
    filler = "It rained on Monday, and the market was closed until noon. The bread was good. " * 30
    facts = (
        "The gardener of the palace is old.",
        "Nothing was known.",
        "The door code of the palace is 48152.",
        "It was late.",
    )
    document = library.add_text("\n\n".join(f"{filler}{fact} {filler}" for fact in facts), "codes")
    catalogue = Catalogue(llm, Reader(llm).form, library)
    everything = [row.id for row in catalogue.rows(document)]

    def read(mode: Any) -> list[int]:
        pieces = catalogue.select("What is the door code of the palace?", [document], mode).pieces
        assert facts[2] in pieces[-1].text or mode == "each"
        return [piece.span.id for piece in pieces]

    *others, best = read("all")
    assert [*sorted([*others, best])] == everything == read("each") and others == [i for i in everything if i != best]
    assert catalogue.select("Summarize.", [document], "all").pieces[-1].span.id == everything[-1]
    longest = max(row.n_tokens for row in catalogue.rows(document))
    some = read(3 * longest)
    pieces = {row.id: catalogue.piece(document, row).text for row in catalogue.rows(document)}
    assert facts[0] in pieces[some[-2]] and some[-1] == best and len(some) < len(everything)


def test_what_a_question_of_few_words_is_about(library: Library, llm: MesaLlama) -> None:
    filler = "It rained on Monday, and the market was closed until noon. " * 40
    facts = [f"The {name} was built by a smith of {town}. " for name, town in (("Swallow", "Varn"), ("Heron", "Tolk"))]
    text = "\n\n".join(filler + fact + filler for fact in facts)
    document = library.add_text(text, "ships")
    catalogue = Catalogue(llm, Reader(llm).form, library)

    def found(question: str, *history: Turn) -> str:
        (piece, *_) = catalogue.select(question, [document], 1, history=history).pieces
        return piece.text

    assert "Heron" in found("Who built the Heron in Tolk, a smith?", Turn("Where is the Swallow?", "In Varn."))
    for before, name in (("Heron", "Heron"), ("Swallow", "Swallow")):
        assert name in found("And who built it?", Turn(f"Where was the {before} seen?", "I do not know."))
    assert "Tolk" in found("And by whom?", Turn("Where was it?", "In Tolk."))
    assert "Heron" in found("The Heron?", Turn("Where is the Swallow?", "In Varn."))


def test_the_budget_is_kept(llm: MesaLlama, tmp_path: Path) -> None:
    with Library(tmp_path / "library", budget=4_000_000) as library:
        document = put(library, tmp_path)
        answer = Reader(llm, library).ask(FACT.question, read="all").answer
        assert is_right(FACT, answer.text) and answer.read is not None
        assert library.index.kept_bytes() <= 4_000_000
        assert sum(f.size for f in library.store.files()) == library.index.kept_bytes()
        assert library.prune(0).n_chunks == 0 and list(library.store.files()) == []
        assert library.text(document) == MADE.text  # stays
    with Library(tmp_path / "small", budget=1000) as library:
        put(library, tmp_path)
        answer = Reader(llm, library).ask(FACT.question).answer
        assert is_right(FACT, answer.text) and answer.read is not None
        assert any("do not fit into the library's budget" in note for note in answer.read.notes)


def test_index_and_disk_come_together(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    Reader(llm, library).ask(FACT.question, read="all").answer  # noqa: B018
    files = chunk_files(library)
    files[0].unlink()
    files[1].write_bytes(b"hello")
    library.store.put("ab" * 32, 3, b"of a process that was killed")
    report = library.verify()
    assert (len(report.missing), len(report.damaged), len(report.unknown)) == (1, 1, 1)
    # what was unknown counts; the preamble's rows do not
    assert report.n_chunks == len(files) - 2 + 1 == len(list(library.store.files())) - 1


def test_models_and_kv_types_do_not_mix(library: Library, tmp_path: Path) -> None:
    put(library, tmp_path, MADE.text[:2500])
    n_kept = []
    for kv_type in (1, 8):
        llm = MesaLlama(BUNDLED, n_ctx=2048, n_threads=1, n_threads_batch=1, type_k=kv_type, type_v=kv_type)
        answer = Reader(llm, library).ask(MADE.facts[0].question, read="all").answer
        assert answer.read is not None and answer.read.tokens_computed > 0 and is_right(MADE.facts[0], answer.text)
        n_kept.append(len(library.index.kept()))
        llm.close()
    assert n_kept[1] == 2 * n_kept[0]


def test_mistakes(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    reader = Reader(llm, library)
    with pytest.raises(PromptError, match="no document to ask about"):
        reader.ask("Who?")
    with pytest.raises(PromptError, match="there is no collection work in the library: it has no collection"):
        reader.ask("Who?", collection="work")
    put(library, tmp_path)
    for mode in ("some", 0, -5, True, 1.5, None):
        with pytest.raises(PromptError, match="it must be auto, all, each, or a number of tokens"):
            reader.ask("Who?", read=mode)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the question is empty"):
        reader.ask(" ")
    with pytest.raises(PromptError, match="give the reader one"):
        Reader(llm).ask("Who?", documents=library.documents())
    stock = MesaLlama(BUNDLED, n_ctx=512, n_threads=1, mesa=MesaConfig(enabled=False))
    with pytest.raises(ConfigError, match="not by stock"):
        Reader(stock, library)
    stock.close()
    small = MesaLlama(BUNDLED, n_ctx=768, n_threads=1, n_threads_batch=1)
    with pytest.raises(
        PromptError, match=r"more than n_ctx \(768\) has room for: make n_ctx \d+ or more, or give read='auto'"
    ):
        Reader(small, library).ask(FACT.question, read="all")
    answer = Reader(small, library).ask(FACT.question, max_tokens=32).answer  # "auto" reads what there is room for
    assert is_right(FACT, answer.text)
    small.close()
    with pytest.raises(LibraryError, match="is a file: name a folder"):
        Library(tmp_path / "log.txt")


def test_where_the_library_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESA_LIBRARY", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("MESA_LIBRARY")
    assert default_folder().parts[-2:] == ("mesa-gguf", "library")


def test_places(library: Library, tmp_path: Path) -> None:
    text = "# One\n\nThe bread was good.\n\n## Two\n\nThe ship sank.\n"
    document = put(library, tmp_path, text, "notes.md")
    assert document.kind == "markdown"
    assert library.place(document, text.index("ship")).heading == ("One", "Two")
    assert library.place(document, text.index("bread")).heading == ("One",)


def test_passages_tile_a_text() -> None:
    found = passages(0, MADE.text, 100)
    assert "".join(p.text for p in found) == MADE.text
    assert all(MADE.text[p.start - 100 : p.stop - 100] == p.text for p in found)


def test_what_is_cited() -> None:
    found = passages(
        0, "The bread was good. " * 30 + "The door code of Mara Lind is 48213. " + "It rained on Monday. " * 30
    )
    best = cite("What is the door code of Mara Lind?", "The code is 48213.", found)[0]
    assert "48213" in best.passage.text and best.literal
    assert cite("What is it?", "", found) == []
    assert not is_literal("The code is 999.", best.passage.text, ["999"])


def test_what_is_cited_for_an_answer_that_goes_on() -> None:
    """Small models answer, then go on with what they read last: that is not what is cited first."""
    text = (
        "The old stone bridge collapsed on 2 November. "
        + "It rained on Monday. " * 30
        + "In those cases you need to change either the pattern or the construct that uses the pattern in the code. "
        + "It rained on Monday. " * 30
    )
    found = passages(0, text)
    for answer in (
        "It collapsed on 2 November. In those cases you need to change either the pattern or the construct.",
        "The answer is:\n\nOn 2 November.\nIn those cases you need to change the pattern, or the construct in the code.",
    ):
        cited = cite("When did the old stone bridge collapse?", answer, found)
        assert "2 November" in cited[0].passage.text
    assert first_statement("The answer is:\n\nBread. It was good.") == "Bread."
    assert first_statement("The answer is:") == "The answer is:" and first_statement("") == ""


def test_borders_leave_room_for_the_preamble(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    document = put(library, tmp_path)
    reader = Reader(llm, library)
    catalogue = Catalogue(llm, reader.form, library)
    tokens = [catalogue.piece(document, row).tokens for row in catalogue.rows(document)]
    assert all(len(own) + len(catalogue.preamble) <= 512 for own in tokens)
    assert b"".join(llm.token_bytes(t) for own in tokens for t in own).decode() == MADE.text


#
# the command line
#


def ask(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mesa_gguf", "ask", "--threads", "1", "--max-tokens", "32", *args]
    env = {**os.environ, "MESA_LIBRARY": str(folder / "library"), "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False, timeout=120)


def test_another_process_reads_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(MADE.text)
    results = []
    for _ in range(2):
        done = ask(tmp_path, "-f", "log.txt", FACT.question, "--read", "all", "--json")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    assert results[0]["answer"] == results[1]["answer"] == FACT.answer_sentence
    assert results[1]["read"]["tokens_computed"] == 0 < results[0]["read"]["tokens_computed"]
    assert set(results[1]) >= {"answer", "citations", "read", "timings"}
    assert set(results[1]["read"]) >= {"mode", "chunks", "of_chunks", "tokens_computed", "tokens_reused"}
    names = {"document", "page", "heading", "start", "end", "text", "weight", "literal"}
    assert results[1]["citations"] and all(set(citation) >= names for citation in results[1]["citations"])
    assert results[1]["timings"]["first_token_s"] > 0


def test_folders_and_collections(tmp_path: Path) -> None:
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "log.txt").write_text(MADE.text)
    (papers / "page.html").write_text(
        "<html><body><h1>Ships</h1><p>The ship of Mara Lind is the Swallow.</p></body></html>"
    )
    (papers / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    done = ask(tmp_path, "-f", "papers", "--collection", "work", FACT.question)
    assert done.returncode == 0 and done.stdout == f"{FACT.answer_sentence}\n"
    assert "broken.pdf" in done.stderr and "chunks of log.txt" in done.stderr and "[1] log.txt" in done.stderr
    done = ask(tmp_path, "--collection", "work", FACT.question, "--quiet")  # no file is named any more
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{FACT.answer_sentence}\n", "")


def command(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MESA_LIBRARY": str(folder / "library"), "PYTHONSAFEPATH": "1"}
    line = [sys.executable, "-m", "mesa_gguf", "library", *args]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=env, check=False, timeout=120)


def test_the_library_from_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESA_LIBRARY", str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)

    def here(*args: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, which takes a tenth of the time."""
        return subprocess.CompletedProcess(args, cli.main(["library", *args]), *capsys.readouterr())

    (tmp_path / "log.txt").write_text(MADE.text)
    done = command(tmp_path, "add", "log.txt", "-m", str(BUNDLED), "--collection", "work", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1  log.txt  text, ") and "tokens computed, 0 kept before" in done.stdout
    assert " 0 tokens computed" in here("add", "log.txt", "-m", str(BUNDLED), "--threads", "1").stdout
    listed = json.loads(here("list", "--json").stdout)
    (about,) = listed["documents"]
    assert about["name"] == "log.txt" and about["collections"] == ["work"]
    (cut,) = about["cuts"]
    assert cut["model"] == BUNDLED.name and cut["chunks"] > 5 and cut["tokens"] > 3000
    assert listed["collections"] == [{"name": "work", "documents": 1}]
    assert listed["models"][0]["model"] == BUNDLED.name and listed["models"][0]["bytes"] > 10**6
    said = here("list").stdout
    assert "collection work: 1 document\n" in said and f"tokens for {BUNDLED.name}" in said and "MiB" in said
    assert here("show", "log.txt").stdout.strip() == MADE.text.strip()
    assert "chunks are kept" in here("verify").stdout
    done = ask(tmp_path, "--collection", "work", FACT.question, "--json", "--read", "all")
    assert json.loads(done.stdout)["read"]["tokens_computed"] == 0
    assert json.loads(here("prune", "--budget", "0", "--json").stdout)["n_chunks"] == 0
    assert here("remove", "log.txt", "--collection", "work").stdout == "log.txt is not in work any more\n"
    assert "log.txt is not in the collection work" in here("remove", "1", "--collection", "work").stderr
    assert here("remove", "--collection", "work").stdout.startswith("removed the collection work;")
    assert "there is no collection work" in here("remove", "--collection", "work").stderr
    assert "nothing to remove" in here("remove").stderr
    assert here("remove", "1").stdout == "removed log.txt\n"
    done = command(tmp_path, "remove", "1")
    assert done.returncode == 2 and "there is no document 1 in the library" in done.stderr


#
# what a tester found
#


def test_many_damaged_chunks_are_read_again_at_once(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    put(library, tmp_path)
    expected = Reader(llm, library).ask(FACT.question, read="all").answer
    paths = chunk_files(library)
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:500])
    paths[0].unlink()
    paths[0].mkdir()
    answer = Reader(llm, library).ask(FACT.question, read="all").answer
    assert answer.tokens == expected.tokens and answer.read is not None
    (note,) = answer.read.notes
    assert "kept chunks of log.txt were damaged or gone: they were read again" in note
    assert library.verify().damaged == []


def test_a_short_text_is_read_whole_whatever_the_context(library: Library, tmp_path: Path) -> None:
    text = MADE.text[:5200]  # its pieces have fewer tokens than the index counts, or more
    document = put(library, tmp_path, text)
    llm = MesaLlama(BUNDLED, n_ctx=2048, n_threads=1, n_threads_batch=1)
    catalogue = Catalogue(llm, Reader(llm).form, library)
    selection = catalogue.select("Who?", [document], "auto")
    assert len(selection.pieces) == selection.of_chunks > 1
    assert catalogue.select("Who?", [document], "auto", room=selection.room) == selection
    llm.close()


def test_names_that_are_not_utf_8(library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.txt"
    try:
        with open(name, "wb") as file:
            file.write(b"The bread was good.")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (document,), notes = library.add_folder(folder)
    assert document.name.isprintable() and notes == []
    for bad in ("n\udc80", "", "a\nb", "\x1b[31m"):
        with pytest.raises(PromptError, match="must be printable text"):
            library.add_text("text", bad)
        with pytest.raises(PromptError, match="must be printable text"):
            library.add_text("text", "name", collection=bad)


def test_another_encoding_loads_again(library: Library, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("In the café the bread was good, and nobody knew why.".encode("cp1252"))
    first = library.add(path, collection="work")
    again = library.add(path, encoding="cp1250")
    assert again.id != first.id and [d.id for d in library.documents("work")] == [again.id]
    with pytest.raises((PromptError, ConfigError, ValueError), match="no encoding"):
        library.add(path, encoding="klingon")
    assert [d.id for d in library.documents()] == [again.id]


def test_texts_are_no_files(library: Library, tmp_path: Path) -> None:
    text = "<html><body>The code<script>secret</script></body></html> and more"
    assert library.text(library.add_text(text, "n")) == text
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        library.add(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("UPDATE spans SET heading = 'x'", "cut anew"),
        ("UPDATE spans SET stop = stop + 1 WHERE ordinal = 2", "cut anew"),
        ("DELETE FROM spans WHERE ordinal = 2", "cut anew"),
        ("DELETE FROM cuts", "cut anew"),
        ("DELETE FROM words_data", "with the 1 document that could be read"),
        ("DROP TABLE spans", "with the 1 document that could be read"),
    ],
)
def test_what_is_damaged_inside_the_index_is_made_anew(llm: MesaLlama, tmp_path: Path, damage: str, said: str) -> None:
    with Library(tmp_path / "library", budget=10**9) as library:
        put(library, tmp_path, collection="work")
        before = Reader(llm, library).ask(FACT.question).answer
        library.index._db.execute(damage)
    with Library(tmp_path / "library", budget=10**9) as library:
        opened = library.mended
        answer = Reader(llm, library).ask(FACT.question, collection="work").answer
        assert (answer.text, answer.citations) == (before.text, before.citations)
        assert answer.read is not None and answer.read.tokens_computed == 0
        (told,) = [*([opened] if opened else []), *answer.read.notes]
        assert said in told and "\n" not in told


@pytest.mark.parametrize(
    "damage",
    ["places = '{'", "text = replace(text, 'a', 'e')", "name = 'x'", "text = CAST(x'ff' AS TEXT)", "seal = ''"],
)
def test_a_document_that_is_damaged_is_not_read(llm: MesaLlama, tmp_path: Path, damage: str) -> None:
    with Library(tmp_path / "library", budget=10**9) as library:
        other = put(library, tmp_path, "Nothing to see here.", "other.txt")
        put(library, tmp_path, collection="work")
        before = Reader(llm, library).ask(FACT.question).answer
        library.index._db.execute(f"UPDATE documents SET {damage} WHERE id != ?", (other.id,))
    with Library(tmp_path / "library", budget=10**9) as library:
        assert len(library.verify().documents) == 1
        with pytest.raises(LibraryError, match="is damaged in the library's index: add its file again"):
            Reader(llm, library).ask(FACT.question).answer  # noqa: B018
        put(library, tmp_path)
        assert Reader(llm, library).ask(FACT.question, collection="work").answer.text == before.text
        assert library.verify().documents == [] and len(library.documents()) == 2


def test_a_collection_that_is_damaged_is_not_read(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    first, second = put(library, tmp_path, collection="work"), put(library, tmp_path, "Nothing.", "other.txt")
    library.index._db.execute("UPDATE members SET document = ?", (second.id,))
    with pytest.raises(LibraryError, match="the collection work is damaged: remove it"):
        library.documents("work")
    assert library.documents() == [first, second]


def test_an_index_that_was_cut_to_nothing(tmp_path: Path) -> None:
    with Library(tmp_path / "library") as library:
        put(library, tmp_path)
    index = tmp_path / "library" / "index.sqlite3"
    index.write_bytes(b"")
    os.utime(index, (0, 0))
    with Library(tmp_path / "library") as library:
        assert library.mended is not None and "it has 0 bytes" in library.mended


def test_wrong_arguments(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    document = put(library, tmp_path)
    reader = Reader(llm, library)
    with pytest.raises(ConfigError, match="it must be a Library"):
        Reader(llm, "folder")  # type: ignore[arg-type]
    for documents in (["log.txt"], document):
        with pytest.raises(PromptError, match="must be a list of what"):
            reader.ask("Who?", documents=documents)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="give one of them"):
        reader.ask("Who?", documents=[document], collection="work")
    with pytest.raises(PromptError, match=r"max_tokens is 1\.5"):
        reader.ask("Who?", max_tokens=1.5)  # type: ignore[arg-type]
    assert reader.ask(FACT.question, stop=" ").answer.text == "The"
    assert (
        reader.ask(FACT.question, documents=[document, document]).answer.read == reader.ask(FACT.question).answer.read
    )
    for folder, budget in (
        ("", None),
        (tmp_path / "other", -1),
        (tmp_path / "other", "5GB"),
        (tmp_path / "other", True),
    ):
        with pytest.raises(LibraryError):
            Library(folder, budget=budget)  # type: ignore[arg-type]
    closed = Library(tmp_path / "closed")
    closed.close()
    with pytest.raises(LibraryError, match="closed"):
        closed.documents()


def test_a_document_that_goes_while_it_is_asked_about(library: Library, llm: MesaLlama, tmp_path: Path) -> None:
    """By another process, say: the answer is of what was read."""
    document = put(library, tmp_path)
    before = Reader(llm, library).ask(FACT.question).answer
    stream = Reader(llm, library).ask(FACT.question)
    next(stream)
    library.remove(document)
    answer = stream.answer
    assert answer.text == before.text and answer.citations[0].text == before.citations[0].text
