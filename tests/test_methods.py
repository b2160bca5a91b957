"""The weave family: every method against its own paper's definition, written out for each query and key.

Sources: ReRoPE and Leaky ReRoPE (Su, 2023), Self-Extend (arXiv 2401.01325, equations 3 and 4), LM-Infinite (arXiv 2308.16137),
StreamingLLM (arXiv 2309.17453), Star Attention (arXiv 2411.17116), Stair PE and Mesa-Extrapolation (arXiv 2410.15859).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

import arch_models
import oracle
from conftest import F16, Q8_0, ModelPath, Opener, Stock, random_tokens, read, worst
from mesa_gguf import METHODS, ConfigError, MesaConfig, MesaLlama, ModelError

T = 128
N = 48  # the window
SINKS = 4
LENGTH = 300
EXACT = 1e-3

RULES = ["stair", "rerope", "leaky-rerope", "self-extend", "lm-infinite", "streaming-llm"]


def distance(method: str, i: int, j: int, width: int) -> float | None:
    """What the paper calls the distance of key j from query i; None: the key is not seen."""
    t = i - j
    if method == "stair":
        return oracle.stair(t, N, width)
    if method == "rerope":
        return min(t, N)
    if method == "leaky-rerope":
        return t if t < N else N + (t - N) / width
    if method == "self-extend":
        return t if t < N else i // width + (N - N // width) - j // width
    # the other two forget what is neither a sink nor in the window
    if t >= N and j >= SINKS:
        return None
    if method == "lm-infinite":
        return min(t, N)
    # streaming-llm: positions are places in its cache
    cache = [*range(min(SINKS, i + 1)), *range(max(SINKS, i - N + 1), i + 1)]
    return len(cache) - 1 - cache.index(j)


def groups(method: str, n: int, width: int) -> list[oracle.Queries]:
    """One for each query: it stands at 0, and each key as far before it as the method says."""
    result = []
    for i in range(n):
        seen = {j: d for j in range(i + 1) if (d := distance(method, i, j, width)) is not None}
        keys = np.array(list(seen))
        result.append(
            oracle.Queries(
                np.array([i]),
                np.array([0]),
                keys,
                -np.array(list(seen.values())),
                np.ones((1, keys.size), bool),
                log_scaled=False,
            )
        )
    return result


def of_groups(path: Path, tokens: list[int], queries: list[oracle.Queries], log_scaling: bool = False) -> oracle.Floats:
    model = oracle.Model.from_gguf(path)
    x = model.embed(tokens)
    for layer in range(model.n_layer):
        q, k, v = model.queries_keys_values(layer, x)
        attention = [model.attend(layer, g, q[g.tokens], k, v, T if log_scaling else None) for g in queries]
        x = model.finish_layer(layer, x, np.concatenate(attention))
    return model.output(x)


def config(method: str) -> MesaConfig:
    if method == "star":
        return MesaConfig(method=method, first_chunk=40, chunk=40, last_chunk=32, room=16)
    if method in ("mesa", "mesa-exact"):
        return MesaConfig(
            method=method, first_chunk=12, chunk=40, last_chunk=32, room=16, window=32, stair_bias=0.0, log_length=T
        )
    return MesaConfig(method=method, window=N, n_sinks=SINKS, room=16)


def test_every_method_is_tested() -> None:
    assert set(METHODS) == {"mesa", "mesa-exact", "star", *RULES}


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("kind", ["llama-head-size", "qwen2"])
def test_of_its_definition(model_path: ModelPath, open_llama: Opener, method: str, kind: str) -> None:
    """A text, then tokens one by one."""
    path, tokens = model_path(kind), random_tokens(LENGTH, seed=5)
    llm = open_llama(path, config(method), n_batch=96, n_ubatch=32)
    logits = read(llm, tokens[:-8])
    width = llm.plan().stair_width
    assert width == (
        1 if method in ("rerope", "lm-infinite", "streaming-llm") else -(-(LENGTH - 8 + 16 - 1 - N) // (T - 1 - N))
    )
    logits = np.concatenate([logits, *(read(llm, [token]) for token in tokens[-8:])])
    assert worst(logits, of_groups(path, tokens, groups(method, LENGTH, width))) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("method", RULES)
def test_of_its_definition_at_32_times_the_trained_length(
    model_path: ModelPath, open_llama: Opener, method: str
) -> None:
    path, n = model_path("llama-head-size"), 32 * T
    tokens = random_tokens(n, seed=13)
    llm = open_llama(path, config(method), n_ctx=n + 32)
    logits = read(llm, tokens)
    errors = np.abs(logits - of_groups(path, tokens, groups(method, n, llm.plan().stair_width))).max(axis=1)
    # llama.cpp's angles are f32: of true positions to 4,095 (rerope, lm-infinite, streaming-llm) with an error to match
    assert np.median(errors) <= EXACT / 5 and errors.max() <= 3 * EXACT


@pytest.mark.parametrize("method", RULES)
def test_of_its_definition_with_a_quantized_cache_and_flash_attention(
    model_path: ModelPath, open_llama: Opener, method: str
) -> None:
    path, tokens = model_path("llama-head-size"), random_tokens(200, seed=6)
    llm = open_llama(path, config(method), kv=Q8_0, flash=True)
    logits = read(llm, tokens)
    exact = of_groups(path, tokens, groups(method, 200, llm.plan().stair_width))
    assert (
        np.sqrt(np.mean(np.square(logits - exact))) < 0.3
    )  # on a scale of 12; seen: see the roundings of q8_0 in test_engine.py


def test_mesa_exact_is_equation_3_for_every_query(model_path: ModelPath, open_llama: Opener) -> None:
    path, tokens = model_path("llama-head-size"), random_tokens(LENGTH, seed=7)
    llm = open_llama(path, config("mesa-exact"))
    logits = read(llm, tokens[:-8])
    logits = np.concatenate([logits, *(read(llm, [token]) for token in tokens[-8:])])
    plan = llm.plan()
    queries = oracle.plan_queries(oracle.Plan(plan.chunk_starts, plan.anchor, plan.stair_width), LENGTH)[:-1]
    for i in range(plan.last_start, LENGTH):
        width = max(plan.stair_width, -(-(i - 32) // (T - 1 - 32)))  # never past the trained range
        keys = np.arange(i + 1)
        positions = -np.array([oracle.stair(i - j, 32, width) for j in keys])
        queries.append(oracle.Queries(np.array([i]), np.array([0]), keys, positions, np.ones((1, i + 1), bool)))
    assert worst(logits, of_groups(path, tokens, queries, log_scaling=True)) <= EXACT


def test_star_reads_blocks_behind_the_anchor_block_at_true_positions(model_path: ModelPath, open_llama: Opener) -> None:
    path, tokens = model_path("llama-head-size"), random_tokens(LENGTH, seed=8)
    llm = open_llama(path, config("star"))
    logits = read(llm, tokens[:-8])
    logits = np.concatenate([logits, *(read(llm, [token]) for token in tokens[-8:])])
    starts = [*llm.plan().chunk_starts, LENGTH]
    assert len(starts) > 5 and starts[1] == 40
    every = np.arange(LENGTH)
    queries = []
    for start, end in pairwise(starts):
        rows = np.arange(start, end)
        keys = every[:end] if end == LENGTH else np.concatenate([every[:40], rows]) if start else rows
        queries.append(oracle.Queries(rows, rows, keys, keys, rows[:, None] >= keys, log_scaled=False))
    assert worst(logits, of_groups(path, tokens, queries)) <= EXACT


@pytest.mark.parametrize("method", RULES)
def test_queries_are_rotated_as_queries(tmp_path: Path, open_llama: Opener, method: str) -> None:
    """Hunyuan's queries and keys have norms after the rotation, with weights of their own: scores stay if what one weight is
    multiplied by, the other is divided by."""
    tokens, logits = random_tokens(150, seed=14), []
    for factor in (np.ones(1), np.linspace(0.5, 2.0, 16)):
        path = arch_models.write(arch_models.find("hunyuan-dense"), tmp_path / f"{len(logits)}.gguf")
        for tensor in gguf.GGUFReader(path, "r+").tensors:
            if tensor.name.endswith("attn_q_norm.weight"):
                tensor.data[:] *= factor
            elif tensor.name.endswith("attn_k_norm.weight"):
                tensor.data[:] /= factor
        logits.append(read(open_llama(path, config(method)), tokens))
    assert worst(*logits) <= EXACT


@pytest.mark.parametrize("method", METHODS)
def test_any_batches(model_path: ModelPath, open_llama: Opener, method: str) -> None:
    tokens = random_tokens(200, seed=9)
    a = open_llama(model_path("llama-head-size"), config(method))
    b = open_llama(model_path("llama-head-size"), config(method), n_batch=64, n_ubatch=17)
    assert worst(read(a, tokens), read(b, tokens)) <= EXACT


@pytest.mark.parametrize("method", METHODS)
def test_roll_back_and_state(model_path: ModelPath, open_llama: Opener, method: str) -> None:
    path, tokens = model_path("llama-head-size"), random_tokens(200, seed=10)
    llm = open_llama(path, config(method))
    read(llm, tokens[:180])
    state = llm.save_state()
    first = read(llm, tokens[180:])
    llm.n_tokens = 180
    assert worst(read(llm, tokens[180:]), first) <= EXACT
    other = open_llama(path, config(method))
    other.load_state(state)
    assert worst(read(other, tokens[180:]), first) <= EXACT


@pytest.mark.parametrize("method", ["star", "stair", "leaky-rerope", "self-extend", "streaming-llm", "mesa-exact"])
def test_stock_inside_the_trained_length(
    model_path: ModelPath, open_llama: Opener, run_stock: Stock, method: str
) -> None:
    path, tokens = model_path("llama-head-size"), random_tokens(T, seed=11)
    stock, _ = run_stock(path, [tokens], type_k=F16, type_v=F16, flash_attn=False)
    llm = open_llama(path, MesaConfig(method=method), kv=F16)
    assert np.array_equal(read(llm, tokens), stock)


def test_a_state_of_another_method_is_refused(model_path: ModelPath, open_llama: Opener) -> None:
    path = model_path("llama-head-size")
    llm = open_llama(path, replace(config("mesa"), log_scaling=False))
    read(llm, random_tokens(200, seed=12))
    other = open_llama(path, config("rerope"))
    with pytest.raises(Exception, match="saved with method mesa, this context has rerope"):
        other.load_state(llm.save_state())


def test_what_a_method_cannot_do_is_refused(model_path: ModelPath) -> None:
    with pytest.raises(ConfigError, match="there is no method 'alibi': use one of mesa, "):
        MesaConfig(method="alibi")
    with pytest.raises(ConfigError, match="window is 128: it must lie between 1 and 127"):
        MesaLlama(model_path("llama-head-size"), mesa=replace(config("rerope"), window=128))
    llm = MesaLlama(model_path("llama-head-size"), mesa=replace(config("stair"), stair_width=2), n_ctx=512)
    with pytest.raises(ConfigError, match="stair_width 2 is too small for 300 tokens: use 4 or more"):
        llm.eval(random_tokens(LENGTH))
    with pytest.raises(ModelError, match="the method rerope weaves RoPE: this model has ALiBi"):
        MesaLlama(model_path("mpt"), mesa=MesaConfig(method="rerope"))
