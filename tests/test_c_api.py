"""llama-mesa.h from C's side: cffi opens the library and drives a model with it, without any of our Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from cffi import FFI
from numpy.typing import NDArray

import mesa_gguf
from conftest import F32, ROOT, ModelPath, Opener, Stock, random_tokens, read
from mesa_gguf import METHODS, ConfigError, MesaConfig
from mesa_gguf._llama_cpp import LIBRARY_DIR

N_VOCAB = 128

# What of llama.h the tests use. Structs that pass by value are laid out by llama_cpp's own mirror of them (below).
LLAMA_H = """
struct llama_model; struct llama_context; struct llama_memory_i;
typedef struct llama_memory_i * llama_memory_t;
typedef int32_t llama_token; typedef int32_t llama_pos; typedef int32_t llama_seq_id;
typedef struct llama_batch {
    int32_t n_tokens;
    llama_token * token; float * embd; llama_pos * pos; int32_t * n_seq_id; llama_seq_id ** seq_id; int8_t * logits;
} llama_batch;
int32_t llama_decode(struct llama_context * ctx, struct llama_batch batch);
float * llama_get_logits_ith(struct llama_context * ctx, int32_t i);
void llama_set_causal_attn(struct llama_context * ctx, bool causal_attn);
llama_memory_t llama_get_memory(const struct llama_context * ctx);
void llama_memory_clear(llama_memory_t mem, bool data);
bool llama_memory_seq_rm(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
void llama_memory_seq_cp(llama_memory_t mem, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
void llama_memory_seq_add(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos delta);
void llama_memory_seq_div(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d);
llama_pos llama_memory_seq_pos_max(llama_memory_t mem, llama_seq_id seq_id);
bool llama_memory_can_shift(llama_memory_t mem);
"""


def header() -> Path:
    """llama-mesa.h, installed or in the source tree."""
    installed = Path(mesa_gguf.__file__).parent / "include" / "llama-mesa.h"
    return installed if installed.exists() else ROOT / "csrc" / "llama-mesa.h"


def declarations() -> str:
    """The header without what cffi's parser does not read: preprocessor lines, comments, extern "C", LLAMA_API."""
    text = re.sub(r"//[^\n]*|^#[^\n]*|LLAMA_API", "", header().read_text(), flags=re.MULTILINE)
    return text.replace('extern "C" {', "").replace("\n}\n", "\n")


@pytest.fixture(scope="module")
def ffi() -> FFI:
    ffi = FFI()
    ffi.cdef(LLAMA_H + declarations())
    return ffi


@pytest.fixture(scope="module")
def lib(ffi: FFI) -> Any:
    (path,) = (LIBRARY_DIR / name for name in ("libllama.so", "libllama.dylib") if (LIBRARY_DIR / name).exists())
    return ffi.dlopen(str(path))


class Context:
    """A model and a context, by llama_cpp's ctypes functions; everything else in the tests goes through cffi."""

    def __init__(self, ffi: FFI, lib: Any, path: Path, n_ctx: int = 512, n_seq_max: int = 1) -> None:
        self.ffi, self.lib = ffi, lib
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self._model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, 512, 512, n_seq_max
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._ctx = llama_cpp.llama_init_from_model(self._model, params)
        assert self._ctx
        self.model = self._cast("struct llama_model *", self._model)
        self.ctx = self._cast("struct llama_context *", self._ctx)
        self.memory = lib.llama_get_memory(self.ctx)

    def _cast(self, kind: str, pointer: Any) -> Any:
        import ctypes

        return self.ffi.cast(kind, ctypes.cast(pointer, ctypes.c_void_p).value)

    def close(self) -> None:
        llama_cpp.llama_free(self._ctx)
        llama_cpp.llama_model_free(self._model)

    def params(self, **changes: int) -> Any:
        """Those of conftest.SMALL, changed."""
        values = dict(
            train_length=128, first_chunk=12, chunk=40, last_chunk=32, stair_width=0, room=16, log_scaling=True
        )
        values["reading_length"] = changes.get("train_length", 128)
        return self.ffi.new("struct llama_mesa_params *", values | changes)

    def enable(self, **changes: int) -> int:
        return self.lib.llama_mesa_enable(self.ctx, self.params(**changes))

    def decode(self, tokens: list[int], start: int, seq_id: int = 0) -> int:
        """llama_decode of tokens at positions start, start + 1, ...; logits of all."""
        n, new = len(tokens), self.ffi.new
        seq_ids = new("llama_seq_id[1]", [seq_id])
        keep = [
            new("llama_token[]", tokens),
            new("llama_pos[]", list(range(start, start + n))),
            new("int32_t[]", [1] * n),
            new("llama_seq_id *[]", [seq_ids] * n),
            new("int8_t[]", [1] * n),
        ]
        batch = new(
            "llama_batch *", dict(zip(["token", "pos", "n_seq_id", "seq_id", "logits"], keep)) | {"n_tokens": n}
        )
        return self.lib.llama_decode(self.ctx, batch[0])

    def logits(self, n: int) -> NDArray[np.float32]:
        rows = [self.ffi.buffer(self.lib.llama_get_logits_ith(self.ctx, i), 4 * N_VOCAB) for i in range(n)]
        return np.stack([np.frombuffer(bytes(row), np.float32) for row in rows])

    def read(self, text: list[int], n_past: int, breaks: Any = None, n_max: int = 512) -> NDArray[np.float32]:
        """As the header says it: announce what follows the first n_past tokens, read what is not kept -> its logits."""
        assert self.lib.llama_memory_seq_rm(self.memory, 0, n_past, -1)
        n = self.lib.llama_mesa_prompt(self.ctx, len(text) - n_past, breaks or self.ffi.NULL)
        assert 0 <= n <= n_past, self.error()
        logits = []
        while n < len(text):
            size = self.lib.llama_mesa_n_batch(self.ctx, len(text) - n, n_max)
            assert 1 <= size <= n_max, self.error()
            assert self.decode(text[n : n + size], n) == 0
            logits.append(self.logits(size))
            n += size
        return np.concatenate(logits)

    def plan(self) -> tuple[list[int], int, int]:
        n = self.lib.llama_mesa_get_plan(self.ctx, self.ffi.NULL, 0, self.ffi.NULL, self.ffi.NULL)
        assert n >= 1, self.error()
        starts, anchor, width = self.ffi.new("int32_t[]", n), self.ffi.new("int32_t *"), self.ffi.new("int32_t *")
        assert self.lib.llama_mesa_get_plan(self.ctx, starts, n, anchor, width) == n
        return list(starts), anchor[0], width[0]

    def error(self) -> str:
        return self.ffi.string(self.lib.llama_mesa_last_error()).decode()


@pytest.fixture
def context(ffi: FFI, lib: Any, model_path: ModelPath) -> Iterator[Context]:
    context = Context(ffi, lib, model_path("llama"))
    yield context
    context.close()


LONG, REST = random_tokens(350, seed=1), random_tokens(40, seed=2)


# The header.


@pytest.mark.parametrize("standard", ["c11", "c17"])  # llama.h itself is not C99
def test_the_header_is_c(tmp_path: Path, standard: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc)")
    folders = [header().parent]
    if not (folders[0] / "llama.h").exists():
        for source in [ROOT / "build", LIBRARY_DIR.resolve().parent]:
            found = next(iter(sorted(source.glob("**/llama.cpp/include/llama.h"))), None)
            if found:
                folders += [found.parent, found.parent.parent / "ggml" / "include"]
                break
        else:
            pytest.skip("llama.h is neither installed nor in a build tree")
    source = tmp_path / "use.c"
    source.write_text(
        '#include "llama-mesa.h"\nint32_t use(void) { return llama_mesa_version() + LLAMA_MESA_VERSION; }\n'
    )
    arguments = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    include = [f"-I{folders[0]}", *(f"-isystem{folder}" for folder in folders[1:])]
    done = subprocess.run([compiler, *arguments, *include, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_function_of_the_header_is_exported(lib: Any) -> None:
    names = re.findall(r"\b(llama_mesa_\w+)\s*\(", declarations())
    assert len(names) >= 11
    for name in names:
        assert getattr(lib, name)


def test_version(lib: Any) -> None:
    assert lib.llama_mesa_version() == int(re.search(r"LLAMA_MESA_VERSION (\d+)", header().read_text())[1])


# Reading.


def test_prompt_and_generation_equal_mesa_llama(context: Context, model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    expected = np.concatenate([read(llm, LONG), *(read(llm, [token]) for token in REST)])

    assert context.enable() == 0
    assert context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL) == 0
    assert context.decode(LONG, 0) == 0
    logits = [context.logits(len(LONG))]
    for i, token in enumerate(REST):
        assert context.decode([token], len(LONG) + i) == 0
        logits.append(context.logits(1))
    assert np.abs(np.concatenate(logits) - expected).max() <= 1e-4
    plan = llm.plan()
    assert context.plan() == (plan.chunk_starts, plan.anchor, plan.stair_width)


@pytest.mark.parametrize("n_max", [512, 70])
def test_a_chat_equals_mesa_llama_bit_for_bit(
    ffi: FFI, lib: Any, model_path: ModelPath, open_llama: Opener, n_max: int
) -> None:
    """Texts that are planned, fit, fit again after a roll-back, and are cut into batches: each decision is the library's."""
    config = MesaConfig(chunk=40, last_chunk=32)
    llm = open_llama(model_path("llama"), config, n_ctx=1024, n_batch=n_max)
    context = Context(ffi, lib, model_path("llama"), n_ctx=1024)
    params = ffi.new("struct llama_mesa_params *", lib.llama_mesa_unset_params())
    params.chunk, params.last_chunk = 40, 32
    assert lib.llama_mesa_fill_params(context.model, params) == 0
    assert lib.llama_mesa_enable(context.ctx, params) == 0, context.error()

    # the model has no vocabulary: some of its tokens end a line, some a sentence
    by_token = np.resize(np.array([2, 0, 0, 1, 0, 0, 0, 0, 0], np.uint8), N_VOCAB)
    llm.__dict__["_has_vocabulary"], llm.__dict__["_token_breaks"] = True, by_token

    random = np.random.default_rng(3)
    text: list[int] = []
    kept = set()
    for n_past, n_more in (
        [
            (0, 50),
            (50, 70),
            (120, 1),
            (121, 20),
            (141, 1),
            (100, 20),
            (120, 300),
            (400, 60),
            (460, 1),
            (90, 30),
            (30, 90),
        ]
        + [(120 + i, 1) for i in range(40)]
        + [(130, 400), (500, 3), (15, 100), (0, 300), (90, 30), (0, 300), (20, 90), (0, 20)]
    ):
        text = text[:n_past] + random_tokens(n_more, seed=int(random.integers(10**6)))
        logits = context.read(text, n_past, ffi.from_buffer("uint8_t[]", by_token[text]), n_max)
        kept.add(len(logits) > n_more)
        llm.n_tokens = n_past
        llm.eval(text[n_past:])
        plan = llm.plan()
        assert context.plan() == (plan.chunk_starts, plan.anchor, plan.stair_width)
        assert np.array_equal(logits, llm.scores[len(text) - len(logits) : len(text)]), (n_past, n_more)
    assert kept == {True, False}
    context.close()


def test_filled_params_are_those_of_mesa_config(context: Context) -> None:
    fields = [
        "reading_length",
        "first_chunk",
        "chunk",
        "last_chunk",
        "stair_width",
        "room",
        "log_scaling",
        "window",
        "n_sinks",
        "stair_bias",
        "log_length",
        "read_budget",
        "read_every",
    ]
    for T in (16, 100, 128, 512, 2048, 131072):
        for number, method in enumerate(METHODS):
            for changes in (
                {},
                dict(first_chunk=9),
                dict(chunk=5),
                dict(last_chunk=4),
                dict(n_sinks=2),
                dict(room=1),
                dict(reading_length=T // 2),
                dict(log_scaling=0),
                dict(read_budget=64, read_every=3),
                dict(read_budget=7),
            ):
                params = context.ffi.new("struct llama_mesa_params *", context.lib.llama_mesa_unset_params())
                params.train_length, params.method = T, number
                for name, value in changes.items():
                    setattr(params, name, value)
                try:
                    expected = MesaConfig(
                        method=method, **changes | ({"log_scaling": False} if "log_scaling" in changes else {})
                    ).params(T)
                except ConfigError as err:
                    assert context.lib.llama_mesa_fill_params(context.ffi.NULL, params) < 0
                    assert context.error() == str(err)  # noqa: PT017
                    assert params.stair_bias == -1  # as it was
                    continue
                assert context.lib.llama_mesa_fill_params(context.ffi.NULL, params) == 0, context.error()
                # log_length 0 stands for R
                values = {name: getattr(params, name) for name in fields}
                values["log_length"] = values["log_length"] or params.reading_length
                assert values == {name: getattr(expected, name) for name in fields}, (T, method, changes)


def test_defaults_make_room_for_what_is_set(context: Context) -> None:
    params = context.ffi.new("struct llama_mesa_params *", context.lib.llama_mesa_unset_params())
    params.chunk = 120
    assert context.lib.llama_mesa_fill_params(context.model, params) == 0
    assert (params.train_length, params.first_chunk, params.chunk) == (128, 8, 120)
    params = context.ffi.new("struct llama_mesa_params *", context.lib.llama_mesa_unset_params())
    params.last_chunk = 90
    assert context.lib.llama_mesa_fill_params(context.model, params) == 0
    assert params.room == 128 - 90 - 32


def test_breaks_are_asked_for_where_a_text_is_cut(context: Context) -> None:
    lib, ctx = context.lib, context.ctx
    context.enable()
    assert [lib.llama_mesa_needs_breaks(ctx, n) for n in (1, 128, 129, 400)] == [0, 0, 1, 1]
    assert context.plan() == ([0], 0, 1)  # nothing was announced
    context.read(LONG, 0)
    assert [lib.llama_mesa_needs_breaks(ctx, n) for n in (1, 20, 160)] == [0, 0, 1]
    for n in (0, -1, 600):
        assert lib.llama_mesa_needs_breaks(ctx, n) < 0
        assert "tokens" in context.error()


def test_batches_end_at_borders(context: Context) -> None:
    lib, ctx = context.lib, context.ctx
    assert lib.llama_mesa_n_batch(ctx, 300, 100) == 100 and lib.llama_mesa_n_batch(ctx, 30, 100) == 30  # not enabled
    context.enable()
    assert lib.llama_mesa_prompt(ctx, len(LONG), context.ffi.NULL) == 0
    assert context.plan()[0][:4] == [0, 12, 52, 92]
    assert [lib.llama_mesa_n_batch(ctx, len(LONG), n) for n in (10, 12, 13, 52, 53, 100, 349, 350)] == [
        10,
        12,
        12,
        12,
        52,
        92,
        318,
        350,
    ]
    for n_tokens, n_max in ((0, 5), (5, 0), (-1, 5), (600, 5)):
        assert lib.llama_mesa_n_batch(ctx, n_tokens, n_max) < 0
        assert "tokens" in context.error()


def test_disabled_and_enabled(context: Context) -> None:
    lib, ctx = context.lib, context.ctx
    assert not lib.llama_mesa_enabled(ctx)
    assert context.enable() == 0
    assert lib.llama_mesa_enabled(ctx)
    assert context.decode(LONG[:100], 0) == 0
    lib.llama_mesa_disable(ctx)
    assert not lib.llama_mesa_enabled(ctx)
    assert lib.llama_memory_seq_pos_max(context.memory, 0) == -1
    lib.llama_mesa_disable(ctx)


def test_bit_identical_to_stock_when_disabled_again(context: Context, model_path: ModelPath, run_stock: Stock) -> None:
    context.enable()
    context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL)
    assert context.decode(LONG, 0) == 0
    context.lib.llama_mesa_disable(context.ctx)
    assert context.decode(LONG, 0) == 0
    stock, _ = run_stock(model_path("llama"), [LONG], type_k=F32, type_v=F32)
    assert np.array_equal(context.logits(len(LONG)), stock)


def test_enable_after_a_text_that_was_read_plainly(context: Context) -> None:
    assert context.decode(LONG[:100], 0) == 0
    assert context.enable() == 0
    assert context.plan() == ([0], 0, 1)
    n = context.lib.llama_mesa_get_key_pos(context.ctx, context.ffi.NULL, 0)
    assert n == 100


def test_roll_back(context: Context) -> None:
    context.enable()
    context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL)
    assert context.decode(LONG, 0) == 0
    first = context.logits(len(LONG))
    for i, token in enumerate(REST):
        assert context.decode([token], len(LONG) + i) == 0
    plan = context.plan()
    assert context.lib.llama_memory_seq_rm(context.memory, 0, 345, -1)
    assert context.plan() != plan
    assert context.decode(LONG[345:], 345) == 0
    assert np.abs(context.logits(5) - first[345:]).max() <= 1e-4


def test_key_positions(context: Context) -> None:
    context.enable()
    context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL)
    context.decode(LONG, 0)
    buffer = context.ffi.new("int32_t[]", [-7] * 400)
    assert context.lib.llama_mesa_get_key_pos(context.ctx, buffer, 300) == len(LONG)
    keys = list(buffer)
    assert keys[300:] == [-7] * 100  # not more than asked
    starts, anchor, width = context.plan()
    assert keys[:300] == mesa_gguf.MesaPlan(starts, anchor, width).key_positions(300).tolist()


def test_plan_by_hand(context: Context) -> None:
    context.enable()
    starts = context.ffi.new("int32_t[]", [0, 12, 52, 92])
    assert context.lib.llama_mesa_set_plan(context.ctx, starts, 4, 90, 3, 110) == 0
    assert context.plan() == ([0, 12, 52, 92], 90, 3)
    assert context.decode(LONG[:110], 0) == 0


def test_a_plan_by_hand_holds_until_it_is_read(context: Context) -> None:
    context.enable()
    starts = context.ffi.new("int32_t[]", [0, 12, 52, 92, 292])
    assert context.lib.llama_mesa_set_plan(context.ctx, starts, 4, 90, 1, 200) == 1
    assert "needs 200 positions, more than the 128" in context.error()
    starts[3] = 200
    assert context.lib.llama_mesa_set_plan(context.ctx, starts, 3, 50, 3, 60) == 0
    assert context.decode(LONG[:20], 0) == 0
    assert context.lib.llama_mesa_prompt(context.ctx, 200, context.ffi.NULL) == 20
    assert context.plan() == ([0, 12, 52], 50, 3)
    assert context.lib.llama_mesa_needs_breaks(context.ctx, 200) == 0
    assert context.decode(LONG[20:60], 20) == 0
    assert context.lib.llama_mesa_prompt(context.ctx, 200, context.ffi.NULL) == 60
    assert context.plan()[0][:3] == [0, 12, 52] and len(context.plan()[0]) > 4


def test_make_plan_without_a_context(context: Context) -> None:
    ffi, lib = context.ffi, context.lib
    starts, anchor, width = ffi.new("int32_t[]", [-7] * 64), ffi.new("int32_t *"), ffi.new("int32_t *")
    n = lib.llama_mesa_make_plan(context.params(), 350, ffi.NULL, starts, 3, anchor, width)
    assert n > 3
    assert list(starts)[3:] == [-7] * 61
    assert lib.llama_mesa_make_plan(context.params(), 350, ffi.NULL, starts, 64, anchor, width) == n
    expected = mesa_gguf.MesaConfig(128 > 0, 128, 12, 40, 32, room=16).make_plan(350, 128)
    assert (list(starts)[:n], anchor[0], width[0]) == (expected.chunk_starts, expected.anchor, expected.stair_width)


def test_default_params(context: Context) -> None:
    params = context.lib.llama_mesa_default_params(context.model, 0)
    assert params.train_length == 128
    assert params.first_chunk >= 1 and params.first_chunk + params.chunk <= 128 and params.log_scaling
    assert context.lib.llama_mesa_default_params(context.model, 4096).train_length == 4096


# What fails says why, and changes nothing.


BAD_PARAMS = [
    (dict(train_length=0), "train_length is 0"),
    (dict(train_length=-5), "train_length is -5"),
    (dict(reading_length=0), "reading_length is 0"),
    (dict(reading_length=129), r"reading_length is 129: it must lie between 8 and train_length \(128\)"),
    (dict(reading_length=-(2**31)), "reading_length is -2147483648"),
    (dict(first_chunk=0), "first_chunk is 0"),
    (dict(chunk=0), "chunk is 0"),
    (dict(chunk=117), r"first_chunk \+ chunk is 129"),
    (dict(chunk=2**31 - 1), r"first_chunk \+ chunk is 2147483659"),
    (dict(last_chunk=0), "last_chunk is 0"),
    (dict(last_chunk=2**31 - 1), "leaves nothing"),
    (dict(stair_width=-1), "stair_width is -1"),
    (dict(room=-1), "room is -1"),
    (dict(log_length=1), "log_length is 1"),
    (dict(log_length=-5), "log_length is -5"),
    (dict(log_scaling=-1), "log_scaling is -1"),
    (dict(log_scaling=2), "log_scaling is 2"),
    (dict(read_budget=-1), "read_budget is -1"),
    (dict(read_budget=31), "read_budget is 31: it must be 32 tokens or more, or 0"),
    (dict(read_budget=64, method=3, window=64), "read_budget is for the method mesa"),
    (dict(read_every=-2), "read_every is -2"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_PARAMS)
def test_bad_params(context: Context, changes: dict[str, int], reason: str) -> None:
    assert context.enable(**changes) < 0
    assert re.search(reason, context.error())
    assert not context.lib.llama_mesa_enabled(context.ctx)
    ffi = context.ffi
    assert (
        context.lib.llama_mesa_make_plan(context.params(**changes), 500, ffi.NULL, ffi.NULL, 0, ffi.NULL, ffi.NULL) < 0
    )
    assert re.search(reason, context.error())


@pytest.mark.parametrize(("name", "reason"), [("mamba", "recurrent"), ("gpt2", "learned absolute")])
def test_unsupported_models(ffi: FFI, lib: Any, model_path: ModelPath, name: str, reason: str) -> None:
    context = Context(ffi, lib, model_path(name))
    assert reason in ffi.string(lib.llama_mesa_unsupported(context.model)).decode()
    assert context.enable() < 0
    assert f"architecture {name}" in context.error() and reason in context.error()
    context.close()


def test_supported_models(context: Context) -> None:
    assert context.lib.llama_mesa_unsupported(context.model) == context.ffi.NULL


def lib_params(params: Any, **changes: int) -> Any:
    for name, value in changes.items():
        setattr(params, name, value)
    return params


NULL_CALLS = {
    "default_params": lambda lib, null, ctx, p: lib.llama_mesa_default_params(null, 0).train_length == 0,
    "method_params": lambda lib, null, ctx, p: lib.llama_mesa_method_params(null, -1, 4).train_length == 0,
    "method_params, no method": lambda lib, null, ctx, p: lib.llama_mesa_method_params(null, 128, 99).train_length == 0,
    "unsupported": lambda lib, null, ctx, p: lib.llama_mesa_unsupported(null) != null,
    "enable, no context": lambda lib, null, ctx, p: lib.llama_mesa_enable(null, p) < 0,
    "enable, no params": lambda lib, null, ctx, p: lib.llama_mesa_enable(ctx, null) < 0,
    "enabled": lambda lib, null, ctx, p: lib.llama_mesa_enabled(null) is False,
    "disable": lambda lib, null, ctx, p: lib.llama_mesa_disable(null) is None,
    "prompt": lambda lib, null, ctx, p: lib.llama_mesa_prompt(null, 5, null) < 0,
    "set_plan": lambda lib, null, ctx, p: lib.llama_mesa_set_plan(null, null, 0, 0, 1, 5) < 0,
    "get_plan": lambda lib, null, ctx, p: lib.llama_mesa_get_plan(null, null, 0, null, null) < 0,
    "get_key_pos": lambda lib, null, ctx, p: lib.llama_mesa_get_key_pos(null, null, 0) < 0,
    "fill_params, no model": lambda lib, null, ctx, p: (
        lib.llama_mesa_fill_params(null, lib_params(p, train_length=-1)) < 0
    ),
    "fill_params, no params": lambda lib, null, ctx, p: lib.llama_mesa_fill_params(null, null) < 0,
    "needs_breaks": lambda lib, null, ctx, p: lib.llama_mesa_needs_breaks(null, 5) < 0,
    "n_batch": lambda lib, null, ctx, p: lib.llama_mesa_n_batch(null, 5, 5) < 0,
    "chunk_size": lambda lib, null, ctx, p: lib.llama_mesa_chunk_size(null, 5) < 0,
    "chunk_save": lambda lib, null, ctx, p: lib.llama_mesa_chunk_save(null, 1, 5, null, 0) < 0,
    "chunk_values_at": lambda lib, null, ctx, p: lib.llama_mesa_chunk_values_at(null, 5, 1, null) < 0,
    "chunk_values": lambda lib, null, ctx, p: lib.llama_mesa_chunk_values(null, null, 0, 5, 1, null, 0) < 0,
    "chunk_load": lambda lib, null, ctx, p: lib.llama_mesa_chunk_load(null, null, 5, null, 0) < 0,
    "get_loaded": lambda lib, null, ctx, p: lib.llama_mesa_get_loaded(null, null, 0) < 0,
    "attention_enable": lambda lib, null, ctx, p: lib.llama_mesa_attention_enable(null, null, 1, 0) < 0,
    "get_attention_layers": lambda lib, null, ctx, p: lib.llama_mesa_get_attention_layers(null, null, 0) < 0,
    "get_attention": lambda lib, null, ctx, p: lib.llama_mesa_get_attention(null, null, 0, null) < 0,
    "get_read_ranges": lambda lib, null, ctx, p: lib.llama_mesa_get_read_ranges(null, null, 0) < 0,
    "set_read_ranges": lambda lib, null, ctx, p: lib.llama_mesa_set_read_ranges(null, null, 0) < 0,
    "set_read_layers": lambda lib, null, ctx, p: lib.llama_mesa_set_read_layers(null, null, 0) < 0,
    "get_read_layers": lambda lib, null, ctx, p: lib.llama_mesa_get_read_layers(null, null, 0) < 0,
    "make_plan": lambda lib, null, ctx, p: lib.llama_mesa_make_plan(null, 5, null, null, 0, null, null) < 0,
}


@pytest.mark.parametrize("name", NULL_CALLS)
def test_null_is_an_error(context: Context, name: str) -> None:
    context.lib.llama_mesa_clear_error()
    assert NULL_CALLS[name](context.lib, context.ffi.NULL, context.ctx, context.params())
    assert re.search("NULL|there is no method 99", context.error())
    assert not context.lib.llama_mesa_enabled(context.ctx)


def test_every_pointer_of_the_header_is_tried_as_null() -> None:
    """Functions that take a model, a context or params."""
    taking = re.findall(r"llama_mesa_(\w+)\s*\([^)]*struct", declarations())
    assert set(taking) == {name.split(",")[0] for name in NULL_CALLS}


def test_a_context_for_several_sequences(ffi: FFI, lib: Any, model_path: ModelPath) -> None:
    context = Context(ffi, lib, model_path("llama"), n_seq_max=2)
    assert context.enable() < 0
    assert "n_seq_max" in context.error()
    context.close()


def test_enable_after_a_long_text(context: Context) -> None:
    assert context.decode(LONG, 0) == 0
    assert context.enable() < 0
    assert "350 tokens already, more than train_length" in context.error()


@pytest.mark.parametrize("keep", [5, 20, 60, 100, 128])
def test_enable_again_after_a_roll_back(context: Context, keep: int) -> None:
    """What is left of a text that was read in chunks was not read plainly: its keys stand on the stair."""
    context.enable()
    context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL)
    assert context.decode(LONG, 0) == 0
    plan = context.plan()
    assert context.lib.llama_memory_seq_rm(context.memory, 0, keep, -1)
    assert context.enable(room=20) < 0
    assert "were not read plainly: empty it first" in context.error()
    assert context.plan() == plan  # and goes on
    assert context.decode(LONG[keep:], keep) == 0
    context.lib.llama_memory_clear(context.memory, True)
    assert context.enable(room=20) == 0


@pytest.mark.parametrize(
    ("first", "n", "refused"),
    [
        ({}, 128, False),
        (dict(log_length=64), 64, False),
        (dict(log_length=64), 65, True),  # the last query was scaled
        (dict(method=4, window=48), 48, False),
        (dict(method=4, window=48), 49, True),  # rerope weaves from its window on
        (dict(method=3, window=48), 128, False),  # stair does where the text is longer than T
    ],
)
def test_enable_again_after_a_short_text(context: Context, first: dict[str, int], n: int, refused: bool) -> None:
    """Logits as if it had been enabled once, or an error."""
    assert context.enable(**first) == 0, context.error()
    assert context.decode(LONG[:n], 0) == 0
    if refused:
        assert context.enable() < 0
        assert "were not read plainly" in context.error()
        return
    assert context.enable() == 0
    assert context.decode(REST[:1], n) == 0
    logits = context.logits(1)
    context.lib.llama_memory_clear(context.memory, True)
    assert context.decode(LONG[:n], 0) == 0
    assert context.decode(REST[:1], n) == 0
    assert np.abs(context.logits(1) - logits).max() <= 1e-4


def test_enable_again_after_the_anchor_moved_back(context: Context) -> None:
    """A short text, generation past T, and back: the keys are on the stair until they are moved back."""
    context.enable()
    assert context.decode(LONG[:120], 0) == 0
    for i, token in enumerate(LONG[120:160]):
        assert context.decode([token], 120 + i) == 0
    assert context.plan()[1] > 0
    assert context.lib.llama_memory_seq_rm(context.memory, 0, 120, -1)
    assert context.enable() == 0
    assert context.decode(LONG[120:121], 120) == 0
    logits = context.logits(1)
    context.lib.llama_memory_clear(context.memory, True)
    assert context.decode(LONG[:120], 0) == 0
    assert context.decode(LONG[120:121], 120) == 0
    assert np.abs(context.logits(1) - logits).max() <= 1e-4


def test_not_enabled(context: Context) -> None:
    ffi, lib, ctx = context.ffi, context.lib, context.ctx
    for result in (
        lib.llama_mesa_prompt(ctx, 5, ffi.NULL),
        lib.llama_mesa_set_plan(ctx, ffi.new("int32_t[]", [0]), 1, 0, 1, 5),
        lib.llama_mesa_get_plan(ctx, ffi.NULL, 0, ffi.NULL, ffi.NULL),
        lib.llama_mesa_get_key_pos(ctx, ffi.NULL, 0),
    ):
        assert result < 0
        assert context.error() == "Mesa-Extrapolation is not enabled on this context"


@pytest.mark.parametrize(
    ("n", "reason"),
    [(0, "0 tokens cannot"), (-3, "-3 tokens cannot"), (513, "513 tokens, more than n_ctx"), (2**31 - 1, "n_ctx")],
)
def test_bad_prompts(context: Context, n: int, reason: str) -> None:
    context.enable()
    plan = context.plan()
    assert context.lib.llama_mesa_prompt(context.ctx, n, context.ffi.NULL) < 0
    assert reason in context.error()
    assert context.plan() == plan


def test_a_prompt_that_no_plan_fits(context: Context) -> None:
    context.enable(stair_width=2)
    assert context.lib.llama_mesa_prompt(context.ctx, 500, context.ffi.NULL) < 0
    assert "stair_width 2 is too small for 500 tokens" in context.error()


BAD_PLANS = [
    ([], 0, 1, 100, "begin with 0"),
    ([5], 0, 1, 100, "begin with 0"),
    ([0, 12, 12], 12, 1, 100, "must grow"),
    ([0, 12, 52], 53, 1, 100, "anchor is 53"),
    ([0, 12, 52], -1, 1, 100, "anchor is -1"),
    ([0, 12, 52], 52, 0, 100, "stair_width is 0"),
    ([0, 12, 129], 100, 2, 200, "with the first chunk"),
    ([0, 128, 129], 100, 2, 200, "the first chunk has 128"),
    ([0, 12, 52], 52, 2, 51, "after the end of the text"),
]


@pytest.mark.parametrize(("starts", "anchor", "width", "n", "reason"), BAD_PLANS)
def test_bad_plans(context: Context, starts: list[int], anchor: int, width: int, n: int, reason: str) -> None:
    context.enable()
    array = context.ffi.new("int32_t[]", starts)
    assert context.lib.llama_mesa_set_plan(context.ctx, array, len(starts), anchor, width, n) < 0
    assert reason in context.error()
    assert context.plan() == ([0], 0, 1)


def test_no_plan(context: Context) -> None:
    context.enable()
    assert context.lib.llama_mesa_set_plan(context.ctx, context.ffi.NULL, 3, 0, 1, 100) < 0
    assert "begin with 0" in context.error()


def test_a_plan_too_late(context: Context) -> None:
    context.enable()
    assert context.decode(LONG[:20], 0) == 0
    assert context.lib.llama_mesa_set_plan(context.ctx, context.ffi.new("int32_t[]", [0, 12]), 2, 12, 1, 100) < 0
    assert "before the first token is read only: 20" in context.error()


def test_batches_that_do_not_follow(context: Context) -> None:
    context.enable()
    assert context.decode(LONG[:20], 0) == 0
    for start, seq_id in [(25, 0), (20, 1)]:
        assert context.decode(LONG[:5], start, seq_id) != 0
    assert context.decode(LONG[20:25], 20) == 0


def test_a_long_batch_without_a_plan(context: Context) -> None:
    """It would have to be read past T: refused, with what to do."""
    context.enable()
    assert context.decode(LONG, 0) < 0
    assert "llama_mesa_prompt" in context.error()
    assert context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL) == 0
    assert context.decode(LONG, 0) == 0


def test_a_plan_is_read_causally(context: Context) -> None:
    context.enable()
    context.lib.llama_set_causal_attn(context.ctx, False)
    assert context.decode(LONG[:20], 0) == 0  # a short text is read as stock llama.cpp reads it
    assert context.lib.llama_mesa_prompt(context.ctx, 300, context.ffi.NULL) >= 0
    assert context.decode(LONG[20:320], 20) < 0
    assert "read causally" in context.error()
    context.lib.llama_set_causal_attn(context.ctx, True)
    assert context.decode(LONG[20:320], 20) == 0


def test_tokens_removed_from_the_middle(context: Context) -> None:
    context.enable()
    context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL)
    assert context.decode(LONG, 0) == 0
    context.lib.llama_memory_seq_rm(context.memory, 0, 100, 120)
    assert context.decode(REST[:1], len(LONG)) != 0
    assert "removed from the middle" in context.error()
    context.lib.llama_memory_clear(context.memory, True)
    assert context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL) == 0
    assert context.decode(LONG, 0) == 0


