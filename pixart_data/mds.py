"""MDS, the shards of MosaicML Streaming: reading and writing them without the library.

`index.json` (version 2) lists the shards. A shard is little-endian: the number of samples u32, an offset u32 for each
and one for the end, the writer's configuration as JSON, the samples. A sample is the size u32 of each column of
variable size, then the columns in order. Of an array, what its encoding leaves open (type, shape) comes before it.
Pickled columns are never decoded.
Source: streaming 0.13, base/format/mds, and what it writes; Apache-2.0, none of its code is here.
"""

import bz2
import gzip
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pixart_data.arrivals import Array, Unusable
from pixart_data.confinement import stays_below
from pixart_data.errors import DataError
from pixart_data.records import Reason
from pixart_data.storage import read_bytes, write_atomic

INDEX = "index.json"
_VERSION = 2
_TYPES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16",
    32: "uint32", 33: "int32", 34: "float32", 64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
_TYPE_NUMBERS = {name: number for number, name in _TYPES.items()}
_SIDE_TYPES = ("uint8", "uint16", "uint32", "uint64")
_ARROW_CODECS = {"zstd": "zstd", "br": "brotli", "snappy": "snappy"}
_MAX_SHARD_BYTES = np.iinfo(np.uint32).max  # offsets have 32 bits
_DAMAGED = (
    ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError, MemoryError, struct.error, zlib.error,
    pa.ArrowException,
)  # fmt: skip


@dataclass(frozen=True)
class Mosaic:
    """A shard: its files, and the names, encodings and fixed sizes (None: variable) of its columns.

    Attributes:
        packed: Path of the compressed file and `algorithm[:level]`, if there is one.
    """

    path: Path
    size_bytes: int
    hashes: Mapping[str, str]
    packed: tuple[Path, str] | None
    num_samples: int
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]


def read_index(root: Path) -> list[Mosaic]:
    """Return the shards of a folder in order, those of merged sub-folders included.

    Raises:
        DataError: If there is no index, it is of another format or version, or it names files outside the folder.
    """
    path = root / INDEX
    try:
        index = json.loads(read_bytes(path))
        return [_shard(root, entry) for entry in index["shards"]]
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: expected the index of MDS shards, found no such file; check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path}: expected an index of MDS shards of version {_VERSION}, found something else ({error!r}); write "
            "it again with the tool that made the shards"
        ) from error


def _shard(root: Path, entry: Mapping[str, Any]) -> Mosaic:
    if (entry["format"], entry["version"]) != ("mds", _VERSION):
        raise ValueError(f"{entry['format']} version {entry['version']}")
    raw, zipped = entry["raw_data"], entry.get("zip_data")
    shard = Mosaic(
        path=_place(root, raw["basename"]),
        size_bytes=int(raw["bytes"]),
        hashes=dict(raw.get("hashes") or {}),
        packed=(_place(root, zipped["basename"]), str(entry["compression"])) if zipped else None,
        num_samples=int(entry["samples"]),
        names=tuple(map(str, entry["column_names"])),
        encodings=tuple(map(str, entry["column_encodings"])),
        sizes=tuple(None if size is None else int(size) for size in entry["column_sizes"]),
    )
    if not len(shard.names) == len(shard.encodings) == len(shard.sizes):
        raise ValueError("names, encodings and sizes of different numbers of columns")
    if min((size for size in shard.sizes if size is not None), default=0) < 0:
        raise ValueError("columns of negative size")
    # Each sample takes 4 bytes at least: memory is taken, and rows are counted, by these numbers alone.
    if not 0 <= 4 * shard.num_samples <= shard.size_bytes <= _MAX_SHARD_BYTES:
        raise ValueError(f"{shard.num_samples} samples in {shard.size_bytes} bytes")
    return shard


def _place(root: Path, name: Any) -> Path:
    if not stays_below(name):
        raise DataError(
            f"{root / INDEX}: expected shards inside the folder, found {name!r:.80}; nothing is read: write the index "
            "again with the tool that made the shards"
        )
    return root / name


def read_samples(shard: Mosaic, columns: Sequence[str]) -> Iterator[dict[str, Any] | Unusable]:
    """Yield some columns of every sample of a shard, or why a sample is lost.

    Raises:
        Unusable: If the whole shard is lost.
        JobError: If the storage fails.
    """
    data = memoryview(_content(shard))
    try:
        (num_samples,) = struct.unpack_from("<I", data)
        if num_samples != shard.num_samples:
            raise ValueError(f"expected {shard.num_samples} samples, found {num_samples}")
        offsets = np.frombuffer(data, "<u4", num_samples + 1, 4).tolist()
    except _DAMAGED as error:
        raise Unusable(Reason.DAMAGED_FILE, f"{shard.path}: {error}") from error
    for number in range(num_samples):
        try:
            yield _sample(shard, data[offsets[number] : offsets[number + 1]], columns)
        except _DAMAGED as error:
            yield Unusable(Reason.DAMAGED_FILE, f"{shard.path}, sample {number}: {error}")


