"""Results as numbers, as a table and as a picture."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import plot
from ..bench.builds import cpu_name, n_cores
from ..methods import METHODS
from . import scoring
from .run import PPL, sort_key
from .store import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

DEPTH_BINS = 10
ABLE = 0.5
"""A task of which not even this share is right within the trained length is one that the model cannot do."""


#
# numbers
#


def summarize(rows: Iterable[Row], train_length: int) -> list[Row]:
    """An entry for each task, method and length."""
    groups = dict(_grouped(rows, lambda row: (row["task"], row["method"], row["length"])))
    return [
        {
            "task": task,
            "method": method,
            "length": length,
            **_numbers(task, group),
            **(_change(group, groups.get((task, method, train_length), [])) if task == PPL else {}),
        }
        for (task, method, length), group in groups.items()
    ]


def by_depth(rows: Iterable[Row]) -> list[Row]:
    """An entry for each task, method, length and depth; depths that are not on a grid go into ten bins."""

    def key(row: Row) -> tuple[Any, ...]:
        depth = row["depth"]
        if row["task"] != "niah":
            depth = (min(DEPTH_BINS - 1, int(depth * DEPTH_BINS)) + 0.5) / DEPTH_BINS
        return (row["task"], row["method"], row["length"], depth)

    placed = [row for row in rows if row["task"] in ("niah", "qa", "qa/two-hop")]
    entries = [
        {"task": task, "method": method, "length": length, "depth": depth, **_numbers(task, group)}
        for (task, method, length, depth), group in _grouped(placed, key)
    ]
    return sorted(entries, key=lambda entry: sort_key({**entry, "seed": 0, "index": 0}))


def _grouped(rows: Iterable[Row], key: Callable[[Row], tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Groups of rows, each and all in order."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=sort_key):
        groups[key(row)].append(row)
    return list(groups.items())


def _numbers(task: str, rows: Sequence[Row]) -> Row:
    if task == PPL:
        losses = [row["loss"] for row in rows]
        mean = math.fsum(losses) / len(losses)
        low, high = scoring.mean_interval(losses)
        return {
            "n": len(rows),
            "loss": round(mean, 4),
            "interval": [round(low, 4), round(high, 4)],
            "perplexity": round(math.exp(mean), 3),
        }
    right, of = sum(row["right"] for row in rows), sum(row["of"] for row in rows)
    low, high = scoring.wilson(right, of)
    return {
        "n": len(rows),
        "right": right,
        "of": of,
        "share": round(right / of, 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def _change(rows: Sequence[Row], base: Sequence[Row]) -> Row:
    """By how much the loss of the same tokens differs from that with T tokens read."""

    def losses(of: Sequence[Row]) -> dict[str, float]:
        return {_item(row): row["loss"] for row in of}

    change = lead(losses(rows), losses(base))
    if change is None:
        return {}
    mean, low, high = change if math.isfinite(change[1]) else (change[0],) * 3
    return {"change": round(mean, 4), "change_interval": [round(low, 4), round(high, 4)]}


def not_able(summary: Sequence[Row], train_length: int) -> dict[str, float]:
    """The tasks that the model cannot do even within the trained length, and its best share of right answers there."""
    best: dict[str, float] = {}
    for entry in summary:
        if entry["task"] != PPL and entry["length"] <= train_length:
            best[entry["task"]] = max(entry["share"], best.get(entry["task"], 0.0))
    return {task: share for task, share in best.items() if share < ABLE}


def timings(rows: Iterable[Row]) -> list[Row]:
    """Medians for each task, method and length."""
    out = []
    for (task, method, length), group in _grouped(rows, lambda row: (row["task"], row["method"], row["length"])):
        entry: Row = {"task": task, "method": method, "length": length}
        read = {(row["timings"]["n_read"], row["timings"]["read_s"]) for row in group}  # once for a document's items
        entry["read_s"] = round(statistics.median(seconds for _, seconds in read), 3)
        entry["read_tokens_per_s"] = round(statistics.median(n / max(seconds, 1e-4) for n, seconds in read))
        if "answer_s" in group[0]["timings"]:
            entry["answer_s"] = round(statistics.median(row["timings"]["answer_s"] for row in group), 3)
        out.append(entry)
    return out


def document(settings: Row, rows: Iterable[Row], command: str, threads: int | None) -> Row:
    """The numbers of a group of tasks: the same for the same seeds, but for "run". The items are told by their hash."""
    rows = list(rows)
    answered = json.dumps(items(rows), ensure_ascii=False)
    summary = summarize(rows, settings["model"]["train_length"])
    return {
        "settings": settings,
        "not_able": not_able(summary, settings["model"]["train_length"]),
        "summary": summary,
        "by_depth": by_depth(rows),
        "items": {"n": len(rows), "sha256": hashlib.sha256(answered.encode()).hexdigest()},
        "scores": scores(rows),
        "run": {"command": command, "machine": machine(), "threads": threads, "timings": timings(rows)},
    }


def items(rows: Iterable[Row]) -> list[Row]:
    """What was asked and answered, without timings, in an order that does not depend on how the run was cut up."""
    return [{key: row[key] for key in sorted(row) if key != "timings"} for row in sorted(rows, key=sort_key)]


def scores(rows: Iterable[Row]) -> list[Row]:
    """For each task, method and length every item's share of right answers, or loss: what pairs of methods are compared by."""

    def value(row: Row) -> float:
        return float(round(row["loss"] if row["task"] == PPL else row["right"] / row["of"], 4))

    return [
        {"task": task, "method": method, "length": length, "values": {_item(row): value(row) for row in group}}
        for (task, method, length), group in _grouped(rows, lambda row: (row["task"], row["method"], row["length"]))
    ]


