"""``eval library``: what a question finds in a collection that is kept, by how much of it is read.

For each question it is measured whether the chunks that are read hold the facts (recall), whether the answer is right, whether the first
citation holds the fact, how many tokens were computed and how many were kept, and the time to the first token. Recall needs no model's
weights, so that large collections are cheap: the mode "none" selects as "auto" does, and reads nothing.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...config import MesaConfig
from ...errors import ConfigError, PromptError
from ...library.library import Document, Library
from ...llama import MesaLlama
from ...model.fingerprint import model_fingerprint
from ...model.header import check_model
from ...reading.embeddings import EmbeddingModel
from ...reading.reader import Reader, context_for, load_model
from ...reading.shelf import MOST_AUTO_TOKENS, Catalogue, ReadMode, check_mode
from .. import documents, facts
from . import report, scoring
from .prompts import Prompter
from .run import Watch
from .store import Row, Store

NONE, STOCK = "none", "stock"
MAX_TOKENS = 48  # of an answer
PART_TOKENS = 32_768  # of a document of a collection
LEAST_TOKENS = 1536  # of a collection
ROOM = 256  # tokens for the longest question, around it and for what the counts of parts differ by
FORMS = facts.FORMS

Mode = ReadMode | str
"""A read mode, "none" (select as "auto" does, read nothing) or "stock" (the whole text, by stock llama.cpp)."""


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        modes: in the order in which they are run.
        lengths: of collections, in tokens.
        samples: collections of a length.
        text: that facts are put into; None: of the bundled reader its own, else Python's documentation.
        n_facts: facts unlike all others, and as many that look alike.
        machine: arguments of MesaLlama that should not change results: threads, layers on a GPU.
        embedding: finds questions in other words, too.
    """

    path: Path
    modes: Sequence[Mode]
    lengths: Sequence[int]
    seed: int
    samples: int = 1
    text: str | None = None
    n_facts: int = 12
    engine: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    embedding: EmbeddingModel | None = None


@dataclass(frozen=True)
class _Asked:
    """A question about a collection.

    Attributes:
        needed: of each fact that it takes, the words that the passage with it has.
    """

    form: str
    question: str
    answer: str
    needed: tuple[tuple[str, ...], ...]
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class _Collection:
    text: str
    asked: tuple[_Asked, ...]


