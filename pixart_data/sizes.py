"""The sizes of a pile of images as a histogram, from wherever they are written down already, or from image headers."""

import io
import logging
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pixart_data.archives import read_seal
from pixart_data.captions import caption_files
from pixart_data.commits import COMMITS, MANIFEST, read_records, read_table
from pixart_data.errors import ConfigError, DataError
from pixart_data.headers import index_members
from pixart_data.places import Store, place_of
from pixart_data.sections import Source
from pixart_data.selection import is_selection, read_selection
from pixart_data.shards import INDEX, feature_sets, read_manifest
from pixart_data.sources import find_units, read_samples
from pixart_data.storage import exists, local_copy, location
from pixart_data.stores import is_url, join, open_file, patiently, unreadable
from pixart_data.threads import ahead
from pixart_data.units import Unit, is_image, is_missing

log = logging.getLogger(__name__)

COLUMNS = (
    ("original_width_px", "original_height_px"),  # features
    ("width_px", "height_px"),  # captions, `fetch`, `filter`
    ("width", "height"),  # img2dataset: as stored
    ("WIDTH", "HEIGHT"),  # LAION
    ("original_width", "original_height"),
)
"""Pairs of columns that hold sizes in pixels, the first that a table has counts."""

_HEADS_BYTES = (1 << 13, 1 << 16)  # then all: of a large profile, or of a format that ends in its header
_ROWS_PER_READ = 1 << 20
_PENDING = 1 << 22
_THREADS = 8
_WHOLE = 1 << 62
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
# What Pillow raises on damaged or cut headers, see `images`.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error)


@dataclass(frozen=True)
class Sizes:
    """How many images there are of each size, upright; three arrays (n,) and the number without a size.

    Attributes:
        num_left_out: Images that are damaged, rejected, or have no size in the table.
    """

    width_px: NDArray[np.int64]
    height_px: NDArray[np.int64]
    count: NDArray[np.int64]
    num_left_out: int = 0

    @property
    def num_images(self) -> int:
        """All images with a size."""
        return int(self.count.sum())


@dataclass(frozen=True)
class Table:
    """A Parquet file with sizes.

    Attributes:
        columns: Those of width and height.
        kept: A table of the keys of the rows that count; None: all do.
    """

    path: Path
    columns: tuple[str, str]
    kept: Path | None = None


@dataclass(frozen=True)
class Origin:
    """Where sizes are to be read: tables, or the units of a source, whose headers tell."""

    path: str
    kind: str
    tables: list[Table] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)


def find_origins(paths: Sequence[str]) -> list[Origin]:
    """Tell what is at each of the paths; reads no image.

    Args:
        paths: Datasets, feature sets, outputs of `caption`, `fetch` and `filter`, Parquet files with sizes or folders
            of them, or whatever `source.paths` takes. `*` and `**` expand.

    Raises:
        ConfigError: If there is nothing with a size.
        DataError: If what a stage wrote is not finished, or is damaged.
    """
    store = Store()
    expanded = []
    for path in paths:
        if not is_url(path) and not os.path.exists(path) and not any(sign in path for sign in "*?["):
            raise ConfigError(f"{path}: expected images or what pixart wrote, found nothing; check the path")
        expanded += place_of(path, store).expand(path)
    found = [(path, place_of(path, store).is_folder(path)) for path in dict.fromkeys(expanded)]
    return list(ahead(lambda place: _origin(*place), found, _THREADS, 2 * _THREADS))


def read_sizes(origins: Sequence[Origin], every: int = 1) -> Sizes:
    """Read the sizes of all images of all origins.

    Args:
        every: Of sources, read only each n-th unit and count each of its images n times.

    Raises:
        DataError: If a file cannot be read, or no image has a size.
    """
    tally = _Tally()
    with warnings.catch_warnings():  # for all threads: a broken EXIF block is none of ours
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for origin in origins:
            for table in origin.tables:
                _read_table(table, tally)
            units = origin.units[::every]
            for number, part in enumerate(ahead(_measure, units, _THREADS, 2 * _THREADS), 1):
                tally.add(*part, times=every)
                log.debug("%s: %d of %d units measured", origin.path, number, len(units))
    sizes = tally.sizes()
    if not sizes.num_images:
        where = ", ".join(origin.path for origin in origins)
        raise DataError(f"{where}: expected images with a size, found {sizes.num_left_out} without; name other images")
    return sizes


