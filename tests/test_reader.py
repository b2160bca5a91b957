"""Reading a document and asking about it: prompts, answers as streams, and texts from bytes."""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
import pickle
import re
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from llama_cpp.llama_grammar import LlamaGrammar

import make_models
from conftest import BUNDLED
from mesa_gguf import ConfigError, MesaConfig, MesaError, MesaLlama, OutOfMemoryError, PromptError, Reader, Turn
from mesa_gguf.errors import DeviceError, Remedy
from mesa_gguf.lab.documents import is_right, make_document
from mesa_gguf.reading.prompts import ABOUT, REPLY, TASK, PromptForm, tokenize_piece
from mesa_gguf.reading.reader import _Text, load_vocabulary
from mesa_gguf.reading.text import check_text, decode, read_text

DOCUMENT = make_document(77, 900, n_facts=6)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    llm = MesaLlama(BUNDLED, n_ctx=2048, n_threads=1, n_threads_batch=1)
    reader = Reader(llm)
    reader.read(DOCUMENT.text)
    yield reader
    llm.close()


#
# asking
#


def test_answers_come_in_pieces(reader: Reader) -> None:
    fact = DOCUMENT.facts[0]
    stream = reader.ask(fact.question)
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == stream.answer.text
    assert is_right(fact, stream.answer.text) and stream.answer.finish_reason == "stop"
    answer = stream.answer
    assert answer.n_tokens == len(answer.tokens) and str(answer) == answer.text
    assert 0 < answer.first_token_seconds <= answer.seconds
    assert answer.n_question == len(reader.form.tail(fact.question))


def test_what_was_read_is_told(reader: Reader) -> None:
    reading = reader.reading
    assert reading is not None
    assert reading.n_tokens == len(reader.form.head(DOCUMENT.text)) and reading.seconds > 0
    assert reading.plan.last_start > 0 and reading.tokens_per_second > 0


def test_an_answer_does_not_depend_on_the_questions_before_it(reader: Reader) -> None:
    first, *others = (fact.question for fact in DOCUMENT.facts)
    alone = reader.ask(first).answer
    for question in others:
        assert reader.ask(question).answer.text
    assert reader.ask(first).answer.tokens == alone.tokens


def test_a_caller_may_stop_at_any_piece(reader: Reader) -> None:
    fact, other = DOCUMENT.facts[:2]
    whole = reader.ask(fact.question).answer
    for n in (0, 1, 3):
        stream = reader.ask(fact.question)
        pieces = list(islice(stream, n))
        stream.close()
        assert list(stream) == []
        if n > 0:
            assert stream.answer.finish_reason == "closed" and whole.text.startswith("".join(pieces))
        assert is_right(other, reader.ask(other.question).answer.text)  # at once, and as ever
    with reader.ask(fact.question) as stream:
        next(stream)
    assert stream.answer.finish_reason == "closed" and stream.answer.n_tokens < whole.n_tokens


def test_the_next_question_ends_an_answer(reader: Reader) -> None:
    stream = reader.ask(DOCUMENT.facts[0].question)
    next(stream)
    other = reader.ask(DOCUMENT.facts[1].question).answer
    assert is_right(DOCUMENT.facts[1], other.text)
    assert list(stream) == [] and stream.answer.finish_reason == "closed"


def test_limits(reader: Reader) -> None:
    question = DOCUMENT.facts[0].question
    answer = reader.ask(question, max_tokens=2).answer
    assert (answer.n_tokens, answer.finish_reason) == (2, "length")
    assert reader.ask(question, stop=[" "]).answer.text == "The"
    with pytest.raises(PromptError, match="max_tokens is 0: it must be 1 or more"):
        reader.ask(question, max_tokens=0)


