"""The command line with standard streams and arguments that are anything but a UTF-8 terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import BUNDLED
from mesa_gguf import cli

QUESTION = "Who was in the Café at 9 – Åsa?"
COMMAND = [sys.executable, "-m", "mesa_gguf"]
ASK = ["ask", "-f", "document.txt", "--threads", "1", "--max-tokens", "24", "--quiet"]


TEXT = "Åsa was in the Café. The door code of Zoë Lind is 48213. The bread was good – “fresh”.\n" * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "document.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(folder: Path, *args: str | bytes, shell: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command; shell: redirections."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **env}
    command: list[Any] = [*COMMAND, *args]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer, by a terminal that has all characters."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "document.txt").write_text(TEXT, encoding="utf-8")
    return json.loads(run(folder, *ASK, QUESTION, "--json", PYTHONIOENCODING="utf-8").stdout)["answer"]


def slow(*values: Any) -> Any:
    """Another of a kind that the quick tests have one of."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("encoding", [slow("ascii"), "cp1252", "ascii:strict", slow("latin-1"), "utf-16"])
def test_every_answer_is_delivered(folder: Path, expected: str, encoding: str) -> None:
    done = run(folder, *ASK, "-q", QUESTION, "-q", "Was Åsa there?", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    name = encoding.partition(":")[0]
    assert expected.encode(name, "backslashreplace") in done.stdout or (
        name == "utf-16" and expected in done.stdout.decode(name)
    )


@pytest.mark.parametrize("encoding", ["ascii", slow("cp1252"), slow("utf-8"), "utf-16"])
def test_json_stays_valid(folder: Path, expected: str, encoding: str) -> None:
    done = run(folder, *ASK, QUESTION, "--json", PYTHONIOENCODING=encoding)
    result = json.loads(done.stdout.decode(encoding))
    assert done.returncode == 0 and result["question"] == QUESTION and result["answer"] == expected


def test_errors_are_told_in_any_encoding(folder: Path) -> None:
    done = run(folder, "ask", "-f", "Åsa – café.txt", "Who?", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert rb"caf\xe9.txt: there is no such file" in done.stderr


@pytest.mark.parametrize(
    ("shell", "has_output"),
    [
        slow("2>&-", True),
        slow("1>&- 2>&-", False),
        ("<&- 2>&-", True),
        ("1>&-", False),
        ("<&- 1>&- 2>&-", False),
        ("2>/dev/full", True),
    ],
)
def test_closed_streams(folder: Path, expected: str, shell: str, has_output: bool) -> None:
    done = run(folder, *[arg for arg in ASK if arg != "--quiet"], QUESTION, shell=shell)
    assert done.returncode == 0
    assert done.stdout.decode() == (f"{expected}\n" if has_output else "")
    assert b"Traceback" not in done.stderr


def test_a_full_disk_is_told(folder: Path) -> None:
    done = run(folder, *ASK, QUESTION, shell="1>/dev/full")
    assert done.returncode != 0 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_other_streams_in_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: Any
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main([*(arg for arg in ASK if arg != "--quiet"), "Was the bread good?"]) == 0
    answer = capsys.readouterr().out
    assert answer.count("\n") == 1 and "tokens/s" not in answer
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.main([*ASK, "Was the bread good?"]) == 0
    assert output.getvalue() == answer
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main([*ASK, "Was the bread good?"]) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([*ASK, b"Caf\xe9?"], b"the question is not UTF-8 text: byte 0xe9 at character 3"),
        ([*ASK, "-q", b"\xff"], b"the question is not UTF-8 text: byte 0xff at character 0"),
        ([*ASK, "Who?", "--questions", b"caf\xe9.txt"], b"there is no such file"),
        (["ask", "-f", b"caf\xe9.txt", "Who?"], b"there is no such file"),
        (["ask", "-f", "document.txt", "Who?", "-m", b"caf\xe9.gguf"], b"its name is not UTF-8"),
        (["inspect", b"caf\xe9.gguf"], b"its name is not UTF-8"),
        (["ask", "-f", "document.txt", "Who?", "--encoding", b"caf\xe9"], b"there is no encoding"),
        (["ask", "-f", "document.txt", "Who?", "--method", b"caf\xe9"], b"there is no method"),
        (["ask", "-f", "document.txt", "Who?", "--rpc", b"caf\xe9"], b"caf"),
        (["plan", "--tokens", "9000", "--plot", b"caf\xe9/plan.png"], b"no such folder"),
    ],
)
def test_arguments_that_are_not_utf_8(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[Any], said: bytes
) -> None:
    monkeypatch.chdir(folder)
    given = [
        arg.decode("utf-8", "surrogateescape") if isinstance(arg, bytes) else arg for arg in args
    ]  # as Python does it
    assert cli.main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and said.decode() in err and err.count("\n") == 1
    err.encode()


@pytest.mark.parametrize("args", [[*ASK, b"Caf\xe9?"], ["inspect", b"caf\xe9.gguf"]])
def test_arguments_that_are_not_utf_8_in_another_process(folder: Path, args: list[Any]) -> None:
    done = run(folder, *args, PYTHONUTF8="1")
    assert done.returncode == 2 and done.stdout == b""
    assert b"not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


def test_a_model_whose_name_is_not_utf_8(folder: Path) -> None:
    name = os.fsencode(folder) + b"/caf\xe9.gguf"
    try:
        os.symlink(BUNDLED, name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    done = run(folder, *ASK, "Was the bread good?", "-m", name, "--json", PYTHONUTF8="1")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"its name is not UTF-8" in done.stderr


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.pdf", b"%PDF-1.4\n%\xe2\xe3\n", "a.pdf is a PDF file"),
        ("b.txt", "Café “x”".encode("cp1252"), "give --encoding cp1252"),
        ("c.txt", b"one\0two", "has a NUL"),
    ],
)
def test_documents_that_are_no_text(folder: Path, name: str, data: bytes, said: str) -> None:
    (folder / name).write_bytes(data)
    done = run(folder, "ask", "-f", name, "Who?", "--no-library")
    assert done.returncode == 2 and said in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_documents_of_a_library_that_are_no_text(folder: Path) -> None:
    for name, data, said in (
        ("a.pdf", b"%PDF-1.4\n%\xe2\xe3\n", "a damaged PDF file"),
        ("c.txt", b"one\0two", "a binary file"),
    ):
        (folder / name).write_bytes(data)
        done = run(folder, "ask", "-f", name, "Who?")
        assert done.returncode == 2 and said in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_an_encoding_is_guessed_and_told(folder: Path) -> None:
    (folder / "b.txt").write_bytes("In the Café “Åsa” the bread was good – and fresh.".encode("cp1252"))
    done = run(folder, *(arg for arg in ASK if arg not in ("document.txt", "-f", "--quiet")), "-f", "b.txt", "Was it?")
    assert done.returncode == 0 and b"the encoding was guessed: cp1252" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
def test_documents_in_unicode(folder: Path, expected: str, encoding: str) -> None:
    path = folder / "document.txt"
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert json.loads(run(folder, *ASK, QUESTION, "--json", PYTHONIOENCODING="utf-8").stdout)["answer"] == expected
