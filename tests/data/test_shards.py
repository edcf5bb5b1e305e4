import hashlib
import json
import os
import pickle
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load as load_safetensors

from pixart_data import shards
from pixart_data.commits import Record, publish, read_records
from pixart_data.config import digest
from pixart_data.errors import DataError
from pixart_data.records import TEXT_INDEX
from pixart_data.seals import seal
from pixart_data.shards import (
    FLIPPED_MEMBER,
    MOMENTS,
    FeatureSet,
    Manifest,
    ShardWriter,
    feature_sets,
    manifest_bytes,
    member_prefix,
    member_tensors,
    read_manifest,
    tensor_shape,
)
from pixart_data.storage import staging_path

WIDTH = 6
MANIFEST = Manifest("text", "t5", "F16", {"width": WIDTH}, {}, {"rows_in": 0})
KEYS = ["a", "photos/summer/img_%41", "x" * 87, "x" * 88, "x" * 89, "x" * 100, "long/" + "y" * 160, "z/" * 200 + "z"]


def tensor(seed, num_tokens=None):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_tokens or 1 + seed % 5, WIDTH)).astype(np.float16)


def write(path, samples, dtype="F16"):
    with ShardWriter(path, [("t5", dtype)]) as writer:
        return {key: writer.add(key, values) for key, values in samples.items()}


@pytest.fixture
def shard(tmp_path):
    samples = {key: tensor(i) for i, key in enumerate(KEYS)}
    path = tmp_path / "shard.tar"
    return path, samples, write(path, samples)


