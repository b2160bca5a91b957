"""The demonstration with a model that people use: facts in real text, past the trained length, with Mesa and without."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config import MesaConfig
from ..library.library import Library
from ..model.header import check_model
from ..reading.prompts import PromptForm
from ..reading.reader import Reader, context_for, load_model, load_vocabulary
from ..reading.shelf import ReadMode
from .demo import Watch
from .facts import FactDocument, Haystack, Question, default_text, make_document

N_QUESTIONS = 10
MAX_TOKENS = 24
SHOWN = 40  # characters of a wrong answer
TAIL = 128  # tokens, more than any question has


@dataclass(frozen=True)
class Run:
    """The answers of one way to read.

    Attributes:
        n_read: tokens that were read before the first question,
        read_s: and the seconds that it took.
        answer_s: seconds of an answer, on the average.
    """

    name: str
    answers: list[str]
    right: list[bool]
    n_read: int
    read_s: float
    answer_s: float

    @property
    def score(self) -> str:
        return f"{sum(self.right)} of {len(self.right)}"


def run_real_demo(path: Path, length: float, seed: int, threads: int | None, watch: Watch, console: Console) -> None:
    """Ask about a document of length times the trained length; print the comparison.

    Raises:
        MesaError: the model cannot be used.
    """
    train_length = check_model(path).train_length
    n_tokens = round(length * train_length)
    form = PromptForm(load_vocabulary(path))
    document = make_document(
        Haystack(default_text()), seed, n_tokens, lambda text: len(form.tokenize(text)),
        n_unlike=N_QUESTIONS, n_alike=0, n_links=0, n_counts=0, n_absent=0,
    )  # fmt: skip
    questions = [question for question in document.questions if question.form == "literal"]
    questions.sort(key=lambda question: question.facts)
    n_ctx = context_for(n_tokens + TAIL, MAX_TOKENS)
    runs = [
        *_with_mesa(path, document, questions, n_ctx, threads, watch),
        _stock(path, document, questions, n_ctx, threads, watch),
    ]
    title = f"{path.name}, trained at {train_length} tokens, and {n_tokens} tokens of Python's documentation"
    console.print(_answers_table(title, document, questions, runs))
    console.print(_totals_table(runs))


def _with_mesa(
    path: Path, document: FactDocument, questions: list[Question], n_ctx: int, threads: int | None, watch: Watch
) -> list[Run]:
    """The chunks that match a question, as `ask` reads them, and all chunks. They are read once for both."""
    runs = []
    with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
        llm = load_model(path, mesa=MesaConfig(), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads)
        with closing(llm):
            reader = Reader(llm, library)
            library.add_text(document.text, "document")
            start = time.perf_counter()
            with watch("Mesa: reading the document") as progress:
                first = reader.ask(questions[0].text, read="all", max_tokens=1, progress=progress).answer
            n_read, read_s = first.read.tokens_computed if first.read is not None else 0, time.perf_counter() - start
            ways: tuple[tuple[str, ReadMode], ...] = (("Mesa, chunks that match", "auto"), ("Mesa, all chunks", "all"))
            for name, read in ways:
                runs.append(_ask(name, questions, n_read, read_s, _asking(reader, read)))
    return runs


def _asking(reader: Reader, read: ReadMode) -> Callable[[str], str]:
    return lambda question: reader.ask(question, read=read, max_tokens=MAX_TOKENS).answer.text


def _stock(
    path: Path, document: FactDocument, questions: list[Question], n_ctx: int, threads: int | None, watch: Watch
) -> Run:
    llm = load_model(path, mesa=MesaConfig(enabled=False), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads)
    with closing(llm):
        reader = Reader(llm)
        with watch("stock llama.cpp: reading the document") as llm.progress:
            reading = reader.read(document.text)
        llm.progress = None

        def ask(question: str) -> str:
            return reader.ask(question, max_tokens=MAX_TOKENS).answer.text

        return _ask("stock llama.cpp", questions, reading.n_tokens, reading.seconds, ask)


def _ask(name: str, questions: list[Question], n_read: int, read_s: float, ask: Callable[[str], str]) -> Run:
    start = time.perf_counter()
    answers = [ask(question.text) for question in questions]
    seconds = (time.perf_counter() - start) / len(questions)
    right = [question.is_right(answer) for question, answer in zip(questions, answers, strict=True)]
    return Run(name, answers, right, n_read, read_s, seconds)


def _answers_table(title: str, document: FactDocument, questions: list[Question], runs: list[Run]) -> Table:
    table = Table(title=title)
    table.add_column("depth", justify="right")
    for name in ("question", "expected", *(run.name for run in runs)):
        table.add_column(name, overflow="fold")
    for i, question in enumerate(questions):
        depth = f"{document.facts[question.facts[0]].depth:.0%}"
        table.add_row(depth, question.text, question.answer, *(_mark(run.right[i], run.answers[i]) for run in runs))
    return table


def _mark(right: bool, text: str) -> str:
    if right:
        return "[green]right[/green]"
    shown = " ".join(text.split())
    return f"[red]wrong[/red]: {escape(shown if len(shown) <= SHOWN else f'{shown[:SHOWN]}…')}"


def _totals_table(runs: list[Run]) -> Table:
    table = Table(title="in all")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right")
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("right answers", lambda run: run.score),
        ("reading the document", lambda run: f"{run.read_s:.0f} s"),
        ("tokens a second", lambda run: f"{run.n_read / run.read_s:.0f}"),
        ("an answer", lambda run: f"{run.answer_s:.1f} s"),
    ]
    for name, value in rows:
        table.add_row(name, *map(value, runs))
    return table
