"""The training data: image and text features joined by key, in batches whose order is known in advance.

An epoch holds every sample once. Its order is a pure function of (seed, epoch): random numbers are the raw output of
numpy's Philox generator, which numpy keeps stable between versions, and sorting them shuffles. A batch holds samples of
one bucket; where a bucket does not divide by the batch size, its last batch of the epoch is smaller. So any step of any
epoch can be named, and a run continues where it stopped.
"""

import contextlib
import logging
import zlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pixart_data.buckets import Bucket
from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet, feature_sets, read_manifest, tensor_shape
from pixart_model.config import Data, Model

_ORDER_OF_ROWS, _ORDER_OF_BATCHES = 0, 1
_PLACE_COLUMNS = ["key", "shard", "offset_bytes", "size_bytes", "crc32"]
_IMAGE_COLUMNS = [*_PLACE_COLUMNS, "bucket", "height_px", "width_px", "original_height_px", "original_width_px"]
_TEXT_COLUMNS = [*_PLACE_COLUMNS, "num_tokens"]
_log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """How the two feature sets fit together, in samples."""

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
    """Matched samples of an image set and a text set. `open_dataset` makes one.

    Attributes:
        counts: What matched and what did not.
        images: The image feature set.
        texts: The text feature set.
    """

    def __init__(self, images: FeatureSet, texts: FeatureSet, data: Data) -> None:
        self.images, self.texts, self.data = images, texts, data
        places = pc.index_in(images.index["key"], value_set=texts.index["key"])
        matched = pc.is_valid(places)
        table = images.index.filter(matched)
        self._image = _columns(
            table, ("offset_bytes", "size_bytes", "crc32", "original_height_px", "original_width_px")
        )
        self._image |= _columns(table, ("height_px", "width_px"))
        self._keys, self._image_shards = table["key"], table["shard"]
        text = texts.index.take(places.filter(matched))
        self._text = _columns(text, ("offset_bytes", "size_bytes", "crc32", "num_tokens"))
        self._text_shards = text["shard"]
        buckets = table["bucket"].combine_chunks().dictionary_encode()
        self._bucket_of: Rows = buckets.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        self._ratios = [float(name) for name in buckets.dictionary.to_pylist()]
        self.counts = Counts(table.num_rows, len(images) - table.num_rows, len(texts) - table.num_rows)

    def __len__(self) -> int:
        return self.counts.matched

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the same for all."""
        counts = np.bincount(self._bucket_of)
        return int(np.sum(-(-counts // self.data.batch_size)))

    def facts(self) -> dict[str, Any]:
        """Return where the features come from, for a checkpoint to keep: encoders, policies, digests and counts."""
        sets = {"image": self.images, "text": self.texts}
        facts: dict[str, Any] = {
            kind: {"model": s.manifest.model, "policy": s.manifest.policy, "index_sha256": s.manifest.index_sha256}
            for kind, s in sets.items()
        }
        return facts | {"resolution_px": self.images.manifest.policy["resolution_px"], "counts": asdict(self.counts)}

    def require(self, model: Model) -> None:
        """Check that a model fits the features.

        Raises:
            ConfigError: Naming the key of the job file and the feature set that disagree.
        """
        wanted = (
            ("caption_width", model.caption_width, self.texts, "width"),
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
        place = self.texts.manifest.model.get("null")
        if not place:
            raise DataError(f"{self.texts.root}: no features of the empty caption; extract the text set again")
        tokens = np.empty(tensor_shape(place, self.texts.manifest), np.int16)
        _read_checked(self.texts, place["path"], place, "the empty caption", tokens)
        return torch.from_numpy(tokens).view(torch.bfloat16)  # (n, D)

    def first_captions(self, count: int) -> list[Tensor]:
        """Return the captions of the first samples in the index, bf16 (n_i, D) each."""
        captions = []
        for row in range(min(count, len(self))):
            shape = tensor_shape({"num_tokens": int(self._text["num_tokens"][row])}, self.texts.manifest)
            captions.append(np.empty(shape, np.int16))
            self._read_caption(row, self._keys[row].as_py(), captions[-1])
        return [torch.from_numpy(caption).view(torch.bfloat16) for caption in captions]

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
                        ahead.append((place, pool.submit(self.read, rows)))
                    place, future = ahead.popleft()
                    yield place, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def read(self, rows: Sequence[int] | Rows) -> Batch:
        """Read samples of one bucket, checking every tensor against the checksum in the index.

        Raises:
            DataError: Naming the sample that is damaged or missing.
        """
        keys = [self._keys[int(row)].as_py() for row in rows]
        lengths = self._text["num_tokens"][rows]  # (B,)
        moments = np.empty((len(rows), *self._moments_shape(int(rows[0]))), np.float16)
        text = np.empty((len(rows), lengths.max(), self.texts.manifest.model["width"]), np.int16)
        for row, key, one_moments, one_text in zip(rows, keys, moments, text, strict=True):
            self._read_moments(int(row), key, one_moments)
            num_tokens = self._text["num_tokens"][row]
            self._read_caption(int(row), key, one_text[:num_tokens])
            one_text[num_tokens:] = 0
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
        self.texts.close()

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

    def _read_moments(self, row: int, key: str, out: npt.NDArray[np.float16]) -> None:
        place = {name: int(self._image[name][row]) for name in ("offset_bytes", "size_bytes", "crc32")}
        _read_checked(self.images, self._image_shards[row].as_py(), place, key, out)

    def _read_caption(self, row: int, key: str, out: npt.NDArray[np.int16]) -> None:
        place = {name: int(self._text[name][row]) for name in ("offset_bytes", "size_bytes", "crc32")}
        _read_checked(self.texts, self._text_shards[row].as_py(), place, key, out)


def open_dataset(data: Data) -> Dataset:
    """Open the features that a job file names and join them by key.

    Raises:
        ConfigError: If there is no such set.
        DataError: If a set is not finished or of the wrong kind, or the two have no sample in common.
    """
    root = Path(data.features)
    images = _open(root / data.image_set, "image", "F16", _IMAGE_COLUMNS)
    texts = _open(root / data.text_set, "text", "BF16", _TEXT_COLUMNS)
    dataset = Dataset(images, texts, data)
    counts = dataset.counts
    if not counts.matched:
        raise DataError(
            f"{root}: {data.image_set} holds {len(images)} samples and {data.text_set} {len(texts)}, with no key in "
            "common; extract both from the same images"
        )
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


def _columns(table: pa.Table, names: Sequence[str]) -> dict[str, Rows]:
    return {name: table[name].to_numpy().astype(np.int64) for name in names}


def _read_checked(
    features: FeatureSet, shard: str, place: dict[str, Any], key: str, out: npt.NDArray[np.float16 | np.int16]
) -> None:
    """Read a tensor into `out`, which is contiguous."""
    if out.nbytes != int(place["size_bytes"]):
        tensor, dtype = features.manifest.tensor, features.manifest.dtype
        found = f"found {place['size_bytes']} bytes"
        raise DataError(f"{features.root}: {key}: expected {tensor} {out.shape} in {dtype}, {found}")
    data = out.reshape(-1).view(np.uint8).data
    features.read_into(shard, int(place["offset_bytes"]), data)
    if zlib.crc32(data) != int(place["crc32"]):
        raise DataError(
            f"{features.root / shard}: sample {key} is damaged: its checksum differs from the index; "
            f"`pixart verify {features.root}` names all such samples"
        )


def _shuffled(count: int, seed: int, epoch: int, purpose: int) -> Rows:
    key = np.random.SeedSequence([seed, epoch, purpose]).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64)
