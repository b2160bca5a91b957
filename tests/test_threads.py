"""Two contexts at once: Python threads really run together, because the interpreter is left while llama.cpp decodes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import F16, SMALL, ModelPath, Opener, random_tokens, read
from mesa_gguf import MesaConfig, MesaLlama

Turn = Callable[[MesaLlama], list[NDArray[np.float32]]]


def conversation(seed: int) -> Turn:
    """A text past T, an answer through moves of the anchor, a roll back, another text, a state saved and loaded."""

    def turn(llm: MesaLlama) -> list[NDArray[np.float32]]:
        logits = [read(llm, random_tokens(300 + 40 * seed, seed=seed))]
        logits += [read(llm, [token]) for token in random_tokens(50, seed=seed + 10)]
        llm.n_tokens -= 60
        state = llm.save_state()
        logits.append(read(llm, random_tokens(150, seed=seed + 20)))
        llm.load_state(state)
        logits.append(read(llm, random_tokens(20, seed=seed + 30)))
        return logits

    return turn


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("flash", [False, True])
def test_two_contexts_in_two_threads_read_as_alone(
    model_path: ModelPath, open_llama: Opener, flash: bool, n_threads: int
) -> None:
    """Bit for bit, over and over; the second context has another plan, another text and other batches. Each computes with
    n_threads of ggml's."""
    path = model_path("llama-gqa")
    turns = [conversation(0), conversation(1)]
    options: dict[str, Any] = dict(kv=F16, flash=flash, n_ctx=1024, n_threads=n_threads, n_threads_batch=n_threads)

    def open_both() -> list[MesaLlama]:
        other = MesaConfig(first_chunk=20, chunk=60, last_chunk=24)
        return [open_llama(path, SMALL, **options), open_llama(path, other, n_batch=96, **options)]

    alone = [turn(llm) for turn, llm in zip(turns, open_both(), strict=True)]

    both, errors = open_both(), []
    start = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(3):
                both[number].reset()
                for got, expected in zip(turns[number](both[number]), alone[number], strict=True):
                    assert np.array_equal(got, expected)
        except BaseException as err:
            errors.append((number, err))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    assert errors == []


def test_each_thread_is_told_its_own_error(model_path: ModelPath, open_llama: Opener) -> None:
    """What fails here is not told there, also between a call and the question why it failed."""
    library = ctypes.CDLL(bindings._lib._name)  # its functions let other threads run while they do
    library.llama_mesa_last_error.restype = ctypes.c_char_p
    library.llama_mesa_prompt.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    contexts = [open_llama(model_path("llama-gqa"))._address for _ in range(2)]
    wrong: list[bytes] = []
    start = threading.Barrier(2)

    def work(number: int) -> None:
        start.wait()
        for i in range(2000):
            n = -(2 * i + number)
            assert library.llama_mesa_prompt(contexts[number], n, None) == -1
            told = library.llama_mesa_last_error()
            if told != f"a text of {n} tokens cannot be planned".encode():
                wrong.append(told)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []
