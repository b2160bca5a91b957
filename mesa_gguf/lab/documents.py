"""Seeded test documents: look-alike facts hidden in filler, with questions that have one exact answer.

``make_document`` writes a document of an asked length (hundreds of tokens or hundreds of thousands) about
one subject (a staff directory, a log book, an inventory, ...). About a dozen facts of the same form lie in it,
each with its own key and its own value, spread over the whole length; everything else is filler. The bundled
model was trained on such documents, the demo and the evaluation read them. Where it is asked for, links lie between
the facts, each from one key to another, and with them questions of two hops.

    >>> document = make_document(seed=1, n_tokens=400, depth=0.5)
    >>> document.prompt(document.target)          # the text, the question, "Answer:"
    >>> document.target.answer                    # the value that has to come out

Only the standard library is needed, and the same arguments always give the same document.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

# --------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------

FIRST_NAMES = """Ada Agnes Albin Alma Amos Anders Anna Anton Arno Astrid Axel Beata Bela Bruno Carla Casper Celia
Clara Cyril Dagny Daria Dora Edda Edgar Edith Egon Elias Elin Ella Elsa Emil Enid Erik Esme Ester Eva Felix Fiona
Frida Fritz Gerda Gita Greta Gustav Hanna Harald Hedda Heidi Helga Henrik Hilda Hugo Ida Ilse Ines Inga Iris Ivan
Ivar Jakob Jana Jarl Jette Joel Jonas Jorun Judith Julia Karel Karin Klara Knut Lars Laura Leif Lena Leo Linus Liv
Lotte Lucas Lydia Magda Magnus Maja Mara Marek Marta Mats Mina Mira Moritz Nadia Nele Niels Nils Nina Nora Olaf Olga
Oskar Otto Paula Per Petra Pia Ragna Rasmus Rita Robin Rolf Rosa Runa Ruth Signe Silas Simon Sofia Stella Sten Sven
Tara Thea Theo Tilda Tora Ulla Ursula Vera Viggo Viktor Wanda Wilma Yngve""".split()

SURNAMES = """Abel Ahlman Arndt Barlow Beck Berg Bohm Borg Brandt Brun Busch Carlin Corvin Dahl Dorn Dreyer Eklund
Engel Falk Fender Fink Fischer Forst Frank Gerber Graf Grimm Grau Haas Hagen Halden Hansen Hartmann Heller Hirsch
Holm Horn Huber Ibsen Jansen Jarvis Junker Kaiser Keller Kern Kessler Klein Koch Kramer Krantz Kroll Lang Larsen
Lenz Lind Lorenz Lund Madsen Maier Marsh Mertens Moller Moser Munk Nagel Nissen Nolte Nordin Nyberg Olsen Orban Ost
Palmer Pauli Pohl Quist Raben Rask Reuter Richter Riis Ritter Roth Ruud Sander Sauer Schmidt Seidel Skov Sommer
Stark Stein Storm Strand Sund Thal Thorn Tiller Torp Ulrich Vance Vinter Voss Wagner Walden Weber Wendt Winkler
Wolff Ziegler Zorn""".split()

TOWNS = """Aldmoor Anvik Ashby Barrow Belmont Birkfeld Blackwell Bramble Brisco Calder Carrick Caswell Corby
Cranmore Dalby Darrow Deepford Denholm Dunmore Eastwick Elmstead Elsfeld Fairholt Farnham Felden Fernley Galloway
Garston Glenmore Granby Greyfell Hadley Halvik Harlow Hartfield Hazelby Highcliff Holbeck Hornsea Ickham Ilford
Inverlea Kelby Kerrick Kingsley Kirkwall Lakeham Langdale Larchfield Linford Longmere Lowick Malden Marlow Medford
Melby Milford Moorgate Mosswick Nethers Newcombe Norby Northam Oakham Orford Otterby Overton Pelham Penrose Pinewood
Quarrel Radley Ravensby Redcar Ribston Rockport Rosedale Runswick Saltash Sandvik Selby Shelford Silverton Stanmore
Stonehaven Sunderby Swanley Tarnby Thornhill Tillbury Torvik Ulverton Upwell Varnholm Wadebridge Walcott Westerby
Whitby Willowby Windermoor Woodhall Yarrow Yewdale""".split()

ADJECTIVES = """ancient bent bright broken carved cheap clean curved damp dark delicate dusty empty faded fine folded
fragile gilded heavy hollow huge large light little long loose modern narrow new odd old painted patched plain polished
quiet rare rough round rusty scratched sharp short simple slender small smooth soft square stained strong striped tall
thick thin tiny twisted wide worn""".split()

ITEMS = """anchor anvil apron axe banner barrel basin basket bell bench blanket bottle bowl box bracket brush bucket
button cabinet candle carpet chain chair chest clock coat compass cradle crate cup curtain desk drum easel fan flag flask
flute frame funnel globe hammer harp hat helmet hinge hook jar kettle key kite knife ladder ladle lamp lantern lens lever
lock loom map mask mirror mug needle net oven paddle pan pen pipe pitcher plate plough pot pump quilt rack rake razor ring
robe rope rug saddle saw scale scarf shelf shield shovel sieve spade spoon stamp statue stool stove sword table tent
toolbox torch tray trumpet trunk tub umbrella vase violin wagon wheel whistle window""".split()

ANIMALS = """badger bear beaver bison boar camel cat cod crane crow deer dog dolphin donkey dove duck eagle falcon
finch fox frog goat goose hare hawk hedgehog hen heron horse hound lark lion lizard lynx magpie marten mole moose mouse
newt osprey otter owl parrot pelican pigeon pike rabbit ram rat raven robin rook salmon seal shark sheep snake sparrow
spider squirrel stag stork swallow swan tiger toad trout turtle viper weasel whale wolf wren""".split()

COLOURS = """amber beige black blue bronze brown copper cream crimson gold green grey indigo ivory lilac lime maroon
mauve navy ochre olive orange peach pink plum purple red rose ruby sand scarlet silver teal violet white yellow""".split()

MATERIALS = """ash bamboo birch bone brass brick canvas cedar cement chalk clay cloth coal concrete cork cotton crystal
elm felt flint fur glass granite hemp horn iron jade lead leather limestone linen maple marble nickel oak paper pewter
pine plaster plastic porcelain quartz rubber satin silk slate stone straw tin velvet walnut wax willow wool zinc""".split()

GOODS = """almonds apples barley beans beer biscuits bread butter cabbage carrots cheese cherries chestnuts cider
coffee corn dates eggs figs fish flour garlic ginger grapes hay honey jam lemons lentils malt meat melons milk mustard
nuts oats oil olives onions pears peas pepper plums potatoes raisins rice rye salt seeds soap spices spinach sugar tea
tobacco tomatoes turnips vinegar walnuts wheat wine yarn""".split()

WATCHWORDS = """acorn arrow autumn beacon blossom bridge canyon castle cavern circle cloud comet coral desert diamond
dragon ember feather fern fire flower forest fountain frost garden glacier harvest hazel island jasmine jewel lagoon
lightning lotus maze meadow mercury midnight mist moon mountain nectar night oasis ocean orbit orchid palace pearl
pebble planet prairie prism puzzle pyramid rain rainbow reef ribbon river saturn shadow snow spring star summer sunset
temple thistle thunder tulip tundra valley volcano waterfall wave winter zenith""".split()

MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TITLES = """baker barber brewer builder butcher carpenter clerk cook doctor driver farmer gardener guard hunter joiner
judge mason mayor miller nurse painter pilot porter potter sailor shepherd singer smith surgeon tailor teacher
weaver writer""".split()
PLACES = """attic bakery barn bridge canteen cellar chapel church courtyard dairy farm garden gate hall harbour hill
inn kitchen library market mill museum office orchard park pier school shed square stable station stairs theatre tower
tunnel well workshop yard""".split()
LETTERS = "A B C D E F G H J K L M N P Q R S T U V W X Y Z".split()
_ONSETS = "b br d dr f fl g gr h j k kl l m n p pr r s sk st t tr v w z".split()
_VOWELS = "a e i o u ai ea ou".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "th", "rk", "nd"]


def made_up_word(rng: random.Random) -> str:
    """A pronounceable capitalised word that is (almost surely) in no word list."""
    syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables).capitalize()


# --------------------------------------------------------------------------------------------------------------
# Slots: what a pair of braces in a template stands for
# --------------------------------------------------------------------------------------------------------------

Slot = Callable[[random.Random], str]


def _pick(words: list[str]) -> Slot:
    return lambda rng: words[int(rng.random() * len(words))]


def _number(low: int, high: int) -> Slot:
    return lambda rng: str(rng.randint(low, high))


def _join(*slots: Slot, sep: str = " ") -> Slot:
    return lambda rng: sep.join(slot(rng) for slot in slots)


SLOTS: dict[str, Slot] = {
    "person": _join(_pick(FIRST_NAMES), _pick(SURNAMES)),
    "first": _pick(FIRST_NAMES),
    "surname": _pick(SURNAMES),
    "town": _pick(TOWNS),
    "item": _join(_pick(ADJECTIVES), _pick(ITEMS)),
    "thing": _pick(ITEMS),
    "adjective": _pick(ADJECTIVES),
    "animal": _pick(ANIMALS),
    "colour": _pick(COLOURS),
    "material": _pick(MATERIALS),
    "goods": _pick(GOODS),
    "word": _pick(WATCHWORDS),
    "title": _pick(TITLES),
    "place": _pick(PLACES),
    "date": _join(_number(1, 28), _pick(MONTHS)),
    "month": _pick(MONTHS),
    "weekday": _pick(WEEKDAYS),
    "ship": lambda rng: f"{_pick(COLOURS)(rng).capitalize()} {_pick(ANIMALS)(rng).capitalize()}",
    "sample": lambda rng: f"{_pick(LETTERS)(rng)}-{rng.randint(100, 999)}",
    "code": _number(10000, 99999),
    "extension": _number(1000, 9999),
    "hundreds": _number(100, 999),
    "tens": _number(10, 99),
    "made_up": made_up_word,
    "made_up_person": lambda rng: f"{made_up_word(rng)} {made_up_word(rng)}",
}

#: How a key is made up of words that no list holds, for the keys where that is natural.
MADE_UP = {"person": "made_up_person", "town": "made_up"}

_SLOT = re.compile(r"\{(\w+)\}")


class Template:
    """A sentence with ``{slot}`` holes, split once so that filling it is quick."""

    def __init__(self, text: str) -> None:
        self.text = text
        parts = _SLOT.split(text)
        self._literals, self._slots = parts[::2], parts[1::2]

    def fill(self, rng: random.Random, **fixed: str) -> str:
        out = [self._literals[0]]
        for slot, literal in zip(self._slots, self._literals[1:]):
            out.append(fixed[slot] if slot in fixed else SLOTS[slot](rng))
            out.append(literal)
        return "".join(out)


# --------------------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactKind:
    """A family of look-alike facts: one statement, several questions for it."""

    name: str
    key: str
    value: str
    statement: str
    questions: tuple[str, ...]


def _kind(name: str, key: str, value: str, statement: str, *questions: str) -> FactKind:
    return FactKind(name, key, value, statement, questions)


#: The subjects of documents, with the fact kinds that occur in each.
SUBJECTS: dict[str, tuple[FactKind, ...]] = {
    "directory": (
        _kind(
            "door code",
            "person",
            "code",
            "the door code of {key} is {value}",
            "What is the door code of {key}?",
            "Which door code belongs to {key}?",
        ),
        _kind(
            "extension",
            "person",
            "extension",
            "the extension of {key} is {value}",
            "What is the extension of {key}?",
            "Which extension reaches {key}?",
        ),
        _kind(
            "locker",
            "person",
            "hundreds",
            "the locker of {key} is number {value}",
            "What is the locker of {key}?",
            "Which locker does {key} use?",
        ),
        _kind(
            "badge",
            "person",
            "colour",
            "the badge of {key} is {value}",
            "What colour is the badge of {key}?",
            "Which badge does {key} wear?",
        ),
        _kind(
            "town",
            "person",
            "town",
            "the home of {key} is {value}",
            "Where is the home of {key}?",
            "In which town does {key} live?",
        ),
    ),
    "log book": (
        _kind(
            "count",
            "date",
            "hundreds",
            "the count on {key} was {value}",
            "What was the count on {key}?",
            "How many were counted on {key}?",
        ),
        _kind(
            "watchword",
            "date",
            "word",
            "the watchword on {key} was {value}",
            "What was the watchword on {key}?",
            "Which watchword was used on {key}?",
        ),
        _kind(
            "reading",
            "town",
            "extension",
            "the gauge at {key} read {value}",
            "What did the gauge at {key} read?",
            "What was read at {key}?",
        ),
    ),
    "inventory": (
        _kind(
            "serial",
            "item",
            "code",
            "the serial of the {key} is {value}",
            "What is the serial of the {key}?",
            "Which serial has the {key}?",
        ),
        _kind(
            "price",
            "item",
            "hundreds",
            "the price of the {key} is {value} coins",
            "What is the price of the {key}?",
            "How much is the {key}?",
        ),
        _kind(
            "shelf",
            "item",
            "tens",
            "the shelf of the {key} is {value}",
            "What is the shelf of the {key}?",
            "On which shelf is the {key}?",
        ),
        _kind(
            "material",
            "item",
            "material",
            "the {key} is made of {value}",
            "What is the {key} made of?",
            "Which material is the {key}?",
        ),
    ),
    "travel notes": (
        _kind(
            "gate",
            "town",
            "code",
            "the gate at {key} opens with {value}",
            "What opens the gate at {key}?",
            "Which code opens the gate at {key}?",
        ),
        _kind(
            "platform",
            "town",
            "tens",
            "the train from {key} leaves from platform {value}",
            "Where does the train from {key} leave?",
            "Which platform has the train from {key}?",
        ),
        _kind(
            "sign",
            "town",
            "animal",
            "the sign at {key} shows one {value}",
            "What does the sign at {key} show?",
            "Which animal is on the sign at {key}?",
        ),
        _kind(
            "guide",
            "town",
            "first",
            "the guide at {key} is {value}",
            "Who is the guide at {key}?",
            "Which guide works at {key}?",
        ),
    ),
    "harbour list": (
        _kind(
            "cargo",
            "ship",
            "goods",
            "the cargo of the {key} is {value}",
            "What is the cargo of the {key}?",
            "Which goods does the {key} carry?",
        ),
        _kind(
            "berth",
            "ship",
            "tens",
            "the berth of the {key} is {value}",
            "What is the berth of the {key}?",
            "At which berth is the {key}?",
        ),
        _kind(
            "captain",
            "ship",
            "surname",
            "the captain of the {key} is {value}",
            "Who is the captain of the {key}?",
            "Which captain sails the {key}?",
        ),
        _kind(
            "call sign",
            "ship",
            "code",
            "the call sign of the {key} is {value}",
            "What is the call sign of the {key}?",
            "Which call sign has the {key}?",
        ),
    ),
    "laboratory notes": (
        _kind(
            "mass",
            "sample",
            "hundreds",
            "the mass of sample {key} is {value} grams",
            "What is the mass of sample {key}?",
            "How heavy is sample {key}?",
        ),
        _kind(
            "vial",
            "sample",
            "colour",
            "the vial of sample {key} is {value}",
            "What colour is the vial of sample {key}?",
            "Which vial holds sample {key}?",
        ),
        _kind(
            "result",
            "sample",
            "code",
            "the result of sample {key} is {value}",
            "What is the result of sample {key}?",
            "Which result has sample {key}?",
        ),
    ),
}


@dataclass(frozen=True)
class LinkKind:
    """A relation between keys of one sort. ``phrase`` says it of a key, and stands for the key that it leads to."""

    name: str
    phrase: str
    verb: str = "is"


#: How sentences name a key, by the slot that it fills, where that is more than the key.
NAMED = {"item": "the {key}", "ship": "the {key}", "sample": "sample {key}"}

#: The relations between keys, by the slot that these fill.
LINKS: dict[str, tuple[LinkKind, ...]] = {
    "person": (
        LinkKind("doctor", "the doctor of {key}"),
        LinkKind("teacher", "the teacher of {key}"),
        LinkKind("clerk", "the clerk of {key}"),
    ),
    "town": (LinkKind("stop before", "the stop before {key}"), LinkKind("town behind", "the town behind {key}")),
    "item": (LinkKind("one behind", "the one behind the {key}"), LinkKind("one below", "the one below the {key}")),
    "date": (
        LinkKind("page before", "the page before {key}", "was"),
        LinkKind("page behind", "the page behind {key}", "was"),
    ),
    "ship": (LinkKind("one before", "the one before the {key}"), LinkKind("one behind", "the one behind the {key}")),
    "sample": (
        LinkKind("one below", "the one below sample {key}"),
        LinkKind("one behind", "the one behind sample {key}"),
    ),
}

#: Ways to bring up a fact; the statement itself stays the same.
LEADS = (
    "",
    "",
    "",
    "",
    "Note that ",
    "As agreed, ",
    "Remember that ",
    "According to the list, ",
    "For the record, ",
    "As of today, ",
    "It is certain that ",
    "By the way, ",
)
TAILS = ("", "", "", "", "", ", as always", " for now", ", as far as we know", " until further notice")

HEADERS = tuple(
    map(
        Template,
        (
            "This is the {subject} of {town}, kept by {person}.",
            "The {subject} of the {place} at {town}, {month} edition.",
            "Here begins the {subject} that {person} wrote in {month}.",
            "Copy of the {subject} from {town}, page {tens}.",
        ),
    )
)

FILLER = tuple(
    map(
        Template,
        (
            "{person} came late on {weekday} and forgot the {item}.",
            "The {title} sold {tens} bags of {goods} at the market.",
            "It rained in {town} for most of {month}.",
            "Nobody knows why the {place} was closed.",
            "A {colour} {animal} sat near the {place} all morning.",
            "We ate {goods} and {goods} before the long walk.",
            "The {title} from {town} asked for {material} and {material}.",
            "On {weekday} the {place} smelled of {goods}.",
            "{first} likes {goods} but never buys any.",
            "There was a {item} under the {place}.",
            "The old road to {town} is wet and slow.",
            "Someone left a {thing} and a {thing} by the door.",
            "The {animal} and the {animal} ran across the yard.",
            "{first} and {first} spoke about the weather in {town}.",
            "A letter for {person} arrived from {town}.",
            "The {title} carried {tens} boxes of {material} up the stairs.",
            "Most people here prefer {goods} to {goods}.",
            "The {place} needs a new roof before {month}.",
            "{person} will paint the {place} {colour} next week.",
            "Later the wind turned and the {place} became cold.",
            "The bill for the {goods} was {hundreds} coins.",
            "Ticket {code} was found near the {place}.",
            "The {title} counted {hundreds} steps to the {place}.",
            "They say that a {animal} lives below the {place}.",
            "Every {weekday} the {title} cleans the {thing}.",
            "{first} dreamed of a {animal} with a {colour} {thing}.",
            "The {place} at {town} opens early in {month}.",
            "No one wanted the {item} any more.",
            "A {title} and a {title} argued about {goods}.",
            "The story of the {word} is told in {town}.",
            "Please keep the {thing} dry and away from the {material}.",
            "{person} moved the {item} to the {place}.",
            "In {month} the {title} planted {goods} behind the {place}.",
            "The bread was good and the {goods} were cheap.",
            "Two of the {thing} makers came from {town}.",
            "He paid {tens} coins for {goods} and went home.",
            "She drew a {word} on the back of the page.",
            "The children saw {tens} birds over the {place}.",
            "It took {tens} days to reach {town} on foot.",
            "The {title} told a joke about a {animal}.",
            "After lunch {first} fixed the {thing} with some {material}.",
            "The {colour} paint has not dried yet.",
            "Bus {hundreds} stops between the {place} and the {place}.",
            "A picture of {person} hangs in the {place}.",
            "{first} asked whether the {animal} had been fed.",
            "Parcel {code} went back to {town}.",
            "The meeting on {weekday} was short and dull.",
            "Old {surname} still talks about the {word}.",
            "Some {material} was stored next to the {goods}.",
            "The song about the {word} and the {animal} is well known.",
            "Nothing else happened at the {place} that day.",
            "The {title} hid the {thing} in a {material} box.",
            "Rain and {colour} clouds came over {town}.",
            "The {item} fell down but did not break.",
            "{person} and {person} met at the {place}.",
            "The {ship} passed {town} without a stop.",
            "Box {sample} was empty when we opened it.",
            "Since {date} the {place} has been quiet.",
            "The clock in the {place} is {tens} minutes slow.",
            "One {animal} followed the {title} all the way to {town}.",
            "Line {extension} was busy, so {first} walked over.",
            "The {title} said that {goods} would be scarce this year.",
            "By evening the {thing} was as good as new.",
            "A {adjective} {animal} is better than a {adjective} {thing}.",
        ),
    )
)

#: Harmless sentences about the key of a fact, by the slot that the key fills.
MENTIONS: dict[str, tuple[Template, ...]] = {
    "person": tuple(
        map(
            Template,
            (
                "{key} came late on {weekday}.",
                "Nobody saw {key} at the {place}.",
                "A letter for {key} arrived from abroad.",
                "{key} likes {goods} and {goods}.",
            ),
        )
    ),
    "town": tuple(
        map(
            Template,
            (
                "It rained in {key} for most of {month}.",
                "The old road to {key} is wet and slow.",
                "{first} once lived in {key}.",
            ),
        )
    ),
    "item": tuple(map(Template, ("{first} cleaned the {key} on {weekday}.", "No one wanted the {key} any more."))),
    "date": tuple(map(Template, ("It rained on {key} until noon.", "Since {key} the {place} has been quiet."))),
    "ship": tuple(map(Template, ("The {key} needs new paint.", "People waved when the {key} came in."))),
    "sample": tuple(map(Template, ("Someone moved sample {key} to the {place}.", "Sample {key} looks old."))),
}

QUESTION = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Fact:
    """One fact of a document, or one link, whose value is the key of a fact.

    ``answer`` is the value alone, ``answer_sentence`` the whole sentence that answers the question (it restates
    the key, then gives the value). ``piece`` is the index of the sentence in ``Document.pieces`` and ``depth`` where
    it begins, as a share of the document's tokens.
    """

    sentence: str
    question: str
    answer: str
    answer_sentence: str
    kind: str
    key: str
    depth: float
    piece: int


@dataclass(frozen=True)
class TwoHop:
    """A question that names a key and asks for the fact of the key that it is linked to.

    ``answer`` is that fact's value, ``answer_sentence`` says the link and then the fact.
    """

    question: str
    link: Fact
    fact: Fact

    @property
    def answer(self) -> str:
        return self.fact.answer

    @property
    def answer_sentence(self) -> str:
        return f"{self.link.answer_sentence} {self.fact.answer_sentence}"

    @property
    def kind(self) -> str:
        return f"{self.fact.kind} by {self.link.kind}"


@dataclass(frozen=True)
class Document:
    """A text, the facts in it (in reading order) and the fact that was asked for by depth; with links, these too and
    one question of two hops for each, both in reading order."""

    subject: str
    pieces: tuple[str, ...]
    facts: tuple[Fact, ...]
    target: Fact
    n_tokens: int
    links: tuple[Fact, ...] = ()
    two_hops: tuple[TwoHop, ...] = ()

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def prompt(self, fact: Fact | TwoHop | None = None) -> str:
        """What the model reads: the text, the question and ``Answer:``. It goes on with the answer and a line end."""
        return prompt(self.text, (fact or self.target).question)


def prompt(text: str, question: str) -> str:
    """The prompt form that the bundled model knows."""
    return f"{text}\n\n{QUESTION.format(question=question)}"


def is_right(fact: Fact | TwoHop, generated: str) -> bool:
    """Whether the first line that the model wrote is exactly the answer sentence."""
    return generated.strip().partition("\n")[0].strip() == fact.answer_sentence


_TOKEN = re.compile(r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def count_tokens(text: str) -> int:
    """Tokens of generated text in the bundled model's vocabulary (made-up words count as one)."""
    return len(_TOKEN.findall(text))


