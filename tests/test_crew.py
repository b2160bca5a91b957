"""How many threads compute beside other programs: on machines that are made up, and once on this one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ModelPath, Opener, random_tokens
from mesa_gguf import MesaConfig, MesaLlama, crew
from mesa_gguf import machine as machine_module
from mesa_gguf.crew import PAUSES, STALE, Crew
from mesa_gguf.machine import LOOK, FreeCpus, disk_faults


class Machine:
    """Cores of which some are taken by other programs, half of the time: a thread there holds up the others.

    Args:
        tells: what other programs compute is known.
    """

    def __init__(self, cores: int, *, held_up: float = 5.0, tells: bool = False) -> None:
        self.cores, self.held_up, self.tells, self.busy, self.now = cores, held_up, tells, 0, 0.0

    def token(self, n: int) -> tuple[float, float]:
        """Seconds of the clock and of the CPU that a token takes with n threads."""
        late = max(0, n + self.busy - self.cores)
        wall = 0.08 / n * (self.held_up if late else 1.0)
        return wall, wall * (n - 0.5 * late)

    def free(self, n: int) -> float | None:
        """Cores that others leave to n threads."""
        return self.cores - self.busy + 0.5 * max(0, n + self.busy - self.cores) if self.tells else None

    def best(self) -> float:
        return min(self.token(n)[0] for n in range(1, self.cores + 1))

    def work(self, made: Crew, seconds: float) -> float:
        """Generate for so long; the mean time of a token, as a multiple of the best."""
        begin, n_tokens = self.now, 0
        while self.now < begin + seconds:
            made.begin(self.now, self.free(0))
            wall, cpu = self.token(made.n)
            self.now += wall
            n_tokens += 1
            made.worked(1, wall, cpu, self.now, None, self.free(made.n))
        return (self.now - begin) / n_tokens / self.best()


@given(cores=st.integers(1, 16), loads=st.lists(st.integers(0, 4), min_size=1, max_size=5), tells=st.booleans())
def test_it_is_near_the_best_number_of_threads(cores: int, loads: list[int], tells: bool) -> None:
    """Whatever comes and goes, once there was time to notice."""
    machine, made = Machine(cores, tells=tells), Crew(cores)
    for busy in loads:
        machine.busy = min(busy, cores - 1)
        machine.work(made, 2 * PAUSES[1] + 2)
        assert machine.work(made, 12.0) <= 1.3
        assert 1 <= made.n <= cores


@given(cores=st.integers(1, 16), loads=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_it_is_near_the_best_at_once_where_the_load_is_known(cores: int, loads: list[int]) -> None:
    """From the first token on, and again after each rest, whatever began or ended meanwhile."""
    machine, made = Machine(cores, tells=True), Crew(cores)
    for busy in loads:
        machine.busy = min(busy, cores - 1)
        machine.now += STALE + 1
        assert machine.work(made, 2.0) <= 1.3


def test_more_threads_than_there_are_free_cpus() -> None:
    """Where they are faster all the same, that is found, and remembered."""
    machine, made = Machine(4, held_up=0.5, tells=True), Crew(4)
    machine.busy = 2
    made.begin(0.0, machine.free(0))
    assert made.n == 2
    machine.work(made, 12.0)
    assert made.n > 2
    machine.now += STALE + 1
    made.begin(machine.now, machine.free(0))
    assert made.n > 2


def test_generating_begins_as_reading_ended() -> None:
    """Where nobody tells what other programs do."""
    reading, writing = Crew(8), Crew(4)
    writing.begin(0.0, None, reading)
    assert writing.n == 4
    reading.n = 3
    reading.worked(512, 1.0, 3.0, 1.0)
    writing.begin(1.0 + STALE, None, reading)
    assert writing.n == 4
    writing.begin(0.5 + STALE, None, reading)
    assert writing.n == 3
    reading.n = 8
    reading.worked(512, 1.0, 8.0, 100.0)
    writing.begin(100.0, None, reading)
    assert writing.n == 4


def test_what_other_programs_compute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two CPUs that this process may use, in two looks."""
    now, own, niced = 100.0, (1.0, 0.5, 0.25, 0.25, 0.0), 0

    def stat(*busy: int, nice: int = 0) -> None:
        lines = [f"cpu{i} {2 * n} {nice} {n} 77 88 0 0 {n} 0 0" for i, n in enumerate(busy)]
        (tmp_path / "proc/stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "intr 12", ""]))

    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(machine_module, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(os, "getpriority", lambda *_: niced, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(os, "times", lambda: os.times_result(own))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert FreeCpus().look() is None  # there is no such file
    stat(10, 10, 10)
    free = FreeCpus()
    assert free.look() is None
    stat(10, 1000, 35)  # the middle one is none of ours
    now += LOOK / 2
    assert free.look() is None  # too early
    now = 101.0
    own = 1.25, 0.5, 0.25, 0.5, 0.0  # half a second of the whole one
    assert free.look() == pytest.approx(1.5)
    stat(10, 1000, 35, nice=100)
    now, own = 102.0, (1.25, 0.5, 0.25, 0.5, 0.0)
    assert free.look() == pytest.approx(2.0)  # they make way
    autogroup = tmp_path / "proc/sys/kernel/sched_autogroup_enabled"
    autogroup.parent.mkdir(parents=True)
    for by_session, expected in ((1, 1.0), (0, 2.0)):  # but those of other sessions, where each has its share
        autogroup.write_text(f"{by_session}\n")
        now += 1.0
        stat(10, 1000, 35, nice=100)
        free.look()
        now += 1.0
        stat(10, 1000, 35, nice=150)
        assert free.look() == pytest.approx(expected)
    niced = 10
    now = 107.0
    free.look()
    stat(10, 1000, 35, nice=200)
    now = 108.0
    assert free.look() == pytest.approx(1.0)
    stat(1000, 1000, 1000)
    now = 109.0
    assert free.look() == 0.0
    (tmp_path / "proc/stat").write_text("cpu0 1 2\n\n")
    now = 110.0
    assert free.look() is None  # it is not known now
    stat(1000, 1000, 1000)
    now = 111.0
    assert free.look() is None  # nothing to compare it with
    now = 112.0
    assert free.look() == 2.0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell")
def test_this_machine_tells() -> None:
    free = FreeCpus()
    end = time.perf_counter() + LOOK
    while time.perf_counter() < end:
        pass
    n = free.look()
    if (machine_module.ROOT / "proc/stat").exists():
        assert n is None or 0 <= n <= len(os.sched_getaffinity(0))


def test_an_idle_machine_is_used_whole() -> None:
    machine, made = Machine(8), Crew(8)
    for _ in range(200):
        made.worked(1, *machine.token(8), machine.now)
        machine.now += 0.01
        assert made.n == 8


def test_fewer_threads_that_are_no_faster_are_not_kept() -> None:
    """CPU time may fall short for other reasons, as where a page of weights comes from the disk."""
    machine, made = Machine(4, held_up=1.0), Crew(4)
    machine.busy = 1
    assert machine.work(made, 30.0) <= 1.1
    assert made.n == 4


def test_long_batches_are_tried_seldom() -> None:
    """A trial costs one of them; and threads that compute much between two waits are kept."""
    made, now, fewer = Crew(2), 0.0, 0
    for _ in range(200):
        wall = 30.0 if made.n == 2 else 31.0
        fewer += made.n == 1
        now += wall
        made.worked(512, wall, wall * 1.5 if made.n == 2 else wall, now)
    assert 0 < fewer <= 20


def test_chunks_of_different_lengths_are_compared() -> None:
    """A trial ends with the next batch, whatever the length that its chunk has."""
    made, now, used = Crew(2), 0.0, []
    for n_tokens in [569, 1024] * 10:
        used.append(made.n)
        wall = n_tokens * (0.002 if made.n == 1 else 0.004)
        now += wall
        made.worked(n_tokens, wall, wall * (1.0 if made.n == 1 else 1.2), now)
    assert used[:2] == [2, 2]  # one does not count, one is measured
    assert used[2:].count(1) >= 16


def test_the_first_batch_waits_for_the_disk() -> None:
    made = Crew(4)
    made.worked(512, 9.0, 4.0, 9.0)
    for i in range(10):
        made.worked(512, 1.0, 3.95, 10.0 + i)
        assert made.n == 4


def test_the_first_batch_counts_where_nothing_came_from_the_disk() -> None:
    """A text of two batches is read by fewer threads from its middle on."""
    made = Crew(2)
    made.worked(512, 1.0, 1.2, 1.0, False)
    assert made.n == 1


def test_a_batch_that_waited_for_the_disk_never_counts() -> None:
    made = Crew(4)
    for i in range(5):
        made.worked(512, 1.0, 1.2, 1.0 + i, True)
        assert made.n == 4


def test_pages_from_the_disk_are_counted() -> None:
    faults = disk_faults()
    assert faults is None or faults >= 0
    assert (faults is None) == (sys.platform == "win32")


def test_a_trial_that_nothing_follows_ends() -> None:
    """Batches of other lengths are not compared with."""
    made = Crew(4)
    made.worked(64, 0.05, 0.1, 0.0)
    made.worked(64, 0.05, 0.1, 0.1)
    assert made.n < 4
    made.worked(8, 0.05, 0.19, 0.2)
    assert made.n < 4
    made.worked(8, 0.05, 0.19, 1.3)
    assert made.n == 4


def threads_of(llm: MesaLlama) -> tuple[int, int]:
    context = llm._ctx.ctx
    return llama_cpp.llama_n_threads(context), llama_cpp.llama_n_threads_batch(context)


@pytest.fixture
def short_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the threads get half of the CPU time, and fewer are faster."""
    monkeypatch.setattr(crew, "LEAST", 0.0)
    monkeypatch.setattr(
        Crew,
        "worked",
        lambda self, n_tokens, wall, cpu, now, from_disk, free, own=Crew.worked: own(
            self, n_tokens, 0.05 * self.n, 0.025 * self.n**2, now
        ),
    )


@pytest.mark.usefixtures("short_of_time")
def test_a_model_computes_with_fewer_threads(
    model_path: ModelPath, open_llama: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesa_gguf.machine.default_threads", lambda: (3, 4))
    llm = open_llama(model_path("llama"), MesaConfig(), n_threads=None, n_threads_batch=None)
    for _ in range(12):
        llm.eval(random_tokens(40))
        for token in random_tokens(3):
            llm.eval([token])
        llm.reset()
    one, many = threads_of(llm)
    assert one < 3 and many < 4


@pytest.mark.usefixtures("short_of_time")
def test_threads_that_were_chosen_are_kept(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama"), MesaConfig(), n_threads=2, n_threads_batch=3)
    for _ in range(5):
        llm.eval(random_tokens(40))
        llm.eval(random_tokens(1))
        llm.reset()
    assert threads_of(llm) == (2, 3)
