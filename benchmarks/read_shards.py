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
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
import webdataset
from torch import Tensor

from benchmarks import layouts
from benchmarks.layouts import CHANNELS, IMAGE_SET, TEXT_SET, Features, npy_path, npz_path
from pixart_data.shards import FeatureSet
from pixart_model import dataset as ours
from pixart_model.config import Data
from pixart_model.mixture import Mixture
from pixart_model.places import Rows

_SHUFFLE_BUFFER = 128  # samples
_MIN_TURN_S = 1.0

_Shape = tuple[int, ...]


class Batch(NamedTuple):
    """B samples, L tokens of the longest caption: moments (B, 2, C, H, W), text (B, L, D), mask (B, L)."""

    keys: list[str]
    moments: Tensor
    text: Tensor
    mask: Tensor


class Reader(Protocol):
    """One way to read the samples."""

    name: str

    @property
    def num_read(self) -> int:
        """Samples read so far, also those read ahead and never taken."""

    def stream(self) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""


class _CountingDataset(ours.Dataset):
    """Our dataset, and how many samples its threads have read."""

    num_read = 0
    _lock = threading.Lock()

    def read(self, rows: Sequence[int] | Rows, seed: int = 0, epoch: int = 0) -> ours.Batch:
        batch = super().read(rows, seed, epoch)
        with self._lock:
            self.num_read += len(batch)
        return batch


class Shards:
    """This toolkit's reader."""

    name = "shards (ours)"

    def __init__(self, root: Path) -> None:
        self.data = Data.model_validate({"features": str(root)})
        texts = Mixture({TEXT_SET: FeatureSet(root / TEXT_SET)}, {TEXT_SET: 1.0})
        self.dataset = _CountingDataset(FeatureSet(root / IMAGE_SET), texts, self.data)

    @property
    def num_read(self) -> int:
        """Samples read so far, also those read ahead and never taken."""
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


class Files:
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
            moments.append(torch.from_numpy(np.load(npy_path(self.root, key))))  # (2 C, H, W)
            with np.load(npz_path(self.root, key)) as file:
                captions.append(torch.from_numpy(file["caption_feature"])[0])  # (120, D)
                masks.append(torch.from_numpy(file["attention_mask"])[0])  # (120,)
        mask = torch.stack(masks).bool()
        mask = mask[:, : int(mask.sum(dim=1).max())]  # (B, L)
        text = torch.stack(captions)[:, : mask.shape[1]].bfloat16()  # (B, L, D)
        text[~mask] = 0
        pairs = [both.reshape(2, CHANNELS, *both.shape[1:]) for both in moments]
        return Batch(keys, torch.stack(pairs).half(), text, mask)


def check(reader: Reader, features: Features, num_batches: int) -> None:
    """Compare one pass with what was written, bit by bit.

    Raises:
        ValueError: If a sample is missing, doubled or different.
    """
    expected = {sample.key: sample for sample in features.samples}
    with contextlib.closing(reader.stream()) as stream:
        for batch in itertools.islice(stream, num_batches):
            samples = [expected.pop(key) for key in batch.keys]
            moments = torch.from_numpy(np.stack([sample.moments for sample in samples]))
            text, mask = ours.pad([features.text(sample) for sample in samples])
            pairs = ((batch.moments, moments), (batch.text, text), (batch.mask, mask))
            for found, wanted in pairs:
                if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                    raise ValueError(f"{reader.name}: a batch differs from what was written: {batch.keys}")
    if expected:
        raise ValueError(f"{reader.name}: {len(expected)} samples missing, such as {min(expected)}")


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
    features = layouts.make_features(count)
    layouts.write_shards(root / "shards", features)
    layouts.write_merged(root / "merged", features)
    layouts.write_files(root / "files", features)
    shards = Shards(root / "shards")
    dataset = shards.dataset
    readers: dict[str, Reader] = {
        "shards": shards,
        "merged": WebDataset(root / "merged", shards.data.batch_size),
        "files": Files(root / "files", dataset),
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
    description = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.read_shards", description=description)
    parser.add_argument("--samples", type=_positive, default=256, help="2.5 MB of disk each (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each reader (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    megabytes = options.samples * layouts.BYTES_PER_SAMPLE / 1e6
    sys.stderr.write(f"writing {options.samples} samples in three layouts, {megabytes:,.0f} MB\n")
    with tempfile.TemporaryDirectory(prefix="read_shards-") as root:
        results = measure(Path(root), options.samples, options.rounds)
    sys.stdout.write(table(results) + "\n")
    settings = {"samples": options.samples, "rounds": options.rounds}
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in {**settings, **facts}.items()) + "\n")
    if options.json:
        report = {"machine": facts, "settings": settings, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
