"""Contractions that NLTK's word tokenizer splits, such as `cannot` and `'tis`: see `rules`, of which this is a part."""

from typing import Any

import numpy as np

from pixart_data.tagging.characters import CONTRACTED
from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.quotes import small

_SPACE = ord(" ")
_CONTRACTIONS = ("can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n", "wan na", "'t is", "'t was")
_LETTERS = np.array([[ord(letter) for letter in word.replace(" ", "").ljust(7)] for word in _CONTRACTIONS], np.int32)
_CUTS = np.array([word.index(" ") for word in _CONTRACTIONS], np.int64)
_LENGTHS = np.array([len(word) - 1 for word in _CONTRACTIONS], np.int64)
_WANNA = 7
_ONE: Any = np.int64(1)  # a plain 1 is a type of its own to numba

COMMON = (np.int64(0), np.int64(8))
TIS = (np.int64(8), np.int64(9))
TWAS = (np.int64(9), np.int64(10))
"""Which contractions `split_contractions` looks for at once."""


@kernel
def _contraction(traits: Any, source: Any, place: int, length: int, which: Any) -> Any:
    """Return which of some contractions stands at a place, -1: none."""
    before = source[place - 1]  # the text begins with a space
    if before != _SPACE if which[0] > _WANNA else traits[before] & CONTRACTED != 0:
        return -1
    letter = small(source, place, length)
    for word in range(which[0], which[1]):
        if _LETTERS[word, 0] == letter:
            size = _LENGTHS[word]
            k = _ONE
            while k < size and small(source, place + k, length) == _LETTERS[word, k]:
                k += 1
            # What it may not run into: `\b` is between a word's last letter and another.
            after = source[min(place + size, length - 1)]
            if k == size and (after == _SPACE if word == _WANNA else traits[after] & CONTRACTED == 0):
                return word
    return -1


@kernel
def split_contractions(traits: Any, source: Any, length: int, target: Any, which: Any) -> Any:
    r"""`(?i)\b(can)(?#X)(not)\b` or `(?i) ('t)(?#X)(is)\b` -> ` \1 \2 `, some of them at once."""
    target[0] = source[0]
    n = i = _ONE
    while i < length:
        word = _contraction(traits, source, i, length, which)
        if word < 0:
            target[n] = source[i]
            n += 1
            i += 1
            continue
        target[n] = _SPACE
        n += 1
        for k in range(_LENGTHS[word]):
            if k == _CUTS[word]:
                target[n] = _SPACE
                n += 1
            target[n] = source[i + k]
            n += 1
        target[n] = _SPACE
        n += 1
        i += _LENGTHS[word]
    return n
