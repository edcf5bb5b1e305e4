import itertools
import json
import logging
import os
import pickle
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pixart_data.codecs import CODECS
from pixart_data.entries import ENTRIES
from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet, read_manifest
from pixart_model import dataset as module
from pixart_model.batches import pad
from pixart_model.config import Data
from pixart_model.dataset import open_dataset
from pixart_model.sizes import pixart_tiny
from tests.model.conftest import CANVASES, change_manifest, damage, open_set, write_image_set, write_text_set

CPU = torch.device("cpu")
KEYS = [f"source/{i:03d}" for i in range(25)]


@pytest.fixture
def opened(features):
    """Opens the features, or others, and closes them in the end."""
    datasets = []

    def open_(root=features, seed=0, **data):
        datasets.append(open_dataset(Data(features=str(root), **{"batch_size": 4, **data}), seed))
        return datasets[-1]

    yield open_
    for dataset in datasets:
        dataset.close()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Mirrored images, and the same captions by each codec; also what is to be read of each key."""
    root = tmp_path_factory.mktemp("stored")
    write_image_set(root / "256px", KEYS, np.random.default_rng(0), flips=True)
    return root, {name: write_text_set(root / name, KEYS[::-1], np.random.default_rng(1), name) for name in CODECS}


def first(dataset, count, **start):
    """The first batches, on the CPU and padded."""
    return [batch.to(CPU) for batch in itertools.islice(dataset.batches(**start), count)]


def told(batches):
    """What tells batches apart, to the bit."""
    return [(b.keys, *(t.view(torch.uint8).tolist() for t in (b.moments, b.text, b.mask, b.size_px))) for b in batches]


def moments_of(images, row, prefix=""):
    shape = (2, 4, row["height_px"] // 8, row["width_px"] // 8)
    return images.read_tensor(row["shard"], row[f"{prefix}offset_bytes"], row["size_bytes"], shape)


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_is_what_the_sets_hold(opened, stored, codec):
    root, texts = stored
    images, rows = open_set(root / "256px")
    dataset = opened(root, text_set=codec)
    seen = Counter()
    for host in itertools.islice(dataset.batches(), 2 * dataset.num_batches()):
        batch, packed = host.to(CPU), host.to(CPU, packed=True)
        seen.update(batch.keys)
        ends = packed.offsets.tolist()
        captions = packed.captions.split()
        assert (packed.offsets.dtype, list(packed.captions.lengths)) == (torch.int32, host.lengths.tolist())
        for i, key in enumerate(batch.keys):
            row, text = rows[key], texts[codec][key]
            np.testing.assert_array_equal(batch.moments[i].numpy(), moments_of(images, row))
            assert torch.equal(batch.text[i, : len(text)].view(torch.int16), text.view(torch.int16))
            assert torch.equal(packed.text[ends[i] : ends[i + 1]].view(torch.int16), text.view(torch.int16))
            assert torch.equal(captions[i].view(torch.int16), text.view(torch.int16))
            assert not batch.text[i, len(text) :].any()
            assert batch.mask[i].tolist() == [j < len(text) for j in range(batch.text.shape[1])]
            assert batch.size_px[i].tolist() == [row["original_height_px"], row["original_width_px"]]
            assert batch.ratio[i] == pytest.approx(float(row["bucket"]))
        assert batch.text.shape[1] == batch.mask.sum(1).max()
        assert batch.text.dtype == packed.text.dtype == torch.bfloat16
        assert (len(batch), batch.moments.dtype, ends[-1]) == (4, torch.float16, len(packed.text))
        assert packed.keys == batch.keys == host.keys
        assert torch.equal(packed.moments, batch.moments)
        assert torch.equal(packed.size_px, batch.size_px)
        assert torch.equal(packed.ratio, batch.ratio)
    assert set(seen) == set(KEYS)
    assert sum(seen.values()) == 2 * dataset.num_batches() * 4
    images.close()


def test_counts_of_what_matches(opened, caplog):
    with caplog.at_level(logging.INFO):
        dataset = opened()
    assert len(dataset) == 23
    assert dataset.facts()["counts"] == {
        "images": 25, "samples": 23, "left_out": 0, "without_text": 2, "texts": [23], "texts_without_image": [1]
    }  # fmt: skip
    assert "23 samples; 2 images without text, 1 texts without image" in caplog.text


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 7)])
def test_any_position_continues_the_same_stream(opened, threads, prefetch):
    dataset = opened(seed=5, num_threads=threads, num_prefetch=prefetch)
    stream = told(first(opened(seed=5), 15))
    for start in (0, 1, 5, 6, 14):
        assert told(first(dataset, 15 - start, step=start)) == stream[start:]
    assert told(first(opened(seed=6), 15)) != stream


def test_ranks_share_one_order(opened):
    dataset = opened()
    stream = told(first(dataset, 12))
    ranks = [told(first(dataset, 4, rank=rank, world=3)) for rank in range(3)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == stream
    assert told(first(dataset, 2, step=5, rank=1, world=2)) == [stream[6], stream[8]]


def test_memory_is_used_again_and_a_batch_says_when_it_is_over(opened):
    dataset = opened(num_threads=2, num_prefetch=3)
    batches = dataset.batches()
    places, before = set(), None
    for batch in itertools.islice(batches, 30):
        places.add(batch.moments.data_ptr())
        if before is not None:
            with pytest.raises(RuntimeError, match=f"batch {before.step}: used after the next one was asked for"):
                before.to(CPU)
            with pytest.raises(RuntimeError, match="used after"):
                pickle.dumps(before)
        before = batch
    batches.close()
    assert len(places) <= 2 * (3 + 2 + 1), "each may grow once, from the smaller canvas to the larger"
    own = dataset.read(3)
    dataset.read(4)
    assert told([own.to(CPU)]) == told(first(dataset, 1, step=3))


def test_what_to_returns_outlives_the_batch(opened):
    dataset = opened(num_threads=1, num_prefetch=1)
    batches = dataset.batches()
    kept = [batch.to(CPU) for batch in itertools.islice(batches, 9)]
    assert told(kept) == told([dataset.read(i).to(CPU) for i in range(9)])
    packed = [dataset.read(i).to(CPU, packed=True).text for i in range(9)]
    for batch, text in zip(kept, packed, strict=True):
        assert torch.equal(batch.text[batch.mask], text)


def test_keys_are_looked_up_only_when_asked_for(opened, copy):
    dataset = opened(copy)
    (copy / "256px/index.parquet").unlink()
    [batch] = first(dataset, 1)
    assert batch.moments.isfinite().all()
    with pytest.raises(DataError, match=r"index\.parquet: missing; run `pixart verify"):
        _ = batch.keys


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_can_be_sent_to_another_process(opened, stored, codec):
    dataset = opened(stored[0], text_set=codec)
    batch = dataset.read(2)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(batch))))
    assert told([again.to(CPU)]) == told([batch.to(CPU)])
    assert (again.keys, again.step, again.skipped) == (batch.keys, 2, ())


# Mirrored images


def test_a_share_of_the_samples_is_mirrored(opened, stored):
    root, _ = stored
    images, rows = open_set(root / "256px")

    def mirrored(**data):
        found = {}
        for batch in first(opened(root, text_set="bf16", **data), 60):
            for key, moments in zip(batch.keys, batch.moments.numpy(), strict=True):
                plain, flipped = moments_of(images, rows[key]), moments_of(images, rows[key], "flipped_")
                assert np.array_equal(moments, flipped) != np.array_equal(moments, plain)
                found.setdefault(key, []).append(np.array_equal(moments, flipped))
        return found

    assert all(all(drawn) for drawn in mirrored(flip=1.0).values())
    assert not any(any(drawn) for drawn in mirrored(flip=0.0).values())
    some = mirrored(flip=0.3)
    drawn = [one for key in KEYS for one in some[key]]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.09)  # three standard errors of 240
    assert len({tuple(some[key][:8]) for key in KEYS}) > 10
    again = mirrored(flip=0.3, batch_size=5, num_threads=1)  # in another order, the same of each epoch
    assert all(again[key][:8] == some[key][:8] for key in KEYS)
    assert mirrored(flip=0.3, seed=1) != some
    images.close()


def test_a_set_without_mirrored_images_cannot_give_any(opened):
    with pytest.raises(ConfigError, match="data.flip: .*256px holds no mirrored images; extract with image.flips"):
        opened(flip=0.5)


# What is damaged


@pytest.mark.parametrize("name", ["256px", "text"])
def test_a_damaged_sample_is_named(opened, copy, name):
    damage(copy / name, "source/005")
    message = rf"sample source/005: .*{name}.*: damaged at byte [\d,]+: its checksum .* `pixart verify .*{name}` names"
    with pytest.raises(DataError, match=message):
        first(opened(copy), 6)


@pytest.mark.parametrize("name", ["256px", "text"])
def test_a_damaged_sample_is_replaced_by_the_next_of_its_batch(opened, features, copy, name, caplog):
    damage(copy / name, "source/005")
    dataset, whole = opened(copy, damaged="skip"), opened(features)
    skipped = 0
    for batch, original in zip(
        itertools.islice(dataset.batches(), 12), (whole.read(i) for i in range(12)), strict=True
    ):
        keys, wanted = batch.keys, original.keys
        assert batch.skipped == ("source/005",) * wanted.count("source/005")
        skipped += len(batch.skipped)
        got, want = batch.to(CPU), original.to(CPU)
        for i in range(4):
            j = i
            while wanted[j] == "source/005":
                j = (j + 1) % 4
            assert keys[i] == wanted[j]
            assert torch.equal(got.moments[i], want.moments[j])
            assert torch.equal(got.text[i][got.mask[i]], want.text[j][want.mask[j]])
            assert torch.equal(got.size_px[i], want.size_px[j])
    assert skipped > 1
    assert caplog.text.count("skipped: sample source/005: ") == 1
    assert told(first(dataset, 12)) == told(first(opened(copy, damaged="skip", num_threads=1), 12))


def test_a_mirrored_image_is_damaged_by_itself(opened, stored, tmp_path):
    root, _ = stored
    shutil.copytree(root, tmp_path / "copy")
    damage(tmp_path / "copy/256px", "source/005", flipped=True)
    first(opened(tmp_path / "copy", text_set="bf16"), 12)
    with pytest.raises(DataError, match="sample source/005: .*damaged"):
        first(opened(tmp_path / "copy", text_set="bf16", flip=1.0), 12)


def test_a_batch_without_a_whole_sample_fails(opened, copy):
    for key in KEYS[:23]:
        damage(copy / "256px", key)
    with pytest.raises(DataError, match="sample source/.*: damaged .*; so is every other sample of the batch"):
        first(opened(copy, damaged="skip"), 1)


@pytest.mark.parametrize("spoil", ["missing", "cut"])
def test_a_missing_or_short_shard_is_named_and_what_it_held_can_be_skipped(opened, copy, spoil):
    images, rows = open_set(copy / "256px")
    [bucket] = {rows["source/005"]["bucket"]}
    path = copy / "256px" / rows["source/005"]["shard"]
    lost = {key for key, row in rows.items() if row["bucket"] == bucket}
    if spoil == "missing":
        path.unlink()
    else:
        last = max(lost, key=lambda key: rows[key]["offset_bytes"])
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.truncate(rows[last]["offset_bytes"] + 100)
        lost = {last}
    with pytest.raises(DataError, match="missing" if spoil == "missing" else "ends early"):
        first(opened(copy), 12)
    if spoil == "cut":
        dataset = opened(copy, damaged="skip")
        skipped = [key for batch in itertools.islice(dataset.batches(), 12) for key in batch.skipped]
        assert set(skipped) == lost & set(KEYS[:23])
    images.close()


@pytest.mark.parametrize(("name", "itemsize"), [("256px", 64), ("text", 40)])
def test_a_damaged_record_is_noticed_and_its_sample_can_be_skipped(opened, copy, name, itemsize):
    opened(copy).close()  # the plan is there already: building it reads the records too
    path = copy / name / ENTRIES
    before = path.stat()
    path.chmod(0o644)
    number = 9 if name == "256px" else int(np.flatnonzero(FeatureSet(copy / name).entries["row"] == 9)[0])
    with path.open("r+b") as file:
        file.seek(number * itemsize + 20)
        file.write(b"\xff\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that decays does not say so
    with pytest.raises(DataError, match=f"record {number} does not fit its check; `pixart extract`"):
        first(opened(copy), 12)
    skipped = [key for batch in first_host(opened(copy, damaged="skip"), 12) for key in batch.skipped]
    assert skipped
    assert {key.split(" of ")[0] for key in skipped} <= {f"record {i}" for i in range(25)}
    os.utime(path)
    with pytest.raises(DataError, match=f"record {number} does not fit its check; `pixart verify"):
        opened(copy)


def first_host(dataset, count):
    return list(itertools.islice(dataset.batches(), count))


def test_records_exchanged_for_those_of_other_texts_are_noticed(opened, copy):
    opened(copy)
    path = copy / "text" / ENTRIES
    before = path.stat()
    path.chmod(0o644)
    entries = np.fromfile(path, FeatureSet(copy / "text").entries.dtype)
    entries[::-1].tofile(path)  # each is whole
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="found a text of another key or length than the plan has"):
        first(opened(copy), 6)


def test_the_null_caption_is_read_and_checked(opened, stored, copy):
    root, texts = stored
    for codec in CODECS:
        null = opened(root, text_set=codec).null_caption()
        assert torch.equal(null, texts[codec][""])
        assert (null.shape, null.dtype) == ((1, 24), torch.bfloat16)
    change_manifest(copy / "text", lambda fields: fields["model"]["null"].update(crc32=1))
    with pytest.raises(DataError, match="the empty caption is damaged: its checksum"):
        opened(copy).null_caption()
    change_manifest(copy / "text", lambda fields: fields["model"]["null"].update(num_tokens=2))
    with pytest.raises(DataError, match="the empty caption is damaged"):
        opened(copy).null_caption()
    change_manifest(copy / "text", lambda fields: fields["model"].pop("null"))
    with pytest.raises(DataError, match="no features of the empty caption"):
        opened(copy).null_caption()


def test_what_a_codec_needs_is_checked(opened, stored, tmp_path):
    root, _ = stored
    shutil.copytree(root, tmp_path / "copy")
    path = tmp_path / "copy/int8/codec.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="codec.safetensors: damaged"):
        opened(tmp_path / "copy", text_set="int8")
    path.unlink()
    with pytest.raises(DataError, match="codec.safetensors: missing; copy it again"):
        opened(tmp_path / "copy", text_set="int8")


# Opening


def test_sets_that_are_absent_swapped_or_strangers_are_refused(opened, copy):
    with pytest.raises(ConfigError, match="data.image_set: no feature set 512px in .*; sets there: 256px, text"):
        opened(image_set="512px")
    with pytest.raises(DataError, match="expected image features in F16, found text in BF16"):
        opened(image_set="text")
    shutil.rmtree(copy / "text")
    write_text_set(copy / "text", ["other/1", "other/2"], np.random.default_rng(0))
    with pytest.raises(DataError, match="25 samples and text 2, with no key in common"):
        opened(copy)


def test_the_plan_is_kept_in_the_cache(opened, tmp_path, monkeypatch):
    opened(cache_dir=str(tmp_path / "here"))
    assert len(list((tmp_path / "here/plans").glob("*.plan"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    opened()
    [plan] = (tmp_path / "there/pixart-toolkit/plans").glob("*.plan")
    before = plan.stat().st_ino
    opened()
    assert plan.stat().st_ino == before


def test_a_model_must_fit(opened):
    dataset = opened()
    fitting = pixart_tiny().model_copy(update={"caption_width": 24, "base_size": 8})
    dataset.require(fitting)
    with pytest.raises(ConfigError, match="model.base_size: expected 8 for the features in .*, got 32"):
        dataset.require(fitting.model_copy(update={"base_size": 32}))
    with pytest.raises(
        ConfigError, match="model.caption_width: expected 24, .* got 4096; set model.caption_width = 24"
    ):
        dataset.require(pixart_tiny())


def test_facts_say_where_the_features_come_from(opened):
    facts = opened().facts()
    assert facts["image"]["model"]["scaling_factor"] == 0.18215
    assert facts["text"]["model"]["revision"] == "def"
    assert facts["resolution_px"] == 64
    assert json.loads(json.dumps(facts)) == facts


def test_captions_come_from_all_over_the_dataset(opened, stored):
    root, texts = stored
    dataset = opened(root, text_set="bf16-packed")
    few = dataset.first_captions(5)
    every = dataset.first_captions(1000)
    assert (len(few), len(every)) == (5, 25)

    def bits(tensor):
        return tensor.view(torch.int16).flatten().tolist()

    known = [bits(texts["bf16-packed"][key]) for key in KEYS]
    assert sorted(map(bits, every)) == sorted(known)
    assert [bits(one) for one in few] == [bits(every[i]) for i in (0, 5, 10, 15, 20)]
    commonest = Counter(row["bucket"] for row in open_set(root / "256px")[1].values()).most_common(1)[0][0]
    bucket = dataset.commonest_bucket()
    assert (bucket.ratio, (bucket.height_px, bucket.width_px)) == (commonest, CANVASES[commonest])


def test_captions_are_padded_with_zeros():
    text, mask = pad([torch.ones(2, 3), torch.ones(4, 3)])
    assert text.shape == (2, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert not text[0, 2:].any()


# Subsets


def keys_of(dataset, batches=30):
    return {key for batch in first(dataset, batches) for key in batch.keys}


def test_a_query_chooses_the_samples(opened, features, tmp_path, caplog):
    rows = [row for row in pq.read_table(features / "256px/index.parquet").to_pylist() if row["key"] in KEYS[:23]]
    with caplog.at_level(logging.INFO):
        dataset = opened(where='bucket in ("1.00", "2.00") and min(original_height_px, original_width_px) > 100')
    assert keys_of(dataset) == {
        row["key"]
        for row in rows
        if row["bucket"] in ("1.00", "2.00") and min(row["original_height_px"], row["original_width_px"]) > 100
    }
    assert 0 < len(dataset) < 23
    assert "rows match" in caplog.text
    assert "left out" in caplog.text


def test_a_query_may_use_scores(opened, tmp_path):
    scores = {key: i / 2 for i, key in enumerate(reversed(KEYS)) if i % 3}
    table = pa.table({"aesthetic": list(scores.values()), "key": list(scores), "other": ["x"] * len(scores)})
    pq.write_table(table, tmp_path / "scores.parquet")
    wanted = {key for key, score in scores.items() if score > 4} & set(KEYS[:23])
    data = {"scores": str(tmp_path / "scores.parquet")}
    assert keys_of(opened(where="aesthetic > 4", **data)) == wanted
    assert keys_of(opened(where="not aesthetic > 4", **data)) == (set(scores) - wanted) & set(KEYS[:23])
    assert keys_of(opened(where='aesthetic > 4 and other == "x" and bucket != "0"', **data)) == wanted
    facts = [opened(where=f"aesthetic > {least}", **data).order_facts() for least in (4, 4.2, 3)]
    assert facts[0]["data.scores"] == facts[1]["data.scores"] != facts[2]["data.scores"]
    with pytest.raises(ConfigError, match="no column aesthetics; did you mean aesthetic?"):
        opened(where="aesthetics > 4", **data)
    with pytest.raises(ConfigError, match="no column aesthetic; name another; .* a table .* as data.scores"):
        opened(where="aesthetic > 4")
    with pytest.raises(DataError, match="none of 25 images matches data.where = 'aesthetic > 40'; change it"):
        opened(where="aesthetic > 40", **data)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"key": ["a", "b", "a"], "score": [1.0, 2.0, 3.0]}, DataError, "one row for each key, found rows 0 and 2"),
        ({"name": ["a"], "score": [1.0]}, ConfigError, "data.scores: .*: expected a column key, found name, score"),
        ({"key": ["a"], "score": [1], "bucket": ["1"]}, ConfigError, "column bucket is in the index too; rename it"),
        (None, ConfigError, "data.scores: .*scores.parquet: no such file or folder; check the path"),
        (b"PAR1 not", DataError, "scores.parquet: cannot be read as a Parquet table"),
    ],
)
def test_scores_that_cannot_be_used_are_refused(opened, tmp_path, columns, error, message):
    path = tmp_path / "scores.parquet"
    if isinstance(columns, bytes):
        path.write_bytes(columns)
    elif columns:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(error, match=message):
        opened(where='score > 1 and bucket == "1.00"', scores=str(path))


def test_scores_without_a_query_are_a_mistake():
    with pytest.raises(ValueError, match="scores: expected a query that uses them"):
        Data(features="x", scores="y.parquet")


# Several datasets


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another dataset, of the same encoders."""
    root = tmp_path_factory.mktemp("other")
    keys = [f"other/{i:03d}" for i in range(40)]
    write_image_set(root / "256px", keys, np.random.default_rng(5), flips=True)
    write_text_set(root / "text", keys, np.random.default_rng(6), "int8")
    return root


