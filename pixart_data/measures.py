"""What is counted in each caption, compiled: one pass over the words and tags of a block, no text touched.

Words are compared by the hash of their lower case, phrases by the ids of a small lexicon, repeats through hash tables
that are never emptied: an entry holds only for the caption and purpose whose stamp it carries.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data import phrases
from pixart_data.tagging.blocks import NOUN_TAGS, TAGS, Block
from pixart_data.tagging.compilation import kernel
from pixart_data.tagging.vocabulary import Vocabulary, hash_of

COUNTS = (
    # fmt: off
    "num_tokens",
    "num_sentences",
    "num_nouns",
    "num_distinct_nouns",
    "num_generic_nouns",
    "num_attributes",
    "num_noun_phrases",
    "num_attributed_phrases",
    "num_spatial",
    "num_numbers",
    "num_hedges",
    "num_boilerplate",
    "num_refusals",
    "num_repeated_tokens",
    "num_distinct_pairs",
    "final_mark",
    "last_tag",
    # fmt: on
)
"""The columns of what `count` returns."""

_SPATIAL, _HEDGE = 1, 2
_BOILERPLATE, _REFUSAL = 1, 2
_NOUN, _ADJECTIVE, _PARTICIPLE, _OPENING, _NUMBER, _JOINING = 1, 2, 3, 4, 5, 6
_ROLES = {
    **dict.fromkeys(NOUN_TAGS, _NOUN),
    **dict.fromkeys(("JJ", "JJR", "JJS"), _ADJECTIVE),
    **dict.fromkeys(("VBG", "VBN"), _PARTICIPLE),
    **dict.fromkeys(("DT", "PDT", "POS", "PRP$", "WP$"), _OPENING),
    "CD": _NUMBER,
    **dict.fromkeys(("RB", "RBR", "RBS", "CC", ","), _JOINING),
}
_ENDS, _CLOSES = 1, 2
_SENTENCE_END = r"""[.!?…。！？।؟]["'”’»)\]}]*$"""
_CLOSER = r"""^(?:["'”’»)\]}`]+|-RRB-)$"""
_NGRAM = 4
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_4 = np.uint64(pow(0x9E3779B97F4A7C15, _NGRAM, 1 << 64))
_ONE = np.uint64(1)


class Tokens(NamedTuple):
    """The arrays of a `Block`, as compiled code takes them."""

    words: npt.NDArray[np.int32]
    tags: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    begins: npt.NDArray[np.uint8]
    counted: npt.NDArray[np.bool_]


class Known(NamedTuple):
    """What is known of words and tags.

    Attributes:
        folded: Hash of each word's lower case.
        lexicon: Each word's id in the lexicon of the phrases, 0 for none.
        marks: Bit 1 for words that end a sentence, bit 2 for closing quotes and brackets.
        generic: By lexicon id, whether it is a generic noun.
        roles: By tag, what it does in a noun phrase.
        phrases: Of the phrases that are counted anywhere.
        openers: Of those that are counted where a sentence begins.
    """

    folded: npt.NDArray[np.uint64]
    lexicon: npt.NDArray[np.uint16]
    marks: npt.NDArray[np.uint8]
    generic: npt.NDArray[np.bool_]
    roles: npt.NDArray[np.uint8]
    phrases: phrases.Trie
    openers: phrases.Trie


class Stamped(NamedTuple):
    """A hash set of which only the entries of the present stamp count."""

    keys: npt.NDArray[np.uint64]
    stamps: npt.NDArray[np.int64]


@kernel
def _is_new(table: Stamped, shift: Any, stamp: Any, key: Any) -> Any:
    """Add a key to the set of a stamp; the set has 2 ** (64 - shift) slots, more than it gets keys."""
    keys, stamps = table.keys, table.stamps
    mask = (_ONE << (np.uint64(64) - shift)) - _ONE
    slot = (key * _FACTOR) >> shift
    while stamps[slot] == stamp:
        if keys[slot] == key:
            return False
        slot = (slot + _ONE) & mask
    stamps[slot] = stamp
    keys[slot] = key
    return True


@kernel
def _match(trie: phrases.Trie, lexicon: Any, words: Any, first: int) -> Any:
    """Return kind and length of the longest phrase that begins at `words[first]`; 0, 1 if none."""
    children, kinds = trie.children, trie.kinds
    node, kind, length = 0, 0, 1
    for i in range(first, len(words)):
        node = children[node, lexicon[words[i]]]
        if node == 0:
            break
        if kinds[node]:
            kind, length = kinds[node], i - first + 1
    return kind, length


@kernel
def _count_openers(known: Known, words: Any, begins: Any, row: Any) -> None:
    lexicon = known.lexicon
    for i in range(len(words)):
        if begins[i]:
            row[1] += 1
            kind, _ = _match(known.openers, lexicon, words, i)
            row[11] += kind == _BOILERPLATE
            row[12] += kind == _REFUSAL


@kernel
def _count_phrases(known: Known, words: Any, row: Any) -> None:
    """From left to right, the longest phrase first; the next is looked for behind it."""
    lexicon, children = known.lexicon, known.phrases.children
    i = 0
    while i < len(words):
        if children[0, lexicon[words[i]]]:
            kind, length = _match(known.phrases, lexicon, words, i)
            row[8] += kind == _SPATIAL
            row[10] += kind == _HEDGE
            i += length
        else:
            i += 1


@kernel
def _count_noun_phrases(known: Known, tags: Any, row: Any) -> None:
    """A base noun phrase is a run of nouns with the determiner, numbers and attributes right before it.

    Adjectives are attributes wherever they stand; participles only inside a noun phrase, between what opens it
    (determiner, possessive, number, adjective) and its nouns: "a smiling woman", not "wearing glasses".
    """
    is_open, num_participles, previous = False, 0, 0
    for tag in tags:
        role = known.roles[tag]
        if role == _NOUN:
            if previous != _NOUN:
                row[6] += 1
                if previous == _ADJECTIVE or (previous == _PARTICIPLE and is_open):
                    row[7] += 1
                    row[5] += num_participles
            row[2] += 1
            is_open = False
        elif role == _PARTICIPLE:
            num_participles += is_open
        elif role == _ADJECTIVE:
            row[5] += 1
        row[9] += role == _NUMBER
        if role in (_OPENING, _NUMBER) or (role == _ADJECTIVE and not is_open):
            is_open, num_participles = True, 0
        is_open = is_open and role != 0
        previous = role


@kernel
def _shift(num_keys: int) -> Any:
    """Return what `_is_new` is to shift by for so many keys: at least half of the slots stay free."""
    shift = np.uint64(62)
    while (_ONE << (np.uint64(64) - shift)) < np.uint64(2 * num_keys):
        shift -= _ONE
    return shift


@kernel
def _count_pairs(known: Known, words: Any, table: Stamped, stamp: Any, row: Any) -> None:
    """Distinct pairs of neighbours, in lower case."""
    folded, shift = known.folded, _shift(len(words))
    last, num_pairs = folded[words[0]], 0
    for i in range(1, len(words)):
        word = folded[words[i]]
        if _is_new(table, shift, stamp, last * _FACTOR + word):
            num_pairs += 1
        last = word
    row[14] = num_pairs


@kernel
def _count_repeats(known: Known, words: Any, table: Stamped, stamp: Any, row: Any) -> None:
    """Words in runs of four that were there before, in lower case."""
    folded, shift = known.folded, _shift(len(words))
    run, first_free, num_repeated = np.uint64(0), 0, 0
    for i in range(len(words)):
        run = run * _FACTOR + folded[words[i]]
        if i >= _NGRAM:
            run -= folded[words[i - _NGRAM]] * _FACTOR_4
        if i >= _NGRAM - 1 and not _is_new(table, shift, stamp, run):
            num_repeated += i + 1 - max(first_free, i + 1 - _NGRAM)
            first_free = i + 1
    row[13] = num_repeated


@kernel
def _count_distinct_nouns(known: Known, words: Any, tags: Any, table: Stamped, stamp: Any, row: Any) -> None:
    folded, lexicon, generic, roles = known.folded, known.lexicon, known.generic, known.roles
    shift, num_distinct, num_generic = _shift(row[2]), 0, 0
    for i in range(len(words)):
        if roles[tags[i]] == _NOUN:
            if _is_new(table, shift, stamp, folded[words[i]]):
                num_distinct += 1
            num_generic += generic[lexicon[words[i]]]
    row[3], row[4] = num_distinct, num_generic


@kernel
def _look_at_end(known: Known, words: Any, tags: Any, row: Any) -> None:
    last = len(words) - 1
    row[16] = tags[last]
    while last > 0 and known.marks[words[last]] & _CLOSES:
        last -= 1
    row[15] = known.marks[words[last]] & _ENDS


@kernel
def _count(tokens: Tokens, known: Known, table: Stamped, out: Any) -> None:
    for caption in range(len(tokens.counted)):
        start, stop = tokens.offsets[caption], tokens.offsets[caption + 1]
        if tokens.counted[caption] and stop > start:
            row, words, tags = out[caption], tokens.words[start:stop], tokens.tags[start:stop]
            row[0] = stop - start
            stamp = 3 * caption + 1  # 0 is in the fresh table
            _count_noun_phrases(known, tags, row)
            _count_distinct_nouns(known, words, tags, table, stamp, row)
            _count_pairs(known, words, table, stamp + 1, row)
            _count_repeats(known, words, table, stamp + 2, row)
            _count_openers(known, words, tokens.begins[start:stop], row)
            _count_phrases(known, words, row)
            _look_at_end(known, words, tags, row)


@kernel
def _shares_run(folded: Any, words: Any, prompt: Any, length: int) -> Any:
    """Whether `length` words follow each other in both; any such run covers a multiple of `length`."""
    for i in range(length - 1, len(words), length):
        word = folded[words[i]]
        for j in range(len(prompt)):
            if prompt[j] == word:
                before, after = 1, 1
                while before <= min(i, j) and folded[words[i - before]] == prompt[j - before]:
                    before += 1
                while after < min(len(words) - i, len(prompt) - j) and folded[words[i + after]] == prompt[j + after]:
                    after += 1
                if before + after - 1 >= length:
                    return True
    return False


@kernel
def _find_echoes(tokens: Tokens, folded: Any, prompts: Any, ends: Any, out: Any) -> None:
    for caption in range(len(tokens.counted)):
        prompt = prompts[ends[caption, 0] : ends[caption, 1]]
        words = tokens.words[tokens.offsets[caption] : tokens.offsets[caption + 1]]
        if ends[caption, 2] > 0 and len(words) and tokens.counted[caption]:
            out[caption] = _shares_run(folded, words, prompt, ends[caption, 2])


class Counter:
    """Counts in blocks whose words are of one vocabulary; what it knows of a word it finds out once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._num_known = 0
        self._lexicon, self._marks = np.zeros(1 << 14, np.uint16), np.zeros(1 << 14, np.uint8)
        texts = phrases.lexicon(
            phrases.SPATIAL, phrases.HEDGES, phrases.BOILERPLATE, phrases.REFUSALS, phrases.GENERIC_NOUNS
        )
        hashes = np.array([hash_of(text) for text in texts], np.uint64)
        self._ids = np.argsort(hashes).astype(np.uint16)
        self._hashes = hashes[self._ids]
        self._generic = np.array([False, *(text in phrases.GENERIC_NOUNS for text in texts)])
        self._roles = np.array([_ROLES.get(tag, 0) for tag in TAGS] + [0] * (256 - len(TAGS)), np.uint8)
        self._phrases = phrases.trie({_SPATIAL: phrases.SPATIAL, _HEDGE: phrases.HEDGES}, texts)
        self._openers = phrases.trie({_BOILERPLATE: phrases.BOILERPLATE, _REFUSAL: phrases.REFUSALS}, texts)

    def count(self, block: Block) -> npt.NDArray[np.int32]:
        """Return a row of `COUNTS` for each caption, zeros for those that do not count; (N, len(COUNTS))."""
        out = np.zeros((len(block), len(COUNTS)), np.int32)
        longest = int(np.diff(block.offsets).max(initial=0))
        num_slots = 1 << max(2, (2 * longest - 1).bit_length() if longest else 0)
        table = Stamped(np.zeros(num_slots, np.uint64), np.zeros(num_slots, np.int64))
        _count(_tokens(block), self._known(), table, out)
        return out

    def find_echoes(
        self, block: Block, prompts: npt.NDArray[np.uint64], ends: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Say which captions share a run of words with their prompt; (N,).

        Args:
            prompts: The hashes of prompts' lower-case words, one prompt after another.
            ends: Where each caption's prompt begins and ends in that, and how many words make a run, (N, 3); 0 for
                captions that are not looked at.
        """
        out = np.zeros(len(block), np.bool_)
        _find_echoes(_tokens(block), self._vocabulary.folded(), prompts, ends, out)
        return out

    def _known(self) -> Known:
        """Look at the words that are new since the last time."""
        count, first = len(self._vocabulary), self._num_known
        folded = self._vocabulary.folded()
        if count > len(self._marks):
            more = max(len(self._marks) // 2, count - len(self._marks))
            self._lexicon = np.concatenate([self._lexicon, np.zeros(more, np.uint16)])
            self._marks = np.concatenate([self._marks, np.zeros(more, np.uint8)])
        if count > first:
            found = np.searchsorted(self._hashes, folded[first:]).clip(max=len(self._hashes) - 1)
            self._lexicon[first:count] = np.where(self._hashes[found] == folded[first:], self._ids[found] + 1, 0)
            surfaces = _surfaces(self._vocabulary, first)
            self._marks[first:count] = _ENDS * _matches(surfaces, _SENTENCE_END)
            self._marks[first:count] |= _CLOSES * _matches(surfaces, _CLOSER)
            self._num_known = count
        return Known(folded, self._lexicon, self._marks, self._generic, self._roles, self._phrases, self._openers)


def _tokens(block: Block) -> Tokens:
    """Writable, as compiled code is made anew for arrays that are not."""
    fit = partial(np.require, requirements=["C", "W"])
    return Tokens(fit(block.words), fit(block.tags), fit(block.offsets), fit(block.begins), fit(block.counted))


def _surfaces(vocabulary: Vocabulary, first: int) -> pa.Array:
    """Return the words from an id on, without copying those before it."""
    words, count = vocabulary.words, len(vocabulary)
    starts = words.starts[first : count + 1]
    text = words.text[starts[0] : starts[-1]]
    return pa.LargeStringArray.from_buffers(
        count - first, pa.py_buffer((starts - starts[0]).tobytes()), pa.py_buffer(text.tobytes())
    )


def _matches(words: pa.Array, pattern: str) -> npt.NDArray[np.uint8]:
    found = pc.match_substring_regex(words, pattern).to_numpy(zero_copy_only=False)
    return np.asarray(found, np.uint8)
