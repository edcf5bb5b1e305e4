"""Which samples there are: an image set joined with text sets, in a file that every reader of a node maps into memory.

A *sample* is an image with a text in at least one of the text sets. Samples are numbered in the order of the image
set's entries, so those of a bucket are neighbours, and neighbours in number are neighbours on the disk. A plan file
holds, little-endian,

    8 bytes   "PIXPLAN1"
    3 x u32   size of the header, CRC-32 of the header, CRC-32 of the columns
    JSON      the header: digest of what it was made from, counts, samples of each bucket; padded to 64 bytes
    columns   u32 (samples,): the number of each sample's record in the image set's entries.bin
              for each text set u32 (samples,): that of its record there, 0xFFFFFFFF where the set has none

and is written under a temporary name. `plan.build` writes it; it can be made again at any time.
"""

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from pixart_data.errors import DataError
from pixart_data.retries import storage
from pixart_data.storage import staging

NONE = 0xFFFFFFFF
"""Stands for no record."""

PIECE_BYTES = 4 << 20
"""How much of a column is looked at at once."""

Numbers = npt.NDArray[np.uint32]
"""Places of records in an entries file."""

_MAGIC = b"PIXPLAN1"
_PREAMBLE = struct.Struct("<8sIII")
_ALIGNMENT = 64


@dataclass(frozen=True)
class Counts:
    """How an image set and text sets fit together.

    Attributes:
        images: All; `samples + left_out + without_text`.
        samples: Images that are wanted and have a text.
        left_out: Images that are not wanted.
        without_text: Images that are wanted and have no text in any set.
        texts: Of each set, how many of the samples have a text in it.
        texts_without_image: Of each set, texts whose key is of no image at all.
    """

    images: int
    samples: int
    left_out: int
    without_text: int
    texts: tuple[int, ...]
    texts_without_image: tuple[int, ...]


class Joined:
    """The samples of a plan file, mapped into memory. `open_plan` makes one; pickled, it is opened again by its path.

    Attributes:
        counts: What matched and what did not.
        bucket_counts: Samples of each bucket of the image set; int64 (buckets,).
        images: Of each sample, the number of its record in the image set's entries; (samples,).
        texts: For each text set the same, `NONE` where it has no text of the sample.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        header, start = _read_header(path, file)
        self.counts = Counts(**header["counts"])
        self.bucket_counts: npt.NDArray[np.int64] = np.array(header["buckets"], np.int64)
        samples = self.counts.samples
        columns = [_column(file, start + 4 * samples * i, samples) for i in range(1 + len(self.counts.texts))]
        self.images, self.texts = columns[0], columns[1:]

    def __len__(self) -> int:
        return self.counts.samples

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.path,)

    def close(self) -> None:
        """Let go of the file, unless a part of a column is held elsewhere; the columns are empty then."""
        self.images, self.texts = np.empty(0, np.uint32), [np.empty(0, np.uint32) for _ in self.texts]


def open_plan(path: Path) -> Joined:
    """Map a plan file, after checking every byte of it.

    Raises:
        DataError: If there is none, or it is damaged.
    """
    file = _open_shared(path)
    if file is None:
        raise DataError(f"{path}: no such plan file; start again: it is built anew")
    with file:
        _require_whole(path, file)
        return Joined(path, file)


def write_plan(
    out: Path, digest: str, counts: Counts, bucket_counts: Sequence[int], columns: Iterable[Iterable[Numbers]]
) -> None:
    """Write a plan file, under a temporary name first.

    Args:
        digest: Of what it was made from.
        columns: Of `images` and of each of `texts`, in pieces.

    Raises:
        JobError: If the disk is full, or `out` cannot be written.
    """
    header = {"digest": digest, "counts": asdict(counts), "buckets": list(bucket_counts)}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-(_PREAMBLE.size + len(text)) % _ALIGNMENT)
    checksum = 0
    with storage(out), staging(out.parent, out.name) as staged:
        with staged.open("wb") as file:
            file.write(bytes(_PREAMBLE.size) + text)
            for pieces in columns:
                for piece in pieces:
                    checksum = crc32(piece.data, checksum)
                    file.write(piece.data)
            file.seek(0)
            file.write(_PREAMBLE.pack(_MAGIC, len(text), crc32(text), checksum))
        os.replace(staged, out)  # not flushed first: what a power cut leaves does not fit its checksums


def _attach(path: Path) -> Joined:
    """Open a plan file that this process's parent has checked."""
    file = _open_shared(path)
    if file is None:
        raise DataError(f"{path}: the plan file is gone; start again: it is built anew")
    with file:
        return Joined(path, file)


def _open_shared(path: Path) -> IO[bytes] | None:
    """Open a file under a shared lock, and note the time; None if there is none, or it was just swept away.

    What maps the file keeps the lock when it is closed, so that a plan in use is not swept away.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not os.fstat(file.fileno()).st_nlink:
        file.close()
        return None
    with contextlib.suppress(OSError):  # a folder that may only be read
        os.utime(path)
    return file


def _read_header(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """Return the header and where the columns begin."""
    size_bytes = os.fstat(file.fileno()).st_size
    file.seek(0)
    preamble = file.read(_PREAMBLE.size)
    magic, length, checksum, _ = _PREAMBLE.unpack(preamble.ljust(_PREAMBLE.size, b"\0"))
    text = file.read(min(length, size_bytes))
    if magic != _MAGIC or not text or crc32(text) != checksum:
        raise _damaged(path, "its header does not fit its checksum")
    header: dict[str, Any] = json.loads(text)
    for name in ("texts", "texts_without_image"):
        header["counts"][name] = tuple(header["counts"][name])
    start = _PREAMBLE.size + length
    expected = start + 4 * header["counts"]["samples"] * (1 + len(header["counts"]["texts"]))
    if size_bytes != expected:
        raise _damaged(path, f"expected {expected} bytes, found {size_bytes}")
    return header, start


def _require_whole(path: Path, file: IO[bytes]) -> None:
    """Check the columns; they are read, not mapped, so that they do not count as this process's memory."""
    _, start = _read_header(path, file)
    file.seek(0)
    expected = _PREAMBLE.unpack(file.read(_PREAMBLE.size))[3]
    file.seek(start)
    buffer, checksum = memoryview(bytearray(PIECE_BYTES)), 0
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        checksum = crc32(buffer[:count], checksum)
    if checksum != expected:
        raise _damaged(path, "its columns do not fit their checksum")


def _column(file: IO[bytes], offset: int, samples: int) -> Numbers:
    if not samples:
        return np.empty(0, np.uint32)
    return np.memmap(file, np.uint32, "r", offset, (samples,))


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged: {what}; delete it: it is built anew from the sets' entries")
