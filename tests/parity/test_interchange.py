"""Our feature sets and exports, opened by the tools they are for."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.cli import main
from pipelines.config import Import
from tests.layouts import held, import_here, made, write_reference

ROOT = Path(__file__).parent.parent.parent
PEERS = Path(os.environ.get("PIXART_PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))
"""A Python with MosaicML Streaming, made as benchmarks/peers.txt says."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interchange")
    write_reference(folder / "toy", made())
    return import_here(Import(path=str(folder / "toy"), layout="reference", output=str(folder / "features")))


def snippets():
    text = (ROOT / "docs/interchange.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def snippet(package, dataset, monkeypatch):
    """Run the snippet of the docs that imports a package and return its names."""
    monkeypatch.chdir(dataset.parent)
    [code] = [code for code in snippets() if re.search(rf"^(import|from) {package}\b", code, re.MULTILINE)]
    names = {}
    exec(compile(code, package, "exec"), names)
    return names


def test_every_snippet_is_run():
    assert len(snippets()) == 4


def test_webdataset_opens_the_shards(dataset, monkeypatch):
    names = snippet("webdataset", dataset, monkeypatch)
    assert len(names["shards"]) == 4
    moments = held(dataset)[names["sample"]["__key__"]][0]
    assert np.array_equal(names["moments"].numpy(), moments)


def test_hugging_face_datasets_opens_the_shards(dataset, monkeypatch, tmp_path):
    names = snippet("datasets", dataset, monkeypatch)
    texts = {key: text for key, (_, text) in held(dataset).items()}
    assert [row["__key__"] for row in names["texts"]] == list(texts)
    assert np.array_equal(names["t5"].view(torch.int16).numpy().view("u2"), texts[names["key"]])
    files = str(dataset / "256px/*/*.tar")
    whole = names["load_dataset"]("webdataset", data_files=files, split="train", cache_dir=str(tmp_path))
    for row in whole:
        moments = names["load"](row["safetensors"])["moments"]
        assert np.array_equal(moments.numpy(), held(dataset)[row["__key__"]][0])
    assert len(whole) == len(texts)


def test_duckdb_opens_the_index(dataset, monkeypatch):
    names = snippet("duckdb", dataset, monkeypatch)
    assert names["per_bucket"] == [("0.25", 1), ("0.78", 1), ("1.00", 2), ("1.29", 1)]
    assert sorted(names["long_captions"]) == [(f"toy/Imgs/{i:03d}", f"caption {i}") for i in (2, 3, 4)]


def test_polars_opens_the_index(dataset, monkeypatch):
    names = snippet("polars", dataset, monkeypatch)
    assert names["longest"].rows()[0] == ("toy/Imgs/004", 6)
    assert len(names["longest"]) == 5


# The reference's loaders, as its InternalData.py and InternalData_ms.py read files, written down anew


def internal_data(root, resolution, multi_scale):
    folder = "img_vae_fatures_{}_multiscale/ms" if multi_scale else "img_vae_features_{}resolution/noflip"
    lists = "partition_filter" if multi_scale else "partition"
    for item in json.loads((root / lists / "data_info.json").read_text()):
        if item["ratio"] > 4:
            continue
        flat = "_".join(item["path"].rsplit("/", 1))
        mean, std = torch.from_numpy(
            np.load(root / folder.format(resolution) / flat.replace(".png", ".npy"))
        ).chunk(2)  # fmt: skip
        text = np.load(root / "caption_feature_wmask" / flat.replace(".png", ".npz"))
        feature = torch.from_numpy(text["caption_feature"])
        mask = torch.from_numpy(text["attention_mask"])[None]
        yield item, mean, std, feature, mask


def nearest(height, width, table):
    return min(table, key=lambda ratio: abs(float(ratio) - height / width))


TABLE_256 = {"0.25": (128, 512), "0.78": (224, 288), "1.0": (256, 256), "1.29": (288, 224)}
"""Of ASPECT_RATIO_256, what these tests use, as (height, width)."""


def test_the_multi_scale_loader_of_the_reference_reads_an_export(dataset, tmp_path):
    assert main(["export", str(dataset), "--to", "reference", "--out", str(tmp_path / "toy")]) == 0
    samples = list(internal_data(tmp_path / "toy", 256, multi_scale=True))
    assert len(samples) == 5
    for (item, mean, std, feature, mask), one in zip(samples, made(), strict=True):
        assert (item["prompt"], item["path"]) == (one.prompt, f"toy/{one.path}")
        assert (mean.dtype, feature.dtype, mask.dtype) == (torch.float32, torch.float32, torch.int64)
        assert np.array_equal(torch.cat([mean, std]).numpy(), one.moments)
        assert (feature.shape, mask.shape) == (one.feature.shape, (1, 1, 12))
        assert np.array_equal(mask[0].numpy(), one.mask)
        assert np.array_equal(feature[0][mask[0, 0] == 1].numpy(), one.tokens)
        assert not feature[0][mask[0, 0] == 0].any()
        canvas = TABLE_256[nearest(item["height"], item["width"], TABLE_256)]
        assert canvas == tuple(8 * side for side in mean.shape[1:])


def test_the_single_scale_loader_of_the_reference_reads_an_export_of_squares(tmp_path):
    samples = made(3, canvases=[(32, 32)])
    write_reference(tmp_path / "toy", samples)
    job = Import(path=str(tmp_path / "toy"), layout="reference", output=str(tmp_path / "out"))
    assert main(["export", str(import_here(job)), "--to", "reference", "--out", str(tmp_path / "there")]) == 0
    found = list(internal_data(tmp_path / "there", 256, multi_scale=False))
    for (_, mean, std, _, _), one in zip(found, samples, strict=True):
        assert np.array_equal(torch.cat([mean, std]).numpy(), one.moments)


# MosaicML Streaming


@pytest.mark.skipif(not PEERS.is_file(), reason="no environment with MosaicML Streaming, see benchmarks/peers.txt")
def test_streaming_reads_our_shards_and_we_read_its(dataset, tmp_path):
    import hashlib

    def streaming(*words):
        command = [str(PEERS), str(ROOT / "tests/parity/streaming.py"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    assert main(["export", str(dataset), "--to", "mds", "--out", str(tmp_path / "mds")]) == 0
    rows = {row["key"]: row for row in streaming("read", tmp_path / "mds")}
    ours = held(dataset)
    assert rows.keys() == ours.keys()
    for key, (moments, text) in ours.items():
        for name, array in (("moments", moments), ("t5", text)):
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            assert rows[key][name] == [array.dtype.name, list(array.shape), digest]
    assert rows["toy/Imgs/001"]["caption"] == "caption 1"
    assert (rows["toy/Imgs/001"]["original_height_px"], rows["toy/Imgs/001"]["original_width_px"]) == (280, 360)
    streaming("write", tmp_path / "again")
    kept = ROOT / "tests/data/mosaics"
    for name in ("plain/index.json", "plain/shard.00000.mds", "plain/shard.00001.mds"):  # zstd's bytes vary by version
        assert (tmp_path / "again" / name).read_bytes() == (kept / name).read_bytes()
