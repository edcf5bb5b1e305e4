"""Captions that are tagged by hand, and what is counted of them, in plain Python as well."""

from collections import Counter

import numpy as np

from pixart_data.nouns import NounCounter
from pixart_data.tagging.blocks import NOUN_TAGS, TAGS, Block
from pixart_data.tagging.vocabulary import Vocabulary

NAME = "by hand 1.0"


def block_of(vocabulary, captions):
    """A block of captions, each a list of (word, tag), or None for a null or blank one."""
    tagged = [caption or [] for caption in captions]
    return Block(
        words=np.array([vocabulary.intern(word) for caption in tagged for word, _ in caption], np.int32),
        tags=np.array([TAGS.index(tag) for caption in tagged for _, tag in caption], np.uint8),
        offsets=np.cumsum([0, *map(len, tagged)], dtype=np.int64),
        begins=np.zeros(sum(map(len, tagged)), np.uint8),
        counted=np.array([caption is not None for caption in captions], np.bool_),
    )


def counted(captions, name=NAME, approximate=False):
    """The counts of captions as the product has them."""
    vocabulary = Vocabulary()
    counter = NounCounter(name, approximate, vocabulary)
    counter.add(block_of(vocabulary, captions))
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
