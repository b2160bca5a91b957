"""The documents of a library before a model: cut into chunks, each read once and kept, put together for a question.

A chunk is read behind the preamble alone, at positions that the model learned. Its keys and values depend on nothing else, so that they
serve again after an edit elsewhere, in another order, or in another collection. That is exact in the sense that the same chunks
read by Mesa-Extrapolation give the same; it is not what full attention over the whole text would give.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ..config import MesaConfig
from ..errors import ConfigError, PromptError, Remedy
from ..library.chunking import split
from ..library.index import SpanRow, terms_of
from ..library.library import Document, Library
from ..library.schema import seal
from ..library.store import LibraryError, chunk_key
from ..llama import MesaLlama
from ..loaders import Place
from ..model.fingerprint import model_fingerprint
from ..model.header import check_model
from ..model.tuning import tuned
from ..text import counted
from .citations import Passage, closest_sentence
from .embeddings import EmbeddingModel, Embeddings
from .other_words import OtherWords, Thesaurus
from .prompts import END, QUESTION, PromptForm, Turn
from .similar import Near, SimilarPassages, WordVectors, evidence, names_of, outstanding
from .values import N_LAYERS, Meanings, ReadChunk, Written, folded, starts_of

CHUNK_TOKENS = 1024  # longest chunk: longer ones do not answer better on real models, and make reuse coarse
LEAST_CHUNK_TOKENS = 256
SPARE_TOKENS = 8  # between a chunk and the end of what the model learned
AUTO_TOKENS = 2048  # that "auto" reads: on real models two chunks answer better than four, and four better than all
MOST_AUTO_TOKENS = 3072  # where other words were looked for: the right chunk is less surely among the first
TRIES = 4  # to put chunks together, while other processes drop some
N_CANDIDATES = 256  # chunks that are matched with a question
ENOUGH_WORDS = (
    3  # of a question, that stand in the documents: it is matched alone; with fewer, with the turn before it too
)
ANSWER_WORDS = 8  # of a turn's answer: what "it" and "she" may be; a long answer would outweigh the question
NAMED_WEIGHT = 0.5  # of what the sentence that the question fits best says besides, for a second hop
TURN_WEIGHT = 0.5  # of a turn's score, beside that of the turn or question after it
WEAK_EVIDENCE = 0.4  # share of a question's words in the best passage, below which other words are looked for
NO_EVIDENCE = 0.2  # below which all chunks that the words find come behind them
ASKED_WORDS = 32  # of a longer question enough are found
# passages that the question's likelihood is computed for, about 50 tokens each, with the question: the nearest by words alone,
COMPARED_PASSAGES = 32
# or so many of those that stand out most by words and values together, by values, and by words
LISTED_PASSAGES = 24
LISTED_BY_VALUES = 16
LISTED_BY_WORDS = 8
OUT_WEIGHT = 0.5  # of how far a passage stands out of all by that sum, in standard deviations, beside the question's likelihood after it
PASSAGE_TOKENS = 128  # longest of them
MOST_CHARS = 2**23  # of documents that other words are looked for in: two million tokens
MOST_MEANT = 1024  # chunks whose sentences are compared by their values, which are read for each question
MOST_UNREAD = 0.25  # of chunks that were not read yet, which have no values: with more of them those that were read would be preferred
LEAST_TOKENIZED = 16  # chunks whose tokens are kept; fewer are tokenized in no time
TOKENS_VERSION = 1  # of how they are kept
N_LIKELIHOODS = 4096  # that are remembered
N_OTHER_WORDS = 4  # questions that are, each with a number for each token of the vocabulary and word

ReadMode = Literal["auto", "all", "each"] | int
Progress = Callable[[int, int], None]
Key = TypeVar("Key")
Kept = TypeVar("Kept")


class Model(Protocol):
    """What a model tells of a question whose words the documents hardly have."""

    def other_words(self, question: str) -> OtherWords | None:
        """What it may be called in other words; None where that is not known."""

    def likelihoods(self, question: str, passages: Sequence[str]) -> Sequence[float]:
        """How likely it is after each of some passages, log p."""

    def by_values(
        self, question: str, pieces: Sequence[Piece], sentences: Sequence[Sequence[Passage]]
    ) -> Sequence[npt.NDArray[np.float32] | None]:
        """How much each sentence of each chunk is like an answer to it, by standard deviations; None where that is not known of a chunk, and
        nothing where it is of too few.

        Args:
            sentences: those of each chunk.
        """


@dataclass(frozen=True)
class Piece:
    """A chunk that a question may read.

    Args:
        tokenize: gives the token ids of a text.
    """

    document: Document
    span: SpanRow
    text: str
    tokenize: Callable[[str], list[int]] = field(repr=False, compare=False)

    @functools.cached_property
    def tokens(self) -> list[int]:
        """Its token ids. note: not before they are asked for, as few chunks of a collection are read"""
        return self.tokenize(self.text)


@dataclass(frozen=True)
class Selection:
    """What a question reads, of how many chunks there are: the one that matches it best comes last, in front of the question, where models use a
    text most. All others come in the order of documents and text; of those that were chosen, the better ones later.

    Attributes:
        compared: passages that the question's likelihood was computed for.
        unknown: words of the question that look like names, and stand nowhere in the documents.
        too_long: tokens of the chunk that matches best, where it is longer than what may be read, and others are not.
    """

    mode: ReadMode
    pieces: tuple[Piece, ...]
    of_chunks: int
    compared: int = 0
    unknown: tuple[str, ...] = ()
    too_long: int | None = None

    @property
    def n_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def room(self) -> int:
        """Tokens that a context must have for it to be selected again: as the index counts them, or as they are."""
        return max(self.n_tokens, sum(piece.span.n_tokens for piece in self.pieces))


@dataclass(frozen=True)
class Read:
    """What a question read.

    Attributes:
        mode: "auto", "all", "each", or a number of tokens.
        chunks: how many it read, and
        of_chunks: of how many.
        documents: names of the documents that they are of.
        tokens_computed: tokens of chunks that had to be read now.
        tokens_reused: those that were kept, or in the context already.
        notes: what was noticed, a line each: chunks whose files were damaged, or could not be kept.
        compared: passages that were compared with the question, because its words are not those of the documents.
    """

    mode: str
    chunks: int
    of_chunks: int
    documents: tuple[str, ...]
    tokens_computed: int
    tokens_reused: int
    notes: tuple[str, ...] = ()
    compared: int = 0

    def __str__(self) -> str:
        names = ", ".join(self.documents) if len(self.documents) <= 3 else f"{len(self.documents)} documents"
        is_chosen = self.compared and self.chunks < self.of_chunks
        why = f", of {self.compared} passages that may tell it in other words" if is_chosen else ""
        return f"read {self.chunks} of {counted(self.of_chunks, 'chunk')} of {names}{why}"


def check_mode(mode: object) -> ReadMode:
    """How much a question reads.

    Raises:
        PromptError: it is none of the modes.
    """
    if mode in ("auto", "all", "each") or (isinstance(mode, int) and not isinstance(mode, bool) and mode > 0):
        return mode
    raise PromptError(f"read is {mode!r}: it must be auto, all, each, or a number of tokens")


class Catalogue:
    """A library's documents in chunks, as a model's vocabulary counts them. The model's weights are not needed.

    Args:
        embedding: finds questions in other words, too.

    Raises:
        ConfigError: the model was trained at too few tokens for chunks.
    """

    def __init__(
        self, vocabulary: MesaLlama, form: PromptForm, library: Library, embedding: EmbeddingModel | None = None
    ) -> None:
        self.form, self.library = form, library
        path = Path(vocabulary.model_path)
        self.model = model_fingerprint(path)
        name = path.name
        train_length = check_model(path).train_length  # which a model without its weights does not know
        own = vocabulary.mesa if vocabulary.mesa.enabled else MesaConfig()  # nothing is read without weights
        reading_length = tuned(own, path, train_length)[0].params(train_length).reading_length
        self.preamble = library.index.preamble(f"{self.model}:{form.name}", name, form.preamble)
        self.chunk_tokens = min(CHUNK_TOKENS, reading_length - len(self.preamble) - SPARE_TOKENS)
        if self.chunk_tokens < 64:
            raise ConfigError(
                f"a model that is read at {reading_length} tokens has no room for chunks beside a preamble of "
                f"{len(self.preamble)}: read the text whole, without a library"
            )
        self.embeddings = Embeddings(embedding, library) if embedding is not None else None
        self._cut = f"{self.model}:{self.chunk_tokens}"
        self._rows: dict[int, list[SpanRow]] = {}
        self._pieces: dict[int, Piece] = {}
        self._text: tuple[int, str] | None = None  # of one document, by its number
        self._vectors = WordVectors(path, vocabulary.n_vocab(), form.tokenize)
        self._similar: tuple[list[int], SimilarPassages] | None = None  # of some chunks, by their numbers

    def rows(self, document: Document) -> list[SpanRow]:
        """The chunks of a document in order; it is cut when it is asked for first."""
        if document.id in self._rows:
            return self._rows[document.id]
        rows = self.library.index.spans(document.id, self._cut)
        text = "" if rows else self.library.text(document)
        if text.strip():
            kept = self.library.index.document(document.id)
            places = [Place(start, page, tuple(heading)) for start, page, heading in (kept.places if kept else [])]
            least = min(LEAST_CHUNK_TOKENS, self.chunk_tokens // 4)
            spans = split(text, places, self._count, max_tokens=self.chunk_tokens, min_tokens=least)
            self.library.index.set_spans(
                document.id,
                self._cut,
                [(s.start, s.stop, s.n_tokens, s.heading, s.page_first, s.page_last) for s in spans],
            )
            rows = self.library.index.spans(document.id, self._cut)
        self._rows[document.id] = rows
        return rows

    def _count(self, text: str) -> int:
        return len(self.form.tokenize(text))

    def piece(self, document: Document, row: SpanRow) -> Piece:
        """A chunk with its text and tokens."""
        if row.id not in self._pieces:
            text = self._text_of(document)[row.start : row.stop]
            self._pieces[row.id] = Piece(document, row, text, self.form.tokenize)
        return self._pieces[row.id]

    def kept_pieces(self, document: Document) -> Iterator[Piece]:
        """The chunks of a document one after the other, where it was cut before. None of it stays in memory."""
        rows = self.library.index.spans(document.id, self._cut)
        text = self.library.text(document) if rows else ""
        for row in rows:
            yield Piece(document, row, text[row.start : row.stop], self.form.tokenize)

    def _text_of(self, document: Document) -> str:
        """A document's text; that of the last one is at hand, because its chunks are asked for one after the other."""
        kept = self._text
        if kept is None or kept[0] != document.id:
            kept = self._text = document.id, self.library.text(document)
        return kept[1]

    def forget(self, document: int) -> None:
        """Let go of what is in memory of a document, by its number."""
        if self._text is not None and self._text[0] == document:
            self._text = None
        self._similar = None
        for row in self._rows.pop(document, []):
            self._pieces.pop(row.id, None)

    def select(
        self,
        question: str,
        documents: Sequence[Document],
        mode: ReadMode,
        *,
        room: int | None = None,
        history: Sequence[Turn] = (),
        model: Model | None = None,
        progress: Progress | None = None,
    ) -> Selection:
        """The chunks that a question reads.

        Args:
            room: tokens that a context has for them; "auto" takes no more, but one chunk at least.
            history: the turns before the question, which a short one ("And who wrote it?") is matched with.
            model: looks at questions whose words the documents hardly have.
            progress: called with (tokens embedded, tokens to embed) after each chunk, where there is an embedding model.

        "auto" and a number of tokens take everything where it is no longer than that, else the chunks that match the question
        best (BM25) as far as they fit. Where few of its words match, chunks with passages of words that mean nearly the same come
        first (similar.py): those after which the question is likeliest, if that can be computed. Where nothing matches, the beginning.
        "all" puts the best one last in the same way.

        Raises:
            PromptError: the mode is none, or the documents are empty.
        """
        mode = check_mode(mode)
        for _ in range(TRIES):
            n_forgotten = self.library.index.n_forgotten
            selection = self._select(question, documents, mode, room, history, model, progress)
            first = {document.id: rows[0].id for document in documents if (rows := self._rows.get(document.id))}
            if self.library.index.n_forgotten == n_forgotten and not self.library.index.are_others(first):
                return selection
            self._rows.clear()  # the index was damaged, as this process or another one found: the documents are cut anew
            self._pieces.clear()
            self._text = self._similar = None
        raise LibraryError(
            f"{self.library.folder}: the index is damaged each time that it is read: see whether the disk is"
        )

    def _select(
        self,
        question: str,
        documents: Sequence[Document],
        mode: ReadMode,
        room: int | None,
        history: Sequence[Turn],
        model: Model | None,
        progress: Progress | None,
    ) -> Selection:
        every = [(document, row) for document in documents for row in self.rows(document)]
        if not every:
            raise PromptError("the documents are empty")
        numbers = [document.id for document in documents]
        budget = mode if mode != "auto" else self._auto(AUTO_TOKENS, room)
        fits = isinstance(budget, str) or sum(row.n_tokens for _, row in every) <= budget
        ranked, compared = self._ranked(question, every, numbers, history) if mode != "each" else [], 0
        looks = len(every) > 1 and (mode == "all" or not fits)
        if looks and (not history or self._n_matched(question, numbers) >= ENOUGH_WORDS):
            with threadpool_limits(
                1, user_api="blas"
            ):  # several wait for each other, spinning, where other programs have CPUs
                other = self._in_other_words(question, every, numbers, ranked, model, progress)
            if other is not None:
                ranked, compared = other
                budget = self._auto(MOST_AUTO_TOKENS, room) if mode == "auto" else budget
        too_long = None
        if fits:
            last = ranked[:1]
            order = [*(i for i in range(len(every)) if i not in last), *last]
        else:
            taken = self._taken(every, ranked, int(budget))
            if ranked and ranked[0] not in taken:
                too_long = self._size(every[ranked[0]])
            rank = {i: place for place, i in enumerate(ranked)}
            order = sorted(taken, key=lambda i: (-rank.get(i, len(rank)), i))
        pieces = tuple(self.piece(*every[i]) for i in order)
        unknown = [
            word
            for term, word in names_of(question).items()
            if not self.library.index.search(term, self._cut, numbers, 1)
        ]
        return Selection(mode, pieces, len(every), compared, tuple(dict.fromkeys(unknown)), too_long)

    def _taken(self, every: Sequence[tuple[Document, SpanRow]], ranked: Sequence[int], budget: int) -> list[int]:
        """The best chunks that fit into a budget of tokens together; where none of those that match fits, the one that matches best."""
        order = list(dict.fromkeys([*ranked, *range(len(every))]))
        fits = (place for place, i in enumerate(order[: len(ranked) or None]) if self._size(every[i]) <= budget)
        taken: list[int] = []
        n_tokens = 0
        for i in order[next(fits, 0) :]:
            n_tokens += self._size(every[i])
            if taken and n_tokens > budget:
                break
            taken.append(i)
        return taken

    def _size(self, chunk: tuple[Document, SpanRow]) -> int:
        """Tokens of a chunk: as the index counts them, or as they are."""
        return max(chunk[1].n_tokens, len(self.piece(*chunk).tokens))

    @staticmethod
    def _auto(budget: int, room: int | None) -> int:
        return budget if room is None else min(budget, room)

    def _ranked(
        self,
        question: str,
        every: Sequence[tuple[Document, SpanRow]],
        documents: Sequence[int],
        history: Sequence[Turn],
    ) -> list[int]:
        """Chunks that have words of the question, the best first."""
        place = {row.id: i for i, (_, row) in enumerate(every)}
        matched = self._match(question, history, documents)
        scores = {place[span]: score for span, score in matched.items() if span in place}
        if scores:  # what the best chunk says of it may name what another one tells
            document, row = every[max(scores, key=lambda i: scores[i])]
            said = closest_sentence(question, self.piece(document, row).text)
            most = max(scores.values())  # for what a long sentence says outweighs the question's own few words else
            for span, score in self._named(question, said, documents):
                if span in place:
                    scores[place[span]] = scores.get(place[span], 0.0) + NAMED_WEIGHT * min(score, most)
        return sorted(scores, key=lambda i: -scores[i])

    def _in_other_words(
        self,
        question: str,
        every: Sequence[tuple[Document, SpanRow]],
        documents: Sequence[int],
        ranked: list[int],
        model: Model | None,
        progress: Progress | None,
    ) -> tuple[list[int], int] | None:
        """Chunks in the order in which they are read, and how many passages the question's likelihood was computed for.

        None: nothing but the question's own words was looked for, as they are enough, or are too many, or the documents are.

        Args:
            ranked: those that have words of the question, the best first.
        """

        def text(i: int) -> str:
            document, row = every[i]
            return self._text_of(document)[row.start : row.stop]

        if len(terms_of(question)) > ASKED_WORDS or sum(row.stop - row.start for _, row in every) > MOST_CHARS:
            return None
        matched = evidence(
            question,
            [text(i) for i in ranked[:3]],
            len(every),
            lambda word: len(self.library.index.search(word, self._cut, documents, N_CANDIDATES)),
        )
        if matched >= WEAK_EVIDENCE:
            return None
        chunks = [row.id for _, row in every]
        if self._similar is None or self._similar[0] != chunks:
            self._similar = chunks, SimilarPassages([text(i) for i in range(len(every))])
        similar = self._similar[1]
        other = model.other_words(question) if model is not None else None
        try:
            near = similar.scores(question, self._vectors, other)
        except (RuntimeError, ValueError):  # the model's file is gone, or another one: what is in memory answers still
            return None
        found = similar.best(near) if near is not None else []
        compared: list[Near] = []
        if near is not None and (model is not None or self.embeddings is not None):
            values: Sequence[npt.NDArray[np.float32] | None] = ()
            if model is not None and len(every) <= MOST_MEANT:
                pieces = [self.piece(*one) for one in every]
                values = model.by_values(question, pieces, similar.of_texts(len(every)))
            others = [similar.of_sentences(values)] if values else []
            if self.embeddings is not None:
                texts = [(text(i), row.n_tokens) for i, (_, row) in enumerate(every)]
                others.append(self.embeddings.near(question, texts, progress))
            scores = outstanding(near)
            for other_scores in others:
                scores += other_scores
            if others:
                passages = similar.best(scores, LISTED_PASSAGES)
                passages += [one for of in others for one in similar.best(of, LISTED_BY_VALUES)]
                passages += similar.best(near, LISTED_BY_WORDS)
            else:
                passages = found[:COMPARED_PASSAGES]
            if ranked and all(one.source != ranked[0] for one in passages):
                passages += [one for one in found if one.source == ranked[0]][:1]
            passages = list(dict.fromkeys(passages))
            if model is not None:
                likely = model.likelihoods(question, [one.text for one in passages])
                total = {one: value + OUT_WEIGHT * float(scores[one.number]) for one, value in zip(passages, likely)}
                compared = sorted(passages, key=lambda one: -total[one])
            found = similar.best(scores, len(scores)) if others else found
        order = list(dict.fromkeys(one.source for one in (*compared, *found)))
        if matched >= NO_EVIDENCE:  # each third: the words may be names, of which each chunk tells something
            order = _in_turns(order[::2], order[1::2], ranked)
        return list(dict.fromkeys([*order, *ranked])), len(compared)

    def _named(self, question: str, said: str, documents: Sequence[int]) -> list[tuple[int, float]]:
        """The chunks that match the words of a sentence that the question has not."""
        asked = set(terms_of(question))
        words = [word for word in terms_of(said) if word not in asked]
        return self.library.index.search(" ".join(words), self._cut, documents, N_CANDIDATES) if words else []

    def _match(self, question: str, history: Sequence[Turn], documents: Sequence[int]) -> dict[int, float]:
        """The chunks that match a question, and how well.

        BM25 is a sum over words, so the words of the turns before it are counted by adding what they score, each turn's half as
        much as what follows it, back to where enough words were matched.
        """

        def search(text: str, limit: int) -> list[tuple[int, float]]:
            return self.library.index.search(text, self._cut, documents, limit)

        scores: dict[int, float] = dict(search(question, N_CANDIDATES))
        n_words = self._n_matched(question, documents) if history else 0
        weight = 1.0
        for turn in reversed(history):
            if n_words >= ENOUGH_WORDS:
                break
            weight *= TURN_WEIGHT
            answered = " ".join(terms_of(turn.answer)[:ANSWER_WORDS])
            for span, score in search(f"{turn.question} {answered}", N_CANDIDATES):
                scores[span] = scores.get(span, 0.0) + weight * score
            n_words += self._n_matched(turn.question, documents)
        return scores

    def _n_matched(self, question: str, documents: Sequence[int]) -> int:
        """How many words of a question stand in documents."""
        return sum(bool(self.library.index.search(word, self._cut, documents, 1)) for word in terms_of(question))


