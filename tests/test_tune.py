"""`mesa-gguf tune`: what it measures, what it chooses, and that the numbers are found where the model is used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import BUNDLED, SMALL, ModelPath, Opener, random_tokens, read, read_singly
from mesa_gguf import ConfigError, MesaConfig, MesaLlama, cli
from mesa_gguf.lab import tune
from mesa_gguf.lab.evaluate.loss import Begun
from mesa_gguf.lab.tune import Numbers, Tuner
from mesa_gguf.model import tuning
from mesa_gguf.model.fingerprint import model_fingerprint
from mesa_gguf.model.tuning import Tuning, find_tuning, forget_tuning, keep_tuning

KIND = "llama"
T = 128
KEPT = Tuning(64, 24, 0.0, 64, model="llama.gguf", date="2026-01-01", items=64, gain=0.5)
TEXT = "\n\n".join(
    f"This is sentence {i} of a text. It says nothing, and it says it in {i % 7} words." for i in range(900)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "tune"))
    return tmp_path / "tune"


def numbers_of(llm: MesaLlama) -> dict[str, Any]:
    return {name: getattr(llm._params, name) for name in KEPT.numbers}


# What is kept is used.


def test_kept_numbers_are_found(model_path: ModelPath, open_llama: Opener) -> None:
    default = numbers_of(open_llama(model_path(KIND), MesaConfig()))
    keep_tuning(model_path(KIND), KEPT, {})
    llm = open_llama(model_path(KIND), MesaConfig())
    assert llm.tuning == KEPT and numbers_of(llm) == KEPT.numbers != default
    assert llm.reading_length == 64 and llm.mesa.stair_bias == 0.0
    other = open_llama(model_path("llama-head-size"), MesaConfig())
    assert other.tuning is None
    assert forget_tuning(model_path(KIND)) and not forget_tuning(model_path(KIND))
    assert numbers_of(open_llama(model_path(KIND), MesaConfig())) == default


def test_given_numbers_win(model_path: ModelPath, open_llama: Opener) -> None:
    keep_tuning(model_path(KIND), KEPT, {})
    llm = open_llama(model_path(KIND), MesaConfig(stair_bias=0.5, last_chunk=20))
    assert numbers_of(llm) == KEPT.numbers | {"stair_bias": 0.5}
    assert llm._params.last_chunk == 20  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mesa", "kwargs"),
    [
        (MesaConfig(tuned=False), {}),
        (MesaConfig(enabled=False), {}),
        (MesaConfig(train_length=100), {}),
        (MesaConfig(reading_length=100), {}),
        (MesaConfig(stair_width=9), {}),
        (MesaConfig(method="star"), {}),
        (MesaConfig(first_chunk=70), {}),  # which leaves nothing of R
        (MesaConfig(), {"rope_freq_scale": 0.5}),
        (MesaConfig(), {"kv_overrides": {"llama.context_length": 64}}),
    ],
)
def test_kept_numbers_are_left_alone(
    model_path: ModelPath, open_llama: Opener, mesa: MesaConfig, kwargs: dict[str, Any]
) -> None:
    """Where they are not wanted, are of another model, or do not go with what is given."""
    keep_tuning(model_path(KIND), KEPT, {})
    llm = open_llama(model_path(KIND), mesa, **kwargs)
    assert llm.tuning is None and llm.mesa == mesa


def test_it_is_said_where_llama_cpp_speaks(
    model_path: ModelPath, open_llama: Opener, capfd: pytest.CaptureFixture[str]
) -> None:
    keep_tuning(model_path(KIND), KEPT, {})
    open_llama(model_path(KIND), MesaConfig())
    assert "tune" not in capfd.readouterr().err
    open_llama(model_path(KIND), MesaConfig(), verbose=True)
    assert capfd.readouterr().err.count("reading length 64, chunk 24, stair bias 0.0, log length 64") == 1


NOTHING: list[Any] = ["", "[" * 100_000, "{", "[]", "null", "{}", '{"version": 1}', '{"version": 2, "tuning": {}}']


@pytest.mark.parametrize(
    "change",
    [
        *NOTHING,
        {"version": 2},
        {"reading_length": "64"},
        {"gain": None},
        {"more": 1},
        {"chunk": -1},
        {"chunk": None},
        {"gain": 10**400},
        {"items": float("nan")},
    ],
)
def test_a_damaged_file_counts_as_none(model_path: ModelPath, folder: Path, change: Any) -> None:
    file = keep_tuning(model_path(KIND), KEPT, {})
    assert file == folder / f"{model_fingerprint(model_path(KIND))}.json"
    if isinstance(change, dict):
        contents = json.loads(file.read_text())
        target = contents if "version" in change else contents["tuning"]
        target |= change
        change = json.dumps(contents)
    file.write_text(change)
    assert find_tuning(model_path(KIND)) is None


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(values=st.fixed_dictionaries({}, optional=dict.fromkeys(vars(KEPT), any_json)))
def test_whatever_a_file_holds_a_model_opens(values: dict[str, Any]) -> None:
    found = tuning._of({"version": 1, "tuning": vars(KEPT) | values})
    assert found is None or MesaConfig(**found.numbers)


def test_a_folder_that_cannot_be(model_path: ModelPath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "file" / "tune"))
    assert find_tuning(model_path(KIND)) is None
    with pytest.raises(ConfigError, match="cannot be kept there"):
        keep_tuning(model_path(KIND), KEPT, {})
    assert not forget_tuning(model_path(KIND))


def test_what_cannot_be_kept_is_not_measured(
    likes_no_bias: list[tuple[int, int]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run = ["tune", "--text", str(tmp_path / "text.txt"), "--minutes", "0.01", "--threads", "1"]
    (folder / f"{model_fingerprint(BUNDLED)}.json").mkdir(parents=True)
    assert cli.main(run) == 2 and "cannot be kept there" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "file"))
    assert cli.main(run) == 2 and "cannot be kept there" in capsys.readouterr().err
    assert not likes_no_bias
    assert [file.name for file in folder.iterdir()] == [f"{model_fingerprint(BUNDLED)}.json"]
    assert cli.main(["tune", "--reset", "--dry-run"]) == 2 and "give one of them" in capsys.readouterr().err


def test_what_was_kept_is_not_forgotten_silently(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "score_begun", lambda *_: Begun(False, -1.0))
    monkeypatch.setattr(tune, "POINTS", (2, 4))
    monkeypatch.setattr(tune, "N_QUESTIONS", 2)
    keep_tuning(BUNDLED, KEPT, {})
    (tmp_path / "text.txt").write_text(TEXT)
    assert cli.main(["tune", "--text", str(tmp_path / "text.txt"), "--minutes", "0.01", "--threads", "1"]) == 0
    assert "what was kept of the model before is forgotten" in capsys.readouterr().out
    assert find_tuning(BUNDLED) is None and not list(folder.iterdir())


def test_plan_and_inspect_show_kept_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    keep_tuning(BUNDLED, replace(KEPT, reading_length=256, chunk=224, log_length=256), {})
    assert cli.main(["plan", "--tokens", "4000", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["reading_length"] == 256 and err.count("reading length 256") == 1
    assert cli.main(["plan", "--tokens", "4000", "--json", "--no-tuned"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["reading_length"] == 512 and not err
    assert cli.main(["inspect", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["defaults"]["reading_length"] == 256 and report["tuned"]["gain"] == 0.5
    assert cli.main(["inspect"]) == 0
    assert "tuned           reading length 256" in capsys.readouterr().out


def test_ask_says_it_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keep_tuning(BUNDLED, replace(KEPT, reading_length=256, chunk=224, log_length=256), {})
    (tmp_path / "text.txt").write_text("The door code of Mara Lind is 4711. " * 30)
    ask = ["ask", "-f", str(tmp_path / "text.txt"), "Who?", "-q", "What?", "--max-tokens", "2", "--threads", "1"]
    for more, times in (
        (["--no-library"], 1),
        ([], 1),
        (["--quiet"], 0),
        (["--no-tuned"], 0),
        (["--no-library", "--no-tuned"], 0),
    ):
        assert cli.main([*ask, *more]) == 0
        assert capsys.readouterr().err.count("reading length 256") == times, more


# Other numbers in the same context.


def test_a_context_that_is_read_by_other_numbers(model_path: ModelPath, open_llama: Opener) -> None:
    """As one that was opened with them, bit for bit."""
    text, rest = random_tokens(300, seed=1), random_tokens(40, seed=2)
    narrow = replace(SMALL, reading_length=64, first_chunk=8, chunk=24, last_chunk=16, room=8, stair_bias=0.5)
    llm, other = open_llama(model_path(KIND), SMALL), open_llama(model_path(KIND), narrow)
    before = read(llm, text)
    llm.reconfigure(narrow)
    assert (llm.n_tokens, llm.reading_length, llm.mesa) == (0, 64, narrow)
    for one in (llm, other):
        read(one, text)
        read_singly(one, rest)
    assert np.array_equal(llm.scores[:340], other.scores[:340])
    with pytest.raises(ConfigError, match="first_chunk"):
        llm.reconfigure(replace(narrow, first_chunk=100))
    with pytest.raises(ConfigError, match="switched on or off"):
        llm.reconfigure(MesaConfig(enabled=False))
    llm.reconfigure(SMALL)
    assert np.array_equal(read(llm, text), before)


# What is chosen.


def tuner(**kwargs: Any) -> Tuner:
    return Tuner(BUNDLED, TEXT, n_threads=1, plain=True, **kwargs)


def scored(made: Tuner, score: Callable[[Numbers, int, int], float], n: int = 16) -> Tuner:
    """Scores as if they were measured."""
    made.lengths = {point: 100 * point for point in made.points}
    for numbers in made.first_candidates():
        for point in made.points:
            if not made._fits(point, numbers.reading_length):
                made.scores[numbers, point] = {str(i): score(numbers, point, i) for i in range(n)}
    return made


def outcome(made: Tuner) -> tune.Outcome:
    made._begin = 0.0
    return made._outcome(1, tune._Text(None, [], []))  # type: ignore[arg-type]


def test_better_numbers_are_chosen_and_noise_is_not() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, 100)
    found = outcome(scored(tuner(), lambda numbers, point, i: -2 + noise[i] + (0.4 if numbers.stair_bias == 0 else 0)))
    assert found.tuning is not None
    assert (found.tuning.stair_bias, found.tuning.log_length, found.tuning.gain) == (0.0, 512, 0.4)
    assert found.tuning.numbers["reading_length"] == 512 and found.tuning.chunk == 480
    for _ in range(5):
        found = outcome(scored(tuner(), lambda *_: float(rng.normal(-2, 1))))
        assert found.tuning is None or found.tuning.gain > 2 * found.best.error
    found = outcome(scored(tuner(), lambda *_: -2.0))
    assert found.tuning is None and found.best is found.rows[0]
    # better at one length and worse at the others
    found = outcome(
        scored(
            tuner(), lambda numbers, point, i: -2 + noise[i] + (numbers.stair_bias == 0) * (3 if point == 16 else -2)
        )
    )
    assert found.tuning is None


def test_reading_lengths_that_are_tried(smollm2: Path) -> None:
    made = Tuner(smollm2, TEXT)
    assert made.reading_lengths() == [2048, 4096, 8192]
    assert made._fits(2, 2048) and not made._fits(4, 2048) and made._fits(4, 4096) and made._fits(8, 8192)
    assert made.first_candidates()[0] == made.auto == Numbers(8192, 0.5, 32768)
    made.points = (2, 4)
    assert made.reading_lengths() == [2048, 8192]


@pytest.fixture
def likes_no_bias(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A model that answers better without a bias, whatever it reads; what it was asked with."""
    seen = []
    real = tune.score_begun

    def score(llm: MesaLlama, n_document: int, before: list[int], answer: list[int]) -> Begun:
        begun = real(llm, n_document, before, answer)
        assert begun.logprob <= 0
        params = llm._params
        assert params is not None
        seen.append((n_document, llm.n_tokens))
        assert llm.plan().n_positions(llm.n_tokens) <= params.reading_length
        return Begun(False, -1.0 if params.stair_bias == 0 else -2.0 - 0.01 * len(answer))

    monkeypatch.setattr(tune, "score_begun", score)
    monkeypatch.setattr(tune, "POINTS", (2, 4))
    monkeypatch.setattr(tune, "N_QUESTIONS", 5)
    return seen


