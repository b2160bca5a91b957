"""How many nodes Mesa adds to llama.cpp's graphs: llama_mesa_n_nodes_max must foresee them, or ggml aborts where a graph is full."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from conftest import F16, F32, Q8_0, ROOT, ModelPath, random_tokens
from make_models import Shape, write_llama
from mesa_gguf import METHODS, MesaConfig, _core

T = 128
N_LAYER = 2
HEADS_OF_64 = Shape(
    n_embd=128, n_head=2, n_head_kv=1, head_size=64, n_layer=N_LAYER
)  # a quantized cache is rotated there


class Tensor(ctypes.Structure):
    """The head of ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def graphs(
    path: Path,
    config: MesaConfig | None,
    *,
    kv: int = F16,
    flash: bool = False,
    prepare: Callable[[int], None] = lambda context: None,
) -> list[int]:
    """Nodes of each graph that reads tokens, while a text of several T is read in small ubatches and goes on."""
    counts: list[int] = []

    def count(address: int, ask: bool, _: object) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        first = (
            tensor.src[0] and ctypes.cast(tensor.src[0], ctypes.POINTER(Tensor)).contents.name == b"token_embd.weight"
        )
        if ask:
            if first and tensor.name != b"result_output":  # the graph begins: those that move keys are not counted
                counts.append(0)
            if counts:
                counts[-1] += 1
        return False

    callback = llama_cpp.ggml_backend_sched_eval_callback(count)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 512, 17, 1, 1
    params.type_k = params.type_v = kv
    params.flash_attn_type = int(flash)
    params.swa_full = True
    params.cb_eval = callback
    ctx = llama_cpp.llama_init_from_model(model, params)
    address = ctypes.cast(ctx, ctypes.c_void_p).value
    if config is not None:
        _core.enable(address, config.params(T))
        prepare(address or 0)
        _core.prompt(address, 350)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    n_past = 0
    for n in [350] + [1] * 40:
        batch.n_tokens = n
        for i, token in enumerate(random_tokens(n)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, n_past + i, 1, 0
            batch.logits[i] = True
        assert llama_cpp.llama_decode(ctx, batch) == 0
        n_past += n
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)
    return counts


def largest_graph(path: Path, config: MesaConfig | None, *, kv: int = F16, flash: bool = False) -> int:
    return max(graphs(path, config, kv=kv, flash=flash))


def per_layer() -> int:
    (number,) = re.findall(r"n_nodes_layer += (\d+);", (ROOT / "csrc" / "graph.cpp").read_text())
    return int(number)


CASES: list[Any] = [
    *(
        ("heads of 64", method, kv, flash)
        for method in METHODS
        for kv, flash in ((F16, False), (F16, True), (Q8_0, True), (F32, False))
    ),
    *(
        (kind, "mesa", kv, flash)
        for kind in ("gemma2", "mpt", "qwen2-yarn")
        for kv, flash in ((F16, False), (F16, True))
    ),
]


@pytest.mark.parametrize(("kind", "method", "kv", "flash"), CASES)
def test_the_nodes_that_are_added_are_foreseen(
    model_path: ModelPath, tmp_path: Path, kind: str, method: str, kv: int, flash: bool
) -> None:
    path = write_llama(tmp_path / "heads.gguf", HEADS_OF_64) if kind == "heads of 64" else model_path(kind)
    config = (
        MesaConfig(method=method, room=10)
        if method != "mesa"
        else MesaConfig(first_chunk=12, chunk=100, last_chunk=32, room=10)
    )
    added = largest_graph(path, config, kv=kv, flash=flash) - largest_graph(path, None, kv=kv, flash=flash)
    print(f"\n{added} nodes for {N_LAYER} layers")
    assert added > 0
    assert added <= per_layer() * N_LAYER
