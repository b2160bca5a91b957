"""Ask questions of documents longer than a local model's context.

Mesa-Extrapolation (NeurIPS 2024) inside llama.cpp, behind llama-cpp-python's API::

    from mesa_gguf import MesaLlama, Reader
    reader = Reader(MesaLlama("model.gguf", n_ctx=32768))
    reader.read(open("report.txt").read())
    print(reader.ask("What was decided in March?").answer)
"""

from __future__ import annotations

from . import _llama_cpp

_llama_cpp.load()

from ._core import METHODS  # noqa: E402
from .config import MesaConfig, MesaPlan  # noqa: E402
from .errors import (  # noqa: E402
    ConfigError,
    DeviceError,
    DocumentError,
    MesaError,
    ModelError,
    OutOfMemoryError,
    PromptError,
)
from .library.library import Library  # noqa: E402
from .library.store import LibraryError  # noqa: E402
from .llama import MesaLlama  # noqa: E402
from .reading.reader import Answer, Reader, Reading  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Answer",
    "ConfigError",
    "DeviceError",
    "DocumentError",
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
    "__version__",
]