def test_datasets_are_mixed_by_their_weights(opened, other, features):
    mixed = opened(weight=3.0, mix=[{"features": str(other), "weight": 1.0}])
    batches = first(mixed, 128)
    of_other = [i for i, batch in enumerate(batches) if batch.keys[0].startswith("other/")]
    assert all(len({key.split("/")[0] for key in batch.keys}) == 1 for batch in batches)
    assert len(of_other) == 32
    assert max(np.diff(of_other)) < 20
    own = [i for i in range(128) if i not in of_other]
    assert told(batches[i] for i in own) == told(first(opened(), 96))
    assert told(batches[i] for i in of_other) == told(first(opened(other), 32))
    assert told(first(mixed, 28, step=100)) == told(batches[100:])
    assert len(mixed) == 63
    facts = mixed.facts()
    assert facts["mix"][0]["weight"] == 1.0
    assert facts["mix"][0]["counts"]["samples"] == 40
    assert json.loads(json.dumps(facts)) == facts
    assert mixed.epochs(128) == [opened().epochs(96)[0], opened(other).epochs(32)[0]]


def test_epochs_are_counted_by_samples_where_buckets_are_smaller_than_a_batch(opened):
    """Of 23 samples in three buckets, 40 a batch: some epochs have no batch at all, and none of them is skipped."""
    dataset = opened(batch_size=40, small_buckets="carry")
    assert 0 in [dataset.num_batches(epoch) for epoch in range(20)]
    assert [dataset.epochs(23 * count) for count in (1, 2, 15)] == [[40.0], [80.0], [600.0]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("text", lambda fields: fields["model"].update(revision="other"), "expected the text encoder of .*'def'"),
        (
            "256px",
            lambda fields: fields["policy"].update(resolution_px=512),
            "expected the resolution of .*, 64, .* 51",
        ),
        ("256px", lambda fields: fields["model"].update(id="x"), "expected the image encoder of .*tiny/vae"),
        ("256px", lambda fields: fields["model"].update(scaling_factor=0.5), "expected the latents of .*0.18215"),
        ("256px", lambda fields: fields["buckets"][0].update(width_px=80), "expected the bucket table of"),
    ],
)
def test_datasets_that_cannot_be_mixed_are_refused(opened, copy, features, name, change, message):
    change_manifest(copy / name, change)
    with pytest.raises(ConfigError, match=f"data.mix: .*copy: {message}"):
        opened(features, mix=[{"features": str(copy)}])


