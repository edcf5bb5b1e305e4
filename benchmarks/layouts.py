"""Synthetic features, written in three layouts: our shards, merged WebDataset tars, the reference's files."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import webdataset
from torch import Tensor

from pipelines.features import TEXT_SHARDS, FeatureWriter
from pixart_data.buckets import Bucket, bucket_table
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.shards import Manifest, seal

CHANNELS = 4
BYTES_PER_SAMPLE = 2_500_000  # all three layouts together
IMAGE_SET, TEXT_SET = "256px", "text"

_WIDTH, _MAX_TOKENS = 4096, 120  # of T5-XXL as the reference uses it
_RESOLUTION_PX = 256
_RATIOS = ("0.72", "1.00", "1.38", "1.75")
_NUM_CAPTIONS = 48  # different ones: the reference takes 0.3 CPU-seconds to compress one, so its files are copied
_SAMPLES_PER_SHARD = 64


@dataclass(frozen=True)
class Sample:
    """What is written: moments fp16 (2, C, H, W), the bucket they belong to, and the number of a caption."""

    key: str
    bucket: Bucket
    moments: npt.NDArray[np.float16]
    caption: int


@dataclass(frozen=True)
class Features:
    """The synthetic features.

    Attributes:
        captions: bf16 (120, D) each, as an encoder gives them: what follows the true tokens is not zero.
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
    """Return `count` samples in four buckets: tokens ~ N(85, 25) cut to 10..120, channels of unlike scale as in T5."""
    rng = np.random.default_rng(0)
    num_captions = min(count, _NUM_CAPTIONS)
    num_tokens = [int(n) for n in np.clip(rng.normal(85, 25, num_captions).round(), 10, _MAX_TOKENS)]
    scales = rng.lognormal(-2, 0.7, _WIDTH).astype(np.float32)
    captions = []
    for _ in range(num_captions):
        values = rng.standard_normal((_MAX_TOKENS, _WIDTH), np.float32) * scales
        captions.append(torch.from_numpy(values).bfloat16())
    buckets = [bucket for bucket in bucket_table(_RESOLUTION_PX) if bucket.ratio in _RATIOS]
    samples = []
    for i in range(count):
        bucket = buckets[(i + i // num_captions) % len(buckets)]
        shape = (2, CHANNELS, bucket.height_px // 8, bucket.width_px // 8)
        moments = rng.standard_normal(shape, np.float32).astype(np.float16)
        samples.append(Sample(f"synthetic/{i:06d}", bucket, moments, i % num_captions))
    return Features(samples, captions, num_tokens)


def write_shards(root: Path, features: Features) -> None:
    """Write what `pixart extract` writes: an image set and a text set."""
    images, texts = [], []
    for unit, samples in features.units():
        image = FeatureWriter(root / IMAGE_SET, unit, "moments", "F16")
        text = FeatureWriter(root / TEXT_SET, unit, "t5", "BF16")
        for s in samples:
            canvas = {"height_px": s.bucket.height_px, "width_px": s.bucket.width_px}
            original = {f"original_{side}": size for side, size in canvas.items()}
            image.add(s.bucket.ratio, s.moments, {"key": s.key, "bucket": s.bucket.ratio, **canvas, **original})
            tokens = features.text(s)
            bits = tokens.view(torch.int16).numpy().view(np.uint16)
            text.add(TEXT_SHARDS, bits, {"key": s.key, "num_tokens": len(tokens)})
        images.append(image.record(image.finish(IMAGE_INDEX), {}))
        texts.append(text.record(text.finish(TEXT_INDEX), {}))
    model, policy = {"channels": CHANNELS, "downsampling": 8}, {"resolution_px": _RESOLUTION_PX}
    seal(root / IMAGE_SET, images, IMAGE_INDEX, Manifest("image", "moments", "F16", model, policy, {}, []))
    seal(root / TEXT_SET, texts, TEXT_INDEX, Manifest("text", "t5", "BF16", {"width": _WIDTH}, {}, {}, []))


def write_merged(root: Path, features: Features) -> None:
    """Write the tars that a webdataset user needs: image and text of a sample side by side, here even in one member."""
    root.mkdir()
    for unit, samples in features.units():
        with webdataset.TarWriter(str(root / f"{unit}.tar"), encoder=False) as writer:
            for s in samples:
                tensors = {"moments": torch.from_numpy(s.moments), "t5": features.text(s)}
                writer.write({"__key__": s.key, "safetensors": safetensors.torch.save(tensors)})


def write_files(root: Path, features: Features) -> None:
    """Write the reference's layout: .npz and .npy in fp32, every caption with its padding as the encoder gave it."""
    folders = {npz_path(root, "x").parent, npy_path(root, "x").parent}
    for folder in folders:
        folder.mkdir(parents=True)

    def compress(number: int) -> None:
        mask = (np.arange(_MAX_TOKENS) < features.num_tokens[number]).astype(np.int64)[None]  # (1, 120)
        caption = features.captions[number].float().numpy()[None]  # (1, 120, D)
        np.savez_compressed(root / f"{number}.npz", caption_feature=caption, attention_mask=mask)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compress, range(len(features.captions))))
    for s in features.samples:
        shutil.copyfile(root / f"{s.caption}.npz", npz_path(root, s.key))
        np.save(npy_path(root, s.key), s.moments.astype(np.float32).reshape(-1, *s.moments.shape[2:]))  # (2 C, H, W)
    for path in root.glob("*.npz"):
        path.unlink()


def npz_path(root: Path, key: str) -> Path:
    """Return where the reference looks for the caption of a sample."""
    return root / "caption_feature_wmask" / f"{Path(key).name}.npz"


def npy_path(root: Path, key: str) -> Path:
    """Return where the reference looks for the moments of a sample."""
    return root / f"img_vae_features_{_RESOLUTION_PX}resolution" / "noflip" / f"{Path(key).name}.npy"
