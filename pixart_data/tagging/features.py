"""The averaged perceptron's weights as arrays: NLTK's JSON, read for compiled code.

NLTK scores a token's classes by adding the weights of fourteen features, each a string of a template's name and what
stands there ("i-1 suffix ing"). Here a feature is a number, found from the text that stands there, and its weights are
whole thousandths: the files hold three decimals, so that sums are exact. The floats are kept too, because where two
sums are equal NLTK's own rounding decides.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.tagging.blocks import TAGS
from pixart_data.tagging.compilation import kernel
from pixart_data.tagging.resources import CLASSES, WEIGHTS, Resources, damaged
from pixart_data.tagging.vocabulary import Vocabulary, Words, intern

LANES = 48  # int32 of a row: three cache lines, of which the last few numbers belong to no class
START, START2 = len(TAGS), len(TAGS) + 1
NUM_CONTEXTS = len(TAGS) + 2
"""What the tag before a token can be: a class, or one of the two marks before the first."""

SUFFIX, PREFIX, WORD, WORD_BEFORE, SUFFIX_BEFORE, WORD_BEFORE2, WORD_AFTER, SUFFIX_AFTER, WORD_AFTER2, SLOT = range(10)
NUM_COLUMNS = 10

NEVER = -(1 << 23)
"""The score of a lane that is no class: below any sum, and 64 times it is an int32."""

MAX_FEATURES = 1 << 20  # three of them make the key of a row

_TEMPLATES = {
    "i suffix": SUFFIX,
    "i pref1": PREFIX,
    "i word": WORD,
    "i-1 word": WORD_BEFORE,
    "i-1 suffix": SUFFIX_BEFORE,
    "i-2 word": WORD_BEFORE2,
    "i+1 word": WORD_AFTER,
    "i+1 suffix": SUFFIX_AFTER,
    "i+2 word": WORD_AFTER2,
}
_TAG, _TAG2, _BOTH_TAGS, _TAG_AND_WORD, _BIAS = "i-1 tag", "i-2 tag", "i tag+i-2 tag", "i-1 tag+i word", "bias"
_NAMES = (_TAG_AND_WORD, *_TEMPLATES, _TAG, _TAG2, _BOTH_TAGS)
_FEATURE = re.compile(f"({'|'.join(map(re.escape, _NAMES))}) (.+)", re.DOTALL)
_CONTEXTS = {tag: number for number, tag in enumerate((*TAGS, "-START-", "-START2-"))}
_THOUSANDTHS = 1000

Group = dict[str, Mapping[str, float]]
"""Weights by class, by what stands at the place a template speaks of."""


class Features(NamedTuple):
    """The weights, for compiled code. Feature 0 is the one without weights.

    Attributes:
        parts: The texts that features speak of: words as NLTK normalises them, and beginnings and ends of words.
        columns: Feature of each template by `part + 1`, row 0 for a text that is no part, (P + 1, 10); the
            last, SLOT, is the word's row in `pairs`.
        bias: The feature of every token, (1,).
        tags: Features of the tag before, of the one before that, and of both, (47, 2) and (47, 47).
        pairs: Features of a word and the tag before it: 1 to `len(pair_rows) - 1`, (S, 47).
        starts: Where the weights of each feature begin, (F + 1,).
        classes: Their classes, (W,).
        thousandths: Their values, (W,).
        values: The same as the floats NLTK adds, (W,).
        tag_rows: What the tags before a token add to its scores, by `tag * 47 + tag before it`, (47 * 47, 48).
        pair_rows: What a feature of `pairs` adds, (K + 1, 48).
    """

    parts: Words
    columns: npt.NDArray[np.int32]
    bias: npt.NDArray[np.int32]
    tags: npt.NDArray[np.int32]
    both_tags: npt.NDArray[np.int32]
    pairs: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    classes: npt.NDArray[np.uint8]
    thousandths: npt.NDArray[np.int32]
    values: npt.NDArray[np.float64]
    tag_rows: npt.NDArray[np.int32]
    pair_rows: npt.NDArray[np.int32]


def load_features(resources: Resources) -> Features:
    """Read the weights.

    Raises:
        DataError: If they are not what exact sums need: NLTK's 45 classes, and weights of three decimals.
    """
    if set(resources.parse(CLASSES)) != set(TAGS):
        raise damaged(f"{CLASSES}: expected the {len(TAGS)} tags of the Penn Treebank")
    try:
        groups = _groups(resources.parse(WEIGHTS))
        weights = _Weights(groups)
        arranged = _arranged(groups, weights)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise damaged(f"{WEIGHTS}: {error!r}") from error
    return arranged


@kernel
def add_feature(features: Features, feature: int, scores: Any, row: int) -> None:
    """Add a feature's weights to a row of scores."""
    for i in range(features.starts[feature], features.starts[feature + 1]):
        scores[row, features.classes[i]] += features.thousandths[i]


def _groups(weights: Mapping[str, Mapping[str, float]]) -> dict[str, Group]:
    """Sort features by their templates; those of no template or no text are never looked up by NLTK."""
    groups: dict[str, Group] = {name: {} for name in _NAMES}
    for feature, by_class in weights.items():
        match = _FEATURE.fullmatch(feature)
        if match:
            groups[match[1]][match[2]] = by_class
    return {**groups, _BIAS: {"": weights.get(_BIAS, {})}}


