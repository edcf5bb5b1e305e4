"""The main job on the demo's pictures and miniature models: every stage through the command, and what it leaves."""

import json
import tarfile

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load as load_safetensors

from jobs import cli


@pytest.fixture(scope="module")
def world(tmp_path_factory, pictures, miniatures, ray_here):
    """Caption, stats, extract, train and sample, once; returns their folder."""
    import tomli_w

    root = tmp_path_factory.mktemp("world")
    source = {"paths": [str(pictures)], "rows_per_unit": 5}
    jobs = {
        "caption": {
            "output": f"{root}/captions",
            "source": source,
            "captioner": {"model": miniatures["llava"], "max_new_tokens": 12, "batch_size": 4},
        },
        "stats": {
            "output": f"{root}/report",
            "approximate": True,
            "sets": [
                {"name": "raw", "path": f"{root}/captions", "column": "raw_caption"},
                {"name": "captioned", "path": f"{root}/captions"},
            ],
        },
        "extract": {
            "output": f"{root}/features",
            "source": source,
            "captions": {"path": f"{root}/captions"},
            "image": {"model": miniatures["vae"], "batch_size": 2},
            "text": {"model": miniatures["t5"], "max_tokens": 30},
        },
        "train": {
            "model": {"size": "tiny", "caption_width": 64},
            "data": {"features": f"{root}/features", "batch_size": 4, "small_buckets": "carry"},
            "optim": {"lr": 1e-3, "warmup_steps": 0},
            "run": {"output": f"{root}/run", "num_steps": 4, "log_every": 1, "save_every": 2},
            "grid": {"num_images": 2, "num_steps": 2},
        },
        "sample": {
            "checkpoint": f"{root}/run",
            "output": f"{root}/samples",
            "prompts": ["a red house", "a tree at night"],
            "num_steps": 3,
        },
    }
    for name, job in jobs.items():
        path = root / f"{name}.toml"
        path.write_text(tomli_w.dumps(job))
        assert cli.main([name, str(path)]) == 0, name
    return root


def images(world):
    return pq.read_table(world / "features/256px/index.parquet").to_pylist()


def texts(world):
    return pq.read_table(world / "features/text/index.parquet").to_pylist()


def test_every_picture_is_captioned_and_encoded(world, pictures):
    captions = pl.read_parquet(f"{world}/captions/parts/*.parquet")
    stems = {path.stem for path in pictures.iterdir() if path.suffix != ".txt"}
    keys = {f"pictures/{stem}" for stem in stems}
    assert set(captions["key"]) == keys
    assert captions["status"].unique().to_list() == ["ok"]
    assert captions["raw_caption"].null_count() == 2
    assert {row["key"] for row in images(world)} == keys
    assert {row["key"] for row in texts(world)} == keys


def test_the_resolved_job_file_is_beside_every_output(world):
    for path in ("captions/job.toml", "report/job.toml", "features/256px/job.toml", "features/text/job.toml"):
        assert (world / path).is_file()
    assert (world / "run/config.toml").is_file()


