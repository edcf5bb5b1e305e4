import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pixart_data import codecs
from pixart_data.commits import Record, publish, write_record
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.seals import seal
from pixart_data.shards import (
    FLIPPED_MEMBER,
    MOMENTS,
    FeatureSet,
    Manifest,
    ShardWriter,
    manifest_bytes,
    read_manifest,
)
from pixart_data.storage import staging_path
from pixart_model.config import Train

CHANNELS, TEXT_WIDTH = 4, 24
CANVASES = {"1.00": (64, 64), "0.50": (48, 96), "2.00": (96, 48)}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def write_set(root, samples, schema, manifest, tensors, null=None):
    """One unit; `samples` is a list of (folder, index row without place, values, those of the mirrored image).

    With `null`, the values of the empty caption, these are stored too; their place goes into the manifest.
    """
    files, rows = [], []
    by_folder = {}
    for folder, *sample in samples:
        by_folder.setdefault(folder, []).append(sample)
    for folder, members in by_folder.items():
        staged = staging_path(root / folder, "shard")
        places = []
        with ShardWriter(staged, tensors) as writer:
            for row, values, flipped in members:
                place = vars(writer.add(row["key"], *values))
                if flipped is not None:
                    mirrored = writer.add(row["key"], flipped, extension=FLIPPED_MEMBER)
                    place |= {"flipped_offset_bytes": mirrored.offset_bytes, "flipped_crc32": mirrored.crc32}
                places.append(place)
        file = publish(staged, root, root / folder, "unit", ".tar")
        files.append(file)
        for (row, *_), place in zip(members, places, strict=True):
            rows.append({**row, "shard": file.path, **place})
    if null is not None:
        staged = staging_path(root / "null", "shard")
        with ShardWriter(staged, tensors) as writer:
            place = writer.add("null", *null)
        files.append(publish(staged, root, root / "null", "unit", ".tar"))
        manifest.model["null"] = {"path": files[-1].path, "num_tokens": len(null[0]), **vars(place)}
    staged = staging_path(root / "index", "part")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), staged)
    files.append(publish(staged, root, root / "index", "unit", ".parquet"))
    record = Record("unit", "digest", {}, len(rows), len(rows), {}, files)
    write_record(root, record)
    return seal(root, [record], schema, manifest)


def write_image_set(root: Path, keys, rng, flips=False):
    samples = []
    for i, key in enumerate(keys):
        bucket = list(CANVASES)[(i * 7 // 5) % len(CANVASES)]
        height, width = CANVASES[bucket]
        moments = rng.standard_normal((2, CHANNELS, height // 8, width // 8))
        moments[1] = np.abs(moments[1]) * 0.1
        row = {"key": key, "bucket": bucket, "height_px": height, "width_px": width}
        row |= {"original_height_px": 2 * height + i, "original_width_px": 2 * width + 1}
        values = moments.astype(np.float16)
        samples.append((bucket, row, [values], np.ascontiguousarray(values[..., ::-1]) if flips else None))
    model = {"id": "tiny/vae", "revision": "abc", "scaling_factor": 0.18215, "channels": CHANNELS}
    model |= {"downsampling": 8, "shift_factor": 0.1}
    counts = {"rows_in": len(keys), "rows_out": len(keys), "rejected": {}}
    buckets = [{"ratio": ratio, "height_px": h, "width_px": w} for ratio, (h, w) in CANVASES.items()]
    manifest = Manifest("image", "moments", "F16", model, {"resolution_px": 64}, counts, buckets=buckets)
    write_set(root, samples, IMAGE_INDEX, manifest, MOMENTS)


def write_text_set(root: Path, keys, rng, codec="bf16"):
    """Captions of 3 to 7 tokens; returns what is to be read of each key, bf16 (n, D)."""
    features = {}
    for i, key in enumerate([*keys, ""]):
        values = rng.standard_normal((3 + i % 5 if key else 1, TEXT_WIDTH)) * 2.0 ** rng.integers(-9, 9, TEXT_WIDTH)
        features[key] = torch.from_numpy(values).to(torch.bfloat16)
    chosen = codecs.calibrate(codec, list(features.values())[:3])
    facts = {"name": codec}
    root.mkdir(parents=True, exist_ok=True)
    if chosen.calibration():
        data = safetensors.torch.save(chosen.calibration())
        (root / "codec.safetensors").write_bytes(data)
        facts["calibration"] = {"path": "codec.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
    samples = []
    for i, key in enumerate(keys):
        row = {"key": key, "num_tokens": len(features[key]), "truncated": False, "caption": f"caption {i}"}
        samples.append(("shards", row, chosen.encode(features[key]), None))
    model = {"id": "tiny/t5", "revision": "def", "width": TEXT_WIDTH}
    counts = {"rows_in": len(keys), "rows_out": len(keys), "rejected": {}}
    manifest = Manifest("text", "t5", "BF16", model, {"cleaning": "x"}, counts, codec=facts)
    write_set(root, samples, TEXT_INDEX, manifest, chosen.tensors, null=chosen.encode(features[""]))
    return {key: chosen.decode_arrays(chosen.encode(values)) for key, values in features.items()}


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    """23 matched samples in three buckets, 2 images without text, 1 text without image."""
    root = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    keys = [f"source/{i:03d}" for i in range(25)]
    write_image_set(root / "256px", keys, rng)
    write_text_set(root / "text", [*reversed(keys[:23]), "source/orphan"], rng)
    return root


def open_set(root):
    """A feature set and the rows of its index, by key."""
    one = FeatureSet(root)
    return one, {row["key"]: row for row in one.index.to_pylist()}


def damage(root, key, flipped=False):
    """Turn a bit of a sample's tensor over."""
    one, rows = open_set(root)
    path = root / rows[key]["shard"]
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(rows[key]["flipped_offset_bytes" if flipped else "offset_bytes"] + 3)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    one.close()


def change_manifest(root, change):
    """Have a function change the fields of a manifest, and write it as it is written."""
    fields = asdict(read_manifest(root))
    change(fields)
    (root / "manifest.json").write_bytes(manifest_bytes(Manifest(**fields)))


@pytest.fixture
def copy(features, tmp_path):
    shutil.copytree(features, tmp_path / "copy")
    return tmp_path / "copy"


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