def _content(shard: Mosaic) -> bytes:
    """Return the shard's bytes, decompressed, checked against the hashes in the index that Python knows."""
    try:
        if shard.packed is None or shard.path.is_file():
            data = read_bytes(shard.path)
        else:
            data = _unpacked(read_bytes(shard.packed[0]), shard.packed[1].partition(":")[0], shard.size_bytes)
        if len(data) != shard.size_bytes:
            raise ValueError(f"expected {shard.size_bytes} bytes, found {len(data)}")
        for name, expected in shard.hashes.items():
            if name in hashlib.algorithms_available and hashlib.new(name, data).hexdigest() != expected:
                raise ValueError(f"its {name} is not the one in {INDEX}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unusable(Reason.MISSING_FILE, f"{shard.path}: missing") from error
    except _DAMAGED as error:
        raise Unusable(Reason.DAMAGED_FILE, f"{shard.path}: {error}") from error
    return data


def _unpacked(data: bytes, algorithm: str, size_bytes: int) -> bytes:
    """Decompress what should be `size_bytes`; of what holds more, one byte more is returned at most."""
    if algorithm in ("gz", "bz2"):
        opener = gzip.open if algorithm == "gz" else bz2.open
        with opener(BytesIO(data), "rb") as file:
            return bytes(file.read(size_bytes + 1))
    if algorithm not in _ARROW_CODECS:
        raise ValueError(f"expected compression {', '.join(_ARROW_CODECS)}, gz, bz2 or none, found {algorithm}")
    unpacked: bytes = pa.Codec(_ARROW_CODECS[algorithm]).decompress(data, size_bytes, asbytes=True)
    return unpacked


def _sample(shard: Mosaic, data: memoryview, columns: Sequence[str]) -> dict[str, Any]:
    num_variable = sum(size is None for size in shard.sizes)
    variable = iter(struct.unpack_from(f"<{num_variable}I", data))
    at, values = 4 * num_variable, {}
    for name, encoding, fixed in zip(shard.names, shard.encodings, shard.sizes, strict=True):
        size = next(variable) if fixed is None else fixed
        if at + size > len(data):
            raise ValueError(f"column {name} ends beyond its sample")
        if name in columns:
            values[name] = decode(encoding, data[at : at + size])
        at += size
    return values


def decode(encoding: str, data: memoryview) -> Any:
    """Return the value of a column.

    Raises:
        ValueError: If the encoding is not one of numbers, arrays, text or bytes, or the value does not fit it.
    """
    name, _, details = encoding.partition(":")
    if name == "bytes":
        return bytes(data)
    if name in ("str", "str_int", "str_float"):
        text = bytes(data).decode()
        return {"str": str, "str_int": int, "str_float": float}[name](text)
    if name == "int":
        return int(np.frombuffer(data, "<i8")[0])
    if name == "ndarray":
        return _array(details, data)
    if name in _TYPE_NUMBERS:
        return np.frombuffer(data, name)[0].item()
    raise ValueError(f"columns of encoding {name} are not read")


def _array(details: str, data: memoryview) -> Array:
    dtype, _, sides = details.partition(":")
    at = 0
    if not dtype:
        dtype, at = _TYPES[data[0]], 1
    if sides:
        shape = [int(side) for side in sides.split(",")]
    else:
        num_sides, side_type = data[at] >> 2, _SIDE_TYPES[data[at] & 3]
        shape = np.frombuffer(data, side_type, num_sides, at + 1).astype(np.int64).tolist()
        at += 1 + num_sides * np.dtype(side_type).itemsize
    return np.frombuffer(data[at:], dtype).reshape(shape)


def encode(encoding: str, value: Any) -> bytes:
    """Return the bytes of a column: text, bytes, an int, or an array of a type that the encoding names.

    Raises:
        ValueError: If the encoding is another.
    """
    name, _, dtype = encoding.partition(":")
    if name == "str":
        return str(value).encode()
    if name == "bytes":
        return bytes(value)
    if name == "int":
        return struct.pack("<q", value)
    if name != "ndarray" or dtype not in _TYPE_NUMBERS:
        raise ValueError(f"columns of encoding {encoding} are not written")
    array = np.ascontiguousarray(value, dtype)
    width = next(i for i, sides in enumerate(_SIDE_TYPES) if max(array.shape) <= np.iinfo(sides).max)
    head = bytes([array.ndim << 2 | width])
    return head + np.array(array.shape, _SIDE_TYPES[width]).tobytes() + array.tobytes()


def write_shard(
    root: Path, number: int, columns: Mapping[str, str], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write a shard, complete or not at all, and return its entry in the index.

    Raises:
        JobError: If the storage fails.
    """
    names = sorted(columns)
    sizes = [8 if columns[name] == "int" else None for name in names]
    config: dict[str, Any] = {
        "version": _VERSION, "format": "mds", "compression": None, "hashes": ["sha1"], "size_limit": None,
        "column_names": names, "column_encodings": [columns[name] for name in names], "column_sizes": sizes,
    }  # fmt: skip
    encoded = [_encoded(columns, names, sizes, sample) for sample in samples]
    head = json.dumps(config, sort_keys=True).encode()
    first = 4 + 4 * (len(encoded) + 1) + len(head)
    offsets = np.cumsum([first, *map(len, encoded)])
    if offsets[-1] > np.iinfo(np.uint32).max:
        raise ValueError(f"expected a shard of less than 4 GiB, found {offsets[-1]} bytes")
    data = b"".join([struct.pack("<I", len(encoded)), offsets.astype("<u4").tobytes(), head, *encoded])
    path = root / f"shard.{number:05d}.mds"
    write_atomic(path, data)
    raw = {"basename": path.name, "bytes": len(data), "hashes": {"sha1": hashlib.sha1(data).hexdigest()}}
    return {**config, "samples": len(encoded), "raw_data": raw, "zip_data": None}


def _encoded(
    columns: Mapping[str, str], names: Sequence[str], sizes: Sequence[int | None], sample: Mapping[str, Any]
) -> bytes:
    values = [encode(columns[name], sample[name]) for name in names]
    variable = [len(value) for value, size in zip(values, sizes, strict=True) if size is None]
    return struct.pack(f"<{len(variable)}I", *variable) + b"".join(values)


def write_index(root: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write the index: the shards are a dataset from then on."""
    write_atomic(root / INDEX, json.dumps({"version": _VERSION, "shards": list(entries)}, sort_keys=True).encode())
