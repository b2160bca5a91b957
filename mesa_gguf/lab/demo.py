"""The demonstration: a document many times longer than the bundled model's context, read with Mesa and without."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .._core import Params
from ..config import MesaConfig, MesaPlan
from ..errors import MissingPackageError
from ..library.library import Library
from ..llama import Progress
from ..model.bundled import bundled_model
from ..model.header import check_model
from ..model.inspection import format_bytes
from ..reading.plans import format_line, summarize
from ..reading.prompts import PromptForm
from ..reading.reader import Reader, context_for, load_model, load_vocabulary
from . import plot
from .documents import Document, Fact, is_right, make_document

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_QUESTIONS = 20
MAX_TOKENS = 32  # answers have about 15
MARGIN = 64  # tokens; documents end a little before the length that is asked for

Watch = Callable[[str], AbstractContextManager[Progress | None]]
"""Shows the progress of what is named."""


@dataclass(frozen=True)
class Run:
    """The answers of one way to read.

    Attributes:
        plan: of the document, after it was read.
        peak: bytes of memory that the process took at most, up to the end of this run.
    """

    name: str
    answers: list[str]
    right: list[bool]
    n_document: int
    prefill: float
    answering: float
    plan: MesaPlan
    kv_bytes: int
    peak: int

    @property
    def score(self) -> str:
        return f"{sum(self.right)} of {len(self.right)}"


@dataclass(frozen=True)
class Step:
    """A question about the document as a library keeps it.

    Attributes:
        what: was done before it.
        computed: tokens of chunks that were read now.
        reused: those that were kept.
        by_prefix: tokens that would be read where only a common beginning is kept.
        seconds: to the first token.
    """

    what: str
    right: bool
    computed: int
    reused: int
    by_prefix: int
    seconds: float


def run_demo(length: float, seed: int, output: Path, threads: int | None, watch: Watch, console: Console) -> None:
    """Ask about a document of length times the trained length; print the comparison and save a picture of it."""
    try:
        plot.check_picture(output)
        no_picture = None
    except MissingPackageError as err:
        no_picture = str(err)
    path = bundled_model()
    train_length = check_model(path).train_length
    document = _document(path, round(train_length * length), seed)

    def run(name: str, config: MesaConfig) -> Run:
        return _run(name, path, config, document, threads, watch)

    mesa = run("Mesa", MesaConfig())
    stock = run("stock", MesaConfig(enabled=False))
    steps = _keep(path, document, threads, watch)

    console.print(_answers_table(document, mesa, stock))
    console.print(_totals_table(mesa, stock))
    console.print(_steps_table(steps))
    params = MesaConfig().params(train_length)
    console.print(f"plan: {format_line(summarize(mesa.plan, mesa.n_document, params))}")
    if no_picture is None:
        _save_picture(output, document, mesa, stock, steps, params)
    console.print(f"picture: {no_picture or output}")


def _document(path: Path, n_tokens: int, seed: int) -> Document:
    vocabulary = load_vocabulary(path)

    def n_tokens_of(text: str) -> int:
        return len(vocabulary.tokenize(text.encode(), add_bos=False))

    return make_document(seed, n_tokens + MARGIN, n_tokens_of, n_facts=N_QUESTIONS)


def _run(name: str, path: Path, config: MesaConfig, document: Document, threads: int | None, watch: Watch) -> Run:
    form = PromptForm(load_vocabulary(path))
    head, tails = form.head(document.text), [form.tail(fact.question) for fact in document.facts]
    n_ctx = context_for(len(head) + max(map(len, tails)), MAX_TOKENS)
    llm = load_model(path, mesa=config, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads)
    try:
        reader = Reader(llm, form=form)
        with watch(f"{name}: reading {len(head)} tokens") as llm.progress:
            reading = reader.read(head)
        llm.progress = None
        answers = [reader.ask(tail, max_tokens=MAX_TOKENS).answer for tail in tails]
    finally:
        llm.close()
    return Run(
        name=name,
        answers=[a.text for a in answers],
        right=[is_right(fact, a.text) for fact, a in zip(document.facts, answers, strict=True)],
        n_document=reading.n_tokens,
        prefill=reading.seconds,
        answering=sum(a.seconds for a in answers) / len(answers),
        plan=reading.plan,
        kv_bytes=check_model(path).kv_bytes(n_ctx),
        peak=_peak_memory(),
    )


def _keep(path: Path, document: Document, threads: int | None, watch: Watch) -> list[Step]:
    """Read the document into a library and ask, ask again, edit a paragraph and ask for that."""
    fact, edited, answer = _edit(document)
    with tempfile.TemporaryDirectory() as folder, Library(os.path.join(folder, "library"), budget=2**40) as library:
        file = Path(folder, "document.txt")
        form = PromptForm(load_vocabulary(path))
        n_tokens = len(form.tokenize(document.text))
        n_ctx = context_for(n_tokens + len(form.preamble) + 256, MAX_TOKENS)
        llm = load_model(path, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads)
        steps: list[Step] = []
        before: list[int] = []
        try:
            for what, text, expected in (
                ("read", document.text, fact.answer_sentence),
                ("asked again, from the disk", document.text, fact.answer_sentence),
                ("one paragraph edited", edited, answer),
            ):
                file.write_text(text, encoding="utf-8")
                own = form.tokenize(text)
                reader = Reader(llm, library, form=form)  # which knows nothing of what is in the context
                with watch(f"library: {what}") as progress:
                    found = reader.ask(
                        fact.question,
                        documents=[library.add(file)],
                        read="all",
                        max_tokens=MAX_TOKENS,
                        progress=progress,
                    ).answer
                assert found.read is not None
                n_common = next((n for n, (a, b) in enumerate(zip(before, own)) if a != b), min(len(before), len(own)))
                right = found.text.strip().partition("\n")[0].strip() == expected
                computed, reused = found.read.tokens_computed, found.read.tokens_reused
                steps.append(Step(what, right, computed, reused, len(own) - n_common, found.first_token_seconds))
                before = own
        finally:
            llm.close()
    return steps


def _edit(document: Document) -> tuple[Fact, str, str]:
    """A fact in the middle of the document, the document with another value there, and the answer that is right then."""
    facts = sorted(document.facts, key=lambda fact: abs(fact.depth - 0.5))
    for fact in facts:
        others = [other.answer for other in facts if other.kind == fact.kind and other.answer not in fact.sentence]
        if others and document.text.count(fact.sentence) == 1:
            sentence = fact.sentence.replace(fact.answer, others[0])
            answer = fact.answer_sentence.replace(fact.answer, others[0])
            return fact, document.text.replace(fact.sentence, sentence), answer
    raise AssertionError("a document of this many facts has two of a kind")


def _peak_memory() -> int:
    """Bytes; the largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


