"""Writes experiments/RESULTS.md from what `mesa-gguf eval` and `mesa-gguf bench` measured.

    python experiments/results.py experiments/results --output experiments/RESULTS.md

Takes folders and looks through them for the JSON files of the two, whatever they are called. Several files of `eval` for one
task, with the same settings of it, and one model become one table, in which each cell is from the file that has the most items
for it. Files with options of Mesa (--chunk and the like) or of the KV cache become rows of an ablation, together with the plain
file beside them, if there is one. Files of `eval real` come first, each with its own tables; models that this project trained come last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesa_gguf.lab.evaluate import real_report, report
from mesa_gguf.lab.evaluate.real import REAL
from mesa_gguf.lab.evaluate.report import cell, length_name, tables
from mesa_gguf.lab.evaluate.run import sort_key
from mesa_gguf.lab.evaluate.tasks import TASKS

INTRODUCTION = """\
# Results

Written by `python experiments/results.py {folders} --output {output}` from the JSON files of `mesa-gguf eval`
and `mesa-gguf bench`; nothing here is typed by hand. The same command draws the pictures of `eval`; the commands of `eval` and `bench` stand above
their tables, and `experiments/measure.py` runs them. Pictures of single runs, which are not shown here, were in the repository up to
version 0.1.

What is measured, and how, is in [EVALUATION.md](../docs/EVALUATION.md). In brackets stand 95 % intervals, Wilson's for shares; items of the
same document are not independent of each other, so that true intervals are wider. Those of differences, item by item, take that into
account. A length is that of prompt and answer together; T is the trained length. Up to T all methods that read a text in one go are the same computation.
"""
GROUPS = ("passkey", "niah", "ruler", "qa", "ppl")
MESA = "mesa"
TRAINED_HERE = "mesa-"
"""What the names of the models begin with that this project trained."""

Contents = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A file of results."""

    path: Path
    contents: Contents

    @property
    def settings(self) -> Contents:
        return self.contents["settings"]

    @property
    def group(self) -> str:
        return str(self.settings["task"]["name"])

    @property
    def model(self) -> str:
        return str(self.settings["model"]["name"])

    @property
    def train_length(self) -> int:
        return int(self.settings["model"]["train_length"])

    @property
    def options(self) -> dict[str, Any]:
        return {**self.settings["mesa"], **self.settings["engine"]}

    def scores(self, task: str, method: str, length: int) -> dict[str, float]:
        """By item; empty where the file is of a version that did not keep them."""
        for entry in self.contents.get("scores", []):
            if (entry["task"], entry["method"], entry["length"]) == (task, method, length):
                return dict(entry["values"])
        return {}


@dataclass(frozen=True)
class Merged:
    """All plain files of a task with the same settings (of "ppl": the same windows) and a model.

    Attributes:
        contents: as of one file.
        sources: which file a (task, method, length) is from.
        files: all of them.
        picture: of all that is in contents.
    """

    contents: Contents
    sources: dict[tuple[str, str, int], Measured]
    files: list[Measured]
    picture: Path

    @property
    def train_length(self) -> int:
        return int(self.contents["settings"]["model"]["train_length"])


def merge(files: list[Measured], name: str) -> Merged:
    """Each (task, method, length) from the file with the most items for it; of those that have as many, the first that tells
    them one by one. Where there are several files, a picture of that name is drawn into the folder that theirs are in. That of a
    single file is drawn where it is not there."""

    def key(entry: Contents) -> tuple[str, str, int]:
        return entry["task"], entry["method"], entry["length"]

    best: dict[tuple[str, str, int], tuple[tuple[int, bool], Measured]] = {}
    for one in files:
        for entry in one.contents["summary"]:
            rank = (entry["n"], bool(one.scores(*key(entry))))
            if key(entry) not in best or rank > best[key(entry)][0]:
                best[key(entry)] = (rank, one)
    sources = {found: one for found, (_, one) in best.items()}

    def chosen(entries: Callable[[Contents], list[Contents]]) -> list[Contents]:
        mine = [entry for one in files for entry in entries(one.contents) if sources[key(entry)] is one]
        return sorted(mine, key=lambda entry: sort_key({"seed": 0, "index": 0, "depth": None, **entry}))

    first, summary = files[0], chosen(lambda contents: contents["summary"])
    commands = [line for one in files for line in one.contents["run"]["command"].splitlines()]
    contents = {
        "settings": first.settings,
        "not_able": report.not_able(summary, first.train_length),
        "summary": summary,
        "by_depth": chosen(lambda contents: contents["by_depth"]),
        "run": {"command": "\n".join(dict.fromkeys(commands))},
    }
    picture = first.path.with_suffix(".png")
    if len(files) > 1:
        picture = first.path.parent.parent / f"{name}.png"
    if len(files) > 1 or not picture.exists():
        report.figure(contents).savefig(picture, dpi=90)
    return Merged(contents, sources, files, picture)


