"""Feature shards: uncompressed WebDataset tars of safetensors members, and the index that addresses every tensor.

A feature set is a directory: `manifest.json` (written last), `index.parquet` (one row for each sample),
`rejected.parquet`, `commits/`, and the shards. Image sets hold one folder for each bucket. A member is
`<key>.safetensors` with one tensor:

    images  `moments`  F16   (2, C, H, W)   posterior mean and standard deviation, unscaled; H W in latent cells of 8 px
    text    `t5`       BF16  (n, D)         the n true tokens, never padding

Any WebDataset reader opens the tars; the index gives offset and length, so that one positioned read fetches a tensor.
Tensor data starts on a multiple of 64 bytes. Member headers depend on nothing but key, name, type and shape, so a
reader can rebuild and check every byte of a shard.
"""

import contextlib
import json
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart_data.commits import MANIFEST, Record, file_sha256, read_table
from pixart_data.errors import DataError, JobError
from pixart_data.records import REJECTED
from pixart_data.retries import storage
from pixart_data.storage import discard, exists, read_bytes, replace_file, require_local, staging_path, write_atomic

FORMAT = "pixart-features"
FORMAT_VERSION = 1
INDEX = "index.parquet"
REJECTED_FILE = "rejected.parquet"
INDEX_PARTS = "index"

_BLOCK = 512
_ALIGNMENT = 64
_MAX_OPEN_SHARDS = 64  # for each thread
_DTYPES: dict[str, npt.DTypeLike] = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a shard."""

    offset_bytes: int
    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a feature set is and what it holds; its existence says the set is complete.

    Attributes:
        kind: "image" or "text".
        tensor: Name of the tensor in every member, with its safetensors type in `dtype`.
        model: Id, revision and facts of the encoder: scaling factor, channels, width.
        policy: What was done before the encoder: resizing and cropping, or text cleaning and truncation.
        buckets: Ratio, size, rows and shards of each bucket; empty for text.
        shards: Path, size_bytes, sha256 of each shard and of the null features.
        counts: rows_in, rows_out and rejected by reason.
    """

    kind: str
    tensor: str
    dtype: str
    model: dict[str, Any]
    policy: dict[str, Any]
    counts: dict[str, Any]
    shards: list[dict[str, Any]]
    buckets: list[dict[str, Any]] = field(default_factory=list)
    index_sha256: str = ""
    rejected_sha256: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = FORMAT_VERSION