class LibraryEvaluation:
    """Questions about collections of a library.

    Args:
        folder: where the results are, "library.jsonl".

    Raises:
        MesaError: settings that cannot work, or results that were made with others.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.options, self.folder = settings, folder
        self.prompter = Prompter(settings.path)
        self.train_length = check_model(settings.path).train_length
        if min(settings.lengths) < LEAST_TOKENS:
            raise ConfigError(
                f"a collection of {min(settings.lengths)} tokens is too short for these facts: make it {LEAST_TOKENS} or more"
            )
        if settings.modes == [STOCK] and min(settings.lengths) > self.train_length:
            raise ConfigError(
                f"stock llama.cpp reads {self.train_length} tokens of this model, and no length is so short"
            )
        self._counts: dict[str, int] = {}
        self.haystack: facts.Haystack | None = None
        if self.prompter.style != "reader" or settings.text is not None:
            self.haystack = facts.Haystack(settings.text if settings.text is not None else facts.default_text())
        folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(folder / "library.jsonl", self.settings())

    def settings(self) -> dict[str, Any]:
        """What the results depend on, besides task, method, length, seed and index."""
        options = self.options
        embedding = options.embedding
        known = {}
        if embedding is not None:
            known["embedding"] = {
                "name": embedding.path.name,
                "fingerprint": embedding.fingerprint,
                "query": embedding.query,
                "passage": embedding.passage,
            }
        return {
            "task": {
                "name": "library",
                "n_facts": options.n_facts,
                "max_tokens": MAX_TOKENS,
                "text": _digest(options.text),
            },
            "model": {
                "name": options.path.name,
                "fingerprint": model_fingerprint(options.path),
                "train_length": self.train_length,
            },
            "form": self.prompter.form.name,
            "engine": dict(options.engine),
            "versions": {"mesa-gguf": __version__},
            **known,
        }

    def run(self, watch: Watch | None = None) -> None:
        """Compute what is not there yet."""
        options = self.options
        plan = [(length, index) for length in options.lengths for index in range(options.samples)]
        total, done = sum(length for length, _ in plan), 0
        for length, index in plan:
            made = self._make(length, index)
            modes = [mode for mode in options.modes if not self._is_there(mode, length, index, made)]
            if watch is not None:
                watch(f"{', '.join(map(str, modes))} · {length}", done, total)
            if modes:
                self._run(length, index, made, modes)
            done += length
        if watch is not None:
            watch("library", total, total)

    def _is_there(self, mode: Mode, length: int, index: int, made: _Collection) -> bool:
        if mode == STOCK and length > self.train_length:
            return True
        return all(self._key(mode, length, index, n, made) in self.store for n in range(len(made.asked)))

    def _key(self, mode: Mode, length: int, index: int, n: int, made: _Collection) -> tuple[Any, ...]:
        form = made.asked[n].form
        return (f"library/{form}", str(mode), length, self.options.seed, None, index * len(made.asked) + n)

    def _make(self, length: int, index: int) -> _Collection:
        """A collection of a length, and its questions."""
        options = self.options
        seed, n = f"{options.seed}:{length}:{index}", options.n_facts
        room = length - ROOM - MAX_TOKENS
        if self.haystack is None:
            number = int.from_bytes(seed.encode(), "little") % 2**31
            made = documents.make_document(number, room, self.prompter.count, n_facts=2 * n)
            return _Collection(made.text, tuple(_of_reader(fact) for fact in made.facts))
        text = facts.make_document(self.haystack, seed, room, self._count, n_unlike=n, n_alike=n)
        return _Collection(text.text, tuple(_of_text(question, text) for question in text.questions))

    def _count(self, text: str) -> int:
        """The number of tokens of a text, paragraph by paragraph; each is tokenized once, however many texts it stands in."""
        total = 0
        for paragraph in text.split("\n\n"):
            if paragraph not in self._counts:
                self._counts[paragraph] = self.prompter.count(f"{paragraph}\n\n")
            total += self._counts[paragraph]
        return total

    def _run(self, length: int, index: int, made: _Collection, modes: Sequence[Mode]) -> None:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="library-", dir=self.folder))
            library = stack.enter_context(Library(folder, budget=10**15))
            parts = [
                library.add_text(part, f"part {n + 1}.txt")
                for n, part in enumerate(split_text(made.text, -(-length // PART_TOKENS)))
            ]
            form = self.prompter.form
            catalogue = Catalogue(form.vocabulary, form, library, self.options.embedding)
            for mode in modes:
                rows = self._rows(mode, length, made, parts, catalogue)
                for n, row in enumerate(rows):
                    names = ("task", "method", "length", "seed", "depth", "index")
                    self.store.add([{**dict(zip(names, self._key(mode, length, index, n, made))), **row}])

    def _rows(
        self, mode: Mode, length: int, made: _Collection, parts: Sequence[Document], catalogue: Catalogue
    ) -> Iterator[Row]:
        if mode == NONE:
            for asked in made.asked:
                start = time.perf_counter()
                selection = catalogue.select(asked.question, parts, "auto")
                seconds = time.perf_counter() - start
                texts = [piece.text for piece in selection.pieces]
                read = {"chunks": len(texts), "of_chunks": selection.of_chunks, "tokens": selection.n_tokens}
                yield {
                    "form": asked.form,
                    **_found(asked, texts),
                    "read": read,
                    "timings": {"select_s": round(seconds, 4)},
                }
            return
        options = self.options
        n_all = catalogue.select(made.asked[0].question, parts, "each").room
        config = MesaConfig(enabled=mode != STOCK)
        n_needed = n_all if mode in ("all", STOCK) else mode if isinstance(mode, int) else MOST_AUTO_TOKENS
        n_ctx = context_for(len(catalogue.preamble) + max(n_needed, catalogue.chunk_tokens) + ROOM, MAX_TOKENS)
        llm = load_model(options.path, mesa=config, n_ctx=n_ctx, **options.engine, **options.machine)
        with closing(llm):
            if mode == STOCK:
                yield from self._ask_stock(llm, made)
                return
            reader = Reader(llm, catalogue=catalogue)
            for asked in made.asked:
                answer = reader.ask(asked.question, documents=parts, read=mode, max_tokens=MAX_TOKENS).answer  # type: ignore[arg-type]
                assert answer.read is not None
                assert reader.shelf is not None
                # as it was for the answer: what the model made of the question is remembered
                selection = catalogue.select(asked.question, parts, check_mode(mode), model=reader.shelf)
                cited = [citation.text for citation in answer.citations]
                yield {
                    "form": asked.form,
                    **_found(asked, [piece.text for piece in selection.pieces]),
                    **_answered(asked, answer.text),
                    "cited": int(any(_holds(cited[0], words) for words in asked.needed))
                    if cited and asked.needed
                    else None,
                    "read": {
                        "chunks": answer.read.chunks,
                        "of_chunks": answer.read.of_chunks,
                        "tokens": answer.read.tokens_computed + answer.read.tokens_reused,
                        "computed": answer.read.tokens_computed,
                    },
                    "timings": {"first_token_s": round(answer.first_token_seconds, 4)},
                }

    def _ask_stock(self, llm: MesaLlama, made: _Collection) -> Iterator[Row]:
        reader = Reader(llm, form=self.prompter.form)
        reading = reader.read(made.text)
        for asked in made.asked:
            answer = reader.ask(asked.question, max_tokens=MAX_TOKENS).answer
            yield {
                "form": asked.form,
                "recall": None,
                **_answered(asked, answer.text),
                "cited": None,
                "read": {"tokens": reading.n_tokens, "computed": reading.n_tokens if asked is made.asked[0] else 0},
                # note: a question after the first reads nothing, as long as the context is kept; a new process reads all
                "timings": {"first_token_s": round(answer.first_token_seconds + reading.seconds, 4)},
            }


def split_text(text: str, n: int) -> list[str]:
    """A text in n parts of about the same length, cut between paragraphs."""
    parts, start = [], 0
    for i in range(1, n):
        at = text.find("\n\n", max(start, len(text) * i // n))
        if at < 0:
            break
        parts.append(text[start : at + 2])
        start = at + 2
    found: list[str] = []
    for part in (*parts, text[start:]):
        if (found and not part.strip()) or (found and not found[-1].strip()):
            found[-1] += part
        else:
            found.append(part)
    return [part for part in found if part.strip()]


def _of_reader(fact: documents.Fact) -> _Asked:
    return _Asked(
        "literal",
        fact.question,
        fact.answer,
        ((fact.key, fact.answer),),
        lambda answer: documents.is_right(fact, answer),
    )


def _of_text(question: facts.Question, document: facts.FactDocument) -> _Asked:
    needed = [document.facts[i] for i in question.facts]
    words = tuple((fact.key, fact.value) if fact.key else (fact.value,) for fact in needed)
    return _Asked(question.form, question.text, question.answer, words, question.is_right)


def _holds(text: str, words: Iterable[str]) -> bool:
    plain = " ".join(text.split())
    return all(word in plain for word in words)


def _found(asked: _Asked, texts: Sequence[str]) -> Row:
    """Which share of the facts stands in the chunks that are read; None where there is none to be found."""
    if not asked.needed:
        return {"recall": None}
    n = sum(any(_holds(text, words) for text in texts) for words in asked.needed)
    return {"recall": round(n / len(asked.needed), 4)}


def _answered(asked: _Asked, answer: str) -> Row:
    return {"right": int(asked.is_right(answer)), "expected": asked.answer, "answer": answer}


def _digest(text: str | None) -> str | None:
    import hashlib

    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


#
# numbers
#


def contents(evaluation: LibraryEvaluation, command: str) -> Row:
    """What library.json holds: the settings, numbers that the seed decides, pairs, and times, which it does not."""
    rows = sorted(
        evaluation.store.rows.values(), key=lambda row: (row["length"], row["task"], row["method"], row["index"])
    )
    return {
        "settings": evaluation.settings(),
        "summary": summarize(rows),
        "pairs": pairs(rows),
        "times": times(rows),
        "run": {"command": command, "machine": report.machine()},
    }


def _groups(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """By form, mode and length; "every" is all forms together."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        for form in (row["form"], "every"):
            found.setdefault((form, row["method"], row["length"]), []).append(row)
    order = {form: n for n, form in enumerate((*FORMS, "every"))}
    return dict(sorted(found.items(), key=lambda item: (item[0][2], order[item[0][0]], item[0][1])))


