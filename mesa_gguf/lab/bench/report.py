"""Medians and ratios of the measurements, as JSON, as tables and as a picture."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...model.header import check_model
from ...model.inspection import format_bytes, format_count
from .builds import Build, Machine
from .measure import DISABLED, MESA, STOCK, Measurement, Settings, in_chunks, kv_bytes

FORMAT = 1  # of the JSON
HOST_BUFFERS = ("CPU",)  # prefixes of buffers in the process's own memory; others are on a device

# name: the value whose medians it divides
RATIOS = {
    "prefill_time": "prefill_s",
    "first_token_time": "first_token_s",
    "decode_time": "decode_s",
    "memory": "memory_bytes",
}


@dataclass(frozen=True)
class Model:
    """What was measured with.

    Attributes:
        train_length: T as used; train_length_file as the file says.
    """

    name: str
    random_weights: bool
    architecture: str
    n_params: int
    weight_bytes: int
    train_length: int
    train_length_file: int
    kv_bytes_per_token: int


def describe_model(settings: Settings, random_weights: bool, name: str) -> Model:
    """The model of the settings."""
    header = check_model(settings.model)
    return Model(
        name=name,
        random_weights=random_weights,
        architecture=header.architecture,
        n_params=header.llama_cpp_view[1],
        weight_bytes=header.weight_bytes,
        train_length=settings.train_length or header.train_length,
        train_length_file=header.train_length,
        kv_bytes_per_token=kv_bytes(settings, header, 1),
    )


#
# medians
#


@dataclass(frozen=True)
class Ratio:
    """Of medians; low and high are the least and the largest ratio of two measurements of the same round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """The medians of one method at one length; seconds and bytes.

    Attributes:
        n_runs: measurements that succeeded.
        decode_only: it has decoded after the text that Mesa has read.
        decode_s: of one token.
        decode_limit_s: what a token takes at least: the time in which as many threads only read the weights and the cache.
        less_s: of one token where each reads a part of the text (`Settings.read_budget`), those that read everything included.
        less_limit_s: the least time for that.
        memory_bytes: the process at its peak, and what lies on devices.
        buffers: bytes that llama.cpp has allocated, used or not: weights, kv, compute, output.
        before_bytes: of memory_bytes, what Python and the libraries took before the model was loaded.
        ratios: to the baseline: below 1 is less time or less memory.
        error: why there is no measurement.
    """

    tokens: int
    method: str
    n_runs: int = 0
    decode_only: bool = False
    prefill_s: float | None = None
    prefill_tokens_per_s: float | None = None
    first_token_s: float | None = None
    decode_s: float | None = None
    decode_tokens_per_s: float | None = None
    decode_limit_s: float | None = None
    less_s: float | None = None
    less_limit_s: float | None = None
    memory_bytes: float | None = None
    buffers: dict[str, int] | None = None
    before_bytes: float | None = None
    plan: dict[str, int] | None = None
    ratios: dict[str, Ratio] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """All that `mesa-gguf bench` tells.

    Attributes:
        baseline: the method that ratios are to; None: there are none.
        flatness: for Mesa: prefill time of a token, by length, to that at the shortest length.
    """

    machine: Machine
    patched: Build
    stock: Build | None
    model: Model
    settings: Settings
    measurements: list[Measurement]
    results: list[Result]
    baseline: str | None
    flatness: dict[int, Ratio]

    @property
    def json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": asdict(self.machine),
            "builds": {"patched": self.patched.json, "stock": None if self.stock is None else self.stock.json},
            "model": asdict(self.model),
            "settings": self.settings.json,
            "baseline": self.baseline,
            "results": [asdict(result) for result in self.results],
            "flatness": {str(tokens): asdict(ratio) for tokens, ratio in self.flatness.items()},
            "measurements": [measurement.json for measurement in self.measurements],
        }


