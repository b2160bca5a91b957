"""The oracle against the authors' program, the paper's example, stock llama.cpp, and itself read in pieces."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import make_models
from oracle import ARCHITECTURES, Model, Plan, Rope, State, key_positions, log_scaling, logits, query_positions, replay, stair

DATA = Path(__file__).parent / "data"
STOCK = DATA / "stock-tiny.npz"
AUTHORS = ["authors-L1000-E20", "authors-L2500-E7"]


@pytest.fixture(scope="module")
def reader() -> Model:
    return Model.from_gguf(DATA / "reader-f32.gguf")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.from_gguf(make_models.write_llama(tmp_path_factory.mktemp("tiny") / "llama.gguf"))


@pytest.fixture
def text() -> NDArray[np.int64]:
    """150 tokens for the tiny models."""
    return np.random.default_rng(7).integers(0, 128, 150)


def worst(a: NDArray, b: NDArray) -> float:
    return float(np.abs(a - b).max())


# Positions.


def test_stair_is_the_papers_example() -> None:
    assert [stair(t, 3, 2) for t in range(10)] == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("anchor", [0, 1, 37, 40, 99])
@pytest.mark.parametrize("stair_width", [1, 2, 7, 50])
def test_anchored_stair_is_equation_3(anchor: int, stair_width: int) -> None:
    """A query at distance N from the anchor sees every key where equation 3 puts it."""
    tokens = np.arange(130)
    keys = key_positions(tokens, anchor, stair_width)
    queries = query_positions(tokens[anchor:], anchor, stair_width)
    assert keys[0] == 0
    assert set(np.diff(keys)) <= {0, 1}
    for query in range(anchor, 130):
        woven = queries[query - anchor] - keys[: query + 1]
        assert woven.tolist() == [stair(query - key, query - anchor, stair_width) for key in range(query + 1)]


def test_width_one_and_anchor_zero_are_stock_positions() -> None:
    tokens = np.arange(100)
    for anchor, stair_width in [(0, 1), (0, 9), (60, 1)]:
        assert np.array_equal(key_positions(tokens, anchor, stair_width), tokens)
        assert np.array_equal(query_positions(tokens[anchor:], anchor, stair_width), tokens[anchor:])


def test_anchor_moves_by_stair_widths_leave_the_stair() -> None:
    """Distances between keys on the stair stay; the frame as a whole does too."""
    before, after = (key_positions(np.arange(300), anchor, 7) for anchor in (100, 100 + 3 * 7))
    assert np.array_equal(before[:100], after[:100])


def test_query_before_the_anchor_is_refused(tiny: Model, text: NDArray) -> None:
    with pytest.raises(ValueError, match="before the anchor"):
        logits(tiny, text, Plan([0, 10, 100], anchor=101, stair_width=2))


def test_log_scaling_starts_past_the_trained_length() -> None:
    scale = log_scaling(np.arange(1024), 512)
    assert (scale[:512] == 1).all() and (scale[512:] > 1).all()
    assert scale[1023] == pytest.approx(10 / 9)  # ln 1024 / ln 512
    assert (log_scaling(np.arange(1024), None) == 1).all()


# Against the authors' program.


@pytest.mark.parametrize("name", AUTHORS)
def test_authors_logits(reader: Model, name: str) -> None:
    run = np.load(DATA / f"{name}.npz")
    assert reader.train_length == run["train_length"]
    plan = Plan(run["chunk_starts"].tolist(), int(run["anchor"]), int(run["stair_width"]))
    log_scaling_T = reader.train_length if run["log_scaling"] else None
    ours = logits(reader, run["tokens"], plan, log_scaling_T, logits_from=int(run["logits_from"]))
    error = worst(ours, run["logits"])
    print(f"\n{name}: max |dlogit| = {error:.5f} on a scale of {np.abs(run['logits']).max():.1f}")
    assert error <= 0.01


@pytest.mark.parametrize("change", ["anchor", "stair_width", "last_start", "log_scaling"])
def test_authors_logits_tell_a_wrong_plan(reader: Model, change: str) -> None:
    """The golden runs are sharp: one token off in the plan is off by more than 1."""
    run = np.load(DATA / "authors-L1000-E20.npz")
    starts, anchor, stair_width = run["chunk_starts"].tolist(), int(run["anchor"]), int(run["stair_width"])
    log_scaling_T: int | None = reader.train_length
    if change == "anchor":
        anchor += 1
    elif change == "stair_width":
        stair_width += 1
    elif change == "last_start":
        starts[-1] -= 1
    else:
        log_scaling_T = None
    plan = Plan(starts, anchor, stair_width)
    ours = logits(reader, run["tokens"], plan, log_scaling_T, logits_from=int(run["logits_from"]))
    assert worst(ours, run["logits"]) > 1


# Against stock llama.cpp.


@pytest.mark.parametrize("name", make_models.SUPPORTED)
def test_stock_llama_cpp_logits(tmp_path: Path, name: str) -> None:
    """Recorded by this file run as a program: the last rows of a text, f32 cache, without and with flash attention.

    note: flash attention rounds keys and values to f16, and GELU is rounded to f16 on a CPU.
    """
    run = np.load(STOCK)
    path = make_models.SUPPORTED[name](tmp_path / "model.gguf")
    for kv_half, suffix, limit in [(False, "", 1e-3), (True, "-flash", 3e-3)]:
        theirs = run[name + suffix]
        ours = logits(Model.from_gguf(path, kv_half), run["tokens"], logits_from=len(run["tokens"]) - len(theirs))
        error = worst(ours, theirs)
        print(f"\n{name}{suffix}: max |dlogit| = {error:.6f} on a scale of {np.abs(theirs).max():.1f}")
        assert error <= limit


@pytest.mark.parametrize("name", [name for name in make_models.SUPPORTED if name != "nope"])
def test_tiny_models_feel_positions(tmp_path: Path, text: NDArray, name: str) -> None:
    """A position that is wrong by one shows, in every kind of model: or the tests built on them would prove nothing."""
    model = Model.from_gguf(make_models.SUPPORTED[name](tmp_path / "model.gguf"))
    right, wrong = (logits(model, text, Plan([0, 10, 50, 100], anchor, 4), logits_from=100) for anchor in (96, 97))
    assert worst(right, wrong) > 0.3


def test_nope_feels_no_positions_but_chunks(tmp_path: Path, text: NDArray) -> None:
    model = Model.from_gguf(make_models.SUPPORTED["nope"](tmp_path / "model.gguf"))
    plans = [Plan([0, 10, 50, 100], 100, 4), Plan([0, 10, 50, 100], 0, 1), Plan([0, 10, 100], 100, 4)]
    first, other_stair, other_chunks = (logits(model, text, plan) for plan in plans)
    assert worst(first, other_stair) < 1e-9
    assert worst(first, other_chunks) > 1


@pytest.mark.parametrize(("name", "limit"), [("F16", 0.02), ("Q8_0", 0.5), ("Q4_0", 10.0)])
def test_weight_types(tmp_path: Path, text: NDArray, name: str, limit: float, tiny: Model) -> None:
    path = make_models.write_llama(tmp_path / "model.gguf", weight_type=gguf.GGMLQuantizationType[name])
    assert 0 < worst(logits(Model.from_gguf(path), text), logits(tiny, text)) < limit


@pytest.mark.parametrize("name", [name for name in make_models.REFUSED if name not in ARCHITECTURES])
def test_other_architectures_are_not_known(tmp_path: Path, name: str) -> None:
    path = make_models.REFUSED[name](tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=name):
        Model.from_gguf(path)


# RoPE.


def test_rope_scores_depend_on_the_distance_only() -> None:
    rope = Rope.make(8, 10000.0, neox=True)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 12))  # 4 dimensions are not rotated
    scores = [(rope(q, np.array([i + 3])) * rope(k, np.array([i]))).sum() for i in (0, 5, 1000)]
    assert scores == pytest.approx([scores[0]] * 3)
    assert np.array_equal(rope(q, np.array([9]))[..., 8:], q[..., 8:])


def test_yarn_bounds() -> None:
    """YaRN leaves the fast pairs, interpolates the slow ones, and multiplies by its mscale."""
    plain = Rope.make(64, 10000.0, neox=False)
    yarn = Rope.make(64, 10000.0, neox=False, scaling="yarn", factor=8.0, original_length=4096, attn_factor=0.5)
    assert yarn.frequencies[0] == plain.frequencies[0]
    assert yarn.frequencies[-1] == pytest.approx(plain.frequencies[-1] / 8)
    assert yarn.magnitude == pytest.approx(0.5 * (1 + 0.1 * np.log(8)))


# Read in pieces.


def test_replay_is_the_plan(tiny: Model, text: NDArray) -> None:
    """First chunk, chunks, last chunk, one after the other: the same logits as the whole text by its plan."""
    plan = Plan([0, 12, 50, 85, 120], anchor=113, stair_width=3)
    events = [
        ("last", text[:12]),
        *[("chunk", text[start:end]) for start, end in [(12, 50), (50, 85), (85, 120)]],
        ("anchor", 113, 3),
        ("last", text[120:140]),
        *[("last", text[i : i + 1]) for i in range(140, 150)],
    ]
    for log_scaling_T in (None, 128):
        whole = logits(tiny, text, plan, log_scaling_T)
        pieces = np.concatenate(replay(tiny, events, first_chunk=12, log_scaling_T=log_scaling_T))
        assert worst(whole, pieces) < 1e-9


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of its two layers the first has a window of 8 tokens."""
    return Model.from_gguf(make_models.write_gemma2(tmp_path_factory.mktemp("windowed") / "m.gguf", sliding_window=8))


