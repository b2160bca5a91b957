"""The command ``mesa-gguf bench``."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import ConfigError, MesaError
from ..model.hub import HUB_FORM, find_model
from . import output as out
from .options import (
    ENGINE,
    Chunk,
    FirstChunk,
    JsonOption,
    LastChunk,
    NGpuLayers,
    ReadingLength,
    TrainLength,
    TypeK,
    TypeV,
    kv_type_of,
    option,
)

if TYPE_CHECKING:
    from ..lab.bench.builds import Build
    from ..lab.bench.measure import Job, Measurement, Settings

MODEL = "Model"
WHAT = "What is measured"

CONSOLE_WIDTH = 120  # where the output is no terminal


@dataclass(frozen=True)
class _Defaults:
    """What a run measures where options do not say."""

    tokens: tuple[int, ...]
    runs: int
    decode: int
    train_length: int | None
    read_budget: int


FULL = _Defaults((2048, 8192, 16384, 32768), runs=3, decode=32, train_length=None, read_budget=2048)
QUICK = _Defaults((512, 2048), runs=1, decode=8, train_length=512, read_budget=512)
DEFAULT_SHAPE = "smollm2-135m"


EXAMPLES = """\
Examples:\n
  mesa-gguf bench --quick\n
  mesa-gguf bench --shape llama-3.2-1b --quant q4_0 --train-length 2048 --tokens 2048,8192 --plot bench.png\n
  mesa-gguf bench -m model.gguf --stock-python other/bin/python --output bench.json\n
  mesa-gguf bench --tokens 65536 --stock-max 16384 --decode-only --method stock,mesa