# --------------------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    kind: FactKind
    key: str
    value: str


def _draft_facts(rng: random.Random, kinds: list[FactKind], n_facts: int, made_up: float, alike: float) -> list[_Draft]:
    """Facts with keys that differ from each other, and values that differ within a kind."""
    drafts: list[_Draft] = []
    keys: set[str] = set()
    words: set[str] = set()
    values: set[tuple[str, str]] = set()
    share_words = rng.random() < alike
    tries = 0
    while len(drafts) < n_facts:
        tries += 1
        if tries > 200 * n_facts + 1000:
            raise ValueError(f"there are not {n_facts} different facts of the kinds {[kind.name for kind in kinds]}")
        kind = rng.choice(kinds)
        slot = MADE_UP[kind.key] if kind.key in MADE_UP and rng.random() < made_up else kind.key
        key = SLOTS[slot](rng)
        value = (
            made_up_word(rng)
            if kind.value in ("town", "first", "surname") and rng.random() < made_up
            else SLOTS[kind.value](rng)
        )
        parts = set(re.findall(r"\w+", key))
        if key in keys or value in parts or (kind.name, value) in values:
            continue
        if not share_words and parts & words and tries < 20 * n_facts:
            continue
        keys.add(key)
        words |= parts
        values.add((kind.name, value))
        drafts.append(_Draft(kind, key, value))
    return drafts


