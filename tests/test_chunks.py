"""Chunks that are kept: read once behind the first chunk, loaded again anywhere, in any order, and never read again.

What is put together from them must give the logits of the same plan, read at once: by the independent oracle, and by the engine.
The models have T = 128; the first chunk here is longer than the config's, and chunks are longer than its chunks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import arch_models
import make_models
import oracle
from conftest import (
    F16,
    F32,
    Q8_0,
    ROOT,
    SMALL,
    ModelPath,
    Opener,
    random_tokens,
    read,
    rms,
    stock_kernels,
    worst,
)
from mesa_gguf import ConfigError, MesaConfig, MesaError, MesaLlama, MesaPlan, PromptError, _core
from mesa_gguf.model.bundled import bundled_model
from mesa_gguf.model.header import check_model
from mesa_gguf.model.memory import KV_TYPES
from test_archs import apart, has_gelu, has_windows, is_deep

T = 128
FIRST = random_tokens(20, seed=1)
CHUNKS = [random_tokens(n, seed=n) for n in (50, 70, 61, 97)]
QUESTION = random_tokens(24, seed=2)
REST = random_tokens(40, seed=3)

SOME = [2, 0, 3, 2]  # chunks in another order, one twice: the stair
ONE = [0]  # inside T

EXACT = 1e-3  # f32 throughout; seen: 0.0001, with GELU 0.0009
GELU = 5e-3  # a norm after GELU in Gemma, whose f16 table llama.cpp looks it up in
FLASH = 0.1  # ggml's flash attention sums values of few queries in f16 (test_engine.py)
SHARE = 1.5  # of the rms error of reading the same plan at once

# keys shared by layers, M-RoPE, widths that differ by layer, layers without RoPE or with another one, windows
QUICK_ARCHS = (
    "gemma3 olmo2:windows cohere2 smollm3 qwen2vl openelm gemma4 gpt-oss gemma3n deci step35 hunyuan-dense phi3 mistral3:temperature"
).split()
QUICK_FILES = [  # made at once
    name + part for name in QUICK_ARCHS for part in ("", "/global", "/windows") if not part or has_windows(name)
]
GELU_KINDS = ["gemma2", "gemma3"]


@dataclass(frozen=True)
class Kept:
    """Chunks as a library holds them."""

    first: bytes
    chunks: list[bytes]


def keep(llm: MesaLlama, first: Sequence[int] = FIRST, chunks: Sequence[Sequence[int]] = CHUNKS) -> Kept:
    """Read each chunk alone behind the first chunk."""
    llm.reset()
    llm.eval(first)
    kept_first, kept = llm.save_chunk(0, len(first)), []
    for chunk in chunks:
        llm.n_tokens = len(first)
        llm.eval(chunk)
        assert llm.plan().is_plain
        kept.append(llm.save_chunk(len(first), llm.n_tokens))
    return Kept(kept_first, kept)


def put_together(llm: MesaLlama, kept: Kept, order: Sequence[int] = SOME) -> list[int]:
    """An empty context, then the first chunk and chunks, all loaded -> the text."""
    llm.reset()
    text = list(FIRST)
    llm.load_chunk(FIRST, kept.first)
    for i in order:
        llm.load_chunk(CHUNKS[i], kept.chunks[i])
        text += CHUNKS[i]
        assert llm.n_tokens == len(text)
    assert llm.input_ids[: llm.n_tokens].tolist() == text
    return text


def oracle_together(state: oracle.State, order: Sequence[int]) -> None:
    """The oracle reads the same."""
    state._read(FIRST, oracle.first_chunk_queries(len(FIRST)))
    for i in order:
        state._read(CHUNKS[i], oracle.kept_chunk_queries(len(FIRST), state.n, state.n + len(CHUNKS[i])))


def oracle_last(state: oracle.State, plan: MesaPlan, tokens: Sequence[int]) -> oracle.Floats:
    state.move_anchor(plan.anchor, plan.stair_width)
    return state.last(tokens)


def starts_of(order: Sequence[int]) -> list[int]:
    return [0, *np.cumsum([len(FIRST), *(len(CHUNKS[i]) for i in order)]).tolist()]


def written_plan(order: Sequence[int], params: MesaConfig = SMALL) -> MesaPlan:
    """The plan of a text of kept chunks, by its definition."""
    starts, end = starts_of(order), starts_of(order)[-1]
    if end + params.last_chunk <= T:
        return MesaPlan(starts, anchor=0, stair_width=1)
    anchor = starts[-2] if end + params.last_chunk + params.room - starts[-2] <= 3 * T // 4 else end
    after = end + params.last_chunk + params.room - anchor
    width = next(e for e in range(1, end) if -(-anchor // e) + after <= T)
    return MesaPlan(starts, anchor=anchor, stair_width=width)


@pytest.fixture(scope="module")
def any_path(tmp_path_factory: pytest.TempPathFactory, model_path: ModelPath) -> Callable[[str], Path]:
    """The file of a model of make_models.py or else arch_models.py, by name; some of the latter at once."""
    folder = tmp_path_factory.mktemp("archs")
    made: dict[str, Path | str] = {}

    def path(name: str) -> Path:
        if name in make_models.MODELS:
            return model_path(name)
        if name == "llama-128":  # heads of whole Hadamard blocks
            return make_models.write_llama(folder / "128.gguf", make_models.Shape(n_head=2, n_head_kv=1, head_size=128))
        if name not in made:
            made.update(arch_models.make(QUICK_FILES if name in QUICK_FILES else [name], folder))
        result = made[name]
        assert isinstance(result, Path), f"{name}: {result}"
        return result

    return path


AnyPath = Callable[[str], Path]


#
# logits
#

ORACLE_KINDS = [
    *(
        "llama",
        "llama-gqa",
        "llama-yarn",
        "llama-freq-factors",
        "qwen2",
        "stablelm",
        "gptneox",
        "mpt",
        "nope",
        "gemma2",
    ),
    *("gemma3", "olmo2:windows", "cohere2", "smollm3"),
]


def limit(kind: str, flash: bool = False) -> float:
    return FLASH if flash else GELU if kind in GELU_KINDS else EXACT


ORACLE_CASES = [
    pytest.param(
        *(kind, flash, order),
        id=f"{kind}-{'flash-' * flash}{'stair' if order == SOME else 'inside'}",
        marks=() if kind in ("llama", "gemma2") or (order == SOME and not flash) else pytest.mark.slow,
    )
    for kind in ORACLE_KINDS
    for flash in (False, True)
    for order in (SOME, ONE)
]


@pytest.mark.parametrize(("kind", "flash", "order"), ORACLE_CASES)
def test_logits_are_those_of_the_oracle(
    any_path: AnyPath, open_llama: Opener, kind: str, flash: bool, order: list[int]
) -> None:
    """A question, then tokens one by one until the anchor has moved."""
    path = any_path(kind)
    llm = open_llama(path, flash=flash)
    kept = keep(llm)
    text = put_together(llm, kept, order)
    assert llm.plan() == written_plan(order)
    assert llm.loaded_chunks() == list(pairwise(starts_of(order)[1:]))

    state = oracle.State(oracle.Model.from_gguf(path, kv_half=flash), log_scaling_T=T)
    oracle_together(state, order)
    errors = [worst(read(llm, QUESTION), oracle_last(state, llm.plan(), QUESTION))]
    assert llm.plan() == written_plan(order)
    moves = 0
    for token in REST:
        before = llm.plan()
        logits = read(llm, [token])
        moves += llm.plan() != before
        errors.append(worst(logits, oracle_last(state, llm.plan(), [token])))
    print(
        f"\n{kind}, flash {flash}, {len(text)} tokens: question {errors[0]:.6f}, generation {max(errors[1:]):.6f}, {moves} moves"
    )
    assert moves >= 1 or order == ONE
    assert max(errors) <= limit(kind, flash)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_chunk_in_front_of_the_question_is_near(
    any_path: AnyPath, open_llama: Opener, kind: str, flash: bool
) -> None:
    """It stands at its true distance, where that leaves a quarter of the positions to the stair; all chunks before it are on the stair."""
    path, near, order = any_path(kind), replace(SMALL, room=8), [3, 2, 0]
    llm = open_llama(path, near, flash=flash)
    text = put_together(llm, keep(llm), order)
    plan = llm.plan()
    assert plan == written_plan(order, near) and plan.anchor == len(text) - len(CHUNKS[0]) and plan.stair_width > 1
    state = oracle.State(oracle.Model.from_gguf(path, kv_half=flash), log_scaling_T=T)
    oracle_together(state, order)
    for tokens in (QUESTION, *([token] for token in REST)):
        assert worst(read(llm, tokens), oracle_last(state, llm.plan(), tokens)) <= limit(kind, flash)
    assert llm.plan().anchor > plan.anchor
    llm.n_tokens = len(text)
    assert written_plan([3, 2, 1], near).anchor == len(FIRST) + sum(len(CHUNKS[i]) for i in (3, 2, 1))  # too long


def read_at_once(
    open_llama: Opener, path: Path, order: Sequence[int], tokens: Sequence[int], **options: Any
) -> NDArray[np.float32]:
    """The same plan without a library -> the logits of tokens."""
    llm = open_llama(path, replace(SMALL, plan=written_plan(order)), **options)
    text = [*FIRST, *(token for i in order for token in CHUNKS[i])]
    return read(llm, [*text, *tokens])[len(text) :]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK_ARCHS else pytest.mark.slow) for name in arch_models.MODELS],
)
def test_every_architecture(any_path: AnyPath, open_llama: Opener, name: str) -> None:
    """In front, as the text is read plainly; in any order, as the same plan reads it at once. There layers with a sliding
    window are silent, as they read another text; alone they read what is in front of them, wherever that stands."""
    path = any_path(name)
    if check_model(path).unsupported is not None:
        pytest.skip(f"{name}: not supported")
    try:
        llm = open_llama(path)
    except MesaError as err:
        pytest.skip(f"{name}: {err}")
    most = (2e-3 if has_gelu(name) else EXACT / 5) * (3 if is_deep(name) else 1)

    put_together(llm, keep(llm), ONE)
    inside = read(llm, QUESTION)
    llm.reset()
    text = [*FIRST, *CHUNKS[0], *QUESTION]
    error = apart(inside, read(llm, text)[-len(QUESTION) :]).max()
    print(f"\n{name}: inside {error:.6f}")
    assert error <= most

    if has_windows(name):
        path = any_path(f"{name}/global")
        llm = open_llama(path)
    put_together(llm, keep(llm), SOME)
    errors = apart(read(llm, QUESTION), read_at_once(open_llama, path, SOME, QUESTION))
    print(f"{name}: stair {errors.max():.6f}")
    assert np.quantile(errors, 0.9) <= most and errors.max() <= max(most, 0.02)

    metadata = arch_models.MODELS[name].all_metadata()
    if has_windows(name) and metadata["attention.sliding_window"] * metadata["block_count"] / 2 < len(CHUNKS[3]):
        llm = open_llama(any_path(f"{name}/windows"))
        kept = keep(llm)
        put_together(llm, kept, [3])
        front = read(llm, QUESTION)
        put_together(llm, kept, [0, 3])
        error = apart(read(llm, QUESTION), front).max()
        print(f"{name}: windows {error:.6f}")
        assert error <= 5 * most  # their keys were rotated once more


#
# KV types
#

FLOATS = ["f32", "f16", "bf16"]
CASES = [(k, v, True) for k in KV_TYPES for v in ("f16", k)] + [(k, v, False) for k in KV_TYPES for v in FLOATS]
QUICK_CASES = [*(("llama-128", k, k, True) for k in KV_TYPES), *(("llama-head-size", k, k, False) for k in FLOATS)]


def kv_cases() -> list[Any]:
    cases = dict.fromkeys((kind, *case) for kind in ("llama-128", "llama-head-size") for case in CASES)
    return [pytest.param(*case, marks=() if case in QUICK_CASES else pytest.mark.slow) for case in cases]


ORDERS = (SOME, [1, 3], [0, 1, 2, 3], [3, 2, 1])
ASKED = [random_tokens(48, seed=n) for n in (50, 51, 52, 53)]


def ask(llm: MesaLlama) -> NDArray[np.float32]:
    """The logits of each of ASKED behind what is in the context."""
    end, logits = llm.n_tokens, []
    for question in ASKED:
        llm.n_tokens = end
        logits.append(read(llm, question))
    return np.concatenate(logits)


@pytest.fixture(scope="module")
def exact_logits(any_path: AnyPath) -> Callable[[str], list[oracle.Floats]]:
    """What `ask` should return behind each of ORDERS, by the kind of the model."""

    def logits(kind: str) -> list[oracle.Floats]:
        model = oracle.Model.from_gguf(any_path(kind))
        result: list[list[oracle.Floats]] = []
        for order in ORDERS:
            state = oracle.State(model, log_scaling_T=T)
            oracle_together(state, order)
            result.append([])
            for question in ASKED:
                result[-1].append(oracle_last(state, written_plan(order), question))
                state.rollback(len(question))
        return [np.concatenate(logits) for logits in result]

    return cache(logits)


@pytest.mark.parametrize(("kind", "type_k", "type_v", "flash"), kv_cases())
def test_every_kv_type(
    any_path: AnyPath,
    open_llama: Opener,
    exact_logits: Callable[[str], list[oracle.Floats]],
    kind: str,
    type_k: str,
    type_v: str,
    flash: bool,
) -> None:
    """Saved, loaded, saved: the same bytes, also where a chunk stands elsewhere. Read behind them: little further from the
    oracle than the same plan without a library (a key is rounded where it was read and where it stands: up to sqrt(2), where
    its rounding is what counts). Heads of 128 are multiplied with Hadamard blocks where they are quantized."""
    path, exact = any_path(kind), (type_k, type_v, flash) == ("f32", "f32", False)
    options = dict(type_k=KV_TYPES[type_k], type_v=KV_TYPES[type_v], flash=flash)
    llm = open_llama(path, **options)
    kept = keep(llm)

    errors: list[NDArray[np.float64]] = []
    at_once: list[NDArray[np.float64]] = []
    for order, want in zip(ORDERS, exact_logits(kind), strict=True):
        text = put_together(llm, kept, order)
        assert llm.save_chunk(0, len(FIRST)) == kept.first
        assert [llm.save_chunk(*span) for span in pairwise(starts_of(order)[1:])] == [kept.chunks[i] for i in order]
        errors.append(ask(llm) - want)
        if not exact:
            other = open_llama(path, replace(SMALL, plan=written_plan(order)), **options)
            read(other, text)
            at_once.append(ask(other) - want)
            other.close()
    if exact:
        assert np.abs(errors).max() <= EXACT
        return
    share = rms(errors) / rms(at_once)
    print(f"\n{kind} {type_k}/{type_v} {flash=}: {rms(errors):.5f}, read at once {rms(at_once):.5f}: {share:.2f}")
    assert share <= SHARE


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2vl"])
def test_the_cache_is_as_a_decode_leaves_it(any_path: AnyPath, open_llama: Opener, kind: str) -> None:
    """In front: cells, M-RoPE's fields and rows of both caches, bit for bit; all of it stands at the end of llama.cpp's state."""
    llm = open_llama(any_path(kind))
    kept = keep(llm)
    llm.reset()
    llm.eval([*FIRST, *CHUNKS[0]])
    read_here = bytes(llm.save_state().llama_state)
    put_together(llm, kept, ONE)
    loaded = bytes(llm.save_state().llama_state)
    rows = llm.n_tokens * (llm.chunk_size(2) - llm.chunk_size(1))
    cells = llm.n_tokens * (
        24 if kind == "qwen2vl" else 2 * 12
    )  # position, sequences, and of M-RoPE x, y and the token
    size = rows + (cells if kind != "llama" else cells // 2)
    assert len(loaded) > size and read_here[-size:] == loaded[-size:]


@pytest.mark.parametrize("kv", [F32, F16])
def test_one_layout_with_and_without_flash_attention(any_path: AnyPath, open_llama: Opener, kv: int) -> None:
    """Without it V is transposed in the cache; in the bytes it is not."""
    path, logits = any_path("openelm"), {}
    for flash in (False, True):
        kept = keep(open_llama(path, kv=kv, flash=flash))
        for here in (False, True):
            llm = open_llama(path, kv=kv, flash=here)
            put_together(llm, kept, ONE)
            assert llm.save_chunk(len(FIRST), llm.n_tokens) == kept.chunks[0]
            logits[flash, here] = read(llm, QUESTION)
    assert worst(logits[True, False], logits[False, False]) <= FLASH
    assert worst(logits[False, True], logits[True, True]) <= FLASH


def test_kernels_are_no_part_of_a_chunk(open_llama: Opener) -> None:
    """Rows that one kernel made serve another: what comes out lies as near to either as they do to each other."""
    llm = open_llama(bundled_model(), flash=True, kv=F16)
    with stock_kernels():
        kept_stock = keep(llm)
        put_together(llm, kept_stock)
        stock = read(llm, QUESTION)
    kept_ours = keep(llm)
    assert kept_ours.chunks != kept_stock.chunks
    put_together(llm, kept_ours)
    ours = read(llm, QUESTION)
    put_together(llm, kept_stock)
    mixed = read(llm, QUESTION)
    between = rms(ours - stock)
    assert 0 < between < 0.05 * stock.std()  # seen: 0.02
    assert max(rms(mixed - ours), rms(mixed - stock)) < 1.5 * between


def test_a_context_as_small_as_the_text(any_path: AnyPath, open_llama: Opener) -> None:
    """The last row of the cache is written, and none behind it; in layers with a transposed V too."""
    path, chunk = any_path("llama"), random_tokens(100, seed=9)
    for flash in (False, True):
        llm = open_llama(path, n_ctx=256, flash=flash, kv=F32)
        kept = keep(llm, chunks=[chunk])
        llm.n_tokens = len(FIRST)
        for _ in range(2):
            llm.load_chunk(chunk, kept.chunks[0])
        with pytest.raises(PromptError, match=r"320 tokens, more than n_ctx \(256\)"):
            llm.load_chunk(chunk, kept.chunks[0])
        rest = random_tokens(36, seed=10)
        larger = open_llama(path, n_ctx=512, flash=flash, kv=F32)
        larger.load_chunk(FIRST, kept.first)
        for _ in range(2):
            larger.load_chunk(chunk, kept.chunks[0])
        assert worst(read(llm, rest), read(larger, rest)) <= (FLASH if flash else EXACT)


#
# plans
#


def test_the_plan_is_that_of_the_chunks_alone(any_path: AnyPath, open_llama: Opener) -> None:
    """Whatever question follows: no key moves for another one."""
    llm = open_llama(any_path("llama"))
    kept = keep(llm)
    end = len(put_together(llm, kept))
    placed: NDArray[np.int32] | None = None
    for n in (1, 5, SMALL.last_chunk + SMALL.room, 9):
        llm.n_tokens = end
        read(llm, random_tokens(n, seed=n))
        assert llm.plan() == written_plan(SOME)
        now = _core.key_positions(llm._address)[:end]
        assert placed is None or np.array_equal(placed, now)
        placed = now
    assert placed is not None and placed.max() + 1 + SMALL.last_chunk + SMALL.room <= T


@pytest.mark.parametrize(("n_question", "chunk"), [(60, 40), (100, 40), (190, 40), (190, 116)])
@pytest.mark.parametrize("order", [[3, 1], ONE], ids=["stair", "inside"])
def test_a_long_question(any_path: AnyPath, open_llama: Opener, order: list[int], n_question: int, chunk: int) -> None:
    """It never goes on in the last chunk that was loaded: it is a last chunk, or chunks of its own behind that one's end, which
    with the first chunk that is there, not with the config's, stay inside T."""
    path, question = any_path("llama"), random_tokens(n_question, seed=20)
    llm = open_llama(path, replace(SMALL, chunk=chunk))
    kept = keep(llm)
    end = len(put_together(llm, kept, order))
    logits = read(llm, question)
    plan = llm.plan()
    assert plan.chunk_starts[: len(order) + 2] == starts_of(order)
    assert all(len(FIRST) + stop - start <= T for start, stop in pairwise(plan.chunk_starts[1:]))

    state = oracle.State(oracle.Model.from_gguf(path), log_scaling_T=T)
    oracle_together(state, order)
    state.move_anchor(plan.anchor, plan.stair_width)
    want, borders = [], [end, *(start for start in plan.chunk_starts if start > end)]
    for start, stop in pairwise(borders):
        want.append(state._read(question[start - end : stop - end], oracle.chunk_queries(len(FIRST), start, stop)))
    want.append(state.last(question[borders[-1] - end :]))
    assert worst(logits, np.concatenate(want)) <= EXACT
    if n_question == 190:
        assert len(borders) > 1


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_bias_of_the_stair(any_path: AnyPath, open_llama: Opener, kind: str) -> None:
    path, mesa = any_path(kind), replace(SMALL, stair_bias=0.5, log_length=4 * T)
    llm = open_llama(path, mesa)
    put_together(llm, keep(llm))
    state = oracle.State(oracle.Model.from_gguf(path), log_scaling_T=4 * T, stair_bias=0.5, near=SMALL.last_chunk)
    oracle_together(state, SOME)
    text = [*QUESTION, *REST[:20]]
    assert worst(read(llm, text), oracle_last(state, llm.plan(), text)) <= limit(kind)


