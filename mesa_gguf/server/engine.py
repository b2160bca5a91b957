"""The one thread that owns the model, and the queue in front of it.

Requests of different clients take turns. A question about documents whose chunks are not read yet gives way to the others after
each chunk. Documents are read in the background, a chunk at a time, while nobody asks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..errors import MesaError
from .metrics import Metrics
from .problems import Problem, problem_of
from .served import ServedLlama, Usage

log = logging.getLogger("mesa_gguf.server")

READING_TURN_SECONDS = 20.0  # in which background reading gets a turn, however many ask


class Stopped(Exception):
    """A request came to its end before its answer did: the client went away, or its time was up."""


class GiveWay(Exception):
    """Others wait, and what was read so far is kept: go on later."""


class Channel:
    """What a request's work gives, from the model's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[str, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._told = False  # the loop was told that there is something, or will look by itself

    def put(self, item: tuple[str, Any]) -> None:
        self._items.append(item)
        if not self._told or item[0] != "item":  # the end is told at once
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop was closed: nobody listens
                log.debug("an answer came after the server's end")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self, timeout: float) -> list[tuple[str, Any]]:
        """All that is there; nothing after the timeout, or now and then before it.

        note: without asyncio.wait_for, which makes a task: this is what a streamed token costs.
        """
        self._told = False  # before it is looked: one that comes from now on tells
        if not self._items:
            await self._wait(timeout)
        self._told = True  # until the next time: what comes meanwhile costs the model's thread nothing
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    async def gather(self, seconds: float) -> None:
        """Let come what comes, for so long or until the end: between two of `take`."""
        if not self._items or self._items[-1][0] == "item":
            await self._wait(seconds)

    async def _wait(self, seconds: float) -> None:
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(seconds, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None


Work = Callable[["Job"], Iterator[Any]]


class Job:
    """A request that wants the model.

    Args:
        client: who asks; clients take turns.
        work: yields what goes to the client, an item after the other. What it raises is the answer; `GiveWay`: call it again later.
        seconds: until its time is up.

    Attributes:
        channel: gets ("item", …) for each item, then ("end", None) or ("error", Problem).
        usage: tokens of it.
    """

    def __init__(self, client: str, work: Work, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.client, self.work = client, work
        self.channel = Channel(loop)
        self.usage = Usage()
        self.computed_chunks = 0  # tokens of chunks that were read for it, also before it gave way
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds
        self.started = False
        self.first: float | None = None
        self._gone = False

    def cancel(self) -> None:
        """The client went away."""
        self._gone = True

    @property
    def gone(self) -> bool:
        return self._gone

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def check(self) -> None:
        """Raise `Stopped` where nobody waits for it any more."""
        if self._gone or self.late:
            raise Stopped


class Background(Protocol):
    """What the model does while nobody asks."""

    def pending(self) -> bool: ...

    def step(self, engine: Engine) -> None:
        """A piece of it, as short as can be."""


class Engine:
    """The model's thread.

    Args:
        llm: the model; only the thread uses it from now on.
        metrics: counts.
        background: what is done while nobody asks.
        max_waiting: requests that may wait; more are refused.
    """

    def __init__(
        self, llm: ServedLlama, metrics: Metrics, background: Background | None = None, *, max_waiting: int = 64
    ) -> None:
        self.llm, self.metrics, self.background, self.max_waiting = llm, metrics, background, max_waiting
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._n_waiting = 0
        self._changed = threading.Condition()
        self._closing = False
        self._stop = False
        self._current: Job | None = None
        self._last_background = time.monotonic()
        self._seconds = 1.0  # that a request takes, on average
        self._thread = threading.Thread(target=self._run, name="mesa-model", daemon=True)
        llm.interrupt = self._interrupt

    def start(self) -> None:
        self._thread.start()

    #
    # from the event loop's thread
    #

    def submit(self, job: Job) -> None:
        """Put a request into the queue.

        Raises:
            Problem: the queue is full, or the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise Problem(503, "the server is shutting down", "shutting_down", retry_after=10)
            if self._n_waiting >= self.max_waiting:
                self.metrics.refused.inc()
                seconds = max(1, min(600, round(self._seconds * self._n_waiting)))
                raise Problem(
                    429,
                    f"{self._n_waiting} requests are waiting already: try again later",
                    "queue_full",
                    retry_after=seconds,
                )
            self._put(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its client went away: it is dropped, or stopped."""
        job.cancel()
        if self.drop(job):
            self.metrics.cancelled.inc()
            # nobody takes it, but who waits for the job's end must learn of it: else each such client leaves a task behind
            job.channel.put(("error", Problem(499, "the client went away", "client_gone")))

    def drop(self, job: Job) -> bool:
        """Take a request out of the queue; whether it was there."""
        with self._changed:
            jobs = self._waiting.get(job.client)
            if jobs is None or job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]
            self._n_waiting -= 1
            self.metrics.waiting.set(self._n_waiting)
        return True

    def wake(self) -> None:
        """There is something new to do in the background."""
        with self._changed:
            self._changed.notify()

    def refuse_more(self) -> None:
        """Begin to shut down: the request that has the model goes on, those that wait are refused."""
        with self._changed:
            self._closing = True
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._n_waiting = 0
            self.metrics.waiting.set(0)
            self._changed.notify()
        for job in waiting:
            job.channel.put(("error", Problem(503, "the server is shutting down", "shutting_down", retry_after=10)))

    def close(self, seconds: float = 10.0) -> None:
        """End the thread: what it does now is stopped."""
        self.refuse_more()
        self._stop = True
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        if not self._thread.is_alive():
            self.llm.close()

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    #
    # the model's thread
    #

    @property
    def others_wait(self) -> bool:
        return self._n_waiting > 0

    def _put(self, job: Job) -> None:
        self._waiting.setdefault(job.client, deque()).append(job)
        self._n_waiting += 1
        self.metrics.waiting.set(self._n_waiting)

    def _take(self) -> Job | None:
        """The next client's first request; the client goes to the end of the row."""
        if not self._waiting:
            return None
        client, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._waiting[client] = jobs
        self._n_waiting -= 1
        self.metrics.waiting.set(self._n_waiting)
        return job

    def _interrupt(self) -> None:
        if self._stop:
            raise Stopped
        if self._current is not None:
            self._current.check()

    def _run(self) -> None:
        while not self._stop:
            with self._changed:
                job = self._take()
                pending = self.background is not None and not self._closing and self.background.pending()
                if job is None and not pending:
                    if self._closing:
                        return
                    self._changed.wait(1.0)
                    continue
            turn = time.monotonic() - self._last_background > READING_TURN_SECONDS
            if pending and (job is None or turn):
                self._work_in_background()
            if job is not None:
                self._answer(job)

    def _work_in_background(self) -> None:
        assert self.background is not None
        try:
            self.background.step(self)
        except Stopped:
            pass
        except Exception:
            log.exception("work in the background failed")
            time.sleep(0.1)
        self._last_background = time.monotonic()

    def _answer(self, job: Job) -> None:
        if not job.started:
            job.started = True
            self.metrics.wait.observe(time.monotonic() - job.begin)
        self._current, self.llm.usage = job, job.usage
        before = Usage(**vars(job.usage))
        try:
            job.check()
            items = job.work(job)
            try:
                for item in items:
                    if job.first is None and job.usage.completion:
                        job.first = time.monotonic() - job.begin
                        self.metrics.first.observe(job.first)
                    job.channel.put(("item", item))
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
        except GiveWay:
            with self._changed:
                if not self._closing:
                    self._put(job)
                    return
            job.channel.put(("error", Problem(503, "the server is shutting down", "shutting_down", retry_after=10)))
        except Stopped:
            if job.gone:
                self.metrics.cancelled.inc()
            late = Problem(504, "the time for this request is up", "timeout")
            stopping = Problem(503, "the server was stopped", "shutting_down", retry_after=10)
            job.channel.put(("error", late if job.late else stopping))
        except Exception as err:
            if not isinstance(err, (MesaError, Problem)):
                log.exception("a request failed")
            job.channel.put(("error", problem_of(err)))
        else:
            job.channel.put(("end", None))
        finally:
            self._current, self.llm.usage = None, Usage()
            used = job.usage
            self.metrics.computed.labels("prompt").inc(used.prompt - before.prompt - used.cached + before.cached)
            self.metrics.reused.inc(used.cached - before.cached)
            self.metrics.generated.inc(used.completion - before.completion)
        took = time.monotonic() - job.begin
        self.metrics.took.observe(took)
        self._seconds += 0.2 * (took - self._seconds)