def _draft_links(rng: random.Random, drafts: list[_Draft], n_links: int) -> list[_Draft]:
    """Links between the keys of facts: none leads to its own key, no two begin or end at the same one."""
    if n_links > len(drafts) or len(drafts) < 2:
        raise ValueError(f"there cannot be {n_links} links between {len(drafts)} facts")
    ring = rng.sample([draft.key for draft in drafts], len(drafts))
    slot = drafts[0].kind.key
    starts = rng.sample(range(len(ring)), n_links)
    return [_Draft(_as_fact_kind(rng.choice(LINKS[slot]), slot), ring[i], ring[i - 1]) for i in starts]


def _as_fact_kind(link: LinkKind, slot: str) -> FactKind:
    named = NAMED.get(slot, "{key}").replace("{key}", "{value}")
    asked = f"{'Who' if slot == 'person' else 'What'} {link.verb} {link.phrase}?"
    return FactKind(link.name, slot, slot, f"{link.phrase} {link.verb} {named}", (asked,))


def _sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


class _Filler:
    """An endless supply of filler that never states a fact and never shows a key or a numeric answer by accident."""

    def __init__(self, rng: random.Random, drafts: list[_Draft], mentions: float) -> None:
        self._rng = rng
        self._drafts = drafts
        self._mentions = mentions
        taken = {d.key for d in drafts} | {d.value for d in drafts if d.value.isdigit() and len(d.value) > 3}
        self._taken = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(taken))) + r")\b") if taken else None

    def allows(self, sentence: str) -> bool:
        return self._taken is None or not self._taken.search(sentence)

    def __call__(self) -> str:
        rng = self._rng
        if self._drafts and rng.random() < self._mentions:
            draft = rng.choice(self._drafts)
            return rng.choice(MENTIONS[draft.kind.key]).fill(rng, key=draft.key)
        while True:
            sentence = FILLER[int(rng.random() * len(FILLER))].fill(rng)
            if self.allows(sentence):
                return sentence


