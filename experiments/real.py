"""How likely the right answers are to questions over real text, for many settings of Mesa at little cost.

    python experiments/real.py -m model.gguf --length 8192 --setting stock --setting mesa --setting mesa,chunk=512,stair_bias=0 -o real.json
    python experiments/real.py -m model.gguf --length 16384 --text book.txt --seed 2 --documents 2 --setting mesa -o real.json
    python experiments/real.py --show -o real.json

The documents, questions and scores are those of `mesa-gguf eval real --no-generate`; of a fact's two questions, literal and paraphrased, one is asked.
What settings do not share is little: a middle chunk does not depend on the reading length, the stair, its bias or the scaling of queries.
So chunks are read once for each chunk length, kept (docs/CHUNKS.md), and loaded for each setting; the last chunk and the questions are read anew. A
setting that is not "mesa" reads everything. The file of results is added to: what is there is not measured again.
"""

from __future__ import annotations

import argparse
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
LAST = 512  # tokens at the end that every setting reads anew, more or less

Kept = tuple[list[int], list[tuple[list[int], bytes]]]
"""Where chunks start, and all but the last of them: tokens and rows."""


class Measure:
    """A document and its questions, with many settings."""

    def __init__(self, path: Path, asked: Asked, length: int, threads: int) -> None:
        self.path, self.asked, self.length, self.threads = path, asked, length, threads
        self.train_length = check_model(path).train_length
        self._kept: dict[tuple[int, int], Kept] = {}

    def _open(self, config: MesaConfig, n_ctx: int) -> MesaLlama:
        swa = {"swa_full": True}  # chunks are kept of all layers
        return load_model(
            self.path, mesa=config, n_ctx=n_ctx, n_threads=self.threads, n_threads_batch=self.threads, **swa
        )

    def _chunks(self, chunk: int, first_chunk: int) -> Kept:
        if (chunk, first_chunk) in self._kept:
            return self._kept[chunk, first_chunk]
        head = self.asked.head
        config = MesaConfig(chunk=chunk, first_chunk=first_chunk, last_chunk=LAST, room=LAST)
        with closing(self._open(config, chunk + first_chunk + LAST)) as llm:
            plan = config.make_plan(
                len(head), min(self.train_length, max(4 * LAST, 2 * (chunk + first_chunk))), llm._breaks(head)
            )
            starts = plan.chunk_starts
            first = head[: starts[1]]
            llm.eval(first)
            rows = [(first, llm.save_chunk(0, len(first)))]
            for start, stop in pairwise(starts[1:]):
                llm.n_tokens = len(first)
                llm.eval(head[start:stop])
                rows.append((head[start:stop], llm.save_chunk(len(first), llm.n_tokens)))
        self._kept[chunk, first_chunk] = starts, rows
        return starts, rows

    def _read(self, setting: Setting) -> MesaLlama:
        """The model with the document in its context."""
        if setting.method.name != "mesa":
            threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
            llm = open_model(self.path, setting.method.name, self.length, overrides=setting.overrides, **threads)
            llm.eval(self.asked.head)
            return llm
        config = MesaConfig(**setting.overrides)
        params = config.params(self.train_length)
        starts, rows = self._chunks(params.chunk, params.first_chunk)
        llm = self._open(config, self.length)
        for tokens, data in rows:
            llm.load_chunk(tokens, data)
        llm.eval(self.asked.head[starts[-1] :])
        return llm

    def scores(self, setting: Setting) -> list[tuple[str, int, float]]:
        """Of each question: its form, whether the answer is exact, its mean log-probability."""
        found = []
        with closing(self._read(setting)) as llm:
            for question, prompt in zip(self.asked.document.questions, self.asked.prompts, strict=True):
                if question.form != "two-hop" and (question.facts[0] % 2 == 0) != (question.form == "literal"):
                    continue
                begun = score_begun(llm, len(self.asked.head), [*prompt.tail, *prompt.begun], prompt.answer)
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
    for length in args.length:
        for index in range(args.first, args.first + args.documents):
            todo = [
                setting
                for setting in map(find_setting, args.setting)
                if f"{args.seed}:{index * STRIDE}" not in results.get((args.model.name, name, length, setting.name), {})
            ]
            if not todo:
                continue
            asked = make_asked(form, haystack, length, f"{args.seed}:{index}", FORMS, N_FACTS)
            document = Measure(args.model, asked, length, args.threads)
            for setting in todo:
                start = time.time()
                scores = document.scores(setting)
                results = load_results(args.output)  # another process may have added to it
                cell = results.setdefault((args.model.name, name, length, setting.name), {})
                cell |= {f"{args.seed}:{index * STRIDE + i}": list(score) for i, score in enumerate(scores)}
                save_results(args.output, results)
                exact, logprob = sum(s[1] for s in scores), math.fsum(s[2] for s in scores) / len(scores)
                print(
                    f"{name} {length} {args.seed}:{index} {setting.name}: {exact} of {len(scores)}, {logprob:.3f}, "
                    f"{time.time() - start:.0f} s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--length", action="append", type=int, default=[], help="in tokens; may be repeated")
    parser.add_argument(
        "--text", type=Path, help="a document or a folder; default: the documentation of Python's language"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first document")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument(
        "--setting", action="append", default=[], help="as --method of mesa-gguf eval real; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--base", default="stock", help="the setting that others are compared with in the table")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.model is not None:
        measure(args)
    if args.show:
        print("\n".join(table(load_results(args.output), args.base)))


if __name__ == "__main__":
    main()
