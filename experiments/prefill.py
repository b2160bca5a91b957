"""Reading a text with ggml's kernels and with this project's, in turns in one process.

    python experiments/prefill.py --shape qwen2.5-0.5b --quants q4_0,q4_k_m,q5_0,q6_k --tokens 2048
    python experiments/prefill.py -m SmolLM2-135M-Instruct.Q4_1.gguf --tokens 16384

Seconds are of the processor with one thread, so that a machine that does other things changes them less; with more they are the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from decode import KERNELS, set_kernels  # beside this script

from mesa_gguf import MesaConfig, MesaLlama
from mesa_gguf.lab.bench.shapes import cached_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="default: random weights of --shape")
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--quants", default="q4_0,q4_1,q5_0,q8_0,q4_k_m,q5_k_m,q6_k")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(f"{args.tokens} tokens, {args.threads} threads\nmodel | tokens/s: ggml's kernels | ours | ratio")
    for path in [args.model] if args.model else [cached_model(args.shape, quant) for quant in args.quants.split(",")]:
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
