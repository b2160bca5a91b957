"""Whether the first citation of a right answer holds the fact: by words, by attention, by both, and by likelihood.

    python experiments/citations.py -m model.gguf --seeds 1 2 3 4 -o citations.json

Facts are put into real text (mesa_gguf.lab.facts), and asked for in their own words and in others, over the chunks that "auto" reads. Of every
right answer each method ranks the same passages; a hit is a first passage that holds the fact's value where the fact stands.

    words       the words that a passage shares with answer and question
    attention   what the answer's tokens attended to, less what the question's beginning attends to
    raw         the same without subtracting that
    both        what Reader does
    likelihood  the chunk after which the answer is likeliest, beside without any: log p(answer | chunk, question) - log p(answer | question);
                in it, the passage that shares most words
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mesa_gguf import Library, MesaLlama, Reader
from mesa_gguf.lab.evaluate.scoring import wilson
from mesa_gguf.lab.facts import FactDocument, Haystack, Question, default_text, load_text, make_document
from mesa_gguf.library.index import terms_of
from mesa_gguf.reading import citations
from mesa_gguf.reading.attended import Attended

METHODS = ("words", "attention", "raw", "both", "likelihood")


class Watched(Attended):
    """Keeps what it saw, too."""

    last: Watched

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.raw = np.zeros(len(args[0]))
        Watched.last = self

    def add(self, weights: Any) -> None:
        super().add(weights)
        self.raw += self.of(weights)


def likelihood(reader: Reader, tail: list[int], answer: list[int]) -> float:
    """log p(answer | what is in the context, question)"""
    found = reader.llm.log_likelihoods([*tail, *answer])
    return float(found[-len(answer) :].sum())


def ask(
    reader: Reader, document: Any, question: Question, at: int, max_tokens: int, methods: tuple[str, ...]
) -> dict[str, Any] | None:
    """A question whose fact was read, and where each method finds its answer; None: the fact is in no chunk that was read."""
    assert reader.shelf is not None
    answer = reader.ask(question.text, documents=[document], max_tokens=max_tokens).answer
    watched, sources = Watched.last, reader._sources
    assert sources is not None
    if not any(piece.span.start <= at < piece.span.stop for piece in sources.pieces):
        return None
    result: dict[str, Any] = dict(form=question.form, right=question.is_right(answer.text), answer=answer.text)
    if not result["right"] or not answer.tokens:
        return result
    read = [passage for n in range(len(sources.pieces)) for passage in sources.passages(n)]
    asked, said = terms_of(question.text), terms_of(citations.first_statement(answer.text))
    new = [word for word in said if word not in asked]
    later = [word for word in terms_of(answer.text) if word not in asked and word not in said]
    words = citations.by_words(asked, new, later, read)
    by = {
        "words": words,
        "attention": watched.shares,
        "raw": watched.raw,
        "both": watched.shares + citations.WORDS_WEIGHT * words / max(words.sum(), 1e-30),
    }
    if "likelihood" in methods:
        tail, tokens = reader.form.tail(question.text), list(answer.tokens)
        gains = []
        for piece in sources.pieces:
            reader.shelf.put_together([piece])
            gains.append(likelihood(reader, tail, tokens))
        best = int(np.argmax(gains))  # what the question alone gives is the same for all of them
        by["likelihood"] = np.where([passage.source == best for passage in read], words, -1)
    first = {name: read[int(np.argmax(scores))] for name, scores in by.items()}
    return result | {name: passage.start <= at < passage.stop for name, passage in first.items()}


DECOYS = (
    "Somebody wrote {v} on the blackboard.",
    "Nobody had expected to hear of {v} again.",
    "A note in the margin says {v}.",
)


def with_decoys(made: FactDocument, n: int, seed: str) -> str:
    """A document with n more sentences for each fact, which have its value and say nothing."""
    rng = random.Random(f"decoys:{seed}")
    kept = [range(fact.start - 1, fact.stop) for fact in made.facts]
    borders = [at for at in Haystack(made.text).borders if not any(at in fact for fact in kept)]
    new = [DECOYS[i].format(v=fact.value) for fact in made.facts for i in range(n)]
    text = made.text
    for at, sentence in sorted(zip(rng.choices(borders, k=len(new)), new), reverse=True):
        text = f"{text[:at]} {sentence}{text[at:]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", help="files or folders; default: Python's documentation")
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--tokens", type=int, default=4096, help="of a document")
    parser.add_argument("--facts", type=int, nargs=2, default=[12, 12], help="unlike all others, and alike")
    parser.add_argument("--decoys", type=int, default=0, help="other sentences that name each fact's value")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    import mesa_gguf.reading.reader as module

    module.Attended = Watched  # type: ignore[misc]
    llm = MesaLlama(args.model, n_ctx=2816, n_threads=args.threads, n_threads_batch=args.threads)
    haystack = Haystack(load_text(args.text) if args.text else default_text())
    results: list[dict[str, Any]] = []
    for seed in args.seeds:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            reader = Reader(llm, library)
            n_unlike, n_alike = args.facts
            made = make_document(
                haystack, seed, args.tokens, lambda text, form=reader.form: len(form.tokenize(text)),  # type: ignore[misc]
                n_unlike=n_unlike, n_alike=n_alike, n_links=0, n_counts=0, n_absent=0,
            )  # fmt: skip
            document = library.add_text(with_decoys(made, args.decoys, seed), f"document {seed}")
            text = library.text(document)
            for question in made.questions:
                fact = made.facts[question.facts[0]]
                at = text.index(fact.sentence) + fact.sentence.rindex(fact.value)
                found = ask(reader, document, question, at, args.max_tokens, args.methods)
                if found is not None:
                    results.append(found | {"seed": seed})
        if args.output:
            args.output.write_text(json.dumps(results, indent=1))
        right = [result for result in results if result.get("words") is not None]
        print(
            f"after document {seed}, {time.perf_counter() - start:.0f} s: {len(right)} right answers of {len(results)}"
        )
        for name in args.methods:
            hits = sum(result[name] for result in right)
            if right:
                low, high = wilson(hits, len(right))
                print(
                    f"  {name:10} {hits:4} of {len(right)}  {hits / len(right):.3f} ({low:.3f} to {high:.3f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
