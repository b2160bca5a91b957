"""Results of the task "real" as numbers, as tables and as a picture."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .. import plot
from ..facts import FORMS
from . import scoring
from .real import REAL, STRIDE
from .report import items, lead, length_name, machine, rich_table, timings
from .store import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

SCORES = {
    "right": "answers written freely, share that is right",
    "begun": "answers whose beginning is given, share that is exact",
    "logprob": "the same, mean log-probability of a token",
}
"""What a row may have, and what it says."""

FACTS = f"{REAL}/facts"
"""Literal and paraphrased questions together."""

_TASKS = [FACTS, *(f"{REAL}/{form}" for form in FORMS)]


#
# numbers
#


def _by_cell(rows: Iterable[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """The rows of each task, length and method, in order."""
    cells: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["seed"], row["index"])):
        cells[row["task"], row["length"], row["method"]].append(row)
        if row["task"] in (f"{REAL}/literal", f"{REAL}/paraphrase"):
            cells[FACTS, row["length"], row["method"]].append(row)
    return cells


def _values(rows: Sequence[Row], score: str) -> dict[str, float]:
    return {f"{row['seed']}:{row['index']}": float(row[score]) for row in rows if score in row}


def summarize(rows: Iterable[Row], methods: Sequence[str]) -> list[Row]:
    """An entry for each task, length and method: its scores, and their differences from the first method's.

    Args:
        methods: in the order in which they are shown.
    """
    cells = _by_cell(rows)
    found = []
    for task, length in sorted({key[:2] for key in cells}, key=lambda key: (_TASKS.index(key[0]), key[1])):
        for method in methods:
            mine, base = cells.get((task, length, method), []), cells.get((task, length, methods[0]), [])
            if not mine:
                continue
            entry: Row = {"task": task, "method": method, "length": length, "n": len(mine)}
            for score in SCORES:
                values = _values(mine, score)
                if not values:
                    continue
                mean = math.fsum(values.values()) / len(values)
                entry[score] = {"mean": round(mean, 4)}
                if score != "logprob":
                    low, high = scoring.wilson(round(mean * len(values)), len(values))
                    entry[score]["interval"] = [round(low, 4), round(high, 4)]
                difference = lead(values, _values(base, score), STRIDE) if method != methods[0] else None
                if difference is not None:
                    mean, low, high = difference
                    entry[score]["difference"] = round(mean, 4)
                    if math.isfinite(low):  # it is not of one document
                        entry[score]["difference_interval"] = [round(low, 4), round(high, 4)]
            found.append(entry)
    return found


def document(settings: Row, rows: Iterable[Row], command: str, threads: int | None, methods: Sequence[str]) -> Row:
    """The numbers: the same for the same seeds, but for "run"."""
    rows = list(rows)
    names = [*methods, *sorted({row["method"] for row in rows} - {*methods})]
    answered = json.dumps(items(rows), ensure_ascii=False)
    cells = sorted(
        _by_cell(rows).items(), key=lambda cell: (_TASKS.index(cell[0][0]), cell[0][1], names.index(cell[0][2]))
    )
    return {
        "settings": settings,
        "summary": summarize(rows, names),
        "items": {"n": len(rows), "sha256": hashlib.sha256(answered.encode()).hexdigest()},
        "scores": [
            {"task": task, "method": method, "length": length, score: values}
            for (task, length, method), group in cells
            if task != FACTS
            for score in SCORES
            if (values := _values(group, score))
        ],
        "run": {"command": command, "machine": machine(), "threads": threads, "timings": _timings(rows)},
    }


def _timings(rows: Sequence[Row]) -> list[Row]:
    """Medians for each method and length, over all forms of questions."""
    return timings([{**row, "task": REAL, "depth": None} for row in rows])


#
# tables
#


def cell(entry: Row, score: str) -> str:
    """A score, its interval, and the difference from the first method's."""
    if score not in entry:
        return "–"
    own = entry[score]
    text = f"{own['mean']:.2f}"
    if "interval" in own:
        text += " [{:.2f}, {:.2f}]".format(*own["interval"])
    if "difference" in own:
        text += f"  {own['difference']:+.2f}"
    if "difference_interval" in own:
        text += " [{:+.2f}, {:+.2f}]".format(*own["difference_interval"])
    return text


def tables(contents: Row) -> list[tuple[str, list[int], list[tuple[str, list[str]]]]]:
    """For each task and score: its title, lengths, and rows of (method, cells)."""
    found = []
    summary = contents["summary"]
    tasks = list(dict.fromkeys(entry["task"] for entry in summary))
    if not {f"{REAL}/literal", f"{REAL}/paraphrase"} <= set(tasks):
        tasks = [task for task in tasks if task != FACTS]
    for task in tasks:
        entries = {(entry["method"], entry["length"]): entry for entry in summary if entry["task"] == task}
        lengths = sorted({length for _, length in entries})
        methods = list(dict.fromkeys(method for method, _ in entries))
        counts = sorted({entry["n"] for entry in entries.values()})
        n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        for score, what in SCORES.items():
            if any(score in entry for entry in entries.values()):
                title = f"{task}: {what}; {n} items a cell"
                rows = [
                    (m, [cell(entries[m, length], score) if (m, length) in entries else "–" for length in lengths])
                    for m in methods
                ]
                found.append((title, lengths, rows))
    return found


def rich_tables(contents: Row) -> list[Table | str]:
    """The tables for a terminal."""
    train_length = contents["settings"]["model"]["train_length"]
    out: list[Table | str] = [rich_table(*made, train_length) for made in tables(contents)]
    first = contents["summary"][0]["method"] if contents["summary"] else ""
    return [*out, f"95 % intervals. Behind them: the difference from {first}, over the same items, by document."]


#
# pictures
#


def figure(contents: Row) -> Figure:
    """Every task and score by length."""
    summary = contents["summary"]
    shown = [
        (task, score)
        for task in dict.fromkeys(entry["task"] for entry in summary)
        for score in SCORES
        if any(entry["task"] == task and score in entry for entry in summary)
    ]
    n_columns = min(3, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    made = plot.new_figure(1 + 4.5 * n_columns, 0.6 + 3.2 * n_rows)
    for axes, (task, score) in zip(made.subplots(n_rows, n_columns, squeeze=False).flat, shown, strict=False):
        _draw(axes, task, score, contents)
    made.suptitle(f"{contents['settings']['model']['name']}, {contents['settings']['style']}")
    return made


def _draw(axes: Axes, task: str, score: str, contents: Row) -> None:
    entries: list[Any] = [entry for entry in contents["summary"] if entry["task"] == task and score in entry]
    train_length = contents["settings"]["model"]["train_length"]
    for method in dict.fromkeys(entry["method"] for entry in entries):
        mine = [entry for entry in entries if entry["method"] == method]
        axes.plot([e["length"] for e in mine], [e[score]["mean"] for e in mine], "o-", label=method, markersize=4)
    axes.axvline(train_length, color="grey", linestyle=":", linewidth=1)
    lengths = sorted({entry["length"] for entry in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_name(length, train_length) for length in lengths])
    axes.minorticks_off()
    if score != "logprob":
        axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"{task}, {score}", fontsize="small")
    axes.legend(fontsize="x-small", framealpha=0.5)
