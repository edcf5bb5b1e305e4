"""The training data: image and text features joined by key, in batches whose order is known in advance.

The order is an endless sequence of batches (`orders`), a pure function of the seed; with several datasets, each batch
comes from one of them (`orders.Mix`). A batch holds samples of one bucket and is always full. So any batch can be named
by its number, and a run continues where it stopped.
"""

import hashlib
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pixart_data.buckets import Bucket
from pixart_data.errors import ConfigError, DataError
from pixart_data.remotes import open_set
from pixart_data.retries import retrying
from pixart_data.shards import FeatureSet, feature_sets, read_manifest
from pixart_data.storage import is_remote, location
from pixart_model import refusals
from pixart_model.batches import HostBatch, Names
from pixart_model.buffers import Buffers
from pixart_model.config import Data
from pixart_model.joins import EntriesFile
from pixart_model.labels import labels_of, read_labels, require_labelled
from pixart_model.loader import Batches, read_ahead
from pixart_model.mixture import Mixture, encoder
from pixart_model.orders import Integers, Mix, Order, dealt
from pixart_model.plan import cached_plan
from pixart_model.portion import Located, Portion
from pixart_model.quality import Quality, shuffle_quality
from pixart_model.sizes import Model
from pixart_model.subset import chosen

CACHE = "pixart-toolkit"
_PLANS = "plans"
_REMOTE_RUN = 8  # samples; see `data.run_length`
_QUALITY_BATCHES = 64
_LOOK_ROWS = 1 << 16
_DIGITS = 12  # of a digest, enough to tell sets apart
_log = logging.getLogger(__name__)


