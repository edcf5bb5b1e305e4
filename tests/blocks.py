"""Captions that are tagged by hand, and what is counted of them, in plain Python as well."""

from collections import Counter

from pixart_data.nouns import NounCounter
from pixart_data.tagging.blocks import NOUN_TAGS
from tests.tokens import block_of

NAME = "by hand 1.0"


def counted(captions, name=NAME, approximate=False):
    """The counts of captions as the product has them."""
    block, vocabulary = block_of(captions)
    counter = NounCounter(name, approximate, vocabulary)
    counter.add(block)
    return counter.take()


def nouns_of(captions):
    """The nouns of each caption that counts, as (surface, tag)."""
    return [[pair for pair in caption if pair[1] in NOUN_TAGS] for caption in captions if caption is not None]


def occurrences(captions, key):
    """How often each noun occurs and how many captions hold it; `key` gives a noun of (surface, tag), or None."""
    total, holding = Counter(), Counter()
    for caption in nouns_of(captions):
        nouns = [noun for pair in caption if (noun := key(*pair)) is not None]
        total.update(nouns)
        holding.update(set(nouns))
    return total, holding
