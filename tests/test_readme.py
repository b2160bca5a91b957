"""The README's examples run as they stand, on the bundled model and a generated document."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mesa_gguf.lab import documents
from mesa_gguf.model import bundled

README = Path(__file__).resolve().parent.parent / "README.md"


def shell_lines(heading: str) -> list[str]:
    """The indented commands of a section."""
    section = README.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("readme")
    document = documents.make_document(seed=5, n_tokens=1500)
    (folder / "document.txt").write_text(document.text)
    (folder / "questions.txt").write_text("".join(fact.question + "\n" for fact in document.facts[:2]))
    (folder / "model.gguf").symlink_to(bundled.bundled_model())
    return folder


@pytest.mark.parametrize("line", shell_lines("Use it from the shell"))
def test_shell_example(line: str, folder: Path) -> None:
    command, *arguments = shlex.split(line)
    assert command == "mesa-gguf"
    done = subprocess.run([sys.executable, "-m", "mesa_gguf", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_python_example(folder: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MesaPlan(" in done.stdout
