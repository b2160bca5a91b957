"""``eval library``: what a question finds in a collection, by how much of it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from make_models import write_synonyms
from mesa_gguf import cli
from mesa_gguf.lab.evaluate import library as evaluation
from mesa_gguf.lab.evaluate.library import check_modes, pairs, split_text, summarize
from mesa_gguf.lab.evaluate.store import Row

Run = Callable[..., Row]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the evaluation -> library.json."""

    def run(*args: object, folder: str = "out") -> Row:
        command = ["eval", "library", "--threads", "1", "--output", str(tmp_path / folder), *map(str, args)]
        code = cli.main(command)
        assert code == 0, capsys.readouterr().err
        capsys.readouterr()
        made: Row = json.loads((tmp_path / folder / "library.json").read_text(encoding="utf-8"))
        return made

    return run


def entry(made: Row, read: str, form: str = "every") -> Row:
    (found,) = [e for e in made["summary"] if (e["read"], e["form"]) == (read, form)]
    return dict(found)


def test_lengths_that_nobody_gave_are_long_enough(run: Run) -> None:
    assert {row["length"] for row in run("--read", "none")["summary"]} == {1536, 2048}


def test_the_bundled_reader_with_its_own_documents(run: Run, tmp_path: Path) -> None:
    made = run("--length", "2048", "--read", "none", "--read", "auto", "--read", 600)
    for read in ("none", "auto", "600"):
        assert entry(made, read)["n"] == 24 and entry(made, read)["recall"] > 0.9
    auto = entry(made, "auto")
    assert auto["right"] == 1 and auto["first_citation_holds"] > 0.9 and auto["tokens_read"] > 1500
    assert entry(made, "600")["tokens_read"] < 600
    (pair,) = [p for p in made["pairs"] if (p["form"], p["minus"]) == ("every", "600")]
    assert pair["n"] == 24 and pair["difference"] == pytest.approx(1 - entry(made, "600")["right"], abs=1e-3)
    (times,) = [t for t in made["times"] if t["read"] == "auto"]
    assert times["tokens_computed"] < 2048 < times["tokens_reused"]
    # the same seed, the same numbers; what is there is not computed again
    assert run("--length", "2048", "--read", "none", folder="other")["summary"][0] == next(
        e for e in made["summary"] if e["read"] == "none"
    )
    lines = (tmp_path / "out" / "library.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "out" / "library.jsonl").write_text("".join(lines[:40]) + lines[40][:30], encoding="utf-8")
    again = run("--length", "2048", "--read", "none", "--read", "auto", "--read", 600)
    assert (again["summary"], again["pairs"]) == (made["summary"], made["pairs"])


def test_real_text_without_a_models_weights(run: Run, smollm2: Path) -> None:
    made = run("-m", smollm2, "--length", "6000", "--read", "none")
    by_form = {e["form"]: e for e in made["summary"]}
    assert set(by_form) == {*evaluation.FORMS, "every"}
    assert by_form["literal"]["n"] == by_form["paraphrase"]["n"] == 24 and by_form["literal"]["recall"] > 0.9
    assert "recall" not in by_form["absent"] and "right" not in by_form["literal"]
    assert by_form["literal"]["tokens_read"] <= 2048 < by_form["paraphrase"]["tokens_read"] <= 3072


def test_with_an_embedding_model(run: Run, tmp_path: Path) -> None:
    model = write_synonyms(tmp_path / "synonyms.gguf", [("dog", "hound")])
    made = run("--length", "2048", "--read", "none", "--embedding-model", model, "--embedding-query", "q ")
    assert made["settings"]["embedding"]["name"] == model.name and made["settings"]["embedding"]["query"] == "q "
    assert entry(made, "none")["recall"] > 0.9
    # what was made with another one is not taken for it
    assert cli.main(["eval", "library", "--length", "2048", "--read", "none", "--output", str(tmp_path / "out")]) == 2


def test_mistakes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, said in (
        (["library", "qa"], "run it alone"),
        (["library", "--read", "some"], "it must be auto, all, each, none, or a number"),
        (["library", "--method", "yarn"], "compares mesa with stock alone"),
        (["qa", "--read", "all"], "--read is for the task library"),
        (["library", "--length", "100"], "too short for these facts"),
    ):
        assert cli.main(["eval", *args, "--output", str(tmp_path / "no")]) == 2, args
        assert said in capsys.readouterr().err
    assert check_modes(["all", "none", "600", "all"]) == ["all", "none", 600]


@given(st.text("ab\n", max_size=200), st.integers(1, 6))
def test_parts_are_the_text(text: str, n: int) -> None:
    parts = split_text(text, n)
    assert len(parts) <= n and "".join(parts).strip() == text.strip()


def test_numbers() -> None:
    def row(method: str, index: int, right: int, cited: int | None, recall: float | None, computed: int) -> Row:
        return {
            "form": "literal",
            "task": "library/literal",
            "method": method,
            "length": 100,
            "index": index,
            "right": right,
            "cited": cited,
            "recall": recall,
            "read": {"tokens": 50, "computed": computed},
            "timings": {"first_token_s": 1.0},
        }

    rows = [
        row("auto", 0, 1, 1, 1.0, 50),
        row("auto", 1, 1, 0, 0.5, 0),
        row("all", 0, 0, None, 1.0, 0),
        row("all", 1, 1, 1, 1.0, 0),
    ]
    (_, auto) = [e for e in summarize(rows) if e["form"] == "literal"]
    assert (auto["read"], auto["recall"], auto["right"], auto["first_citation_holds"]) == ("auto", 0.5, 1.0, 0.5)
    (pair, _) = pairs(rows)
    assert (pair["minus"], pair["difference"], pair["n"]) == ("all", 0.5, 2)
