"""What a streamed token costs through the server, against the same in Python: by turns, in one run; in time, and in time of the CPU,
which depends less on what else the machine does.

python experiments/server_overhead.py -m model.gguf
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mesa_gguf import MesaLlama
from server_process import Server


def seconds_a_token(pieces: Iterable[object]) -> float:
    """From the first piece of an answer to the last one, by the number of pieces between."""
    times = [time.perf_counter() for _ in pieces]
    return (times[-1] - times[0]) / (len(times) - 1)


def cpu_seconds(pid: int) -> float:
    """That a process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    body = {"prompt": "Once upon a time", "max_tokens": given.tokens, "temperature": 0}
    options = dict(n_ctx=2048, n_threads=1, n_threads_batch=1)
    llm = MesaLlama(given.model, **options)
    body["logit_bias"] = {llm.token_eos(): -100}  # each answer has all of its tokens
    times: dict[str, list[float]] = {"python": [], "server": []}
    cpu = {"python": 0.0, "server": 0.0}
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), "--n-ctx", "2048", model=given.model) as server:
        for run in range(given.runs + 1):
            for name in ("python", "server") if run % 2 else ("server", "python"):
                pieces = (
                    llm.create_completion(**body, stream=True)
                    if name == "python"
                    else server.events(body, "/v1/completions")
                )
                pid = os.getpid() if name == "python" else server.process.pid
                used = cpu_seconds(pid)
                took = seconds_a_token(pieces)
                if run > 0:  # the first one warms up
                    times[name].append(took)
                    cpu[name] += cpu_seconds(pid) - used
    llm.close()
    ratios = [b / a for a, b in zip(times["python"], times["server"])]
    result = {
        "model": given.model.name, "tokens": given.tokens, "runs": given.runs,
        **{f"{name}_ms_a_token": 1000 * statistics.median(values) for name, values in times.items()},
        **{f"{name}_cpu_ms_a_token": 1000 * used / given.runs / given.tokens for name, used in cpu.items()},
        "ratio": statistics.median(ratios), "ratios": [round(ratio, 4) for ratio in ratios],
    }  # fmt: skip
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
