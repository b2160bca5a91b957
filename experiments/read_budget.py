"""Answers where each token reads a part of a long text (`MesaConfig.read_budget`), against the full reading and against the best choice.

    python experiments/read_budget.py --length 4096 --length 16384 --documents 8 --setting none --setting 512 --setting oracle:512 -o budget.jsonl
    python experiments/read_budget.py -m model.gguf --length 16384 --setting 2048 --setting 2048/4 --setting oracle:2048 -o budget.jsonl
    python experiments/read_budget.py --show -o budget.jsonl

A setting is BUDGET, BUDGET/EVERY (one token in EVERY reads everything), oracle:BUDGET (of every token the blocks that its own attention, of all
layers, goes to most, found by reading everything first), or none (first chunk and last tokens only). All settings are asked the same questions behind
the same reading of a document, as is "full". Tasks are those of `mesa-gguf eval`, and "copy": the text is followed by 32 tokens of itself from
somewhere, and the 64 that come next are to be written.

score is the share of what was expected that is in the answer (of "copy", of tokens that are the right ones behind those before them). same is the
share of tokens at which a setting would write what the full reading writes, behind the same tokens. Both are of pairs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from mesa_gguf import MesaConfig, MesaLlama, _core
from mesa_gguf.lab.evaluate.prompts import Prompter
from mesa_gguf.lab.evaluate.scoring import mean_interval, n_found
from mesa_gguf.lab.evaluate.tasks import TASKS, Brief
from mesa_gguf.llama import llama_cpp
from mesa_gguf.model.bundled import bundled_model

COPY = "copy"
NAMES = (
    "ruler/multikey",
    "ruler/multivalue",
    "qa",
    "qa/two-hop",
    "ruler/variables",
    "ruler/common",
    "ruler/frequent",
    COPY,
)
N_SHOWN, N_COPIED = 32, 64


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
    budget, _, every = setting.removeprefix("oracle:").partition("/")
    if not budget.isdigit():
        return MesaConfig(**numbers)
    return MesaConfig(**numbers, read_budget=int(budget), read_every=int(every) if every else None)


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
) -> list[int]:
    """What a model writes; or behind forced tokens, what it would write in the place of each."""
    llm.n_tokens = n_head
    llm.set_read_ranges(None)
    llm.eval(tail)
    hide_all(llm, setting)
    out: list[int] = []
    while True:
        token = int(np.argmax(logits(llm)))
        out.append(token)
        if forced is not None:
            if len(out) == len(forced):
                return out
            token = forced[len(out) - 1]
        else:
            text = b"".join(map(llm.token_bytes, out)).decode(errors="replace")
            if len(out) == n_max or llama_cpp.llama_vocab_is_eog(llm._model.vocab, token) or stop in text.lstrip("\n"):
                return out
        llm.eval([token])


def run(args: argparse.Namespace) -> None:
    path = args.model or bundled_model()
    prompter = Prompter(path)
    numbers = {name: int(value) for name, _, value in (pair.partition("=") for pair in args.number)}
    there = set()
    if args.output.exists():
        there = {
            (r["task"], r["length"], r["document"], r["model"], r["setting"])
            for r in map(json.loads, args.output.open())
        }
    settings = ["full", *args.setting]
    for length in args.length:
        with ExitStack() as stack:
            llms = {
                s: stack.enter_context(closing(open_setting(path, s, numbers, length + 256, args.threads)))
                for s in settings
            }
            for index in range(args.documents):
                for name in args.task or NAMES:
                    todo = [s for s in settings if (name, length, index, path.name, s) not in there]
                    if not todo:
                        continue
                    rows = ask(llms, todo, prompter, name, length, index, args.facts)
                    with args.output.open("a") as file:
                        for row in rows:
                            file.write(
                                json.dumps(
                                    {"task": name, "length": length, "document": index, "model": path.name, **row}
                                )
                                + "\n"
                            )
                    print(name, length, index, flush=True)


def ask(
    llms: dict[str, Llama], settings: list[str], prompter: Prompter, name: str, length: int, index: int, n_facts: int
) -> list[dict[str, Any]]:
    full = llms["full"]
    seed = f"budget:{name}:{length}:{index}"
    if name == COPY:
        sample, prompts = prompter.fit(
            TASKS["qa"], length - N_COPIED, lambda n: Brief(prompter.style, seed, n, prompter.count, None, n_facts)
        )
        rng = random.Random(seed)
        head = prompts.head
        starts = [
            rng.randrange(length // 16, len(head) - 1024 if len(head) > 4096 else len(head) * 3 // 4) for _ in range(4)
        ]
        asked = [(head[s : s + N_SHOWN], head[s + N_SHOWN : s + N_SHOWN + N_COPIED], None) for s in starts]
    else:
        task = TASKS[name]
        sample, prompts = prompter.fit(
            task, length, lambda n: Brief(prompter.style, seed, n, prompter.count, None, n_facts)
        )
        head = prompts.head
        turns = [turn for item in sample.items for turn in item.turns][:8]
        form = prompter.form
        asked = [(form.tail(t.question, begun=t.prefix if form.is_plain else ""), None, t) for t in turns]
        room = task.answer_room(prompter.style)
    full.reset()
    full.eval(head)
    state = full.save_state()
    rows = []
    for setting in dict.fromkeys(["full", *settings]):
        if setting != "full":
            llms[setting].load_state(state)
    for number, (tail, copied, turn) in enumerate(asked):
        reference: list[int] = []
        for setting in dict.fromkeys(["full", *settings]):
            llm = llms[setting]
            row: dict[str, Any] = {"setting": setting, "question": number}
            if copied is not None:
                out = written(llm, setting, len(head), tail, copied, 0, "")
                if setting == "full":
                    reference = out
                row["score"] = float(np.mean(np.equal(out, copied)))
                row["same"] = float(np.mean(np.equal(out, reference)))
                row["n"] = len(out)
            else:
                assert turn is not None
                if setting == "full":
                    reference = out = written(llm, setting, len(head), tail, None, room, prompter.stop)
                    row["same"] = 1.0
                else:
                    out = written(llm, setting, len(head), tail, reference, 0, "")
                    row["same"] = float(np.mean(np.equal(out, reference)))
                    if out != reference:
                        out = written(llm, setting, len(head), tail, None, room, prompter.stop)
                text = llm.detokenize(out).decode(errors="replace")
                row["score"] = n_found(turn.expected, text, exact=turn.exact) / len(turn.expected)
                row["answer"] = text
                row["n"] = len(out)
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
    parser.add_argument("--documents", type=int, default=4, help="of each task and length")
    parser.add_argument("--task", action="append", choices=NAMES, help="default: all")
    parser.add_argument("--setting", action="append", default=[])
    parser.add_argument(
        "--number", action="append", default=[], metavar="NAME=N", help="of MesaConfig, for all settings"
    )
    parser.add_argument("--facts", type=int, default=20, help="in a document of qa")
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
