"""Which chunks a question reads: how often the one that holds the fact is among 2,048 tokens of them.

    python experiments/selection.py -m model.gguf --seeds 1 2 -o selection.json

Facts are put into real text (mesa_gguf.lab.facts) and asked for literally and in other words; other words keep the name that the fact is about, where
it has one, and share no word with it where it has none. With --fresh the facts without names are those below, which nothing was chosen by.

    words    BM25 over the chunks (SQLite's FTS5), and the words of the sentence that fits best
    near     where few words match: chunks with passages whose words are near those of the question (mesa_gguf.reading.similar)
    compared the same, and the nearest passages ordered by log p(question | passage), as `auto` does
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mesa_gguf import Library, MesaLlama
from mesa_gguf.lab import facts
from mesa_gguf.lab.evaluate.scoring import wilson
from mesa_gguf.lab.facts import Haystack, default_text, load_text, make_document
from mesa_gguf.reading import shelf as shelf_module
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Shelf

# written after the method was chosen
FRESH = tuple(
    facts.Kind(name, value, statement, question, paraphrase, "it is")
    for name, value, statement, question, paraphrase in (
        ("sheriff", "colour", "the sheriff's horse has a {v} mane", "What mane has the sheriff's horse?",
         "Which hue is the hair of the animal that the lawman rides?"),
        ("quilt", "cloth", "grandmother sewed the quilt out of {v}", "What did grandmother sew the quilt out of?",
         "Which textile did the old lady stitch into a blanket?"),
        ("landlord", "hundreds", "the monthly rent of the attic is {v} crowns", "What is the monthly rent of the attic?",
         "How much must a tenant pay to live under the roof?"),
        ("pilot", "town", "because of fog the aeroplane landed in {v}", "Where did the aeroplane land because of fog?",
         "At which airport did the jet come down when nobody could see?"),
        ("wine", "year", "the oldest bottle in the count's cellar dates from {v}", "What does the oldest bottle in the count's cellar date from?",
         "What vintage is the nobleman's most ancient wine?"),
        ("lawyer", "person", "the defendant was represented by {v}", "Who represented the defendant?",
         "Which attorney spoke for the accused in court?"),
        ("glacier", "tens", "each year the glacier shrinks by {v} metres", "By how many metres does the glacier shrink each year?",
         "How fast does the ice on the mountain melt annually?"),
        ("baby", "date", "the baby took her first steps on {v}", "When did the baby take her first steps?",
         "On what day did the infant begin to walk?"),
        ("novel", "person", "the novel that won the prize was written by {v}", "Who wrote the novel that won the prize?",
         "Which author got an award for a book?"),
        ("castle", "beasts", "the tapestries in the castle show {v}", "What do the tapestries in the castle show?",
         "Which creatures are woven into the wall hangings of the fortress?"),
        ("burglar", "time", "the burglar broke the window at {v}", "When did the burglar break the window?",
         "What was the hour that the thief smashed the glass?"),
        ("sailor", "animal", "on his arm the sailor has a tattoo of a {v}", "Of what has the sailor a tattoo on his arm?",
         "What picture is inked into the skin of the seaman?"),
        ("cheese", "herb", "the shepherd flavours his cheese with {v}", "With what does the shepherd flavour his cheese?",
         "Which seasoning is in the dairy product from the man with the sheep?"),
        ("fire", "street", "the fire started in a garage on {v}", "On which street did the fire start in a garage?",
         "Where did the blaze break out among parked cars?"),
        ("piano", "material", "the lid of the grand piano is inlaid with {v}", "With what is the lid of the grand piano inlaid?",
         "Which substance decorates the cover of the big keyboard instrument?"),
        ("president", "country", "the first state visit of the president was to {v}", "Where was the first state visit of the president to?",
         "Which nation did the head of government travel to at the start?"),
        ("tailor", "weekday", "the tailor delivers trousers every {v}", "When does the tailor deliver trousers?",
         "On what day does the man with needle and thread bring pants?"),
        ("earthquake", "thousands", "the earthquake damaged {v} houses", "How many houses did the earthquake damage?",
         "What number of homes suffered when the ground shook?"),
        ("student", "language", "for her exam the student learns {v}", "What does the student learn for her exam?",
         "Which foreign tongue does the girl at university study before the test?"),
        ("storm", "tree", "the storm uprooted a {v} beside the school", "What did the storm uproot beside the school?",
         "Which plant fell in the gale next to the classrooms?"),
        ("salary", "thousands", "the director earns {v} francs", "How many francs does the director earn?",
         "What wage does the boss get?"),
        ("puppy", "fruits", "the puppy is afraid of {v}", "What is the puppy afraid of?",
         "Which food scares the young hound?"),
        ("magazine", "month", "the magazine will stop printing in {v}", "When will the magazine stop printing?",
         "At what time does the periodical cease publication?"),
        ("clinic", "drink", "in the hospital the patients get {v} for breakfast", "What do the patients get for breakfast in the hospital?",
         "Which beverage are sick people served in the morning?"),
    )
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", help="files or folders; default: Python's documentation")
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--tokens", type=int, default=16384, help="of a document")
    parser.add_argument("--fresh", action="store_true", help="the facts of this file")
    parser.add_argument("--near-only", action="store_true", help="without the model's weights: not compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    if args.fresh:
        facts.UNLIKE = FRESH  # type: ignore[misc]
    threads = dict(n_threads=args.threads, n_threads_batch=args.threads)
    llm = load_vocabulary(args.model) if args.near_only else MesaLlama(args.model, n_ctx=1536, **threads)
    form = PromptForm(llm)
    haystack = Haystack(load_text(args.text) if args.text else default_text())
    results: list[dict[str, Any]] = []
    methods = ("words", "near") if args.near_only else ("words", "near", "compared")
    weak = shelf_module.WEAK_EVIDENCE
    for seed in args.seeds:
        start = time.perf_counter()
        made = make_document(
            haystack, seed, args.tokens, lambda text: len(form.tokenize(text)),
            n_unlike=24, n_alike=8, n_links=0, n_counts=0, n_absent=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            document = library.add_text(made.text, "document")
            catalogue = Catalogue(llm, form, library)
            likelihoods = None if args.near_only else Shelf(llm, catalogue).likelihoods
            for question in made.questions:
                fact = made.facts[question.facts[0]]
                kind = "literal" if question.form == "literal" else "with the name" if fact.is_alike else "other words"
                row: dict[str, Any] = dict(seed=seed, kind=kind, question=question.text)
                for method in methods:
                    shelf_module.WEAK_EVIDENCE = 0.0 if method == "words" else weak
                    begin = time.process_time()
                    selection = catalogue.select(
                        question.text, [document], "auto", likelihoods=likelihoods if method == "compared" else None
                    )
                    row[method] = any(fact.sentence in piece.text for piece in selection.pieces)
                    row[f"{method} CPU seconds"] = round(time.process_time() - begin, 4)
                    row[f"{method} passages"] = selection.compared
                results.append(row)
                if args.output:
                    args.output.write_text(json.dumps(results, indent=1))
            n_chunks = len(catalogue.rows(document))
        print(f"after document {seed}: {n_chunks} chunks, {time.perf_counter() - start:.0f} s")
        for kind in ("literal", "with the name", "other words"):
            of = [result for result in results if result["kind"] == kind]
            print(f"  {kind}, {len(of)}:")
            for method in methods:
                n = sum(result[method] for result in of)
                low, high = wilson(n, len(of))
                seconds = sorted(result[f"{method} CPU seconds"] for result in of)[len(of) // 2]
                compared = sum(result[f"{method} passages"] > 0 for result in of)
                print(
                    f"    {method:9} {n / len(of):.2f} [{low:.2f}, {high:.2f}], {seconds:.2f} CPU seconds, {compared} compared",
                    flush=True,
                )


if __name__ == "__main__":
    main()
