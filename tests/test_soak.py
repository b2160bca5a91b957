"""A minute of soak.py; an hour of it on demand: python tests/soak.py --seconds 3600."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time

import pytest

import soak
from conftest import SMALL, ModelPath


def run_soak(*arguments: str) -> str:
    done = subprocess.run([sys.executable, soak.__file__, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_a_soak_of_seconds() -> None:
    assert " steps in 3 s" in run_soak("--seconds", "3")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_soak_of_a_minute(seed: int) -> None:
    print(run_soak("--seconds", "60", "--seed", str(seed)))


def test_a_wrong_replay_is_seen(model_path: ModelPath) -> None:
    """The comparison can fail: a token that the history does not know of."""
    subject = soak.Soak(model_path("llama"), SMALL, n_ctx=1024, seed=0, tolerance=1e-3)
    subject.llm.eval(subject.text(200))
    subject.check()
    subject.llm.history.texts[0][100] ^= 1
    with pytest.raises(AssertionError, match="logits differ"):
        subject.check()
    subject.llm.close()


def test_memory_that_grows_is_seen(model_path: ModelPath, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = soak.Soak(model_path("llama"), SMALL, n_ctx=512, seed=0, tolerance=1e-3)
    leak: list[mmap.mmap] = []

    def step() -> None:
        leak.append(mmap.mmap(-1, 2**20))  # fresh pages: the heap may have some to spare
        leak[-1].write(b"x" * 2**20)
        time.sleep(0.01)

    monkeypatch.setattr(subject, "step", step)
    with pytest.raises(AssertionError, match="memory grew"):
        soak.soak(subject, seconds=5)
    subject.llm.close()
