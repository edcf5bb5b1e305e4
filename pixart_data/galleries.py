"""Pictures of a data set with their raw and their dense captions, as the paper's Figures 3 and 10 show them.

Rows are drawn by a hash of their key and a seed, so that one gallery comes out of one corpus, however it is cut and
read. The first component of a key names the shard that its picture is in; no other shard is opened, and of those that
are, no other picture is read.
"""

import heapq
import io
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.entries import key_hashes
from pixart_data.errors import ConfigError, DataError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.shares import mixed
from pixart_data.sources import Sample, Unit, find_units, read_samples
from pixart_data.stores import is_url

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SPARES = 4
"""Rows that are looked for, for each picture that is wanted: some pictures are missing or broken."""
MOST_SIDE_PX = 480
MOST_BYTES = 30_000
MOST_CHARS = 2000
"""Longer captions are cut, and end in an ellipsis."""

_MOST_TARS = 128
_MOST_REMOTE_TARS = 16  # each is copied here in whole
_QUALITIES = (85, 75, 65, 50)
_SMALLER = 0.8
_STEP = 0x9E3779B97F4A7C15
_SHOWN = 3
_WHOLE = 1 << 62
_KEY = re.compile(r"(?<!\S)source\.(?=[a-z])")  # of the job file, in a message; not of a path


@dataclass(frozen=True)
class Row:
    """An image's key and its captions: what came with it, and what a model wrote."""

    key: str
    raw: str | None
    dense: str | None


@dataclass(frozen=True)
class Exhibit:
    """A picture to be shown with its captions.

    Example:
        >>> exhibit = Exhibit("sa_000000/sa_1", jpeg, "a dog", "A brown dog lies on a red sofa.", 480, 320)
        >>> url = f"data:image/jpeg;base64,{base64.b64encode(exhibit.jpeg).decode()}"
        >>> figure = f'<img src="{url}" width={exhibit.width} height={exhibit.height}>'

    Attributes:
        key: Names the image in all tables.
        jpeg: At most 30 kB; upright.
        raw, dense: The captions, not blank and at most 2,000 characters long.
        width, height: Of the JPEG in pixels, at most 480.
    """

    key: str
    jpeg: bytes
    raw: str
    dense: str
    width: int
    height: int


def draw_rows(keys: pa.Array, raw: pa.Array, dense: pa.Array, count: int, seed: int) -> list[Row]:
    """Return the rows of a batch that a gallery of `count` pictures could show, first choice first; of one key, one.

    Args:
        keys: Text, (n,), like both captions; rows in which one of the three is null or blank are left out.
    """
    columns = [_as_bytes(column) for column in (keys, raw, dense)]
    whole = np.logical_and.reduce([np.asarray(column.is_valid()) for column in columns])
    places = np.flatnonzero(whole)
    names = [_decoded(name) for name in columns[0].take(pa.array(places))]
    rows: dict[str, Row] = {}
    for place in places[np.argsort(_lots(names, seed), kind="stable")].tolist():
        row = Row(*(_decoded(column[place]) for column in columns))
        if _is_usable(row):
            rows.setdefault(row.key, row)
        if len(rows) == SPARES * count:
            break
    return list(rows.values())


