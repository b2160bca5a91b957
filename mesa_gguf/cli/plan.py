"""``mesa-gguf plan``: how a text of some length is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from ..model.hub import find_model
from . import output
from .options import (
    Chunk,
    FirstChunk,
    JsonOption,
    LastChunk,
    LogScaling,
    Method,
    ModelOption,
    ReadingLength,
    StairBias,
    StairWidth,
    TrainLength,
    Tuned,
    config_of,
    option,
)

EXAMPLES = """\
Examples:\n
  mesa-gguf plan -m model.gguf --tokens 32768\n
  mesa-gguf plan --train-length 2048 --tokens 16384 --plot plan.png
"""


def plan(
    tokens: Annotated[
        int, option("--tokens", min=1, max=2**31 - 1, metavar="N", help="Length of the text, in tokens.")
    ],
    model: ModelOption = None,
    plot: Annotated[
        Path | None,
        option("--plot", metavar="FILE.png", help="Save a picture of the mask and the positions in this file."),
    ] = None,
    as_json: JsonOption = False,
    train_length: TrainLength = None,
    reading_length: ReadingLength = None,
    first_chunk: FirstChunk = None,
    chunk: Chunk = None,
    last_chunk: LastChunk = None,
    stair_width: StairWidth = "auto",
    log_scaling: LogScaling = None,
    stair_bias: StairBias = None,
    use_tuned: Tuned = True,
    method: Method = "mesa",
) -> None:
    """Show how a text of some length is read: its chunks, the anchor, the stair width and the positions.

    Borders lie on the grid here; in a real text they move back to the ends of its sentences.
    """
    from ..model.header import check_model
    from ..model.tuning import tuned
    from ..reading.plans import format_summary, summarize

    if plot is not None:
        from ..lab.plot import check_picture, plan_figure

        check_picture(plot)
    config = config_of(
        False,
        train_length,
        first_chunk,
        chunk,
        last_chunk,
        stair_width,
        log_scaling,
        stair_bias,
        method,
        reading_length,
        use_tuned,
    )
    if train_length is not None and model is None:
        length = train_length
    else:
        path = find_model(model)
        length = check_model(path).train_length
        config, tuning = tuned(config, path, length)
        output.say_tuning(path.name, tuning)
    made = config.make_plan(tokens, length)
    params = config.params(length)
    summary = summarize(made, tokens, params)
    if as_json:
        output.write_json(asdict(summary))
    else:
        output.write(format_summary(summary) + "\n")
    if plot is not None:
        plan_figure(made, tokens, params).savefig(plot)
