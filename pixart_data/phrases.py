"""The words that quality is measured by, and how compiled code finds them.

Phrases are written as NLTK cuts them, in lower case, one blank between tokens: "i 'm sorry". Where an apostrophe is
typed as ’ NLTK cuts otherwise, and `spellings` gives that form too. The lists are this project's own. Ideas:

- spatial relations: the prepositions that grounded captioning counts (Visual Genome's predicates, SPICE's relations),
  and the phrases by which vision-language models place things in a picture;
- hedges: what Hyland (Hedging in Scientific Research Articles) calls epistemic verbs, modals and adverbs; a model that
  guesses uses them, so they stand in for hallucination where nothing better is at hand;
- boilerplate: openers that most sentences of LLaVA, InstructBLIP, MiniGPT-4 and Shikra begin with and that say nothing
  of the picture;
- refusals: how instruction-tuned models decline;
- generic nouns: those of the frame, not of what it shows.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# fmt: off
_PLACES = ("left", "right")

SPATIAL = (
    "on", "onto", "upon", "atop", "on top of", "over", "above", "under", "underneath", "beneath", "below",
    "behind", "in front of", "ahead of", "in back of", "beside", "next to", "near", "nearby", "near to",
    "close to", "closer to", "adjacent to", "alongside", "along", "by the side of", "at the side of", "opposite",
    "across", "across from", "between", "in between", "among", "amongst", "amid", "amidst", "around", "surrounding",
    "surrounded by", "inside", "inside of", "outside", "outside of", "within", "into", "out of", "through",
    "throughout", "against", "towards", "toward", "beyond", "past", "facing", "far from", "away from", "further away",
    "in the background", "in the foreground", "in the distance", "in the middle", "in the middle of", "in the center",
    "in the center of", "in the centre", "in the centre of", "at the center", "at the center of", "at the centre",
    "at the top", "at the top of", "at the bottom", "at the bottom of", "at the edge of", "on the edge of",
    "in the corner", "in the corner of", "at the back", "at the back of", "at the front", "at the front of",
    "on the far side of", "on either side", "on either side of", "on both sides", "on both sides of",
    "on the other side", "on the other side of", "on each side", "on each side of", "side by side",
    *(f"{before} the {place}{after}" for before, place, after in product(
        ("to", "on", "at", "towards", "toward", "from"), _PLACES, ("", " of", " side", " side of"))),
    *(f"{before} the {place} hand side" for before, place in product(("on", "at"), _PLACES)),
    *(f"in the {height} {place} corner" for height, place in product(("upper", "lower", "top", "bottom"), _PLACES)),
)
"""Relations between things, or between a thing and the frame. Bare "in", "at" and "with" are left out: they relate as
often as not something else ("in black", "at least", "with a smile")."""

HEDGES = (
    "appears", "appear", "appeared", "appearing", "seems", "seem", "seemed", "seemingly", "apparently", "presumably",
    "possibly", "perhaps", "maybe", "probably", "likely", "potentially", "supposedly", "might", "may be", "may have",
    "may also", "may not", "may or may not", "could be", "could have", "could also", "can be assumed",
    "suggest", "suggests", "suggesting", "suggested", "indicate", "indicates", "indicating", "imply", "implies",
    "implying", "as if", "as though", "looks like", "look like", "looking like", "looks to be", "some sort of",
    "some kind of", "some type of", "or something", "what looks", "hinting", "hints at", "believed to be",
    "not clear", "unclear", "not possible to", "difficult to tell", "hard to tell", "difficult to determine",
)
"""Words of one who is not sure. A caption that guesses is not wrong for it; one that guesses often was not looking."""

_FRAMES = ("image", "picture", "photo", "photograph", "scene", "painting", "illustration")

BOILERPLATE = (
    *(f"{the} {frame} {verb}" for the, frame, verb in product(("the", "this"), _FRAMES, (
        "features", "shows", "depicts", "captures", "displays", "showcases", "presents", "portrays", "contains",
        "includes", "is of", "is a", "is an", "is set", "is taken", "consists of", "illustrates", "conveys",
        "suggests", "appears", "seems", "takes place", "also features", "also shows", "also includes", "also has",
        "has"))),
    *(f"the overall {thing}" for thing in ("scene", "atmosphere", "mood", "image", "composition", "setting", "tone")),
    *(f"the {thing} of the {frame}" for thing, frame in product(("atmosphere", "mood", "setting", "style"), _FRAMES)),
    *(f"in {the} {frame}" for the, frame in product(("the", "this"), _FRAMES)),
    "in addition", "in addition to", "additionally", "furthermore", "moreover", "besides", "aside from", "apart from",
    "overall", "in summary", "in conclusion", "in general", "it is worth noting", "it appears", "it seems",
    "it is also possible", "there is also", "there are also", "there appears to be", "there appear to be",
    "there seems to be", "there are several other", "there are a few other", "there are various",
    "there are multiple", "other notable", "other elements", "some of them", "some other",
)
"""What a sentence begins with when nothing of the picture has been said yet; counted at the start of sentences only."""

REFUSALS = (
    "i 'm sorry", "i am sorry", "i 'm afraid", "i am afraid", "sorry ,", "sorry but", "i apologize", "i apologise",
    "my apologies", "i can not", "i ca n't", "i could not", "i could n't", "i do n't see", "i do not see",
    "i do n't have", "i do not have", "i am unable", "i 'm unable", "i am not able", "i 'm not able", "i will not",
    "i wo n't", "i 'm just an", "i am just an", "i must decline", "unfortunately , i", "as an ai",
    "as a language model", "as a large language model", "as an artificial intelligence", "as a text-based",
    "as a text based", "there is no image", "there is no picture", "no image was", "no image provided",
    "the image is not visible", "the image was not provided", "please provide", "please upload", "could you please",
    "can you please",
)
"""What a sentence begins with when the model declines, or says that it sees nothing."""

GENERIC_NOUNS = (
    "image", "images", "picture", "pictures", "photo", "photos", "photograph", "photographs", "scene", "scenes", "view",
    "background", "foreground", "side", "sides", "area", "areas", "part", "parts", "center", "centre", "middle",
    "atmosphere", "ambiance", "ambience", "setting", "environment", "touch", "presence", "addition", "variety",
    "overall", "composition", "position", "positions", "distance", "object", "objects", "item", "items", "thing",
    "things", "element", "elements", "frame", "section", "sections", "space", "place", "moment", "sense", "feel",
)
"""Nouns that any caption can be filled with."""
# fmt: on


class Trie(NamedTuple):
    """Phrases, as compiled code walks them; node 0 is the root.

    Attributes:
        children: The node that a lexicon id leads to, 0 where none, (nodes, ids).
        kinds: What the phrase that ends at a node is, 0 where none ends, (nodes,).
    """

    children: npt.NDArray[np.int16]
    kinds: npt.NDArray[np.int8]


def spellings(phrase: str) -> list[tuple[str, ...]]:
    """Return the tokens of a phrase, and those it is cut into where its apostrophe is a ’."""
    tokens = tuple(phrase.split())
    curly: list[str] = []
    for token in tokens:
        if token == "n't" and curly:
            curly[-1:] = [f"{curly[-1]}n", "’", "t"]
        elif len(token) > 1 and token.startswith("'"):
            curly += ["’", token[1:]]
        else:
            curly.append(token)
    return [tokens] if tuple(curly) == tokens else [tokens, tuple(curly)]


def lexicon(*lists: Iterable[str]) -> list[str]:
    """Return every word of some lists of phrases, sorted: a word's id is its position plus 1."""
    spelt = (tokens for phrases in lists for phrase in phrases for tokens in spellings(phrase))
    return sorted({token for tokens in spelt for token in tokens})


def trie(phrases: Mapping[int, Iterable[str]], words: list[str]) -> Trie:
    """Return the trie of phrases by their kind, over the ids of a lexicon that holds all of their words."""
    ids = {word: number for number, word in enumerate(words, 1)}
    nodes: list[dict[int, int]] = [{}]
    kinds = [0]
    for kind, members in phrases.items():
        for tokens in (tokens for phrase in members for tokens in spellings(phrase)):
            node = 0
            for token in tokens:
                if ids[token] not in nodes[node]:
                    nodes[node][ids[token]] = len(nodes)
                    nodes.append({})
                    kinds.append(0)
                node = nodes[node][ids[token]]
            kinds[node] = kind
    children = np.zeros((len(nodes), len(words) + 1), np.int16)
    for node, edges in enumerate(nodes):
        for word, child in edges.items():
            children[node, word] = child
    return Trie(children, np.array(kinds, np.int8))