def find(folders: list[Path]) -> tuple[list[Measured], list[Measured], list[tuple[Path, Contents]]]:
    """All files of results in folders, in the order of their names: of `eval real`, of other tasks, and of `bench`."""
    real, found, benches = [], [], []
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            contents = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(contents, dict) and {"settings", "summary", "run"} <= contents.keys():
                if contents["settings"]["task"]["name"] == REAL:
                    real.append(Measured(path, contents))
                elif contents["settings"]["task"]["name"] in GROUPS:
                    found.append(Measured(path, contents))
            elif isinstance(contents, dict) and {"command", "machine", "results"} <= contents.keys():
                benches.append((path, contents))
    if not real and not found and not benches:
        raise SystemExit(f"no results of mesa-gguf eval or bench in {', '.join(map(str, folders))}")
    return real, sorted(found, key=lambda one: one.model.startswith(TRAINED_HERE)), benches


def check_defaults(measured: list[Measured]) -> None:
    """Raise SystemExit where two files have a method with other defaults. Files of before they were kept are not checked."""
    seen: dict[tuple[str, str], tuple[Contents, Path]] = {}
    for one in measured:
        for method in dict.fromkeys(entry["method"] for entry in one.contents["summary"]):
            own = one.settings.get("defaults", {}).get(method)
            if own is None:
                continue
            own = {"reading_length": one.train_length} | own  # files of before there was one
            other, path = seen.setdefault((one.model, method), (own, one.path))
            changed = [
                f"{name} {other.get(name)} and {own.get(name)}" for name in own if own.get(name) != other.get(name)
            ]
            if changed:
                raise SystemExit(
                    f"{path} and {one.path} were measured with other defaults of {method} ({', '.join(changed)}): delete the older one"
                )


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def heads(lengths: list[int], train_length: int) -> list[str]:
    return [length_name(length, train_length) for length in lengths]


def commands(contents: Contents) -> Iterator[str]:
    yield from (f"    {line}" for line in contents["run"]["command"].splitlines())


def accuracy(group: str, merged: Merged, folder: Path) -> Iterator[str]:
    """The tables and the picture of a task."""
    yield from commands(merged.contents)
    yield ""
    for title, lengths, rows, note in tables(merged.contents):
        yield f"{title}."
        yield ""
        yield from table(["method", *heads(lengths, merged.train_length)], [[name, *cells] for name, cells in rows])
        if note:
            yield note
            yield ""
    yield f"![{group} by length]({os.path.relpath(merged.picture, folder)})"
    yield ""


def per_document(task: str, settings: Contents) -> int:
    """How many items a document has."""
    return TASKS[task].n_items(settings["task"]["n_facts"]) if "n_facts" in settings["task"] else 1


def difference(found: tuple[float, float, float] | None) -> str:
    """A lead in the items that both have."""
    if found is None:
        return "–"
    return (
        f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]"
        if math.isfinite(found[1])
        else f"{found[0]:+.3f} (one document)"
    )


def behind(merged: Merged) -> list[list[str]]:
    """Where another method has the better number past T: in the items that both have, if those are known."""
    entries = {(e["task"], e["length"], e["method"]): e for e in merged.contents["summary"]}
    rows = []
    for (task, length, method), entry in entries.items():
        own = entries.get((task, length, MESA))
        if (
            method.partition(",")[0] == MESA
            or own is None
            or length <= merged.train_length
            or task in merged.contents["not_able"]
        ):
            continue
        source = merged.sources[task, method, length]
        theirs = source.scores(task, method, length)
        same = {item: score for one in merged.files for item, score in one.scores(task, MESA, length).items()}
        found = report.lead(theirs, same, per_document(task, source.settings))
        low_is_good = task == report.PPL
        if found is not None:
            better = found[0] < 0 if low_is_good else found[0] > 0
        else:
            better = entry["loss"] < own["loss"] if low_is_good else entry["share"] > own["share"]
        if better:
            (low, high), (own_low, own_high) = entry["interval"], own["interval"]
            overlap = "overlap" if low <= own_high and own_low <= high else "do not overlap"
            name = length_name(length, merged.train_length)
            rows.append([task, name, cell(own), method, cell(entry), overlap, difference(found)])
    return rows


