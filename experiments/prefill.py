"""Reading a text with ggml's kernels and with this project's, in turns in one process; or what loading takes, and memory.

    python experiments/prefill.py --shape qwen2.5-0.5b --quants q4_0,q4_k_m,q5_0,q6_k --tokens 2048
    python experiments/prefill.py -m SmolLM2-135M-Instruct.Q4_1.gguf --tokens 16384
    python experiments/prefill.py --load --shape llama-3.2-1b --quants q4_k_m --tokens 512

Seconds are of the processor with one thread, so that a machine that does other things changes them less; with more they are the clock's.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from decode import KERNELS, set_kernels  # beside this script

from mesa_gguf import MesaConfig, MesaLlama
from mesa_gguf.lab.bench.shapes import cached_model


def load(path: Path, n_tokens: int) -> None:
    """Print the seconds that loading takes, and the MiB of this process at most once a text was read."""
    start = time.process_time()
    llm = MesaLlama(
        path, mesa=MesaConfig(tuned=False), n_ctx=n_tokens + 512, n_threads=1, n_threads_batch=1, verbose=False
    )
    seconds = time.process_time() - start
    llm.eval(np.random.default_rng(0).integers(0, llm.n_vocab(), n_tokens).tolist())
    print(f"{seconds:.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f}")


def loads(path: Path, n_tokens: int, runs: int) -> None:
    """Load with both kernels, by turns, in processes of their own."""
    measured: dict[str, list[list[float]]] = {"stock": [], "mesa": []}
    for _ in range(runs):
        for name, results in measured.items():
            command = [sys.executable, __file__, "--load-one", "--tokens", str(n_tokens), "-m", str(path)]
            environment = {**os.environ, "MESA_KERNELS": name}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results.append([float(word) for word in done.stdout.split()])
    (stock_s, stock_mib), (ours_s, ours_mib) = (
        [statistics.median(values) for values in zip(*results)] for results in measured.values()
    )
    print(
        f"{path.name} | {stock_s:.2f} | {ours_s:.2f} | {stock_mib:.0f} | {ours_mib:.0f} | {ours_mib / stock_mib:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="default: random weights of --shape")
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--quants", default="q4_0,q4_1,q5_0,q8_0,q4_k_m,q5_k_m,q6_k")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load", action="store_true", help="measure loading and memory instead")
    parser.add_argument("--load-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_one:
        load(args.model, args.tokens)
        return
    paths = [args.model] if args.model else [cached_model(args.shape, quant) for quant in args.quants.split(",")]
    if args.load:
        print("model | loading, s of the processor: ggml's kernels | ours | memory, MiB: ggml's | ours | ratio")
        for path in paths:
            loads(path, args.tokens, args.runs)
        return

    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(f"{args.tokens} tokens, {args.threads} threads\nmodel | tokens/s: ggml's kernels | ours | ratio")
    for path in paths:
        llm = MesaLlama(
            path,
            mesa=MesaConfig(tuned=False),
            n_ctx=args.tokens + 512,
            n_threads=args.threads,
            n_threads_batch=args.threads,
            verbose=False,
        )
        tokens = np.random.default_rng(0).integers(0, llm.n_vocab(), args.tokens).tolist()
        speeds: dict[str, list[float]] = {name: [] for name in KERNELS}
        llm.eval(tokens[:32])  # the weights are in memory then
        for _ in range(args.runs):
            for name, on in KERNELS.items():
                set_kernels(on)
                llm.reset()
                start = clock()
                llm.eval(tokens)
                speeds[name].append(args.tokens / (clock() - start))
        llm.close()
        stock, ours = (statistics.median(speeds[name]) for name in ("stock", "ours"))
        shown = (", ".join(f"{speed:.0f}" for speed in speeds[name]) for name in ("stock", "ours"))
        print(f"{path.name} | {' | '.join(shown)} | {ours / stock:.2f}", flush=True)


if __name__ == "__main__":
    main()
