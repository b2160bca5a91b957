"""KV types, flash attention, batch sizes and context lengths: the cache changes what is rounded, not what is computed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import oracle
from conftest import BUNDLED, ModelPath, Opener, oracle_read, random_tokens, read, rms, worst
from mesa_gguf import MesaConfig, MesaLlama, MesaPlan
from mesa_gguf.model.memory import KV_TYPES
from test_engine import oracle_model, oracle_state

T = 128
TYPES = ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FLOATS = ["f32", "f16", "bf16"]

# llama.cpp stores a V that is not flash attention's transposed, which no quantized type can be
CASES = [(k, v, True) for k in TYPES for v in ("f16", k)] + [(k, v, False) for k in TYPES for v in FLOATS]


def errors(path_errors: list[np.ndarray]) -> float:
    return rms(np.concatenate(path_errors))


INSIDE, PROMPT, REST = random_tokens(T, seed=21), random_tokens(300, seed=22), random_tokens(48, seed=23)


@cache
def exact(path: Path, plans: tuple[tuple[tuple[int, ...], int, int], ...]) -> list[oracle.Floats]:
    """What the oracle has for a text inside T, and for a prompt and tokens one by one, each under its plan: the same for all caches."""
    state, texts = oracle_state(path), [PROMPT, *([token] for token in REST)]
    read_ = [
        oracle_read(state, MesaPlan(list(starts), anchor=anchor, stair_width=width), text)
        for text, (starts, anchor, width) in zip(texts, plans, strict=True)
    ]
    return [oracle.logits(oracle_model(path), INSIDE), *read_]


@pytest.mark.parametrize(("type_k", "type_v", "flash"), dict.fromkeys(CASES))
def test_within_the_rounding_of_the_cache(
    model_path: ModelPath, open_llama: Opener, type_k: str, type_v: str, flash: bool
) -> None:
    """Chunks, last chunk, generation and an anchor move: not much further from the oracle than stock is inside T."""
    path = model_path("llama-head-size")
    types = dict(type_k=KV_TYPES[type_k], type_v=KV_TYPES[type_v], flash=flash)
    stock = read(open_llama(path, MesaConfig(enabled=False), **types), INSIDE)
    llm, logits, plans = open_llama(path, **types), [], []
    for text in [PROMPT, *([token] for token in REST)]:
        logits.append(read(llm, text))
        plan = llm.plan()
        plans.append((tuple(plan.chunk_starts), plan.anchor, plan.stair_width))
    assert plans[-1][1] > plans[0][1]
    inside, *expected = exact(path, tuple(plans))
    rounding = rms(stock - inside)
    seen = [ours - theirs for ours, theirs in zip(logits, expected)]
    print(
        f"\n{type_k}/{type_v} {flash=}: stock {rounding:.4f}, prompt {rms(seen[0]):.4f}, generation {errors(seen[1:]):.4f}"
    )
    floor = 0.005 if flash else 1e-3  # flash attention on a CPU sums in f16 (test_engine.py)
    assert rms(seen[0]) <= rounding + floor
    assert errors(seen[1:]) <= 1.5 * rounding + floor


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(1, 1), (7, 3), (512, 1), (33, 64), (512, 512), (2048, 2048)])
@pytest.mark.parametrize("flash", [False, True])
def test_any_batch_sizes(model_path: ModelPath, open_llama: Opener, n_batch: int, n_ubatch: int, flash: bool) -> None:
    path, tokens = model_path("llama-gqa"), random_tokens(260, seed=24)
    llm = open_llama(path, n_batch=n_batch, n_ubatch=n_ubatch, flash=flash)
    want = oracle_read(oracle_state(path), llm.plan(len(tokens)), tokens)
    assert worst(read(llm, tokens), want) <= (0.1 if flash else 1e-3)


def long_reading(n_tokens: int) -> tuple[MesaLlama, np.ndarray]:
    llm = MesaLlama(
        BUNDLED, n_ctx=n_tokens + 256, n_batch=2048, n_ubatch=2048, type_k=KV_TYPES["q8_0"], type_v=KV_TYPES["q8_0"]
    )
    llm.eval(np.random.default_rng(0).integers(3, llm.n_vocab(), n_tokens).tolist())
    return llm, np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [2**17, 2**20])
def test_very_long_texts(n_tokens: int) -> None:
    """A million tokens, 2,048 times what the bundled model was trained at: no overflow, every position inside T."""
    llm, logits = long_reading(n_tokens)
    plan = llm.plan()
    assert np.isfinite(logits).all() and llm.n_tokens == n_tokens
    assert plan.n_positions(n_tokens) <= llm.train_length
    for _ in range(40):
        llm.eval([int(np.argmax(logits))])
    assert np.isfinite(logits).all()
    llm.close()
