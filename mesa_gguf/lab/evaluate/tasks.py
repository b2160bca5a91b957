"""What is asked: each task makes a document of an asked length, questions about it, and the answers that are expected.

A task comes in two styles. "natural" is English that any language model reads. "reader" is for the bundled model,
which knows the documents of `mesa_gguf.documents` and nothing else: the same task in sentences of that kind, where they
can say it, and judged by the whole answer sentence. Scores of different styles cannot be compared with each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from ...errors import ConfigError
from .. import documents
from . import texts
from .texts import Count, Needle

Style = Literal["natural", "reader"]


@dataclass(frozen=True)
class Turn:
    """A question and the strings that its answer has to give.

    Attributes:
        exact: the answer's first line has to be the one string that is expected.
        prefix: how the answer begins; given to models without a chat template.
    """

    question: str
    expected: tuple[str, ...]
    exact: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class Item:
    """What is scored as one: turns that follow each other in the same context.

    Attributes:
        depth: where the text says it, a share of the text's tokens; None where that is all over the text.
    """

    turns: tuple[Turn, ...]
    depth: float | None

    @property
    def n_expected(self) -> int:
        return sum(len(turn.expected) for turn in self.turns)


@dataclass(frozen=True)
class Sample:
    """A document and the items that are asked about it, each alone."""

    document: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Brief:
    """What a sample is made from; the same brief always gives the same sample.

    Attributes:
        n_tokens: of the document.
        depth: where the needle has to lie, a share; None: anywhere.
        n_facts: sentences that state something, in a document of the tasks "qa" and "qa/two-hop".
    """

    style: Style
    seed: str
    n_tokens: int
    count: Count
    depth: float | None = None
    n_facts: int = 20


@dataclass(frozen=True)
class Task:
    """A task by its name.

    Attributes:
        max_tokens: room for the answer of a turn.
        gridded: needles lie at depths of a grid, not at random ones.
        reader_tokens: room for the answer of a turn in the reader's style.
        n_items: of a sample, by the number of facts that is asked for.
    """

    name: str
    description: str
    make: Callable[[Brief], Sample]
    max_tokens: int
    gridded: bool = False
    reader_tokens: int = 32  # a sentence has about 15
    n_items: Callable[[int], int] = lambda n_facts: 1

    def answer_room(self, style: Style) -> int:
        """Tokens for the answer of a turn."""
        return self.reader_tokens if style == "reader" else self.max_tokens


FRESH = 1 << 50  # the bundled model was trained on documents of smaller seeds


def _document_seed(rng: random.Random) -> int:
    return FRESH + rng.getrandbits(48)


def _reader_turn(fact: documents.Fact | documents.TwoHop) -> Turn:
    return Turn(fact.question, (fact.answer_sentence,), exact=True)


def _fact(rng: random.Random, kind: documents.FactKind, key: str, value: str) -> Turn:
    """A question for a fact that a text states."""
    return Turn(rng.choice(kind.questions).format(key=key), (_say(kind, key, value),), exact=True)


def _say(kind: documents.FactKind, key: str, value: str) -> str:
    statement = kind.statement.format(key=key, value=value)
    return f"{statement[0].upper()}{statement[1:]}."


_DOOR_CODE = next(kind for kind in documents.SUBJECTS["directory"] if kind.name == "door code")


def _persons(rng: random.Random, n: int) -> list[str]:
    """Persons of whom no two share a name."""
    return [
        f"{first} {last}"
        for first, last in zip(rng.sample(documents.FIRST_NAMES, n), rng.sample(documents.SURNAMES, n))
    ]


def _reader_header(rng: random.Random) -> str:
    return f"This is the directory of {rng.choice(documents.TOWNS)}."


#
# passkey
#

PASSKEY_HEADER = (
    "Somewhere in this text, which is otherwise of no importance, a pass key is given. Find it and remember it: "
    "the question at the end asks for it."
)
PASSKEY_FILLER = (
    "The hills are green.",
    "The water is clear.",
    "The road goes on.",
    "We walk to the town.",
    "Then we walk back again.",
)
N_REPEATED = 5  # sentences


def passkey(brief: Brief) -> Sample:
    """A key, said twice, at a random depth of one text that is repeated again and again."""
    rng = random.Random(brief.seed)
    depth = rng.random() if brief.depth is None else brief.depth
    (code,) = texts.codes(rng, 1)
    if brief.style == "natural":
        header, needle = PASSKEY_HEADER, f"The pass key is {code}. Remember it: {code} is the pass key."
        turn = Turn("What is the pass key?", (code,), prefix=" The pass key is")
        unit = list(PASSKEY_FILLER)
    else:
        (person,) = _persons(rng, 1)
        fact = _say(_DOOR_CODE, person, code)
        header, needle = _reader_header(rng), f"{fact} Remember that {fact[0].lower()}{fact[1:]}"
        turn = _fact(rng, _DOOR_CODE, person, code)
        filler = texts.sentences(rng, [code, *person.split()])
        unit = [filler() for _ in range(N_REPEATED)]
    hidden = texts.hide(rng, [Needle(depth, needle)], texts.repeated(unit), brief.n_tokens, brief.count, header=header)
    return Sample(hidden.text, (Item((turn,), hidden.depths[0]),))


#
# needles
#


def _number_sentence(key: str, value: str) -> str:
    return f"The special number of the {key} is {value}."


def _natural_needles(
    rng: random.Random, brief: Brief, keys: list[str], values: list[str], depths: list[float]
) -> texts.Hidden:
    needles = [Needle(depth, _number_sentence(key, value)) for key, value, depth in zip(keys, values, depths)]
    filler = texts.sentences(rng, [*keys, *values])
    header = (
        "Special numbers are hidden in this text. Remember them: the question at the end asks for one or more of them."
    )
    return texts.hide(rng, needles, filler, brief.n_tokens, brief.count, header=header)


def _number_turn(key: str, value: str) -> Turn:
    return Turn(f"What is the special number of the {key}?", (value,), prefix=f" The special number of the {key} is")


def _one_of(brief: Brief, n_keys: int) -> Sample:
    """One question about one of n_keys needles of the same form."""
    rng = random.Random(brief.seed)
    if brief.style == "reader":
        document = documents.make_document(
            _document_seed(rng), brief.n_tokens, brief.count, n_facts=n_keys, n_kinds=1, depth=brief.depth
        )
        return Sample(document.text, (Item((_reader_turn(document.target),), document.target.depth),))
    depths = texts.random_depths(rng, n_keys)
    asked = rng.randrange(n_keys)
    if brief.depth is not None:
        depths[asked] = brief.depth
    keys, values = texts.compounds(rng, n_keys), texts.codes(rng, n_keys)
    hidden = _natural_needles(rng, brief, keys, values, depths)
    return Sample(hidden.text, (Item((_number_turn(keys[asked], values[asked]),), hidden.depths[asked]),))


def niah(brief: Brief) -> Sample:
    """One needle in varied filler."""
    return _one_of(brief, 1)


def multikey(brief: Brief) -> Sample:
    """Four needles with different keys; one is asked for."""
    return _one_of(brief, 4)


def multivalue(brief: Brief) -> Sample:
    """Four needles with the same key and different values; all are asked for."""
    rng = random.Random(brief.seed)
    values, depths = texts.codes(rng, 4), texts.random_depths(rng, 4)
    if brief.style == "natural":
        (key,) = texts.compounds(rng, 1)
        hidden = _natural_needles(rng, brief, [key] * 4, values, depths)
        turn = Turn(
            f"What are all the special numbers of the {key}?",
            tuple(values),
            prefix=f" The special numbers of the {key} are",
        )
    else:
        (person,) = _persons(rng, 1)
        needles = [Needle(depth, _say(_DOOR_CODE, person, value)) for depth, value in zip(depths, values)]
        filler = texts.sentences(rng, [*values, *person.split()])
        hidden = texts.hide(rng, needles, filler, brief.n_tokens, brief.count, header=_reader_header(rng))
        turn = Turn(rng.choice(_DOOR_CODE.questions).format(key=person), tuple(values))
    return Sample(hidden.text, (Item((turn,), None),))


def multiquery(brief: Brief) -> Sample:
    """Four needles with different keys; all are asked for. The reader is asked one after the other."""
    rng = random.Random(brief.seed)
    if brief.style == "reader":
        document = documents.make_document(_document_seed(rng), brief.n_tokens, brief.count, n_facts=4, n_kinds=1)
        facts = rng.sample(document.facts, 4)
        return Sample(document.text, (Item(tuple(map(_reader_turn, facts)), None),))
    keys, values = texts.compounds(rng, 4), texts.codes(rng, 4)
    hidden = _natural_needles(rng, brief, keys, values, texts.random_depths(rng, 4))
    asked = f"the {keys[0]}, the {keys[1]}, the {keys[2]} and the {keys[3]}"
    turn = Turn(
        f"What are the special numbers of {asked}?", tuple(values), prefix=f" The special numbers of {asked} are"
    )
    return Sample(hidden.text, (Item((turn,), None),))


#
# variable tracking
#

N_HOPS = 4


def variables(brief: Brief) -> Sample:
    """A value goes from name to name in four hops, the text in order; which names have it is asked.

    The reader is asked for the value of the last name.
    """
    rng = random.Random(brief.seed)
    (value,) = texts.codes(rng, 1)
    depths = texts.random_depths(rng, N_HOPS + 1)
    if brief.style == "natural":
        names = _variable_names(rng)
        said = [f"VAR {names[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
        forbidden = [value, *names]
        header = "Assignments to variables are hidden in this text. Keep track of them."
        turn = Turn(
            f"Which variables have the value {value}? Name all {len(names)} of them.",
            tuple(names),
            prefix=f" The variables that have the value {value} are",
        )
    else:
        names = _persons(rng, N_HOPS + 1)
        said = [_say(_DOOR_CODE, names[0], value)]
        said += [f"The door code of {b} is the door code of {a}." for a, b in pairwise(names)]
        forbidden = [value, *" ".join(names).split()]
        header = _reader_header(rng)
        turn = _fact(rng, _DOOR_CODE, names[-1], value)
    needles = [Needle(depth, sentence) for depth, sentence in zip(depths, said)]
    filler = texts.sentences(rng, forbidden)
    hidden = texts.hide(rng, needles, filler, brief.n_tokens, brief.count, header=header)
    return Sample(hidden.text, (Item((turn,), None),))


def _variable_names(rng: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < N_HOPS + 1:
        names["".join(rng.choices(documents.LETTERS, k=5))] = None
    return list(names)


#
# words
#

N_COMMON = 10
N_FREQUENT = 3
MIN_WORDS = 40
WORDS_A_LINE = 10


def _listing(words: list[str], *, numbered: bool) -> str:
    said = [f"{i + 1}. {word}" for i, word in enumerate(words)] if numbered else words
    return "\n".join(" ".join(said[i : i + WORDS_A_LINE]) for i in range(0, len(said), WORDS_A_LINE))


def _n_words(brief: Brief, header: str, words: list[str], *, numbered: bool) -> int:
    """How many words like these fill the document."""
    a_word = brief.count("\n" + _listing(words, numbered=numbered)) / len(words)
    return int((brief.n_tokens - brief.count(header)) / a_word)


def common_words(brief: Brief) -> Sample:
    """A list in which ten words stand ten times as often as all others, which are asked for; 30 and 3 times each in a
    long list."""
    rng = random.Random(brief.seed)
    header = "This is a numbered list of words. Some of them are in it more often than all others."
    n_words = _n_words(brief, header, texts.compounds(rng, 100), numbered=True)
    often = max(3, min(30, n_words // (2 * N_COMMON)))
    seldom = max(1, often // 10)
    n_others = max(0, n_words - often * N_COMMON) // seldom
    if n_others > len(texts.FIRST_HALVES) * len(texts.SECOND_HALVES) // 2:
        raise ConfigError(f"there are not enough words for a list of {brief.n_tokens} tokens")
    if n_others < N_COMMON:
        raise ConfigError(f"{brief.n_tokens} tokens are too few for a list of words")
    every = texts.compounds(rng, N_COMMON + n_others)
    common = every[:N_COMMON]
    words = common * often + every[N_COMMON:] * seldom
    rng.shuffle(words)
    turn = Turn(
        f"Which {N_COMMON} words are in the list most often?",
        tuple(common),
        prefix=f" The {N_COMMON} words that are in the list most often are",
    )
    return Sample(f"{header}\n{_listing(words, numbered=True)}", (Item((turn,), None),))


def frequent_words(brief: Brief) -> Sample:
    """Made-up words, the k-th most frequent in proportion to 1/k²; the three most frequent are asked for."""
    rng = random.Random(brief.seed)
    header = "These are words of a language that nobody knows. Some of them occur more often than others."
    made_up: dict[str, None] = {}
    while len(made_up) < 100:
        made_up[documents.made_up_word(rng).lower()] = None
    ranked = list(made_up)
    shares = [1 / (rank + 1) ** 2 for rank in range(len(ranked))]
    # a word's tokens weigh as often as it occurs
    n_words = _n_words(
        brief, header, [word for word, share in zip(ranked, shares) for _ in range(int(400 * share))], numbered=False
    )
    if n_words < MIN_WORDS:
        raise ConfigError(f"{brief.n_tokens} tokens are too few for a list of words")
    ends = [round(n_words * end / sum(shares)) for end in accumulate(shares)]
    words = [word for word, start, end in zip(ranked, [0, *ends], ends) for _ in range(end - start)]
    rng.shuffle(words)
    turn = Turn(
        f"Which {N_FREQUENT} words occur most often?",
        tuple(ranked[:N_FREQUENT]),
        prefix=f" The {N_FREQUENT} words that occur most often are",
    )
    return Sample(f"{header}\n{_listing(words, numbered=False)}", (Item((turn,), None),))


#
# questions and answers
#


def qa(brief: Brief) -> Sample:
    """A document of `mesa_gguf.documents` with look-alike facts over its whole length; each is asked for alone."""
    rng = random.Random(brief.seed)
    document = documents.make_document(_document_seed(rng), brief.n_tokens, brief.count, n_facts=brief.n_facts)
    return Sample(document.text, tuple(Item((_qa_turn(brief, fact),), fact.depth) for fact in document.facts))


def two_hop(brief: Brief) -> Sample:
    """Such a document in which every fact's key is linked to another one ("The doctor of Mara Lind is Otto Falk."). Each
    question names a key and asks for the fact of the key that it is linked to; its depth is the link's."""
    rng = random.Random(brief.seed)
    n_facts = n_two_hops(brief.n_facts)
    document = documents.make_document(
        _document_seed(rng), brief.n_tokens, brief.count, n_facts=n_facts, n_links=n_facts
    )
    items = tuple(Item((_qa_turn(brief, asked),), asked.link.depth) for asked in document.two_hops)
    return Sample(document.text, items)


def n_two_hops(n_facts: int) -> int:
    """A fact and a link each, so that documents have as many sentences to tell apart as those of "qa"."""
    return max(2, n_facts // 2)


def _qa_turn(brief: Brief, asked: documents.Fact | documents.TwoHop) -> Turn:
    return _reader_turn(asked) if brief.style == "reader" else Turn(asked.question, (asked.answer,))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("passkey", "a key in repeated text", passkey, 32),
        Task("niah", "a needle in varied text, by depth", niah, 32, gridded=True),
        Task("ruler/multikey", "one of four needles", multikey, 32),
        Task("ruler/multivalue", "four needles with the same key", multivalue, 96),
        Task("ruler/multiquery", "four needles, all asked for", multiquery, 96),
        Task("ruler/variables", "a value handed on from name to name", variables, 64),
        Task("ruler/common", "the ten most common words of a list", common_words, 120),
        Task("ruler/frequent", "the three most frequent made-up words", frequent_words, 50),
        Task("qa", "look-alike facts of a document", qa, 32, n_items=lambda n_facts: n_facts),
        Task("qa/two-hop", "a fact by way of a link", two_hop, 64, reader_tokens=48, n_items=n_two_hops),
    )
}
