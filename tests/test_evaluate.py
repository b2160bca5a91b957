"""The evaluation: texts that hold what is asked, scores, resuming, and methods that are what their names say."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import make_models
from conftest import BUNDLED, ROOT, ModelPath, random_tokens, worst
from mesa_gguf import ConfigError, MesaConfig, MesaError, MesaLlama, ModelError, PromptError, cli
from mesa_gguf.lab import documents
from mesa_gguf.lab.evaluate import Evaluation, Options, report, scoring, texts
from mesa_gguf.lab.evaluate.loss import tail_losses, window_ends
from mesa_gguf.lab.evaluate.prompts import SLACK, Prompter
from mesa_gguf.lab.evaluate.store import Store
from mesa_gguf.lab.evaluate.tasks import TASKS, Brief, Item, Sample, Style, Task, Turn
from mesa_gguf.lab.methods import METHODS, open_model
from mesa_gguf.reading.prompts import ABOUT, REPLY
from test_cli import TEMPLATE, with_template

T = 512  # of the bundled model
THREADS = ("--threads", "1")
STYLES: tuple[Style, ...] = ("natural", "reader")
EVERY = [(task, style) for task in TASKS for style in STYLES]

prompter = cache(lambda style: Prompter(BUNDLED, style))


def sample(task: str, style: Style, n_tokens: int = 2000, seed: str = "1", depth: float | None = None) -> Sample:
    return TASKS[task].make(Brief(style, seed, n_tokens, prompter(style).count, depth))


#
# texts
#


@pytest.mark.parametrize(("task", "style"), EVERY)
def test_same_seed_same_sample(task: str, style: Style) -> None:
    assert sample(task, style) == sample(task, style)
    assert sample(task, style).document != sample(task, style, seed="2").document


@pytest.mark.parametrize("length", [2 * T, 9 * T])
@pytest.mark.parametrize(("task", "style"), EVERY)
def test_prompt_and_answer_have_the_length(task: str, style: Style, length: int) -> None:
    p = prompter(style)
    made, prompts = p.fit(TASKS[task], length, lambda n: Brief(style, "7", n, p.count))
    room = TASKS[task].answer_room(style)
    asked = [made.items[i].turns for i in range(len(made.items))]
    longest = max(
        p.count(documents.prompt(made.document, turns[0].question) + turns[0].prefix)
        + sum(p.count(documents.QUESTION.format(question=turn.question)) for turn in turns[1:])
        + room * len(turns)
        for turns in asked
    )
    # the token that begins a text; a new line before each later turn
    assert length - SLACK <= longest + 1 <= length
    assert prompts.head[0] == p.vocabulary.token_bos()
    text = p.vocabulary.detokenize(prompts.head).decode()
    assert text.startswith(made.document)


def test_chat_models_get_their_template(tmp_path: Path) -> None:
    path = with_template(tmp_path / "chat.gguf", TEMPLATE)
    p = Prompter(path, "natural")
    made, prompts = p.fit(TASKS["passkey"], 3 * T, lambda n: Brief("natural", "7", n, p.count))
    tokens = prompts.head + prompts.tails[0]
    text = p.vocabulary.detokenize(tokens, special=True).decode()
    assert made.document in text and ABOUT.format(question="What is the pass key?") in text
    assert text.endswith("<|unused0|>") and "The pass key is" not in text.rsplit(REPLY, 1)[1]
    assert 3 * T - SLACK <= len(tokens) + TASKS["passkey"].max_tokens <= 3 * T

    plain = Prompter(path, "reader")  # what the bundled model knows has no template
    _, prompts = plain.fit(TASKS["passkey"], 3 * T, lambda n: Brief("reader", "7", n, plain.count))
    assert plain.vocabulary.detokenize(prompts.tails[0]).decode().endswith("?\nAnswer:")


@pytest.mark.parametrize("length", [2000, 2050, 2100, 2119])
def test_lists_that_grow_in_jumps(length: int) -> None:
    """No length is near enough: the longest document that fits is taken, and none that is much too short."""
    p = prompter("natural")

    def make(brief: Brief, step: int) -> Sample:
        n_words = round(brief.n_tokens / step) * step
        return Sample("a " * n_words, (Item((Turn("Which?", ("a",)),), None),))

    def n_tokens(step: int) -> int:
        task = Task("list", "a list", partial(make, step=step), 8)
        return p.n_tokens(*p.fit(task, length, lambda n: Brief("natural", "1", n, p.count)), 8)

    assert length - 120 < n_tokens(60) <= length
    with pytest.raises(ConfigError, match="does not suit the task list"):
        n_tokens(900)


def test_too_short_a_length() -> None:
    p = prompter("reader")
    with pytest.raises(ConfigError, match="60 tokens does not suit the task qa"):
        p.fit(TASKS["qa"], 60, lambda n: Brief("reader", "1", n, p.count))
    with pytest.raises(ConfigError, match=r"ruler/common at 200 tokens: .* too few for a list"):
        p.fit(TASKS["ruler/common"], 200, lambda n: Brief("reader", "1", n, p.count))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("task", ["passkey", "niah", "ruler/multikey"])
def test_needle_lies_where_asked(task: str, style: Style, depth: float) -> None:
    made = sample(task, style, n_tokens=6000, depth=depth)
    (item,) = made.items
    (turn,) = item.turns
    assert item.depth == pytest.approx(depth, abs=0.02)
    key = turn.expected[0][1:-1] if turn.exact else turn.expected[0]
    text = made.document
    at = len(prompter(style).tokenize(text[: text.index(key)])) / len(prompter(style).tokenize(text))
    assert at == pytest.approx(depth, abs=0.03)
    assert text.count(key) == (2 if task == "passkey" else 1)


def test_passkey_is_said_twice_in_repeated_text() -> None:
    made = sample("passkey", "natural", depth=0.4)
    code = made.items[0].turns[0].expected[0]
    assert made.document.count(code) == 2
    assert made.document.count("The hills are green.") > 40
    made = sample("passkey", "reader", depth=0.4)
    code = re.findall(r"\d{5}", made.items[0].turns[0].expected[0])[0]
    assert made.document.count(code) == 2
    assert Counter(re.findall(r"[^.\n]+\.", made.document)).most_common(1)[0][1] > 20


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("ruler/")])
def test_answers_are_in_the_text(task: str) -> None:
    for seed in "123":
        made = sample(task, "natural", seed=seed)
        for turn in made.items[0].turns:
            assert turn.expected and len(set(turn.expected)) == len(turn.expected)
            assert scoring.n_found(turn.expected, made.document, exact=False) == len(turn.expected)
            assert scoring.n_found(turn.expected, turn.question, exact=False) == 0


@pytest.mark.parametrize("style", STYLES)
def test_several_needles(style: Style) -> None:
    values = sample("ruler/multivalue", style).items[0].turns[0].expected
    document = sample("ruler/multivalue", style).document
    assert [document.count(value) for value in values] == [1, 1, 1, 1]
    made = sample("ruler/multiquery", style)
    assert made.items[0].n_expected == 4
    assert len(made.items[0].turns) == (1 if style == "natural" else 4)
    if style == "reader":
        for turn in made.items[0].turns:
            assert turn.expected[0][1:-1] in made.document


@pytest.mark.parametrize("style", STYLES)
def test_variables_are_handed_on_in_order(style: Style) -> None:
    made = sample("ruler/variables", style)
    if style == "natural":
        names = list(made.items[0].turns[0].expected)
        hops = [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
        value = re.findall(rf"VAR {names[0]} = (\d+)\.", made.document)
    else:
        hops = [
            match[0] for match in re.finditer(r"The door code of [\w ]+ is the door code of [\w ]+\.", made.document)
        ]
        value = re.findall(r"The door code of [\w ]+ is (\d+)\.", made.document)
        assert made.items[0].turns[0].expected[0].endswith(f" is {value[0]}.")
        for a, b in pairwise(hops):
            assert a[len("The door code of ") :].split(" is ")[0] in b.split(" is ")[1]
    assert len(hops) == 4 and len(value) == 1
    places = [made.document.index(hop) for hop in hops]
    assert places == sorted(places) and made.document.index(value[0]) < places[0]


@pytest.mark.parametrize("n_tokens", [460, 2000, 9000])
def test_common_words(n_tokens: int) -> None:
    made = sample("ruler/common", "natural", n_tokens=n_tokens)
    counts = Counter(re.findall(r"\d+\. (\w+ \w+)", made.document))
    expected = set(made.items[0].turns[0].expected)
    often = {word for word, _ in counts.most_common(10)}
    assert often == expected and len(counts) > 20
    (least,) = {counts[word] for word in expected}
    assert least >= 3 * max(n for word, n in counts.items() if word not in expected)


@pytest.mark.parametrize("n_tokens", [460, 2000, 9000])
def test_frequent_words(n_tokens: int) -> None:
    made = sample("ruler/frequent", "natural", n_tokens=n_tokens)
    counts = Counter(made.document.split("\n", 1)[1].split())
    top = counts.most_common(4)
    assert [word for word, _ in top[:3]] == list(made.items[0].turns[0].expected)
    assert all(a > b for (_, a), (_, b) in pairwise(top))
    assert 3 < top[0][1] / top[1][1] < 5  # 1 to 1/4


def test_filler_leaves_out_what_is_forbidden() -> None:
    filler = texts.sentences(random.Random(1), ["door", "Monday"])
    said = [filler() for _ in range(3000)]
    assert not any(re.search(r"\b(door|monday)\b", sentence, re.IGNORECASE) for sentence in said)
    assert any("doors" in sentence or "day" in sentence for sentence in said)


def test_qa_asks_for_every_fact() -> None:
    made = sample("qa", "reader")
    assert len(made.items) == 20
    depths = [item.depth for item in made.items]
    assert depths == sorted(depths) and depths[0] < 0.1 and depths[-1] > 0.9
    natural = sample("qa", "natural")
    assert natural.document == made.document
    assert all(b.turns[0].expected[0] in a.turns[0].expected[0] for a, b in zip(made.items, natural.items))


def test_two_hops_are_asked_for_each_link() -> None:
    made, natural = sample("qa/two-hop", "reader"), sample("qa/two-hop", "natural")
    assert len(made.items) == TASKS["qa/two-hop"].n_items(20) == 10
    depths = [item.depth for item in made.items]
    assert depths == sorted(depths) and depths[0] < 0.2 and depths[-1] > 0.8
    room = TASKS["qa/two-hop"].answer_room("reader")
    for item, plain in zip(made.items, natural.items):
        turn = item.turns[0]
        link, fact = re.findall(r"[^.]+\.", turn.expected[0])
        for hop in (link, fact):
            assert made.document.count(hop.strip()[1:-1]) == 1
        assert prompter("reader").count(f" {turn.expected[0]}\n") < room
        assert plain.turns[0].question == turn.question
        assert scoring.n_found(plain.turns[0].expected, fact, exact=False) == 1
    assert natural.document == made.document


@pytest.mark.parametrize(("n_facts", "n"), [(1, 2), (3, 2), (4, 2), (7, 3), (20, 10)])
def test_facts_and_links_together_are_as_many_as_asked(n_facts: int, n: int) -> None:
    task = TASKS["qa/two-hop"]
    made = task.make(Brief("reader", "1", 2000, prompter("reader").count, None, n_facts))
    assert len(made.items) == task.n_items(n_facts) == n


#
# scores
#


@pytest.mark.parametrize(
    ("expected", "text", "exact", "n"),
    [
        (["12345"], " The key is 12345.", False, 1),
        (["12345"], "It is 123456.", False, 0),
        (["1", "2", "3"], "2, 3 and 4", False, 2),
        (["copper lantern"], "1. Copper lantern 2. odd jar", False, 1),
        (["The code is 1."], " The code is 1.\nQuestion: Who?", True, 1),
        (["The code is 1."], "I think: The code is 1.", True, 0),
        (["The code is 1."], "", True, 0),
        (["x"], "", False, 0),
    ],
)
def test_what_is_found(expected: list[str], text: str, exact: bool, n: int) -> None:
    assert scoring.n_found(expected, text, exact=exact) == n


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (8, 10, 0.4902, 0.9433), (1, 100, 0.0018, 0.0545), (0, 0, 0, 1)],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert scoring.wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_interval_of_a_mean() -> None:
    assert scoring.mean_interval([2.0]) == (2.0, 2.0)
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = scoring.mean_interval(list(values))
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20, rel=1e-4)


#
# log-loss
#


@pytest.mark.parametrize(
    ("n_text", "longest", "tail", "n"), [(5000, 2000, 64, 16), (2100, 2000, 64, 16), (2000, 2000, 64, 16)]
)
def test_windows_end_apart(n_text: int, longest: int, tail: int, n: int) -> None:
    ends = window_ends(n_text, longest, tail, n)
    assert ends[-1] == n_text and ends[0] >= longest
    assert all(b - a >= tail for a, b in pairwise(ends))
    assert len(ends) == min(n, 1 + (n_text - longest) // tail)


def test_text_that_is_shorter_than_a_window() -> None:
    with pytest.raises(PromptError, match="1000 tokens, the longest window takes 2000"):
        window_ends(1000, 2000, 64, 4)


@pytest.mark.parametrize("mesa", [MesaConfig(), MesaConfig(enabled=False)], ids=["mesa", "stock"])
@pytest.mark.parametrize("n_batch", [48, 512])
def test_losses_are_those_of_all_logits(mesa: MesaConfig, n_batch: int) -> None:
    text = documents.make_document(4, 1200).text
    options: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "n_batch": n_batch}
    llm = MesaLlama(BUNDLED, mesa=mesa, **options)
    tokens = llm.tokenize(text.encode())[:1000]
    losses = tail_losses(llm, tokens, 70)
    assert losses == tail_losses(llm, tokens, 70)  # the context is as it was

    every = MesaLlama(BUNDLED, mesa=mesa, logits_all=True, **options)
    every.eval(tokens[:-1])
    logits = every.scores[:999].astype(np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(999), tokens[1:]]
    assert len(losses) == 70
    assert worst(losses, expected[-70:]) < 1e-3


#
# results on disk
#


def row(index: int, method: str = "mesa", **more: Any) -> dict[str, Any]:
    return {"task": "qa", "method": method, "length": 512, "seed": 1, "depth": 0.5, "index": index, **more}


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    settings = {"model": {"name": "a"}, "mesa": {}}
    Store(path, settings).add([row(0, right=1), row(1, right=0)])
    store = Store(path, settings)
    store.add([row(1, right=1), row(2, right=1)])  # what is there stays
    assert [r["right"] for r in Store(path, settings).rows.values()] == [1, 0, 1]
    assert len(path.read_text().splitlines()) == 4


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    Store(path, {"a": 1}).add([row(0), row(1)])
    path.write_bytes(path.read_bytes()[:-9])
    store = Store(path, {"a": 1})
    assert [r["index"] for r in store.rows.values()] == [0]
    store.add([row(1)])
    assert len(Store(path, {"a": 1}).rows) == 2
    path.write_bytes(path.read_bytes()[:3])  # not even the settings
    assert not Store(path, {"a": 2}).rows
    assert json.loads(path.read_text()) == {"settings": {"a": 2}}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    Store(path, {"mesa": {}, "style": "reader"})
    with pytest.raises(ConfigError, match=r"other settings \(mesa.chunk: null there, 240 now\): use another folder"):
        Store(path, {"mesa": {"chunk": 240}, "style": "reader"})


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"settings": {}}\n{"task": 1}\n'])
def test_a_file_that_holds_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(text)
    with pytest.raises(MesaError, match="is no result of mesa-gguf eval"):
        Store(path, {})


#
# runs
#

SMALL_RUN = Options(
    path=BUNDLED,
    methods=("mesa", "stock"),
    lengths=(T, 2 * T),
    seed=3,
    samples={"passkey": 2, "niah": 1, "ruler": 1, "ppl": 3, "qa": 1},
    n_depths=2,
    n_facts=4,
    machine={"n_threads": 1, "n_threads_batch": 1, "n_gpu_layers": 0},
)


def run(group: str, folder: Path, options: Options = SMALL_RUN) -> dict[str, Any]:
    evaluation = Evaluation(group, options, folder)
    evaluation.run()
    rows = evaluation.store.rows.values()
    return {**report.document(evaluation.settings(), rows, "command", 1), "rows": report.items(rows)}


def without_run(contents: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in contents.items() if key != "run"})


@pytest.mark.parametrize("group", ["passkey", "ppl", "qa"])
def test_same_seed_same_results(group: str, tmp_path: Path) -> None:
    first, second = (run(group, tmp_path / name) for name in "ab")
    assert without_run(first) == without_run(second)
    assert len(first["rows"]) == {"passkey": 8, "ppl": 12, "qa": 24}[group]
    other = run(group, tmp_path / "c", replace(SMALL_RUN, seed=4))
    assert first["items"]["sha256"] != other["items"]["sha256"]


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("passkey", tmp_path / "whole")
    ask, asked = Evaluation._ask, []

    def cut_off(self: Evaluation, llm: Any, unit: Any, *rest: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((unit.length, unit.index))
        return ask(self, llm, unit, *rest)

    monkeypatch.setattr(Evaluation, "_ask", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("passkey", tmp_path / "cut")
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run("passkey", tmp_path / "cut")
    assert asked == [(T, 1), (2 * T, 0), (2 * T, 1)]  # stock's second at T, then mesa's at 2 T
    asked.clear()
    resumed = run("passkey", tmp_path / "cut")
    assert asked == [(2 * T, 0), (2 * T, 1)]
    assert without_run(resumed) == without_run(whole)


def test_methods_and_samples_can_be_added(tmp_path: Path) -> None:
    fewer = replace(SMALL_RUN, methods=("mesa",), lengths=(2 * T,), samples={"niah": 1})
    assert len(run("niah", tmp_path, fewer)["rows"]) == 2
    more = run("niah", tmp_path, replace(fewer, methods=("mesa", "yarn"), samples={"niah": 2}))
    fresh = run("niah", tmp_path / "fresh", replace(fewer, methods=("mesa", "yarn"), samples={"niah": 2}))
    assert without_run(more) == without_run(fresh)
    assert [(e["method"], e["n"]) for e in more["summary"]] == [("mesa", 4), ("yarn", 4)]
    assert [e["depth"] for e in more["by_depth"]] == [0.0, 1.0] * 2


def test_documents_that_are_kept(tmp_path: Path) -> None:
    """`read=all` has the whole document before each question, a number of tokens some of it; a method's numbers are its own."""
    methods = ("mesa", "mesa,chunk=100", "mesa,read=all", "mesa,read=500")
    options = replace(SMALL_RUN, methods=methods, lengths=(3 * T,), samples={"qa": 1, "ruler": 1})
    rows = run("qa", tmp_path, options)["rows"]
    prompts = {name: [row["n_prompt"] for row in rows if row["method"] == name] for name in methods}
    assert {name: len(found) for name, found in prompts.items()} == dict.fromkeys(methods, 4 + 2)  # facts, and two hops
    assert prompts["mesa"] == prompts["mesa,chunk=100"]
    assert all(abs(a - b) < 64 for a, b in zip(prompts["mesa"], prompts["mesa,read=all"], strict=True))
    assert all(n < 2 * T for n in prompts["mesa,read=500"])
    right = {name: sum(row["right"] for row in rows if row["method"] == name) for name in methods}
    assert all(right[name] >= 3 for name in methods)
    (turns,) = run("ruler", tmp_path, replace(options, methods=("mesa,read=500",), kinds=("multiquery",)))["rows"]
    assert len(turns["answers"]) == 4 and turns["right"] >= 3  # each question chooses its own chunks