class _Weights:
    """The weights of all features, numbered from 1 through the groups."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        tags = {tag: number for number, tag in enumerate(TAGS)}
        every = list(itertools.chain.from_iterable(group.values() for group in groups.values()))
        sizes = np.array([0, *map(len, every)], np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).astype(np.int32)
        self.classes = np.array([tags[tag] for by_class in every for tag in by_class], np.uint8)
        self.values = np.array([weight for by_class in every for weight in by_class.values()], np.float64)
        thousandths = np.rint(self.values * _THOUSANDTHS)
        if not np.array_equal(thousandths / _THOUSANDTHS, self.values):
            raise ValueError("expected weights of three decimals")
        largest = np.zeros(len(groups))
        kinds = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
        np.maximum.at(largest, np.repeat(kinds, sizes[1:]), np.abs(thousandths))
        if len(every) >= MAX_FEATURES:
            raise ValueError(f"expected fewer than {MAX_FEATURES} features, found {len(every)}")
        if largest.sum() >= -NEVER:
            raise ValueError(f"expected sums of weights below {-NEVER // _THOUSANDTHS}")
        self.thousandths = thousandths.astype(np.int32)

    def rows(self, features: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return what each of some features adds, (n, 48)."""
        rows = np.zeros((len(features), LANES), np.int32)
        sizes = self.starts[features + 1] - self.starts[features]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        at = np.repeat(self.starts[features], sizes) + within
        rows[np.repeat(np.arange(len(features)), sizes), self.classes[at]] = self.thousandths[at]
        return rows


def _arranged(groups: Mapping[str, Group], weights: _Weights) -> Features:
    firsts = dict(zip(groups, itertools.accumulate(map(len, groups.values()), initial=1), strict=False))

    def numbered(name: str) -> Iterator[tuple[int, str]]:
        return enumerate(groups[name], start=firsts[name])

    texts = itertools.chain.from_iterable(groups[name] for name in _TEMPLATES)
    words = (text.partition(" ")[2] for text in groups[_TAG_AND_WORD])
    parts = {text: number for number, text in enumerate(dict.fromkeys(itertools.chain(texts, words)), start=1)}
    columns = np.zeros((len(parts) + 1, NUM_COLUMNS), np.int32)
    for name, column in _TEMPLATES.items():
        for feature, text in numbered(name):
            columns[parts[text], column] = feature
    tags, both_tags = np.zeros((NUM_CONTEXTS, 2), np.int32), np.zeros((NUM_CONTEXTS, NUM_CONTEXTS), np.int32)
    for place, name in enumerate((_TAG, _TAG2)):
        for feature, tag in numbered(name):
            tags[_CONTEXTS[tag], place] = feature
    for feature, text in numbered(_BOTH_TAGS):
        tag, _, tag2 = text.partition(" ")
        both_tags[_CONTEXTS[tag], _CONTEXTS[tag2]] = feature
    pairs = _pairs(numbered(_TAG_AND_WORD), parts, columns)
    pair_features = np.arange(len(groups[_TAG_AND_WORD]) + 1, dtype=np.int32)
    known = interned([text.encode() for text in parts])
    return Features(
        known, columns, np.array([firsts[_BIAS]], np.int32), tags, both_tags, pairs,
        weights.starts, weights.classes, weights.thousandths, weights.values,
        _tag_rows(weights, tags, both_tags), weights.rows(pair_features),
    )  # fmt: skip


def _pairs(
    numbered: Iterator[tuple[int, str]], parts: Mapping[str, int], columns: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Return features by row and tag, and let words know their rows."""
    pairs = [np.zeros(NUM_CONTEXTS, np.int32)]
    for feature, text in numbered:
        tag, _, word = text.partition(" ")
        row = columns[parts[word]]
        if not row[SLOT]:
            row[SLOT] = len(pairs)
            pairs.append(np.zeros(NUM_CONTEXTS, np.int32))
        pairs[row[SLOT]][_CONTEXTS[tag]] = feature
    return np.array(pairs)


def _tag_rows(
    weights: _Weights, tags: npt.NDArray[np.int32], both_tags: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    before, before2 = weights.rows(tags[:, 0]), weights.rows(tags[:, 1])
    rows = weights.rows(both_tags.ravel()).reshape(NUM_CONTEXTS, NUM_CONTEXTS, LANES)
    rows += before[:, None] + before2[None, :]
    rows[:, :, len(TAGS) :] = NEVER
    return rows.reshape(-1, LANES)


def interned(texts: list[bytes]) -> Words:
    """Return distinct texts as words whose ids are their places in the list."""
    words = Vocabulary().reserve(len(texts), sum(map(len, texts)))
    _intern(words, joined(texts), ends(texts))
    return words


def joined(texts: list[bytes]) -> npt.NDArray[np.uint8]:
    """Return texts one after another; never nothing, which numpy takes for no buffer."""
    return np.frombuffer(b"".join(texts) or b" ", np.uint8)


def ends(texts: list[bytes]) -> npt.NDArray[np.int64]:
    """Return where each of joined texts begins, and the last one ends."""
    return np.cumsum([0, *map(len, texts)], dtype=np.int64)


@kernel
def _intern(words: Words, text: Any, bounds: Any) -> None:
    for i in range(len(bounds) - 1):
        intern(words, text, bounds[i], bounds[i + 1])
