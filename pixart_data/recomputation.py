"""Samples computed again from their sources, with the encoders that made them, and compared with what is stored.

Bit for bit the same is what the same machine gives. Another GPU, or a CPU in place of one, rounds otherwise: `LIMITS`
says how far apart, relative to the tensor's length (L2 norm), two results may be that are still taken for the same.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.buckets import Bucket, nearest_bucket
from pixart_data.calibrations import read_codec, split
from pixart_data.captions import CaptionFile, CaptionRow, read_captions
from pixart_data.commits import Record, read_records
from pixart_data.damage import NULL_KEY, Finding
from pixart_data.entries import Entries, require_whole
from pixart_data.errors import ConfigError
from pixart_data.sections import Dtype, ImageFeatures, Source, TextFeatures
from pixart_data.shards import INDEX, FeatureSet, Manifest, tensor_shape
from pixart_data.sources import Sample, Unit, read_samples
from pixart_data.storage import local_copy
from pixart_data.texts import clean

if TYPE_CHECKING:
    from pixart_data.codecs import Codec
    from pixart_data.encoders import ImageEncoder

LIMITS = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.05}
"""By the arithmetic of the encoder, as manifests name it."""

_DTYPES: dict[str, Dtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_SMALLEST = 1e-38  # a norm that is not divided by zero
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_Array = npt.NDArray[Any]


@dataclass
class Comparison:
    """How samples of one set came out.

    Attributes:
        limit: The largest relative error that is taken for the same.
        largest_difference: Absolute, over all values.
        relative_error: Of the worst sample: L2 norm of the difference over that of what is stored.
        findings: The samples that are not the same, or cannot be computed.
    """

    limit: float
    num_samples: int = 0
    num_equal: int = 0
    largest_difference: float = 0.0
    relative_error: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def add(self, path: Path, key: str, stored: Sequence[_Array], computed: Sequence[_Array], same_bits: bool) -> None:
        """Compare the tensors of a sample, each by itself."""
        if key != NULL_KEY:  # which is none of the set's samples
            self.num_samples += 1
            self.num_equal += same_bits
        for old, new in zip(stored, computed, strict=True):
            difference = new.astype(np.float64) - old.astype(np.float64)
            largest = float(np.max(np.abs(difference), initial=0.0))
            norm = float(np.linalg.norm(old.astype(np.float64)))
            relative = float(np.linalg.norm(difference)) / max(norm, _SMALLEST)
            self.largest_difference = max(self.largest_difference, largest)
            self.relative_error = max(self.relative_error, relative)
            if not relative <= self.limit:  # nor if it is not a number
                problem = f"computed again, its relative error is {relative:.3g}, above {self.limit:.3g}"
                self.refuse(path, key, problem)
                return

    def refuse(self, path: Path, key: str, problem: str) -> None:
        """Note a sample that is not what is stored."""
        self.findings.append(Finding(path, sample=key, problem=problem))


@dataclass(frozen=True)
class Chosen:
    """A sample to compute again: its entry and its row in the index."""

    entry: np.void
    row: dict[str, Any]


def choose(features: FeatureSet, count: int, seed: int) -> list[Chosen]:
    """Choose samples by a hash of key and seed, from all buckets alike as far as they reach."""
    entries = features.entries
    numbers = _chosen_numbers(entries, count, seed)
    records = np.array(entries[numbers])
    require_whole(records, features.root / "entries.bin")
    rows = _index_rows(features.root / INDEX, records["row"].tolist())
    return [Chosen(record, rows[int(record["row"])]) for record in records]


def _chosen_numbers(entries: Entries, count: int, seed: int) -> npt.NDArray[np.int64]:
    mixed = np.asarray(entries["key"]) ^ np.uint64((seed * int(_MULTIPLIER) + 1) % (1 << 64))
    for shift in (30, 27):  # the finalizer of splitmix64, nearly
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * _MULTIPLIER
    order = np.argsort(mixed, kind="stable")
    if "bucket" in (entries.dtype.names or ()):
        buckets = np.asarray(entries["bucket"])[order]
        grouped = np.argsort(buckets, kind="stable")
        starts = np.searchsorted(buckets[grouped], buckets[grouped])
        turn = np.empty(len(order), np.int64)  # how many of its bucket come before
        turn[grouped] = np.arange(len(order)) - starts
        order = order[np.argsort(turn, kind="stable")]
    return np.sort(order[:count])


def _index_rows(index: Path, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    wanted = np.sort(np.array(rows, np.int64))
    found: dict[int, dict[str, Any]] = {}
    first = 0
    with local_copy(index) as copy, pq.ParquetFile(copy) as file:
        for batch in file.iter_batches():
            here = wanted[(wanted >= first) & (wanted < first + batch.num_rows)]
            taken = pa.Table.from_batches([batch]).take(here - first).to_pylist()
            found |= dict(zip(here.tolist(), taken, strict=True))
            first += batch.num_rows
    return found


class Origin:
    """Which unit of a source a sample comes from, by the records of the set that was made from the source.

    Args:
        root: That set: the one that is looked at, or the one that it was compacted from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: dict[str, Record] = read_records(root)
        self._unit_of = {file.path: record.unit for record in self.records.values() for file in record.files}

    def by_unit(self, chosen: Sequence[Chosen]) -> dict[str, list[Chosen]]:
        """Group samples by the unit that they come from.

        Raises:
            ConfigError: If no record names the shard of one.
        """
        features = FeatureSet(self.root)
        of_key = {int(one.entry["key"]): one for one in chosen}
        numbers = np.flatnonzero(np.isin(features.entries["key"], np.array(list(of_key), np.uint64)))
        groups: dict[str, list[Chosen]] = defaultdict(list)
        for record in features.entries[numbers]:
            unit = self._unit_of.get(features.shards[record["shard"]])
            if unit is not None:
                groups[unit].append(of_key.pop(int(record["key"])))
        if of_key:
            key = next(iter(of_key.values())).row["key"]
            raise ConfigError(f"{self.root}: no commit record says which unit sample {key} is from; extract it again")
        return dict(groups)

    def changed(self, unit: Unit | CaptionFile) -> bool:
        """Tell whether a unit of the source is another than it was."""
        return bool(self.records[unit.id].settings.get("shard", unit.fingerprint) != unit.fingerprint)