def _item(row: Row) -> str:
    """What tells an item from others of its task and length: seed and number, of a grid ("niah") the depth too."""
    return f"{row['seed']}:{row['index']}" + (f"@{row['depth']}" if row["task"] == "niah" else "")


def lead(
    values: Mapping[str, float], others: Mapping[str, float], per_document: int = 1
) -> tuple[float, float, float] | None:
    """The mean of values - others over the items that both have, and its 95 % interval; None where they share none.

    The items of a document, per_document of them, are not independent of each other: a document counts as one observation, of
    their mean. Of one document the interval is not known: nan, nan.
    """
    documents: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for name in values:
        if name in others:
            item, _, depth = name.partition("@")
            seed, _, index = item.partition(":")
            documents[seed, depth, int(index) // per_document].append(values[name] - others[name])
    if not documents:
        return None
    means = [math.fsum(group) / len(group) for group in documents.values()]
    if len(means) == 1:
        return means[0], math.nan, math.nan
    return (math.fsum(means) / len(means), *scoring.mean_interval(means))


def machine() -> str:
    """The processor, and how many of its cores this process may use."""
    return f"{cpu_name()}, {n_cores()} cores"


def write_json(path: Path, contents: Row) -> None:
    """JSON with one line for each entry of a list."""
    parts = []
    for key, value in contents.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value)
            parts.append(f" {json.dumps(key)}: [\n{lines}\n ]" if value else f" {json.dumps(key)}: []")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


#
# tables
#


def length_name(length: int, train_length: int) -> str:
    """1024 -> 2 T"""
    times = length / train_length
    return f"{times:g} T" if times != 1 and (times * 8).is_integer() else "T" if times == 1 else str(length)


