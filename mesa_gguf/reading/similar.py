"""Passages that tell in other words what a question asks.

Words that mean nearly the same have embeddings that are near each other, in the table with which a model begins to read too. So each word of the
question is compared with each word of the documents; what the model itself takes for other words (other_words.py) counts as much, where it was asked.
How near is near differs from word to word: what counts is by how many standard deviations a word is nearer than the document's words are on
the average. A sentence has the sum over the question's words of the nearest word in it; words that have much that is near them count less.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..library.index import terms_of
from .citations import Passage, passages

if TYPE_CHECKING:  # which takes sentences from here
    from .other_words import OtherWords

TABLE = "token_embd.weight"  # llama.cpp's name of it, for every architecture
N_SAMPLE = 1024  # rows that what all embeddings have in common is taken from
N_COMMON = 8  # directions of it
N_TURNS = 8  # to find them
NEAR = 2.0  # standard deviations from which on a word counts,
NEAREST = 4.0  # and how many more count in full: the word itself is hardly more than a good synonym
SENTENCE_CHARS = 60  # shorter ones are taken together
SENTENCE_WORDS = 16  # different ones: sentences of many more count less
WINDOW_CHARS = 160  # of a sentence with its neighbours, as the model reads it
OF_ONE_TEXT = 3  # passages: the nearest one need not be the one that tells it
SAID = 0.5  # how much a word counts that the model expects in an answer,
EXPECTED = 1.0  # standard deviations from which on one counts that it could have written,
SURELY = 6.0  # and how many more count in full
RARE = 0.05  # of all chunks have a rare word
TOGETHER = 0.3  # of a question stands in a passage where two rare words do for another reason than by chance
NAMED = 0.3  # of a question is matched where one name of it is
N_CACHED = 2**24  # numbers that word vectors take in memory: 64 MiB

_WITHIN = re.compile(r"(?<![.!?] )(?<!^)\b\w+|\b\w*\d\w*")  # words but the first of each sentence, and numbers

Tokenize = Callable[[str], Sequence[int]]
Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.floating[Any]]


class WordVectors:
    """What a model's table of input embeddings has for words.

    Args:
        path: the model's file.
        n_vocab: tokens of its vocabulary.
        tokenize: gives the tokens of a text.
    """

    def __init__(self, path: Path, n_vocab: int, tokenize: Tokenize) -> None:
        self._path, self._n_vocab, self._tokenize = path, n_vocab, tokenize
        self._mean: Any = None
        self._common: Any = None
        self._kept: dict[str, Floats] = {}
        self._split: dict[str, tuple[int, ...]] = {}

    def of(self, words: Sequence[str]) -> Floats | None:
        """A vector of length 1 for each word [n_words, n_embd]; None where the file has no such table.

        Raises:
            RuntimeError: the file cannot be read any more.
        """
        if self._mean is None and not self._prepare():
            return None
        new = [word for word in dict.fromkeys(words) if word not in self._kept]
        tokens = [self._tokens(word) for word in new]
        ids = sorted({token for own in tokens for token in own})
        place = {token: i for i, token in enumerate(ids)}
        rows = self._centred(self._rows(ids)) if ids else np.zeros((0, len(self._mean)), np.float32)
        found = {
            word: _unit(rows[[place[token] for token in own]].sum(axis=0)) if own else np.zeros_like(self._mean)
            for word, own in zip(new, tokens)
        }
        if (len(self._kept) + len(found)) * len(self._mean) > N_CACHED:
            self._kept = {word: self._kept[word] for word in words if word in self._kept}
        everything = self._kept | found
        if len(everything) * len(self._mean) <= N_CACHED:
            self._kept = everything
        return np.stack([everything[word] for word in words]) if words else rows[:0]

    def beginnings(self, words: Sequence[str]) -> tuple[npt.NDArray[np.intp], Floats]:
        """The token that each word begins with in a text, and how much that tells of the word: 1 where it is the whole word."""
        found = [self._tokens(word) for word in words]
        first = np.array([own[0] if own else 0 for own in found], np.intp)
        return first, np.array([len(own) ** -2.0 if own else 0.0 for own in found], np.float32)

    def _tokens(self, word: str) -> tuple[int, ...]:
        """Of a word within a text."""
        if word not in self._split:
            self._split[word] = tuple(self._tokenize(f" {word}"))
        return self._split[word]

    def _rows(self, ids: Sequence[int]) -> Any:
        return _core.tensor_rows(str(self._path), TABLE, ids)

    def _prepare(self) -> bool:
        """Find what all embeddings have in common, which says nothing of a word."""
        rows = self._rows(np.linspace(0, self._n_vocab - 1, min(N_SAMPLE, self._n_vocab)).astype(int).tolist())
        if rows is None:
            return False
        self._mean = rows.mean(axis=0)
        rows = rows - self._mean
        common = np.random.default_rng(0).normal(size=(rows.shape[1], N_COMMON)).astype(np.float32)
        for _ in range(N_TURNS):  # subspace iteration: all of them would take seconds for a large model
            common, _ = np.linalg.qr(rows.T @ (rows @ common))
        self._common = common
        return True

    def _centred(self, rows: Floats) -> Floats:
        rows = rows - self._mean
        return _unit(rows - (rows @ self._common) @ self._common.T)


def _unit(vectors: Any) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9), np.float32)


@dataclass(frozen=True)
class Near:
    """A passage that is like a question.

    Attributes:
        number: of its sentence, among those of all texts.
        source: the number of the text that it is of.
        text: the sentence and its neighbours.
    """

    number: int = field(compare=False)
    source: int
    text: str


def sentences_of(source: int, text: str) -> list[Passage]:
    """Those of a text that have words; short ones are taken together."""
    return [one for one in passages(source, text, chars=SENTENCE_CHARS) if terms_of(one.text)]


def outstanding(scores: Scores) -> Scores:
    """By how many standard deviations each score is above the mean of all."""
    if not len(scores):
        return scores
    return np.asarray((scores - scores.mean()) / max(float(scores.std()), 1e-9), scores.dtype)


class SimilarPassages:
    """The sentences of some texts, to be compared with questions."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._sentences: list[Passage] = []
        for source, text in enumerate(texts):
            self._sentences += sentences_of(source, text)
        own = [terms_of(sentence.text) for sentence in self._sentences]
        self._found_in = Counter(word for words in own for word in words)
        self._words = list(self._found_in)
        self._often = np.array([self._found_in[word] for word in self._words])
        number = {word: i for i, word in enumerate(self._words)}
        self._all = np.fromiter((number[word] for words in own for word in words), np.intp)
        self._sizes = np.array([len(words) for words in own])

    def scores(self, question: str, vectors: WordVectors, other: OtherWords | None = None) -> Scores | None:
        """How near the words of each sentence are to those of a question, 0 where none is near [n_sentences]; None where there is
        nothing to compare, or the model has no vectors for words.

        Args:
            other: what the model makes of the question.

        Raises:
            RuntimeError: the model's file cannot be read any more.
        """
        asked = terms_of(question)
        if not asked or not self._sentences:
            return None
        near = self._near(asked, vectors)
        if near is None:
            return None
        if other is not None:
            near = (near + self._likely(other.likely, vectors)) / math.sqrt(2)
        scores = self._scores(np.clip((near - NEAR) / NEAREST, 0.0, 1.0))
        if other is not None:
            said = self._near(terms_of(other.sentence), vectors)
            if said is not None:
                scores += SAID * self._scores(np.clip((said - NEAR) / NEAREST, 0.0, 1.0))
            expected = self._likely(other.expected[None], vectors)
            scores += self._scores(np.clip((expected - EXPECTED) / SURELY, 0.0, 1.0))
        return scores

    def best(self, scores: Scores, n: int | None = None) -> list[Near]:
        """The n passages with the best scores of their sentences, few of one text, the best first; None: all of them that have one above 0."""
        taken: Counter[int] = Counter()
        found: list[Near] = []
        for i in np.argsort(-scores, kind="stable").tolist():
            if len(found) == n or (n is None and scores[i] <= 0):
                break
            source = self._sentences[i].source
            if taken[source] < OF_ONE_TEXT:
                found.append(Near(i, source, self._window(i)))
                taken[source] += 1
        return found

    def of_texts(self, n: int) -> list[list[Passage]]:
        """The sentences of each of the first n texts."""
        found: list[list[Passage]] = [[] for _ in range(n)]
        for sentence in self._sentences:
            found[sentence.source].append(sentence)
        return found

    def of_sentences(self, values: Sequence[Floats | None]) -> Floats:
        """What is known of each text's sentences, one after the other; 0 where nothing is [n_sentences]."""
        sizes = Counter(sentence.source for sentence in self._sentences)
        rows = [np.zeros(sizes[i], np.float32) if own is None else own for i, own in enumerate(values)]
        return np.concatenate(rows)

    def _near(self, words: Sequence[str], vectors: WordVectors) -> Floats | None:
        """How near each word of the texts is to some words, in standard deviations [words, theirs]."""
        own, theirs = vectors.of(words), vectors.of(self._words)
        return None if own is None or theirs is None or not len(own) else _standard(own @ theirs.T)

    def _likely(self, rows: Floats, vectors: WordVectors) -> Floats:
        """How likely each word of the texts is, by the token that it begins with, in standard deviations [rows, theirs]."""
        tokens, shares = vectors.beginnings(self._words)
        return _standard(rows[:, tokens]) * shares

    def _scores(self, near: Floats) -> npt.NDArray[np.float64]:
        """Of each sentence, from how near each word of the texts is, 0 ... 1 [words, theirs]."""
        weight = np.log(1 + len(self._sentences) / (1 + near @ self._often))
        starts = np.cumsum(self._sizes) - self._sizes
        scores = np.maximum.reduceat((near * weight[:, None])[:, self._all], starts, axis=1).sum(axis=0)
        return np.asarray(scores / np.sqrt(1 + self._sizes / SENTENCE_WORDS), np.float64)

    def _window(self, i: int) -> str:
        """A sentence with its neighbours, those before it first, as far as they fit."""
        first = last = i
        room = WINDOW_CHARS - len(self._sentences[i].text)
        while True:
            for other in (first - 1, last + 1):
                sentence = self._sentences[other] if 0 <= other < len(self._sentences) else None
                if sentence and sentence.source == self._sentences[i].source and len(sentence.text) <= room:
                    room -= len(sentence.text)
                    first, last = min(first, other), max(last, other)
                    break
            else:
                return " ".join(sentence.text.strip() for sentence in self._sentences[first : last + 1])