def test_replay_of_windows_is_the_plan(windowed: Model, text: NDArray) -> None:
    plan = Plan([0, 12, 50, 85, 120], anchor=113, stair_width=3)
    events = [
        ("last", text[:12]),
        *[("chunk", text[start:end]) for start, end in [(12, 50), (50, 85), (85, 120)]],
        ("anchor", 113, 3),
        ("last", text[120:149]),
        ("last", text[149:]),
    ]
    whole = logits(windowed, text, plan, log_scaling_T=128)
    assert worst(whole, np.concatenate(replay(windowed, events, first_chunk=12, log_scaling_T=128))) < 1e-9


def test_windows_reach_over_chunk_borders(tmp_path: Path, tiny: Model, text: NDArray) -> None:
    """The last token of a chunk is felt in the next one, as far as the window reaches; without windows it is not."""
    shape = make_models.Shape(n_layer=1)
    windowed = Model.from_gguf(make_models.write_gemma2(tmp_path / "m.gguf", shape, sliding_window=8))
    plan, changed = Plan([0, 12, 50, 85, 120], anchor=113, stair_width=3), text.copy()
    changed[49] += 1 if text[49] < 127 else -1
    for model, felt in [(windowed, [True] * 7 + [False] * 28), (tiny, [False] * 35)]:
        before, after = (logits(model, tokens, plan)[50:85] for tokens in (text, changed))
        assert (np.abs(before - after).max(axis=1) > 0).tolist() == felt


