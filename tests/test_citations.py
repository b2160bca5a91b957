"""Citations: which passage an answer is from, by what it attended to and by the words that it shares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import BUNDLED
from make_models import write_sentencepiece
from mesa_gguf import ConfigError, Library, MesaLlama, Reader, Turn
from mesa_gguf.lab.documents import is_right, make_document
from mesa_gguf.lab.facts import Haystack, default_text
from mesa_gguf.lab.facts import make_document as make_real_document
from mesa_gguf.reading.attended import Attended, token_starts
from mesa_gguf.reading.citations import PASSAGE_CHARS, Passage, cite, passages, values_of
from mesa_gguf.reading.prompts import tokenize_piece
from mesa_gguf.reading.reader import load_vocabulary

MADE = make_document(4711, 4000, n_facts=8)


@pytest.fixture
def library(library: Library) -> Library:
    library.add_text(MADE.text, "log")
    return library


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> MesaLlama:
    """A vocabulary that puts a space before every text."""
    return load_vocabulary(write_sentencepiece(tmp_path_factory.mktemp("models") / "sentencepiece.gguf"))


# What is summed.


def test_lines_that_were_only_broken_are_no_ends() -> None:
    """Text of a fixed width, as manuals have it; lines of code and lists end where they end."""
    wrapped = "A paragraph that was broken into lines of a fixed width,\nand goes on here. Then another.\n"
    code = "    if ready:\n        start(engine)\n    stop_whatever_is_running_now(engine)\nreturn\n- one item\n- another item\n"
    found = [passage.text for passage in passages(0, wrapped + code, chars=1)]
    assert found[:2] == [
        "A paragraph that was broken into lines of a fixed width,\nand goes on here. ",
        "Then another.\n    ",
    ]
    assert [text.strip() for text in found[2:]] == [line.strip() for line in code.splitlines()]
    assert "".join(found) == wrapped + code
    # never without an end
    endless = "word and so on until the end of this line, which is long\n" * 40
    assert max(len(passage.text) for passage in passages(0, endless)) <= 3 * PASSAGE_CHARS


def test_shares_are_of_passages_alone() -> None:
    """Two layers with masses of their own; three tokens before the passages, and two behind."""
    attended = Attended(np.array([3, 5, 6]), 9)
    weights = np.array(
        [
            [0.5, 0.1, 0, 0.1, 0.1, 0, 0.05, 0.05, 0.05, 0.05, 0],
            [0.9, 0.0, 0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.02, 0.06, 0],
        ],
        np.float32,
    )
    expected = (np.array([0.2, 0, 0.15]) / 0.35 + np.array([0, 0.02, 0.02]) / 0.04) / 2
    assert attended.of(weights) == pytest.approx(expected, abs=1e-6)


def test_what_asks_nothing_is_subtracted() -> None:
    attended = Attended(np.array([0, 1, 2]), 3)
    attended.calm = np.array([0.6, 0.3, 0.1])
    assert not attended.shares.any()
    attended.add(np.array([[0.6, 0.1, 0.3]], np.float32))
    attended.add(np.array([[0.2, 0.5, 0.3]], np.float32))
    assert attended.shares == pytest.approx([0, 1 / 3, 2 / 3], abs=1e-6)


def test_a_passage_without_a_token_of_its_own_gets_nothing() -> None:
    attended = Attended(np.array([0, 2, 2]), 3)
    assert attended.of(np.array([[0.25, 0.25, 0.5]], np.float32)) == pytest.approx([0.5, 0, 0.5])


@dataclass
class Row:
    start: int


@dataclass
class Chunk:
    span: Row
    text: str
    tokens: list[int]


@pytest.mark.parametrize("name", ["bundled", "sentencepiece"])
@given(
    text=st.text(st.sampled_from("the question. Answer?\nwäß日本。 "), min_size=1, max_size=300),
    offset=st.integers(0, 99),
)
def test_passages_in_tokens(sentencepiece: MesaLlama, llm: MesaLlama, name: str, text: str, offset: int) -> None:
    """The tokens of a passage are its text, but for those that reach over its borders."""
    own = llm if name == "bundled" else sentencepiece
    tokens = tokenize_piece(own, text)
    chunk = Chunk(Row(offset), text, tokens)
    found = passages(0, text, offset)
    starts = token_starts(own, chunk, found)  # type: ignore[arg-type]
    assert len(starts) == len(found) and (np.diff(starts) >= 0).all()
    assert not len(starts) or (starts.min() >= 0 and starts.max() < len(tokens))
    longest = max((len(own.token_bytes(token)) for token in tokens), default=0)
    shift = sum(len(own.token_bytes(token)) for token in tokens) - len(text.encode())
    for start, passage in zip(starts, found):
        before = len(b"".join(own.token_bytes(token) for token in tokens[:start])) - shift
        assert abs(before - len(text[: passage.start - offset].encode())) <= longest


# Both together.


def test_attention_outweighs_words() -> None:
    read = [
        Passage(0, i, i + 1, text) for i, text in enumerate(("The cat is blue.", "It was blue too.", "Nothing here."))
    ]
    assert cite("Of what colour is the cat?", "blue", read)[0].passage == read[0]
    attended = np.array([0.0, 0.1, 0.9])
    assert cite("Of what colour is the cat?", "blue", read, attended=attended)[0].passage == read[2]
    assert cite("Of what colour is the cat?", "blue", read, attended=np.zeros(3))[0].passage == read[0]
    both = cite("Of what colour is the cat?", "blue", read, attended=np.array([0.5, 0.5, 0.0]))
    assert [one.passage for one in both] == read[:2] and sum(one.weight for one in both) == pytest.approx(1)


@pytest.mark.parametrize("read", ["auto", "all"])
def test_the_passage_that_an_answer_is_from(library: Library, llm: MesaLlama, read: str) -> None:
    """Of a few chunks, and of the whole text on the stair, by attention alone too."""
    reader = Reader(llm, library)
    for fact in MADE.facts:
        answer = reader.ask(fact.question, read=read).answer  # type: ignore[arg-type]
        assert is_right(fact, answer.text)
        assert fact.answer in answer.citations[0].text and answer.citations[0].literal


def test_answers_stay_whatever_they_are_cited_by(library: Library, llm: MesaLlama) -> None:
    answers = [
        [Reader(llm, library, cite_by=by).ask(fact.question).answer.text for fact in MADE.facts]  # type: ignore[arg-type]
        for by in ("attention", "words")
    ]
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="cite_by"):
        Reader(llm, library, cite_by="page")  # type: ignore[arg-type]


def test_words_alone_ask_for_no_attention(library: Library) -> None:
    llm = MesaLlama(BUNDLED, n_ctx=2048, n_threads=1, n_threads_batch=1)
    assert Reader(llm, library, cite_by="words").ask(MADE.facts[0].question).answer.citations
    assert llm._heads is None
    llm.close()


def test_a_conversation_is_cited_as_well(library: Library, llm: MesaLlama) -> None:
    """The question's beginning is not read again where it is in the context already."""
    reader = Reader(llm, library)
    first = reader.ask(MADE.facts[0].question, read="all").answer
    follow_up = reader.ask(MADE.facts[1].question, follow_up=True).answer
    assert MADE.facts[1].answer in follow_up.citations[0].text or not is_right(MADE.facts[1], follow_up.text)
    turn = Turn(MADE.facts[0].question, first.text)
    again = reader.ask(MADE.facts[2].question, read="all", history=[turn]).answer
    assert again.citations


