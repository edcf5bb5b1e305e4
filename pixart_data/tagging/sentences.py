"""Where sentences end: NLTK's Punkt, whose every decision hangs on two neighbouring chunks of text, or on one.

Punkt asks whether a sentence ends behind a `.`, `?` or `!` that white space follows, or a mark that no word holds, once
for each chunk: at the last such place. Mostly the word before decides alone: one that is no abbreviation, initial or
number ends its sentence whatever follows. That much is compiled, with the lists of NLTK's own model. What is
left is asked of NLTK, once for each pair of chunks. Rules and names are those of `nltk.tokenize.punkt` (3.10).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pixart_data.errors import DataError
from pixart_data.tagging.characters import (
    ALONE,
    CLAUSE,
    DIGIT,
    HYPHEN,
    MARK,
    REALIGNED,
    SEPARATE,
    STOP,
    WORD,
)
from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.vocabulary import FNV_OFFSET, FNV_PRIME

# What the word before a full stop is.
ENDING = 0  # a word that ends its sentence whatever follows
ABBREVIATION = 1
INITIAL = 2
NUMBER = 3
ELLIPSIS = 4
UNCLEAR = 5

_DOT = ord(".")
_DASH = ord("-")
_COMMA = ord(",")
_FOREIGN = np.uint64(0)

_PATIENCE_S = 120.0
_QUOTED_CHARS = 80

T = TypeVar("T")


class Lists(NamedTuple):
    """Sets of words of Punkt's model, as hashes of their lower case; each a table that `_holds` looks things up in.

    Attributes:
        abbreviations: Words that end in a full stop in the middle of a sentence.
        heads: Words with which a known pair begins, such as `j.` of `j. walter`.
    """

    abbreviations: npt.NDArray[np.uint64]
    heads: npt.NDArray[np.uint64]


def lists(punkt: Any) -> Lists:
    """Take the lists of an `nltk.tokenize.PunktTokenizer`.

    Raises:
        DataError: If they are not of the kind that the rules here hold for: words of ASCII.
    """
    parameters = punkt._params
    heads = {head for head, _ in parameters.collocations}
    odd = [word for word in (*parameters.abbrev_types, *heads) if not word.isascii()]
    odd += [second for _, second in parameters.collocations if not second[:1].isalnum()]
    if odd:
        raise DataError(f"punkt: expected lists of English words, found {odd[0]!r}; install NLTK's own punkt_tab again")
    return Lists(_hash_table(parameters.abbrev_types), _hash_table(heads))


def _hash_table(words: Iterable[str]) -> npt.NDArray[np.uint64]:
    hashes = sorted({int(_lower_hash(np.array([*map(ord, word)], np.int32), 0, len(word))) for word in words})
    table = np.zeros(1 << (4 * len(hashes)).bit_length(), np.uint64)
    for value in hashes:
        slot = value & (len(table) - 1)
        while table[slot]:
            slot = (slot + 1) & (len(table) - 1)
        table[slot] = value
    return table


@kernel
def _holds(table: Any, value: Any) -> Any:
    mask = np.uint64(len(table) - 1)
    slot = value & mask
    while table[slot] != np.uint64(0):
        if table[slot] == value:
            return True
        slot = (slot + np.uint64(1)) & mask
    return False


@kernel
def _lower_hash(codes: Any, start: int, stop: int) -> Any:
    """Return what a word of ASCII has in `Lists`; one with other characters gets what no word of ASCII has."""
    value = FNV_OFFSET
    for i in range(start, stop):
        char = codes[i]
        if char >= 128:
            return _FOREIGN
        if 65 <= char <= 90:
            char += 32
        value = (value ^ np.uint64(char)) * FNV_PRIME
    return value


@kernel
def _word_start(traits: Any, codes: Any, stop: int) -> Any:
    """Return where Punkt's last word of `codes[:stop]` begins, which ends in a full stop."""
    for i in range(stop - 2, -1, -1):
        trait = traits[codes[i]]
        if trait & SEPARATE:
            # Some of these are words of their own, the others begin one.
            return i + 1 if trait & ALONE else i
    return 0