def test_a_dataset_can_be_sent_to_another_process(opened, other):
    mixed = opened(mix=[{"features": str(other), "weight": 1.0}], flip=0.0)
    again = pickle.loads(pickle.dumps(mixed))
    assert told(first(again, 10)) == told(first(mixed, 10))
    again.close()


def test_the_run_length_keeps_neighbours_together(opened):
    def neighbours(**data):
        rows = [opened(**data).read(i).names.rows.astype(int) for i in range(6)]
        return np.mean([np.abs(np.diff(one)).mean() for one in rows])

    assert neighbours(run_length=4) < neighbours()
    assert opened(run_length=4).order_facts()["data.run_length"] == 4
    assert opened().order_facts()["data.run_length"] == 1
    assert read_manifest(opened().images.root).index_sha256[:12] in opened().order_facts()["data.image_set"]


def test_a_query_believes_no_index_but_the_one_that_was_sealed(opened, features, tmp_path):
    shutil.copytree(features, tmp_path / "copy")
    path = tmp_path / "copy/256px/index.parquet"
    table = pq.read_table(path)
    heights = table["original_height_px"].to_pylist()
    table = table.set_column(table.schema.get_field_index("original_height_px"), "original_height_px", [heights[::-1]])
    pq.write_table(table, path)
    opened(tmp_path / "copy")  # does not read it
    with pytest.raises(DataError, match="index.parquet: damaged, or of another set; run `pixart extract` again"):
        opened(tmp_path / "copy", where="original_height_px > 130")


