"""Feature shards: uncompressed WebDataset tars of safetensors members, and reading them by position.

A feature set is a directory: `manifest.json` (written last), `index.parquet` (one row for each sample), `entries.bin`
(the same, for training), `rejected.parquet`, `commits/`, and the shards. Image sets hold one folder for each bucket.
A member is `<key>.safetensors`:

    images  `moments`  F16   (2, C, H, W)   posterior mean and standard deviation, unscaled; H W in latent cells of 8 px
    text    `t5`       BF16  (n, D)         the n true tokens, never padding; other codecs store several tensors

Of mirrored images, `<key>.flipped.safetensors` is of the same shape. Any WebDataset reader opens the tars; the index
gives offset and length, so that one positioned read fetches a sample. Its tensors lie one after the other from a
multiple of 64 bytes on. Member headers depend on nothing but key, names, types and shapes, so a reader can rebuild and
check every byte of a shard.
"""

import contextlib
import json
import os
import tarfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from zlib_ng.zlib_ng import crc32  # the values of zlib's, fifteen times as fast

from pixart_data.commits import MANIFEST
from pixart_data.config import digest
from pixart_data.confinement import require_confined
from pixart_data.entries import ENTRIES, Entries, map_entries, read_keys
from pixart_data.errors import DataError, JobError
from pixart_data.retries import storage
from pixart_data.storage import discard, exists, matching, read_bytes, require_local

FORMAT = "pixart-features"
FORMAT_VERSION = 2
INDEX = "index.parquet"
REJECTED_FILE = "rejected.parquet"
INDEX_PARTS = "index"

_BLOCK = 512
_ALIGNMENT = 64
_MAX_OPEN_SHARDS = 64  # for each thread
MEMBER = "safetensors"
FLIPPED_MEMBER = "flipped.safetensors"
MOMENTS = (("moments", "F16"),)

DTYPES: dict[str, npt.DTypeLike] = {
    "F16": np.float16, "F32": np.float32, "BF16": np.uint16, "U16": np.uint16, "U8": np.uint8, "I8": np.int8,
}  # fmt: skip
"""Of safetensors types; numpy has no bfloat16, so its bits stand for it."""

Tensors = Sequence[tuple[str, str, tuple[int, ...]]]
"""Name, safetensors type and shape of each tensor of a member."""


@dataclass(frozen=True)
class TensorPlace:
    """Where the tensors of a member lie in a shard: one after the other."""

    offset_bytes: int
    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a feature set is and what it holds; its existence says the set is complete.

    Attributes:
        kind: "image" or "text".
        tensor: Name of what is stored, "moments" or "t5", with the type that a reader gets of it in `dtype`.
        model: Id, revision and facts of the encoder: scaling factor, channels, width.
        policy: What was done before the encoder: resizing and cropping, or text cleaning and truncation.
        counts: rows_in, rows_out and rejected by reason.
        shards: Path, size_bytes, sha256 and rows of each shard, that of the null features included.
        buckets: Ratio, size, rows and shards of each bucket of the table; empty for text.
        codec: How text is stored: `name`, what the codec needs for decoding, and how exact it was measured to be.
        records: Of the commit records that the set was sealed from, by unit, the digest of each; empty where it has
            none of its own.
    """

    kind: str
    tensor: str
    dtype: str
    model: dict[str, Any]
    policy: dict[str, Any]
    counts: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    buckets: list[dict[str, Any]] = field(default_factory=list)
    codec: dict[str, Any] = field(default_factory=dict)
    index_sha256: str = ""
    entries_sha256: str = ""
    rejected_sha256: str = ""
    records: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = FORMAT_VERSION


def member_prefix(key: str, tensors: Tensors, extension: str = MEMBER) -> bytes:
    """Return all bytes of a member that come before its tensors: tar header, safetensors length and header."""
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + int(np.dtype(DTYPES[dtype]).itemsize * np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    info = tarfile.TarInfo(f"{key}.{extension}")
    info.size = 8 + len(header) + end
    info.mode = 0o444
    return info.tobuf(tarfile.GNU_FORMAT) + len(header).to_bytes(8, "little") + header


def tensor_shape(row: Mapping[str, Any], manifest: Manifest) -> tuple[int, ...]:
    """Return the shape of what an index row addresses; the index stores no shapes, they follow from it."""
    if manifest.kind == "image":
        cells = (row["height_px"] // manifest.model["downsampling"], row["width_px"] // manifest.model["downsampling"])
        return (2, manifest.model["channels"], *cells)
    return (row["num_tokens"], manifest.model["width"])


def member_tensors(row: Mapping[str, Any], manifest: Manifest) -> Tensors:
    """Return the tensors of the member that an index row addresses.

    Raises:
        ValueError: If the row's size and number of tokens do not fit each other.
    """
    if manifest.kind == "image":
        return [(manifest.tensor, manifest.dtype, tensor_shape(row, manifest))]
    from pixart_data.codecs import from_manifest

    codec = from_manifest(manifest.codec, manifest.model["width"], {})
    return [(part.name, part.dtype, part.shape) for part in codec.parts(row["num_tokens"], row["size_bytes"])]


class ShardWriter:
    """Writes one shard, member by member; the same members give the same bytes.

    `tensors` are the names and safetensors types of the tensors of every member.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, str]]) -> None:
        self.path, self.tensors = path, tensors
        self._written = 0
        with storage(path):
            self._file = path.open("wb")

    def add(self, key: str, *values: npt.NDArray[Any], extension: str = MEMBER) -> TensorPlace:
        """Append a member and return where its tensors lie. BF16 comes as its bits, in uint16."""
        for (name, dtype), array in zip(self.tensors, values, strict=True):
            if array.dtype != DTYPES[dtype]:
                raise ValueError(f"{key}: expected {name} in {dtype}, got {array.dtype}")
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in values)
        tensors = [(*tensor, array.shape) for tensor, array in zip(self.tensors, values, strict=True)]
        prefix = member_prefix(key, tensors, extension)
        place = TensorPlace(self._written + len(prefix), len(data), crc32(data))
        with storage(self.path):
            for piece in (prefix, data, bytes(-(len(prefix) + len(data)) % _BLOCK)):
                self._file.write(piece)
        self._written += len(prefix) + len(data) + -(len(prefix) + len(data)) % _BLOCK
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


