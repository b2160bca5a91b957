"""Draws docs/stair.svg, the picture of the README: a small plan of the library, and how a text is read by it.

python experiments/stair.py docs/stair.svg
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

from mesa_gguf import MesaConfig, MesaPlan
from mesa_gguf.reading.plans import chunks

TRAIN_LENGTH, N_TOKENS = 64, 252  # so few that single steps of the stair can be seen
CONFIG = MesaConfig(first_chunk=12, chunk=52, last_chunk=32, room=8)

# readable on white and on dark; a colour-blind reader tells them apart
FIRST, MIDDLE, LAST, GREY = "#2a7bc4", "#45a2dd", "#db6a1c", "#7a828c"

WIDTH, HEIGHT, LEFT = 760, 610, 8
SCALE = (WIDTH - 2 * LEFT) / N_TOKENS  # pixels a token
BAR, MASK, MASK_HEIGHT, FLOOR, UNIT = 34, 100, 200, 572, 2.6  # tops, a height, the zero of positions, pixels a position


def x(token: float) -> float:
    return LEFT + token * SCALE


def row(query: float) -> float:
    return MASK + query * MASK_HEIGHT / N_TOKENS


def y(position: float) -> float:
    return FLOOR - position * UNIT


def shape(points: list[tuple[float, float]], *, fill: str = "none", line: str = "none", more: str = "") -> str:
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    kind = "polyline" if fill == "none" else "polygon"
    return f'<{kind} points="{corners}" fill="{fill}" stroke="{line}" {more}/>'


def text(at: float, down: float, words: str, *, fill: str = GREY, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{at:.1f}" y="{down:.1f}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def coloured(fill: str, words: str) -> str:
    return f'<tspan fill="{fill}">{words}</tspan>'


def bar(plan: MesaPlan) -> list[str]:
    """The text, cut."""
    colours = {"first": FIRST, "middle": MIDDLE, "last": LAST}
    out = [text(x(0), 20, f"A text of {N_TOKENS} tokens, for a model that was trained at {TRAIN_LENGTH}")]
    for chunk in chunks(plan, N_TOKENS):
        box = f'x="{x(chunk.start) + 1:.1f}" y="{BAR}" width="{(chunk.stop - chunk.start) * SCALE - 2:.1f}" height="20"'
        out.append(f'<rect {box} rx="2" fill="{colours[chunk.kind]}"/>')
    starts = plan.chunk_starts
    middle = (starts[1] + plan.last_start) / 2
    out += [
        text(x(0), BAR + 36, "first chunk", fill=FIRST),
        text(x(middle), BAR + 36, "middle chunks", fill=MIDDLE, anchor="middle"),
    ]
    return [*out, text(x(N_TOKENS), BAR + 36, "last chunk", fill=LAST, anchor="end")]


def mask(plan: MesaPlan) -> list[str]:
    """Who reads whom: a row for each token, from top to bottom."""
    f, last = plan.chunk_starts[1], plan.last_start
    out = [shape([(x(0), row(0)), (x(f), row(f)), (x(f), row(last)), (x(0), row(last))], fill=FIRST)]
    for chunk in chunks(plan, N_TOKENS):
        a, b = chunk.start, chunk.stop
        own = [(x(chunk.own), row(a)), (x(a), row(a)), (x(b), row(b)), (x(chunk.own), row(b))]
        if chunk.kind != "first":
            out.append(shape(own, fill=MIDDLE if chunk.kind == "middle" else LAST))
    out.append(text(x(N_TOKENS), MASK + 22, "Who reads whom (a row is a token, from top to bottom):", anchor="end"))
    for line, (colour, words) in enumerate(
        (
            (FIRST, "every middle chunk reads the first chunk"),
            (MIDDLE, "and itself, nothing between them"),
            (LAST, "the last chunk, and the answer, read everything"),
        )
    ):
        out.append(text(x(N_TOKENS), MASK + 44 + 20 * line, words, fill=colour, anchor="end"))
    return out


def positions(plan: MesaPlan) -> list[str]:
    """At which position a token stands, while its chunk is read and for the last chunk."""
    reading, seen = plan.chunk_positions(plan.last_start), plan.key_positions(N_TOKENS)
    out = [shape([(x(0), y(TRAIN_LENGTH)), (x(N_TOKENS), y(TRAIN_LENGTH))], line=GREY, more='stroke-dasharray="5 4"')]
    out.append(shape([(x(0), y(0)), (x(N_TOKENS), y(0))], line=GREY))
    out.append(text(x(N_TOKENS), y(TRAIN_LENGTH) - 6, f"trained length: position {TRAIN_LENGTH}", anchor="end"))
    beyond = TRAIN_LENGTH + 26  # where the line of stock llama.cpp leaves the picture
    out.append(
        shape([(x(0), y(0)), (x(beyond), y(beyond))], line=GREY, more='stroke-width="1.5" stroke-dasharray="1.5 3.5"')
    )
    out.append(text(x(beyond) + 8, y(beyond) + 12, "stock llama.cpp: past what the model learned"))
    for start, stop in pairwise(plan.chunk_starts):
        line = [(x(start), y(reading[start])), (x(stop), y(reading[stop - 1] + 1))]
        out.append(shape(line, line=FIRST if start == 0 else MIDDLE, more='stroke-width="2"'))
    stair = []
    for token in range(N_TOKENS):
        stair += [(x(token), y(seen[token])), (x(token + 1), y(seen[token]))]
    out.append(shape(stair, line=LAST, more='stroke-width="2.5"'))
    out.append(
        shape([(x(plan.anchor), y(0)), (x(plan.anchor), y(TRAIN_LENGTH))], line=GREY, more='stroke-dasharray="2 3"')
    )
    out.append(text(x(plan.anchor) - 6, y(3), "anchor", anchor="end"))
    steps = f"the stair: {plan.stair_width} tokens share a position"
    out.append(text(x(plan.anchor) - 70, y(3), steps, fill=LAST, anchor="end"))
    blue, orange = coloured(MIDDLE, "while their own chunk is read"), coloured(LAST, "as the last chunk sees them")
    legend = f"Positions (upwards) of the tokens (to the right): {blue}, and {orange}"
    return [*out, text(x(0), FLOOR + 24, legend)]


def main() -> None:
    plan = CONFIG.make_plan(N_TOKENS, TRAIN_LENGTH)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">"
    )
    title = "<title>How a text longer than the trained length is cut, who reads whom, and at which positions</title>"
    lines = [head, title, *bar(plan), *mask(plan), *positions(plan), "</svg>"]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