def test_within_the_trained_length_methods_are_the_same(tmp_path: Path) -> None:
    options = replace(SMALL_RUN, methods=tuple(METHODS), lengths=(T,))
    for group in ("qa", "ppl"):
        contents = run(group, tmp_path, options)
        by_method = [
            [{**item, "method": ""} for item in contents["rows"] if item["method"] == method] for method in METHODS
        ]
        assert by_method[0] and all(items == by_method[0] for items in by_method)


def test_the_reader_finds_what_is_asked_in_its_style(tmp_path: Path) -> None:
    options = replace(SMALL_RUN, methods=("mesa",), samples={"passkey": 4, "niah": 2, "ruler": 2, "qa": 1})
    for group, tasks in {
        "passkey": ["passkey"],
        "niah": ["niah"],
        "ruler": ["ruler/multikey", "ruler/multiquery"],
    }.items():
        kinds = [task.split("/")[1] for task in tasks if "/" in task]
        contents = run(group, tmp_path, replace(options, kinds=kinds))
        for entry in contents["summary"]:
            assert entry["task"] in tasks
            assert entry["share"] >= 0.5, entry
        assert contents["not_able"] == {}


def test_what_a_model_cannot_do_is_said(tmp_path: Path) -> None:
    contents = run("ruler", tmp_path, replace(SMALL_RUN, methods=("mesa",), lengths=(T,), kinds=["common"]))
    assert contents["not_able"]["ruler/common"] < 0.5
    (table,) = report.tables(contents)
    assert "cannot do ruler/common within its trained length" in table[3]


