"""Questions over real text, for any model: facts are put into a text between its sentences, and asked for.

    >>> haystack = Haystack(default_text())
    >>> document = make_document(haystack, seed=1, n_tokens=8192, count=n_tokens_of)
    >>> document.questions[0].text, document.questions[0].answer

The facts have nothing to do with the text, and each is one sentence: names, numbers, times, places, short phrases. Some are unlike all
others ("The last ferry leaves the island at 9:40 in the evening."), some look alike ("The door code of Rosalind Quarles is 48152."). They are
asked for in their own words, in other words, over two of them, by counting, and where the text does not say it. A document has many questions, so
that a model reads it once. Only the standard library is needed, and the same arguments always give the same document.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import PromptError
from ..loaders import load, walk

Form = Literal["literal", "paraphrase", "two-hop", "count", "absent"]
"""How a fact is asked for: in its own words; in others, of which it shares none but names; by way of another fact, which
names what it is about; how many of some names the text says something of; and what it does not say."""

FORMS: tuple[Form, ...] = get_args(Form)

# --------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Words that a text lists, with _ for a space in one."""
    return [word.replace("_", " ") for word in text.split()]


FIRST_NAMES = _words("""Abigail Adrian Aisha Alistair Amara Ambrose Anika Antonia Archer Arjun Aurelia Beatrix
Benedict Bertram Bianca Boris Brigid Callum Camille Cassius Cedric Chidi Clarence Clement Constance Cordelia Cosima
Damian Dashiell Delphine Demetri Desmond Dmitri Dorothea Edmund Eleanora Elodie Emeka Emmett Esperanza Esteban Eugenia
Fabian Farida Fatima Ferdinand Fergus Florian Francesca Gareth Genevieve Gideon Giselle Gregor Guadalupe Gwendolyn
Hamish Harriet Hassan Hector Hermione Hiroshi Horace Ignatius Imogen Ingrid Isadora Ismael Jacinta Jasper Jerome
Joaquin Josephine Juniper Kamala Katya Keiko Kenji Lachlan Leocadia Leopold Lorcan Lucinda Ludwig Magnolia Malachi
Marguerite Matilda Maximilian Mehmet Mireille Montague Nadine Natalia Nikolai Octavia Odette Olympia Orlando Padma
Penelope Perpetua Philippa Quentin Ramona Raphael Rashid Reginald Rosalind Rupert Sakura Salvador Saskia Sebastian
Seraphina Shreya Solomon Sylvester Tabitha Tadeusz Tamsin Tariq Terence Thaddeus Theodora Tobias Valentina Vincenzo
Violetta Walburga Wilhelmina Winston Xavier Yasmin Yevgeny Yusuf Zachary Zelda Zuleika""")

SURNAMES = _words("""Abernathy Achterberg Adebayo Albescu Almeida Ambrosini Arbuthnot Ashgrove Atwater Bagshaw
Balakrishnan Bancroft Baptiste Barrington Bellweather Benavides Bergstrom Bianchi Blackburn Bogdanov Bonaventure
Brightwell Broadbent Cadwallader Calloway Carmichael Castellanos Cavendish Chakrabarti Chatterley Cholmondeley
Clutterbuck Copperfield Cranshaw Crowther Culpepper Dalrymple Delacroix Demirel Devereux Drummond Dubois Dunnigan
Easterbrook Eberhardt Ekwueme Ellsworth Escobedo Fairweather Fenwick Ferreira Fitzgibbon Fothergill Gallagher
Garibaldi Gascoigne Goldsworthy Grimshaw Gunnarsson Haddington Halloran Hathaway Hawthorne Heatherington Higginbotham
Hollingsworth Huxtable Iglesias Ingleby Ivanchuk Jankowski Jellicoe Kadlec Katsaros Kilpatrick Kowalczyk Kristoffersen
Lachance Lafayette Lampard Leatherby Lindqvist Lockhart Loxley Macfarlane Maddox Mainwaring Malinowski Marchetti Mbeki
Melnyk Merriweather Montgomery Moriarty Mukherjee Nakamura Navarro Nightingale Norrington Oakeshott Obermann Okonkwo
Oppenheim Osterman Ottolenghi Palomino Papadakis Partridge Pemberton Pettigrew Philbrick Pickersgill Postlethwaite
Quarles Quintero Radcliffe Rasmussen Ravenscroft Rosenthal Rutherford Sallow Santoro Satterfield Schumann Shackleton
Silverstein Skarsgard Somerville Stavropoulos Strickland Takahashi Tarkington Tattersall Thistlewood
Thornbury Trelawney Umarov Underhill Valdemar Vandermeer Vasquez Villanueva Wainwright Wakefield Wetherby Whitlock
Winterbourne Wojcik Worthington Yamamoto Yarborough Zabriskie Zimmermann""")

TOWNS = _words("""Aberdeen Adelaide Ankara Antwerp Athens Auckland Avignon Baltimore Barcelona Basel Belfast Belgrade
Bergen Bilbao Bogota Bologna Bordeaux Bratislava Bremen Brisbane Bristol Bruges Bucharest Budapest Calgary Canberra
Cardiff Casablanca Chicago Cologne Copenhagen Cordoba Cracow Dakar Damascus Denver Dortmund Dresden Dublin Dubrovnik
Durban Edinburgh Eindhoven Florence Frankfurt Galway Gdansk Geneva Genoa Ghent Gothenburg Granada Grenoble Hamburg
Hanoi Havana Helsinki Hobart Innsbruck Istanbul Jakarta Johannesburg Kathmandu Kyoto Lagos Lausanne Leipzig Lille Lima
Lisbon Liverpool Ljubljana Lucerne Lyon Madrid Malmo Manila Marrakesh Marseille Memphis Milan Montreal Munich Nagoya
Nairobi Nantes Naples Nashville Odessa Osaka Oslo Ottawa Palermo Perth Philadelphia Pisa Plymouth Porto Prague Quebec
Ravenna Reykjavik Riga Rotterdam Salzburg Santiago Sapporo Sarajevo Seattle Seville Sofia Stockholm Strasbourg
Stuttgart Tallinn Tampere Tbilisi Toledo Toronto Trieste Tunis Turin Uppsala Utrecht Valencia Valparaiso Vancouver
Venice Verona Vienna Vilnius Warsaw Wellington Winnipeg Yokohama Zagreb Zanzibar Zurich""")

