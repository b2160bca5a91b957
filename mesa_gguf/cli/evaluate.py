"""The command ``mesa-gguf eval``."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from ..errors import ConfigError
from ..model.hub import find_model
from ..paths import expanded
from ..reading.text import read_text
from . import output as out
from .options import (
    MESA,
    Batch,
    Chunk,
    EmbeddingModelOption,
    EmbeddingPassage,
    EmbeddingQuery,
    FirstChunk,
    FlashAttn,
    JsonOption,
    LastChunk,
    LogScaling,
    ModelOption,
    NGpuLayers,
    ReadingLength,
    StairBias,
    StairWidth,
    Threads,
    TrainLength,
    TypeK,
    TypeV,
    UBatch,
    Verbose,
    flash_attn_of,
    kv_type_of,
    open_embedding,
    option,
    stair_width_of,
)

if TYPE_CHECKING:
    from ..lab.evaluate import Evaluation, Options, RealEvaluation
    from ..lab.evaluate.run import Watch
    from ..reading.embeddings import EmbeddingModel

TASKS = ("passkey", "niah", "ruler", "ppl", "qa", "real")
LIBRARY_TASK = "library"  # alone: it has modes of reading in place of methods
ALL = "all"

# how much is run: documents of a length (of "niah": of each depth; of "ppl": windows)
SAMPLES = {"passkey": 40, "niah": 4, "ruler": 20, "ppl": 32, "qa": 5, "real": 10}
QUICK_SAMPLES = {"passkey": 12, "niah": 2, "ruler": 5, "ppl": 12, "qa": 2, "real": 2}
LENGTHS = ("T", "2T", "4T", "8T", "16T")
REAL_LENGTHS = ("T/2", "T", "2T")  # of models that people use
REAL_METHODS = ("stock", "mesa")
DEPTHS, QUICK_DEPTHS = 11, 5
QUICK_MAX_LENGTH_FULL = "4T"

SIZE = "How much is run"
TASK = "Options of single tasks"

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)?T(?:/(\d+))?|(\d+)")


def _tokens(text: str, train_length: int, option: str) -> int:
    """A length as it is written in an option, 4T, T/2 or 4096, in tokens."""
    match = _LENGTH.fullmatch(text.strip())
    if match is None or match[2] == "0":
        raise ConfigError(f"{option} {text}: write a number of tokens, or of trained lengths such as 4T or T/2")
    times, parts, tokens = match.groups()
    length = int(tokens) if tokens else int(Fraction(times or "1") / int(parts or 1) * train_length)
    if not 1 <= length < 2**31:
        raise ConfigError(f"{option} {text}: a length of {length} tokens cannot be read")
    return length


def _groups(tasks: list[str]) -> list[str]:
    unknown = [task for task in tasks if task not in (*TASKS, ALL)]
    if unknown:
        raise ConfigError(f"there is no task {unknown[0]}: use one of {', '.join((*TASKS, ALL))}")
    return [task for task in TASKS if task in tasks or ALL in tasks]


def _settings(names: list[str]) -> list[str]:
    """The methods of "real" with their options, in the order in which they are given: the first is compared with."""
    from ..lab.methods import METHODS, find_setting

    if ALL in names:
        return ["stock", *(name for name in METHODS if name != "stock")]
    return [find_setting(name).name for name in dict.fromkeys(names or REAL_METHODS)]


def _methods(names: list[str]) -> list[str]:
    """The methods of the other tasks, by the list of them all; behind each method the same one with options of its own."""
    from ..lab.methods import METHODS, find_setting

    if ALL in names:
        return list(METHODS)
    given = [find_setting(name) for name in dict.fromkeys(names)]
    if not given:
        return [name for name, method in METHODS.items() if method.default]
    ranks = list(METHODS)
    return [one.name for one in sorted(given, key=lambda one: (ranks.index(one.method.name), "," in one.name))]


EXAMPLES = """\
Examples:\n
  mesa-gguf eval all --quick\n
  mesa-gguf eval qa passkey --length 2T --length 8T --samples 10\n
  mesa-gguf eval ppl -m model.gguf --text book.txt --method mesa --method yarn\n
  mesa-gguf eval qa --method mesa --chunk 240 --output chunk-240\n
  mesa-gguf eval real -m model.gguf --text books --method stock --method mesa --method mesa,chunk=512\n
  mesa-gguf eval library -m model.gguf --length 32768 --read auto --read all
