"""A plan in words and in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from .._core import Params
from ..config import MesaPlan


@dataclass(frozen=True)
class Chunk:
    """Queries start .. stop-1, which attend to keys 0 .. n_first-1 and causally to those from own on."""

    kind: str
    start: int
    stop: int
    n_first: int
    own: int


def chunks(plan: MesaPlan, n_tokens: int) -> Iterator[Chunk]:
    starts = [start for start in plan.chunk_starts if start < n_tokens]
    if plan.last_start == 0:
        yield Chunk("last", 0, n_tokens, 0, 0)
        return
    for start, stop in pairwise([*starts, n_tokens]):
        if start == plan.last_start:
            yield Chunk("last", start, stop, 0, 0)
        elif start == 0:
            yield Chunk("first", start, stop, 0, 0)
        else:
            yield Chunk("middle", start, stop, starts[1], start)


def n_pairs(chunk: Chunk) -> int:
    """Pairs of query and key."""
    n = chunk.stop - chunk.start
    return n * (chunk.n_first + chunk.start - chunk.own) + n * (n + 1) // 2


@dataclass(frozen=True)
class PlanSummary:
    """A plan of n_tokens tokens for a model trained at train_length, of which reading_length is used.

    Attributes:
        n_positions: one more than the largest position that is reached.
        attention: pairs of query and key that are computed, as a share of those of full causal attention.
    """

    n_tokens: int
    train_length: int
    reading_length: int
    chunk_starts: list[int]
    anchor: int
    stair_width: int
    n_positions: int
    attention: float

    @property
    def is_plain(self) -> bool:
        """Read as stock llama.cpp reads it."""
        return len(self.chunk_starts) == 1 and self.anchor == 0


def summarize(plan: MesaPlan, n_tokens: int, params: Params) -> PlanSummary:
    """The numbers of a plan that was made from params (`MesaConfig.params`)."""
    full = n_tokens * (n_tokens + 1) // 2
    return PlanSummary(
        n_tokens=n_tokens,
        train_length=params.train_length,
        reading_length=params.reading_length,
        chunk_starts=plan.chunk_starts,
        anchor=plan.anchor,
        stair_width=plan.stair_width,
        n_positions=plan.n_positions(n_tokens),
        attention=sum(n_pairs(chunk) for chunk in chunks(plan, n_tokens)) / full,
    )


class Lengths(Protocol):
    """A plan's summary, or a model."""

    @property
    def train_length(self) -> int: ...
    @property
    def reading_length(self) -> int: ...


def range_of(lengths: Lengths) -> str:
    """The length that texts are read plainly up to, by the name that says most of it."""
    if lengths.reading_length == lengths.train_length:
        return f"trained length ({lengths.train_length})"
    return f"reading length ({lengths.reading_length})"


def format_line(summary: PlanSummary) -> str:
    """One line."""
    if summary.is_plain:
        return f"{summary.n_tokens} tokens fit into the {range_of(summary)}: read as stock llama.cpp"
    return (
        f"{summary.n_tokens} tokens in {len(summary.chunk_starts)} chunks, stair width {summary.stair_width}, "
        f"anchor {summary.anchor}, {summary.n_positions} positions of {summary.reading_length}, "
        f"{summary.attention:.1%} of full attention"
    )


def format_summary(summary: PlanSummary) -> str:
    """Several lines."""
    if summary.is_plain:
        return format_line(summary)
    starts = summary.chunk_starts
    middle = [stop - start for start, stop in pairwise(starts[1:])]
    lengths = (
        f"{len(middle)} of {min(middle)}" + (f" … {max(middle)}" if min(middle) != max(middle) else "")
        if middle
        else "none"
    )
    rows = [
        ("text", f"{summary.n_tokens} tokens, {summary.n_tokens / summary.train_length:.1f} times the trained length"),
        ("trained length", f"{summary.train_length} tokens"),
        ("reading length", f"{summary.reading_length} tokens"),
        ("first chunk", f"{starts[1]} tokens"),
        ("middle chunks", f"{lengths} tokens" if middle else lengths),
        ("last chunk", f"{summary.n_tokens - starts[-1]} tokens, from token {starts[-1]}"),
        ("anchor", f"token {summary.anchor}"),
        ("stair width", f"{summary.stair_width} tokens a step"),
        ("positions", f"{summary.n_positions} of {summary.reading_length}"),
        ("attention", f"{summary.attention:.1%} of what full causal attention computes"),
    ]
    return "\n".join(f"{key:<16}{value}" for key, value in rows)
