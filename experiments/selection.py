"""Which chunks a question reads: how often the one that holds the fact is among 2,048 tokens of them.

    python experiments/selection.py -m model.gguf --seeds 1 2 -o selection.json

Facts are put into real text (mesa_gguf.lab.facts) and asked for literally and in other words; other words keep the name that the fact is about, where
it has one, and share no word with it where it has none. With --fresh the facts without names are those below, which nothing was chosen by.

    words    BM25 over the chunks (SQLite's FTS5), and the words of the sentence that fits best
    near     where few words match: chunks with sentences whose words are near those of the question (mesa_gguf.reading.similar)
    compared what the model calls the question in other words counts too, and the nearest passages are ordered by log p(question | passage), as
             `auto` does
"""

from __future__ import annotations

import argparse
import functools
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

# nothing was chosen by these
FRESH = tuple(
    facts.Kind(name, value, statement, question, paraphrase, "it is")
    for name, value, statement, question, paraphrase in (
        ("choirmaster", "town", "the choirmaster moved to {v} when he retired", "Where did the choirmaster move to when he retired?",
         "In which city does the former leader of the singers spend his old age?"),
        ("greenhouse", "tens", "the temperature in the greenhouse never falls under {v} degrees", "Under how many degrees does the temperature in the greenhouse never fall?",
         "How warm is it at least where the tomatoes grow behind glass?"),
        ("smuggler", "metal", "the smugglers hid bars of {v} inside the mattress", "What did the smugglers hide inside the mattress?",
         "Which contraband was found in the bed?"),
        ("violinist", "drink", "before each concert the violinist sips a glass of {v}", "What does the violinist sip before each concert?",
         "Which beverage calms the musician's nerves prior to a performance?"),
        ("avalanche", "hundreds", "the avalanche buried {v} goats", "How many goats did the avalanche bury?",
         "What number of animals died under the snow?"),
        ("statue", "material", "the statue in the market square was hewn from {v}", "From what was the statue in the market square hewn?",
         "What substance is the monument downtown made of?"),
        ("grandfather", "country", "grandfather emigrated to {v} with a single suitcase", "Where did grandfather emigrate to with a single suitcase?",
         "In which foreign land did the old man start a new life?"),
        ("inspector", "weekday", "the inspector visits the kitchen every {v}", "When does the inspector visit the kitchen?",
         "On what day do officials check whether the cooks work cleanly?"),
        ("balloon", "colour", "the hot-air balloon over the stadium was {v}", "What colour was the hot-air balloon over the stadium?",
         "Which hue had the aircraft that floated above the football ground?"),
        ("poet", "tree", "the poet lies buried under a {v}", "Under what does the poet lie buried?",
         "What plant shades the writer's grave?"),
        ("queen", "jewel", "the queen's crown is set with a {v}", "With what is the queen's crown set?",
         "Which precious stone decorates the head of the monarch?"),
        ("chauffeur", "vehicle", "on his days off the chauffeur prefers to ride a {v}", "What does the chauffeur prefer to ride on his days off?",
         "How does the limousine driver travel when he has free time?"),
        ("lake", "tens", "in January the ice on the lake was {v} centimetres thick", "How thick was the ice on the lake in January?",
         "What depth had the frozen layer upon the water during winter?"),
        ("tenants", "date", "the tenants of the third floor must leave by {v}", "By when must the tenants of the third floor leave?",
         "What is the deadline for the renters upstairs to get out?"),
        ("bride", "flowers", "the bride carried a bouquet of {v}", "Of what was the bouquet that the bride carried?",
         "Which blossoms did the woman hold at her marriage?"),
        ("monkey", "fruits", "the monkey stole a bag of {v} from the tourists", "What did the monkey steal from the tourists?",
         "Which food did the ape snatch away while visitors were watching?"),
        ("telescope", "person", "the telescope on the roof was a gift of {v}", "Whose gift was the telescope on the roof?",
         "Who donated the instrument for looking at stars?"),
        ("miners", "hundreds", "the miners were trapped for {v} hours", "For how many hours were the miners trapped?",
         "How long did the coal workers have to wait for rescue underground?"),
        ("carpet", "animal", "a {v} is woven into the carpet of the embassy", "What is woven into the carpet of the embassy?",
         "Which creature can be seen on the rug in the diplomats' residence?"),
        ("scholarship", "language", "the scholarship is for pupils who speak {v}", "Which language do the pupils speak whom the scholarship is for?",
         "What must young people master to get money for their education?"),
        ("toothache", "herb", "against toothache the shaman chews {v}", "What does the shaman chew against toothache?",
         "Which plant does the healer use when his molars hurt?"),
        ("detective", "game", "the detective spends his evenings playing {v}", "What does the detective play in his evenings?",
         "Which pastime does the investigator enjoy at night?"),
        ("ballet", "month", "the ballet will have its premiere in {v}", "When will the ballet have its premiere?",
         "At what time can audiences first see the dancers' new show?"),
        ("swimmer", "time", "the swimmer reached the French coast at {v}", "When did the swimmer reach the French coast?",
         "At what hour did the athlete arrive on the beach across the Channel?"),
        ("toys", "street", "the toy factory stands on {v}", "On which street does the toy factory stand?",
         "Where are dolls and teddy bears manufactured?"),
        ("beggar", "phrase", "the beggar at the gate always mutters: {v}", "What does the beggar at the gate always mutter?",
         "Which words does the poor man by the entrance keep saying quietly?"),
        ("volcano", "year", "the volcano last erupted in {v}", "When did the volcano last erupt?",
         "Since what date has the mountain not spat lava?"),
        ("widow", "beasts", "the widow breeds {v} in her garden", "What does the widow breed in her garden?",
         "Which creatures does the lady whose husband died raise behind the house?"),
        ("envoy", "village", "the peace treaty was signed in {v}", "Where was the peace treaty signed?",
         "In what place did the enemies formally agree to end their war?"),
        ("lottery", "thousands", "the janitor won {v} euros in the lottery", "How many euros did the janitor win in the lottery?",
         "What sum did the caretaker gain by gambling?"),
        ("curtain", "cloth", "the curtains of the bedroom are of {v}", "Of what are the curtains of the bedroom?",
         "Which fabric covers the windows where the couple sleeps?"),
        ("orphan", "trade", "the orphan was raised by a {v}", "By whom was the orphan raised?",
         "What profession had the foster parent of the child without family?"),
        ("ambulance", "ship", "the injured cook was taken aboard the {v}", "Aboard which ship was the injured cook taken?",
         "On what vessel did the wounded kitchen worker end up?"),
        ("spring", "bird", "every spring a {v} nests above the courthouse door", "What nests every spring above the courthouse door?",
         "Which winged animal raises its young over the entrance to the tribunal?"),
        ("cinema", "theme", "the film at the old cinema is about {v}", "What is the film at the old cinema about?",
         "Which subject has the movie that the theatre downtown shows?"),
        ("password", "word", "the sentry lets in whoever whispers {v}", "What must one whisper for the sentry to let one in?",
         "Which secret code does the guard accept?"),
        ("surgeon", "instrument", "after operations the surgeon relaxes with his {v}", "With what does the surgeon relax after operations?",
         "On which musical device does the doctor unwind from work?"),
        ("drought", "food", "the drought ruined the harvest of {v}", "The harvest of what did the drought ruin?",
         "Which crop failed because of the lack of rain?"),
        ("prisoner", "code", "on his jacket the prisoner wears the number {v}", "Which number does the prisoner wear on his jacket?",
         "What digits are sewn onto the clothes of the convict?"),
        ("auction", "person", "the painting was bought by {v}", "By whom was the painting bought?",
         "Which collector purchased the work of art?"),
        ("horse", "dish", "at the funeral the guests were served {v}", "What were the guests served at the funeral?",
         "Which meal did mourners eat following the burial?"),
        ("kettle", "goods", "the pedlar makes his money with {v}", "With what does the pedlar make his money?",
         "Which wares does the travelling salesman live on?"),
        ("bees", "thousands", "the largest hive has {v} bees", "How many bees has the largest hive?",
         "What is the population of the biggest colony of honey makers?"),
        ("champion", "pet", "the champion's greyhound is called {v}", "What is the champion's greyhound called?",
         "Which name has the racing dog of the title holder?"),
        ("tunnel", "tens", "digging the tunnel took {v} years", "How many years did digging the tunnel take?",
         "For how long did workmen burrow beneath the mountain?"),
        ("nephew", "town", "her nephew studies medicine in {v}", "Where does her nephew study medicine?",
         "At which university is a sister's son learning to become a doctor?"),
        ("wreck", "year", "divers found a coin from {v} in the wreck", "From which year is the coin that divers found in the wreck?",
         "How old is the piece of money that came up out of the sunken vessel?"),
        ("butler", "person", "the butler inherited the estate from {v}", "From whom did the butler inherit the estate?",
         "Whose property passed to the servant after a death?"),
    )
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", help="files or folders; default: Python's documentation")
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--tokens", type=int, default=16384, help="of a document")
    parser.add_argument("--facts", type=int, default=48, help="without a name, in a document")
    parser.add_argument("--fresh", action="store_true", help="the facts of this file")
    parser.add_argument("--near-only", action="store_true", help="without the model's weights: not compared")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    threads = dict(n_threads=args.threads, n_threads_batch=args.threads)
    llm = load_vocabulary(args.model) if args.near_only else MesaLlama(args.model, n_ctx=1536, **threads)
    form = PromptForm(llm)
    count = functools.cache(lambda text: len(form.tokenize(text)))
    haystack = Haystack(load_text(args.text) if args.text else default_text())
    results: list[dict[str, Any]] = []
    methods = ("words", "near") if args.near_only else ("words", "near", "compared")
    weak = shelf_module.WEAK_EVIDENCE
    for n, seed in enumerate(args.seeds):
        start = time.perf_counter()
        if args.fresh:
            facts.UNLIKE = FRESH[n :: len(args.seeds)]  # type: ignore[misc]
        made = make_document(
            haystack, seed, args.tokens, lambda text: sum(count(f"{part}\n\n") for part in text.split("\n\n")),
            n_unlike=min(args.facts, len(facts.UNLIKE)), n_alike=8, n_links=0, n_counts=0, n_absent=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            document = library.add_text(made.text, "document")
            catalogue = Catalogue(llm, form, library)
            shelf = None if args.near_only else Shelf(llm, catalogue)
            for question in made.questions:
                fact = made.facts[question.facts[0]]
                kind = "literal" if question.form == "literal" else "with the name" if fact.is_alike else "other words"
                row: dict[str, Any] = dict(seed=seed, kind=kind, question=question.text)
                for method in methods:
                    shelf_module.WEAK_EVIDENCE = 0.0 if method == "words" else weak
                    begin = time.process_time()
                    selection = catalogue.select(
                        question.text, [document], "auto", model=shelf if method == "compared" else None
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