def _remember(found: dict[Key, Kept], key: Key, value: Kept, most: int) -> None:
    """Keep a value, and forget the oldest ones where there are more than so many."""
    while len(found) >= most:
        del found[next(iter(found))]
    found[key] = value


def _unpacked(data: bytes, n: int, n_vocab: int) -> list[npt.NDArray[np.int32]] | None:
    """The token ids of n chunks as they are kept; None where they are others, or of another vocabulary."""
    numbers = np.frombuffer(data[: len(data) // 4 * 4], np.int32)
    sizes, ids = numbers[:n], numbers[n:]
    if len(sizes) < n or (sizes < 0).any() or int(sizes.sum(dtype=np.int64)) != len(ids):
        return None
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_vocab:
        return None
    return np.split(ids, np.cumsum(sizes)[:-1])


def _in_turns(*orders: Sequence[int]) -> list[int]:
    """The first of each order, then the second of each, and so on."""
    return list(dict.fromkeys(i for turn in zip_longest(*orders) for i in turn if i is not None))


class Shelf:
    """Puts chunks of a catalogue into a model's context: kept ones as they are, others read now and kept.

    Args:
        llm: the model. The shelf takes over its context.

    Attributes:
        is_unread: a question in other words was about documents of which too little was read to look for it by values. The reader sets it back.

    Raises:
        ConfigError: the model does not read by Mesa-Extrapolation.
    """

    def __init__(self, llm: MesaLlama, catalogue: Catalogue) -> None:
        if not llm.mesa.enabled or llm.mesa.method not in ("mesa", "mesa-exact") or llm.mesa.plan is not None:
            raise ConfigError(
                "kept chunks are read by Mesa-Extrapolation: not by stock llama.cpp, by other methods, or by a plan made by hand"
            )
        self.llm, self.catalogue, self.library = llm, catalogue, catalogue.library
        self.is_unread = False
        self._origin = llm.chunk_origin
        self._loaded: list[tuple[str, int]] = []  # keys and lengths of the chunks in the context, behind the preamble
        self._ready = False  # the preamble is in the context, and nothing that is not known here
        self._preamble: bytes | None = None  # its rows
        self._own: set[str] = set()  # keys of what is no document's
        self._unkept: dict[str, bytes] = {}  # rows that the library could not take
        self._mended = self.library.mended  # what was said of that when the library was opened
        self._likelihoods: dict[tuple[str, str], float] = {}  # of a question after a passage
        self._thesaurus: Thesaurus | None = None
        self._examples: bytes | None = None  # its rows
        self._other_words: dict[str, OtherWords] = {}  # of the last questions
        self._avoiding: dict[str, Written | None] = {}
        self._meanings: tuple[list[str | None], Meanings] | None = None  # of chunks that were read, by their keys
        self._tokenized: tuple[str, list[npt.NDArray[np.int32]]] | None = (
            None  # the tokens of all chunks, and their name
        )

    def key(self, piece: Piece) -> str:
        """The name of a chunk's rows in the library."""
        return self._key(piece.tokens)

    def _key(self, tokens: Sequence[int]) -> str:
        return chunk_key(self.catalogue.model, self._origin, tokens=tokens, preamble=self.catalogue.preamble)

    def forget(self) -> None:
        """Something else used the context."""
        self._ready, self._loaded = False, []

    def release(self) -> None:
        """Let go of chunks that the library could not take: what was read ahead is read again when it is asked for."""
        self._unkept.clear()

    def read(
        self, pieces: Sequence[Piece], progress: Progress | None = None, *, ahead: Collection[str] | None = None
    ) -> tuple[int, list[str]]:
        """Read the chunks that are not kept yet, and keep them: tokens computed, and a line for each that could not be kept.

        What was read is kept at once, so that an interruption loses one chunk at most.

        Args:
            progress: called with (tokens read, tokens to read) after each chunk; what it raises ends the reading there.
            ahead: where no question waits for them, the keys of other chunks that are not dropped for them. The reading ends at the first
                one that cannot be kept. What an embedding model says of those that are kept is made too.
        """
        by_key = {self.key(piece): piece for piece in pieces}
        missing = {
            key: piece for key, piece in by_key.items() if key not in self.library.store and key not in self._unkept
        }
        with contextlib.suppress(LibraryError):  # for the budget; what is read does not need it
            self.library.index.note_lacking([key for key in by_key if key in self.library.store])
        notes: list[str] = []
        total, done = sum(len(piece.tokens) for piece in missing.values()), 0

        def in_use() -> list[str]:
            return [*by_key, *self._own, *(ahead or ())]

        for key, piece in missing.items():
            rows = self._compute(piece)
            done += len(piece.tokens)
            try:
                self.library.keep(key, self.catalogue.model, len(piece.tokens), rows, in_use=in_use())
            except LibraryError as err:
                if str(err) not in (*notes, self.library.read_only):  # which was told when the library was opened
                    notes.append(str(err))
                if ahead is not None:
                    break
                self._unkept[key] = rows
            if progress is not None:
                progress(done, total)
        if ahead is not None and self.catalogue.embeddings is not None:
            texts = {piece.text: len(piece.tokens) for piece in by_key.values()}
            more = self.catalogue.embeddings.make(texts, progress, in_use=in_use(), ahead=True)
            notes += [note for note in more if note not in notes]
        return done, notes

    def complete(self, piece: Piece) -> bool:
        """Make what the embedding model says of a chunk that is kept, ahead of questions. The context stays as it is.

        Returns:
            False where nothing can be kept, unless something else is dropped for it.
        """
        embeddings = self.catalogue.embeddings
        if embeddings is None or embeddings.n_kept([piece.text]) or self.key(piece) not in self.library.store:
            return True
        room = self.library.budget - self.library.index.kept_bytes()
        if room < self.llm.chunk_size(len(piece.tokens)):  # which is much more
            return False
        return not embeddings.make({piece.text: len(piece.tokens)}, ahead=True)

    def _tokens_of(self, pieces: Sequence[Piece]) -> list[npt.NDArray[np.int32]]:
        """The token ids of chunks. To make those of all takes time, so they are kept, by a name that the texts give.

        note: these tell what was read. What is loaded goes by tokens that are made anew.
        """
        texts = seal(*(piece.text for piece in pieces))
        parts = self.catalogue.model, self._origin, "tokens", TOKENS_VERSION, texts
        own = chunk_key(*parts, tokens=[], preamble=self.catalogue.preamble)
        if self._tokenized is not None and self._tokenized[0] == own:
            return self._tokenized[1]
        data = self.library.rows(own, 0) if own in self.library.store else None
        each = _unpacked(data, len(pieces), self.llm.n_vocab()) if data is not None else None
        if each is None:
            each = [np.array(piece.tokens, np.int32) for piece in pieces]
            if len(pieces) >= LEAST_TOKENIZED:
                packed = np.concatenate([np.array([len(ids) for ids in each], np.int32), *each]).tobytes()
                with contextlib.suppress(LibraryError):  # no room, or it cannot be written to: they are tokenized again
                    in_use = [self._key(ids.tolist()) for ids in each]
                    self.library.keep(own, self.catalogue.model, 0, packed, in_use=in_use)
        self._tokenized = own, each
        return each

    def _may_be_read(self, pieces: Sequence[Piece]) -> bool:
        """Whether enough of these chunks can have been read, as far as the number of all that is kept tells. The same text is kept once."""
        n_kept = self.library.index.n_kept(self.catalogue.model) + len(self._unkept)
        return len({piece.text for piece in pieces}) - n_kept <= MOST_UNREAD * len(pieces)

    def _values(self, key: str, n_tokens: int) -> npt.NDArray[np.float32] | None:
        """The values of a chunk's tokens, folded [n_tokens, width]; None where they are gone.

        note: these few of its bytes are read alone, and so not checked. What is loaded is.
        """
        self.llm._check_interrupt()  # as before a batch: those of many chunks take seconds
        ranges = self.llm.chunk_values_at(n_tokens, N_LAYERS)
        if key in self._unkept:
            data: bytes | None = b"".join(self._unkept[key][at : at + size] for at, size in ranges)
        else:
            data = self.library.store.part(key, n_tokens, ranges)
        return folded(self.llm.chunk_values(data, n_tokens, N_LAYERS)) if data is not None else None

    def by_values(
        self, question: str, pieces: Sequence[Piece], sentences: Sequence[Sequence[Passage]]
    ) -> list[npt.NDArray[np.float32] | None]:
        """How near the values of each sentence of each chunk are to those of the sentences that the model writes as an answer, as `Meanings.near`.

        There are none where too few of the chunks were read; None for those that were not.
        """
        other = self.other_words(question)
        if other is None or other.written is None:
            return []
        self.is_unread = True
        if not self._may_be_read(pieces):
            return []
        tokens = self._tokens_of(pieces)
        keys = [self._key(ids.tolist()) for ids in tokens]
        known = [key if key in self.library.store or key in self._unkept else None for key in keys]
        if sum(key is not None for key in known) < (1 - MOST_UNREAD) * len(pieces):
            return []
        self.is_unread = False
        if self._meanings is None or self._meanings[0] != known:
            self._meanings = known, self._meanings_of(known, pieces, tokens, sentences)
        if self._tokenized is not None:
            with contextlib.suppress(LibraryError):  # as in put_together
                self.library.index.note_used([self._tokenized[0]], self.catalogue.model)
        if question not in self._avoiding:  # not before it is needed: that writes a sentence
            thesaurus = self._examples_for(question)
            avoiding = thesaurus.avoiding(question) if thesaurus is not None else None
            _remember(self._avoiding, question, avoiding, N_OTHER_WORDS)
        written = [one for one in (other.written, self._avoiding[question]) if one is not None]
        found = self._meanings[1].near(written)
        return found if any(own is not None for own in found) else []  # another process may have dropped all of them

    def _meanings_of(
        self,
        keys: Sequence[str | None],
        pieces: Sequence[Piece],
        tokens: Sequence[npt.NDArray[np.int32]],
        sentences: Sequence[Sequence[Passage]],
    ) -> Meanings:
        ids = np.unique(np.concatenate(tokens))
        sizes = np.zeros(int(ids[-1]) + 1 if len(ids) else 1, np.int64)
        sizes[ids] = [len(self.llm.token_bytes(token)) for token in ids.tolist()]
        return Meanings([
            None if key is None else ReadChunk(
                own, starts_of(piece.text, of, sizes[own]), functools.partial(self._values, key, len(own))
            )
            for key, piece, own, of in zip(keys, pieces, tokens, sentences)
        ])  # fmt: skip

    def put_together(
        self,
        pieces: Sequence[Piece],
        progress: Progress | None = None,
        *,
        keep_rest: bool = False,
    ) -> tuple[list[int], int, list[str]]:
        """Make the context hold the preamble and these chunks, and nothing behind them.

        Args:
            keep_rest: where it holds exactly these chunks already, what stands behind them stays.

        Returns:
            the token ids in the context, the tokens of chunks that were computed, and a line on each thing that went wrong.

        Raises:
            PromptError: they do not fit into the context.
        """
        preamble = self.catalogue.preamble
        n_tokens = len(preamble) + sum(len(piece.tokens) for piece in pieces)
        n_ctx = self.llm.n_ctx()
        if n_tokens >= n_ctx:
            raise PromptError(
                f"the chunks to read have {n_tokens} tokens, more than n_ctx ({n_ctx}) has room for",
                Remedy("n_ctx", n_tokens + 512, "or more"),
                needed=n_tokens,
                available=n_ctx,
            )
        keys = [self.key(piece) for piece in pieces]
        computed = 0
        notes: list[str] = []
        if self.library.mended is not None and self.library.mended != self._mended:
            notes.append(self.library.mended)
            self._mended = self.library.mended
        for _ in range(TRIES):
            n_read, others = self.read(pieces, progress)
            computed, notes = computed + n_read, [*notes, *others]
            gone = self._load(keys, pieces, keep_rest)
            if gone is None:
                break
            # all that are, so that they are read in one go
            n_gone = sum(
                self.library.rows(key, len(piece.tokens)) is None
                for key, piece in zip(keys, pieces)
                if key not in self._unkept and all(key != loaded for loaded, _ in self._loaded)
            )
            what = "a kept chunk" if n_gone < 2 else f"{n_gone} kept chunks"
            notes.append(
                f"{what} of {gone.document.name} {'were' if n_gone > 1 else 'was'} damaged or gone: "
                f"{'they were' if n_gone > 1 else 'it was'} read again"
            )
        else:
            raise LibraryError(f"{self.library.folder}: what is kept there is gone when it is wanted: {notes[-1]}")
        self._unkept.clear()
        with contextlib.suppress(
            LibraryError
        ):  # a disk that is full, or cannot be written to: the answer does not need this
            self.library.index.note_used([*keys, *self._own], self.catalogue.model)
        return [*preamble, *(token for piece in pieces for token in piece.tokens)], computed, notes

    def _load(self, keys: Sequence[str], pieces: Sequence[Piece], keep_rest: bool) -> Piece | None:
        """Bring chunks into the context; the first one whose rows are not to be had, if there is one."""
        n_same = self._n_same(keys, pieces)
        if n_same == 0:
            self._begin()
        elif not (keep_rest and n_same == len(keys) == len(self._loaded)):
            self._loaded = self._loaded[:n_same]
            self.llm.n_tokens = len(self.catalogue.preamble) + sum(n for _, n in self._loaded)
        for key, piece in zip(keys[n_same:], pieces[n_same:]):
            rows = self._unkept.get(key) or self.library.rows(key, len(piece.tokens))
            if rows is None:
                return piece
            self.llm.load_chunk(piece.tokens, rows)
            self._loaded.append((key, len(piece.tokens)))
        return None

    def _n_same(self, keys: Sequence[str], pieces: Sequence[Piece]) -> int:
        """How many of these chunks are in the context already, in this order from its beginning.

        note: the context is looked at too, for whoever has the model may have read something else with it since.
        """
        if not self._has_preamble():
            return 0
        end = len(self.catalogue.preamble)
        there = self.llm.loaded_chunks()
        n = 0
        for key, piece, loaded, place in zip(keys, pieces, self._loaded, there):
            start, end = end, end + len(piece.tokens)
            if loaded[0] != key or place != (start, end) or not self._holds(piece.tokens, start):
                break
            n += 1
        return n

    def _has_preamble(self) -> bool:
        return self._ready and self._holds(self.catalogue.preamble, 0)

    def _holds(self, tokens: Sequence[int], start: int) -> bool:
        """Whether the context has these tokens from start on."""
        end = start + len(tokens)
        return end <= self.llm.n_tokens and bool(np.array_equal(self.llm.input_ids[start:end], tokens))

    def _begin(self) -> None:
        """The preamble alone in the context. It is kept as other chunks are: a decode of few tokens still goes through all weights."""
        preamble = self.catalogue.preamble

        def read() -> bytes:
            self.llm.eval(preamble)
            return self.llm.save_chunk(0, len(preamble))

        key = chunk_key(self.catalogue.model, self._origin, tokens=preamble, preamble=[])
        self._preamble = self._stand(key, self._preamble, lambda rows: self.llm.load_chunk(preamble, rows), read)
        self._ready = True

    def _stand(self, key: str, held: bytes | None, load: Callable[[bytes], object], read: Callable[[], bytes]) -> bytes:
        """Tokens of no document alone in the context -> their rows: what is held or kept is loaded, else they are read and kept."""
        self.forget()
        self.llm.reset()
        self._own.add(key)
        rows = held if held is not None else self.library.rows(key, 0)
        if rows is not None:
            load(rows)
            return rows
        rows = read()
        with contextlib.suppress(LibraryError):  # no room: they are read again
            self.library.keep(key, self.catalogue.model, 0, rows)
        return rows

    def _compute(self, piece: Piece) -> bytes:
        """Read a chunk behind the preamble alone, which is what stock llama.cpp does, and take its rows."""
        n = len(self.catalogue.preamble)
        if self._loaded or not self._has_preamble():
            self._begin()
        self.llm.n_tokens = n
        try:
            self.llm.eval(piece.tokens)
            return self.llm.save_chunk(n, n + len(piece.tokens))
        finally:
            self.llm.n_tokens = min(n, self.llm.n_tokens)

    def other_words(self, question: str) -> OtherWords | None:
        """What a question may be called in other words; None where there is no room for that."""
        if question in self._other_words:
            return self._other_words[question]
        thesaurus = self._examples_for(question)
        if thesaurus is None:
            return None
        _remember(self._other_words, question, thesaurus.ask(question), N_OTHER_WORDS)
        return self._other_words[question]

    def _examples_for(self, question: str) -> Thesaurus | None:
        """Examples of other words alone in the context; None where there is no room for a question behind them."""
        if self._thesaurus is None:
            self._thesaurus = Thesaurus(self.llm, self.catalogue.form.tokenize, self.catalogue.chunk_tokens)
        thesaurus = self._thesaurus
        if not thesaurus.has_room(question):
            return None
        key = chunk_key(self.catalogue.model, self._origin, "other words", tokens=thesaurus.tokens, preamble=[])
        self._examples = self._stand(key, self._examples, thesaurus.load, thesaurus.learn)
        return thesaurus

    def likelihoods(self, question: str, passages: Sequence[str], progress: Progress | None = None) -> list[float]:
        """How likely a question is after each of some passages, read behind the preamble alone: log p. 0 for all, where there is no room for it.

        What was computed is remembered, so that an interruption loses one passage at most.

        Args:
            progress: called with (tokens read, tokens to read) after each passage; what it raises ends the reading there.
        """
        tokenize = self.catalogue.form.tokenize
        start = len(tokenize(f"{END}{QUESTION.format(question='')}".rstrip()))
        asked = tokenize(f"{END}{QUESTION.format(question=question)}")
        own = {passage: tokenize(passage.strip())[:PASSAGE_TOKENS] for passage in passages}
        if len(asked) <= start or len(asked) + PASSAGE_TOKENS > self.catalogue.chunk_tokens:
            return [0.0] * len(passages)
        missing = [passage for passage in own if (question, passage) not in self._likelihoods]
        total, done = sum(len(own[passage]) + len(asked) for passage in missing), 0
        n = len(self.catalogue.preamble)
        found = {(question, passage): self._likelihoods.get((question, passage), 0.0) for passage in own}
        for passage in missing:
            if self._loaded or not self._has_preamble():
                self._begin()
            self.llm.n_tokens = n
            try:
                value = float(self.llm.log_likelihoods([*own[passage], *asked], len(asked) - start).sum())
            finally:
                self.llm.n_tokens = min(n, self.llm.n_tokens)
            found[question, passage] = value
            _remember(self._likelihoods, (question, passage), value, N_LIKELIHOODS)
            done += len(own[passage]) + len(asked)
            if progress is not None:
                progress(done, total)
        return [found[question, passage] for passage in passages]