class Dataset:
    """Matched samples of one or more datasets. `open_dataset` makes one; it can be pickled.

    Attributes:
        portions: Of each dataset that is trained on, the sets and their order.
        data: What the job file says.
        seed: Decides the order, the text of a sample and whether it is mirrored.
    """

    def __init__(self, portions: list[Portion], data: Data, seed: int) -> None:
        self.portions, self.data, self.seed = portions, data, seed
        self._labels = [_labels_digest(one) for one in portions if one.labels is not None]
        self._mix = Mix([data.weight, *(one.weight for one in data.mix)], seed)

    def __len__(self) -> int:
        return sum(len(one.joined) for one in self.portions)

    @property
    def images(self) -> FeatureSet:
        """The image set, of the first dataset."""
        return self.portions[0].images

    @property
    def mixture(self) -> Mixture:
        """The text sets, of the first dataset."""
        return self.portions[0].mixture

    def num_batches(self, epoch: int = 0) -> int:
        """Return how many batches an epoch of each dataset has, together; epochs differ by a few."""
        return sum(one.order.num_batches(epoch) for one in self.portions)

    def epochs(self, num_batches: int) -> list[float]:
        """Return how often so many batches go through each dataset."""
        weights = self._mix.weights
        counts = [int(num_batches * weight / sum(weights)) for weight in weights]
        return [one.order.epoch_of(count) for one, count in zip(self.portions, counts, strict=True)]

    def batches(
        self, step: int = 0, rank: int = 0, world: int = 1, pinned: bool = False
    ) -> Generator[HostBatch, None, None]:
        """Yield batches from a position on, without end, read ahead by a few threads.

        A batch is valid until the next one is asked for; `HostBatch.to` makes one that lasts.

        Args:
            step: The first batch of the global order, the same for all ranks.
            rank: Of the process; it gets batches `step + rank`, `step + rank + world` and so on.
            world: How many processes share the order.
            pinned: Read into page-locked memory, for a GPU; needs CUDA.

        Raises:
            DataError: Where a sample is damaged, as `data.damaged` has it.
            JobError: If the storage fails.
        """
        data = self.data
        return read_ahead(
            dealt(step, rank, world), self._expect, self._read, data.num_threads, data.num_prefetch, pinned
        )

    def view(self) -> Batches:
        """Return the same batches as a map-style dataset, for the workers of a `torch.utils.data.DataLoader`."""
        return Batches(self)

    def read(self, number: int) -> HostBatch:
        """Read a batch of the global order into memory of its own; raises as `batches` does."""
        portion, own = self._mix.locate(number)
        return self.portions[portion].read(number, self.portions[portion].locate(own))

    def _all_over(self, count: int) -> Integers:
        """Return samples from all over the first dataset, as many as there are if these are fewer."""
        samples = len(self.portions[0].joined)
        count = min(count, samples)
        return np.arange(count) * samples // max(count, 1)

    def _expect(self, number: int) -> tuple[Portion, Located]:
        dataset, own = self._mix.locate(number)
        portion = self.portions[dataset]
        located = portion.locate(own)
        portion.expect(located)
        return portion, located

    def _read(self, number: int, place: tuple[Portion, Located], memory: Buffers) -> HostBatch:
        portion, located = place
        return portion.read(number, located, memory)

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, by label, where they are folders; else none."""
        labels = self.portions[0].labels
        return () if labels is None else labels.names

    def null_caption(self) -> Tensor:
        """Return the features of the empty caption, bf16 (n, D).

        Raises:
            ConfigError: If the dataset was opened with classes.
            DataError: If the text set has none, or they are damaged.
        """
        return self.mixture.null_caption()

    def first_captions(self, count: int) -> list[Tensor]:
        """Return captions of samples from all over the first dataset, bf16 (n_i, D) each; the same ones each time.

        Raises:
            ConfigError: If the dataset was opened with classes.
            DataError: If one is damaged.
        """
        return self.portions[0].captions(self._all_over(count))

    def first_keys(self, count: int) -> list[str]:
        """Return the keys of the samples that `first_captions` is about."""
        portion = self.portions[0]
        return Names(portion.images, portion.images.entries[portion.joined.images[self._all_over(count)]]["row"]).keys()

    def commonest_bucket(self) -> Bucket:
        """Return the bucket with the most samples."""
        counts = sum(one.order.bucket_counts for one in self.portions)
        return self.portions[0].buckets[int(np.argmax(counts))]

    def quality(self) -> list[Quality]:
        """Return how well the order of each dataset shuffles."""
        return [
            shuffle_quality(
                one.order,
                _QUALITY_BATCHES,
                lambda samples, one=one: one.images.entries[one.joined.images[samples]]["shard"],  # type: ignore[misc]
            )
            for one in self.portions
        ]

    def facts(self) -> dict[str, Any]:
        """Return where the features come from, for a checkpoint to keep: encoders, policies, digests and counts.

        With classes there is no `text`, and `classes` holds their names, where they are folders.
        """
        facts = self.portions[0].facts()
        if len(self.portions) > 1:
            further = zip(self.data.mix, self.portions[1:], strict=True)
            facts["mix"] = [
                {"features": given.features, "weight": given.weight, **portion.facts()} for given, portion in further
            ]
        if self.portions[0].labels is not None:
            facts["classes"] = list(self.classes)
        return facts | {"resolution_px": self.images.manifest.policy["resolution_px"]}

    def order_facts(self) -> dict[str, Any]:
        """Return what decides which samples are in a batch and what is read of them, by the job file's keys; for JSON.

        What changes the conditions that a model is trained under, and not the data, is none of it.
        """
        image_sets = [one.images for one in self.portions]
        data = self.data
        facts: dict[str, Any] = {
            "data.image_set": ", ".join(map(_digest, image_sets)),
            **_latents(self.images),
            **self._conditions(),
            "data.where": data.where,
            "data.batch_size": data.batch_size,
            "data.run_length": _one_or_all([one.order.run_length for one in self.portions]),
            "data.block_rows": data.block_rows,
            "data.flip": data.flip,
        }
        if data.scores is not None:  # what they chose: the table may have been written anew
            facts["data.scores"] = ", ".join(one.choice for one in self.portions)
        if data.mix:
            facts |= {"data.weight": data.weight, "data.mix": [one.weight for one in data.mix]}
        return facts

    def _conditions(self) -> dict[str, Any]:
        """Return what decides the captions or the classes of the samples."""
        if self._labels:
            return {"data.labels": ", ".join(self._labels)}
        text_sets = [features for one in self.portions for features in one.mixture.sets]
        facts: dict[str, Any] = {
            "data.text_set": ", ".join(map(_digest, text_sets)),
            "data.text_set, text encoder": encoder(self.mixture.main),
        }
        if len(self.mixture.sets) > 1:
            facts["data.text_mix"] = {name: round(share, 9) for name, (share, _) in self.portions[0].shares().items()}
        return facts

    def require(self, model: Model) -> None:
        """Check all that can be checked before the first step: that a model can be trained on these features.

        It asks the disk for the size of every shard, so one process of a node is enough to do it.

        Raises:
            ConfigError: Naming the key of the job file and the feature set that disagree.
            DataError: If shards are missing or cut short, or the manifest does not say how latents are scaled.
        """
        refusals.require_model(self.portions[0], model)
        refusals.require_buckets(self.portions, self.data)
        refusals.require_shards(self.portions, self.data)

    def close(self) -> None:
        """Close the shards."""
        for one in self.portions:
            one.close()


def open_dataset(data: Data, seed: int = 0, classes: int | None = None) -> Dataset:
    """Open the features that a job file names and join them by key.

    The plan of which text belongs to which image is made once and kept in `data.cache_dir`.

    Args:
        classes: How many classes there are, for images with classes in place of texts: then every image is a sample,
            and no text set is opened.

    Raises:
        ConfigError: If there is no such set, or what the job file asks for does not fit the sets.
        DataError: If a set is not finished or of the wrong kind, or images and texts have no sample in common.
        JobError: If the folder for plans cannot be written.
    """
    _require_used(data, classes)
    roots = [location(root) for root in (data.features, *(one.features for one in data.mix))]
    portions = [_open_portion(root, data, seed, texts={} if classes else data.texts) for root in roots]
    for other in portions[1:]:
        refusals.require_alike(portions[0], other)
    if classes is not None:
        every = read_labels([one.images for one in portions], data, classes)
        for portion, labels in zip(portions, every, strict=True):
            portion.labels = labels
            require_labelled(labels, portion.images, portion.joined, data)
    return Dataset(portions, data, seed)


def cache_folder(data: Data) -> Path:
    """Return the folder for what can be made again."""
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / CACHE


def _open_portion(root: Path, data: Data, seed: int, texts: Mapping[str, float]) -> Portion:
    images = _open(root / data.image_set, "image", "F16", data)
    refusals.require_facts(images)
    sets = {name: _open(root / name, "text", "BF16", data) for name in texts}
    if data.flip and not _has_flips(images):
        raise ConfigError(
            f"data.flip: {images.root} holds no mirrored images; extract with image.flips = true, or set data.flip = 0"
        )
    mixture = Mixture(sets, texts)
    keep = None if data.where is None else chosen(images, data.where, Path(data.scores) if data.scores else None)
    joined = cached_plan(
        cache_folder(data) / _PLANS,
        _entries(images),
        [_entries(one) for one in mixture.sets],
        len(images.manifest.buckets),
        keep,
    )
    refusals.require_samples(root, data, images, sets, joined)
    run_length = data.run_length or (_REMOTE_RUN if is_remote(root) else 1)
    order = Order(joined.bucket_counts, data.batch_size, seed, run_length, data.block_rows)
    choice = "" if keep is None else hashlib.sha256(np.packbits(keep).data).hexdigest()[:_DIGITS]
    portion = Portion(images, mixture, joined, order, choice, data.flip, data.damaged)
    _tell(root, portion)
    return portion


def _open(root: Path, kind: str, dtype: str, data: Data) -> FeatureSet:
    if not retrying(root.is_dir, root, "read"):
        if not retrying(root.parent.is_dir, root, "read"):
            raise ConfigError(f"data.features: {root.parent}: no such folder; check the path")
        there = ", ".join(feature_sets(root.parent)) or "none"
        advice = "name one of those, or run `pixart extract` with [image]"
        if kind == "text":
            advice = "name one of those, run `pixart extract` with [text], or train on classes (model.condition)"
        raise ConfigError(
            f"data.{kind}_set: no feature set {root.name} in {root.parent}; sets there: {there}; {advice}"
        )
    manifest = read_manifest(root)
    found = (manifest.kind, manifest.dtype)
    if found != (kind, dtype):
        raise DataError(
            f"{root}: expected {kind} features in {dtype}, found {found[0]} in {found[1]}; name another set"
        )
    return open_set(root, cache_folder(data), data.cache_bytes)


def _require_used(data: Data, classes: int | None) -> None:
    """Check that what the job file says of classes is read."""
    given = [name for name in ("labels", "classes") if getattr(data, name) is not None]
    if given and classes is None:
        raise ConfigError(
            f"data.{given[0]}: expected none where a model learns from captions, found {getattr(data, given[0])}; "
            "leave it out, or set model.condition = 'class'"
        )
    if len(given) > 1:
        raise ConfigError(
            "data.classes: expected only where folders are the classes, found data.labels as well; leave one out"
        )


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(values) == 1 else values


def _digest(features: FeatureSet) -> str:
    return f"{features.root.name} ({features.manifest.index_sha256[:_DIGITS]})"


def _latents(images: FeatureSet) -> dict[str, Any]:
    """What latents are of: a manifest may be written anew without its index."""
    model = images.manifest.model
    scales = {f"data.image_set, {name}": float(model.get(name) or 0.0) for name in ("scaling_factor", "shift_factor")}
    return {"data.image_set, VAE": encoder(images), **scales}


def _labels_digest(portion: Portion) -> str:
    labels = labels_of(portion.labels, portion.images, portion.joined) if portion.labels else np.empty(0, np.int32)
    return hashlib.sha256(labels.data).hexdigest()[:_DIGITS]


def _entries(features: FeatureSet) -> EntriesFile:
    return EntriesFile(features.entries_path, features.manifest.entries_sha256)


def _has_flips(images: FeatureSet) -> bool:
    offsets = images.entries["flipped_offset"]
    return any(offsets[start : start + _LOOK_ROWS].any() for start in range(0, len(offsets), _LOOK_ROWS))


def _tell(root: Path, portion: Portion) -> None:
    counts = portion.joined.counts
    if len(portion.mixture.sets) > 1:
        held = ", ".join(
            f"{name} {share:.0%} (of {count:,} samples)" for name, (share, count) in portion.shares().items()
        )
        _log.info("%s: texts are drawn from %s", root, held)
    left_out = f", {counts.left_out:,} left out" if counts.left_out else ""
    if not portion.mixture.sets:
        _log.info("%s: %s samples%s", root, f"{counts.samples:,}", left_out)
        return
    texts = " + ".join(f"{count:,}" for count in counts.texts_without_image)
    _log.info(
        "%s: %s samples; %s images without text, %s texts without image%s",
        root, f"{counts.samples:,}", f"{counts.without_text:,}", texts, left_out,
    )  # fmt: skip
