"""Every architecture of llama.cpp, as a tiny random model (arch_models.py): read by Mesa, or refused by name.

The oracle is an unpatched llama.cpp that plays the method with its public API (stock_oracle.py). What is supported is asked
of the engine; models with sliding windows, where that oracle does not apply, have the NumPy one (test_engine.py) and checks
of their own here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import arch_models
import arch_table
import oracle
from arch_models import MODELS, T
from conftest import SMALL, Opener, oracle_read, random_tokens, read, stock_kernels, worst
from mesa_gguf import MesaLlama, MesaPlan, ModelError
from mesa_gguf.model.header import check_model
from stock_oracle import ByHand

DEFAULT = (
    "llama qwen2 qwen3 mistral3 phi3 phi2 gptneox mpt baichuan bloom falcon stablelm olmo2 granite gemma starcoder2 qwen2moe "
    "smollm3 hunyuan-dense gemma2 gemma3 gpt-oss cohere2 qwen2vl"
).split()
DEFAULT_FLASH = "llama qwen3 mpt smollm3 qwen2moe gpt-oss".split()
FLASH_EXPERT = 0.5  # where a token goes to another expert; seen: 0.21, a plain reading is apart by 2

# chunks of 64 tokens or more, and an anchor inside the third: what is read under it stands partly on the stair
PLAN = MesaPlan([0, 12, 112, 198, 300], anchor=288, stair_width=8)
WRONG = MesaPlan([0, 12, 112, 198, 300], anchor=288, stair_width=16)
N_PROMPT, N_REST = 370, 24  # the answer outgrows T once, and the anchor moves

EXACT = 1e-4  # f32 throughout; seen: 0.00001
GELU = 2e-3  # ggml looks GELU up in a table of f16
NEXT_ENTRY = 0.02  # of a token in a hundred: a last bit that differs leads to the next entry of that table
DEEP = 20  # layers; errors of all add up
GELU_ARCHITECTURES = (
    "bloom codeshell falcon gemma gemma2 gemma3 gptneox grok mpt phi2 pockettts spark2_5 starcoder2".split()
)
FLASH = (
    0.02  # from the last chunk on, flash attention rounds keys and values to f16; seen: 0.004, with many layers 0.028
)
SUMS = 0.1  # and for under 64 queries it sums values in f16, which the NumPy oracle and our kernels do not; seen: 0.064
WITHOUT_FLASH = {"grok"}  # llama.cpp turns it off

ORACLE = 5e-3  # GELU, which a norm follows in Gemma

FELT = 0.05  # a wrong plan costs at least this

LONG = 2e-3  # angles of thousands of positions, rounded to f32

NO_ROPE: tuple[int, ...] = ()

BY_HAND = {
    "mpt": ByHand(NO_ROPE),
    "mpt:nope": ByHand(NO_ROPE),
    "granite:nope": ByHand(NO_ROPE),
    "bloom": ByHand(NO_ROPE),
    "refact": ByHand(NO_ROPE),
    "jais": ByHand(NO_ROPE),
    "baichuan:13b": ByHand(NO_ROPE),
    "smollm3": ByHand((0, 1, 2)),
    "hunyuan-dense": ByHand(norm_after=True),
    "hunyuan-moe": ByHand(norm_after=True),
    "hunyuan_vl": ByHand(norm_after=True),
    "hunyuan_vl:mrope": ByHand(norm_after=True),
    "maincoder": ByHand(norm_after=True),
    **{name: ByHand() for name in "qwen2vl qwen3vl qwen3vlmoe paddleocr glm4:mrope glm4moe:mrope qwen3tts".split()},
}
"""Where stock llama.cpp's own shift of keys is missing or not exact; see stock_oracle.py."""

GLOBAL_WITHOUT_ROPE = (
    "cohere2 cohere2moe exaone4:windows exaone-moe muse-glimmer llama4 afmoe smallthinker:windows maple"
).split()
BY_HAND |= dict.fromkeys(GLOBAL_WITHOUT_ROPE, ByHand(NO_ROPE)) | {"step35": ByHand(n_rot=8)}
BY_HAND["deepseek2-ocr"] = ByHand(rope_type=2)  # NEOX

FEELS_NO_POSITIONS = {"granite:nope", "mpt:nope", *GLOBAL_WITHOUT_ROPE}

NO_ORDINARY_CACHE = dict.fromkeys(["minimax-m3", "wavtokenizer-dec"], "it does not use the ordinary KV cache")
"""What a context shows and a model does not."""

ORACLES = ["gemma2", "gemma3", "olmo2:windows", "cohere2", "smollm3"]
"""Models that the NumPy oracle knows too."""