def test_tokens_removed_from_the_front(context: Context) -> None:
    context.enable()
    assert context.decode(LONG[:100], 0) == 0
    context.lib.llama_memory_seq_rm(context.memory, 0, 0, 10)
    assert context.decode(REST[:1], 100) != 0
    assert "removed from the middle" in context.error()


def test_shifts_and_copies_are_refused_and_change_nothing(context: Context) -> None:
    context.enable()
    context.lib.llama_mesa_prompt(context.ctx, len(LONG), context.ffi.NULL)
    assert context.decode(LONG, 0) == 0
    first = context.logits(len(LONG))
    lib, memory = context.lib, context.memory
    assert not lib.llama_memory_can_shift(memory)
    lib.llama_memory_seq_add(memory, 0, 100, -1, -50)
    lib.llama_memory_seq_div(memory, 0, 100, -1, 2)
    assert lib.llama_memory_seq_pos_max(memory, 0) == len(LONG) - 1
    assert lib.llama_memory_seq_rm(memory, 0, 340, -1)
    assert context.decode(LONG[340:], 340) == 0
    assert np.abs(context.logits(10) - first[340:]).max() <= 1e-4


def test_what_a_token_attends_to(context: Context) -> None:
    """As the header has it: where there is no room for the weights nothing is written, and the number of keys is told all the same."""
    lib, ctx, new, null = context.lib, context.ctx, context.ffi.new, context.ffi.NULL
    assert lib.llama_mesa_attention_enable(ctx, null, 1, lib.LLAMA_MESA_ATTENTION_MEAN) < 0  # Mesa is not enabled
    context.enable()
    assert lib.llama_mesa_get_attention_layers(ctx, null, 0) == 0
    assert lib.llama_mesa_get_attention(ctx, null, 0, null) < 0
    assert "llama_mesa_attention_enable first" in context.error()
    for n, kind in ((-1, 0), (1, -1), (1, 3)):
        assert lib.llama_mesa_attention_enable(ctx, null, n, kind) < 0
    wanted = new("int32_t[]", [1, 0])
    assert lib.llama_mesa_attention_enable(ctx, wanted, 2, lib.LLAMA_MESA_ATTENTION_HEADS) == 2
    layers = new("int32_t[2]")
    assert lib.llama_mesa_get_attention_layers(ctx, layers, 2) == 2
    assert list(layers) == [1, 0]

    assert context.decode(LONG[:20], 0) == 0
    assert lib.llama_mesa_get_attention(ctx, null, 0, null) < 0
    assert context.decode(LONG[20:21], 20) == 0
    n_rows = new("int32_t *")
    assert lib.llama_mesa_get_attention(ctx, null, 0, n_rows) == 21
    n = 2 * n_rows[0] * 21
    weights = new("float[]", [-1.0] * n)
    assert lib.llama_mesa_get_attention(ctx, weights, n - 1, null) == 21
    assert set(weights) == {-1.0}
    assert lib.llama_mesa_get_attention(ctx, weights, n, null) == 21
    assert np.allclose(np.array(list(weights)).reshape(-1, 21).sum(1), 1)

    assert context.enable() == 0  # again: it is off
    assert lib.llama_mesa_get_attention_layers(ctx, null, 0) == 0
    assert context.decode(LONG[21:22], 21) == 0
    assert lib.llama_mesa_get_attention(ctx, null, 0, null) < 0


