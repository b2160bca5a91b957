"""llama.cpp's rehearsal with a model file, in a process of its own, where an abort harms nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

from .. import _core
from ..errors import OutOfMemoryError


@dataclass(frozen=True)
class Rehearsal:
    """What came of it when llama.cpp opened a model file.

    Attributes:
        view: what it found; None if it did not open it.
        reason: why it did not; empty where llama.cpp does not say.
        fatal: it took its process with it, or had to be stopped.
    """

    view: _core.ModelView | None
    reason: str = ""
    fatal: bool = False


# in a bare Python, without this package and llama_cpp: that takes a tenth of the time. No core dump, no more than 4 GiB.
REHEARSAL = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**32, resource.getrlimit(resource.RLIMIT_AS)[1]))
except (ImportError, OSError, ValueError):
    pass
core.rehearse(sys.argv[2], json.loads(sys.argv[3]), lambda view: print(json.dumps(view), flush=True))
"""
REHEARSAL_SECONDS = 60  # the largest vocabularies take 2


@lru_cache(maxsize=64)
def rehearse(path: str, size: int, mtime_ns: int, overrides: str) -> Rehearsal:
    """Let llama.cpp do in another process what it does with a file before the first prompt, short of touching the weights.

    size and mtime_ns tell the file from an older one at its path; overrides are JSON.
    """
    if getattr(sys, "frozen", False) or not sys.executable:  # the application, or no Python at all
        views: list[_core.ModelView | None] = []
        _core.rehearse(path, json.loads(overrides), views.append)
        return Rehearsal(views[0])
    # no GPU: it would be initialized for nothing; no backtrace: ggml would start a debugger for it
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "GGML_NO_BACKTRACE": "1"}
    command = [sys.executable, "-I", "-S", "-c", REHEARSAL, _core.__file__, path, overrides]
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=REHEARSAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Rehearsal(None, f"comes to no end with it in {REHEARSAL_SECONDS} seconds", fatal=True)
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode != 0:
        if done.returncode == -signal.SIGKILL:
            raise OutOfMemoryError(
                f"{path}: the process that tries this file out was killed (SIGKILL), most likely for want of memory: free some, "
                "and try again"
            )
        reason = said[-1].rpartition("/")[2] if said else _ending(done.returncode)
        return Rehearsal(_view(done.stdout), f"would abort on it ({reason})", fatal=True)
    errors = [line.partition("error loading model: ")[2] for line in said]
    return Rehearsal(_view(done.stdout), next(filter(None, errors), Rehearsal.reason))


def _view(said: bytes) -> _core.ModelView | None:
    """What the rehearsal found, of which it may have said a part, or nothing, when it ended."""
    try:
        view: _core.ModelView | None = json.loads(said or b"null")
    except ValueError:
        return None
    return view


def _ending(returncode: int) -> str:
    """How a process ended, as subprocess tells it."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # a real-time signal, or another system's
        return f"signal {-returncode}"
