"""Which text belongs to which image: lists of millions of 64-bit keys matched in bounded memory, whatever their order.

A list is read once, in chunks, checked on the way. Its keys, which are hashes, are sorted by their top bits into parts
of like size that wait in a nameless file on the disk: a killed process leaves none. Then part meets part.
"""

import hashlib
import os
import tempfile
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from pixart_data.entries import Entries, checks
from pixart_data.errors import DataError
from pixart_data.retries import storage
from pixart_model.roster import NONE, Numbers

_CHUNK_ROWS = 1 << 18
_CHECK_ROWS = 1 << 14  # what fits a core's cache
_PART_ROWS = 1 << 18
_MOST_PART_BITS = 14
_NUM_THREADS = 2
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, and its bits look random


@dataclass(frozen=True)
class EntriesFile:
    """An entries.bin on a local disk, and the SHA-256 that its manifest gives it."""

    path: Path
    sha256: str


def read_entries(file: EntriesFile, dtype: np.dtype[np.void]) -> Generator[tuple[int, Entries], None, None]:
    """Yield the records of a file in order, each with the number of its first one; they are overwritten by the next.

    Raises:
        DataError: At the first record that does not fit its check, or at the end if the file is not the manifest's.
    """
    digest = hashlib.sha256()
    buffer = np.empty(_CHUNK_ROWS, dtype)
    view = buffer.view(np.uint8).data
    first = 0
    with _opened(file.path) as source, ThreadPoolExecutor(1) as hashing:
        while size_bytes := _read_full(source, view):
            rows, rest = divmod(size_bytes, dtype.itemsize)
            if rest:
                raise _damaged(file.path, f"expected records of {dtype.itemsize} bytes, found {rest} left over")
            done = hashing.submit(digest.update, view[:size_bytes])
            records = buffer[:rows]
            _require_whole(file.path, first, records)
            yield first, records
            done.result()
            first += rows
    if digest.hexdigest() != file.sha256:
        raise _damaged(file.path, "its SHA-256 is not the one in the manifest")