@kernel
def _is_number(traits: Any, codes: Any, start: int, stop: int) -> Any:
    for i in range(start, stop):
        char = codes[i]
        if not (traits[char] & DIGIT or char in (_DOT, _COMMA, _DASH)):
            return False
    return True


@kernel
def _is_abbreviation(abbreviations: Any, codes: Any, start: int, stop: int) -> Any:
    """Whether a word, without its full stop, is on the list, or what is behind its last hyphen."""
    if _holds(abbreviations, _lower_hash(codes, start, stop)):
        return True
    last = stop
    while last > start and codes[last - 1] != _DASH:
        last -= 1
    return last > start and _holds(abbreviations, _lower_hash(codes, last, stop))


@kernel
def _has_runs(codes: Any, start: int, stop: int) -> Any:
    """Whether there are `..` or `--`, which Punkt takes for words."""
    runs = 0
    for i in range(start, stop - 1):
        runs += codes[i] == codes[i + 1] and codes[i] in (_DOT, _DASH)
    return runs > 0


@kernel
def _has_ends(traits: Any, codes: Any, stop: int) -> Any:
    """Whether `codes[:stop]` has a place where a sentence might end."""
    kinds = 0
    for i in range(stop):
        kinds |= traits[codes[i]]
    return kinds & (STOP | MARK) != 0


@kernel
def _word_kind(traits: Any, lists: Lists, codes: Any, start: int, stop: int) -> Any:
    """Classify the word `codes[start:stop]`, which ends in one full stop."""
    if stop - start == 1:
        return ENDING
    if traits[codes[start]] & ALONE or _has_runs(codes, start, stop):
        return UNCLEAR
    if _is_number(traits, codes, start, stop):
        return NUMBER if traits[codes[start]] & DIGIT else UNCLEAR
    if _is_abbreviation(lists.abbreviations, codes, start, stop - 1):
        return ABBREVIATION
    if stop - start == 2 and traits[codes[start]] & WORD:
        return INITIAL
    return UNCLEAR if _holds(lists.heads, _lower_hash(codes, start, stop - 1)) else ENDING


@kernel
def ending_kind(traits: Any, lists: Lists, codes: Any, stop: int) -> Any:
    """Classify the end of `codes[:stop]`, part of a chunk; its last character is one of `.?!`."""
    if traits[codes[stop - 1]] & MARK:
        return ENDING
    start, kind = stop - 1, ELLIPSIS
    if stop >= 2 and codes[stop - 2] == _DOT:
        while start > 0 and codes[start - 1] == _DOT:
            start -= 1
    else:
        start = _word_start(traits, codes, stop)
        kind = _word_kind(traits, lists, codes, start, stop)
    return UNCLEAR if kind != ENDING and _has_ends(traits, codes, start) else kind


@kernel
def inner_end(traits: Any, codes: Any, length: int) -> Any:
    """Return the length of a chunk up to the last `.?!` with a mark right behind it; 0: there is none."""
    for i in range(length - 2, -1, -1):
        if traits[codes[i]] & (STOP | MARK) and traits[codes[i + 1]] & SEPARATE:
            return i + 1
    return 0


@kernel
def ends_inside(traits: Any, kind: int, mark: int) -> Any:
    """Whether a sentence ends between a word of this kind and the mark right behind it; -1: not known here."""
    if kind == UNCLEAR:
        return -1
    if kind in (INITIAL, NUMBER):
        return 0 if traits[mark] & CLAUSE else 1
    return 1 if kind == ENDING else 0


@kernel
def realigned(traits: Any, codes: Any, start: int, length: int) -> Any:
    """Return the end of the closing marks that Punkt counts to the sentence before, `start`: there are none."""
    stop = start
    while stop < length and traits[codes[stop]] & REALIGNED:
        stop += 1
    if stop == length:
        return stop
    dashes = stop + 1 < length and traits[codes[stop]] & HYPHEN and traits[codes[stop + 1]] & HYPHEN
    return stop if dashes else start


