"""What each word of a vocabulary adds to the scores of the tokens around it, as rows that words share.

A row is 48 int32 lanes, the sum of a few features' weights. It is kept once for each set of features, so unknown words
with the same ending and first letter share theirs.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.features import (
    LANES,
    PREFIX,
    SLOT,
    SUFFIX,
    SUFFIX_AFTER,
    SUFFIX_BEFORE,
    WORD,
    WORD_AFTER,
    WORD_AFTER2,
    WORD_BEFORE,
    WORD_BEFORE2,
    Features,
    add_feature,
)
from pixart_data.tagging.vocabulary import Words, find

OWN, BEFORE, BEFORE2, AFTER, AFTER2, PAIRS, TAG = range(7)  # columns of `Cells.rows`
NORM, ENDING, NORM_ENDING, INITIAL = range(4)  # columns of `Cells.parts`
ROWS_PER_WORD = 5

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HYPHEN, _YEAR, _DIGITS = (np.frombuffer(text, np.uint8) for text in (b"!HYPHEN", b"!YEAR", b"!DIGITS"))
LONGEST_MARK = len(_HYPHEN)


class Rows(NamedTuple):
    """Rows of scores, each kept once: `state` is their number, `keys` the features they are sums of."""

    state: npt.NDArray[np.int64]
    scores: npt.NDArray[np.int32]
    keys: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int32]


class Cells(NamedTuple):
    """What is known of each word, by `id + 4`.

    Attributes:
        rows: Its rows as token, one and two before a token, one and two after it; its row of `Features.pairs`; its tag
            if it has but one, else -1; (W, 8): half a cache line.
        parts: Rows of `Features.columns` of its normal form, its ending, the ending of that, its first letter, (W, 4).
    """

    rows: npt.NDArray[np.int32]
    parts: npt.NDArray[np.int32]


class Tables(NamedTuple):
    """All that tagging reads; `fixed` are the words of one tag, `fixed_tags` those tags by their ids there."""

    features: Features
    fixed: Words
    fixed_tags: npt.NDArray[np.int32]
    rows: Rows
    cells: Cells


class Batch(NamedTuple):
    """New words, ids `first` to `last - 1`, and where in the cells id 0 goes.

    Attributes:
        given: 1 for words whose normal forms are given, those that are not ASCII, (last - first,).
        norms: The normal forms, one after another.
        ends: Where each begins, and the last one ends.
        scratch: Room for the longest of the words, and for the longest mark that stands for one.
    """

    first: int
    last: int
    base: int
    given: npt.NDArray[np.uint8]
    norms: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    scratch: npt.NDArray[np.uint8]


def normalise(word: str) -> str:
    """Return a word as the tagger sees it in a context: `PerceptronTagger.normalize` of NLTK."""
    if "-" in word and word[0] != "-":
        return "!HYPHEN"
    if word.isdigit() and len(word) == 4:
        return "!YEAR"
    if word and word[0].isdigit():
        return "!DIGITS"
    return word.lower()


def room_for_rows(num_rows: int) -> Rows:
    """Return an empty table: row 0, that of no features, is there."""
    num_slots = 1 << (2 * num_rows - 1).bit_length()
    return Rows(
        np.ones(1, np.int64),
        np.zeros((num_rows, LANES), np.int32),
        np.zeros(num_rows, np.int64),
        np.full(num_slots, -1, np.int32),
    )


@kernel
def _slot(rows: Rows, key: int) -> Any:
    """Return where the row of a key stands in the table, or where it would."""
    mask = np.uint64(len(rows.slots) - 1)
    mixed = np.uint64(key) * _GOLDEN
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while rows.slots[slot] >= 0 and rows.keys[rows.slots[slot]] != key:
        slot = (slot + np.uint64(1)) & mask
    return slot


@kernel
def fill(rows: Rows) -> None:
    """Enter all rows into an empty table."""
    for row in range(1, rows.state[0]):
        rows.slots[_slot(rows, rows.keys[row])] = row


@kernel
def _sum(features: Features, rows: Rows, some: Any) -> Any:
    """Return the row of the sum of four features, the first of which is the bias or none; make it if need be."""
    key = ((np.int64(some[0] > 0) << 20 | some[1]) << 20 | some[2]) << 20 | some[3]
    if key == 0:
        return 0
    slot = _slot(rows, key)
    row = np.int64(rows.slots[slot])
    if row < 0:
        row = rows.state[0]
        rows.state[0] += 1
        rows.keys[row] = key
        rows.slots[slot] = row
        for feature in some:
            add_feature(features, feature, rows.scores, row)
    return row


@kernel
def _tail(text: Any, start: int, stop: int) -> Any:
    """Return where the last three characters begin."""
    at = stop
    for _ in range(3):
        at -= at > start
        while at > start and text[at] & 0xC0 == 0x80:
            at -= 1
    return at


@kernel
def _head(text: Any, start: int, stop: int) -> Any:
    """Return where the first character ends."""
    at = start + 1
    while at < stop and text[at] & 0xC0 == 0x80:
        at += 1
    return at


@kernel
def _normalise(text: Any, start: int, stop: int, norm: Any) -> Any:
    """Write the normal form of an ASCII word into `norm`; return its length."""
    num_digits = 0
    has_hyphen = False
    for i in range(start, stop):
        byte = text[i]
        num_digits += 48 <= byte <= 57
        has_hyphen |= byte == 45
        norm[i - start] = byte + 32 if 65 <= byte <= 90 else byte
    if has_hyphen and text[start] != 45:
        return _copy(_HYPHEN, norm)
    if num_digits == 4 and stop - start == 4:
        return _copy(_YEAR, norm)
    if 48 <= text[start] <= 57:
        return _copy(_DIGITS, norm)
    return stop - start


@kernel
def _copy(mark: Any, norm: Any) -> Any:
    for i in range(len(mark)):
        norm[i] = mark[i]
    return len(mark)


@kernel
def find_parts(tables: Tables, words: Words, batch: Batch) -> None:
    """Find the parts of words, and of their normal forms, that features speak of, and the tags of words of one."""
    known, parts = tables.features.parts, tables.cells.parts
    num_given = 0
    for word in range(batch.first, batch.last):
        start, stop = words.starts[word], words.starts[word + 1]
        cell = word + batch.base
        norm, first, last = batch.scratch, 0, 0
        if batch.given[word - batch.first]:
            norm, first, last = batch.norms, batch.ends[num_given], batch.ends[num_given + 1]
            num_given += 1
        else:
            last = _normalise(words.text, start, stop, batch.scratch)
        parts[cell, NORM] = find(known, norm, first, last) + 1
        parts[cell, NORM_ENDING] = find(known, norm, _tail(norm, first, last), last) + 1
        parts[cell, ENDING] = find(known, words.text, _tail(words.text, start, stop), stop) + 1
        parts[cell, INITIAL] = find(known, words.text, start, _head(words.text, start, stop)) + 1
        fixed = find(tables.fixed, words.text, start, stop)
        tables.cells.rows[cell, TAG] = tables.fixed_tags[fixed] if fixed >= 0 else -1


@kernel
def find_rows(tables: Tables, first: int, last: int) -> None:
    """Find the rows that cells add, from their parts; make those that are new."""
    features, rows, cells = tables.features, tables.rows, tables.cells
    columns, none = features.columns, np.int32(0)
    for cell in range(first, last):
        norm, ending = cells.parts[cell, NORM], cells.parts[cell, NORM_ENDING]
        suffix = columns[cells.parts[cell, ENDING], SUFFIX]
        prefix = columns[cells.parts[cell, INITIAL], PREFIX]
        own = _sum(features, rows, (features.bias[0], suffix, prefix, columns[norm, WORD]))
        before = _sum(features, rows, (none, none, columns[norm, WORD_BEFORE], columns[ending, SUFFIX_BEFORE]))
        after = _sum(features, rows, (none, none, columns[norm, WORD_AFTER], columns[ending, SUFFIX_AFTER]))
        cells.rows[cell, OWN], cells.rows[cell, BEFORE], cells.rows[cell, AFTER] = own, before, after
        cells.rows[cell, BEFORE2] = _sum(features, rows, (none, none, none, columns[norm, WORD_BEFORE2]))
        cells.rows[cell, AFTER2] = _sum(features, rows, (none, none, none, columns[norm, WORD_AFTER2]))
        cells.rows[cell, PAIRS] = columns[norm, SLOT]