def require_units(groups: Mapping[str, Any], units: Mapping[str, Any], setting: str) -> None:
    """Check that the source still has the units that samples come from.

    Raises:
        ConfigError: If one is gone.
    """
    for unit, chosen in groups.items():
        if unit not in units:
            key = chosen[0].row["key"]
            raise ConfigError(f"{setting}: expected unit {unit}, which sample {key} is from; it is not there any more")


def recompute_images(
    features: FeatureSet,
    origin: Origin,
    chosen: Sequence[Chosen],
    units: Mapping[str, Unit],
    source: Source,
    config: ImageFeatures,
) -> Comparison:
    """Compute images again and compare their posteriors, those of mirrored images included.

    Args:
        units: Those of the source by id; each is read once at most.

    Raises:
        ConfigError: If the model or a unit is not there, or the model has other weights.
        JobError: If images are prepared otherwise on this machine.
    """
    from pixart_data.canvases import require
    from pixart_data.encoders import ImageEncoder

    manifest = features.manifest
    groups = origin.by_unit(chosen)
    require_units(groups, units, "source.paths")
    require(manifest.policy["preparation"])
    encoder = ImageEncoder(config.model_copy(update=_placed(manifest)))
    _require_same_model("image.model", manifest, encoder.facts)
    comparison = Comparison(LIMITS[manifest.model["dtype"]])
    pixels = _prepared(features, origin, groups, units, _Preparation(source, config), comparison)
    by_bucket: dict[int, list[tuple[Chosen, _Array]]] = defaultdict(list)
    for one, picture in pixels:
        waiting = by_bucket[int(one.entry["bucket"])]
        waiting.append((one, picture))
        if len(waiting) == config.batch_size:
            _compare_images(features, encoder, waiting, comparison)
            waiting.clear()
    for waiting in by_bucket.values():
        if waiting:
            _compare_images(features, encoder, waiting, comparison)
    return comparison


