"""Features in the layouts of other tools, made by hand, and their import without Ray."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from pixart_data.commits import write_record
from pixart_data.config import digest
from pixart_data.pairs import Pairs

WIDTH, LENGTH = 24, 12
CANVASES = [(32, 32), (28, 36), (32, 32), (36, 28), (16, 64)]


@dataclass(frozen=True)
class Made:
    """A sample: path, caption, moments fp32 (8, h, w), features fp32 (1, L, D), mask int64 (1, L)."""

    path: str
    prompt: str
    moments: np.ndarray
    feature: np.ndarray
    mask: np.ndarray

    @property
    def tokens(self):
        return self.feature[0, self.mask[0] == 1]


def made(count=5, exact=True, canvases=CANVASES):
    """Samples whose values came from fp16 and bf16, as those of real encoders did, or else did not."""
    random = np.random.default_rng(1)
    samples = []
    for number in range(count):
        height, width = canvases[number % len(canvases)]
        moments = random.normal(size=(8, height, width)).astype(np.float32)
        feature = torch.from_numpy(random.normal(size=(1, LENGTH, WIDTH)).astype(np.float32))
        if exact:
            moments, feature = moments.astype(np.float16).astype(np.float32), feature.bfloat16().float()
        mask = np.zeros((1, LENGTH), np.int64)
        mask[0, : 2 + number % 8] = 1
        samples.append(Made(f"Imgs/{number:03d}.png", f"caption {number}", moments, feature.numpy(), mask))
    return samples


def write_reference(root, samples, images="img_vae_fatures_256_multiscale/ms", texts="caption_feature_wmask"):
    """The reference's folders, named as its extraction names them; returns the rows of the list."""
    rows = []
    for folder in (images, texts, "partition"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for one in samples:
        stem = "_".join(one.path.rsplit("/", 1))[: -len(".png")]
        np.save(root / images / f"{stem}.npy", one.moments)
        np.savez_compressed(root / texts / f"{stem}.npz", caption_feature=one.feature, attention_mask=one.mask)
        height, width = (10 * side for side in one.moments.shape[1:])
        row = {"path": one.path, "prompt": one.prompt, "height": height, "width": width, "ratio": height / width}
        rows.append(row)
    (root / "partition" / "data_info.json").write_text(json.dumps(rows))
    return rows


def import_here(job):
    """Import in this process, and return the dataset's folder."""
    from pipelines.imports import runs

    for run, finish in runs(job):
        stage, records = run.build(), []
        for unit in run.units:
            settings = run.settings(unit)
            record = stage(unit, lambda rows, rejected: None)
            records.append(replace(record, settings=settings, digest=digest(settings)))
            write_record(run.root, records[-1])
        finish(records)
    return Path(job.output)


def held(root, image_set="256px", text_set="text"):
    """Moments and bits of text by key, read back through the index."""
    pairs = Pairs(root / image_set, root / text_set)
    rows = pairs.rows(0, len(pairs))
    found = {row.image["key"]: (pairs.moments(row), pairs.text(row)) for row in rows}
    pairs.close()
    return found


def bits(values):
    """Bits of bf16, by torch."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.int16).numpy().view("u2")


def rejected(root, name):
    """Reason and detail by key."""
    rows = pq.read_table(root / name / "rejected.parquet").to_pylist()
    return {row["key"]: (row["error"], row["detail"]) for row in rows}
