"""Captions into tokens: what `nltk.word_tokenize` gives for each, from compiled code.

Captions are split at white space; `chunks` knows each chunk's tokens, `sentences` where sentences end. What neither is
sure of goes to NLTK itself, caption by caption.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.tagging import characters
from pixart_data.tagging.analysis import analyse, desk
from pixart_data.tagging.arrays import Texts, texts
from pixart_data.tagging.chunks import (
    ASKS,
    BEGIN,
    BREAKS,
    CLOSING,
    DOUBTFUL,
    ENDS,
    LAST,
    LEANING,
    QUOTED,
    QUOTING,
    SINGLE,
    STARTS,
    STOPPED,
    STOPPING,
    Chunks,
    ChunkTable,
    holds,
    number,
)
from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.sentences import Pairs, PairTable, find_pair, lists, pair_key, patiently
from pixart_data.tagging.vocabulary import FNV_OFFSET, FNV_PRIME, Vocabulary

# The white space before a chunk.
_NOTHING, _SPACES, _WIDE, _MIXED = 0, 1, 2, 3
"""None, plain spaces, no-break spaces alone, and whatever else."""

_BEGINS = 8
"""Added to a form: the chunk begins a sentence."""

# What becomes of a caption.
_COMPILED, _DECLINED = 0, 1

_MAX_CAPTION_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
_BLOCK_CAPTIONS = 1 << 16
_SPACE, _TAB, _NEWLINE, _RETURN = 32, 9, 10, 13
_NO_BREAK = 0xC2, 0xA0


class Tokens(NamedTuple):
    """The tokens of captions; see `blocks.Block`."""

    words: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    begins: npt.NDArray[np.uint8]
    counted: npt.NDArray[np.bool_]


class Parts(NamedTuple):
    """The captions of a block, as chunks.

    Attributes:
        numbers: Of all chunks, one caption after another.
        gaps: The white space before each.
        forms: Their places in their sentences, as `chunks` numbers them.
        fates: What becomes of each caption.
        offsets: Where each caption's chunks begin, and the end of the last one's.
        counts: Tokens of each caption.
        missing: Pairs of chunks that NLTK must be asked about.
    """

    numbers: npt.NDArray[np.int32]
    gaps: npt.NDArray[np.uint8]
    forms: npt.NDArray[np.uint8]
    fates: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    missing: npt.NDArray[np.uint64]


@kernel
def _blank(data: Any, i: int, stop: int) -> Any:
    """Return the width of the white space that begins at a byte: 0 if it is none, 2 for a no-break space."""
    byte = data[i]
    if byte > _SPACE and byte != _NO_BREAK[0]:
        return 0
    if byte == _NO_BREAK[0]:
        return 2 if i + 1 < stop and data[i + 1] == _NO_BREAK[1] else 0
    return 1 if byte in (_SPACE, _NEWLINE, _TAB, _RETURN) else 0


@kernel
def _widened(gap: int, byte: int) -> Any:
    """Return what white space is with one more character, of which this is the first byte."""
    kind = _SPACES if byte == _SPACE else _WIDE if byte == _NO_BREAK[0] else _MIXED
    return kind if gap in (_NOTHING, kind) else _MIXED


@kernel
def _scan(chunks: Chunks, data: Any, offsets: Any, parts: Parts, caption: int) -> None:
    """Split a caption into chunks."""
    i, stop, at, gap = offsets[caption], offsets[caption + 1], parts.offsets[caption], _NOTHING
    while i < stop:
        width = _blank(data, i, stop)
        if width:
            gap = _widened(gap, data[i])
            i += width
            continue
        first = i
        value = FNV_OFFSET
        while i < stop and not _blank(data, i, stop):
            value = (value ^ np.uint64(data[i])) * FNV_PRIME
            i += 1
        parts.numbers[at] = number(chunks, data, first, i, value)
        parts.gaps[at] = gap
        gap = _NOTHING
        at += 1
    parts.offsets[caption + 1] = at


@kernel
def _scan_all(chunks: Chunks, data: Any, offsets: Any, present: Any, parts: Parts) -> Any:
    """Split captions into chunks, as long as there is room; return how many."""
    parts.offsets[0] = 0
    for caption in range(len(present)):
        num_bytes = offsets[caption + 1] - offsets[caption]
        parts.fates[caption] = _COMPILED
        parts.offsets[caption + 1] = parts.offsets[caption]
        if not present[caption]:
            continue
        if num_bytes > _MAX_CAPTION_BYTES:
            parts.fates[caption] = _DECLINED
        elif holds(chunks, num_bytes):
            _scan(chunks, data, offsets, parts, caption)
        else:
            return caption
    return len(present)


@kernel
def _ends_with_marks(chunks: Chunks, parts: Parts, start: int, i: int) -> Any:
    """Whether the chunks up to the i-th of a sentence end in a full stop and, apart from it, marks that go with it."""
    if not chunks.flags[parts.numbers[i]] & CLOSING:
        return False
    while i > start and chunks.flags[parts.numbers[i]] & CLOSING:
        i -= 1
    return chunks.flags[parts.numbers[i]] & STOPPED != 0


@kernel
def _breaks(chunks: Chunks, pairs: Pairs, parts: Parts, i: int, num_missing: Any) -> Any:
    """Whether a sentence ends behind the i-th chunk; -1 if that must be asked of NLTK, for the caption or the pair."""
    flags = chunks.flags[parts.numbers[i]]
    following = chunks.flags[parts.numbers[i + 1]]
    gap = parts.gaps[i + 1]
    if following & DOUBTFUL or (flags & QUOTING and gap != _SPACES) or (flags & STOPPING and gap == _WIDE):
        return -1
    ends = flags & BREAKS != 0
    if flags & ASKS:
        key = pair_key(parts.numbers[i], parts.numbers[i + 1])
        slot = find_pair(pairs, key)
        if pairs.keys[slot] == np.uint64(0):
            parts.missing[num_missing[0]] = key
            num_missing[0] += 1
        else:
            ends = pairs.answers[slot] != 0
    if ends:
        return -1 if following & LEANING else 1
    return 0


@kernel
def _parse(chunks: Chunks, pairs: Pairs, parts: Parts, start: int, stop: int, num_missing: Any) -> Any:
    """Find the sentences of the chunks from `start` to `stop`; return the number of tokens, -1: NLTK must do it."""
    begin = start
    tokens = 0
    for i in range(start, stop):
        chunk = parts.numbers[i]
        flags = chunks.flags[chunk]
        form = STARTS if i == begin and (i > start or parts.gaps[i] == _NOTHING) else 0
        if flags & DOUBTFUL or (flags & QUOTED and not form and parts.gaps[i] != _SPACES):
            return -1
        ends = 1
        if i + 1 < stop:
            ends = _breaks(chunks, pairs, parts, i, num_missing)
            form += ENDS * ends
        else:
            form += ENDS + LAST
        if ends and (ends < 0 or _ends_with_marks(chunks, parts, begin, i)):
            return -1
        parts.forms[i] = form | _BEGINS if i == begin else form
        begin = i + 1 if ends else begin
        tokens += _num_tokens(chunks, chunk, form)
    return tokens


@kernel
def _num_tokens(chunks: Chunks, chunk: int, form: int) -> Any:
    if chunks.flags[chunk] & SINGLE:
        return 1
    at = chunks.tokens[chunk] + 2 * form
    return chunks.bounds[at + 1] - chunks.bounds[at]


@kernel
def _parse_all(chunks: Chunks, pairs: Pairs, parts: Parts, count: int, num_missing: Any) -> Any:
    """Find the sentences of captions; return the number of pairs that NLTK must be asked about first."""
    num_missing[0] = 0
    for caption in range(count):
        parts.counts[caption] = 0
        if parts.fates[caption] == _COMPILED:
            tokens = _parse(chunks, pairs, parts, parts.offsets[caption], parts.offsets[caption + 1], num_missing)
            parts.counts[caption] = max(tokens, 0)
            if tokens < 0:
                parts.fates[caption] = _DECLINED
    return num_missing[0]


@kernel
def _emit(chunks: Chunks, parts: Parts, i: int, words: Any, begins: Any, at: int) -> Any:
    """Write the tokens of the i-th chunk; return where the next one's go."""
    chunk = parts.numbers[i]
    begins[at] = parts.forms[i] // _BEGINS
    if chunks.flags[chunk] & SINGLE:
        words[at] = chunks.tokens[chunk]
        return at + 1
    bound = chunks.tokens[chunk] + 2 * (parts.forms[i] % _BEGINS)
    first = at
    for k in range(chunks.bounds[bound], chunks.bounds[bound + 1]):
        words[at] = chunks.pool[k] >> 1
        if at > first:
            begins[at] = chunks.pool[k] & BEGIN
        at += 1
    return at


