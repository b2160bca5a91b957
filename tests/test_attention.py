"""What a token attends to: the oracle's weights, llama.cpp's own of every kind of layer, and nothing where it is off."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

import arch_models
import oracle
from conftest import F16, F32, Q8_0, SMALL, ModelPath, Opener, oracle_read, random_tokens, read, rms, worst
from make_models import Shape, write_llama
from mesa_gguf import ConfigError, MesaConfig, MesaError, _core
from test_chunks import QUESTION, SOME, keep, oracle_last, oracle_together, put_together
from test_graph_size import Tensor, graphs

T = 128
LONG = random_tokens(370, seed=1)  # several T
SHORT = random_tokens(60, seed=1)
ANSWER = random_tokens(30, seed=2)  # with LONG the anchor moves once

EXACT = 1e-3  # of the weights
FLASH = 0.05  # as the logits, which are of attention that sums values of few queries in f16 (test_engine.py), below the layer

ALL = ["llama", "llama-head-size", "qwen2-yarn", "stablelm", "mpt", "nope", "gemma2"]


def state_of(path: Path, flash: bool = False) -> oracle.State:
    return oracle.State(oracle.Model.from_gguf(path, kv_half=flash), log_scaling_T=T)


def oracle_weights(state: oracle.State, layers: list[int], heads: str) -> NDArray[np.float64]:
    every = np.stack([state.attention[layer] for layer in layers])
    return every if heads == "all" else every.mean(1) if heads == "mean" else every.max(1)


def full_layers(path: Path) -> list[int]:
    return [layer for layer, window in enumerate(oracle.Model.from_gguf(path).windows) if not window]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("text", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("heads", ["mean", "max", "all"])
def test_weights_are_the_oracles(
    model_path: ModelPath, open_llama: Opener, kind: str, text: list[int], heads: Any
) -> None:
    """Of the prompt's last token and of each of an answer's, within T and on the stair."""
    path = model_path(kind)
    llm, state, layers = open_llama(path), state_of(path), full_layers(path)
    assert llm.enable_attention(layers, heads) == layers
    errors = []
    for tokens in [text, *([token] for token in ANSWER)]:
        assert worst(read(llm, tokens), oracle_read(state, llm.plan(), tokens)) < 5e-3
        seen, expected = llm.attention(), oracle_weights(state, layers, heads)
        assert seen.dtype == np.float32 and seen.shape == expected.shape
        errors.append(worst(seen, expected))
    print(f"\n{max(errors):.6f}")
    assert max(errors) < EXACT


@pytest.mark.parametrize(("kv", "flash", "limit"), [(F32, True, FLASH), (F16, False, 0.02), (F16, True, FLASH)])
def test_weights_with_other_caches(
    model_path: ModelPath, open_llama: Opener, kv: int, flash: bool, limit: float
) -> None:
    """The first layer, where nothing below it is rounded, has the oracle's weights to the rounding of its keys."""
    path = model_path("llama-head-size")
    llm, state = open_llama(path, kv=kv, flash=flash), state_of(path, flash)
    layers = llm.enable_attention(full_layers(path), "all")
    errors = []
    for tokens in [LONG, *([token] for token in ANSWER)]:
        llm.eval(tokens)
        oracle_read(state, llm.plan(), tokens)
        error = np.abs(llm.attention() - oracle_weights(state, layers, "all"))
        errors.append(error.max(axis=(1, 2)))
    print(f"\n{np.max(errors, axis=0)}")
    assert np.max(errors) < limit
    assert np.max(errors, axis=0)[0] < (EXACT if kv == F32 else 5e-3)


@pytest.mark.parametrize("flash", [False, True])
def test_weights_with_a_quantized_cache(tmp_path: Path, open_llama: Opener, flash: bool) -> None:
    """Its keys are rotated by a Hadamard matrix, and the queries with them. The rms error is that of the keys' rounding."""
    path = write_llama(tmp_path / "heads.gguf", Shape(n_head=2, n_head_kv=1, head_size=64))
    kv: dict[str, Any] = dict(type_k=Q8_0, type_v=Q8_0 if flash else F16)
    llm, state = open_llama(path, flash=flash, **kv), state_of(path, flash)
    layers = llm.enable_attention(full_layers(path), "all")
    errors = []
    for tokens in [LONG, *([token] for token in ANSWER)]:
        llm.eval(tokens)
        oracle_read(state, llm.plan(), tokens)
        errors.append(llm.attention() - oracle_weights(state, layers, "all"))
    print(f"\n{[rms(np.concatenate([e[layer].ravel() for e in errors])) for layer in layers]}")
    assert rms(np.concatenate([error[0].ravel() for error in errors])) < 1e-3


