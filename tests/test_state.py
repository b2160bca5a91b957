"""Saving, loading and rolling back: nothing of it can be told from never having done it (invariant 5), and a state that is
damaged or foreign is refused, aloud, with a context that goes on working."""

from __future__ import annotations

import ctypes
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache, LlamaState
from numpy.typing import NDArray

from conftest import (
    BUNDLED,
    F16,
    F32,
    Q8_0,
    READER,
    ROOT,
    SMALL,
    ModelPath,
    Opener,
    Stock,
    random_tokens,
    read,
    read_singly,
    run_python,
    worst,
)
from mesa_gguf import MesaConfig, MesaError, MesaLlama, MesaPlan, PromptError, _core

KIND = "llama-head-size"  # heads of 32 values, for q8_0
LONG, REST, OTHER = random_tokens(350, seed=1), random_tokens(60, seed=2), random_tokens(30, seed=3)

CACHES = [(F32, False), (F16, False), (F16, True), (Q8_0, True)]


def with_bytes(state: LlamaState, data: bytes) -> LlamaState:
    """The same state with other bytes of llama.cpp, and without the seal that would tell (test_damaged.py)."""
    return LlamaState(state.input_ids, state.scores, state.n_tokens, data, len(data), state.seed)


def works(llm: MesaLlama, expected: NDArray[np.float32]) -> None:
    """The context reads a text as if nothing had happened."""
    llm.reset()
    assert np.array_equal(read(llm, LONG), expected)


# Save, load, continue = continue.


@pytest.mark.parametrize(("kv", "flash"), CACHES)
def test_load_and_continue_equals_continue(model_path: ModelPath, open_llama: Opener, kv: int, flash: bool) -> None:
    """Bit for bit, across moves of the anchor, in a new context."""
    llm = open_llama(model_path(KIND), kv=kv, flash=flash)
    read(llm, LONG)
    read_singly(llm, OTHER)
    plan, state = llm.plan(), llm.save_state()
    expected = read_singly(llm, REST)
    assert llm.plan() != plan

    other = open_llama(model_path(KIND), kv=kv, flash=flash)
    read(other, OTHER)
    other.load_state(state)
    assert other.plan() == plan
    assert other.n_tokens == len(LONG) + len(OTHER)
    assert np.array_equal(read_singly(other, REST), expected)


