"""Training batches from feature shards, against the layouts a user would pick instead.

    python -m benchmarks.read_shards [--samples N] [--rounds K] [--json FILE]

The same synthetic features (T5-XXL's width, 256 px buckets) are written in three layouts to a temporary directory:

    shards      this toolkit: tars with an index; positioned reads, every tensor checked against its CRC, 2 threads
    webdataset  our members merged into one tar member per sample, streamed by the `webdataset` library, shuffled
                shard by shard and through a buffer, grouped by shape into batches; one process, no check of the data
    npz         the PixArt-alpha reference: one compressed .npz and one fp32 .npy for each sample, one process

Each gives the same batch: fp16 moments, bf16 text padded to the longest caption, mask. Before anything is timed, one
pass of every reader is compared with what was written, bit by bit. Then they take turns, A B C A B C; a turn is whole
passes for at least a second, from a warm page cache. Other work on the machine disturbs wall time more than CPU time,
so the figure to quote is samples per CPU-second (user and system, all threads), and a ratio is the median of the
ratios inside each round. torch computes with one thread in all readers.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.torch
import torch
import webdataset
from torch import Tensor

from pipelines.features import TEXT_SHARDS, FeatureWriter
from pixart_data.buckets import Bucket, bucket_table
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.shards import FeatureSet, Manifest, seal
from pixart_model import dataset as ours
from pixart_model.config import Data

_WIDTH, _MAX_TOKENS, _CHANNELS = 4096, 120, 4
_RATIOS = ("0.72", "1.00", "1.38", "1.75")
_NUM_CAPTIONS = 64  # different ones: the reference takes 0.3 CPU-seconds to compress one, so its files are copied
_SAMPLES_PER_SHARD = 64
_SHUFFLE_BUFFER = 128  # samples
_MIN_TURN_S = 1.0
_BYTES_PER_SAMPLE = 2_500_000  # all three layouts together

_Shape = tuple[int, ...]


class Batch(NamedTuple):
    """B samples, L tokens of the longest caption: moments (B, 2, C, H, W), text (B, L, D), mask (B, L)."""

    keys: list[str]
    moments: Tensor
    text: Tensor
    mask: Tensor


class Reader(Protocol):
    """One way to read the samples. `num_read` counts them, also those read ahead and never taken."""

    name: str
    num_read: int

    def stream(self) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""


@dataclass(frozen=True)
class Sample:
    """What is written: moments fp16 (2, C, H, W) and the index of a caption, with the bucket they belong to."""

    key: str
    bucket: Bucket
    moments: npt.NDArray[np.float16]
    caption: int


@dataclass(frozen=True)
class Features:
    """The synthetic features.

    Attributes:
        captions: bf16 (120, D) each, as an encoder gives them: positions after the true tokens are not zero.
        num_tokens: True tokens of each caption.
    """

    samples: list[Sample]
    captions: list[Tensor]
    num_tokens: list[int]

    def text(self, sample: Sample) -> Tensor:
        """Return the true tokens of a sample, bf16 (n, D)."""
        return self.captions[sample.caption][: self.num_tokens[sample.caption]]

    def units(self) -> Iterator[tuple[str, list[Sample]]]:
        """Yield the samples of one shard after another, with its name."""
        for start in range(0, len(self.samples), _SAMPLES_PER_SHARD):
            yield f"{start // _SAMPLES_PER_SHARD:05d}", self.samples[start : start + _SAMPLES_PER_SHARD]


def make_features(count: int) -> Features:
    """Return `count` samples: tokens ~ N(85, 25) within 10 to 120, channels of very different scale as in T5."""
    rng = np.random.default_rng(0)
    num_captions = min(count, _NUM_CAPTIONS)
    num_tokens = np.clip(rng.normal(85, 25, num_captions).round(), 10, _MAX_TOKENS).astype(int).tolist()
    scales = rng.lognormal(-2, 0.7, _WIDTH).astype(np.float32)
    captions = []
    for _ in range(num_captions):
        values = rng.standard_normal((_MAX_TOKENS, _WIDTH), np.float32) * scales
        captions.append(torch.from_numpy(values).to(torch.bfloat16))
    buckets = [bucket for bucket in bucket_table(256) if bucket.ratio in _RATIOS]
    samples = []
    for i in range(count):
        bucket = buckets[(i + i // num_captions) % len(buckets)]
        shape = (2, _CHANNELS, bucket.height_px // 8, bucket.width_px // 8)
        moments = rng.standard_normal(shape, np.float32).astype(np.float16)
        samples.append(Sample(f"synthetic/{i:06d}", bucket, moments, i % num_captions))
    return Features(samples, captions, num_tokens)


def write_shards(root: Path, features: Features) -> None:
    """Write the layout of this toolkit as `pixart extract` does: an image set and a text set."""
    image_model = {"channels": _CHANNELS, "downsampling": 8}
    images, texts = [], []
    for unit, samples in features.units():
        image = FeatureWriter(root / "256px", unit, "moments", "F16")
        text = FeatureWriter(root / "text", unit, "t5", "BF16")
        for s in samples:
            canvas = {"height_px": s.bucket.height_px, "width_px": s.bucket.width_px}
            original = {f"original_{side}": size for side, size in canvas.items()}
            image.add(s.bucket.ratio, s.moments, {"key": s.key, "bucket": s.bucket.ratio, **canvas, **original})
            tokens = features.text(s)
            bits = tokens.view(torch.int16).numpy().view(np.uint16)
            text.add(TEXT_SHARDS, bits, {"key": s.key, "num_tokens": len(tokens)})
        images.append(image.record(image.finish(IMAGE_INDEX), {}))
        texts.append(text.record(text.finish(TEXT_INDEX), {}))
    policy = {"resolution_px": 256}
    seal(root / "256px", images, IMAGE_INDEX, Manifest("image", "moments", "F16", image_model, policy, {}, []))
    seal(root / "text", texts, TEXT_INDEX, Manifest("text", "t5", "BF16", {"width": _WIDTH}, {}, {}, []))


def write_merged(root: Path, features: Features) -> None:
    """Write the tars a webdataset user needs: image and text of a sample side by side, here even in one member."""
    root.mkdir()
    for unit, samples in features.units():
        with webdataset.TarWriter(str(root / f"{unit}.tar"), encoder=False) as writer:
            for s in samples:
                tensors = {"moments": torch.from_numpy(s.moments), "t5": features.text(s).contiguous()}
                writer.write({"__key__": s.key, "safetensors": safetensors.torch.save(tensors)})


def write_npz(root: Path, features: Features) -> None:
    """Write the reference's layout: every caption with its padding, as the encoder gave it."""
    for folder in (_npz_path(root, "x").parent, _npy_path(root, "x").parent):
        folder.mkdir(parents=True)

    def compress(number: int) -> None:
        mask = (np.arange(_MAX_TOKENS) < features.num_tokens[number]).astype(np.int64)[None]  # (1, 120)
        caption = features.captions[number].float().numpy()[None]  # (1, 120, D)
        np.savez_compressed(root / f"{number}.npz", caption_feature=caption, attention_mask=mask)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compress, range(len(features.captions))))
    for s in features.samples:
        shutil.copyfile(root / f"{s.caption}.npz", _npz_path(root, s.key))
        np.save(_npy_path(root, s.key), s.moments.astype(np.float32).reshape(-1, *s.moments.shape[2:]))
    for number in range(len(features.captions)):
        (root / f"{number}.npz").unlink()


