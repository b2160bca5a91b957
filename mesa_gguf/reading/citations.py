"""Where an answer stands in what was read.

Every passage of the chunks that were read is scored by the words that it shares with the answer and the question, rare words more
than common ones. That needs no model; it says nothing of passages that mean the same in other words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..library.index import terms_of, words_of

PASSAGE_CHARS = 320  # about 64 tokens
ANSWER_WEIGHT = 3.0  # of a word of the answer, beside one of the question
LATER_WEIGHT = (
    0.3  # of a word that the answer has behind its first statement, where small models go on with what was read last
)
MAX_CITATIONS = 3
LEAST_SHARE = 0.3  # of the best passage's score, to be cited beside it

_ENDS = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Passage:
    """A piece of a document's text.

    Attributes:
        source: of what was read, as the caller counts it.
        start, stop: in characters of that text.
    """

    source: int
    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class Scored:
    """A passage as a citation.

    Attributes:
        weight: its share of the scores of the passages that are cited.
        literal: the answer, or each number and name in it, stands there word by word.
    """

    passage: Passage
    weight: float
    literal: bool


def passages(source: int, text: str, start: int = 0) -> list[Passage]:
    """A text in pieces of whole sentences, about PASSAGE_CHARS each.

    Args:
        start: where the text begins, in the document that it is of.
    """
    found: list[Passage] = []
    begin = 0
    borders = [match.end() for match in _ENDS.finditer(text)] + [len(text)]
    end = 0
    for border in borders:
        if border - begin > PASSAGE_CHARS and end > begin:
            found.append(Passage(source, start + begin, start + end, text[begin:end]))
            begin = end
        end = border
    if end > begin:
        found.append(Passage(source, start + begin, start + end, text[begin:end]))
    return [passage for passage in found if passage.text.strip()]


def cite(question: str, answer: str, read: Iterable[Passage], n: int = MAX_CITATIONS) -> list[Scored]:
    """The passages that an answer is likely to come from, the likeliest first; none where nothing is shared."""
    candidates = list(read)
    if not candidates or not answer.strip():
        return []
    words = [Counter(word.casefold() for word in _WORD.findall(words_of(passage.text))) for passage in candidates]
    seen = Counter(word for own in words for word in own)

    def weight(word: str) -> float:
        return math.log(1 + len(candidates) / seen[word])

    asked, said = terms_of(question), terms_of(first_statement(answer))
    new = [word for word in said if word not in asked]
    later = [word for word in terms_of(answer) if word not in asked and word not in said]
    scores = []
    for own in words:
        score = sum(weight(word) for word in asked if word in own)
        score += ANSWER_WEIGHT * sum(weight(word) for word in new if word in own)
        score += LATER_WEIGHT * sum(weight(word) for word in later if word in own)
        scores.append(score / math.sqrt(1 + sum(own.values()) / 64))
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    best = scores[order[0]]
    if best <= 0:
        return []
    taken = [i for i in order[:n] if scores[i] >= LEAST_SHARE * best]
    total = sum(scores[i] for i in taken)
    return [Scored(candidates[i], scores[i] / total, is_literal(answer, candidates[i].text, new)) for i in taken]


def first_statement(answer: str) -> str:
    """An answer up to the end of the first sentence that tells something: not "The answer is:"."""
    begin = 0
    for match in _ENDS.finditer(answer):
        sentence = answer[begin : match.start()].strip()
        if sentence and not sentence.endswith(":"):
            return sentence
        begin = match.end()
    return answer[begin:].strip() or answer


def is_literal(answer: str, text: str, telling: Sequence[str] = ()) -> bool:
    """Whether an answer stands in a text: as a whole, or with each of the words that tell something."""
    plain, within = (" ".join(_WORD.findall(words_of(value).casefold())) for value in (answer, text))
    if plain and f" {plain} " in f" {within} ":
        return True
    words = set(within.split())
    return bool(telling) and all(word in words for word in telling)


def stands_in(question: str, answer: str, texts: Iterable[str]) -> bool:
    """Whether at least half of the words that an answer adds to the question stand in some texts."""
    asked = set(terms_of(question))
    new = [word for word in terms_of(answer) if word not in asked]
    there = {word.casefold() for text in texts for word in _WORD.findall(words_of(text))}
    return 2 * sum(word in there for word in new) >= len(new)