def test_a_question_that_leaves_no_room(reader: Reader) -> None:
    n_ctx = reader.llm.n_ctx()
    tail = reader.form.tail("Who?")
    fits = [*tail, *[tail[-1]] * (n_ctx - reader.reading.n_tokens - len(tail) - 1)]  # type: ignore[union-attr]
    answer = reader.ask(fits, stop=()).answer
    assert answer.n_tokens <= 1
    with pytest.raises(
        PromptError, match=rf"no room for an answer in n_ctx \({n_ctx}\): make n_ctx {n_ctx + 5} or more"
    ) as error:
        reader.ask([*fits, tail[-1]], max_tokens=5)
    assert (error.value.needed, error.value.available) == (n_ctx + 5, n_ctx)


def test_a_question_that_follows_an_answer(reader: Reader) -> None:
    one, two = (fact.question for fact in DOCUMENT.facts[:2])
    first = reader.ask(one).answer
    second = reader.ask(two, follow_up=True).answer
    llm, form = reader.llm, reader.form
    tokens = [*form.head(DOCUMENT.text), *form.tail(one), *first.tokens, *form.follow_up(two, first.written)]
    llm.n_tokens = reader.reading.n_tokens  # type: ignore[union-attr]
    by_hand = list(islice(llm.generate(tokens, temp=0.0), second.n_tokens))
    assert list(second.tokens) == by_hand
    third = reader.ask(one, follow_up=True).answer  # of a longer conversation
    assert third.text and third.n_question == len(form.follow_up(one, second.written))


def test_a_conversation_that_the_caller_keeps(reader: Reader) -> None:
    one, two = (fact.question for fact in DOCUMENT.facts[:2])
    first = reader.ask(one).answer
    history = [Turn(one, first.text)]
    second = reader.ask(two, history=history, instructions="Be brief.").answer
    llm, form = reader.llm, reader.form
    tail = form.tail(two, history=history, instructions="Be brief.")
    assert text_of(reader, tail) == (f"Be brief.\n\nQuestion: {one}\nAnswer: {first.text}\nQuestion: {two}\nAnswer:")
    assert second.n_prompt == len(form.head(DOCUMENT.text)) + len(tail)
    llm.n_tokens = reader.reading.n_tokens  # type: ignore[union-attr]
    by_hand = list(islice(llm.generate([*form.head(DOCUMENT.text), *tail], temp=0.0), second.n_tokens))
    assert list(second.tokens) == by_hand
    # a longer conversation reads only what is new, and answers as one that is begun anew
    longer = [*history, Turn(two, second.text)]
    going_on = reader.ask(one, history=longer, instructions="Be brief.").answer
    assert going_on.n_question <= len(form.follow_up(one, second.written)) + 2
    reader.ask(two).answer  # noqa: B018  rolls back
    anew = reader.ask(one, history=longer, instructions="Be brief.").answer
    assert anew.tokens == going_on.tokens and anew.n_question == len(form.tail(one, history=longer)) + len(
        form.tokenize("Be brief.\n\n")
    )
    assert reader.ask(one).answer.tokens == first.tokens


def text_of(reader: Reader, tokens: list[int]) -> str:
    return b"".join(map(reader.llm.token_bytes, tokens)).decode()


def test_a_history_that_does_not_fit(reader: Reader) -> None:
    long = [Turn("Who?", "The bread was good. " * 40)] * 12
    with pytest.raises(PromptError, match="no room for an answer in n_ctx") as error:
        reader.ask("Who?", history=long)
    assert error.value.needed is not None and error.value.needed > error.value.available  # type: ignore[operator]
    for bad, said in (
        ([("Who?", "He.")], r"history\[0\] is of the type tuple: it must be a Turn"),
        ([Turn("", "He.")], r"history\[0\].question is empty"),
        ([Turn("Who?", 7)], r"history\[0\].answer is of the type int"),  # type: ignore[arg-type]
    ):
        with pytest.raises(PromptError, match=said):
            reader.ask("Who?", history=bad)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="give it no history"):
        reader.ask("Who?", history=[Turn("Who?", "He.")], follow_up=True)
    with pytest.raises(PromptError, match="instructions is empty"):
        reader.ask("Who?", instructions=" ")
    with pytest.raises(PromptError, match="are for one in words"):
        reader.ask([1, 2], history=[Turn("Who?", "He.")])


