"""The programs of examples/ run as they stand, on the bundled model and on one that is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import BUNDLED, ROOT

FOLDER = ROOT / "examples"

# what each prints, besides times
EXPECTED = {
    "ask": (
        r"1998 tokens, 6 chunks, stair width \d+\n"
        r"> What is the door code of Sven Thorn\?\nThe door code of Sven Thorn is 57712\.\n"
        r"> Which .* Linus Engel\?\nThe teacher of Linus Engel is Jakob Klein\. The door code of Jakob Klein is 78860\.\n"
    ),
    "stream": (
        r"The clerk of Karel Zorn is Enid Arndt\. The door code of Enid Arndt is 52617\.\n"
        r"\d+ tokens, the first after \d+\.\d\d s; ended by: stop\n"
        r"The clerk of Karel Zorn is Enid …\nended by: closed\n"
    ),
    "follow_up": (
        r"> .*\nThe door code of Mina Hirsch is 89422\.\n> .*\nThe door code of Silas Lund is 58766\.\n"
        r"> .*\nThe door code of Tara Koch is 78911\.\n\d+ tokens are in the context now, 1998 of them the document's\n"
    ),
    "chat": r" The door code of Jakob Klein is 78860\.\nMesaPlan\(chunk_starts=\[0, 32, .*\n",
    "save_state": (
        r"read 1998 tokens in .* s\nloaded 1998 tokens, \d+\.\d MiB, in .* s\nThe door code of Karel Zorn is 98405\.\n"
    ),
    "plan_lengths": r"all defaults\n  512 tokens fit .*\n(  \d+ tokens in .*\n){4}middle chunks of 128 tokens\n(  .*\n){5}",
}


def output(name: str, *arguments: object, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_and_listed() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    listed = set(re.findall(r"^\| \[(\w+)\.py\]", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert names == set(EXPECTED) == listed


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path) -> None:
    text = output(name, folder=tmp_path)
    assert re.fullmatch(EXPECTED[name], text), text


@pytest.mark.parametrize("name", EXPECTED)
def test_example_with_a_model(name: str, tmp_path: Path) -> None:
    """One that is named, and found from the working directory."""
    (tmp_path / "model.gguf").symlink_to(BUNDLED)
    assert re.fullmatch(EXPECTED[name], output(name, "model.gguf", folder=tmp_path))


@pytest.mark.parametrize("name", EXPECTED)
def test_example_is_short(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 35 and f"python examples/{name}.py [MODEL.gguf]" in lines
