"""The words that the templates are filled with: one tuple per kind, in an order that the shipped tokenizer depends on.

Every word is one token of `mechjax.tasks.vocabulary` and starts with a consonant where a template puts "a" before it.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _words(
    "Mary Alice Emma Olivia Sophia Laura Julia Anna Sarah Rachel Hannah Emily Grace Chloe Lucy Ella Nora Clara Helen "
    "Diana Julie Karen Linda Susan Nancy Lisa Betty Sandra Carol Ruth Sharon Michelle Amanda Melissa Deborah Rebecca "
    "Cynthia Kathleen Amy Angela Brenda Pamela Nicole Virginia Katherine Christine Samantha Janet Catherine Martha "
    "Victoria Teresa Sara Megan Evelyn Cheryl Joan Andrea Jane Heather"
)
MALE_NAMES = _words(
    "John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Donald Steven "
    "Paul Andrew Joshua Kenneth Kevin Brian George Timothy Ronald Edward Jason Jeffrey Ryan Jacob Gary Nicholas Eric "
    "Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Gregory Frank Alexander Raymond Patrick Jack Dennis "
    "Jerry Tyler Aaron Henry Adam Nathan Peter Zachary Kyle Walter Simon Oliver"
)
NAMES = FEMALE_NAMES + MALE_NAMES

PLACES = _words(
    "store park school library garden market station hospital museum beach office church theater restaurant bakery "
    "stadium airport bank hotel farm factory gym zoo harbor castle cinema bookshop village bridge forest lake studio "
    "pharmacy court gallery palace warehouse tower kitchen campsite"
)
OBJECTS = _words(
    "drink book ring ball bottle necklace kiss basket letter ticket key lamp box cake coat computer flower guitar hat "
    "jacket kite map mirror newspaper pencil phone photo pillow plate present radio rope scarf shirt spoon sweater toy "
    "towel violin watch"
)
EVENTS = _words(
    "war siege voyage famine strike trial reign project campaign drought plague treaty mission expedition journey "
    "marriage revolt crisis construction tournament empire alliance blockade boom career contract debate dynasty "
    "experiment festival friendship investigation migration occupation partnership peace prosperity rebellion "
    "rivalry tradition"
)
PROFESSIONS = _words(
    "nurse doctor teacher lawyer farmer baker pilot painter singer writer driver carpenter plumber librarian chemist "
    "dentist soldier judge tailor gardener"
)

# Subjects and verbs form their other number with a plain "s".
SUBJECTS = _words(
    "dog cat boat tree car cloud bird horse friend neighbor student king queen boy girl cow duck engine flag fountain "
    "ghost goat kid knight leader machine monkey mountain owner parrot passenger prisoner rabbit river robot sailor "
    "scientist sheepdog ship star stranger tiger tourist train traveler uncle visitor waiter wheel worker"
)
VERBS = _words(
    "run walk sing dance sleep jump swim eat drift play work read hide speak talk laugh smile grow fall stand sit wait "
    "move turn stop start help dream shout listen look appear arrive remain stay rest travel leap climb cook paint "
    "draw learn think bark wander whisper glow float sink shake burn break shine bend roll spin return suffer "
    "struggle"
)

ADJECTIVES = _words(
    "old new cold warm dark bright quiet loud small large heavy light clean dirty empty full happy sad tired hungry "
    "busy calm brave clever gentle kind lazy proud shy strange strong weak tall short long wide narrow deep shallow "
    "soft hard smooth rough round flat sharp sweet sour bitter fresh dry wet rich poor cheap rare common simple plain "
    "red blue green yellow brown white black gray golden silver wooden broken hidden famous local foreign ancient "
    "modern perfect terrible pleasant lovely ugly pretty strict nervous silent lonely dusty muddy sunny windy rainy "
    "foggy snowy dangerous safe slow quick careful careless curious honest loyal noisy polite rude serious steady "
    "tiny huge useful useless wild tame young"
)
ADVERBS = _words(
    "very really quite rather almost nearly slightly extremely surprisingly always often sometimes rarely never "
    "usually certainly perhaps clearly probably apparently already suddenly finally again"
)
THINGS = _words(
    "air apple arm art baby bag band bar barn bat bath bay bear bed bee beer bell bench berry bike blanket blood board "
    "bone bowl brain branch brass bread breakfast brick brush bucket building bus butter button cabin camera camp "
    "candle candy card carpet carrot cave ceiling cellar chain chair chalk cheese chicken chin chocolate circle city "
    "clay cliff clock cloth clown coal coast coffee coin color comb copper corn corner cotton country cream crowd "
    "crown cup curtain desk dinner dirt dish door dress drum dust ear earth egg elbow evening eye face family fan "
    "feather fence field finger fire fish floor fog food foot fork fox frog fruit furniture game gate glass glove goal "
    "gold grain grape grass ground group hair hall hammer hand harvest hay head heart heel hill hole honey hook "
    "house ice idea ink insect iron island ivory jar jelly jewel juice jungle kettle knee knife ladder land leaf "
    "leather lemon lesson lion lip list lock log lunch magnet meal meat medal melon metal milk mill mind money moon "
    "morning moss moth motor mouse mouth mud muscle music nail neck needle nest net night noise nose note nut oak "
    "oar ocean oil onion orange oven owl paper pea peach pear pearl pen pepper piano picture pie pig pin pipe plane "
    "plant pocket poem pond pool pot potato powder prize pump puppy puzzle quilt rail rain rat rice road rock roof "
    "room root rose rug sail salad salt sand sauce saw scale scissors sea seat seed shadow sheep shelf shell shoe "
    "shop shoulder sidewalk sign silk sister skin sky sleet smoke snail snake snow soap sock sofa soil song "
    "soup spark spider sponge spring square squirrel stage stair stamp steam steel stem step stick stocking stomach "
    "stone story stove straw stream street string sugar suit summer sun swan sword table tail tea tent thread throat "
    "thumb thunder tin toe tomato tongue tooth town trail tray truck trumpet tub turkey turtle valley vase vest "
    "voice wagon wall water wave wax weather weed well wind window wine wing winter wire wolf wood wool world worm "
    "yard zipper"
)


def plural(noun: str) -> str:
    """The plural of one of `SUBJECTS`."""
    return noun + "s"


def third_person(verb: str) -> str:
    """The form of one of `VERBS` that goes with a singular subject."""
    return verb + "s"
