"""Exact answers on fresh documents: inside the trained length, and far past it by the extension.

python -m training.evaluate --run run --documents 100 --lengths 1024 4096 16384
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mesa_gguf.lab import documents
from mesa_gguf.lab.documents import Document, Fact
from training import extend
from training import model as models
from training.model import Model
from training.tokenizer import Tokenizer

FRESH = 1 << 50  # seeds of training documents are smaller


@dataclass(frozen=True)
class Outcome:
    fact: Fact
    right: bool


def sentence_ends(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.ids[token] for token in (".", ".Ċ", ".ĊĊ")}


def parts(tokenizer: Tokenizer, document: Document, fact: Fact) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the text, of the question and of the answer."""
    text = [tokenizer.bos, *tokenizer.encode(document.text + "\n\n")]
    asked = tokenizer.encode(documents.QUESTION.format(question=fact.question))
    return text, asked, tokenizer.encode(f" {fact.answer_sentence}\n")


@torch.no_grad()
def greedy(model: Model, ids: list[int], stop: int, limit: int = 40) -> list[int]:
    """Plain decoding, no cache."""
    written: list[int] = []
    while len(written) < limit and (not written or written[-1] != stop):
        hidden = model(torch.tensor([ids + written]))
        written.append(int(model.logits(hidden[0, -1]).argmax()))
    return written


@torch.no_grad()
def in_window(model: Model, tokenizer: Tokenizer, document: Document) -> Iterator[Outcome]:
    """Each fact asked for alone. An answer is right if each of its tokens is the most likely one after the
    right ones before it, which is when greedy decoding writes it."""
    for fact in document.facts:
        text, asked, answer = parts(tokenizer, document, fact)
        logits = model.logits(model(torch.tensor([text + asked + answer]))[0, -len(answer) - 1 : -1])
        yield Outcome(fact, logits.argmax(-1).tolist() == answer)


def extended(model: Model, tokenizer: Tokenizer, document: Document, chunk: int, log_n: bool) -> Iterator[Outcome]:
    split = [parts(tokenizer, document, fact) for fact in document.facts]
    tails = [asked + answer for _, asked, answer in split]
    every = extend.answer_logits(model, split[0][0], tails, sentence_ends(tokenizer), chunk, log_n)
    for fact, (_, _, answer), logits in zip(document.facts, split, every):
        yield Outcome(fact, logits[-len(answer) - 1 : -1].argmax(-1).tolist() == answer)


def share(outcomes: list[Outcome]) -> str:
    right = sum(o.right for o in outcomes)
    return f"{right / max(1, len(outcomes)):.4f} ({right}/{len(outcomes)})"


def by_kind(outcomes: list[Outcome]) -> str:
    total, right = Counter(o.fact.kind for o in outcomes), Counter(o.fact.kind for o in outcomes if o.right)
    return "  ".join(f"{kind} {right[kind]}/{n}" for kind, n in sorted(total.items()))


def by_depth(outcomes: list[Outcome], bins: int = 10) -> str:
    def place(o: Outcome) -> int:
        return min(bins - 1, int(o.fact.depth * bins))

    total, right = Counter(map(place, outcomes)), Counter(place(o) for o in outcomes if o.right)
    return "  ".join(f"{b / bins:.1f}: {right[b]}/{n}" for b, n in sorted(total.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("run"))
    parser.add_argument("--documents", type=int, default=100, help="inside the trained length")
    parser.add_argument("--tokens", type=int, default=450, help="of each of these")
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--made-up", type=float, default=0.0)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384])
    parser.add_argument("--long-documents", type=int, default=5, help="of each length past it")
    parser.add_argument("--chunk", type=int, default=400)
    parser.add_argument("--no-log-n", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--misses", type=int, default=0, help="show this many")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = models.load(args.run / "model.pt")
    tokenizer = Tokenizer.load(args.run / "tokenizer.json")

    def make(seed: int, n_tokens: int) -> Document:
        return documents.make_document(
            FRESH + seed, n_tokens, lambda text: len(tokenizer.encode(text)), n_facts=args.facts, made_up=args.made_up
        )

    outcomes = [o for seed in range(args.documents) for o in in_window(model, tokenizer, make(seed, args.tokens))]
    print(f"{args.tokens} tokens: {share(outcomes)}\n  {by_kind(outcomes)}\n  {by_depth(outcomes)}", flush=True)
    for length in args.lengths:
        start = time.time()
        outcomes = [
            o
            for seed in range(args.long_documents)
            for o in extended(model, tokenizer, make(length + seed, length), args.chunk, not args.no_log_n)
        ]
        print(
            f"{length} tokens, extended: {share(outcomes)}  {time.time() - start:.0f} s\n  {by_kind(outcomes)}\n"
            f"  {by_depth(outcomes)}",
            flush=True,
        )
        for o in [o for o in outcomes if not o.right][: args.misses]:
            print(f"    missed: {o.fact.sentence}")


if __name__ == "__main__":
    main()