def make_document(
    seed: int,
    n_tokens: int,
    tokenizer_len: Callable[[str], int] = count_tokens,
    *,
    kind: str | None = None,
    n_facts: int = 12,
    depth: float | None = None,
    n_kinds: int | None = None,
    made_up: float = 0.0,
    alike: float = 0.25,
    mentions: float = 0.03,
    n_links: int = 0,
) -> Document:
    """Write a document of about ``n_tokens`` tokens (never more than asked by over one sentence).

    ``tokenizer_len`` counts the tokens of a sentence. ``kind`` is a subject (a key of ``SUBJECTS``) or the name
    of one fact kind; None draws a subject. ``n_facts`` look-alike facts are spread over the whole length, of
    ``n_kinds`` kinds (drawn when None). ``depth`` (0 to 1) places the ``target`` fact; None draws it.
    ``made_up`` is the share of names that no word list holds, ``alike`` the chance that keys may share a
    word, ``mentions`` the share of filler sentences that name a key without telling its value.
    ``n_links`` (up to ``n_facts``) links lie between the keys of facts, which then are all of one sort; a key
    has at most one link, and is led to by at most one.
    """
    rng = random.Random(seed)
    subject, kinds = _choose_kinds(rng, kind, n_kinds)
    if n_links:
        kinds = [kind for kind in kinds if kind.key == kinds[0].key]
    drafts = _draft_facts(rng, kinds, n_facts, made_up, alike)
    filler = _Filler(rng, drafts, mentions)
    links = _draft_links(rng, drafts, n_links) if n_links else []

    target = rng.randrange(n_facts)
    n_said = n_facts + n_links
    spots = [(i + rng.random()) / n_said for i in range(n_said)]
    if n_links:
        rng.shuffle(spots)
    if depth is not None:
        nearest = min(range(n_facts), key=lambda i: abs(spots[i] - depth))
        spots[nearest], target = depth, nearest
    spots_left = sorted((spot, i) for i, spot in enumerate(spots))

    said = [_state(rng, draft) for draft in [*drafts, *links]]
    lengths = [tokenizer_len(" " + sentence) for sentence in said]
    pieces: list[str] = []
    placed: dict[int, tuple[int, float]] = {}
    used = 0
    rest = sum(lengths)
    until_break = 0

    def add(sentence: str, length: int) -> None:
        nonlocal used, until_break
        pieces.append(sentence if not pieces or pieces[-1].endswith("\n") else " " + sentence)
        used += length
        until_break -= 1
        if until_break <= 0:
            if len(pieces) > 1 or rng.random() < 0.5:
                pieces[-1] += "\n"
            until_break = rng.randint(3, 9)

    header = _fitting(rng, HEADERS, filler, subject)
    add(header, tokenizer_len(" " + header))
    while True:
        following = filler()
        length = tokenizer_len(" " + following)
        room = n_tokens - used - rest
        while spots_left and (spots_left[0][0] * n_tokens <= used + length / 2 or room < length):
            _, i = spots_left.pop(0)
            placed[i] = (len(pieces), min(1.0, used / n_tokens))
            add(said[i], lengths[i])
            rest -= lengths[i]
        if n_tokens - used - rest < length:
            break
        add(following, length)
    pieces[-1] = pieces[-1].rstrip("\n")

    facts = {i: _fact(rng, [*drafts, *links][i], said[i], *placed[i]) for i in placed}
    in_order = tuple(facts[i] for i in placed if i < n_facts)
    linked = tuple(facts[i] for i in placed if i >= n_facts)
    by_key = {draft.key: (draft.kind, facts[i]) for i, draft in enumerate(drafts)}
    two_hops = tuple(_two_hop(rng, link, *by_key[link.answer]) for link in linked)
    return Document(subject, tuple(pieces), in_order, facts[target], used, linked, two_hops)


