"""The plan: pure functions, held against the oracle, against definitions written out, and against their promises."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import oracle
from mesa_gguf import ConfigError, MesaConfig, MesaPlan, _core

ANY_LENGTH = st.integers(1, 30_000)


@st.composite
def plans(draw: st.DrawFn) -> MesaPlan:
    """Any plan, fitting into no T in particular."""
    sizes = draw(st.lists(st.integers(1, 60), max_size=8))
    starts = np.cumsum([0, *sizes]).tolist()
    return MesaPlan(starts, draw(st.integers(0, starts[-1])), draw(st.integers(1, 60)))


@st.composite
def params(draw: st.DrawFn, **fixed: Any) -> _core.Params:
    """Any options that are valid."""
    length = draw(st.integers(16, 4096))
    first = draw(st.integers(1, length // 2))
    chunk = draw(st.integers(1, length - first))
    last = draw(st.integers(1, length - first - 2))
    room = draw(st.integers(0, length - first - last - 1))
    lengths = {"train_length": length + draw(st.integers(0, 4096)), "reading_length": length}
    return _core.Params(**lengths, first_chunk=first, chunk=chunk, last_chunk=last, room=room, **fixed)


def breaks_of(n: int, kind: str, seed: int) -> NDArray[np.uint8] | None:
    if kind == "none":
        return None
    every = {"seldom": 0.003, "often": 0.1, "never": 0.0, "always": 1.0}[kind]
    return (np.random.default_rng(seed).random(n) < every).astype(np.uint8)


break_kinds = st.sampled_from(["none", "seldom", "often", "never", "always"])


# Positions.


def test_the_papers_example() -> None:
    """Equation 3 with N = 3, E = 2, seen from a query at distance 3 from the anchor."""
    query, plan = 30, MesaPlan([0, 27], anchor=27, stair_width=2)
    keys = plan.key_positions(query + 1)
    distances = plan.query_positions(query + 1)[-1] - keys[query - 9 :][::-1]
    assert distances.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]


@given(plan=plans(), more=st.integers(1, 100))
def test_positions_equal_the_oracles(plan: MesaPlan, more: int) -> None:
    n = plan.last_start + more
    tokens = np.arange(n)
    assert np.array_equal(plan.key_positions(n), oracle.key_positions(tokens, plan.anchor, plan.stair_width))
    last = tokens[plan.last_start :]
    assert np.array_equal(plan.query_positions(n), oracle.query_positions(last, plan.anchor, plan.stair_width))


@given(plan=plans(), more=st.integers(1, 100))
def test_number_of_positions(plan: MesaPlan, more: int) -> None:
    n = plan.last_start + more
    assert plan.n_positions(n) == 1 + max(plan.key_positions(n).max(), plan.query_positions(n).max())
    assert plan.key_positions(n).min() == 0


@given(plan=plans(), more=st.integers(1, 100))
def test_chunk_positions_equal_the_oracles(plan: MesaPlan, more: int) -> None:
    """The first chunk from 0 on, every middle chunk from F on."""
    starts, n = plan.chunk_starts, plan.last_start + more
    expected = np.arange(starts[1] if len(starts) > 1 else 0)
    for start, end in pairwise(starts[1:]):
        expected = np.concatenate([expected, oracle.chunk_queries(starts[1], start, end).positions])
    assert np.array_equal(plan.chunk_positions(n), expected)


@given(plan=plans(), steps=st.integers(0, 5))
def test_an_anchor_that_moves_by_stair_widths_leaves_the_stair(plan: MesaPlan, steps: int) -> None:
    anchor = plan.anchor + steps * plan.stair_width
    moved = MesaPlan([0, anchor + 1], anchor, plan.stair_width)
    assert np.array_equal(moved.key_positions(plan.anchor), plan.key_positions(plan.anchor))


# Who sees whom.


@given(plan=plans(), more=st.integers(1, 40))
def test_mask_is_the_chunk_triangular_one(plan: MesaPlan, more: int) -> None:
    """By the definition: query by query, chunk by chunk."""
    starts, n = plan.chunk_starts, plan.last_start + more
    expected = np.zeros((n, n), np.bool_)
    for start, end in pairwise([*starts, n]):
        for query in range(start, end):
            if start == starts[-1]:
                expected[query, : query + 1] = True
            else:
                expected[query, start : query + 1] = True
                if start > 0:
                    expected[query, : starts[1]] = True
    assert np.array_equal(plan.mask(n), expected)


@given(plan=plans(), more=st.integers(1, 40))
def test_mask_equals_the_oracles(plan: MesaPlan, more: int) -> None:
    assume(len(plan.chunk_starts) > 1)
    n = plan.last_start + more
    expected = np.zeros((n, n), np.bool_)
    for group in oracle.plan_queries(oracle.Plan(plan.chunk_starts, plan.anchor, plan.stair_width), n):
        expected[np.ix_(group.tokens, group.keys)] = group.visible
    assert np.array_equal(plan.mask(n), expected)


@given(
    plan=plans(),
    more=st.integers(1, 40),
    last=st.integers(1, 30),
    bias=st.sampled_from([0.0, 0.5, 1.0]),
    alibi=st.booleans(),
)
def test_mask_by_its_definition(plan: MesaPlan, more: int, last: int, bias: float, alibi: bool) -> None:
    """Query by query and key by key: ALiBi's distances; else the bias of the stair, and its share in the last chunk."""
    p = _core.Params(train_length=4096, first_chunk=1, chunk=1, last_chunk=last, stair_bias=bias)
    n = plan.last_start + more
    keys = plan.key_positions(n)
    chunk = plan.chunk_positions(n)
    lowered = -bias * np.log(plan.stair_width) if plan.anchor > 0 else 0.0
    expected = np.where(plan.mask(n), 0.0, -np.inf)
    for i, j in np.argwhere(plan.mask(n)):
        if alibi:
            in_last = plan.query_positions(i + 1)[-1] - keys[j] if i >= plan.last_start else 0
            expected[i, j] = -(in_last if i >= plan.last_start else chunk[i] - chunk[j])
        elif i >= plan.last_start:
            far = j < plan.anchor or i - j >= last
            expected[i, j] = lowered * (1.0 if far else max(0.0, 2 * (i - j) / last - 1))
    assert np.allclose(_core.mask(p, plan._plan, n, alibi), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["lm-infinite", "streaming-llm"])
