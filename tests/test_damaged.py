"""Damaged files: models and states that are cut, flipped, swapped, edited (damage.py). Each is an error, or is loaded where
the damage cannot be seen; nothing aborts, hangs, or takes a wrong state for a right one."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaDiskCache

import damage
import make_models
from conftest import BUNDLED, F16, Q8_0, SMALL, ModelPath, Opener, random_tokens, read, worst
from mesa_gguf import MesaConfig, MesaError, MesaLlama, ModelError

PROGRAM = Path(damage.__file__)


def run_variants(what: str, source: Path, folder: Path, seed: int, n: int) -> Counter[str]:
    """Tries n variants in processes that may die -> how many were loaded and refused. Fails with all that took one along."""
    begin, outcomes, failures = 0, Counter[str](), []
    environment = {
        **os.environ,
        "GGML_NO_BACKTRACE": "1",
    }  # or ggml starts a debugger where it aborts, which takes long
    while begin < n:
        command = [sys.executable, str(PROGRAM), what, str(source), str(folder), str(seed), str(begin), str(n)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        lines = done.stdout.splitlines()
        outcomes.update(line.split()[0] for line in lines if line.startswith(("loaded", "refused")))
        if done.returncode == 0 and lines[-1] == "done":
            break
        last = max((i for i, line in enumerate(lines) if line.split(" ")[0].isdigit()), default=None)
        if last is None:
            pytest.fail(f"{command} did not begin: {done.stderr[-2000:]}")
        failures.append(
            f"seed {seed}: {' | '.join(lines[last:])}: exit {done.returncode}: {done.stderr.strip()[-600:]}"
        )
        begin = int(lines[last].split(" ")[0]) + 1
    print(f"\n{what} {source.name}, seed {seed}: {dict(outcomes)}, {len(failures)} failures")
    assert not failures, "\n\n".join(failures)
    assert outcomes["loaded"] and outcomes["refused"]  # or the variants would prove nothing
    return outcomes


# Models.

SOURCES = ["stablelm", "qwen2-yarn", "mpt", "mesa-reader-q4_0"]


def source_path(model_path: ModelPath, name: str) -> Path:
    return model_path(name) if name in make_models.MODELS else BUNDLED.parent / f"{name}.gguf"


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_models(model_path: ModelPath, tmp_path: Path, name: str) -> None:
    run_variants("gguf", source_path(model_path, name), tmp_path, seed=1, n=60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*SOURCES, "llama", "llama-freq-factors", "gptneox", "mesa-reader-q8_0"])
def test_thousands_of_damaged_models(model_path: ModelPath, tmp_path: Path, name: str) -> None:
    run_variants("gguf", source_path(model_path, name), tmp_path, seed=2, n=1000)


def test_an_abort_is_told_as_an_error(model_path: ModelPath, tmp_path: Path) -> None:
    """llama.cpp's assertion in the message, and the way out."""
    data = model_path("qwen2-yarn").read_bytes().replace(b"\4\0\0\0\0\0\0\0yarn", b"\4\0\0\0\0\0\0\0barn")
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(
        ModelError, match=r"damaged: llama.cpp would abort on it \(llama-model.cpp:\d+: GGML_ASSERT.*rope_scaling_type"
    ):
        MesaLlama(path, mesa=SMALL)


NUMBERS = [
    ("stablelm", "stablelm.attention.layer_norm_epsilon", -1.0),
    ("stablelm", "stablelm.attention.layer_norm_epsilon", float("nan")),
    ("stablelm", "stablelm.rope.dimension_count", 0),
    ("stablelm", "stablelm.rope.dimension_count", 7),
    ("stablelm", "stablelm.rope.dimension_count", 18),
    ("mpt", "mpt.vocab_size", 2**29),
]


