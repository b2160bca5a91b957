"""Properties, searched with Hypothesis: whatever is asked for in whatever order, the logits are those of the oracle that
replays the same history; what cannot work is an error, and no abort.

HYPOTHESIS_PROFILE=thorough searches longer, as the slow test at the end does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import make_models
from conftest import F32, ModelPath, Opener, random_tokens, run_python
from mesa_gguf import ConfigError, MesaConfig, MesaLlama, MesaPlan
from mirror import Mirror, Saved

T = 128  # of the models of make_models.py
KINDS = ["llama", "llama-gqa", "llama-yarn", "qwen2", "stablelm", "gptneox", "mpt"]
EXACT, FLASH = 1e-3, 0.1  # as in test_engine.py

N_CTX = 768


# Any valid configuration.


@st.composite
def configs(draw: st.DrawFn) -> MesaConfig:
    """Every number that a configuration may have for T = 128, those of no use included."""
    first = draw(st.integers(1, 100))
    chunk = draw(st.integers(1, T - first))
    last = draw(st.integers(1, T - first - 1))
    room = draw(st.integers(0, T - first - last - 1))
    return MesaConfig(
        first_chunk=first,
        chunk=chunk,
        last_chunk=last,
        room=room,
        stair_width=draw(st.one_of(st.just("auto"), st.integers(1, 200))),
        log_scaling=draw(st.booleans()),
        stair_bias=draw(st.sampled_from([0.0, 0.5, 1.0])),
        log_length=draw(st.sampled_from([None, T, 2 * T, 200])),
        read_budget=draw(st.sampled_from([None, None, 32, 50, 128, 1000])),
        read_every=draw(st.integers(1, 12)),
    )


steps = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 300)),
    st.tuples(st.just("answer"), st.integers(1, 25)),
    st.tuples(st.just("back"), st.integers(1, 250)),
    st.tuples(st.just("state"), st.just(0)),
)


def check_plan(before: MesaPlan, after: MesaPlan, n_past: int, n_total: int, config: MesaConfig) -> None:
    """What every plan must hold, whoever made it."""
    assert after.n_positions(n_total) <= T
    starts = after.chunk_starts
    if len(starts) > 1:
        for start, end in pairwise(starts[1:]):
            if end > n_past:  # else it was read already, maybe as a last chunk
                assert end - max(start, n_past) <= config.chunk
                assert starts[1] + end - start <= T
    if not after.is_plain:  # what was read stays: borders are added at its end, or before it where it was read plainly
        read_before = [s for s in before.chunk_starts if s < n_past]
        assert [s for s in starts if s < n_past][: len(read_before)] == read_before


@given(
    config=configs(),
    kind=st.sampled_from(KINDS),
    flash=st.booleans(),
    n_batch=st.integers(1, 600),
    n_ubatch=st.integers(1, 600),
    script=st.lists(steps, min_size=1, max_size=7),
)
def test_any_reading_equals_the_oracle(
    model_path: ModelPath,
    open_llama: Opener,
    config: MesaConfig,
    kind: str,
    flash: bool,
    n_batch: int,
    n_ubatch: int,
    script: list[tuple[str, int]],
) -> None:
    """Any configuration and batch sizes; prompts after prompts, answers, roll-backs to anywhere, states, in any order."""
    llm = open_llama(model_path(kind), config, flash=flash, n_ctx=N_CTX, n_batch=n_batch, n_ubatch=n_ubatch)
    mirror = Mirror(llm, flash=flash)
    try:
        for i, (step, size) in enumerate(script):
            if step == "back":
                llm.n_tokens -= min(size, llm.n_tokens)
            elif step == "state":
                mirror.load(mirror.save())
            else:
                tokens = random_tokens(min(size, N_CTX - llm.n_tokens), seed=i)
                for piece in [[t] for t in tokens] if step == "answer" else [tokens]:
                    read_or_refuse(llm, piece, config)
    finally:
        llm.close()
    assert mirror.error <= (FLASH if flash else EXACT)


def read_or_refuse(llm: MesaLlama, tokens: list[int], config: MesaConfig) -> None:
    n_past = llm.n_tokens
    llm._ctx.kv_cache_seq_rm(-1, n_past, -1)
    before = llm.plan()
    refused = ""
    try:
        llm.eval(tokens)
    except ConfigError as err:
        refused = str(err)
    if refused:
        assert config.stair_width != "auto" and "stair_width" in refused
        assert llm.n_tokens <= n_past and llm.plan().n_positions(max(1, llm.n_tokens)) <= T
    else:
        assert llm.n_tokens == n_past + len(tokens)
        check_plan(before, llm.plan(), n_past, llm.n_tokens, config)


@given(
    config=configs(), n=st.integers(T + 1, N_CTX), cuts=st.lists(st.integers(1, N_CTX - 1), max_size=5), data=st.data()
)
def test_a_planned_text_in_any_pieces(
    model_path: ModelPath, open_llama: Opener, config: MesaConfig, n: int, cuts: list[int], data: st.DataObject
) -> None:
    """Announced once, handed over in any pieces (llama_mesa_prompt, then decodes): the plan stays as it was made."""
    kind = data.draw(st.sampled_from(KINDS), "kind")
    sizes = {name: data.draw(st.integers(1, 400), name) for name in ("n_batch", "n_ubatch")}
    llm = open_llama(model_path(kind), config, n_ctx=N_CTX, **sizes)
    mirror = Mirror(llm)
    tokens = random_tokens(n, seed=n)
    try:
        llm._make_plan(tokens)
    except ConfigError:
        assume(False)
    plan = llm.plan()
    for start, end in pairwise([0, *sorted({c for c in cuts if c < n}), n]):
        llm._eval(tokens[start:end], to_borders=False)
    llm.close()
    assert {event.plan for event in mirror.events} == {plan}
    assert mirror.error <= EXACT


# A conversation.


class Conversation(RuleBasedStateMachine):
    """What a program does with a chat, in any order. Each logit on the way is held against the oracle."""

    saved = Bundle("saved")
    folder: Path

    @initialize(
        kind=st.sampled_from(["llama-gqa", "qwen2-yarn", "mpt"]),
        room=st.integers(0, 40),
        n_batch=st.sampled_from([7, 64, 512]),
    )
    def open(self, kind: str, room: int, n_batch: int) -> None:
        path = self.folder / f"{kind}.gguf"
        if not path.exists():
            make_models.MODELS[kind](path)
        config = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=room)
        options: dict[str, Any] = dict(
            n_ctx=N_CTX, n_batch=n_batch, logits_all=True, flash_attn=False, type_k=F32, type_v=F32
        )
        self.llm = MesaLlama(path, mesa=config, n_threads=1, n_threads_batch=1, **options)
        self.mirror = Mirror(self.llm)
        self.turns: list[int] = []  # where each begins
        self.seed = 0

    def text(self, n: int) -> list[int]:
        """Of n tokens, or as many as still fit."""
        self.seed += 1
        return random_tokens(max(0, min(n, N_CTX - 20 - self.llm.n_tokens)), seed=self.seed)

    def history(self) -> list[int]:
        return self.llm.input_ids[: self.llm.n_tokens].tolist()

    @rule(n=st.integers(1, 260))
    def read(self, n: int) -> None:
        """A turn of the user's."""
        tokens = self.text(n)
        if tokens:
            self.turns.append(self.llm.n_tokens)
            self.llm.eval(tokens)

    @rule(n=st.integers(1, 15), temp=st.sampled_from([0.0, 1.0]))
    def answer(self, n: int, temp: float) -> None:
        self.generate(self.history(), n, temp)

    def generate(self, prompt: list[int], n: int, temp: float = 0.0) -> list[int]:
        if not prompt or len(prompt) + n + 12 > N_CTX:
            return []
        self.llm.set_seed(self.seed)
        return [token for _, token in zip(range(n), self.llm.generate(prompt, temp=temp))]

    @rule(n=st.integers(1, 15), n_draft=st.integers(1, 10))
    def answer_with_speculation(self, n: int, n_draft: int) -> None:
        """On a text that repeats itself, so that drafts are found, and taken."""
        prompt = self.history()
        if not prompt:
            return
        prompt += prompt[-min(len(prompt), 20) :]
        self.llm.draft_model = LlamaPromptLookupDecoding(num_pred_tokens=n_draft)
        self.generate(prompt, n)
        self.llm.draft_model = None

    @rule(n=st.integers(1, 15))
    def regenerate(self, n: int) -> None:
        """The same answer again."""
        prompt = self.history()
        first = self.generate(prompt, n)
        assert self.generate(prompt, n) == first

    @precondition(lambda self: self.turns)
    @rule(n=st.integers(1, 200))
    def edit_the_last_turn(self, n: int) -> None:
        start = min(self.turns[-1], self.llm.n_tokens)
        self.llm.n_tokens = start
        self.generate(self.history() + self.text(n), 3)

    @rule(n=st.integers(1, 300))
    def roll_back(self, n: int) -> None:
        self.llm.n_tokens = max(0, self.llm.n_tokens - n)

    @rule()
    def reset(self) -> None:
        self.llm.reset()

    @rule(target=saved)
    def save(self) -> tuple[Saved, list[int]]:
        return self.mirror.save(), list(self.turns)

    @rule(saved=saved)
    def load(self, saved: tuple[Saved, list[int]]) -> None:
        self.mirror.load(saved[0])
        self.turns = list(saved[1])

    @rule(saved=consumes(saved))
    def load_for_the_last_time(self, saved: tuple[Saved, list[int]]) -> None:
        self.load(saved)

    @invariant()
    def equals_the_oracle(self) -> None:
        if not hasattr(self, "llm"):
            return
        for event in self.mirror.events:
            assert event.error <= EXACT, event
            assert event.plan.n_positions(event.start + event.n) <= T, event
        self.mirror.events.clear()

    def teardown(self) -> None:
        if hasattr(self, "llm"):
            self.llm.close()


