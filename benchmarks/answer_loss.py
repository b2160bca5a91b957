"""How likely the expected answers of two hops are, by length: tells settings of a method apart that give as many right answers.

    python benchmarks/answer_loss.py --seed 2001 --seed 3001 --length 2T --length 4T -o default.json
    python benchmarks/answer_loss.py --seed 2001 --seed 3001 --length 2T --length 4T --set stair_bias=0.4 -o other.json --against default.json
    python benchmarks/answer_loss.py --seed 2001 --seed 3001 --length 2T --method rerope -o rerope.json --against default.json

The documents and questions are those of `mesa-gguf eval qa` with the same seeds. The expected answer is read token by token after
the question; it counts as right if each token was the likeliest, which is what greedy decoding would have written. Its
log-probability counts from -5 up, so that a few lost answers do not decide. Differences have the interval of the mean
over documents, whose questions are not independent of each other.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mesa_gguf import MesaLlama, ask
from mesa_gguf.bundled import bundled_model
from mesa_gguf.evaluate import Evaluation, Options
from mesa_gguf.methods import METHODS, open_model

TASK = "qa/two-hop"
FLOOR = -5.0
N_DOCUMENTS = 160  # of T tokens; half as many of 2T, and so on


def logits(llm: MesaLlama) -> np.ndarray:
    """Of the last token that was read: (n_vocab,), in f64."""
    import llama_cpp  # after mesa_gguf, which tells it what library to load

    pointer = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).astype(np.float64)


def score(llm: MesaLlama, question: list[int], answer: list[int]) -> tuple[float, bool]:
    """Log-probability of an answer after what was read and a question, and whether it would be written."""
    total, right = 0.0, True
    for token, following in zip([None, *answer], answer):
        llm.eval(question if token is None else [token])
        own = logits(llm)
        top = own.max()
        total += float(own[following] - top - np.log(np.exp(own - top).sum()))
        right &= int(own.argmax()) == following
    return total, right


def run(
    method: str, length: int, seed: int, n_documents: int, overrides: dict[str, Any], threads: int
) -> list[dict[str, Any]]:
    path = bundled_model()
    options = Options(path, [method], [length], seed, {"qa": n_documents}, overrides=overrides)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation("qa", options, Path(folder))
    llm = open_model(path, method, length, overrides=overrides, n_threads=threads, n_threads_batch=threads)
    with closing(llm):
        for unit in evaluation.units:
            if unit.task != TASK:
                continue
            sample, prompts = evaluation._sample(unit)
            ask.read_document(llm, prompts)
            for item, question in zip(sample.items, prompts.questions):
                llm.n_tokens = len(prompts.document)  # eval() goes on from here
                answer = evaluation.prompter.tokenize(f" {item.turns[0].expected[0]}\n")
                loss, right = score(llm, question, answer)
                rows.append(
                    {"length": length, "document": f"{seed}/{unit.index}", "logprob": round(loss, 4), "right": right}
                )
    return rows


def mean(values: list[float]) -> str:
    """The mean and half its 95 % interval."""
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{np.mean(values):+.3f} ± {half:.3f}"


def compare(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Print what rows have more than others, question by question."""
    by_document: dict[tuple[int, str], list[list[dict[str, Any]]]] = defaultdict(lambda: [[], []])
    for side, side_rows in enumerate((rows, others)):
        for row in side_rows:
            by_document[row["length"], row["document"]][side].append(row)
    for length in sorted({row["length"] for row in rows}):
        right, logprob = [], []
        for (own_length, _), (ours, theirs) in by_document.items():
            if own_length == length and len(ours) == len(theirs):
                pairs = list(zip(ours, theirs))
                right.append(float(np.mean([a["right"] - b["right"] for a, b in pairs])))
                logprob.append(float(np.mean([max(FLOOR, a["logprob"]) - max(FLOOR, b["logprob"]) for a, b in pairs])))
        if right:
            print(f"{length} tokens, {len(right)} documents: right {mean(right)}, log-probability {mean(logprob)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="mesa", choices=list(METHODS))
    parser.add_argument("--length", action="append", required=True, help="in tokens or as 4T; may be repeated")
    parser.add_argument("--seed", action="append", type=int, required=True, help="may be repeated")
    parser.add_argument(
        "--documents", type=int, help=f"of a length and seed; default: as many as have {N_DOCUMENTS} T tokens"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of MesaConfig; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="what another run has written")
    args = parser.parse_args()
    overrides = {name: json.loads(value) for name, value in (option.split("=", 1) for option in args.set)}
    rows: list[dict[str, Any]] = []
    for text in args.length:
        times = text.removesuffix("T")
        length = 512 * int(times) if times != text else int(text)
        own = []
        for seed in args.seed:
            n_documents = args.documents or max(1, N_DOCUMENTS * 512 // length)
            own += run(args.method, length, seed, n_documents, overrides, args.threads)
        rows += own
        clipped = float(np.mean([max(FLOOR, row["logprob"]) for row in own]))
        print(
            f"{length} tokens: {sum(row['right'] for row in own)} of {len(own)} right, log-probability {clipped:.3f}",
            flush=True,
        )
    args.output.write_text(
        json.dumps({"method": args.method, "overrides": overrides, "rows": rows}) + "\n", encoding="utf-8"
    )
    if args.against:
        compare(rows, json.loads(args.against.read_text(encoding="utf-8"))["rows"])


if __name__ == "__main__":
    main()
