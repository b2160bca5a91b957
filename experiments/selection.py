"""Which chunks a question reads: how often the one that holds the fact is among 2,048 tokens of them.

    python experiments/selection.py -m model.gguf --seeds 1 2 -o selection.json

Facts are put into real text (mesa_gguf.lab.facts) and asked for literally and in other words; other words keep the name that the fact is about, where
it has one, and share no word with it where it has none.

    words        BM25 over the chunks (SQLite's FTS5), as `auto` selects
    likelihood 8 the 8 best of these, ordered by log p(question | chunk)
    likelihood   all chunks, ordered by that
    hidden       the mean of the model's last hidden states: the chunk with the passage that is nearest to the question
    tokens       the model's input embeddings: each word of the question finds the nearest token of a chunk, rare words counting more
    words, X     words first, and X for the second half of the tokens
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mesa_gguf import Library, MesaLlama
from mesa_gguf.lab.facts import Haystack, default_text, load_text, make_document
from mesa_gguf.library.index import terms_of
from mesa_gguf.reading.citations import passages
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.shelf import Catalogue, Shelf

BUDGET = 2048
BEST = 8


def taken(order: list[int], sizes: list[int], budget: int = BUDGET) -> list[int]:
    """The first chunks of an order, as far as they fit."""
    found: list[int] = []
    total = 0
    for i in order:
        total += sizes[i]
        if found and total > budget:
            break
        found.append(i)
    return found


def input_embeddings(path: Path) -> Any:
    """Those of the vocabulary, centred, of length 1 [n_vocab, n_embd]."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    table = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    table -= table.mean(axis=0)
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def unit(vectors: Any) -> Any:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", help="files or folders; default: Python's documentation")
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--tokens", type=int, default=16384, help="of a document")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[], choices=["likelihood", "hidden", "tokens"])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    threads = dict(n_threads=args.threads, n_threads_batch=args.threads)
    llm = MesaLlama(args.model, n_ctx=1536, **threads)
    hidden = (
        None
        if "hidden" in args.without
        else MesaLlama(args.model, n_ctx=256, embedding=True, pooling_type=1, **threads)
    )  # mean
    table = None if "tokens" in args.without else input_embeddings(args.model)
    form = PromptForm(llm)
    haystack = Haystack(load_text(args.text) if args.text else default_text())
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        start = time.perf_counter()
        made = make_document(
            haystack, seed, args.tokens, lambda text: len(form.tokenize(text)),
            n_unlike=24, n_alike=8, n_links=0, n_counts=0, n_absent=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            document = library.add_text(made.text, "document")
            catalogue = Catalogue(llm, form, library)
            shelf = Shelf(llm, catalogue)
            text = library.text(document)
            rows = catalogue.rows(document)
            pieces = [catalogue.piece(document, row) for row in rows]
            sizes = [row.n_tokens for row in rows]
            number = {row.id: i for i, row in enumerate(rows)}
            if hidden is not None:
                own = [[p.text for p in passages(0, piece.text)] for piece in pieces]
                vectors = [np.asarray(hidden.embed(texts)) for texts in own]
                middle = np.concatenate(vectors).mean(axis=0)
            frequency = Counter(token for piece in pieces for token in set(piece.tokens))
            asked: list[dict[str, Any]] = []
            for question in made.questions:
                fact = made.facts[question.facts[0]]
                at = text.index(fact.sentence)
                gold = next(i for i, row in enumerate(rows) if row.start <= at < row.stop)
                found = library.index.search(question.text, catalogue._cut, [document.id], 256)
                words = list(dict.fromkeys([*(number[span] for span, _ in found), *range(len(rows))]))
                orders = {"words": words}
                if hidden is not None:
                    vector = unit(np.asarray(hidden.embed(question.text)) - middle)
                    near = [float((unit(own - middle) @ vector).max()) for own in vectors]
                    orders["hidden"] = sorted(range(len(rows)), key=lambda i: -near[i])
                if table is not None:
                    tokens = [t for term in terms_of(question.text) for t in form.tokenize(f" {term}")]
                    weight = np.array([np.log(1 + len(rows) / (1 + frequency[t])) for t in tokens])
                    soft = [float((table[tokens] @ table[piece.tokens].T).max(axis=1) @ weight) for piece in pieces]
                    orders["tokens"] = sorted(range(len(rows)), key=lambda i: -soft[i])
                asked.append(
                    dict(question=question, gold=gold, orders=orders, score=np.zeros(len(rows)), alike=fact.is_alike)
                )
            if "likelihood" not in args.without:
                for i, piece in enumerate(pieces):  # each is loaded once
                    head, _, _ = shelf.put_together([piece])
                    for one in asked:
                        llm.n_tokens = len(head)
                        one["score"][i] = llm.log_likelihoods(form.tail(one["question"].text)).sum()
                for one in asked:
                    score, words = one["score"], one["orders"]["words"]
                    one["orders"]["likelihood"] = sorted(range(len(rows)), key=lambda i: -score[i])
                    one["orders"][f"likelihood {BEST}"] = [
                        *sorted(words[:BEST], key=lambda i: -score[i]),
                        *words[BEST:],
                    ]
            for one in asked:
                by = {name: one["gold"] in taken(order, sizes) for name, order in one["orders"].items()}
                first = taken(one["orders"]["words"], sizes, BUDGET // 2)
                for name in ("likelihood", "hidden", "tokens"):
                    if name in one["orders"]:
                        both = list(dict.fromkeys([*first, *one["orders"][name]]))
                        by[f"words, {name}"] = one["gold"] in taken(both, sizes)
                kind = one["question"].form if one["question"].form == "literal" else "other words, the name"
                if kind != "literal" and not one["alike"]:
                    kind = "other words"
                results.append(dict(seed=seed, kind=kind, **by))
        if args.output:
            args.output.write_text(json.dumps(results, indent=1))
        print(f"after document {seed}: {len(rows)} chunks, {time.perf_counter() - start:.0f} s")
        names = [name for name in results[0] if name not in ("seed", "kind")]
        for kind in ("literal", "other words, the name", "other words"):
            of = [result for result in results if result["kind"] == kind]
            print(
                f"  {kind}, {len(of)}:",
                ", ".join(f"{n} {sum(r[n] for r in of) / len(of):.2f}" for n in names),
                flush=True,
            )


if __name__ == "__main__":
    main()
