"""What a dataset holds, found without reading all of it: for people to look at.

Manifests, `entries.bin` and single columns of the index are read in pieces; of features, a sample that depends on the
number of records alone. Memory: 8 bytes for each image of the largest set, for matching keys, besides what is sampled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pixart_data.advice import command
from pixart_data.agreement import wrong_numbers
from pixart_data.calibrations import read_codec, split
from pixart_data.codecs import from_manifest
from pixart_data.entries import ENTRIES, Entries, checks
from pixart_data.errors import DataError
from pixart_data.figures import MOST_CODEC_ERROR, LatentFigures, LatentSums, TextFigures, TextSums
from pixart_data.shards import INDEX, REJECTED_FILE, BatchBuffer, FeatureSet, Manifest, MemberPlaces
from pixart_data.storage import exists, size_bytes
from pixart_data.tables import parquet

MOST_SAMPLES = 1000
MOST_BYTES = 128 << 20  # of sampled members in a set: long captions and large images make fewer
SMALL_SHARD_BYTES = 64_000_000

_RECORDS_AT_ONCE = 1 << 20
_MEMBERS_AT_ONCE = 32
_ROWS_AT_ONCE = 1 << 16
_MANY_SHARDS = 16
_REJECTED_ROWS_READ = 1 << 20  # for examples

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Totals:
    """Sums over all records of a set.

    Attributes:
        num_members: Stored; rows with one caption share a member, mirrored images are not counted.
        size_bytes: Of the tensors of these members.
        num_tokens: Of these members, in a text set.
        num_flipped, flipped_bytes: Of mirrored images.
        lengths: Rows by their number of tokens, (longest + 1,); empty for images.
    """

    num_members: int
    size_bytes: int
    num_tokens: int
    num_flipped: int
    flipped_bytes: int
    lengths: npt.NDArray[np.int64]

    def percentile(self, share: float) -> int:
        """Return the number of tokens that this share of the captions has at most."""
        return int(np.searchsorted(np.cumsum(self.lengths), share * self.lengths.sum()))


@dataclass(frozen=True)
class Portion:
    """What takes how much space."""

    what: str
    size_bytes: int


@dataclass(frozen=True)
class Survey:
    """A feature set as it was found.

    Attributes:
        num_truncated: Captions that were longer than stored.
        shards: Portions of the shards.
        tables: Portions of the files beside them; of index.parquet by column.
        figures: Of a sample of its features; None where there are none.
        damaged: What is wrong with members of that sample.
        rejected: Rows of rejected.parquet to look at, by reason.
    """

    root: Path
    manifest: Manifest
    totals: Totals
    num_truncated: int
    shards: list[Portion]
    tables: list[Portion]
    figures: LatentFigures | TextFigures | None
    damaged: list[str]
    rejected: dict[str, list[dict[str, Any]]]

    @property
    def num_rows(self) -> int:
        """Samples in the set."""
        return int(self.manifest.counts["rows_out"])

    @property
    def size_bytes(self) -> int:
        """Of shards and tables."""
        return sum(portion.size_bytes for portion in (*self.shards, *self.tables))

    @property
    def small_shards(self) -> int:
        """How many shards are small; 0 where there are so few that gathering them is no use."""
        sizes = [shard["size_bytes"] for shard in self.manifest.shards]
        num_kinds = max(1, sum(bucket["rows"] > 0 for bucket in self.manifest.buckets))
        few = len(sizes) <= max(_MANY_SHARDS, 2 * num_kinds)
        if few or sum(sizes) / len(sizes) >= SMALL_SHARD_BYTES:
            return 0
        return sum(size < SMALL_SHARD_BYTES for size in sizes)

    def alarms(self) -> Iterator[str]:
        """Yield what cannot be right, in sentences."""
        if self.damaged:
            others = f", and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
            yield f"damaged: {self.damaged[0]}{others}"
        if self.figures is not None:
            yield from self.figures.alarms()
        error = self.manifest.codec.get("measured", {}).get("channel_error", 0.0)
        if error > MOST_CODEC_ERROR:
            yield (
                f"{self.manifest.codec['name']} loses {error:.1%} of what channels say, expected under "
                f"{MOST_CODEC_ERROR:.0%}: "
                'extract again with text.codec = "bf16-packed", which loses nothing'
            )


@dataclass(frozen=True)
class Match:
    """How the keys of an image set and a text set meet."""

    images: str
    texts: str
    num_both: int
    num_images: int
    num_texts: int


def space(size_bytes: float) -> str:
    """Return a size for people: `783 bytes`, `24.9 kB`, `1.2 TB`; a kB is 1,000 bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


