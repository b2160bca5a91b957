"""`Reader`: read a document once, then ask about it.

In short::

    reader = Reader(MesaLlama("model.gguf", n_ctx=32768))
    reader.read(open("document.txt").read())
    for piece in reader.ask("What was decided in March?"):
        print(piece, end="")
"""

from __future__ import annotations

import codecs
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_grammar import LlamaGrammar

from .. import rpc
from ..chat import grammar_of
from ..completion import logprobs_of
from ..config import MesaConfig, MesaPlan
from ..errors import ConfigError, MesaError, ModelError, PromptError, Remedy
from ..library.library import Document, Library
from ..library.store import LibraryError
from ..llama import N_CTX_STEP, MesaLlama
from ..loaders import Place
from ..sampling import Sampler, SamplingOptions, whole
from .attended import LAYERS, N_CALM, Attended, Shares, token_starts
from .citations import Passage, cite, passages, stands_in, values_of
from .embeddings import EmbeddingModel
from .other_words import OtherWords
from .prompts import PromptForm, Turn, gap_after
from .shelf import Catalogue, Piece, Progress, Read, ReadMode, Selection, Shelf
from .text import check_text

MAX_TOKENS = 256  # of an answer, where nothing else is asked for

FinishReason = Literal["stop", "length", "closed"]
CiteBy = Literal["attention", "words"]


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        n_tokens: of the document, the prompt's head included.
        seconds: that it took.
        plan: how it was read.
    """

    n_tokens: int
    seconds: float
    plan: MesaPlan

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Citation:
    """A passage that an answer is likely to come from.

    Attributes:
        document: its name.
        page: the first page that it is on; None where there are none.
        heading: the headings over it, the outermost first.
        start, stop: in characters of the document's text.
        weight: its share among the citations, of what the answer attended to while it was generated and of the words that it shares.
        literal: the answer stands there word by word.
        document_id: the document's number in the library: several may have one name.
        path: of the file that it was read from; None where there was none.
    """

    document: str
    page: int | None
    heading: tuple[str, ...]
    start: int
    stop: int
    text: str
    weight: float
    literal: bool
    document_id: int = 0
    path: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, and how likely it was to the model, whatever the sampling made of that.

    Attributes:
        data: its text, which may be a part of a character.
        top: the tokens that were likeliest in its place, each with its text and its log-probability.
    """

    token: int
    data: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        text: without white space around it and without what ended it.
        written: all that the model wrote.
        tokens: the same as token ids.
        n_question: tokens of the question that were read, and of what else stands behind the documents: instructions and earlier
            turns, where they were not in the context already.
        finish_reason: "stop" where the model or a stop string ended it, "length" where max_tokens or n_ctx did, "closed" where
            the caller did.
        first_token_seconds: until the first token, the reading of the question included.
        seconds: in all.
        citations: where it stands, the likeliest first; empty for a text that is not in a library.
        read: what was read for it; None for a text that is not in a library.
        stands: at least half of the words that it adds to the question stand in the chunks that were read.
        n_prompt: tokens of the whole prompt, documents included.
        logprobs: of its tokens, without those of a stop string; empty where they were not asked for.
    """

    text: str
    written: str
    tokens: tuple[int, ...]
    n_question: int
    finish_reason: FinishReason
    first_token_seconds: float
    seconds: float
    citations: tuple[Citation, ...] = ()
    read: Read | None = None
    stands: bool = True
    n_prompt: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens that were generated."""
        return len(self.tokens)

    def __str__(self) -> str:
        return self.text


