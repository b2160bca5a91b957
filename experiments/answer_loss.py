"""How likely the expected answers of two hops are, by length: tells settings of a method apart that give as many right answers.

    python experiments/answer_loss.py --seed 2001 --seed 3001 --length 2T --length 4T -o default.json
    python experiments/answer_loss.py --seed 2001 --seed 3001 --length 2T --length 4T --set stair_bias=0.4 -o other.json --against default.json
    python experiments/answer_loss.py --seed 2001 --seed 3001 --length 2T --method rerope -o rerope.json --against default.json

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
from contextlib import closing
from pathlib import Path

import numpy as np

from mesa_gguf import MesaLlama
from mesa_gguf.cli.evaluate import _tokens
from mesa_gguf.lab.evaluate import Evaluation, Options, report
from mesa_gguf.lab.evaluate.loss import token_loss
from mesa_gguf.lab.evaluate.tasks import TASKS
from mesa_gguf.lab.methods import METHODS, open_model
from mesa_gguf.model.bundled import bundled_model
from mesa_gguf.model.header import check_model

TASK = "qa/two-hop"
FLOOR = -5.0
N_DOCUMENTS = 160  # of T tokens; half as many of 2T, and so on

Scores = dict[str, dict[str, float]]
"""By what is measured ("right", "log-probability") the values of the items, named as `report.lead` wants them."""


def score(llm: MesaLlama, question: list[int], answer: list[int]) -> tuple[bool, float]:
    """Whether an answer would be written after what was read and a question, and its log-probability."""
    right, logprob = True, 0.0
    for token, following in zip([None, *answer], answer):
        llm.eval(question if token is None else [token])
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))  # of the last token alone
        right &= int(logits.argmax()) == following
        logprob -= token_loss(logits, following)
    return right, logprob


def run(options: Options) -> Scores:
    """Score the answers of one method at one length, on the documents of a seed."""
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation("qa", options, Path(folder))
    scores: Scores = {"right": {}, "log-probability": {}}
    method, length = options.methods[0], options.lengths[0]
    llm = open_model(options.path, method, length, overrides=options.overrides, **options.machine)
    with closing(llm):
        for unit in evaluation.units:
            if unit.task != TASK:
                continue
            sample, prompts = evaluation._sample(unit)
            llm.reset()
            llm.eval(prompts.head)
            for i, (item, question) in enumerate(zip(sample.items, prompts.tails)):
                llm.n_tokens = len(prompts.head)  # eval() goes on from here
                answer = evaluation.prompter.tokenize(f" {item.turns[0].expected[0]}\n")
                right, logprob = score(llm, question, answer)
                name = f"{options.seed}:{unit.index * unit.n_items + i}"
                scores["right"][name] = float(right)
                scores["log-probability"][name] = round(max(FLOOR, logprob), 4)
    return scores


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
    path = bundled_model()
    train_length = check_model(path).train_length
    overrides = {name: json.loads(value) for name, value in (option.split("=", 1) for option in args.set)}
    machine = {"n_threads": args.threads, "n_threads_batch": args.threads}
    others = json.loads(args.against.read_text(encoding="utf-8"))["scores"] if args.against else {}
    every: dict[str, Scores] = {}
    for text in args.length:
        length = _tokens(text, train_length, "--length")
        n_documents = args.documents or max(1, N_DOCUMENTS * train_length // length)
        scores: Scores = {}
        for seed in args.seed:
            samples = {"qa": n_documents}
            options = Options(path, [args.method], [length], seed, samples, overrides=overrides, machine=machine)
            for what, values in run(options).items():
                scores.setdefault(what, {}).update(values)
        every[str(length)] = scores
        print(f"{length} tokens, {len(scores['right'])} answers")
        for what, values in scores.items():
            line = f"  {what} {math.fsum(values.values()) / len(values):.3f}"
            found = report.lead(values, others.get(str(length), {}).get(what, {}), TASKS[TASK].n_items(options.n_facts))
            if found:
                line += f", difference {found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]"
            print(line, flush=True)
    report.write_json(args.output, {"method": args.method, "overrides": overrides, "scores": every})


if __name__ == "__main__":
    main()
