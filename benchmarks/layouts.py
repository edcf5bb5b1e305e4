"""The same samples on a disk, as this toolkit, a webdataset user and the PixArt-alpha reference would write them.

MosaicML's layout is in `benchmarks.mosaic`, which needs an environment of its own.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import webdataset

from benchmarks.batches import as_tensor
from benchmarks.samples import CHANNELS, MAX_TOKENS, SIDE, WIDTH, Samples
from pipelines.features import FeatureWriter
from pixart_data import codecs
from pixart_data.buckets import bucket_table
from pixart_data.commits import Record
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.seals import seal
from pixart_data.shards import MOMENTS, Manifest

RESOLUTION_PX = 256

_SAMPLES_PER_SHARD = 250  # 176 MB of bf16
_CALIBRATION_CAPTIONS = 256
_RATIO = "1.00"


def _units(samples: Samples) -> Iterator[tuple[str, range]]:
    for start in range(0, len(samples), _SAMPLES_PER_SHARD):
        yield f"{start // _SAMPLES_PER_SHARD:05d}", range(start, min(start + _SAMPLES_PER_SHARD, len(samples)))


def write_images(root: Path, samples: Samples) -> None:
    """Write the image set that `pixart extract` writes."""
    [square] = [bucket for bucket in bucket_table(RESOLUTION_PX) if bucket.ratio == _RATIO]
    canvas = {"height_px": square.height_px, "width_px": square.width_px}
    facts = {"bucket": square.ratio, **canvas, **{f"original_{side}": size for side, size in canvas.items()}}
    records = []
    for unit, numbers in _units(samples):
        with FeatureWriter(root, unit, MOMENTS) as writer:
            for i in numbers:
                writer.add(square.ratio, [samples.moments[i]], {"key": samples.key(i), **facts})
            records.append(writer.record(writer.finish(IMAGE_INDEX), {}))
    model, policy = {"channels": CHANNELS, "downsampling": RESOLUTION_PX // SIDE}, {"resolution_px": RESOLUTION_PX}
    buckets = [{"ratio": square.ratio, **canvas}]
    seal(root, records, IMAGE_INDEX, Manifest("image", "moments", "F16", model, policy, {}, buckets=buckets))


def write_texts(root: Path, samples: Samples, name: str) -> None:
    """Write the text set that `pixart extract` writes with the codec of this name."""
    root.mkdir(parents=True)
    codec, facts = _calibrated(root, samples, name)
    records: list[Record] = []
    for unit, numbers in _units(samples):
        with FeatureWriter(root, unit, codec.tensors) as writer:
            for i in numbers:
                row = {"key": samples.key(i), "caption": samples.caption(i), "num_tokens": int(samples.num_tokens[i])}
                writer.add("shards", codec.encode(as_tensor(samples.text(i))), row)
            records.append(writer.record(writer.finish(TEXT_INDEX), {}))
    manifest = Manifest("text", "t5", "BF16", {"width": WIDTH}, {}, {}, codec=facts)
    seal(root, records, TEXT_INDEX, manifest)


def _calibrated(root: Path, samples: Samples, name: str) -> tuple[codecs.Codec, dict[str, Any]]:
    captions = [as_tensor(samples.text(i)) for i in range(min(_CALIBRATION_CAPTIONS, len(samples)))]
    tensors = codecs.calibrate(name, captions).calibration()
    facts: dict[str, Any] = {"name": name}
    if tensors:
        data = safetensors.torch.save(tensors)
        (root / "codec.safetensors").write_bytes(data)
        facts["calibration"] = {"path": "codec.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    return codecs.from_manifest(facts, WIDTH, tensors), facts


def write_merged(root: Path, samples: Samples) -> None:
    """Write the tars that a webdataset user needs: caption, and image and text of a sample in one more member."""
    root.mkdir()
    for unit, numbers in _units(samples):
        with webdataset.TarWriter(str(root / f"{unit}.tar"), encoder=False) as writer:
            for i in numbers:
                tensors = {"moments": torch.from_numpy(np.array(samples.moments[i])), "t5": as_tensor(samples.text(i))}
                data = safetensors.torch.save(tensors)
                writer.write({"__key__": samples.key(i), "txt": samples.caption(i).encode(), "safetensors": data})


def write_files(root: Path, samples: Samples, count: int) -> None:
    """Write the first `count` samples as the reference does: .npz and .npy in fp32, every caption with its padding.

    Compressing one takes the reference's call a third of a CPU-second.
    """
    for folder in {npz_path(root, "x").parent, npy_path(root, "x").parent}:
        folder.mkdir(parents=True)

    def write(i: int) -> None:
        key = samples.key(i)
        mask = (np.arange(MAX_TOKENS) < samples.num_tokens[i]).astype(np.int64)[None]  # (1, 120)
        caption = as_tensor(samples.padded(i)).float().numpy()[None]  # (1, 120, D)
        np.savez_compressed(npz_path(root, key), caption_feature=caption, attention_mask=mask)
        np.save(npy_path(root, key), samples.moments[i].astype(np.float32).reshape(2 * CHANNELS, SIDE, SIDE))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))


def npz_path(root: Path, key: str) -> Path:
    """Return where the reference looks for the caption of a sample."""
    return root / "caption_feature_wmask" / f"{Path(key).name}.npz"


def npy_path(root: Path, key: str) -> Path:
    """Return where the reference looks for the moments of a sample."""
    return root / f"img_vae_features_{RESOLUTION_PX}resolution" / "noflip" / f"{Path(key).name}.npy"