def test_mask_of_the_methods_that_forget(method: str) -> None:
    p = _core.Params(train_length=128, first_chunk=8, chunk=64, last_chunk=16, method=method, window=20, n_sinks=3)
    i, j = np.indices((90, 90))
    seen = (j <= i) & ((j < 3) | (i - j < 20))
    assert np.array_equal(_core.mask(p, _core.Plan([0], 0, 1), 90), np.where(seen, 0.0, -np.inf))


# Log scaling.


def test_log_scale_equals_the_oracles() -> None:
    ours = _core.log_scale(512, 0, 5000)
    assert np.abs(ours - oracle.log_scaling(np.arange(5000), 512)).max() < 1e-6
    assert (ours[:512] == 1).all() and (ours[512:] > 1).all()


# Plans that are made.


@given(p=params(), n=ANY_LENGTH, kind=break_kinds, seed=st.integers(0, 9))
def test_a_made_plan_keeps_its_promises(p: _core.Params, n: int, kind: str, seed: int) -> None:
    breaks = breaks_of(n, kind, seed)
    try:
        plan = _core.make_plan(p, n, breaks)
    except ValueError as err:
        # a stair of width n would still be one position too long: R leaves it none
        assert "leave no position" in str(err)  # noqa: PT017
        assert p.last_chunk + p.room >= p.reading_length - 1
        return
    if n <= p.reading_length:
        assert plan == _core.Plan([0], 0, 1)
        return
    plan.validate(p, n)
    starts, R = plan.chunk_starts.tolist(), p.reading_length
    assert starts[:2] == [0, p.first_chunk]
    assert all(end - start <= p.chunk for start, end in pairwise(starts[1:]))  # so every chunk is inside R
    assert plan.anchor == starts[-1]
    # positions fit into R, with room
    assert plan.n_positions(n) + p.room <= R
    # E is the smallest that fits
    last = n - starts[-1]
    assert plan.stair_width == 1 or -(-plan.anchor // (plan.stair_width - 1)) + last + p.room > R
    # the last chunk is about as long as asked
    assert p.last_chunk <= last <= max(p.last_chunk, 1.5 * p.last_chunk)


@given(p=params(), n=ANY_LENGTH, more=st.integers(0, 20_000), kind=break_kinds, seed=st.integers(0, 9))
def test_borders_do_not_depend_on_what_follows(p: _core.Params, n: int, more: int, kind: str, seed: int) -> None:
    """All but the last two borders are those of any longer text that begins the same."""
    assume(n > p.reading_length)
    breaks = breaks_of(n + more, kind, seed)
    short = _core.make_plan(p, n, None if breaks is None else breaks[:n]).chunk_starts.tolist()
    long = _core.make_plan(p, n + more, breaks).chunk_starts.tolist()
    assert long[: len(short) - 2] == short[:-2]


@given(p=params(), n=ANY_LENGTH, seed=st.integers(0, 9))
def test_borders_lie_on_breaks(p: _core.Params, n: int, seed: int) -> None:
    """Wherever there is a break in the second half of a chunk."""
    breaks = breaks_of(n, "often", seed)
    starts = _core.make_plan(p, n, breaks).chunk_starts.tolist()
    for before, start in pairwise(starts[1:-1]):
        half = before + p.chunk // 2
        possible = [s for s in range(half + 1, before + p.chunk + 1) if breaks[s - 1]]
        assert start == (possible[-1] if possible else before + p.chunk)


def test_full_chunks_then_a_shorter_one_then_the_last() -> None:
    p = _core.Params(train_length=512, first_chunk=32, chunk=240, last_chunk=128, room=64)
    plan = _core.make_plan(p, 1600)
    assert plan.chunk_starts.tolist() == [0, 32, 272, 512, 752, 992, 1232, 1472]
    assert _core.make_plan(p, 1500).chunk_starts.tolist() == [0, 32, 272, 512, 752, 992, 1232, 1372]
    assert plan.stair_width == 5  # ceil(1472/4) + 128 + 64 > 512


def test_a_fixed_stair_width_is_kept_or_refused() -> None:
    config = MesaConfig(train_length=512, stair_width=20)
    assert config.make_plan(3000, 0).stair_width == 20
    with pytest.raises(ConfigError, match=r"stair_width 20 is too small for 30000 tokens.*use \d+ or more"):
        config.make_plan(30_000, 0)


@given(p=params(), n=st.integers(1, 4096))
def test_a_text_inside_R_is_read_plainly(p: _core.Params, n: int) -> None:
    assert _core.make_plan(p, min(n, p.reading_length)) == _core.Plan([0], 0, 1)


# Plans that go on.


@given(p=params(), n_past=st.integers(1, 9000), more=st.integers(1, 9000), back=st.integers(0, 9000), kind=break_kinds)
def test_an_extended_plan_keeps_what_was_read(p: _core.Params, n_past: int, more: int, back: int, kind: str) -> None:
    """Also after a roll-back into the middle of what the plan was made for."""
    breaks = breaks_of(n_past + back + more, kind, 3)
    cut = (lambda n: None) if breaks is None else (lambda n: breaks[:n])
    old = _core.make_plan(p, n_past + back, cut(n_past + back))
    new = _core.extend_plan(p, old, n_past, n_past + more, cut(n_past + more))
    n = n_past + more
    assert new.n_positions(n) <= p.reading_length
    assert new.last_start <= n
    if n <= p.reading_length and new.last_start == 0:
        return
    # who saw whom among the tokens that were read in chunks
    m = min(n_past, old.last_start, new.last_start)
    if m > 0:
        read_before, read_now = (plan.chunk_starts[plan.chunk_starts < m].tolist() for plan in (old, new))
        assert read_now == read_before
    # tokens still to be read in a chunk find it inside R
    starts = new.chunk_starts.tolist()
    assert all(end - start <= p.chunk for start, end in pairwise(starts[1:]) if end > n_past)


def test_a_chunk_that_was_read_in_part_is_not_cut_before_its_end() -> None:
    """Not even where a line ends in what was read: found by the property above, once in very many runs."""
    p = _core.Params(train_length=43, first_chunk=1, chunk=7, last_chunk=1, room=39)
    breaks = np.zeros(191, np.uint8)
    breaks[[20, 186]] = 1
    old = _core.make_plan(p, 190, breaks[:190])
    assert old.chunk_starts.tolist()[-3:] == [175, 182, 189]
    assert _core.extend_plan(p, old, 188, 191, breaks).chunk_starts.tolist()[-3:] == [182, 189, 190]


def test_an_extended_plan_moves_the_anchor_for_a_short_text() -> None:
    p = _core.Params(train_length=512, first_chunk=32, chunk=240, last_chunk=128, room=64)
    old = _core.make_plan(p, 1600)
    assert _core.extend_plan(p, old, 1600, 1650) == old  # room was left
    new = _core.extend_plan(p, old, 1600, 1700)
    assert new.chunk_starts.tolist() == old.chunk_starts.tolist()
    assert new.anchor > old.anchor and (new.anchor - old.anchor) % old.stair_width == 0


def test_an_extended_plan_cuts_a_long_text_into_chunks() -> None:
    p = _core.Params(train_length=512, first_chunk=32, chunk=240, last_chunk=128, room=64)
    old = _core.make_plan(p, 1600)
    new = _core.extend_plan(p, old, 1650, 3000).chunk_starts.tolist()
    assert new[: len(old.chunk_starts)] == old.chunk_starts.tolist()
    assert 1650 in new
    assert new[-1] == 3000 - 128


@pytest.mark.parametrize(("n_past", "n_tokens"), [(10, 10), (10, 9), (-1, 10)])
def test_an_extended_plan_needs_more_tokens(n_past: int, n_tokens: int) -> None:
    p = _core.Params.default(512)
    with pytest.raises(ValueError, match="n_tokens"):
        _core.extend_plan(p, _core.Plan([0], 0, 1), n_past, n_tokens)


# Options.


@pytest.mark.parametrize("length", [8, 9, 15, 16, 64, 128, 500, 512, 2048, 4096, 131072])
def test_defaults_work_for_any_trained_length(length: int) -> None:
    plan = MesaConfig().make_plan(20 * length, length)
    assert plan.n_positions(20 * length) <= length


@pytest.mark.parametrize("length", [8, 64, 512, 2048, 2**30, 2**31 - 1])
def test_defaults_that_are_not_the_papers(length: int) -> None:
    mesa, exact = (_core.Params.default(length, method) for method in ("mesa", "mesa-exact"))
    assert (mesa.stair_bias, mesa.room, mesa.log_length) == (0.5, length // 2, min(2**31 - 1, 4 * length))
    assert (exact.stair_bias, exact.room, exact.log_length) == (0.0, length // 4, length)


@pytest.mark.parametrize(
    ("length", "last_chunk"),
    [(8, 2), (64, 16), (512, 128), (1024, 256), (2048, 256), (3072, 384), (4096, 512), (131072, 512)],
)
def test_the_last_chunk_is_a_quarter_of_a_short_trained_length(length: int, last_chunk: int) -> None:
    assert _core.Params.default(length).last_chunk == last_chunk


@pytest.mark.parametrize("last_chunk", [1, 64, 128, 200, 256, 383, 384, 400, 479])
def test_a_long_last_chunk_leaves_positions_to_the_stair(last_chunk: int) -> None:
    """T/4 of them, if there are as many; the room is what is left, at most T/2."""
    params = MesaConfig(last_chunk=last_chunk).params(512)
    assert params.room == min(256, max(0, 512 - last_chunk - 128))


@pytest.mark.parametrize("length", [8, 100, 512, 2048])
@pytest.mark.parametrize("method", _core.METHODS)
def test_a_reading_length_is_a_trained_length_of_its_own(length: int, method: str) -> None:
    """All numbers but T follow from R."""
    read, trained = (
        MesaConfig(method=method, reading_length=length).params(2048),
        MesaConfig(method=method).params(length),
    )
    names = {name for name in dir(read) if not name.startswith("_")} - {"fill", "default", "train_length"}
    assert {name: getattr(read, name) for name in names} == {name: getattr(trained, name) for name in names}
    assert (read.train_length, trained.train_length) == (2048, length)


@pytest.mark.parametrize(
    ("length", "chunk"), [(512, 480), (2048, 1948), (4095, 3995), (4096, 1024), (8192, 1024), (131072, 1024)]
)
def test_chunks_of_a_long_trained_length_are_short(length: int, chunk: int) -> None:
    assert MesaConfig().params(length).chunk == chunk
    assert _core.Params.default(length).chunk == chunk
    assert MesaConfig(reading_length=400).params(length).chunk == 375


@pytest.mark.parametrize("field", ["first_chunk", "chunk", "last_chunk", "room"])
@pytest.mark.parametrize("value", [1, 2, 50, 200])
def test_one_option_alone_works_with_the_defaults_of_the_others(field: str, value: int) -> None:
    config = replace(MesaConfig(), **{field: value})
    assert config.make_plan(5000, 512).n_positions(5000) <= 512


INVALID = [-1, 2**31, 10**30, 1.5, "7", True, [3]]
LEAST_ONE = ["train_length", "reading_length", "first_chunk", "chunk", "last_chunk", "stair_width"]


@pytest.mark.parametrize(
    ("field", "value"), [*product([*LEAST_ONE, "room"], INVALID), *((field, 0) for field in LEAST_ONE)]
)
def test_an_invalid_option_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        MesaConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(first_chunk=100, chunk=413), r"first_chunk \+ chunk is 513.*chunk at most 412"),
        (dict(first_chunk=512), "first_chunk is 512, not less than reading_length"),
        (dict(first_chunk=2**31 - 1, chunk=2**31 - 1), "first_chunk is 2147483647, not less than reading_length"),
        (dict(first_chunk=511, chunk=2**31 - 1), r"first_chunk \+ chunk is 2147484158"),
        (dict(last_chunk=512), "last_chunk"),
        (dict(first_chunk=100, last_chunk=300, room=112), r"first_chunk \+ last_chunk \+ room is 512"),
        (dict(train_length=7), "train_length is 7"),
        (dict(reading_length=7), r"reading_length is 7: it must lie between 8 and train_length \(512\)"),
        (dict(reading_length=513), "reading_length is 513"),
        (dict(train_length=400, reading_length=401), r"reading_length is 401: .* train_length \(400\)"),
        (
            dict(reading_length=256, first_chunk=56, chunk=201),
            r"first_chunk \+ chunk is 257, more than reading_length \(256\)",
        ),
        (dict(plan=[0, 5]), "plan must be a MesaPlan"),
        (dict(log_length=1), "log_length is 1: it must be 2 or more"),
        (dict(stair_bias=-0.5), "stair_bias is -0.5"),
        (dict(stair_bias=float("nan")), "stair_bias is nan"),
        (dict(stair_bias="much"), "stair_bias is 'much'"),
        (dict(method="star", stair_bias=0.5), "stair_bias is for the method mesa: star has none"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MesaConfig(**options).params(512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0, 1), "begin with 0"),
        (([1, 5], 0, 1), "begin with 0"),
        (([0, 5, 5], 0, 1), "must grow: 5 follows 5"),
        (([0, 5, 3], 0, 1), "must grow"),
        (([0, 5], -1, 1), "anchor is -1"),
        (([0, 5], 5, 0), "stair_width is 0"),
        (([0, 5], 5, -3), "stair_width is -3"),
        (([0, 2**31], 5, 1), "."),
        (("0x", 0, 1), "."),
    ],
)
def test_an_invalid_plan_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MesaPlan(*arguments)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MesaPlan([0, 512, 600], 600, 9), "the first chunk has 512"),
        (MesaPlan([0, 100, 513], 513, 9), "the chunk that starts at 100 has 413 tokens"),
        (MesaPlan([0, 100, 400], 401, 9), "anchor is 401"),
        (MesaPlan([0, 100, 500, 900], 900, 9), "after the end of the text"),
    ],
)
def test_a_plan_by_hand_must_fit(plan: MesaPlan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MesaConfig(plan=plan).make_plan(800, 512)


@given(n=st.integers(-5, 0))
def test_a_text_of_no_tokens_has_no_plan(n: int) -> None:
    with pytest.raises(ConfigError, match="cannot be planned"):
        MesaConfig().make_plan(n, 512)


def test_breaks_must_be_one_a_token() -> None:
    with pytest.raises(ConfigError, match="one value for each of the 2000 tokens"):
        MesaConfig().make_plan(2000, 512, np.zeros(1999))


def test_options_are_all_documented() -> None:
    for field in fields(MesaConfig):
        assert f"{field.name}:" in (MesaConfig.__doc__ or "")


@pytest.mark.parametrize("method", ["mesa", "mesa-exact", "stair", "leaky-rerope", "self-extend"])
def test_a_fixed_stair_width_must_fit_the_text_and_no_more(method: str) -> None:
    """Alike with and without chunks: room for generation is what "auto" leaves, not what a text needs."""
    options: dict[str, Any] = (
        dict(method=method, last_chunk=64, room=100) if method.startswith("mesa") else dict(method=method, room=100)
    )
    refused = []
    for n in range(513, 3000, 7):
        try:
            plan = MesaConfig(**options, stair_width=4).make_plan(n, 512)
        except ConfigError as err:
            assert f"stair_width 4 is too small for {n} tokens" in str(err)  # noqa: PT017
            refused.append(n)
        else:
            assert plan.stair_width == 4
            assert not refused, f"{n} tokens fit, {refused[-1]} do not"
    # by definition: the longest text whose distances stay below T
    window = 256
    longest = window + 4 * (511 - window) + 1 if not method.startswith("mesa") else None
    assert refused
    if longest:
        assert refused[0] - 7 <= longest < refused[0]


def test_lengths_near_the_largest_number_do_not_overflow() -> None:
    for method in ("stair", "rerope", "leaky-rerope", "self-extend", "lm-infinite"):
        width = MesaConfig(method=method).make_plan(2**31 - 1, 512).stair_width
        assert width == 1 if method in ("rerope", "lm-infinite") else width > 2**31 // 256


# Arrays and objects.


def test_chunk_starts_are_a_view_that_keeps_the_plan_alive() -> None:
    starts = _core.make_plan(_core.Params.default(512), 5000).chunk_starts
    assert isinstance(starts.base, _core.Plan)
    assert not starts.flags.owndata
    assert starts.tolist()[:2] == [0, 32]


def test_chunk_starts_cannot_be_written() -> None:
    starts = _core.Plan([0, 5, 9], 9, 2).chunk_starts
    with pytest.raises(ValueError, match="read-only"):
        starts[0] = 1


def test_dtypes() -> None:
    plan = MesaPlan([0, 5, 9], 9, 2)
    for array in (plan.key_positions(20), plan.query_positions(20), plan.chunk_positions(20), plan._plan.chunk_starts):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert plan.mask(20).dtype == np.bool_
    assert _core.log_scale(512, 0, 4).dtype == np.float32


def test_plans_compare_by_value() -> None:
    a, b, c = MesaPlan([0, 5, 9], 9, 2), MesaPlan([0, 5, 9], 9, 2), MesaPlan([0, 5, 9], 9, 3)
    assert a == b and hash(a) == hash(b) and a != c
    assert a != "plan"
    assert eval(repr(a)) == a
    assert MesaPlan([0], 0, 1).is_plain and not a.is_plain


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4)])
def test_ranges_are_checked(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        _core.Plan([0, 5], 5, 2).key_positions(start, stop)
