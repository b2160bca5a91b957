"""The command line, on the bundled model: what it prints, that documents are read once, and how it says no."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from huggingface_hub import errors as hub_errors
from matplotlib.path import Path as Polygon

from conftest import BUNDLED, READER, ModelPath
from mesa_gguf import MesaConfig, MesaLlama, ModelError, cli
from mesa_gguf.cli import output
from mesa_gguf.cli.app import app
from mesa_gguf.cli.ask import say_citations
from mesa_gguf.lab import plot
from mesa_gguf.lab.documents import Document, is_right, make_document
from mesa_gguf.model.header import Header
from mesa_gguf.model.hub import find_model
from mesa_gguf.reading import reader as reading
from mesa_gguf.reading.plans import summarize
from mesa_gguf.reading.prompts import ABOUT, REPLY, PromptForm
from mesa_gguf.reading.reader import Citation, load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Selection

T = 512  # of the bundled model
THREADS = ("--threads", "1")

Run = Callable[..., str]
"""Runs a command that must succeed, returns its standard output."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> str:
        code = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2 and one line, returns the line."""

    def fails(*args: object) -> str:
        code = cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.startswith("mesa-gguf: ") and err.count("\n") == 1
        return err

    return fails


@pytest.fixture(scope="session")
def document() -> Document:
    """About four times the trained length."""
    return make_document(3, 4 * T, n_facts=6)


@pytest.fixture
def file(tmp_path: Path, document: Document) -> Path:
    path = tmp_path / "document.txt"
    path.write_text(document.text, encoding="utf-8")
    return path


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of each text that llama.cpp is given, in order."""
    counts: list[int] = []
    read = MesaLlama._eval

    def count(self: MesaLlama, tokens: list[int]) -> None:
        counts.append(len(tokens))
        read(self, tokens)

    monkeypatch.setattr(MesaLlama, "_eval", count)
    return counts


def asked(questions: Sequence[str]) -> list[str]:
    return [part for question in questions for part in ("-q", question)]


#
# ask
#


