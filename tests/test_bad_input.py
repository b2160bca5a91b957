"""Bad files, bad options, bad tokens: each is refused with an error of ours that names the cause, and nothing aborts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import make_models
from conftest import Q8_0, SMALL, ModelPath, Opener, random_tokens, read, run_python
from mesa_gguf import ConfigError, MesaConfig, MesaError, MesaLlama, ModelError, OutOfMemoryError, PromptError

# Files.


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf: there is no such file"):
        MesaLlama(tmp_path / "model.gguf")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        MesaLlama(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"GG", b"PK\3\4 something", b"{}", b"\0" * 4096])
def test_a_file_that_is_no_gguf(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(contents)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        MesaLlama(path)


@pytest.mark.parametrize("contents", [b"GGUF", b"GGUF\3\0\0\0", b"GGUF" + b"\xff" * 60, b"GGUF\3\0\0\0" + b"\0" * 16])
def test_a_file_that_only_begins_like_gguf(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(contents)
    with pytest.raises(ModelError, match="GGUF file"):
        MesaLlama(path)


def test_a_file_that_is_cut_short(model_path: ModelPath, tmp_path: Path) -> None:
    """At many sizes, header and tensors."""
    data, path = model_path("llama").read_bytes(), tmp_path / "model.gguf"
    sizes = [*range(1, 60, 7), *range(60, 3000, 97), *(len(data) * i // 20 for i in range(1, 20)), len(data) - 1]
    for size in sizes:
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=str(path)):
            MesaLlama(path, mesa=SMALL)


# note: in a process of its own, so that an abort is seen. It says which flip it is at before each one.
FLIPS = """
import sys
from pathlib import Path
import numpy as np
from mesa_gguf import MesaConfig, MesaError, MesaLlama

source, target, seed, begin, end = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
data = bytearray(source.read_bytes())
header = data.index(b"output_norm.weight") + 60
random = np.random.default_rng(seed)
flips = [(int(random.integers(0, header)), int(random.integers(0, 8))) for _ in range(end)]
config = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=16)
for i in range(begin, end):
    place, bit = flips[i]
    print(i, place, bit, bytes(data[max(0, place - 30):place + 10]), flush=True)
    data[place] ^= 1 << bit
    target.write_bytes(data)
    data[place] ^= 1 << bit
    try:
        llm = MesaLlama(target, mesa=config, n_ctx=256, n_threads=1, n_threads_batch=1)
        llm.eval([t % llm.n_vocab() for t in range(200)])
        llm.close()
        print("loaded", flush=True)
    except MesaError as err:
        print("refused", err, flush=True)
"""


@pytest.mark.parametrize(
    "seed",
    [
        1,
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_bit_flips_in_a_header(model_path: ModelPath, tmp_path: Path, seed: int) -> None:
    """Each loads or raises a MesaError. All that abort are listed."""
    begin, end, failures = 0, 150, []
    while begin < end:
        done = run_python(FLIPS, str(model_path("llama")), str(tmp_path / "m.gguf"), str(seed), str(begin), str(end))
        if done.returncode == 0:
            break
        lines = [line for line in done.stdout.splitlines() if line[0].isdigit()]
        failures.append(f"{lines[-1]}: exit {done.returncode}: {' | '.join(done.stderr.strip().splitlines()[-2:])}")
        begin = int(lines[-1].split()[0]) + 1
    assert not failures, "\n".join(failures)


LAYERS = """
import sys
from mesa_gguf import MesaLlama, ModelError

try:
    MesaLlama(sys.argv[1])
except ModelError as err:
    print(err)
"""


@pytest.mark.parametrize("n_layer", [0, 513, 32770, 2**31 + 2])
def test_an_impossible_number_of_layers(model_path: ModelPath, tmp_path: Path, n_layer: int) -> None:
    """What a flipped bit in a header's block_count comes to."""
    data, key = bytearray(model_path("llama").read_bytes()), b"llama.block_count"
    place = data.index(key) + len(key) + 4  # after the type
    data[place : place + 4] = n_layer.to_bytes(4, "little")
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    done = run_python(LAYERS, str(path), timeout=20)
    assert done.returncode == 0, done.stderr[-500:]
    assert str(path) in done.stdout


# Models.

REASONS = {
    "bert": "architecture bert.*encoder-only",
    "mamba": "architecture mamba.*recurrent",
    "gpt2": "architecture gpt2.*learned absolute",
}


@pytest.mark.parametrize("name", REASONS)
def test_models_that_mesa_cannot_read_with(model_path: ModelPath, name: str) -> None:
    with pytest.raises(ModelError, match=REASONS[name]):
        MesaLlama(model_path(name), mesa=SMALL)


@pytest.mark.parametrize("name", ["mamba", "gpt2"])
def test_such_models_run_with_mesa_off(model_path: ModelPath, open_llama: Opener, name: str) -> None:
    llm = open_llama(model_path(name), MesaConfig(enabled=False), kv=1)
    assert read(llm, random_tokens(50)).shape == (50, 128)


# Options.


def test_chunks_that_do_not_fit(model_path: ModelPath) -> None:
    with pytest.raises(ConfigError, match=r"first_chunk \+ chunk is 140, more than reading_length \(128\).*at most 88"):
        MesaLlama(model_path("llama"), mesa=MesaConfig(first_chunk=40, chunk=100))


def test_a_stair_of_width_zero() -> None:
    with pytest.raises(ConfigError, match="stair_width is 0"):
        MesaConfig(stair_width=0)


@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_ubatch"])
@pytest.mark.parametrize("value", [-1, 1.5, "512", None, 2**31, True])
def test_sizes_that_are_none(model_path: ModelPath, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} is"):
        MesaLlama(model_path("llama"), mesa=SMALL, **{name: value})


