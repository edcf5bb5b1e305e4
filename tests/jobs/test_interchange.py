"""`pixart import` and `pixart export`: what goes in comes out, and what cannot is told."""

import contextlib
import json
import os
import re
import shutil
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.cli import main
from pipelines.config import Import
from pixart_data import exports, mds
from pixart_data.errors import DataError
from pixart_data.shards import read_manifest
from pixart_model.config import Data
from pixart_model.dataset import open_dataset
from pixart_model.sizes import Model
from tests.layouts import LENGTH, WIDTH, bits, held, import_here, made, rejected, write_reference


def job(path, out, layout="reference", **more):
    return Import(path=str(path), layout=layout, output=str(out), **more)


@pytest.fixture
def toy(tmp_path):
    samples = made()
    write_reference(tmp_path / "toy", samples)
    return tmp_path / "toy", samples


def assert_holds(root, samples, prefix="toy/Imgs"):
    found = held(root)
    assert len(found) == len(samples)
    for number, one in enumerate(samples):
        moments, text = found[f"{prefix}/{number:03d}"]
        assert np.array_equal(moments.reshape(8, *moments.shape[2:]).astype(np.float32), one.moments)
        assert np.array_equal(text, bits(one.tokens))


def test_what_was_imported_trains(toy, tmp_path):
    root, samples = toy
    np.savez_compressed(root / "null_caption.npz", caption_feature=samples[0].feature[:, :1])
    out = import_here(job(root, tmp_path / "out"))
    data = Data(features=str(out), batch_size=2, small_buckets="carry", cache_dir=str(tmp_path / "cache"))
    with contextlib.closing(open_dataset(data)) as dataset:
        assert len(dataset) == 5
        dataset.require(Model(size="tiny", caption_width=WIDTH))
        assert np.array_equal(
            dataset.null_caption().view(torch.int16).numpy().view("u2"), bits(samples[0].feature[0, :1])
        )
        batch = dataset.read(0)
        known = [one.moments.astype(np.float16).tobytes() for one in samples]
        assert len(batch.moments) == 2
        assert all(moments.numpy().tobytes() in known for moments in batch.moments)
    shutil.rmtree(out / "text")
    (root / "null_caption.npz").unlink()
    import_here(job(root, tmp_path / "out"))
    with contextlib.closing(open_dataset(data)) as dataset, pytest.raises(DataError, match="text.null_caption"):
        dataset.null_caption()


# The reference's folders


def test_the_reference_is_imported_bit_for_bit(toy, tmp_path):
    root, samples = toy
    out = import_here(job(root, tmp_path / "out"))
    assert_holds(out, samples)
    images, texts = read_manifest(out / "256px"), read_manifest(out / "text")
    assert images.provenance["imported"] == {
        "layout": "reference", "rounding": {"samples": 0, "values": 0, "max_error": 0.0},
    }  # fmt: skip
    assert (images.model["scaling_factor"], images.model["channels"]) == (0.18215, 4)
    assert (texts.model["width"], texts.policy["max_tokens"]) == (WIDTH, LENGTH)
    assert len(images.buckets) == 40
    rows = pq.read_table(out / "256px" / "index.parquet").to_pylist()
    assert [(row["original_height_px"], row["original_width_px"]) for row in rows[:2]] == [(320, 320), (280, 360)]
    captions = pq.read_table(out / "text" / "index.parquet")["caption"].to_pylist()
    assert captions == [one.prompt for one in samples]


def test_values_that_do_not_fit_are_rounded_and_counted(tmp_path):
    samples = made(3, exact=False)
    write_reference(tmp_path / "toy", samples)
    out = import_here(job(tmp_path / "toy", tmp_path / "out"))
    for number, one in enumerate(samples):
        moments, text = held(out)[f"toy/Imgs/{number:03d}"]
        assert np.array_equal(moments.reshape(one.moments.shape), one.moments.astype(np.float16))
        assert np.array_equal(text, bits(one.tokens))
    rounding = read_manifest(out / "256px").provenance["imported"]["rounding"]
    errors = [np.abs(one.moments.astype(np.float64) - one.moments.astype(np.float16)) for one in samples]
    assert rounding["values"] == sum(int((error > 0).sum()) for error in errors)
    assert rounding["max_error"] == max(error.max() for error in errors)
    assert rounding["samples"] == 3


