"""Measures what experiments/RESULTS.md shows, with `mesa-gguf eval` and `mesa-gguf bench`, into experiments/results.

    python experiments/measure.py reader                                          # the bundled model: hours on one core
    python experiments/measure.py language --model FILE.gguf --text FILE.txt      # log-loss: python -m training.language makes both
    python experiments/measure.py ablation [--model FILE.gguf --text FILE.txt]    # Mesa with other numbers than the default ones
    python experiments/measure.py longer --model FILE.gguf [--text FILE.txt]      # Mesa's last chunk on a model of T = 1,024 or 2,048
    python experiments/measure.py mesa --model FILE.gguf --text FILE.txt          # Mesa alone, after its defaults changed
    python experiments/measure.py fresh                                           # ReRoPE's two hops, on seeds of their own
    python experiments/measure.py real --model FILE.gguf --text FILE.txt          # questions about real text, with a model that people use
    python experiments/measure.py bench                                           # nothing else should run meanwhile
    python experiments/results.py experiments/results --output experiments/RESULTS.md

Runs that were cut off go on where they were. In a fresh checkout experiments/results holds sums without their items, which are not
overwritten: give another --output, or delete it. The quadratic methods stop at shorter texts, because they take hours there.
`mesa` takes the method's numbers (but not its speeds, which others are told in) out of the sums of "reader" and "language", and
measures what they were of, and what "fresh" is compared with, into folders of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from mesa_gguf.lab.evaluate import report
from mesa_gguf.model.header import check_model

STOCK_LIKE = "--method stock --method linear --method dynamic-ntk --method yarn"
EVERY_KEY = "--method rerope --method leaky-rerope --method self-extend"  # two position rules, and all keys are seen
TWO_RULES = f"{EVERY_KEY} --method lm-infinite --method streaming-llm"
TO_4 = "--length T --length 2T --length 4T"
TO_16 = f"{TO_4} --length 8T --length 16T"
TO_64 = f"{TO_16} --length 32T --length 64T"

Parts = dict[str, tuple[str, ...]]

# folder -> commands. A folder of its own where fewer methods read more, or longer, texts: Mesa reads those too
READER = {
    "reader": (
        f"qa --method all --documents 2 {TO_4}",
        "qa --method mesa --method star --documents 2 --length 8T --length 16T --length 32T --length 64T",
        f"qa {STOCK_LIKE} --documents 2 --length 8T --length 16T",
        f"qa --method mesa-exact {TWO_RULES} --documents 1 --length 8T",
        f"qa --method mesa --method mesa-exact {EVERY_KEY} --method stair --method yarn --documents 20 --length 2T",
        f"passkey --method mesa --method star --samples 10 {TO_64}",
        f"passkey {STOCK_LIKE} --samples 10 {TO_4}",
        "ruler --samples 5 --max-length-full 4T",
    ),
    "reader-long": (
        f"qa --method mesa {STOCK_LIKE} --documents 2 --length 32T --length 64T",
        f"passkey --method mesa {STOCK_LIKE} --samples 10 --length 8T --length 16T --length 32T",
    ),
    "reader-slow": (
        f"qa --method mesa --method mesa-exact {EVERY_KEY} --documents 1 --length 16T --length 32T",
        f"passkey --method mesa --method mesa-exact {TWO_RULES} --samples 10 {TO_4}",
        f"passkey --method mesa --method mesa-exact {EVERY_KEY} --samples 10 --length 8T --length 16T",
    ),
    "reader-64": ("qa --method mesa --method mesa-exact --method rerope --documents 1 --length 64T",),
    "reader-2t": ("qa --method mesa --method rerope --method stair --documents 40 --length 2T",),
    "reader-far": (
        "qa --method stair --documents 1 --length 8T",
        "passkey --method lm-infinite --method streaming-llm --samples 10 --length 8T --length 16T",
        "qa --method lm-infinite --method streaming-llm --documents 1 --length 16T",
        "passkey --method rerope --samples 10 --length 32T",
    ),
    "reader-beyond": (
        "passkey --method rerope --samples 5 --length 64T",
        "qa --method lm-infinite --method streaming-llm --documents 1 --length 32T",
        "qa --method stair --documents 1 --length 16T",
        "passkey --method leaky-rerope --method self-extend --samples 5 --length 32T",
        "passkey --method lm-infinite --method streaming-llm --samples 5 --length 32T",
        "qa --method leaky-rerope --method self-extend --documents 1 --length 64T",
        "qa --method lm-infinite --method streaming-llm --documents 1 --length 64T",
    ),
    "reader-stair": (
        f"passkey --method stair --samples 10 {TO_4}",
        "passkey --method stair --samples 5 --length 8T --length 16T",
    ),
    "reader-exact": ("passkey --method mesa-exact --samples 5 --length 32T --length 64T",),
    "reader-far-stock": (f"passkey {STOCK_LIKE} --samples 5 --length 64T",),
    "reader-depth": ("niah --method mesa --method yarn --samples 4 --depths 6 --length 2T --length 8T --length 16T",),
}
LANGUAGE = {
    "language": (
        "ppl --method all --samples 24 --length T --length 2T --length 16T --max-length-full 2T",
        f"ppl --method mesa --method star {STOCK_LIKE} --samples 24 {TO_16}",
        f"ppl --method mesa-exact {TWO_RULES} --samples 24 --length T --length 4T --length 16T --max-length-full 4T",
    ),
    "language-mesa": (f"ppl --method mesa --samples 240 {TO_16}",),
    "language-window": ("ppl --method mesa --method lm-infinite --samples 96 --length T --length 4T --length 8T",),
}
# two hops of the strongest other method, on seeds that nothing was chosen with at these lengths
FRESH = {
    "reader-fresh": tuple(
        f"qa --method rerope --seed {seed} --documents {documents} --length {length}"
        for seed in (5001, 6001)
        for documents, length in ((80, "2T"), (40, "4T"), (20, "8T"))
    ),
    "reader-fresh-far": (
        "qa --method rerope --seed 3001 --documents 20 --length 16T",
        "qa --method rerope --seed 3001 --documents 5 --length 32T",
        "qa --method rerope --seed 3001 --documents 5 --length 64T",
    ),
}
# what the folders above have of the method mesa, and what it is compared with in those on fresh seeds
MESA = {
    "reader-mesa": (
        f"qa --method mesa --documents 2 {TO_64}",
        "qa --method mesa --documents 40 --length 2T",
        f"passkey --method mesa --samples 10 {TO_64}",
        f"ruler --method mesa --samples 5 {TO_16}",
        "niah --method mesa --samples 4 --depths 6 --length 2T --length 8T --length 16T",
    ),
    "reader-fresh-mesa": tuple(what.replace("rerope", "mesa") for part in FRESH.values() for what in part),
    "language-mesa-24": (f"ppl --method mesa --samples 24 {TO_16}",),
    "language-mesa": LANGUAGE["language-mesa"],
    "language-mesa-96": ("ppl --method mesa --samples 96 --length T --length 4T --length 8T",),
}
ABLATION = {
    "default": "",
    "bias-0": "--stair-bias 0",
    "bias-1": "--stair-bias 1",
    "paper": "--stair-bias 0 --log-length 512 --room 128",
    "log-1T": "--log-length 512",
    "no-log": "--no-log-scaling",
    "bias-0-no-log": "--stair-bias 0 --no-log-scaling",
    "bias-1-no-log": "--stair-bias 1 --no-log-scaling",
    "chunk-240": "--chunk 240",
    "chunk-120": "--chunk 120",
    "first-8": "--first-chunk 8",
    "first-100": "--first-chunk 100 --chunk 400",
    "last-64": "--last-chunk 64",
    "last-256": "--last-chunk 256",
    "room-128": "--room 128",
    "room-64": "--room 64",
    "width-256": "--stair-width 256",
}
# last chunks beside the default one, by T; training.train and training.language make such models with --context
LONGER = {1024: (128, 512), 2048: (512, 1024)}
LONGER_QA = (
    "qa --seed 7001 --documents 20 --length 2T --length 4T",
    "qa --seed 7001 --documents 10 --length 8T --length 16T",
    "qa --seed 7101 --documents 60 --length 2T",
)
LONGER_RIVAL = ("qa --seed 7001 --documents 10 --length 2T --length 4T", "qa --seed 7101 --documents 60 --length 2T")
BENCH = (
    ("reader", "--threads 2 --tokens 512,2048,8192,32768 --runs 2 --method stock,mesa,star"),
    (
        "smollm2-135m",
        "--shape smollm2-135m --train-length 2048 --threads 2 --tokens 2048,8192 --runs 1 --method stock,mesa",
    ),
)
# questions about real text, the first method being the one that the others are compared with
REAL = (
    "--length 4096 --length 8192 --method mesa,read=auto --method mesa,read=all --method stock",
    "--length 16384 --method mesa,read=auto --method mesa,read=all --method mesa --method dynamic-ntk --method yarn --method stock",
    "--length 32768 --method mesa,read=auto --method mesa,read=all --method mesa",
)


def run(command: str) -> None:
    words = [str(Path(sys.executable).with_name("mesa-gguf")), *shlex.split(command)]
    print("+ mesa-gguf", command, flush=True)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def forget_mesa(folder: Path) -> None:
    """Take the numbers of the method mesa out of the sums in a folder, and leave its speeds."""
    for path in sorted(folder.glob("*.json")):
        contents = json.loads(path.read_text(encoding="utf-8"))
        for part in ("summary", "by_depth", "scores"):
            contents[part] = [entry for entry in contents.get(part, []) if entry["method"] != "mesa"]
        report.write_json(path, contents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["reader", "language", "mesa", "fresh", "ablation", "longer", "real", "bench"])
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    parser.add_argument("--model", help="a language model, for log-loss; for longer, one of another T")
    parser.add_argument("--text", help="a text that it has not seen")
    parser.add_argument("--only", metavar="FOLDER", help="what belongs into one of the folders")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    language = f"-m {args.model} --text {args.text}" if args.model else ""
    reader = f"-m {args.model}" if args.part == "longer" else ""
    if args.part in ("language", "mesa", "real") and not args.text:
        parser.error(f"{args.part} takes --model and --text")
    if args.part == "longer" and not args.model:
        parser.error("longer takes --model")
    if args.part == "mesa" and not args.only:
        for folder in ({*READER} | {*LANGUAGE}) - {*MESA}:
            forget_mesa(args.output / folder)
    parts: Parts = {"reader": READER, "language": LANGUAGE, "mesa": MESA, "fresh": FRESH}.get(args.part, {})
    if args.part == "ablation":
        parts = ablation(bool(args.text))
    if args.part == "longer":
        parts = longer(args.model, bool(args.text))
    if args.part == "real":
        what = "real --no-generate --kind literal --kind paraphrase --seed 701 --samples 5"
        parts = {f"real-{Path(args.model).stem}": tuple(f"{what} {options}" for options in REAL)}
    commands = [
        f"eval {what} {language if what.startswith(('ppl', 'real')) else reader} -o {args.output}/{folder}"
        for folder, part in parts.items()
        for what in part
        if args.only in (None, folder)
    ]
    if args.part == "bench":
        args.output.mkdir(parents=True, exist_ok=True)
        for name, options in BENCH:
            picture = f"--output {args.output}/bench-{name}.json --plot {args.output}/bench-{name}.png"
            model = "" if "--shape" in options else f"-m {bundled()} "
            run(f"bench {model}{options} {picture}")
    for command in commands:
        run(f"{command} --threads {args.threads}")


def ablation(log_loss: bool) -> Parts:
    what = (
        "ppl --samples 48 --length T --length 16T"
        if log_loss
        else "qa --documents 4 --length 2T --length 8T --length 32T"
    )
    return {f"ablation/{name}": (f"{what} --method mesa {options}",) for name, options in ABLATION.items()}


def longer(model: str, log_loss: bool) -> Parts:
    train_length = check_model(Path(model)).train_length
    if train_length not in LONGER:
        raise SystemExit(f"{model}: T is {train_length}; {' and '.join(map(str, LONGER))} are measured")
    options = {"default": ""} | {f"last-{last}": f"--last-chunk {last}" for last in LONGER[train_length]}
    parts: Parts = {}
    for name, option in options.items():
        what = (f"ppl --samples 48 {TO_4} --length 16T",) if log_loss else LONGER_QA
        parts[f"longer-{train_length}/{name}"] = tuple(f"{one} --method mesa {option}" for one in what)
    if not log_loss:
        parts[f"reader-{train_length}"] = tuple(f"{one} --method mesa --method rerope" for one in LONGER_RIVAL)
    return parts


def bundled() -> str:
    from mesa_gguf.model.bundled import bundled_model

    return str(bundled_model())


if __name__ == "__main__":
    main()