def test_quadratic_methods_stop_at_a_length(tmp_path: Path) -> None:
    contents = run("passkey", tmp_path, replace(SMALL_RUN, max_length_full=T))
    assert [(e["method"], e["length"]) for e in contents["summary"]] == [("mesa", T), ("stock", T), ("mesa", 2 * T)]
    (table,) = report.tables(contents)
    assert table[2][1] == ("stock", [table[2][1][1][0], "–"])


def test_a_change_from_t_is_that_of_methods_that_have_one() -> None:
    scored = {"task": "ppl", "n": 4, "loss": 3.0, "interval": [2.9, 3.1]}
    summary = [
        {**scored, "method": "mesa", "length": T, "change": 0.0, "change_interval": [0.0, 0.0]},
        {**scored, "method": "mesa", "length": 2 * T, "change": 0.1, "change_interval": [0.0, 0.2]},
        {**scored, "method": "yarn", "length": 2 * T},
    ]
    losses, changes = report.tables({"summary": summary, "not_able": {}})
    assert [method for method, _ in losses[2]] == ["mesa", "yarn"]
    assert [method for method, _ in changes[2]] == ["mesa"]


def test_ppl_scores_the_same_tokens_at_all_lengths(tmp_path: Path) -> None:
    contents = run("ppl", tmp_path)
    ends = {(i["method"], i["length"]): [] for i in contents["rows"]}
    for item in contents["rows"]:
        ends[item["method"], item["length"]].append(item["end"])
        assert item["n"] == T // 8
    assert len(ends) == 4 and len({tuple(value) for value in ends.values()}) == 1
    losses = {(e["method"], e["length"]): e["loss"] for e in contents["summary"]}
    assert all(0.5 < loss < 10 for loss in losses.values())