def test_what_a_generated_token_reads(context: Context) -> None:
    """Without room the number of ranges is told all the same; a batch of several tokens reads everything."""
    lib, ctx, new, null = context.lib, context.ctx, context.ffi.new, context.ffi.NULL
    assert context.enable(read_budget=64, read_every=16) == 0
    assert lib.llama_mesa_prompt(ctx, len(LONG), null) == 0
    assert context.decode(LONG, 0) == 0
    n = len(LONG)
    for i, token in enumerate(LONG[:20]):
        assert context.decode([token], n + i) == 0
        n_ranges = lib.llama_mesa_get_read_ranges(ctx, null, 0)
        assert (n_ranges == 0) == (i in (0, 16))
    ranges = new("int32_t[]", [-1] * 2 * n_ranges)
    assert lib.llama_mesa_get_read_ranges(ctx, ranges, 1) == n_ranges
    assert ranges[0] == 0 and set(list(ranges)[2:]) <= {-1}
    assert lib.llama_mesa_get_read_ranges(ctx, ranges, n_ranges) == n_ranges
    assert ranges[2 * n_ranges - 1] == n + 20

    assert context.decode(LONG[20:22], n + 20) == 0
    assert lib.llama_mesa_get_read_ranges(ctx, null, 0) == 0
    by_hand = new("int32_t[]", [0, 5])
    assert lib.llama_mesa_set_read_ranges(ctx, by_hand, 1) == 0
    assert context.decode(LONG[22:23], n + 22) == 0
    ranges = new("int32_t[4]")
    assert lib.llama_mesa_get_read_ranges(ctx, ranges, 2) == 2
    assert list(ranges) == [0, 5, n + 22, n + 23]
    assert lib.llama_mesa_set_read_ranges(ctx, new("int32_t[]", [5, 3]), 1) < 0
    assert "is out of order" in context.error()
    assert lib.llama_mesa_set_read_ranges(ctx, null, 0) == 0
    assert context.decode(LONG[23:24], n + 23) == 0
    assert lib.llama_mesa_get_read_ranges(ctx, null, 0) == 0