VILLAGES = [
    first + last
    for first in "Alder Amber Birch Bramble Cinder Cold Copper Crow Drift Elder Ember Fern Frost Gorse Hazel Heron Juniper Lark".split()
    for last in "combe dale fell gate ham haven hollow hurst mere minster stead thwaite wick".split()
]

STREETS = [
    f"{tree} {way}"
    for tree in """Acorn Bluebell Cathedral Cherry Clover Cobbler Convent Customs Falconer Foundry Granary Juniper Kingfisher Lantern Linden Mulberry
Orchard Paradise Pilgrim Primrose Quarry Ropemaker Rosemary Saffron Saltmarsh Shepherd Tanner Turnpike Weaver Windmill""".split()
    for way in "Street Lane Road Square Alley".split()
]

SHIPS = [
    f"{what} {who}"
    for what in "Bold Crimson Distant Faithful Gallant Golden Hidden Lucky Northern Patient Restless Silent Southern Swift Wandering".split()
    for who in "Albatross Baroness Countess Dolphin Heron Huntress Kestrel Marigold Meteor Petrel Pilgrim Porpoise Sparrow Voyager Walrus".split()
]

PETS = _words("""Biscuit Boomer Bramble Buttons Cinnamon Clover Domino Dumpling Fidget Ginger Goblin Hopscotch Jigsaw
Jupiter Licorice Marmalade Mittens Muffin Nutmeg Paprika Patches Peanut Pebbles Pickles Porridge Pudding Ragtime
Rascal Scamper Shadow Snuffles Socrates Sprocket Tangerine Thunder Truffle Tugboat Turnip Waffles Whiskers Wizard""")

COLOURS = _words("""beige blue bronze brown burgundy charcoal copper coral cream crimson gold green grey khaki
lavender lilac magenta maroon mauve mustard navy pink plum purple red rust salmon scarlet silver tan teal turquoise
vermilion violet white yellow""")

ANIMALS = _words("""badger beaver bison boar buffalo camel cheetah cobra crab crocodile dolphin dragon falcon ferret
flamingo fox gazelle giraffe gorilla griffin hamster hare hedgehog heron hippopotamus hyena jackal jaguar kangaroo
koala leopard lion lobster lynx mole mongoose moose panther peacock pelican penguin porcupine puma rabbit raccoon ram
raven reindeer rhinoceros salamander scorpion seahorse squirrel stag swan tiger tortoise unicorn vulture walrus weasel
wolf wolverine zebra""")

BIRDS = _words("""blackbird bullfinch buzzard chaffinch cormorant crane cuckoo dove finch goldfinch goshawk hawk
hoopoe jackdaw jay kingfisher kite lark magpie mockingbird nightingale nuthatch partridge pheasant pigeon quail robin
rook sandpiper sparrow starling stork swallow swift thrush warbler woodpecker wren""")

BEASTS = _words("""beetles bears butterflies camels crabs dinosaurs dragons eagles elephants fish foxes frogs giraffes
hedgehogs horses lizards monkeys moths octopuses parrots penguins rabbits seals snails snakes spiders squirrels swans
tigers toads turtles whales wolves zebras""")

DISHES = _words("""baked_aubergine barley_soup beef_stew buckwheat_pancakes cabbage_rolls cheese_dumplings cherry_pie
chicken_curry chickpea_salad clam_chowder coconut_rice cold_noodles duck_with_plums fish_cakes fried_mackerel
goat_cheese_tart grilled_sardines ham_omelette lamb_with_mint lentil_soup lobster_bisque mashed_turnips
mushroom_risotto mussels_in_cream onion_soup oxtail_broth pickled_herring plum_dumplings pumpkin_ravioli rabbit_stew
roast_goose saffron_rice salted_cod smoked_trout spinach_lasagne squid_in_ink stuffed_peppers tomato_soup veal_cutlet
venison_pie""")

FOODS = _words("""almonds apricots artichokes asparagus barley beans beetroot blackberries blueberries carrots
cauliflower celery chanterelles cherries chestnuts chives cloves coconut courgettes cranberries cucumbers currants
dates fennel figs garlic ginger gooseberries hazelnuts horseradish kale leeks lemons lentils limes mangoes millet mint
nettles nutmeg oats olives onions oranges parsley parsnips peaches peas pistachios plums pomegranates pumpkin quinces
radishes raisins raspberries rhubarb rye sage sesame sorrel spinach thyme tomatoes turnips vanilla walnuts
watercress""")

FRUITS = _words("""apples apricots blackberries cherries figs grapes greengages hazelnuts lemons mandarins medlars
melons mulberries nectarines olives oranges peaches pears persimmons plums pomegranates quinces raspberries
walnuts""")

HERBS = _words("""basil borage camomile comfrey coriander elderflower eucalyptus fennel hyssop lavender liquorice
lovage marjoram mint mullein oregano peppermint plantain rosehip rosemary sage savory tarragon thyme valerian verbena
yarrow""")

DRINKS = _words("""absinthe applejack buttermilk cider cocoa_elderberry_wine espresso ginger_beer grappa hot_chocolate
iced_coffee lemonade madeira malt_whisky mead mulled_wine orange_juice oolong_tea peppermint_tea plum_brandy port
rum_punch sherry sloe_gin tonic_water""")

MATERIALS = _words("""bamboo basalt beeswax birch_bark bog_oak brick bronze cedar chalk cherry_wood concrete cork
driftwood ebony felt flint glass granite horn ivory jade lava_stone leather limestone mahogany maple marble
papier-mâché pine plaster porcelain quartz reed rosewood rubber sandstone slate soapstone straw teak terracotta
walnut_wood whalebone willow""")

METALS = _words("""aluminium brass bronze cobalt copper gold iron lead nickel pewter platinum silver steel tin
titanium tungsten zinc""")

CLOTHS = _words("""brocade calico canvas cotton damask denim flannel gauze hemp jute lace linen muslin nylon plaid
satin silk tweed velvet wool""")

INSTRUMENTS = _words("""accordion bagpipes balalaika banjo bassoon bugle castanets celesta cello clarinet cornet
didgeridoo dulcimer euphonium fiddle flute glockenspiel gong guitar harmonica harp harpsichord horn lute lyre mandolin
marimba oboe ocarina organ piano piccolo recorder saxophone sitar tambourine theremin trombone trumpet tuba ukulele
vibraphone viola violin xylophone zither""")