"""


def bench(
    model: Annotated[
        str | None,
        option(
            "-m",
            "--model",
            metavar="MODEL",
            help=f"The model: a GGUF file, or {HUB_FORM}. Default: random weights.",
            panel=MODEL,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        option(
            "--shape",
            metavar="NAME",
            help="Shape of random weights: smollm2-135m (the default), qwen2.5-0.5b, llama-3.2-1b, llama-2-7b or tiny. They "
            "are written once, into the user's cache.",
            panel=MODEL,
        ),
    ] = None,
    quant: Annotated[
        str | None,
        option(
            "--quant",
            metavar="TYPE",
            help="Type of the random weights: q8_0 (the default), q4_0, q4_1, q5_0, q5_1, q6_k, f16, or as llama.cpp mixes q4_k_m and q5_k_m.",
            panel=MODEL,
        ),
    ] = None,
    train_length: TrainLength = None,
    reading_length: ReadingLength = None,
    tokens: Annotated[
        list[str] | None,
        option(
            "--tokens", metavar="N", help="Lengths of text, in tokens: 2048,8192, or given several times.", panel=WHAT
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        option(
            "--method",
            metavar="NAME",
            help="What to measure: stock (unpatched llama.cpp), disabled (the patched one with Mesa disabled), mesa, or "
            "another method of docs/METHODS.md. Default: stock,disabled,mesa.",
            panel=WHAT,
        ),
    ] = None,
    runs: Annotated[
        int | None, option("--runs", min=1, metavar="N", help="How often each measurement is made.", panel=WHAT)
    ] = None,
    decode: Annotated[
        int | None,
        option("--decode", min=0, metavar="N", help="How many tokens are decoded after each text.", panel=WHAT),
    ] = None,
    stock_max: Annotated[
        int | None,
        option(
            "--stock-max",
            min=1,
            metavar="N",
            help="Longest text for the methods that do not read in chunks, which become slow.",
            panel=WHAT,
        ),
    ] = None,
    decode_only: Annotated[
        bool,
        option(
            "--decode-only", help="Beyond --stock-max, stock decodes after the text that Mesa has read.", panel=WHAT
        ),
    ] = False,
    read_budget: Annotated[
        int | None,
        option(
            "--read-budget",
            min=0,
            metavar="N",
            help="Mesa decodes once more, each token reading N tokens of the text besides its beginning and end; 0: not. Default: 2,048, with --quick 512.",
            panel=WHAT,
        ),
    ] = None,
    stock_python: Annotated[
        str | None,
        option(
            "--stock-python",
            metavar="PYTHON",
            help="A Python that has an unpatched llama-cpp-python, to compare with.",
            panel=WHAT,
        ),
    ] = None,
    stock_lib: Annotated[
        Path | None,
        option(
            "--stock-lib", metavar="DIR", help="A folder that has an unpatched libllama, to compare with.", panel=WHAT
        ),
    ] = None,
    quick: Annotated[
        bool, option("--quick", help="Measure two short lengths, once, with T = 512.", panel=WHAT)
    ] = False,
    output: Annotated[
        Path | None, option("--output", metavar="FILE.json", help="Save all measurements in this file.")
    ] = None,
    plot: Annotated[Path | None, option("--plot", metavar="FILE.png", help="Save a picture in this file.")] = None,
    as_json: JsonOption = False,
    first_chunk: FirstChunk = None,
    chunk: Chunk = None,
    last_chunk: LastChunk = None,
    type_k: TypeK = "f16",
    type_v: TypeV = "f16",
    flash_attn: Annotated[
        str, option("--flash-attn", metavar="on|off", help="Whether to use flash attention.", panel=ENGINE)
    ] = "on",
    threads: Annotated[
        int | None, option("--threads", min=1, metavar="N", help="Number of threads. Default: all cores.", panel=ENGINE)
    ] = None,
    n_gpu_layers: NGpuLayers = None,
    batch: Annotated[
        int,
        option("--batch", min=1, metavar="N", help="How many tokens are handed to llama.cpp at once.", panel=ENGINE),
    ] = 2048,
    ubatch: Annotated[
        int, option("--ubatch", min=1, metavar="N", help="How many tokens are computed at once.", panel=ENGINE)
    ] = 512,
) -> None:
    """Measure speed and memory by length and method, against unpatched llama.cpp.

    Every measurement is a process of its own; lengths and methods take turns. The machine should do nothing else.
    """
    from ..lab.bench import builds, measure, report
    from ..model.header import check_model

    defaults = QUICK if quick else FULL
    if output is not None:
        out.check_output(output, "the measurements")
    if plot is not None:
        from ..lab.plot import check_picture

        check_picture(plot)
    for name in (type_k, type_v):
        kv_type_of(name)
    if flash_attn not in ("on", "off"):  # what llama.cpp decides by itself need not be the same for both
        raise ConfigError(f"--flash-attn {flash_attn}: it must be on or off")
    lengths = _lengths(tokens) or defaults.tokens
    methods = _names(method)
    measure.check_names(methods)

    stock = None
    if stock_python is not None or stock_lib is not None:
        stock = builds.stock_build(stock_python, stock_lib)
    path, name = _model(model, shape, quant)
    if train_length is None and defaults.train_length is not None:
        train_length = min(defaults.train_length, check_model(path).train_length)
    patched = builds.patched_build()
    settings = measure.Settings(
        model=path,
        tokens=lengths,
        methods=tuple(methods or ("stock", "disabled", "mesa")),
        runs=runs or defaults.runs,
        decode=defaults.decode if decode is None else decode,
        whole_max=stock_max,
        decode_only=decode_only,
        train_length=train_length,
        type_k=type_k.lower(),
        type_v=type_v.lower(),
        flash_attn=flash_attn == "on",
        threads=threads or builds.n_cores(),
        n_gpu_layers=n_gpu_layers if n_gpu_layers is not None else -1 if patched.gpus else 0,
        n_batch=batch,
        n_ubatch=ubatch,
        read_budget=defaults.read_budget if read_budget is None else read_budget,
        mesa={
            "reading_length": reading_length,
            "first_chunk": first_chunk,
            "chunk": chunk,
            "last_chunk": last_chunk,
        },
    )
    measure.check(settings)
    if stock is None and "stock" in settings.methods:
        stock, settings = _find_stock(settings)

    machine = builds.this_machine()
    described = report.describe_model(settings, random_weights=model is None, name=name)
    for line in report.header_lines(machine, patched, stock, described, settings):
        out.say(line) if as_json else out.write(f"{line}\n")

    measurements: list[Measurement] = []
    try:
        with _progress(measure.jobs(settings)) as progress:
            for measurement in measure.measure(settings, patched, stock, progress.start):
                progress.done(measurement)
                measurements.append(measurement)
    finally:  # an interrupted run shows what it has
        if measurements:
            made = report.make_report(machine, patched, stock, described, settings, measurements)
            _show(made, output, plot, as_json)
    if all(measurement.error is not None for measurement in measurements):
        raise MesaError("every measurement failed")


def _show(made: Any, output: Path | None, plot: Path | None, as_json: bool) -> None:
    from ..lab.bench import report

    if output is not None:
        output.write_text(json.dumps({"command": out.command_line(), **made.json}, indent=1) + "\n")
    if plot is not None:
        report.save_picture(made, plot)
    if as_json:
        out.write_json(made.json)
    else:
        out.console(CONSOLE_WIDTH).print(report.format_report(made))


#
# options
#


def _lengths(values: Sequence[str] | None) -> tuple[int, ...]:
    lengths: list[int] = []
    for text in _split(values):
        if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**31:
            raise ConfigError(f"--tokens {text}: it must be a whole number of tokens, or several: 2048,8192")
        lengths.append(int(text))
    return tuple(sorted(set(lengths)))


def _names(values: Sequence[str] | None) -> list[str]:
    return list(dict.fromkeys(_split(values)))


def _split(values: Sequence[str] | None) -> list[str]:
    return [part for value in values or () for part in re.split(r"[,\s]+", value) if part]


def _find_stock(settings: Settings) -> tuple[Build | None, Settings]:
    """The unpatched llama.cpp that is installed; where there is none, settings without it."""
    from ..lab.bench import builds

    build, reason = builds.find_stock()
    if build is not None:
        return build, settings
    name_one = "name one with --stock-lib DIR or --stock-python PYTHON"
    methods = tuple(method for method in settings.methods if method != "stock")
    if not methods:
        raise ConfigError(f"no unpatched llama.cpp to measure ({reason}): {name_one}")
    out.say(f"mesa-gguf: no unpatched llama.cpp to compare with ({reason}): measuring without; {name_one}")
    return None, replace(settings, methods=methods)


def _model(model: str | None, shape: str | None, quant: str | None) -> tuple[Path, str]:
    """The file to measure with, and what it is called."""
    from ..lab.bench import shapes

    if model is not None:
        if shape is not None or quant is not None:
            raise ConfigError("-m names a file: --shape and --quant are for random weights")
        path = find_model(model)
        return path, path.name
    shape, quant = (shape or DEFAULT_SHAPE).lower(), (quant or "q8_0").lower()
    size = shapes.model_bytes(shape, quant)
    if shapes.model_path(shape, quant).exists():
        return shapes.cached_model(shape, quant), f"{shape} {quant}"

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not out.is_terminal(sys.stderr)
    ) as bar:
        task = bar.add_task(f"writing random weights, {shape} {quant}", total=size)
        path = shapes.cached_model(shape, quant, lambda n_bytes: bar.advance(task, n_bytes))
    return path, f"{shape} {quant}"


#
# progress
#


class _Progress:
    """A bar with the time that is left, or a line for each measurement where there is no terminal."""

    def __init__(self, all_jobs: Sequence[Job], bar: Any, task: Any) -> None:
        from ..lab.bench.measure import Estimate

        self.estimate = Estimate(all_jobs)
        self._n, self._all = 0, len(all_jobs)
        self._bar, self._task = bar, task

    def start(self, job: Job) -> None:
        if self._bar is not None:
            what = f"{job.method}, {job.tokens} tokens, run {job.run + 1}"
            self._bar.update(self._task, description=what, left=self.estimate.seconds_left)

    def done(self, measurement: Measurement) -> None:
        self.estimate.add(measurement.job, measurement.seconds)
        self._n += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._n)
            return
        job, left = measurement.job, self.estimate.seconds_left or 0
        what = f"{self._n} of {self._all}: {job.method}, {job.tokens} tokens, {measurement.seconds:.0f} s"
        out.say(f"{what}{'; failed' if measurement.error is not None else ''}; about {_duration(left)} left")


@contextlib.contextmanager
def _progress(all_jobs: Sequence[Job]) -> Iterator[_Progress]:
    if not out.is_terminal(sys.stderr):
        yield _Progress(all_jobs, None, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )

    class Left(ProgressColumn):
        """The estimate of when the measurement began, less the time since."""

        seen: tuple[float | None, float] = (None, 0.0)

        def render(self, task: Task) -> str:
            left, now = task.fields["left"], time.monotonic()
            if left != self.seen[0]:
                self.seen = left, now
            return "" if left is None else f"about {_duration(max(0.0, left - (now - self.seen[1])))} left"

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Left())
    # once a second: what draws the bar takes time from what is measured
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as bar:
        yield _Progress(all_jobs, bar, bar.add_task("", total=len(all_jobs), left=None))


def _duration(seconds: float) -> str:
    """90 -> 1:30, 4000 -> 1:06:40"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
