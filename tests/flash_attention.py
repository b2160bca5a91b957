"""ggml's attention operation on the CPU through its C API, and what it should give, in NumPy."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from mesa_gguf import _llama_cpp

Floats = NDArray[np.float32]

TYPES = {
    name: int(gguf.GGMLQuantizationType[name.upper()])
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
}
F32, F16 = TYPES["f32"], TYPES["f16"]


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def library(name: str) -> Any:
    file = next(path for path in sorted(_llama_cpp.LIBRARY_DIR.iterdir()) if path.stem == f"lib{name}")
    return ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


@cache
def function(name: str, result: Any, *arguments: Any, of: str = "ggml-base") -> Any:
    found = getattr(library(of), name)
    found.restype, found.argtypes = result, list(arguments)
    return found


POINTER, INT, LONG, FLOAT, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_size_t


def set_kernels(on: bool) -> None:
    """Whether the CPU backend of this process uses this project's kernels."""
    registry = function("ggml_backend_reg_by_name", POINTER, ctypes.c_char_p, of="ggml")(b"CPU")
    address = function("ggml_backend_reg_get_proc_address", POINTER, POINTER, ctypes.c_char_p)(
        registry, b"ggml_backend_cpu_set_mesa_kernels"
    )
    assert address
    ctypes.CFUNCTYPE(None, ctypes.c_bool)(address)(on)


@dataclass
class Case:
    """What is attended to.

    Attributes:
        q: [n_batch, n_head, n_q, n_k].
        k: [n_batch, n_head_kv, n_kv, n_k], and v, as a cache of their type keeps them.
        mask: [1 or n_batch, 1 or n_head, n_q, n_kv], in f16.
        sinks: [n_head].
        poison: keys that nobody sees are no numbers.
    """

    q: Floats
    k: Floats
    v: Floats
    mask: NDArray[np.float16] | None = None
    sinks: Floats | None = None
    type_k: int = F16
    type_v: int = F16
    scale: float = 0.125
    max_bias: float = 0.0
    softcap: float = 0.0
    poison: bool = False