def speed(measured: list[Merged]) -> Iterator[str]:
    """How fast documents were read, by method and length, as a multiple of Mesa's speed: medians over tasks and files."""
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in (file for merged in measured for file in merged.files):
        timings = one.contents["run"]["timings"]
        own = {
            (entry["task"], entry["length"]): entry["read_tokens_per_s"] for entry in timings if entry["method"] == MESA
        }
        for entry in timings:
            key = (entry["task"], entry["length"])
            if entry["method"] != MESA and key in own:  # other files are of other days, and perhaps machines
                ratios[entry["method"]][entry["length"]].append(entry["read_tokens_per_s"] / own[key])
    ranks = report.ranks_of(ratios)
    methods = sorted(ratios, key=lambda method: ranks[method])
    lengths = sorted({length for row in ratios.values() for length in row})
    rows = [
        [method, *(f"{statistics.median(found):.2f}" if (found := ratios[method].get(n)) else "–" for n in lengths)]
        for method in methods
    ]
    yield from table(["method", *heads(lengths, measured[0].train_length)], rows)


def ablation(default: Measured, others: list[Measured]) -> Iterator[str]:
    """Mesa's number by length under each set of options, and how far it is from that under the default ones."""

    def name(one: Measured) -> str:
        names = sorted({*default.options, *one.options})
        changed = [f"{key} {one.options.get(key)}" for key in names if one.options.get(key) != default.options.get(key)]
        return ", ".join(changed) or "default"

    for task in dict.fromkeys(entry["task"] for entry in default.contents["summary"]):
        rows, differences, lengths = [], [], set()
        for one in (default, *others):
            entries = {e["length"]: e for e in one.contents["summary"] if e["task"] == task and e["method"] == MESA}
            rows.append((name(one), entries))
            lengths |= entries.keys()
            if one is not default and one.settings["task"] == default.settings["task"]:
                scores = {n: (one.scores(task, MESA, n), default.scores(task, MESA, n)) for n in entries}
                size = per_document(task, one.settings)
                leads = {n: report.lead(*pair, size) for n, pair in scores.items() if all(pair)}
                differences.append((name(one), {n: difference(found) for n, found in leads.items()}))
        ordered = sorted(lengths)
        yield f"{task}:"
        yield ""
        cells = [[label, *(cell(entries.get(n)) for n in ordered)] for label, entries in rows if entries]
        yield from table(["options", *heads(ordered, default.train_length)], cells)
        shown = [(label, row) for label, row in differences if row]
        if shown:
            yield f"{task}, difference from the default's, item by item:"
            yield ""
            cells = [[label, *(row.get(n, "–") for n in ordered)] for label, row in shown]
            yield from table(["options", *heads(ordered, default.train_length)], cells)
    yield "Commands:"
    yield ""
    for one in (default, *others):
        yield from commands(one.contents)
    yield ""


def real_text(measured: list[Measured], folder: Path) -> Iterator[str]:
    """The tables and the picture of each file of `eval real`, model by model."""
    for model in dict.fromkeys(one.model for one in measured):
        yield f"## {model}: questions about real text"
        yield ""
        for one in (one for one in measured if one.model == model):
            yield from commands(one.contents)
            yield ""
            text = f'T = {one.train_length:,}, style "{one.settings["style"]}", {one.contents["run"]["machine"]}.'
            changed = ", ".join(f"{name} {value}" for name, value in one.options.items())
            yield f"{text} {changed}." if changed else text
            yield ""
            for title, lengths, rows in real_report.tables(one.contents):
                yield f"{title}."
                yield ""
                yield from table(
                    ["method", *heads(lengths, one.train_length)], [[name, *cells] for name, cells in rows]
                )
            picture = one.path.with_suffix(".png")
            if picture.exists():
                yield f"![Answers by length]({os.path.relpath(picture, folder)})"
                yield ""