#
# output
#


def _answers_table(document: Document, mesa: Run, stock: Run) -> Table:
    table = Table(title=f"{document.subject}, {mesa.n_document} tokens")
    table.add_column("depth", justify="right")
    for name in ("question", "expected", "with Mesa", "stock llama.cpp"):
        table.add_column(name, overflow="fold")
    for i, fact in enumerate(document.facts):
        cells = [_mark(run.right[i], run.answers[i], fact.answer_sentence) for run in (mesa, stock)]
        table.add_row(f"{fact.depth:.0%}", fact.question, fact.answer, *cells)
    return table


def _mark(right: bool, text: str, expected: str) -> str:
    from rich.markup import escape

    if right:
        return "[green]right[/green]"
    shown = text if len(text) <= len(expected) else f"{text[: len(expected)]}…"
    return f"[red]wrong[/red]: {escape(shown)}"


def _totals_table(mesa: Run, stock: Run) -> Table:
    table = Table(title="in all")
    table.add_column("")
    for run in (mesa, stock):
        table.add_column(run.name, justify="right")
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("right answers", lambda run: run.score),
        ("reading the document", lambda run: f"{run.prefill:.1f} s"),
        ("tokens a second", lambda run: f"{run.n_document / run.prefill:.0f}"),
        ("an answer", lambda run: f"{run.answering:.2f} s"),
        ("KV cache", lambda run: format_bytes(run.kv_bytes)),
        ("peak memory so far", lambda run: format_bytes(run.peak)),
    ]
    for name, value in rows:
        table.add_row(name, value(mesa), value(stock))
    return table


def _steps_table(steps: list[Step]) -> Table:
    table = Table(title="the same document, kept in a library")
    for name in ("", "answer"):
        table.add_column(name)
    for name in ("tokens computed", "tokens reused", "computed by a prefix cache", "to the first token"):
        table.add_column(name, justify="right")
    for step in steps:
        right = "[green]right[/green]" if step.right else "[red]wrong[/red]"
        numbers = (f"{n:,}" for n in (step.computed, step.reused, step.by_prefix))
        table.add_row(step.what, right, *numbers, f"{step.seconds:.2f} s")
    return table


def _save_picture(output: Path, document: Document, mesa: Run, stock: Run, steps: list[Step], params: Params) -> None:
    figure = plot.new_figure(13.5, 8.5)
    axes = figure.subplot_mosaic(
        [["answers", "library"], *plot.plan_mosaic(mesa.plan)],
        width_ratios=plot.WIDTHS,
        height_ratios=(0.8, *plot.HEIGHTS),
    )
    _draw_answers(axes["answers"], document, mesa, stock)
    _draw_steps(axes["library"], steps)
    plot.draw_plan(axes, mesa.plan, mesa.n_document, params)
    figure.suptitle(format_line(summarize(mesa.plan, mesa.n_document, params)))
    figure.savefig(output)


def _draw_answers(axes: Axes, document: Document, mesa: Run, stock: Run) -> None:
    """Right and wrong answers by the depth of their facts."""
    for row, run in enumerate((stock, mesa)):
        for right, colour, marker in ((True, plot.FIRST, "o"), (False, plot.LAST, "x")):
            depths = [fact.depth * 100 for fact, is_so in zip(document.facts, run.right, strict=True) if is_so == right]
            axes.scatter(depths, [row] * len(depths), c=colour, marker=marker, s=60)
    axes.set_yticks([0, 1], [f"stock: {stock.score} right", f"Mesa: {mesa.score} right"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("depth of the fact in the document (%)")
    axes.set_title("Answers (circle: right, cross: wrong)")


def _draw_steps(axes: Axes, steps: list[Step]) -> None:
    """Tokens computed and reused, step by step."""
    rows = range(len(steps), 0, -1)
    axes.barh(rows, [step.computed for step in steps], color=plot.LAST, height=0.6)
    left = [step.computed for step in steps]
    axes.barh(rows, [step.reused for step in steps], left=left, color=plot.OWN, height=0.6)
    for row, step in zip(rows, steps, strict=True):
        text = f"{step.computed:,} computed, {step.reused:,} kept: {'right' if step.right else 'wrong'}"
        axes.annotate(text, (0, row), (6, 0), textcoords="offset points", va="center", fontsize="small")
    axes.set_yticks(list(rows), [step.what.replace(", ", ",\n") for step in steps])
    axes.set_ylim(0.5, len(steps) + 0.5)
    axes.set_xlabel("tokens of the document")
    axes.set_title("Kept in a library (orange: computed, blue: kept)")
