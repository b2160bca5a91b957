"""Passages that tell in other words what a question asks.

Words that mean nearly the same have embeddings that are near each other, in the table with which a model begins to read too. So each word of the
question is compared with each word of the documents. How near is near differs from word to word: what counts is by how many standard deviations
a word is nearer than the document's words are on the average. A passage has the sum over the question's words of the nearest word in it; words
that have much that is near them count less. It needs rows of the model's file, and no computation of the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core
from ..library.index import terms_of
from .citations import passages

TABLE = "token_embd.weight"  # llama.cpp's name of it, for every architecture
N_SAMPLE = 1024  # rows that what all embeddings have in common is taken from
N_COMMON = 8  # directions of it
N_TURNS = 8  # to find them
NEAR = 2.0  # standard deviations from which on a word counts,
NEAREST = 4.0  # and how many more count in full: the word itself is hardly more than a good synonym
PASSAGE_WORDS = 16  # different ones: passages of many more count less
RARE = 0.05  # of all chunks have a rare word
N_CACHED = 2**24  # numbers that word vectors take in memory: 64 MiB

Tokenize = Callable[[str], Sequence[int]]
Floats = npt.NDArray[np.float32]


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

    def of(self, words: Sequence[str]) -> Floats | None:
        """A vector of length 1 for each word [n_words, n_embd]; None where the file has no such table.

        Raises:
            RuntimeError: the file cannot be read any more.
        """
        if self._mean is None and not self._prepare():
            return None
        new = [word for word in dict.fromkeys(words) if word not in self._kept]
        tokens = [list(self._tokenize(f" {word}")) for word in new]
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
        source: the number of the text that it is of.
    """

    source: int
    text: str
    score: float


class SimilarPassages:
    """The passages of some texts, to be compared with questions."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._passages = [
            (source, passage.text) for source, text in enumerate(texts) for passage in passages(source, text)
        ]
        own = [terms_of(text) for _, text in self._passages]
        self._passages = [passage for passage, words in zip(self._passages, own) if words]
        own = [words for words in own if words]
        self._found_in = Counter(word for words in own for word in words)
        self._words = list(self._found_in)
        number = {word: i for i, word in enumerate(self._words)}
        self._all = np.fromiter((number[word] for words in own for word in words), np.intp)
        self._sizes = np.array([len(words) for words in own])

    def nearest(self, question: str, vectors: WordVectors) -> list[Near]:
        """The nearest passage of each text, the nearest text first; none where the model has no vectors for words.

        Raises:
            RuntimeError: the model's file cannot be read any more.
        """
        asked = terms_of(question)
        if not asked or not self._passages:
            return []
        own, theirs = vectors.of(asked), vectors.of(self._words)
        if own is None or theirs is None:
            return []
        near = own @ theirs.T  # [asked, words]
        near = (near - near.mean(axis=1, keepdims=True)) / np.maximum(near.std(axis=1, keepdims=True), 1e-6)
        near = np.clip((near - NEAR) / NEAREST, 0.0, 1.0)
        often = near @ np.array([self._found_in[word] for word in self._words])
        near *= np.log(1 + len(self._passages) / (1 + often))[:, None]
        starts = np.cumsum(self._sizes) - self._sizes
        scores = np.maximum.reduceat(near[:, self._all], starts, axis=1).sum(axis=0)
        scores /= np.sqrt(1 + self._sizes / PASSAGE_WORDS)
        best: dict[int, Near] = {}
        for i in np.argsort(-scores, kind="stable"):
            source, text = self._passages[i]
            if source not in best and scores[i] > 0:
                best[source] = Near(source, text, float(scores[i]))
        return list(best.values())


def evidence(question: str, texts: Sequence[str], n_texts: int, found_in: Callable[[str], int]) -> float:
    """The share of a question's words that one passage of some texts has, rare words counting more; 1 for a question of no words, and
    where a passage has two rare ones: a name.

    Args:
        n_texts: of all texts.
        found_in: how many of them a word stands in.
    """
    often = {word: found_in(word) for word in terms_of(question)}
    weight = {word: math.log(1 + n_texts / max(n, 0.5)) for word, n in often.items()}
    own = [set(terms_of(passage.text)) & weight.keys() for text in texts for passage in passages(0, text)]
    if not weight or any(sum(often[word] <= RARE * n_texts for word in words) >= 2 for words in own):
        return 1.0
    return max((sum(weight[word] for word in words) for words in own), default=0.0) / sum(weight.values())
