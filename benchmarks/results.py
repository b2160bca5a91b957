"""Writes docs/RESULTS.md from what `mesa-gguf eval` and `mesa-gguf bench` measured.

    python benchmarks/results.py docs/results --output docs/RESULTS.md

Takes folders and looks through them for the JSON files of the two, whatever they are called. Files of `eval` with options of
Mesa (--chunk and the like) or of the KV cache that differ from the ones of a plain run become rows of an ablation.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesa_gguf.evaluate.report import cell, length_name, tables

INTRODUCTION = """\
# Results

Written by `python benchmarks/results.py {folders} --output {output}` from the JSON files of `mesa-gguf eval`
and `mesa-gguf bench`; nothing here is typed by hand. What is measured, and how, is in [EVALUATION.md](EVALUATION.md). In brackets stand 95 % intervals, Wilson's
for shares; items of the same document are not independent of each other, so that true intervals are wider. A length is that
of prompt and answer together; T is the trained length. Up to T all methods are the same computation.
"""
GROUPS = ("passkey", "niah", "ruler", "qa", "ppl")
MESA = "mesa"

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


def find(folders: list[Path]) -> tuple[list[Measured], list[tuple[Path, Contents]]]:
    """All files of results in folders, in the order of their names: of `eval`, and of `bench`."""
    found, benches = [], []
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            contents = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(contents, dict) and {"settings", "summary", "run"} <= contents.keys():
                found.append(Measured(path, contents))
            elif isinstance(contents, dict) and {"command", "machine", "results"} <= contents.keys():
                benches.append((path, contents))
    if not found and not benches:
        raise SystemExit(f"no results of mesa-gguf eval or bench in {', '.join(map(str, folders))}")
    return found, benches


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def heads(lengths: list[int], train_length: int) -> list[str]:
    return [length_name(length, train_length) for length in lengths]


def commands(measured: Measured) -> Iterator[str]:
    yield from (f"    {line}" for line in measured.contents["run"]["command"].splitlines())


def accuracy(measured: Measured, folder: Path) -> Iterator[str]:
    """The tables and the picture of a file."""
    yield from commands(measured)
    yield ""
    for title, lengths, rows, note in tables(measured.contents):
        yield f"{title}."
        yield ""
        yield from table(["method", *heads(lengths, measured.train_length)], [[name, *cells] for name, cells in rows])
        if note:
            yield note
            yield ""
    picture = measured.path.with_suffix(".png")
    if picture.exists():
        yield f"![{measured.group} by length]({os.path.relpath(picture, folder)})"
        yield ""


def behind(measured: Measured) -> list[list[str]]:
    """Where another method has the better number past T."""
    entries = {(e["task"], e["length"], e["method"]): e for e in measured.contents["summary"]}
    rows = []
    for (task, length, method), entry in entries.items():
        own = entries.get((task, length, MESA))
        if method == MESA or own is None or length <= measured.train_length or task in measured.contents["not_able"]:
            continue
        (low, high), (own_low, own_high) = entry["interval"], own["interval"]
        better = entry["loss"] < own["loss"] if task == "ppl" else entry["share"] > own["share"]
        if better:
            overlap = low <= own_high and own_low <= high
            rows.append(
                [task, length_name(length, measured.train_length), cell(own), method, cell(entry),
                 "overlap" if overlap else "do not overlap"]
            )  # fmt: skip
    return rows


def speed(measured: list[Measured]) -> Iterator[str]:
    """Tokens a second while documents were read, by method and length; of all tasks the fastest median."""
    best: dict[str, dict[int, int]] = defaultdict(dict)
    for one in measured:
        for entry in one.contents["run"]["timings"]:
            row = best[entry["method"]]
            row[entry["length"]] = max(row.get(entry["length"], 0), entry["read_tokens_per_s"])
    lengths = sorted({length for row in best.values() for length in row})
    rows = [[method, *(f"{row[n]:,}" if n in row else "–" for n in lengths)] for method, row in best.items()]
    yield from table(["method", *heads(lengths, measured[0].train_length)], rows)


def ablation(plain: Measured, others: list[Measured]) -> Iterator[str]:
    """Mesa's number by length under each set of options."""
    tasks = dict.fromkeys(entry["task"] for entry in plain.contents["summary"])
    for task in tasks:
        rows, lengths = [], set()
        for one in (plain, *others):
            entries = {e["length"]: e for e in one.contents["summary"] if e["task"] == task and e["method"] == MESA}
            changed = [
                f"{name} {one.options.get(name)}"
                for name in sorted({*plain.options, *one.options})
                if one.options.get(name) != plain.options.get(name)
            ]
            rows.append((", ".join(changed) or "default", entries))
            lengths |= entries.keys()
        ordered = sorted(lengths)
        yield f"{task}:"
        yield ""
        cells = [[name, *(cell(entries.get(n)) for n in ordered)] for name, entries in rows if entries]
        yield from table(["options", *heads(ordered, plain.train_length)], cells)
    yield "Commands:"
    yield ""
    for one in others:
        yield from commands(one)
    yield ""


def write(measured: list[Measured], folder: Path) -> Iterator[str]:
    """The sections, model by model."""
    models = dict.fromkeys(one.model for one in measured)
    for model in models:
        mine = [one for one in measured if one.model == model]
        plain = [one for one in mine if not one.settings["mesa"]]
        first = mine[0]
        machines = dict.fromkeys(one.contents["run"]["machine"] for one in mine)
        versions = ", ".join(f"{name} {version}" for name, version in first.settings["versions"].items())
        yield f"## {model}"
        yield ""
        yield f'T = {first.train_length}, style "{first.settings["style"]}". {versions}. Measured on {"; ".join(machines)}.'
        yield ""
        defaults: dict[str, Measured] = {}
        for one in plain:
            defaults.setdefault(one.group, one)  # the first in the order of names
        for group in sorted(defaults, key=GROUPS.index):
            yield f"### {group}"
            yield ""
            yield from accuracy(defaults[group], folder)
        rows = [row for group in sorted(defaults, key=GROUPS.index) for row in behind(defaults[group])]
        if defaults:
            yield "### Where Mesa is behind"
            yield ""
            if rows:
                yield from table(["task", "length", "mesa", "method", "its number", "intervals"], rows)
            else:
                yield "Nowhere past T does another method have the better number."
                yield ""
            yield "Tasks that the model cannot do within T are left out."
            yield ""
            yield "### Reading speed"
            yield ""
            yield "Tokens a second, the median of the task that was quickest; the machine may have had other work to do."
            yield ""
            yield from speed(list(defaults.values()))
        changed = [one for one in mine if one not in defaults.values()]
        if changed:
            yield "### Ablation"
            yield ""
            for group in sorted({one.group for one in changed}, key=GROUPS.index):
                others = [one for one in changed if one.group == group]
                yield from ablation(defaults.get(group, others[0]), others if group in defaults else others[1:])


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
    head = ["tokens", "method", "prefill, tokens/s", "first token, s", "decode, tokens/s", "memory, MiB", "weights", "KV", "compute"]
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
    measured, benches = find(args.folders)
    lines = [head, *write(measured, args.output.parent)]
    if benches:
        lines += ["## Memory and latency", ""]
        lines += [line for bench in benches for line in speed_and_memory(*bench, args.output.parent)]
    args.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