def test_load_back_in_the_same_context(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    read(llm, LONG)
    state = llm.save_state()
    expected = read_singly(llm, REST)
    llm.load_state(state)
    assert np.array_equal(read_singly(llm, REST), expected)


def test_a_state_of_a_short_text(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    read(llm, OTHER)
    state = llm.save_state()
    expected = read(llm, LONG)
    llm.load_state(state)
    assert np.array_equal(read(llm, LONG), expected)


def test_an_empty_state(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    state = llm.save_state()
    expected = read(llm, LONG)
    llm.load_state(state)
    assert llm.n_tokens == 0
    assert np.array_equal(read(llm, LONG), expected)


def test_a_state_in_the_middle_of_a_chunk(model_path: ModelPath, open_llama: Opener) -> None:
    """The plan travels: the chunk goes on where it was."""
    plan = MesaPlan([0, 12, 52, 92, 132], anchor=132, stair_width=4)
    llm, other = (open_llama(model_path(KIND), MesaConfig(stair_bias=0.0, log_length=128, plan=plan)) for _ in range(2))
    text = LONG[:180]
    expected = read(llm, text)

    llm.reset()
    llm._ctx.kv_cache_clear()
    _core.set_plan(llm._address, plan._plan, len(text))
    llm._eval(text[:70], to_borders=False)
    other.load_state(llm.save_state())
    assert other.plan() == plan
    other._eval(text[70:], to_borders=False)
    assert worst(other.scores[70:180], expected[70:]) <= 1e-4


def test_a_state_right_after_a_roll_back(model_path: ModelPath, open_llama: Opener) -> None:
    """As prompt-lookup speculation leaves it: tokens were removed from the cache, and none read since."""
    llm, other = (open_llama(model_path(KIND)) for _ in range(2))
    read(llm, LONG)
    read_singly(llm, REST)
    llm.n_tokens = 370
    llm._ctx.kv_cache_seq_rm(-1, 370, -1)
    state = llm.save_state()
    expected = read(llm, OTHER)
    other.load_state(state)
    assert worst(read(other, OTHER), expected) <= 1e-4


def test_roll_back_after_load(model_path: ModelPath, open_llama: Opener) -> None:
    """The history of the plan travels too."""
    llm = open_llama(model_path(KIND))
    expected = read(llm, LONG)
    read_singly(llm, REST)
    state = llm.save_state()
    other = open_llama(model_path(KIND))
    other.load_state(state)
    other.n_tokens = len(LONG) - 5
    assert worst(read_singly(other, LONG[-5:]), expected[-5:]) <= 1e-4


# Roll back and go on = never having read what was rolled back.


@pytest.mark.parametrize("keep", [1, 11, 12, 13, 30, 52, 53, 91, 150, 300, 330, 349])
def test_roll_back_to_anywhere(model_path: ModelPath, open_llama: Opener, keep: int) -> None:
    """Into the first chunk, a middle chunk, at a border, into the last chunk; then the same text again, and another."""
    llm, fresh = open_llama(model_path(KIND)), open_llama(model_path(KIND))
    expected = read(llm, LONG)
    read_singly(llm, REST)  # moves the anchor
    llm.n_tokens = keep
    again = read(llm, LONG[keep:])
    assert worst(again, expected[keep:]) <= 1e-4

    llm.n_tokens = keep
    fresh.eval(LONG)
    fresh.n_tokens = keep
    assert worst(read(llm, OTHER), read(fresh, OTHER)) <= 1e-4
    assert llm.plan() == fresh.plan()


def test_roll_back_across_an_anchor_move(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    read(llm, LONG)
    plans, logits = [llm.plan()], []
    for token in REST:
        logits.append(read(llm, [token])[0])
        plans.append(llm.plan())
    assert len(set(map(repr, plans))) > 2
    for n in range(len(REST) - 1, -1, -7):
        llm.n_tokens = len(LONG) + n
        assert worst(read_singly(llm, REST[n:]), logits[n:]) <= 1e-4
        assert llm.plan() == plans[-1]


def test_roll_back_to_nothing(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    expected = read(llm, LONG)
    llm.n_tokens = 0
    assert np.array_equal(read(llm, LONG), expected)


# llama-cpp-python's caches of states.


@pytest.mark.parametrize("disk", [False, True])
def test_caches_of_states(model_path: ModelPath, open_llama: Opener, tmp_path: Path, disk: bool) -> None:
    cache = LlamaDiskCache(str(tmp_path)) if disk else LlamaRAMCache()
    llm = open_llama(model_path(KIND))
    read(llm, LONG)
    cache[LONG] = llm.save_state()
    expected = read_singly(llm, REST)
    read(llm, OTHER)

    assert LONG + REST in cache
    llm.load_state(cache[LONG + REST])
    assert llm.n_tokens == len(LONG)
    assert np.array_equal(read_singly(llm, REST), expected)


def test_a_ram_cache_keeps_to_its_capacity(open_llama: Opener) -> None:
    """All that it holds counted: keys, values, logits, tokens and the tokens of its keys."""
    llm = open_llama(READER, MesaConfig(), n_ctx=2048)
    cache = LlamaRAMCache(capacity_bytes=6 * 2**20)
    llm.set_cache(cache)
    for seed in range(6):
        llm.create_completion(random_tokens(300 + 60 * seed, seed=seed, n_vocab=200), max_tokens=4)
        held = sum(len(pickle.dumps(item)) for item in cache.cache_state.items())
        assert held <= cache.cache_size <= cache.capacity_bytes
        assert cache.cache_size <= held + 40 * 2048 * len(cache.cache_state)  # and not much less than there is room for
    assert 1 <= len(cache.cache_state) < 6


def test_a_disk_cache_keeps_to_its_capacity(open_llama: Opener, tmp_path: Path) -> None:
    llm = open_llama(READER, MesaConfig(), n_ctx=2048)
    cache = LlamaDiskCache(str(tmp_path), capacity_bytes=6 * 2**20)
    llm.set_cache(cache)
    for seed in range(6):
        llm.create_completion(random_tokens(300 + 60 * seed, seed=seed, n_vocab=200), max_tokens=4)
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.val")) <= cache.capacity_bytes
    assert 1 <= len(cache.cache) < 6


GEMMA = Path(os.environ.get("MESA_MODELS") or ROOT / "models") / "gemma-3-270m-q4_k_m.gguf"


@pytest.mark.skipif(not GEMMA.exists(), reason=f"no {GEMMA.name} in models/ or MESA_MODELS")
def test_states_of_a_model_of_many_tokens(open_llama: Opener) -> None:
    """262,144 of them: the logits of a token take 1 MiB, its keys and values 18 KiB."""
    llm = open_llama(GEMMA, MesaConfig(), kv=F16, flash=True, n_ctx=1024, logits_all=False)
    cache = LlamaRAMCache(capacity_bytes=8 * 2**20)
    llm.set_cache(cache)
    for seed in range(3):
        llm.create_completion(random_tokens(150 + 50 * seed, seed=seed, n_vocab=5000), max_tokens=1)
        assert 0 < sum(len(pickle.dumps(item)) for item in cache.cache_state.items()) <= cache.capacity_bytes
    state = llm.save_state()
    assert len(pickle.dumps(state)) <= 20 * 1024 * state.n_tokens
    llm.n_tokens -= (
        1  # a token by itself and as the end of a batch differ by 1.0 (of 20) in stock llama.cpp, of this model
    )
    llm.eval([int(llm.input_ids[llm.n_tokens])])
    expected = llm.eval_logits[-1]
    llm.reset()
    llm.eval(random_tokens(state.n_tokens, seed=9, n_vocab=5000))
    llm.load_state(state)
    assert worst(llm.eval_logits[-1], expected) <= 1e-3


# What is in a state, and what is not.


@pytest.mark.parametrize("n_tokens", [0, 100, 350])
def test_what_was_never_computed_is_not_saved(model_path: ModelPath, open_llama: Opener, n_tokens: int) -> None:
    llm = open_llama(model_path(KIND), logits_all=False, n_ctx=4096)
    llm.eval(LONG[:n_tokens])
    state = llm.save_state()
    assert state.scores.shape == (0, 128)
    assert state.input_ids.tolist() == LONG[:n_tokens]
    assert len(pickle.dumps(state)) <= len(state.llama_state) + 4 * n_tokens + 1000


def test_logits_of_all_tokens_travel(model_path: ModelPath, open_llama: Opener) -> None:
    """As after reading the text: scores, eval_logits and logprobs, in a context that has read something longer."""
    llm, other = (open_llama(model_path(KIND)) for _ in range(2))
    expected = read(llm, LONG[:200])
    read(other, LONG)
    state = llm.save_state()
    assert state.scores.nbytes == expected.nbytes
    other.load_state(state)
    assert np.array_equal(other.scores[:200], expected)
    assert not other.scores[200:].any()
    assert np.array_equal(other.eval_logits, expected)


def test_logits_that_a_state_does_not_hold(model_path: ModelPath, open_llama: Opener) -> None:
    """Those of what follows are there, and travel on; the others are 0, here and later."""
    source, llm, straight = (
        open_llama(model_path(KIND), logits_all=False),
        open_llama(model_path(KIND)),
        open_llama(model_path(KIND)),
    )
    read(straight, LONG[:200])
    expected = read(straight, LONG[200:])
    source.eval(LONG[:200])
    read(llm, LONG)
    llm.load_state(source.save_state())
    assert not llm.scores.any()
    read(llm, LONG[200:])

    state = llm.save_state()
    assert state.scores.shape == (150, 128)
    other = open_llama(model_path(KIND))
    read(other, OTHER + LONG)
    other.load_state(state)
    for one in (llm, other):
        assert not one.scores[:200].any() and not one.scores[350:].any()
        assert worst(one.scores[200:350], expected) <= 1e-4
    other.n_tokens = 150  # before any of those
    assert other.save_state().scores.shape == (0, 128)
    read(other, LONG[150:250])
    assert other.save_state().scores.shape == (100, 128)


@pytest.mark.parametrize("logits_all", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 100, 350])
def test_sample_after_load(model_path: ModelPath, open_llama: Opener, logits_all: bool, n_tokens: int) -> None:
    """The token of the text that was loaded, not of another of the same length that was read before."""
    llm = open_llama(model_path(KIND), logits_all=logits_all)
    texts = [random_tokens(n_tokens, seed=seed) for seed in range(20, 30)]
    states, tokens, logits = [], [], []
    for text in texts:
        llm.reset()
        llm.eval(text)
        tokens.append(llm.sample(temp=0.0))
        logits.append(llm.eval_logits[-1])
        states.append(llm.save_state())
        assert int(np.argmax(logits[-1])) == tokens[-1]
    assert len(set(tokens)) > 1

    for state, token in zip(states, tokens):
        llm.load_state(state)
        assert llm.sample(temp=0.0) == token
        assert llm.n_tokens == n_tokens
    for state, expected in zip(states, logits):
        llm.load_state(state)
        assert worst(llm.eval_logits[-1], expected) <= 1e-4
    other = open_llama(model_path(KIND), logits_all=logits_all)  # that has read nothing
    other.load_state(states[3])
    assert other.sample(temp=0.0) == tokens[3]


def test_generate_and_logprobs_after_load(open_llama: Opener) -> None:
    """As after reading the text; what follows, and the text itself (echo)."""
    llm, source = (open_llama(BUNDLED, MesaConfig(), n_ctx=1024, logits_all=logits_all) for logits_all in (True, False))
    prompt = "The door code of Mara Lind is 4711. " * 8
    options = dict(max_tokens=5, temperature=0.0, logprobs=2, echo=True)
    expected = llm.create_completion(prompt, **options)["choices"][0]
    source.eval(llm.input_ids[: llm.n_tokens].tolist())
    states = [llm.save_state(), source.save_state()]
    for state, other in zip(
        states * 2, (*[random_tokens(llm.n_tokens, seed=seed, n_vocab=200) for seed in (8, 9)], OTHER, LONG)
    ):
        llm.reset()
        llm.eval(other)
        llm.load_state(state)
        check_completion(llm.create_completion(prompt, **options)["choices"][0], expected)


def check_completion(loaded: dict[str, Any], expected: dict[str, Any]) -> None:
    assert loaded["text"] == expected["text"]
    assert loaded["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
    values = zip(loaded["logprobs"]["token_logprobs"][1:], expected["logprobs"]["token_logprobs"][1:])
    assert max(abs(a - b) for a, b in values) <= 1e-3


@pytest.mark.parametrize("logits_all", [False, True])
@pytest.mark.parametrize("n_tokens", [60, 350])
def test_save_right_after_load(model_path: ModelPath, open_llama: Opener, logits_all: bool, n_tokens: int) -> None:
    source, llm = (open_llama(model_path(KIND), logits_all=logits_all) for _ in range(2))
    source.eval(LONG[:n_tokens])
    llm.eval(OTHER)
    state = source.save_state()
    llm.load_state(state)
    assert llm.save_state().checksum == state.checksum


def test_sample_before_anything_was_read(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    with pytest.raises(PromptError, match="no token -1 to sample after: 0 were read"):
        llm.sample()
    assert len(llm.eval_logits) == 0
    llm.eval(OTHER)
    for idx in (-5, len(OTHER), 5000):
        with pytest.raises(PromptError, match=f"no token {idx} to sample after: 30 were read"):
            llm.sample(idx=idx)


# Damaged and foreign states.


def test_truncated_states_are_refused(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    expected = read(llm, LONG)
    state = llm.save_state()
    size = len(state.llama_state)
    for n in [1, 3, 4, 10, 20, 30, 40, 60, 100, 1000, size // 3, size // 2, size - 1000, size - 4, size - 1]:
        with pytest.raises(MesaError, match="state"):
            llm.load_state(with_bytes(state, state.llama_state[:n]))
        assert llm.n_tokens == 0
    works(llm, expected)


def test_a_state_of_no_bytes_is_refused(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    read(llm, OTHER)
    state = llm.save_state()
    with pytest.raises(MesaError):
        llm.load_state(with_bytes(state, b""))


def test_a_state_with_bytes_left_over_is_refused(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path(KIND))
    expected = read(llm, LONG)
    state = llm.save_state()
    with pytest.raises(MesaError):
        llm.load_state(with_bytes(state, state.llama_state + b"\0"))
    works(llm, expected)


FOREIGN = {
    "another T": (KIND, dict(mesa=replace(SMALL, train_length=120))),
    "no log scaling": (KIND, dict(mesa=replace(SMALL, log_scaling=False))),
    "a stair bias": (KIND, dict(mesa=replace(SMALL, stair_bias=0.5))),
    "queries scaled from elsewhere on": (KIND, dict(mesa=replace(SMALL, log_length=256))),
    "another reach of the bias": (KIND, dict(mesa=replace(SMALL, last_chunk=31))),
    "another KV type": (KIND, dict(kv=Q8_0, flash=True)),
    "another V layout": (KIND, dict(flash=True)),
    "another head size": ("llama", {}),
    "another architecture": ("qwen2", {}),
    "Mesa off": (KIND, dict(mesa=MesaConfig(enabled=False))),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_states_are_refused(model_path: ModelPath, open_llama: Opener, foreign: str) -> None:
    """Of a context with other options into one with these."""
    kind, options = FOREIGN[foreign]
    source = open_llama(model_path(KIND))
    read(source, LONG)
    llm = open_llama(model_path(kind), **options)
    expected = read(llm, OTHER)
    with pytest.raises(MesaError):
        llm.load_state(source.save_state())
    llm.reset()
    assert np.array_equal(read(llm, OTHER), expected)


METHOD_FIELDS = [
    ("rerope", dict(window=48), dict(window=40), "window 48, this context has 40"),
    ("lm-infinite", dict(window=48, n_sinks=4), dict(window=48, n_sinks=3), "n_sinks 4, this context has 3"),
    ("streaming-llm", dict(window=48, n_sinks=4), dict(window=40, n_sinks=4), "window 48, this context has 40"),
    (
        "mesa-exact",
        dict(window=32, last_chunk=32, room=16),
        dict(window=30, last_chunk=32, room=16),
        "window 32, this context has 30",
    ),
    ("mesa", dict(last_chunk=32, room=16), dict(last_chunk=33, room=16), "last_chunk 32, this context has 33"),
    ("star", dict(last_chunk=32, room=16), dict(last_chunk=33, room=16), "last_chunk 32, this context has 33"),
    ("mesa", dict(stair_bias=0.5), dict(stair_bias=0.50001), "stair_bias 0.5, this context has 0.5000"),
]


@pytest.mark.parametrize(("method", "saved", "own", "reason"), METHOD_FIELDS)
def test_what_a_token_is_read_by_must_be_the_same(
    model_path: ModelPath, open_llama: Opener, method: str, saved: dict[str, Any], own: dict[str, Any], reason: str
) -> None:
    source = open_llama(model_path(KIND), MesaConfig(method=method, **saved))
    read(source, LONG)
    llm = open_llama(model_path(KIND), MesaConfig(method=method, **own))
    with pytest.raises(MesaError, match=reason):
        llm.load_state(source.save_state())


@pytest.mark.parametrize("unused", [dict(window=40), dict(n_sinks=2), dict(log_scaling=False, log_length=99)])
def test_what_the_method_does_not_read_may_differ(
    model_path: ModelPath, open_llama: Opener, unused: dict[str, Any]
) -> None:
    same = replace(SMALL, log_scaling=False)
    source, llm = open_llama(model_path(KIND), same), open_llama(model_path(KIND), replace(same, **unused))
    read(source, LONG)
    llm.load_state(source.save_state())
    assert np.array_equal(read_singly(llm, REST), read_singly(source, REST))


@pytest.mark.parametrize("other", [dict(first_chunk=20), dict(chunk=50), dict(room=4), dict(stair_width=9)])
def test_a_conversation_goes_on_by_its_own_numbers(
    model_path: ModelPath, open_llama: Opener, other: dict[str, Any]
) -> None:
    """Those that plans are made from travel with the state, until the context is empty: moves of the anchor, texts that follow."""
    source, llm, fresh = (
        open_llama(model_path(KIND), config, n_ctx=1024)
        for config in (SMALL, replace(SMALL, **other), replace(SMALL, **other))
    )
    read(source, LONG)
    llm.load_state(source.save_state())
    assert np.array_equal(read_singly(llm, REST), read_singly(source, REST))
    more = random_tokens(300, seed=9)
    again = llm.save_state()
    assert np.array_equal(read(llm, more), read(source, more))
    assert llm.plan() == source.plan()
    for empty in (True, False):
        llm.load_state(again)
        if empty:
            llm.reset()
        else:
            llm.n_tokens = 0
        fresh.reset()
        assert np.array_equal(read(llm, LONG), read(fresh, LONG))
        assert llm.plan() == fresh.plan()


def test_a_state_of_a_larger_context_is_refused(model_path: ModelPath, open_llama: Opener) -> None:
    source, llm = open_llama(model_path(KIND)), open_llama(model_path(KIND), n_ctx=256)
    read(source, LONG)
    with pytest.raises(MesaError):
        llm.load_state(source.save_state())


def test_a_refused_state_says_why(model_path: ModelPath, open_llama: Opener) -> None:
    source, llm = open_llama(model_path(KIND)), open_llama(model_path(KIND), replace(SMALL, train_length=120))
    read(source, LONG)
    with pytest.raises(MesaError, match=r"train_length 128.*120"):
        llm.load_state(source.save_state())


def test_a_long_state_without_mesa_is_refused(model_path: ModelPath, open_llama: Opener) -> None:
    """Stock llama.cpp read past T there: llama_mesa_enable refuses a context with such a text, so this should be too."""
    stock = open_llama(model_path(KIND), MesaConfig(enabled=False))
    read(stock, LONG)
    llm = open_llama(model_path(KIND))
    expected = read(llm, LONG)
    with pytest.raises(MesaError):
        llm.load_state(stock.save_state())
    works(llm, expected)


def test_stock_states(model_path: ModelPath, open_llama: Opener, run_stock: Stock, tmp_path: Path) -> None:
    """A state of the unpatched library is loaded as a text that was read plainly; a Mesa state is refused by it."""
    path, text = model_path(KIND), random_tokens(100, seed=4)
    llm = open_llama(path)
    read(llm, LONG)
    mesa_state, mesa_file = llm.save_state(), tmp_path / "mesa.bin"
    mesa_file.write_bytes(mesa_state.llama_state)

    stock_file = tmp_path / "stock.bin"
    _, printed = run_stock(path, [text], state=stock_file, load=[mesa_file], type_k=F32, type_v=F32)
    assert printed.split() == ["0"]  # bytes read

    llm.reset()
    read(llm, text)
    state = with_bytes(llm.save_state(), stock_file.read_bytes())
    expected = read(llm, OTHER[:20])
    llm.load_state(state)
    assert llm.plan().is_plain
    assert np.array_equal(read(llm, OTHER[:20]), expected)


# note: in a process of its own, so that an abort would fail this test and not end the run
FLIPS = """
import sys
from pathlib import Path
import numpy as np
from mesa_gguf import MesaConfig, MesaError, MesaLlama
from llama_cpp import LlamaState

path, kv, flash, seed, count = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4]), int(sys.argv[5])
config = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=16)
llm = MesaLlama(path, mesa=config, n_ctx=512, logits_all=True, type_k=kv, type_v=kv, flash_attn=flash, n_threads=1,
                n_threads_batch=1)
random = np.random.default_rng(seed)
text = random.integers(0, 128, 350).tolist()
llm.eval(text)
expected = llm.scores[:350].copy()
for token in text[:40]:
    llm.eval([token])
state = llm.save_state()
data = bytearray(state.llama_state)
begin = bytes(data).index(b"MESA")  # of the Mesa part
end = begin + 16 + 4 * (3 + 1 + len(llm.plan().chunk_starts) + 2 + 1 + llm.n_tokens + 1)  # at least
loaded = refused = 0
places = [int(random.integers(0, end)) for _ in range(count // 2)] + [int(random.integers(0, len(data))) for _ in range(count // 2)]
for place in places:
    bit = 1 << int(random.integers(0, 8))
    data[place] ^= bit
    changed = LlamaState(state.input_ids, state.scores, state.n_tokens, bytes(data), len(data), state.seed)  # not sealed
    data[place] ^= bit
    try:
        llm.load_state(changed)
        loaded += 1
        assert not begin <= place < end, f"bit {bit} of byte {place} in the Mesa part ({begin}..{end}) went unnoticed"
    except MesaError:
        refused += 1
        assert llm.n_tokens == 0
    llm.eval(text[:3])  # goes on, whatever was loaded
llm.reset()
llm.eval(text)
assert np.array_equal(llm.scores[:350], expected)
llm.load_state(state)
print(loaded, "loaded", refused, "refused")
"""


@pytest.mark.parametrize(("kv", "flash", "seed"), [(F32, False, 1), (F16, True, 2), (Q8_0, True, 3)])
def test_bit_flips_never_abort(model_path: ModelPath, kv: int, flash: bool, seed: int) -> None:
    """Half of them in the header and the Mesa part, where each must be refused, half anywhere: KV data hold any bits."""
    done = run_python(FLIPS, str(model_path(KIND)), str(kv), str(flash), str(seed), "300")
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 8))
def test_many_bit_flips_never_abort(model_path: ModelPath, seed: int) -> None:
    done = run_python(FLIPS, str(model_path(KIND)), str(F16), "True", str(seed), "5000")
    assert done.returncode == 0, done.stderr[-3000:]


def test_state_of_one_sequence_travels(model_path: ModelPath, open_llama: Opener) -> None:
    """llama_state_seq_get_data and _set_data carry the plan too."""
    llm = open_llama(model_path(KIND))
    read(llm, LONG)
    size = llama_cpp.llama_state_seq_get_size(llm._ctx.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm._ctx.ctx, buffer, size, 0) == size
    plan, expected = llm.plan(), read_singly(llm, REST)

    other = open_llama(model_path(KIND))
    assert llama_cpp.llama_state_seq_set_data(other._ctx.ctx, buffer, size, 0) == size
    assert other.plan() == plan
    other.n_tokens = len(LONG)
    assert np.array_equal(read_singly(other, REST), expected)


def test_golden_model_states_are_small(open_llama: Opener) -> None:
    """What Mesa adds to a state is small beside the KV data: less than 1 %."""
    llm = open_llama(READER, MesaConfig(), kv=F16, flash=True, n_ctx=4096, logits_all=False)
    llm.eval(random_tokens(3000, n_vocab=200))
    with_mesa = len(llm.save_state().llama_state)
    off = open_llama(READER, MesaConfig(enabled=False), kv=F16, flash=True, n_ctx=4096, logits_all=False)
    off.eval(random_tokens(3000, n_vocab=200))
    stock = len(off.save_state().llama_state)
    print(f"\nstate: {stock} bytes stock, {with_mesa} with Mesa")
    assert with_mesa <= 1.01 * stock
