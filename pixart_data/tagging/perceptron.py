"""NLTK's averaged perceptron tagger in compiled code, over words that are numbers: the same tags, always.

A token's scores are the sum of seven rows of whole thousandths: its word's, those of two words on each side, and those
of the tags before it. NLTK takes the class with the largest (score, name), so the largest of `64 * score + class` is
that class. Its sums of floats cannot order two classes otherwise than exact sums do, unless these are equal: then its
floats are summed here too, in its order.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.tagging.blocks import TAGS
from pixart_data.tagging.cells import (
    AFTER,
    AFTER2,
    BEFORE,
    BEFORE2,
    ENDING,
    INITIAL,
    LONGEST_MARK,
    NORM,
    NORM_ENDING,
    OWN,
    PAIRS,
    ROWS_PER_WORD,
    TAG,
    Batch,
    Cells,
    Tables,
    fill,
    find_parts,
    find_rows,
    normalise,
    room_for_rows,
)
from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.features import (
    LANES,
    NUM_CONTEXTS,
    PREFIX,
    SLOT,
    START,
    START2,
    SUFFIX,
    SUFFIX_AFTER,
    SUFFIX_BEFORE,
    WORD,
    WORD_AFTER,
    WORD_AFTER2,
    WORD_BEFORE,
    WORD_BEFORE2,
    ends,
    interned,
    joined,
    load_features,
)
from pixart_data.tagging.resources import TAGDICT, Resources, damaged
from pixart_data.tagging.vocabulary import Vocabulary, Words

_EDGES = ("-START-", "-START2-", "-END-", "-END2-")  # NLTK's context around a caption, in cells before all words
_NUM_EDGES = len(_EDGES)
_END = 2
_WORDS_AT_ONCE = 4096
_NUM_CLASSES = len(TAGS)


class _Scoring(NamedTuple):
    """Of the tables, what scoring a token reads."""

    cells: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    tag_rows: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.int32]
    pair_rows: npt.NDArray[np.int32]


class Perceptron:
    """Tags the words of a vocabulary, to which words may be added at any time.

    A word costs 48 bytes here, beside the rows: there are as many as known endings meet first letters.

    Raises:
        DataError: If the data files are not what exact sums need; NLTK may well read them.
    """

    def __init__(self, vocabulary: Vocabulary, resources: Resources) -> None:
        self._vocabulary = vocabulary
        self._num_known = 0
        self._features = load_features(resources)
        self._fixed, self._fixed_tags = _fixed(resources)
        self._rows = room_for_rows(1 << 12)
        self._cells = Cells(np.zeros((0, 8), np.int32), np.zeros((0, 4), np.int32))
        self._learn_edges()

    @property
    def size_bytes(self) -> int:
        """What the arrays take, those that grow."""
        return sum(array.nbytes for array in (*self._rows, *self._cells))

    def tag(self, words: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Tag captions one at a time: of each, what `pos_tag` gives for its tokens.

        Args:
            words: Ids in the vocabulary, (T,).
            offsets: Where each caption begins, and the end of the last, (N + 1,).

        Returns:
            Positions in `TAGS`, (T,).
        """
        while self._num_known < len(self._vocabulary):
            self._learn()
        tags = np.empty(len(words), np.uint8)
        words, offsets = np.ascontiguousarray(words, np.int32), np.ascontiguousarray(offsets, np.int64)
        _tag_captions(self._tables(), words, offsets, tags)
        return tags

    def _tables(self) -> Tables:
        return Tables(self._features, self._fixed, self._fixed_tags, self._rows, self._cells)

    def _learn(self) -> None:
        first, last = self._num_known, min(len(self._vocabulary), self._num_known + _WORDS_AT_ONCE)
        words = self._vocabulary.words
        start, stop = words.starts[first], words.starts[last]
        foreign = np.unique(
            np.searchsorted(words.starts[first:last], start + np.flatnonzero(words.text[start:stop] > 127), "right") - 1
        )
        given = np.zeros(last - first, np.uint8)
        given[foreign] = 1
        norms = [normalise(self._vocabulary.surface(first + int(word))).encode() for word in foreign]
        self._reserve(last + _NUM_EDGES)
        self._describe(words, range(first, last), _NUM_EDGES, given, norms)
        self._num_known = last

    def _learn_edges(self) -> None:
        edges = [edge.encode() for edge in _EDGES]
        self._reserve(_NUM_EDGES)
        given = np.ones(_NUM_EDGES, np.uint8)
        self._describe(interned(edges), range(_NUM_EDGES), 0, given, edges)

    def _describe(self, words: Words, ids: range, base: int, given: npt.NDArray[np.uint8], norms: list[bytes]) -> None:
        longest = int(np.diff(words.starts[ids.start : ids.stop + 1]).max())
        scratch = np.empty(max(longest, LONGEST_MARK), np.uint8)
        tables = self._tables()
        find_parts(tables, words, Batch(ids.start, ids.stop, base, given, joined(norms), ends(norms), scratch))
        find_rows(tables, ids.start + base, ids.stop + base)

    def _reserve(self, num_cells: int) -> None:
        """Make room for cells, and for as many rows as a batch may need."""
        if num_cells > len(self._cells.rows):
            held, room = len(self._cells.rows), max(num_cells, len(self._cells.rows) * 3 // 2)
            cells = Cells(np.empty((room, 8), np.int32), np.empty((room, 4), np.int32))
            cells.rows[:held], cells.parts[:held] = self._cells
            self._cells = cells
        held, needed = int(self._rows.state[0]), int(self._rows.state[0]) + ROWS_PER_WORD * _WORDS_AT_ONCE
        if needed > len(self._rows.keys):
            rows = room_for_rows(max(needed, len(self._rows.keys) * 3 // 2))
            rows.state[:] = self._rows.state
            rows.scores[:held], rows.keys[:held] = self._rows.scores[:held], self._rows.keys[:held]
            fill(rows)
            self._rows = rows


def _fixed(resources: Resources) -> tuple[Words, npt.NDArray[np.int32]]:
    """Return the words that have but one tag, and their tags."""
    try:
        tags = {word.encode(): TAGS.index(tag) for word, tag in resources.parse(TAGDICT).items()}
    except (AttributeError, ValueError) as error:
        raise damaged(f"{TAGDICT}: {error!r}") from error
    return interned(list(tags)), np.array(list(tags.values()), np.int32)


@kernel
def _settle(tables: Tables, place: Any, tag: int, tag2: int, top: int) -> Any:
    """Return the class that NLTK takes among those whose exact sums are `top`: the largest by its floats."""
    features, parts = tables.features, tables.cells.parts
    word, before, before2, after, after2 = place
    columns = features.columns
    order = (
        features.bias[0],
        columns[parts[word, ENDING], SUFFIX],
        columns[parts[word, INITIAL], PREFIX],
        features.tags[tag, 0],
        features.tags[tag2, 1],
        features.both_tags[tag, tag2],
        columns[parts[word, NORM], WORD],
        features.pairs[columns[parts[word, NORM], SLOT], tag],
        columns[parts[before, NORM], WORD_BEFORE],
        columns[parts[before, NORM_ENDING], SUFFIX_BEFORE],
        columns[parts[before2, NORM], WORD_BEFORE2],
        columns[parts[after, NORM], WORD_AFTER],
        columns[parts[after, NORM_ENDING], SUFFIX_AFTER],
        columns[parts[after2, NORM], WORD_AFTER2],
    )
    best, most = -1, 0.0
    for number in range(_NUM_CLASSES):
        exact, rounded = 0, 0.0
        for feature in order:
            for i in range(features.starts[feature], features.starts[feature + 1]):
                if features.classes[i] == number:
                    exact += features.thousandths[i]
                    rounded += features.values[i]
        if exact == top and (best < 0 or rounded >= most):
            best, most = number, rounded
    return best


@kernel
def _score(scoring: _Scoring, place: Any, tag: int, tag2: int) -> Any:
    """Return 64 times the highest score plus its class, and whether several classes have it.

    Of equal scores the one maximum prefers the last class, the other the first.

    Args:
        scoring: Whose rows they are.
        place: Cells of a token's word, of the two before it and the two after.
        tag: The tag before.
        tag2: The tag before that.
    """
    cells, rows = scoring.cells, scoring.rows
    own, before, before2 = cells[place[0], OWN], cells[place[1], BEFORE], cells[place[2], BEFORE2]
    after, after2 = cells[place[3], AFTER], cells[place[4], AFTER2]
    tags = tag * NUM_CONTEXTS + tag2
    pair = scoring.pairs[cells[place[0], PAIRS], tag]
    best = highest = np.int32(-(1 << 31))
    for i in range(LANES):
        score = rows[own, i] + rows[before, i] + rows[before2, i] + rows[after, i] + rows[after2, i]
        score = np.int32(score + scoring.tag_rows[tags, i] + scoring.pair_rows[pair, i])
        best = max(best, np.int32(score * 64 + i))
        highest = max(highest, np.int32(score * 64 + 63 - i))
    return best, (best & 63) + (highest & 63) != 63


@kernel
def _tag_captions(tables: Tables, words: Any, offsets: Any, tags: Any) -> None:
    scoring = _Scoring(
        tables.cells.rows,
        tables.rows.scores,
        tables.features.tag_rows,
        tables.features.pairs,
        tables.features.pair_rows,
    )
    cells = scoring.cells
    for caption in range(len(offsets) - 1):
        start, stop = offsets[caption], offsets[caption + 1]
        tag, tag2 = START, START2
        before, before2 = 1, 0
        word = words[start] + _NUM_EDGES if start < stop else 0
        after = words[start + 1] + _NUM_EDGES if start + 1 < stop else _END
        for i in range(start, stop):
            after2 = words[i + 2] + _NUM_EDGES if i + 2 < stop else i + 2 - stop + _END
            chosen = int(cells[word, TAG])
            if chosen < 0:
                place = (word, before, before2, after, after2)
                best, is_tie = _score(scoring, place, tag, tag2)
                chosen = int(_settle(tables, place, tag, tag2, best >> 6) if is_tie else best & 63)
            tags[i] = chosen
            tag, tag2 = chosen, tag
            before, before2, word, after = word, before, after, after2
