"""Texts of an asked length with needles at asked depths."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .. import documents

Count = Callable[[str], int]
"""The number of tokens of a piece of text."""

FIRST_HALVES = [*documents.ADJECTIVES, *documents.COLOURS, *documents.MATERIALS]
SECOND_HALVES = [*documents.ITEMS, *documents.ANIMALS, *documents.GOODS, *documents.WATCHWORDS]


@dataclass(frozen=True)
class Needle:
    """A sentence that has to lie at a depth, a share of the text's tokens."""

    depth: float
    sentence: str


@dataclass(frozen=True)
class Hidden:
    """A text, and where its needles begin, in the order in which they were given, as shares of its tokens."""

    text: str
    depths: tuple[float, ...]


def hide(
    rng: random.Random,
    needles: Sequence[Needle],
    filler: Callable[[], str],
    n_tokens: int,
    count: Count,
    *,
    header: str,
) -> Hidden:
    """A text of about n_tokens tokens: the header, then filler with the needles in it, a line every few sentences."""
    lengths = [count(" " + needle.sentence) for needle in needles]
    left = sorted(range(len(needles)), key=lambda i: needles[i].depth)
    depths = [0.0] * len(needles)
    rest = sum(lengths)
    pieces: list[str] = []
    used = until_break = 0

    def add(sentence: str, length: int) -> None:
        nonlocal used, until_break
        pieces.append(sentence if not pieces or pieces[-1].endswith("\n") else " " + sentence)
        used += length
        until_break -= 1
        if until_break <= 0:
            pieces[-1] += "\n"
            until_break = rng.randint(3, 9)

    add(header, count(header))
    while True:
        following = filler()
        length = count(" " + following)
        room = n_tokens - used - rest
        while left and (needles[left[0]].depth * n_tokens <= used + length / 2 or room < length):
            i = left.pop(0)
            depths[i] = min(1.0, used / n_tokens)
            rest -= lengths[i]
            add(needles[i].sentence, lengths[i])
        if n_tokens - used - rest < length:
            break
        add(following, length)
    return Hidden("".join(pieces).rstrip("\n"), tuple(depths))


def sentences(rng: random.Random, forbidden: Iterable[str]) -> Callable[[], str]:
    """Filler without end, of the document generator's sentences, in which none of the forbidden words occurs."""
    taken = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(forbidden))) + r")\b", re.IGNORECASE)

    def next_sentence() -> str:
        while True:
            sentence = rng.choice(documents.FILLER).fill(rng)
            if not taken.search(sentence):
                return sentence

    return next_sentence


def repeated(unit: Sequence[str]) -> Callable[[], str]:
    """Filler without end: the same sentences over and over."""
    n_said = 0

    def next_sentence() -> str:
        nonlocal n_said
        n_said += 1
        return unit[(n_said - 1) % len(unit)]

    return next_sentence


def compounds(rng: random.Random, n: int) -> list[str]:
    """Different pairs of words such as "copper lantern", of which no two share a half where there are few."""
    if n <= min(len(FIRST_HALVES), len(SECOND_HALVES)):
        halves = zip(rng.sample(FIRST_HALVES, n), rng.sample(SECOND_HALVES, n))
        return [f"{first} {second}" for first, second in halves]
    words: dict[str, None] = {}
    while len(words) < n:
        words[f"{rng.choice(FIRST_HALVES)} {rng.choice(SECOND_HALVES)}"] = None
    return list(words)


def codes(rng: random.Random, n: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(number) for number in rng.sample(range(10_000, 100_000), n)]


def random_depths(rng: random.Random, n: int) -> list[float]:
    """One depth in each n-th of a text, in order."""
    return [(i + rng.random()) / n for i in range(n)]