@pytest.mark.parametrize("mode", ["auto", "500"])
def test_a_question_chooses_its_chunks_once(
    run: Run, file: Path, tmp_path: Path, document: Document, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    chosen: list[int] = []
    select = Catalogue.select

    def count(self: Catalogue, *args: Any, **kwargs: Any) -> Selection:
        chosen.append(1)
        return select(self, *args, **kwargs)

    monkeypatch.setattr(Catalogue, "select", count)
    monkeypatch.setattr("mesa_gguf.reading.shelf.AUTO_TOKENS", 600)
    monkeypatch.setattr("mesa_gguf.reading.shelf.MOST_AUTO_TOKENS", 600)
    question = document.facts[0].question
    answer = json.loads(
        run("ask", "-f", file, question, "--read", mode, "--json", "--library", tmp_path / "l", *THREADS)
    )
    assert is_right(document.facts[0], answer["answer"])
    assert 1 <= answer["read"]["chunks"] < answer["read"]["of_chunks"]
    assert len(chosen) == 1


def test_ask_within_the_trained_length_is_plain_llama_cpp(run: Run, tmp_path: Path) -> None:
    document = make_document(5, 400, n_facts=6)
    path = tmp_path / "short.txt"
    path.write_text(document.text)
    llm = MesaLlama(BUNDLED, mesa=MesaConfig(enabled=False), n_ctx=T, n_threads=1, n_threads_batch=1)
    expected = llm(document.prompt(), max_tokens=32, temperature=0, stop=["\n"])["choices"][0]["text"].strip()
    assert expected
    assert run("ask", "-f", path, document.target.question, *THREADS) == f"{expected}\n"


def test_a_file_without_a_name_is_no_folder(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "a file's name is empty" in fails("ask", "-f", "", "Who?", "--library", tmp_path / "library", *THREADS)
    assert "a file's name is empty" in fails("library", "add", "", "--library", tmp_path / "library")


def test_citations_have_no_commands_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say_citations([Citation("a.txt", None, (), 0, 9, "a \x1b[31mred\x07 word\u202e", 1.0, False)], [])
    assert capsys.readouterr().err == "[1] a.txt: a \\x1b[31mred\\x07 word\\u202e\n"


def test_ask_several_questions(run: Run, file: Path, document: Document, tmp_path: Path) -> None:
    first, second, third = (fact.question for fact in document.facts[:3])
    questions = tmp_path / "questions.txt"
    questions.write_text(f"{third}\n\n")
    lines = run("ask", first, "-f", file, "-q", second, "--questions", questions, *THREADS).splitlines()
    assert [lines[0], lines[3], lines[6]] == [f"> {first}", f"> {second}", f"> {third}"]
    assert [lines[2], lines[5]] == ["", ""]
    assert all([lines[1], lines[4], lines[7]]) and len(lines) == 8


def test_json_has_one_object_a_question(run: Run, file: Path, document: Document) -> None:
    questions = [fact.question for fact in document.facts[:2]]
    results = [
        json.loads(line)
        for line in run("ask", "--no-library", "-f", file, *asked(questions), "--json", *THREADS).splitlines()
    ]
    assert [result["question"] for result in results] == questions
    for result in results:
        assert set(result) == {"question", "answer", "finish_reason", "n_tokens", "timings", "plan", "model"}
        assert result["answer"] and "\n" not in result["answer"]
        assert set(result["n_tokens"]) == {"document", "question", "answer"}
        assert all(n > 0 for n in result["n_tokens"].values())
        assert set(result["timings"]) == {
            "load_s",
            "prefill_s",
            "prefill_tokens_per_s",
            "first_token_s",
            "answer_s",
            "answer_tokens_per_s",
        }
        assert all(seconds > 0 for seconds in result["timings"].values())
        assert set(result["plan"]) == {
            "enabled",
            "train_length",
            "reading_length",
            "chunk_starts",
            "anchor",
            "stair_width",
        }
        assert result["plan"]["enabled"] and result["plan"]["train_length"] == T
        assert len(result["plan"]["chunk_starts"]) >= 4
        assert Path(result["model"]).samefile(BUNDLED)


def test_the_document_is_read_once(run: Run, file: Path, document: Document, evaluated: list[int]) -> None:
    questions = [fact.question for fact in document.facts[:3]]
    results = [
        json.loads(line)
        for line in run("ask", "--no-library", "-f", file, *asked(questions), "--json", *THREADS).splitlines()
    ]
    read = [n for n in evaluated if n > 1]  # generated tokens are given one by one
    assert read == [results[0]["n_tokens"]["document"], *(result["n_tokens"]["question"] for result in results)]
    generated = sum(result["n_tokens"]["answer"] for result in results)
    assert sum(evaluated) - sum(read) <= generated


def test_an_answer_does_not_depend_on_other_questions(run: Run, file: Path, document: Document) -> None:
    first, second = (fact.question for fact in document.facts[:2])
    together = run("ask", "-f", file, *asked([first, second, first]), "--quiet", *THREADS).splitlines()
    assert together[0] == together[2]
    assert together[1] == run("ask", "-f", file, second, "--quiet", *THREADS).strip()


def test_ask_standard_input(run: Run, file: Path, document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    question = document.target.question
    expected = run("ask", "-f", file, question, *THREADS)
    data = b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n")  # as some editors write it
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run("ask", "-f", "-", question, *THREADS) == expected


def test_ask_options_reach_the_engine(run: Run, file: Path) -> None:
    options = "--first-chunk 20 --chunk 100 --last-chunk 90 --stair-width 60 --no-log-scaling --train-length 500 --reading-length 400"
    engine = "--type-k q8_0 --type-v q8_0 --batch 128 --ubatch 64 --n-ctx 3000 --max-tokens 2 --n-gpu-layers 0"
    result = json.loads(run("ask", "-f", file, "Who?", "--json", *options.split(), *engine.split(), *THREADS))
    starts = result["plan"]["chunk_starts"]
    assert starts[1] == 20 and max(b - a for a, b in pairwise(starts)) <= 100
    assert result["plan"]["stair_width"] == 60 and result["plan"]["reading_length"] == 400
    assert result["plan"]["train_length"] == 500
    assert result["n_tokens"]["answer"] <= 2


@pytest.mark.parametrize(("option", "expected"), [("on", True), ("off", False), ("auto", "auto")])
def test_flash_attention_reaches_the_engine(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch, option: str, expected: object
) -> None:
    given: list[object] = []
    load = reading.load_model
    monkeypatch.setattr(reading, "load_model", lambda *a, **kw: given.append(kw["flash_attn"]) or load(*a, **kw))
    run("ask", "-f", file, "Who?", "--flash-attn", option, "--max-tokens", "1", *THREADS)
    assert given == [expected]


def test_ask_stock(run: Run, file: Path) -> None:
    result = json.loads(run("ask", "-f", file, "Who?", "--json", "--stock", "--max-tokens", "4", *THREADS))
    assert result["plan"] == {
        "enabled": False,
        "train_length": T,
        "reading_length": T,
        "chunk_starts": [0],
        "anchor": 0,
        "stair_width": 1,
    }


def test_same_seed_same_answer(run: Run, file: Path) -> None:
    options = ("--temperature", "1.5", "--seed", "0", "--max-tokens", "12", *THREADS)
    assert run("ask", "-f", file, "Who?", *options) == run("ask", "-f", file, "Who?", *options)


def test_quiet_says_nothing_else(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "-f", str(file), "Who?", "--max-tokens", "4", "--no-library", *THREADS]) == 0
    assert "tokens/s" in capsys.readouterr().err
    assert cli.main(["ask", "-f", str(file), "Who?", "--max-tokens", "4", *THREADS]) == 0
    assert "chunks of document.txt" in capsys.readouterr().err
    assert cli.main(["ask", "-f", str(file), "Who?", "--max-tokens", "4", "--quiet", *THREADS]) == 0
    assert capsys.readouterr().err == ""


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with output.reading_bar(False) as progress:
        assert progress is None
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    with output.reading_bar(True) as progress:
        assert progress is not None
        progress(512, 2048)
        progress(2048, 2048)
    assert capsys.readouterr().out == ""


#
# chat templates
#

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|unused0|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}<|unused0|>"
)


