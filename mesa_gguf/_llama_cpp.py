"""Makes ``llama_cpp`` load the patched llama.cpp of this package.

``llama_cpp`` loads its library once, from the folder in ``LLAMA_CPP_LIB_PATH``, when it is first imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# beside the extension, which in an editable install lies elsewhere than this file
_SPEC = importlib.util.find_spec("mesa_gguf._core")
LIBRARY_DIR = Path(_SPEC.origin if _SPEC and _SPEC.origin else __file__).parent / "lib"

_callback: Any = None  # llama.cpp's log goes here; ctypes callbacks live as long as they are referenced
_silent = False  # nothing of it is shown


class _Finder(importlib.abc.MetaPathFinder):
    """Stands before Python's own finders until ``llama_cpp`` is imported, by whomever."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "llama_cpp":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs ``llama_cpp`` with LLAMA_CPP_LIB_PATH set to the folder of this package's library."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        keep_standard_streams()
        before = os.environ.get("LLAMA_CPP_LIB_PATH")
        os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARY_DIR)
        try:
            self._loader.exec_module(module)
        finally:
            # processes that we start choose for themselves
            if before is None:
                del os.environ["LLAMA_CPP_LIB_PATH"]
            else:
                os.environ["LLAMA_CPP_LIB_PATH"] = before
        _check(module)


def prepare() -> None:
    """See to it that ``llama_cpp`` loads the patched library, when it is imported: that takes a while, and not every command needs it.

    Raises:
        ImportError: ``llama_cpp`` was imported before with another library, or the library is missing.
    """
    if "llama_cpp" in sys.modules:
        _check(sys.modules["llama_cpp"])
    elif not LIBRARY_DIR.is_dir():
        raise ImportError(
            f"the patched llama.cpp is missing at {LIBRARY_DIR}: install mesa-gguf with pip, or make test"
        )
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _check(module: ModuleType) -> None:
    bindings = module.llama_cpp  # its ctypes bindings, which have the name of the package
    library = getattr(bindings, "_lib", None)
    if library is None or not hasattr(library, "llama_mesa_version"):
        raise ImportError(
            "llama_cpp was imported before mesa_gguf and has loaded its own llama.cpp "
            f"({getattr(library, '_name', 'unknown')}); import mesa_gguf first"
        )
    _log_by_level(bindings)


def has_stderr() -> bool:
    """Whether there is a standard error to write to. A service or a window may have none, and a program may have closed it."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def keep_standard_streams() -> None:
    """Open /dev/null as standard input, output or error where that is closed.

    llama_cpp duplicates the last two while it loads a model, which fails without them; and files that are opened later would get their
    numbers, and what llama.cpp writes to standard error.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != stream:
                os.dup2(null, stream)
                os.close(null)
            os.set_inheritable(stream, True)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without llama.cpp's messages, errors included."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """Ctrl-C is raised at the end of this where it came while llama.cpp was logging: Python drops what is raised in a callback."""
    lost: list[BaseException] = []
    before = sys.unraisablehook

    def keep(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_value is None or isinstance(unraisable.exc_value, Exception):
            before(unraisable)
        else:
            lost.append(unraisable.exc_value)

    sys.unraisablehook = keep
    try:
        yield
    finally:
        sys.unraisablehook = before
        if lost:
            raise lost[0]


def _log_by_level(bindings: ModuleType) -> None:
    """Show llama.cpp's messages by their level: errors, and all of them with verbose=True.

    llama_cpp's own callback takes this llama.cpp's warnings for errors and shows them always, among them the warning
    that n_ctx exceeds the trained length, which is what Mesa is for.
    """
    from llama_cpp._logger import logger

    # enum ggml_log_level: none, debug, info, warn, error, cont
    levels = {0: logging.NOTSET, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
    last = logging.NOTSET

    def log(level: int, text: bytes, _: object) -> None:
        nonlocal last
        last = levels.get(level, last)
        if _silent or last < logger.level or not has_stderr():
            return
        # nothing can be raised through llama.cpp
        with contextlib.suppress(OSError, ValueError):
            print(text.decode("utf-8", "replace"), end="", flush=True, file=sys.stderr)

    global _callback
    _callback = bindings.llama_log_callback(log)
    bindings.llama_log_set(_callback, ctypes.c_void_p(0))
    logger.setLevel(logging.ERROR)
