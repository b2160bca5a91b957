"""What sentences mean, by the values that the KV cache holds of their tokens.

The values of a model's last layers say what it makes of a token in its place. They are kept with each chunk, so that their mean over a
sentence costs no reading. A sentence that the model writes as a likely answer has values too, and those of a sentence that tells the same
in other words are near them. What many sentences share says little: directions in which sentences differ much count less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .similar import outstanding, sentences_of

MOST_WIDTH = 1024  # numbers of a token: what is computed with them grows with the cube
SHRINK = 0.3  # of the mean variance of a direction, which is added to that of each
VERSION = 1  # of what is kept: other layers, other sentences, another mean

Floats = npt.NDArray[np.float32]


def folded(values: Floats) -> Floats:
    """Values of more than MOST_WIDTH numbers as that many, their angles about the same: each is added to one of those, with a sign [n, width]."""
    n, width = values.shape
    if width <= MOST_WIDTH:
        return values
    index = np.arange(width, dtype=np.uint64)
    sign = np.where((index * np.uint64(2654435761)) >> np.uint64(31) & np.uint64(1), np.float32(1), np.float32(-1))
    padded = np.zeros((n, -(-width // MOST_WIDTH) * MOST_WIDTH), np.float32)
    padded[:, :width] = values * sign
    return np.asarray(padded.reshape(n, -1, MOST_WIDTH).sum(axis=1), np.float32)


def of_sentences(text: str, sizes: Sequence[int], values: Floats) -> npt.NDArray[np.float16]:
    """The mean of the values of each sentence's tokens [n_sentences, width].

    Args:
        text: of a chunk.
        sizes: the bytes of each of its tokens.
        values: of each token [n_tokens, width].
    """
    sentences = sentences_of(0, text)
    ends = np.cumsum(sizes) - (sum(sizes) - len(text.encode()))  # some tokenizers put a space before a text
    middles = ends - np.asarray(sizes) / 2
    found = np.zeros((len(sentences), values.shape[1]), np.float16)
    at, n_bytes = 0, 0
    for i, sentence in enumerate(sentences):
        start = n_bytes + len(text[at : sentence.start].encode())
        at, n_bytes = sentence.stop, start + len(sentence.text.encode())
        first, behind = np.searchsorted(middles, [start, n_bytes])
        own = values[min(first, len(values) - 1) : max(behind, first + 1)]
        found[i] = np.clip(np.nan_to_num(own.mean(axis=0)), -6e4, 6e4)  # what f16 can hold
    return found


class Meanings:
    """The sentences of some chunks, to be compared with a sentence that the model wrote.

    Args:
        chunks: what `of_sentences` gave of each; None where that is not known.
    """

    def __init__(self, chunks: Sequence[npt.NDArray[np.float16] | None]) -> None:
        known = [rows for rows in chunks if rows is not None]
        self._sizes = [None if rows is None else len(rows) for rows in chunks]
        said = np.concatenate(known).astype(np.float32)
        said -= said.mean(axis=0)
        variances = (said.T @ said / len(said)).astype(np.float64)
        shrunk = variances + SHRINK * max(float(variances.trace()) / len(variances), 1e-30) * np.eye(len(variances))
        # note: with the inverse alone, for OpenBLAS takes seconds for its root where another program has one of two CPUs
        self._metric = np.linalg.inv(shrunk).astype(np.float32)
        weighed = said @ self._metric
        self._said = weighed / _length(np.einsum("ij,ij->i", weighed, said))[:, None]

    def near(self, written: Sequence[Floats], usual: Floats) -> list[Floats | None]:
        """How near each sentence of each chunk is to some sentences together, as `outstanding` counts; None where that is not known.

        Args:
            written: the values of the sentences.
            usual: those of other sentences that the model read in that place.
        """
        scores = np.zeros(len(self._said), np.float32)
        for one in written:
            meant = one - usual
            scores += outstanding(self._said @ meant / _length(meant @ self._metric @ meant))
        ends = iter(np.split(scores, np.cumsum([n for n in self._sizes if n is not None])))
        return [None if n is None else next(ends) for n in self._sizes]


def _length(squared: Any) -> Any:
    """The length that a vector's product with itself tells, and no zero."""
    return np.sqrt(np.maximum(squared, 1e-18))