def _npz_path(root: Path, key: str) -> Path:
    return root / "caption_feature_wmask" / f"{Path(key).name}.npz"


def _npy_path(root: Path, key: str) -> Path:
    return root / "img_vae_features_256resolution" / "noflip" / f"{Path(key).name}.npy"


class _CountingDataset(ours.Dataset):
    """Our dataset, and how many samples its threads have read."""

    num_read = 0
    _lock = threading.Lock()

    def read(self, rows: Sequence[int] | ours.Rows) -> ours.Batch:
        batch = super().read(rows)
        with self._lock:
            self.num_read += len(batch)
        return batch


class Shards:
    """This toolkit's reader."""

    name = "shards (ours)"

    def __init__(self, root: Path) -> None:
        self.data = Data.model_validate({"features": str(root)})
        self.dataset = _CountingDataset(FeatureSet(root / "256px"), FeatureSet(root / "text"), self.data)

    @property
    def num_read(self) -> int:
        """Samples read so far."""
        return self.dataset.num_read

    def stream(self) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""
        with contextlib.closing(self.dataset.batches(ours.Position(0, 0, 0))) as batches:
            for _, batch in batches:
                yield Batch(batch.keys, batch.moments, batch.text, batch.mask)


class WebDataset:
    """The webdataset library over merged tars."""

    name = "webdataset"

    def __init__(self, root: Path, batch_size: int) -> None:
        self.batch_size, self.num_read = batch_size, 0
        urls = sorted(str(path) for path in root.glob("*.tar"))
        pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(_SHUFFLE_BUFFER, seed=0)
        self.pipeline = pipeline.map_dict(safetensors=safetensors.torch.load)

    def stream(self) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""
        while True:
            waiting: dict[_Shape, list[dict[str, Any]]] = {}
            for sample in self.pipeline:
                shape = tuple(sample["safetensors"]["moments"].shape)
                samples = waiting.setdefault(shape, [])
                samples.append(sample)
                if len(samples) == self.batch_size:
                    yield self._collate(waiting.pop(shape))
            while waiting:
                yield self._collate(waiting.popitem()[1])

    def _collate(self, samples: list[dict[str, Any]]) -> Batch:
        self.num_read += len(samples)
        tensors = [sample["safetensors"] for sample in samples]
        text, mask = ours.pad([t["t5"] for t in tensors])
        return Batch([s["__key__"] for s in samples], torch.stack([t["moments"] for t in tensors]), text, mask)