def marked(name: str, *more: Any, quick: Sequence[str] = DEFAULT) -> Any:
    return pytest.param(name, *more, marks=() if name in quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def arch_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a model of arch_models.py, by name."""
    folder = tmp_path_factory.mktemp("archs")
    made: dict[str, Path | str] = {}  # the default ones at once, others when they are asked for

    def path(name: str) -> Path:
        if name not in made:
            made.update(arch_models.make(DEFAULT if name in DEFAULT else [name], folder))
        result = made[name]
        assert isinstance(result, Path), f"{name}: {result}"
        return result

    return path


def has_windows(name: str) -> bool:
    return bool(MODELS[name].metadata.get("attention.sliding_window"))


def n_vocab(name: str) -> int:
    return min(128, MODELS[name].all_metadata()["vocab_size"])


def read_all(llm: MesaLlama, prompt: list[int], rest: list[int]) -> tuple[NDArray[np.float32], list[MesaPlan]]:
    """A prompt, then tokens one by one -> the logits of all, the plan after the prompt and after each token."""
    logits, plans = [read(llm, prompt)], [llm.plan()]
    for token in rest:
        logits.append(read(llm, [token]))
        plans.append(llm.plan())
    return np.concatenate(logits), plans


def apart(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest difference of each row. note: Chameleon gives image tokens the lowest number there is, in the first row of each
    ubatch only."""
    return np.where((a > -1e30) & (b > -1e30), np.abs(a - b), 0).max(axis=1)


def has_gelu(name: str) -> bool:
    return MODELS[name].architecture in GELU_ARCHITECTURES


def is_deep(name: str) -> bool:
    return MODELS[name].all_metadata()["block_count"] >= DEEP


def has_experts(name: str) -> bool:
    return MODELS[name].all_metadata().get("expert_count", 0) > 0


def limit(name: str, flash: bool) -> float:
    return (FLASH if flash else GELU if has_gelu(name) else EXACT) * (3 if is_deep(name) else 1)


RunOracle = Callable[..., dict[str, NDArray[np.float32]]]


@pytest.fixture(scope="module")
def run_oracle(stock_lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunOracle]:
    """Asks stock_oracle.py, in a process that is kept, because it takes longer to start than to answer."""
    folder = tmp_path_factory.mktemp("oracle")
    program, out = Path(__file__).with_name("stock_oracle.py"), folder / "out.npz"
    processes: list[subprocess.Popen[str]] = []
    with (folder / "stderr").open("w+") as stderr:

        def ask(**request: Any) -> dict[str, NDArray[np.float32]]:
            if not processes or processes[-1].poll() is not None:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, program, out],
                        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_lib), "GGML_NO_BACKTRACE": "1"},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                )
            process = processes[-1]
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            if process.stdout.readline() != "done\n":
                process.wait()
                stderr.seek(0)
                raise AssertionError(stderr.read())
            return dict(np.load(out))

        yield ask
        for process in processes:
            with process:
                pass