def _standard(values: Floats) -> Floats:
    """By how many standard deviations each value is above its row's mean."""
    mean, deviation = values.mean(axis=1, keepdims=True), values.std(axis=1, keepdims=True)
    return np.asarray((values - mean) / np.maximum(deviation, 1e-6), np.float32)


def evidence(question: str, texts: Sequence[str], n_texts: int, found_in: Callable[[str], int]) -> float:
    """The share of a question's words that one passage of some texts has, rare words counting more; 1 for a question of no words, and
    where a passage has three tenths of them with two rare ones, or several have two rare names. One rare name is some evidence at least.

    Args:
        n_texts: of all texts.
        found_in: how many of them a word stands in.
    """
    often = {word: found_in(word) for word in terms_of(question)}
    weight = {word: math.log(1 + n_texts / max(n, 0.5)) for word, n in often.items()}
    own = [set(terms_of(passage.text)) & weight.keys() for text in texts for passage in passages(0, text)]
    rare = {word for word, n in often.items() if n <= RARE * n_texts}
    named = rare & names_of(question).keys() & set().union(*own)
    if not weight or len(named) >= 2:
        return 1.0
    shares = [(sum(weight[word] for word in words) / sum(weight.values()), words) for words in own]
    if any(share >= TOGETHER and len(words & rare) >= 2 for share, words in shares):
        return 1.0
    share = max((share for share, _ in shares), default=0.0)
    return max(share, NAMED) if named else share


def names_of(question: str) -> dict[str, str]:
    """The words of a question that look like names, in capitals within a sentence or with digits, as they are searched -> as they are written."""
    found = [match[0] for match in _WITHIN.finditer(question)]
    names = [word for word in found if word[0].isupper() or any(c.isdigit() for c in word)]
    return {term: word for word in names for term in terms_of(word)}