def write(measured: list[Measured], folder: Path) -> Iterator[str]:
    """The sections, model by model."""
    models = dict.fromkeys((one.model, one.settings["model"]["fingerprint"]) for one in measured)
    for model in models:
        mine = [one for one in measured if (one.model, one.settings["model"]["fingerprint"]) == model]
        first = next((one for one in mine if not one.settings["mesa"]), mine[0])
        changed = [one for one in mine if one.settings["mesa"] or one.settings["engine"] != first.settings["engine"]]
        defaults = [one for one in mine if one not in changed]
        beside = {one.path.parent.parent for one in changed}
        plain = [one for one in defaults if one.path.parent.parent not in beside] or defaults
        machines = dict.fromkeys(one.contents["run"]["machine"] for one in mine)
        versions = ", ".join(f"{name} {version}" for name, version in first.settings["versions"].items())
        yield f"## {first.model}"
        yield ""
        yield f'T = {first.train_length}, style "{first.settings["style"]}". {versions}. Measured on {"; ".join(machines)}.'
        yield ""
        groups = sorted({one.group for one in plain}, key=GROUPS.index)
        results: list[Merged] = []
        for group in groups:
            yield f"### {group}"
            yield ""
            alike: dict[str, list[Measured]] = {}
            for one in plain:
                if one.group == group:
                    alike.setdefault(json.dumps(one.settings["task"]), []).append(one)
            for number, files in enumerate(alike.values(), start=1):
                name = f"{Path(first.model).stem}-{group}"
                results.append(merge(files, name if number == 1 else f"{name}-{number}"))
                yield from accuracy(group, results[-1], folder)
        if any(entry["method"] != MESA for merged in results for entry in merged.contents["summary"]):
            yield "### Where Mesa is behind"
            yield ""
            rows = [row for merged in results for row in behind(merged)]
            if rows:
                head = [
                    "task",
                    "length",
                    "mesa",
                    "method",
                    "its number",
                    "intervals",
                    "its number - mesa's, item by item",
                ]
                yield from table(head, rows)
            else:
                yield "Nowhere past T does another method have the better number."
                yield ""
            yield "Tasks that the model cannot do within T are left out."
            yield ""
            yield "### Reading speed"
            yield ""
            yield "As a multiple of Mesa's in the same runs, the median over tasks; the machine may have had other work to do."
            yield ""
            yield from speed(results)
        if changed:
            yield "### Ablation"
            yield ""
            for group in sorted({one.group for one in changed}, key=GROUPS.index):
                others = [one for one in changed if one.group == group]
                with_defaults = [one for one in defaults if one.group == group]
                with_defaults.sort(
                    key=lambda one: one.path.parent.parent not in beside
                )  # the one beside them: the same items
                default, *others = [*with_defaults[:1], *others]
                yield from ablation(default, others)


def number(value: float | None, divisor: float = 1.0) -> str:
    return "–" if value is None else f"{value / divisor:,.{1 if value / divisor < 100 else 0}f}"


def speed_and_memory(path: Path, contents: Contents, folder: Path) -> Iterator[str]:
    """The tables and the picture of a file of `bench`."""
    model, machine, settings = contents["model"], contents["machine"], contents["settings"]
    yield f"### {model['name']}{', random weights' if model['random_weights'] else ''}"
    yield ""
    yield f"    {contents['command']}"
    yield ""
    yield (
        f"T = {model['train_length']}; {machine['cpu']}, {settings['threads']} threads; KV {settings['type_k']}/{settings['type_v']}, "
        f"flash attention {'on' if settings['flash_attn'] else 'off'}; medians of {settings['runs']}, lengths and methods in turn; "
        f"load of the machine at the start {machine['load']:.1f}."
    )
    yield ""
    head = [
        "tokens",
        "method",
        "prefill, tokens/s",
        "first token, s",
        "decode, tokens/s",
        "memory, MiB",
        "weights",
        "KV",
        "compute",
    ]
    against = contents["baseline"]
    if against is not None:
        head += [f"prefill time / {against}", f"memory / {against}"]
    rows = []
    for result in contents["results"]:
        buffers, ratios = result["buffers"] or {}, result["ratios"] or {}
        row = [f"{result['tokens']:,}", result["method"] + ("\\*" if result["decode_only"] else "")]
        row += [number(result[key]) for key in ("prefill_tokens_per_s", "first_token_s", "decode_tokens_per_s")]
        row += [number(result["memory_bytes"], 2**20)]
        compute = buffers["compute"] + buffers["output"] if buffers else None
        row += [number(size, 2**20) for size in (buffers.get("weights"), buffers.get("kv"), compute)]
        if against is not None:
            row += [f"{ratios[key]['median']:.2f}" if key in ratios else "–" for key in ("prefill_time", "memory")]
        rows.append(row)
    yield from table(head, rows)
    if any(result["decode_only"] for result in contents["results"]):
        yield "\\* decodes after the text that Mesa has read, on the same number of keys."
        yield ""
    shortest = min((r["tokens"] for r in contents["results"] if r["method"] == MESA), default=0)
    for tokens, ratio in contents["flatness"].items():
        yield f"Mesa: a token of a text of {int(tokens):,} takes {ratio['median']:.2f} times as long to read as one of {shortest:,}."
        yield ""
    picture = path.with_suffix(".png")
    if picture.exists():
        yield f"![Memory, latency and decoding by length]({os.path.relpath(picture, folder)})"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    head = INTRODUCTION.format(folders=" ".join(map(str, args.folders)), output=args.output)
    real, measured, benches = find(args.folders)
    check_defaults(measured)
    lines = [head, *real_text(real, args.output.parent), *write(measured, args.output.parent)]
    if benches:
        lines += ["## Memory and latency", ""]
        lines += [line for bench in benches for line in speed_and_memory(*bench, args.output.parent)]
    args.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