@pytest.mark.parametrize("value", ["on", "", None, -1, 2])
def test_flash_attention_that_is_none_of_three(model_path: ModelPath, value: Any) -> None:
    with pytest.raises(ConfigError, match=r'flash_attn is .* True, False or "auto"'):
        MesaLlama(model_path("llama"), mesa=SMALL, flash_attn=value)


def test_heads_that_do_not_fill_a_block(model_path: ModelPath) -> None:
    """16 values a head, 2 heads: llama.cpp wants whole blocks of 32 in a head."""
    with pytest.raises(MesaError):
        MesaLlama(model_path("llama-gqa"), mesa=SMALL, type_k=Q8_0, type_v=Q8_0)


@pytest.mark.parametrize("name", ["type_k", "type_v"])
@pytest.mark.parametrize(
    "kv_type", [999, -1, 24, 12, 39, "f16"]
)  # none, int8, a K-quant, MXFP4: no KV caches, or llama.cpp crashes
def test_a_type_of_which_no_kv_cache_is(model_path: ModelPath, name: str, kv_type: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {kv_type!r}, .*8 \(q8_0\)"):
        MesaLlama(model_path("llama"), mesa=SMALL, **{name: kv_type})


def test_a_quantized_v_cache_without_flash_attention(model_path: ModelPath) -> None:
    with pytest.raises(MesaError, match="flash_attn"):
        MesaLlama(model_path("llama-head-size"), mesa=SMALL, type_v=Q8_0, flash_attn=False)


@pytest.mark.parametrize("n_ctx", [2**30, 2**31 - 1])
def test_too_little_memory(model_path: ModelPath, n_ctx: int) -> None:
    """Before anything is allocated: the message says what would fit."""
    with pytest.raises(OutOfMemoryError, match=r"n_ctx = \d+ tokens needs .* GiB.*make n_ctx \d+ or less"):
        MesaLlama(model_path("llama"), mesa=SMALL, n_ctx=n_ctx)


# Tokens.


def test_an_empty_prompt(model_path: ModelPath, open_llama: Opener) -> None:
    with pytest.raises(PromptError, match="empty"):
        open_llama(model_path("llama")).generate([])


@pytest.mark.parametrize("bad", [-1, 128, 2**31, -(2**40)])
def test_a_token_that_the_model_does_not_know(model_path: ModelPath, open_llama: Opener, bad: int) -> None:
    llm = open_llama(model_path("llama"))
    for act in (llm.eval, llm.generate):
        with pytest.raises(PromptError, match=f"token {bad} is not in the model's vocabulary of 128"):
            act([1, 2, bad, 3])
    assert llm.n_tokens == 0


def test_a_prompt_beyond_n_ctx(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    for act in (llm.eval, llm.generate):
        with pytest.raises(PromptError, match=r"600 tokens, more than n_ctx \(512\): make n_ctx 600"):
            act(random_tokens(600))
    assert llm.n_tokens == 0
    read(llm, random_tokens(400))


def test_generation_up_to_n_ctx(model_path: ModelPath, open_llama: Opener) -> None:
    """The token that does not fit any more is an error, not a crash, and not a silent one."""
    llm = open_llama(model_path("llama"))
    with pytest.raises(PromptError, match="n_ctx"):
        list(zip(range(20), llm.generate(random_tokens(500), temp=0.0)))
    assert llm.n_tokens == 512


def test_a_failed_load_leaves_nothing_open(model_path: ModelPath) -> None:
    """Many of them, and none holds a model's memory or stands in the way of the next."""
    for _ in range(30):
        with pytest.raises(ConfigError):
            MesaLlama(model_path("llama"), mesa=replace(SMALL, last_chunk=127))
        with pytest.raises(ModelError):
            MesaLlama(model_path("mamba"), mesa=SMALL)
    MesaLlama(model_path("llama"), mesa=SMALL).close()


def test_no_model_of_make_models_is_forgotten() -> None:
    assert set(REASONS) == set(make_models.REFUSED)


def test_tokens_that_are_none(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"))
    for call in (llm.eval, llm.log_likelihoods):
        for tokens in ("abc", b"abc", [1.5], ["1"], None, 5, [[1, 2]]):
            with pytest.raises(PromptError, match="list of tokens, whole numbers"):
                call(tokens)
    assert llm.n_tokens == 0


@pytest.mark.parametrize("config", [{}, 5, "mesa"])
def test_a_config_of_another_type(model_path: ModelPath, open_llama: Opener, config: Any) -> None:
    path = model_path("llama")
    with pytest.raises(ConfigError, match="must be a MesaConfig"):
        MesaLlama(path, mesa=config)
    with pytest.raises(ConfigError, match="must be a MesaConfig"):
        open_llama(path).reconfigure(config)


def test_a_context_that_changes_in_the_middle_of_a_text(model_path: ModelPath, open_llama: Opener) -> None:
    """A text that is being generated does not go on behind another one."""
    llm = open_llama(model_path("llama"))
    uses: list[Callable[[], object]] = [
        llm.reset,
        lambda: llm.reconfigure(SMALL),
        lambda: next(llm.generate([7, 8], temp=0)),
    ]
    for use in uses:
        text = llm.generate(random_tokens(20, seed=3), temp=0)
        next(text)
        next(text)
        use()
        with pytest.raises(MesaError, match="the context was changed while a text was generated"):
            next(text)
    begin = random_tokens(20, seed=3)
    expected = [token for token, _ in zip(llm.generate(begin, temp=0), range(4))]
    text = llm.generate(begin, temp=0)
    found = [next(text), next(text)]
    llm.eval([1, 2, 3])  # behind it: that is forgotten
    assert [*found, next(text), next(text)] == expected
