"""A context and the oracle side by side: whatever is decoded, the oracle reads too, under the plan that was in force.

So what a context does is compared with a replay of its own history (docs/CONVERSATIONS.md), through any of its entrances:
eval, generate, speculation, caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import oracle
from conftest import oracle_read, worst
from mesa_gguf import MesaLlama, MesaPlan
from mesa_gguf.state import MesaState


@dataclass(frozen=True)
class Event:
    """Tokens that were read in one go: where they begin, how many, under which plan, and how far from the oracle."""

    start: int
    n: int
    plan: MesaPlan
    error: float


@dataclass(frozen=True)
class Saved:
    """A state of both."""

    state: MesaState
    n: int
    keys: list[oracle.Floats]
    values: list[oracle.Floats]


class Mirror:
    """Follows a context that computes the logits of every token (logits_all)."""

    def __init__(self, llm: MesaLlama, *, flash: bool = False) -> None:
        self.llm = llm
        params = llm._params
        model = oracle.Model.from_gguf(Path(llm.model_path), kv_half=flash)
        self.state = oracle.State(
            model,
            log_scaling_T=params.log_length if params.log_scaling else None,
            stair_bias=params.stair_bias,
            near=params.last_chunk,
        )
        self.events: list[Event] = []
        self._decode = llm._ctx.decode
        llm._ctx.decode = self.decode  # type: ignore[method-assign]

    def decode(self, batch: Any) -> None:
        self._decode(batch)
        n = batch.n_tokens()
        start = batch.batch.pos[0]
        tokens = [batch.batch.token[i] for i in range(n)]
        if self.state.n > start:
            self.state.rollback(self.state.n - start)
        assert self.state.n == start
        plan = self.llm.plan()
        expected = oracle_read(self.state, plan, tokens, self.llm.read_ranges())
        logits = np.ctypeslib.as_array(self.llm._ctx.get_logits(), shape=(n, self.llm._n_vocab))
        self.events.append(Event(start, n, plan, worst(logits, expected)))

    @property
    def error(self) -> float:
        """The largest difference in a logit so far."""
        return max((event.error for event in self.events), default=0.0)

    def save(self) -> Saved:
        n = self.llm.n_tokens
        keep = slice(0, n)
        return Saved(self.llm.save_state(), n, [k[keep] for k in self.state.keys], [v[keep] for v in self.state.values])

    def load(self, saved: Saved) -> None:
        self.llm.load_state(saved.state)
        self.take(saved)

    def take(self, saved: Saved) -> None:
        """Follow a context that loaded the state by itself."""
        self.state.n, self.state.keys, self.state.values = saved.n, list(saved.keys), list(saved.values)