"""


def evaluate(
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...", help=f"What to run: {', '.join(TASKS)}, or {ALL} but real; or {LIBRARY_TASK}."
        ),
    ],
    model: ModelOption = None,
    methods: Annotated[
        list[str] | None,
        option(
            "--method",
            metavar="NAME",
            help="A method to compare, or all for every one; may be given several times. Default: mesa and those that "
            "stock llama.cpp has. It may have options of its own, as mesa,chunk=512, or mesa,read=auto for a text that is kept in a "
            "library. For real the first one is compared with.",
        ),
    ] = None,
    lengths: Annotated[
        list[str] | None,
        option(
            "--length",
            metavar="N",
            help="Length of prompt and answer together, in tokens or as 4T; may be given several times. "
            f"Default: {', '.join(LENGTHS)}; for real {', '.join(REAL_LENGTHS)}; "
            "for library T, 2T, 4T, and 1536 at least.",
        ),
    ] = None,
    seed: Annotated[int, option("--seed", min=0, metavar="N", help="Seed that the texts are made from.")] = 1,
    quick: Annotated[
        bool, option("--quick", help="Run fewer samples, and quadratic methods up to 4T only.", panel=SIZE)
    ] = False,
    samples: Annotated[
        int | None,
        option(
            "--samples",
            "--documents",
            min=1,
            metavar="N",
            help="How many documents there are of each length; for niah of each depth, too, and for ppl how many windows. "
            "Default: by task.",
            panel=SIZE,
        ),
    ] = None,
    max_length_full: Annotated[
        str | None,
        option(
            "--max-length-full",
            metavar="N",
            help="Longest length for methods whose time grows with its square.",
            panel=SIZE,
        ),
    ] = None,
    style: Annotated[
        str,
        option(
            "--style",
            metavar="NAME",
            help="Wording of the texts: natural for any model, reader for the bundled one; auto goes by the model.",
        ),
    ] = "auto",
    output: Annotated[
        Path, option("-o", "--output", metavar="FOLDER", help="Folder where results are kept, and found again.")
    ] = Path("mesa-eval"),
    as_json: JsonOption = False,
    verbose: Verbose = False,
    depths: Annotated[
        int | None,
        option(
            "--depths",
            min=2,
            metavar="N",
            help="For niah: how many depths there are, from 0 to 1. Default: 11.",
            panel=TASK,
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        option(
            "--kind",
            metavar="NAME",
            help="For ruler and real: one of its kinds; may be given several times. Default: all.",
            panel=TASK,
        ),
    ] = None,
    facts: Annotated[
        int,
        option(
            "--facts",
            min=1,
            max=200,
            metavar="N",
            help="For qa and real: how many facts a document has; for qa with two hops, how many facts and links.",
            panel=TASK,
        ),
    ] = 20,
    text: Annotated[
        str | None,
        option(
            "--text",
            metavar="FILE",
            help="For ppl: a text file. Default: a generated text, where the style is reader. For real and library: a document, or a "
            "folder of them, that facts are put into. Default: the documentation of Python's language; for library with the bundled "
            "model texts of its own.",
            panel=TASK,
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        option(
            "--encoding",
            metavar="NAME",
            help="For ppl: encoding of the text file. Default: UTF-8 or UTF-16, whichever it is.",
            panel=TASK,
        ),
    ] = None,
    read: Annotated[
        list[str] | None,
        option(
            "--read",
            metavar="auto|all|each|N|none",
            help="For library: how much a question reads; may be given several times. none selects as auto does, and reads nothing. "
            "Default: auto and all.",
            panel=TASK,
        ),
    ] = None,
    embedding_model: EmbeddingModelOption = None,
    embedding_query: EmbeddingQuery = None,
    embedding_passage: EmbeddingPassage = None,
    tail: Annotated[
        int | None,
        option(
            "--tail",
            min=1,
            metavar="N",
            help="For ppl: how many of a window's last tokens count. Default: T/8, at most 256.",
            panel=TASK,
        ),
    ] = None,
    plain: Annotated[
        bool, option("--plain", help="For real: do without the model's chat template.", panel=TASK)
    ] = False,
    generate: Annotated[
        bool,
        option(
            "--generate/--no-generate",
            help="For real: also let the model write answers freely, which takes most of the time of a question.",
            panel=TASK,
        ),
    ] = True,
    train_length: TrainLength = None,
    reading_length: ReadingLength = None,
    first_chunk: FirstChunk = None,
    chunk: Chunk = None,
    last_chunk: LastChunk = None,
    stair_width: StairWidth = "auto",
    stair_bias: StairBias = None,
    room: Annotated[
        int | None,
        option(
            "--room",
            min=0,
            metavar="N",
            help="How many positions a plan leaves free for generation. Default: T/2, for other methods T/4.",
            panel=MESA,
        ),
    ] = None,
    log_scaling: LogScaling = None,
    log_length: Annotated[
        int | None,
        option(
            "--log-length",
            min=2,
            metavar="N",
            help="Length from which on queries are scaled. Default: 4T, for other methods T.",
            panel=MESA,
        ),
    ] = None,
    type_k: TypeK = "f16",
    type_v: TypeV = "f16",
    flash_attn: FlashAttn = "on",
    threads: Threads = None,
    n_gpu_layers: NGpuLayers = None,
    batch: Batch = 512,
    ubatch: UBatch = 512,
) -> None:
    """Measure what methods that extend the context still find in texts longer than the trained length T.

    A run that was cut off goes on where it was when the same command is given again.
    """
    from ..lab.evaluate import Evaluation, Options, RealEvaluation
    from ..lab.plot import new_figure

    if LIBRARY_TASK in tasks:
        if tasks != [LIBRARY_TASK]:
            raise ConfigError("the task library has modes of reading in place of methods: run it alone")
        engine = {"type_k": kv_type_of(type_k), "type_v": kv_type_of(type_v), "flash_attn": flash_attn_of(flash_attn)}
        machine = {
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_gpu_layers": n_gpu_layers,
            "verbose": verbose,
        }
        prefixes = embedding_query, embedding_passage
        with open_embedding(
            embedding_model, *prefixes, threads=threads, n_gpu_layers=n_gpu_layers, verbose=verbose
        ) as embedding:
            _library(
                find_model(model), list(lengths or ()), list(read or ("auto", "all")), list(methods or ("stock",)), seed,
                samples, text, engine, machine, output, as_json, embedding,
            )  # fmt: skip
        return
    if read:
        raise ConfigError("--read is for the task library")
    if any(value is not None for value in (embedding_model, embedding_query, embedding_passage)):
        raise ConfigError("--embedding-model is for the task library")
    new_figure(1, 1)  # raises where matplotlib is missing, before anything is computed
    groups = _groups(tasks)
    names = _methods(methods or []) if groups != ["real"] else []
    settings = _settings(methods or []) if "real" in groups else []
    if style not in ("auto", "natural", "reader"):
        raise ConfigError(f"there is no style {style}: use natural, reader or auto")
    kv_type_of(type_k), kv_type_of(type_v)
    path = find_model(model)
    given = {
        "train_length": train_length,
        "reading_length": reading_length,
        "first_chunk": first_chunk,
        "chunk": chunk,
        "last_chunk": last_chunk,
        "stair_width": None if stair_width == "auto" else stair_width_of(stair_width),
        "stair_bias": stair_bias,
        "room": room,
        "log_scaling": log_scaling,
        "log_length": log_length,
    }
    _check_overrides(given, [name.partition(",")[0] for name in (*names, *settings)])
    sizes = QUICK_SAMPLES if quick else SAMPLES
    options = Options(
        path=path,
        methods=names,
        lengths=(),
        seed=seed,
        samples=sizes if samples is None else dict.fromkeys(sizes, samples),
        kinds=kinds or (),
        n_depths=depths if depths is not None else QUICK_DEPTHS if quick else DEPTHS,
        n_facts=facts,
        text=None,
        tail=tail,
        style=None if style == "auto" else cast(Literal["natural", "reader"], style),
        overrides={name: value for name, value in given.items() if value is not None},
        engine={
            "type_k": kv_type_of(type_k),
            "type_v": kv_type_of(type_v),
            "flash_attn": flash_attn_of(flash_attn),
            "n_batch": batch,
            "n_ubatch": ubatch,
        },
        machine={
            "n_threads": threads,
            "n_threads_batch": threads,
            "n_gpu_layers": n_gpu_layers,
            "verbose": verbose,
        },
    )
    limit = max_length_full if max_length_full is not None else QUICK_MAX_LENGTH_FULL if quick else None
    real_options = replace(
        options, methods=settings, text=_haystack(text) if text is not None and "real" in groups else None
    )
    if text is not None and "ppl" in groups:
        options = replace(options, text=read_text(text, encoding))
    options = _with_lengths(options, list(lengths or LENGTHS), limit)
    real_options = _with_lengths(real_options, list(lengths or REAL_LENGTHS), limit)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: give --output a folder")
    out.call_option("enabled", False, "--method stock")
    evaluations: list[Evaluation | RealEvaluation] = []
    for group in groups:
        if group == "real":
            if ALL not in tasks:
                evaluations.append(RealEvaluation(real_options, output, generate=generate, plain=plain))
            continue
        if group == "ppl" and ALL in tasks and _has_no_text(options):
            out.say("mesa-gguf: ppl is left out: it needs a text (--text FILE)")
            continue
        evaluations.append(Evaluation(group, options, output))
    for evaluation in evaluations:
        _run(evaluation, output, as_json)


def _haystack(text: str) -> str:
    """The text of a document, or of the documents of a folder."""
    from ..lab.facts import load_text

    return load_text([expanded(text)])


def _library(
    path: Path,
    lengths: list[str],
    read: list[str],
    methods: list[str],
    seed: int,
    samples: int | None,
    text: str | None,
    engine: dict[str, Any],
    machine: dict[str, Any],
    output: Path,
    as_json: bool,
    embedding: EmbeddingModel | None,
) -> None:
    from ..lab.evaluate import library, report
    from ..model.header import check_model

    if set(methods) - {"stock", "mesa"}:
        raise ConfigError("the task library compares mesa with stock alone: leave out the other methods")
    modes = library.check_modes([*read, *(["stock"] if "stock" in methods and read != ["none"] else [])])
    train_length = check_model(path).train_length
    settings = library.Settings(
        path=path,
        modes=modes,
        lengths=sorted(
            {_tokens(length, train_length, "--length") for length in lengths}
            or {max(library.LEAST_TOKENS, times * train_length) for times in (1, 2, 4)}
        ),
        seed=seed,
        samples=samples if samples is not None else 1,
        text=None if text is None else _haystack(text),
        engine=engine,
        machine=machine,
        embedding=embedding,
    )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: give --output a folder")
    evaluation = library.LibraryEvaluation(settings, output)
    with _bar(out.is_terminal(sys.stderr)) as watch:
        evaluation.run(watch)
    file = output / "library.json"
    made = library.contents(evaluation, _commands(file, out.command_line()))
    report.write_json(file, made)
    if as_json:
        out.write_json({key: made[key] for key in ("settings", "summary", "pairs")})
        return
    console = out.console(160)
    console.print(library.table(made), highlight=False)
    console.print(str(file), highlight=False, soft_wrap=True)


def _check_overrides(given: dict[str, Any], names: list[str]) -> None:
    """Raise ConfigError for options of Mesa where no method is run that has them."""
    from ..lab.methods import METHODS

    options = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if options and options != ["--train-length"] and all(METHODS[name].engine is None for name in names):
        raise ConfigError(f"{options[-1]} changes nothing for {', '.join(names)}: leave it out, or add --method mesa")


def _with_lengths(options: Options, lengths: list[str], limit: str | None) -> Options:
    train_length = options.train_length
    return replace(
        options,
        lengths=sorted({_tokens(text, train_length, "--length") for text in lengths}),
        max_length_full=None if limit is None else _tokens(limit, train_length, "--max-length-full"),
    )


def _has_no_text(options: Options) -> bool:
    from ..lab.evaluate.prompts import Prompter

    return options.text is None and Prompter(options.path, options.style).style != "reader"


def _run(evaluation: Evaluation | RealEvaluation, output: Path, as_json: bool) -> None:
    from ..lab.evaluate import RealEvaluation, real_report, report

    if evaluation.n_there:
        out.say(f"{evaluation.store.path}: {evaluation.n_there} results are there already")
    with _bar(out.is_terminal(sys.stderr)) as watch:
        evaluation.run(watch)
    command = _commands(output / f"{evaluation.group}.json", out.command_line())
    rows, threads = evaluation.store.rows.values(), evaluation.options.machine["n_threads"]
    if isinstance(evaluation, RealEvaluation):
        contents = real_report.document(evaluation.settings(), rows, command, threads, evaluation.options.methods)
        figure, tables = real_report.figure(contents), real_report.rich_tables(contents)
    else:
        contents = report.document(evaluation.settings(), rows, command, threads)
        figure, tables = report.figure(contents), report.rich_tables(contents)
    report.write_json(output / f"{evaluation.group}.json", contents)
    picture = output / f"{evaluation.group}.png"
    figure.savefig(picture, dpi=90)
    if as_json:
        shown = {key: contents[key] for key in ("settings", "not_able", "summary") if key in contents}
        out.write_json(shown)
        return
    console = out.console(160)
    for part in tables:
        console.print(part, highlight=False)
    console.print(f"{picture.with_suffix('.json')}, {picture}", highlight=False, soft_wrap=True)


def _commands(path: Path, command: str) -> str:
    """The commands that results come from, a line each: those that a file of results names, and this one."""
    try:
        before = str(json.loads(path.read_text(encoding="utf-8"))["run"]["command"]).splitlines()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        before = []
    return "\n".join(dict.fromkeys([*before, command]))


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Watch | None]:
    """A bar on standard error that an evaluation moves; None if it is not to be shown."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: Any = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