def cell(entry: Row | None) -> str:
    """The number of an entry and its 95 % interval."""
    if entry is None:
        return "–"
    low, high = entry["interval"]
    value = entry["loss"] if entry["task"] == PPL else entry["share"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def tables(contents: Row) -> list[tuple[str, list[int], list[tuple[str, list[str]]], str]]:
    """For each task: its title, lengths, rows of (method, cells), and what has to be known about it."""
    summary = contents["summary"]
    out = []
    for task in dict.fromkeys(entry["task"] for entry in summary):
        entries = {(entry["method"], entry["length"]): entry for entry in summary if entry["task"] == task}
        lengths = sorted({length for _, length in entries})
        methods = list(dict.fromkeys(method for method, _ in entries))
        rows = [(method, [cell(entries.get((method, length))) for length in lengths]) for method in methods]
        counts = sorted({entry["n"] for entry in entries.values()})
        n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        what = "log-loss in nats, lower is better" if task == PPL else "share that is right"
        title = f"{task}: {what}, 95 % interval; {n} {'windows' if task == PPL else 'items'} a cell"
        share = contents["not_able"].get(task)
        note = (
            f"The model cannot do {task} within its trained length either (at best {share:.2f} there): "
            "past it, the scores say nothing about the methods."
            if share is not None
            else ""
        )
        out.append((title, lengths, rows, note))
        changed = {entry["method"] for entry in entries.values() if "change" in entry}
        if changed:
            changes = [
                (method, [_change_cell(entries.get((method, length))) for length in lengths])
                for method in methods
                if method in changed
            ]
            out.append((f"{task}: change of log-loss from T, window by window", lengths, changes, ""))
    return out


def _change_cell(entry: Row | None) -> str:
    if entry is None or "change" not in entry:
        return "–"
    low, high = entry["change_interval"]
    return f"{entry['change']:+.3f} [{low:+.3f}, {high:+.3f}]"


def rich_tables(contents: Row) -> list[Table | str]:
    """The tables for a terminal, with notes between them."""
    train_length = contents["settings"]["model"]["train_length"]
    out: list[Table | str] = []
    for title, lengths, rows, note in tables(contents):
        out += [rich_table(title, lengths, rows, train_length), *([note] if note else [])]
    return out


def rich_table(
    title: str, lengths: Sequence[int], rows: Iterable[tuple[str, Sequence[str]]], train_length: int
) -> Table:
    """Methods down, lengths across."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for length in lengths:
        name = length_name(length, train_length)
        table.add_column(name if name == str(length) else f"{name}\n{length}", justify="right", no_wrap=True)
    for method, cells in rows:
        table.add_row(method, *cells)
    return table


#
# pictures
#


def ranks_of(methods: Iterable[str]) -> dict[str, int]:
    """The place of each method in tables and pictures: that of the list of all methods, then those with options of their own."""
    return {method: rank for rank, method in enumerate(dict.fromkeys([*METHODS, *methods]))}


def figure(contents: Row) -> Figure:
    """Every task of a group by length; heat maps of depth and length too, where results have a depth."""
    tasks = list(dict.fromkeys(entry["task"] for entry in contents["summary"]))
    placed = dict.fromkeys((entry["task"], entry["method"]) for entry in contents["by_depth"])
    ranks = ranks_of(method for _, method in placed)
    maps = sorted(placed, key=lambda name: (tasks.index(name[0]), ranks[name[1]]))
    n_columns = max(1, min(3, len(tasks)), min(3, len(maps)))
    n_rows = math.ceil(len(tasks) / n_columns) + math.ceil(len(maps) / n_columns)
    made = plot.new_figure(1 + 4.5 * n_columns, 0.6 + 3.4 * n_rows)
    grid = made.add_gridspec(n_rows, n_columns)
    for i, task in enumerate(tasks):
        columns = slice(None) if len(tasks) == 1 else i % n_columns
        _draw_lines(made.add_subplot(grid[i // n_columns, columns]), task, contents)
    first = math.ceil(len(tasks) / n_columns)
    for i, (task, method) in enumerate(maps):
        _draw_depths(made.add_subplot(grid[first + i // n_columns, i % n_columns]), task, method, contents)
    settings = contents["settings"]
    changed = ", ".join(f"{name} {value}" for name, value in settings["mesa"].items())
    made.suptitle(f"{settings['model']['name']}, style {settings['style']}{', ' + changed if changed else ''}")
    return made


def _draw_lines(axes: Axes, task: str, contents: Row) -> None:
    """The number of each method by length, with its interval."""
    entries = [entry for entry in contents["summary"] if entry["task"] == task]
    train_length = contents["settings"]["model"]["train_length"]
    for method, rank in ranks_of(entry["method"] for entry in entries).items():
        mine = [entry for entry in entries if entry["method"] == method]
        if not mine:
            continue
        x = [entry["length"] for entry in mine]
        colour, line = f"C{rank % 10}", "o-" if rank < 10 else "o--"
        axes.plot(
            x, [e["loss" if task == PPL else "share"] for e in mine], line, label=method, color=colour, markersize=4
        )
        axes.fill_between(
            x, [e["interval"][0] for e in mine], [e["interval"][1] for e in mine], alpha=0.15, color=colour
        )
    axes.axvline(train_length, color="grey", linestyle=":", linewidth=1)
    lengths = sorted({entry["length"] for entry in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_name(length, train_length) for length in lengths])
    axes.minorticks_off()
    if task != PPL:
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(task + (" (log-loss, nats)" if task == PPL else " (share right)"))
    axes.legend(fontsize="x-small", framealpha=0.5)


def _draw_depths(axes: Axes, task: str, method: str, contents: Row) -> None:
    """Right answers by length and depth."""
    mine = [e for e in contents["by_depth"] if (e["task"], e["method"]) == (task, method)]
    entries = {(e["depth"], e["length"]): e["share"] for e in mine}
    depths, lengths = (sorted(values) for values in (map(set, zip(*entries))))
    shares = [[entries.get((depth, length), math.nan) for length in lengths] for depth in depths]
    axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    train_length = contents["settings"]["model"]["train_length"]
    axes.set_xticks(range(len(lengths)), [length_name(length, train_length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for (depth, length), share in entries.items():
        colour = "white" if share < 0.6 else "black"
        axes.text(
            lengths.index(length),
            depths.index(depth),
            f"{share:.2g}",
            ha="center",
            va="center",
            fontsize="x-small",
            color=colour,
        )
    axes.set_ylabel("depth")
    axes.set_title(f"{task}, {method} (share right)")