def run_conversations(folder: Path, factor: float) -> None:
    profile = settings.default
    assert profile is not None
    n_examples = max(1, int(profile.max_examples * factor))

    class InFolder(Conversation):
        pass

    InFolder.folder = folder
    case = InFolder.TestCase
    case.settings = settings(profile, max_examples=n_examples, stateful_step_count=10 if n_examples < 100 else 30)
    case().runTest()


def test_a_conversation_in_any_order(tmp_path: Path) -> None:
    run_conversations(tmp_path, factor=0.5)


# What cannot work.

# note: in a process of its own, several cases one after another; the number of a case is printed before it is tried
INVALID = """
import faulthandler, json, sys
from mesa_gguf import MesaConfig, MesaError, MesaLlama, MesaPlan, _core
import llama_cpp
import numpy as np

path, cases = sys.argv[1], json.loads(sys.argv[2])
small = dict(first_chunk=12, chunk=40, last_chunk=32, room=16)


def open_llama(mesa=None, **options):
    mesa = dict(small, **(mesa or {}))
    if mesa.get("plan"):
        mesa["plan"] = MesaPlan(*mesa["plan"])
    return MesaLlama(path, mesa=MesaConfig(**mesa), **dict(dict(n_ctx=512, n_threads=1, n_threads_batch=1), **options))


def works(llm):
    llm.reset()
    llm.eval([t % 128 for t in range(200)])
    assert llm.n_tokens == 200 and np.isfinite(llm._ctx.get_logits()[0])


def config(mesa, options, n):
    llm = open_llama(mesa, **options)
    try:
        llm.eval([t % 128 for t in range(n)])
        for t in range(3):
            llm.eval([t])
    finally:
        llm.close()


def plan(mesa, starts, anchor, width, n):
    config(dict(mesa, plan=[starts, anchor, width]), {}, n)


def core(name, arguments):
    llm = open_llama()
    llm.eval(list(range(100)))
    try:
        getattr(_core, name)(llm._address, *arguments)
    finally:
        works(llm)
        llm.close()


def set_plan(starts, anchor, width, n_past, n_tokens):
    llm = open_llama()
    llm.eval(list(range(n_past)))
    try:
        _core.set_plan(llm._address, MesaPlan(starts, anchor, width)._plan, n_tokens)
        llm._eval([t % 128 for t in range(min(512, max(1, n_tokens)) - n_past)], to_borders=False)
    finally:
        works(llm)
        llm.close()


def tokens(values, act):
    llm = open_llama()
    try:
        getattr(llm, act)(values) if act == "eval" else next(getattr(llm, act)(values))
    finally:
        works(llm)
        llm.close()


def decode(positions, seq_ids, n_past):
    llm = open_llama()
    llm.eval([t % 128 for t in range(n_past)])
    batch = llama_cpp.llama_batch_init(len(positions), 0, 8)
    batch.n_tokens = len(positions)
    for i, (pos, seqs) in enumerate(zip(positions, seq_ids)):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i, pos, len(seqs), 1
        for j, seq in enumerate(seqs):
            batch.seq_id[i][j] = seq
    result = llama_cpp.llama_decode(llm._ctx.ctx, batch)
    llama_cpp.llama_batch_free(batch)
    works(llm)
    llm.close()
    if result != 0:
        raise RuntimeError(f"llama_decode returned {result}")


def memory(name, arguments, n_past):
    llm = open_llama()
    llm.eval([t % 128 for t in range(n_past)])
    getattr(llama_cpp, "llama_memory_seq_" + name)(llama_cpp.llama_get_memory(llm._ctx.ctx), *arguments)
    llm.n_tokens = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm._ctx.ctx), 0) + 1
    try:
        llm.eval([1, 2, 3])
    finally:
        llm._ctx.kv_cache_clear()
        works(llm)
        llm.close()


for i, (act, *arguments) in enumerate(cases):
    print(i, flush=True)
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        globals()[act](*arguments)
        print("worked", flush=True)
    except (MesaError, RuntimeError, ValueError, TypeError) as err:
        assert str(err), repr(err)
        print("refused", type(err).__name__, str(err).splitlines()[0], flush=True)
"""