def survey(features: FeatureSet, num_examples: int) -> Survey:
    """Look at a feature set.

    Args:
        num_examples: Rejected rows to keep of each reason.

    Raises:
        DataError: If its files do not belong together.
        JobError: If the storage fails.
    """
    manifest, root = features.manifest, features.root
    _require_alike(features)
    totals = _totals(features.entries)
    damaged: list[str] = []
    return Survey(
        root=root,
        manifest=manifest,
        totals=totals,
        num_truncated=_num_truncated(root / INDEX) if manifest.kind == "text" else 0,
        shards=_shard_portions(manifest, totals),
        tables=list(_table_portions(root, manifest)),
        figures=_figures(features, totals, damaged),
        damaged=damaged,
        rejected=_rejected(root / REJECTED_FILE, num_examples),
    )


def match(images: FeatureSet, texts: FeatureSet) -> Match:
    """Count the samples that two sets have in common."""
    keys = np.sort(images.entries["key"])
    num_both = 0
    for some in _pieces(texts.entries) if len(keys) else ():
        wanted = np.sort(some["key"])  # neighbours are found near each other, and memory is read in order
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        num_both += int(np.count_nonzero(keys[places] == wanted))
    return Match(images.root.name, texts.root.name, num_both, len(images), len(texts))


def read_members(features: FeatureSet, records: Entries) -> Iterator[tuple[int, Bytes | DataError]]:
    """Yield the bytes of members, or what is wrong with one, each with its place in `records`.

    Raises:
        JobError: If the storage fails.
    """
    for start in range(0, len(records), _MEMBERS_AT_ONCE):
        some = np.array(records[start : start + _MEMBERS_AT_ONCE])
        whole = some["check"] == checks(some)
        for i in np.flatnonzero(~whole):
            where = features.root / ENTRIES
            advice = f"run {command(features.root)} again"
            yield start + int(i), DataError(f"{where}: a record does not fit its check; {advice}")
        good = some[whole]
        bounds = [0, *np.cumsum(good["size"], dtype=np.int64).tolist()]
        data = np.empty(bounds[-1], np.uint8)
        places = MemberPlaces(good["shard"].tolist(), good["offset"].tolist(), good["crc"].tolist())
        wrong = features.read_batch(places, [BatchBuffer(data.data, bounds)])
        for place, i in enumerate(np.flatnonzero(whole)):
            yield start + int(i), wrong.get(place, data[bounds[place] : bounds[place + 1]])