class Pairs(NamedTuple):
    """A hash table of pairs of chunks: whether a sentence ends between them.

    Attributes:
        keys: The first's number and the second's, 32 bits each, plus one; 0 where empty. Of a power of two in length.
        answers: 1 where one ends.
    """

    keys: npt.NDArray[np.uint64]
    answers: npt.NDArray[np.uint8]


@kernel
def pair_key(first: int, second: int) -> Any:
    """Return the key of two chunks."""
    return ((np.uint64(first) << np.uint64(32)) | np.uint64(second)) + np.uint64(1)


@kernel
def find_pair(pairs: Pairs, key: Any) -> Any:
    """Return the slot of a key, or the empty one where it belongs."""
    mask = np.uint64(len(pairs.keys) - 1)
    slot = ((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while pairs.keys[slot] != key and pairs.keys[slot] != np.uint64(0):
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel
def _put(pairs: Pairs, keys: Any, answers: Any) -> None:
    for i in range(len(keys)):
        if keys[i] != np.uint64(0):
            slot = find_pair(pairs, keys[i])
            pairs.keys[slot] = keys[i]
            pairs.answers[slot] = answers[i]


def patiently(ask: Callable[[str], T], text: str) -> T:
    """Ask NLTK about a text, a second time where it gives up on a regular expression after five seconds.

    These are seconds of the clock, so which texts are too much depends on what else the machine does; the answer does
    not. Its patterns are trusted here, so they get two minutes each then (`nltk.redos.DEFAULT_TIMEOUT`).

    Raises:
        DataError: If that is too little.
    """
    try:
        return ask(text)
    except TimeoutError:
        from nltk import redos
    limit_s, redos.DEFAULT_TIMEOUT = redos.DEFAULT_TIMEOUT, _PATIENCE_S
    try:
        return ask(text)
    except TimeoutError as error:
        raise DataError(
            f"captions: expected texts that NLTK splits within {_PATIENCE_S:.0f} s, found one of {len(text):,} "
            f"characters that takes longer, {text[:_QUOTED_CHARS]!r}...; shorten it or make it null"
        ) from error
    finally:
        redos.DEFAULT_TIMEOUT = limit_s


class PairTable:
    """Punkt's answers about pairs of chunks.

    Args:
        ends: Whether a sentence ends in a text of two chunks: `PunktTokenizer.text_contains_sentbreak`.
    """

    def __init__(self, ends: Callable[[str], bool]) -> None:
        self._ends = ends
        self.clear()

    def __len__(self) -> int:
        return self._count

    def clear(self) -> None:
        """Forget all of them: the chunks have other numbers now."""
        self.pairs = _empty(_FEWEST_SLOTS)
        self._count = 0

    def learn(self, keys: npt.NDArray[np.uint64], text: Callable[[int], str]) -> None:
        """Ask NLTK about pairs.

        Args:
            keys: Of pairs that the table does not hold; they may repeat.
            text: Gives a chunk by its number.

        Raises:
            DataError: If a pair takes NLTK minutes.
        """
        keys = np.unique(keys)
        answers = np.empty(len(keys), np.uint8)
        for i, key in enumerate(keys.tolist()):
            first, second = divmod(key - 1, 1 << 32)
            answers[i] = patiently(self._ends, f"{text(first)} {text(second)}")
        if 2 * (self._count + len(keys)) > len(self.pairs.keys):
            grown = _empty(1 << (4 * (self._count + len(keys))).bit_length())
            _put(grown, self.pairs.keys, self.pairs.answers)
            self.pairs = grown
        _put(self.pairs, keys, answers)
        self._count += len(keys)


_FEWEST_SLOTS = 1 << 10


def _empty(num_slots: int) -> Pairs:
    return Pairs(np.zeros(num_slots, np.uint64), np.zeros(num_slots, np.uint8))