TRADES = _words("""baker banker barber beekeeper blacksmith bookbinder bricklayer butcher butler carpenter
cartographer chemist chimney_sweep clockmaker cobbler cook cooper dentist diver farmer fisherman gardener glassblower
goldsmith hatter jeweller judge juggler librarian locksmith magician mason miner nurse painter photographer pilot
plumber porter potter printer roofer saddler sculptor shepherd surgeon surveyor tailor teacher translator watchmaker
weaver zoologist""")

FLOWERS = _words("""anemones asters bluebells camellias carnations chrysanthemums cornflowers crocuses daffodils
dahlias daisies forget-me-nots foxgloves freesias gentians geraniums gladioli heather hollyhocks hyacinths hydrangeas
irises jasmine larkspur lilies lupins magnolias marigolds nasturtiums orchids pansies peonies petunias poppies
primroses roses snapdragons snowdrops sunflowers tulips violets wisteria zinnias""")

TREES = _words("""beech birch cedar_cherry_tree chestnut_tree cypress fig_tree fir ginkgo hawthorn hornbeam larch
lime_tree magnolia maple mulberry_tree pear_tree pine plane_tree poplar redwood rowan spruce sycamore walnut_tree
willow yew""")

JEWELS = _words("""beryl carbuncle diamond garnet jade lapis moonstone pearl peridot ruby sapphire spinel sunstone
topaz tourmaline turquoise zircon""")

LANGUAGES = _words("""Albanian Arabic Aramaic Armenian Basque Breton Bulgarian Catalan Coptic Croatian Danish Dutch
Estonian Finnish Flemish Gaelic Georgian Greek Hebrew Hungarian Icelandic Irish Japanese Korean Latin Latvian
Lithuanian Maltese Mongolian Norwegian Persian Polish Portuguese Romanian Sanskrit Serbian Slovak Swahili Swedish
Tamil Tibetan Turkish Ukrainian Urdu Vietnamese Welsh Yiddish""")

COUNTRIES = _words("""Albania Algeria Argentina Armenia Australia Austria Bolivia Bulgaria Cambodia Canada Chile
Colombia Croatia Cuba Cyprus Denmark Ecuador Egypt Estonia Ethiopia Finland Ghana Greece Guatemala Hungary Iceland
India Indonesia Ireland Jamaica Japan Jordan Kenya Laos Latvia Lebanon Madagascar Malaysia Malta Mexico Moldova
Mongolia Morocco Mozambique Nepal Norway Oman Pakistan Panama Paraguay Peru Poland Portugal Romania Senegal Serbia
Slovenia Sweden Syria Tanzania Thailand Tunisia Turkey Uganda Ukraine Uruguay Vietnam Yemen Zambia""")

GAMES = _words("""backgammon badminton basketball billiards boules bridge charades checkers chess cricket croquet
curling darts dominoes football frisbee golf hockey hopscotch lacrosse leapfrog mahjong marbles poker polo rugby
skittles snooker softball squash table_tennis volleyball water_polo""")

GOODS = _words("""antiques ball_bearings bananas barometers bicycles bricks buttons candles carpets cement clocks
cocoa coffee copper_wire cotton fertiliser fireworks fishing_rods frozen_fish fur_coats furniture glassware grain hats
lamp_oil lanterns leather machine_parts mattresses mirrors newsprint paint perfume pianos pottery rice roof_tiles
rubber saddles salt sewing_machines soap spices sugar tea telescopes timber tobacco toys typewriters umbrellas wine
wool""")

VEHICLES = _words("""bicycle bus camel cart donkey dog_sled hang-glider helicopter horse hovercraft jeep kayak mare
moped motorcycle mule pony raft reindeer rickshaw rowing_boat scooter skateboard sledge snowmobile steamboat tandem
tractor tricycle truck van""")

THEMES = _words("""a_beekeeper a_blind_detective a_broken_promise a_cursed_diamond a_deaf_piano_tuner a_drowned_city
a_duel_at_dawn a_failed_coup a_forged_will a_goose_thief a_haunted_elevator a_lonely_giant a_lost_umbrella
a_runaway_circus a_sleepless_king a_stolen_alphabet a_talking_mirror a_treaty_of_peace a_wager_between_brothers
an_arctic_wedding an_honest_spy an_invisible_tailor jealous_gods rival_bakers shipwrecked_monks the_invention_of_zero
two_duelling_poets""")

WORDS = _words("""abacus avalanche banjo bonfire cactus carousel cathedral cinnamon citadel compass crocodile daffodil
emerald festival firefly galaxy glacier gondola hammock harmonica horizon icicle jasmine kaleidoscope labyrinth
lantern lighthouse lullaby magnet marzipan meadow mosaic nightshade obelisk orchard paradox parasol pendulum periscope
pinwheel porcelain quicksand rainbow rhubarb riddle sandcastle scarecrow silhouette snowflake solstice sundial
tambourine telescope thimble thunderbolt tornado tulip umbrella velvet volcano waterfall whirlpool windmill
zeppelin""")

MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "none one two three four five six seven eight nine ten".split()

_ADVICE = "measure listen plough look think breathe count pay knock rest sow water".split()
_DEEDS = "cut speak harvest leap write shout spend enter judge sail trust dance".split()
_SILENCES = _words("""salt iron rain bread winter patience thunder honest_work deep_rivers old_wolves cold_ashes
borrowed_money early_frost""")
_OUTCOMES = _words("""outlasts_gold needs_no_sharpening keeps_its_own_counsel feeds_the_stranger forgives_nobody
never_sleeps opens_every_gate makes_good_neighbours tells_no_lies wins_the_long_race returns_by_night""")

# --------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------

Slot = Callable[[random.Random], str]


def _one_of(words: Sequence[str]) -> Slot:
    return lambda rng: words[int(rng.random() * len(words))]


def _number(low: int, high: int) -> Slot:
    return lambda rng: str(rng.randint(low, high))


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(SURNAMES)}"


def _phrase(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(_ADVICE)} twice before you {rng.choice(_DEEDS)}"
    return f"{rng.choice(_SILENCES)} {rng.choice(_OUTCOMES)}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(1, 12)}:{rng.randrange(5, 60, 5):02d} in the {rng.choice(('morning', 'evening'))}"


