"""Which chunks a question reads: how often the one that holds the fact is among 2,048 tokens of them.

    python experiments/selection.py -m model.gguf --seeds 1 2 -o selection.json

Facts are put into real text (mesa_gguf.lab.facts) and asked for literally and in other words; other words keep the name that the fact is about, where
it has one, and share no word with it where it has none. With --fresh N the facts without names are those
below, of the first list or the second.

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


def kinds(*rows: tuple[str, str, str, str, str]) -> tuple[facts.Kind, ...]:
    return tuple(
        facts.Kind(name, value, statement, question, paraphrase, "it is")
        for name, value, statement, question, paraphrase in rows
    )


# the method was not chosen by these, but how many tokens are read was
FRESH = kinds(
    ("plumber", "weekday", "the plumber can only come on {v}", "When can the plumber only come?",
     "Which day will somebody repair the leaking pipes?"),
    ("museum", "hundreds", "the museum owns {v} ancient vases", "How many ancient vases does the museum own?",
     "What is the size of the gallery's collection of old pottery?"),
    ("knight", "beasts", "the knight's shield was painted with {v}", "With what was the knight's shield painted?",
     "Which creatures adorned what the armoured rider held to protect himself?"),
    ("harbour master", "drink", "the harbour master starts each day with {v}", "With what does the harbour master start each day?",
     "Which beverage does the official at the docks take in the morning?"),
    ("gravedigger", "person", "the gravedigger once arrested {v}", "Whom did the gravedigger once arrest?",
     "Who was caught by the man from the cemetery?"),
    ("soprano", "town", "the soprano lost her voice in {v}", "Where did the soprano lose her voice?",
     "In which city could the opera singer no longer perform?"),
    ("elevator", "tens", "the elevator carries at most {v} passengers", "How many passengers does the elevator carry at most?",
     "What number of people may use the lift together?"),
    ("vineyard", "year", "the vineyard was planted in {v}", "When was the vineyard planted?",
     "Since what time have grapes grown on that hill?"),
    ("blanket", "cloth", "the baby's blanket is made of {v}", "Of what is the baby's blanket made?",
     "Which fabric keeps the infant warm?"),
    ("clockwork", "metal", "the wheels of the old clock are of {v}", "Of what are the wheels of the old clock?",
     "What are the gears of the antique timepiece forged from?"),
    ("mushroom", "tree", "the rarest mushrooms grow under a {v}", "Under what do the rarest mushrooms grow?",
     "Beside which plant can one find uncommon fungi?"),
    ("spy", "street", "the spy rented a flat on {v}", "On which street did the spy rent a flat?",
     "Where did the secret agent live?"),
    ("heiress", "thousands", "the heiress donated {v} books to the village", "How many books did the heiress donate to the village?",
     "What number of volumes did the rich woman give away?"),
    ("farmer", "animal", "a {v} escaped from the farmer's stable", "What escaped from the farmer's stable?",
     "Which creature ran away out of the barn?"),
    ("bus", "time", "the first bus to the airport departs at {v}", "When does the first bus to the airport depart?",
     "At what hour can passengers get a coach for their flight?"),
    ("painter", "colour", "the painter mixes every picture with a drop of {v}", "With a drop of what does the painter mix every picture?",
     "Which hue is found on all canvases of the artist?"),
    ("wedding", "date", "the wedding of the goldsmith takes place on {v}", "When does the wedding of the goldsmith take place?",
     "Which day does the jeweller get married?"),
    ("chef", "herb", "the chef refuses to cook with {v}", "With what does the chef refuse to cook?",
     "Which seasoning is never used in that kitchen?"),
    ("senator", "country", "the senator hid his fortune in {v}", "Where did the senator hide his fortune?",
     "In what foreign nation did the politician conceal money?"),
    ("doll", "material", "the eyes of the doll are of {v}", "Of what are the eyes of the doll?",
     "Which substance does the toy look at you with?"),
    ("band", "instrument", "the new band still needs somebody for the {v}", "For what does the new band still need somebody?",
     "Which musician is missing in the young group?"),
    ("sculptor", "fruits", "the sculptor's only still life shows {v}", "What does the sculptor's only still life show?",
     "Which food is seen on the one picture by the man who carves stone?"),
    ("desert", "hundreds", "the caravan crossed {v} kilometres of desert", "How many kilometres of desert did the caravan cross?",
     "What distance did the camels walk through the sand?"),
    ("quarrel", "game", "the brothers quarrelled over a round of {v}", "Over a round of what did the brothers quarrel?",
     "Which pastime made the siblings fight?"),
    ("pirate", "jewel", "the pirate swallowed a {v}", "What did the pirate swallow?",
     "Which gem ended up in the stomach of the sea robber?"),
    ("priest", "vehicle", "the priest fell off a {v}", "What did the priest fall off?",
     "In which traffic accident was the clergyman hurt?"),
    ("monument", "month", "the monument will be unveiled in {v}", "When will the monument be unveiled?",
     "At what date can the public see the memorial?"),
    ("translator", "language", "the manual was translated from {v}", "From which language was the manual translated?",
     "What tongue were the instructions originally written in?"),
    ("orchid", "flowers", "the judge decorates her office with {v}", "With what does the judge decorate her office?",
     "Which blossoms stand in the room of the magistrate?"),
    ("cobbler", "trade", "the cobbler's son became a {v}", "What did the cobbler's son become?",
     "Which profession did the boy of the shoemaker choose?"),
    ("cupboard", "goods", "behind the cupboard the police discovered {v}", "What did the police discover behind the cupboard?",
     "Which merchandise did officers find hidden by the furniture?"),
    ("trout", "thousands", "the river was stocked with {v} trout", "With how many trout was the river stocked?",
     "What number of fish were released into the stream?"),
    ("nun", "bird", "the nun has tamed a {v}", "What has the nun tamed?",
     "Which winged creature obeys the sister from the convent?"),
    ("banquet", "dish", "the banquet ended with {v}", "With what did the banquet end?",
     "Which course was served last during the feast?"),
    ("astronaut", "pet", "the astronaut misses her cat {v}", "Which cat does the astronaut miss?",
     "What is the name of the animal that the space traveller left at home?"),
    ("slogan", "phrase", "the slogan of the miners' strike was: {v}", "What was the slogan of the miners' strike?",
     "Which words did the coal workers shout as they laid down their tools?"),
    ("cable", "ship", "the undersea cable was laid by the {v}", "Which ship laid the undersea cable?",
     "What vessel put the wire on the ocean floor?"),
    ("refugee", "village", "the refugees found shelter in {v}", "Where did the refugees find shelter?",
     "What place took in those who had fled from war?"),
    ("opera", "theme", "the composer's last opera deals with {v}", "What does the composer's last opera deal with?",
     "Which subject has the final stage work of the musician?"),
    ("bomb", "word", "the bomb is disarmed by saying {v}", "By saying what is the bomb disarmed?",
     "What must one utter so that the explosive does not go off?"),
    ("vault", "code", "the banker's vault opens with {v}", "With what does the banker's vault open?",
     "Which digits give access to where the money is stored?"),
    ("beekeeper", "food", "the beekeeper trades honey for {v}", "For what does the beekeeper trade honey?",
     "Which groceries does the owner of the hives get in exchange?"),
    ("marathon", "person", "the marathon was won by {v}", "Who won the marathon?",
     "Which runner came first in the long race?"),
    ("tower", "tens", "the church tower leans by {v} degrees", "By how many degrees does the church tower lean?",
     "How crooked is the steeple?"),
    ("ghost", "hundreds", "guests of the hotel saw a ghost in room {v}", "In which room did guests of the hotel see a ghost?",
     "Where did travellers who stayed overnight meet a phantom?"),
    ("tax", "town", "the tax office was moved to {v}", "Where was the tax office moved to?",
     "In which city do revenue officials work now?"),
    ("dentist", "year", "the dentist bought his drill in {v}", "When did the dentist buy his drill?",
     "How old is the tool for treating teeth?"),
    ("ballroom", "person", "the ballroom is named after {v}", "After whom is the ballroom named?",
     "Who is honoured by what the hall for dancing is called?"),
)  # fmt: skip

# nothing was chosen by these
SECOND = kinds(
    ("lighthouse keeper", "bird", "the lighthouse keeper feeds a {v}", "What does the lighthouse keeper feed?",
     "Which feathered guest is given crumbs by the man who guards the coast?"),
    ("widow", "jewel", "the widow pawned a {v}", "What did the widow pawn?",
     "Which gem was left as security by the lady whose husband had died?"),
    ("tailor", "cloth", "the tailor lined the coat with {v}", "With what did the tailor line the coat?",
     "Which fabric is on the inside of the garment?"),
    ("firefighters", "street", "the firefighters saved a kitten on {v}", "On which street did the firefighters save a kitten?",
     "Where was a young cat rescued from the flames?"),
    ("orphan", "person", "the orphan was adopted by {v}", "By whom was the orphan adopted?",
     "Who took in the child without parents?"),
    ("brewery", "year", "the brewery burned down in {v}", "When did the brewery burn down?",
     "Since what time has there been no beer because of the fire?"),
    ("mayor", "vehicle", "the mayor goes to work by {v}", "By what does the mayor go to work?",
     "How does the head of the town hall commute?"),
    ("hunter", "animal", "the hunter stumbled over a {v}", "Over what did the hunter stumble?",
     "Which creature made the man with the rifle trip?"),
    ("professor", "language", "the professor dreams in {v}", "In which language does the professor dream?",
     "What tongue does the scholar use while asleep?"),
    ("cathedral", "hundreds", "the stairs of the cathedral have {v} steps", "How many steps have the stairs of the cathedral?",
     "What must one climb inside the great church?"),
    ("perfume", "flowers", "the perfume smells of {v}", "Of what does the perfume smell?",
     "Which blossoms does the fragrance remind one of?"),
    ("thief", "goods", "the thief stole a waggon of {v}", "A waggon of what did the thief steal?",
     "Which merchandise was taken by the robber?"),
    ("dragon", "metal", "the dragon's cage is made of {v}", "Of what is the dragon's cage made?",
     "Which ore was melted to lock up the fire-breathing monster?"),
    ("grandfather", "instrument", "grandfather plays the {v} at night", "What does grandfather play at night?",
     "On what does the old man make music after dark?"),
    ("queen", "dish", "the queen's favourite meal is {v}", "What is the queen's favourite meal?",
     "What does Her Majesty like best to eat?"),
    ("shepherd", "tree", "lightning killed the shepherd beneath a {v}", "Beneath what did lightning kill the shepherd?",
     "Where did the man with the flock die in the thunderstorm?"),
    ("bride", "colour", "the bride wore shoes of {v}", "What colour were the shoes that the bride wore?",
     "In which hue was the footwear of the woman who got married?"),
    ("glacier", "tens", "the glacier shrinks each summer by {v} metres", "By how many metres does the glacier shrink each summer?",
     "How much of the ice melts in the warm season?"),
    ("poet", "month", "the poet intends to finish the epic in {v}", "When does the poet intend to finish the epic?",
     "At what date will the writer's long verse be complete?"),
    ("barber", "town", "the barber learned shaving in {v}", "Where did the barber learn shaving?",
     "In which city was the man who cuts hair trained?"),
    ("kidnapper", "thousands", "the kidnappers demanded {v} dollars", "How many dollars did the kidnappers demand?",
     "What ransom was asked for by those who held the hostage?"),
    ("sailors", "drink", "the sailors got drunk on {v}", "On what did the sailors get drunk?",
     "Which beverage made the crew tipsy?"),
    ("magician", "beasts", "the magician pulled {v} out of his hat", "What did the magician pull out of his hat?",
     "Which creatures did the conjurer produce?"),
    ("chimney", "weekday", "the chimney is swept every {v}", "When is the chimney swept?",
     "Which day does somebody remove the soot?"),
    ("grammar school", "time", "lessons start at {v}", "When do lessons start?",
     "At what hour must pupils be in class?"),
    ("invention", "trade", "the zipper was devised by a {v}", "By whom was the zipper devised?",
     "What was the profession of the inventor of that fastener?"),
    ("dungeon", "word", "somebody scratched {v} into the wall of the dungeon", "What did somebody scratch into the wall of the dungeon?",
     "What had the prisoner carved on the stones of his cell?"),
    ("submarine", "ship", "the submarine torpedoed the {v}", "What did the submarine torpedo?",
     "Which vessel was sunk from under water?"),
    ("millionaire", "country", "the millionaire pays no taxes in {v}", "Where does the millionaire pay no taxes?",
     "In which state does the rich man owe the treasury nothing?"),
    ("tunnel", "thousands", "the tunnel has a length of {v} metres", "What length has the tunnel?",
     "How far does one drive through the mountain?"),
    ("allergy", "food", "the waiter is allergic to {v}", "To what is the waiter allergic?",
     "Which groceries give the man who serves tables a rash?"),
    ("quarry", "material", "the workmen found a figure of {v}", "A figure of what did the workmen find?",
     "Which substance was the statue that the labourers dug up?"),
    ("drummer", "game", "the drummer lost his savings at {v}", "At what did the drummer lose his savings?",
     "Through which pastime was the percussionist ruined?"),
    ("parrot", "phrase", "the parrot keeps saying: {v}", "What does the parrot keep saying?",
     "Which words does the talking bird repeat?"),
    ("snowstorm", "village", "the snowstorm cut off {v}", "What did the snowstorm cut off?",
     "Which hamlet could not be reached in the blizzard?"),
    ("lawyer", "theme", "the lawyer gave a lecture on {v}", "On what did the lawyer give a lecture?",
     "What subject did the attorney talk about?"),
    ("safe", "parcel", "the key to the apartment lies in box {v}", "In which box does the key to the apartment lie?",
     "Where is what unlocks the flat?"),
    ("telephone", "code", "the number of the hospital is {v}", "What is the number of the hospital?",
     "Which digits must one dial to reach a doctor?"),
    ("cemetery", "date", "the general was buried on {v}", "When was the general buried?",
     "Which day was the funeral of the army commander?"),
    ("salad", "herb", "the secret of the salad is {v}", "What is the secret of the salad?",
     "Which seasoning makes the lettuce so good?"),
    ("nurse", "pet", "the nurse bought her hamster {v} a wheel", "Which hamster got a wheel from the nurse?",
     "What is the little rodent called that the woman in the ward keeps?"),
    ("jam", "fruits", "the convent cooks jam of {v}", "Of what does the convent cook jam?",
     "From which crop do the sisters make their sweet spread?"),
    ("bell", "year", "the bell was cast in {v}", "When was the bell cast?",
     "How old is what rings in the steeple?"),
    ("dam", "tens", "the dam supplies {v} factories", "How many factories does the dam supply?",
     "What number of plants get electricity from the reservoir?"),
    ("duel", "person", "the count was wounded in a duel by {v}", "By whom was the count wounded in a duel?",
     "Which opponent hurt the nobleman as they fought with pistols?"),
    ("inn", "hundreds", "a bed at the inn costs {v} dollars", "How many dollars does a bed at the inn cost?",
     "What is the price to stay overnight in the tavern?"),
    ("explorer", "town", "the explorer fell ill in {v}", "Where did the explorer fall ill?",
     "In which city did the traveller catch a fever?"),
    ("puppet", "vehicle", "the puppet theatre travels by {v}", "By what does the puppet theatre travel?",
     "How do the marionettes get from place to place?"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", help="files or folders; default: Python's documentation")
    parser.add_argument("--seeds", nargs="+", default=["1"])
    parser.add_argument("--tokens", type=int, default=16384, help="of a document")
    parser.add_argument("--facts", type=int, default=48, help="without a name, in a document")
    parser.add_argument("--names", type=int, default=8, help="facts with a name, in a document")
    parser.add_argument("--links", type=int, default=0, help="questions over two of those, by way of another name")
    parser.add_argument(
        "--counts", type=int, default=0, help="questions of how many of five names there is one of those"
    )
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="of tokens, beside 2,048")
    parser.add_argument(
        "--fresh", type=int, nargs="?", const=1, choices=(1, 2), help="the facts of this file: which list"
    )
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
            facts.UNLIKE = (FRESH, SECOND)[args.fresh - 1][n :: len(args.seeds)]  # type: ignore[misc]
        made = make_document(
            haystack, seed, args.tokens, lambda text: sum(count(f"{part}\n\n") for part in text.split("\n\n")),
            n_unlike=min(args.facts, len(facts.UNLIKE)), n_alike=args.names, n_links=args.links,
            n_counts=args.counts, n_absent=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            document = library.add_text(made.text, "document")
            catalogue = Catalogue(llm, form, library)
            shelf = None if args.near_only else Shelf(llm, catalogue)
            for question in made.questions:
                sentences = [made.facts[i].sentence for i in question.facts]
                kind: str = question.form
                if kind == "paraphrase":
                    kind = "with the name" if made.facts[question.facts[0]].is_alike else "other words"
                row: dict[str, Any] = dict(seed=seed, kind=kind, question=question.text)
                for method in methods:
                    shelf_module.WEAK_EVIDENCE = 0.0 if method == "words" else weak
                    begin = time.process_time()
                    selection = catalogue.select(
                        question.text, [document], "auto", model=shelf if method == "compared" else None
                    )
                    row[method] = all(any(text in piece.text for piece in selection.pieces) for text in sentences)
                    row[f"{method} CPU seconds"] = round(time.process_time() - begin, 4)
                    row[f"{method} passages"] = selection.compared
                for tokens in args.budgets:  # what the model tells of the question is remembered
                    selection = catalogue.select(question.text, [document], tokens, model=shelf)
                    row[f"{tokens} tokens"] = all(
                        any(text in piece.text for piece in selection.pieces) for text in sentences
                    )
                results.append(row)
                if args.output:
                    args.output.write_text(json.dumps(results, indent=1))
            n_chunks = len(catalogue.rows(document))
        print(f"after document {seed}: {n_chunks} chunks, {time.perf_counter() - start:.0f} s")
        for kind in dict.fromkeys(result["kind"] for result in results):
            of = [result for result in results if result["kind"] == kind]
            print(f"  {kind}, {len(of)}:")
            for tokens in args.budgets:
                n = sum(result[f"{tokens} tokens"] for result in of)
                low, high = wilson(n, len(of))
                print(f"    {tokens:5} tokens {n / len(of):.2f} [{low:.2f}, {high:.2f}]")
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