class _Tally:
    """Counts sizes; pairs wait in arrays until there are many."""

    def __init__(self) -> None:
        self._packed: list[NDArray[np.int64]] = []
        self._counts: list[NDArray[np.int64]] = []
        self._pending = self.num_left_out = 0

    def add(self, width_px: NDArray[np.int64], height_px: NDArray[np.int64], times: int = 1) -> None:
        """Count images, (n,) and (n,); those with a side under 1 are left out."""
        good = (width_px > 0) & (height_px > 0)
        self.num_left_out += times * int((~good).sum())
        packed, counts = np.unique(width_px[good] << 32 | height_px[good], return_counts=True)
        self._packed.append(packed)
        self._counts.append(times * counts)
        self._pending += len(packed)
        if self._pending > _PENDING:
            self._merge()

    def _merge(self) -> None:
        packed, place = np.unique(np.concatenate([*self._packed, np.empty(0, np.int64)]), return_inverse=True)
        counts = np.zeros(len(packed), np.int64)
        np.add.at(counts, place, np.concatenate([*self._counts, np.empty(0, np.int64)]))
        self._packed, self._counts, self._pending = [packed], [counts], 0

    def sizes(self) -> Sizes:
        """Return the histogram, ordered by width and height."""
        self._merge()
        [packed], [counts] = self._packed, self._counts
        return Sizes(packed >> 32, packed & 0xFFFFFFFF, counts, self.num_left_out)


# What is at a path


def _origin(path: str, is_folder: bool) -> Origin:
    if not is_folder:
        return _file(path) if path.lower().endswith(".parquet") else _source(path)
    root = location(path)
    for look in (_features, _stage, _tables):
        found = look(root)
        if found is not None:
            return found
    return _source(path)


def _file(path: str) -> Origin:
    names = _names(location(path))
    columns = _size_columns(names)
    if columns:
        return Origin(path, "table of sizes", [Table(location(path), columns)])
    if "path" in names:
        return _source(path)
    pairs = ", ".join(f"{width} and {height}" for width, height in COLUMNS)
    raise ConfigError(
        f"{path}: expected a pair of columns with sizes ({pairs}) or a column path that names images, found "
        f"{', '.join(names)}; name the images themselves"
    )


def _features(root: Path) -> Origin | None:
    sets = feature_sets(root)
    if not sets:
        return None
    images = {name: read_manifest(place) for name, place in sets.items()}
    rows = {name: found.counts["rows_out"] for name, found in images.items() if found.kind == "image"}
    if not rows:
        raise ConfigError(f"{root}: expected a feature set of images, found {', '.join(sets)}; name one of images")
    name = max(rows, key=lambda name: rows[name])  # sets of one dataset hold the same images
    return Origin(str(root), f"feature set {name}", [Table(sets[name] / INDEX, COLUMNS[0])])


def _stage(root: Path) -> Origin | None:
    if not exists(root / MANIFEST):
        if (root / COMMITS).is_dir() or any(root.glob(f"*/{COMMITS}")):
            raise DataError(f"{root}: expected a finished output, found one that is not; run its stage to the end")
        return None
    fetched = read_seal(root)
    if fetched is not None:
        return Origin(str(root), "fetched images", [Table(root / rows["path"], COLUMNS[1]) for rows in fetched["rows"]])
    if is_selection(root):
        records = read_records(root)
        parts = read_selection(root).parts
        tables = [Table(root / records[p.unit].files[0].path, COLUMNS[1], root / p.file.path) for p in parts]
        return Origin(str(root), "kept images", tables)
    files = caption_files(root, "paths")
    return Origin(str(root), "captions", [Table(location(file.path), COLUMNS[1]) for file in files])


def _tables(root: Path) -> Origin | None:
    """Take a folder of Parquet files with sizes, if there is no tar and no image beside them."""
    paths = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    if any(path.suffix == ".tar" or is_image(path.name) for path in paths):
        return None
    found = {path: _size_columns(_names(path)) for path in paths if path.suffix == ".parquet"}
    tables = [Table(path, columns) for path, columns in found.items() if columns]
    return Origin(str(root), "tables of sizes", tables) if tables and len(tables) == len(found) else None