def write_unit(root, unit, samples, rejected=()):
    """What a stage does for one unit: a shard, an index part, and the record that names them."""
    staged = staging_path(root / "shards", "s.tar")
    places = write(staged, samples)
    file = publish(staged, root, root / "shards", unit, ".tar")
    rows = [{"key": k, "shard": file.path, "num_tokens": len(samples[k]), **asdict(p)} for k, p in places.items()]
    rows += [{"key": key, "error": "bad_row", "detail": "d"} for key in rejected]
    part = staging_path(root / "index", "s.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=TEXT_INDEX), part)
    files = [file, publish(part, root, root / "index", unit, ".parquet")]
    return Record(unit, "", {}, len(rows), len(places), {"bad_row": len(rejected)}, files)


@pytest.fixture
def features(tmp_path):
    root = tmp_path / "run=3" / "text"
    records = [
        write_unit(root, unit, {f"{unit}/{i}": tensor(i + 3 * n) for i in range(4)}, rejected=[f"{unit}/bad"])
        for n, unit in enumerate(["b", "a", "c"])
    ]
    seal(root, records, TEXT_INDEX, MANIFEST)
    return root


def test_a_manifest_is_the_same_whether_facts_come_from_a_worker_or_from_a_record_read_again(features):
    """Found by chaos: the record of a unit that an earlier run committed has its keys in the order of the file."""
    written = []
    for model in (
        {"width": WIDTH, "null": {"path": "x", "crc32": 1}},
        {"null": {"crc32": 1, "path": "x"}, "width": WIDTH},
    ):
        seal(features, list(read_records(features).values()), TEXT_INDEX, replace(MANIFEST, model=model))
        written.append((features / "manifest.json").read_bytes())
    assert written[0] == written[1]


def test_the_same_samples_give_the_same_bytes(shard, tmp_path):
    path, samples, places = shard
    assert write(tmp_path / "again.tar", samples) == places
    assert (tmp_path / "again.tar").read_bytes() == path.read_bytes()


def test_python_s_tarfile_reads_every_sample(shard):
    path, samples, _ = shard
    with tarfile.open(path) as tar:
        read = {member.name: load_safetensors(tar.extractfile(member).read()) for member in tar}
    assert list(read) == [f"{key}.safetensors" for key in samples]
    for key, values in samples.items():
        np.testing.assert_array_equal(read[f"{key}.safetensors"]["t5"], values, strict=True)
    assert path.stat().st_size % 512 == 0
    assert path.read_bytes().endswith(bytes(1024))


def test_webdataset_reads_every_sample(shard):
    import webdataset

    path, samples, _ = shard
    read = {
        sample["__key__"]: load_safetensors(sample["safetensors"])["t5"]
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    }
    assert read.keys() == samples.keys()
    assert all(np.array_equal(read[key], samples[key]) for key in samples)


def test_places_address_the_tensors_whatever_the_length_of_the_key(shard):
    path, samples, places = shard
    data = path.read_bytes()
    for key, place in places.items():
        stored = data[place.offset_bytes : place.offset_bytes + place.size_bytes]
        assert stored == samples[key].tobytes()
        assert zlib.crc32(stored) == place.crc32
        assert place.offset_bytes % 64 == 0


def test_tensors_of_any_layout_are_stored_in_row_order(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    place = write(tmp_path / "s.tar", {"k": values.T[::2]}, dtype="F32")["k"]
    with tarfile.open(tmp_path / "s.tar") as tar:
        read = load_safetensors(tar.extractfile("k.safetensors").read())["t5"]
    np.testing.assert_array_equal(read, values.T[::2], strict=True)
    assert place.size_bytes == 3 * 4 * 4


def test_bf16_is_stored_as_its_bits(tmp_path):
    import torch
    from safetensors.torch import load

    values = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    write(tmp_path / "s.tar", {"k": values.view(torch.int16).numpy().view(np.uint16)}, dtype="BF16")
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert torch.equal(load(tar.extractfile("k.safetensors").read())["t5"], values)


@pytest.mark.parametrize(("dtype", "wrong"), [("F16", np.float32), ("F32", np.float64), ("BF16", np.float16)])
def test_a_tensor_of_another_type_is_refused(tmp_path, dtype, wrong):
    expected = pytest.raises(ValueError, match=f"k: expected t5 in {dtype}, got {np.dtype(wrong)}")
    with ShardWriter(tmp_path / "s.tar", [("t5", dtype)]) as writer, expected:
        writer.add("k", np.zeros((1, WIDTH), wrong))


def test_an_empty_shard_is_an_empty_tar(tmp_path):
    write(tmp_path / "s.tar", {})
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == []


def test_a_sealed_set_reads_back_in_the_order_of_its_records(features):
    opened = FeatureSet(features)
    assert opened.index["key"].to_pylist() == [f"{unit}/{i}" for unit in "bac" for i in range(4)]
    assert len(opened) == 12
    assert "error" not in opened.index.column_names
    row = opened.index.to_pylist()[5]
    shape = tensor_shape(row, opened.manifest)
    values = opened.read_tensor(row["shard"], row["offset_bytes"], row["size_bytes"], shape)
    np.testing.assert_array_equal(values, tensor(1 + 3), strict=True)
    assert pq.read_table(features / "rejected.parquet")["key"].to_pylist() == ["b/bad", "a/bad", "c/bad"]
    opened.close()


def test_sealing_twice_gives_the_same_files(features):
    names = ("manifest.json", "index.parquet", "entries.bin", "rejected.parquet")
    before = [(features / name).read_bytes() for name in names]
    records = [
        write_unit(features, u, {f"{u}/{i}": tensor(i + 3 * n) for i in range(4)}, [f"{u}/bad"])
        for n, u in enumerate("bac")
    ]
    seal(features, records, TEXT_INDEX, MANIFEST)
    assert [(features / name).read_bytes() for name in names] == before


def test_a_key_that_occurs_twice_is_named_and_nothing_is_sealed(tmp_path):
    records = [write_unit(tmp_path, unit, {key: tensor(1) for key in ("k/0", f"{unit}/1")}) for unit in ("a", "b")]
    with pytest.raises(DataError, match="key k/0 occur more than once"):
        seal(tmp_path, records, TEXT_INDEX, MANIFEST)
    assert not (tmp_path / "manifest.json").exists()


def test_a_set_without_samples_is_sealed_too(tmp_path):
    seal(tmp_path, [], TEXT_INDEX, MANIFEST)
    opened = FeatureSet(tmp_path)
    assert len(opened) == 0
    assert opened.index.column_names == [name for name in TEXT_INDEX.names if name not in ("error", "detail")]


def num_open(root):
    """The shards below `root` that this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(path.startswith(str(root)) and path.endswith(".tar") for path in paths)


def test_many_threads_read_one_set(features):
    opened = FeatureSet(features)
    rows = opened.index.to_pylist() * 50

    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(partial(read, opened), rows))
        assert 3 <= num_open(features) <= 16 * 3
    assert num_open(features) == 0, "a thread that ends closes its shards"
    read(opened, rows[0])
    assert num_open(features) == 1
    for row, values in zip(rows, results, strict=True):
        unit, i = row["key"].split("/")
        assert np.array_equal(values, tensor(int(i) + 3 * "bac".index(unit)))
    opened.close()
    assert num_open(features) == 0
    assert np.array_equal(read(opened, rows[0]), tensor(0))  # a closed set opens its shards again
    opened.close()


def read(opened, row):
    return opened.read_tensor(row["shard"], row["offset_bytes"], row["size_bytes"], (row["num_tokens"], WIDTH))


def test_a_missing_shard_is_a_data_error(features):
    opened = FeatureSet(features)
    row = opened.index.to_pylist()[0]
    (features / row["shard"]).unlink()
    with pytest.raises(DataError, match=f"{row['shard']}: missing; `pixart verify {features}` names what it held"):
        read(opened, row)


def test_a_shard_that_was_cut_off_is_a_data_error(features):
    opened = FeatureSet(features)
    first, *_, last = [row for row in opened.index.to_pylist() if row["key"].startswith("a/")]
    os.truncate(features / last["shard"], last["offset_bytes"] + last["size_bytes"] - 1)
    assert read(opened, first).shape == (first["num_tokens"], WIDTH)
    with pytest.raises(DataError, match=f"ends early; `pixart verify {features}` names the samples lost"):
        read(opened, last)
    opened.close()


def test_few_shards_are_open_at_a_time(features, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    opened = FeatureSet(features)
    for row in opened.index.to_pylist() * 2:
        assert read(opened, row).shape == (row["num_tokens"], WIDTH)
        assert num_open(features) <= 2
    opened.close()


def signed(fields):
    return json.dumps({**fields, "digest": digest(fields)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "not a finished feature set; run `pixart extract` to its end"),
        ("", "not valid JSON"),
        ('{"format": "pix', "not valid JSON"),
        ('{"format": "other", "version": 2}', "expected pixart-features version 2, found other version 2"),
        (
            '{"format": "pixart-features", "version": 1}',
            "found pixart-features version 1; run `pixart extract` with its",
        ),
        ("[]", "expected pixart-features version 2, found list"),
        ('{"format": "pixart-features", "version": 2}', "damaged or edited: it does not fit its own digest; run"),
        (signed({"format": "pixart-features", "version": 2}), "not a complete manifest"),
        (signed({**asdict(MANIFEST), "width": 3}), "not a complete manifest"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_a_data_error(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=expected):
        read_manifest(tmp_path)


def test_a_manifest_reads_back_as_sealed(features):
    manifest = read_manifest(features)
    sums = {name: value for name, value in asdict(manifest).items() if name.endswith("_sha256")}
    paths = [path for unit in "bac" for path in features.glob(f"shards/{unit}-*.tar")]
    shards = [
        {
            "path": path.relative_to(features).as_posix(),
            "size_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": 4,
        }
        for path in paths
    ]
    assert manifest == replace(MANIFEST, **sums, shards=shards)
    names = {"index_sha256": "index.parquet", "entries_sha256": "entries.bin", "rejected_sha256": "rejected.parquet"}
    assert sums == {n: hashlib.sha256((features / path).read_bytes()).hexdigest() for n, path in names.items()}
    assert json.loads((features / "manifest.json").read_text())["format"] == "pixart-features"
    assert manifest_bytes(manifest) == (features / "manifest.json").read_bytes()


def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed_or_changes_nothing(features):
    path = features / "manifest.json"
    whole, before = path.read_bytes(), read_manifest(features)
    for bit in range(0, 8 * len(whole), 7):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = read_manifest(features)
        except DataError:
            continue
        assert found == before  # such as the e of 1e-5 made an E


def test_a_manifest_that_was_edited_is_refused(features):
    path = features / "manifest.json"
    path.write_text(path.read_text().replace('"width": 6', '"width": 7'))
    with pytest.raises(DataError, match="manifest.json: damaged or edited: .*; run `pixart extract` again"):
        FeatureSet(features)


def test_sets_are_found_by_name_and_a_set_is_itself(features):
    assert feature_sets(features.parent) == {"text": features}
    assert feature_sets(features) == {"text": features}
    (features / "manifest.json").unlink()
    assert feature_sets(features.parent) == {}


def test_shapes_follow_from_the_index():
    image = Manifest("image", "moments", "F16", {"channels": 4, "downsampling": 8}, {}, {})
    assert tensor_shape({"height_px": 128, "width_px": 512}, image) == (2, 4, 16, 64)
    assert tensor_shape({"num_tokens": 7}, MANIFEST) == (7, WIDTH)


def test_a_member_holds_several_tensors_one_after_the_other(tmp_path):
    low, high = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(6, dtype=np.uint16).reshape(3, 2)
    with ShardWriter(tmp_path / "s.tar", [("low", "U8"), ("high", "U16")]) as writer:
        place = writer.add("k", low, high)
        empty = writer.add("empty", low[:0], high[:0])
        with pytest.raises(ValueError, match="k: expected high in U16, got uint8"):
            writer.add("k", low, low)
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            writer.add("k", low)
    data = (tmp_path / "s.tar").read_bytes()
    assert data[place.offset_bytes : place.offset_bytes + place.size_bytes] == low.tobytes() + high.tobytes()
    assert place.crc32 == zlib.crc32(low.tobytes() + high.tobytes())
    assert (empty.size_bytes, empty.crc32, empty.offset_bytes % 64) == (0, 0, 0)
    with tarfile.open(tmp_path / "s.tar") as tar:
        read = load_safetensors(tar.extractfile("k.safetensors").read())
        assert tar.getnames() == ["k.safetensors", "empty.safetensors"]
    np.testing.assert_array_equal(read["low"], low, strict=True)
    np.testing.assert_array_equal(read["high"], high, strict=True)


def test_the_mirrored_image_is_a_second_member_of_its_sample(tmp_path):
    import webdataset

    values = [np.full((2, 4, 2, 3), number, np.float16) for number in (1, 2)]
    with ShardWriter(tmp_path / "s.tar", MOMENTS) as writer:
        writer.add("a/b", values[0])
        writer.add("a/b", values[1], extension=FLIPPED_MEMBER)
    [sample] = webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False)
    read = [load_safetensors(sample[name])["moments"] for name in ("safetensors", "flipped.safetensors")]
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("extension", ["safetensors", FLIPPED_MEMBER])
@pytest.mark.parametrize("key", KEYS)
def test_all_bytes_before_the_tensors_can_be_made_again(tmp_path, key, extension):
    values = tensor(1)
    with ShardWriter(tmp_path / "s.tar", [("t5", "F16")]) as writer:
        place = writer.add(key, values, extension=extension)
    prefix = member_prefix(key, [("t5", "F16", values.shape)], extension)
    assert (tmp_path / "s.tar").read_bytes()[: place.offset_bytes] == prefix


def test_the_tensors_of_a_member_follow_from_its_row():
    image = Manifest("image", "moments", "F16", {"channels": 4, "downsampling": 8}, {}, {})
    assert member_tensors({"height_px": 64, "width_px": 32}, image) == [("moments", "F16", (2, 4, 8, 4))]
    text = Manifest("text", "t5", "BF16", {"width": 8}, {}, {}, codec={"name": "int8", "group": 8})
    row = {"num_tokens": 3, "size_bytes": 3 * 8 + 3 * 2}
    assert member_tensors(row, text) == [("t5", "I8", (3, 8)), ("t5_scale", "BF16", (3, 1))]
    with pytest.raises(ValueError, match="expected 30 bytes for 3 tokens, found 31"):
        member_tensors({**row, "size_bytes": 31}, text)


def test_one_read_fills_several_buffers(features):
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        preadv = os.preadv
        patch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
        opened = FeatureSet(features)
        row = opened.index.to_pylist()[2]
        first, second = np.empty(5, np.uint8), np.empty(row["size_bytes"] - 5, np.uint8)
        opened.read_into(row["shard"], row["offset_bytes"], first.data, second.data)
        opened.close()
    assert len(calls) == 1
    assert first.tobytes() + second.tobytes() == tensor(2).tobytes()


def test_a_set_travels_to_another_process_by_its_path(features):
    opened = FeatureSet(features)
    row = opened.index.to_pylist()[0]
    assert np.array_equal(read(opened, row), tensor(0))
    copy = pickle.loads(pickle.dumps(opened))
    assert np.array_equal(read(copy, row), tensor(0))
    assert np.array_equal(copy.entries, opened.entries)
    opened.close()
    copy.close()


def test_keys_are_read_by_row(features):
    opened = FeatureSet(features)
    keys = opened.index["key"].to_pylist()
    assert opened.keys(opened.entries["row"]) == [keys[row] for row in opened.entries["row"]]
    assert opened.keys([5, 0]) == ["a/1", "b/0"]