@pytest.mark.parametrize(
    ("name", "flash"),
    [*(marked(name, False) for name in MODELS), *(marked(name, True, quick=DEFAULT_FLASH) for name in MODELS)],
)
def test_against_stock(
    arch_path: Callable[[str], Path], open_llama: Opener, run_oracle: RunOracle, name: str, flash: bool
) -> None:
    """Inside T bit-identical to stock; chunks, last chunk and answer as stock llama.cpp computes them when it is led through
    the method by its own API. A model that Mesa does not support is refused, with the reason."""
    path = arch_path(name)
    reason = check_model(path).unsupported or NO_ORDINARY_CACHE.get(name)
    if reason is not None:
        with pytest.raises(ModelError, match=re.escape(f"(architecture {MODELS[name].architecture}): {reason}")):
            open_llama(path, flash=flash)
        return

    short = random_tokens(100, seed=1)
    prompt, rest = random_tokens(N_PROMPT, seed=2), random_tokens(N_REST, seed=3)

    config = replace(SMALL, log_scaling=False)
    with stock_kernels():
        inside = read(open_llama(path, config, flash=flash), short)
    assert np.isfinite(inside).all()

    if has_windows(name):
        # the oracle knows nothing of windows: here those layers add nothing, below these ones do
        stock = run_oracle(path=str(path), flash=flash, short=short, prompt=prompt, rest=[], starts=[])
        assert np.array_equal(inside, stock["short"])
        path = arch_path(f"{name}/global")
        with stock_kernels():
            inside = read(open_llama(path, config, flash=flash), short)

    # one chunk in a batch: the later ones read the first from the cache
    options: dict[str, Any] = dict(flash=flash, n_batch=128, n_ubatch=128)
    with stock_kernels():
        mesa, plans = read_all(open_llama(path, replace(config, plan=PLAN), **options), prompt, rest)
    assert plans[0] == PLAN and plans[-1].anchor > PLAN.anchor
    assert plans[-1].stair_width == PLAN.stair_width

    by_hand = BY_HAND.get(name)
    flash = flash and name not in WITHOUT_FLASH
    stock = run_oracle(
        path=str(path),
        flash=flash,
        by_hand=by_hand and asdict(by_hand),
        short=short,
        prompt=prompt,
        rest=rest,
        starts=PLAN.chunk_starts,
        plans=[[plan.anchor, plan.stair_width] for plan in plans],
        wrong=[WRONG.anchor, WRONG.stair_width],
    )
    assert np.array_equal(inside, stock["short"])

    last = PLAN.last_start
    chunks, later = apart(mesa[:last], stock["chunks"]), apart(mesa[last:], stock["whole"][last:])
    exact = chunks if flash else np.concatenate([chunks, later])
    usual, largest = np.quantile(exact, 0.9), exact.max()
    if has_gelu(name):
        exact[exact > np.quantile(exact, 0.99)] = 0
    felt = apart(stock["wrong"][last:], stock["whole"][last:N_PROMPT]).max()
    plain = apart(stock["plain"], stock["whole"][last:N_PROMPT]).max()
    scale = np.abs(mesa[mesa > -1e30]).max()
    print(
        f"\n{name}, flash {flash}: exact {exact.max():.6f}, of nine in ten {usual:.6f}, largest {largest:.6f}; last chunk and answer {later.max():.6f}; scale {scale:.1f}, wrong plan {felt:.3f}, plain {plain:.3f}"
    )

    assert np.isfinite(mesa).all()
    assert exact.max() <= limit(name, False)
    if has_gelu(name):
        assert largest <= NEXT_ENTRY
    if flash:
        assert later.max() <= limit(name, True)
        own, _ = read_all(open_llama(path, replace(config, plan=PLAN), **options), prompt, rest)
        sums = apart(own, mesa)
        if has_experts(name):  # a rounding chooses another expert, now and then
            assert sums.max() <= FLASH_EXPERT
            sums = sums[sums <= np.quantile(sums, 0.98)]
        assert sums.max() <= SUMS * (3 if is_deep(name) else 1)
    else:  # without that table nothing is beyond this in a model with GELU either
        assert usual <= EXACT * (3 if is_deep(name) else 1)
    assert plain > FELT
    assert felt > FELT or name in FEELS_NO_POSITIONS


@pytest.mark.parametrize("name", ORACLES)
def test_the_numpy_oracle_is_stock(arch_path: Callable[[str], Path], run_oracle: RunOracle, name: str) -> None:
    """Sliding windows, layers without RoPE, norms of heads and soft caps, inside T."""
    tokens = random_tokens(100, seed=1)
    stock = run_oracle(path=str(arch_path(name)), flash=False, short=tokens, prompt=[], rest=[], starts=[])
    error = worst(oracle.logits(oracle.Model.from_gguf(arch_path(name)), tokens), stock["short"])
    print(f"\n{name}: {error:.6f}")
    assert error <= ORACLE


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_against_the_numpy_oracle(arch_path: Callable[[str], Path], open_llama: Opener, name: str, flash: bool) -> None:
    """Where the way through stock llama.cpp does not lead: windows see their true neighbours, the other layers weave."""
    path = arch_path(name)
    reason = check_model(path).unsupported
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    prompt, rest = random_tokens(380, seed=5), random_tokens(60, seed=6)
    llm = open_llama(path, flash=flash)
    state = oracle.State(oracle.Model.from_gguf(path, kv_half=flash), log_scaling_T=T)

    errors, moves = [worst(read(llm, prompt), oracle_read(state, llm.plan(), prompt))], 0
    for token in rest:
        before = llm.plan()
        logits = read(llm, [token])
        moves += llm.plan() != before
        errors.append(worst(logits, oracle_read(state, llm.plan(), [token])))
    print(f"\n{name}, flash {flash}: prompt {errors[0]:.6f}, generation {max(errors[1:]):.6f}, {moves} moves")
    assert moves >= 1
    assert max(errors) <= (SUMS if flash else ORACLE)  # token by token


@pytest.mark.parametrize("name", [marked(name) for name in MODELS if has_windows(name)])
def test_windows_are_those_of_stock(
    arch_path: Callable[[str], Path], open_llama: Opener, run_oracle: RunOracle, name: str
) -> None:
    """Where only the attention of sliding-window layers counts, a plan changes nothing: they see their true neighbours."""
    reason = check_model(arch_path(name)).unsupported
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    path, prompt, rest = arch_path(f"{name}/windows"), random_tokens(N_PROMPT, seed=2), random_tokens(N_REST, seed=3)
    mesa, plans = read_all(open_llama(path, replace(SMALL, plan=PLAN), n_batch=128, n_ubatch=128), prompt, rest)
    assert plans[0] == PLAN and plans[-1].anchor > PLAN.anchor
    stock = run_oracle(path=str(path), flash=False, short=prompt + rest, prompt=[], rest=[], starts=[])
    error = worst(mesa, stock["short"])
    print(f"\n{name}: {error:.6f}; scale {np.abs(mesa).max():.1f}")
    assert error <= 5 * limit(name, False)  # queries and keys are rotated twice: seen 0.0001, with GELU 0.001