numbers = st.one_of(
    st.sampled_from(
        [-(2**63), -(2**31), -(2**31) + 1, -1, 0, 1, 2, T - 1, T, T + 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64]
    ),
    st.integers(-300, 600),
)
lengths = st.one_of(st.sampled_from([-1, 0, 1, T - 1, T, T + 1, 2**31 - 1]), st.integers(-10, 600))
small_lists = st.lists(numbers, max_size=8)
some_config = st.fixed_dictionaries(
    {},
    optional={
        "train_length": lengths,
        "reading_length": lengths,
        "first_chunk": lengths,
        "chunk": lengths,
        "last_chunk": lengths,
        "room": lengths,
        "stair_width": st.one_of(numbers, st.just("auto"), st.just("wide")),
        "log_scaling": st.booleans(),
        "log_length": lengths,
        "stair_bias": st.floats(-1, 10),
    },
)
some_options = st.fixed_dictionaries(
    {},
    optional={
        "n_ctx": st.one_of(lengths, st.just(2**30)),
        "n_batch": st.one_of(numbers, st.integers(1, 2000)),
        "n_ubatch": st.one_of(numbers, st.integers(1, 2000)),
        "type_k": st.integers(-1, 45),
        "type_v": st.integers(-1, 45),
        "flash_attn": st.booleans(),
    },
)
int32 = st.one_of(st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1]), st.integers(-5, 600))
calls = st.one_of(
    st.tuples(st.just("config"), some_config, some_options, st.integers(1, 500)),
    st.tuples(st.just("plan"), some_config, small_lists.map(sorted), numbers, numbers, st.integers(1, 500)),
    st.tuples(st.just("plan"), some_config, small_lists, numbers, numbers, st.integers(1, 500)),
    st.tuples(st.just("core"), st.just("prompt"), st.tuples(numbers)),
    st.tuples(st.just("set_plan"), small_lists.map(sorted), numbers, numbers, st.sampled_from([0, 0, 50]), int32),
    st.tuples(st.just("tokens"), small_lists, st.sampled_from(["eval", "generate"])),
    st.tuples(st.just("tokens"), st.integers(500, 3000).map(lambda n: [1] * n), st.sampled_from(["eval", "generate"])),
    st.tuples(
        st.just("decode"),
        st.lists(int32, min_size=1, max_size=6),
        st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=3), min_size=6, max_size=6),
        st.sampled_from([0, 50, 300]),
    ),
    st.tuples(
        st.just("memory"), st.just("rm"), st.tuples(st.integers(-1, 0), int32, int32), st.sampled_from([50, 300])
    ),
    st.tuples(st.just("memory"), st.just("keep"), st.tuples(st.just(0)), st.sampled_from([50, 300])),
    st.tuples(
        st.just("memory"),
        st.just("add"),
        st.tuples(st.just(0), int32, int32, st.integers(-9, 9)),
        st.sampled_from([50, 300]),
    ),
    st.tuples(
        st.just("memory"),
        st.just("div"),
        st.tuples(st.just(0), int32, int32, st.integers(1, 9)),
        st.sampled_from([50, 300]),
    ),
)


