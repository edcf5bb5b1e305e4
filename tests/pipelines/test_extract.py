import hashlib
import tarfile
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from zlib_ng.zlib_ng import crc32

from pipelines import extract
from pipelines.config import Extract
from pipelines.images import ImageStage
from pipelines.texts import NullCaption, TextStage
from pixart_data import canvases
from pixart_data.canvases import preparation
from pixart_data.codecs import from_manifest
from pixart_data.encoders import TextEncoder
from pixart_data.entries import IMAGE_ENTRY, TEXT_ENTRY, checks
from pixart_data.errors import DataError, JobError
from pixart_data.sections import ImageFeatures, Source, TextFeatures
from pixart_data.shards import DTYPES, FeatureSet, tensor_shape
from pixart_data.sources import find_units
from pixart_data.storage import location


@pytest.fixture
def photographs(tmp_path):
    """A folder with a JPEG of 1200 x 1100 pixels, the same turned by its EXIF orientation, and the same as a PNG."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    y, x = np.mgrid[0:1100, 0:1200]
    waves = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.sin(y / 60), (x + y) % 256], axis=-1)
    image = Image.fromarray(waves.astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "plain.jpg", quality=90)
    image.save(folder / "turned.jpg", quality=90, exif=turned)
    image.save(folder / "plain.png")
    return folder


def test_jpegs_are_decoded_at_the_scale_of_their_bucket(photographs, tmp_path, miniatures):
    source = Source(paths=[str(photographs)])
    config = ImageFeatures(model=miniatures["vae"], batch_size=2)
    stage = ImageStage(tmp_path / "set", source, config, preparation())
    [unit] = find_units(source)
    record = stage(unit, lambda count, num_rejected: None)
    [part] = [file.path for file in record.files if file.path.endswith(".parquet")]
    rows = {row["key"].split("/")[-1]: row for row in pq.read_table(tmp_path / "set" / part).to_pylist()}
    assert {key: (row["image_ops"], row["bucket"]) for key, row in rows.items()} == {
        "plain": ("draft2", "0.94"),
        "plain~png": ("", "0.94"),
        "turned": ("draft2,exif6", "1.07"),
    }
    assert (rows["plain"]["original_width_px"], rows["plain"]["original_height_px"]) == (1200, 1100)
    assert (rows["turned"]["original_width_px"], rows["turned"]["original_height_px"]) == (1100, 1200)


def test_another_way_to_prepare_images_redoes_the_image_features(photographs, tmp_path, miniatures, monkeypatch):
    image = ImageFeatures(model=miniatures["vae"])
    job = Extract(output=str(tmp_path / "out"), source=Source(paths=[str(photographs)]), image=image)

    def settings():
        [(run, _)] = extract.plan(job)
        return run.settings(run.units[0])

    before = settings()
    assert before["image"]["preparation"] == preparation()
    monkeypatch.setattr(canvases.jpegs, "decoder", lambda: "pillow")
    assert settings()["image"]["preparation"] == "dct-1, pillow, torch lanczos"
    assert {**settings(), "image": None} == {**before, "image": None}


def test_a_worker_that_prepares_images_otherwise_does_not_start(photographs, tmp_path, miniatures):
    source = Source(paths=[str(photographs)])
    with pytest.raises(JobError, match="image preparation on .*: expected 'dct-0', .*; install the same packages"):
        ImageStage(tmp_path / "set", source, ImageFeatures(model=miniatures["vae"]), "dct-0")


def staged_files(root):
    return [path for path in root.rglob("*") if path.is_file() and path.name.startswith(".tmp-")]


@pytest.mark.parametrize("attempt", ["first", "again"])
def test_a_failed_attempt_at_images_leaves_no_staged_shard(photographs, tmp_path, miniatures, attempt):
    source, root = Source(paths=[str(photographs)]), tmp_path / "set"
    stage = ImageStage(root, source, ImageFeatures(model=miniatures["vae"], batch_size=1))
    [unit] = find_units(source)
    (photographs / "bad.jpg").write_bytes(b"no image")
    [with_bad] = find_units(source)
    record = stage(with_bad, lambda count, num_rejected: None)
    image = (photographs / "plain.jpg").read_bytes()
    (photographs / "bad.jpg").write_bytes(image)
    staged = []

    def fail(count, num_rejected):
        staged.extend(staged_files(root))
        if staged:
            raise JobError("the store is away")

    attempts = {
        "first": lambda: stage(unit, fail),
        "again": lambda: stage.retry(with_bad, sorted(record.rejected), record, fail),
    }
    with pytest.raises(JobError, match="the store is away"):
        attempts[attempt]()
    assert staged
    assert not staged_files(root)


@pytest.mark.parametrize("attempt", ["first", "again", "null"])
def test_a_failed_attempt_at_captions_leaves_no_staged_shard(tmp_path, miniatures, monkeypatch, attempt):
    folder, root = tmp_path / "captioned", tmp_path / "set"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a red square")
    source = Source(paths=[str(folder)])
    stage = TextStage(root, source, "caption", TextFeatures(model=miniatures["t5"]))
    [unit] = find_units(source)
    record = stage(unit, lambda count, num_rejected: None)
    (folder / "b.txt").write_text("a blue square")
    staged = []

    def fail(*_):
        staged.extend(staged_files(root))
        raise JobError("the store is away")

    monkeypatch.setattr("pipelines.features.publish", fail)
    attempts = {
        "first": lambda: stage(unit, lambda count, num_rejected: None),
        "again": lambda: stage.retry(unit, sorted(record.rejected), record, lambda count, num_rejected: None),
        "null": lambda: stage(NullCaption(), lambda count, num_rejected: None),
    }
    with pytest.raises(JobError, match="the store is away"):
        attempts[attempt]()
    assert staged
    assert not staged_files(root)


@pytest.fixture
def captioned(tmp_path):
    """Six pictures; captions a, b and c, a and b twice, differing in white space only, and one without."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for name, caption in zip(
        "uvwxyz", ("a red square", "blue", " a red  square", None, "a green circle", "blue"), strict=True
    ):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        if caption:
            (folder / f"{name}.txt").write_text(caption)
    return Source(paths=[str(folder)])


