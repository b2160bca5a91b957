"""What a streamed token costs through the server, against the same in Python: by turns, in one run.

python experiments/server_overhead.py -m model.gguf

The time of a token is a slope: from the first piece of an answer to the last one. What a request costs once is told apart from it, as the
time to the first piece. Clients are a bare socket, which notes when bytes come and nothing else, and OpenAI's own. On Linux, the time of
the CPU that a token takes is told too: of the model's thread, and of the server's others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai import OpenAI

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from mesa_gguf import MesaLlama
from server_process import Server

CONTEXT = 2048


@dataclass
class Measured:
    """Of one way to get tokens, a value for each run.

    Attributes:
        token: seconds, from the first piece on.
        first: seconds until the first piece.
        model, others: seconds of the CPU a token, of the thread that computes and of all others.
    """

    token: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


def pieces_of(stream: Iterable[object]) -> list[float]:
    """When each piece came."""
    return [time.perf_counter() for _ in stream]


def raw(url: str, body: dict[str, Any]) -> list[float]:
    """When each piece came at a socket."""
    parts, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    times: list[float] = []
    with socket.create_connection((parts.hostname, parts.port)) as wire:
        wire.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        end = b""
        while b"[DONE]" not in end:
            got = wire.recv(1 << 16)
            times += [time.perf_counter()] * got.count(b"data: {")
            end = (end + got)[-64:]
    return times


def busy(process: str) -> dict[str, float]:
    """Seconds of the CPU that each thread of a process had so far; nothing where there is no Linux."""
    found = {}
    for file in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has ended
            found[file.parent.name] = int(file.read_text().split()[0]) / 1e9
    return found


def measure(into: Measured | None, process: str, ask: Callable[[], list[float]]) -> None:
    before, begin = busy(process), time.perf_counter()
    times = ask()
    after = busy(process)
    n = len(times) - 1
    if into is None or n < 2:
        return
    into.token.append((times[-1] - times[0]) / n)
    into.first.append(times[0] - begin)
    used = sorted(seconds - before.get(thread, 0.0) for thread, seconds in after.items())
    if used:
        into.model.append(used[-1] / n)
        into.others.append(sum(used[:-1]) / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    llm = MesaLlama(given.model, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1)
    # each answer has all of its tokens
    asked = {"prompt": "Once upon a time", "max_tokens": given.tokens, "temperature": 0, "logit_bias": {str(llm.token_eos()): -100}, "stream": True}  # fmt: skip
    found = {name: Measured() for name in ("python", "socket", "openai")}
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder), "--n-ctx", str(CONTEXT), model=given.model) as server,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        served = str(server.process.pid)
        ways = {
            "python": ("self", lambda: pieces_of(llm.create_completion(**asked))),
            "socket": (served, lambda: raw(server.url, asked)),
            "openai": (served, lambda: pieces_of(client.completions.create(model="mesa", **asked))),
        }
        for run in range(-1, given.runs):  # the first one warms up
            names = list(ways)
            for name in names[run % 3 :] + names[: run % 3]:
                measure(found[name] if run >= 0 else None, *ways[name])
        client.close()
    llm.close()

    def ms(values: list[float]) -> float | None:
        return round(1000 * statistics.median(values), 3) if values else None

    result: dict[str, Any] = {"model": given.model.name, "tokens": given.tokens, "runs": given.runs}
    for name, of in found.items():
        result[name] = {"ms_a_token": ms(of.token), "ms_to_first": ms(of.first), "cpu_ms_a_token": {"model": ms(of.model), "others": ms(of.others)}}  # fmt: skip
        if name != "python":
            ratios = [b / a for a, b in zip(found["python"].token, of.token)]
            result[name] |= {
                "ratio": round(statistics.median(ratios), 4),
                "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
