"""What is refused before a step is trained: features that are not whole, not alike, or not what the model takes."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixart_data.commits import MANIFEST
from pixart_data.errors import ConfigError, DataError
from pixart_data.retries import retrying
from pixart_data.shards import FeatureSet
from pixart_data.storage import is_remote
from pixart_model.batches import Names
from pixart_model.config import Data
from pixart_model.mixture import encoder
from pixart_model.portion import Portion
from pixart_model.roster import Joined
from pixart_model.sizes import Model
from pixart_model.subset import narrowed

_LATENTS = ("channels", "downsampling", "scaling_factor", "shift_factor")
_SHOWN = 3
_NUM_THREADS = 16  # that ask for sizes of files, on storage where an answer takes a while
_log = logging.getLogger(__name__)


# When sets are opened


def require_facts(images: FeatureSet) -> None:
    """Check that the manifest of an image set says what reading needs.

    Raises:
        DataError: Naming what is missing.
    """
    manifest = images.manifest
    sides = ("height_px", "width_px")
    found: list[tuple[str, Any]] = [
        *((f"model.{name}", manifest.model.get(name)) for name in ("channels", "downsampling")),
        ("policy.resolution_px", manifest.policy.get("resolution_px")),
        *((f"buckets[{i}].{side}", one.get(side)) for i, one in enumerate(manifest.buckets) for side in sides),
        ("buckets", len(manifest.buckets)),
    ]
    for name, value in found:
        if type(value) is not int or value < 1:
            raise DataError(
                f"{images.root / MANIFEST}: expected a whole number above 0 as {name}, found {value!r}; extract the "
                "set again, or import it again"
            )


def require_samples(
    root: Path, data: Data, images: FeatureSet, texts: Mapping[str, FeatureSet], joined: Joined
) -> None:
    """Check that there is something to train on.

    Raises:
        DataError: If every bucket is empty.
    """
    counts = joined.counts
    if counts.samples:
        return
    if not counts.images:
        raise DataError(
            f"{images.root}: expected images, found none: all {len(images.manifest.buckets)} buckets are empty; "
            f"`pixart inspect {images.root}` says why its rows were rejected"
        )
    if counts.left_out == counts.images:
        raise DataError(f"{root}: none of {counts.images} images matches data.where = {data.where!r}; change it")
    held = " and ".join(f"{name} {len(one)}" for name, one in texts.items())
    raise DataError(
        f"{root}: {data.image_set} holds {len(images)} samples and {held}, with no key in common; extract both "
        "from the same images"
    )


def require_alike(first: Portion, other: Portion) -> None:
    """Check that batches of two datasets can follow each other in training.

    Raises:
        ConfigError: Naming what differs.
    """
    facts = [
        {
            "the text encoder": encoder(one.mixture.main) if one.mixture.sets else None,
            "the resolution": one.images.manifest.policy["resolution_px"],
            "the image encoder": encoder(one.images),
            "the latents": {name: one.images.manifest.model.get(name) for name in _LATENTS},
            "the bucket table": [(b.ratio, b.height_px, b.width_px) for b in one.buckets],
        }
        for one in (first, other)
    ]
    for what, wanted in facts[0].items():
        if facts[1][what] != wanted:
            raise ConfigError(
                f"data.mix: {other.images.root.parent}: expected {what} of {first.images.root.parent}, {wanted}, found "
                f"{facts[1][what]}; extract it with the same settings, or leave it out"
            )


# When a model is to be trained


def require_model(portion: Portion, model: Model) -> None:
    """Check that a model fits a dataset.

    Raises:
        ConfigError: Naming the key of the job file and the feature set that disagree.
        DataError: If the manifest does not say how latents are scaled.
    """
    images, facts = portion.images, portion.images.manifest.model
    _require_condition(portion, model)
    wanted = [("in_channels", model.in_channels, images, "channels")]
    if model.condition == "caption":
        wanted.append(("caption_width", model.caption_width, portion.mixture.main, "width"))
    for key, value, features, fact in wanted:
        found = features.manifest.model.get(fact)
        if value != found:
            raise ConfigError(
                f"model.{key}: expected {found}, the {fact} of {features.root}, got {value}; "
                f"set model.{key} = {found} or choose other features"
            )
    cells = images.manifest.policy["resolution_px"] // facts["downsampling"]
    if model.base_size != cells:
        raise ConfigError(
            f"model.base_size: expected {cells} for the features in {images.root}, got {model.base_size}; "
            f"set model.base_size = {cells}, and at 1024 px model.interpolation_scale = 2"
        )
    for bucket in portion.buckets:
        sides = (bucket.height_px // facts["downsampling"], bucket.width_px // facts["downsampling"])
        if any(side % model.patch for side in sides):
            raise ConfigError(
                f"model.patch: expected a divisor of {sides[0]} and {sides[1]}, the latent cells of bucket "
                f"{bucket.ratio} of {images.root}, got {model.patch}; set model.patch = 2 or extract other buckets"
            )
    _require_scale(images)


def require_buckets(portions: Sequence[Portion], data: Data) -> None:
    """Check that every bucket with samples holds a batch of them; where `data.small_buckets` allows less, tell of it.

    Raises:
        ConfigError: Naming the buckets, and the ways out.
    """
    size = data.batch_size
    counts = [(one.buckets[i].ratio, int(n)) for one in portions for i, n in enumerate(one.order.bucket_counts) if n]
    small = sorted(((ratio, n) for ratio, n in counts if n < size), key=lambda one: one[1])
    if not small:
        return
    if data.small_buckets == "carry":
        told = ", ".join(f"{ratio} with {n} (up to {_most_times(n, size)} times)" for ratio, n in small[:_SHOWN])
        _log.info(
            "data.small_buckets: batches of %d hold a sample more than once in %d of %d buckets: %s%s",
            size, len(small), len(counts), told, ", ..." if small[_SHOWN:] else "",
        )  # fmt: skip
        return
    shown = ", ".join(f"{ratio} with {n}" for ratio, n in small[:_SHOWN]) + (", ..." if small[_SHOWN:] else "")
    ways = [f"lower data.batch_size to {min(n for _, n in small)}"]
    if len(small) < len(counts):
        ways.append(f"leave them out with data.where = {_without([ratio for ratio, _ in small], data.where)}")
    where = ", ".join(str(one.images.root) for one in portions)
    raise ConfigError(
        f"data.batch_size: expected {size} samples or more in every bucket of {where}, found fewer in {len(small)} of "
        f"{len(counts)}: {shown}; "
        f'{", ".join(ways)}, or let their batches hold samples more than once: data.small_buckets = "carry"'
    )


def require_shards(portions: Sequence[Portion], data: Data) -> None:
    """Check that the shards on local disks are as long as their manifests say: one question to the disk for each.

    Raises:
        DataError: Naming the first that is not and what it lost. Where samples may be skipped, that is only told, but
            for buckets that lost them all.
    """
    gone: list[str] = []
    for one in portions:
        wrong = [_require_whole(features, data) for features in (one.images, *one.mixture.sets)]
        if any(wrong):
            gone += _gone(one, wrong)
    if not gone:
        return
    held = sum(int(np.count_nonzero(one.order.bucket_counts)) for one in portions)
    ways = ["copy the shards named above again"]
    if len(gone) < held:
        ways.append(f"leave them out, in a new run.output, with data.where = {_without(gone, data.where)}")
    where = ", ".join(str(one.images.root) for one in portions)
    shown = ", ".join(gone[:_SHOWN]) + (", ..." if gone[_SHOWN:] else "")
    raise DataError(
        f"data.damaged: expected samples to take the place of those lost in every bucket of {where}, found none in "
        f"{len(gone)} of {held}: {shown}; {', or '.join(ways)}"
    )


# The parts


def _most_times(count: int, size: int) -> int:
    """Return how often a batch can hold one sample of a bucket of so many: the rounds of the bucket that it touches."""
    return -(-(size + count - math.gcd(count, size)) // count)


def _require_whole(features: FeatureSet, data: Data) -> dict[int, int | None]:
    """Return the shards of a set that are not whole, and their lengths, told of if samples may be skipped; or raise."""
    wrong = {} if is_remote(features.root) else dict(_cut_shards(features))
    if not wrong:
        return {}
    number, found = next(iter(wrong.items()))
    more = f" ({len(wrong) - 1} more shards are not whole either)" if wrong.keys() - {number} else ""
    said = f"{_cut(features, number, found)}{more}"
    if data.damaged == "fail":
        raise DataError(
            f"{said}; copy it again, or make it again and start a new run.output, or set data.damaged = 'skip'; "
            f"`pixart verify {features.root}` names all that is lost"
        )
    _log.warning("%s; what is lost is skipped", said)
    return wrong


def _gone(portion: Portion, wrong: Sequence[Mapping[int, int | None]]) -> list[str]:
    """Return the buckets that have samples, none of which lies in what is left of the shards.

    Args:
        portion: The dataset.
        wrong: Of its image set and each text set, the shards that are not whole, and their lengths.
    """
    images, *texts = (
        _lost(one, shards, bool(portion.flip))
        for one, shards in zip((portion.images, *portion.mixture.sets), wrong, strict=True)
    )
    lost = images[portion.joined.images]
    if texts:  # a sample that has one text left may be drawn with it
        pairs = zip(texts, portion.joined.texts, strict=True)  # `NONE`, above all numbers, is lost as well
        lost |= np.all([np.append(one, True)[np.minimum(column, len(one))] for one, column in pairs], axis=0)
    counts = portion.order.bucket_counts
    ends = np.cumsum(counts)
    return [
        bucket.ratio
        for bucket, first, end in zip(portion.buckets, ends - counts, ends, strict=True)
        if first < end and lost[first:end].all()
    ]


def _lost(features: FeatureSet, shards: Mapping[int, int | None], mirrored: bool) -> npt.NDArray[np.bool_]:
    """Return which samples of a set lie beyond the end of their shard; (entries,).

    Args:
        features: The set.
        shards: Those that are not whole, and their lengths.
        mirrored: Whether a sample's mirrored tensor, where there is one, will do as well.
    """
    lost = np.zeros(len(features.entries), np.bool_)
    for number, size_bytes in shards.items():
        own = np.flatnonzero(features.entries["shard"] == number)
        entries = features.entries[own]
        starts = entries["offset"]
        if mirrored and features.manifest.kind == "image":
            there = entries["flipped_offset"] > 0
            starts = np.where(there, np.minimum(starts, entries["flipped_offset"]), starts)
        lost[own] = starts + entries["size"] > (size_bytes or 0)
    return lost


def _require_condition(portion: Portion, model: Model) -> None:
    """Check that the dataset was opened for what the model is conditioned on."""
    if model.condition == "caption":
        portion.mixture.require_texts()
    elif portion.labels is None:
        raise ConfigError(
            "model.condition: expected 'caption' for features that were opened with captions, got 'class'; open them "
            "with model.num_classes"
        )
    elif portion.labels.num_classes != model.num_classes:
        raise ConfigError(
            f"model.num_classes: expected {portion.labels.num_classes}, with which the features were opened, got "
            f"{model.num_classes}; make them the same"
        )


def _require_scale(images: FeatureSet) -> None:
    facts = images.manifest.model
    scale, shift = facts.get("scaling_factor"), facts.get("shift_factor") or 0.0
    for name, value, low in (("a scaling_factor above 0", scale, 0.0), ("a number as shift_factor", shift, -math.inf)):
        good = isinstance(value, int | float) and not isinstance(value, bool) and low < value < math.inf
        if not good:
            raise DataError(
                f"{images.root / MANIFEST}: expected {name} under model, the VAE's own, found {value!r}; extract the "
                "set again, or, of imported features, import it again with image.scaling_factor"
            )


def _without(ratios: Iterable[str], where: str | None) -> str:
    """Return a `data.where` that leaves buckets out, and what `where` does."""
    names = sorted(set(ratios), key=float)
    query = f'bucket != "{names[0]}"'
    if names[1:]:
        query = f"bucket not in ({', '.join(json.dumps(name) for name in names)})"
    return narrowed(where, query)


def _cut_shards(features: FeatureSet) -> Iterator[tuple[int, int | None]]:
    """Yield the numbers of shards that are not as long as the manifest says, and their lengths; None of absent ones."""
    shards = features.manifest.shards
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sizes") as pool:
        sizes = pool.map(partial(_size_bytes, features.root), (str(one["path"]) for one in shards))
        for number, (shard, size_bytes) in enumerate(zip(shards, sizes, strict=True)):
            if size_bytes != shard["size_bytes"]:
                yield number, size_bytes


def _size_bytes(root: Path, name: str) -> int | None:
    try:
        return retrying((root / name).stat, root / name, "read").st_size
    except FileNotFoundError:
        return None


def _cut(features: FeatureSet, number: int, found: int | None) -> str:
    """Say how long a shard is, and which samples it lacks."""
    shard = features.manifest.shards[number]
    entries = features.entries[features.entries["shard"] == number]
    ends = entries["offset"]
    if features.manifest.kind == "image":
        ends = np.maximum(ends, entries["flipped_offset"])
    lost = entries["row"][ends + entries["size"] > (found or 0)]
    what = "no such file" if found is None else f"{found:,}"
    said = f"{features.root / str(shard['path'])}: expected {shard['size_bytes']:,} bytes, found {what}"
    if not len(lost):
        return said
    return f"{said}: {len(lost)} of its {len(entries)} samples are lost, {Names(features, lost[:1]).keys()[0]} first"