@pytest.mark.parametrize(
    ("images", "texts", "more"),
    [
        ("img_vae_features_256resolution/noflip", "caption_feature_wmask", {}),
        ("img_vae_features_256_multiscale/ms", "caption_features", {}),
        ("img_sdxl_vae_features_256resolution_ms_new", "caption_features_new", {}),
        ("mine", "theirs", {"image": {"folder": "mine"}, "text": {"folder": "theirs"}}),
    ],
)
def test_every_folder_of_the_reference_is_known(tmp_path, images, texts, more):
    samples = made(2)
    write_reference(tmp_path / "toy", samples, images, texts)
    assert_holds(import_here(job(tmp_path / "toy", tmp_path / "out", **more)), samples)


def test_the_layout_of_sam_is_imported(tmp_path):
    samples = made(3, canvases=[(32, 32)])
    root = tmp_path / "sam"
    write_reference(root, samples, "img_vae_feature/train_vae_256/noflip")
    (root / "partition" / "data_info.json").unlink()
    (root / "partition" / "part0.txt").write_text("".join(f"Imgs_{number:03d}\n" for number in range(3)))
    (root / "captions").mkdir()
    (root / "captions" / "Imgs_001.txt").write_text("a red square\n")
    out = import_here(job(root, tmp_path / "out", rows_per_unit=2))
    found = held(out)
    assert sorted(found) == [f"sam-part0/Imgs_{number:03d}" for number in range(3)]
    assert np.array_equal(found["sam-part0/Imgs_002"][1], bits(samples[2].tokens))
    assert pq.read_table(out / "text" / "index.parquet")["caption"].to_pylist() == [None, "a red square", None]


