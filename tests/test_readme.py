"""README's commands and programs run as they stand, on the bundled model and a generated document.

A command that is none of mesa-gguf's is run by CI or another test, which `ELSEWHERE` names. A new one without a test fails here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import server_process
from conftest import ROOT
from mesa_gguf.lab import documents
from mesa_gguf.model import bundled

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("mesa-gguf", "make", "pip", "python", "cmake", "sh", "bash", "git")

# other commands, without their variables -> a file that runs them, and how it does
ELSEWHERE = {
    "make demo": ("Makefile", "$(BIN)/mesa-gguf demo"),  # which test_cli.py runs, in short
    "make demo-real": ("Makefile", "$(BIN)/mesa-gguf demo -m"),  # the same
    "make models": (".ci/run", "make models"),
    "make test": (".ci/run", "make test"),
    "make wheel": ("tests/test_wheel.py", '"make", "wheel"'),
    "pip install .": ("Makefile", "$(PIP) install --no-build-isolation --check-build-dependencies '.[$(EXTRAS)]'"),
    "pip install --no-cache-dir .": ("tests/test_wheel.py", "pip install"),
}
FACT = "The door code of Mara Lind is 48213."


def commands() -> list[str]:
    """All commands of the README: indented lines, and words in code that begin with a program's name."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    found += [span for span in re.findall(r"`([^`\n]+)`", text) if program(span) in PROGRAMS and " " in span]
    found += [
        line
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
    ]
    return list(dict.fromkeys(found))


def without_variables(command: str) -> str:
    """CMAKE_ARGS="-DX=on" pip install . -> pip install ."""
    return re.sub(r"^(?:[A-Z_]+=(?:\"[^\"]*\"|'[^']*'|\S*) +)+", "", command)


def program(command: str) -> str:
    return without_variables(command).split(" ")[0]


def is_run_here(command: str) -> bool:
    return command.startswith("mesa-gguf ") and not is_server(command)


def is_server(command: str) -> bool:
    return command.startswith("mesa-gguf serve ")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("readme")
    document = documents.make_document(seed=5, n_tokens=1500)
    half = document.text.index("\n", len(document.text) // 2) + 1
    (folder / "document.txt").write_text(f"{document.text[:half]}{FACT} {document.text[half:]}", encoding="utf-8")
    questions = "".join(fact.question + "\n" for fact in document.facts[:2])
    (folder / "questions.txt").write_text(questions, encoding="utf-8")
    (folder / "model.gguf").symlink_to(bundled.bundled_model())
    return folder


@pytest.mark.parametrize("line", [line for line in commands() if is_run_here(line)])
def test_command(line: str, folder: Path) -> None:
    _, *arguments = shlex.split(line)
    process = [sys.executable, "-m", "mesa_gguf", *arguments]
    # what chat is told; the others do not listen
    done = subprocess.run(process, cwd=folder, capture_output=True, text=True, check=False, input="/help\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if "Mara Lind" in line:
        assert done.stdout == f"{FACT}\n"


@pytest.mark.parametrize("line", [line for line in commands() if is_server(line)])
def test_server(line: str, folder: Path, tmp_path: Path) -> None:
    """It serves the page. The port is another one, as that of the README may be in use."""
    arguments = shlex.split(line)[2:]
    model = folder / arguments.pop(arguments.index("-m") + 1)
    arguments.remove("-m")
    with server_process.Server(tmp_path, *arguments, model=model) as server:
        status, headers, page = server.ask("GET", "/")
        assert status == 200 and b"Drop a document here" in page
        assert "script-src 'self';" in headers["content-security-policy"]


@pytest.mark.parametrize("line", [line for line in commands() if not is_run_here(line) and not is_server(line)])
def test_other_command(line: str) -> None:
    """It is run elsewhere; of an extra, there is one of that name."""
    extra = re.fullmatch(r"pip install '(?:mesa-gguf|\.)\[(\w+)\]'", line)
    if extra is not None:
        assert re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        return
    assert without_variables(line) in ELSEWHERE, f"no test runs {line!r}: add one, and name it in ELSEWHERE"
    file, how = ELSEWHERE[without_variables(line)]
    assert how in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("source", python_blocks())
def test_python_block(source: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(FACT)
    assert "llm.plan()" not in source or "MesaPlan(chunk_starts=[0, " in done.stdout


def test_what_the_readme_is_looked_through_for() -> None:
    """The commands are found, wherever they stand."""
    assert {
        "make demo",
        "mesa-gguf inspect",
        'mesa-gguf ask -f document.txt "What is the door code of Mara Lind?"',
    } < set(commands())
    assert len(python_blocks()) == README.count("```python") == 2
    assert README.index("docs/stair.svg") < README.index("--")  # the picture before any option
