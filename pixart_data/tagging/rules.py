"""NLTK's word tokenizer, compiled: its substitutions one after the other, on the characters of one chunk of text.

A chunk is what stands between white space. No substitution carries anything across a space but for what `chunks` tells
apart, so that a chunk's tokens are found once, standing as it does between two spaces, at the start of a sentence, at
its end, or both. Each kernel below is one line of `nltk.tokenize.destructive` (3.10), named in its docstring, or a few
that follow each other and do not meet. It reads `source[:length]`, writes `target` and returns the new length.

Text is code points, all below `characters.NUM_CHARACTERS`, and its only white space is the space.
"""

from typing import Any

from pixart_data.tagging.characters import (
    APOSTROPHE,
    BACKTICK,
    BRACKET,
    CLOSER,
    COLON,
    DIGIT,
    DOUBLE_QUOTE,
    ENDING_QUOTE,
    HYPHEN,
    MARK,
    OPENER,
    STOP,
    SYMBOL,
)
from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.contractions import COMMON, TIS, TWAS, split_contractions
from pixart_data.tagging.quotes import (
    end_apostrophes,
    end_quotes,
    open_apostrophes,
    open_line,
    open_quotes,
    split_endings,
)

_SPACE = ord(" ")
_TICK = ord("`")
_STOP = ord(".")
_HYPHEN = ord("-")
_MOST = 1 << 30

GROWTH = 8
"""A text gets at most so many times as long, and `MARGIN` characters more."""

MARGIN = 32


@kernel
def _pad(traits: Any, source: Any, length: int, target: Any, trait: int) -> Any:
    r"""`[...]` -> ` \g<0> `."""
    n = 0
    for i in range(length):
        char = source[i]
        if traits[char] & trait:
            target[n] = _SPACE
            target[n + 1] = char
            target[n + 2] = _SPACE
            n += 3
        else:
            target[n] = char
            n += 1
    return n


@kernel
def _pad_runs(source: Any, length: int, target: Any, char: int, fewest: int, most: int) -> Any:
    r"""`c{fewest,most}` -> ` \g<0> `."""
    n = i = 0
    while i < length:
        run = 0
        while run < most and i + run < length and source[i + run] == char:
            run += 1
        padded = run >= fewest
        if padded:
            target[n] = _SPACE
            n += 1
        for _ in range(max(run, 1)):
            target[n] = source[i]
            n += 1
            i += 1
        if padded:
            target[n] = _SPACE
            n += 1
    return n


@kernel
def _final_stop(traits: Any, source: Any, length: int, target: Any) -> Any:
    r"""`([^\.])(\.)([\]\)}>"\'»”’ ]*+)\s*$` -> `\1 \2 \3 `."""
    stop = length - 1
    while stop >= 0 and (source[stop] == _SPACE or traits[source[stop]] & CLOSER):
        stop -= 1
    for i in range(length):
        target[i] = source[i]
    if stop < 1 or source[stop] != _STOP or source[stop - 1] == _STOP:
        return length
    target[stop] = target[stop + 2] = _SPACE
    target[stop + 1] = _STOP
    n = stop + 3
    for i in range(stop + 1, length):
        target[n] = source[i]
        n += 1
    target[n] = _SPACE
    return n + 1


@kernel
def _last_stop(traits: Any, source: Any, length: int, target: Any) -> Any:
    r"""`([^\.])(\.)([\]\)}>"\']*)\s*$` -> `\1 \2\3 `."""
    end = length
    while end > 0 and source[end - 1] == _SPACE:
        end -= 1
    stop = end - 1
    while stop >= 0 and source[stop] < 128 and traits[source[stop]] & CLOSER:
        stop -= 1
    for i in range(length):
        target[i] = source[i]
    if stop < 1 or source[stop] != _STOP or source[stop - 1] == _STOP:
        return length
    target[stop] = _SPACE
    for i in range(stop, end):
        target[i + 1] = source[i]
    target[end + 1] = _SPACE
    return end + 2


@kernel
def _colons(traits: Any, source: Any, length: int, target: Any, ends: bool) -> Any:
    r"""`([:,])([^\d])` -> ` \1 \2`, then `([:,])$` -> ` \1 `."""
    n = i = 0
    while i < length:
        char = source[i]
        i += 1
        if traits[char] & COLON and i < length and not traits[source[i]] & DIGIT:
            target[n] = target[n + 2] = _SPACE
            target[n + 1] = char
            target[n + 3] = source[i]
            n += 4
            i += 1
        else:
            target[n] = char
            n += 1
    if ends and n and traits[target[n - 1]] & COLON:
        target[n] = target[n - 1]
        target[n - 1] = target[n + 1] = _SPACE
        n += 2
    return n