def member_prefix(key: str, tensor: str, dtype: str, shape: Sequence[int]) -> bytes:
    """Return all bytes of a member that come before its tensor: tar header, safetensors length and header."""
    size_bytes = int(np.dtype(_DTYPES[dtype]).itemsize * np.prod(shape, dtype=np.int64))
    entry = {tensor: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size_bytes]}}
    header = json.dumps(entry, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    info = tarfile.TarInfo(f"{key}.safetensors")
    info.size = 8 + len(header) + size_bytes
    info.mode = 0o444
    return info.tobuf(tarfile.GNU_FORMAT) + len(header).to_bytes(8, "little") + header


def tensor_shape(row: Mapping[str, Any], manifest: Manifest) -> tuple[int, ...]:
    """Return the shape of the tensor that an index row addresses; the index stores no shapes, they follow from it."""
    if manifest.kind == "image":
        cells = (row["height_px"] // manifest.model["downsampling"], row["width_px"] // manifest.model["downsampling"])
        return (2, manifest.model["channels"], *cells)
    return (row["num_tokens"], manifest.model["width"])


class ShardWriter:
    """Writes one shard, sample by sample; the same samples give the same bytes."""

    def __init__(self, path: Path, tensor: str, dtype: str) -> None:
        self.path, self.tensor, self.dtype = path, tensor, dtype
        self._written = 0
        with storage(path):
            self._file = path.open("wb")

    def add(self, key: str, values: npt.NDArray[Any]) -> TensorPlace:
        """Append a sample and return where its tensor lies. `values` has the shard's type (BF16 as uint16 bits)."""
        if values.dtype != _DTYPES[self.dtype]:
            raise ValueError(f"{key}: expected {self.dtype}, got {values.dtype}")
        data = np.ascontiguousarray(values).tobytes()
        prefix = member_prefix(key, self.tensor, self.dtype, values.shape)
        place = TensorPlace(self._written + len(prefix), len(data), zlib.crc32(data))
        record = prefix + data
        record += bytes(-len(record) % _BLOCK)
        with storage(self.path):
            self._file.write(record)
        self._written += len(record)
        return place

    def close(self) -> None:
        """Write the end-of-archive blocks; `commits.publish` flushes the file to the disk."""
        with storage(self.path), self._file:
            self._file.write(bytes(2 * _BLOCK))

    def discard(self) -> None:
        """Close and delete the file; one that was published is left alone."""
        with contextlib.suppress(OSError):  # a full disk has been told of
            self._file.close()
        discard(self.path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class FeatureSet:
    """A sealed feature set, opened for reading: manifest, index, and tensors by positioned reads.

    Thread-safe. Each thread keeps its last few shards open: a shuffled epoch visits tens of thousands.

    Attributes:
        index: The index table, or the columns of it that were asked for; at 25M samples captions alone are gigabytes.
    """

    def __init__(self, root: Path, columns: list[str] | None = None) -> None:
        self.root = require_local(root, "training reads local disks and mounts only")
        self.manifest = read_manifest(root)
        self.index = pq.read_table(root / INDEX, columns=columns)
        self._local = threading.local()
        self._opened: list[OrderedDict[str, int]] = []

    def __len__(self) -> int:
        return int(self.index.num_rows)

    def read_into(self, shard: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill `buffer`, whose items are single bytes, from a shard with one positioned read.

        Raises:
            DataError: If the shard is missing or too short.
            JobError: If the storage fails.
        """
        descriptor = self._descriptor(shard)
        try:
            num_read = os.preadv(descriptor, [buffer], offset_bytes)
        except OSError as error:
            why = f"{error.strerror}; check the storage, then run again"
            raise JobError(f"{self.root / shard}: cannot be read: {why}") from error
        if num_read != len(buffer):
            raise DataError(f"{self.root / shard}: ends early; `pixart verify {self.root}` names the samples lost")

    def read_tensor(self, shard: str, offset_bytes: int, size_bytes: int, shape: Sequence[int]) -> npt.NDArray[Any]:
        """Return a tensor; BF16 comes as uint16 bits, for `torch.Tensor.view(torch.bfloat16)`."""
        data = np.empty(size_bytes, np.uint8)
        self.read_into(shard, offset_bytes, data.data)
        return data.view(_DTYPES[self.manifest.dtype]).reshape(shape)

    def _descriptor(self, shard: str) -> int:
        opened: OrderedDict[str, int] | None = getattr(self._local, "opened", None)
        if opened is None:
            opened = self._local.opened = OrderedDict()
            self._opened.append(opened)
        if shard not in opened:
            if len(opened) >= _MAX_OPEN_SHARDS:
                os.close(opened.popitem(last=False)[1])
            try:
                opened[shard] = os.open(self.root / shard, os.O_RDONLY)
            except FileNotFoundError:
                raise DataError(
                    f"{self.root / shard}: missing; `pixart verify {self.root}` names what it held"
                ) from None
            except OSError as error:
                why = f"{error.strerror}; check the storage, then run again"
                raise JobError(f"{self.root / shard}: cannot be opened: {why}") from error
        opened.move_to_end(shard)
        return opened[shard]

    def close(self) -> None:
        """Close the shards; no thread may be reading."""
        for opened in self._opened:
            while opened:
                os.close(opened.popitem()[1])


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of the feature set at `root`.

    Raises:
        DataError: If there is none, or it is of another format or version.
    """
    path = root / MANIFEST
    try:
        fields = json.loads(read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"{root}: no {MANIFEST}: not a finished feature set; run `pixart extract` to its end") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run `pixart extract` again to rewrite it") from error
    kind = (fields.get("format"), fields.get("version")) if isinstance(fields, dict) else (type(fields).__name__, "?")
    if kind != (FORMAT, FORMAT_VERSION):
        found = f"{kind[0]} version {kind[1]}"
        raise DataError(f"{path}: expected {FORMAT} version {FORMAT_VERSION}, found {found}; extract again")
    try:
        return Manifest(**fields)
    except TypeError as error:
        raise DataError(f"{path}: not a complete manifest ({error}); run `pixart extract` again") from error


def feature_sets(root: Path) -> dict[str, Path]:
    """Return the sealed feature sets of a dataset by name; `root` may also be a single set."""
    paths = [root / MANIFEST] if exists(root / MANIFEST) else sorted(root.glob(f"*/{MANIFEST}"))
    return {path.parent.name: path.parent for path in paths if FORMAT.encode() in read_bytes(path)}


def seal(root: Path, records: Sequence[Record], schema: pa.Schema, manifest: Manifest) -> Manifest:
    """Merge the units' index parts into one index and one table of rejected rows, then write the manifest.

    Args:
        records: The commit records of every unit of the set, in the order the index is to have.
        schema: `records.IMAGE_INDEX` or `records.TEXT_INDEX`.
        manifest: Complete but for the two checksums.

    Raises:
        DataError: If a key occurs twice.
    """
    parts = [file.path for record in records for file in record.files if file.path.startswith(f"{INDEX_PARTS}/")]
    index = _Table(root / INDEX, _without(schema, "error", "detail"))
    rejected = _Table(root / REJECTED_FILE, REJECTED)
    keys: list[pa.ChunkedArray] = []
    for part in parts:
        table = read_table(root / part, schema=schema)
        good = table.filter(table["error"].is_null()).select(index.schema.names)
        index.write(good)
        rejected.write(table.filter(table["error"].is_valid()).select(REJECTED.names))
        keys.append(good["key"])
    _require_distinct(root, keys)
    sealed = replace(manifest, rejected_sha256=rejected.publish(), index_sha256=index.publish())
    # Sorted: facts of a model come from a worker in one order, and from a record read again in another.
    write_atomic(root / MANIFEST, json.dumps(asdict(sealed), indent=1, sort_keys=True).encode())
    return sealed


class _Table:
    """A Parquet file that is written part by part under a temporary name: an index need not fit into memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._staged = staging_path(path.parent, path.name)
        self._writer = pq.ParquetWriter(self._staged, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        with storage(self.path):
            self._writer.write_table(table)

    def publish(self) -> str:
        """Put the file in its place and return its sha256."""
        with storage(self.path):
            self._writer.close()
            sha256 = file_sha256(self._staged)
            replace_file(self._staged, self.path)
        return sha256


def _without(schema: pa.Schema, *names: str) -> pa.Schema:
    return pa.schema([column for column in schema if column.name not in names])


def _require_distinct(root: Path, keys: list[pa.ChunkedArray]) -> None:
    chunks = [chunk for column in keys for chunk in column.chunks]
    counts = pa.chunked_array(chunks, pa.string()).value_counts()
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise DataError(
            f"{root}: key {twice[0]['values']} and {len(twice) - 1} others occur more than once; a feature set holds "
            "one row for each image: name sources apart with source.root, or keep one caption for each key"
        )