class AnswerStream(Iterator[str]):
    """The pieces of an answer as they are generated; in the end, or when it is closed, `answer` is there."""

    def __init__(
        self, pieces: Generator[str, None, None], answers: list[Answer], logprobs: Sequence[TokenLogprob]
    ) -> None:
        self._pieces = pieces
        self._answers = answers  # of one, in the end
        self.logprobs = logprobs  # of the tokens of the pieces so far, where they were asked for

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer; what is not generated yet is generated first."""
        for _ in self:
            pass
        if not self._answers:
            raise PromptError("this answer was stopped before it began: ask again")
        return self._answers[0]

    def close(self) -> None:
        """Stop generating. The reader can be asked again at once."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Reader:
    """A document in a model's context, and questions about it; or the documents of a library, and questions about those.

    For each question the context is rolled back to the document's end, so that no answer depends on the questions before it. Where they
    are part of the prompt, as history, what stands in the context already is not read again.

    Args:
        llm: the model. The reader takes over its context.
        library: where documents are kept, as chunks that are read once.
        form: how prompts are made; default: the model's chat template, where it has one.
        catalogue: of the library, if there is one already.
        cite_by: citations are the passages that the answer attended to and shares words with; or "words" alone, which costs nothing
            while it is generated.
        embedding: finds questions in other words in the library, too. A catalogue has its own, or none.

    Raises:
        ModelError: the model has no vocabulary, or its chat template cannot be rendered.
        ConfigError: with a library: the model does not read by Mesa-Extrapolation, or has no room for chunks.
    """

    def __init__(
        self,
        llm: MesaLlama,
        library: Library | None = None,
        *,
        form: PromptForm | None = None,
        catalogue: Catalogue | None = None,
        cite_by: CiteBy = "attention",
        embedding: EmbeddingModel | None = None,
    ) -> None:
        if library is not None and not isinstance(library, Library):
            raise ConfigError(f"library is of the type {type(library).__name__}: it must be a Library")
        if cite_by not in ("attention", "words"):
            raise ConfigError(f'cite_by is {cite_by!r}: it must be "attention" or "words"')
        self.llm, self.cite_by = llm, cite_by
        self.library = library if catalogue is None else catalogue.library
        if form is None:
            form = catalogue.form if catalogue is not None else PromptForm(llm)
        self.form = form
        self.shelf: Shelf | None = None
        if self.library is not None:
            if catalogue is None:
                catalogue = Catalogue(llm, form, self.library, embedding)
            self.shelf = Shelf(llm, catalogue)
        self._document: list[int] = []
        # the last answer. note: a strong reference would be one to the reader itself, and keep the model in memory
        self._stream: weakref.ref[AnswerStream] | None = None
        self._answers: list[Answer] = []
        self._head: list[int] = []  # the tokens of the prompt before it, the document's
        self._turns: list[int] = []  # and the others
        self._sources: _Sources | None = None
        self._calm: tuple[list[int], Shares] | None = (
            None  # numbers of chunks, and what asks nothing attends to in them
        )
        self.reading: Reading | None = None

    def read(self, document: str | Sequence[int]) -> Reading:
        """Read a document, in place of the one before.

        Args:
            document: text, or the token ids of a prompt's head (`PromptForm.head`).

        Raises:
            PromptError: the document is empty, or does not fit into n_ctx.
        """
        tokens = _tokens(document) or self.form.head(document)  # type: ignore[arg-type]
        self._leave()
        if self.shelf is not None:
            self.shelf.forget()
        start = time.perf_counter()
        self.llm.reset()
        self.llm.eval(tokens)
        seconds = time.perf_counter() - start
        self._document = tokens
        self.reading = Reading(len(tokens), seconds, self.llm.plan())
        return self.reading

    def ask(
        self,
        question: str | Sequence[int],
        *,
        documents: Sequence[Document] | None = None,
        collection: str | None = None,
        read: ReadMode = "auto",
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        history: Sequence[Turn] = (),
        instructions: str | None = None,
        follow_up: bool = False,
        response_format: Mapping[str, Any] | LlamaGrammar | None = None,
        logprobs: int | None = None,
        progress: Progress | None = None,
        begin: float | None = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Answer a question about the document that was read, or about documents of the library.

        Args:
            question: text, or the token ids of a prompt's tail (`PromptForm.tail`) for a document that was read.
            documents: of the library; default: those of the collection, or all of them, where no document was read.
            collection: of the library.
            read: how much of them is read: "all" of it; "auto" all of it where it is short, else the chunks that match the question;
                a number of tokens of matching chunks; "each" chunk alone, then the answers together.
            max_tokens: longest answer; the context's end cuts it short too.
            temperature: 0 takes the most likely token.
            seed: of the random choice of tokens, where the temperature is above 0; default: the model's.
            stop: strings that end the answer; default: the prompt form's, or none where a grammar ends it.
            history: earlier questions and answers, of a conversation that the caller keeps. They stand behind the documents, and those
                that stand in the context already are not read again. In a library, a question of few words is matched with the turn
                before it too.
            instructions: how to answer, as in a system message. They stand behind the documents, before the first question: what
                stands before the documents is the same for all questions.
            follow_up: the last question and its answer stay in the context, before this question.
            response_format: the answer is JSON, as in `create_chat_completion`: {"type": "json_object"}, or {"type": "json_schema",
                "json_schema": {"schema": …}}, or a grammar of JSON. Citations are for its values. "each" asks each chunk in words.
            logprobs: the answer has the log-probabilities of its tokens, each with so many of the likeliest in its place.
            progress: called with (tokens read, tokens to read) after each chunk that is read or embedded, each passage that is compared with
                the question, and each answer of "each". What it raises ends the reading there; what was read is kept.
            begin: of the work on this question, by time.perf_counter(), where some was done before; for the answer's times.
            **sampling: top_k, top_p, min_p, repeat_penalty, grammar, logit_bias and the others of `MesaLlama.sample`.

        Raises:
            PromptError: nothing was read, the question is empty, or there is no room for it, its history and an answer in n_ctx.
            ConfigError: the sampling cannot work.
            LibraryError: the library cannot be used.
        """
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise PromptError(f"max_tokens is {max_tokens}: it must be 1 or more")
        if logprobs is not None and whole("logprobs", logprobs, "5") < 0:
            raise ConfigError(f"logprobs is {logprobs}: it must be 0 or more")
        form = grammar_of(response_format)
        if form is not None:
            if sampling.get("grammar") is not None:
                raise ConfigError("response_format and grammar are given: give one of them")
            sampling["grammar"] = form
        # JSON may have line breaks, which end an answer in words
        default = self.form.stop if sampling.get("grammar") is None else ()
        ends = default if stop is None else (stop,) if isinstance(stop, str) else stop
        if not isinstance(ends, Sequence) or not all(isinstance(end, str) for end in ends):
            raise PromptError(f"stop is {stop!r}: it must be strings")
        ends = tuple(ends)
        options = SamplingOptions(temp=temperature, **sampling)
        choice = _Choice(options, None if seed is None else whole("seed", seed), logprobs, form is not None)
        choice.check(self.llm)
        if not isinstance(history, Sequence):
            raise PromptError(f"history is of the type {type(history).__name__}: it must be a list of Turns")
        history = list(history)
        if follow_up:
            if history or instructions is not None:
                raise PromptError(
                    "follow_up goes on with the conversation in the context: give it no history and no instructions"
                )
            return self._follow_up(question, max_tokens, choice, ends)
        asks_library = (
            documents is not None or collection is not None or (self.shelf is not None and not self._document)
        )
        if not asks_library:
            if not self._document:
                raise PromptError("no document was read: call read() first")
            given = _tokens(question)
            if given and (history or instructions is not None):
                raise PromptError("the question is token ids: history and instructions are for one in words")
            tail = given or self.form.tail(question, history=history, instructions=instructions)  # type: ignore[arg-type]
            self._sources = None
            return self._answer(self._document, tail, max_tokens, choice, ends, keep=bool(history))
        if self.shelf is None:
            raise PromptError("documents are asked about in a library: give the reader one")
        begin = time.perf_counter() if begin is None else begin
        tail = self.form.tail(question, history=history, instructions=instructions)  # type: ignore[arg-type]
        asked = _Asked(check_text(question, "the question"), tail, tuple(history), max_tokens, choice, ends)
        chosen = self._chosen(documents, collection)
        room = self.llm.n_ctx() - len(self.shelf.catalogue.preamble) - len(tail) - max_tokens

        self.shelf.is_unread = False  # of this question, not of the one before it
        selection = self.shelf.catalogue.select(
            asked.question, chosen, read, room=room, history=history, model=_Looking(self, progress), progress=progress
        )
        self._leave()
        if selection.mode == "each" and len(selection.pieces) > 1:
            return self._each(asked, selection, progress, begin)
        return self._of_chunks(asked, selection, progress, begin)

    def _leave(self) -> None:
        """The context is used for something else than the last answer and the document that was read."""
        self._stop()
        self.reading, self._document = None, []

    def _chosen(self, documents: Sequence[Document] | None, collection: str | None) -> list[Document]:
        assert self.library is not None
        if documents is not None and collection is not None:
            raise PromptError("documents and a collection are given: give one of them")
        if documents is not None and (
            not isinstance(documents, Sequence) or not all(isinstance(document, Document) for document in documents)
        ):
            raise PromptError("documents must be a list of what Library.add or Library.documents returned")
        found = list(documents) if documents is not None else self.library.documents(collection)
        found = list({document.id: document for document in found}.values())
        if not found:
            raise PromptError("there is no document to ask about: add one to the library first")
        return found

    def _of_chunks(self, asked: _Asked, selection: Selection, progress: Progress | None, begin: float) -> AnswerStream:
        assert self.shelf is not None
        tail = [*self.form.tokenize(gap_after(selection.pieces[-1].text)), *asked.tail]
        self._check_room(asked, selection, len(tail))
        head, computed, notes = self.shelf.put_together(selection.pieces, progress, keep_rest=bool(asked.history))
        self._sources = _Sources(asked.question, selection.pieces, _what_was_read(selection, computed, notes))
        return self._answer(head, tail, asked.max_tokens, asked.choice, asked.stop, begin, keep=bool(asked.history))

    def _check_room(self, asked: _Asked, selection: Selection, n_tail: int) -> None:
        """Raise PromptError if chunks and question do not fit into the context, before anything is read."""
        assert self.shelf is not None
        n_ctx, n_chunks = self.llm.n_ctx(), len(self.shelf.catalogue.preamble) + selection.n_tokens
        if n_chunks + n_tail < n_ctx:
            return
        remedies = [Remedy("n_ctx", n_chunks + n_tail + asked.max_tokens, "or more")]
        if selection.mode != "auto":
            remedies.append(Remedy("read", "auto", why="which reads the chunks that match the question"))
        what = "the question has"
        if asked.history:
            what = f"the question and the {len(asked.history)} turns before it have"
            remedies.append(Remedy("history", why="with fewer turns"))
        raise PromptError(
            f"the chunks to read have {n_chunks} tokens and {what} {n_tail}, more than n_ctx ({n_ctx}) has room for",
            *remedies,
            needed=n_chunks + n_tail + asked.max_tokens,
            available=n_ctx,
        )

    def _each(self, asked: _Asked, selection: Selection, progress: Progress | None, begin: float) -> AnswerStream:
        """Every chunk alone, then the answers together."""
        assert self.shelf is not None
        computed, notes = self.shelf.read(selection.pieces, progress)
        said: list[str] = []
        in_words = asked
        if asked.choice.options.grammar is not None:  # a chunk that tells nothing could not say so in it
            in_words = replace(asked, choice=asked.choice.in_words(), stop=self.form.stop)
        for n, piece in enumerate(selection.pieces):
            alone = Selection("each", (piece,), selection.of_chunks)
            answer = self._of_chunks(in_words, alone, None, begin).answer
            said.append(f"Part {n + 1} ({piece.document.name}): {answer.text}\n")
            if answer.read is not None:
                computed, notes = computed + answer.read.tokens_computed, [*notes, *answer.read.notes]
            if progress is not None:
                progress(computed, computed)
        self._stop()
        self.shelf.forget()
        head = [*self.shelf.catalogue.preamble, *self.form.tokenize("\n".join(said) + "\n")]
        read = _what_was_read(selection, computed, notes)
        self._sources = _Sources(asked.question, selection.pieces, read, in_context=False)
        self.llm.reset()
        return self._answer(head, asked.tail, asked.max_tokens, asked.choice, asked.stop, begin)

    def _follow_up(
        self, question: str | Sequence[int], max_tokens: int, choice: _Choice, stop: tuple[str, ...]
    ) -> AnswerStream:
        self._finish()
        if not self._answers:
            raise PromptError("there is no question before this one that it could follow")
        last, sources = self._answers[0], self._sources
        before = [*self._head, *self._turns, *last.tokens]
        tail = _tokens(question) or self.form.follow_up(question, last.written)  # type: ignore[arg-type]
        if sources is not None and isinstance(question, str):
            self._sources = replace(sources, question=question)
        turns = [*before[len(self._head) :], *tail]
        return self._answer(self._head, turns, max_tokens, choice, stop, n_question=len(tail))

    def _answer(
        self,
        head: list[int],
        rest: list[int],
        max_tokens: int,
        choice: _Choice,
        stop: tuple[str, ...],
        begin: float | None = None,
        n_question: int | None = None,
        keep: bool = False,
    ) -> AnswerStream:
        """Begin an answer to a prompt: head, which is in the context already or is read now, and what follows it.

        Args:
            n_question: tokens at the end of rest that are read; default: all of rest.
            keep: what the context holds of rest already is not read again.
        """
        self._stop()
        prompt = [*head, *rest]
        n_ctx = self.llm.n_ctx()
        if len(prompt) >= n_ctx:
            raise PromptError(
                f"document and question have {len(prompt)} tokens, which leaves no room for an answer in n_ctx ({n_ctx})",
                Remedy("n_ctx", len(prompt) + max_tokens, "or more"),
                needed=len(prompt) + max_tokens,
                available=n_ctx,
            )
        self._head, self._turns = head, rest
        limit = min(max_tokens, n_ctx - len(prompt))
        n = len(rest) if n_question is None else n_question
        if keep:
            n = len(prompt) - max(len(head), self._n_common(prompt))
        # generate() keeps what it finds of the prompt and reads what follows, the last token of an answer among it
        self.llm.n_tokens = min(self.llm.n_tokens, len(prompt) - n)
        answers: list[Answer] = []
        logprobs = _Logprobs(self.llm, choice.logprobs)
        pieces = self._generate(answers, logprobs, prompt, n, limit, choice, stop, self._sources, begin)
        stream = AnswerStream(pieces, answers, logprobs.certain)
        self._stream, self._answers = weakref.ref(stream), answers
        return stream

    def _n_common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt the context begins with; the last one is read for its logits."""
        n = min(self.llm.n_tokens, len(prompt) - 1)
        other = np.flatnonzero(self.llm.input_ids[:n] != np.asarray(prompt[:n], np.intc))
        return int(other[0]) if len(other) else n

    def _finish(self) -> None:
        """Generate what is left of the last answer."""
        stream = self._stream() if self._stream is not None else None
        for _ in stream or ():
            pass

    def _stop(self) -> None:
        """Leave the last answer as it is."""
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.close()
        self._stream, self._answers = None, []

    def _generate(
        self,
        answers: list[Answer],
        logprobs: _Logprobs,
        prompt: list[int],
        n_question: int,
        limit: int,
        choice: _Choice,
        stop: tuple[str, ...],
        sources: _Sources | None,
        begin: float | None,
    ) -> Generator[str, None, None]:
        start = time.perf_counter() if begin is None else begin
        first: float | None = None
        text = _Text(stop)
        tokens: list[int] = []
        reason: FinishReason = "closed"
        attended: Attended | None = None
        try:
            if sources is not None and sources.in_context and self.cite_by == "attention":
                attended = self._attend(sources, prompt)
            for token in choice.generate(self.llm, prompt):
                if (
                    attended is not None and self.llm.read_ranges() is None
                ):  # else it is not known: the passage may not be read
                    attended.add(self.llm.attention())
                first = first if first is not None else time.perf_counter() - start
                if llama_cpp.llama_vocab_is_eog(self.llm._model.vocab, token):
                    reason = "stop"
                    break
                logprobs.add(token, len(prompt) + len(tokens) - 1, len(text.written))
                tokens.append(token)
                piece = text.add(self.llm.token_bytes(token))
                logprobs.take(text.certain)
                if piece:
                    yield piece
                if text.complete:
                    reason = "stop"
                    break
                if len(tokens) == limit:
                    reason = "length"
                    break
            piece = text.end()
            logprobs.take(text.certain)
            if piece:
                yield piece
        finally:
            seconds = time.perf_counter() - start
            if attended is not None:
                with contextlib.suppress(MesaError):  # the model may be closed by now, or its device gone
                    self.llm.disable_attention()  # or all that is read next would pay for it
            first = first if first is not None else seconds
            shown = text.shown.strip()
            said = values_of(shown) if choice.is_json else shown
            # an answer that was given up may be so because everything is at its end, the library too
            citations: tuple[Citation, ...] = ()
            if sources is not None and reason != "closed":
                citations = self._cite(sources, said, attended.shares if attended is not None else None)
            read = sources.read if sources is not None else None
            stands = (
                sources is None
                or reason == "closed"
                or stands_in(sources.question, said, (piece.text for piece in sources.pieces))
            )
            answers.append(
                Answer(
                    shown,
                    text.written,
                    tuple(tokens),
                    n_question,
                    reason,
                    first,
                    seconds,
                    citations,
                    read,
                    stands,
                    len(prompt),
                    tuple(logprobs.certain),
                )
            )

    def _attend(self, sources: _Sources, prompt: Sequence[int]) -> Attended:
        """Watch what comes next; if nothing behind the documents was read yet, that begins with what asks nothing."""
        assert self.shelf is not None
        self.llm.enable_attention(LAYERS, "max")
        begin, starts = len(self.shelf.catalogue.preamble), []
        for n, piece in enumerate(sources.pieces):
            starts.append(begin + token_starts(self.llm, piece, sources.passages(n)))
            begin += len(piece.tokens)
        attended = Attended(np.concatenate(starts), begin)
        chunks = [piece.span.id for piece in sources.pieces]
        calm = begin + self.form.n_before + N_CALM
        if self.llm.n_tokens == begin and len(prompt) > calm:
            self.llm.eval(prompt[begin:calm])
            self._calm = chunks, attended.of(self.llm.attention())
        if self._calm is not None and self._calm[0] == chunks:
            attended.calm = self._calm[1]
        return attended

    def _cite(self, sources: _Sources, answer: str, attended: Shares | None) -> tuple[Citation, ...]:
        """Where an answer stands in the chunks that were read for it."""
        assert self.library is not None
        read = [passage for n in range(len(sources.pieces)) for passage in sources.passages(n)]
        found = []
        for scored in cite(sources.question, answer, read, attended=attended):
            document, passage = sources.pieces[scored.passage.source].document, scored.passage
            try:
                place = self.library.place(document, passage.start)
            except LibraryError:  # another process replaced or removed it since: the chunk knows about where it is
                span = sources.pieces[scored.passage.source].span
                place = Place(span.start, span.page_first, tuple(span.heading))
            found.append(
                Citation(
                    document.name,
                    place.page,
                    place.heading,
                    passage.start,
                    passage.stop,
                    passage.text,
                    scored.weight,
                    scored.literal,
                    document.id,
                    document.source,
                )
            )
        return tuple(found)


@dataclass(frozen=True)
class _Choice:
    """How the tokens of an answer are chosen, and what is told of them.

    Attributes:
        logprobs: how many of the likeliest tokens are told with each one's log-probability; None: nothing is.
        is_json: the grammar is that of a response_format.
    """

    options: SamplingOptions
    seed: int | None
    logprobs: int | None = None
    is_json: bool = False

    def in_words(self) -> _Choice:
        """The same without a grammar."""
        return _Choice(replace(self.options, grammar=None), self.seed)

    def generate(self, llm: MesaLlama, prompt: list[int]) -> Iterator[int]:
        """The tokens that follow a prompt."""
        llm._check_vocabulary(prompt)
        return llm._generate(prompt, self._sampler(llm), True, None)

    def check(self, llm: MesaLlama) -> None:
        """Raise ConfigError if the model cannot choose so, before anything is read."""
        self._sampler(llm).close()

    def _sampler(self, llm: MesaLlama) -> Sampler:
        return llm._sampler_of(self.options, llm._seed if self.seed is None else self.seed)


@dataclass(frozen=True)
class _Looking:
    """A reader's model, as it looks at a question whose words the documents hardly have."""

    reader: Reader
    progress: Progress | None

    def other_words(self, question: str) -> OtherWords | None:
        return self._shelf().other_words(question)

    def likelihoods(self, question: str, passages: Sequence[str]) -> Sequence[float]:
        return self._shelf().likelihoods(question, passages, self.progress)

    def by_values(
        self, question: str, pieces: Sequence[Piece], sentences: Sequence[Sequence[Passage]]
    ) -> Sequence[npt.NDArray[np.float32] | None]:
        return self._shelf().by_values(question, pieces, sentences)

    def _shelf(self) -> Shelf:
        self.reader._leave()
        assert self.reader.shelf is not None
        return self.reader.shelf


@dataclass(frozen=True)
class _Asked:
    """A question about documents of a library.

    Attributes:
        tail: its tokens behind the documents, those of instructions and earlier turns among them.
    """

    question: str
    tail: list[int]
    history: tuple[Turn, ...]
    max_tokens: int
    choice: _Choice
    stop: tuple[str, ...]


@dataclass(frozen=True)
class _Sources:
    """What an answer is of: the question, and the chunks that were read for it.

    Attributes:
        in_context: the chunks are what the answer's tokens see.
    """

    question: str
    pieces: tuple[Piece, ...]
    read: Read
    in_context: bool = True

    def passages(self, n: int) -> list[Passage]:
        """Those of a chunk."""
        return passages(n, self.pieces[n].text, self.pieces[n].span.start)


class _Logprobs:
    """The log-probabilities of an answer's tokens.

    Args:
        n: how many of the likeliest tokens are told with each; None: nothing is.

    Attributes:
        certain: of the tokens that are shown, so that none of a stop string is among them.
    """

    def __init__(self, llm: MesaLlama, n: int | None) -> None:
        self.certain: list[TokenLogprob] = []
        self._llm, self._n = llm, n
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()

    def add(self, token: int, row: int, begin: int) -> None:
        """Note a token that was chosen from the logits of a row of the context; begin: of its text, in characters."""
        if self._n is None:
            return
        llm = self._llm
        logprob, top = logprobs_of(llm, token, llm._get_logits(row), self._n)
        likeliest = tuple((other, llm.token_bytes(other), its) for other, its in top)
        self._waiting.append((begin, TokenLogprob(token, llm.token_bytes(token), logprob, likeliest)))

    def take(self, n_characters: int) -> None:
        """So many characters are certain."""
        while self._waiting and self._waiting[0][0] < n_characters:
            self.certain.append(self._waiting.popleft()[1])


def _what_was_read(selection: Selection, computed: int, notes: Sequence[str]) -> Read:
    names = tuple({piece.document.id: piece.document.name for piece in selection.pieces}.values())
    reused = max(0, selection.n_tokens - computed)
    n_read = len(selection.pieces)
    if selection.too_long is not None:
        said = f"the chunk that matches best has {selection.too_long} tokens, more than may be read: it was left out"
        notes = [*notes, said]
    if isinstance(selection.mode, int) and selection.n_tokens > selection.mode:
        notes = [*notes, f"none of the chunks that match has as few tokens as {selection.mode}: the best one was read"]
    if selection.unknown:
        notes = [*notes, f"the documents do not have these words of the question: {', '.join(selection.unknown)}"]
    return Read(
        str(selection.mode), n_read, selection.of_chunks, names, computed, reused, tuple(notes), selection.compared
    )


def _tokens(given: object) -> list[int]:
    """Token ids, if that is what was given."""
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []


class _Text:
    """Text from the bytes of tokens, as they come, up to a stop string.

    Attributes:
        written: all of it.
        shown: what was given to the caller: without white space at its beginning, the stop string and what follows that.
        complete: a stop string was met.
        certain: characters of what was written that are no part of a stop string.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(filter(None, stop))
        self._held = ""  # not shown yet: it may be the beginning of a stop string, or white space at the end
        self.written = ""
        self.shown = ""
        self.complete = False
        self.certain = 0

    def add(self, data: bytes) -> str:
        """What can be shown now."""
        return self._take(self._decoder.decode(data))

    def end(self) -> str:
        """What is left to be shown."""
        piece = self._take(self._decoder.decode(b"", True))
        held, self._held = self._held.rstrip(), ""
        if not self.complete:
            self.certain = len(self.written)
        if self.complete or not held:
            return piece
        self.shown += held
        return piece + held

    def _take(self, piece: str) -> str:
        self.written += piece
        if self.complete:
            return ""
        text = self._held + piece
        if not self.shown:
            text = text.lstrip()
        found = [at for at in (text.find(end) for end in self._stop) if at >= 0]
        self.certain = len(self.written) - len(text) + (min(found) if found else 0)
        if found:
            self.complete, text = True, text[: min(found)].rstrip()
            self._held = ""
        else:
            self._held = self._hold(text)
            text = text[: len(text) - len(self._held)]
            self.certain += len(text)
        self.shown += text
        return text

    def _hold(self, text: str) -> str:
        """The end of a text that may turn out not to be shown."""
        kept = len(text)
        for end in self._stop:
            for n in range(min(len(end) - 1, len(text)), 0, -1):
                if text.endswith(end[:n]):
                    kept = min(kept, len(text) - n)
                    break
        return text[len(text[:kept].rstrip()) :]


#
# models
#


def load_vocabulary(path: Path, verbose: bool = False) -> MesaLlama:
    """A model without its weights, to count tokens before a context is made for them.

    Raises:
        ModelError: the file cannot be used, or has no vocabulary.
    """
    config = MesaConfig(enabled=False)  # nothing is read with it
    llm = MesaLlama(path, mesa=config, vocab_only=True, n_ctx=1, n_batch=1, n_ubatch=1, verbose=verbose)
    if llama_cpp.llama_vocab_type(llm._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise ModelError(f"{path}: this model has no vocabulary: it cannot read text")
    return llm


def n_gpu_layers_of(given: int | None, rpc_servers: str | None) -> int:
    """How many layers go to devices, where nothing else is said: all of them, where there are any."""
    return given if given is not None else -1 if rpc_servers is not None or rpc.has_gpu() else 0


def load_model(
    path: Path,
    *,
    n_gpu_layers: int | None = None,
    rpc_servers: str | None = None,
    seed: int | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> MesaLlama:
    """`MesaLlama` with all layers on the GPU, or on RPC servers, where there are any; seed None: another one each time.

    Raises:
        MesaError: as `MesaLlama` does.
    """
    n_gpu_layers = n_gpu_layers_of(n_gpu_layers, rpc_servers)
    llm = MesaLlama(path, n_gpu_layers=n_gpu_layers, rpc_servers=rpc_servers, verbose=verbose, **kwargs)
    if seed is not None:
        llm.set_seed(seed)  # the constructor takes 0 for none
    return llm


def context_for(n_prompt: int, max_tokens: int) -> int:
    """The n_ctx that a prompt and an answer need, in tokens: a multiple of llama.cpp's step."""
    return -(-(n_prompt + max_tokens) // N_CTX_STEP) * N_CTX_STEP
