"""What a library saves: tokens computed again after edits, and times to the first token, on a real model.

    python experiments/library.py prepare -m MODEL --text book.txt --tokens 32768 --folder work   # once; reads the text
    python experiments/library.py edits   -m MODEL --folder work                                   # needs the tokenizer alone
    python experiments/library.py same    -m MODEL --folder work                                   # order, subset, collection, bytes
    python experiments/library.py again   -m MODEL --folder work                                   # new processes, timed
    python experiments/library.py stock   -m MODEL --folder work --stock-tokens 8192               # what they are compared with
    python experiments/library.py first   -m MODEL --folder work --tokens 8192                     # first reading, with and without

Each prints JSON. Stock's prefill is measured in batches of 512 up to --stock-tokens. What a batch takes grows evenly with what stands before it, so what the
whole text takes follows from a line through them (`whole`); `at_least` is what was measured, multiplied by the share of the text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mesa_gguf import MesaConfig, Reader
from mesa_gguf.lab.facts import Haystack, load_text
from mesa_gguf.library.library import Library
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import context_for, load_model, load_vocabulary
from mesa_gguf.reading.shelf import Catalogue

BATCH = 512  # tokens
QUESTION = "What does the text say about ownership?"
SENTENCE = (
    "The committee met again on Tuesday and agreed to postpone the vote until the harbour report number {n} is ready."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "edits", "same", "again", "stock", "first"))
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--stock-tokens", type=int, default=8192)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--question", action="append", help="of again; may be repeated")
    parser.add_argument("--times", type=int, default=3, help="that each question is asked, with another number in it")
    given = parser.parse_args()
    print(json.dumps(globals()[f"measure_{given.what}"](given)))


def document_of(given: argparse.Namespace) -> Path:
    return Path(given.folder) / "document.txt"


def measure_prepare(given: argparse.Namespace) -> dict[str, Any]:
    """A document of so many tokens, read into a library."""
    given.folder.mkdir(parents=True, exist_ok=True)
    form = PromptForm(load_vocabulary(given.model))
    text = Haystack(load_text([given.text])).text
    borders = Haystack(text).borders
    low, high = 0, len(borders) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if len(form.tokenize(text[: borders[middle]])) <= given.tokens:
            low = middle
        else:
            high = middle - 1
    document_of(given).write_text(text[: borders[low]], encoding="utf-8")
    threads = [] if given.threads is None else ["--threads", str(given.threads)]
    start = time.perf_counter()
    command = ["library", "add", str(document_of(given)), "-m", str(given.model), *threads]
    mesa_gguf(given, *command)
    return {"n_tokens": len(form.tokenize(text[: borders[low]])), "seconds": round(time.perf_counter() - start, 1)}


def mesa_gguf(given: argparse.Namespace, *arguments: str) -> str:
    """Run the program as a person does, in a process of its own."""
    command = [sys.executable, "-m", "mesa_gguf", *arguments, "--library", str(given.folder / "library")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout


def measure_edits(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens of chunks that are new after an edit, as shares of the document's."""
    rng = random.Random(given.seed)
    text = document_of(given).read_text(encoding="utf-8")
    form = PromptForm(load_vocabulary(given.model))
    found: dict[str, list[float]] = {"changed": [], "inserted": [], "at the beginning": []}
    with tempfile.TemporaryDirectory() as folder, Library(folder, budget=10**12) as library:
        catalogue = Catalogue(form.vocabulary, form, library)

        def chunks(edited: str, name: str) -> list[tuple[int, ...]]:
            document = library.add_text(edited, name)
            made = [tuple(catalogue.piece(document, row).tokens) for row in catalogue.rows(document)]
            library.remove(document)
            return made

        before = set(chunks(text, "document"))
        n_tokens = sum(map(len, before))
        paragraphs = [start for start in range(len(text)) if start == 0 or text.startswith("\n\n", start - 2)]
        for n in range(given.edits):
            sentence = SENTENCE.format(n=n)
            at = rng.choice(paragraphs)
            end = text.find("\n\n", at) if text.find("\n\n", at) >= 0 else len(text)
            kind = ("changed", "inserted", "at the beginning")[n % 3]
            if kind == "changed":
                middle = text.rfind(" ", at, (at + end) // 2 + 1)
                middle = middle if middle >= 0 else at
                edited = f"{text[:middle]} {sentence} {text[middle:]}"
            elif kind == "inserted":
                edited = f"{text[:at]}{sentence}\n\n{text[at:]}"
            else:
                edited = f"{sentence}\n\n{text}"
            new = sum(len(chunk) for chunk in chunks(edited, f"edit {n}") if chunk not in before)
            found[kind].append(new / n_tokens)
    every = sorted(share for shares in found.values() for share in shares)
    return {
        "n_tokens": n_tokens,
        "chunks": len(before),
        "n": len(every),
        "median": round(statistics.median(every), 4),
        "p95": round(every[int(0.95 * (len(every) - 1))], 4),
        "largest": round(every[-1], 4),
        "median_by_kind": {kind: round(statistics.median(shares), 4) for kind, shares in found.items() if shares},
    }


def measure_same(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens computed for another question, subset, order and collection; bytes on disk against those in memory."""
    with Library(given.folder / "library") as library:
        (document,) = library.documents()
        text = library.text(document)
        form = PromptForm(load_vocabulary(given.model))
        catalogue = Catalogue(form.vocabulary, form, library)
        every = [catalogue.piece(document, row) for row in catalogue.rows(document)]
        n_tokens = sum(len(piece.tokens) for piece in every)
        llm = load_model(given.model, n_ctx=context_for(n_tokens // 2 + 512, 8), n_threads=given.threads)
        shelf = Reader(llm, catalogue=catalogue).shelf
        assert shelf is not None
        _, reversed_order, _ = shelf.put_together(every[: len(every) // 2][::-1])
        _, subset, _ = shelf.put_together(every[::3])
        n_preamble, size = len(catalogue.preamble), llm.chunk_size(1000) - llm.chunk_size(0 + 1)
        per_token = size / 999
        llm.close()
        kept = {row.key: row.size for row in library.index.kept()}
        memory = sum(len(piece.tokens) for piece in every) * per_token
        return {
            "n_tokens": n_tokens,
            "computed": {"other order": reversed_order, "subset": subset},
            "preamble": n_preamble,
            "bytes_on_disk": sum(kept.values()),
            "kv_bytes": round(memory),
            "ratio": round(sum(kept.values()) / memory, 4),
            "characters": len(text),
        }


def measure_again(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token of a new process, from its start to its end with an answer of one token, and of all CPUs; in turns."""
    cells = [(read, question) for read in ("all", "auto") for question in given.question or [QUESTION]]
    threads = [] if given.threads is None else ["--threads", str(given.threads)]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
    for n in range(given.times):
        for read, question in cells:
            asked = f"{question.rstrip('?')} ({n})?"
            command = ["ask", "-m", str(given.model), "-f", str(document_of(given)), asked, "--read", read, *threads]
            start, used = time.perf_counter(), cpu_of_children()
            answer = json.loads(mesa_gguf(given, *command, "--max-tokens", "1", "--json"))
            took = {"process_s": time.perf_counter() - start, "cpu_s": cpu_of_children() - used}
            found[read, question].append(answer["read"] | answer["timings"] | took)
    return {
        f"{read}: {question}": {
            "n": len(runs),
            **{s: round(statistics.median(run[s] for run in runs), 2) for s in ("process_s", "first_token_s", "cpu_s")},
            **{name: runs[-1][name] for name in ("chunks", "tokens_computed", "tokens_reused", "compared")},
        }
        for (read, question), runs in found.items()
    }


def cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def measure_stock(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds that stock llama.cpp takes for the beginning of the text, and at least takes for all of it."""
    text = document_of(given).read_text(encoding="utf-8")
    form = PromptForm(load_vocabulary(given.model))
    tokens = form.head(text)
    config = MesaConfig(enabled=False)
    n_ctx = context_for(given.stock_tokens, 8)
    llm = load_model(given.model, mesa=config, n_ctx=n_ctx, n_threads=given.threads, n_threads_batch=given.threads)
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    places = range(0, given.stock_tokens, BATCH)
    took: dict[str, list[float]] = {name: [] for name in clocks}
    for place in places:
        begin = {name: clock() for name, clock in clocks.items()}
        llm.eval(tokens[place : min(place + BATCH, given.stock_tokens)])
        for name, clock in clocks.items():
            took[name].append(clock() - begin[name])
    llm.close()
    out: dict[str, Any] = {"n_tokens": given.stock_tokens, "of": len(tokens)}
    for name, batches in took.items():
        more, first = np.polyfit(list(places)[:-1], batches[:-1], 1)  # the last batch may be shorter
        whole = sum(first + more * place for place in range(0, len(tokens), BATCH))
        out[name] = round(sum(batches), 2)
        out[f"whole_{name}"] = round(whole, 1)
        out[f"at_least_{name}"] = round(sum(batches) * len(tokens) / given.stock_tokens, 1)
    return out


def measure_first(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds to read a text first, into a library and without one, in turns."""
    text = document_of(given).read_text(encoding="utf-8")
    form = PromptForm(load_vocabulary(given.model))
    share = min(1.0, given.tokens / len(form.tokenize(text)))
    text = text[: int(len(text) * share)]
    head = form.head(text)
    n_ctx = context_for(len(head) + 512, 8)
    times: dict[str, list[float]] = {"library": [], "without": []}
    llm = load_model(given.model, n_ctx=n_ctx, n_threads=given.threads, n_threads_batch=given.threads)
    for n in range(2):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder, Library(folder, budget=10**12) as library:
            document = library.add_text(text, f"part {n}")
            reader = Reader(llm, library)
            start = time.perf_counter()
            with reader.ask(QUESTION, documents=[document], read="all", max_tokens=1) as stream:
                next(stream, None)
            times["library"].append(time.perf_counter() - start)
        reader = Reader(llm, form=form)
        start = time.perf_counter()
        reader.read(head)
        with reader.ask(QUESTION, max_tokens=1) as stream:
            next(stream, None)
        times["without"].append(time.perf_counter() - start)
    llm.close()
    best = {name: min(values) for name, values in times.items()}
    ratio = round(best["library"] / best["without"], 3)
    return {"n_tokens": len(head), "seconds": {k: [round(v, 2) for v in vs] for k, vs in times.items()}, "ratio": ratio}


if __name__ == "__main__":
    main()