def _placed(manifest: Manifest) -> dict[str, str]:
    """Return the settings of an encoder that computes as the one did that made a set, on whatever device is here."""
    return {"dtype": _DTYPES[manifest.model["dtype"]], "device": "auto"}


def _require_same_model(setting: str, manifest: Manifest, facts: Mapping[str, Any]) -> None:
    expected, found = manifest.model.get("identity"), facts["identity"]
    if expected is not None and expected != found:
        raise ConfigError(f"{setting}: expected the weights {expected} that made the set, found {found} there now")


@dataclass(frozen=True)
class _Preparation:
    """What happens to an image before the encoder."""

    source: Source
    config: ImageFeatures

    def __call__(self, sample: Sample) -> tuple[Bucket, tuple[int, int], _Array] | str:
        """Return the bucket, the original's height and width, and pixels (H, W, 3); or why there are none."""
        from pixart_data.canvases import fit
        from pixart_data.images import ImageRejected, decode

        if sample.error is not None or sample.data is None:
            return f"{sample.error}: {sample.detail}"
        table = self.config.table
        try:
            decoded = decode(sample.data, max_pixels=self.source.max_image_pixels, buckets=table)
        except ImageRejected as rejected:
            return f"{rejected.reason}: {rejected.detail}"
        bucket = nearest_bucket(decoded.width_px, decoded.height_px, table)
        return bucket, (decoded.height_px, decoded.width_px), fit(decoded, bucket)


def _wanted(
    root: Path,
    origin: Origin,
    groups: Mapping[str, Sequence[Chosen]],
    units: Mapping[str, Any],
    read: Callable[[Any], Iterator[Any]],
    comparison: Comparison,
) -> Iterator[tuple[Chosen, Any]]:
    """Yield the rows of the source that belong to samples; those of units that changed, or have no such row, do not."""
    for name, group in groups.items():
        unit = units[name]
        missing = {one.row["key"]: one for one in group}
        if origin.changed(unit):
            for key in missing:
                comparison.refuse(root, key, f"its source {unit.path} has changed since; extract again")
            continue
        for row in read(unit):
            one = missing.pop(row.key, None)
            if one is not None:
                yield one, row
            if not missing:
                break
        for key in missing:
            comparison.refuse(root, key, f"not in its source {unit.path} any more; extract again")


def _prepared(
    features: FeatureSet,
    origin: Origin,
    groups: Mapping[str, Sequence[Chosen]],
    units: Mapping[str, Unit],
    prepare: _Preparation,
    comparison: Comparison,
) -> Iterator[tuple[Chosen, _Array]]:
    def read(unit: Unit) -> Iterator[Sample]:
        return read_samples(unit, prepare.source)

    for one, sample in _wanted(features.root, origin, groups, units, read, comparison):
        prepared = prepare(sample)
        if isinstance(prepared, str):
            comparison.refuse(features.root, sample.key, f"cannot be computed again: {prepared}")
            continue
        bucket, size_px, pixels = prepared
        stored = (one.row["bucket"], (one.row["original_height_px"], one.row["original_width_px"]))
        if (bucket.ratio, size_px) != stored:
            problem = f"is now of {size_px} px and bucket {bucket.ratio}, was {stored[1]} and {stored[0]}"
            comparison.refuse(features.root, sample.key, problem)
            continue
        yield one, pixels


