"""A miniature of NLTK's data files, for machines that have not got the real ones: same names, same format, own content.

The weights are random, with a lean towards what English does, so that captions hold nouns. NLTK reads them as its own:
whatever is derived from such files can be compared with NLTK itself anywhere.
"""

import json
import random
from pathlib import Path

from pixart_data.tagging.blocks import TAGS
from pixart_data.tagging.resources import (
    ABBREV_TYPES,
    CLASSES,
    COLLOCATIONS,
    ORTHO_CONTEXT,
    SENT_STARTERS,
    TAGDICT,
    WEIGHTS,
)


def split(text):
    """Return the words of a text."""
    return text.split()


NOUNS = split("""
dog cat ball grass table chair picture kitchen window street car bus man woman child people water sky tree
trees flower house door plate pizza bear bench board clock light lamp wall floor room desk laptop phone train track
station boat beach sand snow mountain field horse sheep cow bird kite plane umbrella bag coat hat shirt background
foreground image scene photo left right side top center atmosphere setting apple apples print vintage poster art
dogs cats men women children cars bowl cup knife fork spoon sandwich cake wine glass bottle vase book tv remote
""")
VERBS = split("is are was were sits stands holds rides wearing standing sitting holding ran chase makes adds see")
ADJECTIVES = split("red blue green small large old young wooden white black wet several other overall cozy bright")
OTHERS = {
    "the": "DT", "a": "DT", "an": "DT", "and": "CC", "or": "CC", "of": "IN", "in": "IN", "on": "IN", "with": "IN",
    "near": "IN", "to": "TO", "it": "PRP", "he": "PRP", "they": "PRP", "their": "PRP$", "not": "RB", "very": "RB",
    "The": "DT", "A": "DT", "It": "PRP", ".": ".", ",": ",", "'s": "POS", "can": "MD", "two": "CD", "three": "CD",
}  # fmt: skip
NAMES = split("Anna Paul London Smith Canon Nike Paris Amazon Disney Monday")
FOREIGN = split("café naïve straße Ärzte ΑΘΗΝΑ москва 東京 ½ ٣٤٥٦ Ünal İstanbul ﬁne")
ABBREVIATIONS = split("dr mr mrs st u.s e.g i.e vs etc a.m p.m inc no jr in")
SUFFIXES = split("ing ed ly ies ers ble tion ous s 's st ll n't")
_CONTEXTS = ("i word", "i-1 word", "i-2 word", "i+1 word", "i+2 word")
_EDGES = ("-START-", "-START2-", "-END-", "-END2-", "!HYPHEN", "!YEAR", "!DIGITS")

ORTHO_LETTERS = (2, 4, 8, 16, 32, 34, 36, 42, 46)
"""Values of Punkt's orthographic context: beginning, middle or unknown place, in upper or lower case."""


def write_nltk_data(folder: Path, seed: int = 0) -> None:
    """Write the seven files under a folder, as NLTK's packages unpack."""
    chance = random.Random(seed)
    for name, text in {
        WEIGHTS: json.dumps(weights(chance)),
        TAGDICT: json.dumps(OTHERS),
        CLASSES: json.dumps(list(TAGS)),
        ABBREV_TYPES: "\n".join(ABBREVIATIONS),
        COLLOCATIONS: "\n".join(["##number##\tstreet", "st\tpaul", "j\tsmith", "no\tpets", "fine\tart"]),
        SENT_STARTERS: "\n".join(["the", "it", "there", "this", "in", "a", "however"]),
        ORTHO_CONTEXT: "\n".join(
            f"{word}\t{chance.choice(ORTHO_LETTERS)}" for word in [*NOUNS, *VERBS, *OTHERS, "paul", "smith", "anna"]
        ),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o022)  # NLTK reads nothing that others may write


def weights(chance: random.Random) -> dict[str, dict[str, float]]:
    """Return weights by feature and class, of three decimals like NLTK's.

    Two thirds are coarse, so that sums tie often; 0.1 + 0.2 against 0.3 is a tie that rounding decides.
    """
    words = [*NOUNS, *VERBS, *ADJECTIVES, *NAMES, *FOREIGN, *(word for word in OTHERS if word.isalpha())]
    lower = list(dict.fromkeys([*(word.lower() for word in words), ".", ",", "'s", *_EDGES]))
    suffixes = list(dict.fromkeys([*(word[-3:] for word in [*words, *lower]), *SUFFIXES]))
    features = [f"{context} {word}" for context in _CONTEXTS for word in lower if chance.random() < 0.6]
    features += [f"{place} suffix {suffix}" for place in ("i", "i-1", "i+1") for suffix in suffixes]
    features += [f"i pref1 {letter}" for letter in sorted({word[0] for word in words}) if chance.random() < 0.7]
    tags = ["-START-", "-START2-", *TAGS]
    features += [f"{place} tag {tag}" for place in ("i-1", "i-2") for tag in tags]
    features += [f"i tag+i-2 tag {one} {two}" for one in tags for two in tags if chance.random() < 0.3]
    features += [f"i-1 tag+i word {tag} {word}" for tag in tags for word in lower if chance.random() < 0.1]
    chance.shuffle(features)
    found = {feature: _some(chance) for feature in features}
    found["bias"] = {"NN": 0.3, "JJ": 0.1, "NNP": 0.1, "VBZ": -0.2}
    _lean(found)
    return found


def _some(chance: random.Random) -> dict[str, float]:
    classes = chance.sample(TAGS, chance.randint(1, 6))
    if chance.random() < 2 / 3:
        return {tag: chance.choice((-0.2, -0.1, 0.1, 0.2, 0.3)) for tag in classes}
    return {tag: round(chance.gauss(0, 0.7), 3) or 0.001 for tag in classes}


def _lean(found: dict[str, dict[str, float]]) -> None:
    for words, tag in ((NOUNS, "NN"), (VERBS, "VBZ"), (ADJECTIVES, "JJ"), (NAMES, "NNP")):
        for word in words:
            weights_of_word = found.setdefault(f"i word {word.lower()}", {})
            weights_of_word[tag] = round(weights_of_word.get(tag, 0.0) + 2.4, 3)
    for feature, tag in (
        ("i suffix ing", "VBG"),
        ("i suffix ogs", "NNS"),
        ("i suffix ees", "NNS"),
        ("i pref1 A", "NNP"),
    ):
        found.setdefault(feature, {})[tag] = 1.5