def test_how_tokens_are_chosen(reader: Reader) -> None:
    question = DOCUMENT.facts[0].question
    best = reader.ask(question).answer.tokens
    assert reader.ask(question, temperature=1.5, seed=3, top_k=1).answer.tokens == best
    options: dict[str, Any] = dict(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=12)
    drawn = [reader.ask(question, seed=seed, **options).answer.tokens for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert reader.ask(question, logit_bias={best[0]: -100.0}).answer.tokens[0] != best[0]
    with pytest.raises(ConfigError, match=r"top_k is 1\.5"):
        reader.ask(question, top_k=1.5)
    with pytest.raises(ConfigError, match="seed is 'x'"):
        reader.ask(question, seed="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="best_of"):
        reader.ask(question, best_of=2)


def test_a_conversation_is_what_the_chat_template_makes_of_it(smollm2: Path) -> None:
    vocabulary = load_vocabulary(smollm2)
    form = PromptForm(vocabulary)
    turns = [Turn("Who came?", "Mara."), Turn("When?", "")]
    tokens = [*form.head("The text."), *form.tail("Why?", history=turns, instructions="Be brief.", begun=" As")]
    messages = [
        {"role": "user", "content": f"{TASK}The text.\n\n"},
        {"role": "assistant", "content": REPLY},
        {"role": "user", "content": "Be brief.\n\n" + ABOUT.format(question="Who came?")},
        {"role": "assistant", "content": "Mara."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Why?"},
    ]
    template = vocabulary.metadata["tokenizer.chat_template"]
    bos, eos = (vocabulary._model.token_get_text(t) for t in (vocabulary.token_bos(), vocabulary.token_eos()))
    formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
    expected = formatter(messages=messages).prompt  # type: ignore[arg-type]
    assert vocabulary.detokenize(tokens, special=True).decode() == f"{expected} As"
    assert form.tail("Why?", history=[]) == form.tail("Why?")
    vocabulary.close()


def test_mistakes_of_the_caller() -> None:
    llm = MesaLlama(BUNDLED, n_ctx=512, n_threads=1, n_threads_batch=1)
    reader = Reader(llm)
    with pytest.raises(PromptError, match="no document was read"):
        reader.ask("Who?")
    reader.read("The bread was good.")
    with pytest.raises(PromptError, match="no question before this one"):
        reader.ask("Who?", follow_up=True)
    for bad, said in ((" \n", "empty"), (7, "of the type int"), ("caf\udce9", "byte 0xe9")):
        with pytest.raises(PromptError, match=said):
            reader.ask(bad)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"the text has \d+ tokens, more than n_ctx"):
        reader.read("The bread was good. " * 500)
    with pytest.raises(PromptError, match="no document was read"):
        reader.ask("Who?")
    llm.close()


def test_an_interrupted_reading_is_no_reading() -> None:
    llm = MesaLlama(BUNDLED, n_ctx=2048, n_threads=1, n_threads_batch=1, n_batch=64)
    reader = Reader(llm)
    reader.read("The bread was good.")

    def interrupt(n_done: int, n_all: int) -> None:
        if n_done > 200:
            raise KeyboardInterrupt

    llm.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        reader.read(DOCUMENT.text)
    llm.progress = None
    with pytest.raises(PromptError, match="no document was read"):
        reader.ask("Who?")
    reader.read(DOCUMENT.text)
    assert is_right(DOCUMENT.facts[2], reader.ask(DOCUMENT.facts[2].question).answer.text)
    llm.close()


@given(st.lists(st.binary(max_size=4), max_size=30), st.lists(st.text("ab\n ", min_size=1, max_size=3), max_size=3))
def test_a_stream_shows_what_the_answer_has(pieces: list[bytes], stop: list[str]) -> None:
    text = _Text(tuple(stop))
    shown = "".join(text.add(piece) for piece in pieces) + text.end()
    whole = b"".join(pieces).decode("utf-8", "replace")
    assert text.written == whole and text.shown == shown
    expected = whole.lstrip()
    ends = [at for at in map(expected.find, stop) if at >= 0]
    assert text.complete == bool(ends)
    assert shown == (expected[: min(ends)] if ends else expected).rstrip()


def test_a_reader_does_not_keep_its_model() -> None:
    """In a circle of references it would stay in memory until Python looks for such."""
    gc.disable()
    try:
        llm = MesaLlama(BUNDLED, n_ctx=512, n_threads=1, n_threads_batch=1)
        reader = Reader(llm)
        reader.read("The bread was good.")
        stream = reader.ask("Was it good?")
        next(stream)
        gone = weakref.ref(reader)
        del reader, stream
        assert gone() is None
    finally:
        gc.enable()
        llm.close()


#
# prompts
#


def test_pieces_of_a_prompt_are_those_of_the_whole(tmp_path: Path) -> None:
    """SentencePiece puts a space before every text: not into the middle of a prompt."""
    vocabulary = load_vocabulary(make_models.write_sentencepiece(tmp_path / "spm.gguf"))
    plain = vocabulary.tokenize(b"tea", add_bos=False)
    space = vocabulary.tokenize("▁".encode(), add_bos=False)[0]
    assert plain[0] == space or vocabulary.detokenize(plain) == b" tea" or len(plain) > 1
    for text in ("tea", " tea", "\ntea", "Question: the tea?", "\n\n"):
        tokens = tokenize_piece(vocabulary, text)
        assert b"".join(map(vocabulary.token_bytes, tokens)).decode() == text
    form = PromptForm(vocabulary)
    tokens = [*form.head("the tea"), *form.tail("Who?")]
    assert tokens[0] == vocabulary.token_bos()
    assert b"".join(map(vocabulary.token_bytes, tokens)) == b"the tea\n\nQuestion: Who?\nAnswer:"


def test_a_text_that_spells_a_control_token_stays_text(reader: Reader) -> None:
    special = reader.llm.token_eos()
    name = reader.llm._model.token_get_text(special)
    assert reader.llm.tokenize(name.encode(), add_bos=False, special=True) == [special]
    tokens = [
        *reader.form.head(f"One {name} two"),
        *reader.form.tail(f"Is {name} there?"),
        *reader.form.follow_up(name, name),
    ]
    assert special not in tokens


#
# texts from bytes
#

TEXT = "Caf\u00e9 \u2013 \u201cgood\u201d bread,\r\neaten by \u00c5sa\rat 9."
READ = TEXT.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_found(encoding: str) -> None:
    assert decode(TEXT.encode(encoding), "a.txt") == READ


def test_a_given_encoding_counts() -> None:
    assert decode(TEXT.encode("cp1252"), "a.txt", "cp1252") == READ
    assert decode("кот".encode("koi8-r"), "a.txt", "koi8-r") == "кот"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3", "is a PDF file, not text"),
        (b"PK\x03\x04\x14\x00", "is a ZIP file, as DOCX"),
        (b"\x1f\x8b\x08\x00", "is a gzip file"),
        (TEXT.encode("cp1252"), "is not utf-8: byte 0xe9 at offset 3: give encoding='cp1252'"),
        (b"one\0two\0three", "has a NUL at character 3"),
        (b"\xff\xfeT\x00e\x00\xd8", "is utf-16, but ends within a character: cut off its last byte"),
        (b"\xff\xfeT\x00\x00\xd8T\x00", "is not utf-16"),
        ("кот и кит, и ещё раз кот".encode("koi8-r"), "is not utf-8"),
    ],
)
def test_what_is_no_text_is_named(data: bytes, said: str) -> None:
    with pytest.raises(PromptError) as error:
        decode(data, "a.txt")
    assert str(error.value).startswith("a.txt ") and said in str(error.value)