def with_template(path: Path, template: str) -> Path:
    """A copy of the bundled model that has a chat template."""
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template]
    subprocess.run([*command, str(BUNDLED), str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tmp_path_factory.mktemp("chat") / "chat.gguf", TEMPLATE)


def test_chat_template_has_the_document_before_the_question(chat_model: Path) -> None:
    vocabulary = load_vocabulary(chat_model)
    form = PromptForm(vocabulary)
    head, tail = form.head("The bread was good."), form.tail("Who ate it?")
    before, after = (vocabulary.detokenize(tokens, special=True).decode() for tokens in (head, tail))
    assert head[0] == vocabulary.token_bos() != head[1]
    assert before.endswith("The bread was good.\n\n") and "user" in before
    question = ABOUT.format(question="Who ate it?")
    replied = f"<|eos|>\n<|unused0|>assistant\n{REPLY}<|eos|>\n<|unused0|>user\n"
    assert after == f"{replied}{question}<|eos|>\n<|unused0|>"
    assert vocabulary.detokenize(tail[: form.n_before], special=True).decode() == replied
    told = vocabulary.detokenize(form.tail("Who ate it?", instructions="Rhyme."), special=True).decode()
    assert told.startswith(f"{replied}Rhyme.\n\n{question}")
    assert form.stop == () and not form.is_plain


def test_control_tokens_in_a_document_are_text(chat_model: Path) -> None:
    vocabulary = load_vocabulary(chat_model)
    for plain in (False, True):
        form = PromptForm(vocabulary, plain=plain)
        head, tail = form.head("One <|eos|> and two <|bos|>."), form.tail("Who is <|eos|>?")
        assert vocabulary.token_eos() not in head
        assert head.count(vocabulary.token_bos()) == 1
        assert tail.count(vocabulary.token_eos()) == (0 if plain else 3)  # the template's own


def test_plain_form(chat_model: Path) -> None:
    forms = [PromptForm(load_vocabulary(model), plain=plain) for model, plain in ((chat_model, True), (BUNDLED, False))]
    prompts = [(form.head("The bread was good."), form.tail("Was it?")) for form in forms]
    assert prompts[0] == prompts[1] and all(form.stop == ("\n",) for form in forms)


def test_ask_with_a_chat_template(run: Run, chat_model: Path, file: Path) -> None:
    result = json.loads(run("ask", "-m", chat_model, "-f", file, "Who?", "--json", "--max-tokens", "4", *THREADS))
    assert result["n_tokens"]["answer"] <= 4


def test_broken_chat_templates(fails: Callable[..., str], file: Path, tmp_path: Path) -> None:
    model = with_template(tmp_path / "raises.gguf", "{{ raise_exception('system first') }}")
    assert "system first" in fails("ask", "-m", model, "-f", file, "Who?")
    model = with_template(tmp_path / "syntax.gguf", "{% for %}")
    assert "chat template" in fails("ask", "-m", model, "-f", file, "Who?")


#
# inspect
#


def test_inspect(run: Run) -> None:
    text = run("inspect", "--tokens", "1000", "--tokens", "2000")
    for part in ("llama", "512 tokens", "q8_0", "norm", "3.0 KiB a token", "supported", "last chunk 128", "2000"):
        assert part in text
    report = json.loads(run("inspect", BUNDLED, "--json"))
    assert report["train_length"] == T and report["unsupported"] is None and report["n_params"] > 10**6
    assert [memory["n_tokens"] for memory in report["memory"]] == [T, 8 * T, 32 * T]
    assert report["kv_bytes_per_token"]["kv_f16"] == 3072 and report["kv_bytes_per_token"]["kv_q8_0"] == 1632
    assert report["defaults"] == {
        "reading_length": 512,
        "first_chunk": 32,
        "chunk": 480,
        "last_chunk": 128,
        "room": 256,
    }


@pytest.mark.parametrize(
    ("name", "position", "kind", "unsupported"),
    [
        ("qwen2", "rope", "neox", None),
        ("mpt", "alibi", None, None),
        ("nope", "none", None, None),
        ("gemma2", "rope", "neox", None),
        ("gpt2", "none", None, "learned absolute"),
        ("mamba", "none", None, "recurrent"),
    ],
)
def test_inspect_architectures(
    run: Run, model_path: ModelPath, name: str, position: str, kind: str | None, unsupported: str | None
) -> None:
    report = json.loads(run("inspect", model_path(name), "--json"))
    assert report["position"] == position and report["rope"].get("kind") == kind
    if unsupported is None:
        assert report["unsupported"] is None and report["defaults"]
    else:
        assert unsupported in report["unsupported"] and report["defaults"] is None
        assert unsupported in run("inspect", model_path(name))


#
# plan
#


def is_picture(path: Path) -> bool:
    """A PNG that shows more than one colour."""
    from matplotlib.image import imread

    return path.read_bytes().startswith(b"\x89PNG") and float(imread(path).std()) > 0.02


@pytest.mark.parametrize("n_tokens", [300, 2000, 1_000_000])
def test_plan_draws_a_picture(run: Run, tmp_path: Path, n_tokens: int) -> None:
    picture = tmp_path / "plan.png"
    text = run("plan", "--tokens", n_tokens, "--plot", picture)
    assert str(n_tokens) in text and is_picture(picture)


def test_plan_prints_what_the_library_plans(run: Run) -> None:
    made = MesaConfig(first_chunk=60, last_chunk=200).make_plan(9000, 2048)
    options = ("--tokens", "9000", "--train-length", "2048", "--first-chunk", "60", "--last-chunk", "200")
    printed = json.loads(run("plan", *options, "--json"))
    assert printed["chunk_starts"] == made.chunk_starts
    assert (printed["anchor"], printed["stair_width"]) == (made.anchor, made.stair_width)
    assert printed["n_positions"] == made.n_positions(9000)
    assert f"from token {made.last_start}" in run("plan", *options)


def test_plan_of_a_model(run: Run) -> None:
    assert json.loads(run("plan", "-m", BUNDLED, "--tokens", "2000", "--json"))["train_length"] == T


@pytest.mark.parametrize("n_tokens", [20, 200])
def test_picture_shows_the_mask(n_tokens: int) -> None:
    made = MesaConfig(first_chunk=8, chunk=24, last_chunk=16).make_plan(n_tokens, 64)
    mask = made.mask(n_tokens)
    areas = [Polygon(area) for kind in plot.mask_areas(made, n_tokens).values() for area in kind]
    keys, queries = np.meshgrid(
        np.arange(n_tokens) + 0.25, np.arange(n_tokens) + 0.75
    )  # inside a cell, off the diagonal
    points = np.stack([keys.ravel(), queries.ravel()], axis=1)
    drawn = np.any([area.contains_points(points) for area in areas], axis=0).reshape(n_tokens, n_tokens)
    np.testing.assert_array_equal(drawn, mask)
    share = summarize(made, n_tokens, MesaConfig().params(64)).attention
    assert share == pytest.approx(mask.sum() / np.tril(np.ones_like(mask)).sum())


#
# demo
#


def test_demo(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    text = run("demo", "--length", "2", "--output", picture, *THREADS)
    for part in ("with Mesa", "stock llama.cpp", "right answers", "tokens a second", "peak memory", "stair width"):
        assert part in text
    assert text.count("of 20") == 2
    steps = [line.split("│") for line in text[text.index("kept in a library") :].splitlines() if "right" in line]
    computed, reused = ([int(step[column].replace(",", "")) for step in steps] for column in (3, 4))
    assert len(steps) == 3 and reused[0] == computed[1] == 0 and reused[1] == computed[0]
    assert 0 < computed[2] < computed[0] / 2 and reused[2] > 0
    assert is_picture(picture)


def test_demo_of_a_model(run: Run, tmp_path: Path) -> None:
    """Facts in real text. The bundled model finds none, but reads all of it."""
    text = run("demo", "-m", BUNDLED, "--length", "3", *THREADS)
    for part in (
        "Mesa, chunks that match",
        "Mesa, all chunks",
        "stock llama.cpp",
        "1536 tokens of Python's documentation",
    ):
        assert part in " ".join(text.split())
    assert text.count("of 10") == 3
    assert not any(tmp_path.iterdir())


#
# mistakes
#


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["ask", "-f", "DOC"], "no question"),
        (["ask", "-f", "DOC", " "], "question is empty"),
        (["ask", "-f", "DOC", "--questions", "EMPTY"], "no question"),
        (["ask", "Who?"], "no document"),
        (["ask", "-f", "EMPTY", "Who?"], "EMPTY has no text"),
        (["ask", "-f", "EMPTY", "Who?", "--no-library"], "empty"),
        (["ask", "-f", "missing.txt", "Who?"], "missing.txt: there is no such file"),
        (["ask", "-f", "FOLDER", "Who?", "--no-library"], "folder"),
        (["ask", "-f", "LATIN", "Who?", "--no-library"], "byte 0xe9 at offset 3"),
        (["ask", "-f", "DOC", "Who?", "--encoding", "klingon"], "klingon"),
        (["ask", "-f", "-", "--questions", "-"], "standard input"),
        (["ask", "-f", "DOC", "Who?", "--n-ctx", "500", "--no-library"], "--n-ctx 500"),
        (["ask", "-f", "DOC", "Who?", "--n-ctx", "500", "--read", "all"], "or give --read auto"),
        (["ask", "-f", "DOC", "Who?", "--read", "some"], "it must be auto, all, each, or a number of tokens"),
        (["ask", "-f", "DOC", "Who?", "--read", "0"], "it must be auto, all, each, or a number of tokens"),
        (["ask", "-f", "DOC", "Who?", "--read", "all", "--stock"], "leave out --no-library, --stock"),
        (["ask", "-f", "DOC", "Who?", "--no-library", "--library", "x"], "--library, --collection, --read"),
        (["ask", "-f", "DOC", "-f", "DOC", "Who?", "--no-library"], "several documents are for the library"),
        (["ask", "--collection", "none", "Who?"], "there is no collection none"),
        (
            ["ask", "-f", "DOC", "Who", "was", "there?"],
            "(was there?): give documents with -f, and a question in quotes",
        ),
        (["chat", "DOC"], ": give documents with -f"),
        (["inspect", "my", "model.gguf"], "(model.gguf): put quotes around a name with spaces"),
        (["ask", "-f", "DOC", "Who?", "--library", "DOC"], "is a file: name a folder"),
        (["ask", "-f", "DOC", "Who?", "--type-k", "q9_9"], "q9_9"),
        (["ask", "-f", "DOC", "Who?", "--first-chunk", "600"], "reading_length (512)"),
        (["ask", "-f", "DOC", "Who?", "--stair-width", "wide"], "--stair-width wide"),
        (["ask", "-f", "DOC", "Who?", "--stair-width", "1"], "stair_width 1 is too small"),
        (["ask", "-f", "DOC", "Who?", "--max-tokens", "0"], "--max-tokens"),
        (["ask", "-f", "DOC", "Who?", "--flash-attn", "off", "--type-v", "q8_0"], "--flash-attn on"),
        (["ask", "-f", "DOC", "Who?", "--flash-attn", "maybe"], "--flash-attn maybe: it must be on, off or auto"),
        (["ask", "-f", "DOC", "Who?", "-m", "missing.gguf"], "missing.gguf: there is no such file"),
        (["ask", "-f", "DOC", "Who?", "-m", "FOLDER"], "folder"),
        (["ask", "-f", "DOC", "Who?", "-m", "DOC"], "not a GGUF file"),
        (["ask", "-f", "DOC", "Who?", "-m", "CUT"], "cut short"),
        (["ask", "-f", "DOC", "Who?", "-m", "BEHEADED"], "damaged"),
        (["ask", "-f", "DOC", "Who?", "-m", "READER"], "no vocabulary"),
        (["ask", "-f", "DOC", "Who?", "-m", "hf:owner/repo"], "hf:owner/repo/file.gguf"),
        (["inspect", "missing.gguf"], "no such file"),
        (["inspect", "DOC"], "not a GGUF file"),
        (["plan"], "--tokens"),
        (["plan", "--tokens", "0"], "--tokens"),
        (["plan", "--tokens", "9000", "--chunk", "600"], "reading_length (512)"),
        (["plan", "--tokens", "9000", "--stair-width", "1"], "stair_width 1 is too small"),
        (["plan", "--tokens", "9000", "--train-length", "1"], "train_length is 1"),
        (["plan", "--tokens", "9000", "--plot", "missing/plan.png"], "no such folder"),
        (["plan", "--tokens", "9000", "--plot", "plan.doc"], "plan.doc"),
        (["demo", "--output", "missing/demo.png"], "no such folder"),
        (["demo", "--length", "1"], "--length"),
        (["ask", "--frobnicate"], "--frobnicate"),
        (["read"], "read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    fails: Callable[..., str],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "EMPTY": b" \n",
        "LATIN": "caf\u00e9 is here".encode("latin-1"),
        "CUT": BUNDLED.read_bytes()[:-1000],
        "BEHEADED": BUNDLED.read_bytes()[:300],
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    names = {"DOC": file, "FOLDER": tmp_path, "READER": READER}
    assert problem in fails(*(names.get(arg, arg) for arg in args))


def test_model_that_llama_cpp_does_not_know(fails: Callable[..., str], file: Path, tmp_path: Path) -> None:
    model = tmp_path / "other.gguf"
    model.write_bytes(BUNDLED.read_bytes().replace(b"llama", b"other", 1))  # general.architecture
    assert "other.gguf: llama.cpp cannot load this model" in fails("ask", "-m", model, "-f", file, "Who?")


def test_model_that_mesa_does_not_support(
    fails: Callable[..., str], run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Header, "unsupported", "it is recurrent")
    line = fails("ask", "-f", file, "Who?")
    assert "it is recurrent" in line and "--stock" in line
    run("ask", "-f", file, "Who?", "--stock", "--max-tokens", "2", *THREADS)


def test_another_encoding(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("The caf\u00e9 was good.".encode("latin-1"))
    run("ask", "-f", path, "Who?", "--encoding", "latin-1", "--max-tokens", "2", *THREADS)


#
# models on Hugging Face
#


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def test_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def download(repo: str, name: str, local_files_only: bool = False) -> str:
        if local_files_only:
            raise hub_errors.LocalEntryNotFoundError("not there")
        calls.append((repo, name))
        return f"/cache/{name}"

    fake_hub(monkeypatch, download)
    assert find_model("hf:owner/repo/folder/model.gguf") == Path("/cache/folder/model.gguf")
    assert find_model("hf:owner/repo/big-00001-of-00002.gguf") == Path("/cache/big-00001-of-00002.gguf")
    assert calls == [
        ("owner/repo", "folder/model.gguf"),
        ("owner/repo", "big-00001-of-00002.gguf"),
        ("owner/repo", "big-00002-of-00002.gguf"),
    ]


def test_hub_model_that_was_downloaded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, name: str, local_files_only: bool = False) -> str:
        assert local_files_only, "the network was asked"
        return f"/cache/{name}"

    fake_hub(monkeypatch, download)
    assert find_model("hf:owner/repo/model.gguf") == Path("/cache/model.gguf")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("RepositoryNotFoundError", "no repository owner/repo"),
        ("GatedRepoError", "licence"),
        ("EntryNotFoundError", "no file model.gguf"),
        ("HFValidationError", "hf:owner/repo/file.gguf"),
        ("OfflineModeIsEnabled", "cannot be downloaded: reason"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, name: str, problem: str) -> None:
    kind = getattr(hub_errors, name)
    error = kind.__new__(kind)  # some want an HTTP response to be made from
    Exception.__init__(error, "reason")

    def download(*_: Any, local_files_only: bool = False) -> str:
        raise hub_errors.LocalEntryNotFoundError("not there") if local_files_only else error

    fake_hub(monkeypatch, download)
    with pytest.raises(ModelError, match=r"hf:owner/repo/model\.gguf: ") as caught:
        find_model("hf:owner/repo/model.gguf")
    assert problem in str(caught.value)


#
# the program
#


@pytest.mark.parametrize("command", ["", "ask", "library", "inspect", "plan", "demo", "rpc-server", "bench", "tune"])
def test_help_shows_examples(run: Run, command: str) -> None:
    text = run(*command.split(), "--help")
    assert "Examples:" in text and f"mesa-gguf {command}" in text


def test_help_speaks_in_phrases() -> None:
    """A text says what it is without the option's name beside it: no "Of the document."."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set("ask library chat serve inspect plan tune demo rpc-server bench eval".split())
    commands |= {f"library {name}": of for name, of in commands["library"].commands.items()}
    for command, of in commands.items():
        assert of.help and of.help.strip().endswith("."), command
        for param in of.params:
            text = param.help or ""
            assert len(text.split()) >= 4 and text[0].isupper() and text.endswith("."), (
                f"{command} {param.name}: {text}"
            )
            assert text.split()[0] not in ("Of", "At", "By", "Default:", "In", "Where"), (
                f"{command} {param.name}: {text}"
            )


def test_version(run: Run) -> None:
    assert run("--version").startswith("mesa-gguf ")


def program(*args: str, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "mesa_gguf", *args], text=True, **{**pipes, **options})


def test_exit_code_of_the_program() -> None:
    process = program("inspect", "missing.gguf")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "mesa-gguf: missing.gguf: there is no such file\n"


def test_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        @property
        def buffer(self) -> io.BytesIO:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert cli.main(["ask", "-f", "-", "Who?"]) == 130
    assert capsys.readouterr() == ("", "mesa-gguf: interrupted\n")


def test_a_bar_tells_no_number_before_it_knows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with output.reading_bar(True):
        pass
    assert "reading" in shown.getvalue() and "None" not in shown.getvalue()
    with output.reading_bar(True) as progress:
        assert progress is not None
        progress(3, 7)
    assert "3 of 7 tokens" in shown.getvalue()


@pytest.mark.parametrize("where", ["mesa_gguf.cli.app.main", "typer.main.get_command"])
def test_interrupted_at_once(where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the program begins, too, which takes a while on a slow disk."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert cli.main(["ask", "Who?"]) == 130
    assert capsys.readouterr() == ("", "mesa-gguf: interrupted\n")


def test_interrupted_within_an_answer(
    file: Path, document: Document, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of it begins on a line of its own."""
    write = output.write

    def write_once(text: str) -> None:
        write(text)
        if text.strip():
            raise KeyboardInterrupt

    monkeypatch.setattr(output, "write", write_once)
    assert cli.main(["ask", "-f", str(file), document.facts[0].question, *THREADS]) == 130
    out, err = capsys.readouterr()
    assert out.strip() and out.endswith("\n") and out.count("\n") == 1
    assert err.splitlines()[-1] == "mesa-gguf: interrupted"


def test_broken_pipe(file: Path, document: Document) -> None:
    questions = asked([fact.question for fact in document.facts[:3]])
    process = program("ask", "-f", str(file), *questions, "--quiet", *THREADS)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.wait(timeout=120)
    assert process.stderr.read() == ""
    assert process.returncode == 1


def test_help_does_not_wait_for_heavy_imports() -> None:
    code = "import sys, mesa_gguf.cli.app; print([name for name in ('matplotlib', 'huggingface_hub') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
