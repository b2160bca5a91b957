"""The CPU's attention kernel against NumPy: shapes, types of the cache, masks, ALiBi, caps, sinks, threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import worst
from flash_attention import INT, TYPES, Case, attend, expected, function, kept, key_products, set_kernels

EXACT = 2e-5  # of values of about 1, in single precision, where logits reach 15


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    set_kernels(True)
    yield
    set_kernels(True)


def case_of(
    rng: np.random.Generator,
    heads: int,
    group: int,
    n_q: int,
    n_kv: int,
    n_k: int,
    n_v: int | None = None,
    batches: int = 1,
) -> Case:
    """Random, and everything is seen. Logits spread far enough for some keys to stand out."""
    shape = (batches, heads, n_kv)
    return Case(
        q=rng.normal(0, 3, (batches, heads * group, n_q, n_k)).astype(np.float32),
        k=rng.normal(0, 1, (*shape, n_k)).astype(np.float32),
        v=rng.normal(0, 1, (*shape, n_v or n_k)).astype(np.float32),
        scale=n_k**-0.5,
    )


def causal(n_q: int, n_kv: int) -> NDArray[np.float16]:
    """The queries are the last keys."""
    return np.where(np.arange(n_kv) <= n_kv - n_q + np.arange(n_q)[:, None], 0, -np.inf).astype(np.float16)[None, None]


def windows(rng: np.random.Generator, n_q: int, n_kv: int) -> NDArray[np.float16]:
    """As Mesa's are: runs of keys that are seen, some lowered by a bias, and none elsewhere."""
    mask = np.full((1, 1, n_q, n_kv), -np.inf, np.float16)
    for _ in range(3):
        start = int(rng.integers(0, n_kv))
        mask[..., start : start + int(rng.integers(1, 200))] = -rng.integers(0, 3) / 2
    mask[..., -n_q:] = causal(n_q, n_kv)[..., -n_q:]
    return mask


SHAPES = {
    "smollm2": (3, 3, 64),
    "qwen2.5-0.5b": (2, 7, 64),
    "llama-3.2-1b": (8, 4, 64),
    "no groups": (2, 1, 80),
    "one key head": (1, 20, 32),
    "gemma": (1, 4, 256),
}


@pytest.mark.parametrize("n_q", [1, 2, 5, 16, 40, 130])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, n_q: int) -> None:
    heads, group, size = SHAPES[shape]
    rng = np.random.default_rng(0)
    case = case_of(rng, heads, group, n_q, 700, size)
    case.mask = causal(n_q, 700)
    assert worst(attend(case, 2), expected(case)) < EXACT


@pytest.mark.parametrize("n_q", [1, 33])
@pytest.mark.parametrize("type_v", TYPES)
@pytest.mark.parametrize("type_k", TYPES)
def test_types(type_k: str, type_v: str, n_q: int) -> None:
    """What the cache keeps is read as it is kept, and the query is not rounded."""
    rng = np.random.default_rng(0)
    case = case_of(rng, 2, 3, n_q, 300, 64)
    case.type_k, case.type_v, case.mask = TYPES[type_k], TYPES[type_v], windows(rng, n_q, 300)
    assert worst(attend(case, 2), expected(case)) < EXACT


