"""What it costs to know what each token of an answer attends to: time for a token with it and without, in turns, in one process.

python experiments/attention_cost.py -m model.gguf --keys 2048 16384
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from mesa_gguf import MesaLlama
from mesa_gguf.lab.facts import default_text

CHUNK = 1000  # tokens; loaded again and again, until there are enough keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--keys", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--tokens", type=int, default=12, help="in each turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()

    llm = MesaLlama(args.model, n_ctx=max(args.keys) + 1024)
    text = llm.tokenize(default_text()[: 12 * CHUNK].encode())
    first, chunk, answer = text[:20], text[20 : 20 + CHUNK], text[-args.tokens :]
    llm.eval(first)
    llm.eval(chunk)
    rows = llm.save_chunk(len(first), len(first) + len(chunk))
    for keys in args.keys:
        llm.reset()
        llm.eval(first)
        while llm.n_tokens + CHUNK <= keys:
            llm.load_chunk(chunk, rows)
        llm.eval(text[-40:])
        n = llm.n_tokens
        times: dict[int, list[float]] = {layers: [] for layers in (0, *args.layers)}
        for _ in range(args.turns):
            for layers, taken in times.items():
                llm.disable_attention()
                if layers:
                    llm.enable_attention(layers, "max")
                llm.eval([answer[0]])  # the graph is made anew
                for token in answer[1:]:
                    start = time.perf_counter()
                    llm.eval([token])
                    llm._get_logits(llm.n_tokens - 1)
                    if layers:
                        llm.attention()
                    taken.append(time.perf_counter() - start)
                llm.n_tokens = n
        off = median(times[0])
        print(f"{n} keys: {1000 * off:.1f} ms a token without")
        for layers in args.layers:
            print(
                f"  {layers} layers: {1000 * median(times[layers]):.1f} ms, {median(times[layers]) / off:.3f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
