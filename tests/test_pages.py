"""The pages: links lead somewhere, pictures are shown, and results are what the stored numbers say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

LINK = re.compile(r"(?<!`)!?\[[^\]`]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


def tracked() -> list[str]:
    """The files that git carries."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def pages() -> list[Path]:
    folders = (ROOT, *(ROOT / name for name in ("docs", "experiments", "examples", "training")))
    return [page for folder in folders for page in sorted(folder.glob("*.md"))]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
    return text.strip().replace(" ", "-")


def links(page: Path) -> list[str]:
    found = LINK.findall(without_code(page.read_text(encoding="utf-8")))
    return [link for pair in found for link in pair if link and "://" not in link]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, part = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{link} is not there"
        if part:
            headings = re.findall(r"^#+ +(.*)$", without_code(target.read_text(encoding="utf-8")), re.M)
            assert part in map(anchor, headings), f"{link}: no such heading"


NAMED = re.compile(
    r"`(?:python )?((?:\.ci|cmake|csrc|docs|examples|experiments|mesa_gguf|patches|scripts|tests|training)/[\w./*-]+)"
)
ELSEWHERE = {"mesa_gguf/lib", "docs/accuracy.json"}  # where it is installed; in the repository of version 0.1


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(NAMED.findall(page.read_text(encoding="utf-8"))) - ELSEWHERE
    if page.name != "CHANGELOG.md":  # which tells of files that were
        assert [name for name in sorted(named) if not any(ROOT.glob(name.rstrip("/")))] == []


def test_git_carries_no_picture_that_no_page_shows() -> None:
    shown = {os.path.normpath((page.parent / link).relative_to(ROOT)) for page in pages() for link in links(page)}
    pictures = [name for name in tracked() if name.endswith((".png", ".svg")) and not name.startswith("mesa_gguf/")]
    assert pictures and not [name for name in pictures if name not in shown]


def test_every_page_of_documentation_is_linked_from_the_readme() -> None:
    linked = {os.path.normpath((ROOT / link.partition("#")[0]).relative_to(ROOT)) for link in links(ROOT / "README.md")}
    listed = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert not listed - linked


def test_the_picture_of_the_readme_is_what_the_library_plans(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "experiments" / "stair.py"), str(tmp_path / "stair.svg")]
    subprocess.run(script, check=True)
    assert (tmp_path / "stair.svg").read_text() == (ROOT / "docs" / "stair.svg").read_text()


@pytest.mark.slow  # every plot is drawn: 8 s
def test_results_are_those_of_the_stored_numbers(tmp_path: Path) -> None:
    """experiments/RESULTS.md is written by experiments/results.py, and by nobody else."""
    copy = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments" / "results", copy / "results")
    script = [sys.executable, str(ROOT / "experiments" / "results.py"), "experiments/results"]
    subprocess.run([*script, "--output", "experiments/RESULTS.md"], cwd=tmp_path, check=True)
    page = (copy / "RESULTS.md").read_text(encoding="utf-8")
    assert page == (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8")
    kept = set(re.findall(r"\]\((results/[^)]*\.png)\)", page))
    assert all((ROOT / "experiments" / name).exists() for name in kept)
