"""What a chunk of text is: its tokens and the ends of sentences in it, found once for each, at first sight.

`rules` says what its tokens are and `sentences` where Punkt ends sentences; here both are asked for every place that
the chunk can have in a sentence, and what they say goes into the table of `chunks`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.tagging.characters import (
    APOSTROPHE,
    CLOSER,
    DOUBLE_QUOTE,
    MARK,
    NUM_CHARACTERS,
    RULED,
    SEPARATE,
    STOP,
    UNSURE,
)
from pixart_data.tagging.chunks import (
    ASKS,
    BEGIN,
    BREAKS,
    CLOSING,
    DOUBTFUL,
    ENDS,
    LAST,
    LEANING,
    MAX_CHARS,
    NUM_FORMS,
    QUOTED,
    QUOTING,
    SINGLE,
    STARTS,
    STOPPED,
    STOPPING,
    Chunks,
)
from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.rules import GROWTH, MARGIN, rewrite
from pixart_data.tagging.sentences import ENDING, Lists, ending_kind, ends_inside, inner_end, realigned
from pixart_data.tagging.vocabulary import Words, intern

_SPACE = ord(" ")
_MOST_BYTES = 4 * MAX_CHARS  # of a chunk that has tokens at all
_ZERO: Any = np.int64(0)  # a plain 0 is a type of its own to numba, for which all would be compiled again


class Desk(NamedTuple):
    """What an analysis needs besides the tables it adds to.

    Attributes:
        traits: The table of `characters`.
        lists: Punkt's.
        codes: The chunk's code points.
        one: A page for `rules.rewrite`.
        two: Another.
        token: UTF-8 of a token.
    """

    traits: npt.NDArray[np.uint32]
    lists: Lists
    codes: npt.NDArray[np.int32]
    one: npt.NDArray[np.int32]
    two: npt.NDArray[np.int32]
    token: npt.NDArray[np.uint8]


def desk(traits: npt.NDArray[np.uint32], lists: Lists) -> Desk:
    """Return a desk with pages for the longest chunk."""
    size = GROWTH * (MAX_CHARS + 2) + MARGIN
    codes, one, two = (np.zeros(size, np.int32) for _ in range(3))
    return Desk(traits, lists, codes, one, two, np.zeros(4 * size, np.uint8))


@kernel
def _decode(desk: Desk, data: Any, start: int, stop: int) -> Any:
    """Write a chunk's code points to the desk; return their number, -1 if one is unsure or they are too many."""
    i, n = start, 0
    while i < stop:
        code, width = np.int64(data[i]), 1
        if code >= 0xF0:
            code, width = code & 7, 4
        elif code >= 0xE0:
            code, width = code & 15, 3
        elif code >= 0xC0:
            code, width = code & 31, 2
        for k in range(1, width):
            code = code << 6 | data[i + k] & 63
        if n == MAX_CHARS or code >= NUM_CHARACTERS or desk.traits[code] & UNSURE:
            return -1
        desk.codes[n] = code
        n += 1
        i += width
    return n


@kernel
def _encode(code: int, token: Any, n: int) -> Any:
    """Append a character's UTF-8; return the length with it."""
    if code < 0x80:
        token[n] = code
        return n + 1
    if code < 0x800:
        token[n] = 0xC0 | code >> 6
        token[n + 1] = 0x80 | code & 63
        return n + 2
    if code < 0x10000:
        token[n] = 0xE0 | code >> 12
        token[n + 1] = 0x80 | code >> 6 & 63
        token[n + 2] = 0x80 | code & 63
        return n + 3
    token[n] = 0xF0 | code >> 18
    token[n + 1] = 0x80 | code >> 12 & 63
    token[n + 2] = 0x80 | code >> 6 & 63
    token[n + 3] = 0x80 | code & 63
    return n + 4


@kernel
def _pour(chunks: Chunks, words: Words, token: Any, page: Any, length: int) -> None:
    """Add the tokens of a rewritten text, which its spaces separate, to the pool."""
    at, n = chunks.state[3], 0
    for i in range(length + 1):
        if i < length and page[i] != _SPACE:
            n = _encode(page[i], token, n)
        elif n:
            chunks.pool[at] = intern(words, token, 0, n) << 1
            at += 1
            n = 0
    chunks.state[3] = at


@kernel
def _tokenize(chunks: Chunks, words: Words, desk: Desk, start: int, stop: int, place: int) -> None:
    """Add the tokens of `codes[start:stop]`, at a place in its sentence, to the pool."""
    n = kinds = _ZERO
    if not place & STARTS:
        desk.one[0] = _SPACE
        n += 1
    for i in range(start, stop):
        desk.one[n] = desk.codes[i]
        kinds |= desk.traits[desk.codes[i]]
        n += 1
    if not place & ENDS:
        desk.one[n] = _SPACE
        n += 1
    page, n = rewrite(desk.traits, desk.one, desk.two, n, kinds, place & STARTS != 0, place & ENDS != 0)
    _pour(chunks, words, desk.token, page, n)


@kernel
def _add_form(chunks: Chunks, words: Words, desk: Desk, length: int, split: int, place: int) -> None:
    """Add the tokens of a chunk with a sentence's end at `split`, 0: there is none; and their bounds."""
    at, first, second = chunks.state[2], chunks.state[3], chunks.state[3]
    begin, stop = _ZERO, split if split else length
    while begin < length:
        # A part behind the end of a sentence starts one, the part before ends one.
        ends = ENDS if stop < length else 0
        _tokenize(chunks, words, desk, begin, stop, (place | STARTS if begin else place) | ends)
        if begin:
            chunks.pool[second] |= BEGIN
        begin, stop, second = stop, length, chunks.state[3]
    chunks.bounds[at] = first
    chunks.bounds[at + 1] = chunks.state[3]
    chunks.state[2] = at + 2


