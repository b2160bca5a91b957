"""Uses one context for as long as asked for: random turns, answers, edits, roll-backs, saved and loaded states, chats that
take turns. At random moments a new context replays the history that is left, and must give the same logits; memory must
not grow.

    python soak.py --seconds 3600
    python soak.py --seconds 600 --model model.gguf --n-ctx 8192
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mesa_gguf import MesaConfig, MesaLlama
from mesa_gguf.state import MesaState

sys.path.insert(0, str(Path(__file__).parent))  # where PYTHONSAFEPATH keeps it out
import make_models  # isort: skip
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # isort: skip

GROWTH = 24 * 2**20  # bytes of memory that the allocator may come to hold after the warm-up
WARM_UP = 0.25  # of the time


def memory() -> int:
    """Bytes of memory that the process holds."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # the most that it ever held, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass
class History:
    """What a fresh context must do to come to the same place: read texts, and forget their ends."""

    texts: list[list[int]] = field(default_factory=list)  # in the order that they were read
    keep: list[int] = field(default_factory=list)  # tokens of each that are still there

    @property
    def n(self) -> int:
        return sum(self.keep)

    def read(self, tokens: list[int]) -> None:
        self.texts.append(list(tokens))
        self.keep.append(len(tokens))

    def roll_back(self, n: int) -> None:
        """To n tokens."""
        while self.keep and self.n - self.keep[-1] >= n:
            self.texts.pop()
            self.keep.pop()
        if self.n > n:
            self.keep[-1] -= self.n - n

    def copy(self) -> History:
        return History(list(self.texts), list(self.keep))

    def replay(self, llm: MesaLlama) -> None:
        for text, n in zip(self.texts, self.keep, strict=True):
            llm.eval(text)
            llm.n_tokens -= len(text) - n


class Recorded(MesaLlama):
    """Keeps its history: every eval, whoever calls it, and every roll-back."""

    history: History
    n_before = 0

    def eval(self, tokens: list[int]) -> None:  # type: ignore[override]
        self.n_before = self.n_tokens
        self.history.roll_back(self.n_tokens)
        super().eval(tokens)
        if self.n_before < 0:
            self.history = History()
            self.history.read(self.input_ids[: self.n_tokens].tolist())
        elif tokens:
            self.history.read(tokens)

    def _eval(self, tokens: list[int], to_borders: bool = True) -> None:
        if (
            self.n_tokens < self.n_before
        ):  # a text that fits into T again is read plainly: what was before is no part of it
            self.n_before = -1
        super()._eval(tokens, to_borders)


