import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pixart_data.commits import Record, publish, write_record
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.shards import Manifest, ShardWriter, seal
from pixart_data.storage import staging_path
from pixart_model.config import Train

CHANNELS, TEXT_WIDTH = 4, 24
CANVASES = {"1.00": (64, 64), "0.50": (48, 96), "2.00": (96, 48)}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def bf16_bits(values):
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def write_set(root, samples, schema, manifest):
    """One unit; `samples` is a list of (folder, index row without place, values)."""
    files, rows = [], []
    by_folder = {}
    for folder, row, values in samples:
        by_folder.setdefault(folder, []).append((row, values))
    for folder, members in by_folder.items():
        staged = staging_path(root / folder, "shard")
        with ShardWriter(staged, manifest.tensor, manifest.dtype) as writer:
            places = [writer.add(row["key"], values) for row, values in members]
        file = publish(staged, root, root / folder, "unit", ".tar")
        files.append(file)
        for (row, _), place in zip(members, places, strict=True):
            rows.append({**row, "shard": file.path, **vars(place)})
    staged = staging_path(root / "index", "part")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), staged)
    files.append(publish(staged, root, root / "index", "unit", ".parquet"))
    record = Record("unit", "digest", {}, len(rows), len(rows), {}, files)
    write_record(root, record)
    return seal(root, [record], schema, manifest)


def write_images(root: Path, keys, rng):
    samples = []
    for i, key in enumerate(keys):
        bucket = list(CANVASES)[(i * 7 // 5) % len(CANVASES)]
        height, width = CANVASES[bucket]
        moments = rng.standard_normal((2, CHANNELS, height // 8, width // 8))
        moments[1] = np.abs(moments[1]) * 0.1
        row = {"key": key, "bucket": bucket, "height_px": height, "width_px": width}
        row |= {"original_height_px": 2 * height + i, "original_width_px": 2 * width + 1}
        samples.append((bucket, row, moments.astype(np.float16)))
    model = {"id": "tiny/vae", "revision": "abc", "scaling_factor": 0.18215, "channels": CHANNELS}
    model |= {"downsampling": 8, "shift_factor": 0.1}
    counts = {"rows_in": len(keys), "rows_out": len(keys), "rejected": {}}
    write_set(root, samples, IMAGE_INDEX, Manifest("image", "moments", "F16", model, {"resolution_px": 64}, counts, []))


def write_text_set(root: Path, keys, rng):
    samples = []
    for i, key in enumerate(keys):
        tokens = 3 + i % 5
        row = {"key": key, "num_tokens": tokens, "truncated": False, "caption": f"caption {i}"}
        values = bf16_bits(rng.standard_normal((tokens, TEXT_WIDTH)).astype(np.float32))
        samples.append(("shards", row, values))
    null = bf16_bits(rng.standard_normal((1, TEXT_WIDTH)).astype(np.float32))
    root.mkdir(parents=True, exist_ok=True)
    with ShardWriter(root / "null.tar", "t5", "BF16") as writer:
        place = writer.add("null", null)
    assert place.crc32 == zlib.crc32(null.tobytes())
    model = {"id": "tiny/t5", "revision": "def", "width": TEXT_WIDTH}
    model["null"] = {"path": "null.tar", "num_tokens": 1, **vars(place)}
    counts = {"rows_in": len(keys), "rows_out": len(keys), "rejected": {}}
    write_set(root, samples, TEXT_INDEX, Manifest("text", "t5", "BF16", model, {"cleaning": "x"}, counts, []))


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    """23 matched samples in three buckets, 2 images without text, 1 text without image."""
    root = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    keys = [f"source/{i:03d}" for i in range(25)]
    write_images(root / "256px", keys, rng)
    write_text_set(root / "text", [*reversed(keys[:23]), "source/orphan"], rng)
    return root


@pytest.fixture
def write_texts():
    return write_text_set


@pytest.fixture
def make_job(features, tmp_path):
    def make(**sections):
        tree = {
            "model": {"size": "tiny", "width": 48, "heads": 4, "base_size": 8, "caption_width": TEXT_WIDTH},
            "data": {"features": str(features), "batch_size": 4},
            "optim": {"lr": 1e-3, "warmup_steps": 4, "clip_grad_norm": 1.0, "ema_decay": 0.9},
            "run": {"output": str(tmp_path / "run"), "num_steps": 6, "log_every": 2, "save_every": 3, "device": "cpu"},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return Train.model_validate(tree)

    return make
