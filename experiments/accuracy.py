"""Exact answers of the bundled model by length and depth, with Mesa and in stock mode.

    python experiments/accuracy.py --output experiments/accuracy.json --plot experiments/accuracy.png

Every document holds 20 look-alike facts at depths 0.025 … 0.975; each is asked for. With --two-hop it holds 10 facts and 10
links from one fact's key to another's; the fact at the end of each link is asked for. The documents are generated from
seeds that the training did not use. The table gives the share of exact answers and its 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from mesa_gguf import MesaConfig
from mesa_gguf.lab import documents
from mesa_gguf.lab.evaluate.scoring import wilson
from mesa_gguf.model.header import check_model
from mesa_gguf.model.hub import find_model
from mesa_gguf.reading.reader import Reader, load_model

N_FACTS = 20
FIRST_SEED = 77_000_000


def run(
    path: Path,
    n_tokens: int,
    n_documents: int,
    config: MesaConfig,
    threads: int | None,
    *,
    first_seed: int,
    two_hop: bool,
) -> dict[str, Any]:
    """Ask for every fact (or by way of every link) of n_documents documents of n_tokens tokens."""
    answers: list[dict[str, Any]] = []
    seconds = tokens = 0.0
    llm = load_model(path, n_ctx=n_tokens + 512, mesa=config, n_threads=threads, n_threads_batch=threads)
    reader = Reader(llm)
    for index in range(n_documents):
        n_links = N_FACTS // 2 if two_hop else 0
        document = documents.make_document(
            first_seed + 1000 * n_tokens + index, n_tokens, n_facts=N_FACTS - n_links, n_links=n_links
        )
        asked = document.two_hops if two_hop else document.facts
        depths = [fact.depth for fact in (document.links if two_hop else document.facts)]
        reading = reader.read(document.text)
        seconds += reading.seconds
        tokens += reading.n_tokens
        for fact, depth in zip(asked, depths):
            text = reader.ask(fact.question, max_tokens=48 if two_hop else 32).answer.text
            right = documents.is_right(fact, text)
            answers.append({"depth": round(depth, 4), "right": right, "document": index})
            if not right:
                answers[-1] |= {
                    "kind": fact.kind,
                    "question": fact.question,
                    "expected": fact.answer_sentence,
                    "answer": text,
                }
    llm.close()
    right = sum(a["right"] for a in answers)
    return {"tokens": n_tokens, "right": right, "total": len(answers), "interval": wilson(right, len(answers)),
            "prefill_tokens_per_second": tokens / seconds, "answers": answers}  # fmt: skip


def plot(results: dict[str, list[dict[str, Any]]], train_length: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for mode, rows in results.items():
        x = [row["tokens"] for row in rows]
        axes.plot(x, [row["right"] / row["total"] for row in rows], "o-", label=mode)
        axes.fill_between(x, [row["interval"][0] for row in rows], [row["interval"][1] for row in rows], alpha=0.2)
    axes.axvline(train_length, color="grey", linestyle=":", label=f"trained length, T = {train_length}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("length of the document, tokens")
    axes.set_ylabel("exact answers")
    axes.set_title("mesa-reader: facts found by length of the document")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="default: the bundled model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="multiples of T")
    parser.add_argument("--documents", type=int, default=3, help="documents of each length")
    parser.add_argument(
        "--stock-max", type=int, default=16, help="longest length for stock mode, whose prefill is quadratic"
    )
    parser.add_argument("--two-hop", action="store_true", help="questions of two hops")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--config", nargs="*", default=[], metavar="NAME=VALUE", help="fields of MesaConfig: chunk=240")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    path = find_model(args.model)
    fields: dict[str, Any] = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.config)}
    train_length = check_model(path).train_length

    results: dict[str, list[dict[str, Any]]] = {"Mesa": [], "stock": []}
    for multiple in args.lengths:
        # at T itself the question must fit in too
        n_tokens = multiple * train_length if multiple > 1 else train_length - (72 if args.two_hop else 56)
        for mode, config in (("Mesa", MesaConfig(**fields)), ("stock", MesaConfig(enabled=False))):
            if mode == "stock" and multiple > args.stock_max:
                continue
            start = time.perf_counter()
            row = run(
                path, n_tokens, args.documents, config, args.threads, first_seed=args.first_seed, two_hop=args.two_hop
            )
            results[mode].append(row)
            low, high = row["interval"]
            print(f"{multiple:>3} T {n_tokens:>6} tokens  {mode:>5}  {row['right']:>3}/{row['total']}  {row['right'] / row['total']:.3f}  "
                  f"[{low:.3f}, {high:.3f}]  {row['prefill_tokens_per_second']:>8.0f} tokens/s  {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(results, separators=(",", ":")).replace("},{", "},\n{") + "\n")
    if args.plot:
        plot(results, train_length, args.plot)


if __name__ == "__main__":
    main()