def test_what_is_advised_works() -> None:
    """latin-1 takes any byte; the quotes of cp1252 would become control characters."""
    for encoding, read in (
        ("utf-8", TEXT.encode("cp1252")),
        ("latin-1", TEXT.encode("utf-16-le")),
        ("ascii", TEXT.encode()),
    ):
        with pytest.raises(PromptError) as error:
            decode(read, "a.txt", encoding)
        (remedy,) = error.value.remedies
        assert decode(read, "a.txt", remedy.value) == READ


@given(
    st.binary(max_size=200),
    st.sampled_from([None, "utf-8", "utf-16", "utf-7", "cp1252", "idna", "punycode", "base64", "no"]),
)
def test_any_bytes_give_text_or_an_error(data: bytes, encoding: str | None) -> None:
    with contextlib.suppress(PromptError):
        text = decode(data, "a.txt", encoding)
        assert "\0" not in text and "\r" not in text


@given(st.text(max_size=50))
def test_texts_from_outside(text: str) -> None:
    if text.strip() and not any("\ud800" <= c <= "\udfff" for c in text):
        assert check_text(text, "the question") == text.strip()
    else:
        with pytest.raises(PromptError, match=r"^the question is "):
            check_text(text, "the question")


@pytest.mark.parametrize("name", ["missing\udce9.txt", "nul\0.txt", "folder"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(PromptError) as error:
        read_text(f"{tmp_path}/{name}")
    str(error.value).encode()  # can be printed


#
# errors
#


def test_errors_know_their_parts() -> None:
    err = PromptError(
        "too long", Remedy("n_ctx", 512, "or more"), Remedy("flash_attn", True, why="which helps"), needed=512
    )
    assert str(err) == "too long: make n_ctx 512 or more, or give flash_attn=True, which helps"
    assert (err.what, err.needed, err.available) == ("too long", 512, None)
    assert str(PromptError("empty")) == "empty"


@pytest.mark.parametrize("kind", [PromptError, DeviceError, OutOfMemoryError, ConfigError])
def test_errors_travel(kind: type[MesaError]) -> None:
    err: Any = pickle.loads(pickle.dumps(kind("it is so", Remedy("n_ctx", 5, "or less"), needed=7, available=5)))
    assert type(err) is kind and str(err) == "it is so: make n_ctx 5 or less" and (err.needed, err.available) == (7, 5)


def test_a_cache_that_does_not_fit_is_told_with_numbers() -> None:
    with pytest.raises(OutOfMemoryError) as error:
        MesaLlama(BUNDLED, n_ctx=2**30, mesa=MesaConfig(enabled=False))
    assert error.value.needed is not None and error.value.available is not None
    assert error.value.needed > error.value.available
    assert {remedy.option for remedy in error.value.remedies} == {"n_ctx", "type_k"}


def test_a_quantized_v_cache_without_flash_attention() -> None:
    with pytest.raises(ConfigError, match="needs flash attention: give flash_attn=True"):
        MesaLlama(BUNDLED, flash_attn=False, type_v=8)


def test_marks_are_no_text() -> None:
    for mark in (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF32_BE):
        encoding = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF32_BE: "utf-32-be"}[mark]
        assert decode(mark + "tea".encode(encoding), "a.txt") == "tea"


#
# answers in a form, and how likely their tokens are
#

CODE = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "code", "schema": CODE}}