def extract_texts(source, root, model, codec):
    """What the driver does, in this process."""
    job = Extract(output=str(root), source=source, text=TextFeatures(model=model, codec=codec))
    [(run, finish)] = extract._runs(job)
    stage = run.build()
    records = [replace(stage(unit, lambda count, num_rejected: None), unit=unit.id) for unit in run.units]
    finish(records)
    return FeatureSet(run.root), records


def read_bits(features, row):
    """The features of an index row (n, D), as bits of bf16."""
    codec = features.manifest.codec
    path = codec.get("calibration", {}).get("path")
    tables = safetensors.torch.load_file(features.root / path) if path else {}
    codec = from_manifest(codec, features.manifest.model["width"], tables)
    data = np.empty(row["size_bytes"], np.uint8)
    features.read_into(row["shard"], row["offset_bytes"], data.data)
    arrays, start = [], 0
    for part in codec.parts(row["num_tokens"], row["size_bytes"]):
        arrays.append(data[start : start + part.size_bytes].view(DTYPES[part.dtype]).reshape(part.shape))
        start += part.size_bytes
    return codec.decode_arrays(arrays)


def test_equal_captions_are_encoded_and_stored_once(captioned, tmp_path, miniatures):
    features, _ = extract_texts(captioned, tmp_path / "set", miniatures["t5"], "bf16")
    rows = {row["key"].split("/")[-1]: row for row in features.index.to_pylist()}
    assert list(rows) == ["u", "v", "w", "y", "z"]
    places = {name: (row["shard"], row["offset_bytes"], row["crc32"]) for name, row in rows.items()}
    assert places["u"] == places["w"]
    assert places["v"] == places["z"]
    assert len(set(places.values())) == 3
    assert rows["u"]["caption"] == rows["w"]["caption"] == "a red square"
    [shard] = {row["shard"] for row in rows.values()}
    with tarfile.open(features.root / shard) as tar:
        assert [name.split("/")[-1] for name in tar.getnames()] == [f"{n}.safetensors" for n in "uvy"]