def broken(root, samples):
    """Damage one file of each kind; returns what each is rejected for in the image set and the text set."""
    images, texts = root / "img_vae_fatures_256_multiscale/ms", root / "caption_feature_wmask"
    wanted = {}

    def put(path, data):
        if data is None:
            path.unlink()
        elif isinstance(data, bytes):
            path.write_bytes(data)
        elif isinstance(data, dict):
            np.savez_compressed(path, **data)
        else:
            np.save(path, data)

    def spoil(number, image, text):
        wanted[f"toy/Imgs/{number:03d}"] = tuple(spoilt and spoilt[0] for spoilt in (image, text))
        for spoilt, path in ((image, images / f"Imgs_{number:03d}.npy"), (text, texts / f"Imgs_{number:03d}.npz")):
            if spoilt is not None:
                put(path, spoilt[1])

    def whole(number, suffix):
        folder = images if suffix == ".npy" else texts
        return (folder / f"Imgs_{number:03d}{suffix}").read_bytes()

    flipped = bytearray(whole(2, ".npz"))
    flipped[len(flipped) // 2] ^= 0xFF
    infinite, huge = samples[4].moments.copy(), samples[5].moments.copy()
    infinite[0, 0, 0], huge[0, 0, 0] = np.inf, 1e5
    nan = samples[5].feature.copy()
    nan[0, 0, 0] = np.nan
    mask, narrow = samples[0].mask, samples[0].feature[:, :, :20]
    spoil(0, ("missing_file", None), ("missing_file", None))
    spoil(1, ("zero_bytes", b""), ("zero_bytes", b""))
    spoil(2, ("damaged_file", whole(2, ".npy")[:-5]), ("damaged_file", bytes(flipped)))
    spoil(3, ("bad_shape", samples[3].moments[:4]), ("bad_shape", {"caption_feature": narrow, "attention_mask": mask}))
    spoil(4, ("nonfinite_features", infinite), ("damaged_file", whole(4, ".npz")[:-30]))
    spoil(5, ("nonfinite_features", huge), ("nonfinite_features", {"caption_feature": nan}))
    spoil(6, ("bad_shape", samples[6].moments[:, :31]), ("damaged_file", {"attention_mask": mask}))
    spoil(7, ("bad_shape", np.zeros((8, 8, 8), np.float32)), None)
    short = {"caption_feature": samples[8].feature, "attention_mask": mask[:, :5]}
    spoil(8, ("damaged_file", np.array([{}], dtype=object)), ("bad_shape", short))
    empty = {"caption_feature": samples[9].feature, "attention_mask": mask * 0}
    spoil(9, ("damaged_file", b"no array"), ("bad_shape", empty))
    return wanted


def test_each_bad_file_is_a_rejected_row_with_its_reason(tmp_path):
    samples = made(11, canvases=[(32, 32)])
    rows = write_reference(tmp_path / "toy", samples)
    wanted = broken(tmp_path / "toy", samples)
    rows += [{"path": 3, "prompt": "x"}, "no object"]
    (tmp_path / "toy/partition/data_info.json").write_text(json.dumps(rows))
    out = import_here(job(tmp_path / "toy", tmp_path / "out", text={"width": WIDTH}))
    images, texts = rejected(out, "256px"), rejected(out, "text")
    for key, (image, text) in wanted.items():
        assert images.get(key, (None,))[0] == image, images.get(key)
        assert texts.get(key, (None,))[0] == text, texts.get(key)
    assert sorted(reason for reason, _ in images.values()).count("bad_row") == 2
    assert "Imgs_000.npz" in texts["toy/Imgs/000"][1]
    assert sorted(held(out)) == ["toy/Imgs/010"]
    for name in ("256px", "text"):
        counts = read_manifest(out / name).counts
        assert counts["rows_in"] == 13 == counts["rows_out"] + sum(counts["rejected"].values())


def test_canvases_outside_the_reference_make_a_table_of_their_own(tmp_path):
    samples = made(2, canvases=[(32, 32), (34, 32)])
    write_reference(tmp_path / "toy", samples)
    out = import_here(job(tmp_path / "toy", tmp_path / "out"))
    table = [(b["ratio"], b["height_px"], b["width_px"], b["rows"]) for b in read_manifest(out / "256px").buckets]
    assert table == [("1.00", 256, 256, 1), ("1.06", 272, 256, 1)]


def test_two_canvases_of_one_ratio_are_told_and_can_be_chosen_from(tmp_path, capsys):
    samples = made(2, canvases=[(32, 32), (34, 34)])
    write_reference(tmp_path / "toy", samples)
    with pytest.raises(DataError, match=r"'256x256' and '272x272', both 1.00; .*image.buckets="):
        import_here(job(tmp_path / "toy", tmp_path / "out"))
    out = import_here(job(tmp_path / "toy", tmp_path / "other", image={"buckets": ["272x272"]}))
    reason, detail = rejected(out, "256px")["toy/Imgs/000"]
    assert (reason, detail) == ("bad_shape", "expected a canvas of image.buckets, found 256x256")
    assert [b["height_px"] for b in read_manifest(out / "256px").buckets] == [272]


def test_a_null_caption_is_taken_from_a_file_and_trained_with(toy, tmp_path):
    root, samples = toy
    feature = samples[0].feature[:, :3]
    np.savez_compressed(tmp_path / "null.npz", caption_feature=feature, attention_mask=np.array([[1, 0, 0]]))
    out = import_here(job(root, tmp_path / "out", text={"null_caption": str(tmp_path / "null.npz")}))
    place = read_manifest(out / "text").model["null"]
    data = (out / "text" / place["path"]).read_bytes()[place["offset_bytes"] :][: place["size_bytes"]]
    assert place["num_tokens"] == 1
    assert np.array_equal(np.frombuffer(data, "u2"), bits(feature[0, 0]))


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda root: shutil.rmtree(root / "partition"), [], "expected lists in .*partition_filter.* found none"),
        (lambda root: shutil.rmtree(root / "caption_feature_wmask"), [], "one folder of text features .* none of"),
        (
            lambda root: (root / "img_vae_features_256resolution/noflip").mkdir(parents=True),
            [],
            "one folder of image features for 256 px .*noflip, .*; choose with --set image.folder=FOLDER",
        ),
        (
            lambda root: None,
            ["--set", "image.folder=nowhere"],
            "image.folder: expected a folder .* found no nowhere",
        ),
        (lambda root: None, ["--set", 'lists=["absent.json"]'], "lists: expected a file below .*absent.json"),
        (lambda root: None, ["--set", "text.null_caption=absent.npz"], "text.null_caption: expected a file"),
        (lambda root: None, ["--set", "image.set=text"], "text.set: expected a name of its own"),
        (lambda root: None, ["--set", "text.column=t5"], "text.column: expected only with layout mds, not reference"),
        (lambda root: None, ["--set", 'image.buckets=["250x250"]'], "image.buckets: expected sides that are multiples"),
        (lambda root: None, ["--from", "webdataset"], "layout: expected 'reference', 'mds' or 'diffusers', got 'webd"),
        (
            lambda root: (root / "partition/data_info.json").write_text("[]"),
            [],
            "lists: .*json: expected a JSON",
        ),
        (lambda root: shutil.rmtree(root), [], "path: expected a local folder, found .*; check the path"),
    ],
)
def test_a_layout_that_is_not_as_the_job_says_is_told_before_any_work(toy, tmp_path, capsys, change, words, message):
    root, _ = toy
    change(root)
    command = ["import", str(root), "--from", "reference", "--out", str(tmp_path / "out"), *words]
    assert main(command) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# Other layouts


