"""What the engine's tests share: models, contexts that close themselves, the oracle driven by the engine's own plans,
and the unpatched llama.cpp in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import ArrayLike, NDArray

import make_models
import mesa_gguf  # before any llama_cpp: it decides which library that loads
from flash_attention import set_kernels
from mesa_gguf import Library, MesaConfig, MesaLlama, MesaPlan
from oracle import Floats, Queries, State, chunk_queries, first_chunk_queries

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
READER = DATA / "reader-f32.gguf"
BUNDLED = Path(mesa_gguf.__file__).parent / "data" / "mesa-reader-q8_0.gguf"

F32, F16, Q8_0 = 0, 1, 8  # enum ggml_type

SMALL = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=16, stair_bias=0.0, log_length=128)
"""For the models of make_models.py, whose T is 128. The paper's method: no bias of the stair, queries scaled from T on."""

settings.register_profile("quick", deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
settings.register_profile("thorough", deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def worst(a: ArrayLike, b: ArrayLike) -> float:
    """Largest absolute difference."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def rms(errors: ArrayLike) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(errors, np.float64)))))


def random_tokens(n: int, seed: int = 0, n_vocab: int = 128) -> list[int]:
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


@pytest.fixture(scope="session", autouse=True)
def own_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test keeps goes into the user's library."""
    folder = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESA_LIBRARY", str(folder))
        patch.setenv("MESA_TUNE", str(folder / "tune"))
        yield folder


# Models and contexts.


@pytest.fixture(scope="module")
def llm() -> Iterator[MesaLlama]:
    """The bundled model."""
    llm = MesaLlama(BUNDLED, n_ctx=8192, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    """A library with nothing in it."""
    with Library(tmp_path / "library", budget=10**9) as opened:
        yield opened


ModelPath = Callable[[str], Path]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> ModelPath:
    """The file of a model of make_models.py, by name."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda name: make_models.MODELS[name](folder / f"{name}.gguf"))


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # T = 8192, llama architecture, chat template
GEMMA3 = "gemma-3-270m-q4_k_m.gguf"  # T = 32768, most layers see a window of 512, no chat template
REAL_MODELS = Path(os.environ.get("MESA_MODELS") or ROOT / "models")


def real_model(file: str) -> Path:
    """The file of a model that `make models` fetches; skips the test where it is not there."""
    path = REAL_MODELS / file
    if not path.is_file():
        pytest.skip(f"{file} is not in {REAL_MODELS}: make models, or set MESA_MODELS")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return real_model(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return real_model(GEMMA3)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for a real model bears the mark, whether or not it was written down."""
    for item in items:
        if {"smollm2", "gemma3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("real_model")


Opener = Callable[..., MesaLlama]


@pytest.fixture
def open_llama() -> Iterator[Opener]:
    """Opens a MesaLlama with logits of every token, f32 cache and no flash attention unless asked; closes it."""
    opened: list[MesaLlama] = []

    def opener(
        path: Path, mesa: MesaConfig = SMALL, *, kv: int = F32, flash: bool | Literal["auto"] = False, **kwargs: Any
    ) -> MesaLlama:
        arguments = (
            dict(n_ctx=512, logits_all=True, flash_attn=flash, type_k=kv, type_v=kv, n_threads=1, n_threads_batch=1)
            | kwargs
        )
        opened.append(MesaLlama(path, mesa=mesa, **arguments))
        return opened[-1]

    yield opener
    for llm in opened:
        llm.close()


@contextmanager
def stock_kernels() -> Iterator[None]:
    """The CPU computes with ggml's own kernels: for what is to be stock llama.cpp's bit for bit."""
    set_kernels(False)
    try:
        yield
    finally:
        set_kernels(True)


def read(llm: MesaLlama, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Read tokens after the ones in the context -> their logits [n, n_vocab]."""
    n = llm.n_tokens
    llm.eval(tokens)
    assert llm.n_tokens == n + len(tokens)
    return llm.scores[n : llm.n_tokens].copy()


def read_singly(llm: MesaLlama, tokens: Sequence[int]) -> NDArray[np.float32]:
    """As generation does it."""
    return np.concatenate([read(llm, [token]) for token in tokens])


# The oracle, driven by a plan of the engine.


def oracle_read(
    state: State, plan: MesaPlan, tokens: Sequence[int], ranges: Sequence[tuple[int, int]] | None = None
) -> Floats:
    """Read tokens after the ones in the oracle's state, as the plan wants it -> their logits [n, n_vocab].

    ranges: what those of the last chunk read; None: everything.
    """
    out = []
    starts = plan.chunk_starts
    state.move_anchor(plan.anchor, plan.stair_width)
    tokens = list(tokens)
    while tokens:
        n = state.n
        if n >= starts[-1]:
            out.append(state.last(tokens, ranges))
            break
        chunk = int(np.searchsorted(starts, n, side="right")) - 1
        start, end = starts[chunk], starts[chunk + 1]
        group = first_chunk_queries(end) if chunk == 0 else chunk_queries(starts[1], start, end)
        now = slice(n - start, min(end - n, len(tokens)) + n - start)
        keys = group.keys <= group.tokens[now][-1]  # tokens that were not read yet are no keys yet
        piece = Queries(
            group.tokens[now],
            group.positions[now],
            group.keys[keys],
            group.key_positions[keys],
            group.visible[now][:, keys],
            group.log_scaled,
        )
        out.append(state._read(tokens[: len(piece.tokens)], piece))
        tokens = tokens[len(piece.tokens) :]
    return np.concatenate(out)


# Stock llama.cpp.

STOCK_PROGRAM = """
import ctypes, json, sys
import numpy as np
import llama_cpp

assert not hasattr(llama_cpp.llama_cpp._lib, "llama_mesa_version"), "this library is not the stock one"
request = json.loads(sys.argv[1])
llm = llama_cpp.Llama(request["path"], verbose=False, logits_all=True, **request["options"])
for tokens in request["texts"]:
    llm.eval(tokens)
np.save(request["out"], llm.scores[: llm.n_tokens])
if request["state"]:
    with open(request["state"], "wb") as file:
        file.write(llm.save_state().llama_state)
for path in request["load"]:
    llm.reset()
    with open(path, "rb") as file:
        data = file.read()
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    print(llama_cpp.llama_state_set_data(llm._ctx.ctx, buffer, len(data)))
    llm._ctx.kv_cache_clear()
    llm.eval(request["texts"][0])
"""


@pytest.fixture(scope="session")
def stock_lib() -> Path:
    """The folder of the same llama.cpp, unpatched, built with the same flags."""
    folder = Path(os.environ.get("MESA_STOCK_LIB") or ROOT / "build" / "stock" / "lib")
    if not any((folder / f"libllama.{suffix}").exists() for suffix in ("so", "dylib")):
        reason = f"no unpatched libllama in {folder}: make stock, or set MESA_STOCK_LIB"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


Stock = Callable[..., tuple[NDArray[np.float32], str]]


@pytest.fixture
def run_stock(stock_lib: Path, tmp_path: Path) -> Iterator[Stock]:
    """Runs stock llama.cpp: reads texts one after another -> (logits of every token, what it printed). Until the test ends
    this process computes with the same kernels.

    state: save the state there in the end. load: states to try afterwards; each one's result is printed, and the first
    text is read again.
    """

    def run(
        path: Path, texts: list[list[int]], state: Path | None = None, load: Sequence[Path] = (), **options: Any
    ) -> tuple[NDArray[np.float32], str]:
        out = tmp_path / "stock.npy"
        request = {
            "path": str(path),
            "texts": texts,
            "options": dict(n_ctx=512, n_threads=1, n_threads_batch=1) | options,
            "out": str(out),
            "state": str(state) if state else "",
            "load": [str(p) for p in load],
        }
        done = subprocess.run(
            [sys.executable, "-c", STOCK_PROGRAM, json.dumps(request)],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_lib)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return np.load(out), done.stdout

    with stock_kernels():
        yield run


def run_python(program: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own, so that an abort of the library is seen and not suffered."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={
            **os.environ,
            "GGML_NO_BACKTRACE": "1",
        },  # or ggml starts a debugger to print where it aborts, which takes long
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
