"""Speed and memory of Mesa against the unpatched llama.cpp, on random-weight models of real shapes.

    make bench ARGS="--shape 135m --tokens 2048 8192 16384 32768"

Each measurement is a process of its own; the libraries take turns, and the medians are compared. Reads need a machine
that does nothing else. What it checks is what the project promises (see docs/BENCHMARKS.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_model

ROOT = Path(__file__).resolve().parent.parent
MODES = ("stock", "off", "mesa")


def stock_lib() -> Path | None:
    """The folder of the unpatched library that `make stock` builds."""
    folder = Path(os.environ.get("MESA_STOCK_LIB", ROOT / "build" / "stock" / "lib"))
    return folder if any(folder.glob("libllama.*")) else None


def measure(mode: str, model: Path, tokens: int, n_ctx: int, args: argparse.Namespace) -> dict[str, Any]:
    """One process of worker.py."""
    env = dict(os.environ)
    env.pop("LLAMA_CPP_LIB_PATH", None)
    if mode == "stock":
        env["LLAMA_CPP_LIB_PATH"] = str(stock_lib())
    command = [
        sys.executable, str(Path(__file__).with_name("worker.py")), mode, str(model), "--tokens", str(tokens),
        "--n-ctx", str(n_ctx), "--decode", str(args.decode), "--threads", str(args.threads), "--kv-type", str(args.kv_type),
        "--n-ubatch", str(args.n_ubatch),
    ]  # fmt: skip
    if args.no_flash_attn:
        command.append("--no-flash-attn")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{mode} at {tokens} tokens failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=make_model.SHAPES, default="135m")
    parser.add_argument("--quant", choices=["q8_0", "q4_0"], default="q8_0")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384, 32768])
    parser.add_argument("--stock-max", type=int, default=32768, help="longest text that stock and off read (they slow down)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after each text")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--n-ubatch", type=int, default=512)
    parser.add_argument("--kv-type", type=int, default=1, help="ggml type of the KV cache: 1 f16, 8 q8_0")
    parser.add_argument("--no-flash-attn", action="store_true")
    parser.add_argument("--output", type=Path, help="write all measurements as JSON")
    args = parser.parse_args()

    if "stock" in args.modes and stock_lib() is None:
        raise SystemExit("no unpatched library: run `make stock` first, or leave stock out of --modes")

    model = ROOT / "build" / "bench" / f"{args.shape}-{args.quant}.gguf"
    if not model.exists():
        make_model.write(model, make_model.SHAPES[args.shape], args.quant)

    print(f"{args.shape} {args.quant}, T = {make_model.TRAIN_LENGTH}, KV type {args.kv_type}, "
          f"flash attention {'off' if args.no_flash_attn else 'on'}, n_ubatch {args.n_ubatch}, {args.threads} threads, "
          f"{cpu_name()}, median of {args.runs}, modes in turn")  # fmt: skip
    print(f"{'tokens':>7} {'mode':>6} {'prefill s':>10} {'tok/s':>8} {'decode tok/s':>13} {'peak MiB':>9}   against stock: prefill, decode, memory")

    results: dict[str, Any] = {"args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, "cpu": cpu_name(), "runs": []}
    # the lengths take turns as well, so that a machine whose speed drifts does not favour one of them
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _ in range(args.runs):
        for tokens in args.tokens:
            for mode in args.modes:
                if mode == "mesa" or tokens <= args.stock_max:
                    run = measure(mode, model, tokens, tokens + 256, args)  # n_ctx: the same for every mode
                    runs.setdefault((tokens, mode), []).append(run)
                    results["runs"].append(run)
                    print(json.dumps(run), file=sys.stderr, flush=True)

    prefill: dict[int, float] = {}
    for tokens in args.tokens:
        stock = runs.get((tokens, "stock"))
        for mode in (mode for mode in args.modes if (tokens, mode) in runs):
            seconds, step, peak = (median(runs[tokens, mode], key) for key in ("prefill_s", "decode_s", "peak_bytes"))
            ratio = ""
            if stock:
                base = [median(stock, key) for key in ("prefill_s", "decode_s", "peak_bytes")]
                ratio = f"   {seconds / base[0]:.3f} of its time, {base[1] / step:.3f} of its speed, {peak / base[2]:.3f}"
            print(f"{tokens:>7} {mode:>6} {seconds:>10.2f} {tokens / seconds:>8.1f} {1 / step:>13.1f} {peak / 2**20:>9.0f}{ratio}", flush=True)
            if mode == "mesa":
                prefill[tokens] = seconds
    if len(prefill) > 1:
        first = min(prefill)
        for tokens in sorted(prefill)[1:]:
            print(f"mesa: prefill of {tokens} tokens costs {prefill[tokens] / (prefill[first] * tokens / first):.3f} of {tokens / first:g} x that of {first}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
