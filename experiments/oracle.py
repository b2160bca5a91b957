"""What stands between a model and a fact in a long text: how much is read at once, where it stands, or that chunks are read apart.

    python experiments/oracle.py -m model.gguf --length 16384 --documents 2 -o oracle.json
    python experiments/oracle.py --show -o oracle.json

The documents, questions and scores are those of experiments/real.py, two hops left out; of a fact's two questions, literal and paraphrased, one is asked.
The chunk that holds a question's fact is known, and read with others or without:

    alone          that chunk and the first one
    K              that chunk and others, K of them, drawn at random, in the document's order, at their true distances
    K stair        the same on a stair of 2,048 tokens, queries scaled from there on, as in the paper
    K piece        the text of the same chunks read as one piece, as stock llama.cpp does; with --pieces
    K, nearest     the same with that chunk last, in front of the question
    all            the whole document, as Mesa reads it by default
    all stair      the same on the stair of 2,048 tokens
    all, nearest   the whole document, that chunk moved to the end, where its distances are true
    all, again     the whole document, and that chunk once more behind it
    all, farthest  the whole document, that chunk moved to the beginning

So "alone" is the ceiling of any choice of chunks. Chunks are read once and kept (docs/CHUNKS.md). The file of results is added to.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from real import N_FACTS, STRIDE, Chunk, Measure, options  # beside this script

from mesa_gguf import MesaConfig, MesaLlama
from mesa_gguf.lab.evaluate import report
from mesa_gguf.lab.evaluate.loss import score_begun
from mesa_gguf.lab.evaluate.real import Asked, Prompt, make_asked
from mesa_gguf.lab.facts import Form, Haystack, default_text, load_text
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary

FORMS: tuple[Form, ...] = ("literal", "paraphrase")
STAIR: dict[str, Any] = {"reading_length": 2048, "log_length": 2048, "stair_bias": 0.0}
NUMBERS = (2, 4, 7)
BASE = "alone"


class Oracle(Measure):
    """A document whose questions are asked behind chunks that are chosen by where the fact is."""

    def __init__(self, path: Path, asked: Asked, length: int, folder: Path, threads: int) -> None:
        super().__init__(path, asked, length, folder, threads)
        self._contexts: dict[MesaConfig, MesaLlama] = {}

    def items(self, index: int, stride: int) -> list[tuple[int, Prompt, int]]:
        """Questions: number, prompt, and the chunk that holds the fact, counted without the first one."""
        params = MesaConfig().params(self.train_length)
        _, *rest = self.chunks(params.chunk, params.first_chunk)
        llm = load_vocabulary(self.path)
        texts = [" ".join(llm.detokenize(tokens).decode(errors="replace").split()) for tokens, _ in rest]
        found = []
        for i, (question, prompt) in enumerate(zip(self.asked.document.questions, self.asked.prompts, strict=True)):
            if (question.facts[0] % 2 == 0) != (question.form == "literal"):
                continue
            sentence = " ".join(self.asked.document.facts[question.facts[0]].sentence.split())
            holders = [number for number, text in enumerate(texts) if sentence in text]
            if holders:  # else it stands across a border, or in the first chunk
                found.append((index * stride + i, prompt, holders[0]))
        return found

    def score(self, prompt: Prompt, chosen: Sequence[Chunk], config: MesaConfig, *, piece: bool) -> list[float]:
        """Exact and log-probability of an answer behind these chunks."""
        params = MesaConfig().params(self.train_length)
        first = self.chunks(params.chunk, params.first_chunk)[0]
        if config not in self._contexts:
            self._contexts[config] = self._open(config, self.length + params.chunk + 512)
        llm = self._contexts[config]
        llm.reset()
        for tokens, rows in () if piece else (first, *chosen):
            llm.load_chunk(tokens, rows)
        read = [token for tokens, _ in (first, *chosen) for token in tokens]
        if piece:
            llm.eval(read)
        begun = score_begun(llm, len(read), [*prompt.tail, *prompt.begun], prompt.answer)
        return [int(begun.exact), round(begun.logprob, 4)]

    def close(self) -> None:
        for llm in self._contexts.values():
            llm.close()

    def conditions(self, item: int, holder: int, pieces: bool) -> dict[str, tuple[list[Chunk], MesaConfig, bool]]:
        """Of a question: name, chunks, settings, and whether they are read as one piece."""
        default = MesaConfig()
        params = default.params(self.train_length)
        _, *rest = self.chunks(params.chunk, params.first_chunk)
        order = [number for number in range(len(rest)) if number != holder]
        others = random.Random(f"oracle/{item}").sample(order, len(order))
        found = {"alone": ([rest[holder]], default, False)}
        for k in NUMBERS:
            chunks = [rest[number] for number in sorted([holder, *others[: k - 1]])]
            found[str(k)] = (chunks, default, False)
            found[f"{k}, nearest"] = ([rest[number] for number in [*sorted(others[: k - 1]), holder]], default, False)
            found[f"{k} stair"] = (chunks, MesaConfig(**STAIR), False)
            if pieces:
                found[f"{k} piece"] = (chunks, MesaConfig(enabled=False), True)
        found["all"] = (list(rest), default, False)
        found["all, nearest"] = ([rest[number] for number in [*order, holder]], default, False)
        found["all, again"] = ([*rest, rest[holder]], default, False)
        found["all stair"] = (list(rest), MesaConfig(**STAIR), False)
        found["all stair, nearest"] = ([rest[number] for number in [*order, holder]], MesaConfig(**STAIR), False)
        found["all, farthest"] = ([rest[number] for number in [holder, *order]], default, False)
        return found


def measure(args: argparse.Namespace) -> None:
    form = PromptForm(load_vocabulary(args.model))
    haystack = Haystack(default_text() if args.text is None else load_text([args.text]))
    text = "default" if args.text is None else args.text.name
    args.keep.mkdir(parents=True, exist_ok=True)
    results = load(args.output)
    for index in range(args.first, args.first + args.documents):
        asked = make_asked(form, haystack, args.length, f"{args.seed}:{index}", FORMS, N_FACTS)
        with closing(Oracle(args.model, asked, args.length, args.keep, args.threads)) as document:
            for item, prompt, holder in document.items(index, STRIDE):
                start, name = time.time(), f"{args.model.name}/{text}/{args.length}/{args.seed}:{item}"
                row = results.setdefault(name, {})
                for condition, (chunks, config, piece) in document.conditions(item, holder, args.pieces).items():
                    if condition not in row:
                        row[condition] = document.score(prompt, chunks, config, piece=piece)
                report.write_json(args.output, results)
                print(f"{name} {time.time() - start:.0f} s", file=sys.stderr, flush=True)


def load(path: Path) -> dict[str, dict[str, list[float]]]:
    """Of each question, by condition: exact, log-probability."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def show(results: dict[str, dict[str, list[float]]]) -> None:
    """A table, each condition against "alone" over the same questions."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    print("| read | questions | exact | against alone | log-probability | against alone |\n|---|---|---|---|---|---|")
    for name in names:
        cells = [name]
        for score in (0, 1):
            own = {item: row[name][score] for item, row in results.items() if name in row}
            other = {item: results[item][BASE][score] for item in own}
            if not score:
                cells.append(str(len(own)))
            gain = [own[item] - other[item] for item in own]
            mean = math.fsum(gain) / len(gain)
            spread = math.sqrt(math.fsum((g - mean) ** 2 for g in gain) / max(1, len(gain) - 1) / len(gain))
            cells += [f"{math.fsum(own.values()) / len(own):.2f}", f"{mean:+.2f} ± {1.96 * spread:.2f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pieces", action="store_true", help="also read the chosen chunks as one piece: takes long")
    args = parser.parse_args()
    if args.model is not None:
        measure(args)
    if args.show:
        show(load(args.output))


if __name__ == "__main__":
    main()