class MemberPlaces(NamedTuple):
    """Where the members of a batch lie: numbers of shards, offsets in bytes of their tensors, and CRC-32 of these."""

    shards: Sequence[int]
    offsets: Sequence[int]
    checksums: Sequence[int]


class BatchBuffer(NamedTuple):
    """Memory for one tensor of each sample of a batch: that of sample i goes to `data[bounds[i] : bounds[i + 1]]`."""

    data: memoryview
    bounds: Sequence[int]


class _OpenShards(OrderedDict[str, int]):
    """The descriptors of a thread's last few shards, which are closed when the thread ends."""

    def close(self, close: Callable[[int], None] = os.close) -> None:
        while self:
            close(self.popitem()[1])

    __del__ = close


class FeatureSet:
    """A sealed feature set, opened for reading: manifest, index, and samples by positioned reads.

    Thread-safe, and picklable: a copy in another process opens the files anew. Each thread keeps its last few shards
    open: a shuffled epoch visits tens of thousands.

    Attributes:
        entries: The records of `entries.bin`, memory-mapped.
        index_path, entries_path: Local files of the index.
        shards: Paths of the shards by their number, relative to the root.
    """

    def __init__(self, root: Path) -> None:
        self.root = require_local(root, "expected a local folder here")
        self.manifest = read_manifest(root)
        self.index_path, self.entries_path = root / INDEX, root / ENTRIES
        self.entries: Entries = map_entries(self.entries_path, self.manifest.kind)
        self.shards = [str(shard["path"]) for shard in self.manifest.shards]
        self._local = threading.local()
        self._opened: list[weakref.ref[_OpenShards]] = []

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _open_again, (partial(FeatureSet, self.root), self.manifest.entries_sha256)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def index(self) -> pa.Table:
        """The index table, read anew at each use; at 25M samples captions alone are gigabytes."""
        return pq.read_table(self.index_path)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Return the keys of rows of the index; only the row groups that hold them are read."""
        return read_keys(self.index_path, rows)

    def read_into(self, shard: str, offset_bytes: int, *buffers: memoryview) -> None:
        """Fill `buffers`, whose items are single bytes, from a shard with one positioned read.

        Raises:
            DataError: If the shard is missing or too short.
            JobError: If the storage fails.
        """
        descriptor = self._descriptor(shard)
        try:
            num_read = os.preadv(descriptor, buffers, offset_bytes)
        except OSError as error:
            why = f"{error.strerror}; check the storage, then run again"
            raise JobError(f"{self.root / shard}: cannot be read: {why}") from error
        if num_read != sum(map(len, buffers)):
            raise DataError(f"{self.root / shard}: ends early; `pixart verify {self.root}` names the samples lost")

    def read_batch(self, places: MemberPlaces, buffers: Sequence[BatchBuffer]) -> dict[int, DataError]:
        """Fill buffers with the tensors of members, checking each member against its checksum.

        Args:
            places: Of the members.
            buffers: One for each tensor of a member, in their order there.

        Returns:
            What is wrong with members that are damaged or missing, by their place in the batch; the buffers are of no
            use there.

        Raises:
            JobError: If the storage fails.
        """
        wrong = {}
        for i, (number, offset_bytes, checksum) in enumerate(zip(*places, strict=True)):
            shard = self.shards[number]
            pieces = [data[bounds[i] : bounds[i + 1]] for data, bounds in buffers]
            try:
                self.read_into(shard, offset_bytes, *pieces)
            except DataError as error:
                wrong[i] = error
                continue
            found = 0
            for piece in pieces:
                found = crc32(piece, found)
            if found != checksum:
                wrong[i] = DataError(
                    f"{self.root / shard}: damaged at byte {offset_bytes:,}: its checksum differs from the index; "
                    f"`pixart verify {self.root}` names all such samples"
                )
        return wrong

    def expect(self, places: MemberPlaces, sizes_bytes: Sequence[int]) -> None:
        """Have the system fetch members that `read_batch` will be asked for; what cannot be read is told of there."""
        for number, offset_bytes, size_bytes in zip(places.shards, places.offsets, sizes_bytes, strict=True):
            with contextlib.suppress(DataError, JobError, OSError):
                descriptor = self._descriptor(self.shards[number])
                os.posix_fadvise(descriptor, offset_bytes, size_bytes, os.POSIX_FADV_WILLNEED)

    def read_tensor(self, shard: str, offset_bytes: int, size_bytes: int, shape: Sequence[int]) -> npt.NDArray[Any]:
        """Return the one tensor of a member; BF16 comes as uint16 bits, for `torch.Tensor.view(torch.bfloat16)`."""
        data = np.empty(size_bytes, np.uint8)
        self.read_into(shard, offset_bytes, data.data)
        return data.view(DTYPES[self.manifest.dtype]).reshape(shape)

    def _descriptor(self, shard: str) -> int:
        opened: _OpenShards | None = getattr(self._local, "opened", None)
        if opened is None:
            opened = self._local.opened = _OpenShards()
            self._opened.append(weakref.ref(opened))
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
        for one in self._opened:
            if (opened := one()) is not None:
                opened.close()


def _open_again(open_set: Callable[[], FeatureSet], entries_sha256: str) -> FeatureSet:
    """Open a set in another process, where it must be what it was in the first one.

    Raises:
        DataError: If it was written anew meanwhile.
    """
    features = open_set()
    if features.manifest.entries_sha256 != entries_sha256:
        raise DataError(f"{features.root}: was written anew after it had been opened; start again what reads it")
    return features


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of `manifest.json`, with a digest of itself: nothing else sees a flipped bit."""
    fields = asdict(manifest)
    # Sorted: facts of a model come from a worker in one order, and from a record read again in another.
    return json.dumps({**fields, "digest": digest(fields)}, indent=1, sort_keys=True).encode()


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of the feature set at `root`.

    Raises:
        DataError: If there is none, it is damaged, of another format or version, or names files outside the set.
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
        raise DataError(
            f"{path}: expected {FORMAT} version {FORMAT_VERSION}, found {kind[0]} version {kind[1]}; run `pixart "
            f"extract` with its job, {root}/job.toml, and the same sources and models: of a set of an older version it "
            "redoes the index alone"
        )
    if fields.pop("digest", None) != digest(fields):
        raise DataError(
            f"{path}: damaged or edited: it does not fit its own digest; run `pixart extract` again to rewrite it"
        )
    require_confined(path, fields)
    try:
        return Manifest(**fields)
    except TypeError as error:
        raise DataError(f"{path}: not a complete manifest ({error}); run `pixart extract` again") from error


def feature_sets(root: Path) -> dict[str, Path]:
    """Return the sealed sets of a dataset, or the set at `root`, by name; raises ConfigError if nothing is there."""
    paths = [root / MANIFEST] if exists(root / MANIFEST) else matching(root, f"*/{MANIFEST}")
    return {path.parent.name: path.parent for path in paths if FORMAT.encode() in read_bytes(path)}