SLOTS: dict[str, Slot] = {
    "person": _person,
    "town": _one_of(TOWNS),
    "village": _one_of(VILLAGES),
    "street": _one_of(STREETS),
    "ship": _one_of(SHIPS),
    "pet": _one_of(PETS),
    "colour": _one_of(COLOURS),
    "animal": _one_of(ANIMALS),
    "bird": _one_of(BIRDS),
    "beasts": _one_of(BEASTS),
    "dish": _one_of(DISHES),
    "food": _one_of(FOODS),
    "fruits": _one_of(FRUITS),
    "herb": _one_of(HERBS),
    "drink": _one_of(DRINKS),
    "material": _one_of(MATERIALS),
    "metal": _one_of(METALS),
    "cloth": _one_of(CLOTHS),
    "instrument": _one_of(INSTRUMENTS),
    "trade": _one_of(TRADES),
    "flowers": _one_of(FLOWERS),
    "tree": _one_of(TREES),
    "jewel": _one_of(JEWELS),
    "language": _one_of(LANGUAGES),
    "country": _one_of(COUNTRIES),
    "game": _one_of(GAMES),
    "goods": _one_of(GOODS),
    "vehicle": _one_of(VEHICLES),
    "theme": _one_of(THEMES),
    "word": _one_of(WORDS),
    "phrase": _phrase,
    "time": _time,
    "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
    "month": lambda rng: f"{rng.choice(MONTHS)} {rng.randint(2031, 2089)}",
    "weekday": _one_of(WEEKDAYS),
    "year": _number(1612, 1968),
    "tens": _number(13, 97),
    "hundreds": _number(102, 998),
    "thousands": _number(1103, 9897),
    "code": _number(10234, 98765),
    "parcel": lambda rng: f"{rng.choice('BCDFGHJKLMNPQRSTVWXZ')}{rng.randint(102, 987)}",
}

# --------------------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------------------


class TooShortError(PromptError):
    """A document's length has no room for its facts."""


@dataclass(frozen=True)
class Kind:
    """A fact without its value, and without its key where there are several of the kind.

    Attributes:
        value, key: their slots; key "" of a fact that is unlike all others.
        statement: the sentence, without its full stop, with {v} and {k}; what stands before {v} is what an answer begins with.
        question, paraphrase: it is asked by; the paraphrase shares no word with the statement but the key and small words.
        begun: what an answer to the paraphrase begins with.
        counted: what is counted where it is asked of how many keys the text says it.
    """

    name: str
    value: str
    statement: str
    question: str
    paraphrase: str
    begun: str
    key: str = ""
    counted: str = ""


def _unlike(name: str, value: str, statement: str, question: str, paraphrase: str, begun: str) -> Kind:
    return Kind(name, value, statement, question, paraphrase, begun)


