"""Clients that ask a server at once, each checking its own answers; and short questions while a long document is read.

python experiments/server_load.py --seconds 600 --clients 32
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_process import Server, facts

NAMES = ("Mara Lind", "Tom Hale", "Ida Frost", "Ben Moor", "Eva Stone")


@dataclass
class Counts:
    """What happened.

    Attributes:
        answers: by kind of request.
        wrong: answers that are not what the same request gave alone.
        lost: requests that had no answer, or an error other than that the queue is full.
    """

    answers: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """A client with a document and questions of its own, whose answers it knows."""

    def __init__(self, server: Server, number: int) -> None:
        self.server, self.number = server, number
        self.codes = {name: 10_000 + 97 * number + i for i, name in enumerate(NAMES)}
        text = facts(40 + 5 * (number % 8), self.codes).replace("ferry", f"ferry {number}")
        self.file = server.upload(text.encode(), f"client-{number}.txt")["id"]
        server.wait_for(self.file, seconds=600)
        self.known: dict[tuple[str, str], str] = {}

    def learn(self) -> None:
        """What each request gives while nobody else asks."""
        for name in NAMES:
            for kind in ("short", "stream", "document"):
                self.known[kind, name] = self.ask(kind, name)

    def ask(self, kind: str, name: str) -> str:
        question = f"What is the door code of {name}?"
        if kind == "document":
            body: dict[str, Any] = {
                "messages": [{"role": "user", "content": question}],
                "documents": [self.file],
                "user": str(self.number),
            }
            answer: str = self.server.json("POST", "/v1/chat/completions", body, timeout=600)["choices"][0]["message"][
                "content"
            ]
            return answer
        prompt = f"The door code of {name} is {self.codes[name]}.\n\nQuestion: {question}\nAnswer:"
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stop": "\n", "user": str(self.number)}
        if kind == "stream":
            return "".join(
                event["choices"][0]["text"] for event in self.server.events(body, "/v1/completions", timeout=600)
            )
        found: str = self.server.json("POST", "/v1/completions", body, timeout=600)["choices"][0]["text"]
        return found

    def run(self, until: float, counts: Counts) -> None:
        chance = random.Random(self.number)
        while time.monotonic() < until:
            kind, name = chance.choice(("short", "short", "stream", "document")), chance.choice(NAMES)
            try:
                answer = self.ask(kind, name)
            except (HTTPError, AssertionError) as err:
                full = "queue_full" in str(err) or getattr(err, "code", 0) == 429
                with counts.lock:
                    counts.refused += full
                    if not full:
                        counts.lost.append(f"{kind}: {err}")
                time.sleep(0.2)
                continue
            except OSError as err:
                with counts.lock:
                    counts.lost.append(f"{kind}: {err}")
                continue
            with counts.lock:
                counts.answers[kind] = counts.answers.get(kind, 0) + 1
                if answer != self.known[kind, name]:
                    counts.wrong.append(
                        f"client {self.number}, {kind}, {name}: {answer!r}, alone {self.known[kind, name]!r}"
                    )


def resident(pid: int) -> int:
    """Bytes of memory that a process has (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def load(server: Server, n_clients: int, seconds: float) -> dict[str, Any]:
    """All clients at once."""
    clients = [Client(server, number) for number in range(n_clients)]
    for client in clients:
        client.learn()
    counts = Counts()
    memory = [resident(server.process.pid)]
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client.run, args=(until, counts)) for client in clients]
    for thread in threads:
        thread.start()
    pauses, looked = 0.0, time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, seconds / 10))
        memory.append(resident(server.process.pid))
        now = time.monotonic()
        pauses, looked = pauses + max(now - looked - 10.0, 0.0), now
    for thread in threads:
        thread.join()
    middle = memory[len(memory) // 4 :]
    return {
        "clients": n_clients, "seconds": seconds, "answers": counts.answers, "wrong": counts.wrong[:10], "n_wrong": len(counts.wrong),
        "lost": counts.lost[:10], "n_lost": len(counts.lost), "refused": counts.refused,
        "stopped_s": round(pauses),  # that all of this was stopped from outside
        "memory_mib": {"begin": memory[0] >> 20, "after a quarter": middle[0] >> 20, "end": memory[-1] >> 20, "most": max(memory) >> 20},
    }  # fmt: skip


def short_questions(server: Server, n: int, busy: bool, n_lines: int) -> dict[str, Any]:
    """Times of short questions, while a long document is read if busy."""
    file_id = None
    if busy:
        text = facts(n_lines, {"Ann Vale": 22871}).replace("ferry", f"ferry {time.monotonic()}")
        file_id = server.upload(text.encode(), "long.txt")["id"]
        server.wait_for(file_id, ("reading", "ready"))
    times = []
    for i in range(n):
        body = {"prompt": f"Question {i}: what is {i} and {i}?\nAnswer:", "max_tokens": 8, "temperature": 0}
        begin = time.perf_counter()
        server.json("POST", "/v1/completions", body)
        times.append(time.perf_counter() - begin)
    still = file_id is not None and server.json("GET", f"/v1/files/{file_id}")["mesa"]["state"] == "reading"
    ordered = sorted(times)
    return {"n": n, "p50_s": statistics.median(times), "p95_s": ordered[int(0.95 * (n - 1))], "still_reading": still}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--questions", type=int, default=60, help="short questions, alone and while a document is read")
    parser.add_argument("--lines", type=int, default=6000, help="of the document that is read meanwhile")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), "--n-ctx", "8192", model=given.model) as server:
        idle = short_questions(server, given.questions, False, given.lines)
        busy = short_questions(server, given.questions, True, given.lines)
        result = {"idle": idle, "while a document is read": busy, "p95_ratio": busy["p95_s"] / idle["p95_s"],
                  **(load(server, given.clients, given.seconds) if given.seconds > 0 else {})}  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