def test_answers_put_together_of_each_chunk(library: Library, llm: MesaLlama) -> None:
    """What they see at last is those answers, not the chunks: they are cited by words."""
    answer = Reader(llm, library).ask(MADE.facts[0].question, read="each").answer
    assert answer.read is not None and answer.read.mode == "each"
    assert all(citation.text in MADE.text for citation in answer.citations)


@pytest.mark.slow
def test_a_real_model_cites_real_text(gemma3: Path, tmp_path: Path) -> None:
    llm = MesaLlama(gemma3, n_ctx=2560, n_threads=1, n_threads_batch=1)
    with Library(tmp_path / "library", budget=10**9) as library:
        reader = Reader(llm, library)
        made = make_real_document(
            Haystack(default_text()), "citations", 1500, lambda text: len(reader.form.tokenize(text)),
            n_unlike=6, n_alike=6, n_links=0, n_counts=0, n_absent=0,
        )  # fmt: skip
        document = library.add_text(made.text, "manual")
        right = held = 0
        for question in made.questions:
            if question.form != "literal":
                continue
            answer = reader.ask(question.text, documents=[document], max_tokens=16).answer
            if question.is_right(answer.text):
                (fact,) = (made.facts[i] for i in question.facts)
                right, held = right + 1, held + (fact.value in answer.citations[0].text)
        print(f"\n{held} of {right}")
        assert right >= 6 and held >= right - 1
    llm.close()


# Of JSON.


def test_the_values_of_json_are_what_it_tells() -> None:
    text = '{"door code": 48213, "of": ["Mara Lind", {"since": 1.50}], "open": true, "note": "a \\"key\\": b"}'
    assert values_of(text) == '48213 Mara Lind 1.50 a "key": b'
    assert values_of("48213") == "48213"
    assert "door" not in values_of(text[:40]) and "48213" in values_of(text[:40])  # cut short
    assert values_of("The code is 48213.") == "The code is 48213."


json_values = st.recursive(
    st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values, st.integers(0, 200))
def test_any_json_and_any_beginning_of_it_tell_something(value: object, n: int) -> None:
    text = json.dumps(value)
    assert isinstance(values_of(text[:n]), str)
    if isinstance(value, str):
        assert values_of(text) == value


def test_citations_of_json_are_of_its_values(llm: MesaLlama, library: Library) -> None:
    """Names of fields are the caller's words: they stand nowhere in a document, and another passage may have them."""
    fact = MADE.facts[3]
    form = {"type": "json_object", "schema": {
        "type": "object", "properties": {"rain on day": {"enum": [fact.answer]}}, "required": ["rain on day"]}}  # fmt: skip
    answer = Reader(llm, library).ask(fact.question, response_format=form, max_tokens=48).answer
    assert json.loads(answer.text) == {"rain on day": fact.answer}
    assert answer.stands and fact.answer in answer.citations[0].text and answer.citations[0].literal


def test_each_chunk_is_asked_in_words(llm: MesaLlama, library: Library) -> None:
    """A chunk that does not tell could not say so in the form."""
    reader = Reader(llm, library)
    heard: list[str] = []
    of_chunks = reader._of_chunks

    def listen(asked: object, *rest: object) -> object:
        stream = of_chunks(asked, *rest)  # type: ignore[arg-type]
        heard.append(stream.answer.text)
        return stream

    reader._of_chunks = listen  # type: ignore[assignment, method-assign]
    form = {"type": "json_object", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}}
    answer = reader.ask(MADE.facts[0].question, read="each", response_format=form, max_tokens=24, logprobs=0).answer
    assert json.loads(answer.text) == {"a": 1} and len(answer.logprobs) > 2
    assert len(heard) > 4 and not any(text.startswith("{") for text in heard)