def make_report(
    machine: Machine,
    patched: Build,
    stock: Build | None,
    model: Model,
    settings: Settings,
    measurements: Sequence[Measurement],
) -> Report:
    """Medians and ratios of what was measured so far."""
    groups: dict[tuple[int, str], list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(measurement.job.key, []).append(measurement)
    order = {method: i for i, method in enumerate(settings.methods)}
    keys = sorted(groups, key=lambda key: (settings.tokens.index(key[0]), order[key[1]]))
    baseline = next((name for name in (STOCK, DISABLED) if any(method == name for _, method in groups)), None)
    rates = [m.values["memory_bytes_per_s"] for m in measurements if m.error is None and m.values["memory_bytes_per_s"]]
    rate = statistics.median(rates) if rates else None
    results = [
        _result(groups[key], groups.get((key[0], baseline)) if baseline else None, model, settings, rate)
        for key in keys
    ]
    return Report(
        machine, patched, stock, model, settings, list(measurements), results, baseline, _flatness(groups, MESA)
    )


def _result(
    group: Sequence[Measurement],
    base: Sequence[Measurement] | None,
    model: Model,
    settings: Settings,
    rate: float | None,
) -> Result:
    """rate: bytes a second that the memory gives."""
    job = group[0].job
    good = [m for m in group if m.error is None]
    if not good:
        return Result(job.tokens, job.method, decode_only=job.decode_only, error=group[0].error)
    prefill, first, step = (_median(good, name) for name in ("prefill_s", "first_token_s", "decode_s"))
    less = _median(good, "decode_less_s")

    def limit(n_keys: float) -> float | None:
        on_cpu = settings.n_gpu_layers == 0
        return (model.weight_bytes + n_keys * model.kv_bytes_per_token) / rate if rate and on_cpu else None

    read, every = good[0].values.get("read"), good[0].values.get("read_every")
    buffers = {kind: sum(sizes.values()) for kind, sizes in good[0].values["buffers"].items()}
    return Result(
        tokens=job.tokens,
        method=job.method,
        n_runs=len(good),
        decode_only=job.decode_only,
        prefill_s=prefill,
        prefill_tokens_per_s=None if prefill is None else job.tokens / prefill,
        first_token_s=first,
        decode_s=step,
        decode_tokens_per_s=None if step is None else 1 / step,
        decode_limit_s=None if step is None else limit(job.tokens),
        less_s=less,
        less_limit_s=limit((job.tokens + (every - 1) * read) / every) if less is not None and read and every else None,
        memory_bytes=_median(good, "memory_bytes"),
        buffers=buffers,
        before_bytes=_median(good, "before_bytes"),
        plan=good[0].values["plan"],
        ratios=_ratios(good, base) if base and job.method != base[0].job.method else None,
    )


def _value(measurement: Measurement, name: str) -> float | None:
    if name != "memory_bytes":
        value: float | None = measurement.values[name]
        return value
    on_devices = sum(
        size
        for sizes in measurement.values["buffers"].values()
        for buffer, size in sizes.items()
        if not buffer.startswith(HOST_BUFFERS) and not buffer.endswith("_Host")
    )
    return float(measurement.values["peak_bytes"] + on_devices)


def _median(group: Iterable[Measurement], name: str) -> float | None:
    values = [value for value in (_value(m, name) for m in group) if value is not None]
    return statistics.median(values) if values else None


def _ratios(group: Sequence[Measurement], base: Sequence[Measurement]) -> dict[str, Ratio]:
    by_run = {m.job.run: m for m in base if m.error is None}
    ratios: dict[str, Ratio] = {}
    for name, value in RATIOS.items():
        if name == "memory" and any(m.job.decode_only for m in (*group, *by_run.values())):
            continue  # reading takes memory too
        medians = _median(group, value), _median(by_run.values(), value)
        pairs = [(_value(m, value), _value(by_run[m.job.run], value)) for m in group if m.job.run in by_run]
        each = [a / b for a, b in pairs if a is not None and b]
        if medians[0] is not None and medians[1] and each:
            ratios[name] = Ratio(medians[0] / medians[1], min(each), max(each))
    return ratios


def _flatness(groups: Mapping[tuple[int, str], Sequence[Measurement]], method: str) -> dict[int, Ratio]:
    times: dict[int, dict[int, float]] = {}
    for (tokens, name), group in groups.items():
        by_run = {m.job.run: m.values["prefill_s"] / tokens for m in group if m.error is None and name == method}
        if by_run:
            times[tokens] = by_run
    if not times:
        return {}
    first = times.pop(min(times))
    flatness: dict[int, Ratio] = {}
    for tokens, by_run in sorted(times.items()):
        each = [seconds / first[run] for run, seconds in by_run.items() if run in first]
        if each:
            median = statistics.median(by_run.values()) / statistics.median(first.values())
            flatness[tokens] = Ratio(median, min(each), max(each))
    return flatness


#
# as text
#


def header_lines(machine: Machine, patched: Build, stock: Build | None, model: Model, settings: Settings) -> list[str]:
    """The machine, the builds, the model and the settings."""
    memory = "" if machine.memory is None else f", {format_bytes(machine.memory)}"
    trained = (
        "" if model.train_length == model.train_length_file else f" (the model's own is {model.train_length_file})"
    )
    rows = [
        ("model", f"{model.name}, {format_count(model.n_params)} parameters, {format_bytes(model.weight_bytes)}"
                  f"{', random weights' if model.random_weights else ''}; T = {model.train_length}{trained}; "
                  f"KV cache {format_bytes(model.kv_bytes_per_token)} a token"),
        ("machine", f"{', '.join([machine.cpu, *patched.gpus])}, {machine.n_cores} cores{memory}, {machine.system}, "
                    f"load {machine.load:.1f}"),
        ("patched", f"mesa-gguf {patched.json['mesa_gguf']}, {_build(patched)}"),
    ]  # fmt: skip
    if stock is not None:
        same = _features(stock) == _features(patched)
        rows.append(("stock", f"{_build(stock, same_features=same)}"))
        if not same:
            rows.append(("note", "the builds differ: part of what the ratios say is that"))
    rows.append((
        "settings",
        f"KV {settings.type_k}/{settings.type_v}, flash attention {'on' if settings.flash_attn else 'off'}, "
        f"{settings.threads} threads, batch {settings.n_batch}, ubatch {settings.n_ubatch}, GPU layers {settings.n_gpu_layers}, "
        f"{settings.decode} tokens decoded, median of {settings.runs}, lengths and methods in turn",
    ))  # fmt: skip
    if machine.is_busy:
        rows.append(("note", f"load {machine.load:.1f} in the last minute: what still runs disturbs the measurements"))
    if any(in_chunks(method) for method in settings.methods) and max(settings.tokens) <= model.train_length:
        shorter = max(settings.tokens) // 8
        advice = f"a trained length of {shorter}" if shorter >= 128 else "a longer text"
        rows.append((
            "note",
            f"all lengths fit into T = {model.train_length}, where texts are read as in stock llama.cpp: "
            f"{advice} measures what lies beyond",
        ))  # fmt: skip
    return [f"{key:<10}{value}" for key, value in rows]


def _features(build: Build) -> tuple[str, list[str], list[str]]:
    return build.llama_cpp_python, sorted(part.strip() for part in build.system_info.split("|")), build.gpus


def _build(build: Build, *, same_features: bool = False) -> str:
    cmake = " ".join(f"{key.removeprefix('CMAKE_')}={value}" for key, value in build.cmake.items())
    features = "the same build flags as patched" if same_features else build.system_info.rstrip("| ")
    return f"llama-cpp-python {build.llama_cpp_python}, Python {build.python_version}: {features}" + (
        f"; {cmake}" if cmake else ""
    )


def format_report(report: Report) -> RenderableType:
    """Tables, and a line on how flat Mesa's cost is."""
    parts: list[RenderableType] = [_measured_table(report)]
    parts.append(
        Text("memory: of the process at its peak, Python included; weights, KV, compute: as allocated by llama.cpp")
    )
    if any(result.decode_s for result in report.results):
        parts.append(_decode_table(report))
    if report.baseline is not None and any(result.ratios for result in report.results):
        parts.append(_ratio_table(report, report.baseline))
    for result in report.results:
        if result.error is not None:
            parts.append(Text(f"{result.method} at {result.tokens} tokens failed: {result.error}"))
    if any(result.decode_only for result in report.results):
        parts.append(Text("* decodes after the text that Mesa has read, on the same number of keys"))
    first = min((r.tokens for r in report.results if r.method == MESA), default=0)
    for tokens, ratio in report.flatness.items():
        times = _ratio(ratio, report.settings.runs)
        parts.append(Text(f"mesa: a token of a text of {tokens} takes {times} times as long to read as one of {first}"))
    return Group(*parts)


def _measured_table(report: Report) -> Table:
    table = _table("medians", "prefill tokens/s", "first token s", "decode tokens/s")
    for name in ("memory", "weights", "KV", "compute"):
        table.add_column(f"{name} MiB", justify="right", overflow="fold")
    for r in report.results:
        buffers = r.buffers or {}
        compute = buffers["compute"] + buffers["output"] if buffers else None
        table.add_row(
            str(r.tokens),
            r.method + ("*" if r.decode_only else ""),
            *(_number(value) for value in (r.prefill_tokens_per_s, r.first_token_s, r.decode_tokens_per_s)),
            *(_mebibytes(n) for n in (r.memory_bytes, buffers.get("weights"), buffers.get("kv"), compute)),
        )
    return table


def _decode_table(report: Report) -> Table:
    """Generation beside what the memory allows."""
    table = _table("generation", "tokens/s", "memory's limit", "of it")

    def row(result: Result, name: str, seconds: float | None, limit: float | None) -> None:
        if seconds is not None:
            per_s = 1 / limit if limit is not None else None
            share = "-" if limit is None else f"{limit / seconds:.0%}"
            table.add_row(str(result.tokens), name, _number(1 / seconds), _number(per_s), share)

    for result in report.results:
        row(result, result.method, result.decode_s, result.decode_limit_s)
        row(result, f"{result.method}, {report.settings.read_budget} keys", result.less_s, result.less_limit_s)
    table.caption = "memory's limit: as many threads only read the weights and the keys and values that a token reads"
    return table


def _ratio_table(report: Report, baseline: str) -> Table:
    name = "stock llama.cpp" if baseline == STOCK else "the patched library with Mesa disabled"
    shown = [ratio for ratio in RATIOS if ratio != "first_token_time"]  # hardly differs from prefill
    table = _table(f"against {name}: below 1 is less", *(ratio.replace("_", " ") for ratio in shown))
    for r in report.results:
        if r.ratios:
            table.add_row(str(r.tokens), r.method, *(_ratio(r.ratios.get(ratio), r.n_runs) for ratio in shown))
    if report.settings.runs > 1:
        table.caption = "in brackets: least and largest ratio within a round"
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    table.add_column("tokens", justify="right", overflow="fold")
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _ratio(ratio: Ratio | None, n_runs: int) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.3f}" + (f" ({ratio.low:.3f} … {ratio.high:.3f})" if n_runs > 1 else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if value < 100 else 1}f}"