UNLIKE: tuple[Kind, ...] = tuple(
    _unlike(*texts)
    for texts in (
        ("lighthouse", "person", "the lighthouse on the northern cape was built by {v}",
         "Who built the lighthouse on the northern cape?",
         "Which architect is behind the tower that guides ships past that headland?", "the architect of the tower is"),
        ("dog", "pet", "the innkeeper's old dog answers to the name {v}", "What name does the innkeeper's old dog answer to?",
         "What is the landlord's hound called?", "the landlord's hound is called"),
        ("bell", "town", "the copper bell of the chapel was cast in {v}", "Where was the copper bell of the chapel cast?",
         "In which city did founders make the thing that rings for prayers?", "it was made in the city of"),
        ("ferry", "time", "the last ferry leaves the island at {v}", "When does the last ferry leave the island?",
         "What is the hour of the final boat back to the mainland?", "the final boat to the mainland goes at"),
        ("maps", "hundreds", "the number of maps that the archive keeps is {v}", "What is the number of maps that the archive keeps?",
         "How many charts are stored in the record office?", "in the record office there are"),
        ("soup", "food", "at every wedding the villagers serve a soup of {v}", "What soup do the villagers serve at every wedding?",
         "When a couple marries, what is the broth made from that the guests eat?", "the broth is made from"),
        ("bicycle", "colour", "last spring the postman painted his bicycle {v}", "In what colour did the postman paint his bicycle last spring?",
         "Which colour has the mail carrier's two-wheeler?", "the colour of the two-wheeler is"),
        ("daughter", "instrument", "after school the mayor's daughter practises the {v}", "What does the mayor's daughter practise after school?",
         "Which musical instrument does the girl play whose father runs the town?", "the girl plays the"),
        ("bridge", "date", "the old stone bridge collapsed on {v}", "When did the old stone bridge collapse?",
         "On what day did the river crossing fall down?", "the river crossing fall down happened on"),
        ("throne", "material", "the new throne was carved from {v}", "What was the new throne carved from?",
         "Out of what did craftsmen make the seat for the king?", "the seat for the king is made of"),
        ("brewery", "year", "the brewery by the canal opened in {v}", "In which year did the brewery by the canal open?",
         "Since when have people made beer next to the waterway?", "people have made beer there since the year"),
        ("motto", "phrase", "the motto over the library door is: {v}", "What is the motto over the library door?",
         "Which saying stands above the entrance to the house of books?", "the saying above the entrance reads:"),
        ("arms", "animal", "the coat of arms of the valley shows a {v}", "What does the coat of arms of the valley show?",
         "Which beast appears on the region's heraldic shield?", "the beast on the shield is a"),
        ("captain", "trade", "before he went to sea, the captain worked as a {v}", "What did the captain work as before he went to sea?",
         "What profession did the skipper have on land?", "on land the skipper was a"),
        ("wall", "flowers", "along the south wall the gardener plants {v}", "What does the gardener plant along the south wall?",
         "Which blossoms grow on the sunny side of the enclosure?", "the blossoms that grow there are"),
        ("teapot", "hundreds", "at the auction the blue teapot fetched {v} dollars", "How many dollars did the blue teapot fetch at the auction?",
         "What price did a bidder pay for the piece of crockery?", "the price that the bidder paid was"),
        ("pharmacy", "street", "the night pharmacy is on {v}", "On which street is the night pharmacy?",
         "Where can one buy medicine after dark?", "after dark one can buy medicine at"),
        ("rubbish", "weekday", "the rubbish is collected every {v}", "When is the rubbish collected?",
         "On what day of the week do the bins get emptied?", "the bins get emptied on a"),
        ("choir", "tens", "the number of members in the choir is {v}", "What is the number of members in the choir?",
         "How many singers belong to the ensemble?", "the ensemble has a total of"),
        ("meteorite", "ship", "the whaler that brought the meteorite home was the {v}", "Which whaler brought the meteorite home?",
         "What was the vessel called that carried the rock from space?", "the vessel was called the"),
        ("chess", "person", "the winner of the chess tournament was {v}", "Who was the winner of the chess tournament?",
         "Which player beat everybody else at the board game?", "the player who beat everybody else is"),
        ("ring", "jewel", "in the snow the duchess lost a ring with a {v}", "What was on the ring that the duchess lost in the snow?",
         "Which gem did the noblewoman drop on a cold day?", "the gem that the noblewoman dropped is a"),
        ("stolen violin", "town", "the stolen violin turned up in {v}", "Where did the stolen violin turn up?",
         "In which city did the police find the fiddle that thieves had taken?", "the police found the fiddle in the city of"),
        ("safe", "code", "the safe in the cellar opens with the combination {v}", "With which combination does the safe in the cellar open?",
         "Which digits must be dialled to get at the valuables under the house?", "the digits to be dialled are"),
        ("hut", "tree", "the children built their hut in a {v}", "In what did the children build their hut?",
         "Up which kind of plant did the kids make a den?", "the den is up a"),
        ("fountain", "language", "the inscription on the fountain is in {v}", "In which language is the inscription on the fountain?",
         "What tongue do the carved letters at the water basin belong to?", "the carved letters belong to"),
        ("dome", "time", "the observatory closes its dome at {v}", "When does the observatory close its dome?",
         "What is the hour that the astronomers shut the roof?", "the astronomers shut the roof at"),
        ("cough", "herb", "against the cough the doctor prescribed {v}", "What did the doctor prescribe against the cough?",
         "Which remedy did the physician recommend for the sore throat?", "the physician recommended a remedy of"),
        ("barn", "material", "the roof of the barn is covered with {v}", "With what is the roof of the barn covered?",
         "What lies on top of the building where hay is kept?", "on top of the building lies"),
        ("lecture", "person", "the lecture on volcanoes was given by {v}", "Who gave the lecture on volcanoes?",
         "Which speaker talked about mountains that spit fire?", "the speaker who talked about them was"),
        ("committee", "hundreds", "on Tuesdays the committee meets in room {v}", "In which room does the committee meet on Tuesdays?",
         "Where in the building does the board assemble?", "the board assembles at door number"),
        ("waterfall", "tens", "the path from the camp to the waterfall has a length of {v} kilometres",
         "What length has the path from the camp to the waterfall?", "How far must hikers walk between their tents and the cascade?",
         "the distance that hikers must walk is"),
        ("sisters", "drink", "on Sundays the old sisters drink {v}", "What do the old sisters drink on Sundays?",
         "Which beverage do the elderly siblings enjoy at weekends?", "the beverage that the elderly siblings enjoy is"),
        ("nest", "bird", "the bird that nests in the broken clock is a {v}", "Which bird nests in the broken clock?",
         "What feathered creature has made a home inside the timepiece that no longer works?", "the feathered creature is a"),
        ("zoo", "tens", "the age of the oldest tortoise in the zoo is {v} years", "What is the age of the oldest tortoise in the zoo?",
         "For how long has the most senior reptile of the animal park lived?", "the most senior reptile has lived for"),
        ("parrot", "word", "the word that calms the parrot is {v}", "Which word calms the parrot?",
         "What must one say so that the talking pet gets quiet?", "so that the pet gets quiet, one must say"),
        ("expedition", "town", "the expedition spent the winter in {v}", "Where did the expedition spend the winter?",
         "In which place did the explorers stay during the cold months?", "during the cold months the explorers stayed in"),
        ("portrait", "person", "the portrait in the hall was painted by {v}", "Who painted the portrait in the hall?",
         "Which artist made the picture of a face near the entrance?", "the artist who made the picture is"),
        ("mill", "cloth", "the sails of the mill are made of {v}", "What are the sails of the mill made of?",
         "Which fabric catches the wind so that flour can be ground?", "the fabric that catches the wind is"),
        ("shaft", "tens", "the depth of the well behind the church is {v} metres", "What is the depth of the well behind the church?",
         "How far down does the water hole near the house of worship reach?", "the water hole reaches down"),
        ("express", "tens", "the express to the mountains leaves from platform {v}", "From which platform does the express to the mountains leave?",
         "On what track do travellers board the fast train to the peaks?", "travellers board the fast train on track"),
        ("experiment", "hundreds", "the experiment was repeated so often that the count is {v}", "What is the count of how often the experiment was repeated?",
         "How many further trials did the scientists run?", "the scientists ran a number of further trials, namely"),
        ("apprentices", "game", "in their lunch break the apprentices play {v}", "What do the apprentices play in their lunch break?",
         "Which sport do the trainees amuse themselves with at midday?", "at midday the trainees amuse themselves with"),
        ("keys", "metal", "the keys of the treasury are made of {v}", "What are the keys of the treasury made of?",
         "From which ore were the openers of the strongroom forged?", "the openers of the strongroom were forged from"),
        ("stamps", "beasts", "the professor collects stamps that show {v}", "What do the stamps show that the professor collects?",
         "Which motif does the academic look for when he buys old postage?", "the motif that the academic looks for is"),
        ("pie", "food", "the cook of the hotel is famous for a pie with {v}", "What is in the pie that the cook of the hotel is famous for?",
         "Which filling made the chef so well known among guests?", "the filling that made the chef well known is"),
        ("bakery", "street", "in autumn the bakery moved to {v}", "Where did the bakery move in autumn?",
         "What is the new address of the shop that sells bread?", "the new address of the shop is"),
        ("pool", "weekday", "the swimming pool stays shut every {v}", "When does the swimming pool stay shut?",
         "On what day of the week can nobody bathe indoors?", "nobody can bathe indoors on a"),
        ("comet", "month", "the comet will come back in {v}", "When will the comet come back?",
         "At what date is the wandering star with the tail visible again?", "the wandering star is visible again in"),
        ("referee", "colour", "the referee of the final wore a scarf that was {v}", "What colour was the scarf that the referee of the final wore?",
         "How was the wool dyed that kept the umpire's neck warm?", "the wool around the umpire's neck was dyed"),
        ("diary", "phrase", "the last words of the diary are: {v}", "What are the last words of the diary?",
         "How does the journal end?", "the journal ends like this:"),
        ("wallet", "person", "the wallet that was lost on the tram belongs to {v}", "To whom does the wallet belong that was lost on the tram?",
         "Who is the owner of the purse that somebody found in public transport?", "the owner of the purse is"),
        ("raffle", "thousands", "the ticket that won the raffle has the number {v}", "Which number has the ticket that won the raffle?",
         "What was printed on the slip of paper that got first prize in the draw?", "printed on the slip of paper was"),
        ("glue", "food", "the secret of the carpenter's glue is a spoonful of {v}", "What is the secret of the carpenter's glue?",
         "Which ingredient does the joiner add to his adhesive?", "the ingredient that the joiner adds is"),
        ("hermit", "thousands", "the cave of the hermit lies at an altitude of {v} metres", "At what altitude does the cave of the hermit lie?",
         "How high up does the recluse live?", "the recluse lives at a height of"),
        ("vet", "vehicle", "the vet visits the farms on a {v}", "On what does the vet visit the farms?",
         "How does the animal doctor travel in the countryside?", "in the countryside the animal doctor travels by"),
        ("spices", "country", "the spice merchant was born in {v}", "In which country was the spice merchant born?",
         "What is the homeland of the man who sells pepper?", "the homeland of the man who sells pepper is"),
        ("whale", "thousands", "the weight of the whale skeleton is {v} kilograms", "What is the weight of the whale skeleton?",
         "How heavy are the bones of the giant sea mammal?", "when put on scales, the bones of the sea mammal show"),
        ("twins", "person", "the twins were named after {v}", "After whom were the twins named?",
         "Which relative do the two babies owe what they are called to?", "for what they are called, the two babies owe thanks to"),
        ("orchard", "fruits", "the monastery's orchard is known for its {v}", "What is the monastery's orchard known for?",
         "Which crop from the garden of the monks is popular?", "the popular crop from the garden of the monks is"),
        ("theatre", "theme", "the theatre will open again with a play about {v}", "What is the play about with which the theatre will open again?",
         "Which subject does the first drama on stage have once the renovation is over?", "the subject of the first drama is"),
        ("dairy", "time", "the alarm bell in the dairy rings at {v}", "When does the alarm bell in the dairy ring?",
         "What is the hour that the milk workers get woken?", "the milk workers get woken at"),
        ("teacher", "goods", "the dancing teacher lives above a shop for {v}", "Above which shop does the dancing teacher live?",
         "What is sold downstairs from the ballet tutor?", "downstairs from the ballet tutor they sell"),
        ("lawn", "animal", "the hedge in front of the palace is cut in the shape of a {v}", "In what shape is the hedge in front of the palace cut?",
         "Which creature do the trimmed bushes outside the royal residence resemble?", "the trimmed bushes resemble a"),
    )
)  # fmt: skip