def test_pooled_numbers() -> None:
    rows = [row(i, right=i % 2, of=1) for i in range(10)] + [row(i, "stock", right=0, of=1) for i in range(10)]
    mesa, stock = report.summarize(rows, T)
    assert (mesa["right"], mesa["of"], mesa["share"]) == (5, 10, 0.5)
    assert mesa["interval"] == pytest.approx(scoring.wilson(5, 10), abs=1e-4)
    assert stock["interval"][0] == 0
    assert [e["depth"] for e in report.by_depth(rows)] == [0.55, 0.55]


def test_losses_are_compared_window_by_window() -> None:
    def windows(length: int, losses: list[float]) -> list[dict[str, Any]]:
        return [row(i, loss=loss) | {"task": "ppl", "length": length, "depth": None} for i, loss in enumerate(losses)]

    at_t, longer = report.summarize(windows(T, [1.0, 2.0, 4.0]) + windows(2 * T, [1.1, 2.2, 4.3]), T)
    assert (at_t["change"], longer["change"]) == (0, 0.2)
    assert longer["change_interval"] == pytest.approx(scoring.mean_interval([0.1, 0.2, 0.3]), abs=1e-4)
    assert longer["loss"] == pytest.approx(7.6 / 3, abs=1e-4)
    (alone,) = report.summarize(windows(2 * T, [1.1]), T)
    assert "change" not in alone


