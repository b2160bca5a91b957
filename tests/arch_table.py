"""docs/ARCHITECTURES.md: what Mesa does with each architecture that this llama.cpp lists, asked of the engine.

    python tests/arch_table.py            write the file
    python tests/arch_table.py --check    fail if it is not as the engine says

Needs mesa_gguf installed, and llama.cpp's sources (make stock, or MESA_STOCK_LIB).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tempfile
from pathlib import Path

from arch_models import MODELS, each, file_name, make, tell
from mesa_gguf import MesaError, MesaLlama

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "ARCHITECTURES.md"

NOT_MADE = {
    "clip": "an image encoder: llama.cpp loads no such model",
    "gptj": "llama.cpp has the name only and loads no such model",
}
"""Architectures without a test model, and why."""

INTRO = """\
# Architectures

Written by `python tests/arch_table.py`; a test holds it against the engine. A variant of an architecture has its name after a
colon. Test models are tiny and random, with everything optional that the architecture may have (`tests/arch_models.py`).

How a model is tested (`tests/test_archs.py`), beside the logits inside T, which are those of stock llama.cpp bit for bit:

* *stock*: prompt and answer over several T equal stock llama.cpp's, when it is led through the method by its public API;
* *by hand*: so too, with the keys placed in a saved state, because stock llama.cpp cannot shift them, or not exactly;
* *windows*: with the attention of all other layers silenced, they equal stock llama.cpp's plain reading; *stock* and *by hand*
  are then with the sliding windows silenced; and splits into batches give the same logits;
* *oracle*: they equal those of a NumPy program of the definition, sliding windows included;
* *refused*: loading it fails, with the reason given here.

"""


def architectures() -> list[str]:
    """Those in llama.cpp's own list, in its order."""
    stock = Path(os.environ.get("MESA_STOCK_LIB") or ROOT / "build" / "stock" / "lib").parent
    source = stock / "llama.cpp" / "src" / "llama-arch.cpp"
    if not source.exists():
        raise FileNotFoundError(f"llama.cpp's sources are not at {source}: make stock, or set MESA_STOCK_LIB")
    listed = source.read_text().split("LLM_ARCH_NAMES = {", 1)[1].split("};", 1)[0]
    return [name for name in re.findall(r'LLM_ARCH_\w+,\s*"([^"]+)"', listed) if name != "(unknown)"]


def verdicts(folder: Path) -> dict[str, str | None]:
    """Of each model of arch_models.py: why Mesa does not read with it, None if it does."""
    files = make(MODELS, folder)
    missing = {name: path for name, path in files.items() if not isinstance(path, Path)}
    if missing:
        raise RuntimeError(f"llama.cpp could not make {missing}")
    answers = each([__file__, "--ask", folder], MODELS)
    broken = {name: reason for name, (answer, reason) in answers.items() if answer is None}
    if broken:
        raise RuntimeError(f"these take the process with them: {broken}")
    return {name: reason or None for name, (_, reason) in answers.items()}


def ask(folder: Path, names: list[str]) -> None:
    """Open models one after another and tell what came of it, for `verdicts`."""
    for name in names:
        try:
            MesaLlama(folder / file_name(name), n_ctx=256).close()
            tell(name, "read", "")
        except MesaError as err:
            tell(name, "refused", re.sub(r"^.*\(architecture [^)]*\): |: give enabled=False.*$", "", str(err)))


def how_tested(name: str) -> str:
    from test_archs import BY_HAND, ORACLES, has_windows

    ways = ["by hand" if name in BY_HAND else "stock"]
    if has_windows(name):
        ways.append("windows")
    if name in ORACLES:
        ways.append("oracle")
    return ", ".join(ways)


def table() -> str:
    with tempfile.TemporaryDirectory() as folder:
        reasons = verdicts(Path(folder))
    rows = ["| architecture | Mesa | tested |", "|---|---|---|"]
    for architecture in architectures():
        if architecture in NOT_MADE:
            rows.append(f"| {architecture} | no: {NOT_MADE[architecture]} | no |")
            continue
        for name in sorted(name for name, model in MODELS.items() if model.architecture == architecture):
            reason = reasons[name]
            verdict, tested = (f"no: {reason}", "refused") if reason else ("yes", how_tested(name))
            rows.append(f"| {name} | {verdict} | {tested} |")
    read = {MODELS[name].architecture for name, reason in reasons.items() if reason is None}
    summary = f"{len(read)} of llama.cpp's {len(architectures())} architectures can be read with Mesa.\n\n"
    return INTRO + summary + "\n".join(rows) + "\n"


def difference() -> str:
    """What is not up to date in the file, as a diff."""
    before = DOCS.read_text() if DOCS.exists() else ""
    return "".join(difflib.unified_diff(before.splitlines(True), table().splitlines(True), "docs", "engine", n=0))


def main() -> None:
    parser = argparse.ArgumentParser(description="What Mesa does with each architecture of llama.cpp.")
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    parser.add_argument("--ask", nargs="+", metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        ask(Path(arguments.ask[0]), arguments.ask[1:])
    elif arguments.check:
        sys.exit(difference() or None)
    else:
        DOCS.write_text(table())


if __name__ == "__main__":
    main()