@given(
    seed=st.integers(0, 2**32),
    heads=st.integers(1, 3),
    group=st.integers(1, 9),
    n_q=st.one_of(st.integers(1, 8), st.integers(9, 100)),
    n_kv=st.integers(1, 1500),
    n_k=st.sampled_from([32, 64, 96]),
    n_v=st.sampled_from([32, 64, 96]),
    batches=st.integers(1, 2),
    kinds=st.tuples(st.sampled_from(list(TYPES)), st.sampled_from(list(TYPES))),
    masked=st.sampled_from(["nothing", "causal", "windows", "heads", "batches", "scattered", "everything"]),
    max_bias=st.sampled_from([0.0, 8.0]),
    softcap=st.sampled_from([0.0, 20.0]),
    sinks=st.booleans(),
    n_threads=st.integers(1, 4),
)
def test_everything(
    seed: int,
    heads: int,
    group: int,
    n_q: int,
    n_kv: int,
    n_k: int,
    n_v: int,
    batches: int,
    kinds: tuple[str, str],
    masked: str,
    max_bias: float,
    softcap: float,
    sinks: bool,
    n_threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    case = case_of(rng, heads, group, n_q, max(n_kv, n_q), n_k, n_v, batches)
    n_kv = case.k.shape[2]
    case.type_k, case.type_v, case.softcap = TYPES[kinds[0]], TYPES[kinds[1]], softcap
    if masked == "causal":
        case.mask = causal(n_q, n_kv)
    elif masked == "windows":
        case.mask = windows(rng, n_q, n_kv)
    elif masked == "heads":
        case.mask = np.concatenate([windows(rng, n_q, n_kv) for _ in range(heads * group)], axis=1)
    elif masked == "batches":
        case.mask = np.concatenate([windows(rng, n_q, n_kv) for _ in range(batches)], axis=0)
    elif masked == "scattered":
        seen = rng.random((1, 1, n_q, n_kv)) < 0.05
        case.mask = np.where(seen, rng.normal(0, 1, seen.shape), -np.inf).astype(np.float16)
    elif masked == "everything":
        case.mask = np.full((1, 1, n_q, n_kv), -np.inf, np.float16)
    if case.mask is not None:
        case.max_bias, case.poison = max_bias, True
    if sinks:
        case.sinks = rng.normal(0, 3, heads * group).astype(np.float32)
    assert worst(attend(case, n_threads), expected(case)) < 2 * EXACT


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_number_of_threads_changes_nothing(kind: str) -> None:
    """Of a generated token: the keys are cut alike."""
    case = case_of(np.random.default_rng(0), 3, 3, 1, 5000, 64)
    case.type_k = case.type_v = TYPES[kind]
    alone = attend(case, 1)
    for n_threads in (2, 3, 4):
        assert np.array_equal(attend(case, n_threads), alone)


@pytest.mark.parametrize("n_q", [1, 40])
def test_logits_far_apart(n_q: int) -> None:
    """One key outweighs all; what is left of the others is no denormal, and no NaN."""
    case = case_of(np.random.default_rng(0), 2, 3, n_q, 1000, 64)
    case.q *= 100
    assert worst(attend(case, 2), expected(case)) < 1e-4
    assert np.isfinite(attend(case, 2)).all()


def test_stock_kernels_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """They round otherwise: the values of f16 are summed in f16 there."""
    case = case_of(np.random.default_rng(0), 3, 3, 1, 2000, 64)
    ours = attend(case)
    set_kernels(False)
    stock = attend(case)
    assert 0 < worst(stock, ours) < 1e-2
    assert worst(stock, expected(case)) > worst(ours, expected(case))


def test_what_the_kernel_cannot_do_is_left_to_ggml() -> None:
    """Heads that no vector divides."""
    case = case_of(np.random.default_rng(0), 2, 2, 3, 100, 40)
    ours = attend(case)
    set_kernels(False)
    assert worst(ours, expected(case)) < 1e-2
    assert worst(ours, attend(case)) < 1e-2


@given(
    kind=st.sampled_from(("f32", "f16", "bf16", "q8_0", "q4_0")),
    heads=st.integers(2, 5),
    group=st.integers(1, 9),
    n_kv=st.integers(1, 300),
    size=st.sampled_from((32, 64, 80, 96, 128)),
    threads=st.integers(1, 3),
)
def test_keys_times_queries(kind: str, heads: int, group: int, n_kv: int, size: int, threads: int) -> None:
    """What a token attends to begins with these products; nothing is written beside them."""
    size = size // 32 * 32 if kind[0] == "q" else size
    rng = np.random.default_rng(n_kv)
    keys = rng.normal(size=(heads, n_kv, size)).astype(np.float32)
    queries = rng.normal(size=(heads, group, size)).astype(np.float32)
    right = np.einsum("hkd,hgd->hgk", kept(keys[None], TYPES[kind])[0], queries.astype(np.float64))
    given = key_products(keys, queries, TYPES[kind], threads)
    is_ours = group <= 8 and kind != "q4_0" and size % 16 == 0
    assert worst(given, right) < (EXACT if is_ours and has_vectors() else 0.2 if kind[0] == "q" else 0.05) * size**0.5


def has_vectors() -> bool:
    return any(function(f"ggml_cpu_has_{name}", INT, of="ggml-cpu")() for name in ("avx2", "neon"))
