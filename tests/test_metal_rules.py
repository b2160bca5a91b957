"""Metal on paper: every operation that the Mesa graphs add over stock ones, held against the rules of ggml's Metal backend.

No Metal device is needed. `ggml_metal_device_supports_op` is cut out of ggml-metal-device.m as it stands, compiled as C for a
device that has everything, and asked about the tensors of a run on the CPU. What the CPU does otherwise (keys that move in a
graph of their own, the cast before a GPU's flash attention) is built by hand in C below.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from cffi import FFI

from conftest import F16, F32, Q8_0, ROOT, random_tokens
from make_models import Shape, write_llama
from mesa_gguf import MesaConfig, _core
from mesa_gguf._llama_cpp import LIBRARY_DIR

PROGRAM = """
#include "ggml.h"
#include "ggml-metal-impl.h"
#include <stddef.h>

typedef struct ggml_metal_device {
    struct { bool has_simdgroup_mm; bool has_simdgroup_reduction; bool has_bfloat; size_t max_theadgroup_memory_size; } props;
} * ggml_metal_device_t;

// the stricter answers: no fast path opens a case that the general one does not have
static bool ggml_metal_op_mul_mat_use_fwht(const struct ggml_tensor * op, size_t n)  { (void) op; (void) n; return false; }
static bool ggml_metal_op_mul_mat_use_mm(const struct ggml_tensor * op, bool has)    { (void) op; (void) has; return false; }
static bool ggml_metal_op_mul_mat_id_use_mm(const struct ggml_tensor * op, bool has) { (void) op; (void) has; return false; }

@RULES@

bool supports(const struct ggml_tensor * op) {
    struct ggml_metal_device dev = { { true, true, true, 32768 } };
    return ggml_metal_device_supports_op(&dev, op);
}

