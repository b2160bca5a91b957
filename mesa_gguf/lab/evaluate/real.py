"""The task "real": questions about facts in real text, for any model.

A document is read once, and every question is asked behind it. An answer is scored in two ways: as the model writes it freely, and with
its beginning given, so that only the fact itself is scored: whether its tokens are the likeliest ones, and how likely they are. The second
tells settings apart that answer equally often. Documents of all lengths have the same facts and questions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from ... import __version__
from ...errors import ConfigError, PromptError
from ...llama import MesaLlama
from ...model.header import check_model
from ...reading.prompts import PromptForm
from ...reading.reader import load_vocabulary
from ...reading.shelf import ReadMode
from ..facts import FORMS, FactDocument, Form, Haystack, Question, TooShortError, default_text, make_document
from ..methods import Setting, check_method, find_setting
from .loss import score_begun
from .run import Options, Watch, check_folder, defaults, fingerprint
from .sources import open_for, open_source
from .store import Row, Store

REAL = "real"
MAX_TOKENS = 48
ROOM = 96  # tokens at first for a question and its answer; more where they are longer
STRIDE = 1000
"""An item's index is that of its document times this, and its own in the document."""


@dataclass(frozen=True)
class Prompt:
    """A question as token ids, to follow a document's head.

    Attributes:
        tail: the question.
        begun: what the answer begins with, and
        answer: the answer itself.
    """

    tail: list[int]
    begun: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Asked:
    """A document and its questions as token ids."""

    document: FactDocument
    head: list[int]
    prompts: list[Prompt]


def make_prompt(form: PromptForm, question: Question) -> Prompt:
    """The tokens of a question about a document."""
    gap = " " if form.is_plain else ""
    return Prompt(
        form.tail(question.text), form.tokenize(f"{gap}{question.begun}"), form.tokenize(f" {question.answer}")
    )