#
# methods
#


def logits(path: Path, method: str, n_tokens: int, tokens: list[int], **options: Any) -> Any:
    llm = open_model(
        path, method, n_tokens, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0, **options
    )
    llm.eval(tokens)
    return llm.scores[: len(tokens)].copy()


SHORT = make_models.Shape(n_head=2, train_length=32)


@pytest.mark.parametrize(
    ("method", "scaling"),
    [
        ("linear", make_models.RopeScaling("linear", factor=4.0)),
        ("yarn", make_models.RopeScaling("yarn", factor=4.0, original_length=32)),
        ("dynamic-ntk", make_models.RopeScaling(freq_base=10000.0 * (3 * 4 - 2) ** (32 / 30))),
        ("stock", make_models.RopeScaling()),
    ],
)
def test_methods_are_what_a_model_with_that_scaling_is(
    method: str, scaling: make_models.RopeScaling, tmp_path: Path
) -> None:
    plain = make_models.write_llama(tmp_path / "plain.gguf", SHORT)
    scaled = make_models.write_llama(tmp_path / "scaled.gguf", replace(SHORT, train_length=128), scaling)
    tokens = random_tokens(120)
    got = logits(plain, method, 128, tokens)
    expected = logits(scaled, "stock", 128, tokens)
    assert worst(got, expected) < 1e-4
    others = [name for name in ("linear", "yarn", "dynamic-ntk", "stock") if name != method]
    assert all(worst(logits(plain, other, 128, tokens), expected) > 0.1 for other in others)


@pytest.mark.parametrize("method", METHODS)
def test_within_the_trained_length_a_method_is_stock(method: str, tmp_path: Path) -> None:
    plain = make_models.write_llama(tmp_path / "plain.gguf", SHORT)
    tokens = random_tokens(32)
    np.testing.assert_array_equal(logits(plain, method, 32, tokens), logits(plain, "stock", 32, tokens))


