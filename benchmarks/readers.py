"""The readers that `benchmarks.read_shards` compares, but for MosaicML's, which needs an environment of its own."""

import contextlib
import itertools
import os
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import webdataset
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.batches import BATCH_SIZE, PLANNED, SEQUENTIAL, Batch, Buffers, Expected, as_tensor, packed
from benchmarks.layouts import npy_path, npz_path
from benchmarks.samples import Samples
from pixart_data.shards import FeatureSet
from pixart_model.config import Data
from pixart_model.dataset import Dataset, open_dataset
from pixart_model.orders import Order, Picks
from pixart_model.portion import Portion

_SHUFFLE_BUFFER = 500  # samples, 350 MB


class _Sequential(Order):
    """The samples in the order of storage, those of one bucket."""

    def batch(self, number: int) -> Picks:
        """Return the samples of a batch of the endless sequence, from 0; the tail of a pass is left out."""
        epoch, place = divmod(number, self.num_samples // self.batch_size)
        first = place * self.batch_size
        samples = np.arange(first, first + self.batch_size, dtype=np.uint32)
        bucket = int(np.argmax(self.bucket_counts))
        return Picks(bucket, samples, np.full(self.batch_size, epoch))


class Ours:
    """This toolkit's reader, with the threads and the reading ahead that a job gets by default."""

    def __init__(self, root: Path, text_set: str) -> None:
        plans = str(root / "cache")
        data = Data(features=str(root), text_set=text_set, batch_size=BATCH_SIZE, cache_dir=plans)
        planned = open_dataset(data)
        [portion] = planned.portions
        self.codec = portion.mixture.codecs[0]
        order = _Sequential(portion.order.bucket_counts, BATCH_SIZE, 0)
        sequential = Dataset([Portion(portion.images, portion.mixture, portion.joined, order)], data, 0)
        self.datasets = {SEQUENTIAL: sequential, PLANNED: planned}

    def stream(self, order: str) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end; the text of each is the parts of its codec."""
        with contextlib.closing(self.datasets[order].batches()) as batches:
            for batch in batches:
                [captions] = batch.texts
                yield Batch(batch.keys, batch.moments, captions.parts)

    def expected(self, samples: Samples) -> Expected:
        """Return what the reader must give of each sample: text as its codec encodes what was written."""
        return partial(self._encoded, samples)

    def _encoded(self, samples: Samples, i: int) -> tuple[Tensor, Sequence[Tensor]]:
        moments, [text] = packed(samples, i)
        parts = []
        for part, (_, dtype) in zip(self.codec.encode(text), self.codec.tensors, strict=True):
            tensor = torch.from_numpy(part.view(np.int16) if part.dtype == np.uint16 else part)
            parts.append(tensor.view(torch.bfloat16) if dtype == "BF16" else tensor)
        return moments, parts


class Bare:
    """What any reader of these bytes has to do and no more: one thread, two positioned reads for each sample.

    They go into the memory of one batch; nothing is checked. Its orders are those of our reader.
    """

    def __init__(self, root: Path, text_set: str) -> None:
        ours = Ours(root, text_set)
        [portion] = ours.datasets[PLANNED].portions
        images, [texts], joined = portion.images, portion.mixture.sets, portion.joined
        self.keys = images.keys(images.entries["row"][joined.images].tolist())
        matching = texts.entries[joined.texts[0]]
        self.places = [_places(images, images.entries[joined.images]), _places(texts, matching)]
        self.num_tokens = matching["num_tokens"].tolist()
        num_batches = len(self.keys) // BATCH_SIZE
        self.numbers = {
            order: [dataset.portions[0].order.batch(i).samples.tolist() for i in range(num_batches)]
            for order, dataset in ours.datasets.items()
        }
        self.buffers = Buffers()

    def stream(self, order: str) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""
        moments, text = (values.reshape(-1).view(np.uint8).data for values in (self.buffers.moments, self.buffers.text))
        images, texts = self.places
        for numbers in itertools.cycle(self.numbers[order]):
            to_image = to_text = 0
            for i in numbers:
                file, offset, size = images[i]
                os.preadv(file, (moments[to_image : to_image + size],), offset)
                to_image += size
                file, offset, size = texts[i]
                os.preadv(file, (text[to_text : to_text + size],), offset)
                to_text += size
            keys = [self.keys[i] for i in numbers]
            yield self.buffers.filled(keys, sum(self.num_tokens[i] for i in numbers))


def _places(features: FeatureSet, entries: Any) -> list[tuple[int, int, int]]:
    """Return file descriptor, offset and size in bytes of each record."""
    files = [os.open(features.root / shard, os.O_RDONLY) for shard in features.shards]
    columns = (entries[name].tolist() for name in ("shard", "offset", "size"))
    return [(files[shard], offset, size) for shard, offset, size in zip(*columns, strict=True)]


class WebDataset:
    """The webdataset library over merged tars, in one process: in order, or shuffled by shard and through a buffer.

    Text is packed: the tensors of a batch are copied once, into memory used again, where the usual collation takes new
    memory and pads.
    """

    def __init__(self, root: Path) -> None:
        self.urls = sorted(str(path) for path in root.glob("*.tar"))
        self.buffers = Buffers()

    def stream(self, order: str) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end; the tail of a pass is left out."""
        pipeline = webdataset.WebDataset(self.urls, shardshuffle=len(self.urls) if order == PLANNED else False, seed=0)
        if order == PLANNED:
            pipeline = pipeline.shuffle(_SHUFFLE_BUFFER, seed=0)
        pipeline = pipeline.map_dict(safetensors=safetensors.torch.load)
        while True:
            samples: list[dict[str, Any]] = []
            for sample in pipeline:
                samples.append(sample)
                if len(samples) == BATCH_SIZE:
                    yield self._collate(samples)
                    samples = []

    def _collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        tensors = [sample["safetensors"] for sample in samples]
        texts = [one["t5"].view(torch.int16).numpy().reshape(-1) for one in tensors]
        return self.buffers.pack([s["__key__"] for s in samples], [one["moments"].numpy() for one in tensors], texts)


class Files:
    """The reference's `InternalData.getdata` and the default collation, less its sampling of the posterior.

    It gives fp32, text padded to 120 tokens, in memory taken anew for each batch. Shuffled by torch's permutation.
    """

    def __init__(self, root: Path, keys: Sequence[str]) -> None:
        self.root, self.keys = root, keys

    def stream(self, order: str) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end."""
        while True:
            count = len(self.keys)
            numbers = torch.randperm(count).tolist() if order == PLANNED else range(count)
            for i in range(0, count - BATCH_SIZE + 1, BATCH_SIZE):
                keys = [self.keys[number] for number in numbers[i : i + BATCH_SIZE]]
                moments, text, _ = default_collate([self._read(key) for key in keys])
                yield Batch(keys, moments, [text])

    def _read(self, key: str) -> tuple[Tensor, Tensor, Tensor]:
        with np.load(npz_path(self.root, key)) as file:
            text = torch.from_numpy(file["caption_feature"])  # (1, 120, D)
            mask = torch.from_numpy(file["attention_mask"])[None]  # (1, 1, 120)
        return torch.from_numpy(np.load(npy_path(self.root, key))), text, mask


def reference(samples: Samples, i: int) -> tuple[Tensor, Sequence[Tensor]]:
    """Return what a sample is, as the reference gives it: fp32 (2 C, H, W) and (1, 1, 120, D), padding included."""
    moments, _ = packed(samples, i)
    return moments.float().flatten(0, 1), [as_tensor(samples.padded(i)).float()[None, None]]
