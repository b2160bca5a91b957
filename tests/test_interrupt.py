"""A batch that is ended while llama.cpp computes it: what was read whole stays, nothing else, and reading goes on as if nothing was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import (
    BUNDLED,
    F16,
    F32,
    Q8_0,
    SMALL,
    ModelPath,
    Opener,
    random_tokens,
    read,
    read_singly,
    run_python,
    worst,
)
from make_models import write_bert
from mesa_gguf import EmbeddingModel, MesaConfig, MesaLlama, _core, llama
from mesa_gguf.server.engine import Engine, Job
from mesa_gguf.server.metrics import Metrics
from mesa_gguf.server.served import ServedLlama

Q4_0 = 2  # enum ggml_type
TEXT, REST, OTHER = random_tokens(300, seed=1), random_tokens(30, seed=2), random_tokens(200, seed=3)


class Stop(Exception):
    pass


class After:
    """Asked whether a batch is to end: from the n-th time on it raises."""

    def __init__(self, n: int) -> None:
        self.n, self.n_asked, self.error = n, 0, Stop()

    def __call__(self) -> None:
        self.n_asked += 1
        if self.n_asked > self.n:
            raise self.error


@pytest.fixture(autouse=True)
def _look_after_each_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "LOOK_SECONDS", 0.0)


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """A shell that starts tests in the background switches it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopped(llm: MesaLlama, n: int, work: Callable[[], object]) -> int:
    """Let llm work, and end it when it is asked for the n-th time -> how often it was asked."""
    llm.interrupt = ask = After(n)
    with contextlib.suppress(Stop):
        work()
    llm.interrupt = None
    if ask.error.__traceback__ is None:
        assert ask.n_asked <= n
    assert ask.error.__context__ is None and ask.error.__cause__ is None
    return ask.n_asked


def talk(llm: MesaLlama) -> NDArray[np.float32]:
    """What is left of the text, then tokens one by one: the logits of all."""
    llm.eval(TEXT[llm.n_tokens :])
    return np.concatenate([llm.scores[: len(TEXT)], read_singly(llm, REST)])


CACHES = [
    ("llama-gqa", F32, F32, False, True), ("llama-gqa", F16, F16, True, True), ("llama-head-size", Q8_0, F16, False, True),
    ("llama-head-size", Q8_0, Q8_0, True, True), ("llama-head-size", Q4_0, Q4_0, True, True), ("gemma2", F32, F32, False, True),
    ("gemma2", F16, F16, True, True), ("gemma2", F32, F32, False, False), ("gemma2", F16, F16, True, False),
]  # fmt: skip


@pytest.mark.parametrize(("model", "type_k", "type_v", "flash", "swa_full"), CACHES)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_reading_goes_on_as_if_nothing_was(
    model_path: ModelPath,
    open_llama: Opener,
    model: str,
    type_k: int,
    type_v: int,
    flash: bool,
    swa_full: bool,
    enabled: bool,
) -> None:
    """Ended after any operation: chunks, the last chunk, generation and an anchor move."""
    options: dict[str, Any] = dict(
        type_k=type_k, type_v=type_v, flash=flash, swa_full=swa_full, n_batch=96, n_ubatch=32
    )
    llm = open_llama(model_path(model), SMALL if enabled else MesaConfig(enabled=False), **options)
    n_all = stopped(llm, 10**9, lambda: llm.eval(TEXT))
    expected, plan = talk(llm), llm.plan()
    ends = set()
    for n in range(0, n_all, 41):
        llm._forget()
        assert stopped(llm, n, lambda: llm.eval(TEXT)) == n + 1
        ends.add(llm.n_tokens)
        assert llm.input_ids[: llm.n_tokens].tolist() == TEXT[: llm.n_tokens]
        # of a ring, which cell a key lies in decides in which order is summed up
        assert worst(talk(llm), expected) <= (0 if swa_full else 3e-5) and llm.plan() == plan
    assert len(ends) > 6 and min(ends) == 0