def test_which_layers_choose_what_is_read(context: Context) -> None:
    lib, ctx, new, null = context.lib, context.ctx, context.ffi.new, context.ffi.NULL
    assert context.enable() == 0
    assert lib.llama_mesa_get_read_layers(ctx, null, 0) == 0
    assert lib.llama_mesa_set_read_layers(ctx, new("int32_t[]", [1]), 1) < 0
    assert context.error().startswith("read_budget is 0")

    assert context.enable(read_budget=64) == 0
    layers = new("int32_t[2]", [-1, -1])
    assert lib.llama_mesa_get_read_layers(ctx, layers, 1) == 2
    assert list(layers) == [0, -1]
    for wanted, message in (([5], "does not see the whole text"), ([1, 1], "is given twice"), ([], "give 1 or more")):
        assert lib.llama_mesa_set_read_layers(ctx, new("int32_t[]", [*wanted, 0]), len(wanted)) < 0
        assert message in context.error()
    assert lib.llama_mesa_set_read_layers(ctx, new("int32_t[]", [1]), 1) == 1
    assert lib.llama_mesa_get_read_layers(ctx, layers, 2) == 1
    assert list(layers) == [1, -1]
    assert lib.llama_mesa_set_read_layers(ctx, null, 0) == 2
    assert lib.llama_mesa_get_read_layers(ctx, layers, 2) == 2
    assert list(layers) == [0, 1]
