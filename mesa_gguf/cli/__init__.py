"""The command line, ``mesa-gguf``: one module a command, `options` and `output` for all of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Ctrl-C is told in one line from the beginning on."""
    try:
        from . import app

        return app.main(args)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or is not there
            sys.stderr.write("mesa-gguf: interrupted\n")
        return EXIT_INTERRUPTED
