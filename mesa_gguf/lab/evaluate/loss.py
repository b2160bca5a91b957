"""Log-loss by token position, and of answers.

For each length L the loss of the last W tokens of a window of L tokens is taken: tokens that have L - W to L - 1 tokens
before them. The windows slide over the text, and their last W tokens are the same ones for every length and every
method, so that what differs is what was read before them and nothing else. With chunked methods the last chunk alone
reads everything; W tokens should fit into it (T/8 do), or the loss of a part of them is that of a middle chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ...errors import PromptError
from ...llama import MesaLlama


def window_ends(n_text: int, longest: int, tail: int, n_windows: int) -> list[int]:
    """Where the windows end in a text of n_text tokens: evenly spread, the last at the text's end.

    There are fewer than n_windows of them if their tails would overlap.

    Raises:
        PromptError: the longest window is longer than the text.
    """
    room = n_text - longest
    if room < 0:
        raise PromptError(f"the text has {n_text} tokens, the longest window takes {longest}: give a longer text")
    n = min(n_windows, 1 + room // tail)
    return [n_text - k * room // max(1, n - 1) for k in reversed(range(n))]


def token_loss(logits: npt.NDArray[np.float32], token: int) -> float:
    """Log-loss in nats of a token by the logits [n_vocab] that were computed for its place."""
    row = logits.astype(np.float64)
    row -= row.max()
    return float(np.log(np.exp(row).sum()) - row[token])


def tail_losses(llm: MesaLlama, tokens: Sequence[int], tail: int) -> list[float]:
    """Log-loss in nats of each of the last `tail` tokens of a text, read at once into an empty context.

    Args:
        tokens: at least tail + 1.
    """
    targets = iter(tokens[-tail:])
    losses: list[float] = []

    def take(logits: npt.NDArray[np.float32]) -> None:
        losses.extend(token_loss(row, next(targets)) for row in logits)

    own_batch: Any = llm._batch
    batch = _TailBatch(llm, len(tokens) - 1 - tail, take)
    llm._batch = cast(Any, batch)
    try:
        llm.reset()
        llm.eval(tokens[:-1])
        batch.flush()
    finally:
        llm._batch = own_batch
    return losses


@dataclass(frozen=True)
class Begun:
    """How an answer follows what it was begun with.

    Attributes:
        exact: each of its tokens is the likeliest, so that greedy decoding would write it.
        logprob: the mean over its tokens of the log-probability, in nats.
    """

    exact: bool
    logprob: float


def score_begun(llm: MesaLlama, n_document: int, before: Sequence[int], answer: Sequence[int]) -> Begun:
    """Score an answer behind a document that is in the context.

    Args:
        n_document: tokens of the context that stay; what follows them is forgotten.
        before: the question, and what the answer begins with.
    """
    targets = iter(answer)
    losses: list[float] = []
    exact = True

    def take(logits: npt.NDArray[np.float32]) -> None:
        nonlocal exact
        for row in logits:
            token = next(targets)
            exact = exact and int(row.argmax()) == token
            losses.append(token_loss(row, token))

    own_batch: Any = llm._batch
    batch = _TailBatch(llm, n_document + len(before) - 1, take)
    llm._batch = cast(Any, batch)
    try:
        llm.n_tokens = n_document  # eval() goes on from here
        llm.eval([*before, *answer[:-1]])
        batch.flush()
    finally:
        llm._batch = own_batch
    return Begun(exact, -sum(losses) / len(losses))


class _TailBatch:
    """Stands in for the batch of a `Llama`: asks for the logits of the tokens from start on, and for no others.

    `logits_all` would keep n_ctx times n_vocab of them.
    """

    def __init__(self, llm: MesaLlama, start: int, take: Any) -> None:
        self._llm = llm
        self._start = start
        self._take = take
        self._inner = llm._batch
        self._n_rows = 0

    @property
    def batch(self) -> Any:
        return self._inner.batch

    def set_batch(self, batch: Sequence[int], n_past: int, logits_all: bool) -> None:
        self.flush()
        self._inner.set_batch(batch, n_past, logits_all=False)
        first = max(0, self._start - n_past)
        for i in range(first, len(batch)):
            self._inner.batch.logits[i] = True
        self._n_rows = max(0, len(batch) - first)

    def flush(self) -> None:
        """Hand on the logits of the batch that was decoded last."""
        if self._n_rows:
            shape = (self._n_rows, self._llm.n_vocab())
            self._take(np.ctypeslib.as_array(self._llm._ctx.get_logits(), shape=shape))
            self._n_rows = 0
