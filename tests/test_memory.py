"""Memory that is foreseen, not touched where it is not used, and given back; what ends in the rehearsal of a model file; and a
process without a standard error."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import SMALL, ModelPath
from mesa_gguf import (
    MesaLlama,
    ModelError,
    OutOfMemoryError,
)

MIB = 2**20

# The rehearsal of a model file.


def test_how_a_rehearsal_ends(tmp_path: Path, model_path: ModelPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal, one without a name, or a code, with a word or without: the error says it, and the file."""
    results = {
        -signal.SIGSEGV: "SIGSEGV",
        -signal.SIGABRT: "SIGABRT",
        -50: "signal 50",
        -100: "signal 100",
        1: "exit code 1",
        3: "exit code 3",
        120: "exit code 120",
    }
    number = 0
    for returncode, reason in results.items():
        for stdout in (b"", b'{"unsup'):
            for stderr, said in (
                (b"", reason),
                (b"a.cpp:1: what\n/x/b.cpp:7: GGML_ASSERT(n > 0) failed\n", "b.cpp:7: GGML_ASSERT"),
            ):
                number += 1
                path = tmp_path / f"{number}.gguf"
                path.write_bytes(model_path("llama").read_bytes())
                done = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
                with monkeypatch.context() as patch:
                    patch.setattr(subprocess, "run", lambda *args, done=done, **kwargs: done)
                    with pytest.raises(ModelError, match=rf"{number}\.gguf: .*{re.escape(said)}"):
                        MesaLlama(path, mesa=SMALL)


def test_a_rehearsal_that_is_killed(tmp_path: Path, model_path: ModelPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does that for want of memory: no word of a damaged file, and the next try is a new one."""
    path = tmp_path / "m.gguf"
    path.write_bytes(model_path("llama").read_bytes())
    done = SimpleNamespace(returncode=-signal.SIGKILL, stdout=b"", stderr=b"")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *args, **kwargs: done)
        with pytest.raises(OutOfMemoryError, match=r"m\.gguf: .*killed"):
            MesaLlama(path, mesa=SMALL)
    MesaLlama(path, mesa=SMALL).close()


@pytest.mark.parametrize("executable", ["", None])
def test_a_python_that_does_not_know_where_it_is(
    tmp_path: Path, model_path: ModelPath, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model_path("llama").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        llm = MesaLlama(path, mesa=SMALL)
    llm.close()