def test_weights_over_loaded_chunks(model_path: ModelPath, open_llama: Opener) -> None:
    path = model_path("llama")
    llm, state = open_llama(path), state_of(path)
    layers = llm.enable_attention(full_layers(path), "all")
    put_together(llm, keep(llm))
    with pytest.raises(MesaError, match="not read alone"):
        llm.attention()
    oracle_together(state, SOME)
    for tokens in [QUESTION, *([token] for token in ANSWER)]:
        llm.eval(tokens)
        oracle_last(state, llm.plan(), tokens)
        assert worst(llm.attention(), oracle_weights(state, layers, "all")) < EXACT


def test_weights_of_the_exact_method(model_path: ModelPath, open_llama: Opener) -> None:
    """Every query has positions of its own: they are what the softmax of llama.cpp is given."""
    weights = own_weights(model_path("llama"), MesaConfig(method="mesa-exact", room=10))
    assert len(weights) > 40
    assert all(worst(seen, expected) < 1e-5 for seen, expected in weights)


# Against llama.cpp's own softmax, which has a name in the graph where flash attention is off.


def own_weights(path: Path, config: MesaConfig, kv: int = F32) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A text of several T and an answer: of each of its tokens and each layer ours, and llama.cpp's, [n_head, n_keys]."""
    softmax: dict[int, NDArray[np.float32]] = {}

    def look(address: int, ask: bool, _: object) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        name = tensor.name.decode()
        if not name.startswith("kq_soft_max-") or tensor.ne[1] != 1:
            return not ask
        if not ask:
            size = tensor.ne[0] * tensor.ne[2]
            data = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float)), (size,))
            softmax[int(name.split("-")[1])] = data.reshape(tensor.ne[2], tensor.ne[0]).copy()
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(look)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 512, 64, 1, 1
    params.type_k = params.type_v = kv
    params.flash_attn_type = 0
    params.swa_full = True
    params.cb_eval = callback
    ctx = llama_cpp.llama_init_from_model(model, params)
    address = ctypes.cast(ctx, ctypes.c_void_p).value or 0
    _core.enable(address, config.params(T))
    layers = []
    for layer in range(llama_cpp.llama_model_n_layer(model)):
        with contextlib.suppress(ValueError):  # a sliding window, or no attention
            layers += _core.attention_enable(address, [layer], 1, _core.ATTENTION_HEADS)
    _core.attention_enable(address, layers, 0, _core.ATTENTION_HEADS)
    _core.prompt(address, len(LONG))
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    n_past, found = 0, []
    for tokens in [LONG[:-1], LONG[-1:], *([token] for token in ANSWER)]:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, n_past + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        softmax.clear()
        assert llama_cpp.llama_decode(ctx, batch) == 0
        n_past += len(tokens)
        if len(tokens) == 1:
            ours = _core.attention(address)
            found += [(ours[i], softmax[layer][:, :n_past]) for i, layer in enumerate(layers)]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)
    return found


QUICK_ARCHS = "gemma2 gpt-oss qwen3 gemma3n qwen2vl smollm3 deci mpt".split()


@pytest.fixture(scope="module")
def arch_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("archs")
    made = arch_models.make(QUICK_ARCHS, folder)

    def path(name: str) -> Path:
        if name not in made:
            made.update(arch_models.make([name], folder))
        found = made[name]
        assert isinstance(found, Path), found
        return found

    return path


@pytest.mark.parametrize("name", QUICK_ARCHS)
def test_weights_are_llama_cpps_own(arch_path: Callable[[str], Path], name: str) -> None:
    """Sinks, capped scores, ALiBi, layers that use the keys of another, layers without attention."""
    weights = own_weights(arch_path(name), SMALL)
    assert weights
    assert max(worst(seen, expected) for seen, expected in weights) < 1e-5


# On and off.


@pytest.mark.parametrize(("kv", "flash"), [(F16, False), (F16, True)])
@pytest.mark.parametrize("text", [SHORT, LONG], ids=["short", "long"])
def test_logits_stay(model_path: ModelPath, open_llama: Opener, kv: int, flash: bool, text: list[int]) -> None:
    """On: the same to rounding, as the last token is read alone. Off again: bit for bit."""
    llm = open_llama(model_path("qwen2"), kv=kv, flash=flash)

    def logits() -> NDArray[np.float32]:
        llm.reset()
        return np.concatenate([read(llm, text), *(read(llm, [token]) for token in ANSWER)])

    off = logits()
    llm.enable_attention()
    on = logits()
    assert worst(on, off) < (0.1 if flash else 1e-3)
    assert np.array_equal(on[: len(text) - 1], off[: len(text) - 1]) or flash
    llm.disable_attention()
    assert np.array_equal(logits(), off)


