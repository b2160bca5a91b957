"""A plan as a picture: the chunk-triangular mask and the stair of positions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._core import Params
from ..config import MesaPlan
from ..errors import ConfigError, missing_package
from ..reading.plans import chunks, format_line, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Polygon = npt.NDArray[np.float64]
"""Corners, [n, (key, query)]."""

# colours that a colour-blind reader tells apart
FIRST, OWN, LAST, STOCK = "#0072B2", "#56B4E9", "#D55E00", "#999999"
MAX_POINTS = 4000  # of a line; more cannot be seen
MIN_STEPS_SHOWN = 8  # tokens past the anchor
WIDTHS, HEIGHTS = (1, 1.1), (1.6, 1)  # of plan_mosaic's columns and rows


#
# the mask as areas: exact at any length, where an image of n_tokens² pixels would not be
#


def mask_areas(plan: MesaPlan, n_tokens: int) -> dict[str, list[Polygon]]:
    """What queries attend to, by kind: "first" (chunk), "own" (chunk) and "last" (chunk: everything before it).

    Token i covers i .. i + 1 on both axes; the diagonal runs through its cells.
    """
    areas: dict[str, list[Polygon]] = {"first": [], "own": [], "last": []}
    for chunk in chunks(plan, n_tokens):
        a, b, own = chunk.start, chunk.stop, chunk.own
        causal = np.array([(own, a), (a, a), (b, b), (own, b)], np.float64)
        areas[{"first": "first", "middle": "own", "last": "last"}[chunk.kind]].append(causal)
        if chunk.kind == "middle":
            f = chunk.n_first
            areas["first"].append(np.array([(0, a), (f, a), (f, b), (0, b)], np.float64))
    return areas


#
# pictures
#


def draw_mask(axes: Axes, plan: MesaPlan, n_tokens: int) -> None:
    """Which query attends to which key."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    areas = mask_areas(plan, n_tokens)
    if plan.is_plain:
        kinds = {"last": (OWN, "everything before it")}
    else:
        kinds = {"first": (FIRST, "the first chunk"), "own": (OWN, "its own chunk"), "last": (LAST, "all (last chunk)")}
    for kind, (colour, _) in kinds.items():
        # edges keep visible what is narrower than a pixel; axes hide one half of an edge on them
        is_thin = kind != "own" and max(np.ptp(area, axis=0).min() for area in areas[kind]) < n_tokens / 200
        line = PolyCollection(areas[kind], facecolors=colour, edgecolors=colour, linewidths=3 if is_thin else 0.6)
        axes.add_collection(line)
    axes.plot([0, n_tokens], [0, n_tokens], color=STOCK, linewidth=0.6, linestyle=":")
    axes.set_xlim(0, n_tokens)
    axes.set_ylim(n_tokens, 0)
    axes.set_aspect("equal")
    axes.set_title("Who attends to whom")
    axes.set_xlabel("key (token index)")
    axes.set_ylabel("query (token index)")
    handles = [Patch(color=colour, label=label) for colour, label in kinds.values()]
    axes.legend(handles=handles, title="a query reads", loc="upper right", frameon=False)


def draw_positions(axes: Axes, plan: MesaPlan, n_tokens: int, params: Params) -> None:
    """At which position each token stands."""
    lines = {params.reading_length: "reading length", params.train_length: "trained length"}
    for length, name in lines.items():
        axes.axhline(length, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(f"{name} {length}", (n_tokens, length), (-4, 4), textcoords="offset points", ha="right")
    if not plan.is_plain:
        axes.plot([0, n_tokens], [0, n_tokens], color=STOCK, linestyle=":", label="stock llama.cpp")
        axes.plot(
            *_sawtooth(plan),
            color=OWN,
            linewidth=max(0.3, min(0.8, 40 / len(plan.chunk_starts))),
            label="while its chunk is read",
        )
    label = "as in stock llama.cpp" if plan.is_plain else "as the last chunk sees it"
    axes.plot(*_line(plan, n_tokens), color=LAST, linewidth=1.8, label=label)
    axes.set_xlim(0, n_tokens)
    axes.set_ylim(0, params.train_length * 1.25)
    axes.set_title("Positions")
    axes.set_xlabel("token index")
    axes.set_ylabel("position")
    axes.legend(loc="upper center", ncols=3, frameon=False, handlelength=1.2, columnspacing=1, fontsize="small")


def draw_steps(axes: Axes, plan: MesaPlan, n_tokens: int) -> None:
    """The stair around the anchor: in the whole picture its steps are too small to be seen."""
    start = max(0, plan.anchor - 8 * plan.stair_width)
    stop = min(n_tokens, plan.anchor + max(MIN_STEPS_SHOWN, 2 * plan.stair_width))
    axes.step(np.arange(start, stop), plan.key_positions(stop)[start:], where="post", color=LAST)
    axes.axvline(plan.anchor, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("anchor ", (plan.anchor, 0.9), xycoords=("data", "axes fraction"), ha="right", va="top")
    axes.set_xlim(start, stop)
    axes.set_title(f"The stair before the anchor: {plan.stair_width} tokens a step")
    axes.set_xlabel("token index")
    axes.set_ylabel("position")
    axes.ticklabel_format(useOffset=False, style="plain")


def _sawtooth(plan: MesaPlan) -> tuple[list[float], list[float]]:
    """Positions while chunks are read, as one line with gaps: only the ends of each chunk, however long the text is."""
    positions = plan.chunk_positions(plan.last_start)
    x: list[float] = []
    y: list[float] = []
    for start, stop in pairwise(plan.chunk_starts):
        x += [start, stop - 1, np.nan]
        y += [float(positions[start]), float(positions[stop - 1]), np.nan]
    return x, y


def _line(plan: MesaPlan, n_tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    at = np.unique(np.linspace(0, n_tokens - 1, MAX_POINTS).astype(np.int64))
    return at, plan.key_positions(n_tokens)[at]


def plan_mosaic(plan: MesaPlan) -> list[Any]:
    """The axes that draw_plan fills; there are no steps to show in a plain reading."""
    return [["mask", "positions"], ["mask", "positions" if plan.is_plain else "steps"]]


def draw_plan(axes: dict[str, Axes], plan: MesaPlan, n_tokens: int, params: Params) -> None:
    """Mask, positions and steps into the axes of plan_mosaic."""
    draw_mask(axes["mask"], plan, n_tokens)
    draw_positions(axes["positions"], plan, n_tokens, params)
    if "steps" in axes:
        draw_steps(axes["steps"], plan, n_tokens)


def plan_figure(plan: MesaPlan, n_tokens: int, params: Params) -> Figure:
    """The mask and the positions, side by side."""
    figure = new_figure(13.5, 6.5)
    axes = figure.subplot_mosaic(plan_mosaic(plan), width_ratios=WIDTHS, height_ratios=HEIGHTS)
    draw_plan(axes, plan, n_tokens, params)
    figure.suptitle(format_line(summarize(plan, n_tokens, params)))
    return figure


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, drawn without a screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as err:
        raise missing_package("a picture", "matplotlib", "lab") from err

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_picture(path: Path) -> None:
    """Raise ConfigError if no picture can be saved there, before anything is computed for it."""
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(f"{path}: a picture's name ends with its format, such as .png, .svg or .pdf")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{path}: the picture cannot be saved there: there is no such folder, or it is a folder itself"
        )