def _alike(
    name: str, key: str, value: str, statement: str, question: str, paraphrase: str, begun: str, counted: str
) -> Kind:
    return Kind(name, value, statement, question, paraphrase, begun, key, counted)


ALIKE: tuple[Kind, ...] = tuple(
    _alike(*texts)
    for texts in (
        ("door code", "person", "code", "the door code of {k} is {v}", "What is the door code of {k}?",
         "What must {k} type in to enter?", "to enter, {k} must type in", "a door code"),
        ("birthplace", "person", "town", "{k} was born in {v}", "Where was {k} born?",
         "Which city is the native place of {k}?", "the native place of {k} is", "a place of birth"),
        ("dish", "person", "dish", "the favourite dish of {k} is {v}", "What is the favourite dish of {k}?",
         "What does {k} like best to eat?", "{k} likes best to eat", "a favourite dish"),
        ("appointment", "person", "date", "the appointment of {k} is on {v}", "When is the appointment of {k}?",
         "Which day is {k} expected to come?", "{k} is expected to come on", "an appointment"),
        ("locker", "person", "hundreds", "the locker of {k} has the number {v}", "Which number has the locker of {k}?",
         "What compartment are the belongings of {k} stored in?", "the belongings of {k} are stored in compartment", "a locker"),
        ("instrument", "person", "instrument", "in the orchestra {k} plays the {v}", "What does {k} play in the orchestra?",
         "Which musical instrument does {k} perform on?", "{k} performs on the", "an instrument in the orchestra"),
        ("trade", "person", "trade", "{k} earns a living as a {v}", "As what does {k} earn a living?",
         "What is the occupation of {k}?", "the occupation of {k} is that of a", "a trade"),
        ("pet", "person", "animal", "the pet of {k} is a {v}", "What is the pet of {k}?",
         "Which animal does {k} keep?", "{k} keeps a", "a pet"),
        ("mayor", "village", "person", "the mayor of {k} is {v}", "Who is the mayor of {k}?",
         "Which person governs {k}?", "{k} is governed by", "a mayor"),
        ("fair", "village", "date", "the fair in {k} begins on {v}", "When does the fair in {k} begin?",
         "Which day do the festivities start in {k}?", "the festivities start in {k} on", "a fair"),
        ("cargo", "ship", "goods", "the cargo of the {k} is {v}", "What is the cargo of the {k}?",
         "Which freight does the {k} have aboard?", "the {k} has freight aboard, namely", "a cargo"),
        ("port", "ship", "town", "the home port of the {k} is {v}", "What is the home port of the {k}?",
         "In which harbour is the {k} registered?", "the {k} is registered in the harbour of", "a home port"),
        ("parcel", "parcel", "street", "the address on parcel {k} is {v}", "What is the address on parcel {k}?",
         "Where must the courier bring {k}?", "the courier must bring {k} to", "an address"),
    )
)  # fmt: skip

RELATIONS = _words("""accountant dentist godfather landlady lawyer neighbour piano_teacher hairdresser tailor tutor
cousin business_partner best_friend biographer bodyguard rival""")

ABSENT = "not stated in the text"
REFUSALS = (
    ABSENT, "not stated", "not mentioned", "not given", "not specified", "not provided", "not said", "not known", "not in the text", "not contain",
    "not say", "not state", "not mention", "not give", "not specify", "not provide", "not include", "not have", "doesn't say", "doesn't state",
    "doesn't mention", "doesn't give", "doesn't specify", "doesn't provide", "doesn't contain", "no information", "no mention", "unknown",
    "unspecified", "cannot be determined", "cannot answer", "can't answer", "cannot find", "couldn't find", "don't know",
)  # fmt: skip
"""One of them is in an answer that says that the text does not say it."""