@pytest.mark.parametrize("flash", [False, True])
def test_threads_leave_an_operation_together(model_path: ModelPath, open_llama: Opener, flash: bool) -> None:
    """One of them asks, between two parts of an operation or behind it, and the others get no more parts."""
    options: dict[str, Any] = dict(kv=F16, flash=flash, n_batch=96, n_ubatch=32, n_threads=2, n_threads_batch=2)
    llm = open_llama(model_path("llama-gqa"), **options)
    n_all = stopped(llm, 10**9, lambda: llm.eval(TEXT))
    expected = talk(llm)
    for n in range(1, n_all // 2, 71):
        llm._forget()
        stopped(llm, n, lambda: llm.eval(TEXT))
        assert llm.n_tokens < len(TEXT) and np.array_equal(talk(llm), expected)


class Once:
    def __init__(self) -> None:
        self.n_asked = self.wanted = 0

    def __call__(self, _: object) -> bool:
        self.n_asked += 1
        return self.n_asked == self.wanted


def test_a_callback_that_wants_it_once(model_path: ModelPath, open_llama: Opener) -> None:
    """Of a caller of llama.cpp: an operation that was left in its middle is not taken for whole."""
    llm = open_llama(model_path("llama-gqa"), kv=F16, flash=True, n_threads=2, n_threads_batch=2)
    once = Once()
    callback = llama_cpp.ggml_abort_callback(once)
    llama_cpp.llama_set_abort_callback(llm._ctx.ctx, callback, None)
    expected = read(llm, TEXT[:100])
    for wanted in range(1, once.n_asked // 2, 3):
        llm._forget()
        once.n_asked, once.wanted = 0, wanted
        with pytest.raises(RuntimeError, match="llama_decode returned 2"):
            llm.eval(TEXT[:100])
        assert llm.n_tokens == 0
    once.wanted = 0
    assert np.array_equal(read(llm, TEXT[:100]), expected)
    _core.let_watch(llm._address)


@pytest.mark.parametrize("n", [0, 1, 40, 150])
def test_another_text_is_read_as_in_a_fresh_context(model_path: ModelPath, open_llama: Opener, n: int) -> None:
    path = model_path("llama-gqa")
    expected = read(open_llama(path, n_ubatch=32), OTHER)
    llm = open_llama(path, n_ubatch=32)
    stopped(llm, n, lambda: llm.eval(TEXT))
    llm.reset()
    assert np.array_equal(read(llm, OTHER), expected)


def test_behind_what_was_read_another_text_goes_on(model_path: ModelPath, open_llama: Opener) -> None:
    """As behind a reading that ended there by itself, between two batches."""
    path = model_path("llama-gqa")
    llm, other = open_llama(path, n_batch=96, n_ubatch=32), open_llama(path, n_batch=96, n_ubatch=32)

    def progress(*_: int) -> None:
        raise Stop

    other.progress = progress
    with pytest.raises(Stop):
        other.eval(TEXT)
    other.progress = None
    n = 0
    while llm.n_tokens != other.n_tokens:
        llm._forget()
        n += 10
        assert stopped(llm, n, lambda: llm.eval(TEXT)) == n + 1
    assert np.array_equal(read(llm, OTHER), read(other, OTHER))


LESS = MesaConfig(first_chunk=12, chunk=40, last_chunk=32, room=16, read_budget=32)


@pytest.mark.parametrize("mesa", [SMALL, LESS])
def test_each_token_of_an_answer(model_path: ModelPath, open_llama: Opener, mesa: MesaConfig) -> None:
    """Ended once each, through moves of the anchor: the next try is the token as it would have been."""
    path = model_path("llama-gqa")
    llm, other = (open_llama(path, mesa, kv=F16, flash=True) for _ in range(2))
    assert np.array_equal(read(llm, TEXT), read(other, TEXT))
    anchor, n_stopped = llm.plan().anchor, 0
    for i, token in enumerate(REST):
        n_tokens = llm.n_tokens
        stopped(llm, 1 + 2 * i, lambda token=token: llm.eval([token]))  # type: ignore[misc]
        if llm.n_tokens == n_tokens:
            n_stopped += 1
            llm.eval([token])
        assert np.array_equal(llm.scores[n_tokens], read(other, [token])[0])
        assert np.array_equal(_core.key_positions(llm._address), _core.key_positions(other._address))
        assert llm.read_ranges() == other.read_ranges()
    assert n_stopped > 15 and llm.plan().anchor > anchor


def test_keys_that_move_do_so_in_all_layers(model_path: ModelPath, open_llama: Opener) -> None:
    """The stair gets wider, and all keys move, some thousands at a time: ended between two of these."""
    path, n, more = model_path("llama-gqa"), 4600, random_tokens(2000, seed=5)
    options = dict(n_ctx=8192, logits_all=False)
    llm, other = open_llama(path, **options), open_llama(path, **options)
    for each in (llm, other):
        each.eval(random_tokens(n, seed=4))
    before = _core.key_positions(llm._address)
    other.eval(more)
    assert np.count_nonzero(_core.key_positions(other._address)[:n] - before) > 4096
    moved = []
    for n_looks in (1, 2, 3):  # before the batch, then before each group of keys
        assert stopped(llm, n_looks, lambda: llm.eval(more)) == n_looks + 1
        assert llm.n_tokens == n
        moved.append(np.count_nonzero(_core.key_positions(llm._address) - before))
    assert moved[0] == 0 and 0 < moved[1] < moved[2]
    llm.eval(more)
    assert np.array_equal(_core.key_positions(llm._address), _core.key_positions(other._address))
    for token in REST:
        llm.eval([token])
        other.eval([token])
        assert np.array_equal(llm._get_logits(llm.n_tokens - 1), other._get_logits(other.n_tokens - 1))


def test_what_is_generated_behind_it(model_path: ModelPath, open_llama: Opener) -> None:
    path = model_path("llama-gqa")
    options: dict[str, Any] = dict(n_batch=96, n_ubatch=32, logits_all=False)
    llm, fresh = open_llama(path, **options), open_llama(path, **options)

    def said(llm: MesaLlama) -> list[int]:
        return [token for token, _ in zip(llm.generate(TEXT, temp=0), range(20))]

    expected = said(fresh)
    for n in (0, 30, 200, 700):
        llm._forget()
        stopped(llm, n, lambda: said(llm))
        assert said(llm) == expected


def test_what_follows_is_not_sampled_from_what_was_thrown_away(model_path: ModelPath, open_llama: Opener) -> None:
    llm = open_llama(model_path("llama-gqa"), n_batch=96, n_ubatch=32, logits_all=False)
    llm.eval(TEXT[:100])
    expected = llm._get_logits(99).copy()
    stopped(llm, 30, lambda: llm.eval(OTHER))
    assert llm.n_tokens == 100
    assert worst(llm._get_logits(99), expected) <= 1e-5 and llm.n_tokens == 100


def test_less_is_read_behind_it(model_path: ModelPath, open_llama: Opener) -> None:
    """A token behind a text of which a part was read counts as generated, and does not read everything as a part of the text would."""
    llm = open_llama(model_path("llama-gqa"), LESS, n_ctx=1024, n_ubatch=32)
    llm.eval(TEXT)
    read_singly(llm, REST)
    assert llm.read_ranges() is not None
    stopped(llm, 1, lambda: llm.eval(OTHER))
    read_singly(llm, REST)
    assert llm.read_ranges() is not None


def test_vectors_of_texts(model_path: ModelPath, open_llama: Opener) -> None:
    for mesa in (SMALL, MesaConfig(enabled=False)):
        llm = MesaLlama(BUNDLED, mesa=mesa, n_ctx=512, embedding=True, pooling_type=1, n_threads=1, n_threads_batch=1)
        expected = llm.embed("The ferry leaves at noon.")
        for n in (0, 1, 20):
            stopped(llm, n, lambda llm=llm: llm.embed("Mara Lind has the key."))  # type: ignore[misc]
            assert llm.n_tokens == 0 and llm.embed("The ferry leaves at noon.") == expected
        llm.close()


@pytest.mark.parametrize("encoder", [True, False])
def test_an_embedding_model(tmp_path: Path, encoder: bool, capfd: pytest.CaptureFixture[str]) -> None:
    words = "the ferry island dog".split()
    path = write_bert(tmp_path / "bert.gguf", words=words) if encoder else BUNDLED
    with EmbeddingModel(path, n_threads=1, n_threads_batch=1) as model:
        expected = model.embed(words)
        for n in (0, 1, 20):
            model.interrupt = After(n)
            with pytest.raises(Stop):
                model.embed(words[::-1])
            model.interrupt = None
            assert np.array_equal(model.embed(words), expected)
    assert capfd.readouterr() == ("", "")


def test_a_recurrent_model_begins_anew(model_path: ModelPath, open_llama: Opener) -> None:
    """Stock llama.cpp: a state that was half computed cannot go back."""
    llm = open_llama(model_path("mamba"), MesaConfig(enabled=False), n_ubatch=32)
    expected = read(llm, TEXT)
    for n in (1, 30, 100):
        llm.reset()
        assert stopped(llm, n, lambda: llm.eval(TEXT)) == n + 1
        assert llm.n_tokens == 0
        assert np.array_equal(read(llm, TEXT), expected)


def test_nothing_is_logged(model_path: ModelPath, open_llama: Opener, capfd: pytest.CaptureFixture[str]) -> None:
    llm = open_llama(model_path("llama-gqa"))
    stopped(llm, 20, lambda: llm.eval(TEXT))
    assert capfd.readouterr() == ("", "")


#
# signals
#


def test_ctrl_c_within_a_batch(model_path: ModelPath, open_llama: Opener, hears_ctrl_c: None) -> None:
    """In the middle of it, not after it: Python's own handler is called while llama.cpp computes."""
    llm = open_llama(model_path("llama-gqa"))
    asked = []

    def press() -> None:
        asked.append(True)
        if len(asked) == 10:
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()

    expected = read(llm, TEXT)
    llm._forget()
    llm.interrupt = press

    def read_on() -> None:
        while True:
            llm.reset()
            llm.eval(TEXT)

    with pytest.raises(KeyboardInterrupt) as pressed:
        read_on()
    assert pressed.value.__context__ is None and len(asked) >= 10
    llm.interrupt = None
    llm.eval(TEXT[llm.n_tokens :])
    assert np.array_equal(llm.scores[: len(TEXT)], expected)


def test_signals_are_looked_for_without_being_asked(
    model_path: ModelPath, open_llama: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a signal's handler raises reaches the caller, and one that raises nothing does not disturb."""
    llm = open_llama(model_path("llama-gqa"))
    heard: list[int] = []

    def handle(number: int, _: object) -> None:
        heard.append(llm.n_tokens)
        if len(heard) > 1:
            raise Stop

    before = signal.signal(signal.SIGUSR1, handle)
    decode = llm._ctx.decode

    def decode_and_send(batch: Any) -> None:
        # blocked until llama.cpp runs: so nobody but the watch can hear it
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        decode(batch)

    try:
        expected = read(llm, TEXT)
        llm._forget()
        monkeypatch.setattr(llm._ctx, "decode", decode_and_send)
        llm.eval(TEXT[:10])
        with pytest.raises(Stop):
            llm.eval(TEXT[10:])
        monkeypatch.undo()
        llm.eval(TEXT[llm.n_tokens :])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(heard) == 2
    assert worst(llm.scores[: len(TEXT)], expected) <= 1e-5


ENDS = """
import sys, threading, time
import numpy as np
from mesa_gguf import MesaLlama, llama

llama.LOOK_SECONDS = 0.0
llm = MesaLlama(sys.argv[1], n_ctx=8192, n_batch=8192, n_ubatch=2048, n_threads=1, n_threads_batch=1)
tokens = np.random.default_rng(0).integers(3, llm.n_vocab(), 8000).tolist()

def read():
    while True:
        llm.reset()
        llm.eval(tokens)

threading.Thread(target=read, daemon=True).start()
time.sleep(0.05)
sum(range(10**6))
"""


def test_a_process_ends_while_a_thread_reads() -> None:
    """The thread that reads has ended before: it does not take hold of a Python that is being finalized, nor of a model that is freed."""
    done = run_python(ENDS, str(BUNDLED), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


#
# the server
#


def test_a_request_whose_client_went_away_ends_within_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = ServedLlama(BUNDLED, n_ctx=2048, n_batch=2048, n_ubatch=2048, n_threads=1, n_threads_batch=1)
    tokens = random_tokens(400, n_vocab=200)
    loop = asyncio.new_event_loop()
    engine = Engine(llm, Metrics())
    looks: list[bool] = []
    ask = llm.interrupt
    assert ask is not None
    logits: list[NDArray[np.float32]] = []

    def ask_and_leave() -> None:
        looks.append(True)
        if len(looks) == 30:
            engine.cancel(gone)
        ask()

    def work(_: Job) -> Iterator[str]:
        llm.reset()
        llm.eval(tokens)
        logits.append(llm._get_logits(len(tokens) - 1).copy())
        yield "done"

    gone, stays, again = (Job(name, work, loop, 60.0) for name in "abc")
    llm.interrupt = ask_and_leave
    for job in (gone, stays, again):
        engine.submit(job)
    engine.start()
    outcomes = []
    for job in (gone, stays, again):
        items: list[tuple[str, Any]] = []
        while not items or items[-1][0] == "item":
            items += loop.run_until_complete(job.channel.take(10))
        outcomes.append([kind for kind, _ in items])
    engine.close()
    loop.close()
    assert outcomes == [["error"], ["item", "end"], ["item", "end"]]
    assert np.array_equal(*logits) and engine.metrics.cancelled._value.get() == 1
