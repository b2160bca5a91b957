"""What an answer attended to, passage by passage, while it was generated.

Each token of an answer attends to what it is taken from; that is measured, where words that are shared only suggest it. Every layer
also has passages that it attends to whatever is asked. So what the beginning of the question draws, which asks nothing yet, is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..llama import MesaLlama
from .citations import Passage
from .shelf import Piece

LAYERS = 8
N_CALM = 2  # tokens of the question's beginning, of which the last one asks nothing yet: a line break and a word like "Question"

Shares = npt.NDArray[np.float64]


def token_starts(llm: MesaLlama, piece: Piece, passages: Sequence[Passage]) -> npt.NDArray[np.int64]:
    """The first token of each passage of a chunk, in tokens of the chunk; a token over a border belongs to where its middle lies."""
    ends = np.cumsum([len(llm.token_bytes(token)) for token in piece.tokens])
    ends -= ends[-1] - len(piece.text.encode())  # some tokenizers put a space before a text
    sizes = np.diff(ends, prepend=0)
    starts = [len(piece.text[: passage.start - piece.span.start].encode()) for passage in passages]
    return np.minimum(np.searchsorted(ends - sizes / 2, starts), len(sizes) - 1)


class Attended:
    """Sums up what tokens attend to, by passage.

    Args:
        starts: the first token of each passage in the context, in order.
        stop: the token after the last passage.
    """

    def __init__(self, starts: npt.NDArray[np.int64], stop: int) -> None:
        self._starts, self._stop = starts, stop
        self.calm: Shares = np.zeros(len(starts))  # what a token that asks nothing attends to
        self._sum: Shares = np.zeros(len(starts))

    def of(self, weights: npt.NDArray[np.float32]) -> Shares:
        """The share of each passage in what a token attends to, [layer, token], on the average of the layers; what lies before and
        behind the passages is left out."""
        read = weights[:, : self._stop].astype(np.float64)
        mass = np.add.reduceat(read, self._starts, axis=1)
        mass[:, np.append(self._starts[1:] == self._starts[:-1], False)] = 0.0  # passages of no token of their own
        return np.asarray((mass / np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)).mean(axis=0))

    def add(self, weights: npt.NDArray[np.float32]) -> None:
        """Note what a token of the answer was taken from."""
        self._sum += np.maximum(self.of(weights) - self.calm, 0.0)

    @property
    def shares(self) -> Shares:
        """The share of each passage in what the answer was taken from."""
        return np.asarray(self._sum / max(self._sum.sum(), 1e-30))