# (tokens, whether they are chunks of the text in turn rather than a window that slides): llama.cpp's own numbers
LONG_WINDOWS = {"smallthinker:windows": (4096, False), "llama4": (8192, True)}
EDGE = 20  # tokens before and after it


@pytest.mark.slow
@pytest.mark.parametrize(("generated", "swa_full"), [(False, True), (True, False)])
@pytest.mark.parametrize("name", LONG_WINDOWS)
def test_windows_at_their_edge(
    arch_path: Callable[[str], Path],
    open_llama: Opener,
    run_oracle: RunOracle,
    name: str,
    generated: bool,
    swa_full: bool,
) -> None:
    """Windows so long that no other test leaves them: where they end inside a middle chunk, and during generation. Stock
    llama.cpp says what is seen, and that it is felt when one token less is."""
    size, chunked = LONG_WINDOWS[name]
    path, start = arch_path(f"{name}/windows"), size - EDGE
    prompt = random_tokens(size - 5 if generated else size + 200, seed=2)
    rest = random_tokens(5 + EDGE, seed=3)
    llm = open_llama(path, n_ctx=size + 256, swa_full=swa_full)
    mesa, plans = read_all(llm, prompt, rest)
    assert plans[0].last_start > size + EDGE or generated
    assert plans[0].anchor > size - 3 * T and plans[0].stair_width > 1

    edge = dict(start=start, window=size, chunked=chunked)
    text = prompt + rest
    stock = run_oracle(path=str(path), flash=False, short=text, prompt=[], rest=[], starts=[], edge=edge)
    seen, felt = worst(stock["seen"], stock["short"][start:]), worst(stock["narrow"], stock["short"][start:])
    error = worst(mesa[start:], stock["short"][start:])
    print(f"\n{name}, generated {generated}, swa_full {swa_full}: {error:.6f}; seen {seen:.6f}, one less {felt:.4f}")
    assert max(error, seen) <= LONG
    assert felt > 5 * LONG


@pytest.mark.parametrize("name", [marked(name) for name in MODELS if has_windows(name)])
def test_windows_in_batches_of_any_size(arch_path: Callable[[str], Path], open_llama: Opener, name: str) -> None:
    path = arch_path(name)
    reason = check_model(path).unsupported
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    tokens = random_tokens(N_PROMPT, seed=2)
    expected = read(open_llama(path), tokens)
    assert np.isfinite(expected).all()
    for n_batch, n_ubatch in [(512, 64), (100, 100), (37, 37), (64, 7)]:
        error = worst(read(open_llama(path, n_batch=n_batch, n_ubatch=n_ubatch), tokens), expected)
        print(f"\n{name}, n_batch {n_batch}, n_ubatch {n_ubatch}: {error:.6f}")
        assert error <= max(ORACLE, limit(name, False))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_keys_placed_by_hand_are_those_that_llama_cpp_shifts(
    arch_path: Callable[[str], Path], run_oracle: RunOracle, name: str
) -> None:
    """The oracle's two ways, where both lead."""
    prompt, rest = random_tokens(N_PROMPT, seed=2), random_tokens(3, seed=3)
    plans = [[288, 8], [288, 8], [328, 8], [328, 8]]
    ways = [
        run_oracle(
            path=str(arch_path(name)),
            flash=False,
            by_hand=by_hand,
            short=prompt[:10],
            prompt=prompt,
            rest=rest,
            starts=PLAN.chunk_starts,
            plans=plans,
            wrong=[WRONG.anchor, WRONG.stair_width],
        )["whole"]
        for by_hand in (None, asdict(ByHand()))
    ]
    assert 0 < worst(*ways) <= 1e-4


def test_every_architecture_has_a_model() -> None:
    """A new llama.cpp's new architectures are noticed here."""
    listed = set(arch_table.architectures())
    made = {model.architecture for model in MODELS.values()}
    assert listed == made | set(arch_table.NOT_MADE)
    assert not made & set(arch_table.NOT_MADE)


@pytest.mark.slow  # each model is made and opened: 16 s
def test_the_table_is_as_the_engine_says() -> None:
    """docs/ARCHITECTURES.md; python tests/arch_table.py writes it."""
    assert arch_table.difference() == ""