def _compare_images(
    features: FeatureSet, encoder: "ImageEncoder", waiting: Sequence[tuple[Chosen, _Array]], comparison: Comparison
) -> None:
    pixels = np.stack([picture for _, picture in waiting])  # (B, H, W, 3)
    computed = encoder({"pixels": pixels})["moments"]  # (B, 2, C, h, w)
    mirrored = None
    if any(one.entry["flipped_offset"] for one, _ in waiting):
        mirrored = encoder({"pixels": np.ascontiguousarray(pixels[:, :, ::-1])})["moments"]
    for number, (one, _) in enumerate(waiting):
        shape = tensor_shape(one.row, features.manifest)
        stored = [_moments(features, one.entry, "offset", shape)]
        new = [computed[number]]
        if mirrored is not None and one.entry["flipped_offset"]:
            stored.append(_moments(features, one.entry, "flipped_offset", shape))
            new.append(mirrored[number])
        same = all(a.tobytes() == b.tobytes() for a, b in zip(stored, new, strict=True))
        old, again = ([part for tensor in tensors for part in tensor] for tensors in (stored, new))  # mean, std of each
        comparison.add(features.root / one.row["shard"], one.row["key"], old, again, same)


def _moments(features: FeatureSet, entry: np.void, offset: str, shape: tuple[int, ...]) -> _Array:
    return features.read_tensor(features.shards[entry["shard"]], int(entry[offset]), int(entry["size"]), shape)


def recompute_texts(
    features: FeatureSet,
    origin: Origin,
    chosen: Sequence[Chosen],
    units: Mapping[str, Any],
    captions: Callable[[Any], Iterator[CaptionRow]],
    config: TextFeatures,
) -> Comparison:
    """Encode captions again, the empty one included, and compare what their features are once decoded.

    Args:
        units: What `captions` reads, by id.

    Raises:
        ConfigError: If the model or a unit is not there, or the model has other weights.
    """
    from pixart_data.encoders import TextEncoder

    manifest = features.manifest
    groups = origin.by_unit(chosen)
    require_units(groups, units, "captions.path")
    codec = read_codec(features.root, manifest)
    encoder = TextEncoder(config.model_copy(update=_placed(manifest)))
    _require_same_model("text.model", manifest, encoder.facts)
    lossy = manifest.codec.get("measured", {}).get("relative_error", 0.0)
    comparison = Comparison(LIMITS[manifest.model["dtype"]] + 2 * lossy)  # both sides lose that much
    found: list[tuple[str, str, dict[str, Any]]] = []
    for one, row in _wanted(features.root, origin, groups, units, captions, comparison):
        now = clean(row.caption or "", config.cleaning)
        if row.error is not None or now != one.row["caption"]:
            comparison.refuse(features.root, row.key, f"its caption is now {now[:80]!r}; extract again")
        else:
            found.append((row.key, now, one.row))
    null = manifest.model.get("null")
    if null:
        found.append((NULL_KEY, "", {**null, "shard": null["path"]}))
    encoded = encoder.encode([caption for _, caption, _ in found])
    for (key, _, place), new in zip(found, encoded, strict=True):
        stored = _stored_arrays(features, codec, place)
        arrays = codec.encode(new)
        same = [a.tobytes() for a in stored] == [a.tobytes() for a in arrays]
        path = features.root / place["shard"]
        if len(new) != place["num_tokens"]:
            comparison.refuse(path, key, f"computed again, it has {len(new)} tokens, stored are {place['num_tokens']}")
            continue
        old, again = (codec.decode_arrays(values).float().numpy() for values in (stored, arrays))
        comparison.add(path, key, [old], [again], same)
    return comparison


def _stored_arrays(features: FeatureSet, codec: "Codec", place: Mapping[str, Any]) -> list[_Array]:
    data = np.empty(place["size_bytes"], np.uint8)
    features.read_into(place["shard"], place["offset_bytes"], data.data)
    return split(codec, data, place["num_tokens"])


def captions_of(source: Source | None, column: str) -> Callable[[Any], Iterator[CaptionRow]]:
    """Return what reads the captions of a unit as `extract` does: of a table, or what came with the images."""

    def read(unit: Unit | CaptionFile) -> Iterator[CaptionRow]:
        if isinstance(unit, CaptionFile):
            yield from read_captions(unit, column, need_key=True)
        elif source is not None:
            for sample in read_samples(unit, source, with_images=False):
                yield CaptionRow(sample.key, sample.caption, sample.error, sample.detail)

    return read
