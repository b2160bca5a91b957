"""Answers where each token reads a part of a long text (`MesaConfig.read_budget`), against the full reading and against the best choice.

    python experiments/read_budget.py --length 4096 --length 16384 --documents 8 --setting none --setting 512 --setting oracle:512 -o budget.jsonl
    python experiments/read_budget.py -m model.gguf --length 16384 --setting 2048 --setting 2048/4 --setting oracle:2048 -o budget.jsonl
    python experiments/read_budget.py --show -o budget.jsonl

A setting is BUDGET, BUDGET/EVERY (one token in EVERY reads everything), BUDGET@LAYERS (of `read_layers`, as 18,23), oracle:BUDGET (of every token the blocks that its own attention, of all
layers, goes to most, found by reading everything first), or none (first chunk and last tokens only). All settings are asked the same questions behind
the same reading of a document, as is "full". Tasks are those of `mesa-gguf eval`; "facts", those of `mesa-gguf eval real`, of each fact one question;
"begun", the same, where the answer's beginning is given and the rest scored: whether its tokens are the likeliest ones; and "copy": the text is followed
by 32 tokens of itself from somewhere, and the 64 that come next are to be written.

score is the share of what was expected that is in the answer (of "copy", of tokens that are the right ones behind those before them). same is the
share of tokens at which a setting would write what the full reading writes, behind the same tokens. Both are of pairs. With --keep a document is read once
and its state kept in a folder, for other settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mesa_gguf import MesaConfig, MesaLlama, _core
from mesa_gguf.lab.evaluate.loss import token_loss
from mesa_gguf.lab.evaluate.prompts import Prompter
from mesa_gguf.lab.evaluate.real import MAX_TOKENS, make_asked
from mesa_gguf.lab.evaluate.scoring import mean_interval, n_found
from mesa_gguf.lab.evaluate.tasks import TASKS, Brief, Turn
from mesa_gguf.lab.facts import Form, Haystack, default_text
from mesa_gguf.lab.facts import Question as FactQuestion
from mesa_gguf.llama import llama_cpp
from mesa_gguf.model.bundled import bundled_model

COPY, FACTS, BEGUN = "copy", "facts", "begun"
FORMS: tuple[Form, ...] = ("literal", "paraphrase", "two-hop")
NAMES = (
    "ruler/multikey",
    "ruler/multivalue",
    "qa",
    "qa/two-hop",
    "ruler/variables",
    "ruler/common",
    "ruler/frequent",
    FACTS,
    BEGUN,
    COPY,
)
N_SHOWN, N_COPIED = 32, 64


@dataclass(frozen=True)
class Question:
    """What follows a document.

    Attributes:
        task: as it is called in the table.
        tail: tokens.
        answer: what is to be written, token by token, where that is given; and
        n_begun: of those, how many do not count.
        turn, fact: else, what tells whether an answer is right.
        whole: all tokens of the answer must be the likeliest, or it counts as none; False: their share counts.
        room: for the answer, in tokens.
    """

    task: str
    tail: list[int]
    answer: list[int] | None = None
    n_begun: int = 0
    turn: Turn | None = None
    fact: FactQuestion | None = None
    whole: bool = False
    room: int = 0

    def score(self, written: str) -> float:
        if self.fact is not None:
            return float(self.fact.is_right(written))
        assert self.turn is not None
        return n_found(self.turn.expected, written, exact=self.turn.exact) / len(self.turn.expected)


class Llama(MesaLlama):
    """Of each token that is generated, the blocks that it attends to most; oracle: how many keys, 0: as usual."""

    oracle = 0

    def eval(self, tokens: Sequence[int]) -> None:
        if not self.oracle or len(tokens) > 1:
            super().eval(tokens)
            return
        self.set_read_ranges(None)
        super().eval(tokens)
        scores = self.attention().sum(0)
        params = self._params
        best = _core.choose_ranges(params, self.plan()._plan, scores)
        self.n_tokens -= 1
        n = self.n_tokens
        self.set_read_ranges([(a, min(b, n)) for a, b in best if a < n])
        super().eval(tokens)


def config_of(setting: str, numbers: dict[str, Any]) -> MesaConfig:
    setting, _, layers = setting.removeprefix("oracle:").partition("@")
    budget, _, every = setting.partition("/")
    if not budget.isdigit():
        return MesaConfig(**numbers, tuned=False)
    return MesaConfig(
        **numbers,
        tuned=False,
        read_budget=int(budget),
        read_every=int(every) if every else None,
        read_layers=tuple(map(int, layers.split(","))) if layers else None,
    )


def open_setting(path: Path, setting: str, numbers: dict[str, Any], n_ctx: int, threads: int) -> Llama:
    llm = Llama(
        path,
        mesa=config_of(setting, numbers),
        n_ctx=n_ctx,
        n_threads=threads,
        n_threads_batch=threads,
        swa_full=True,
        verbose=False,
    )
    if setting.startswith("oracle:"):
        llm.oracle = int(setting.partition(":")[2])
        llm.enable_attention(10**6)
    return llm


def logits(llm: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))


def hide_all(llm: Llama, setting: str) -> None:
    """What is read by none."""
    if setting == "none":
        n, params = llm.n_tokens, llm._params
        assert params is not None
        starts = llm.plan().chunk_starts
        first = starts[1] if len(starts) > 1 else params.first_chunk
        if n - params.last_chunk > first:
            llm.set_read_ranges([(0, first), (n - params.last_chunk, n)])


def written(
    llm: Llama, setting: str, n_head: int, tail: list[int], forced: Sequence[int] | None, n_max: int, stop: str
) -> tuple[list[int], list[float]]:
    """What a model writes; or behind forced tokens, what it would write in the place of each, and how much the forced one is worth, in nats."""
    llm.n_tokens = n_head
    llm.set_read_ranges(None)
    llm.eval(tail)
    hide_all(llm, setting)
    out: list[int] = []
    losses: list[float] = []
    while True:
        row = logits(llm)
        token = int(np.argmax(row))
        out.append(token)
        if forced is not None:
            losses.append(token_loss(row, forced[len(out) - 1]))
            if len(out) == len(forced):
                return out, losses
            token = forced[len(out) - 1]
        else:
            text = b"".join(map(llm.token_bytes, out)).decode(errors="replace")
            if len(out) == n_max or llama_cpp.llama_vocab_is_eog(llm._model.vocab, token) or stop in text.lstrip("\n"):
                return out, losses
        llm.eval([token])


def make(prompter: Prompter, name: str, length: int, seed: str, n_facts: int) -> tuple[list[int], list[Question]]:
    """A document's tokens, and questions."""

    def brief(n: int) -> Brief:
        return Brief(prompter.style, seed, n, prompter.count, None, n_facts)

    if name in (FACTS, BEGUN):
        asked = make_asked(prompter.form, Haystack(default_text()), length, seed, FORMS, n_facts)
        questions = []
        for fact, prompt in zip(asked.document.questions, asked.prompts, strict=True):
            if fact.form != "two-hop" and (fact.facts[0] % 2 == 0) != (fact.form == "literal"):
                continue
            task = f"{name}, {fact.form}"
            if name == FACTS:
                questions.append(Question(task, prompt.tail, fact=fact, room=MAX_TOKENS))
            else:
                answer = [*prompt.begun, *prompt.answer]
                questions.append(Question(task, prompt.tail, answer, len(prompt.begun), whole=True))
        return asked.head, questions
    if name == COPY:
        _, prompts = prompter.fit(TASKS["qa"], length - N_COPIED, brief)
        rng = random.Random(seed)
        head = prompts.head
        starts = [
            rng.randrange(length // 16, len(head) - 1024 if len(head) > 4096 else len(head) * 3 // 4) for _ in range(4)
        ]
        return head, [Question(name, head[s : s + N_SHOWN], head[s + N_SHOWN : s + N_SHOWN + N_COPIED]) for s in starts]
    task = TASKS[name]
    sample, prompts = prompter.fit(task, length, brief)
    form, room = prompter.form, task.answer_room(prompter.style)
    turns = [turn for item in sample.items for turn in item.turns][:8]
    tails = [form.tail(turn.question, begun=turn.prefix if form.is_plain else "") for turn in turns]
    return prompts.head, [Question(name, tail, turn=turn, room=room) for tail, turn in zip(tails, turns, strict=True)]


def read(llm: Llama, head: list[int], folder: Path | None) -> Any:
    """The state behind a document."""
    file = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        what = repr((llm.chunk_origin, llm.mesa, head))
        file = folder / hashlib.sha256(what.encode()).hexdigest()[:24]
        if file.exists():
            state = pickle.loads(file.read_bytes())
            llm.load_state(state)
            return state
    llm.reset()
    llm.eval(head)
    state = llm.save_state()
    if file is not None:
        file.with_suffix(".part").write_bytes(pickle.dumps(state))
        file.with_suffix(".part").rename(file)
    return state


def run(args: argparse.Namespace) -> None:
    path = args.model or bundled_model()
    prompter = Prompter(path)
    numbers = {name: int(value) for name, _, value in (pair.partition("=") for pair in args.number)}
    there = set()
    if args.output.exists():
        there = {
            (r["task"].partition(",")[0], r["length"], r["document"], r["model"], r["setting"])
            for r in map(json.loads, args.output.open())
        }
    settings = ["full", *args.setting]
    for length in args.length:
        with ExitStack() as stack:
            llms = {
                s: stack.enter_context(closing(open_setting(path, s, numbers, length + 256, args.threads)))
                for s in settings
            }
            for index in range(args.first, args.first + args.documents):
                for name in args.task or NAMES:
                    todo = [s for s in settings if (name, length, index, path.name, s) not in there]
                    if not todo:
                        continue
                    # the two tasks of facts ask about the same document
                    seed = f"budget:{FACTS if name == BEGUN else name}:{length}:{index}"
                    head, questions = make(prompter, name, length, seed, args.facts)
                    state = read(llms["full"], head, args.keep)
                    for setting in todo:
                        if setting != "full":
                            llms[setting].load_state(state)
                    rows = ask(llms, todo, len(head), questions, prompter.stop)
                    same = {"length": length, "document": index, "model": path.name}
                    with args.output.open("a") as file:
                        file.writelines(json.dumps({**same, **row}) + "\n" for row in rows)
                    print(name, length, index, flush=True)


def ask(
    llms: dict[str, Llama], settings: list[str], n_head: int, questions: list[Question], stop: str
) -> list[dict[str, Any]]:
    rows = []
    for number, question in enumerate(questions):
        reference: list[int] = []
        for setting in dict.fromkeys(["full", *settings]):
            llm = llms[setting]
            row: dict[str, Any] = {"task": question.task, "setting": setting, "question": number}

            def write(
                forced: Sequence[int] | None, llm: Llama = llm, setting: str = setting, question: Question = question
            ) -> tuple[list[int], list[float]]:
                return written(llm, setting, n_head, question.tail, forced, question.room, stop)

            if question.answer is not None:
                out, losses = write(question.answer)
                row["loss"] = float(np.mean(losses[question.n_begun :]))
                reference = reference or out
                right = np.equal(out, question.answer)[question.n_begun :]
                row["score"] = float(right.all() if question.whole else right.mean())
            else:
                out, _ = write(reference or None)
                reference = reference or out
            row["same"] = float(np.mean(np.equal(out, reference)))
            row["n"] = len(out)
            if question.answer is None:
                if out != reference:
                    out, _ = write(None)
                row["answer"] = llm.detokenize(out).decode(errors="replace")
                row["score"] = question.score(row["answer"])
            if setting in settings:
                rows.append(row)
    return rows


def show(path: Path) -> None:
    rows = [json.loads(line) for line in path.open()]
    cells: dict[tuple[str, int, str], dict[str, dict[tuple[int, int], dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        cells[row["model"], row["length"], row["task"]][row["setting"]][row["document"], row["question"]] = row
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    print("| model | tokens | task | n | tokens of an answer | " + " | ".join(settings) + " |")
    print("|---" * (5 + len(settings)) + "|")
    for (model, length, task), by_setting in cells.items():
        full = by_setting["full"]
        shown = []
        for setting in settings:
            own = by_setting.get(setting, {})
            pairs = [key for key in own if key in full]
            if not pairs:
                shown.append("")
                continue
            score = np.mean([own[key]["score"] for key in pairs])
            if setting == "full":
                shown.append(f"{score:.2f}")
                continue
            low, high = mean_interval([own[key]["score"] - full[key]["score"] for key in pairs])
            same = np.average([own[key]["same"] for key in pairs], weights=[full[key]["n"] for key in pairs])
            shown.append(f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}, {same:.1%}")
        n_tokens = np.mean([row["n"] for row in full.values()])
        print(f"| {model[:20]} | {length:,} | {task} | {len(full)} | {n_tokens:.0f} | " + " | ".join(shown) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="default: the bundled one")
    parser.add_argument("--length", type=int, action="append", default=[])
    parser.add_argument("--first", type=int, default=0, help="number of the first document, which is its seed")
    parser.add_argument("--documents", type=int, default=4, help="of each task and length")
    parser.add_argument("--task", action="append", choices=NAMES, help="default: all")
    parser.add_argument("--setting", action="append", default=[])
    parser.add_argument(
        "--number", action="append", default=[], metavar="NAME=N", help="of MesaConfig, for all settings"
    )
    parser.add_argument("--facts", type=int, default=20, help="in a document of qa, facts and begun")
    parser.add_argument("--keep", type=Path, help="folder of states, one for each document: 23 kB a token of SmolLM2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of results, which is added to")
    parser.add_argument("--show", action="store_true", help="print the table")
    args = parser.parse_args()
    if args.show:
        show(args.output)
    else:
        run(args)


if __name__ == "__main__":
    main()
