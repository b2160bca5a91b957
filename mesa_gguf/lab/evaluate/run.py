"""Runs tasks with methods at lengths, and keeps what comes out."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp

from ... import __version__, _core
from ...errors import ConfigError, PromptError, Remedy
from ...llama import MesaLlama
from ...model.header import check_model
from ...reading.shelf import ReadMode
from .. import documents
from ..methods import METHODS, READ, Method, Setting, check_method, find_setting
from . import scoring, tasks
from .loss import tail_losses, window_ends
from .prompts import Prompter, Prompts
from .sources import Source, open_for, open_source
from .store import Row, Store
from .tasks import TASKS, Brief, Item, Sample, Style, Task

PPL = "ppl"
GROUPS = ("passkey", "niah", "ruler", PPL, "qa")
"""The tasks as they are asked for; each has a file of results."""

Watch = Callable[[str, int, int], None]
"""Called with (what is done, tokens done, tokens in all)."""

NUMBERS = (
    "reading_length", "first_chunk", "chunk", "last_chunk", "stair_width", "stair_bias", "room", "log_scaling", "log_length", "window", "n_sinks",
)  # fmt: skip


def defaults(train_length: int) -> dict[str, dict[str, Any]]:
    """The numbers that each method of the engine takes where no option says otherwise: another version may have others."""
    params = {method: _core.Params.default(train_length, method) for method in _core.METHODS}
    return {method: {name: getattr(own, name) for name in NUMBERS} for method, own in params.items()}


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        lengths: in tokens, of prompt and answer together.
        samples: for each group of tasks, how many documents (for "niah" of each depth; for "ppl" windows) of a length.
        max_length_full: longest length for the methods whose time is quadratic; None: no limit.
        kinds: of "ruler"; empty: all.
        n_depths: of "niah", from 0 to 1.
        n_facts: in a document of "qa"; in one of "qa/two-hop", facts and links together.
        text: for "ppl"; None: a generated document, in the reader's style.
        tail: tokens at the end of each window of "ppl" whose loss counts; None: T/8, at most 256.
        overrides: fields of MesaConfig.
        engine: arguments of MesaLlama that change results: KV types, flash attention, batches.
        machine: those that should not: threads, layers on a GPU.
    """

    path: Path
    methods: Sequence[str]
    lengths: Sequence[int]
    seed: int
    samples: Mapping[str, int]
    max_length_full: int | None = None
    kinds: Sequence[str] = ()
    n_depths: int = 11
    n_facts: int = 20
    text: str | None = None
    tail: int | None = None
    style: Style | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train_length(self) -> int:
        own = self.overrides.get("train_length")
        return int(own) if own is not None else check_model(self.path).train_length

    def reads(self, method: Method, length: int) -> bool:
        """Whether the method is run at the length."""
        return not method.quadratic or self.max_length_full is None or length <= self.max_length_full


@dataclass(frozen=True)
class _Unit:
    """A document, or a window of text, at a length.

    Attributes:
        n_items: how many results it gives.
        depth: where the needle has to lie; None: anywhere.
    """

    task: str
    length: int
    index: int
    n_items: int = 1
    depth: float | None = None