def write_micro_diffusion(root, latents, texts):
    """As micro_diffusion's precompute.py does: bare fp16, in columns that the format stores by name."""
    columns = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes", "latents_512": "bytes"}
    samples = [
        {"caption": f"c{i}", "caption_latents": t.tobytes(), "latents_256": x.tobytes(), "latents_512": bytes(8)}
        for i, (x, t) in enumerate(zip(latents, texts, strict=True))
    ]
    root.mkdir()
    entries = [mds.write_shard(root, number, columns, samples[2 * number : 2 * number + 2]) for number in range(2)]
    mds.write_index(root, entries)


def test_micro_diffusion_is_imported_to_the_stated_precision(tmp_path, capsys):
    random = np.random.default_rng(3)
    latents = random.normal(size=(4, 4, 32, 32)).astype(np.float16)
    texts = random.normal(size=(4, 77, 16)).astype(np.float16)
    write_micro_diffusion(tmp_path / "micro", latents, texts)
    image = {"scaling_factor": 0.13025}
    out = import_here(job(tmp_path / "micro", tmp_path / "out", "mds", image=image, text={"width": 16}))
    for number, (moments, text) in enumerate(held(out).values()):
        assert not moments[1].any()  # drawn once: no deviation is known
        restored = moments[0].astype(np.float64) * 0.13025
        assert np.allclose(restored, latents[number].astype(np.float64), rtol=2**-10, atol=1e-8)
        assert np.array_equal(text, bits(texts[number]))
    assert list(held(out)) == [f"micro/{shard:05d}/{row:06d}" for shard in (0, 1) for row in (0, 1)]
    command = ["import", str(tmp_path / "micro"), "--from", "mds", "--out", str(tmp_path / "other")]
    assert main(command) == 2
    assert "text.width: required for column caption_latents" in capsys.readouterr().err
    assert main([*command, "--set", "text.width=16", "--set", "image.column=latents_1024"]) == 2
    assert "image.column: expected latents_1024 in" in capsys.readouterr().err


def test_unscaled_latents_are_kept_exactly(tmp_path):
    latents = np.random.default_rng(3).normal(size=(4, 4, 32, 32)).astype(np.float16)
    write_micro_diffusion(tmp_path / "micro", latents, np.ones((4, 77, 16), np.float16))
    out = import_here(job(tmp_path / "micro", tmp_path / "out", "mds", image={"scaled": False}, text={"width": 16}))
    assert all(np.array_equal(moments[0], latents[i]) for i, (moments, _) in enumerate(held(out).values()))


