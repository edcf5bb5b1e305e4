"""The table of chunks: what stands between white space in captions, each once, with what `analysis` knows about it.

It has a chunk's tokens in every place that it can have in a sentence, and what else its neighbours must know. It
is a cache: it may be cleared between blocks of captions, and is once it grows beyond a limit.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pixart_data.tagging.compilation import lean_kernel as kernel
from pixart_data.tagging.vocabulary import Vocabulary

# What a chunk is, as bits.
SINGLE = 1  # one token in all places
DOUBTFUL = 1 << 1  # a caption that holds it goes to NLTK
BREAKS = 1 << 2  # a sentence ends behind it, if anything follows
ASKS = 1 << 3  # one may end behind it: the next chunk says
QUOTED = 1 << 4  # begins with a quote that opens only behind a space, no other white space
QUOTING = 1 << 5  # ends with an apostrophe that is split off only before a space
CLOSING = 1 << 6  # nothing but what may stand between the last full stop and the end of its sentence
STOPPED = 1 << 7  # ends in such a full stop
LEANING = 1 << 8  # belongs, or a part of it does, to a sentence that ends before it
STOPPING = 1 << 9  # has a place where a sentence might end; Punkt takes no-break spaces behind it for part of the word

# A chunk's places in a sentence: forms that are the same share their tokens.
STARTS = 1  # added for the first chunk
ENDS = 2  # added for the last one
LAST = 2  # added to those two for the last chunk of a caption
NUM_FORMS = 6

MAX_CHARS = 400
"""A longer chunk is doubtful."""

BEGIN = 1
"""The low bit of a token of the pool: it begins a sentence; above it is the word."""

_MAX_LOAD = 2


class Chunks(NamedTuple):
    """The table of chunks, as compiled code takes it.

    Attributes:
        state: Number of chunks, of bytes of them all, of forms' bounds, of pooled tokens, and of analysed chunks.
        text: The chunks' UTF-8, one after another.
        starts: Where each chunk's begins; `starts[number + 1]` is where it ends.
        hashes: FNV-1a of each.
        slots: Hash table as in `vocabulary.Words`.
        flags: What each chunk is.
        tokens: Its token, where it is single, else where its forms' bounds begin.
        bounds: The start and end of each form in the pool.
        pool: Words of forms, times two, and whether they begin a sentence.
    """

    state: npt.NDArray[np.int64]
    text: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    slots: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint16]
    tokens: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    pool: npt.NDArray[np.int32]


@kernel
def _add(chunks: Chunks, data: Any, start: int, stop: int) -> Any:
    """Add the chunk `data[start:stop]`, for `analysis` to see to; return its number."""
    chunk, at = chunks.state[0], chunks.state[1]
    for i in range(start, stop):
        chunks.text[at] = data[i]
        at += 1
    chunks.starts[chunk + 1] = at
    chunks.state[0], chunks.state[1] = chunk + 1, at
    return chunk


@kernel
def number(chunks: Chunks, data: Any, start: int, stop: int, value: Any) -> Any:
    """Return the number of the chunk `data[start:stop]`, whose hash is given; it is added if it is new."""
    mask = np.uint64(len(chunks.slots) - 1)
    slot = value & mask
    length = stop - start
    while True:
        chunk = chunks.slots[slot]
        if chunk < 0:
            break
        first = chunks.starts[chunk]
        if chunks.hashes[chunk] == value and chunks.starts[chunk + 1] - first == length:
            i = 0
            while i < length and chunks.text[first + i] == data[start + i]:
                i += 1
            if i == length:
                return chunk
        slot = (slot + np.uint64(1)) & mask
    chunk = _add(chunks, data, start, stop)
    chunks.hashes[chunk] = value
    chunks.slots[slot] = chunk
    return chunk


@kernel
def _fill(chunks: Chunks) -> None:
    mask = np.uint64(len(chunks.slots) - 1)
    for chunk in range(chunks.state[0]):
        slot = chunks.hashes[chunk] & mask
        while chunks.slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        chunks.slots[slot] = chunk


@kernel
def holds(chunks: Chunks, num_bytes: int) -> Any:
    """Whether the chunks of a caption of so many bytes fit in."""
    return len(chunks.hashes) - chunks.state[0] > num_bytes // 2 and len(chunks.text) - chunks.state[1] >= num_bytes


class ChunkTable:
    """The table of chunks: grows with what it holds, up to a limit.

    Args:
        vocabulary: Where words go.
        max_chunks: With so many, `clear` starts it anew.
    """

    def __init__(self, vocabulary: Vocabulary, max_chunks: int = 1 << 20) -> None:
        self._vocabulary = vocabulary
        self._max_chunks = max_chunks
        self.num_clearances = 0
        self.chunks = _room(np.array([_FEWEST, 8 * _FEWEST, NUM_FORMS * _FEWEST, NUM_FORMS * _FEWEST]))

    def __len__(self) -> int:
        return int(self.chunks.state[0])

    def text(self, chunk: int) -> str:
        """Return a chunk by its number."""
        start, stop = self.chunks.starts[chunk : chunk + 2]
        return self.chunks.text[start:stop].tobytes().decode()

    def clear(self) -> bool:
        """Start anew if the table has grown beyond its limit; return whether it has."""
        if len(self) < self._max_chunks:
            return False
        self.chunks.state[:] = 0
        self.chunks.slots[:] = -1
        self.num_clearances += 1
        return True

    def reserve(self, num_bytes: int) -> None:
        """Make room for the chunks of a caption of so many bytes; the table doubles at least."""
        self._grow(np.array([num_bytes // 2 + 1, num_bytes, 0, 0]))

    def reserve_tokens(self) -> None:
        """Make room for the tokens of any one chunk, here and in the vocabulary."""
        num_tokens = NUM_FORMS * 4 * MAX_CHARS
        self._grow(np.array([0, 0, 2 * NUM_FORMS, num_tokens]))
        self._vocabulary.reserve(num_tokens, 2 * num_tokens)

    def _grow(self, num_more: npt.NDArray[np.int64]) -> None:
        """Double those of the arrays, by the counters of `Chunks.state`, that cannot take so many more."""
        old = self.chunks
        sizes = np.array([len(old.hashes), len(old.text), len(old.bounds), len(old.pool)])
        needed = old.state[:4] + num_more
        if (needed <= sizes).all():
            return
        self.chunks = _room(np.where(needed > sizes, np.maximum(2 * sizes, needed), sizes))
        arrays: list[npt.NDArray[Any]] = [*old]
        for name, held in zip(Chunks._fields, arrays, strict=True):
            if name != "slots":
                getattr(self.chunks, name)[: len(held)] = held
        _fill(self.chunks)


_FEWEST = 1 << 14


def _room(sizes: npt.NDArray[np.int64]) -> Chunks:
    """Return tables for so many chunks, bytes, bounds and pooled tokens."""
    num_chunks, num_bytes, num_bounds, num_tokens = (int(size) for size in sizes)
    return Chunks(
        np.zeros(5, np.int64),
        np.empty(num_bytes, np.uint8),
        np.zeros(num_chunks + 1, np.int64),
        np.empty(num_chunks, np.uint64),
        np.full(1 << (_MAX_LOAD * num_chunks - 1).bit_length(), -1, np.int32),
        np.zeros(num_chunks, np.uint16),
        np.zeros(num_chunks, np.int32),
        np.zeros(num_bounds, np.int32),
        np.zeros(num_tokens, np.int32),
    )