@kernel
def _collapse(source: Any, length: int, target: Any) -> Any:
    r"""Pad the text, then `\s+` -> ` `."""
    target[0] = _SPACE
    n = 1
    for i in range(length):
        if source[i] != _SPACE or target[n - 1] != _SPACE:
            target[n] = source[i]
            n += 1
    if target[n - 1] != _SPACE:
        target[n] = _SPACE
        n += 1
    return n


@kernel
def _starting_quotes(traits: Any, one: Any, two: Any, length: int, kinds: int, starts: bool) -> Any:
    """`STARTING_QUOTES`; return where the text is, the other page, and its length, as all that follow do."""
    if kinds & OPENER:
        length = _pad(traits, one, length, two, OPENER)
        one, two = two, one
    if kinds & BACKTICK:
        length = _pad_runs(one, length, two, _TICK, 1, _MOST)
        length = _pad_runs(two, length, one, _TICK, 2, 2)
    if kinds & (DOUBLE_QUOTE | APOSTROPHE):
        length = open_line(one, length, two, starts)
        length = open_quotes(traits, two, length, one)
    if kinds & APOSTROPHE:
        length = open_apostrophes(traits, one, length, two)
        one, two = two, one
    return one, two, length


@kernel
def _stops(traits: Any, one: Any, two: Any, length: int, kinds: int, ends: bool) -> Any:
    """The first half of `PUNCTUATION`, up to the ellipsis."""
    if kinds & STOP and ends:
        length = _final_stop(traits, one, length, two)
        one, two = two, one
    if kinds & COLON:
        length = _colons(traits, one, length, two, ends)
        one, two = two, one
    if kinds & STOP:
        length = _pad_runs(one, length, two, _STOP, 2, _MOST)
        one, two = two, one
    return one, two, length


@kernel
def _marks(traits: Any, one: Any, two: Any, length: int, kinds: int, ends: bool) -> Any:
    """The second half of `PUNCTUATION`."""
    if kinds & SYMBOL:
        length = _pad(traits, one, length, two, SYMBOL)
        one, two = two, one
    if kinds & STOP and ends:
        length = _last_stop(traits, one, length, two)
        one, two = two, one
    if kinds & MARK:
        length = _pad(traits, one, length, two, MARK)
        one, two = two, one
    if kinds & APOSTROPHE:
        length = end_apostrophes(one, length, two)
        one, two = two, one
    return one, two, length


@kernel
def _brackets(traits: Any, one: Any, two: Any, length: int, kinds: int) -> Any:
    """The last of `PUNCTUATION`, `PARENS_BRACKETS`, `DOUBLE_DASHES` and most of `ENDING_QUOTES`."""
    if kinds & BRACKET:
        length = _pad(traits, one, length, two, BRACKET)
        one, two = two, one
    if kinds & HYPHEN:
        length = _pad_runs(one, length, two, _HYPHEN, 2, 2)
        one, two = two, one
    if kinds & (APOSTROPHE | DOUBLE_QUOTE | ENDING_QUOTE):
        length = end_quotes(traits, one, length, two)
        one, two = two, one
    length = _collapse(one, length, two)
    if kinds & APOSTROPHE:
        length = split_endings(two, length, one, False)
        length = split_endings(one, length, two, True)
    return two, one, length


@kernel
def rewrite(traits: Any, one: Any, two: Any, length: int, kinds: int, starts: bool, ends: bool) -> Any:
    """Rewrite a text as `NLTKWordTokenizer.tokenize` does, up to the point where it splits it at its spaces.

    Args:
        traits: The table of `characters`.
        one: Holds the text, (GROWTH * N + MARGIN,).
        two: Another page of that size.
        length: Of the text.
        kinds: All traits of its characters.
        starts: Whether the text starts a sentence: nothing, not even a space, is before it.
        ends: Whether it ends one.

    Returns:
        The page that has the result, and its length.
    """
    one, two, length = _starting_quotes(traits, one, two, length, kinds, starts)
    one, two, length = _stops(traits, one, two, length, kinds, ends)
    one, two, length = _marks(traits, one, two, length, kinds, ends)
    one, two, length = _brackets(traits, one, two, length, kinds)
    length = split_contractions(traits, one, length, two, COMMON)
    if kinds & APOSTROPHE == 0:
        return two, length
    # One at a time: what the first puts a space behind may be the second.
    length = split_contractions(traits, two, length, one, TIS)
    length = split_contractions(traits, one, length, two, TWAS)
    return two, length
