"""Asks the installed package a question, in a process of its own and away from the source tree; fails unless it is answered.

    python tests/ask_a_question.py

What tests of a wheel run: nothing but the standard library and the package is needed.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

PEOPLE = ("Mara Lind", "Otto Krantz", "Ida Falk", "Erik Berg", "Nora Holm")


def make_text(codes: dict[str, int], n_sentences: int = 200) -> str:
    """Facts spread over other sentences: some 2,000 tokens, four times what the bundled model was trained at."""
    random.seed(1)
    words = (
        ("old", "red", "small", "heavy"),
        ("chair", "lamp", "table", "crate", "bell"),
        ("door", "window", "stove", "wall"),
    )
    text = ["The {} {} stood near the {}.".format(*map(random.choice, words)) for _ in range(n_sentences)]
    for i, (name, code) in enumerate(codes.items()):
        text.insert(n_sentences * (i + 1) // (len(codes) + 1), f"The door code of {name} is {code}.")
    return " ".join(text)


def main() -> int:
    codes = {name: 3201 + 1111 * i for i, name in enumerate(PEOPLE)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(make_text(codes))
        questions = [argument for name in PEOPLE for argument in ("-q", f"What is the door code of {name}?")]
        command = [sys.executable, "-m", "mesa_gguf", "ask", "-f", "text.txt", *questions]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    print(done.stdout, done.stderr, sep="")
    missing = [name for name, code in codes.items() if f"The door code of {name} is {code}" not in done.stdout]
    if done.returncode or missing:
        print(f"exit code {done.returncode}; not answered: {', '.join(missing) or 'none'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