def summarize(rows: Iterable[Row]) -> list[Row]:
    """An entry for each form, mode and length."""
    out = []
    for (form, mode, length), group in _groups(rows).items():
        recalls = [row["recall"] for row in group if row["recall"] is not None]
        entry: Row = {"form": form, "read": mode, "length": length, "n": len(group)}
        if recalls:
            n_whole = sum(recall == 1 for recall in recalls)
            entry["recall"] = round(n_whole / len(recalls), 4)
            entry["recall_interval"] = _rounded(scoring.wilson(n_whole, len(recalls)))
        if all("right" in row for row in group):
            right = sum(row["right"] for row in group)
            entry["right"] = round(right / len(group), 4)
            entry["right_interval"] = _rounded(scoring.wilson(right, len(group)))
            cited = [row["cited"] for row in group if row["right"] and row["cited"] is not None]
            if cited:
                entry["first_citation_holds"] = round(sum(cited) / len(cited), 4)
                entry["n_cited"] = len(cited)
        entry["tokens_read"] = round(statistics.fmean(row["read"]["tokens"] for row in group), 1)
        out.append(entry)
    return out


def pairs(rows: Iterable[Row]) -> list[Row]:
    """What "auto" has more right than the other modes, question by question, with the 95 % interval over collections."""
    groups = _groups(row for row in rows if "right" in row)
    out = []
    for (form, mode, length), group in groups.items():
        others = groups.get((form, "auto", length))
        if mode == "auto" or others is None:
            continue
        mine = {row["index"]: row["right"] for row in others}
        differences = [mine[row["index"]] - row["right"] for row in group if row["index"] in mine]
        if differences:
            low, high = scoring.mean_interval(differences)
            out.append(
                {
                    "form": form,
                    "length": length,
                    "of": "auto",
                    "minus": mode,
                    "n": len(differences),
                    "difference": round(math.fsum(differences) / len(differences), 4),
                    "interval": _rounded((low, high)),
                }
            )
    return out