def _source(path: str) -> Origin:
    try:
        return Origin(path, "images", units=find_units(_source_of(path)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("source.paths", "paths")) from None


def _source_of(path: str) -> Source:
    return Source(paths=[path], bytes_per_unit=_WHOLE)  # each slice of a tar would read all of its headers


def _names(path: Path) -> list[str]:
    names: list[str] = _reading(path, lambda file: file.schema_arrow.names)
    return names


def _size_columns(names: Sequence[str]) -> tuple[str, str] | None:
    return next((pair for pair in COLUMNS if set(names).issuperset(pair)), None)


def _reading(path: Path, read: Callable[[pq.ParquetFile], Any]) -> Any:
    try:
        with local_copy(path) as copy, pq.ParquetFile(copy) as file:
            return read(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file, found one that cannot be read: {error}") from error


# Tables


def _read_table(table: Table, tally: _Tally) -> None:
    keys = None if table.kept is None else read_table(table.kept, columns=["key"])["key"].combine_chunks()
    columns = [*table.columns, *(["key"] if keys is not None else [])]

    def read(file: pq.ParquetFile) -> None:
        for batch in file.iter_batches(_ROWS_PER_READ, columns=columns):
            kept = batch if keys is None else batch.filter(pc.is_in(batch["key"], value_set=keys))
            width_px, height_px = (_numbers(kept[name]) for name in table.columns)
            tally.add(width_px, height_px)

    _reading(table.path, read)


def _numbers(column: pa.Array) -> NDArray[np.int64]:
    """Return whole numbers, 0 for what is null; LAION has floats."""
    values = pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
    numbers: NDArray[np.int64] = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).astype(np.int64)
    return numbers


# Headers


def _measure(unit: Unit) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return widths and heights of the images of a unit, 0 for those whose header cannot be read."""
    readers = {"tar": _tar_images, "folder": _folder_images, "list": _list_images}
    found = [_size(read) for read in readers[unit.kind](unit)]
    sides = np.array(found, dtype=np.int64).reshape(-1, 2)
    return sides[:, 0], sides[:, 1]


Read = Callable[[int], bytes]
"""Returns up to so many bytes of a file from its begin; all of them for -1."""


def _tar_images(unit: Unit) -> Iterator[Read]:
    def read_at(offset: int, size_bytes: int, limit_bytes: int) -> bytes:
        file.seek(offset)
        return file.read(size_bytes if limit_bytes < 0 else min(limit_bytes, size_bytes))

    try:
        with open_file(unit.path) as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            index = index_members(file, size_bytes)
            if index.unreadable or index.problem:
                log.warning("%s: %s; what cannot be read is left out", unit.path, index.unreadable or index.problem)
            for members in index.groups.values():
                for member in members:
                    if member.is_image and member.reason is None:
                        yield partial(read_at, member.offset, member.size_bytes)
    except OSError as error:
        raise unreadable(unit.path, error) from error


def _folder_images(unit: Unit) -> Iterator[Read]:
    def read(path: str, limit_bytes: int) -> bytes:
        with open_file(path) as file:
            return file.read(limit_bytes)

    for name in unit.files:
        path = join(unit.path, name)
        yield lambda limit_bytes, path=path: patiently(partial(read, path, limit_bytes), path)  # type: ignore[misc]


def _list_images(unit: Unit) -> Iterator[Read]:
    """Read whole files: what a row means is known to the reader of lists alone."""
    for sample in read_samples(unit, _source_of(unit.path)):
        data = sample.data or b""
        yield lambda limit_bytes, data=data: data if limit_bytes < 0 else data[:limit_bytes]  # type: ignore[misc]


def _size(read: Read) -> tuple[int, int]:
    try:
        for limit_bytes in (*_HEADS_BYTES, -1):
            head = read(limit_bytes)
            size = _header(io.BytesIO(head))
            if size is not None:
                return size
            if len(head) != limit_bytes:  # that was all of it
                break
    except OSError as error:
        if not is_missing(error):
            raise
    return 0, 0


def _header(file: BinaryIO) -> tuple[int, int] | None:
    """Return width and height, upright; None if there is no whole header."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            width_px, height_px = image.size
            # Pillow turns TIFFs itself, and would decode all of a PNG to look for EXIF behind its pixels.
            hidden = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
            turned = not hidden and image.getexif().get(_ORIENTATION) in _TURNED
            return (height_px, width_px) if turned else (width_px, height_px)
    except (*_DAMAGED, Image.DecompressionBombError):
        return None