def _choose_kinds(rng: random.Random, kind: str | None, n_kinds: int | None) -> tuple[str, list[FactKind]]:
    subject = kind if kind in SUBJECTS else rng.choice(list(SUBJECTS))
    if kind is not None and kind not in SUBJECTS:
        for name, members in SUBJECTS.items():
            for member in members:
                if member.name == kind:
                    return name, [member]
        raise ValueError(f"no subject and no fact kind is called {kind!r}")
    members = SUBJECTS[subject]
    return subject, rng.sample(members, min(n_kinds or rng.choice((1, 1, 2, 3)), len(members)))


def _state(rng: random.Random, draft: _Draft) -> str:
    statement = draft.kind.statement.format(key=draft.key, value=draft.value)
    return _sentence_case(rng.choice(LEADS) + statement + rng.choice(TAILS) + ".")


def _fact(rng: random.Random, draft: _Draft, sentence: str, piece: int, depth: float) -> Fact:
    kind = draft.kind
    return Fact(
        sentence=sentence,
        question=rng.choice(kind.questions).format(key=draft.key),
        answer=draft.value,
        answer_sentence=_sentence_case(kind.statement.format(key=draft.key, value=draft.value) + "."),
        kind=kind.name,
        key=draft.key,
        depth=depth,
        piece=piece,
    )


def _two_hop(rng: random.Random, link: Fact, kind: FactKind, fact: Fact) -> TwoHop:
    """The fact's question, in which the link stands for the fact's key."""
    (phrase,) = (each.phrase for each in LINKS[kind.key] if each.name == link.kind)
    asked = rng.choice(kind.questions).replace(NAMED.get(kind.key, "{key}"), phrase)
    return TwoHop(asked.format(key=link.key), link, fact)


def _fitting(rng: random.Random, templates: tuple[Template, ...], filler: _Filler, subject: str) -> str:
    """A header that shows no key of the document."""
    while True:
        header = rng.choice(templates).fill(rng, subject=subject)
        if filler.allows(header):
            return header
