"""The command line, ``mesa-gguf``: one module a command, `options` and `output` for all of them."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