def test_yarn_goes_on_from_a_models_own(tmp_path: Path) -> None:
    def write(name: str, factor: float, train_length: int) -> Path:
        scaling = make_models.RopeScaling("yarn", factor=factor, original_length=32)
        return make_models.write_llama(tmp_path / name, replace(SHORT, train_length=train_length), scaling)

    tokens = random_tokens(120)
    got = logits(write("own.gguf", 2.0, 64), "yarn", 128, tokens)
    assert worst(got, logits(write("longer.gguf", 4.0, 128), "stock", 128, tokens)) < 1e-4


def test_overrides_reach_the_engine() -> None:
    llm = open_model(BUNDLED, "mesa", 2048, overrides={"chunk": 120, "first_chunk": 20, "stair_width": 60}, n_threads=1)
    plan = llm.plan(2000)
    assert plan.chunk_starts[1] == 20 and plan.stair_width == 60
    assert max(b - a for a, b in pairwise(plan.chunk_starts)) <= 120
    assert llm.n_ctx() == 2048


@pytest.mark.parametrize(
    ("model", "method", "problem"),
    [
        ("mpt", "yarn", "yarn scales RoPE, which this model does not have"),
        ("nope", "linear", "linear scales RoPE"),
        ("llama-yarn", "linear", "on top of the model's own yarn"),
        ("llama-linear", "yarn", "on top of the model's own linear"),
        ("mamba", "mesa", "mesa cannot read with this model .*recurrent"),
    ],
)
def test_methods_that_do_not_apply(model_path: ModelPath, model: str, method: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        open_model(model_path(model), method, 256)


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"there is no method mega: use one of .*yarn"):
        open_model(BUNDLED, "mega", 512)


def test_every_method_says_what_it_is() -> None:
    for name, method in METHODS.items():
        assert name == method.name and method.description and method.source


#
# the command
#


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Runs `mesa-gguf eval` into the test's folder; returns what it printed."""

    def command(*args: object, into: str = "results") -> tuple[str, str]:
        code = cli.main(["eval", *(str(arg) for arg in args), "--output", str(tmp_path / into), *THREADS])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return command


def results_page(folder: Path, *of: str) -> str:
    """What experiments/results.py writes of these folders in there."""
    script = [sys.executable, str(ROOT / "experiments" / "results.py"), *of, "--output", "RESULTS.md"]
    subprocess.run(script, cwd=folder, check=True)
    return (folder / "RESULTS.md").read_text()


TINY = ("--samples", "1", "--length", "T", "--length", "2T", "--depths", "2", "--facts", "3")


