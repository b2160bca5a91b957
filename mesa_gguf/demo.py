"""The demonstration: a document many times longer than the bundled model's context, read with Mesa and without."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from . import gguf_file, plot
from .ask import answer, load_model, load_vocabulary, make_prompts, read_document
from .bundled import bundled_model
from .config import MesaConfig, MesaPlan
from .documents import Document, is_right, make_document
from .inspect_model import format_bytes
from .llama import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_QUESTIONS = 20
MAX_TOKENS = 32  # answers have about 15
MARGIN = 64  # tokens; documents end a little before the length that is asked for
CONSOLE_WIDTH = 130  # where the output is no terminal

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


def run_demo(length: int, seed: int, output: Path, threads: int | None, watch: Watch) -> None:
    """Ask about a document of length times the trained length; print the comparison and save a picture of it."""
    plot.check_picture(output)
    path = bundled_model()
    header = gguf_file.check(path)
    document = _document(path, header.train_length * length, seed)

    def run(name: str, config: MesaConfig) -> Run:
        return _run(name, path, config, document, threads, watch)

    mesa = run("Mesa", MesaConfig())
    stock = run("stock", MesaConfig(enabled=False))

    console = Console(width=None if sys.stdout.isatty() else CONSOLE_WIDTH)
    console.print(_answers_table(document, mesa, stock))
    console.print(_totals_table(mesa, stock))
    console.print(
        f"plan: {plot.format_line(plot.summarize(mesa.plan, mesa.n_document, header.train_length))}", highlight=False
    )
    _save_picture(output, document, mesa, stock, header.train_length)
    console.print(f"picture: {output}", highlight=False)


def _document(path: Path, n_tokens: int, seed: int) -> Document:
    vocabulary = load_vocabulary(path)

    def n_tokens_of(text: str) -> int:
        return len(vocabulary.tokenize(text.encode(), add_bos=False))

    return make_document(seed, n_tokens + MARGIN, n_tokens_of, n_facts=N_QUESTIONS)


def _run(name: str, path: Path, config: MesaConfig, document: Document, threads: int | None, watch: Watch) -> Run:
    questions = [fact.question for fact in document.facts]
    prompts = make_prompts(load_vocabulary(path), document.text, questions)
    n_ctx = prompts.n_ctx(MAX_TOKENS)
    llm = load_model(path, mesa=config, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads)
    try:
        with watch(f"{name}: reading {len(prompts.document)} tokens") as llm.progress:
            prefill = read_document(llm, prompts)
        plan = llm.plan()
        llm.progress = None
        answers = [answer(llm, prompts, index, max_tokens=MAX_TOKENS) for index in range(len(questions))]
    finally:
        llm.close()
    return Run(
        name=name,
        answers=[a.text for a in answers],
        right=[is_right(fact, a.text) for fact, a in zip(document.facts, answers, strict=True)],
        n_document=len(prompts.document),
        prefill=prefill,
        answering=sum(a.seconds for a in answers) / len(answers),
        plan=plan,
        kv_bytes=gguf_file.check(path).kv_bytes(n_ctx),
        peak=_peak_memory(),
    )


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


def _save_picture(output: Path, document: Document, mesa: Run, stock: Run, train_length: int) -> None:
    figure = plot.new_figure(13.5, 8.5)
    axes = figure.subplot_mosaic(
        [["answers", "answers"], *plot.plan_mosaic(mesa.plan)],
        width_ratios=plot.WIDTHS,
        height_ratios=(0.8, *plot.HEIGHTS),
    )
    _draw_answers(axes["answers"], document, mesa, stock)
    plot.draw_plan(axes, mesa.plan, mesa.n_document, train_length)
    figure.suptitle(plot.format_line(plot.summarize(mesa.plan, mesa.n_document, train_length)))
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
