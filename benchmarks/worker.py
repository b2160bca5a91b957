"""One measurement in a process of its own: prefill and decode of random tokens; prints a line of JSON.

Run by speed.py, with LLAMA_CPP_LIB_PATH at the library that is to be measured. Modes: "stock" is that library through
llama_cpp, "off" the patched library with Mesa off, "mesa" with it on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def load(args: argparse.Namespace) -> Any:
    options = dict(
        n_ctx=args.n_ctx, n_batch=args.n_batch, n_ubatch=args.n_ubatch, n_threads=args.threads,
        n_threads_batch=args.threads, flash_attn=not args.no_flash_attn, type_k=args.kv_type, type_v=args.kv_type, verbose=False,
    )  # fmt: skip
    if args.mode == "stock":
        import llama_cpp

        return llama_cpp.Llama(args.model, **options)
    from mesa_gguf import MesaConfig, MesaLlama

    return MesaLlama(args.model, mesa=MesaConfig(enabled=args.mode == "mesa"), **options)


def state_path(path: Path, mode: str) -> Path:
    """A Mesa context saves its plan too, stock llama.cpp takes the keys and values alone."""
    return path.with_suffix(".mesa") if mode == "mesa" else path


def save_state(llm: Any, path: Path) -> None:
    """Write the state as a Mesa context takes it, and as stock llama.cpp does (whose timing cares not where keys stand)."""
    import llama_cpp

    size = llama_cpp.llama_state_get_size(llm._ctx.ctx)
    buffer = (ctypes.c_uint8 * size)()
    data = memoryview(buffer)[: llama_cpp.llama_state_get_data(llm._ctx.ctx, buffer, size)].cast("B")
    state_path(path, "mesa").write_bytes(data)

    # the architecture's name with its length, then, behind "+mesa", the Mesa part with its length
    rest = 4 + int.from_bytes(data[:4], "little")
    name = bytes(data[4:rest]).removesuffix(b"+mesa")
    rest += 4 + int.from_bytes(data[rest : rest + 4], "little")
    with path.open("wb") as file:
        file.write(len(name).to_bytes(4, "little") + name)
        file.write(data[rest:])


def load_state(llm: Any, path: Path, n_tokens: int) -> None:
    import llama_cpp

    data = bytearray(path.read_bytes())
    buffer = (ctypes.c_uint8 * len(data)).from_buffer(data)
    if llama_cpp.llama_state_set_data(llm._ctx.ctx, buffer, len(data)) != len(data):
        raise SystemExit(f"{path}: cannot be loaded")
    llm.n_tokens = n_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["stock", "off", "mesa"])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--save-state", type=Path, help="mesa: write the cache after reading")
    parser.add_argument("--load-state", type=Path, help="take the cache from there instead of reading: decode alone")
    parser.add_argument("--n-ctx", type=int, required=True)
    parser.add_argument("--n-batch", type=int, default=2048)
    parser.add_argument("--n-ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-type", type=int, default=1)
    parser.add_argument("--no-flash-attn", action="store_true")
    args = parser.parse_args()

    llm = load(args)
    tokens = np.random.default_rng(0).integers(0, llm.n_vocab(), args.tokens + args.decode).tolist()

    llm.eval(tokens[:32])  # warm up: pages of the weights, threads
    llm.reset()

    start = time.perf_counter()
    if args.load_state:
        load_state(llm, state_path(args.load_state, args.mode), args.tokens)
    else:
        llm.eval(tokens[: args.tokens])
        llm._ctx.get_logits()  # waits until it is computed
    prefill = time.perf_counter() - start
    if args.save_state:
        save_state(llm, args.save_state)

    steps = []
    for token in tokens[args.tokens :]:
        start = time.perf_counter()
        llm.eval([token])
        llm._ctx.get_logits()
        steps.append(time.perf_counter() - start)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({
        "mode": args.mode, "tokens": args.tokens, "prefill_s": prefill,
        "decode_s": float(np.median(steps)) if steps else None, "peak_bytes": peak,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