def choose(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """Return the rows that a gallery of `count` pictures could show, first choice first; of one key, the first row.

    What is chosen from the choices of parts is what would be chosen from the whole.
    """
    usable: dict[str, Row] = {}
    for row in rows:
        if _is_usable(row):
            usable.setdefault(row.key, row)
    lots = _lots(list(usable), seed).tolist()
    return [usable[key] for _, key in heapq.nsmallest(SPARES * count, zip(lots, usable, strict=True))]


def _lots(keys: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    return mixed(key_hashes(keys) ^ np.uint64((seed * _STEP + 1) % (1 << 64)))


def _is_usable(row: Row) -> bool:
    return all(text is not None and text.strip() for text in (row.key, row.raw, row.dense))


def _as_bytes(column: pa.Array) -> pa.Array:
    text = column.cast(pa.string()) if pa.types.is_integer(column.type) else column
    return text.cast(pa.large_binary())


def _decoded(value: pa.Scalar) -> str:
    return str(value.as_py().decode("utf-8", "replace"))


def find_shards(source: Source) -> dict[str, list[Unit]]:
    """Return the units of a gallery's source by the first component of their keys; a driver tries before it starts.

    Raises:
        ConfigError: As `sources.find_units` does, of the job file's section `gallery.source`.
        DataError: If the source cannot be listed.
    """
    shards: dict[str, list[Unit]] = defaultdict(list)
    # Each slice of a tar would read all of its headers; but what a filter kept, it kept of slices.
    whole = source if source.kept else source.model_copy(update={"bytes_per_unit": _WHOLE})
    try:
        for unit in find_units(whole):
            shards[unit.name].append(unit)
    except ConfigError as error:
        raise ConfigError(_KEY.sub("gallery.source.", str(error))) from error
    return dict(shards)


def gallery(source: Source, rows: Iterable[Row], count: int, seed: int = 0) -> list[Exhibit]:
    """Return up to `count` pictures of a source with their captions, in the order in which they were drawn.

    Pictures that are missing or cannot be decoded are left out for others; the log says how many, and why. At most 128
    tars are opened, of those on an object store 16: each is copied to the scratch disk for as long as it is read. One
    picture at a time is in memory.

    Example:
        >>> rows = draw_rows(batch["key"], batch["raw_caption"], batch["caption"], count=12, seed=0)
        >>> for exhibit in gallery(Source(paths=["data/sa1b"]), rows, count=12):
        ...     print(exhibit.key, len(exhibit.jpeg), exhibit.raw, exhibit.dense)

    Args:
        rows: From `draw_rows` or `choose`, or any others: those with both captions are drawn from.
        count: Of pictures.
        seed: Another one draws other rows.

    Raises:
        ConfigError: If the source is none, see `find_shards`.
        DataError: If it cannot be listed; a shard that cannot be read is left out.
    """
    waiting = choose(rows, count, seed)
    hall = _Hall(source)
    found: dict[str, Exhibit] = {}
    tried: list[Row] = []
    while waiting and len(found) < count:
        turn, waiting = waiting[: count - len(found)], waiting[count - len(found) :]
        tried += turn
        found |= hall.exhibits({row.key: row for row in turn})
    hall.report(tried, len(found))
    return [found[row.key] for row in tried if row.key in found]


class _Hall:
    """Finds the pictures of keys in the units of a source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left_out: Counter[str] = Counter()
        self._num_opened = 0
        self._units = find_shards(source)

    def exhibits(self, rows: Mapping[str, Row]) -> dict[str, Exhibit]:
        """Return those of the rows, by key, that have a picture."""
        by_shard: dict[str, set[str]] = defaultdict(set)
        for key in rows:
            by_shard[key.partition("/")[0]].add(key)
        found = {}
        for shard, keys in sorted(by_shard.items()):
            for sample in self._samples(shard, keys):
                exhibit = self._exhibit(sample, rows[sample.key])
                if exhibit is not None:
                    found[sample.key] = exhibit
        return found

    def _samples(self, shard: str, keys: set[str]) -> Iterator[Sample]:
        """Yield the samples of some keys, all of one shard, unit by unit until all are found."""
        missing = set(keys)
        for unit in self._units.get(shard, ()):
            if not missing:
                break
            if not self._may_open(unit):
                self._left_out[f"in shards beyond the {self._num_opened} that were opened"] += len(missing)
                return
            try:
                for sample in read_samples(unit, self._source, keys=frozenset(missing)):
                    missing.discard(sample.key)
                    yield sample
            except DataError as error:
                log.warning("gallery: %s; its pictures are left out", error)
        if missing:
            self._left_out["not found"] += len(missing)

    def _may_open(self, unit: Unit) -> bool:
        if unit.kind != "tar":  # of folders and lists only what is looked for is opened
            return True
        if self._num_opened >= (_MOST_REMOTE_TARS if is_url(unit.path) else _MOST_TARS):
            return False
        self._num_opened += 1
        return True

    def _exhibit(self, sample: Sample, row: Row) -> Exhibit | None:
        from pixart_data.images import ImageRejected, decode

        if sample.error is not None or sample.data is None:
            self._left_out[sample.error or Reason.NO_IMAGE] += 1
            return None
        try:
            decoded = decode(sample.data, max_pixels=self._source.max_image_pixels, min_side_px=MOST_SIDE_PX)
        except ImageRejected as rejected:
            self._left_out[rejected.reason] += 1
            return None
        jpeg, width, height = _thumbnail(decoded.image)
        return Exhibit(row.key, jpeg, _cut(str(row.raw)), _cut(str(row.dense)), width, height)

    def report(self, tried: Sequence[Row], num_found: int) -> None:
        """Log what became of the rows that were looked for."""
        if not self._left_out:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self._left_out.items()))
        log.warning(
            "gallery: left out %d of the %d pictures looked for: %s", sum(self._left_out.values()), len(tried), reasons
        )
        shards = sorted({row.key.partition("/")[0] for row in tried} - self._units.keys())
        if shards and not num_found:
            log.warning(
                "gallery: expected keys that begin with the name of a shard of its source (%s ...), found %s; name the "
                "images that were captioned, with the same source.root",
                ", ".join(sorted(self._units)[:_SHOWN]),
                ", ".join(shards[:_SHOWN]),
            )


def _cut(caption: str) -> str:
    text = caption.strip()
    return text if len(text) <= MOST_CHARS else f"{text[: MOST_CHARS - 1]}…"


def _thumbnail(image: "Image") -> tuple[bytes, int, int]:
    """Return a JPEG of at most `MOST_BYTES` with its width and height in pixels; the image is shrunk to that."""
    side_px = MOST_SIDE_PX
    while True:
        image.thumbnail((side_px, side_px))
        for quality in _QUALITIES:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
            if file.tell() <= MOST_BYTES:
                return file.getvalue(), image.width, image.height
        side_px = int(side_px * _SMALLER)