def test_a_lost_shard_of_mds_is_as_many_rejected_rows(tmp_path):
    write_micro_diffusion(tmp_path / "micro", np.zeros((4, 4, 32, 32), np.float16), np.ones((4, 77, 16), np.float16))
    path = tmp_path / "micro" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])
    out = import_here(job(tmp_path / "micro", tmp_path / "out", "mds", text={"width": 16}))
    assert {key: reason for key, (reason, _) in rejected(out, "text").items()} == {
        "micro/00000/000000": "damaged_file", "micro/00000/000001": "damaged_file",
    }  # fmt: skip
    assert len(held(out)) == 2


def test_bytes_of_another_size_are_rejected(tmp_path):
    write_micro_diffusion(tmp_path / "micro", np.zeros((4, 4, 31, 32), np.float16), np.ones((4, 77, 16), np.float16))
    out = import_here(job(tmp_path / "micro", tmp_path / "out", "mds", text={"width": 17}))
    assert {reason for reason, _ in rejected(out, "256px").values()} == {"bad_shape"}
    assert {reason for reason, _ in rejected(out, "text").values()} == {"bad_shape"}


def write_tensors(root, samples, folders=("", "")):
    for number, one in enumerate(samples):
        stem = f"a b/{number:03d}.pt"
        image = {"latents": torch.from_numpy(one.moments).half()}
        text = {
            "prompt_embeds": torch.from_numpy(one.feature).bfloat16(),
            "prompt_attention_mask": torch.from_numpy(one.mask),
            "prompt": one.prompt,
        }
        for folder, held_there in ({"": image | text} if folders[0] == folders[1] else
                                   {folders[0]: image, folders[1]: text}).items():  # fmt: skip
            (root / folder / "a b").mkdir(parents=True, exist_ok=True)
            torch.save(held_there, root / folder / stem)


@pytest.mark.parametrize("folders", [("", ""), ("vae", "t5")])
def test_tensor_files_are_imported_bit_for_bit(tmp_path, folders):
    samples = made(3)
    root = tmp_path / "toy"
    write_tensors(root, samples, folders)
    image, text = ({"folder": folder} if folder else {} for folder in folders)
    out = import_here(job(root, tmp_path / "out", "diffusers", image=image, text=text, rows_per_unit=2))
    assert_holds(out, samples, "toy/a%20b")
    assert pq.read_table(out / "text/index.parquet")["caption"].to_pylist() == [one.prompt for one in samples]


def test_bare_tensors_in_two_folders_are_imported(tmp_path):
    one = made(1)[0]
    for folder, tensor in (("vae", torch.from_numpy(one.moments[:4])), ("t5", torch.from_numpy(one.tokens))):
        (tmp_path / "toy" / folder).mkdir(parents=True)
        torch.save(tensor, tmp_path / "toy" / folder / "x.pt")
    out = import_here(
        job(tmp_path / "toy", tmp_path / "out", "diffusers", image={"folder": "vae", "scaled": False},
            text={"folder": "t5"})
    )  # fmt: skip
    moments, text = held(out)["toy/x"]
    assert np.array_equal(moments[0].astype(np.float32), one.moments[:4])
    assert np.array_equal(text, bits(one.tokens))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_pickle_in_a_tensor_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = made(3)
    write_tensors(tmp_path / "toy", samples)
    torch.save({"latents": Evil()}, tmp_path / "toy/a b/000.pt")
    (tmp_path / "toy/a b/001.pt").write_bytes((tmp_path / "toy/a b/001.pt").read_bytes()[:100])
    out = import_here(job(tmp_path / "toy", tmp_path / "out", "diffusers"))
    assert {key: reason for key, (reason, _) in rejected(out, "256px").items()} == {
        "toy/a%20b/000": "damaged_file", "toy/a%20b/001": "damaged_file",
    }  # fmt: skip
    assert not (tmp_path / "evil").exists()


# Export


def export(dataset, layout, out, *words):
    return main(["export", str(dataset), "--to", layout, "--out", str(out), *words])


@pytest.fixture
def dataset(toy, tmp_path):
    root, samples = toy
    np.savez_compressed(root / "null_caption.npz", caption_feature=samples[0].feature[:, :1])
    return import_here(job(root, tmp_path / "dataset"))