@dataclass(frozen=True)
class Fact:
    """A sentence that was put into a text.

    Attributes:
        key: what it is about, where there are several of the kind.
        start, stop: of the sentence, in characters of the document's text.
        depth: its start as a share of the text.
    """

    kind: str
    key: str
    value: str
    sentence: str
    start: int = 0
    stop: int = 0
    depth: float = 0.0

    @property
    def is_alike(self) -> bool:
        """There are others of its kind."""
        return self.key != ""


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        answer: as the text has it.
        begun: what an answer begins with, up to the answer itself.
        accepted: strings of which an answer has to have one.
        facts: what it asks for, as indices of the document's facts; for two hops the link, then the fact; for a count all that
            count; empty where the text does not say it.
    """

    form: Form
    kind: str
    text: str
    answer: str
    begun: str
    accepted: tuple[str, ...]
    facts: tuple[int, ...]

    def is_right(self, written: str) -> bool:
        """Whether an answer gives what is expected."""
        said = " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", written).split())
        return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", said, re.IGNORECASE) for one in self.accepted)


@dataclass(frozen=True)
class FactDocument:
    """A text with facts in it, in the order of the text, and questions about them."""

    text: str
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]


def accepted_forms(value: str) -> tuple[str, ...]:
    """The ways to write a value that an answer may take."""
    forms = [value]
    if match := re.fullmatch(r"(\d+):(\d\d) in the (morning|evening)", value):
        hour, minutes, half = match.groups()
        short = "a" if half == "morning" else "p"
        forms += [
            f"{hour}:{minutes} {short}m",
            f"{hour}:{minutes} {short}.m",
            f"{hour}:{minutes}{short}m",
            f"{hour}:{minutes}",
        ]
    if match := re.fullmatch(rf"(\d+) ({'|'.join(MONTHS)})", value):
        day, month = match.groups()
        ending = {"1": "st", "2": "nd", "3": "rd"}.get(day[-1], "th") if day not in ("11", "12", "13") else "th"
        forms += [
            f"{month} {day}",
            f"{day}{ending} {month}",
            f"{day}{ending} of {month}",
            f"{day} of {month}",
            f"{month} {day}{ending}",
        ]
    if value in NUMBERS:
        forms.append(str(NUMBERS.index(value)))
    return tuple(forms)


# --------------------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------------------

Count = Callable[[str], int]
"""The number of tokens of a text."""

# where a sentence may be put in: behind one, or behind a paragraph
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]?(?=\s+[\"'“‘(\[]?[A-Z])|(?<=[。！？])|(?<=\S)(?=\n[ \t]*\n)")
_LINE_END = re.compile(r"(?<=\S)(?=\s)")
_MAX_CHARACTERS = 24  # of a token, on the average of a text


def default_text() -> str:
    """The documentation of Python's language that comes with Python: about 700,000 characters, under its licence."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def load_text(paths: Iterable[Path]) -> str:
    """The text of files, and of the files in folders, one after the other.

    Raises:
        DocumentError: one of them cannot be read.
    """
    files = [file for path in paths for file in (walk(path).files if path.is_dir() else (path,))]
    return "\n\n".join(load(file).text.strip() for file in files)


