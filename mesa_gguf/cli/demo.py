"""``mesa-gguf demo``: the demonstration."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from . import output
from .options import ModelOption, Threads, option

if TYPE_CHECKING:
    from ..llama import Progress

EXAMPLES = """\
Examples:\n
  mesa-gguf demo\n
  mesa-gguf demo --length 64 --seed 7 --output demo-64.png\n
  mesa-gguf demo -m model.gguf --length 1.5
"""


def demo(
    model: ModelOption = None,
    length: Annotated[
        float | None,
        option(
            "--length",
            min=1.1,
            max=1024,
            metavar="N",
            help="Length of the document, in multiples of the trained length. Default: 32, with -m 1.25.",
        ),
    ] = None,
    seed: Annotated[int, option("--seed", min=0, metavar="N", help="Seed that the document is made from.")] = 1,
    picture: Annotated[
        Path,
        option(
            "--output", metavar="FILE.png", help="File of the picture that is saved, where matplotlib is installed."
        ),
    ] = Path("demo.png"),
    threads: Threads = None,
) -> None:
    """Ask a model about a document longer than its context, with Mesa-Extrapolation and without.

    The bundled model is asked about a generated document, and a picture is saved. Another one (-m) is asked about facts that
    were put into Python's documentation.
    """
    from ..lab.demo import run_demo
    from ..lab.demo_real import run_real_demo
    from ..model.hub import find_model

    def progress(what: str) -> contextlib.AbstractContextManager[Progress | None]:
        output.say(what)
        return output.reading_bar(True)

    if model is not None:
        run_real_demo(find_model(model), length or 1.25, seed, threads, progress, output.console(150))
        return
    run_demo(length or 32, seed, picture, threads, progress, output.console(130))