@pytest.mark.parametrize("codec", ["bf16-packed", "int8"])
def test_codecs_store_the_same_features_in_fewer_bytes(captioned, tmp_path, miniatures, codec):
    plain, _ = extract_texts(captioned, tmp_path / "plain", miniatures["t5"], "bf16")
    coded, records = extract_texts(captioned, tmp_path / "coded", miniatures["t5"], codec)
    for row, smaller in zip(plain.index.to_pylist(), coded.index.to_pylist(), strict=True):
        assert (row["key"], row["num_tokens"]) == (smaller["key"], smaller["num_tokens"])
        assert smaller["size_bytes"] < (0.9 if codec == "bf16-packed" else 0.6) * row["size_bytes"]
        wanted, found = read_bits(plain, row), read_bits(coded, smaller)
        if codec == "bf16-packed":
            assert torch.equal(wanted.view(torch.int16), found.view(torch.int16))
        else:
            error = (found.float() - wanted.float()).norm() / wanted.float().norm()
            assert 0 < error < 0.01
    facts = coded.manifest.codec
    assert facts["name"] == codec
    data = (coded.root / facts["calibration"]["path"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == facts["calibration"]["sha256"]
    if codec == "int8":
        distinct = {row["caption"]: row["num_tokens"] for row in coded.index.to_pylist()}
        assert facts["measured"]["num_tokens"] == sum(distinct.values())
        assert 0 < facts["measured"]["channel_error"] < 0.02
        assert facts["measured"] == records[1].facts["measured"]
    else:
        assert "measured" not in facts


def test_a_set_whose_calibration_was_lost_and_made_anew_is_not_sealed(captioned, tmp_path, miniatures):
    _, records = extract_texts(captioned, tmp_path / "set", miniatures["t5"], "int8")
    lost = {**records[1].facts["codec"], "calibration": {"path": "codec.safetensors", "sha256": "other"}}
    records[1] = replace(records[1], facts={**records[1].facts, "codec": lost})
    with pytest.raises(DataError, match="expected a codec calibrated as .* delete this record"):
        extract._codec(records)


def test_a_codec_without_any_caption_to_calibrate_on_is_refused(tmp_path, miniatures):
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "bare" / "a.png")
    source = Source(paths=[str(tmp_path / "bare")])
    with pytest.raises(DataError, match="no caption in the first 1 shards to calibrate codec int8"):
        extract_texts(source, tmp_path / "set", miniatures["t5"], "int8")


def test_flips_are_the_posteriors_of_the_mirrored_images(photographs, tmp_path, miniatures):
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    Image.open(photographs / "plain.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored / "plain.png")
    for name in ("plain.jpg", "turned.jpg"):
        (photographs / name).unlink()
    sets = {}
    for name, folder, flips in (("both", photographs, True), ("other", mirrored, False)):
        image = ImageFeatures(model=miniatures["vae"], flips=flips)
        job = Extract(output=str(tmp_path / name), source=Source(paths=[str(folder)]), image=image)
        [(run, finish)] = extract._runs(job)
        stage = run.build()
        finish([replace(stage(unit, lambda count, num_rejected: None), unit=unit.id) for unit in run.units])
        sets[name] = FeatureSet(run.root)
    [both], [other] = (sets[name].index.to_pylist() for name in sets)
    assert other["flipped_offset_bytes"] is None
    shape = tensor_shape(both, sets["both"].manifest)
    flipped = sets["both"].read_tensor(both["shard"], both["flipped_offset_bytes"], both["size_bytes"], shape)
    plain = sets["other"].read_tensor(other["shard"], other["offset_bytes"], other["size_bytes"], shape)
    np.testing.assert_array_equal(flipped, plain)
    assert crc32(flipped.tobytes()) == both["flipped_crc32"]
    assert sets["both"].entries["flipped_offset"][0] == both["flipped_offset_bytes"]


def test_keys_that_are_not_set_redo_nothing(photographs, tmp_path, miniatures):
    """Sets made before these keys were there must not be made again."""
    source = Source(paths=[str(photographs)])
    job = Extract(
        output=str(tmp_path), source=source, image=ImageFeatures(model=miniatures["vae"]),
        text=TextFeatures(model=miniatures["t5"]),
    )  # fmt: skip
    image, text = (run.settings(run.units[-1]) for run, _ in extract._runs(job))
    assert not {"flips", "buckets"} & image["image"].keys()
    assert "codec" not in text["text"]


def test_captions_that_t5_cannot_encode_are_rows_with_a_reason_whatever_the_codec(
    captioned, tmp_path, miniatures, monkeypatch
):
    def overflowing(self, rows):
        features = encode(self, rows)
        return [f * float("inf") if len(f) == most else f for f in features]

    encode = TextEncoder._encode
    most = 12
    longest = TextEncoder(TextFeatures(model=miniatures["t5"]))
    most = max(len(f) for f in longest.encode(["a red square", "blue", "a green circle"]))
    monkeypatch.setattr(TextEncoder, "_encode", overflowing)
    counts = []
    for codec in ("bf16", "int8"):
        _, records = extract_texts(captioned, tmp_path / codec, miniatures["t5"], codec)
        counts.append((records[1].rows_out, records[1].rejected))
    assert counts[0] == counts[1]
    assert counts[0][1]["nonfinite_features"] >= 1
    assert counts[0][0] >= 1
    monkeypatch.setattr(TextEncoder, "_encode", lambda self, rows: [f * float("nan") for f in encode(self, rows)])
    for codec, message in (("bf16", "the empty caption: T5 gave infinite"), ("int8", "for all of the first")):
        with pytest.raises(DataError, match=message):
            extract_texts(captioned, tmp_path / f"nan {codec}", miniatures["t5"], codec)


def write_keys(path, dtype, keys):
    records = np.zeros(len(keys), dtype)
    records["key"] = keys
    records["check"] = checks(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(records.tobytes())


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(("num_images", "num_texts"), [(5, 7), (7, 5), (0, 3), (3, 0)])
def test_the_samples_that_two_sets_share_are_counted_from_their_entries(
    tmp_path, monkeypatch, remote, num_images, num_texts
):
    monkeypatch.setattr(extract, "_KEYS_AT_ONCE", 2)
    root = location(f"memory://{tmp_path.name}") if remote else tmp_path
    keys = np.random.default_rng(0).integers(0, 1 << 64, 12, dtype=np.uint64)
    images, texts = keys[:num_images], np.concatenate([keys[2:4], keys[-5:]])[:num_texts]
    both = len(set(images.tolist()) & set(texts.tolist()))
    write_keys(root / "256px/entries.bin", IMAGE_ENTRY, images)
    write_keys(root / "text/entries.bin", TEXT_ENTRY, texts)
    assert extract.match_line(root, "256px", "text") == (
        f"{both} samples to train on: {num_images - both} images have no text, {num_texts - both} texts no image"
    )
    assert both == (2 if num_images > 3 else 0 if not num_images or not num_texts else 1)


def test_counting_shared_samples_takes_little_memory(tmp_path):
    num_rows = 400_000
    keys = np.random.default_rng(0).integers(0, 1 << 64, num_rows + 1, dtype=np.uint64)
    write_keys(tmp_path / "256px/entries.bin", IMAGE_ENTRY, keys[1:])
    write_keys(tmp_path / "text/entries.bin", TEXT_ENTRY, keys[:-1])
    tracemalloc.start()
    try:
        line = extract.match_line(tmp_path, "256px", "text")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert line == "399,999 samples to train on: 1 images have no text, 1 texts no image"
    assert peak_bytes < 2 * 8 * num_rows + (12 << 20)


def test_a_damaged_index_is_not_counted(tmp_path):
    write_keys(tmp_path / "256px/entries.bin", IMAGE_ENTRY, np.arange(5))
    write_keys(tmp_path / "text/entries.bin", TEXT_ENTRY, np.arange(5))
    path = tmp_path / "text/entries.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="text/entries.bin: damaged: a record does not fit its check"):
        extract.match_line(tmp_path, "256px", "text")
