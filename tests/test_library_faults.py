"""Libraries whose processes are killed, whose files are damaged, whose disk is full: library_faults.py, a few rounds of each.

Thousands of rounds: python library_faults.py --help
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import library_faults
from mesa_gguf.errors import MesaError
from mesa_gguf.library import index, store

PROGRAM = Path(__file__).with_name("library_faults.py")


def run(fault: str, n: int, seed: int = 7) -> str:
    """In a process of its own: it forks, which one that ran tests had better not do."""
    command = [sys.executable, str(PROGRAM), fault, "--n", str(n), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize("n", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_reading_and_pruning(n: int) -> None:
    assert "'killed'" in run("kill", n)


@pytest.mark.parametrize("n", [24, pytest.param(600, marks=pytest.mark.slow)])
def test_damaged_chunks_and_indexes(n: int) -> None:
    assert "'answered'" in run("damage", n)


@pytest.mark.slow
def test_full_disks() -> None:
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)
    if probe.returncode != 0:
        pytest.skip("a small disk can be mounted by root only")
    assert "'answered'" in run("disk", 10)


@pytest.mark.parametrize("checked", ["chunks", "documents"])
def test_wrong_answers_are_seen(monkeypatch: pytest.MonkeyPatch, checked: str) -> None:
    """A library that takes whatever lies on the disk fails."""
    if checked == "chunks":
        monkeypatch.setattr(store.ChunkStore, "_checked", staticmethod(lambda head, rows, key, n_tokens: rows))
    else:
        monkeypatch.setattr(index, "is_whole", lambda row: True)
        monkeypatch.setattr(library_faults, "_damage_once", _change_a_text)
    with pytest.raises((library_faults.Wrong, MesaError)), contextlib.redirect_stdout(None):
        library_faults.damage(60, 7)


def _change_a_text(rng: object, folder: Path) -> None:
    path = folder / "index.sqlite3"
    data = path.read_bytes()
    path.write_bytes(data.replace(b" is ", b" it "))
