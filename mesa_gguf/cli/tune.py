"""``mesa-gguf tune``: the numbers that suit a model, measured and kept."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import ConfigError
from ..model.hub import find_model
from . import output
from .options import JsonOption, ModelOption, Plain, Threads, option

if TYPE_CHECKING:
    from ..lab.tune import Outcome, Watch

EXAMPLES = """\
Examples:\n
  mesa-gguf tune -m model.gguf\n
  mesa-gguf tune -m model.gguf --text book.txt --minutes 30\n
  mesa-gguf tune -m model.gguf --reset
"""


def tune(
    model: ModelOption = None,
    text: Annotated[
        list[Path] | None,
        option(
            "--text",
            metavar="FILE",
            help="A text, or a folder of texts, like those that you ask about; may be given several times. Default: a manual.",
        ),
    ] = None,
    minutes: Annotated[
        float, option("--minutes", min=0.01, max=1440, metavar="N", help="How long to measure, about.")
    ] = 10.0,
    dry_run: Annotated[bool, option("--dry-run", help="Measure and print, but keep nothing.")] = False,
    reset: Annotated[bool, option("--reset", help="Forget what is kept of the model, and measure nothing.")] = False,
    seed: Annotated[int, option("--seed", min=0, metavar="N", help="Seed of the facts that are asked for.")] = 0,
    plain: Plain = False,
    as_json: JsonOption = False,
    threads: Threads = None,
) -> None:
    """Measure up to which length a model reads well, and the few numbers that matter beyond it, and keep them.

    Facts are hidden in a text and asked for. What is better than the defaults beyond doubt is kept for this model file: every command
    and MesaLlama use it from then on. Options that are given win.
    """
    from ..lab.facts import default_text, load_text
    from ..lab.tune import Tuner
    from ..model.tuning import check_keeps, forget_tuning, keep_tuning

    if dry_run and reset:
        raise ConfigError("--dry-run and --reset are given: give one of them")
    path = find_model(model)
    if reset:
        removed = forget_tuning(path)
        output.write(f"{path.name}: {'the numbers are forgotten' if removed else 'nothing was kept'}\n")
        return
    tuner = Tuner(
        path, load_text(text) if text else default_text(), seed=seed, minutes=minutes, n_threads=threads, plain=plain
    )
    if not dry_run:
        check_keeps(path)
    with _bar() as watch:
        outcome = tuner.run(watch)
    kept, forgotten = None, False
    if not dry_run and outcome.tuning is not None:
        measured = {"table": list(outcome.table()), "rounds": outcome.rounds, "seconds": round(outcome.seconds)}
        kept = keep_tuning(path, outcome.tuning, measured)
    elif not dry_run:
        forgotten = forget_tuning(path)
    if as_json:
        output.write_json({**asdict(outcome), "kept": None if kept is None else str(kept)})
        return
    _show(outcome, path, kept, dry_run, forgotten)


def _show(outcome: Outcome, path: Path, kept: Path | None, dry_run: bool, forgotten: bool) -> None:
    from rich.table import Table

    head, *lines = outcome.table()
    title = (
        f"{path.name}: log-probability of an answer's tokens, by the length of the text; {outcome.best.items} answers"
    )
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i < len(head) - 1 else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = output.console(120)
    console.print(table)
    if outcome.n_whole:
        console.print(
            f"reading {outcome.n_whole} tokens: {outcome.seconds_whole:.1f} s in one piece, {outcome.seconds_chunks:.1f} s in chunks"
        )
    if outcome.too_long:
        console.print(f"there was no time for {outcome.too_long} tokens and more: --minutes gives it more")
    if outcome.tuning is None:
        console.print("best: the defaults, or nothing that is surely better; nothing is kept")
        if forgotten:
            console.print("what was kept of the model before is forgotten")
        return
    console.print(f"best: {outcome.tuning}, {outcome.tuning.gain:+.2f} over the defaults")
    where = "nothing is kept (--dry-run)" if kept is None else f"kept in {kept}; --reset forgets it"
    console.print(where, soft_wrap=True)


@contextlib.contextmanager
def _bar() -> Iterator[Watch | None]:
    """A bar on standard error; lines where that is no terminal."""
    if not output.is_terminal(sys.stderr):
        yield lambda what, share: output.say(f"{share:4.0%} {what}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: Any = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
