"""What stands between a document and its question: right answers, by how a prompt is put together.

    python experiments/prompts.py -m model.gguf --seeds 301 302 [--text book.txt] [--read auto] [--length 8192]

Each document has 8 facts unlike all others and 4 that look alike (mesa_gguf.lab.facts), asked for in their own words; the latter in other words, too. Answers are
written freely. The model needs a chat template. Forms take turns at each question, so that the chunks are read once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mesa_gguf import Library, MesaConfig, Reader
from mesa_gguf.lab.facts import Haystack, default_text, load_text, make_document
from mesa_gguf.reading.prompts import ABOUT, QUESTION, REPLY, PromptForm
from mesa_gguf.reading.reader import context_for, load_model, load_vocabulary

MAX_TOKENS = 24
Tail = Callable[[PromptForm, str], list[int]]


def in_one(text: str) -> Tail:
    """Document and question are one message."""
    return lambda form, question: form.tokenize(text.format(question=question)) + _template(form).tail


def in_two(reply: str, text: str) -> Tail:
    """The document is a message, the question another."""

    def tail(form: PromptForm, question: str) -> list[int]:
        before, behind, end = _template(form).around(1)
        return [*before, *form.tokenize(reply), *behind, *form.tokenize(text.format(question=question)), *end]

    return tail


def _template(form: PromptForm) -> Any:
    if form._template is None:
        raise SystemExit("this model has no chat template")
    return form._template


ASK = "I have read the text. What would you like to know?"
FORMS: dict[str, Tail] = {
    "one": in_one(QUESTION),
    "ends": in_one(f"The text ends here. Answer this question from the text above, briefly.\n\n{QUESTION}"),
    "few words": in_one(
        f"The text ends here. Using only the text above, answer the question in a few words.\n\n{QUESTION}"
    ),
    "according": in_one("According to the text above, {question} Answer in one short sentence."),
    "behind": in_one("{question} Answer briefly, from the text above."),
    "sentence": in_one(f"{QUESTION}\n\nAnswer this question with a short sentence, using the text above."),
    "two": in_two(ASK, "{question}"),
    "two, brief": in_two(ASK, "{question} Answer briefly, with what the text says."),
    "default": in_two(REPLY, ABOUT),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument(
        "--text", type=Path, help="a document or a folder; default: the documentation of Python's language"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, default=8192, help="of a document, in tokens")
    parser.add_argument("--read", default="auto", choices=["auto", "all"])
    parser.add_argument("--form", action="append", choices=list(FORMS), help="may be repeated; default: all of them")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    forms = {name: FORMS[name] for name in arguments.form or FORMS}
    haystack = Haystack(load_text([arguments.text]) if arguments.text else default_text())
    vocabulary = PromptForm(load_vocabulary(arguments.model))
    right: Counter[tuple[str, bool]] = Counter()
    asked: Counter[bool] = Counter()
    llm = load_model(
        arguments.model,
        mesa=MesaConfig(),
        n_ctx=context_for(arguments.length + 192, MAX_TOKENS),
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
    )
    for seed in arguments.seeds:
        document = make_document(
            haystack, seed, arguments.length, lambda text: len(vocabulary.tokenize(text)),
            n_unlike=8, n_alike=4, n_links=0, n_counts=0, n_absent=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            library.add_text(document.text, "document")
            reader = Reader(llm, library)
            for question in document.questions:
                alike = bool(document.facts[question.facts[0]].key)
                if question.form == "paraphrase" and not alike:
                    continue  # it shares no word with the fact, which `auto` does not find
                asked[alike] += 1
                for name, tail in forms.items():
                    reader.form = _Tailed(vocabulary.vocabulary, tail)
                    answer = reader.ask(question.text, read=arguments.read, max_tokens=MAX_TOKENS).answer
                    right[name, alike] += question.is_right(answer.text)
        for name in forms:
            row = [
                f"{right[name, alike]} of {asked[alike]} {'alike' if alike else 'unlike'}" for alike in (False, True)
            ]
            print(f"up to seed {seed}  {name:12} {', '.join(row)}", flush=True)


class _Tailed(PromptForm):
    """A form whose tail is another."""

    def __init__(self, vocabulary: Any, tail: Tail) -> None:
        super().__init__(vocabulary)
        self._tail = tail

    def tail(
        self, question: str, *, begun: str = "", history: Sequence[Any] = (), instructions: str | None = None
    ) -> list[int]:
        return self._tail(self, question)


if __name__ == "__main__":
    main()
