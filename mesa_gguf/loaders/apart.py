"""Reading in a process of its own: what a hostile file can take there is time and memory, both limited, and no more."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import DocumentError, MesaError, Remedy
from .document import Limits, LoadedDocument, Place, beyond

# note: a package of the same name stands in for this one, so that no llama.cpp is loaded there
_CHILD = """
import json, sys, types
task = json.loads(sys.stdin.buffer.readline())
sys.path[:] = task.pop("path")
package = types.ModuleType("mesa_gguf")
package.__path__ = [task.pop("package")]
sys.modules["mesa_gguf"] = package
from mesa_gguf.loaders.apart import serve
serve(**task)
"""


def read_apart(
    kind: str, data: bytes, name: str, *, password: str | None, everything: bool, notes: tuple[str, ...], limits: Limits
) -> LoadedDocument:
    """What `readers.read` gives, from another process.

    Raises:
        DocumentError: as there, or the process died, or it took too long.
        MissingPackageError: as there.
    """
    options = {"kind": kind, "password": password, "everything": everything, "notes": notes, "limits": asdict(limits)}
    is_sought = kind == "html" and not everything
    answer = run_apart("readers", options, data, name, limits, is_sought=is_sought)
    places = tuple(Place(place["start"], place["page"], tuple(place["heading"])) for place in answer["places"])
    return LoadedDocument(answer["text"], places, answer["kind"], answer["title"], tuple(answer["notes"]))


def run_apart(
    module: str, options: dict[str, Any], data: bytes, name: str, limits: Limits, *, is_sought: bool = False
) -> dict[str, Any]:
    """What a module's function `apart` gives, from another process.

    Args:
        module: of this package. Its `warm_up` gets the options and imports what it takes; then `apart` gets data, name and the
            options, and gives what JSON can hold.
        is_sought: it looks for the main text of a page, which takes most of the time.

    Raises:
        DocumentError: the process died, or it took too long.
        MesaError: as the function raises it.
    """
    task = {
        "path": [str(path) for path in sys.path],
        "package": str(Path(__file__).parent.parent),
        "module_name": module,
        "name": name,
        "options": options,
        "limits": asdict(limits),
    }
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _CHILD]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(task).encode() + b"\n" + data,
            capture_output=True,
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _no_time(name, limits, is_sought) from None
    if done.returncode < 0 and _signal(-done.returncode) == "SIGXCPU":
        raise _no_time(name, limits, is_sought)
    if done.returncode != 0:
        if b"MemoryError" in done.stderr[-2000:]:
            raise _no_memory(name, limits)
        ending = f"signal {_signal(-done.returncode)}" if done.returncode < 0 else f"status {done.returncode}"
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise DocumentError(
            f"{name}: the process that read it ended with {ending}{''.join(f' ({line[:200]})' for line in last)}: it is damaged, or "
            f"needs more than {limits.memory:,} bytes",
            Remedy("limits.memory", why="if you trust the file"),
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        remedies = [Remedy(**remedy) for remedy in answer["remedies"]]
        kind: type[MesaError] = getattr(errors, answer["error"])
        raise kind(answer["what"], *remedies, needed=answer["needed"], available=answer["available"])
    return answer


def serve(module_name: str, name: str, options: dict[str, Any], limits: dict[str, Any]) -> None:
    """Call a module's `apart` for what standard input has left, and write what comes of it to standard output as JSON."""
    module = importlib.import_module(f"{__package__}.{module_name}")
    module.warm_up(**options)
    data = sys.stdin.buffer.read()
    _limit(Limits(**limits))
    answer: dict[str, Any]
    try:
        answer = module.apart(data, name, **options)
    except MesaError as err:
        answer = {
            "error": type(err).__name__,
            "what": err.what,
            "remedies": [asdict(remedy) for remedy in err.remedies],
            "needed": err.needed,
            "available": err.available,
        }
    sys.stdout.buffer.write(json.dumps(answer).encode())
    sys.stdout.buffer.flush()


def _limit(limits: Limits) -> None:
    """No more memory than that, no file written, no core dump, and an end even if the parent is gone."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    seconds = int(limits.seconds or 0) + 1
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),  # note: pipes do not count
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits.memory),
    ):
        try:
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, hard))
        except (OSError, ValueError):
            continue  # macOS has no RLIMIT_AS


def _no_time(name: str, limits: Limits, is_sought: bool) -> DocumentError:
    """The error for what took too long.

    Args:
        is_sought: it was the main text of a page, and that takes most of the time.
    """
    error = beyond("seconds", f"{name} was not read in time", limits.seconds or 0)
    if not is_sought:
        return error
    faster = Remedy("everything", True, why="which is read faster than the main text is found")
    return DocumentError(error.what, *error.remedies, faster, available=error.available)


def _no_memory(name: str, limits: Limits) -> DocumentError:
    return beyond("memory", f"{name} needs more bytes of memory", limits.memory)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
