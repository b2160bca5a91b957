"""Would a question in other words find its chunk by hidden states, or by those beside what `auto` does?

    python experiments/hidden_states.py -m model.gguf --text book.txt --seed s1 --fresh 1 --tokens 16384

Each sentence of a document and each question is read alone by the user's own model, and is the mean of its last hidden states, as an embedding
model would have it. What all sentences share, their first principal directions, is taken away. Facts are those of selection.py, beside this script.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from selection import FRESH, SECOND  # beside this script

from mesa_gguf import Library, MesaConfig, MesaLlama
from mesa_gguf.lab import facts
from mesa_gguf.lab.facts import Haystack, default_text, load_text, make_document
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Shelf
from mesa_gguf.reading.similar import SimilarPassages

POOLING_MEAN = 1  # llama.h, LLAMA_POOLING_TYPE_MEAN
BUDGETS = (2048, 3072, 4096)
REMOVED = (0, 8, 16, 32, 48, 64, 128)
Floats = npt.NDArray[np.float32]


def states(path: Path, texts: Sequence[str]) -> Floats:
    """The mean of the last hidden states of each text [n_texts, n_embd]."""
    threads = dict(n_threads=1, n_threads_batch=1)
    llm = MesaLlama(
        path, mesa=MesaConfig(enabled=False), n_ctx=512, n_ubatch=512, embedding=True,
        pooling_type=POOLING_MEAN, **threads,
    )  # fmt: skip
    rows = [np.asarray(llm.embed(text, normalize=False, truncate=True), np.float32) for text in texts]
    llm.close()
    return np.stack(rows)


def likeness(asked: Floats, said: Floats, n_removed: int) -> Floats:
    """Cosines without the first principal directions of what is said [n_asked, n_said]."""
    mean = said.mean(axis=0)
    common = np.linalg.svd(said - mean, full_matrices=False)[2][:n_removed]

    def rest(rows: Floats, centre: Floats) -> Any:
        rows = rows - centre
        rows = rows - (rows @ common.T) @ common
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    return np.asarray(rest(asked, asked.mean(axis=0)) @ rest(said, mean).T, np.float32)


def n_found(
    orders: Sequence[Sequence[int]], sizes: Sequence[int], holders: Sequence[Sequence[int]], budget: int
) -> int:
    """How many questions have a chunk that holds their fact among the first ones of their order, as far as they fit."""
    found = 0
    for order, held in zip(orders, holders, strict=True):
        ends = np.cumsum([sizes[i] for i in order])
        taken = order[: max(1, int((ends <= budget).sum()))]
        found += any(i in taken for i in held)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", help="files or folders; default: Python's documentation")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--tokens", type=int, default=16384, help="of the document")
    parser.add_argument("--fresh", type=int, choices=(1, 2), default=1, help="the list of facts of selection.py")
    args = parser.parse_args()

    vocabulary = load_vocabulary(args.model)
    form = PromptForm(vocabulary)
    count = functools.cache(lambda text: len(form.tokenize(text)))
    facts.UNLIKE = (FRESH, SECOND)[args.fresh - 1]  # type: ignore[misc]
    made = make_document(
        Haystack(load_text(args.text) if args.text else default_text()), args.seed, args.tokens,
        lambda text: sum(count(f"{part}\n\n") for part in text.split("\n\n")),
        n_unlike=len(facts.UNLIKE), n_alike=1, n_links=0, n_counts=0, n_absent=0,
    )  # fmt: skip
    asked = [one for one in made.questions if one.form == "paraphrase" and not made.facts[one.facts[0]].is_alike]
    with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
        document = library.add_text(made.text, "document")
        catalogue = Catalogue(vocabulary, form, library)
        every = [(document, row) for row in catalogue.rows(document)]
        sizes = [row.n_tokens for _, row in every]
        texts = [catalogue.piece(*one).text for one in every]
        holders = [[i for i, text in enumerate(texts) if made.facts[one.facts[0]].sentence in text] for one in asked]
        sentences = [one for one in SimilarPassages(texts)._sentences if one.text.strip()]
        start = time.process_time()
        said = states(args.model, [one.text.strip() for one in sentences])
        seconds = time.process_time() - start
        questions = states(args.model, [one.text for one in asked])
        shelf = Shelf(MesaLlama(args.model, n_ctx=1536, n_threads=1, n_threads_batch=1), catalogue)
        compared = []
        for one in asked:
            ranked = catalogue._ranked(one.text, every, [document.id], [])
            other = catalogue._in_other_words(one.text, every, [document.id], ranked, shelf)
            compared.append(list(dict.fromkeys([*(other[0] if other else ranked), *range(len(every))])))
        shelf.llm.close()

    def shown(orders: Sequence[Sequence[int]]) -> str:
        return ", ".join(str(n_found(orders, sizes, holders, budget)) for budget in BUDGETS)

    print(f"{len(sentences)} sentences in {len(every)} chunks, {seconds:.0f} CPU seconds; {len(asked)} questions")
    print(f"found in {', '.join(map(str, BUDGETS))} tokens\nas auto does: {shown(compared)}")
    for n_removed in REMOVED:
        by_states = []
        for row in likeness(questions, said, n_removed):
            by_states.append(list(dict.fromkeys(sentences[int(i)].source for i in np.argsort(-row, kind="stable"))))
        turns = [
            list(dict.fromkeys(i for pair in zip(own, other, strict=False) for i in pair))
            for own, other in zip(compared, by_states, strict=True)
        ]
        print(
            f"{n_removed} directions taken away: by hidden states {shown(by_states)}; in turns with auto's {shown(turns)}"
        )


if __name__ == "__main__":
    main()