def test_no_anchor_is_stock(tiny: Model, text: NDArray) -> None:
    pieces = np.concatenate(replay(tiny, [("last", text[:70]), ("last", text[70:71]), ("last", text[71:])]))
    assert worst(pieces, logits(tiny, text)) < 1e-9
    assert worst(logits(tiny, text, Plan([0, 100], anchor=0, stair_width=5)), logits(tiny, text)) < 1e-9


def test_chunks_do_not_see_each_other(tiny: Model, text: NDArray) -> None:
    """A chunk's logits follow from the first chunk and its own tokens, wherever it stands."""
    alone, later = State(tiny, first_chunk=12), State(tiny, first_chunk=12)
    for state in (alone, later):
        state.last(text[:12])
    later.chunk(text[12:90])
    assert worst(alone.chunk(text[90:120]), later.chunk(text[90:120])) < 1e-9


def test_rollback_forgets(tiny: Model, text: NDArray) -> None:
    before = [("last", text[:12]), ("chunk", text[12:80]), ("anchor", 80, 4), ("last", text[80:100])]
    after = [("anchor", 96), ("last", text[100:120])]
    straight = replay(tiny, before + after, first_chunk=12)
    detour = [("last", text[120:150]), ("rollback", 30)]
    assert worst(straight[-1], replay(tiny, before + detour + after, first_chunk=12)[-1]) < 1e-9
    with pytest.raises(ValueError, match="roll back"):
        replay(tiny, [("last", text[:5]), ("rollback", 6)])


def test_anchor_moves_between_turns(tiny: Model, text: NDArray) -> None:
    """Keys stay as they were read; only where later queries see them changes. With E = 1 nothing does."""
    turns = [("last", text[:100]), ("anchor", 60), ("last", text[100:])]
    assert worst(np.concatenate(replay(tiny, turns)), logits(tiny, text)) < 1e-9
    turns[1] = ("anchor", 60, 4)
    assert worst(replay(tiny, turns)[-1], logits(tiny, text)[100:]) > 1


def test_chunk_before_the_first_chunk_is_refused(tiny: Model, text: NDArray) -> None:
    with pytest.raises(ValueError, match="first chunk"):
        replay(tiny, [("last", text[:11]), ("chunk", text[11:])], first_chunk=12)


def record_stock(folder: Path) -> None:
    """Write STOCK with the unpatched llama.cpp that the installed llama_cpp package loads. Run once per llama.cpp."""
    import llama_cpp

    tokens = np.random.default_rng(0).integers(0, 128, 120)
    rows = {"tokens": tokens.astype(np.int32)}
    for name, write in make_models.SUPPORTED.items():
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(write(folder / f"{name}.gguf")).encode(), parameters)
        for flash, suffix in enumerate(["", "-flash"]):
            options = llama_cpp.llama_context_default_params()
            options.n_ctx = options.n_batch = options.n_ubatch = 256
            options.type_k = options.type_v = gguf.GGMLQuantizationType.F32
            options.flash_attn_type = flash
            context = llama_cpp.llama_init_from_model(model, options)
            batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
                batch.seq_id[i][0] = 0
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError(f"{name} was not decoded")
            shape = len(tokens), llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            rows[name + suffix] = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape)[-4:].copy()
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    np.savez_compressed(STOCK, **rows)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        record_stock(Path(temporary))