def test_off_is_the_same_graph(model_path: ModelPath) -> None:
    """Nothing is added until it is asked for, and after that only what the budget of nodes foresees."""
    path, config = model_path("gemma2"), MesaConfig(first_chunk=12, chunk=100, last_chunk=32, room=10)
    sizes: dict[str, list[int]] = {"off": [], "on": [], "off again": []}
    for name, count in sizes.items():

        def ask(address: int, name: str = name) -> None:
            if name != "off":
                _core.attention_enable(address, None, 1, _core.ATTENTION_MEAN)
            if name == "off again":
                _core.attention_enable(address, None, 0, _core.ATTENTION_MEAN)

        count.extend(graphs(path, config, prepare=ask))
    assert sizes["off"] == sizes["off again"]
    added = {on - off for on, off in zip(sizes["on"], sizes["off"])}
    print(f"\n{added} nodes")
    assert 0 in added and len(added) == 2  # only the ubatches of one token have more
    assert max(added) <= 14


def test_what_the_last_token_saw_is_known_only_of_a_token_read_alone(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    with pytest.raises(MesaError, match="off"):
        llm.attention()
    llm.eval(SHORT)
    llm.enable_attention()
    with pytest.raises(MesaError, match="not read alone"):
        llm.attention()
    llm.eval(SHORT)  # the last one alone
    seen = llm.attention()
    assert seen.shape == (2, 2 * len(SHORT)) and worst(seen.sum(1), 1) < 1e-5
    llm.n_tokens -= 5
    llm.eval(ANSWER[:1])
    assert llm.attention().shape == (2, 2 * len(SHORT) - 4)
    llm.n_tokens -= 1
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)
    with pytest.raises(MesaError, match="not read alone"):
        llm.attention()
    state = llm.save_state()
    llm.eval(ANSWER[:1])
    llm.load_state(state)
    with pytest.raises(MesaError, match="not read alone"):
        llm.attention()


def test_other_numbers_and_a_roll_back(model_path: ModelPath, open_llama: Opener) -> None:
    """It stays on when the model reads by other numbers; of a token that is no more in the context it tells nothing."""
    llm = open_llama(model_path("llama"))
    layers = llm.enable_attention(1, "all")
    llm.eval(LONG)
    for config in (MesaConfig(chunk=40), SMALL):
        llm.reconfigure(config)
        with pytest.raises(MesaError, match="is not known"):
            llm.attention()
        llm.eval(LONG)
        seen = llm.attention()
        assert seen.shape[0] == len(layers) and seen.shape[-1] == len(LONG)
    llm.n_tokens = 50
    with pytest.raises(MesaError, match="rolled back to 50"):
        llm.attention()
    llm.eval(LONG[50:52])
    assert llm.attention().shape[-1] == 52


def test_which_layers(model_path: ModelPath, open_llama: Opener, tmp_path: Path) -> None:
    deep = open_llama(write_llama(tmp_path / "deep.gguf", Shape(n_layer=20)))
    assert deep.enable_attention() == list(range(8, 16))
    assert deep.enable_attention(4) == [9, 11, 13, 15]
    assert deep.enable_attention(2) == [10, 14]
    assert deep.enable_attention(10) == list(range(7, 17))
    assert deep.enable_attention(100) == list(range(20))
    assert deep.enable_attention([19, 0]) == [19, 0]
    windows = open_llama(model_path("gemma2"))
    assert windows.enable_attention(4) == [1]
    with pytest.raises(ConfigError, match=r"layer 0 does not see the whole text: of this model these do: 1$"):
        windows.enable_attention([0])
    windows.eval(SHORT)  # and what was on before is on still
    assert windows.attention().shape == (1, len(SHORT))
    for wrong in (0, -1, True, [], [1, 1], [2], [-1]):
        with pytest.raises(ConfigError):
            windows.enable_attention(wrong)
    with pytest.raises(ConfigError, match="heads"):
        windows.enable_attention(heads="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Mesa is off"):
        open_llama(model_path("llama"), MesaConfig(enabled=False)).enable_attention()


@pytest.mark.parametrize("layers", [2.5, "1", None, [1.5], ["1"], 10**20, [10**20], True, [], {1}])
def test_what_are_no_layers(model_path: ModelPath, open_llama: Opener, layers: Any) -> None:
    llm = open_llama(model_path("llama"))
    with pytest.raises(ConfigError, match=r"layers is .*it must be a number of layers"):
        llm.enable_attention(layers)
    with pytest.raises(ConfigError, match="heads is"):
        llm.enable_attention(1, ["mean"])  # type: ignore[arg-type]


def test_generation_goes_on_with_it(model_path: ModelPath, open_llama: Opener) -> None:
    """At each token that is generated, what the one before it attended to, from the prompt's last token on."""
    llm = open_llama(model_path("llama"), logits_all=False)
    plain = [token for token, _ in zip(llm.generate(LONG, temp=0), range(12))]
    llm.enable_attention()
    lengths, tokens = [], []
    for token, _ in zip(llm.generate(LONG, temp=0), range(12)):
        tokens.append(token)
        lengths.append(llm.attention().shape[1])
    assert tokens == plain
    assert lengths == list(range(len(LONG), len(LONG) + 12))