def _mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


#
# as a picture
#


def save_picture(report: Report, path: Path) -> None:
    """Memory, latency and decoding by length, a line for each method."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from ..plot import new_figure

    figure = new_figure(13.5, 4.8)
    panels = (
        ("memory at the peak (GiB)", "memory_bytes", 2**-30, "linear"),
        ("until the first token (s)", "first_token_s", 1.0, "log"),
        ("each further token (ms)", "decode_s", 1000.0, "linear"),
    )
    for axes, (title, name, factor, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for i, method in enumerate(report.settings.methods):
            rows = [r for r in report.results if r.method == method and getattr(r, name) is not None]
            if name == "memory_bytes":
                rows = [r for r in rows if not r.decode_only]  # reading takes memory too
            if rows:
                x, y = [r.tokens for r in rows], [getattr(r, name) * factor for r in rows]
                # methods may lie on top of each other
                axes.plot(
                    x, y, "o-", label=_label(method), linewidth=max(1.0, 4.0 - i), markersize=max(4.0, 9.0 - 2 * i)
                )
        if name == "memory_bytes":
            axes.axhline(
                report.model.weight_bytes * factor, color="black", linewidth=0.8, linestyle="--", label="weights"
            )
        if min(report.settings.tokens) <= report.model.train_length <= max(report.settings.tokens):
            axes.axvline(
                report.model.train_length, color="grey", linestyle=":", label=f"T = {report.model.train_length}"
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(report.settings.tokens, map(str, report.settings.tokens))
        axes.set_yscale(scale)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        else:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("length of the text (tokens)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    settings, machine = report.settings, report.machine
    figure.suptitle(
        f"{report.model.name}, KV {settings.type_k}/{settings.type_v}, {machine.cpu}, {settings.threads} threads, "
        f"median of {settings.runs}"
    )
    figure.savefig(path)


def _label(method: str) -> str:
    return {STOCK: "stock llama.cpp", DISABLED: "patched, Mesa disabled", MESA: "Mesa"}.get(method, method)
