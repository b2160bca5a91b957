"""Generation and questions behind many keys: ggml's attention kernel and this project's in turn, on the same cache.

    python experiments/decode.py --shape smollm2-135m --kv f16 --keys 2048,8192,16384,32768
    python experiments/decode.py --shape smollm2-135m --kv f16 --keys 32768,65536 --read-budget 2048 --questions ""

The cache is filled without a prefill: one chunk is read and loaded again and again. Then tokens are generated one by one, kernel and kernel in
turn, so that a machine whose speed drifts slows both; questions of 32 and 256 tokens likewise. What the memory would allow is measured in the
same run: the bytes of the weights and the cache over the rate at which as many threads read an array.

With --read-budget tokens that read less (`MesaConfig.read_budget`) take turns too; of them the mean of a token that reads everything and of those
that follow until the next one is told. The time of a token behind 64 keys is what is no attention: matrices, and threads that wait for each other.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from pathlib import Path

import numpy as np

from mesa_gguf import MesaConfig, MesaLlama, _llama_cpp
from mesa_gguf.lab.bench.shapes import cached_model
from mesa_gguf.lab.bench.worker import bandwidth
from mesa_gguf.model.header import check_model
from mesa_gguf.model.memory import KV_TYPES

FIRST, CHUNK = 64, 448
KERNELS = {"stock": False, "ours": True}
CLOCK = [time.perf_counter]


def set_kernels(on: bool) -> None:
    """Whether the CPU backend computes with this project's kernels."""
    folder = _llama_cpp.LIBRARY_DIR
    ggml = ctypes.CDLL(str(next(path for path in folder.iterdir() if path.stem == "libggml")))
    base = ctypes.CDLL(str(next(path for path in folder.iterdir() if path.stem == "libggml-base")))
    ggml.ggml_backend_reg_by_name.restype = base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    registry = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"CPU"))
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_cpu_set_mesa_kernels")
    ctypes.CFUNCTYPE(None, ctypes.c_bool)(address)(on)


def timed(llm: MesaLlama, tokens: list[int], kernels: str) -> float:
    set_kernels(KERNELS[kernels])
    start = CLOCK[0]()
    llm.eval(tokens)
    llm._ctx.get_logits()
    return CLOCK[0]() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="default: random weights of --shape")
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--kv", default="f16", choices=sorted(KV_TYPES))
    parser.add_argument("--keys", default="2048,8192,16384,32768")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--read-budget", type=int, default=0, help="0: nothing reads less")
    parser.add_argument("--questions", default="32,256", help="lengths in tokens; empty: none")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, with --threads 1: for a machine that does other things"
    )
    args = parser.parse_args()
    if args.cpu_time:
        CLOCK[0] = time.process_time

    path = args.model or cached_model(args.shape, args.quant)
    lengths = [int(n) for n in args.keys.split(",")]
    questions = [int(n) for n in args.questions.split(",") if n]
    kind = KV_TYPES[args.kv]
    header = check_model(path)
    llm = MesaLlama(
        path,
        mesa=MesaConfig(
            train_length=min(2048, header.train_length),
            first_chunk=FIRST,
            last_chunk=512,
            read_budget=args.read_budget,
            tuned=False,
        ),
        n_ctx=max(lengths) + 1024,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, llm.n_vocab(), FIRST + CHUNK).tolist()
    llm.eval(tokens[:FIRST])
    first = llm.save_chunk(0, FIRST)
    llm.eval(tokens[FIRST:])
    chunk = llm.save_chunk(FIRST, FIRST + CHUNK)

    kv_bytes = len(chunk) / CHUNK
    rate = bandwidth(args.threads)
    print(f"{path.name}, KV {args.kv}, {args.threads} threads; the memory: {rate / 1e9:.1f} GB/s")
    print(
        "keys | tokens/s: stock | ours | ratio | of the memory's limit: stock | ours | attention's share of the time: stock | ours"
    )
    llm.eval(tokens[:4])
    bare = {name: statistics.median(timed(llm, [tokens[i]], name) for i in range(args.runs)) for name in KERNELS}
    print(f"behind {llm.n_tokens} keys: {1 / bare['stock']:.1f} | {1 / bare['ours']:.1f}")
    for length in lengths:
        llm.reset()
        llm.load_chunk(tokens[:FIRST], first)
        while llm.n_tokens + CHUNK <= length:
            llm.load_chunk(tokens[FIRST:], chunk)
        n_keys = llm.n_tokens
        llm.eval(tokens[:4])
        seconds: dict[str, list[float]] = {name: [] for name in KERNELS}
        whole: list[float] = []
        less: list[float] = []
        for i in range(args.runs):
            llm.set_read_ranges([(0, llm.n_tokens)])  # everything
            for name in KERNELS:
                seconds[name].append(timed(llm, [tokens[i]], name))
            if 0 < args.read_budget < n_keys - 1024:
                llm.set_read_ranges(None)
                whole.append(timed(llm, [tokens[i]], "ours"))
                less += [timed(llm, [token], "ours") for token in tokens[:3]]
                assert llm.read_ranges() is not None
        speeds = {name: 1 / statistics.median(values) for name, values in seconds.items()}
        limit = rate / (path.stat().st_size + n_keys * kv_bytes)
        print(
            f"{n_keys} | {speeds['stock']:.1f} | {speeds['ours']:.1f} | {speeds['ours'] / speeds['stock']:.2f} | "
            f"{speeds['stock'] / limit:.0%} | {speeds['ours'] / limit:.0%} | "
            f"{1 - bare['stock'] * speeds['stock']:.0%} | {1 - bare['ours'] * speeds['ours']:.0%}",
            flush=True,
        )
        if less:
            every = llm._params.read_every
            mean = (statistics.median(whole) + (every - 1) * statistics.median(less)) / every
            print(
                f"  reading {args.read_budget}: {1 / mean:.1f} tokens/s, {speeds['stock'] ** -1 / mean:.2f} x stock, {speeds['ours'] ** -1 / mean:.2f} x ours; "
                f"ms: {1000 * statistics.median(whole):.1f} reads everything and chooses, {1000 * statistics.median(less):.1f} the others",
                flush=True,
            )
        for n in questions:
            times: dict[str, list[float]] = {name: [] for name in KERNELS}
            for _ in range(3):
                for name in KERNELS:
                    llm.n_tokens = n_keys
                    times[name].append(timed(llm, (tokens * n)[:n], name))
            medians = {name: statistics.median(values) for name, values in times.items()}
            print(
                f"  a question of {n}: {medians['stock']:.2f} s, {medians['ours']:.2f} s, {medians['stock'] / medians['ours']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