def test_an_answer_in_json(reader: Reader) -> None:
    question = DOCUMENT.facts[0].question
    stream = reader.ask(question, response_format=SCHEMA, max_tokens=64)
    text = "".join(stream)
    assert set(json.loads(text)) == {"code"} and isinstance(json.loads(text)["code"], int)
    assert stream.answer.finish_reason == "stop" and stream.answer.text == text
    plain = reader.ask(question).answer
    assert reader.ask(question, response_format={"type": "text"}).answer.tokens == plain.tokens


def test_a_line_break_ends_an_answer_in_words_and_none_in_json(reader: Reader) -> None:
    lines = LlamaGrammar.from_string('root ::= "[\\n1,\\n2\\n]"', verbose=False)
    assert reader.form.stop == ("\n",)
    assert json.loads(reader.ask(DOCUMENT.facts[0].question, grammar=lines).answer.text) == [1, 2]


@pytest.mark.parametrize("kind", ["response_format", "tool"])
def test_texts_in_json_have_no_line_breaks(reader: Reader, kind: str) -> None:
    """The grammar of llama-cpp-python lets them in, and what has them is no JSON."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}}, "required": ["a"]}
    (line_break,) = reader.llm.tokenize(b"\n", add_bos=False)
    options: dict[str, Any] = dict(logit_bias={line_break: 100.0}, max_tokens=32, temperature=0.0)
    if kind == "tool":
        reader.llm.chat_format = "chatml"
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        choice = {"type": "function", "function": {"name": "f"}}
        made = reader.llm.create_chat_completion(
            [{"role": "user", "content": "Hello"}], tools=[tool], tool_choice=choice, **options
        )
        text = made["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
        reader.read(DOCUMENT.text)
    else:
        form = {"type": "json_object", "schema": schema}
        text = reader.ask(DOCUMENT.facts[0].question, response_format=form, **options).answer.text
    assert set(json.loads(text)) == {"a"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "xml"}, 'its type must be "text", "json_object" or "json_schema"'),
        ({"type": "json_schema"}, "response_format has no schema"),
        ({"type": "json_object", "schema": {"$ref": "#/nowhere"}}, "the schema of response_format cannot be made"),
    ],
)
def test_a_form_that_there_is_not(reader: Reader, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        reader.ask(DOCUMENT.facts[0].question, response_format=given)


def test_a_form_and_a_grammar(reader: Reader) -> None:
    grammar = LlamaGrammar.from_string('root ::= "1"', verbose=False)
    with pytest.raises(ConfigError, match="response_format and grammar are given"):
        reader.ask(DOCUMENT.facts[0].question, response_format=SCHEMA, grammar=grammar)
    with pytest.raises(ConfigError, match="logprobs is -1"):
        reader.ask(DOCUMENT.facts[0].question, logprobs=-1)


def test_log_probabilities_are_those_of_the_logits(reader: Reader) -> None:
    fact = DOCUMENT.facts[0]
    stream = reader.ask(fact.question, logprobs=3)
    told = [(piece, len(stream.logprobs)) for piece in stream]
    answer = stream.answer
    assert [n for _, n in told] == sorted(n for _, n in told) and told[0][1] > 0  # with the pieces that they are of
    assert tuple(stream.logprobs) == answer.logprobs
    # "\n" ended it, and is no part of it
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens)[: len(answer.logprobs)]
    assert b"".join(entry.data for entry in answer.logprobs).decode().strip() == answer.text
    llm = reader.llm
    prompt = reader.form.head(DOCUMENT.text) + reader.form.tail(fact.question)
    llm.reset()  # type: ignore[no-untyped-call]
    llm.eval(prompt)
    logprobs = llm.logits_to_logprobs(np.array(llm.eval_logits[-1], np.float32))
    first = answer.logprobs[0]
    assert first.logprob == pytest.approx(float(logprobs[first.token]), abs=1e-3)
    assert [token for token, _, _ in first.top] == np.argsort(-logprobs, kind="stable")[:3].tolist()
    assert first.top[0][2] == pytest.approx(float(logprobs.max()), abs=1e-3)
    reader.read(DOCUMENT.text)
    assert reader.ask(fact.question).answer.logprobs == ()
    assert [entry.top for entry in reader.ask(fact.question, logprobs=0).answer.logprobs[:2]] == [(), ()]


@given(
    pieces=st.lists(
        st.text("ab \n", max_size=4).map(str.encode) | st.sampled_from([b"\xc3", b"\xa9", b"<|", b"end|>"])
    ),
    stop=st.sampled_from([(), ("\n",), ("<|end|>",), ("ab", "b \n"), (" ",)]),
)
def test_what_is_certain_is_what_is_shown(pieces: list[bytes], stop: tuple[str, ...]) -> None:
    """Characters of what was written up to which nothing can turn out to be of a stop string."""
    text = _Text(stop)
    certain = 0
    for piece in pieces:
        text.add(piece)
        assert certain <= text.certain <= len(text.written)
        certain = text.certain
        if text.complete:
            break
    text.end()
    assert text.written[: text.certain].strip() == text.shown.strip()
    ended = text.written[text.certain :]
    assert ended.startswith(stop) if text.complete else ended == ""