class Npz:
    """The reference's dataset, less its sampling of the posterior; the batches are those that our plan names."""

    name = "npz (reference)"

    def __init__(self, root: Path, dataset: ours.Dataset) -> None:
        self.root, self.dataset, self.num_read = root, dataset, 0
        self.keys = dataset.images.index["key"].to_pylist()

    def stream(self) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""
        plan = self.dataset.plan(0, 0)
        while True:
            for step in range(len(plan)):
                yield self._read([self.keys[row] for row in plan[step]])

    def _read(self, keys: list[str]) -> Batch:
        self.num_read += len(keys)
        moments, captions, masks = [], [], []
        for key in keys:
            moments.append(torch.from_numpy(np.load(_npy_path(self.root, key))))  # (2 C, H, W)
            with np.load(_npz_path(self.root, key)) as file:
                captions.append(torch.from_numpy(file["caption_feature"])[0])  # (120, D)
                masks.append(torch.from_numpy(file["attention_mask"])[0])  # (120,)
        stacked = torch.stack(moments).half()
        mask = torch.stack(masks).bool()
        mask = mask[:, : int(mask.sum(dim=1).max())]  # (B, L)
        text = torch.stack(captions)[:, : mask.shape[1]].bfloat16()  # (B, L, D)
        text[~mask] = 0
        return Batch(keys, stacked.unflatten(1, (2, _CHANNELS)), text, mask)


def check(reader: Reader, features: Features, num_batches: int) -> None:
    """Compare one pass with what was written, bit by bit.

    Raises:
        ValueError: If a sample is missing, doubled or different.
    """
    missing = {sample.key: sample for sample in features.samples}
    with contextlib.closing(reader.stream()) as stream:
        for _ in range(num_batches):
            batch = next(stream)
            if batch.moments.dtype != torch.float16 or batch.text.dtype != torch.bfloat16:
                raise ValueError(f"{reader.name}: expected fp16 and bf16, found {batch.moments.dtype, batch.text.dtype}")
            for i, key in enumerate(batch.keys):
                sample = missing.pop(key)
                tokens = features.text(sample)
                same = torch.equal(batch.moments[i], torch.from_numpy(sample.moments))
                same &= torch.equal(batch.text[i, : len(tokens)], tokens) and not batch.text[i, len(tokens) :].any()
                same &= int(batch.mask[i].sum()) == len(tokens) and bool(batch.mask[i, : len(tokens)].all())
                if not same:
                    raise ValueError(f"{reader.name}: sample {key} differs from what was written")
            if batch.text.shape[1] != int(batch.mask.sum(dim=1).max()):
                raise ValueError(f"{reader.name}: batch is not padded to its longest caption")
    if missing:
        raise ValueError(f"{reader.name}: {len(missing)} samples missing, such as {min(missing)}")


