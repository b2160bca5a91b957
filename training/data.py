"""Training rows: a document, cut anywhere, and questions about the facts that are left in it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from mesa_gguf.lab import documents
from mesa_gguf.lab.documents import Fact, TwoHop
from training.tokenizer import Tokenizer

VALUE_WEIGHT, ANSWER_WEIGHT, TEXT_WEIGHT = 1.0, 0.5, 0.15
KEY_WEIGHT = 3.0  # of the second hop, which is copied from the first
TEXT_SHARE = 0.15
QUESTION_ROOM = 30
TWO_HOP_ROOM = 48


@dataclass(frozen=True)
class Mix:
    """What a batch is made of."""

    length: int
    copy: float
    made_up: float
    links: float = 0.0
    """Share of the documents that have links, and questions of two hops."""


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a row: ``[start, end)``, the value from ``value`` on."""

    start: int
    value: int
    end: int
    kind: str
    two_hop: bool = False


@dataclass
class Row:
    ids: list[int]
    weights: list[float]
    answers: list[Answer]


def copy_row(rng: random.Random, tokenizer: Tokenizer, length: int) -> Row:
    """Random tokens, repeated: what copying is learned from."""
    period = rng.randint(8, length // 2)
    segment = [rng.randrange(tokenizer.bos) for _ in range(period)]
    ids = [tokenizer.bos, *(segment * (length // period + 1))][:length]
    return Row(ids, [0.0] * (period + 1) + [0.5] * (length - period - 1), [])


def document_row(rng: random.Random, tokenizer: Tokenizer, mix: Mix) -> Row:
    """A document of which a window (and perhaps the beginning) is kept, with one to ten questions."""
    linked = rng.random() < mix.links
    n_questions = min(mix.length // 50, rng.choice((1, 3, 4, 5, 6, 6) if linked else (1, 3, 6, 8, 10, 10)))
    room = mix.length - (TWO_HOP_ROOM if linked else QUESTION_ROOM) * n_questions - 2
    if rng.random() < 0.1:
        room = rng.randint(min(60, room), room)
    most = max(2, min(16, room // 18))
    n_facts = rng.randint(min(n_questions, most), most)
    stretch = rng.uniform(1.2, 2.5) if rng.random() < 0.6 else 1.0
    n_facts = min(24, int(n_facts * stretch))
    n_links = 0
    if linked:
        n_facts = max(2, round(n_facts * rng.uniform(0.45, 0.7)))
        n_links = rng.randint((n_facts + 1) // 2, n_facts)
    document = documents.make_document(
        rng.getrandbits(48),
        int(room * stretch),
        n_facts=n_facts,
        made_up=rng.choice((0.0, 1.0)) if rng.random() < mix.made_up else 0.0,
        mentions=rng.choice((0.0, 0.03, 0.15)),
        n_links=n_links,
    )
    pieces = [tokenizer.encode(piece) for piece in document.pieces]
    ids = [] if rng.random() < 0.03 else [tokenizer.bos]
    shown: set[int] = set()

    first = 0
    if stretch > 1:
        flat = [token for piece in pieces for token in piece]
        if rng.random() < 0.75:
            keep = rng.randint(8, 64)
            ids += flat[:keep]
        total = 0
        skip = rng.randint(0, max(0, len(flat) - room + len(ids)))
        while first < len(pieces) - 1 and total + len(pieces[first]) <= skip:
            total += len(pieces[first])
            first += 1
        if rng.random() < 0.5:
            ids += pieces[first][rng.randrange(len(pieces[first])) :]
            first += 1
    for i in range(first, len(pieces)):
        if len(ids) + len(pieces[i]) > room:
            break
        ids += pieces[i]
        shown.add(i)
    facts = [fact for fact in document.facts if fact.piece in shown]
    if not facts:
        return document_row(rng, tokenizer, mix)

    stop = tokenizer.ids["."]
    while ids[-1] in (tokenizer.ids[".Ċ"], stop):
        ids.pop()
    ids.append(tokenizer.ids[".ĊĊ"])
    weights = [TEXT_WEIGHT if rng.random() < TEXT_SHARE else 0.0 for _ in ids]
    answers: list[Answer] = []
    asked_for: list[Fact | TwoHop] = rng.sample(facts, min(n_questions, len(facts)))
    if linked:
        links = [link for link in document.links if link.piece in shown]
        both = [two for two in document.two_hops if two.link in links and two.fact in facts]
        two_hops = rng.sample(both, min(len(both), (2 * n_questions + 2) // 3))
        told = [fact for two in two_hops for fact in (two.link, two.fact)]
        others = [fact for fact in facts + links if fact not in told]
        asked_for = [*two_hops, *rng.sample(others, min(len(others), n_questions - len(two_hops)))]
        rng.shuffle(asked_for)
    for fact in asked_for:
        asked = tokenizer.encode(documents.QUESTION.format(question=fact.question))
        before = _before_value(tokenizer, fact)
        answer = tokenizer.encode(f" {fact.answer_sentence}\n")
        if len(ids) + len(asked) + len(answer) > mix.length - 1:
            break
        ids += asked
        weights += [TEXT_WEIGHT if rng.random() < TEXT_SHARE else 0.0 for _ in asked]
        start = len(ids)
        answers.append(Answer(start, start + before, start + len(answer), fact.kind, isinstance(fact, TwoHop)))
        ids += answer
        weights += [ANSWER_WEIGHT] * before + [VALUE_WEIGHT] * (len(answer) - before)
        if isinstance(fact, TwoHop):
            first = _before_value(tokenizer, fact.link)
            weights[start + first :] = [VALUE_WEIGHT] * (len(answer) - first)
            before_key = fact.answer_sentence[: fact.answer_sentence.rindex(fact.fact.key) - 1]
            key = len(tokenizer.encode(" " + before_key))
            n_key = len(tokenizer.encode(" " + fact.fact.key))
            weights[start + key : start + key + n_key] = [KEY_WEIGHT] * n_key
    ids.append(tokenizer.eos)
    weights.append(ANSWER_WEIGHT)
    return Row(ids, weights, answers)


def _before_value(tokenizer: Tokenizer, fact: Fact | TwoHop) -> int:
    """The tokens of an answer before its value."""
    return len(tokenizer.encode(" " + fact.answer_sentence[: fact.answer_sentence.rfind(fact.answer) - 1]))


def batch(
    rng: random.Random, tokenizer: Tokenizer, mix: Mix, n_rows: int
) -> tuple[torch.Tensor, torch.Tensor, list[Row]]:
    """Token ids and weights of the targets, both ``[n_rows, length]``; short rows are padded."""
    rows = [
        copy_row(rng, tokenizer, mix.length) if rng.random() < mix.copy else document_row(rng, tokenizer, mix)
        for _ in range(n_rows)
    ]
    ids = torch.tensor([row.ids + [tokenizer.pad] * (mix.length - len(row.ids)) for row in rows])
    weights = torch.tensor([row.weights + [0.0] * (mix.length - len(row.weights)) for row in rows])
    return ids, weights, rows