@pytest.mark.parametrize("layout", ["reference", "mds"])
def test_what_is_exported_comes_back_byte_for_byte(dataset, tmp_path, capsys, layout):
    assert export(dataset, layout, tmp_path / "there", "--dry-run") == 0
    assert f"export: would write 5 samples, as {layout} -> " in capsys.readouterr().out
    assert export(dataset, layout, tmp_path / "there") == 0
    assert f"export: 5 samples, as {layout} -> " in capsys.readouterr().out
    back = import_here(job(tmp_path / "there", tmp_path / "back", layout))
    ours, theirs = held(dataset), held(back)
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        for mine, found in zip(values, theirs[key], strict=True):
            assert mine.tobytes() == found.tobytes()
    nulls = [read_manifest(root / "text").model["null"]["crc32"] for root in (dataset, back)]
    assert nulls[0] == nulls[1]
    columns = ["key", "original_height_px", "original_width_px"]
    assert pq.read_table(dataset / "256px/index.parquet", columns=columns) == pq.read_table(
        back / "256px/index.parquet", columns=columns
    )


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*") if path.is_file() and ".lease" not in path.parts
    }  # fmt: skip


class Killed(BaseException):
    pass


@pytest.mark.parametrize("layout", ["reference", "mds"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_export_that_was_killed_is_finished_by_running_it_again(
    dataset, tmp_path, capsys, monkeypatch, layout, after
):
    monkeypatch.setattr(exports, "_ROWS_PER_PORTION", 1)
    monkeypatch.setattr(exports, "MOSAIC_BYTES", 20_000)
    assert export(dataset, layout, tmp_path / "whole") == 0
    cls = exports.LAYOUTS[layout]
    write, written = cls.write, []

    def killed(self, number, pairs):
        if number == after:
            (self.out / ".tmp-leftover").touch()
            if layout == "mds":
                (self.out / f"shard.{number:05d}.mds").write_bytes(b"half")
            raise Killed
        return write(self, number, pairs)

    monkeypatch.setattr(cls, "write", killed)
    with pytest.raises(Killed):
        export(dataset, layout, tmp_path / "there")
    with (tmp_path / "there" / exports.PROGRESS).open("ab") as file:
        file.write(b'{"torn": ')
    assert not (tmp_path / "there" / ("index.json" if layout == "mds" else "partition")).exists()
    (tmp_path / "there" / ".tmp-leftover").unlink()
    capsys.readouterr()
    monkeypatch.setattr(cls, "write", lambda self, number, pairs: written.append(number) or write(self, number, pairs))
    assert export(dataset, layout, tmp_path / "there") == 0
    assert min(written) == after
    assert ("by an earlier run" in capsys.readouterr().out) == (after > 0)
    assert files(tmp_path / "there") == files(tmp_path / "whole")
    written.clear()
    assert export(dataset, layout, tmp_path / "there") == 0
    assert not written
    assert "5 samples, 5 of them by an earlier run" in capsys.readouterr().out


def test_an_export_leaves_folders_of_others_alone(dataset, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert export(dataset, "mds", tmp_path / "mine") == 2
    assert "found thesis.txt in" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert export(dataset, "mds", tmp_path / "there", "--dry-run") == 0
    assert not (tmp_path / "there").exists()
    assert export(dataset, "mds", tmp_path / "there") == 0
    assert export(dataset, "reference", tmp_path / "there") == 2
    assert "holds the export of another dataset, another state of it or another layout" in capsys.readouterr().err
    assert export(dataset, "mds", tmp_path / "x", "--set", "text_set=short") == 2
    assert "text_set: expected a finished feature set short in" in capsys.readouterr().err
    assert export("s3://bucket/features", "mds", tmp_path / "x") == 2
    assert "path: expected a local folder, found s3://bucket/features; copy it" in capsys.readouterr().err
    assert export(dataset, "mds", "s3://bucket/x") == 2
    assert "output: expected a local folder, found s3://bucket/x; export to a disk" in capsys.readouterr().err


def test_a_damaged_sample_stops_an_export(dataset, tmp_path, capsys):
    row = pq.read_table(dataset / "text/index.parquet").to_pylist()[2]
    path = dataset / "text" / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["offset_bytes"]] ^= 1
    path.write_bytes(data)
    assert export(dataset, "reference", tmp_path / "there") == 3
    assert f"{row['key']}: damaged: its bytes do not fit their checksum; `pixart verify" in capsys.readouterr().err


def test_sizes_in_the_list_lead_the_reference_to_the_canvas_of_the_latents():
    image = {"key": "a/b", "bucket": "0.25", "height_px": 128, "width_px": 512}
    text = {"caption": None}
    cases = {(300, 1200): (300, 1200), (100, 1000): (100, 1000), (400, 1000): (128, 512)}
    for size, wanted in cases.items():
        original = dict(zip(("original_height_px", "original_width_px"), size, strict=True))
        row = exports.listed(exports.Pair(image | original, text))
        assert (row["height"], row["width"]) == wanted
        assert row["ratio"] == wanted[0] / wanted[1]
    tall = {"key": "a", "bucket": "4.00", "height_px": 512, "width_px": 128}
    row = exports.listed(exports.Pair(tall | {"original_height_px": 900, "original_width_px": 100}, text))
    assert (row["height"], row["ratio"], row["prompt"]) == (512, 4.0, "")


def test_shards_of_mds_are_filled_to_their_size(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "MOSAIC_BYTES", 40_000)
    assert export(dataset, "mds", tmp_path / "there") == 0
    shards = mds.read_index(tmp_path / "there")
    assert [shard.num_samples for shard in shards] == [2, 2, 1]
    assert all(struct.unpack("<I", shard.path.read_bytes()[:4])[0] == shard.num_samples for shard in shards)
    assert all(shard.size_bytes < 40_000 for shard in shards)


def test_samples_that_the_reference_would_call_the_same_are_refused(tmp_path, capsys):
    samples = made(2, canvases=[(32, 32)])
    rows = write_reference(tmp_path / "toy", samples)
    for row, key in zip(rows, ("a/b_c", "a_b/c"), strict=True):
        row["key"] = key.replace("a/b_c", "x/b_c").replace("a_b/c", "x_b/c")
    (tmp_path / "toy/partition/data_info.json").write_text(json.dumps(rows))
    out = import_here(job(tmp_path / "toy", tmp_path / "out"))
    assert sorted(held(out)) == ["x/b_c", "x_b/c"]
    assert export(out, "reference", tmp_path / "there") == 3
    assert "found x/b_c and x_b/c" in capsys.readouterr().err


# On Ray


def test_an_import_on_ray_resumes_and_retries(toy, tmp_path, capsys, ray_here):
    root, samples = toy
    path = root / "caption_feature_wmask" / "Imgs_003.npz"
    kept = path.read_bytes()
    path.unlink()
    command = ["import", str(root), "--from", "reference", "--out", str(tmp_path / "out")]
    command += ["--set", "rows_per_unit=2", "--set", "cluster.num_workers=1"]
    assert main([*command, "--dry-run"]) == 0
    assert "import text: 5 rows, 0 done, 5 to do" in capsys.readouterr().out
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "import 256px: 5 in = 5 out + 0 rejected" in said
    assert "import 256px: every value is kept exactly, as F16" in said
    assert "import text: 5 in = 4 out + 1 rejected (missing_file 1)" in said
    assert "import: 4 samples to train on: 1 images have no text, 0 texts no image" in said
    (tmp_path / "out/text/commits/toy-00000.json").unlink()
    assert main([*command, "--dry-run"]) == 0
    assert "import text: 3 shards, 2 done, 1 to do" in capsys.readouterr().out
    assert main(command) == 0
    path.write_bytes(kept)
    assert main(["retry", str(tmp_path / "out"), "--reason", "missing_file"]) == 0
    assert "import text: 5 in = 5 out + 0 rejected" in capsys.readouterr().out
    assert_holds(tmp_path / "out", samples)
    assert main(["verify", str(tmp_path / "out")]) == 0
