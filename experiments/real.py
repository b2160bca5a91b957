"""How likely the right answers are to questions over real text, for many settings of Mesa at little cost.

    python experiments/real.py -m model.gguf --length 16384 --setting stock --setting mesa --setting mesa,reading_length=2048 -o real.json
    python experiments/real.py -m model.gguf --length 16384 --parts 2 --text book.txt --seed 2 --setting mesa -o real.json
    python experiments/real.py --show -o real.json

The documents, questions and scores are those of `mesa-gguf eval real --no-generate`; of a fact's two questions, literal and paraphrased, one is asked.
What settings do not share is little: a chunk does not depend on the reading length, the stair, its bias or the scaling of queries. So chunks are read once
for each chunk length, kept in a folder (docs/CHUNKS.md), and loaded for each setting; the questions alone are read anew. With --parts, each part of a
document is one of its own, of the chunks that are there already. A setting that is not "mesa" reads everything. The file of results is added to: what is
there is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from mesa_gguf import MesaConfig, MesaLlama
from mesa_gguf.lab.evaluate import report
from mesa_gguf.lab.evaluate.loss import score_begun
from mesa_gguf.lab.evaluate.real import STRIDE, Asked, make_asked
from mesa_gguf.lab.facts import Form, Haystack, default_text, load_text
from mesa_gguf.lab.methods import Setting, find_setting, open_model
from mesa_gguf.model.header import check_model
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_model, load_vocabulary

FORMS: tuple[Form, ...] = ("literal", "paraphrase", "two-hop")
N_FACTS = 24
MAX_PARTS = 8

Chunk = tuple[list[int], bytes]
"""Tokens and rows."""


class Measure:
    """A document and its questions, with many settings.

    Args:
        folder: where chunks are kept.
    """

    def __init__(self, path: Path, asked: Asked, length: int, folder: Path, threads: int) -> None:
        self.path, self.asked, self.length, self.folder, self.threads = path, asked, length, folder, threads
        self.train_length = check_model(path).train_length
        self._read_chunks: dict[tuple[int, int], list[Chunk]] = {}

    def _open(self, config: MesaConfig, n_ctx: int) -> MesaLlama:
        arguments = {"n_threads": self.threads, "n_threads_batch": self.threads, "swa_full": True}
        return load_model(self.path, mesa=config, n_ctx=n_ctx, **arguments)

    def _kept(self, llm: MesaLlama, first: list[int], tokens: list[int]) -> Chunk:
        """A chunk's rows, read now where they are not in the folder."""
        digest = hashlib.sha256(repr((llm.chunk_origin, first, tokens)).encode()).hexdigest()[:24]
        file = self.folder / digest
        if file.exists():
            return tokens, file.read_bytes()
        start = len(first) if tokens is not first else 0
        if start:
            llm.n_tokens = 0
            llm.eval(first)
        llm.n_tokens = start
        llm.eval(tokens)
        rows = llm.save_chunk(start, llm.n_tokens)
        file.with_suffix(".part").write_bytes(rows)
        file.with_suffix(".part").rename(file)
        return tokens, rows

    def chunks(self, chunk: int, first_chunk: int) -> list[Chunk]:
        """The document, the first chunk first."""
        if (chunk, first_chunk) not in self._read_chunks:
            head = self.asked.head
            config = MesaConfig(
                chunk=chunk, first_chunk=first_chunk, last_chunk=1, room=0, reading_length=chunk + 2 * first_chunk
            )
            with closing(self._open(config, 2 * (chunk + first_chunk))) as llm:
                starts = [*config.make_plan(len(head), self.train_length, llm._breaks(head)).chunk_starts, len(head)]
                first = head[: starts[1]]
                kept = [self._kept(llm, first, first)]
                kept += [self._kept(llm, first, head[start:stop]) for start, stop in pairwise(starts[1:])]
            self._read_chunks[chunk, first_chunk] = kept
        return self._read_chunks[chunk, first_chunk]

    def scores(self, setting: Setting, part: int, n_parts: int) -> list[tuple[str, int, float]]:
        """Of each question that the part answers: its form, whether the answer is exact, its mean log-probability."""
        if setting.method.name == "mesa":
            config = MesaConfig(**setting.overrides)
            params = config.params(self.train_length)
            first, *rest = self.chunks(params.chunk, params.first_chunk)
            chosen = rest[len(rest) * part // n_parts : len(rest) * (part + 1) // n_parts]
            llm = self._open(config, self.length)
            for tokens, rows in (first, *chosen):
                llm.load_chunk(tokens, rows)
            read = [token for tokens, _ in (first, *chosen) for token in tokens]
        else:
            head = self.asked.head
            read = head[len(head) * part // n_parts : len(head) * (part + 1) // n_parts]
            threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
            llm = open_model(
                self.path, setting.method.name, self.length // n_parts, overrides=setting.overrides, **threads
            )
            llm.eval(read)
        with closing(llm):
            text = " ".join(llm.detokenize(read).decode(errors="replace").split())
            found = []
            for question, prompt in zip(self.asked.document.questions, self.asked.prompts, strict=True):
                if question.form != "two-hop" and (question.facts[0] % 2 == 0) != (question.form == "literal"):
                    continue
                facts = [self.asked.document.facts[i] for i in question.facts]
                if not all(" ".join(fact.sentence.split()) in text for fact in facts):
                    continue
                begun = score_begun(llm, len(read), [*prompt.tail, *prompt.begun], prompt.answer)
                found.append((str(question.form), int(begun.exact), round(begun.logprob, 4)))
        return found


Cell = tuple[str, str, int, str]
"""Model, text, length, setting."""

Results = dict[Cell, dict[str, list[Any]]]
"""For each cell, by "seed:index", [form, exact, log-probability]."""


def load_results(path: Path) -> Results:
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return {(e["model"], e["text"], e["length"], e["setting"]): e["values"] for e in entries}


def save_results(path: Path, results: Results) -> None:
    names = ("model", "text", "length", "setting")
    report.write_json(
        path, {"scores": [{**dict(zip(names, cell)), "values": results[cell]} for cell in sorted(results)]}
    )


def pooled(results: Results) -> Results:
    """The same, documents of all texts together."""
    found: Results = {}
    for (model, text, length, setting), values in results.items():
        found.setdefault((model, "", length, setting), {}).update(
            {f"{text}/{item}": row for item, row in values.items()}
        )
    return found


def table(results: Results, base: str) -> Iterator[str]:
    """For each model and length, the settings by their log-probability, with their differences from the base's over shared items."""
    cells = pooled(results)

    def values(cell: Cell, score: int) -> dict[str, float]:
        return {item: row[score] for item, row in cells.get(cell, {}).items()}

    def mean(cell: Cell, score: int) -> float:
        own = values(cell, score)
        return math.fsum(own.values()) / len(own)

    def text(cell: Cell, score: int) -> list[str]:
        other = report.lead(values(cell, score), values((*cell[:3], base), score), STRIDE) if cell[3] != base else None
        if other is None:
            return [f"{mean(cell, score):.2f}", "–"]
        interval = f" [{other[1]:+.2f}, {other[2]:+.2f}]" if math.isfinite(other[1]) else ""  # not of one document
        return [f"{mean(cell, score):.2f}", f"{other[0]:+.2f}{interval}"]

    for model, length in sorted({(cell[0], cell[2]) for cell in cells}):
        yield f"### {model}, {length} tokens"
        yield ""
        yield f"| setting | documents | answers | exact | against {base} | log-probability | against {base} |"
        yield "|---|---|---|---|---|---|---|"
        mine = [cell for cell in cells if (cell[0], cell[2]) == (model, length)]
        for cell in sorted(mine, key=lambda cell: -mean(cell, 2)):
            n_documents = len({(*item.split(":")[:1], int(item.split(":")[1]) // STRIDE) for item in cells[cell]})
            row = [cell[3], str(n_documents), str(len(cells[cell])), *text(cell, 1), *text(cell, 2)]
            yield f"| {' | '.join(row)} |"
        yield ""


def measure(args: argparse.Namespace) -> None:
    results = load_results(args.output)
    form = PromptForm(load_vocabulary(args.model))
    haystack = Haystack(default_text() if args.text is None else load_text([args.text]))
    name = "default" if args.text is None else args.text.name
    args.keep.mkdir(parents=True, exist_ok=True)
    length = args.length // args.parts
    for index in range(args.first, args.first + args.documents):
        asked = make_asked(form, haystack, args.length, f"{args.seed}:{index}", FORMS, N_FACTS)
        document = Measure(args.model, asked, args.length, args.keep, args.threads)
        for setting in map(find_setting, args.setting):
            for part in range(args.parts):
                start = time.time()
                base = (index * MAX_PARTS + part) * STRIDE
                cell = (args.model.name, name, length, setting.name)
                if f"{args.seed}:{base}" in load_results(args.output).get(cell, {}):
                    continue
                scores = document.scores(setting, part, args.parts)
                results = load_results(args.output)  # another process may have added to it
                values = results.setdefault(cell, {})
                values |= {f"{args.seed}:{base + i}": list(score) for i, score in enumerate(scores)}
                save_results(args.output, results)
                exact, logprob = sum(s[1] for s in scores), math.fsum(s[2] for s in scores) / max(1, len(scores))
                print(
                    f"{name} {length} {args.seed}:{index}/{part} {setting.name}: {exact} of {len(scores)}, {logprob:.3f}, "
                    f"{time.time() - start:.0f} s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def options(description: str | None) -> argparse.ArgumentParser:
    """What an experiment takes that asks behind chunks that were read once: the document, where chunks and results are, and threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--length", type=int, default=16384, help="of a document, in tokens")
    parser.add_argument("--keep", type=Path, default=Path("run-real"), help="folder of chunks that were read")
    parser.add_argument(
        "--text", type=Path, help="a document or a folder; default: the documentation of Python's language"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first document")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--parts", type=int, default=1, help=f"in how many it is cut, at most {MAX_PARTS}")
    parser.add_argument(
        "--setting", action="append", default=[], help="as --method of mesa-gguf eval real; may be repeated"
    )
    parser.add_argument("--base", default="stock", help="the setting that others are compared with in the table")
    args = parser.parse_args()
    if args.model is not None:
        measure(args)
    if args.show:
        print("\n".join(table(load_results(args.output), args.base)))


if __name__ == "__main__":
    main()
