"""``mesa-gguf inspect``: what a model is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..model.hub import HUB_FORM, find_model
from . import output
from .options import JsonOption, option

EXAMPLES = """\
Examples:\n
  mesa-gguf inspect model.gguf\n
  mesa-gguf inspect hf:owner/repo/file.gguf --tokens 32768 --tokens 131072
"""


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"The model: a GGUF file, or {HUB_FORM}. Default: the bundled one."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        option("--tokens", min=1, metavar="N", help="Tell the memory that N tokens take; may be given several times."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a model is, whether Mesa-Extrapolation supports it, and the memory that a text takes."""
    from ..model.inspection import format_report, inspect_model

    report = inspect_model(find_model(model), tokens or ())
    if as_json:
        output.write_json(asdict(report))
    else:
        output.write(format_report(report) + "\n")