def times(rows: Iterable[Row]) -> list[Row]:
    """Medians of the time to the first token, in seconds: of questions for which something was computed, and of the others."""
    out = []
    for (form, mode, length), group in _groups(rows).items():
        if form != "every":
            continue
        entry: Row = {"read": mode, "length": length}
        for name, some in (
            ("first_token_s_computed", [r for r in group if r["read"].get("computed", 0) > 0]),
            ("first_token_s_reused", [r for r in group if r["read"].get("computed", 1) == 0]),
        ):
            values = [row["timings"]["first_token_s"] for row in some if "first_token_s" in row["timings"]]
            if values:
                entry[name] = round(statistics.median(values), 3)
        computed = sum(row["read"].get("computed", 0) for row in group)
        read = sum(row["read"]["tokens"] for row in group)
        entry |= {"tokens_computed": computed, "tokens_reused": read - computed} if mode != NONE else {}
        out.append(entry)
    return out


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]


def table(made: Row) -> Any:
    """The summary for a terminal."""
    from rich.table import Table

    found = Table(title="questions about a collection, 95 % intervals", title_justify="left")
    for name in ("tokens", "form", "read", "n", "recall", "right", "first citation", "tokens read"):
        found.add_column(name, justify="left" if name in ("form", "read") else "right")
    for entry in made["summary"]:
        found.add_row(
            str(entry["length"]),
            entry["form"],
            entry["read"],
            str(entry["n"]),
            _cell(entry, "recall"),
            _cell(entry, "right"),
            f"{entry['first_citation_holds']:.2f} of {entry['n_cited']}" if "n_cited" in entry else "–",
            f"{entry['tokens_read']:.0f}",
        )
    return found


def _cell(entry: Row, name: str) -> str:
    if name not in entry:
        return "–"
    low, high = entry[f"{name}_interval"]
    return f"{entry[name]:.2f} [{low:.2f}, {high:.2f}]"


def check_modes(names: Sequence[str]) -> list[Mode]:
    """What --read and stock say.

    Raises:
        PromptError: one is no mode.
    """
    found: list[Mode] = []
    for name in names:
        mode: Mode = int(name) if name.isascii() and name.isdigit() else name
        if mode not in (NONE, STOCK):
            try:
                check_mode(mode)
            except PromptError:
                raise PromptError(
                    f"read is {mode!r}: it must be auto, all, each, none, or a number of tokens"
                ) from None
        if mode not in found:
            found.append(mode)
    return found
