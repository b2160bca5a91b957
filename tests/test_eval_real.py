"""`mesa-gguf eval real`: documents of a length, answers that are scored in two ways, settings that are compared item by item."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import BUNDLED
from mesa_gguf import ConfigError, MesaConfig, MesaLlama, PromptError, cli
from mesa_gguf.lab.evaluate import Options, RealEvaluation, real_report
from mesa_gguf.lab.evaluate.loss import score_begun, token_loss
from mesa_gguf.lab.evaluate.real import MAX_TOKENS, STRIDE, make_asked
from mesa_gguf.lab.facts import FORMS, Haystack
from mesa_gguf.lab.methods import find_setting
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from test_cli import TEMPLATE, with_template
from test_evaluate import results_page

T = 512  # of the bundled model
PROSE = " ".join(
    f"The {word} went on for {n} days. Nobody saw it.\n\n" for n in range(99) for word in ("river", "march", "wind")
)
SMALL_RUN = Options(
    path=BUNDLED,
    methods=("stock", "mesa", "mesa,chunk=200,stair_bias=0"),
    lengths=(2 * T, 3 * T),
    seed=3,
    samples={"real": 2},
    n_facts=4,
    text=PROSE,
    machine={"n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0},
)


def run(folder: Path, options: Options = SMALL_RUN, **more: Any) -> dict[str, Any]:
    evaluation = RealEvaluation(options, folder, **more)
    evaluation.run()
    rows = evaluation.store.rows.values()
    contents = real_report.document(evaluation.settings(), rows, "command", 1, options.methods)
    return {**contents, "rows": sorted(rows, key=lambda row: (row["length"], row["method"], row["index"]))}


def without_run(contents: dict[str, Any]) -> str:
    kept = {key: value for key, value in contents.items() if key not in ("run", "rows")}
    return json.dumps(kept)


@pytest.mark.parametrize("chat", [False, True])
def test_a_document_fills_its_length(chat: bool, tmp_path: Path) -> None:
    form = PromptForm(load_vocabulary(with_template(tmp_path / "chat.gguf", TEMPLATE) if chat else BUNDLED))
    asked = {n: make_asked(form, Haystack(PROSE), n, "1:0", FORMS, 6) for n in (3 * T, 5 * T)}
    for length, made in asked.items():
        longest = max(len(one.tail) + max(MAX_TOKENS, len(one.begun) + len(one.answer)) for one in made.prompts)
        assert length - 64 <= len(made.head) + longest <= length
        text = form.vocabulary.detokenize(made.head).decode()
        for question, prompt in zip(made.document.questions, made.prompts, strict=True):
            said = form.vocabulary.detokenize([*prompt.tail, *prompt.begun, *prompt.answer]).decode()
            assert question.text in said and said.endswith(f"{question.begun} {question.answer}")
            assert all(made.document.facts[i].sentence in text for i in question.facts)
    first, second = asked.values()
    assert [q.text for q in first.document.questions] == [q.text for q in second.document.questions]


def test_an_answer_that_was_begun() -> None:
    """Its log-probability is that of its tokens, one after the other."""
    llm = MesaLlama(BUNDLED, mesa=MesaConfig(), n_ctx=1024, n_threads=1, verbose=False)
    tokens = llm.tokenize(b"The door code of Mara Lind is 48213. It rained on Monday until noon. " * 12)
    before = llm.tokenize(b"Question: What is the door code of Mara Lind?\nAnswer:", add_bos=False)
    llm.eval(tokens)
    greedy: list[int] = []
    for token in llm.generate([*tokens, *before], temp=0):
        greedy.append(token)
        if len(greedy) == 4:
            break
    found = score_begun(llm, len(tokens), before, greedy)
    assert found.exact and not score_begun(llm, len(tokens), before, [greedy[0], (greedy[1] + 1) % 300]).exact
    losses = []
    llm.n_tokens = len(tokens)
    for piece, token in zip([before, *([token] for token in greedy)], greedy, strict=False):
        llm.eval(piece)
        losses.append(token_loss(np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)), token))
    assert found.logprob == pytest.approx(-np.mean(losses), abs=2e-3)
    llm.close()


def test_same_seed_same_results(tmp_path: Path) -> None:
    options = replace(SMALL_RUN, lengths=(2 * T,), methods=("stock", "mesa"))
    first, second = run(tmp_path / "a", options), run(tmp_path / "b", replace(options, samples={"real": 1}))
    of_first = [row for row in first["rows"] if row["index"] < STRIDE]
    assert real_report.items(of_first) == real_report.items(second["rows"])
    n = 2 * (4 + 4 + 1 + 1 + 1)  # of two documents; literal, paraphrase, two hops, count, absent
    assert len(first["rows"]) == n * 2
    by_task = {(e["task"], e["method"]): e for e in first["summary"]}
    stock = by_task["real/facts", "stock"]
    assert stock["n"] == 16 and "difference" not in stock["begun"]
    own = by_task["real/facts", "mesa"]["logprob"]
    values = {
        method: [
            row["logprob"]
            for row in first["rows"]
            if row["method"] == method and row["task"] in ("real/literal", "real/paraphrase")
        ]
        for method in ("stock", "mesa")
    }
    assert own["mean"] == pytest.approx(np.mean(values["mesa"]), abs=1e-3)
    assert own["difference"] == pytest.approx(np.mean(values["mesa"]) - np.mean(values["stock"]), abs=1e-3)
    assert own["difference_interval"][0] <= own["difference"] <= own["difference_interval"][1]
    absent = by_task["real/absent", "mesa"]
    assert "right" in absent and "begun" not in absent
    assert len(real_report.tables(first)) == 3 * 5 + 1
    real_report.figure(first).savefig(tmp_path / "real.png")


def test_another_seed_is_another_document(tmp_path: Path) -> None:
    evaluations = [RealEvaluation(replace(SMALL_RUN, seed=seed), tmp_path / str(seed)) for seed in (3, 4)]
    first, second = (one._asked(2 * T, 0) for one in evaluations)
    assert first.head != second.head and first.document.questions != second.document.questions


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(SMALL_RUN, lengths=(2 * T,), methods=("stock", "mesa"))
    whole = run(tmp_path / "whole", options, generate=False)
    ask, asked = RealEvaluation._ask, []

    def cut_off(self: RealEvaluation, llm: Any, made: Any, index: int, read: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(index)
        return ask(self, llm, made, index, read)

    monkeypatch.setattr(RealEvaluation, "_ask", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", options, generate=False)
    asked.clear()
    resumed = run(tmp_path / "cut", options, generate=False)
    assert asked == [1]
    assert without_run(resumed) == without_run(whole)
    asked.clear()
    options = replace(options, methods=("stock", "mesa", "mesa,chunk=200"), samples={"real": 1})
    run(tmp_path / "cut", options, generate=False)
    assert asked == [0]  # of the new setting alone


def test_kinds_and_without_writing(tmp_path: Path) -> None:
    options = replace(SMALL_RUN, lengths=(2 * T,), methods=("mesa",), samples={"real": 1})
    contents = run(tmp_path, replace(options, kinds=["paraphrase", "absent"]), generate=False)
    assert {entry["task"] for entry in contents["summary"]} == {"real/facts", "real/paraphrase"}
    assert all("right" not in row and row["index"] < STRIDE for row in contents["rows"])
    assert [table[0].split(":")[0] for table in real_report.tables(contents)] == ["real/paraphrase"] * 2
    with pytest.raises(ConfigError, match="absent is scored by what the model writes"):
        RealEvaluation(replace(options, kinds=["absent"]), tmp_path, generate=False)
    with pytest.raises(ConfigError, match="there is no real kind hard"):
        RealEvaluation(replace(options, kinds=["hard"]), tmp_path)


def test_documents_that_are_kept(tmp_path: Path) -> None:
    """`read=all` has every fact before the question, a number of tokens some of them, and both within T too."""
    options = replace(SMALL_RUN, lengths=(T, 3 * T), methods=("mesa,read=all", "mesa,read=250"), samples={"real": 1})
    rows = run(tmp_path, options)["rows"]
    prompts: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        prompts.setdefault((row["method"], row["length"]), []).append(row["n_prompt"])
    assert all("right" in row for row in rows) and all("begun" in row for row in rows if row["task"] != "real/absent")
    for length in options.lengths:
        every, some = prompts["mesa,read=all", length], prompts["mesa,read=250", length]
        assert all(0.75 * length < n <= length + 64 for n in every)
        assert all(n < T + 64 for n in some)  # one chunk at least, whatever its length
        assert len(every) == len(some) == 11
    right = sum(row["right"] for row in rows if row["task"] == "real/literal" and row["method"] == "mesa,read=all")
    assert right >= 1  # of 8: the bundled model was trained for other facts


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="give a longer one"):
        RealEvaluation(replace(SMALL_RUN, lengths=(2 * T, 64 * T)), tmp_path)
    with pytest.raises(PromptError, match=r"^130 tokens are too few for a document of"):
        RealEvaluation(replace(SMALL_RUN, lengths=(130, 2 * T)), tmp_path)


def test_settings() -> None:
    found = find_setting("mesa,chunk=200, stair_bias=0.5,log_scaling=false")
    assert found.method.name == "mesa"
    assert found.overrides == {"chunk": 200, "stair_bias": 0.5, "log_scaling": False}
    assert found.read is None
    kept = find_setting("mesa,read=900, stair_bias=0")
    assert (kept.read, kept.overrides) == (900, {"stair_bias": 0}) and find_setting("mesa,read=all").read == "all"
    for text, problem in (
        ("mesa,size=2", "size is no option"),
        ("mesa,chunk", "write NAME=VALUE"),
        ("mesa,chunk=many", "many is no number"),
        ("yarn,chunk=2", "yarn has no options but train_length"),
        ("mega,chunk=2", "there is no method mega"),
        ("mesa,read=each", "read is each: it must be auto, all, or a number of tokens"),
        ("mesa,read=0", "read is 0: it must be"),
        ("stock,read=auto", "stock cannot read chunks that are kept: write mesa,read=auto"),
    ):
        with pytest.raises(ConfigError, match=problem):
            find_setting(text)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs `mesa-gguf eval real` into the test's folder; returns what it printed."""

    def command(*args: object) -> str:
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / "prose.txt").write_text(PROSE, encoding="utf-8")
        given = [
            "eval",
            "real",
            *map(str, args),
            "--text",
            tmp_path / "texts",
            "--output",
            tmp_path / "out",
            "--threads",
            "1",
        ]
        code = cli.main([str(arg) for arg in given])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return command


