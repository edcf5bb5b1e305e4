"""Words as numbers: each distinct surface is kept once, and compiled code compares and counts ids.

Ids are given in order of appearance, so they mean something in one process only: what leaves it are surfaces.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.tagging.compilation import kernel

FNV_OFFSET = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
_FEWEST_WORDS = 1 << 14
_FEWEST_BYTES = 1 << 18
_MAX_LOAD = 2  # slots for each word, at least: a miss ends soon


class Words(NamedTuple):
    """The arrays behind a vocabulary, as compiled code takes them; they are others after `Vocabulary.reserve`.

    Attributes:
        state: Number of words, and of bytes of them all; compiled code moves both.
        text: The words' UTF-8, one after another.
        starts: Where each word's begins; `starts[id + 1]` is where it ends.
        hashes: FNV-1a of each word's UTF-8.
        slots: Hash table, -1 where empty, of a power of two in length; linear probing from `hash & (length - 1)`.
    """

    state: npt.NDArray[np.int64]
    text: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    slots: npt.NDArray[np.int32]


@kernel
def fnv(text: Any, start: int, stop: int) -> Any:
    """Return the 64-bit FNV-1a hash of `text[start:stop]`, an array of bytes."""
    value = FNV_OFFSET
    for i in range(start, stop):
        value = (value ^ np.uint64(text[i])) * FNV_PRIME
    return value


@kernel
def _slot(words: Words, value: Any, text: Any, start: int, stop: int) -> Any:
    """Return where the word `text[start:stop]` of a hash stands in the table, or where it would."""
    mask = np.uint64(len(words.slots) - 1)
    slot = value & mask
    length = stop - start
    while True:
        word = words.slots[slot]
        if word < 0:
            return slot
        if words.hashes[word] == value:
            first = words.starts[word]
            if words.starts[word + 1] - first == length:
                i = 0
                while i < length and words.text[first + i] == text[start + i]:
                    i += 1
                if i == length:
                    return slot
        slot = (slot + np.uint64(1)) & mask


@kernel
def find(words: Words, text: Any, start: int, stop: int) -> Any:
    """Return the id of the word `text[start:stop]`, -1 if it has none."""
    return words.slots[_slot(words, fnv(text, start, stop), text, start, stop)]


@kernel
def intern(words: Words, text: Any, start: int, stop: int) -> Any:
    """Return the id of the word `text[start:stop]`, a new one if need be; room must have been reserved."""
    value = fnv(text, start, stop)
    slot = _slot(words, value, text, start, stop)
    word = np.int64(words.slots[slot])
    if word < 0:
        word, first = words.state[0], words.state[1]
        length = stop - start
        for i in range(length):
            words.text[first + i] = text[start + i]
        words.starts[word + 1] = first + length
        words.hashes[word] = value
        words.slots[slot] = word
        words.state[0] = word + 1
        words.state[1] = first + length
    return word


@kernel
def _fill(words: Words) -> None:
    mask = np.uint64(len(words.slots) - 1)
    for word in range(words.state[0]):
        slot = words.hashes[word] & mask
        while words.slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        words.slots[slot] = word


@kernel
def _fold(words: Words, first: int, hashes: Any, is_ascii: Any) -> None:
    """Hash words in lower case, those of ASCII alone; the others are only marked."""
    for word in range(first, words.state[0]):
        value = FNV_OFFSET
        plain = True
        for i in range(words.starts[word], words.starts[word + 1]):
            byte = words.text[i]
            if byte >= 128:
                plain = False
                break
            if 65 <= byte <= 90:
                byte += 32
            value = (value ^ np.uint64(byte)) * FNV_PRIME
        hashes[word - first] = value
        is_ascii[word - first] = plain


class Vocabulary:
    """Distinct words and their ids, 0 to `len - 1`."""

    def __init__(self) -> None:
        self.words = _room(_FEWEST_WORDS, _FEWEST_BYTES)
        self._folded = np.empty(0, np.uint64)
        self._num_folded = 0

    def __len__(self) -> int:
        return int(self.words.state[0])

    @property
    def size_bytes(self) -> int:
        """What the arrays take."""
        return sum(array.nbytes for array in (*self.words, self._folded))

    def reserve(self, num_words: int, num_bytes: int) -> Words:
        """Make room for so many more words of so many bytes together; return the arrays to go on with."""
        old = self.words
        need_words, need_bytes = len(self) + num_words, int(old.state[1]) + num_bytes
        if need_words > len(old.hashes) or need_bytes > len(old.text):
            words = _room(_grown(len(old.hashes), need_words), _grown(len(old.text), need_bytes))
            words.state[:] = old.state
            words.text[: old.state[1]] = old.text[: old.state[1]]
            words.starts[: len(self) + 1] = old.starts[: len(self) + 1]
            words.hashes[: len(self)] = old.hashes[: len(self)]
            _fill(words)
            self.words = words
        return self.words

    def intern(self, word: str) -> int:
        """Return the id of a word, a new one if need be; a lone surrogate counts as U+FFFD."""
        text = np.frombuffer(_utf8(word), np.uint8)
        return int(intern(self.reserve(1, len(text)), text, 0, len(text)))

    def surface(self, word: int) -> str:
        """Return the word of an id."""
        start, stop = self.words.starts[word : word + 2]
        return self.words.text[start:stop].tobytes().decode()

    def surfaces(self, ids: npt.NDArray[np.integer[Any]] | None = None) -> pa.Array:
        """Return the words of ids, of all without, as an array of large strings."""
        count = len(self)
        text, starts = self.words.text[: self.words.state[1]], self.words.starts[: count + 1]
        every = pa.LargeStringArray.from_buffers(count, pa.py_buffer(starts.tobytes()), pa.py_buffer(text.tobytes()))
        return every if ids is None else every.take(pa.array(ids))

    def folded(self) -> npt.NDArray[np.uint64]:
        """Return, by id, the FNV-1a of each word's lower case (`str.lower`): equal for words that differ in case."""
        count, done = len(self), self._num_folded
        if count > len(self._folded):
            grown = np.empty(_grown(max(len(self._folded), _FEWEST_WORDS), count), np.uint64)
            grown[:done] = self._folded[:done]
            self._folded = grown
        if count > done:
            is_ascii = np.empty(count - done, np.bool_)
            _fold(self.words, done, self._folded[done:count], is_ascii)
            for word in np.flatnonzero(~is_ascii) + done:
                self._folded[word] = hash_of(self.surface(int(word)).lower())
            self._num_folded = count
        return self._folded[:count]


def hash_of(text: str) -> np.uint64:
    """Return the FNV-1a of a text's UTF-8: what `Vocabulary.folded` has for a word whose lower case is `text`."""
    data = np.frombuffer(_utf8(text), np.uint8)
    return np.uint64(fnv_of(data))


@kernel
def fnv_of(data: Any) -> Any:
    """Return the 64-bit FNV-1a hash of an array of bytes."""
    return fnv(data, 0, len(data))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _room(num_words: int, num_bytes: int) -> Words:
    num_slots = 1 << (_MAX_LOAD * num_words - 1).bit_length()
    return Words(
        np.zeros(2, np.int64),
        np.empty(num_bytes, np.uint8),
        np.zeros(num_words + 1, np.int64),
        np.empty(num_words, np.uint64),
        np.full(num_slots, -1, np.int32),
    )


def _grown(held: int, needed: int) -> int:
    return max(held * 3 // 2 if needed > held else held, needed)