// The nodes of move_keys (csrc/cache.cpp), and of the end of llama_mesa_build_attn (csrc/graph.cpp) where a GPU computes.
// n_rot: 0 without RoPE. Returns the first node that is not supported, or NULL.
const char * by_hand(enum ggml_type kv, int d_head, int n_head, int n_head_kv, int n_rot, int rope_type) {
    static char text[256];
    struct ggml_init_params params = { 1 << 20, NULL, true };
    struct ggml_context * ctx = ggml_init(params);
    struct ggml_cgraph * gf = ggml_new_graph(ctx);

    if (n_rot > 0) {
        struct ggml_tensor * storage = ggml_new_tensor_3d(ctx, kv, d_head*n_head_kv, 1024, 1);
        struct ggml_tensor * factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_rot/2);
        struct ggml_tensor * delta   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 300);
        struct ggml_tensor * k = ggml_view_3d(ctx, storage, d_head, n_head_kv, 300, ggml_row_size(kv, d_head), storage->nb[1], 77*storage->nb[1]);
        struct ggml_tensor * cur = ggml_cast(ctx, k, GGML_TYPE_F32);
        cur = ggml_rope_ext(ctx, cur, delta, factors, n_rot, rope_type, 512, 10000.0f, 1.0f, 1.0f, 0.9f, 32.0f, 1.0f);
        ggml_build_forward_expand(gf, ggml_cpy(ctx, cur, k));
    }
    {
        const int n = 240, n_kv = 512;
        struct ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_head, n_head,    n);
        struct ggml_tensor * k = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_head, n_head_kv, n_kv);
        struct ggml_tensor * v = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_head, n_head_kv, n_kv);
        struct ggml_tensor * m = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n);
        k = ggml_cast(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), GGML_TYPE_F16);
        v = ggml_cast(ctx, ggml_permute(ctx, v, 0, 2, 1, 3), GGML_TYPE_F16);
        ggml_build_forward_expand(gf, ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, v, m, 0.1f, 0.0f, 0.0f));
    }

    const char * res = NULL;
    for (int i = 0; i < ggml_graph_n_nodes(gf) && !res; ++i) {
        const struct ggml_tensor * t = ggml_graph_node(gf, i);
        if (!supports(t)) {
            snprintf(text, sizeof(text), "%s -> %s", ggml_op_desc(t), ggml_type_name(t->type));
            res = text;
        }
    }
    ggml_free(ctx);
    return res;
}
"""

TENSOR = """
struct ggml_tensor {
    int type;
    void * buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_tensor * src[10];
    struct ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    ...;
};
"""


def metal_source() -> Path:
    """ggml-metal-device.m of the llama.cpp that the library was built from, in its build tree."""
    for build in (ROOT / "build", LIBRARY_DIR.resolve().parent):
        found = sorted(build.glob("**/llama.cpp/ggml/src/ggml-metal/ggml-metal-device.m"))
        if found:
            return found[0]
    pytest.skip("no llama.cpp source in a build tree")


def function(source: str, start: str) -> str:
    """A function of the source, from its first line to the closing brace in the first column."""
    found = re.search(rf"^{re.escape(start)}.*?^}}\n", source, re.DOTALL | re.MULTILINE)
    assert found, f"ggml-metal-device.m has no {start!r} any more: read its rules anew"
    return found[0]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """supports() and by_hand(), compiled."""
    source, compiler = metal_source(), shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    text = source.read_text()
    parts = ["static bool ggml_metal_supports_mul_mat_op(", "bool ggml_metal_device_supports_op("]
    program = PROGRAM.replace("@RULES@", "\n".join(function(text, part) for part in parts))
    folder = tmp_path_factory.mktemp("metal")
    (folder / "rules.c").write_text("#include <stdio.h>\n" + program)
    ggml = source.parents[2]
    done = subprocess.run(
        [
            *(
                compiler,
                "-std=gnu11",
                "-shared",
                "-fPIC",
                "-Wno-everything" if "clang" in compiler else "-w",
                "rules.c",
            ),
            *("-o", "rules.so", f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", f"-I{source.parent}"),
            *(f"-L{LIBRARY_DIR}", "-lggml-base", f"-Wl,-rpath,{LIBRARY_DIR}"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "rules.so"))
    library.supports.argtypes, library.supports.restype = [ctypes.c_void_p], ctypes.c_bool
    library.by_hand.argtypes, library.by_hand.restype = [ctypes.c_int] * 6, ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def ggml() -> Any:
    ffi = FFI()
    ffi.cdef(TENSOR.replace("...;", "void * extra; char padding[8];"))
    ffi.cdef(
        "const char * ggml_op_name(int op); const char * ggml_type_name(int type); bool ggml_is_contiguous(void * tensor);"
    )
    name = next(name for name in ("libggml-base.so", "libggml-base.dylib") if (LIBRARY_DIR / name).exists())
    return ffi, ffi.dlopen(str(LIBRARY_DIR / name))


Operation = tuple[str, ...]
"""Name, type of the result, and type, layout and head size of the sources."""


class Recorder:
    """Runs a model and collects the operations of its graphs, each with the rules' answer."""

    def __init__(self, rules: ctypes.CDLL, ggml: Any) -> None:
        self.rules, (self.ffi, self.lib) = rules, ggml
        self.operations: dict[Operation, bool] = {}

    def _text(self, value: Any) -> str:
        return self.ffi.string(value).decode()

    def _describe(self, tensor: Any) -> str:
        contiguous = "" if self.lib.ggml_is_contiguous(tensor) else " strided"
        return f"{self._text(self.lib.ggml_type_name(tensor.type))}{contiguous}"

    def __call__(self, address: int, ask: bool, _: object) -> bool:
        tensor = self.ffi.cast("struct ggml_tensor *", address)
        sources = [source for source in tensor.src if source]
        name = self._text(self.lib.ggml_op_name(tensor.op))
        size = [f"heads of {tensor.src[0].ne[0]}"] if name == "FLASH_ATTN_EXT" else []
        operation = (name, self._describe(tensor), *map(self._describe, sources), *size)
        self.operations[operation] = self.rules.supports(address)
        return False  # no need to stop and look at data

    def run(self, path: Path, *, kv: int, flash: bool, mesa: bool) -> dict[Operation, bool]:
        """A prompt of several T, then generation through moves of the anchor."""
        callback = llama_cpp.ggml_backend_sched_eval_callback(self)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 512, 64, 1, 1
        params.type_k = params.type_v = kv
        params.flash_attn_type = int(flash)
        params.cb_eval = callback
        ctx = llama_cpp.llama_init_from_model(model, params)
        address = ctypes.cast(ctx, ctypes.c_void_p).value
        if mesa:
            _core.enable(address, MesaConfig(first_chunk=12, chunk=100, last_chunk=32, room=10).params(128))
            _core.prompt(address, 350)
        batch = llama_cpp.llama_batch_init(512, 0, 1)
        moves, n_past = 0, 0
        for n in [350] + [1] * 60:
            batch.n_tokens = n
            for i, token in enumerate(random_tokens(n)):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, n_past + i, 1, 0
                batch.logits[i] = i == n - 1
            plan = _core.plan(address) if mesa else None
            assert llama_cpp.llama_decode(ctx, batch) == 0
            moves += mesa and _core.plan(address) != plan
            n_past += n
        assert moves >= 2 or not mesa
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)
        return self.operations