class Evaluation:
    """One group of tasks.

    Args:
        group: one of GROUPS.
        folder: where the results are, "<group>.jsonl".

    Raises:
        MesaError: options that cannot work, results that were made with other settings, or a summary without its items, which
            a new one would replace.
    """

    def __init__(self, group: str, options: Options, folder: Path) -> None:
        self.group = group
        self.options = options
        self.prompter = Prompter(options.path, options.style)
        self.chosen = [find_setting(name) for name in options.methods]
        self.header = check_model(options.path)
        for setting in self.chosen:
            check_method(self.header, setting.method, self._overrides(setting))
            if group == PPL and setting.read is not None:
                raise ConfigError(f"{setting.name}: ppl has no questions to choose chunks by: leave out {READ}")
        self.units = [unit for length in options.lengths for unit in self._units(length)]
        if group == PPL:
            self._set_up_text()
        else:
            shortest = {unit.task: unit for unit in self.units if unit.length == min(options.lengths)}
            for unit in shortest.values():
                self._sample(unit)  # raises if the length is too short
        self.store = Store(check_folder(folder, group), self.settings())

    def _overrides(self, setting: Setting) -> dict[str, Any]:
        return {**self.options.overrides, **setting.overrides}

    def settings(self) -> dict[str, Any]:
        """What the results depend on, besides task, method, length, seed, depth and index."""
        options, train_length = self.options, self.options.train_length
        own: dict[str, Any] = {}
        if self.group == "qa":
            own = {"n_facts": options.n_facts}
        if self.group == PPL:
            digest = hashlib.sha256(str(self.text).encode()).hexdigest()
            own = {"tail": self.tail, "longest": max(options.lengths), "windows": self.ends, "text": digest}
        return {
            "task": {"name": self.group, **own},
            "model": {
                "name": options.path.name,
                "fingerprint": fingerprint(options.path),
                "train_length": train_length,
            },
            "style": self.prompter.style,
            "mesa": dict(options.overrides),
            "defaults": defaults(train_length),
            "engine": dict(options.engine),
            "versions": {"mesa-gguf": __version__, "llama-cpp-python": llama_cpp.__version__},
        }

    #
    # what there is to do
    #

    def _units(self, length: int) -> Iterator[_Unit]:
        n = self.options.samples[self.group]
        if self.group == PPL:
            for index in range(n):
                yield _Unit(PPL, length, index)
            return
        names = [name for name in TASKS if name.split("/")[0] == self.group]
        if self.group == "ruler" and self.options.kinds:
            unknown = sorted({*self.options.kinds} - {name.split("/")[1] for name in names})
            if unknown:
                kinds = ", ".join(name.split("/")[1] for name in names)
                raise ConfigError(f"there is no ruler kind {unknown[0]}: use one of {kinds}")
            names = [name for name in names if name.split("/")[1] in self.options.kinds]
        for name in names:
            n_items = TASKS[name].n_items(self.options.n_facts)
            depths = self._grid() if TASKS[name].gridded else [None]
            for index in range(n):
                for depth in depths:
                    yield _Unit(name, length, index, n_items, depth)

    def _grid(self) -> list[float | None]:
        last = max(1, self.options.n_depths - 1)
        return [round(i / last, 4) for i in range(self.options.n_depths)]

    def _set_up_text(self) -> None:
        options = self.options
        longest, n_windows = max(options.lengths), options.samples[PPL]
        self.tail = options.tail if options.tail is not None else max(1, min(256, options.train_length // 8))
        if min(options.lengths) <= self.tail + 1:
            raise ConfigError(
                f"windows of {min(options.lengths)} tokens are too short for a tail of {self.tail}: make it shorter"
            )
        if options.text is not None:
            self.text = options.text
        elif self.prompter.style == "reader":
            rng = random.Random(f"{options.seed}:{PPL}")
            n_tokens = longest + n_windows * options.train_length
            self.text = documents.make_document(tasks._document_seed(rng), n_tokens, self.prompter.count).text
        else:
            raise PromptError("the task ppl needs a text", Remedy("text", "FILE"))
        self.tokens = self.prompter.tokenize(self.text)
        n_begin = len(self.prompter.begin())
        self.ends = window_ends(len(self.tokens), longest - n_begin, self.tail, n_windows)
        self.units = [unit for unit in self.units if unit.index < len(self.ends)]

    def _todo(self, method: Setting, length: int) -> list[_Unit]:
        def name(unit: _Unit, i: int) -> tuple[Any, ...]:
            index = unit.index * unit.n_items + i
            return (unit.task, method.name, unit.length, self.options.seed, index, unit.depth)

        there = {
            (row["task"], row["method"], row["length"], row["seed"], row["index"], row["depth"] if gridded else None)
            for row in self.store.rows.values()
            for gridded in [row["task"] in TASKS and TASKS[row["task"]].gridded]
        }
        return [
            unit
            for unit in self.units
            if unit.length == length and not all(name(unit, i) in there for i in range(unit.n_items))
        ]

    @property
    def n_there(self) -> int:
        """Number of results that need not be computed."""
        return len(self.store.rows)

    #
    # doing it
    #

    def run(self, watch: Watch | None = None) -> None:
        """Compute what is not there yet."""
        plan = [
            (length, setting, self._todo(setting, length))
            for length in self.options.lengths
            for setting in self.chosen
            if self.options.reads(setting.method, length)
        ]
        total = sum(length * len(todo) for length, _, todo in plan)
        done = 0
        samples: dict[_Unit, tuple[Sample, Prompts]] = {}
        for length, setting, todo in plan:
            if not todo:
                continue
            samples = {unit: made for unit, made in samples.items() if unit.length == length}  # for all methods
            options = self.options
            llm = open_for(options.path, setting, length, self._overrides(setting), **options.engine, **options.machine)
            with closing(llm):
                for unit in todo:
                    if watch is not None:
                        watch(f"{unit.task} · {setting.name} · {length}", done, total)
                    if self.group == PPL:
                        rows: Iterable[Row] = [self._window(llm, unit)]
                    else:
                        if unit not in samples:
                            samples[unit] = self._sample(unit)
                        rows = self._ask(llm, unit, *samples[unit], setting.read)
                    key = {"task": unit.task, "method": setting.name, "length": length, "seed": self.options.seed}
                    self.store.add({**key, **row} for row in rows)
                    done += length
        if watch is not None:
            watch(self.group, total, total)

    def _sample(self, unit: _Unit) -> tuple[Sample, Prompts]:
        seed = f"{self.options.seed}:{unit.task}:{unit.length}:{unit.depth}:{unit.index}"

        def make_brief(n_tokens: int) -> Brief:
            style, count = self.prompter.style, self.prompter.count
            return Brief(style, seed, n_tokens, count, unit.depth, self.options.n_facts)

        return self.prompter.fit(TASKS[unit.task], unit.length, make_brief)

    def _ask(
        self, llm: MesaLlama, unit: _Unit, sample: Sample, prompts: Prompts, read: ReadMode | None
    ) -> Iterator[Row]:
        with open_source(llm, self.prompter.form, prompts.head, sample.document, read) as source:
            for i, item in enumerate(sample.items):
                start = time.perf_counter()
                answers, n_prompt = self._answers(source, TASKS[unit.task], item, prompts.tails[i])
                answer_s = time.perf_counter() - start
                depth = unit.depth if unit.depth is not None or item.depth is None else round(item.depth, 4)
                right = sum(
                    scoring.n_found(turn.expected, answer, exact=turn.exact)
                    for turn, answer in zip(item.turns, answers, strict=True)
                )
                yield {
                    "depth": depth,
                    "index": unit.index * unit.n_items + i,
                    "right": right,
                    "of": item.n_expected,
                    "n_prompt": n_prompt,
                    "expected": [value for turn in item.turns for value in turn.expected],
                    "answers": answers,
                    "timings": {
                        "n_read": source.n_read,
                        "read_s": round(source.read_s, 4),
                        "answer_s": round(answer_s, 4),
                    },
                }

    def _answers(self, source: Source, task: Task, item: Item, tail: list[int]) -> tuple[list[str], int]:
        """The answers of an item's turns, each read after the ones before it, and the tokens before the first one."""
        max_tokens, stop = task.answer_room(self.prompter.style), (self.prompter.stop,)
        first, *more = item.turns
        answer, n_prompt = source.write(first.question, tail, max_tokens, stop)
        answers = [answer]
        for turn in more:
            answers.append(source.follow_up(turn.question, self.prompter.tail(turn), max_tokens, stop))
        return answers, n_prompt

    def _window(self, llm: MesaLlama, unit: _Unit) -> Row:
        begin = self.prompter.begin()
        end = self.ends[unit.index]
        tokens = begin + self.tokens[end - unit.length + len(begin) : end]
        start = time.perf_counter()
        losses = tail_losses(llm, tokens, self.tail)
        seconds = time.perf_counter() - start
        return {
            "depth": None,
            "index": unit.index,
            "loss": round(sum(losses) / len(losses), 6),
            "n": len(losses),
            "end": end,
            "timings": {"n_read": len(tokens) - 1, "read_s": round(seconds, 4)},
        }


def check_folder(folder: Path, group: str) -> Path:
    """The file of a group's items in a folder, which is made if it is not there.

    Raises:
        ConfigError: there is a summary of items that are gone.
    """
    summary, items = folder / f"{group}.json", folder / f"{group}.jsonl"
    if summary.exists() and not items.exists():
        raise ConfigError(
            f"{summary} sums up items that are gone ({items.name} is not there), and would be overwritten: "
            "use another folder, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return items


def fingerprint(path: Path) -> str:
    """A hash of a model's file: of its size, its first and its last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def sort_key(row: Row) -> tuple[Any, ...]:
    """Results in the order in which they are kept: the same however the run was cut into pieces."""
    names, name = list(METHODS), row["method"].partition(",")[0]
    method = names.index(name) if name in names else len(names)
    depth = -1.0 if row["depth"] is None else row["depth"]
    return (row["task"], row["length"], method, row["method"], row["seed"], row["index"], depth)