@pytest.mark.slow
def test_all_tasks(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, _ = command("all", "--quick", *TINY, "--method", "mesa", "--method", "linear")
    for task in ("passkey", "niah", "qa", "qa/two-hop", "ppl", *(name for name in TASKS if "ruler" in name)):
        assert f"{task}: " in out
    assert re.search(r"mesa +│ +1\.00 \[0\.\d\d, 1\.00\]", out)
    assert "cannot do ruler/common" in out
    for group in ("passkey", "niah", "ruler", "ppl", "qa"):
        assert (tmp_path / "results" / f"{group}.png").read_bytes().startswith(b"\x89PNG")
        contents = json.loads((tmp_path / "results" / f"{group}.json").read_text())
        assert set(contents) == {"settings", "not_able", "summary", "by_depth", "items", "scores", "run"}
        assert contents["settings"]["style"] == "reader"
        assert {entry["length"] for entry in contents["summary"]} == {T, 2 * T}

    (tmp_path / "results" / "qa.png").unlink()  # of single runs pictures are not kept
    page = results_page(tmp_path, "results")
    assert (tmp_path / "results" / "qa.png").exists()
    assert "## mesa-reader-q8_0.gguf" in page and "### Where Mesa is behind" in page
    assert "| method | T | 2 T |" in page and "![qa by length](results/qa.png)" in page


def test_methods_with_options_have_places_of_their_own(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    methods = ("mesa", "mesa,read=all", "mesa,read=500")
    command("passkey", "--samples", "1", "--length", "2T", *(part for name in methods for part in ("--method", name)))
    page = results_page(tmp_path, "results")
    assert all(f"| {name} |" in page for name in methods)
    figure = report.figure(json.loads((tmp_path / "results" / "passkey.json").read_text()))
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines() if line.get_label() in methods}
    assert len(colours) == len({*colours.values()}) == len(methods)


@pytest.mark.slow
def test_answer_loss(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """The script's right answers are those that `eval` writes, and a run is level with itself."""
    command("qa", "--method", "mesa", "--samples", "2", "--length", "4T", "--seed", "3", "--stair-bias", "1.5")
    summary = json.loads((tmp_path / "results" / "qa.json").read_text())["summary"]
    options = ("--length", "4T", "--seed", "3", "--documents", "2", "--set", "stair_bias=1.5")
    out = ""
    for more in (("-o", "own.json"), ("-o", "again.json", "--against", "own.json")):
        script = [sys.executable, str(ROOT / "experiments" / "answer_loss.py"), *options, *more]
        out = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    right = json.loads((tmp_path / "own.json").read_text())["scores"][str(4 * T)]["right"]
    written = next(entry["right"] for entry in summary if entry["task"] == "qa/two-hop")
    assert sum(right.values()) == written and 0 < written < len(right) == 20
    assert out.count("difference +0.000 [+0.000, +0.000]") == 2


def test_ablations_are_put_side_by_side(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    options = ("qa", "--method", "mesa", *TINY)
    command(*options, into="default")
    command(*options, "--chunk", "240", "--no-log-scaling")
    page = results_page(tmp_path, "default", "results")
    assert "### Ablation" in page and "| default | " in page and "| chunk 240, log_scaling False | " in page


def test_results_of_other_defaults_are_not_mixed(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    command("passkey", "--method", "mesa", *TINY)
    contents = json.loads((tmp_path / "results" / "passkey.json").read_text())
    own = contents["settings"]["defaults"]["mesa"]
    assert own == {
        **dict(reading_length=512, first_chunk=32, chunk=480, last_chunk=128, stair_width=0, stair_bias=0.5, room=256),
        **dict(log_scaling=True, log_length=2048, window=0, n_sinks=4),
    }
    own["room"] = 64
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "passkey.json").write_text(json.dumps(contents))
    script = [sys.executable, str(ROOT / "experiments" / "results.py"), "older", "results", "--output", "RESULTS.md"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / "RESULTS.md").exists()
    assert "other defaults of mesa (room 64 and 256)" in done.stderr


def test_files_of_one_task_become_one_table(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """The cell with more items counts, ablations are compared with the plain run beside them, item by item."""
    runs = {
        "plain/a": ("passkey", *TINY, "--method", "mesa", "--method", "linear"),
        "plain/b": ("passkey", "--samples", "2", "--length", "2T", "--method", "mesa", "--method", "linear"),
        "ablation/default": ("passkey", *TINY, "--method", "mesa"),
        "ablation/chunk": ("passkey", *TINY, "--method", "mesa", "--chunk", "240"),
    }
    for folder, args in runs.items():
        command(*args, into=folder)
    page = results_page(tmp_path, "plain", "ablation")
    assert "passkey: share that is right, 95 % interval; 1 to 2 items a cell." in page
    assert "![passkey by length](plain/mesa-reader-q8_0-passkey.png)" in page
    assert (tmp_path / "plain" / "mesa-reader-q8_0-passkey.png").exists()
    rows = [line for line in page.splitlines() if line.startswith("| mesa |") and "[" in line]
    assert rows == ["| mesa | 1.00 [0.21, 1.00] | 1.00 [0.34, 1.00] |"]
    assert page.count("| default | 1.00 [0.21, 1.00] | 1.00 [0.21, 1.00] |") == 1
    assert "| chunk 240 | +0.000 (one document) | +0.000 (one document) |" in page


def test_leads_are_taken_of_the_items_of_all_files(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """Mesa's cell is that of its largest file; another method is compared with what any file has of Mesa on its own items."""
    runs = {
        "plain/linear": (("--samples", "1", "--method", "linear"), 1.0),
        "plain/mesa": (("--samples", "1", "--method", "mesa"), 0.0),
        "plain/larger": (("--samples", "2", "--method", "mesa", "--seed", "9"), 1.0),
    }
    for folder, (args, score) in runs.items():
        command("passkey", "--length", "2T", *args, into=folder)
        path = tmp_path / folder / "passkey.json"
        contents = json.loads(path.read_text())
        for entry in contents["scores"]:
            entry["values"] = dict.fromkeys(entry["values"], score)
        path.write_text(json.dumps(contents))
    (row,) = (line for line in results_page(tmp_path, "plain").splitlines() if line.startswith("| passkey | 2 T |"))
    assert "| 1.00 [0.34, 1.00] | linear |" in row and row.endswith("| +1.000 (one document) |")


def test_pairs_share_their_items() -> None:
    rows = [row(i, right=1, of=1) for i in range(4)] + [row(i, "stock", right=int(i > 2), of=1) for i in range(1, 4)]
    mesa, stock = (entry["values"] for entry in report.scores(rows))
    assert len(mesa) == 4 and set(stock) < set(mesa)
    mean, low, high = report.lead(mesa, stock) or (0, 0, 0)
    assert mean == pytest.approx(2 / 3) and (low, high) == pytest.approx(scoring.mean_interval([1, 1, 0]))
    assert report.lead(mesa, {}) is None
    # the items of a document are one observation of their mean
    first = {f"0:{i}": value for i, value in enumerate([1.0, 1.0, 0.0, 0.0, 1.0, 0.5])}
    none = dict.fromkeys(first, 0.0)
    assert report.lead(first, none, 2) == pytest.approx((7 / 12, *scoring.mean_interval([1, 0, 0.75])))
    assert report.lead(first, none, 1) == pytest.approx((7 / 12, *scoring.mean_interval(list(first.values()))))
    assert np.isnan(report.lead(first, none, 6)[1])
    # of a grid, items of all depths have the same number
    grid = [{**row(0), "task": "niah", "depth": depth, "right": 1, "of": 1} for depth in (0.0, 0.5, 1.0)]
    assert len(report.scores(grid)[0]["values"]) == 3


def test_a_summary_without_its_items_is_kept(
    command: Callable[..., tuple[str, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command("passkey", "--method", "mesa", *TINY)
    (tmp_path / "results" / "passkey.jsonl").unlink()
    before = (tmp_path / "results" / "passkey.json").read_bytes()
    args = ["eval", "passkey", *TINY, "--method", "star", "--output", str(tmp_path / "results"), *THREADS]
    assert cli.main(args) == 2
    assert "sums up items that are gone" in capsys.readouterr().err
    assert (tmp_path / "results" / "passkey.json").read_bytes() == before


def test_again_and_json(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    args = ("passkey", "--method", "mesa", *TINY)
    _, err = command(*args)
    assert "there already" not in err
    before = (tmp_path / "results" / "passkey.jsonl").read_bytes()
    out, err = command(*args, "--json")
    assert "passkey.jsonl: 2 results are there already" in err
    assert (tmp_path / "results" / "passkey.jsonl").read_bytes() == before
    shown = json.loads(out)
    assert [entry["length"] for entry in shown["summary"]] == [T, 2 * T]
    # the commands that results come from are kept, each once
    first, second = json.loads((tmp_path / "results" / "passkey.json").read_text())["run"]["command"].splitlines()
    assert first.startswith("mesa-gguf eval passkey") and second == first.replace(" --output", " --json --output")


def test_ppl_of_a_text(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "licence.txt"
    path.write_text((ROOT / "LICENSE").read_text())
    options = ("--method", "mesa", "--length", "300", "--length", "T", "--tail", "20", "--samples", "3")
    out, _ = command("ppl", "--text", path, *options)
    assert "300" in out and "T" in out
    contents = json.loads((tmp_path / "results" / "ppl.json").read_text())
    assert contents["settings"]["task"]["tail"] == 20
    assert [entry["n"] for entry in contents["summary"]] == [3, 3]


def test_all_leaves_out_ppl_without_a_text(command: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    out, err = command("all", *TINY, "--style", "natural", "--length", "3T", "--method", "mesa", "--kind", "multikey")
    assert "ppl is left out" in err and "ppl:" not in out
    assert not (tmp_path / "results" / "ppl.json").exists()


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from mesa_gguf.cli import evaluate as cli_eval

    with cli_eval._bar(False) as watch:
        assert watch is None
    with cli_eval._bar(True) as watch:
        assert watch is not None
        watch("qa · mesa · 512", 512, 2048)


@pytest.mark.parametrize(
    ("text", "tokens"), [("T", 512), ("4T", 2048), ("T/2", 256), ("1.5T", 768), ("0.5T", 256), ("3000", 3000)]
)
def test_lengths(text: str, tokens: int) -> None:
    from mesa_gguf.cli.evaluate import _tokens

    assert _tokens(text, T, "--length") == tokens


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["everything"], "there is no task everything: use one of passkey, niah, ruler, ppl, qa, real, all"),
        ([], "TASK"),
        (["qa", "--method", "mega"], "there is no method mega: use one of mesa"),
        (["qa", "--method", "origin"], "the method origin is called stock now: give stock"),
        (["qa", "--length", "long"], "--length long: write a number of tokens"),
        (["qa", "--length", "0"], "--length 0"),
        (["qa", "--length", "T/0"], "--length T/0"),
        (["qa", "--length", "60"], "does not suit the task qa"),
        (["qa", "--max-length-full", "much"], "--max-length-full much"),
        (["ruler", "--kind", "hard"], "there is no ruler kind hard: use one of multikey"),
        (["qa", "--style", "modern"], "there is no style modern"),
        (["qa", "--samples", "0"], "--samples"),
        (["qa", "--type-k", "q9_9"], "q9_9"),
        (["qa", "--first-chunk", "600"], "reading_length (512)"),
        (["qa", "--stair-width", "wide"], "--stair-width wide"),
        (["qa", "--method", "yarn", "--chunk", "200"], "--chunk changes nothing for yarn"),
        (["qa", "-m", "missing.gguf"], "missing.gguf: there is no such file"),
        (["qa", "-m", "MPT", "--method", "yarn"], "no vocabulary"),
        (["ppl", "--style", "natural"], "ppl needs a text"),
        (["ppl", "--text", "SHORT", "--method", "mesa,read=auto"], "ppl has no questions to choose chunks by"),
        (["qa", "--method", "mesa,chunk=much"], "much is no number"),
        (["ppl", "--text", "missing.txt"], "missing.txt: there is no such file"),
        (["ppl", "--text", "SHORT"], "the longest window takes"),
        (["ppl", "--length", "50"], "too short for a tail of 64"),
        (["qa", "--output", "SHORT"], "SHORT is a file: give --output a folder"),
        (["passkey", "--output", "OTHER", "--seed", "5"], "is no result of mesa-gguf eval"),
        (["passkey", "--output", "CHANGED"], "made with other settings"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model_path: ModelPath,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("SHORT").write_text("A short text.")
    Path("OTHER").mkdir()
    Path("OTHER/passkey.jsonl").write_text("hello\n")
    Path("CHANGED").mkdir()
    Path("CHANGED/passkey.jsonl").write_text('{"settings": {"style": "natural"}}\n')
    names = {"MPT": str(model_path("mpt"))}
    code = cli.main(["eval", *(names.get(arg, arg) for arg in args), *THREADS])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("mesa-gguf: ") and err.count("\n") == 1
    assert problem in err


def test_model_that_mesa_does_not_support(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mesa_gguf.model.header import Header

    monkeypatch.setattr(Header, "unsupported", "it is recurrent")
    assert cli.main(["eval", "qa", "--output", str(tmp_path), *THREADS]) == 2
    assert "mesa cannot read with this model (architecture llama): it is recurrent" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text and "mesa-gguf eval all --quick" in text