def test_the_command(command: Callable[..., str], tmp_path: Path) -> None:
    tiny = ["--samples", "1", "--facts", "3", "--length", "2T", "--kind", "literal"]
    tiny += ["--method", "stock", "--method", "mesa,chunk=200"]
    out = command(*tiny)
    assert "real/literal: answers written freely, share that is right; 3 items a cell" in " ".join(out.split())
    assert "mesa,chunk=200" in out and "the difference from stock" in out
    assert (tmp_path / "out" / "real.png").read_bytes().startswith(b"\x89PNG")
    shown = json.loads(command(*tiny, "--json"))
    assert [entry["method"] for entry in shown["summary"]] == ["stock", "mesa,chunk=200"] * 2
    assert set(json.loads((tmp_path / "out" / "real.json").read_text())) == {
        "settings",
        "summary",
        "items",
        "scores",
        "run",
    }
    page = results_page(tmp_path, "out")
    assert (
        "## mesa-reader-q8_0.gguf: questions about real text" in page and "![Answers by length](out/real.png)" in page
    )
    assert "real/literal: answers written freely, share that is right; 3 items a cell." in page
    assert "| mesa,chunk=200 | " in page and "| method | 2 T |" in page


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["real", "--kind", "hard"], "there is no real kind hard: use one of literal"),
        (["real", "--text", "missing.txt"], "missing.txt: there is no such file"),
        (["real", "--method", "mesa,size=3"], "size is no option of a method"),
        (["ppl", "--method", "mesa,read=auto", "--text", "none.txt"], "none.txt"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *args]) == 2
    err = capsys.readouterr().err
    assert problem in err and err.count("\n") == 1


def test_a_real_model_finds_facts_in_real_text(smollm2: Path, tmp_path: Path) -> None:
    """Of what one reads in a page, most is found, however it is asked for."""
    options = Options(
        path=smollm2, methods=("stock",), lengths=(640,), seed=1, samples={"real": 1}, n_facts=3,
        machine={"n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0},
    )  # fmt: skip
    contents = run(tmp_path, replace(options, kinds=["literal", "paraphrase"]), generate=False)
    (entry, *_) = contents["summary"]
    assert entry["task"] == "real/facts" and entry["begun"]["mean"] >= 0.5 and entry["logprob"]["mean"] > -2