@pytest.mark.parametrize("mesa", [SMALL, MesaConfig(enabled=False)])
@pytest.mark.parametrize(("kind", "key", "value"), NUMBERS)
def test_numbers_that_llama_cpp_dies_of_later(
    model_path: ModelPath, tmp_path: Path, kind: str, key: str, value: float, mesa: MesaConfig
) -> None:
    """When it computes (an abort, or a loop without end), or when it takes the memory: found by the variants above."""
    data, path = model_path(kind).read_bytes(), tmp_path / "model.gguf"
    (field,) = (field for field in damage.gguf_fields(data) if field.name == f"value of {key}")
    path.write_bytes(data[: field.start] + struct.pack(field.form, value) + data[field.start + field.size :])
    with pytest.raises(ModelError, match=r"damaged|cannot load"):
        MesaLlama(path, mesa=mesa, n_ctx=512)


# States.

KIND = "llama-head-size"


@pytest.mark.parametrize("what", ["state", "file"])
def test_damaged_states(model_path: ModelPath, tmp_path: Path, what: str) -> None:
    run_variants(what, model_path(KIND), tmp_path, seed=1, n=250)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["state", "file"])
@pytest.mark.parametrize("seed", [2, 3])
def test_thousands_of_damaged_states(model_path: ModelPath, tmp_path: Path, what: str, seed: int) -> None:
    run_variants(what, model_path(KIND), tmp_path, seed=seed, n=5000)


TEXT, SHORT, REST = random_tokens(350, seed=1), random_tokens(60, seed=2), random_tokens(20, seed=3)


def test_a_flipped_bit_of_a_value_is_seen(model_path: ModelPath, open_llama: Opener) -> None:
    """llama.cpp would take it. The context stays as it was."""
    llm = open_llama(model_path(KIND))
    read(llm, TEXT)
    state, changed = llm.save_state(), llm.save_state()
    place = len(state.llama_state) * 3 // 4  # values are the second half
    changed.llama_state = (
        state.llama_state[:place] + bytes([state.llama_state[place] ^ 1]) + state.llama_state[place + 1 :]
    )
    with pytest.raises(MesaError, match=r"damaged \(wrong checksum\)"):
        llm.load_state(changed)
    assert llm.n_tokens == len(TEXT)
    after = read(llm, REST)
    llm.load_state(state)
    assert np.array_equal(read(llm, REST), after)