class Soak:
    def __init__(self, model: Path, config: MesaConfig, n_ctx: int, seed: int, tolerance: float) -> None:
        self.random = np.random.default_rng(seed)
        self.tolerance = tolerance
        options: dict[str, Any] = dict(n_ctx=n_ctx, n_batch=256, type_k=0, type_v=0, flash_attn=False, logits_all=True)
        self.options = dict(model_path=model, mesa=config, n_threads=1, n_threads_batch=1, **options)
        self.llm = Recorded(**self.options)
        self.llm.history = History()
        self.n_ctx, self.n_vocab = n_ctx, self.llm.n_vocab()
        self.saved: list[tuple[MesaState, History]] = []
        self.turn = 0
        self.counts = Counter[str]()
        self.worst = 0.0

    def text(self, n: int) -> list[int]:
        room = self.n_ctx - self.llm.n_tokens - 40
        return self.random.integers(0, self.n_vocab, min(n, room)).tolist()

    def step(self) -> None:
        if self.llm.n_tokens > self.n_ctx - 100:
            self.roll_back_to(int(self.random.integers(0, self.n_ctx // 2)))
        names = [
            "read",
            "read",
            "answer",
            "answer",
            "speculate",
            "edit",
            "roll_back",
            "save",
            "load",
            "regenerate",
            "reset",
        ]
        weights = np.array([4, 4, 6, 6, 4, 3, 3, 2, 2, 2, 0.2])
        name = str(self.random.choice(names, p=weights / weights.sum()))
        getattr(self, name)()
        self.counts[name] += 1

    def read(self) -> None:
        self.turn = self.llm.n_tokens
        self.llm.eval(self.text(int(self.random.choice([1, 10, 40, 150, 400]))))

    def answer(self) -> None:
        self.generate(self.prompt(), int(self.random.integers(1, 25)))

    def prompt(self) -> list[int]:
        return self.llm.input_ids[: self.llm.n_tokens].tolist() or self.text(5)

    def generate(self, prompt: list[int], n: int) -> list[int]:
        self.llm.set_seed(int(self.random.integers(2**31)))
        return [
            token for _, token in zip(range(min(n, self.n_ctx - len(prompt) - 15)), self.llm.generate(prompt, temp=0.7))
        ]

    def speculate(self) -> None:
        prompt = self.prompt()
        prompt = prompt + prompt[-10:]
        self.llm.draft_model = LlamaPromptLookupDecoding(num_pred_tokens=int(self.random.integers(1, 10)))
        self.generate(prompt, int(self.random.integers(1, 25)))
        self.llm.draft_model = None

    def edit(self) -> None:
        self.roll_back_to(min(self.turn, self.llm.n_tokens))
        self.llm.eval(self.text(30))
        self.answer()

    def regenerate(self) -> None:
        prompt = self.prompt()
        for _ in range(2):
            self.generate(prompt, 8)

    def roll_back(self) -> None:
        self.roll_back_to(int(self.random.integers(0, self.llm.n_tokens + 1)))

    def roll_back_to(self, n: int) -> None:
        self.llm.n_tokens = n

    def reset(self) -> None:
        self.llm.reset()

    def save(self) -> None:
        self.llm.history.roll_back(self.llm.n_tokens)
        self.saved.append((self.llm.save_state(), self.llm.history.copy()))
        self.saved = self.saved[-4:]

    def load(self) -> None:
        if self.saved:
            state, history = self.saved[int(self.random.integers(len(self.saved)))]
            self.llm.load_state(state)
            self.llm.history = history.copy()
            self.turn = 0

    def check(self) -> None:
        """A new context, the same history, and the next few tokens."""
        self.llm.n_tokens = min(self.llm.n_tokens, self.n_ctx - 60)
        self.llm.history.roll_back(self.llm.n_tokens)
        history = self.llm.history.copy()
        fresh = MesaLlama(**self.options)
        history.replay(fresh)
        assert fresh.n_tokens == self.llm.n_tokens
        for tokens in (self.text(1), self.text(9)):
            n = self.llm.n_tokens
            for llm in (self.llm, fresh):
                llm.eval(tokens)
            assert fresh.plan() == self.llm.plan(), f"plans differ: {self.llm.plan()} here, {fresh.plan()} in a replay"
            error = float(np.abs(self.llm.scores[n : n + len(tokens)] - fresh.scores[n : n + len(tokens)]).max())
            assert error <= self.tolerance, f"logits differ by {error} after {self.llm.n_tokens} tokens"
            self.worst = max(self.worst, error)
        fresh.close()
        self.counts["replays"] += 1


def soak(subject: Soak, seconds: float, report: float = 60.0) -> None:
    begin = time.monotonic()
    warm: int | None = None
    next_report = report
    peak = 0
    while (now := time.monotonic() - begin) < seconds:
        subject.step()
        if subject.random.integers(25) == 0:
            subject.check()
        held = memory()
        if now >= WARM_UP * seconds:
            warm = warm if warm is not None else held
            peak = max(peak, held)
            grown = held - warm
            assert grown <= GROWTH, f"memory grew by {grown / 2**20:.1f} MiB in {now:.0f} s: {dict(subject.counts)}"
        if now >= next_report:
            print(f"{now:.0f} s, {held / 2**20:.1f} MiB, {sum(subject.counts.values())} steps", flush=True)
            next_report += report
    subject.check()
    print(
        f"{sum(subject.counts.values())} steps in {seconds:.0f} s: {dict(subject.counts)}; worst difference to a replay "
        f"{subject.worst:.2e}; memory {(warm or 0) / 2**20:.1f} MiB after the warm-up, at most {peak / 2**20:.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: a tiny one with random weights, T = 128)")
    parser.add_argument("--n-ctx", type=int, default=1536)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference in a logit")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        if arguments.model is None:
            model = make_models.MODELS["llama-yarn"](Path(folder) / "model.gguf")
            config = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=16)
        else:
            model, config = arguments.model, MesaConfig()
        soak(Soak(model, config, arguments.n_ctx, arguments.seed, arguments.tolerance), arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