@pytest.fixture(scope="module", params=[64, 128])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads of a size that real ones have, GQA, f16 weights as a GPU would run."""
    shape = Shape(n_embd=128, n_head=2, n_head_kv=1, head_size=request.param)
    return write_llama(tmp_path_factory.mktemp("metal") / f"heads{request.param}.gguf", shape)


CACHES = [(F16, False), (F32, False), (F16, True), (Q8_0, True), (F32, True)]

# What csrc/graph.cpp builds, as ggml names it. Any other operation here is news, and its kernels are to be looked at.
EXPECTED = {
    *("GET_ROWS", "ROPE", "CONCAT", "CPY", "CONT", "MUL", "SET_ROWS", "FLASH_ATTN_EXT", "MUL_MAT", "SOFT_MAX", "ADD"),
    *("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"),
}


@pytest.fixture(params=CACHES, ids=lambda case: f"kv{case[0]}-{'flash' if case[1] else 'plain'}")
def added(request: pytest.FixtureRequest, rules: ctypes.CDLL, ggml: Any, model: Path) -> dict[Operation, bool]:
    """Operations of Mesa's graphs that stock graphs do not have, with the rules' answer."""
    kv, flash = request.param
    stock = Recorder(rules, ggml).run(model, kv=kv, flash=flash, mesa=False)
    woven = Recorder(rules, ggml).run(model, kv=kv, flash=flash, mesa=True)
    assert {name for name, *_ in stock} >= {"MUL_MAT", "ROPE", "SET_ROWS"}
    return {operation: supported for operation, supported in woven.items() if operation not in stock}


def test_metal_supports_what_mesa_adds(added: dict[Operation, bool]) -> None:
    print("", *(f"{', '.join(operation)}: {supported}" for operation, supported in sorted(added.items())), sep="\n")
    assert {name for name, *_ in added} >= {"CONCAT", "CPY"}
    assert [operation for operation, supported in added.items() if not supported] == []


def test_only_stock_operations_are_added(added: dict[Operation, bool]) -> None:
    assert {name for name, *_ in added} <= EXPECTED


HEADS = [(64, 9, 3), (128, 32, 8), (80, 32, 32), (96, 32, 32), (256, 8, 4)]
KV_TYPES = {"f32": F32, "f16": F16, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": Q8_0}
# heads of 80 do not fill blocks of 32
BY_HAND = [
    (KV_TYPES[kv], *heads) for kv, heads in product(KV_TYPES, HEADS) if heads[0] % 32 == 0 or kv.endswith(("16", "32"))
]


@pytest.mark.parametrize(("kv", "d_head", "n_head", "n_head_kv"), BY_HAND)
@pytest.mark.parametrize("rope_type", [0, 2])
def test_metal_supports_moves_of_keys_and_a_gpus_window(
    rules: ctypes.CDLL, kv: int, d_head: int, n_head: int, n_head_kv: int, rope_type: int
) -> None:
    """For every KV type that flash attention takes, heads as in SmolLM, Llama, Phi, Gemma; RoPE in NORM and NEOX order."""
    unsupported = rules.by_hand(kv, d_head, n_head, n_head_kv, d_head, rope_type)
    assert unsupported is None, unsupported


def test_the_rules_can_say_no(rules: ctypes.CDLL) -> None:
    """Heads of 16 are not in the list of flash attention's kernels: such models stay on the CPU."""
    assert b"FLASH_ATTN_EXT" in rules.by_hand(F16, 16, 4, 4, 16, 0)
