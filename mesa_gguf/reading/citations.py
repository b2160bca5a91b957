"""Where an answer stands in what was read.

Every passage of the chunks that were read is scored by what the answer attended to while it was generated (attended.py), and by the
words that it shares with the answer and the question, rare words more than common ones. Words alone need no model, but say nothing of
passages that mean the same in other words, and are misled by passages with the same words.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..library.index import terms_of, words_of

PASSAGE_CHARS = 320  # about 64 tokens
BROKEN_CHARS = 40  # of a line that goes on in the next one
ANSWER_WEIGHT = 3.0  # of a word of the answer, beside one of the question
LATER_WEIGHT = (
    0.3  # of a word that the answer has behind its first statement, where small models go on with what was read last
)
WORDS_WEIGHT = 0.5  # of the share of words, beside the share of attention
MAX_CITATIONS = 3
LEAST_SHARE = 0.3  # of the best passage's score, to be cited beside it

_ENDS = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_WORD = re.compile(r"\w+")
_FIELD = re.compile(r'"(?:[^"\\]|\\.)*"\s*:')  # of JSON


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


def passages(source: int, text: str, start: int = 0, chars: int = PASSAGE_CHARS) -> list[Passage]:
    """A text in pieces of whole sentences.

    Args:
        start: where the text begins, in the document that it is of.
        chars: of each, about.
    """
    found: list[Passage] = []
    begin = 0
    end = 0
    for border in _borders(text):
        if border - begin > chars and end > begin:
            found.append(Passage(source, start + begin, start + end, text[begin:end]))
            begin = end
        end = border
    if end > begin:
        found.append(Passage(source, start + begin, start + end, text[begin:end]))
    return [passage for passage in found if passage.text.strip()]


def _borders(text: str) -> list[int]:
    """Where its sentences end: also at the end of a line, unless the line was only broken there, as in text of a fixed width."""
    found = [0]
    for match in _ENDS.finditer(text):
        line = match.start() - text.rfind("\n", 0, match.start()) - 1
        before, behind = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 64].lstrip(" ")[:1]
        broken = match[0] == "\n" and line >= BROKEN_CHARS and (before.isalnum() or before == ",") and behind.islower()
        if not broken or match.end() - found[-1] > PASSAGE_CHARS:
            found.append(match.end())
    return [*found[1:], len(text)]


def cite(
    question: str,
    answer: str,
    read: Iterable[Passage],
    n: int = MAX_CITATIONS,
    attended: npt.NDArray[np.float64] | None = None,
) -> list[Scored]:
    """The passages that an answer is likely to come from, the likeliest first; none where nothing is shared.

    Args:
        attended: the share of each passage in what the answer attended to; None: by words alone.
    """
    candidates = list(read)
    if not candidates or not answer.strip():
        return []
    asked, said = terms_of(question), terms_of(first_statement(answer))
    new = [word for word in said if word not in asked]
    later = [word for word in terms_of(answer) if word not in asked and word not in said]
    scores = by_words(asked, new, later, candidates)
    if attended is not None and attended.any():
        scores = attended + WORDS_WEIGHT * scores / max(float(scores.sum()), 1e-30)
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    best = scores[order[0]]
    if best <= 0:
        return []
    taken = [i for i in order[:n] if scores[i] >= LEAST_SHARE * best]
    total = sum(scores[i] for i in taken)
    return [Scored(candidates[i], float(scores[i] / total), is_literal(answer, candidates[i].text, new)) for i in taken]


def by_words(
    asked: Sequence[str], new: Sequence[str], later: Sequence[str], candidates: Sequence[Passage]
) -> npt.NDArray[np.float64]:
    """How many words each passage shares with a question, and with what the answer adds to it, in its first statement and later."""
    words = [Counter(word.casefold() for word in _WORD.findall(words_of(passage.text))) for passage in candidates]
    seen = Counter(word for own in words for word in own)

    def weight(word: str) -> float:
        return math.log(1 + len(candidates) / seen[word])

    scores = []
    for own in words:
        score = sum(weight(word) for word in asked if word in own)
        score += ANSWER_WEIGHT * sum(weight(word) for word in new if word in own)
        score += LATER_WEIGHT * sum(weight(word) for word in later if word in own)
        scores.append(score / math.sqrt(1 + sum(own.values()) / 64))
    return np.asarray(scores)


def closest_sentence(question: str, text: str) -> str:
    """The sentence of a text that shares most words with a question, rare ones counting more."""
    borders = _borders(text)
    sentences = [text[begin:end].strip() for begin, end in pairwise([0, *borders]) if text[begin:end].strip()]
    words = [{word.casefold() for word in _WORD.findall(words_of(sentence))} for sentence in sentences]
    seen = Counter(word for own in words for word in own)
    asked = terms_of(question)
    scores = [sum(math.log(1 + len(sentences) / seen[word]) for word in asked if word in own) for own in words]
    return sentences[scores.index(max(scores))] if scores and max(scores) > 0 else ""


def values_of(text: str) -> str:
    """What JSON tells: its texts and numbers, without the names of its fields, which are the caller's words."""
    try:
        value = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):  # it was cut short
        return _FIELD.sub(" ", text)
    told: list[str] = []
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            told.append(value)
        elif isinstance(value, (list, dict)):
            left += reversed(list(value.values()) if isinstance(value, dict) else value)
    return " ".join(told)


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
