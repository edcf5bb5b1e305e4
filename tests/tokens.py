"""Blocks made by hand, for tests of what reads them."""

import numpy as np

from pixart_data.tagging.blocks import OTHER_TAG, TAGS, Block
from pixart_data.tagging.vocabulary import Vocabulary

Token = tuple[str, str, bool] | tuple[str, str]
"""Word, tag, and whether a sentence begins with it; without the last, none does."""


def parse(text):
    """Return the tokens of a text such as "The/DT dog/NN ./. | It/PRP runs/VBZ ./."; | separates sentences."""
    tokens = []
    for sentence in text.split(" | "):
        for i, piece in enumerate(sentence.split()):
            word, _, tag = piece.rpartition("/")
            tokens.append((word, tag, i == 0))
    return tokens


def block_of(captions, vocabulary=None):
    """Return the block of captions given as lists of tokens, None for one that is not counted, and its vocabulary."""
    vocabulary = Vocabulary() if vocabulary is None else vocabulary
    tokens = [token for caption in captions for token in caption or ()]
    block = Block(
        np.array([vocabulary.intern(word) for word, *_ in tokens], np.int32),
        np.array([TAGS.index(tag) if tag in TAGS else OTHER_TAG for _, tag, *_ in tokens], np.uint8),
        np.cumsum([0, *(len(caption or ()) for caption in captions)]).astype(np.int64),
        np.array([begins == [True] for _, _, *begins in tokens], np.uint8),
        np.array([caption is not None for caption in captions], np.bool_),
    )
    return block, vocabulary


def tokens_of(block, vocabulary):
    """Return the captions of a block as `block_of` takes them."""
    words = [vocabulary.surface(word) for word in range(len(vocabulary))]
    tags = [*TAGS, "?"]
    captions = []
    for i, counted in enumerate(block.counted):
        span = range(block.offsets[i], block.offsets[i + 1])
        tokens = [(words[block.words[at]], tags[block.tags[at]], bool(block.begins[at])) for at in span]
        captions.append(tokens if counted else None)
    return captions
