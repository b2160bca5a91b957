"""What sentences mean, by the values that the KV cache holds of their tokens.

The values of a model's last layers say what it makes of a token in its place. They are kept with each chunk, so that they cost no reading. A
sentence that the model writes as a likely answer has values too. Each of its tokens is compared with each token of a text: a sentence that tells
the same in other words has a token near each (as BERTScore compares two texts). What all tokens share, the directions in which they differ most, is
taken away; and a token that stands nowhere else counts more than a frequent one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .citations import Passage
from .similar import outstanding

N_LAYERS = 3  # the last ones: one alone tells little, five hardly more
MOST_WIDTH = 1024  # numbers of a token that are compared
N_COMMON = 64  # directions that are taken away
N_TURNS = 6  # to find them
N_SAMPLE = 8192  # tokens that they are taken from, of as many chunks as
SAMPLED_CHUNKS = 16

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Written:
    """A sentence that the model wrote.

    Attributes:
        tokens: its token ids [n_tokens].
        values: theirs, folded [n_tokens, width].
    """

    tokens: Sequence[int]
    values: Floats


@dataclass(frozen=True)
class ReadChunk:
    """A chunk whose values are kept.

    Attributes:
        tokens: its token ids.
        starts: the place of the first token of each of its sentences, in their order.
        values: reads those of its tokens, folded [n_tokens, width]; None where they are gone.
    """

    tokens: Ids
    starts: Ids
    values: Callable[[], Floats | None]


@dataclass(frozen=True)
class Shared:
    """What the values of many tokens have in common.

    Attributes:
        mean: of all [width].
        directions: in which they differ most [width, n].
    """

    mean: Floats
    directions: Floats

    def taken_from(self, values: Floats) -> Floats:
        rest = values - self.mean
        return np.asarray(rest - (rest @ self.directions) @ self.directions.T, np.float32)


def folded(values: Floats) -> Floats:
    """Values of more than MOST_WIDTH numbers as that many, their angles about the same: each is added to one of those, with a sign [n, width]."""
    n, width = values.shape
    if width <= MOST_WIDTH:
        return values
    index = np.arange(width, dtype=np.uint64)
    sign = np.where((index * np.uint64(2654435761)) >> np.uint64(31) & np.uint64(1), np.float32(1), np.float32(-1))
    padded = np.zeros((n, -(-width // MOST_WIDTH) * MOST_WIDTH), np.float32)
    padded[:, :width] = values * sign
    with np.errstate(invalid="ignore", over="ignore"):  # damaged ones
        return np.asarray(padded.reshape(n, -1, MOST_WIDTH).sum(axis=1), np.float32)


def starts_of(text: str, sentences: Sequence[Passage], sizes: Ids) -> Ids:
    """The place of the first token of each sentence of a text; of a token over a border, its middle counts.

    Args:
        sizes: the bytes of each token of the text.
    """
    ends = np.cumsum(sizes) - (int(np.sum(sizes)) - len(text.encode()))  # some tokenizers put a space before a text
    borders, at, n_bytes = [], 0, 0
    for sentence in sentences:
        n_bytes += len(text[at : sentence.start].encode())
        at = sentence.start
        borders.append(n_bytes)
    return np.minimum(np.searchsorted(ends - np.asarray(sizes) / 2, borders), max(len(sizes) - 1, 0))


class Meanings:
    """The tokens of some chunks, to be compared with sentences that the model wrote.

    Args:
        chunks: None where nothing is known of one.
    """

    def __init__(self, chunks: Sequence[ReadChunk | None]) -> None:
        self._chunks = chunks
        self._often = np.bincount(np.concatenate([chunk.tokens for chunk in chunks if chunk is not None]))
        self._shared = self._found_in_all()

    def near(self, written: Sequence[Written]) -> list[Floats | None]:
        """How near each sentence of each chunk is to some sentences together, as `outstanding` counts; None where that is not known."""
        if self._shared is None:
            return [None for _ in self._chunks]
        asked = np.concatenate([_unit(self._shared.taken_from(one.values)) for one in written])
        n_all = int(self._often.sum())
        tokens = np.concatenate([one.tokens for one in written]).astype(int)
        often = np.append(self._often, 0)[np.minimum(tokens, len(self._often))]
        weights = np.log(1 + n_all / (1 + often)).astype(np.float32)
        of = np.repeat(np.arange(len(written)), [len(one.tokens) for one in written])
        found = [self._nearest(chunk, asked, weights, of) for chunk in self._chunks]
        known = [rows for rows in found if rows is not None]
        if not known:
            return [None for _ in found]
        scores = sum(outstanding(rows) for rows in np.concatenate(known, axis=1))
        ends = iter(np.split(np.asarray(scores, np.float32), np.cumsum([rows.shape[1] for rows in known])))
        return [None if rows is None else next(ends) for rows in found]

    def _nearest(self, chunk: ReadChunk | None, asked: Floats, weights: Floats, of: Ids) -> Floats | None:
        """Of each sentence of a chunk, and each written one, the weighted sum of how near its tokens come [n_written, n_sentences]."""
        values = self._values(chunk) if chunk is not None else None
        if chunk is None or values is None or self._shared is None:
            return None
        found = np.zeros((int(of[-1]) + 1, len(chunk.starts)), np.float32)
        if len(chunk.starts):
            rest = values - self._shared.mean
            squared = np.einsum("ij,ij->i", rest, rest) - np.square(rest @ self._shared.directions).sum(axis=1)
            near = asked @ rest.T / np.sqrt(np.maximum(squared, 1e-12))  # what is asked has no part in what is common
            nearest = np.maximum.reduceat(near, chunk.starts, axis=1)
            np.add.at(found, of, weights[:, None] * np.maximum(nearest, 0.0))
        return found

    @staticmethod
    def _values(chunk: ReadChunk) -> Floats | None:
        """note: kept bytes are not checked here, for that would read all of them: what is no number, or beyond f16, is 0"""
        values = chunk.values()
        if values is None or len(values) != len(chunk.tokens):
            return None
        return (
            values if np.abs(values).max(initial=0.0) < 1e5 else np.where(np.abs(values) < 1e5, values, np.float32(0))
        )

    def _found_in_all(self) -> Shared | None:
        """None: no values are there."""
        known = [chunk for chunk in self._chunks if chunk is not None and len(chunk.tokens)]
        sampled = known[:: max(1, -(-len(known) // SAMPLED_CHUNKS))]
        read = [values for chunk in sampled if (values := self._values(chunk)) is not None]
        if not read:
            return None
        rows = np.concatenate(read)
        rows = rows[:: -(-len(rows) // N_SAMPLE)]
        mean = rows.mean(axis=0)
        rows = rows - mean
        n = min(N_COMMON, rows.shape[1] // 4)
        directions = np.random.default_rng(0).normal(size=(rows.shape[1], n)).astype(np.float32)
        for _ in range(N_TURNS):  # subspace iteration: all of them would take seconds beside other programs
            directions, _ = np.linalg.qr(rows.T @ (rows @ directions))
        return Shared(mean, np.asarray(directions, np.float32))


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9), np.float32)