class Turn(NamedTuple):
    """Samples per second of one turn."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Result:
    """A line of the table: medians over the rounds; ratios are medians of the ratios to our reader in each round."""

    reader: str
    samples_per_cpu_s: float
    samples_per_s: float
    bytes_per_sample: int
    cpu_ratio: float
    cpu_ratio_lowest: float
    cpu_ratio_highest: float
    wall_ratio: float


def take_turn(reader: Reader, num_batches: int) -> Turn:
    """Read whole passes for at least a second."""
    gc.collect()
    before, cpu_s, wall_s = reader.num_read, time.process_time(), time.perf_counter()
    with contextlib.closing(reader.stream()) as stream:
        while time.perf_counter() - wall_s < _MIN_TURN_S:
            for _ in range(num_batches):
                next(stream)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    count = reader.num_read - before
    return Turn(count / cpu_s, count / wall_s)


def summarize(turns: dict[str, list[Turn]], bytes_per_sample: dict[str, int]) -> list[Result]:
    """Return the table; the first reader is the one that the others are compared with."""
    first = next(iter(turns.values()))
    results = []
    for name, own in turns.items():
        ratios = [turn.cpu / base.cpu for turn, base in zip(own, first, strict=True)]
        wall_ratios = [turn.wall / base.wall for turn, base in zip(own, first, strict=True)]
        cpu, wall = (statistics.median(values) for values in zip(*own, strict=True))
        results.append(
            Result(
                name, cpu, wall, bytes_per_sample[name], statistics.median(ratios), min(ratios), max(ratios),
                statistics.median(wall_ratios),
            )
        )  # fmt: skip
    return results


def measure(root: Path, count: int, rounds: int) -> list[Result]:
    """Write the three layouts under `root`, check the readers, let them take turns."""
    features = make_features(count)
    write_shards(root / "shards", features)
    write_merged(root / "merged", features)
    write_npz(root / "npz", features)
    shards = Shards(root / "shards")
    dataset = shards.dataset
    readers: dict[str, Reader] = {
        "shards": shards,
        "merged": WebDataset(root / "merged", shards.data.batch_size),
        "npz": Npz(root / "npz", dataset),
    }
    for reader in readers.values():
        check(reader, features, dataset.num_batches)
    turns: dict[str, list[Turn]] = {reader.name: [] for reader in readers.values()}
    for _ in range(rounds):
        for reader in readers.values():
            turns[reader.name].append(take_turn(reader, dataset.num_batches))
    dataset.close()
    sizes = {reader.name: _size_bytes(root / folder) // count for folder, reader in readers.items()}
    return summarize(turns, sizes)


def _size_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def machine() -> dict[str, str | int]:
    """Return what the figures depend on: cores, processor, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, str | int] = {"cores": os.cpu_count() or 0, "cpu": (models or [platform.machine()])[0]}
    facts |= {"load": f"{os.getloadavg()[0]:.1f}", "python": platform.python_version()}
    return facts | {name: importlib.metadata.version(name) for name in ("numpy", "torch", "webdataset", "safetensors")}


def table(results: Sequence[Result]) -> str:
    """Return the results as text."""
    lines = [f"{'reader':<16} {'samples/CPU-s':>13} {'samples/s':>10} {'bytes/sample':>13}  ratio to ours, CPU   wall"]
    for r in results:
        spread = f"{r.cpu_ratio:.3f} ({r.cpu_ratio_lowest:.3f}..{r.cpu_ratio_highest:.3f})"
        lines.append(
            f"{r.reader:<16} {r.samples_per_cpu_s:>13,.0f} {r.samples_per_s:>10,.0f} {r.bytes_per_sample:>13,}"
            f"  {spread:<20} {r.wall_ratio:.3f}"
        )
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.read_shards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=_positive, default=256, help="2.5 MB of disk each (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=7, help="turns of each reader (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    megabytes = options.samples * _BYTES_PER_SAMPLE / 1e6
    sys.stderr.write(f"writing {options.samples} samples in three layouts, {megabytes:,.0f} MB\n")
    with tempfile.TemporaryDirectory(prefix="read_shards-") as root:
        results = measure(Path(root), options.samples, options.rounds)
    sys.stdout.write(table(results) + "\n")
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    if options.json:
        settings = {"samples": options.samples, "rounds": options.rounds}
        report = {"machine": facts, "settings": settings, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
