"""Counting the nouns of tagged captions by word id, compiled."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.tagging.blocks import NOUN_TAGS, TAGS
from pixart_data.tagging.compilation import kernel

MOST_NOUNS = 255
"""Captions with so many nouns or more are counted together."""

_LAST = 3
_NUM_NOUN_TAGS = len(NOUN_TAGS)
_NOUN_OF_TAG = np.array([NOUN_TAGS.index(tag) if tag in NOUN_TAGS else -1 for tag in (*TAGS, "")], np.int8)
_FEWEST_ROWS = 1 << 12
_FEWEST_SEEN = 1 << 9


class Tallies(NamedTuple):
    """The counts so far; a row stands for a word with a noun tag.

    Attributes:
        state: Number of rows in use, and of captions counted, which stamps what a caption has met already.
        rows: By word id * 4 + position of the tag in `NOUN_TAGS`: its row, -1 for none.
        pairs: By row: the place in `rows` that points to it.
        figures: By row: occurrences; captions that hold it; those of them where it is the first noun of its lower
            case; the stamp of the last caption that held it, (R, 4).
        per_caption: Captions by their number of nouns, (256,).
        seen: A set of the lower-case nouns of one caption, by hash, of a power of two in length.
        stamps: The caption that each place of `seen` was taken for.
    """

    state: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.int64]
    figures: npt.NDArray[np.int64]
    per_caption: npt.NDArray[np.int64]
    seen: npt.NDArray[np.uint64]
    stamps: npt.NDArray[np.int64]


def no_tallies() -> Tallies:
    """Return counts of nothing, with room for no word: `reserve` makes it."""
    return Tallies(
        np.zeros(2, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.int64),
        np.zeros((0, _LAST + 1), np.int64),
        np.zeros(MOST_NOUNS + 1, np.int64),
        np.zeros(_FEWEST_SEEN, np.uint64),
        np.zeros(_FEWEST_SEEN, np.int64),
    )


def reserve(tallies: Tallies, num_words: int, num_tokens: int, longest: int) -> Tallies:
    """Make room for a block; return the arrays to go on with.

    Args:
        num_words: Size of the vocabulary.
        num_tokens: Tokens of the block: each may be a new row.
        longest: Tokens of its longest caption.
    """
    num_pairs = num_words * _NUM_NOUN_TAGS
    num_rows = min(int(tallies.state[0]) + num_tokens, num_pairs)
    if num_pairs > len(tallies.rows):
        tallies = tallies._replace(rows=_longer(tallies.rows, num_pairs, -1))
    if num_rows > len(tallies.pairs):
        tallies = tallies._replace(
            pairs=_longer(tallies.pairs, num_rows, 0), figures=_longer(tallies.figures, num_rows, 0)
        )
    if 2 * longest > len(tallies.seen):
        size = 1 << (2 * longest - 1).bit_length()
        tallies = tallies._replace(seen=np.zeros(size, np.uint64), stamps=np.zeros(size, np.int64))
    return tallies


def clear(tallies: Tallies) -> None:
    """Forget all counts, at a cost proportional to their number and not to the vocabulary."""
    count = int(tallies.state[0])
    tallies.rows[tallies.pairs[:count]] = -1
    tallies.figures[:count] = 0
    tallies.stamps[:] = 0
    tallies.per_caption[:] = 0
    tallies.state[:] = 0


@kernel
def _meets(seen: Any, stamps: Any, stamp: int, value: Any) -> Any:
    """Put a hash into the set of this caption; return whether it was not there."""
    mask = np.uint64(len(seen) - 1)
    slot = value & mask
    while stamps[slot] == stamp:
        if seen[slot] == value:
            return False
        slot = (slot + np.uint64(1)) & mask
    stamps[slot] = stamp
    seen[slot] = value
    return True


@kernel
def tally(tallies: Tallies, words: Any, tags: Any, offsets: Any, counted: Any, folded: Any) -> None:
    """Count the nouns of a block of captions (see `blocks.Block`); `folded` is `Vocabulary.folded()`.

    The arrays are unpacked once: handing the tuple to other functions for each token costs several times as much.
    """
    state, rows, pairs, figures, per_caption, seen, stamps = tallies
    num_rows, stamp = state
    for caption in range(len(counted)):
        if not counted[caption]:
            continue
        stamp += 1
        num_nouns = 0
        for i in range(offsets[caption], offsets[caption + 1]):
            noun = _NOUN_OF_TAG[tags[i]]
            if noun < 0:
                continue
            num_nouns += 1
            pair = np.int64(words[i]) * _NUM_NOUN_TAGS + noun
            row = rows[pair]
            if row < 0:
                row = num_rows
                rows[pair] = row
                pairs[row] = pair
                num_rows += 1
            figures[row, 0] += 1
            if figures[row, _LAST] != stamp:
                figures[row, _LAST] = stamp
                figures[row, 1] += 1
                if _meets(seen, stamps, stamp, folded[words[i]]):
                    figures[row, 2] += 1
        per_caption[min(num_nouns, MOST_NOUNS)] += 1
    state[0], state[1] = num_rows, stamp


def _longer(array: npt.NDArray[Any], length: int, fill: int) -> npt.NDArray[Any]:
    grown = np.full((max(length, len(array) * 3 // 2, _FEWEST_ROWS), *array.shape[1:]), fill, array.dtype)
    grown[: len(array)] = array
    return grown