def test_the_command(
    likes_no_bias: list[tuple[int, int]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run = ["tune", "--text", str(tmp_path / "text.txt"), "--minutes", "0.01", "--threads", "1"]
    assert cli.main([*run, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "best" in out and "--dry-run" in out and "in chunks" in err and not folder.exists()
    assert max(n for n, _ in likes_no_bias) > 2 * 512

    assert cli.main([*run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["best"]["numbers"]["stair_bias"] == 0.0 and result["best"]["gain"] > 1
    found = find_tuning(BUNDLED)
    assert found is not None and found.stair_bias == 0.0 and found.items == result["best"]["items"]
    kept = json.loads(Path(result["kept"]).read_text())
    assert kept["measured"]["table"][0][0] == "R"

    assert cli.main(["tune", "--reset"]) == 0 and "forgotten" in capsys.readouterr().out
    assert find_tuning(BUNDLED) is None
    assert cli.main(["tune", "--reset"]) == 0 and "nothing was kept" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out_and_told(
    likes_no_bias: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(tune, "POINTS", (2, 4, 8))
    monkeypatch.setattr(tune, "MAX_ROUNDS", 1)
    (tmp_path / "text.txt").write_text(TEXT)
    run = ["tune", "--text", str(tmp_path / "text.txt"), "--threads", "1", "--dry-run"]
    monkeypatch.setattr(tune, "GROWTH", 1e9)
    assert cli.main([*run, "--minutes", "10"]) == 0
    out, err = capsys.readouterr()
    told = re.search(r"no time for (\d+) tokens and more", out)
    assert told is not None and int(told[1]) > 3 * max(n for n, _ in likes_no_bias) // 2
    assert "text 2" not in err
    likes_no_bias.clear()
    monkeypatch.setattr(tune, "GROWTH", 0.0)
    assert cli.main([*run, "--minutes", "1000"]) == 0
    assert "no time" not in capsys.readouterr().out
    assert max(n for n, _ in likes_no_bias) > int(told[1]) - 100


def test_a_text_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("One sentence. Another one.")
    assert cli.main(["tune", "--text", str(tmp_path / "text.txt")]) == 2
    assert "longer" in capsys.readouterr().err