def test_the_method_mesa_exact(any_path: AnyPath, open_llama: Opener) -> None:
    """Every query has distances of its own: as the same text read at once with the method."""
    path, mesa = (
        any_path("llama"),
        MesaConfig(method="mesa-exact", first_chunk=12, chunk=40, last_chunk=32, room=16, window=64),
    )
    llm = open_llama(path, mesa)
    put_together(llm, keep(llm))
    at_once = open_llama(path, replace(mesa, plan=written_plan(SOME)))
    text = [*FIRST, *(token for i in SOME for token in CHUNKS[i]), *QUESTION]
    want = read(at_once, text)[-len(QUESTION) :]
    assert worst(read(llm, QUESTION), want) <= EXACT
    plain = open_llama(path)
    put_together(plain, keep(plain))
    assert worst(read(plain, QUESTION), want) > 0.1


def test_a_fixed_stair_width(any_path: AnyPath, open_llama: Opener) -> None:
    llm = open_llama(any_path("llama"), replace(SMALL, stair_width=7))
    kept = keep(llm)
    put_together(llm, kept, ONE)
    assert llm.plan().stair_width == 1
    put_together(llm, kept)
    assert llm.plan().stair_width == 7
    llm = open_llama(any_path("llama"), replace(SMALL, stair_width=2))
    kept = keep(llm)
    put_together(llm, kept, [0, 1])
    before = snapshot(llm)
    with pytest.raises(PromptError, match="stair_width 2 is too small for 237 tokens and a last chunk; use 3 or more"):
        llm.load_chunk(CHUNKS[3], kept.chunks[3])
    assert snapshot(llm) == before