def test_the_run_lengths_of_all_datasets_decide_the_order(opened, features, tmp_path, monkeypatch):
    """One that moves to an object store would be read in longer runs."""
    shutil.copytree(features, tmp_path / "other")
    monkeypatch.setattr("pixart_model.dataset.is_remote", lambda root: "other" in str(root))
    mixed = opened(mix=[{"features": str(tmp_path / "other")}])
    assert mixed.order_facts()["data.run_length"] == [1, 8]
    assert opened().order_facts()["data.run_length"] == 1


def test_a_set_that_was_written_anew_is_not_opened_by_a_worker(opened, features, tmp_path):
    shutil.copytree(features, tmp_path / "copy")
    sent = pickle.dumps(opened(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy/text")
    write_text_set(tmp_path / "copy/text", KEYS[:9], np.random.default_rng(3))
    with pytest.raises(DataError, match="text: was written anew after it had been opened; start again"):
        pickle.loads(sent)


@pytest.mark.parametrize(
    ("num_sets", "said"),
    [
        (0, "set: 10,000,000 samples, 9,999 left out"),
        (1, "set: 10,000,000 samples; 1,234 images without text, 5,678 texts without image, 9,999 left out"),
    ],
)
def test_large_counts_can_be_read(caplog, num_sets, said):
    counts = SimpleNamespace(samples=10_000_000, without_text=1_234, texts_without_image=(5_678,), left_out=9_999)
    mixture = SimpleNamespace(sets=[None] * num_sets)
    with caplog.at_level(logging.INFO):
        module._tell("set", SimpleNamespace(joined=SimpleNamespace(counts=counts), mixture=mixture))
    assert caplog.messages == [said]