class Keys:
    """The keys of an entries file in parts by their top bits, on the disk. A context manager.

    Args:
        path: Of the entries file, for messages.
        bits: Of the key that number its part.
        folder: Local, where the nameless file lies: 12 bytes for each key.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.void], bits: int, folder: Path) -> None:
        self.path, self.dtype, self.bits, self.folder = path, dtype, bits, folder
        self.num_rows = 0
        self._bounds: list[npt.NDArray[np.int64]] = []  # for each chunk, where in it each part begins
        with storage(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__

    def add(self, keys: npt.NDArray[np.uint64]) -> None:
        """Add the keys of the next records; at most a chunk's.

        Raises:
            JobError: If the disk is full.
        """
        parts = (keys >> np.uint64(64 - self.bits)).astype(np.uint16) if self.bits else np.zeros(len(keys), np.uint16)
        order = np.argsort(parts, kind="stable")  # 16 bits: numpy sorts these by radix
        sizes = np.bincount(parts, minlength=1 << self.bits)
        self._bounds.append(np.concatenate([[0], np.cumsum(sizes)]))
        with storage(self.folder):
            self._file.write(keys[order].data)
            self._file.write((order + self.num_rows).astype(np.uint32).data)
        self.num_rows += len(keys)

    def finish(self) -> None:
        """Say that all keys are there."""
        with storage(self.folder):
            self._file.flush()

    def part(self, number: int) -> tuple[npt.NDArray[np.uint64], Numbers]:
        """Return the keys of a part and the numbers of their records."""
        size = sum(int(bounds[number + 1] - bounds[number]) for bounds in self._bounds)
        keys, numbers = np.empty(size, np.uint64), np.empty(size, np.uint32)
        done, offset = 0, 0
        for bounds in self._bounds:
            low, high, rows = int(bounds[number]), int(bounds[number + 1]), int(bounds[-1])
            end = done + high - low
            self._pread(keys[done:end].data, offset + 8 * low)
            self._pread(numbers[done:end].data, offset + 8 * rows + 4 * low)
            done, offset = end, offset + 12 * rows
        return keys, numbers

    def _pread(self, out: memoryview, offset: int) -> None:
        raw, done = out.cast("B") if len(out) else out, 0
        while done < raw.nbytes:
            count = os.preadv(self._file.fileno(), [raw[done:]], offset + done)
            if not count:
                raise OSError(f"{self.folder}: a temporary file became shorter")
            done += count

    def refuse(self, numbers: Numbers) -> DataError:
        """Return the error for two records with the same key."""
        rows = []
        with _opened(self.path) as source:
            for number in sorted(int(number) for number in numbers):
                source.seek(number * self.dtype.itemsize)
                rows.append(int(np.frombuffer(source.read(self.dtype.itemsize), self.dtype)["row"][0]))
        return DataError(
            f"{self.path}: expected each key once, found rows {rows[0]} and {rows[1]} of index.parquet with the same "
            "64-bit hash; if their keys are the same, name sources apart with source.root, else leave one of the two "
            "out or rename it; then run `pixart extract` again"
        )

    def __enter__(self) -> "Keys":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def part_bits(sizes_rows: Iterable[int]) -> int:
    """Return how many top bits of the keys part lists of these lengths into pieces that fit a cache."""
    return min(_MOST_PART_BITS, max(0, -(-max(sizes_rows) // _PART_ROWS) - 1).bit_length())


class _Table:
    """Where each of some keys is, by hashing; five times as fast as sorting them.

    On every level the keys that are left are written to slots, and those that find themselves there are placed. As one
    key for each slot is, the levels come to an end, after about four.

    Attributes:
        twice: The places of two keys that are equal, or None.
    """

    def __init__(self, keys: npt.NDArray[np.uint64]) -> None:
        self.keys = keys
        self.twice: npt.NDArray[np.int64] | None = None
        self._levels: list[Numbers] = []
        left = np.arange(len(keys), dtype=np.uint32)
        while len(left):
            table = np.full(1 << (2 * len(left) - 1).bit_length(), NONE, np.uint32)
            slots = self._slots(keys[left], len(self._levels), len(table))
            table[slots] = left
            self._levels.append(table)
            lost = np.flatnonzero(table[slots] != left)
            winners, left = table[slots[lost]], left[lost]
            same = np.flatnonzero(keys[winners] == keys[left])
            if len(same):
                self.twice = np.array([winners[same[0]], left[same[0]]], np.int64)
                return

    def find(self, wanted: npt.NDArray[np.uint64]) -> Numbers:
        """Return the place of each key, `NONE` where it is not there."""
        found = np.full(len(wanted), NONE, np.uint32)
        left = np.arange(len(wanted))
        for level, table in enumerate(self._levels):
            places = table[self._slots(wanted[left], level, len(table))]
            there = places != NONE
            there[there] = self.keys[places[there]] == wanted[left[there]]
            found[left[there]] = places[there]
            left = left[~there]
        return found

    @staticmethod
    def _slots(keys: npt.NDArray[np.uint64], level: int, size: int) -> npt.NDArray[np.int64]:
        return ((keys * np.uint64(_MULTIPLIER + 2 * level)) >> np.uint64(65 - size.bit_length())).view(np.int64)


def match(images: Keys, texts: Keys) -> Numbers:
    """Return the text of every image: the number of its record or `NONE`; (images,).

    Raises:
        DataError: If a key is twice in one of them.
    """
    found = np.full(images.num_rows, NONE, np.uint32)

    def match_part(number: int) -> None:
        image_keys, image_numbers = images.part(number)
        text_keys, text_numbers = texts.part(number)
        table = _Table(text_keys)
        for twice, numbers, of in (
            (_Table(image_keys).twice, image_numbers, images),
            (table.twice, text_numbers, texts),
        ):
            if twice is not None:
                raise of.refuse(numbers[twice])
        places = table.find(image_keys)
        there = places != NONE
        found[image_numbers[there]] = text_numbers[places[there]]  # no two parts write the same place

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for _ in pool.map(match_part, range(1 << images.bits)):
            pass
    return found


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; run `pixart extract` again: this file is written anew") from None


def _read_full(source: IO[bytes], view: memoryview) -> int:
    done = 0
    while done < len(view) and (count := source.readinto(view[done:])):  # type: ignore[attr-defined]
        done += count
    return done


def _require_whole(path: Path, first: int, records: Entries) -> None:
    for start in range(0, len(records), _CHECK_ROWS):
        some = records[start : start + _CHECK_ROWS]
        wrong = np.flatnonzero(some["check"] != checks(some))
        if len(wrong):
            raise _damaged(path, f"record {first + start + int(wrong[0])} does not fit its check")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: damaged: {what}; `pixart verify {path.parent}` names all that is, and `pixart extract`, run again, "
        "writes this file anew"
    )
