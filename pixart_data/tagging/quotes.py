"""Quotes and apostrophes as NLTK's word tokenizer has them: see `rules`, of which this is a part."""

from typing import Any

from pixart_data.tagging.characters import ENDING_QUOTE, QUOTED, WORD
from pixart_data.tagging.compilation import lean_kernel as kernel

_SPACE = ord(" ")
_QUOTE = ord('"')
_TICK = ord("`")
_APOSTROPHE = ord("'")
_D, _E, _L, _M, _N, _R, _S, _T, _V = (ord(letter) for letter in "delmnrstv")
_LARGE_N, _LARGE_T = ord("N"), ord("T")
_LOWER = 32  # the bit that makes an ASCII letter small


@kernel
def small(source: Any, place: int, length: int) -> Any:
    """Return the character at a place in lower case, a space where there is none."""
    if place < 0 or place >= length:
        return _SPACE
    char = source[place]
    return char + _LOWER if 65 <= char <= 90 else char


@kernel
def _has(traits: Any, source: Any, place: int, length: int, trait: int) -> Any:
    """Whether there is a character at a place, and it has a trait."""
    return 0 <= place < length and traits[source[place]] & trait != 0


@kernel
def open_line(source: Any, length: int, target: Any, starts: bool) -> Any:
    r"""`^"` -> ` `` `, padded as the rule after it pads all of them."""
    n = i = 0
    if starts and length and source[0] == _QUOTE:
        target[0] = target[3] = _SPACE
        target[1] = target[2] = _TICK
        n, i = 4, 1
    for k in range(i, length):
        target[n] = source[k]
        n += 1
    return n


@kernel
def open_quotes(traits: Any, source: Any, length: int, target: Any) -> Any:
    r"""`([ \(\[{<])(\"|\'{2})` -> `\1 `` `."""
    n = i = 0
    while i < length:
        target[n] = source[i]
        n += 1
        i += 1
        width = 0
        if traits[source[i - 1]] & QUOTED and i < length:
            if source[i] == _QUOTE:
                width = 1
            elif source[i] == _APOSTROPHE and i + 1 < length and source[i + 1] == _APOSTROPHE:
                width = 2
        if width:
            target[n] = target[n + 3] = _SPACE
            target[n + 1] = target[n + 2] = _TICK
            n += 4
            i += width
    return n


@kernel
def _is_clitic(traits: Any, source: Any, place: int, length: int) -> Any:
    r"""`(?:re|ve|ll|m|t|s|d|n)\b`, whatever the case, at a place."""
    one, two = small(source, place, length), small(source, place + 1, length)
    if one in (_M, _T, _S, _D, _N) and not _has(traits, source, place + 1, length, WORD):
        return True
    if (one in (_R, _V) and two == _E) or (one == _L and two == _L):
        return not _has(traits, source, place + 2, length, WORD)
    return False


@kernel
def open_apostrophes(traits: Any, source: Any, length: int, target: Any) -> Any:
    r"""`(?i)(?<!\w)(\')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)` -> `\1 `."""
    n = 0
    for i in range(length):
        target[n] = source[i]
        n += 1
        if (
            source[i] == _APOSTROPHE
            and not _has(traits, source, i - 1, length, WORD)
            and _has(traits, source, i + 1, length, WORD)
            and not _is_clitic(traits, source, i + 1, length)
        ):
            target[n] = _SPACE
            n += 1
    return n


@kernel
def end_apostrophes(source: Any, length: int, target: Any) -> Any:
    r"""`([^'])' ` -> `\1 ' `."""
    n = i = 0
    while i < length:
        target[n] = source[i]
        n += 1
        if i + 2 < length and source[i] != _APOSTROPHE and source[i + 1] == _APOSTROPHE and source[i + 2] == _SPACE:
            target[n] = target[n + 2] = _SPACE
            target[n + 1] = _APOSTROPHE
            n += 3
            i += 2
        i += 1
    return n


@kernel
def end_quotes(traits: Any, source: Any, length: int, target: Any) -> Any:
    r"""`([»”’])` -> ` \1 `, then `''` -> ` '' `, then `"` -> ` '' `."""
    n = i = 0
    while i < length:
        char = source[i]
        i += 1
        if char == _QUOTE or (char == _APOSTROPHE and i < length and source[i] == _APOSTROPHE):
            target[n] = target[n + 3] = _SPACE
            target[n + 1] = target[n + 2] = _APOSTROPHE
            n += 4
            i += char == _APOSTROPHE
        elif traits[char] & ENDING_QUOTE:
            target[n] = target[n + 2] = _SPACE
            target[n + 1] = char
            n += 3
        else:
            target[n] = char
            n += 1
    return n


@kernel
def _short_ending(source: Any, place: int, length: int) -> Any:
    """Return the length of `'[sS]|'[mM]|'[dD]|'` before a space, at a place; 0: it is not there."""
    if source[place] != _APOSTROPHE:
        return 0
    if place + 1 < length and source[place + 1] == _SPACE:
        return 1
    if place + 2 < length and source[place + 2] == _SPACE:
        char = small(source, place + 1, length)
        return 2 if char in (_S, _M, _D) else 0
    return 0


@kernel
def _long_ending(source: Any, place: int, length: int) -> Any:
    """Return 3 for `'ll|'LL|'re|'RE|'ve|'VE|n't|N'T` before a space, at a place; 0: it is not there."""
    if place + 3 >= length or source[place + 3] != _SPACE:
        return 0
    one, two, three = source[place], source[place + 1], source[place + 2]
    if one == _APOSTROPHE:
        case = two & _LOWER  # both small or both large, and ASCII letters: the others are compared whole
        if (three & _LOWER) != case:
            return 0
        two, three = two | _LOWER, three | _LOWER
        return 3 if (two == _L and three == _L) or (two in (_R, _V) and three == _E) else 0
    return 3 if two == _APOSTROPHE and ((one == _N and three == _T) or (one == _LARGE_N and three == _LARGE_T)) else 0


@kernel
def split_endings(source: Any, length: int, target: Any, long: bool) -> Any:
    r"""`([^' ])(...) ` -> `\1 \2 `."""
    n = i = 0
    while i < length:
        char = source[i]
        target[n] = char
        n += 1
        i += 1
        if char in (_APOSTROPHE, _SPACE) or i >= length:
            continue
        width = _long_ending(source, i, length) if long else _short_ending(source, i, length)
        if width:
            target[n] = _SPACE
            n += 1
            for _ in range(width + 1):
                target[n] = source[i]
                n += 1
                i += 1
    return n