def index_rows(path: Path, rows: list[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    """Return a few rows of a Parquet table by their numbers; only the row groups that hold them are read."""
    found: dict[int, dict[str, Any]] = {}
    with parquet(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            inside = sorted({row for row in rows if first <= row < end})
            if inside:
                table = file.read_row_group(group, columns=columns).take([row - first for row in inside])
                found |= dict(zip(inside, table.to_pylist(), strict=True))
            first = end
    return found


def _require_alike(features: FeatureSet) -> None:
    with parquet(features.root / INDEX) as file:
        num_rows = file.metadata.num_rows
    expected = features.manifest.counts["rows_out"]
    for name, found in ((ENTRIES, len(features)), (INDEX, num_rows)):
        if found != expected:
            raise DataError(
                f"{features.root / name}: expected {expected:,} rows, as manifest.json has them, found {found:,}; "
                f"`pixart verify {features.root}` says what to do"
            )
    problem = wrong_numbers(features.entries, features.manifest)
    if problem:
        raise DataError(f"{features.root}: {problem}; `pixart verify {features.root}` says what to do")


def _pieces(entries: Entries) -> Iterator[Entries]:
    for start in range(0, len(entries), _RECORDS_AT_ONCE):
        yield entries[start : start + _RECORDS_AT_ONCE]


def _totals(entries: Entries) -> Totals:
    is_text = "num_tokens" in (entries.dtype.names or ())
    num_members = num_bytes = num_tokens = num_flipped = flipped_bytes = 0
    lengths = np.zeros(0, np.int64)
    last = (-1, -1)
    for some in _pieces(entries):
        shards, offsets, sizes = (some[name].astype(np.int64) for name in ("shard", "offset", "size"))
        # Rows that share a member are neighbours.
        new = (np.diff(shards, prepend=last[0]) != 0) | (np.diff(offsets, prepend=last[1]) != 0)
        last = int(shards[-1]), int(offsets[-1])
        num_members += int(new.sum())
        num_bytes += int(sizes[new].sum())
        if is_text:
            tokens = some["num_tokens"].astype(np.int64)
            num_tokens += int(tokens[new].sum())
            lengths = _added(lengths, np.bincount(tokens))
        else:
            flipped = some["flipped_offset"] > 0
            num_flipped += int(flipped.sum())
            flipped_bytes += int(sizes[flipped].sum())
    return Totals(num_members, num_bytes, num_tokens, num_flipped, flipped_bytes, lengths)


def _added(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    both = np.zeros(max(len(one), len(other)), np.int64)
    both[: len(one)] += one
    both[: len(other)] += other
    return both


def _num_truncated(index: Path) -> int:
    with parquet(index) as file:
        return sum(batch["truncated"].true_count for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["truncated"]))


def _shard_portions(manifest: Manifest, totals: Totals) -> list[Portion]:
    portions = _tensor_portions(manifest, totals)
    if totals.num_flipped:
        portions.append(Portion("mirrored moments", totals.flipped_bytes))
    if manifest.model.get("null"):
        portions.append(Portion("the empty caption", manifest.model["null"]["size_bytes"]))
    rest = sum(shard["size_bytes"] for shard in manifest.shards) - sum(portion.size_bytes for portion in portions)
    return [*portions, Portion("headers and padding", rest)]


def _tensor_portions(manifest: Manifest, totals: Totals) -> list[Portion]:
    if manifest.kind == "image":
        return [Portion(manifest.tensor, totals.size_bytes)]
    codec = from_manifest(manifest.codec, manifest.model["width"], {})
    try:
        # Sizes grow with the number of tokens, so that the parts of all captions are those of one as long as all.
        parts = codec.parts(totals.num_tokens, totals.size_bytes)
    except ValueError:
        return [Portion("tensors", totals.size_bytes)]
    return [Portion(f"{part.name} {part.dtype}", part.size_bytes) for part in parts]


def _table_portions(root: Path, manifest: Manifest) -> Iterator[Portion]:
    with parquet(root / INDEX) as file:
        columns: dict[str, int] = {}
        for group in range(file.num_row_groups):
            held = file.metadata.row_group(group)
            for number in range(held.num_columns):
                column = held.column(number)
                columns[column.path_in_schema] = columns.get(column.path_in_schema, 0) + column.total_compressed_size
    for name, size in columns.items():
        yield Portion(f"{INDEX}: {name}", size)
    yield Portion(f"{INDEX}: metadata", size_bytes(root / INDEX) - sum(columns.values()))
    calibration = manifest.codec.get("calibration")
    for name in (ENTRIES, REJECTED_FILE, *([calibration["path"]] if calibration else [])):
        if exists(root / name):
            yield Portion(name, size_bytes(root / name))


def _figures(features: FeatureSet, totals: Totals, damaged: list[str]) -> LatentFigures | TextFigures | None:
    if not len(features):
        return None
    count = max(1, min(MOST_SAMPLES, len(features), MOST_BYTES * totals.num_members // max(totals.size_bytes, 1)))
    chosen = np.sort(np.random.default_rng(0).choice(len(features), count, replace=False))
    records = np.array(features.entries[chosen])
    is_image = features.manifest.kind == "image"
    return (_latents if is_image else _texts)(features, records, damaged)


def _latents(features: FeatureSet, records: Entries, damaged: list[str]) -> LatentFigures | None:
    model = features.manifest.model
    sums = LatentSums(model["channels"])
    for i, data in read_members(features, records):
        if isinstance(data, DataError):
            damaged.append(str(data))
        else:
            sums.add(moments_of(data, features.manifest, records[i]))
    if "scaling_factor" not in model:  # what training sees cannot be told
        return None
    return sums.figures(model["scaling_factor"], model.get("shift_factor") or 0.0)


def moments_of(data: Bytes, manifest: Manifest, record: Mapping[str, Any] | np.void) -> npt.NDArray[np.float16]:
    """Return the posterior (2, C, h, w) in the bytes of an image's member."""
    bucket = manifest.buckets[int(record["bucket"])]
    step = manifest.model["downsampling"]
    shape = (2, manifest.model["channels"], bucket["height_px"] // step, bucket["width_px"] // step)
    return data.view(np.float16).reshape(shape)


def _texts(features: FeatureSet, records: Entries, damaged: list[str]) -> TextFigures:
    import torch

    codec = read_codec(features.root, features.manifest)
    sums = TextSums(features.manifest.model["width"])
    for i, data in read_members(features, records):
        if isinstance(data, DataError):
            damaged.append(str(data))
        else:
            arrays = split(codec, data, int(records[i]["num_tokens"]))
            bits = codec.decode_arrays(arrays).contiguous().view(torch.int16).numpy().view(np.uint16)
            sums.add((bits.astype(np.uint32) << 16).view(np.float32))  # torch's threads take longer for so little
    return sums.figures()


def _rejected(path: Path, num_examples: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    with parquet(path) as file:
        num_read = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            for reason in pc.unique(batch["error"]).to_pylist():
                rows = found.setdefault(reason, [])
                missing = num_examples - len(rows)
                if missing > 0:
                    rows += batch.filter(pc.equal(batch["error"], reason)).slice(0, missing).to_pylist()
            num_read += batch.num_rows
            if num_read > _REJECTED_ROWS_READ:
                break
    return found
