"""Whose turn it is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf.errors import PromptError
from mesa_gguf.server.engine import Channel, Engine, GiveWay, Job, Stopped
from mesa_gguf.server.metrics import Metrics
from mesa_gguf.server.problems import Problem
from mesa_gguf.server.served import Usage


class Model:
    """In place of a model: nothing is computed."""

    usage = Usage()
    interrupt: Any = None
    closed = False

    def close(self) -> None:
        self.closed = True


class Run:
    """An engine, and what happened in it."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = Engine(Model(), Metrics(), **options)  # type: ignore[arg-type]
        self.order: list[str] = []

    def job(self, client: str, work: Any = None, seconds: float = 60.0) -> Job:
        def note(_: Job) -> Iterator[str]:
            self.order.append(client)
            yield client

        return Job(client, work or note, self.loop, seconds)

    def outcome(self, job: Job) -> list[Any]:
        """All that a job gives."""

        async def collect() -> list[Any]:
            found: list[Any] = []
            while not found or found[-1][0] == "item":
                found += await job.channel.take(5)
            return found

        return self.loop.run_until_complete(collect())

    def close(self) -> None:
        self.engine.close()
        self.loop.close()


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    made.close()


@given(clients=st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
def test_clients_take_turns(clients: list[str]) -> None:
    run = Run()
    jobs = [run.job(client) for client in clients]
    for job in jobs:
        run.engine.submit(job)
    run.engine.start()
    assert all(run.outcome(job)[-1] == ("end", None) for job in jobs)
    run.close()
    # nobody has a second turn before all others that wait had one more than before
    for n in range(len(run.order)):
        had, left = run.order[: n + 1], run.order[n + 1 :]
        assert all(had.count(run.order[n]) <= had.count(other) + 1 for other in set(left))


def test_a_full_queue_refuses(run: Run) -> None:
    run.engine.max_waiting = 2
    for _ in range(2):
        run.engine.submit(run.job("a"))
    with pytest.raises(Problem) as caught:
        run.engine.submit(run.job("b"))
    assert caught.value.status == 429 and caught.value.headers["Retry-After"]


def test_what_gives_way_comes_again(run: Run) -> None:
    parts = iter(range(3))

    def work(_: Job) -> Iterator[str]:
        part = next(parts)
        run.order.append(f"long {part}")
        if part < 2:
            raise GiveWay
        yield "done"

    long, short = run.job("a", work), run.job("b")
    run.engine.submit(long)
    run.engine.submit(short)
    run.engine.start()
    assert run.outcome(long) == [("item", "done"), ("end", None)]
    assert run.outcome(short)[-1] == ("end", None)
    assert run.order == ["long 0", "b", "long 1", "long 2"]


def test_what_went_away_is_not_begun(run: Run) -> None:
    gone, other = run.job("a"), run.job("b")
    for job in (gone, other):
        run.engine.submit(job)
    run.engine.cancel(gone)
    run.engine.start()
    assert run.outcome(other)[-1] == ("end", None) and run.order == ["b"]
    ((kind, problem),) = run.outcome(gone)  # its end is told too, or the task that waits for it stays for ever
    assert kind == "error" and problem.code == "client_gone"


def test_what_runs_is_stopped(run: Run) -> None:
    began = threading.Event()

    def work(_: Job) -> Iterator[str]:
        began.set()
        while True:
            run.engine.llm.interrupt()  # type: ignore[misc]  # as the model does before and within a batch
        yield ""

    job = run.job("a", work)
    run.engine.submit(job)
    run.engine.start()
    assert began.wait(5)
    run.engine.cancel(job)
    assert run.outcome(job)[-1][0] == "error"
    late = run.job("a", work, seconds=0.05)
    run.engine.submit(late)
    assert run.outcome(late)[-1][1].status == 504


@pytest.mark.parametrize(
    ("err", "status"),
    [(PromptError("x"), 400), (Stopped(), 503), (RuntimeError("x"), 500), (Problem(404, "x", "y"), 404)],
)
def test_what_fails_is_told_and_the_next_one_goes_on(run: Run, err: Exception, status: int) -> None:
    def work(_: Job) -> Iterator[str]:
        raise err
        yield ""

    job, other = run.job("a", work), run.job("a")
    for each in (job, other):
        run.engine.submit(each)
    run.engine.start()
    kind, problem = run.outcome(job)[-1]
    assert kind == "error" and problem.status == status
    assert run.outcome(other)[-1] == ("end", None)


def test_the_end_refuses_those_that_wait_and_finishes_what_runs() -> None:
    run = Run()
    began, go = threading.Event(), threading.Event()

    def work(_: Job) -> Iterator[str]:
        began.set()
        go.wait(5)
        yield "done"

    running, waiting = run.job("a", work), run.job("b")
    run.engine.submit(running)
    run.engine.start()
    assert began.wait(5)
    run.engine.submit(waiting)
    run.engine.refuse_more()
    assert run.outcome(waiting)[-1][1].status == 503
    with pytest.raises(Problem, match="shutting down"):
        run.engine.submit(run.job("c"))
    go.set()
    assert run.outcome(running) == [("item", "done"), ("end", None)]
    run.close()
    assert run.engine.llm.closed  # type: ignore[attr-defined]


def test_what_comes_while_it_gathers_is_taken_together_and_the_end_at_once(run: Run) -> None:
    """The model's thread wakes the loop for the first of them and for the end, and for none between."""
    woken: list[float] = []
    tell = run.loop.call_soon_threadsafe
    run.loop.call_soon_threadsafe = lambda *args: (woken.append(time.monotonic()), tell(*args))[1]  # type: ignore[method-assign]
    channel = Channel(run.loop)

    def put() -> None:
        for n in range(50):
            channel.put(("item", n))
            time.sleep(0.001)
        channel.put(("end", None))

    async def collect() -> list[list[Any]]:
        thread = threading.Thread(target=put)
        thread.start()
        found = [await channel.take(5)]
        while found[-1][-1][0] == "item":
            await channel.gather(60)
            found.append(await channel.take(5))
        thread.join()
        return found

    begin = time.monotonic()
    found = run.loop.run_until_complete(collect())
    assert [item for items in found for _, item in items] == [*range(50), None]
    # one word more where the first item came before it was waited for
    assert len(found) <= 3 and len(woken) <= 3 and time.monotonic() - begin < 30


def test_what_does_not_come_is_not_waited_for_longer(run: Run) -> None:
    channel = Channel(run.loop)
    channel.put(("item", 1))
    assert run.loop.run_until_complete(channel.take(5)) == [("item", 1)]
    run.loop.run_until_complete(channel.gather(0.01))
    assert run.loop.run_until_complete(channel.take(0.01)) == []


class Chunks:
    """Work in the background: n pieces."""

    def __init__(self, n: int, order: list[str]) -> None:
        self.n, self.order = n, order

    def pending(self) -> bool:
        return self.n > 0

    def step(self, _: Engine) -> None:
        self.n -= 1
        self.order.append("chunk")


def test_questions_come_before_the_background() -> None:
    run = Run()
    run.engine.background = Chunks(3, run.order)
    jobs = [run.job("a") for _ in range(3)]
    for job in jobs:
        run.engine.submit(job)
    run.engine.start()
    for job in jobs:
        run.outcome(job)
    end = run.job("b")
    while run.engine.background.pending():
        pass
    run.engine.submit(end)
    run.outcome(end)
    run.close()
    assert run.order == ["a", "a", "a", "chunk", "chunk", "chunk", "b"]