class Haystack:
    """A text, and where in it a sentence may be put.

    Args:
        text: any; of one without sentences the borders of words are taken.

    Raises:
        PromptError: it has no words.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.borders = sorted({match.end() for match in _SENTENCE_END.finditer(self.text)})
        if len(self.borders) < 2 + len(self.text) // 4000:
            self.borders = [match.end() for match in _LINE_END.finditer(self.text)]
        if not self.borders:
            raise PromptError("the text to hide facts in has no sentences: give a longer one")

    def turned(self, rng: random.Random) -> Haystack:
        """The same, beginning at one of its borders, and at its end going on with its beginning."""
        start = rng.choice(self.borders)
        turned = Haystack.__new__(Haystack)
        rest, before = self.text[start:].lstrip(), self.text[:start]
        skipped = len(self.text) - start - len(rest)
        turned.text = f"{rest}\n\n{before}"
        behind = [border - start - skipped for border in self.borders if border > start + skipped]
        turned.borders = [*behind, len(rest), *(border + len(rest) + 2 for border in self.borders if border <= start)]
        return turned


def make_document(
    haystack: Haystack,
    seed: int | str,
    n_tokens: int | None = None,
    count: Count | None = None,
    *,
    n_unlike: int = 12,
    n_alike: int = 12,
    n_links: int = 4,
    n_counts: int = 2,
    n_absent: int = 4,
) -> FactDocument:
    """A stretch of a text with facts in it, spread over its whole length, and questions about them.

    Args:
        seed: chooses the stretch, the facts and their places.
        n_tokens: of the document, at most; it is filled up to it with whole sentences. None: the whole text from its beginning.
        count: counts tokens; needed for n_tokens.
        n_unlike: facts of kinds of their own; each is asked for literally and in other words.
        n_alike: facts of a few kinds, each with a key of its own; asked for in the same ways.
        n_links: sentences that name another key of one of those facts; each is asked for in two hops.
        n_counts: questions of how many.
        n_absent: questions for what the text does not say.

    Raises:
        PromptError: the text is too short for that length or those facts.
    """
    rng = random.Random(f"facts:{seed}")
    if n_tokens is not None:
        haystack = haystack.turned(rng)
    facts, questions = _make_facts(rng, haystack.text, n_unlike, n_alike, n_links, n_counts, n_absent)
    body = haystack.text
    borders = haystack.borders
    if n_tokens is not None:
        if count is None:
            raise TypeError("n_tokens is given without count")
        budget = n_tokens - sum(count(f" {fact.sentence}") for fact in facts)
        end = _longest(haystack, budget, count)
        if end == len(borders) - 1:
            raise PromptError(f"the text to hide facts in has fewer than {n_tokens} tokens: give a longer one")
        while True:
            if end < len(facts):
                raise TooShortError(f"{n_tokens} tokens are too few for {len(facts)} facts: make it longer")
            text, places = _put(rng.getstate(), body[: borders[end]], borders[:end], facts)
            over = count(text) - n_tokens
            if over <= 0:
                break
            end -= max(1, over // 64)
    else:
        text, places = _put(rng.getstate(), body, borders, facts)
    placed = {
        i: Fact(fact.kind, fact.key, fact.value, fact.sentence, start, start + len(fact.sentence), start / len(text))
        for (i, fact), start in zip(enumerate(facts), places)
    }
    order = sorted(placed, key=lambda i: placed[i].start)
    new = {old: i for i, old in enumerate(order)}
    asked = tuple(
        Question(q.form, q.kind, q.text, q.answer, q.begun, q.accepted, tuple(new[i] for i in q.facts))
        for q in questions
    )
    return FactDocument(text, tuple(placed[i] for i in order), asked)


def _longest(haystack: Haystack, budget: int, count: Count) -> int:
    """The index of the last border before which there are at most budget tokens; -1 where there is none."""
    text, borders = haystack.text, haystack.borders
    low, high = -1, min(len(borders), bisect_right(borders, _MAX_CHARACTERS * max(0, budget)))
    while high - low > 1:
        middle = (low + high) // 2
        if count(text[: borders[middle]]) <= budget:
            low = middle
        else:
            high = middle
    return low


def _put(state: object, body: str, borders: Sequence[int], facts: Sequence[Fact]) -> tuple[str, list[int]]:
    """A text with the facts in it, one in each n-th of it, and where their sentences begin."""
    rng = random.Random()
    rng.setstate(state)  # type: ignore[arg-type]
    if len(borders) < len(facts):
        raise PromptError(f"the text to hide {len(facts)} facts in has {len(borders)} sentences: give a longer one")
    order = list(range(len(facts)))
    rng.shuffle(order)
    taken: dict[int, int] = {}  # border -> fact
    for nth, i in enumerate(order):
        wanted = (nth + rng.random()) / len(facts) * len(body)
        at = min(bisect_left(borders, wanted), len(borders) - 1)
        step = 0
        while (place := at + (step + 1) // 2 * (1 if step % 2 else -1)) in taken or not 0 <= place < len(borders):
            step += 1
        taken[place] = i
    pieces: list[str] = []
    places = [0] * len(facts)
    done = length = 0
    for border in sorted(taken):
        before, i = body[done : borders[border]], taken[border]
        places[i] = length + len(before) + 1
        pieces += [before, f" {facts[i].sentence}"]
        length = places[i] + len(facts[i].sentence)
        done = borders[border]
    return "".join([*pieces, body[done:]]), places


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _begun(kind: Kind, key: str) -> str:
    return _sentence(kind.statement.partition("{v}")[0].format(k=key).rstrip())


class _Values:
    """Values of slots, none of them twice, and none of names that the text has."""

    def __init__(self, rng: random.Random, text: str) -> None:
        self._rng, self._text = rng, text
        self._taken: set[str] = set()

    def new(self, slot: str) -> str:
        for _ in range(1000):
            value = SLOTS[slot](self._rng)
            parts = value.split() if slot == "person" else [value]
            is_name = slot in ("person", "village", "ship", "parcel")
            if self._taken.isdisjoint(parts) and not (is_name and value in self._text):
                self._taken.update(parts)
                return value
        raise PromptError("there are not enough words for so many facts: ask for fewer")


def _make_facts(
    rng: random.Random, text: str, n_unlike: int, n_alike: int, n_links: int, n_counts: int, n_absent: int
) -> tuple[list[Fact], list[Question]]:
    if n_unlike > len(UNLIKE):
        raise PromptError(f"there are {len(UNLIKE)} kinds of facts that are unlike all others: ask for at most so many")
    values = _Values(rng, text)
    facts: list[Fact] = []
    stated: list[Kind] = []  # of each fact: kinds of other lists may have names that are here too
    questions: list[Question] = []

    def state(kind: Kind, key: str) -> Fact:
        value = values.new(kind.value)
        stated.append(kind)
        facts.append(Fact(kind.name, key, value, _sentence(kind.statement.format(k=key, v=value)) + "."))
        return facts[-1]

    def ask(form: Form, kind: Kind, key: str, answer: str, about: Sequence[int]) -> None:
        plain = form != "paraphrase"
        asked = (kind.question if plain else kind.paraphrase).format(k=key)
        begun = _begun(kind, key) if plain else _sentence(kind.begun.format(k=key))
        accepted = REFUSALS if form == "absent" else accepted_forms(answer)
        questions.append(Question(form, kind.name, asked, answer, begun, accepted, tuple(about)))

    kinds = rng.sample(UNLIKE, len(UNLIKE))
    for kind in kinds[:n_unlike]:
        state(kind, "")
    groups = rng.sample(ALIKE, min(len(ALIKE), max(1, n_alike // 6)))
    if n_links and not any(kind.key == "person" for kind in groups):
        groups[0] = rng.choice([kind for kind in ALIKE if kind.key == "person"])
    for i in range(n_alike):
        kind = groups[i % len(groups)]
        state(kind, values.new(kind.key))
    for i, (kind, fact) in enumerate(zip(stated, facts)):
        for form in ("literal", "paraphrase"):
            ask(form, kind, fact.key, fact.value, [i])

    persons = [i for i, kind in enumerate(stated) if kind.key == "person"]
    if n_links and not persons:
        raise PromptError("two hops need facts that look alike: ask for some")
    for n in range(n_links):
        i = persons[n % len(persons)]
        relation, of = rng.choice(RELATIONS), values.new("person")
        facts.append(Fact("link", of, facts[i].key, f"The {relation} of {of} is {facts[i].key}."))
        ask("two-hop", stated[i], f"the {relation} of {of}", facts[i].value, [len(facts) - 1, i])

    for n in range(n_counts):
        kind = groups[n % len(groups)]
        there = [i for i, other in enumerate(stated) if other is kind]
        if not there:
            raise PromptError("counting needs facts that look alike: ask for some")
        n_there = rng.randint(1, min(4, len(there)))
        chosen = sorted(rng.sample(there, n_there))
        listed = [facts[i].key for i in chosen] + [values.new(kind.key) for _ in range(5 - n_there)]
        rng.shuffle(listed)
        names = f"{', '.join(listed[:-1])} and {listed[-1]}"
        number = NUMBERS[n_there]
        questions.append(
            Question(
                "count", kind.name, f"For how many of these does the text state {kind.counted}: {names}?", number,
                f"The text states {kind.counted} for", accepted_forms(number), tuple(chosen),
            )
        )  # fmt: skip

    spare = kinds[n_unlike:]
    for n in range(n_absent):
        if n % 2 and spare:
            ask("absent", spare.pop(), "", ABSENT, [])
        else:
            kind = groups[n // 2 % len(groups)]
            ask("absent", kind, values.new(kind.key), ABSENT, [])
    return facts, questions
