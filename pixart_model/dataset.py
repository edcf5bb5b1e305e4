"""The training data: image and text features joined by key, in batches whose order is known in advance.

An epoch holds every sample once. Its order is a pure function of (seed, epoch): random numbers are the raw output of
numpy's Philox generator, which numpy keeps stable between versions, and sorting them shuffles. A batch holds samples of
one bucket; where a bucket does not divide by the batch size, its last batch of the epoch is smaller. So any step of any
epoch can be named, and a run continues where it stopped.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart_data.buckets import Bucket
from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet, feature_sets, read_manifest, tensor_shape
from pixart_model.config import Data, Model
from pixart_model.mixture import Mixture
from pixart_model.places import PLACE_COLUMNS, Places, Rows, columns, read_checked

_ORDER_OF_ROWS, _ORDER_OF_BATCHES = 0, 1
_IMAGE_COLUMNS = [*PLACE_COLUMNS, "bucket", "height_px", "width_px", "original_height_px", "original_width_px"]
_TEXT_COLUMNS = [*PLACE_COLUMNS, "num_tokens"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """How the image set and the text sets fit together, in samples."""

    matched: int
    images_without_text: int
    texts_without_image: int


@dataclass(frozen=True)
class Position:
    """A step of training: the batch `step` of an epoch."""

    seed: int
    epoch: int
    step: int


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket. B samples, L tokens of the longest caption, sides in latent cells.

    Attributes:
        keys: B keys.
        moments: fp16 (B, 2, C, H, W): posterior mean and standard deviation, unscaled.
        text: bf16 (B, L, D), zeros after a caption's end.
        mask: bool (B, L), True on true tokens.
        size_px: fp32 (B, 2): original height and width.
        ratio: fp32 (B,): height / width of the bucket, with its two decimals.
    """

    keys: list[str]
    moments: Tensor
    text: Tensor
    mask: Tensor
    size_px: Tensor
    ratio: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(self.keys, **tensors)


@dataclass(frozen=True)
class Plan:
    """The batches of an epoch: batch i holds the samples `rows[starts[i] : ends[i]]`."""

    rows: Rows
    starts: Rows
    ends: Rows

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, step: int) -> Rows:
        return self.rows[self.starts[step] : self.ends[step]]


def epoch_plan(bucket_of: Rows, batch_size: int, seed: int, epoch: int) -> Plan:
    """Return the batches of an epoch.

    Args:
        bucket_of: The bucket number of every sample; samples are named by their place in it.
        batch_size: Of all batches but the last of each bucket.
        seed: Not negative, like `epoch`; the plan depends on these and on nothing else.
        epoch: From 0.
    """
    order = _shuffled(len(bucket_of), seed, epoch, _ORDER_OF_ROWS)
    rows = order[np.argsort(bucket_of[order], kind="stable")]  # shuffled inside each bucket
    counts = np.bincount(bucket_of)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([np.arange(low, high, batch_size) for low, high in zip(bounds, bounds[1:], strict=False)])
    ends = np.minimum(starts + batch_size, bounds[np.searchsorted(bounds, starts, side="right")])
    turn = _shuffled(len(starts), seed, epoch, _ORDER_OF_BATCHES)
    return Plan(rows, starts[turn], ends[turn])


