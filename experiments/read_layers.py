"""Which layers of a model look for what an answer needs: `MesaConfig.read_layers`, for reading less.

    python experiments/read_layers.py -m model.gguf --length 8192 --documents 2

Facts in real text (those of `mesa-gguf eval real`) are asked for, and the beginnings of their answers are given. Of each layer between 40 and 80 % of the depth
two numbers are told, of the tokens of the answers: peak, the largest share of a head's attention that one block of the far text draws, for which
nothing has to be known of the text; and found, how often the fact's blocks are among the best of that layer alone, if each token reads --budget
keys by what the tokens before it attended to. Layers with high peaks are those that find.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mesa_gguf import MesaConfig, MesaLlama, _core
from mesa_gguf.lab.evaluate.real import make_asked
from mesa_gguf.lab.facts import Haystack, default_text
from mesa_gguf.model.header import check_model
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary

BLOCK = _core.READ_BLOCK
Blocks = NDArray[np.float32]


def blocks_of(weights: Blocks) -> Blocks:
    """[layer, head, token] -> what each block draws, [layer, head, block]."""
    padded = np.pad(weights, ((0, 0), (0, 0), (0, -weights.shape[-1] % BLOCK)))
    return padded.reshape(*weights.shape[:2], -1, BLOCK).sum(-1)


def places(llm: MesaLlama, head: Sequence[int], sentence: str) -> set[int]:
    """The blocks that a sentence lies in."""
    ends = np.cumsum([len(llm.token_bytes(token)) for token in head])
    text = b"".join(map(llm.token_bytes, head))
    start = text.find(sentence.encode())
    first, last = np.searchsorted(ends, (start, start + len(sentence.encode()) - 1), "right")
    return set(range(int(first) // BLOCK, int(last) // BLOCK + 1))


def hits(tokens: Sequence[Blocks], rows: Sequence[int], needed: set[int], n_best: int, n_begun: int) -> list[float]:
    """Of each token behind the answer's beginning the share of needed blocks that the ones before it choose."""
    found = []
    score = np.zeros(0, np.float32)
    for i, blocks in enumerate(tokens):
        if i > 0 and i >= n_begun:
            found.append(len(needed & set(np.argsort(-score)[:n_best].tolist())) / len(needed))
        own = blocks[list(rows)].max(1).sum(0)
        score = np.pad(score, (0, max(0, len(own) - len(score)))) / 2
        score[: len(own)] += own
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--seed", default="layers")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    n_layer = check_model(args.model).n_layer
    form, haystack = PromptForm(load_vocabulary(args.model)), Haystack(default_text())
    options = dict(n_ctx=args.length + 64, n_threads=args.threads, n_threads_batch=args.threads, swa_full=True)
    asked_for: list[tuple[list[Blocks], set[int], int]] = []
    with closing(MesaLlama(args.model, mesa=MesaConfig(tuned=False), verbose=False, **options)) as llm:
        assert llm._params is not None
        n_last = llm._params.last_chunk
        layers: list[int] = []
        for index in range(args.documents):
            asked = make_asked(form, haystack, args.length, f"{args.seed}:{index}", ("literal", "paraphrase"), 24)
            llm.reset()
            llm.disable_attention()
            llm.eval(asked.head)
            all_that_see = llm.enable_attention(10**6, "all")
            middle = [il for il in all_that_see if 0.4 <= (il + 0.5) / n_layer <= 0.8]
            layers = llm.enable_attention(middle or all_that_see, "all")
            for question, prompt in zip(asked.document.questions, asked.prompts, strict=True):
                tokens = [*prompt.begun, *prompt.answer]
                llm.n_tokens = len(asked.head)
                llm.eval(prompt.tail)
                seen: list[Blocks] = []
                for token in tokens:
                    blocks = blocks_of(llm.attention())
                    first = llm.plan().chunk_starts[1] if len(llm.plan().chunk_starts) > 1 else llm._params.first_chunk
                    blocks[..., : -(-first // BLOCK)] = 0
                    seen.append(blocks[..., : max(1, (llm.n_tokens - n_last) // BLOCK)])
                    llm.eval([token])
                needed = places(llm, asked.head, asked.document.facts[question.facts[0]].sentence)
                needed = {block for block in needed if -(-first // BLOCK) <= block < seen[0].shape[-1]}
                if needed:
                    asked_for.append((seen, needed, len(prompt.begun)))
            print(f"document {index}: {len(asked_for)} questions", flush=True)

    def found(rows: Sequence[int]) -> float:
        return float(
            np.mean(
                [np.mean(hits(seen, rows, needed, args.budget // BLOCK, begun)) for seen, needed, begun in asked_for]
            )
        )

    peaks = np.mean([np.mean([blocks.max(2).max(1) for blocks in seen], axis=0) for seen, *_ in asked_for], axis=0)
    print("| layer | peak | found |\n|---|---|---|")
    for row in np.argsort(-peaks):
        print(f"| {layers[row]} | {peaks[row]:.3f} | {found([row]):.2f} |")
    best = np.argsort(-peaks)[:4]
    print("| the layers together | found |\n|---|---|")
    for n in (2, 3, 4):
        for rows in combinations(best, n):
            print(f"| {', '.join(str(layers[row]) for row in sorted(rows))} | {found(rows):.2f} |")


if __name__ == "__main__":
    main()