def quantize(rows: Floats, kind: int) -> bytes:
    """Rows as ggml keeps them."""
    rows = np.ascontiguousarray(rows, np.float32)
    n = rows.shape[-1]
    out = ctypes.create_string_buffer(function("ggml_row_size", SIZE, INT, LONG)(kind, n) * (rows.size // n))
    chunk = function("ggml_quantize_chunk", SIZE, INT, POINTER, POINTER, LONG, LONG, LONG, POINTER)
    chunk(kind, rows.ctypes.data, out, 0, rows.size // n, n, None)
    return out.raw


def kept(rows: Floats, kind: int) -> NDArray[np.float64]:
    """Rows as they come back from a cache of this type, by the gguf package's own code."""
    data = np.frombuffer(quantize(rows, kind), np.uint8).reshape(
        -1, rows.shape[-2], len(quantize(rows[:1, :1, :1], kind))
    )
    return gguf.dequantize(data, gguf.GGMLQuantizationType(kind)).astype(np.float64).reshape(rows.shape)


def expected(case: Case) -> NDArray[np.float64]:
    """[n_batch, n_q, n_head, n_v], in double precision."""
    n_head, n_group = case.q.shape[1], case.q.shape[1] // case.k.shape[1]
    k = np.repeat(kept(case.k, case.type_k), n_group, axis=1)
    v = np.repeat(kept(case.v, case.type_v), n_group, axis=1)
    logits = np.einsum("bhqd,bhkd->bhqk", case.q.astype(np.float64), k) * case.scale
    if case.softcap:
        logits = case.softcap * np.tanh(logits / case.softcap)
    if case.mask is not None:
        power = 2 ** math.floor(math.log2(n_head))
        heads = np.arange(n_head)
        slopes = np.where(
            heads < power,
            2.0 ** (-case.max_bias / power * (heads + 1)),
            2.0 ** (-case.max_bias / 2 / power * (2 * (heads - power) + 1)),
        )
        logits = logits + case.mask.astype(np.float64) * (slopes[:, None, None] if case.max_bias else 1.0)
    sinks = np.full(n_head, -np.inf) if case.sinks is None else case.sinks.astype(np.float64)
    largest = np.maximum(logits.max(axis=-1), sinks[:, None])
    weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0)[..., None])
    total = weights.sum(axis=-1) + np.exp(sinks[:, None] - np.where(np.isfinite(largest), largest, 0))
    out = np.einsum("bhqk,bhkd->bhqd", weights, v) / np.where(total > 0, total, 1)[..., None]
    return np.asarray(out.transpose(0, 2, 1, 3))


def cache_of(context: int, rows: Floats, kind: int, unseen: NDArray[np.bool_] | None) -> int:
    """A tensor [n, n_kv, n_head_kv, n_batch] over rows that lie as a KV cache has them: all heads of a key beside each other."""
    n_batch, n_head_kv, n_kv, n = rows.shape
    tensor = function("ggml_new_tensor_4d", POINTER, POINTER, INT, LONG, LONG, LONG, LONG)(
        context, kind, n, n_head_kv, n_kv, n_batch
    )
    data = bytearray(quantize(rows.transpose(0, 2, 1, 3), kind))
    if unseen is not None:  # 0xff everywhere is no number in a float, and in the scale of a block
        flat = np.frombuffer(data, np.uint8).reshape(n_batch, n_kv, -1)
        flat[np.broadcast_to(unseen, (n_batch, n_kv))] = 0xFF
    fill(tensor, bytes(data))
    return int(function("ggml_permute", POINTER, POINTER, POINTER, INT, INT, INT, INT)(context, tensor, 0, 2, 1, 3))


def fill(tensor: int, data: bytes) -> None:
    ctypes.memmove(function("ggml_get_data", POINTER, POINTER)(tensor), data, len(data))


def attend(case: Case, n_threads: int = 1) -> Floats:
    """What ggml-cpu gives: [n_batch, n_q, n_head, n_v]."""
    size = 2**22 + 4 * (case.q.nbytes + 3 * case.k.nbytes + 3 * case.v.nbytes)
    if case.mask is not None:
        size += 4 * case.mask.nbytes
    context = function("ggml_init", POINTER, InitParams)(InitParams(size, None, False))
    try:
        unseen = None
        if case.poison:
            assert case.mask is not None
            unseen = np.isneginf(case.mask).all(axis=(1, 2))
        tensor = function("ggml_new_tensor_4d", POINTER, POINTER, INT, LONG, LONG, LONG, LONG)
        n_batch, n_head, n_q, n_k = case.q.shape
        q = tensor(context, F32, n_k, n_head, n_q, n_batch)
        fill(q, np.ascontiguousarray(case.q.transpose(0, 2, 1, 3)).tobytes())
        q = function("ggml_permute", POINTER, POINTER, POINTER, INT, INT, INT, INT)(context, q, 0, 2, 1, 3)
        k = cache_of(context, case.k, case.type_k, unseen)
        v = cache_of(context, case.v, case.type_v, unseen)
        mask = None
        if case.mask is not None:
            mask = tensor(context, F16, *reversed(case.mask.shape))
            fill(mask, np.ascontiguousarray(case.mask).tobytes())
        attention = function(
            "ggml_flash_attn_ext", POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, FLOAT, FLOAT, FLOAT
        )
        out = attention(context, q, k, v, mask, case.scale, case.max_bias, case.softcap)
        if case.sinks is not None:
            sinks = function("ggml_new_tensor_1d", POINTER, POINTER, INT, LONG)(context, F32, n_head)
            fill(sinks, np.asarray(case.sinks, np.float32).tobytes())
            function("ggml_flash_attn_ext_add_sinks", None, POINTER, POINTER)(out, sinks)
        graph = function("ggml_new_graph", POINTER, POINTER)(context)
        function("ggml_build_forward_expand", None, POINTER, POINTER)(graph, out)
        compute = function("ggml_graph_compute_with_ctx", INT, POINTER, POINTER, INT, of="ggml-cpu")
        assert compute(context, graph, n_threads) == 0
        shape = (n_batch, n_q, n_head, case.v.shape[-1])
        data = ctypes.string_at(function("ggml_get_data", POINTER, POINTER)(out), 4 * math.prod(shape))
        return np.frombuffer(data, np.float32).reshape(shape).copy()
    finally:
        function("ggml_free", None, POINTER)(context)


def key_products(keys: Floats, queries: Floats, kind: int, n_threads: int = 1) -> Floats:
    """A cache's keys [n_head_kv, n_kv, n] times queries [n_head_kv, n_group, n], as for what a token attends to: [n_head_kv, n_group, n_kv]."""
    n_head_kv, n_kv, n = keys.shape
    n_group = queries.shape[1]
    size = 2**22 + 8 * keys.nbytes + 4 * queries.nbytes + 8 * n_head_kv * n_group * n_kv
    context = function("ggml_init", POINTER, InitParams)(InitParams(size, None, False))
    try:
        k = cache_of(context, keys[None], kind, None)
        q = function("ggml_new_tensor_3d", POINTER, POINTER, INT, LONG, LONG, LONG)(context, F32, n, n_group, n_head_kv)
        fill(q, np.ascontiguousarray(queries, np.float32).tobytes())
        out = function("ggml_mul_mat", POINTER, POINTER, POINTER, POINTER)(context, k, q)
        graph = function("ggml_new_graph", POINTER, POINTER)(context)
        function("ggml_build_forward_expand", None, POINTER, POINTER)(graph, out)
        compute = function("ggml_graph_compute_with_ctx", INT, POINTER, POINTER, INT, of="ggml-cpu")
        assert compute(context, graph, n_threads) == 0
        data = ctypes.string_at(function("ggml_get_data", POINTER, POINTER)(out), 4 * n_head_kv * n_group * n_kv)
        return np.frombuffer(data, np.float32).reshape(n_head_kv, n_group, n_kv).copy()
    finally:
        function("ggml_free", None, POINTER)(context)
