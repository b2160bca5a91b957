"""Which chunks a question reads: how often the one that holds the fact is among 2,048 tokens of them.

    python experiments/selection.py -m model.gguf --seeds 1 2 -o selection.json

Facts are put into real text (mesa_gguf.lab.facts) and asked for literally and in other words; other words keep the name that the fact is about, where
it has one, and share no word with it where it has none. With --fresh N the facts without names are those
below, of one of seven lists.

    words    BM25 over the chunks (SQLite's FTS5), and the words of the sentence that fits best
    near     where few words match: chunks with sentences whose words are near those of the question (mesa_gguf.reading.similar)
    compared what the model calls the question in other words counts too, and the nearest passages are ordered by log p(question | passage), as
             `auto` does where the chunks were not read yet
    values   passages with the sentences whose tokens' values are near those of the sentences that the model writes (mesa_gguf.reading.values) are
             ordered with them, as `auto` does where the chunks were read; with --read
    embedded as compared, with passages that an embedding model finds (mesa_gguf.reading.embeddings); with --embedding-model
    all      as values, with those passages; with --read and --embedding-model
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesa_gguf import EmbeddingModel, Library, MesaLlama
from mesa_gguf.lab import facts
from mesa_gguf.lab.evaluate.scoring import wilson
from mesa_gguf.lab.facts import Haystack, default_text, load_text, make_document
from mesa_gguf.reading import shelf as shelf_module
from mesa_gguf.reading.prompts import PromptForm
from mesa_gguf.reading.reader import load_vocabulary
from mesa_gguf.reading.shelf import Catalogue, Piece, Shelf


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


# that passages by words and by values are compared by the likelihood was chosen by these, and by the first list
THIRD = kinds(
    ("blacksmith", "metal", "the blacksmith hammered a crown of {v}", "Of what did the blacksmith hammer a crown?",
     "What is the headgear of the king made from?"),
    ("midwife", "vehicle", "the midwife arrived on a {v}", "On what did the midwife arrive?",
     "How did the woman who helps at births get there?"),
    ("cellar", "hundreds", "the flood left {v} litres of water in the cellar", "How many litres of water did the flood leave in the cellar?",
     "What quantity had to be pumped out of the basement?"),
    ("actress", "country", "the actress spends every winter in {v}", "Where does the actress spend every winter?",
     "In which nation does the star of the stage stay during the cold season?"),
    ("coachman", "drink", "the coachman smelled of {v}", "Of what did the coachman smell?",
     "Which beverage had the driver of the carriage apparently consumed?"),
    ("pond", "flowers", "ducks built a nest among the {v}", "Among what did ducks build a nest?",
     "In which blossoms did waterfowl hatch their eggs?"),
    ("carpenter", "tree", "the carpenter carved the cradle from {v}", "From what did the carpenter carve the cradle?",
     "Which timber was used for the bed of the newborn?"),
    ("detective", "street", "the detective lost the suspect on {v}", "On which street did the detective lose the suspect?",
     "Where did the person under investigation shake off the sleuth?"),
    ("aunt", "thousands", "my aunt inherited {v} acres of forest", "How many acres of forest did my aunt inherit?",
     "What area of woodland came to a relative after a death?"),
    ("examination", "weekday", "the examination was postponed to {v}", "To which day was the examination postponed?",
     "When will the test be held after the delay?"),
    ("baron", "game", "the baron cheats at {v}", "At what does the baron cheat?",
     "In which pastime is the aristocrat dishonest?"),
    ("ambulance", "time", "the ambulance reached the accident at {v}", "When did the ambulance reach the accident?",
     "At what hour did paramedics come to the crash?"),
    ("shipwreck", "goods", "divers recovered {v} from the shipwreck", "What did divers recover from the shipwreck?",
     "Which merchandise was brought up out of the sunken vessel?"),
    ("monk", "language", "the monk copied a book written in {v}", "In which language was the book that the monk copied?",
     "What tongue did the manuscript from the abbey use?"),
    ("champion", "person", "the chess champion was beaten by {v}", "By whom was the chess champion beaten?",
     "Who defeated the best player at the board?"),
    ("butcher", "animal", "the butcher's sign shows a {v}", "What does the butcher's sign show?",
     "Which creature is depicted above the meat shop?"),
    ("prophet", "year", "the prophet foretold that the world would end in {v}", "When would the world end, as the prophet foretold?",
     "For what date did the seer announce the apocalypse?"),
    ("skater", "town", "the skater broke her ankle in {v}", "Where did the skater break her ankle?",
     "In which city did the athlete on the ice injure a joint?"),
    ("governess", "bird", "the governess wore a hat with the feather of a {v}", "The feather of what did the governess wear on her hat?",
     "From which winged animal came the plume on the head of the private teacher?"),
    ("curtain", "colour", "the curtains of the theatre are {v}", "What colour are the curtains of the theatre?",
     "Which hue is the drapery in front of the stage?"),
    ("grocer", "food", "the grocer ran out of {v}", "Of what did the grocer run out?",
     "Which product was no longer in stock at the corner shop?"),
    ("oath", "word", "the members of the lodge greet each other with {v}", "With what do the members of the lodge greet each other?",
     "What do the brothers of the secret society say when they meet?"),
    ("engineer", "tens", "the engineer holds {v} patents", "How many patents does the engineer hold?",
     "What number of inventions has the technician registered?"),
    ("stepmother", "jewel", "the stepmother hid the {v} in a shoe", "What did the stepmother hide in a shoe?",
     "Which gem was concealed in footwear by dad's second wife?"),
    ("corporal", "month", "the corporal deserted in {v}", "When did the corporal desert?",
     "At what time of year did the soldier run away from the army?"),
    ("attic", "instrument", "in the attic lay a broken {v}", "What lay broken in the attic?",
     "What damaged thing to make music with was kept under the roof?"),
    ("swimmer", "beasts", "the swimmer is terrified of {v}", "Of what is the swimmer terrified?",
     "Which creatures frighten the man in the pool?"),
    ("lamp", "material", "the base of the lamp is of {v}", "Of what is the base of the lamp?",
     "On what substance does the light stand?"),
    ("apprentice", "trade", "the apprentice would rather be a {v}", "What would the apprentice rather be?",
     "Which profession does the trainee actually wish for?"),
    ("funeral", "dish", "the mourners were served {v}", "What were the mourners served?",
     "Which meal did those get who came to say farewell to the dead?"),
    ("chapel", "village", "the bishop consecrated a chapel in {v}", "Where did the bishop consecrate a chapel?",
     "In which hamlet did a high cleric bless a small church?"),
    ("ferryman", "pet", "the ferryman's dog is called {v}", "What is the ferryman's dog called?",
     "Which name has the animal of the man who takes people across the river?"),
    ("jury", "date", "the jury will give its verdict on {v}", "When will the jury give its verdict?",
     "Which day is the court's decision expected?"),
    ("candle", "herb", "the candle gives off a scent of {v}", "Of what does the candle give off a scent?",
     "Which plant can one smell while the wax burns?"),
    ("regiment", "cloth", "the regiment got new uniforms of {v}", "Of what are the new uniforms that the regiment got?",
     "Which fabric do the troops wear these days?"),
    ("emperor", "phrase", "the last words of the emperor were: {v}", "What were the last words of the emperor?",
     "What did the monarch say before he died?"),
    ("submission", "theme", "the student wrote her thesis about {v}", "About what did the student write her thesis?",
     "Which subject did the young woman choose for the dissertation at university?"),
    ("whaler", "ship", "the whale rammed the {v}", "What did the whale ram?",
     "Which vessel was hit by a giant of the sea?"),
    ("locker", "code", "the locker at the station opens with {v}", "With what does the locker at the station open?",
     "Which digits does one need for the luggage by the trains?"),
    ("bakery", "fruits", "the bakery fills its tarts with {v}", "With what does the bakery fill its tarts?",
     "What is inside the pastry from that shop?"),
    ("sleepwalker", "person", "the sleepwalker frightened {v}", "Whom did the sleepwalker frighten?",
     "Who was scared by somebody wandering about in the dark with closed eyes?"),
    ("volcano", "hundreds", "the volcano buried {v} houses", "How many houses did the volcano bury?",
     "What number of homes was covered by lava?"),
    ("rebels", "town", "the rebels set up their headquarters in {v}", "Where did the rebels set up their headquarters?",
     "From which city did the insurgents direct the uprising?"),
    ("well", "tens", "the well is {v} metres deep", "How many metres deep is the well?",
     "How far down does one have to lower the bucket?"),
    ("stamp", "thousands", "the collector paid {v} dollars for a stamp", "How many dollars did the collector pay for a stamp?",
     "What was the price of the little piece of postage?"),
    ("umbrella", "vehicle", "the widower left his umbrella on a {v}", "On what did the widower leave his umbrella?",
     "Where did the man forget what keeps off the rain?"),
    ("snake charmer", "animal", "the acrobat rides on a {v}", "On what does the acrobat ride?",
     "Which creature carries the performer in the circus?"),
    ("treaty", "year", "the treaty was signed in {v}", "When was the treaty signed?",
     "Since what time have the two states been at peace?"),
)  # fmt: skip


# nothing was chosen by these
FOURTH = kinds(
    ("goalkeeper", "animal", "the goalkeeper has a tattoo of a {v}", "Of what does the goalkeeper have a tattoo?",
     "Which creature is inked on the skin of the man between the posts?"),
    ("rent", "weekday", "the rent falls due every {v}", "When does the rent fall due?",
     "Which day must one pay for the lodgings?"),
    ("foal", "date", "the mare gave birth to a foal on {v}", "When did the mare give birth to a foal?",
     "Which day did the young horse come into the world?"),
    ("boxer", "hundreds", "the boxer skips rope {v} times a day", "How many times a day does the boxer skip rope?",
     "What number of jumps belongs to the fighter's training?"),
    ("mummy", "metal", "the mummy was wearing a mask of {v}", "Of what was the mask that the mummy was wearing?",
     "Which ore covered the face of the embalmed pharaoh?"),
    ("pickpocket", "person", "the pickpocket was recognised by {v}", "By whom was the pickpocket recognised?",
     "Who identified the crook that stole purses in the crowd?"),
    ("hurricane", "town", "the hurricane flattened the harbour of {v}", "The harbour of which town did the hurricane flatten?",
     "Which city's docks were razed by the terrible storm?"),
    ("surgeon", "instrument", "the surgeon relaxes by playing the {v}", "By playing what does the surgeon relax?",
     "On what does the man with the scalpel make music to unwind?"),
    ("headmistress", "colour", "the headmistress always signs in {v}", "In what colour does the headmistress always sign?",
     "Which hue is the ink of the woman who runs the school?"),
    ("sorbet", "fruits", "the sorbet is made from {v}", "From what is the sorbet made?",
     "Which crop gives the frozen dessert its flavour?"),
    ("pensioners", "game", "the pensioners meet in the park for {v}", "For what do the pensioners meet in the park?",
     "Which pastime brings retired people together among the lawns?"),
    ("gladiator", "beasts", "the gladiator had to fight {v}", "What did the gladiator have to fight?",
     "Against which creatures was the Roman slave sent into the arena?"),
    ("sofa", "cloth", "the sofa is covered in {v}", "In what is the sofa covered?",
     "Which fabric was the couch upholstered with?"),
    ("sentry", "time", "the sentry is relieved at {v}", "When is the sentry relieved?",
     "At what hour does another soldier take over guarding the gate?"),
    ("smuggler", "goods", "the smuggler filled a coffin with {v}", "With what did the smuggler fill a coffin?",
     "Which merchandise crossed the border where a corpse should have lain?"),
    ("princess", "jewel", "the princess hurled a {v} into the fire", "What did the princess hurl into the fire?",
     "Which gem was thrown in the flames by the daughter of the king?"),
    ("optician", "street", "the optician opened a shop on {v}", "On which street did the optician open a shop?",
     "Where can one now be fitted with new glasses?"),
    ("conductor", "dish", "the conductor orders {v} after each concert", "What does the conductor order after each concert?",
     "Which meal does the man with the baton have when the symphony ends?"),
    ("philosopher", "tree", "the philosopher fell asleep under a {v}", "Under what did the philosopher fall asleep?",
     "Below which plant did the great thinker take a nap?"),
    ("burglar", "vehicle", "the burglar fled on a {v}", "On what did the burglar flee?",
     "How did the intruder get away from the house?"),
    ("cheese", "herb", "the cheese is wrapped in leaves of {v}", "In leaves of what is the cheese wrapped?",
     "Which plant surrounds the food made of curdled milk?"),
    ("novelist", "country", "the novelist was deported from {v}", "From where was the novelist deported?",
     "Which nation threw the author out?"),
    ("bathtub", "material", "the bathtub was hewn from {v}", "From what was the bathtub hewn?",
     "Which substance does one lie on while having a soak?"),
    ("scouts", "drink", "the scouts warmed themselves with {v}", "With what did the scouts warm themselves?",
     "Which beverage kept the boys at the camp from freezing?"),
    ("convict", "tens", "the convict served a sentence of {v} years", "A sentence of how many years did the convict serve?",
     "For how long was the criminal behind bars?"),
    ("ski jumper", "tens", "the ski jumper landed after {v} metres", "After how many metres did the ski jumper land?",
     "How far did the athlete fly through the winter air?"),
    ("stadium", "thousands", "the stadium seats {v} spectators", "How many spectators does the stadium seat?",
     "What number of fans can come to watch a match?"),
    ("beggar", "thousands", "the beggar found {v} dollars in a dustbin", "How many dollars did the beggar find in a dustbin?",
     "What sum came out of the garbage for the homeless man?"),
    ("encyclopaedia", "hundreds", "the encyclopaedia lacks page {v}", "Which page does the encyclopaedia lack?",
     "What leaf was torn out of the big reference work?"),
    ("republic", "year", "the republic was proclaimed in {v}", "When was the republic proclaimed?",
     "Since what time has the nation been without a king?"),
    ("vaccine", "year", "the vaccine was discovered in {v}", "When was the vaccine discovered?",
     "How long has there been an injection against the disease?"),
    ("uncle", "trade", "my uncle started out as a {v}", "As what did my uncle start out?",
     "Which profession did father's brother have in his youth?"),
    ("stowaway", "ship", "the stowaway was found on the {v}", "On which ship was the stowaway found?",
     "Aboard what vessel was the passenger without a ticket caught?"),
    ("earthquake", "village", "the earthquake damaged every house in {v}", "Where did the earthquake damage every house?",
     "In which hamlet did no home stay intact when the ground shook?"),
    ("mechanic", "bird", "the mechanic whistles like a {v}", "Like what does the mechanic whistle?",
     "Which winged creature does the man in the garage imitate?"),
    ("electrician", "pet", "the electrician's rabbit is called {v}", "What is the electrician's rabbit called?",
     "Which name has the animal of the man who mends wires?"),
    ("coach", "phrase", "the coach tells the players: {v}", "What does the coach tell the players?",
     "With which words does the trainer encourage his team?"),
    ("hypnotist", "word", "the hypnotist wakes people by whispering {v}", "By whispering what does the hypnotist wake people?",
     "What is said softly to bring somebody out of the trance?"),
    ("alarm", "code", "the alarm is switched off with {v}", "With what is the alarm switched off?",
     "Which digits silence the siren that scares thieves?"),
    ("documentary", "theme", "the director is shooting a film about {v}", "About what is the director shooting a film?",
     "Which subject will the new movie in the cinema have?"),
    ("goat", "food", "the goat ate up all the {v}", "All of what did the goat eat up?",
     "Which crop was devoured by the horned animal with the beard?"),
    ("jockey", "flowers", "the jockey received a wreath of {v}", "Of what was the wreath that the jockey received?",
     "Which blossoms were hung around the neck of the winning rider?"),
    ("passport", "month", "the passport expires in {v}", "When does the passport expire?",
     "Until what date can one use the document to go abroad?"),
    ("ambassador", "language", "the ambassador swears in {v}", "In which language does the ambassador swear?",
     "What tongue does the diplomat curse in?"),
    ("grandmother", "person", "grandmother once danced with {v}", "With whom did grandmother once dance?",
     "Who led the old lady across the floor for a waltz?"),
    ("pilgrims", "town", "the pilgrims set out from {v}", "From where did the pilgrims set out?",
     "In which city did the devout begin their walk to the shrine?"),
    ("Santa Claus", "vehicle", "Santa Claus brought the presents by {v}", "By what did Santa Claus bring the presents?",
     "How did the bearded man in red come with his gifts?"),
    ("fingerprints", "parcel", "the fingerprints are kept in folder {v}", "In which folder are the fingerprints kept?",
     "Where did investigators file the marks of the culprit's thumbs?"),
)  # fmt: skip

# nothing was chosen by these
FIFTH = kinds(
    ("lumberjack", "beasts", "the lumberjack was chased by {v}", "By what was the lumberjack chased?",
     "Which creatures ran after the man with the axe?"),
    ("taxis", "colour", "all taxis in the capital are {v}", "What colour are all taxis in the capital?",
     "In which hue do cabs drive around the country's main city?"),
    ("stewardess", "language", "the stewardess is learning {v}", "Which language is the stewardess learning?",
     "What tongue does the woman from the airline study?"),
    ("flag", "cloth", "the flag was sewn from {v}", "From what was the flag sewn?",
     "Which fabric flutters at the top of the pole?"),
    ("executioner", "flowers", "the executioner grew {v}", "What did the executioner grow?",
     "Which blossoms did the hangman raise in his garden?"),
    ("sword", "jewel", "the hilt of the sword is set with a {v}", "With what is the hilt of the sword set?",
     "Which gem decorates the handle of the old weapon?"),
    ("peddler", "goods", "the peddler went from door to door with {v}", "With what did the peddler go from door to door?",
     "Which merchandise was offered at every house by the travelling salesman?"),
    ("secretary", "time", "the secretary goes home at {v}", "When does the secretary go home?",
     "At what hour does the office clerk finish work?"),
    ("skyscraper", "tens", "the skyscraper has {v} floors", "How many floors has the skyscraper?",
     "What number of storeys does the giant building have?"),
    ("mountaineers", "tens", "the mountaineers waited {v} days below the summit",
     "How many days did the mountaineers wait below the summit?", "For how long did the climbers have to be patient near the top?"),
    ("hens", "hundreds", "the hens lay {v} eggs a week", "How many eggs a week do the hens lay?",
     "What does the poultry produce in seven days?"),
    ("fine", "hundreds", "the fine for fishing in the lake is {v} dollars", "How many dollars is the fine for fishing in the lake?",
     "What sum must an angler who gets caught hand over?"),
    ("newspaper", "thousands", "the newspaper has {v} subscribers", "How many subscribers does the newspaper have?",
     "What number of readers get the daily press delivered?"),
    ("dowry", "thousands", "the dowry amounted to {v} dollars", "To how many dollars did the dowry amount?",
     "How much money did the bride's father give his son-in-law?"),
    ("castle", "year", "the castle was besieged in {v}", "When was the castle besieged?",
     "At what date did enemy troops surround the fortress?"),
    ("shipyard", "year", "the shipyard went bankrupt in {v}", "When did the shipyard go bankrupt?",
     "Since what time have no boats been built for lack of money?"),
    ("subway", "month", "the new subway will be opened in {v}", "When will the new subway be opened?",
     "At what date can passengers travel underground for the first time?"),
    ("election", "date", "the election was held on {v}", "When was the election held?",
     "Which day did the citizens cast their votes?"),
    ("sauna", "weekday", "the sauna is reserved for women on {v}", "When is the sauna reserved for women?",
     "Which day may no man go into the steam bath?"),
    ("fencer", "person", "the fencer was trained by {v}", "By whom was the fencer trained?",
     "Who taught the athlete how to use the foil?"),
    ("lifeguard", "person", "the lifeguard rescued {v}", "Whom did the lifeguard rescue?",
     "Who would have drowned without the man on the beach?"),
    ("clown", "town", "the clown retired to {v}", "Where did the clown retire to?",
     "In which city does the comedian with the big nose spend his old age?"),
    ("counterfeiter", "town", "the counterfeiter printed his banknotes in {v}", "Where did the counterfeiter print his banknotes?",
     "In which city was the false money produced?"),
    ("potter", "village", "the potter moved his kiln to {v}", "Where did the potter move his kiln?",
     "In which hamlet are jugs and bowls now fired?"),
    ("parade", "street", "the parade ends on {v}", "On which street does the parade end?",
     "Where do the marching columns come to a halt?"),
    ("mutiny", "ship", "a mutiny broke out on the {v}", "On which ship did a mutiny break out?",
     "Aboard what vessel did the crew rise against their officers?"),
    ("seamstress", "pet", "the seamstress shares her bed with her poodle {v}", "With which poodle does the seamstress share her bed?",
     "What is the dog called that sleeps beside the woman who makes dresses?"),
    ("sheriff", "animal", "the sheriff shot a {v}", "What did the sheriff shoot?",
     "Which creature was killed by a bullet from the lawman's pistol?"),
    ("carousel", "animal", "on the carousel the girl sat on a {v}", "On what did the girl sit on the carousel?",
     "Which creature did the little daughter ride at the funfair?"),
    ("poacher", "bird", "the poacher was betrayed by a {v}", "By what was the poacher betrayed?",
     "Which feathered creature gave away the man who hunted illegally?"),
    ("canteen", "dish", "the canteen offers {v} today", "What does the canteen offer today?",
     "Which meal can employees get for lunch?"),
    ("miser", "food", "the miser lives on nothing but {v}", "On nothing but what does the miser live?",
     "Which groceries are the only ones that the stingy man buys?"),
    ("customs", "fruits", "the customs officer confiscated {v}", "What did the customs officer confiscate?",
     "Which food was taken away from a traveller at the border?"),
    ("toothpaste", "herb", "the toothpaste tastes of {v}", "Of what does the toothpaste taste?",
     "Which plant's flavour is in the mouth after brushing?"),
    ("sultan", "drink", "the sultan forbade {v}", "What did the sultan forbid?",
     "Which beverage was not allowed under the oriental ruler?"),
    ("comb", "material", "the comb is carved out of {v}", "Out of what is the comb carved?",
     "With which substance does one tidy one's hair?"),
    ("gate", "metal", "the hinges of the gate are of {v}", "Of what are the hinges of the gate?",
     "Which ore was used for the parts on which the garden entrance swings?"),
    ("caretaker", "instrument", "the caretaker complained about the {v}", "About what did the caretaker complain?",
     "Which kind of music was a nuisance to the janitor?"),
    ("nephew", "trade", "my nephew is engaged to a {v}", "To whom is my nephew engaged?",
     "Which profession has the woman that my sister's son wants to marry?"),
    ("kite", "tree", "the kite got stuck in a {v}", "In what did the kite get stuck?",
     "Which plant caught the toy that the wind had carried?"),
    ("rug", "country", "the rug was woven in {v}", "Where was the rug woven?",
     "Which nation does the covering of the floor come from?"),
    ("minister", "game", "the minister missed the meeting because of {v}", "Because of what did the minister miss the meeting?",
     "Which pastime was more important to the politician than the conference?"),
    ("reporter", "vehicle", "the reporter reached the front by {v}", "By what did the reporter reach the front?",
     "How did the journalist get to where the battle was?"),
    ("minstrel", "theme", "the minstrel sang of {v}", "Of what did the minstrel sing?",
     "Which subject did the wandering musician choose for his ballad?"),
    ("toddler", "word", "the toddler's first word was {v}", "What was the toddler's first word?",
     "With what did the small child begin to talk?"),
    ("fortune teller", "phrase", "the fortune teller's advice was: {v}", "What was the fortune teller's advice?",
     "What did the woman with the crystal ball recommend?"),
    ("getaway car", "code", "the getaway car had the number plate {v}", "Which number plate did the getaway car have?",
     "Which digits were on the automobile in which the gang escaped?"),
    ("patient", "person", "the patient was cured by {v}", "By whom was the patient cured?",
     "Who made the sick man well again?"),
)  # fmt: skip


SIXTH = kinds(
    ("ballerina", "animal", "the ballerina was bitten by a {v}", "By what was the ballerina bitten?",
     "Which creature sank its teeth into the woman who dances on her toes?"),
    ("casino", "weekday", "the casino closes early on {v}", "When does the casino close early?",
     "Which day do gamblers have to stop sooner than usual?"),
    ("matador", "person", "the matador eloped with {v}", "With whom did the matador elope?",
     "Who ran off in secret to wed the bullfighter?"),
    ("igloo", "tens", "the igloo was built from {v} blocks of snow", "From how many blocks of snow was the igloo built?",
     "What number of frozen bricks make up the Inuit hunter's round hut?"),
    ("trophy", "metal", "the trophy is cast from {v}", "From what is the trophy cast?",
     "Which ore was used for the cup that the winner takes home?"),
    ("ventriloquist", "town", "the ventriloquist was booed off the stage in {v}", "Where was the ventriloquist booed off the stage?",
     "In which city did the audience jeer at the man whose dummy talks?"),
    ("gondolier", "colour", "the gondolier repainted his boat {v}", "In what colour did the gondolier repaint his boat?",
     "Which hue does the vessel of the Venetian oarsman have now?"),
    ("planetarium", "year", "the planetarium was inaugurated in {v}", "When was the planetarium inaugurated?",
     "Since what time have visitors looked up at artificial stars?"),
    ("pillow", "herb", "the pillow is filled with {v}", "With what is the pillow filled?",
     "Which plant does one lay one's head on at bedtime?"),
    ("hydrant", "vehicle", "the hydrant was knocked over by a {v}", "By what was the hydrant knocked over?",
     "What crashed into the thing that firemen get water from?"),
    ("wig", "hundreds", "the wig cost {v} dollars", "How many dollars did the wig cost?",
     "What was the price of the false hair?"),
    ("werewolf", "trade", "by day the werewolf works as a {v}", "As what does the werewolf work by day?",
     "Which profession does the man have who turns into a beast at full moon?"),
    ("oasis", "thousands", "the oasis has {v} inhabitants", "How many inhabitants has the oasis?",
     "What number of people live around the spring amid the dunes?"),
    ("missionary", "language", "the missionary preaches in {v}", "In which language does the missionary preach?",
     "What tongue are the sermons to the heathens given in?"),
    ("taxidermist", "bird", "the taxidermist stuffed a {v}", "What did the taxidermist stuff?",
     "Which feathered creature was mounted for display after its death?"),
    ("tapestry", "theme", "the tapestry shows the story of {v}", "The story of what does the tapestry show?",
     "Which subject did the weavers choose for the hanging on the wall?"),
    ("prison", "dish", "the prison serves {v} on Christmas Eve", "What does the prison serve on Christmas Eve?",
     "Which meal do the inmates get just before the holiday?"),
    ("hijacker", "person", "the hijacker was overpowered by {v}", "By whom was the hijacker overpowered?",
     "Who subdued the man that had seized the aeroplane?"),
    ("eclipse", "date", "the eclipse darkened the sky on {v}", "When did the eclipse darken the sky?",
     "Which day did the moon block the sunlight?"),
    ("parachute", "cloth", "the parachute was stitched from {v}", "From what was the parachute stitched?",
     "Which fabric slows the fall of somebody who leaps out of an aeroplane?"),
    ("balloonist", "country", "the balloonist landed by mistake in {v}", "Where did the balloonist land by mistake?",
     "In which nation did the traveller in the basket accidentally come down?"),
    ("greenhouse", "flowers", "the greenhouse is full of {v}", "Of what is the greenhouse full?",
     "Which blossoms thrive under the panes of glass?"),
    ("briefcase", "code", "the lock on the briefcase is set to {v}", "To what is the lock on the briefcase set?",
     "Which digits does one need to open the bag for documents?"),
    ("guillotine", "year", "the guillotine was last used in {v}", "When was the guillotine last used?",
     "Since what time has nobody been beheaded?"),
    ("wrestler", "food", "the wrestler crushes {v} with his bare hands", "What does the wrestler crush with his bare hands?",
     "Which groceries get squashed by the strong man in the ring?"),
    ("croupier", "jewel", "the croupier accepted a {v} as a stake", "What did the croupier accept as a stake?",
     "Which gem was wagered at roulette?"),
    ("witch", "village", "the witch was driven out of {v}", "Where was the witch driven out of?",
     "Which hamlet got rid of the sorceress?"),
    ("cyclist", "tens", "the cyclist had a lead of {v} seconds", "A lead of how many seconds did the cyclist have?",
     "By how much was the man on the racing bike ahead of his rivals?"),
    ("vicar", "drink", "the vicar spilled {v} on the altar", "What did the vicar spill on the altar?",
     "Which beverage was accidentally poured out by the clergyman during mass?"),
    ("mermaid", "instrument", "the fisherwomen heard the mermaid play the {v}", "What did the fisherwomen hear the mermaid play?",
     "On what did the maiden with the scaly tail make music?"),
    ("mammoth", "parcel", "the bones of the mammoth are kept in crate {v}", "In which crate are the bones of the mammoth kept?",
     "Where did they store the skeleton of the prehistoric elephant?"),
    ("babysitter", "time", "the babysitter must leave at {v}", "When must the babysitter leave?",
     "At what hour do the parents have to be back to look after the kids themselves?"),
    ("caveman", "beasts", "the caveman painted {v} on the rock", "What did the caveman paint on the rock?",
     "Which creatures did our prehistoric ancestor depict on stone?"),
    ("cholera", "ship", "cholera was brought into the harbour by the {v}", "By which ship was cholera brought into the harbour?",
     "Aboard what vessel did the epidemic arrive?"),
    ("dentures", "material", "the dentures are made of {v}", "Of what are the dentures made?",
     "Which substance does the toothless old man chew with?"),
    ("landslide", "thousands", "the landslide made {v} people homeless", "How many people did the landslide make homeless?",
     "What number of villagers lost the roof over their heads when the slope came down?"),
    ("cardinals", "game", "the cardinals secretly play {v}", "What do the cardinals secretly play?",
     "Which pastime do the men who elect the pope hide from others?"),
    ("treasure", "tree", "the treasure is buried under a {v}", "Under what is the treasure buried?",
     "Below which plant would one have to dig for the gold?"),
    ("archaeologist", "town", "the archaeologist grew up in {v}", "Where did the archaeologist grow up?",
     "In which city did the woman who digs for ruins spend her childhood?"),
    ("chambermaid", "pet", "the chambermaid's goldfish is called {v}", "What is the chambermaid's goldfish called?",
     "Which name has the animal in the bowl of the woman who makes the hotel beds?"),
    ("bartender", "fruits", "the bartender garnishes every cocktail with {v}", "With what does the bartender garnish every cocktail?",
     "Which crop adorns the mixed drinks at the counter?"),
    ("viaduct", "month", "the viaduct will be demolished in {v}", "When will the viaduct be demolished?",
     "At what date is the long bridge over the valley going to be pulled down?"),
    ("genie", "word", "the genie appears when somebody says {v}", "When somebody says what does the genie appear?",
     "What must one utter to call the spirit out of the bottle?"),
    ("acupuncturist", "street", "the acupuncturist practises on {v}", "On which street does the acupuncturist practise?",
     "Where does one get treated with needles?"),
    ("barge", "goods", "the barge sank with a load of {v}", "With a load of what did the barge sink?",
     "Which merchandise went to the bottom of the canal?"),
    ("vampire", "hundreds", "the vampire has been sleeping for {v} years", "For how many years has the vampire been sleeping?",
     "How long has the bloodsucker rested in his coffin?"),
    ("tombstone", "phrase", "on the tombstone is carved: {v}", "What is carved on the tombstone?",
     "Which words can one read above the grave?"),
    ("archduke", "vehicle", "the archduke crossed the frontier on a {v}", "On what did the archduke cross the frontier?",
     "How did His Highness get into the neighbouring country?"),
)  # fmt: skip


SEVENTH = kinds(
    ("curfew", "time", "the curfew begins at {v}", "When does the curfew begin?",
     "At what hour must everybody be off the streets?"),
    ("jester", "animal", "the jester entered on the back of a {v}", "On the back of what did the jester enter?",
     "Which creature carried the fool into the hall?"),
    ("blackmailer", "person", "the blackmailer threatened {v}", "Whom did the blackmailer threaten?",
     "From whom did the crook want money for keeping a secret?"),
    ("lifeboat", "tens", "the lifeboat has room for {v} people", "For how many people does the lifeboat have room?",
     "What number of shipwrecked passengers can be taken aboard?"),
    ("handcuffs", "metal", "the handcuffs are made of {v}", "Of what are the handcuffs made?",
     "Which ore holds the wrists of the arrested together?"),
    ("dictator", "country", "the dictator went into exile in {v}", "Where did the dictator go into exile?",
     "Which nation gave asylum to the toppled tyrant?"),
    ("geyser", "hundreds", "the geyser shoots {v} feet into the air", "How many feet into the air does the geyser shoot?",
     "What height does the hot spring's jet reach?"),
    ("kimono", "colour", "the geisha wore a kimono of {v}", "What colour was the kimono that the geisha wore?",
     "Which hue did the Japanese entertainer's robe have?"),
    ("looters", "goods", "the looters carried off {v}", "What did the looters carry off?",
     "Which merchandise was taken during the riot?"),
    ("tightrope walker", "town", "the tightrope walker fell in {v}", "Where did the tightrope walker fall?",
     "In which city did the man on the wire lose his balance?"),
    ("shaman", "herb", "the shaman burns {v}", "What does the shaman burn?",
     "From which plant comes the smoke around the medicine man?"),
    ("slavery", "year", "slavery was abolished in {v}", "When was slavery abolished?",
     "Since what time may no human being be owned by another?"),
    ("swing", "tree", "the swing hangs from a {v}", "From what does the swing hang?",
     "Which plant supports the seat that children fly back and forth on?"),
    ("bigamist", "trade", "the bigamist pretended to be a {v}", "What did the bigamist pretend to be?",
     "Which profession did the man with two wives claim to have?"),
    ("chandelier", "hundreds", "the chandelier has {v} crystals", "How many crystals has the chandelier?",
     "What number of glittering pieces dangle from the ceiling?"),
    ("chauffeur", "person", "the chauffeur drove {v} to the ball", "Whom did the chauffeur drive to the ball?",
     "Who was taken to the dance in the limousine?"),
    ("gourmet", "dish", "the gourmet choked on {v}", "On what did the gourmet choke?",
     "Which meal got stuck in the throat of the lover of fine cooking?"),
    ("plague", "village", "the plague spared the people of {v}", "The people of which village did the plague spare?",
     "In which hamlet did nobody die of the epidemic?"),
    ("petition", "thousands", "the petition was signed by {v} people", "By how many people was the petition signed?",
     "What number of citizens put their names under the demand?"),
    ("serenade", "language", "the serenade was sung in {v}", "In which language was the serenade sung?",
     "What tongue did the suitor use beneath the window of his beloved?"),
    ("weathervane", "animal", "the weathervane has the shape of a {v}", "The shape of what does the weathervane have?",
     "Which creature turns with the wind at the top of the roof?"),
    ("seance", "word", "at the seance the spirit spelled {v}", "What did the spirit spell at the seance?",
     "Which message did the medium get from the dead?"),
    ("bandage", "cloth", "the bandage is made of {v}", "Of what is the bandage made?",
     "Which fabric is wrapped around the wound?"),
    ("bailiff", "weekday", "the bailiff will return on {v}", "When will the bailiff return?",
     "Which day is somebody coming back to seize the debtor's belongings?"),
    ("anthem", "person", "the anthem was composed by {v}", "By whom was the anthem composed?",
     "Who wrote the music that is played in honour of the nation?"),
    ("castaway", "food", "the castaway survived on {v}", "On what did the castaway survive?",
     "Which crop kept the man on the lonely island from starving?"),
    ("emigrants", "ship", "the emigrants sailed on the {v}", "On which ship did the emigrants sail?",
     "Aboard what vessel did those leave who sought a new home across the ocean?"),
    ("coma", "tens", "the coma lasted {v} days", "How many days did the coma last?",
     "For how long was the injured woman unconscious?"),
    ("hailstorm", "fruits", "the hailstorm ruined the {v}", "What did the hailstorm ruin?",
     "Which crop was destroyed by lumps of ice from the clouds?"),
    ("busker", "instrument", "the busker plays the {v} outside the bank", "What does the busker play outside the bank?",
     "With what does the musician in the street entertain passers-by?"),
    ("idol", "jewel", "the idol has a {v} for an eye", "What does the idol have for an eye?",
     "With which gem does the statue of the god look at people?"),
    ("bribe", "thousands", "the inspector accepted a bribe of {v} dollars", "A bribe of how many dollars did the inspector accept?",
     "How much money did the corrupt official take?"),
    ("wallpaper", "beasts", "the wallpaper in the nursery shows {v}", "What does the wallpaper in the nursery show?",
     "Which creatures surround the baby in its room?"),
    ("armistice", "date", "the armistice was announced on {v}", "When was the armistice announced?",
     "Which day did people hear that the war was over?"),
    ("admiral", "pet", "the admiral never goes to sea without his tomcat {v}", "Without which tomcat does the admiral never go to sea?",
     "What is the animal called that accompanies the commander of the fleet?"),
    ("poison", "drink", "the poison was dissolved in {v}", "In what was the poison dissolved?",
     "Which beverage contained what killed the victim?"),
    ("pawnshop", "street", "the pawnshop is on {v}", "On which street is the pawnshop?",
     "Where can one leave valuables as security for a loan?"),
    ("cartoonist", "bird", "the cartoonist always draws a {v}", "What does the cartoonist always draw?",
     "Which winged creature is found in all comic strips by the artist?"),
    ("synagogue", "year", "the synagogue was consecrated in {v}", "When was the synagogue consecrated?",
     "Since what time have Jews had a house of prayer?"),
    ("jackpot", "vehicle", "the jackpot was spent on a {v}", "On what was the jackpot spent?",
     "Which means of transport did the lucky gambler buy with his prize?"),
    ("sermon", "theme", "the sermon was about {v}", "About what was the sermon?",
     "Which subject did the parson talk of from the pulpit?"),
    ("fugitive", "town", "the fugitive was seen in {v}", "Where was the fugitive seen?",
     "In which city did a witness spot the man on the run?"),
    ("mosque", "material", "the floor of the mosque is of {v}", "Of what is the floor of the mosque?",
     "On which substance do Muslim worshippers kneel?"),
    ("abbess", "phrase", "the abbess teaches the novices: {v}", "What does the abbess teach the novices?",
     "Which words does the head of the nunnery impress on young sisters?"),
    ("balcony", "flowers", "the balcony is overgrown with {v}", "With what is the balcony overgrown?",
     "Which blossoms climb around the upstairs window?"),
    ("drought", "month", "the drought is expected to last until {v}", "Until when is the drought expected to last?",
     "At what date will there be rain again, as forecasters believe?"),
    ("bunker", "code", "the hatch of the bunker opens with {v}", "With what does the hatch of the bunker open?",
     "Which digits let one into the shelter under the ground?"),
    ("centenarian", "game", "the centenarian never tires of {v}", "Of what does the centenarian never tire?",
     "Which pastime still delights the woman who is over a hundred years old?"),
)  # fmt: skip


LISTS = (FRESH, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH)


class Unread(Shelf):
    """As if no chunk had been read."""

    def by_values(self, question: str, pieces: Sequence[Piece], sentences: object) -> list[Any]:
        return []


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
        "--fresh",
        type=int,
        nargs="?",
        const=1,
        choices=range(1, len(LISTS) + 1),
        help="the facts of this file: which list",
    )
    parser.add_argument("--read", action="store_true", help="read all chunks first: selection by values too")
    parser.add_argument("--near-only", action="store_true", help="without the model's weights: not compared")
    parser.add_argument("--embedding-model", type=Path, help="finds passages too")
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
    methods += ("values",) if args.read else ()
    embedding = None
    if args.embedding_model is not None:
        embedding = EmbeddingModel(args.embedding_model, **threads)
        methods += ("embedded", "all") if args.read else ("embedded",)
    weak = shelf_module.WEAK_EVIDENCE
    for n, seed in enumerate(args.seeds):
        start = time.perf_counter()
        if args.fresh:
            facts.UNLIKE = LISTS[args.fresh - 1][n :: len(args.seeds)]  # type: ignore[misc]
        made = make_document(
            haystack, seed, args.tokens, lambda text: sum(count(f"{part}\n\n") for part in text.split("\n\n")),
            n_unlike=min(args.facts, len(facts.UNLIKE)), n_alike=args.names, n_links=args.links,
            n_counts=args.counts, n_absent=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, Library(folder) as library:
            document = library.add_text(made.text, "document")
            catalogue = Catalogue(llm, form, library)
            embedded = Catalogue(llm, form, library, embedding)
            if embedded.embeddings is not None:
                begin = time.process_time()
                texts = {piece.text: 1 for piece in (embedded.piece(document, row) for row in embedded.rows(document))}
                embedded.embeddings.make(texts)
                print(f"embedding {len(texts)} chunks: {time.process_time() - begin:.1f} CPU seconds")
            shelf = None if args.near_only else Shelf(llm, catalogue)
            unread = None if args.near_only else Unread(llm, catalogue)
            if args.read and shelf is not None:
                shelf.read([catalogue.piece(document, row) for row in catalogue.rows(document)])
            if shelf is not None and unread is not None:  # what the model tells of a question is remembered for both
                unread._other_words, unread._likelihoods = shelf._other_words, shelf._likelihoods
            models = {"compared": unread, "values": shelf, "embedded": unread, "all": shelf}
            for question in made.questions:
                sentences = [made.facts[i].sentence for i in question.facts]
                kind: str = question.form
                if kind == "paraphrase":
                    kind = "with the name" if made.facts[question.facts[0]].is_alike else "other words"
                row: dict[str, Any] = dict(seed=seed, kind=kind, question=question.text)
                for method in methods:
                    shelf_module.WEAK_EVIDENCE = 0.0 if method == "words" else weak
                    begin = time.process_time()
                    chooser = embedded if method in ("embedded", "all") else catalogue
                    selection = chooser.select(question.text, [document], "auto", model=models.get(method))
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
