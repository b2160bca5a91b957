"""``mesa-gguf demo``: the demonstration."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import output
from .options import Threads, option

if TYPE_CHECKING:
    from ..llama import Progress

EXAMPLES = """\
Examples:\n
  mesa-gguf demo\n
  mesa-gguf demo --length 64 --seed 7 --output demo-64.png
"""


def demo(
    length: Annotated[
        int,
        option(
            "--length", min=2, max=1024, metavar="N", help="Length of the document, in multiples of the trained length."
        ),
    ] = 32,
    seed: Annotated[int, option("--seed", min=0, metavar="N", help="Seed that the document is made from.")] = 1,
    picture: Annotated[
        Path,
        option(
            "--output", metavar="FILE.png", help="File of the picture that is saved, where matplotlib is installed."
        ),
    ] = Path("demo.png"),
    threads: Threads = None,
) -> None:
    """Ask the bundled model about a document far longer than its context, with Mesa-Extrapolation and without."""
    from ..lab.demo import run_demo

    def progress(what: str) -> contextlib.AbstractContextManager[Progress | None]:
        output.say(what)
        return output.reading_bar(True)

    run_demo(length, seed, picture, threads, progress, output.console(130))
