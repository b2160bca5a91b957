"""The reading length R apart from the trained length T: R decides where texts are cut and how far distances go, T what is possible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import F32, SMALL, ModelPath, Opener, Stock, random_tokens, read, read_singly, worst
from mesa_gguf import ConfigError, MesaConfig, MesaPlan, PromptError, _core

KIND = "llama"
T, R = 128, 64

NARROW = replace(SMALL, reading_length=R, first_chunk=8, chunk=24, last_chunk=16, room=8, log_length=R)
SHORT = replace(NARROW, reading_length=None, train_length=R)

LONG, REST = random_tokens(350, seed=1), random_tokens(60, seed=2)


def test_within_R_a_text_is_stock(model_path: ModelPath, open_llama: Opener, run_stock: Stock) -> None:
    """Bit for bit, in a prompt and one by one; at R + 1 it is read in chunks."""
    texts = [LONG[: R - 10], *([token] for token in REST[:10])]
    stock, _ = run_stock(model_path(KIND), texts, flash_attn=False, type_k=F32, type_v=F32)
    llm = open_llama(model_path(KIND), MesaConfig(reading_length=R))
    assert np.array_equal(np.concatenate([read(llm, text) for text in texts]), stock)
    assert (llm.n_tokens, llm.plan().is_plain) == (R, True)
    llm.reset()
    read(llm, LONG[: R + 1])
    assert len(llm.plan().chunk_starts) > 1


@pytest.mark.parametrize("method", ["mesa", "mesa-exact", "star", "rerope", "self-extend", "streaming-llm"])
def test_reading_at_R_is_reading_with_a_T_of_R(model_path: ModelPath, open_llama: Opener, method: str) -> None:
    """Bit for bit: prompts, tokens one by one, another text behind them. T itself changes nothing below it."""
    narrow, short = (
        open_llama(model_path(KIND), MesaConfig(method=method, **length))
        for length in ({"reading_length": R}, {"train_length": R})
    )
    for llm in (narrow, short):
        read(llm, LONG)
        read_singly(llm, REST)
        read(llm, LONG[:100])
    n = narrow.n_tokens
    assert np.array_equal(narrow.scores[:n], short.scores[:n])
    assert narrow.plan() == short.plan()
    assert (narrow.train_length, narrow.reading_length) == (T, R)
    if method.startswith("mesa"):
        assert narrow.plan().n_positions(n) <= R


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    reading_length=st.integers(48, 128),
)
def test_positions_stay_below_R_whatever_is_read(lengths: list[int], reading_length: int) -> None:
    params = MesaConfig(reading_length=reading_length, room=4, last_chunk=12).params(T)
    plan, n_past = MesaPlan([0], 0, 1)._plan, 0
    for n in lengths:
        plan = _core.extend_plan(params, plan, n_past, n_past + n)
        n_past += n
        assert plan.n_positions(n_past) <= reading_length
    assert (n_past <= reading_length) == (plan == _core.Plan([0], 0, 1))


def test_a_state_goes_on_by_the_length_that_it_was_read_with(model_path: ModelPath, open_llama: Opener) -> None:
    wide, narrow = (open_llama(model_path(KIND), replace(NARROW, reading_length=length)) for length in (100, R))
    fresh = read(narrow, LONG)
    read(wide, LONG)
    state = wide.save_state()
    expected = read_singly(wide, REST)
    narrow.load_state(state)
    assert np.array_equal(read_singly(narrow, REST), expected)
    assert narrow.plan() == wide.plan()
    narrow.reset()  # and the next text is this context's own
    assert np.array_equal(read(narrow, LONG), fresh)


def test_what_was_read_before_mesa_was_enabled_may_fill_T(model_path: ModelPath, open_llama: Opener) -> None:
    """All of it at positions that the model knows; it is the stair's with the next token."""
    stock = open_llama(model_path(KIND), MesaConfig(enabled=False))
    plain = read(stock, LONG[:T])
    params = NARROW.params(T)
    _core.enable(stock._address, params)
    assert _core.prompt(stock._address, 4) == T
    plan = _core.plan(stock._address)
    assert plan.n_positions(T + 4) <= R
    assert np.isfinite(plain).all()


def test_a_plan_by_hand_may_use_all_of_T(model_path: ModelPath, open_llama: Opener) -> None:
    """Its maker knows why; only the chunks that are made by themselves keep to R."""
    plan = MesaPlan([0, 8, 118, 200], anchor=200, stair_width=2)
    wide = open_llama(model_path(KIND), replace(SMALL, first_chunk=8, chunk=110, plan=plan))
    narrow = open_llama(model_path(KIND), replace(NARROW, log_length=T, plan=plan))
    assert worst(read(wide, LONG[:210]), read(narrow, LONG[:210])) < 1e-4
    with pytest.raises(ConfigError, match="more than train_length"):
        open_llama(model_path(KIND), replace(NARROW, plan=MesaPlan([0, 8, 130, 200], anchor=200, stair_width=2)))


def test_kept_chunks_do_not_depend_on_R(model_path: ModelPath, open_llama: Opener) -> None:
    """The same name and the same rows, so that a library serves after R was changed; where they stand is R's matter."""
    first, chunks = LONG[:8], [LONG[8:40], LONG[40:64], REST[:30]]
    wide, narrow = (open_llama(model_path(KIND), config) for config in (replace(SMALL, first_chunk=8), NARROW))
    assert wide.chunk_origin == narrow.chunk_origin
    kept = []
    for llm in (wide, narrow):
        read(llm, first)
        rows = []
        for chunk in chunks:
            llm.n_tokens = 8
            read(llm, chunk)
            rows.append(llm.save_chunk(8, 8 + len(chunk)))
        llm.n_tokens = 8
        kept.append(rows)
    assert kept[0] == kept[1]
    for llm, rows, length in ((wide, kept[1], T), (narrow, kept[0], R)):
        for chunk, data in zip(chunks, rows):
            llm.load_chunk(chunk, data)
        read(llm, REST[30:40])
        assert llm.plan().n_positions(llm.n_tokens) <= length
        assert (llm.plan().anchor > 0) == (8 + 32 + 24 + 30 + llm._params.last_chunk > length)  # type: ignore[union-attr]


def test_a_kept_chunk_that_R_would_not_make_is_loaded(model_path: ModelPath, open_llama: Opener) -> None:
    """It was read well elsewhere. Reading it here is not plain any more, so that it cannot be kept."""
    wide, narrow = (open_llama(model_path(KIND), config) for config in (replace(SMALL, first_chunk=8), NARROW))
    for llm in (wide, narrow):
        read(llm, LONG[:108])
    data = wide.save_chunk(8, 108)
    with pytest.raises(PromptError, match="not read plainly"):
        narrow.save_chunk(8, 108)
    narrow.reset()
    read(narrow, LONG[:8])
    narrow.load_chunk(LONG[8:108], data)
    logits = read(narrow, REST[:10])
    assert np.isfinite(logits).all()
    assert narrow.plan().n_positions(118) <= R