class Dataset:
    """Matched samples of an image set and one or more text sets. `open_dataset` makes one.

    Attributes:
        counts: What matched and what did not.
        images: The image feature set.
        mixture: The text feature sets, matched with the samples.
    """

    def __init__(self, images: FeatureSet, mixture: Mixture, data: Data) -> None:
        self.images, self.mixture, self.data = images, mixture, data
        table = images.index.filter(mixture.match(images.index["key"]))
        self._image = columns(table, ("original_height_px", "original_width_px", "height_px", "width_px"))
        self._keys, self._moments = table["key"], Places(images, table)
        buckets = table["bucket"].combine_chunks().dictionary_encode()
        self._bucket_of: Rows = buckets.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        self._ratios = [float(name) for name in buckets.dictionary.to_pylist()]
        self.counts = Counts(table.num_rows, len(images) - table.num_rows, mixture.num_unmatched())

    def __len__(self) -> int:
        return self.counts.matched

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the same for all."""
        counts = np.bincount(self._bucket_of)
        return int(np.sum(-(-counts // self.data.batch_size)))

    def facts(self) -> dict[str, Any]:
        """Return where the features come from, for a checkpoint to keep: encoders, policies, digests and counts."""
        sets = {"image": self.images, "text": self.mixture.main}
        facts: dict[str, Any] = {
            kind: {"model": s.manifest.model, "policy": s.manifest.policy, "index_sha256": s.manifest.index_sha256}
            for kind, s in sets.items()
        }
        if len(self.mixture.sets) > 1:
            facts["text_mix"] = {
                name: {"share": share, "samples": count} for name, (share, count) in self.mixture.shares().items()
            }
        return facts | {"resolution_px": self.images.manifest.policy["resolution_px"], "counts": asdict(self.counts)}

    def require(self, model: Model) -> None:
        """Check that a model fits the features.

        Raises:
            ConfigError: Naming the key of the job file and the feature set that disagree.
        """
        wanted = (
            ("caption_width", model.caption_width, self.mixture.main, "width"),
            ("in_channels", model.in_channels, self.images, "channels"),
        )
        for key, value, features, fact in wanted:
            found = features.manifest.model.get(fact)
            if value != found:
                raise ConfigError(
                    f"model.{key}: expected {found}, the {fact} of {features.root}, got {value}; "
                    f"set model.{key} = {found} or choose other features"
                )
        cells = self.images.manifest.policy["resolution_px"] // self.images.manifest.model["downsampling"]
        if model.base_size != cells:
            raise ConfigError(
                f"model.base_size: expected {cells} for the features in {self.images.root}, got {model.base_size}; "
                f"set model.base_size = {cells}, and at 1024 px model.interpolation_scale = 2"
            )

    def null_caption(self) -> Tensor:
        """Return the features of the empty caption, bf16 (n, D).

        Raises:
            DataError: If the text set has none, or they are damaged.
        """
        texts = self.mixture.main
        place = texts.manifest.model.get("null")
        if not place:
            raise DataError(f"{texts.root}: no features of the empty caption; extract the text set again")
        tokens = np.empty(tensor_shape(place, texts.manifest), np.int16)
        read_checked(texts, place["path"], place, "the empty caption", tokens)
        return torch.from_numpy(tokens).view(torch.bfloat16)  # (n, D)

    def first_captions(self, count: int) -> list[Tensor]:
        """Return captions of the first samples in the index, bf16 (n_i, D) each; the same ones each time."""
        captions = []
        for row in range(min(count, len(self))):
            text, _ = self.mixture.read([row], [self._keys[row].as_py()], seed=0, epoch=0)
            captions.append(torch.from_numpy(text[0]).view(torch.bfloat16))
        return captions

    def commonest_bucket(self) -> Bucket:
        """Return the bucket with the most samples."""
        number = int(np.argmax(np.bincount(self._bucket_of)))
        row = int(np.argmax(self._bucket_of == number))
        height_px, width_px = (int(self._image[name][row]) for name in ("height_px", "width_px"))
        return Bucket(f"{self._ratios[number]:.2f}", height_px, width_px)

    def plan(self, seed: int, epoch: int) -> Plan:
        """Return the batches of an epoch."""
        return epoch_plan(self._bucket_of, self.data.batch_size, seed, epoch)

    def batches(self, position: Position) -> Generator[tuple[Position, Batch], None, None]:
        """Yield batches from a position on, without end, read ahead by a few threads.

        Raises:
            DataError: Where a sample is damaged, naming it.
        """
        ahead: deque[tuple[Position, Future[Batch]]] = deque()
        pool = ThreadPoolExecutor(self.data.num_threads, thread_name_prefix="read")
        with contextlib.closing(self._positions(position)) as positions:
            try:
                while True:
                    while len(ahead) <= self.data.num_prefetch:
                        place, rows = next(positions)
                        ahead.append((place, pool.submit(self.read, rows, place.seed, place.epoch)))
                    place, future = ahead.popleft()
                    yield place, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def read(self, rows: Sequence[int] | Rows, seed: int = 0, epoch: int = 0) -> Batch:
        """Read samples of one bucket, checking every tensor against the checksum in the index.

        Args:
            seed: Of the run; it and the epoch decide which of several texts a sample gets.
            epoch: From 0.

        Raises:
            DataError: Naming the sample that is damaged or missing.
        """
        keys = [self._keys[int(row)].as_py() for row in rows]
        moments = np.empty((len(rows), *self._moments_shape(int(rows[0]))), np.float16)
        for row, key, one_moments in zip(rows, keys, moments, strict=True):
            self._moments.read(int(row), key, one_moments)
        text, lengths = self.mixture.read(rows, keys, seed, epoch)  # (B, L, D), (B,)
        mask = np.arange(text.shape[1]) < lengths[:, None]
        sizes = [self._image[name][rows] for name in ("original_height_px", "original_width_px")]
        ratios = [self._ratios[self._bucket_of[row]] for row in rows]
        return Batch(
            keys,
            torch.from_numpy(moments),  # (B, 2, C, H, W)
            torch.from_numpy(text).view(torch.bfloat16),  # (B, L, D)
            torch.from_numpy(mask),  # (B, L)
            torch.from_numpy(np.stack(sizes, axis=1)).float(),  # (B, 2)
            torch.tensor(ratios, dtype=torch.float32),  # (B,)
        )

    def close(self) -> None:
        """Close the shards."""
        self.images.close()
        self.mixture.close()

    def _positions(self, start: Position) -> Generator[tuple[Position, Rows], None, None]:
        epoch, first = start.epoch, start.step
        while True:
            plan = self.plan(start.seed, epoch)
            for step in range(first, len(plan)):
                yield Position(start.seed, epoch, step), plan[step]
            epoch, first = epoch + 1, 0

    def _moments_shape(self, row: int) -> tuple[int, ...]:
        canvas = {name: int(self._image[name][row]) for name in ("height_px", "width_px")}
        return tensor_shape(canvas, self.images.manifest)


def open_dataset(data: Data) -> Dataset:
    """Open the features that a job file names and join them by key.

    Raises:
        ConfigError: If there is no such set.
        DataError: If a set is not finished or of the wrong kind, or images and texts have no sample in common.
    """
    root = Path(data.features)
    images = _open(root / data.image_set, "image", "F16", _IMAGE_COLUMNS)
    texts = {name: _open(root / name, "text", "BF16", _TEXT_COLUMNS) for name in data.texts}
    dataset = Dataset(images, Mixture(texts, data.texts), data)
    counts = dataset.counts
    if not counts.matched:
        held = " and ".join(f"{name} {len(one)}" for name, one in texts.items())
        raise DataError(
            f"{root}: {data.image_set} holds {len(images)} samples and {held}, with no key in common; extract both "
            "from the same images"
        )
    if len(texts) > 1:
        shares = dataset.mixture.shares().items()
        held = ", ".join(f"{name} {share:.0%} (of {count} samples)" for name, (share, count) in shares)
        _log.info("%s: texts are drawn from %s", root, held)
    _log.info(
        "%s: %d samples; %d images without text, %d texts without image",
        root, counts.matched, counts.images_without_text, counts.texts_without_image,
    )  # fmt: skip
    return dataset


def pad(captions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return captions (n_i, D) as one tensor (B, L, D), zeros after each end, and its mask (B, L)."""
    text = torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True)  # (B, L, D)
    lengths = torch.tensor([len(caption) for caption in captions], device=text.device)  # (B,)
    mask = torch.arange(text.shape[1], device=text.device) < lengths[:, None]  # (B, L)
    return text, mask


def _open(root: Path, kind: str, dtype: str, columns: list[str]) -> FeatureSet:
    if not root.is_dir():
        there = ", ".join(feature_sets(root.parent)) or "none"
        raise ConfigError(f"data.{kind}_set: no feature set {root.name} in {root.parent}; sets there: {there}")
    manifest = read_manifest(root)
    found = (manifest.kind, manifest.dtype)
    if found != (kind, dtype):
        raise DataError(
            f"{root}: expected {kind} features in {dtype}, found {found[0]} in {found[1]}; name another set"
        )
    return FeatureSet(root, columns)


def _shuffled(count: int, seed: int, epoch: int, purpose: int) -> Rows:
    key = np.random.SeedSequence([seed, epoch, purpose]).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64)
