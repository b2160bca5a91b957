"""Ask questions of documents longer than a local model's context.

Mesa-Extrapolation (NeurIPS 2024) inside llama.cpp, behind llama-cpp-python's API::

    from mesa_gguf import MesaLlama, Reader
    reader = Reader(MesaLlama("model.gguf", n_ctx=32768))
    reader.read(open("report.txt").read())
    print(reader.ask("What was decided in March?").answer)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _llama_cpp

if TYPE_CHECKING:
    from ._core import METHODS
    from .config import MesaConfig, MesaPlan
    from .errors import (
        ConfigError,
        DeviceError,
        DocumentError,
        MesaError,
        ModelError,
        OutOfMemoryError,
        PromptError,
    )
    from .library.library import Library
    from .library.store import LibraryError
    from .llama import MesaLlama
    from .reading.embeddings import EmbeddingModel
    from .reading.prompts import Turn
    from .reading.reader import Answer, Reader, Reading

_llama_cpp.prepare()

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Answer",
    "ConfigError",
    "DeviceError",
    "DocumentError",
    "EmbeddingModel",
    "Library",
    "LibraryError",
    "MesaConfig",
    "MesaError",
    "MesaLlama",
    "MesaPlan",
    "ModelError",
    "OutOfMemoryError",
    "PromptError",
    "Reader",
    "Reading",
    "Turn",
    "__version__",
]

# where the names above are; they are imported when they are asked for, so that the command line is quick
_ROOMS = {
    **dict.fromkeys(("Answer", "Reader", "Reading"), "reading.reader"),
    **dict.fromkeys(("MesaConfig", "MesaPlan"), "config"),
    "EmbeddingModel": "reading.embeddings",
    "Library": "library.library",
    "LibraryError": "library.store",
    "METHODS": "_core",
    "MesaLlama": "llama",
    "Turn": "reading.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOMS.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