@kernel
def _repeat_form(chunks: Chunks, back: int) -> None:
    """Let a form be the one so many before it."""
    at = chunks.state[2]
    chunks.bounds[at] = chunks.bounds[at - 2 * back]
    chunks.bounds[at + 1] = chunks.bounds[at - 2 * back + 1]
    chunks.state[2] = at + 2


@kernel
def _opens_with_end(traits: Any, codes: Any) -> Any:
    """Whether Punkt looks for an end right at the start of a chunk; if so, it may look at a second place, too."""
    return traits[codes[0]] & (STOP | MARK) and traits[codes[1]] & SEPARATE


@kernel
def _split(desk: Desk, length: int) -> Any:
    """Return where a sentence ends inside a chunk: 0 nowhere, its length at its end, -1 if that is not known here."""
    stop = inner_end(desk.traits, desk.codes, length)
    if not stop:
        return 0
    if _opens_with_end(desk.traits, desk.codes) and (stop > 1 or desk.traits[desk.codes[length - 1]] & (STOP | MARK)):
        return -1
    ends = ends_inside(desk.traits, ending_kind(desk.traits, desk.lists, desk.codes, stop), desk.codes[stop])
    return realigned(desk.traits, desk.codes, stop, length) if ends > 0 else ends


@kernel
def _flags(desk: Desk, length: int, kinds: int) -> Any:
    """Return what a chunk is for its neighbours, but for the ends of sentences."""
    codes, traits = desk.codes, desk.traits
    first = traits[codes[0]]
    flags = STOPPING if kinds & (STOP | MARK) else _ZERO
    if first & DOUBLE_QUOTE or (first & APOSTROPHE and length > 1 and traits[codes[1]] & APOSTROPHE):
        flags |= QUOTED
    if traits[codes[length - 1]] & APOSTROPHE:
        flags |= QUOTING
    if realigned(traits, codes, _ZERO, length):
        flags |= LEANING
    stop = length
    while stop > 0 and traits[codes[stop - 1]] & CLOSER:
        stop -= 1
    if not stop:
        flags |= CLOSING
    elif traits[codes[stop - 1]] & STOP:
        flags |= STOPPED
    return flags


@kernel
def _add_forms(chunks: Chunks, words: Words, desk: Desk, length: int, ends: Any, ruled: bool) -> None:
    """Add all forms of a chunk, with a sentence's end at `ends[0]`, or `ends[1]` where nothing follows it."""
    split, late = ends
    quoted = desk.traits[desk.codes[0]] & (STOP | APOSTROPHE | DOUBLE_QUOTE)
    for place in range(NUM_FORMS):
        is_last = place >= ENDS + LAST
        if (place & STARTS and not quoted) or (place and not ruled):
            _repeat_form(chunks, 1)
        elif is_last and late == split:
            _repeat_form(chunks, LAST)
        else:
            _add_form(chunks, words, desk, length, late if is_last else split, place - LAST if is_last else place)


@kernel
def _analyse(chunks: Chunks, words: Words, desk: Desk, chunk: int, length: int) -> None:
    """Fill in a chunk's flags and tokens."""
    kinds = _ZERO
    for i in range(length):
        kinds |= desk.traits[desk.codes[i]]
    late = _split(desk, length) if kinds & (STOP | MARK) else _ZERO
    if late < 0:
        chunks.flags[chunk] = DOUBTFUL
        return
    flags = _flags(desk, length, kinds)
    if late == length:
        flags, late = flags | BREAKS, _ZERO
    split = late
    if desk.traits[desk.codes[length - 1]] & (STOP | MARK):
        split = _ZERO  # it is what follows that the last mark asks Punkt about
        kind = ending_kind(desk.traits, desk.lists, desk.codes, length)
        flags |= BREAKS if kind == ENDING else ASKS
    at, first = chunks.state[2], chunks.state[3]
    _add_forms(chunks, words, desk, length, (split, late), kinds & RULED != 0)
    chunks.tokens[chunk] = at
    if not kinds & RULED and chunks.state[3] == first + 1:
        flags |= SINGLE
        chunks.tokens[chunk] = chunks.pool[first] >> 1
        chunks.state[2], chunks.state[3] = at, first
    chunks.flags[chunk] = flags


@kernel
def analyse(chunks: Chunks, words: Words, desk: Desk) -> Any:
    """Analyse the chunks that are new since the last time; return how many are left, for lack of room."""
    state = chunks.state
    while state[4] < state[0]:
        chunk = state[4]
        start, stop = chunks.starts[chunk], chunks.starts[chunk + 1]
        if not _has_room(chunks, words, min(stop - start, _MOST_BYTES)):
            break
        length = _decode(desk, chunks.text, start, stop)
        if length < 0:
            chunks.flags[chunk] = DOUBTFUL
        else:
            _analyse(chunks, words, desk, chunk, length)
        state[4] = chunk + 1
    return state[0] - state[4]


@kernel
def _has_room(chunks: Chunks, words: Words, num_bytes: int) -> Any:
    """Whether there is room for the tokens of a chunk of so many bytes, whatever they are."""
    return (
        len(chunks.bounds) - chunks.state[2] >= 2 * NUM_FORMS
        and len(chunks.pool) - chunks.state[3] >= NUM_FORMS * num_bytes
        and len(words.hashes) - words.state[0] >= NUM_FORMS * num_bytes
        and len(words.text) - words.state[1] >= 2 * NUM_FORMS * num_bytes
    )