@kernel
def _emit_all(chunks: Chunks, parts: Parts, count: int, offsets: Any, words: Any, begins: Any) -> None:
    """Write the tokens of captions, but for those that NLTK has done."""
    for caption in range(count):
        if parts.fates[caption] == _COMPILED:
            at = offsets[caption]
            for i in range(parts.offsets[caption], parts.offsets[caption + 1]):
                at = _emit(chunks, parts, i, words, begins, at)


class Tokenizer:
    """Splits captions into the tokens of `nltk.word_tokenize`, and into its sentences.

    Args:
        vocabulary: Where the tokens go.
        max_chunks: At so many, which take about 100 MB, the table of chunks is cleared.

    Attributes:
        num_captions: Captions so far, without nulls.
        num_declined: Those of them that went to NLTK itself.

    Raises:
        LookupError: If NLTK's data files are missing.
    """

    def __init__(self, vocabulary: Vocabulary, max_chunks: int = 1 << 20) -> None:
        from nltk.tokenize import NLTKWordTokenizer, PunktTokenizer

        self.vocabulary = vocabulary
        self.num_captions = self.num_declined = 0
        self._punkt = PunktTokenizer()
        self._split = NLTKWordTokenizer().tokenize
        self._desk = desk(_traits(), lists(self._punkt))
        self._table = ChunkTable(vocabulary, max_chunks)
        self._pairs = PairTable(self._punkt.text_contains_sentbreak)
        self._num_missing = np.zeros(1, np.int64)

    @property
    def num_clearances(self) -> int:
        """How often the table of chunks was full and started anew."""
        return self._table.num_clearances

    def tokenize(self, captions: pa.Array | pa.ChunkedArray) -> Tokens:
        """Return the tokens of captions; new ones join the vocabulary.

        Args:
            captions: Of type string, large_string, string_view or null, or a dictionary of those.

        Raises:
            DataError: If the array is of another type, or a caption takes NLTK minutes.
        """
        whole = texts(captions)
        self.num_captions += int(whole.present.sum())
        blocks, start = [], 0
        while start < len(whole.present):
            stop = int(np.searchsorted(whole.offsets, whole.offsets[start] + _BLOCK_BYTES, "right")) - 1
            stop = min(max(stop, start + 1), start + _BLOCK_CAPTIONS, len(whole.present))
            block = self._tokenize(Texts(whole.data, whole.offsets[start : stop + 1], whole.present[start:stop]))
            blocks.append(block)
            start += len(block.counted)
        return _joined(blocks)

    def _tokenize(self, block: Texts) -> Tokens:
        """Tokenize as many captions as there is room for, one at least."""
        parts = _parts(block)
        if self._table.clear():
            self._pairs.clear()
        while not (count := _scan_all(self._table.chunks, *block, parts)):
            self._table.reserve(int(block.offsets[1] - block.offsets[0]))
        while analyse(self._table.chunks, self.vocabulary.words, self._desk):
            self._table.reserve_tokens()
        chunks = self._table.chunks
        while num_missing := _parse_all(chunks, self._pairs.pairs, parts, count, self._num_missing):
            self._pairs.learn(parts.missing[:num_missing], self._table.text)
        declined = self._ask(block, np.flatnonzero(parts.fates[:count] == _DECLINED), parts)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(parts.counts[:count])])
        words, begins = np.empty(offsets[-1], np.int32), np.zeros(offsets[-1], np.uint8)
        _emit_all(chunks, parts, count, offsets, words, begins)
        for caption, (caption_words, caption_begins) in declined.items():
            words[offsets[caption] : offsets[caption + 1]] = caption_words
            begins[offsets[caption] : offsets[caption + 1]] = caption_begins
        return Tokens(words, offsets, begins, parts.counts[:count] > 0)

    def _ask(
        self, block: Texts, captions: npt.NDArray[np.integer[Any]], parts: Parts
    ) -> dict[int, tuple[list[int], list[int]]]:
        """Have NLTK tokenize captions; return the words of each, and whether they begin sentences."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        self.num_declined += len(captions)
        for caption in captions.tolist():
            words: list[int] = []
            begins: list[int] = []
            text = block.text(caption)
            for tokens in patiently(self._sentences, text) if text.strip() else ():
                words += map(self.vocabulary.intern, tokens)
                begins += [int(i == 0) for i in range(len(tokens))]
            found[caption] = words, begins
            parts.counts[caption] = len(words)
        return found

    def _sentences(self, text: str) -> list[list[str]]:
        """Return the tokens of each sentence, by NLTK."""
        return [self._split(sentence) for sentence in self._punkt.tokenize(text)]


@functools.cache
def _traits() -> npt.NDArray[np.uint32]:
    return characters.table()


def _parts(block: Texts) -> Parts:
    """Return room for the chunks of captions: at most one for two bytes."""
    count = len(block.present)
    most = int(block.offsets[-1] - block.offsets[0]) // 2 + count
    return Parts(
        np.empty(most, np.int32),
        np.empty(most, np.uint8),
        np.empty(most, np.uint8),
        np.empty(count, np.uint8),
        np.empty(count + 1, np.int64),
        np.empty(count, np.int64),
        np.empty(most, np.uint64),
    )


def _joined(blocks: list[Tokens]) -> Tokens:
    if len(blocks) == 1:
        return blocks[0]
    counts = [np.diff(block.offsets) for block in blocks]
    return Tokens(
        np.concatenate([np.empty(0, np.int32), *(block.words for block in blocks)]),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.empty(0, np.int64), *counts]))]),
        np.concatenate([np.empty(0, np.uint8), *(block.begins for block in blocks)]),
        np.concatenate([np.empty(0, np.bool_), *(block.counted for block in blocks)]),
    )
