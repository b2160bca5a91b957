"""The command line on a library: what it adds where some files cannot be, what it prints, and how documents are told apart."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesa_gguf import Library, MesaLlama, Reader, cli
from mesa_gguf.cli import output
from mesa_gguf.cli.ask import documents_of
from mesa_gguf.cli.options import bytes_of
from mesa_gguf.errors import DocumentError, Remedy
from mesa_gguf.lab.documents import make_document
from mesa_gguf.loaders import Limits
from mesa_gguf.model.inspection import format_bytes
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.shelf import Catalogue

BUNDLED = Path(output.__file__).parents[1] / "data" / "mesa-reader-q8_0.gguf"
MADE, OTHER = make_document(4711, 1200, n_facts=4), make_document(4712, 1200, n_facts=4)

if sys.platform != "win32":
    import pwd

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command -> exit code, standard output, standard error."""
    monkeypatch.setenv("MESA_LIBRARY", str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_good_files_are_added_and_read_beside_bad_ones(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("The bread was good.", encoding="utf-8")
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "last.txt").write_text("The ship sank.", encoding="utf-8")
    files = ("none.txt", "good.txt", "picture", "folder", "last.txt", "good.txt")
    code, out, err = run("library", "add", *files, "-m", "bundled", "--threads", "1")
    assert (code, out) == (2, "")  # the model is looked for before work is spent
    code, out, err = run("library", "add", *files)
    assert code == 2
    assert [line.split()[1] for line in out.splitlines()] == ["good.txt", "last.txt"]
    said = err.splitlines()
    assert len(said) == 3 and "none.txt: there is no such file" in said[0] and "picture is a picture" in said[1]
    assert "folder: there is no document in this folder" in said[2]
    code, out, err = run("library", "add", "none.txt", "good.txt", "-m", BUNDLED, "--threads", "1")
    assert code == 2 and "good.txt: 1 chunk," in out and "none.txt: there is no such file" in err
    assert run("library", "add", "good.txt", "last.txt")[0] == 0
    assert run("library", "add", "none.txt")[0] == 2


def test_an_interrupted_reading_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.txt").write_text(MADE.text, encoding="utf-8")
    save, saved = MesaLlama.save_chunk, []

    def save_and_press(self: MesaLlama, start: int, stop: int) -> bytes:
        saved.append(start)
        if len(saved) == 4:
            raise KeyboardInterrupt
        return save(self, start, stop)

    monkeypatch.setattr(MesaLlama, "save_chunk", save_and_press)
    said = "the chunks that were read are kept: the same command goes on where it stopped"
    add = ("library", "add", "log.txt", "-m", BUNDLED, "--threads", "1")
    code, _, err = run(*add)
    assert code == 130 and err.splitlines()[-2:] == [said, "mesa-gguf: interrupted"]
    code, out, _ = run(*add)
    assert code == 0 and " 0 kept before" not in out


def test_what_reading_ahead_would_bring_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(MADE.text * 2, encoding="utf-8")
    ask = (
        "ask",
        "-m",
        BUNDLED,
        "-f",
        "log.txt",
        "Which zebra gleams?",
        "--threads",
        "1",
        "--max-tokens",
        "2",
        "--read",
        "400",
    )
    said = "questions in other words find more once all was read: mesa-gguf library add -m MODEL FILE"
    assert run(*ask, "-q", "Which xylophone gleams?")[2].splitlines().count(said) == 1
    assert said not in run(*ask, "--quiet")[2]
    run("library", "add", "log.txt", "-m", BUNDLED, "--threads", "1")
    assert said not in run(*ask)[2]
    (tmp_path / "log.txt").write_text(OTHER.text[:3000], encoding="utf-8")
    everything = run(*ask[:-1], "all")[2]  # which has read it by then
    assert said not in everything and re.search(r"^read (\d+) of \1 chunks", everything, re.MULTILINE)


def test_chunks_that_are_the_same_are_read_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("word and another thing, " * 500, encoding="utf-8")
    code, out, err = run("library", "add", "log.txt", "-m", BUNDLED, "--threads", "1")
    found = re.search(r"(\d+) chunks, (\d+) tokens computed, 0 kept before$", out.strip())
    with Library() as library:
        read = [row.n_tokens for row in library.index.kept() if row.n_tokens > 0]
    assert code == 0 and found is not None and 2 * len(read) < int(found[1])
    assert int(found[2]) == sum(read) < int(err.split()[0]) / 2
    ask = ("ask", "-m", BUNDLED, "-f", "log.txt", "Which zebra gleams?", "--threads", "1", "--max-tokens", "2")
    err = run(*ask, "--read", "400")[2]
    assert "find more once all was read" not in err and "passages that may tell it in other words" in err


def test_reading_ahead_ends_where_the_budget_does(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read that cannot be kept, and nothing is dropped that was read by the same command."""
    (tmp_path / "log.txt").write_text(MADE.text, encoding="utf-8")
    (tmp_path / "other.txt").write_text(OTHER.text, encoding="utf-8")
    monkeypatch.setattr(Library, "budget", 1_500_000)
    n_read = []
    save = MesaLlama.save_chunk
    monkeypatch.setattr(MesaLlama, "save_chunk", lambda *args: n_read.append(args) or save(*args))
    code, out, err = run("library", "add", "log.txt", "other.txt", "-m", BUNDLED, "--threads", "1")
    assert code == 0
    first, second = out.splitlines()[2:]
    assert " 0 kept before" in first and re.search(r" 0 tokens computed, 0 kept before, \d{3,4} not read$", second)
    assert err.splitlines()[-1].startswith(
        "mesa-gguf: the library's budget of 1500000 bytes is full of chunks that are"
    )
    with Library(tmp_path / "library") as library:
        kept = library.index.kept()
        n_chunks = sum(row.n_tokens > 0 for row in kept)
        assert len(n_read) == n_chunks + 2 and sum(row.size for row in kept) <= 1_500_000
    code, out, _ = run("library", "add", "log.txt", "other.txt", "-m", BUNDLED, "--threads", "1")
    assert re.search(r" 0 tokens computed, \d{2,4} kept before", out.splitlines()[2])


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("0", 0),
        ("2000000", 2_000_000),
        ("1.5KB", 1500),
        ("500mb", 500_000_000),
        ("2GiB", 2**31),
        ("1 k", 1000),
        ("7B", 7),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes(text: str, n: int) -> None:
    assert bytes_of("--budget", text) == n


@given(st.integers(0, 2**42))
def test_a_size_that_was_shown_can_be_given(n: int) -> None:
    assert bytes_of("--budget", format_bytes(n)) == pytest.approx(n, rel=0.1, abs=0.5)


def test_a_budget_is_a_size(run: Run) -> None:
    with Library() as library:
        for n, letter in enumerate("abc"):
            library.keep(letter * 64, "model", 9, bytes(600 * (n + 1)))
    assert "3 chunks are kept" in run("library", "prune", "--budget", 40 * "9")[1]
    assert run("library", "prune", "--budget", "2.1kB")[1].startswith("1 chunk is kept, ")
    assert run("library", "prune", "--budget", "1 KiB")[1].startswith("0 chunks are kept, ")


def test_a_budget_lasts(run: Run, tmp_path: Path) -> None:
    with Library() as library:
        for letter in "abc":
            library.keep(letter * 64, "model", 9, bytes(600))
    assert re.fullmatch(
        r"budget: \S+ .iB \(a fifth of the free disk\) in .*; 2.0 KiB are kept\n", run("library", "budget")[1]
    )
    code, out, err = run("library", "budget", "1.5kB")
    assert code == 0 and out.startswith("budget: 1.5 KiB (set) in ") and err.startswith("more is kept than that: ")
    assert "\nbudget: 1.5 KiB in " in run("library", "list")[1]
    assert run("library", "prune")[1].startswith("2 chunks are kept, ")
    assert json.loads(run("library", "budget", "--json")[1]) == {"budget": 1500, "is_set": True, "bytes": 1392}
    with Library(tmp_path / "library") as library, Library(tmp_path / "library", budget=9) as other:
        assert (library.budget, other.budget) == (1500, 9)
        assert run("library", "budget", "1GiB")[2] == "" and library.budget == 2**30  # of those that are open too
    (tmp_path / "library" / "index.sqlite3").write_bytes(b"hello" * 1000)
    code, out, err = run("library", "budget")
    assert out.startswith("budget: 1.0 GiB (set) in ") and "the index was damaged" in err
    for text in ("unlimited", "None", 30 * "9"):
        assert run("library", "budget", text)[1].startswith("budget: unlimited (set) in ")
        assert json.loads(run("library", "list", "--json")[1])["budget"] is None
    assert "(a fifth of the free disk)" in run("library", "budget", "default")[1]
    code, _, err = run("library", "budget", "much")
    assert code == 2 and "budget much: it must be a number of bytes, or a size such as" in err


@pytest.mark.parametrize("damaged", ["", "5 GB\n", "٣\n", 50 * "9"])
def test_a_budget_that_is_damaged_is_told(run: Run, tmp_path: Path, damaged: str) -> None:
    run("library", "budget", "5GB")
    (tmp_path / "library" / "chunks" / "budget").write_text(damaged, encoding="utf-8")
    code, out, err = run("library", "list")
    assert code == 0 and err.count("\n") == 1 and "the library's budget is lost, as it has no number of bytes" in err
    assert "(a fifth of the free disk)" in run("library", "budget")[1]
    code, out, err = run("library", "budget", "6GB")
    assert "(set)" in out and run("library", "list")[2] == ""


def test_a_budget_is_whole_whoever_sets_it(tmp_path: Path) -> None:
    """By several at once, while others read it."""
    with Library(tmp_path / "library") as library:
        sizes = [10**n for n in range(3, 15)]
        library.set_budget(sizes[0])
        with ThreadPoolExecutor(4) as pool:
            setting = [pool.submit(library.set_budget, size) for size in sizes * 20]
            assert all(library.budget in sizes for _ in range(200)) and library.has_own_budget
        assert all(one.result() is None for one in setting)
        assert [path.name for path in (tmp_path / "library" / "chunks").iterdir()] == ["budget"]


def test_what_is_no_size_or_no_file(run: Run) -> None:
    for text in ("1XB", "-1", "", "GB", "1e9", "٣", 5000 * "9"):
        code, _, err = run("library", "prune", "--budget", text)
        assert code == 2 and "it must be a number of bytes, or a size such as 500MB or 2GiB" in err
    code, _, err = run("library", "add", "https://example.org/report.pdf")
    assert code == 2 and "https://example.org/report.pdf is an address: save it as a file" in err


def test_models_of_one_name_are_told_apart(run: Run, tmp_path: Path) -> None:
    """As where a model's file was replaced. What was kept of the one is not used for the other."""
    (tmp_path / "note.txt").write_text("The bread was good.", encoding="utf-8")
    assert run("library", "list")[1].startswith("no documents: mesa-gguf library add FILE adds one\n")
    model = tmp_path / "model.gguf"
    read = ("library", "add", "note.txt", "-m", model, "--threads", "1")
    data = BUNDLED.read_bytes()
    model.write_bytes(data)
    run(*read)
    out = run("library", "list")[1]
    assert "    1 chunk of " in out and "for model.gguf\n" in out
    assert "\nmodel.gguf: 1 chunk is kept" in out  # the preamble is none of a document
    model.write_bytes(data.replace(b"general.name", b"general.mane"))
    assert " 0 kept before" in run(*read)[1]
    about = json.loads(run("library", "list", "--json")[1])
    names = [one["model"] for one in about["models"]]
    assert len(set(names)) == 2 and all(name.startswith("model.gguf (") for name in names)
    assert {cut["model"] for cut in about["documents"][0]["cuts"]} == set(names)


def test_an_empty_environment_variable_is_none(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("", " "):
        monkeypatch.setenv("MESA_LIBRARY", name)
        assert str(tmp_path) in run("library", "list")[1].splitlines()[-1]
    assert not (tmp_path / " ").exists()


def test_nobody_is_at_home(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that is not there, or one without a home, as some containers have: nothing is made in a folder that is called ~."""
    if sys.platform == "win32":
        pytest.skip("every user has a home on Windows")
    said = "there is no such home folder: give the whole path of the library's folder"
    for command in (("library", "list"), ("ask", "-f", "a.txt", "Who?"), ("serve",)):
        (tmp_path / "a.txt").write_text("text", encoding="utf-8")
        code, _, err = run(*command, "--library", "~nobody-here/library")
        assert code == 2 and ("there is no library there" if command[1:] == ("list",) else said) in err
    assert "~nobody-here/a.txt: there is no such file" in run("library", "add", "~nobody-here/a.txt")[2]
    for command in (("ask", "-f", "a.txt", "Who?", "-m", "~nobody-here/model.gguf"), ("inspect", "~nobody-here/a")):
        assert "there is no such file" in run(*command)[2]
    for name in ("HOME", "MESA_LIBRARY", "MESA_TUNE", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert re.fullmatch(rf"mesa-gguf: ~/(?:\S+/)?mesa-gguf/library: {said}\n", run("library", "list")[2])
    answer = run("ask", "-f", "a.txt", "Who?", "--no-library", "--threads", "1", "--max-tokens", "1")
    assert answer[0] == 0 and "platformdirs" not in answer[2]  # it looks for what was measured of the model
    code, _, err = run("tune", "-m", BUNDLED)
    assert code == 2 and "the numbers cannot be kept there: No such file or directory: set MESA_TUNE" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "library"]


def test_a_folder_that_is_named_and_has_no_library(run: Run, tmp_path: Path) -> None:
    """A slip, or a disk that is not there: nothing is made, but where something is added."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    for name in ("none/library", "empty"):
        for command in (("list",), ("show", "1"), ("remove", "1"), ("verify",), ("prune",), ("budget",)):
            code, out, err = run("library", *command, "--library", name)
            assert (code, out) == (2, "") and f"{name}: there is no library there: mesa-gguf library add FILE" in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "empty"]
    assert run("library", "budget", "5GB", "--library", "first")[0] == 0
    assert run("library", "add", "a.txt", "--library", "second")[0] == 0
    assert all(run("library", "list", "--library", name)[0] == 0 for name in ("first", "second"))


def test_what_is_left_out_of_a_folder_is_named_as_it_was_given(run: Run, tmp_path: Path) -> None:
    (tmp_path / "papers" / "old").mkdir(parents=True)
    for name, data in (("empty.txt", b""), ("blank.txt", b" "), ("no.pdf", b"text"), ("a.txt", b"text")):
        (tmp_path / "papers" / "old" / name).write_bytes(data)
    said = ["blank.txt has no text", "empty.txt is empty", "no.pdf is no PDF file, though its name says so: it is damaged, or of another kind"]  # fmt: skip
    for folder in ("papers", "papers/", f"{tmp_path}/papers", "."):
        shown = "" if folder == "." else f"{folder.rstrip('/')}/"
        own = "papers/" if folder == "." else ""
        lines = [line for line in run("library", "add", folder)[2].splitlines() if not line.endswith("of mesa-gguf")]
        assert sorted(lines) == [f"mesa-gguf: {shown}{own}old/{line}" for line in said]


def test_a_document_that_is_named_twice_is_removed_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    number = run("library", "add", "a.txt")[1].split()[0]
    assert run("library", "remove", "a.txt", number)[:2] == (0, "removed a.txt\n")


def test_a_folder_that_no_library_can_be_in(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    code, _, err = run("library", "list", "--library", tmp_path / "file" / "library")
    assert code == 2 and "cannot be kept there: Not a directory: name another folder for it" in err


def test_a_chat_takes_the_good_ones(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(MADE.text[:900], encoding="utf-8")
    (tmp_path / "b.txt").write_text("The ship sank.", encoding="utf-8")
    lines = iter(["/add none.txt b.txt"])
    monkeypatch.setattr("mesa_gguf.cli.chat._line_reader", lambda: lambda: _next(lines))
    code, out, err = run("chat", "-f", "a.txt", "--threads", "1")
    assert (code, out) == (0, "added b.txt\n") and "none.txt: there is no such file" in err


def _next(lines: Any) -> str:
    for line in lines:
        return str(line)
    raise EOFError


def test_notes_on_a_document_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.txt").write_bytes("In the café, it is said that 90 m\u2019".encode()[:-1])
    with Library(tmp_path / "library") as library:
        documents = documents_of(library, [str(tmp_path / "cut.txt")] * 2, None, None)
    assert len(documents) == 1 and capsys.readouterr().err.count("cut within a character") == 1


@pytest.mark.parametrize("name", ["", " ", "a\x1b[31m", "a\nb"])
def test_a_collection_without_a_name(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text("text", encoding="utf-8")
    for command in (
        ("ask", "-f", "papers", "Who?"),
        ("ask", "Who?"),
        ("chat", "-f", "papers"),
        ("library", "add", "papers"),
        ("library", "list"),
        ("library", "remove"),
    ):
        code, out, err = run(*command, "--collection", name)
        assert (code, out, err.count("\n")) == (2, "", 1) and "a collection's name is" in err, command
    assert json.loads(run("library", "list", "--json")[1])["documents"] == []


HOSTILE = "Words\x1b]0;title\x07 and \x9b31mmore\r\x7f \u202ebackwards\u2066.\n\tIndented.\f\nThe end.\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_commands_a_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """What is printed on one has escapes; what goes into a pipe, and what JSON tells, is as it is."""
    monkeypatch.setattr(output, "is_terminal", lambda _: terminal)
    with Library() as library:
        library.add_text(HOSTILE, "hostile")
    kept = HOSTILE.replace("\r", "\n")
    code, out, _ = run("library", "show", "hostile")
    assert code == 0
    assert out == (output.harmless(kept) if terminal else kept)
    if terminal:
        assert out.split() == ["Words\\x1b]0;title\\x07", "and", "\\x9b31mmore", "\\x7f", "\\u202ebackwards\\u2066.", "Indented.", "The", "end."]  # fmt: skip
    code, out, _ = run("library", "show", "hostile", "--json")
    assert json.loads(out)["text"] == kept and not set(out) & set("\x1b\x07\x9b\x7f\u202e\u2066")


def test_files_are_told_as_files(run: Run) -> None:
    """What is kept beside a chunk is another file, and no chunk."""
    keys = [letter * 64 for letter in "abcd"]
    with Library() as library:
        for n, key in enumerate(keys):
            library.keep(key, "model", n % 2, b"rows")
        library.store.remove(keys[0])
    assert run("library", "verify")[1] == "2 chunks are kept, 300 B; 1 file gone from the disk\n"
    assert run("library", "prune", "--budget", "0")[1] == (
        "0 chunks are kept, 0 B; 3 files removed to keep to the budget\n"
    )


def test_a_library_without_a_name_is_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    for command in (("ask", "-f", "a.txt", "Who?"), ("chat", "-f", "a.txt"), ("library", "list"), ("serve",)):
        code, out, err = run(*command, "--library", "")
        assert (code, out) == (2, "") and "the library's folder has no name" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


@pytest.mark.parametrize("name", ["esc\x1b[31m.txt", "two\nlines.txt", "\u202egpj.txt"])
def test_documents_are_found_by_names_of_files(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text", encoding="utf-8")
    shown = run("library", "add", name)[1].split("  ")[1]
    assert shown.isprintable() and run("library", "show", shown)[1] == "text\n" == run("library", "show", name)[1]
    assert run("library", "remove", name)[:2] == (0, f"removed {shown}\n")


@pytest.mark.parametrize("name", ["chunks", "index.sqlite3"])
def test_what_stands_in_the_place_of_a_library(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "library").mkdir()
    path = tmp_path / "library" / name
    path.touch() if name == "chunks" else path.mkdir()
    code, _, err = run("library", "list")
    assert code == 2 and "which no library has there: move it away" in err and err.count("\n") == 1


def test_messages_command_no_terminal(run: Run) -> None:
    code, _, err = run("library", "show", "a\x1b[31mb\x9b")
    assert code == 2 and "a\\x1b[31mb\\x9b" in err and "\x1b" not in err


def test_documents_of_one_name_are_told_apart(run: Run, tmp_path: Path) -> None:
    for folder, made in (("one", MADE), ("two", OTHER)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.txt").write_text(made.text, encoding="utf-8")
    question = OTHER.facts[0].question
    files = ("-f", "one/report.txt", "-f", "two/report.txt")
    out = run("ask", *files, question, "--threads", "1", "--json", "--max-tokens", 24)[1]
    listed = {d["source"]: d["id"] for d in json.loads(run("library", "list", "--json")[1])["documents"]}
    citation = json.loads(out)["citations"][0]
    path = str((tmp_path / "two" / "report.txt").resolve())
    assert citation["document"] == "report.txt" and citation["path"] == path
    assert citation["document_id"] == listed[path] and len(listed) == 2
    lines = run("library", "list")[1].splitlines()
    assert all(any(line.endswith(f"characters, {source}") for line in lines) for source in listed)
    err = run("ask", *files, question, "--threads", "1", "--max-tokens", 24)[2]
    assert f"[1] {path}" in err and "chunks of report.txt, report.txt" in err
    assert "[1] report.txt" in run("ask", "-f", "two/report.txt", question, "--threads", "1", "--max-tokens", 24)[2]


@pytest.mark.parametrize("n", [1, 60, 150, 300, 700])
def test_n_tokens_are_not_exceeded(llm: MesaLlama, library: Library, n: int) -> None:
    """Where a chunk that matches is as short as that."""
    documents = [
        library.add_text(MADE.text, "log"),
        library.add_text("Mara Lind was there, and it rained.", "note"),
        library.add_text("Nothing. " * 20, "nothing"),
    ]
    catalogue = Catalogue(llm, PromptForm(llm), library)
    for fact in MADE.facts:
        selection = catalogue.select(f"{fact.question} Was Mara Lind there?", documents, n)
        sizes = [len(catalogue.piece(d, row).tokens) for d in documents for row in catalogue.rows(d)]
        assert selection.n_tokens <= n or (len(selection.pieces) == 1 and n < 20)
        assert selection.pieces and min(sizes) < 60
        assert (selection.too_long or n + 1) > n
    # what matches is read, where none of it fits
    (piece,) = catalogue.select(MADE.facts[0].question, documents[::2], 1).pieces
    assert MADE.facts[0].answer in piece.text
    answer = Reader(llm, library, cite_by="words").ask(MADE.facts[0].question, documents=documents[:1], read=1, max_tokens=1).answer  # fmt: skip
    assert answer.read is not None and "none of the chunks that match has as few tokens as 1" in answer.read.notes[0]


def test_a_chunk_that_is_too_long_is_told(llm: MesaLlama, library: Library) -> None:
    documents = [library.add_text(MADE.text, "log"), library.add_text("It was July, and nobody rained.", "note")]
    question = f"{MADE.facts[0].question} Or was it nobody?"
    answer = Reader(llm, library, cite_by="words").ask(question, documents=documents, read=40, max_tokens=2).answer
    assert answer.read is not None and answer.read.documents == ("note",)
    assert "the chunk that matches best has" in answer.read.notes[0] and "it was left out" in answer.read.notes[0]


def test_limits_are_told_with_what_to_do() -> None:
    with pytest.raises(DocumentError) as caught:
        Limits().check("characters", 60_000_000, "big.txt has 60,000,000 characters of text or more")
    assert output.worded(caught.value) == (
        "big.txt has 60,000,000 characters of text or more, and 50,000,000 is the limit: split it into smaller files"
    )
    for name in Limits.__dataclass_fields__:
        said = output.worded(DocumentError("It", Remedy(f"limits.{name}")))
        assert said.startswith("It: s") or said == "It: name the folders in it that matter", said


def test_a_reader_cites_by_number_and_path(llm: MesaLlama, library: Library, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(MADE.text, encoding="utf-8")
    document = library.add(tmp_path / "log.txt")
    answer = Reader(llm, library, cite_by="words").ask(MADE.facts[0].question, max_tokens=24).answer
    assert {(c.document_id, c.path) for c in answer.citations} == {(document.id, document.source)}