def test_tars_open_with_webdataset(world):
    shards = sorted(str(path) for path in (world / "features/256px").glob("*.*/*.tar"))
    rows = {row["key"]: row for row in images(world)}
    seen = set()
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        moments = load_safetensors(sample["safetensors"])["moments"]
        row = rows[sample["__key__"]]
        assert moments.dtype == torch.float16
        assert moments.shape == (2, 4, row["height_px"] // 8, row["width_px"] // 8)
        seen.add(sample["__key__"])
    assert seen == set(rows)


def test_the_index_addresses_every_tensor_for_other_tools_too(world):
    root, named = world / "features/text", set()
    for shard, offset_bytes, size_bytes, num_tokens in duckdb.sql(
        f"select shard, offset_bytes, size_bytes, num_tokens from '{root}/index.parquet'"
    ).fetchall():
        with (root / shard).open("rb") as file:
            file.seek(offset_bytes)
            data = file.read(size_bytes)
        by_index = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(num_tokens, 64)
        with tarfile.open(root / shard) as tar:
            [member] = [m for m in tar if m.offset_data < offset_bytes < m.offset_data + m.size]
            by_name = load_safetensors(tar.extractfile(member).read())["t5"]
        named.add(member.name)
        assert torch.equal(by_index, by_name)
        assert num_tokens <= 30
        assert offset_bytes % 64 == 0
    index = pl.read_parquet(root / "index.parquet")
    assert index.height == 12
    assert named <= {f"{key}.safetensors" for key in index["key"]}  # rows with equal captions share a member
    assert len(named) >= index["caption"].n_unique()


def test_buckets_and_crops_are_recorded(world):
    rows = {row["key"]: row for row in images(world)}
    rotated = rows["pictures/cabin_dawn"]
    assert (rotated["original_width_px"], rotated["original_height_px"]) == (480, 360)
    assert rotated["bucket"] == "0.78"
    assert "exif6" in rotated["image_ops"]
    assert rows["pictures/tower_tall"]["bucket"] == "3.62"
    for row in rows.values():
        assert row["resized_width_px"] - row["width_px"] >= row["crop_left_px"] >= 0
        assert row["shard"].startswith(f"{row['bucket']}/")


def test_a_picture_decoded_from_its_moments_matches_direct_encoding(world, pictures, miniatures):
    """The stored posterior mean, decoded, is the picture that encoding and decoding the cropped image gives."""
    from diffusers import AutoencoderKL

    from pixart_data.buckets import Bucket
    from pixart_data.canvases import fit
    from pixart_data.images import decode
    from pixart_data.shards import FeatureSet

    vae = AutoencoderKL.from_pretrained(miniatures["vae"]).eval()
    features = FeatureSet(world / "features/256px")
    row = next(row for row in images(world) if row["key"] == "pictures/farm")
    shape = (2, 4, row["height_px"] // 8, row["width_px"] // 8)
    stored = features.read_tensor(row["shard"], row["offset_bytes"], row["size_bytes"], shape)
    bucket = Bucket(row["bucket"], row["height_px"], row["width_px"])
    pixels = fit(decode((pictures / "farm.jpg").read_bytes(), max_pixels=10**8), bucket)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        posterior = vae.encode(x).latent_dist
        direct = vae.decode(posterior.mean).sample
        mean = torch.from_numpy(stored[0].astype(np.float32))[None]
        from_shard = vae.decode(mean).sample
        difference = (direct - from_shard).abs().max().item()
        assert difference < 2e-3 * direct.abs().max().item()
        std = torch.from_numpy(stored[1].astype(np.float32))[None]
        torch.testing.assert_close(std, posterior.std, rtol=1e-3, atol=1e-3)


def test_the_report_labels_approximate_numbers(world):
    report = json.loads((world / "report/stats.json").read_text())
    assert [row["stats"]["approximate"] for row in report["sets"]] == [True, True]
    assert "approximate" in (world / "report/report.html").read_text()


def test_the_null_caption_is_stored_with_the_dataset_and_the_checkpoint(world, miniatures):
    from pixart_data.encoders import TextEncoder
    from pixart_data.sections import TextFeatures
    from pixart_model.checkpoint import find, load_null_caption

    null = load_null_caption(find(world / "run"))
    [expected] = TextEncoder(TextFeatures(model=miniatures["t5"])).encode([""])
    assert torch.equal(null.features, expected)
    assert len(null.features) == 1


def test_samples_are_pictures_that_say_how_they_were_made(world):
    names = sorted(path.name for path in (world / "samples").glob("*.png"))
    assert names == ["0000.png", "0001.png", "grid.png"]
    picture = Image.open(world / "samples/0001.png")
    assert picture.size == (256, 256)
    assert picture.text["prompt"] == "a tree at night"
    assert picture.text["seed"] == "1"
    assert np.asarray(picture).std() > 0


def test_samples_of_an_earlier_run_are_replaced_and_nothing_else(world, tmp_path, capsys):
    (tmp_path / "9999.png").write_text("not ours")
    words = ["sample", str(world / "run"), "--out", str(tmp_path), "--set", "num_steps=1"]
    assert cli.main([*words, "--prompt", "a", "--prompt", "b"]) == 0
    assert cli.main([*words, "--prompt", "c\nd"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0000.png", "9999.png", "grid.png"]
    assert (tmp_path / "prompts.txt").read_text() == "0000.png c d\n"
    assert (tmp_path / "job.toml").is_file()


def test_extract_says_what_can_be_trained_on(world, capsys):
    assert cli.main(["extract", str(world / "extract.toml")]) == 0
    assert "12 samples to train on: 0 images have no text, 0 texts no image" in capsys.readouterr().out


def test_running_again_does_nothing_twice(world, capsys):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("commits/*.json")}
    assert len(before) == 3 + 6 + 3 + 4
    for name in ("caption", "stats", "extract"):
        assert cli.main([name, str(world / f"{name}.toml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in world.rglob("commits/*.json")} == before
    assert "12 in = 12 out + 0 rejected" in capsys.readouterr().out


def test_the_plan_says_what_changed(world, capsys):
    assert cli.main(["extract", str(world / "extract.toml"), "--set", "text.max_tokens=20", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "extract 256px: 3 shards, 3 done, 0 to do" in out
    assert "extract text: 4 shards, 0 done, 4 to do (0 new; 4 redone: text.max_tokens changed)" in out


def test_inspect_shows_buckets_shapes_and_captions(world, capsys):
    for path in ("features", "captions", "report", "run"):
        assert cli.main(["inspect", str(world / path)]) == 0
    out = capsys.readouterr().out
    assert "(2, 4, 58, 16)" in out
    assert "pictures/cabin_dawn" in out
    assert "step 4" in out


def test_an_unfinished_set_is_said_to_be(world, capsys):
    manifest = world / "features/text/manifest.json"
    whole = manifest.read_bytes()
    manifest.unlink()
    assert cli.main(["verify", str(world / "features")]) == 3
    assert "not finished" in capsys.readouterr().err
    assert cli.main(["inspect", str(world / "features")]) == 0
    assert "text: not finished, 4 shards are done" in capsys.readouterr().out
    manifest.write_bytes(whole)


def test_verify_passes_then_names_the_damaged_sample(world, capsys):
    assert cli.main(["verify", str(world / "features")]) == 0
    assert "all whole" in capsys.readouterr().out
    row = images(world)[4]
    path = world / "features/256px" / row["shard"]
    whole = path.read_bytes()
    # in the tensor, in the tar header, in the safetensors header, in the padding after the last sample
    for place in (row["offset_bytes"] + 7, row["offset_bytes"] - 640 + 3, row["offset_bytes"] - 20, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert cli.main(["verify", str(world / "features")]) == 3
        shown = capsys.readouterr()
        assert row["key"] in shown.err
        assert row["key"] in shown.out
    path.unlink()
    assert cli.main(["verify", str(world / "features")]) == 3
    assert "missing" in capsys.readouterr().out
    path.write_bytes(whole)
    assert cli.main(["verify", str(world / "features")]) == 0