@settings(settings.get_profile("quick"), max_examples=5 if settings.default.max_examples < 100 else 100)  # type: ignore[union-attr]
@given(cases=st.lists(calls, min_size=30, max_size=30))
def test_what_cannot_work_is_an_error_and_no_abort(model_path: ModelPath, cases: list[tuple[Any, ...]]) -> None:
    """And the context goes on working."""
    done = run_python(INVALID, str(model_path("llama")), json.dumps(cases))
    assert done.returncode == 0, (
        f"{cases[int([s for s in done.stdout.split() if s.isdigit()][-1])]}\n{done.stderr[-1500:]}"
    )


def test_the_cases_are_of_both_kinds(model_path: ModelPath) -> None:
    """Some work and some are refused, or the search would search nothing."""
    cases = [
        ["config", {}, {}, 300],
        ["config", {"chunk": T}, {}, 300],
        ["config", {}, {"type_k": 999}, 10],
        ["plan", {}, [0, 12, 52], 52, 2, 100],
        ["plan", {}, [0, 12, 12], 12, 2, 100],
        ["core", "prompt", [100]],
        ["core", "prompt", [-1]],
        ["set_plan", [0, 12, 52], 52, 2, 0, 100],
        ["set_plan", [0, 12, 52], 52, 2, 50, 100],
        ["tokens", [1, 2], "eval"],
        ["tokens", [1, 128], "eval"],
        ["decode", [50, 51], [[0], [0]], 50],
        ["decode", [51, 52], [[0], [0]], 50],
        ["memory", "rm", [0, 40, -1], 50],
        ["memory", "rm", [0, 10, 20], 50],
    ]
    done = run_python(INVALID, str(model_path("llama")), json.dumps(cases))
    assert done.returncode == 0, done.stderr[-1500:]
    results = [line.split()[0] for line in done.stdout.splitlines() if not line.isdigit()]
    expected = "worked refused refused worked refused worked refused worked refused worked refused worked refused worked refused"
    assert results == expected.split(), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thoroughly() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        __file__,
        "-k",
        "not thoroughly",
        "--hypothesis-show-statistics",
        "--timeout=3000",
    ]
    done = subprocess.run(
        command, env={**os.environ, "HYPOTHESIS_PROFILE": "thorough"}, capture_output=True, text=True, check=False
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:]