CHANGES: dict[str, Any] = {
    "n_tokens": 349,
    "seed": 5,
    "llama_state_size": 0,
    "input_ids": np.zeros(512, np.intc),
    "scores": np.zeros((350, 128), np.single),
    "origin": "another",
    "checksum": "",
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("missing", [False, True])
def test_every_part_of_a_state_is_sealed(model_path: ModelPath, open_llama: Opener, name: str, missing: bool) -> None:
    """A number that was changed, an attribute that a damaged pickle has lost."""
    llm = open_llama(model_path(KIND))
    read(llm, TEXT)
    state = llm.save_state()
    changed = copy(state)
    if missing:
        delattr(changed, name)
    else:
        setattr(changed, name, CHANGES[name])
    with pytest.raises(MesaError, match="damaged"):
        llm.load_state(changed)
    llm.load_state(state)


def test_an_open_state_that_says_it_is_longer(model_path: ModelPath, open_llama: Opener) -> None:
    """Without a checksum the number of tokens is still held against the KV data; fewer is what a roll-back leaves."""
    llm = open_llama(model_path(KIND))
    read(llm, TEXT)
    state = damage.with_bytes(llm.save_state(), llm.save_state().llama_state)
    state.n_tokens, state.input_ids = state.n_tokens + 1, np.append(state.input_ids, 0)
    with pytest.raises(MesaError, match="KV data end after 350 of 351 tokens"):
        llm.load_state(state)
    assert llm.n_tokens == 0
    state.n_tokens -= 11
    llm.load_state(state)
    assert llm.n_tokens == 340


def write_other(path: Path) -> Path:
    """The shape of KIND with other weights."""
    return make_models.write_llama(path, make_models.Shape(n_head=3, n_head_kv=1, head_size=32), seed=99)


CONTEXTS: dict[str, dict[str, Any]] = {
    "base": {},
    "larger n_ctx": dict(n_ctx=1024),
    "smaller n_ctx": dict(n_ctx=256),
    "other chunks": dict(mesa=replace(SMALL, first_chunk=20, chunk=50, room=10)),
    "other T": dict(mesa=replace(SMALL, train_length=120)),
    "no log scaling": dict(mesa=replace(SMALL, log_scaling=False)),
    "Mesa off": dict(mesa=MesaConfig(enabled=False)),
    "f16": dict(kv=F16),
    "flash": dict(flash=True),
    "q8_0": dict(kv=Q8_0, flash=True),
    "other weights": {},
    "other RoPE base": dict(rope_freq_base=20000.0),
    "other RoPE scale": dict(rope_freq_scale=0.5),
}
WITHIN = {"base", "larger n_ctx", "smaller n_ctx", "other chunks"}  # these differ in nothing that a short text knows of


def accepts(source: str, target: str, long: bool) -> bool:
    if source == target or {source, target} <= (WITHIN if not long else WITHIN - {"smaller n_ctx"}):
        return True
    return source == "Mesa off" and not long and target in WITHIN | {"other T", "no log scaling"}


@pytest.mark.parametrize("long", [False, True])
def test_states_of_other_contexts(model_path: ModelPath, open_llama: Opener, tmp_path: Path, long: bool) -> None:
    """Every pair: what is taken goes on as at home, the rest is refused, and the context works on."""
    other = write_other(tmp_path / "other.gguf")
    contexts = {
        name: open_llama(other if name == "other weights" else model_path(KIND), **options)
        for name, options in CONTEXTS.items()
    }
    states, expected, fresh = {}, {}, {}
    for name, llm in contexts.items():
        fresh[name] = read(llm, SHORT)
        llm.reset()
        if long and name == "smaller n_ctx":
            continue
        read(llm, TEXT if long else SHORT)
        states[name] = llm.save_state()
        expected[name] = read(llm, REST)
    taken = set()
    for source, state in states.items():
        for target, llm in contexts.items():
            try:
                llm.load_state(state)
            except MesaError:
                pass
            else:
                taken.add((source, target))
                llm.n_tokens = min(llm.n_tokens, llm.n_ctx() - len(REST))
                assert np.array_equal(read(llm, REST), expected[source]), (source, target)
            llm.reset()
            assert np.array_equal(read(llm, SHORT), fresh[target]), (source, target)
    assert taken == {(a, b) for a in states for b in CONTEXTS if accepts(a, b, long)}


def test_a_state_of_an_adapter(model_path: ModelPath) -> None:
    """What was read with a LoRA adapter is not what the model itself would have read."""
    llm = MesaLlama(model_path(KIND), mesa=SMALL, n_ctx=512)
    origin = llm._origin
    other = MesaLlama(model_path(KIND), mesa=SMALL, n_ctx=512)
    other.lora_path, other.lora_scale = str(model_path("mpt")), 0.5
    assert other._origin != origin
    llm.close()
    other.close()


def test_a_model_file_that_moved(model_path: ModelPath, open_llama: Opener, tmp_path: Path) -> None:
    """Its states still belong to it."""
    llm = open_llama(model_path(KIND))
    read(llm, TEXT)
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(model_path(KIND).read_bytes())
    other = open_llama(moved)
    other.load_state(llm.save_state())
    assert worst(read(other, REST), read(llm, REST)) == 0


def test_damaged_files_of_a_disk_cache(model_path: ModelPath, open_llama: Opener, tmp_path: Path) -> None:
    """The state's own file in the cache's folder: flipped, cut, emptied."""
    llm = open_llama(model_path(KIND))
    random = np.random.default_rng(4)
    for i in range(30):
        cache = LlamaDiskCache(str(tmp_path / str(i)))
        llm.reset()
        read(llm, TEXT)
        cache[TEXT] = llm.save_state()
        (file,) = (tmp_path / str(i)).rglob("*.val")
        data = bytearray(file.read_bytes())
        if i % 3 == 0:
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        elif i % 3 == 1:
            del data[int(random.integers(len(data))) :]
        else:
            data[:] = random.bytes(len(data)) if i % 2 else b""
        file.write_bytes(data)
        with pytest.raises(Exception) as caught:  # noqa: PT011 what pickle and SQLite raise is theirs
            llm.load_state(cache[TEXT])
        assert not isinstance(caught.value, AssertionError)
        cache.cache.close()
    llm.reset()
    read(llm, TEXT)