#
# what cannot be loaded
#


def snapshot(llm: MesaLlama) -> tuple[Any, ...]:
    """All that a failing call must leave alone."""
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)  # what Llama has forgotten, llama.cpp forgets with the next call
    data = bytes(llm.save_state().llama_state)
    keys = _core.key_positions(llm._address).tolist()
    return llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist(), llm.plan(), llm.loaded_chunks(), keys, data


@pytest.fixture(scope="module")
def standing(any_path: AnyPath, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A context with a chunk in it, and what is kept."""
    llm = MesaLlama(
        any_path("gemma2"),
        mesa=SMALL,
        n_ctx=256,
        flash_attn=False,
        type_k=F16,
        type_v=F16,
        n_threads=1,
        n_threads_batch=1,
    )
    kept = keep(llm, chunks=CHUNKS[:2])
    put_together(llm, kept, ONE)
    yield llm, kept
    llm.close()


def refused(llm: MesaLlama, tokens: Sequence[int], data: bytes) -> str:
    before = snapshot(llm)
    with pytest.raises(MesaError) as caught:
        llm.load_chunk(tokens, data)
    assert snapshot(llm) == before
    return str(caught.value)


@given(where=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_any_changed_byte(standing: tuple[MesaLlama, Kept], where: float, change: int) -> None:
    llm, kept = standing
    data = bytearray(kept.chunks[1])
    data[int(where * len(data))] ^= change
    assert "cannot be loaded" in refused(llm, CHUNKS[1], bytes(data))


def test_each_byte_of_the_header(standing: tuple[MesaLlama, Kept]) -> None:
    """All of them, by the C API: Python's part in front of it is skipped."""
    llm, kept = standing
    tokens, data = np.asarray(CHUNKS[1], np.int32), kept.chunks[1][32:]
    before = snapshot(llm)
    n_header = len(data) - (llm.chunk_size(2) - llm.chunk_size(1)) * len(tokens)
    assert 0 < n_header < 1000
    for i in range(n_header):
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            _core.chunk_load(llm._address, tokens, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
    assert snapshot(llm) == before


@given(where=st.floats(0, 1, exclude_max=True))
def test_cut_short_anywhere(standing: tuple[MesaLlama, Kept], where: float) -> None:
    llm, kept = standing
    refused(llm, CHUNKS[1], kept.chunks[1][: int(where * len(kept.chunks[1]))])


@given(data=st.binary(max_size=2000))
def test_any_bytes(standing: tuple[MesaLlama, Kept], data: bytes) -> None:
    llm, kept = standing
    refused(llm, CHUNKS[1], data)
    refused(llm, CHUNKS[1], kept.chunks[1][:32] + data)
    refused(llm, CHUNKS[1], kept.chunks[1][: 32 + 16] + data)
    refused(llm, CHUNKS[1], kept.chunks[1] + (data or b"\0"))


def test_another_chunk(standing: tuple[MesaLlama, Kept]) -> None:
    """Swapped, of other tokens, a first chunk, one read behind another first chunk of any length."""
    llm, kept = standing
    assert "it holds other tokens (50) than those given (70)" in refused(llm, CHUNKS[1], kept.chunks[0])
    other = [*CHUNKS[1][:-1], (CHUNKS[1][-1] + 1) % 128]
    assert "it holds other tokens" in refused(llm, other, kept.chunks[1])
    assert "it is a first chunk" in refused(llm, FIRST, kept.first)
    again = MesaLlama(
        llm.model_path, mesa=SMALL, n_ctx=256, flash_attn=False, type_k=F16, type_v=F16, n_threads=1, n_threads_batch=1
    )
    behind = keep(again, [*FIRST[:-1], 7], CHUNKS[1:2]).chunks[0]
    assert "behind a first chunk of other tokens" in refused(llm, CHUNKS[1], behind)
    behind = keep(again, FIRST[:-1], CHUNKS[1:2]).chunks[0]
    assert "behind a first chunk of 19 tokens, here are 20" in refused(llm, CHUNKS[1], behind)
    again.reset()
    assert "behind a first chunk of 20 tokens, here are 0" in refused(again, CHUNKS[1], kept.chunks[1])
    again.close()


@pytest.mark.parametrize("options", [dict(type_k=F32), dict(type_v=F32)])
def test_another_kv_type(standing: tuple[MesaLlama, Kept], open_llama: Opener, options: dict[str, int]) -> None:
    llm, kept = standing
    other = open_llama(Path(llm.model_path), **(dict(type_k=F16, type_v=F16) | options))
    other.eval(FIRST)
    kind = "keys" if "type_k" in options else "values"
    said = refused(other, CHUNKS[1], kept.chunks[1])
    assert (
        f"of another model, KV type or RoPE: the type of {kind} of layer" in said and "is 1, this context has 0" in said
    )


def test_another_model(any_path: AnyPath, open_llama: Opener, tmp_path: Path) -> None:
    """The file, though the shapes are the same; another architecture; other RoPE options. The C API sees all but the first."""
    kept = keep(open_llama(any_path("llama"))).chunks[0]

    def reasons(llm: MesaLlama) -> tuple[str, str]:
        llm.eval(FIRST)
        said = refused(llm, CHUNKS[0], kept)
        try:
            _core.chunk_load(llm._address, np.asarray(CHUNKS[0], np.int32), kept[32:])
        except RuntimeError as err:
            return said, str(err)
        return said, ""

    files = "another model file, adapter or RoPE options"
    said, c_says = reasons(open_llama(make_models.write_llama(tmp_path / "other.gguf", seed=5)))
    assert files in said and c_says == ""
    said, c_says = reasons(open_llama(any_path("stablelm")))
    assert files in said and "the architecture (hash)" in c_says
    said, c_says = reasons(open_llama(any_path("llama"), rope_freq_base=5e5))
    assert files in said and "the rotation (hash) of layer 0" in c_says
    said, c_says = reasons(open_llama(any_path("llama-freq-factors")))
    assert files in said and "the rotation (hash) of layer 0" in c_says


def test_without_hadamard_blocks(any_path: AnyPath, open_llama: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable of llama.cpp switches them off: the same types and sizes, other contents."""
    kept = keep(open_llama(any_path("llama-128"), kv=Q8_0, flash=True))
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    llm = open_llama(any_path("llama-128"), kv=Q8_0, flash=True)
    llm.eval(FIRST)
    said = refused(llm, CHUNKS[0], kept.chunks[0])
    assert "the Hadamard block of keys is 128, this context has 0" in said


def test_where_no_chunk_can_follow(any_path: AnyPath, open_llama: Opener) -> None:
    llm = open_llama(any_path("llama"))
    kept = keep(llm)

    put_together(llm, kept, ONE)
    llm.eval(QUESTION[:3])
    assert "token 73 does not follow the end of a chunk" in refused(llm, CHUNKS[1], kept.chunks[1])
    llm.n_tokens = 60
    assert "lies in a chunk that was loaded (20 to 70)" in refused(llm, CHUNKS[1], kept.chunks[1])
    llm.n_tokens = len(FIRST) - 3
    assert "behind a first chunk of 20 tokens, here are 17" in refused(llm, CHUNKS[1], kept.chunks[1])

    with pytest.raises(PromptError, match="a chunk of no tokens"):
        llm.load_chunk([], kept.chunks[1])
    with pytest.raises(PromptError, match="token 128 is not in the model's vocabulary"):
        llm.load_chunk([128], kept.chunks[1])

    # behind 40 tokens there is no room in T for the longest chunk
    chunk, first = CHUNKS[3], random_tokens(40, seed=30)
    llm.reset()
    llm.eval(first)
    with pytest.raises(
        PromptError, match=r"with the first chunk \(40\) its 97 tokens are more than train_length \(128\)"
    ):
        llm.load_chunk(chunk, kept.chunks[3])


def test_what_was_announced_and_not_read_is_replaced(any_path: AnyPath, open_llama: Opener) -> None:
    """And stays announced where the chunk cannot be loaded."""
    llm = open_llama(any_path("llama"))
    kept = keep(llm)
    for order in ([], ONE):
        put_together(llm, kept, order)
        plan = llm.plan()
        _core.prompt(llm._address, 300)
        assert (announced := llm.plan()) != plan
        refused(llm, CHUNKS[2], kept.chunks[1])
        assert llm.plan() == announced
        llm.load_chunk(CHUNKS[1], kept.chunks[1])
        assert llm.plan() == written_plan([*order, 1])


def test_a_text_that_was_read_in_chunks_goes_on_with_kept_ones(any_path: AnyPath, open_llama: Opener) -> None:
    """At any border of a plan."""
    path = any_path("llama")
    llm = open_llama(path, replace(SMALL, first_chunk=len(FIRST)))
    kept = keep(llm)
    llm.reset()
    text = [*FIRST, *random_tokens(300, seed=31)]
    llm.eval(text)
    border = llm.plan().chunk_starts[3]
    llm.n_tokens = border
    llm.load_chunk(CHUNKS[1], kept.chunks[1])
    starts = [*llm.plan().chunk_starts[:-2], border, border + len(CHUNKS[1])]
    assert llm.plan().chunk_starts == starts and llm.loaded_chunks() == [(border, border + 70)]

    state = oracle.State(oracle.Model.from_gguf(path), log_scaling_T=T)
    state._read(FIRST, oracle.first_chunk_queries(len(FIRST)))
    for start, stop in pairwise(starts[1:]):
        tokens = text[start:stop] if stop <= border else CHUNKS[1]
        state._read(tokens, oracle.chunk_queries(len(FIRST), start, stop))
    assert worst(read(llm, QUESTION), oracle_last(state, llm.plan(), QUESTION)) <= EXACT


#
# values
#


def values_of(llm: MesaLlama, data: bytes, n_tokens: int) -> dict[int, NDArray[np.float32]]:
    """The values in a chunk's bytes by layer, as docs/CHUNKS.md has the format; f32 and f16."""
    payload = data[len(bytes.fromhex(llm._origin)) :]
    numbers = np.frombuffer(payload[: len(payload) // 8 * 8], np.int64)
    n_caches = 2 if llama_cpp.llama_model_n_swa(llm.model) > 0 else 1
    at = 9 + 2 * n_caches
    layers = numbers[at + 1 : at + 1 + 7 * numbers[at]].reshape(-1, 7)
    place, found = 8 * (at + 1 + 7 * int(numbers[at])), {}
    for number, *_, key_size, value_type, value_size in layers.tolist():
        place += n_tokens * key_size
        kind = {F32: np.float32, F16: np.float16}[value_type]
        rows = np.frombuffer(payload[place : place + n_tokens * value_size], kind).reshape(n_tokens, -1)
        found[number] = rows.astype(np.float32)
        place += n_tokens * value_size
    assert place == len(payload)
    return found


def values_in(llm: MesaLlama, chunk: bytes, n_tokens: int, n_layers: int) -> NDArray[np.float32]:
    """What `chunk_values` reads of a whole chunk."""
    parts = [chunk[at : at + size] for at, size in llm.chunk_values_at(n_tokens, n_layers)]
    return llm.chunk_values(b"".join(parts), n_tokens, n_layers)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "openelm", "gemma3n", "mpt"])
@pytest.mark.parametrize("kv", [F32, F16])
def test_values(any_path: AnyPath, open_llama: Opener, name: str, kv: int) -> None:
    """The last layers' first, of both caches, as wide as they are, and as many as are asked for."""
    llm = open_llama(any_path(name), kv=kv)
    kept = keep(llm)
    before = llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()
    n = len(CHUNKS[0])
    own = values_of(llm, kept.chunks[0], n)
    order = sorted(own, reverse=True)
    for n_layers in (1, 2, 1 << 20):
        expected = np.hstack([own[number] for number in order[:n_layers]])
        np.testing.assert_array_equal(values_in(llm, kept.chunks[0], n, n_layers), expected)
        assert len(llm.chunk_values_at(n, n_layers)) == min(n_layers, len(order))
    assert values_in(llm, kept.first, len(FIRST), 1).shape == (len(FIRST), own[order[0]].shape[1])
    assert (llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()) == before
    assert llm.save_chunk(len(FIRST), llm.n_tokens) == kept.chunks[-1]


@pytest.mark.parametrize("kv", [F16, Q8_0])
@pytest.mark.parametrize("flash", [False, True])
def test_values_of_other_types(any_path: AnyPath, open_llama: Opener, kv: int, flash: bool) -> None:
    """What is compared are angles, which the rotation of quantized values leaves as they are."""
    exact, n = open_llama(any_path("llama-128")), len(CHUNKS[1])
    expected = values_in(exact, keep(exact).chunks[1], n, 1)
    llm = open_llama(any_path("llama-128"), kv=kv, flash=flash) if flash else open_llama(
        any_path("llama-128"), kv=kv, type_v=F32 if kv == Q8_0 else kv
    )  # fmt: skip
    values = values_in(llm, keep(llm).chunks[1], n, 1)
    assert values.shape == expected.shape
    products = expected @ expected.T
    assert rms(values @ values.T - products) < 0.02 * rms(products)


def test_bytes_that_are_no_values(any_path: AnyPath, open_llama: Opener) -> None:
    """Their size tells; a part of a chunk has nothing else that could."""
    llm = open_llama(any_path("llama"))
    ((_, size),) = llm.chunk_values_at(5, 1)
    assert np.array_equal(llm.chunk_values(memoryview(bytes(size)), 5, 1), np.zeros((5, size // 20)))
    for bad in (b"", bytes(size - 1), bytes(size + 4)):
        with pytest.raises(PromptError, match=f"{size} bytes"):
            llm.chunk_values(bad, 5, 1)
    for n_tokens, n_layers in ((0, 1), (-1, 1), (5, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            llm.chunk_values(b"", n_tokens, n_layers)
        with pytest.raises(ValueError, match="at least 1"):
            llm.chunk_values_at(n_tokens, n_layers)
    other = open_llama(any_path("llama"), MesaConfig(enabled=False))
    for call in (lambda: other.chunk_values_at(5, 1), lambda: other.chunk_values(bytes(size), 5, 1)):
        with pytest.raises(ConfigError):
            call()


#
# what cannot be saved
#


def test_what_cannot_be_saved(any_path: AnyPath, open_llama: Opener) -> None:
    llm = open_llama(any_path("llama"))
    kept = keep(llm)
    for span in [(-1, 5), (5, 5), (9, 4), (0, llm.n_tokens + 1)]:
        with pytest.raises(PromptError, match="no chunk can be kept"):
            llm.save_chunk(*span)
    put_together(llm, kept)
    with pytest.raises(PromptError, match="nor are they one chunk"):
        llm.save_chunk(len(FIRST), 90)
    read(llm, QUESTION)
    for span in [(0, len(FIRST)), (20, 81)]:
        with pytest.raises(PromptError, match="have moved since they were read"):
            llm.save_chunk(*span)
    # there and back: rounded twice
    llm.n_tokens = len(FIRST)
    llm.eval([1])
    assert _core.key_positions(llm._address).tolist() == list(range(len(FIRST) + 1))
    for span in [(0, len(FIRST)), (len(FIRST), len(FIRST) + 1)]:
        with pytest.raises(PromptError, match="have moved since they were read"):
            llm.save_chunk(*span)
    llm.reset()
    llm.load_chunk(FIRST, kept.first)
    llm.eval(CHUNKS[1])
    assert llm.save_chunk(20, 90) == kept.chunks[1]

    llm.reset()
    llm.eval(random_tokens(300, seed=4))
    with pytest.raises(PromptError, match="nor are they one chunk"):
        llm.save_chunk(12, 52)

    llm = open_llama(any_path("llama"), replace(SMALL, log_length=40))
    llm.eval(FIRST)
    llm.save_chunk(0, 20)
    llm.eval(CHUNKS[0])
    with pytest.raises(PromptError, match=r"queries were scaled from token 40 on \(log_length\)"):
        llm.save_chunk(20, 70)


def test_sliding_windows_stand_where_they_were_loaded(any_path: AnyPath, open_llama: Opener) -> None:
    """Their keys move at once: only a chunk in front can be saved again."""
    llm = open_llama(any_path("gemma2"))
    kept = keep(llm)
    put_together(llm, kept, [0, 1])
    assert llm.save_chunk(20, 70) == kept.chunks[0]
    with pytest.raises(PromptError, match="have moved since they were read"):
        llm.save_chunk(70, 140)


def test_configurations_that_keep_no_chunks(any_path: AnyPath, open_llama: Opener) -> None:
    path = any_path("gemma2")
    kept = keep(open_llama(path))
    for mesa, options, message in [
        (MesaConfig(enabled=False), {}, "Mesa is off, and stock llama.cpp keeps no chunks: give enabled=True"),
        (
            MesaConfig(method="star", first_chunk=12, chunk=40),
            {},
            "the method star keeps no chunks: give method='mesa'",
        ),
        (MesaConfig(method="rerope", window=64), {}, "the method rerope keeps no chunks"),
        (replace(SMALL, plan=MesaPlan([0, 20, 70], 70, 2)), {}, "a plan was made by hand"),
        (SMALL, dict(swa_full=False), "give swa_full=True"),
    ]:
        llm = open_llama(any_path("llama") if mesa.method != "mesa" else path, mesa, **options)
        for call in (
            lambda llm: llm.load_chunk(FIRST, kept.first),
            lambda llm: llm.save_chunk(0, 1),
            lambda llm: llm.chunk_size(3),
        ):
            with pytest.raises(ConfigError) as caught:
                call(llm)
            assert message in str(caught.value)
        llm.eval(FIRST)
        assert llm.loaded_chunks() == []


#
# going on
#


def test_rolling_back(any_path: AnyPath, open_llama: Opener) -> None:
    """To a border, and anywhere outside of loaded chunks; into one of them only to leave it by its start."""
    path = any_path("llama")
    llm = open_llama(path)
    kept = keep(llm)
    put_together(llm, kept, [2, 1, 3])
    first = read(llm, QUESTION)
    read(llm, random_tokens(60, seed=40))  # the anchor moves
    llm.n_tokens = starts_of([2, 1, 3])[-1]
    assert worst(read(llm, QUESTION), first) <= EXACT
    assert llm.plan() == written_plan([2, 1, 3])

    for n in (247, 152):
        llm.n_tokens = n
        with pytest.raises(PromptError, match=r"lies in a chunk that was loaded \("):
            llm.eval(QUESTION)
        with pytest.raises(PromptError, match="there are no logits of"):
            llm.sample()
        with pytest.raises(ValueError, match="cannot go on from its middle"):
            _core.prompt(llm._address, 3)
        llm._batch.set_batch(batch=[1], n_past=n, logits_all=False)
        with pytest.raises(RuntimeError):
            llm._ctx.decode(llm._batch)
        assert f"token {n} lies in a chunk that was loaded" in _core.last_error()
        assert llm.n_tokens == n and llm.plan().last_start > n

    llm.n_tokens = 151  # after the second chunk: the third is gone
    again = read(llm, QUESTION)
    assert llm.loaded_chunks() == [(20, 81), (81, 151)] and llm.plan() == written_plan([2, 1])
    put_together(llm, kept, [2, 1])
    assert worst(again, read(llm, QUESTION)) <= EXACT
    llm.n_tokens = 151
    llm.load_chunk(CHUNKS[0], kept.chunks[0])
    assert llm.plan() == written_plan([2, 1, 0])

    llm.n_tokens = len(FIRST) - 5  # no loaded chunk is left, and the text is read plainly again
    logits = read(llm, QUESTION)
    assert llm.loaded_chunks() == [] and llm.plan().is_plain
    assert worst(logits, read(open_llama(path), [*FIRST[:15], *QUESTION])[15:]) <= EXACT


def count_decoded(llm: MesaLlama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that llama.cpp gets from here on."""
    sizes: list[int] = []
    decode = llm._ctx.decode
    monkeypatch.setattr(llm._ctx, "decode", lambda batch: (sizes.append(batch.n_tokens()), decode(batch))[1])
    return sizes


@pytest.mark.parametrize("order", [SOME, ONE], ids=["stair", "inside"])
def test_generate_goes_on_without_reading(
    any_path: AnyPath, open_llama: Opener, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    """A prompt that begins with the loaded text, or tokens behind it: only what is new is decoded, inside T too."""
    llm = open_llama(any_path("llama"), logits_all=False)
    kept = keep(llm)
    text = put_together(llm, kept, order)
    with pytest.raises(PromptError, match="read at least one token after it"):
        llm.sample()
    assert llm.n_tokens == len(text)
    with pytest.raises(PromptError, match="read at least one token after it"):
        next(llm.generate(text))
    assert llm.n_tokens == len(text)

    sizes = count_decoded(llm, monkeypatch)
    pieces = llm.generate([*text, *QUESTION], temp=0.0)
    answer = [next(pieces) for _ in range(3)]
    assert sizes == [len(QUESTION), 1, 1]
    assert llm.input_ids[: llm.n_tokens].tolist() == [*text, *QUESTION, *answer[:2]]
    pieces = llm.generate([*text, *REST], temp=0.0)  # another question
    next(pieces)
    assert sizes[3:] == [len(REST)]

    put_together(llm, kept, order)
    sizes.clear()
    pieces = llm.generate(QUESTION, reset=False, temp=0.0)
    assert [next(pieces) for _ in range(3)] == answer and sizes == [len(QUESTION), 1, 1]

    # the same beginning as far as into the last chunk
    with pytest.raises(PromptError, match="lies in a chunk that was loaded"):
        next(llm.generate([*text[:-7], *QUESTION]))
    other = [FIRST[0], *QUESTION]  # that leaves them
    next(llm.generate(other))
    assert llm.loaded_chunks() == []


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("read_first", [False, True])
def test_states_hold_loaded_chunks(any_path: AnyPath, open_llama: Opener, kind: str, read_first: bool) -> None:
    """Saved and loaded with the rest: the same logits, rules and borders; chunks can follow, and be saved if they could before."""
    path = any_path(kind)
    llm = open_llama(path)
    kept = keep(llm)
    put_together(llm, kept, [1, 0])
    if read_first:
        read(llm, QUESTION)
    state, plan, end = llm.save_state(), llm.plan(), llm.n_tokens

    other = open_llama(path)
    other.load_state(state)
    assert other.loaded_chunks() == [(20, 90), (90, 140)] and other.plan() == plan
    assert np.array_equal(read(other, REST), read(llm, REST))
    for here in (llm, other):
        here.load_state(state)
        assert here.n_tokens == end
        if not read_first:
            assert here.save_chunk(20, 90) == kept.chunks[1]
        here.n_tokens = 140
        here.load_chunk(CHUNKS[2], kept.chunks[2])
        assert here.plan() == written_plan([1, 0, 2])
        read(here, QUESTION)
        here.n_tokens = 90  # and no cell of a window was lost
        here.load_chunk(CHUNKS[2], kept.chunks[2])
    assert np.array_equal(read(other, REST), read(llm, REST))
    for here in (llm, other):
        here.load_state(state)
        here.n_tokens = 100
        inside = here.save_state()
        with pytest.raises(PromptError, match="lies in a chunk"):
            here.eval([1])
        here.load_state(inside)
        assert here.n_tokens == 100
        with pytest.raises(PromptError, match="lies in a chunk"):
            here.eval([1])
        here.n_tokens = 90
        here.eval([1])

    # a state of before: nothing of the chunks is left
    llm.reset()
    llm.eval(FIRST)
    before = llm.save_state()
    put_together(llm, kept, [1, 0])
    llm.load_state(before)
    assert llm.loaded_chunks() == [] and llm.plan().is_plain
    llm.eval(CHUNKS[0])
    assert llm.save_chunk(20, 70) == kept.chunks[0]


def test_tokens_of_stock_states_are_not_known(any_path: AnyPath, open_llama: Opener) -> None:
    """What they were read as nobody can tell: they are no first chunk, and not kept."""
    path = any_path("llama")
    stock = open_llama(path, MesaConfig(enabled=False))
    stock.eval([*FIRST, *CHUNKS[0]])
    llm = open_llama(path)
    kept = keep(llm)
    data = bytes(stock.save_state().llama_state)
    llm.reset()
    llm._ctx.kv_cache_clear()
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    assert llama_cpp.llama_state_set_data(llm._ctx.ctx, buffer, len(data)) == len(data)
    llm.input_ids[:70] = [*FIRST, *CHUNKS[0]]
    llm.n_tokens = 70
    with pytest.raises(PromptError, match="token 0 is not known"):
        llm.save_chunk(20, 70)
    llm.n_tokens = 20
    assert "token 0 of the first chunk is not known" in refused(llm, CHUNKS[1], kept.chunks[1])


def test_the_c_api_says_no(any_path: AnyPath, open_llama: Opener) -> None:
    lib = llama_cpp.llama_cpp._lib
    lib.llama_mesa_chunk_size.restype = lib.llama_mesa_chunk_save.restype = ctypes.c_int64
    lib.llama_mesa_last_error.restype = ctypes.c_char_p
    llm = open_llama(any_path("llama"))
    llm.eval(FIRST)
    ctx, null = ctypes.c_void_p(llm._address), None
    buffer, tokens = ctypes.create_string_buffer(100), (ctypes.c_int32 * 3)(1, 2, 3)
    size = lib.llama_mesa_chunk_size(ctx, 3)
    assert size > 100
    for call, message in [
        (lambda: lib.llama_mesa_chunk_size(null, 3), "the context is NULL"),
        (lambda: lib.llama_mesa_chunk_size(ctx, 0), "a chunk of 0 tokens"),
        (lambda: lib.llama_mesa_chunk_save(null, 0, 3, buffer, ctypes.c_size_t(100)), "the context is NULL"),
        (
            lambda: lib.llama_mesa_chunk_save(ctx, 0, 3, buffer, ctypes.c_size_t(100)),
            f"takes {size} bytes, the buffer has 100",
        ),
        (
            lambda: lib.llama_mesa_chunk_save(ctx, 0, 3, null, ctypes.c_size_t(size)),
            f"takes {size} bytes, the buffer has 0",
        ),
        (lambda: lib.llama_mesa_chunk_save(ctx, 0, 21, buffer, ctypes.c_size_t(100)), "20 are in the context"),
        (lambda: lib.llama_mesa_chunk_load(null, tokens, 3, buffer, ctypes.c_size_t(100)), "the context is NULL"),
        (lambda: lib.llama_mesa_chunk_load(ctx, null, 3, buffer, ctypes.c_size_t(100)), "a chunk of no tokens"),
        (lambda: lib.llama_mesa_chunk_load(ctx, tokens, -1, buffer, ctypes.c_size_t(100)), "a chunk of no tokens"),
        (lambda: lib.llama_mesa_chunk_load(ctx, tokens, 3, null, ctypes.c_size_t(100)), "the buffer is NULL"),
        (lambda: lib.llama_mesa_chunk_load(ctx, tokens, 3, buffer, ctypes.c_size_t(0)), "cut short or empty"),
        (lambda: lib.llama_mesa_chunk_load(ctx, tokens, 3, buffer, ctypes.c_size_t(100)), "not a chunk"),
        (lambda: lib.llama_mesa_get_loaded(null, null, 0), "the context is NULL"),
    ]:
        lib.llama_mesa_clear_error()
        assert call() < 0 and message in lib.llama_mesa_last_error().decode()
    off = open_llama(any_path("llama"), MesaConfig(enabled=False))
    assert lib.llama_mesa_chunk_size(ctypes.c_void_p(off._address), 3) == -1
    assert b"not enabled" in lib.llama_mesa_last_error()


#
# a real model
#


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["own", "stock"])
def test_a_real_model(smollm2: Path, open_llama: Opener, kernels: str) -> None:
    """Real text, f16, flash attention, as people use it: no further from f32 than the same plan read at once."""
    with stock_kernels() if kernels == "stock" else nullcontext():
        _read_a_real_model(smollm2, open_llama, kernels)


def _read_a_real_model(smollm2: Path, open_llama: Opener, kernels: str) -> None:
    llm = open_llama(smollm2, MesaConfig(), n_ctx=256)
    first = llm.tokenize(b"<|im_start|>user\nAnswer from the text.\n", special=True)
    tokens = llm.tokenize((ROOT / "LICENSE").read_bytes(), add_bos=False)
    chunks = [tokens[at : at + 70] for at in (0, 70, 140)]
    question = llm.tokenize(
        b"\nWhat may be done with the software?<|im_end|>\n<|im_start|>assistant\n", add_bos=False, special=True
    )
    question += tokens[210:250]  # more to compare
    order = [2, 0, 1, 2]
    whole = [*first, *(token for i in order for token in chunks[i])]

    stair = MesaConfig(train_length=256, first_chunk=16, chunk=64, last_chunk=64, room=32)
    for length, mesa in (("inside", MesaConfig()), ("stair", stair)):
        llm = open_llama(smollm2, mesa, kv=F16, flash=True)
        kept = keep(llm, first, chunks)
        llm.reset()
        llm.load_chunk(first, kept.first)
        for i in order:
            llm.load_chunk(chunks[i], kept.chunks[i])
        plan = llm.plan()
        assert (plan.stair_width > 1) == (length == "stair")
        logits = read(llm, question)
        at_once = [
            read(open_llama(smollm2, replace(mesa, plan=plan), kv=kv, flash=kv == F16), [*whole, *question])[
                len(whole) :
            ]
            for kv in (F16, F32)
        ]
        errors = rms(logits - at_once[1]), rms(at_once[0] - at_once[1])
        print(f"\n{length}: {errors[0]:.4f}, read at once {errors[1]:.4f}, scale {np.abs(logits).max():.0f}")
        assert errors[0] <= SHARE * errors[1]
        best = np.argmax(at_once[1][-1])
        assert kernels == "own" or np.argmax(logits[-1]) == best
        assert logits[-1].max() - logits[-1][best] <= 4 * errors[1]  # the best ones are that near to each other