def make_asked(
    form: PromptForm, haystack: Haystack, length: int, seed: int | str, forms: Sequence[Form], n_facts: int
) -> Asked:
    """A document of facts that fills `length` tokens with its longest question and answer, or nearly so.

    Args:
        forms: the questions that are kept.
        n_facts: how many facts it has; half of them look alike. Two more, and for each six one more, are for other questions.

    Raises:
        PromptError: the text, or the length, is too short.
    """

    def count(text: str) -> int:
        return len(form.tokenize(text))

    n_tokens = length - ROOM
    n_alike = max(1, n_facts // 2)
    n_more = max(1, n_facts // 6)
    while True:
        try:
            document = make_document(
                haystack, seed, n_tokens, count,
                n_unlike=max(0, n_facts - n_alike), n_alike=n_alike, n_links=n_more, n_counts=max(1, n_more // 2), n_absent=n_more,
            )  # fmt: skip
        except TooShortError:
            raise PromptError(
                f"{length} tokens are too few for a document of {n_facts} facts, a question and an answer: make it longer, or give it fewer facts"
            ) from None
        head = form.head(document.text)
        questions = tuple(question for question in document.questions if question.form in forms)
        prompts = [make_prompt(form, question) for question in questions]
        longest = max(len(one.tail) + max(MAX_TOKENS, len(one.begun) + len(one.answer)) for one in prompts)
        over = len(head) + longest - length
        if over <= 0:
            return Asked(FactDocument(document.text, document.facts, questions), head, prompts)
        n_tokens -= over


class RealEvaluation:
    """Questions over real text, with several settings.

    Args:
        options: `methods` are settings ("mesa,chunk=1024"), the first of which the others are compared with; `kinds` are forms of
            questions; `text` is the text that facts are hidden in, None: `default_text`.
        folder: where the results are, "real.jsonl".
        generate: answers are written freely too.
        plain: the model's chat template is not used.

    Raises:
        MesaError: options that cannot work, or results that were made with other settings.
    """

    group = REAL

    def __init__(self, options: Options, folder: Path, *, generate: bool = True, plain: bool = False) -> None:
        self.options = options
        self.generate = generate
        self.path = options.path
        self.header = check_model(self.path)
        self.forms = self._forms()
        self.settings_ = [find_setting(text) for text in options.methods]
        for setting in self.settings_:
            check_method(self.header, setting.method, self._overrides(setting))
        self.text = options.text if options.text is not None else default_text()
        self.haystack = Haystack(self.text)
        self.form = PromptForm(load_vocabulary(self.path), plain=plain)
        self._made: dict[tuple[int, int], Asked] = {}
        for length in {min(options.lengths), max(options.lengths)}:
            self._asked(length, 0)  # raises if it cannot be made
        self.store = Store(check_folder(folder, REAL), self.settings())

    def _forms(self) -> list[Form]:
        unknown = [name for name in self.options.kinds if name not in FORMS]
        if unknown:
            raise ConfigError(f"there is no real kind {unknown[0]}: use one of {', '.join(FORMS)}")
        chosen = [form for form in FORMS if not self.options.kinds or form in self.options.kinds]
        if not self.generate:
            chosen = [form for form in chosen if form != "absent"]
        if not chosen:
            raise ConfigError("absent is scored by what the model writes, which was switched off: choose other kinds")
        return chosen

    def _overrides(self, setting: Setting) -> dict[str, Any]:
        common = self.options.overrides if setting.method.engine is not None else {}
        return {**common, **setting.overrides}

    def _asked(self, length: int, index: int) -> Asked:
        if (length, index) not in self._made:
            seed = f"{self.options.seed}:{index}"
            self._made[length, index] = make_asked(
                self.form, self.haystack, length, seed, self.forms, self.options.n_facts
            )
        return self._made[length, index]

    def settings(self) -> dict[str, Any]:
        """What the results depend on, besides task, method, length, seed, depth and index."""
        options = self.options
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        task = {
            "name": REAL,
            "n_facts": options.n_facts,
            "forms": self.forms,
            "generate": self.generate,
            "text": digest,
        }
        return {
            "task": task,
            "model": {
                "name": self.path.name,
                "fingerprint": fingerprint(self.path),
                "train_length": self.header.train_length,
            },
            "style": self.form.name,
            "mesa": dict(options.overrides),
            "defaults": defaults(options.train_length),
            "engine": dict(options.engine),
            "versions": {"mesa-gguf": __version__, "llama-cpp-python": llama_cpp.__version__},
        }

    @property
    def n_there(self) -> int:
        """Number of results that need not be computed."""
        return len(self.store.rows)

    def run(self, watch: Watch | None = None) -> None:
        """Compute what is not there yet."""
        there = {
            (row["method"], row["length"], row["seed"], row["index"] // STRIDE) for row in self.store.rows.values()
        }
        plan = [
            (
                length,
                setting,
                [i for i in range(self.options.samples[REAL]) if not self._is_there(there, setting, length, i)],
            )
            for length in self.options.lengths
            for setting in self.settings_
            if self.options.reads(setting.method, length)
        ]
        total = sum(length * len(todo) for length, _, todo in plan)
        done = 0
        for length, setting, todo in plan:
            if not todo:
                continue
            self._made = {key: made for key, made in self._made.items() if key[0] == length}  # for all settings
            llm = open_for(
                self.path, setting, length, self._overrides(setting), **self.options.engine, **self.options.machine
            )
            with closing(llm):
                for index in todo:
                    if watch is not None:
                        watch(f"{REAL} · {setting.name} · {length}", done, total)
                    key = {"method": setting.name, "length": length, "seed": self.options.seed}
                    self.store.add(
                        [{**key, **row} for row in self._ask(llm, self._asked(length, index), index, setting.read)]
                    )
                    done += length
        if watch is not None:
            watch(REAL, total, total)

    def _is_there(self, there: set[tuple[Any, ...]], setting: Setting, length: int, index: int) -> bool:
        return (setting.name, length, self.options.seed, index) in there

    def _ask(self, llm: MesaLlama, asked: Asked, document: int, read: ReadMode | None) -> Iterator[Row]:
        """The results of a document, which is read first."""
        with open_source(llm, self.form, asked.head, asked.document.text, read) as source:
            for i, (question, prompt) in enumerate(zip(asked.document.questions, asked.prompts, strict=True)):
                start = time.perf_counter()
                row: Row = {}
                n_prompt = None
                if question.form != "absent":
                    n_read, tail = source.put(question.text, prompt.tail, MAX_TOKENS)
                    n_prompt = n_read + len(tail)
                    begun = score_begun(llm, n_read, [*tail, *prompt.begun], prompt.answer)
                    row |= {"begun": int(begun.exact), "logprob": round(begun.logprob, 4)}
                if self.generate:
                    written, n_prompt = source.write(question.text, prompt.tail, MAX_TOKENS, self.form.stop)
                    row |= {"right": int(question.is_right(written)), "answer": written}
                first = asked.document.facts[question.facts[0]] if question.facts and question.form != "count" else None
                yield {
                    "task": f"{REAL}/{question.form}",
                    "kind": question.kind,
                    "alike": first is not None and first.is_alike,
                    "depth": None if first is None else round(first.depth, 4),
                    "index": document * STRIDE + i,
                    "question": question.text,
                    "expected": question.answer,
                    "n_prompt": n_prompt,
                    **row,
                    "timings": {
                        "n_read": source.n_read,
                        "read_s": round(source.read_s, 4),
                        "answer_s": round(time.perf_counter() - start, 4),
                    },
                }
