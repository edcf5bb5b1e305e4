import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet
from pixart_model.config import Data, pixart_tiny
from pixart_model.dataset import Position, epoch_plan, open_dataset, pad


@pytest.fixture
def dataset(features):
    opened = open_dataset(Data(features=str(features), batch_size=4))
    yield opened
    opened.close()


@pytest.fixture
def copy(features, tmp_path):
    shutil.copytree(features, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (23, 4), (997, 32), (64, 64), (10, 100)])
def test_an_epoch_holds_every_sample_once_and_a_batch_one_bucket(rows, batch_size):
    bucket_of = np.random.default_rng(0).integers(0, 5, rows)
    plan = epoch_plan(bucket_of, batch_size, seed=3, epoch=1)
    batches = [plan[i] for i in range(len(plan))]
    assert sorted(np.concatenate(batches)) == list(range(rows))
    assert all(len(set(bucket_of[batch])) == 1 for batch in batches)
    for bucket in set(bucket_of):
        sizes = [len(batch) for batch in batches if bucket_of[batch[0]] == bucket]
        assert sum(size < batch_size for size in sizes) <= 1
        assert max(sizes) <= batch_size


def test_the_order_is_decided_by_seed_and_epoch_alone():
    bucket_of = np.zeros(50, dtype=np.int64)
    orders = [epoch_plan(bucket_of, 8, seed, epoch).rows.tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(range(50))
    assert epoch_plan(np.zeros(6, dtype=np.int64), 2, 7, 9).rows.tolist() == [1, 5, 4, 0, 3, 2]  # on any numpy


def test_buckets_are_mixed_over_the_epoch():
    bucket_of = np.repeat([0, 1], 500)
    plan = epoch_plan(bucket_of, 10, 0, 0)
    first_half = [bucket_of[plan[i][0]] for i in range(50)]
    assert 10 < sum(first_half) < 40


def test_counts_of_what_matches(dataset, features, caplog):
    assert vars(dataset.counts) == {"matched": 23, "images_without_text": 2, "texts_without_image": 1}
    with caplog.at_level(logging.INFO):
        open_dataset(Data(features=str(features))).close()
    assert "23 samples; 2 images without text, 1 texts without image" in caplog.text


def test_a_batch_is_what_the_sets_hold(dataset, features):
    images, texts = FeatureSet(features / "256px"), FeatureSet(features / "text")
    image_rows = {row["key"]: row for row in images.index.to_pylist()}
    text_rows = {row["key"]: row for row in texts.index.to_pylist()}
    seen = []
    for _, batch in itertools.islice(dataset.batches(Position(0, 0, 0)), dataset.num_batches):
        seen += batch.keys
        for i, key in enumerate(batch.keys):
            row, text = image_rows[key], text_rows[key]
            shape = (2, 4, row["height_px"] // 8, row["width_px"] // 8)
            expected = images.read_tensor(row["shard"], row["offset_bytes"], row["size_bytes"], shape)
            np.testing.assert_array_equal(batch.moments[i].numpy(), expected)
            n = text["num_tokens"]
            tokens = texts.read_tensor(text["shard"], text["offset_bytes"], text["size_bytes"], (n, 24))
            np.testing.assert_array_equal(batch.text[i, :n].view(torch.int16).numpy().view(np.uint16), tokens)
            assert not batch.text[i, n:].any()
            assert batch.mask[i].tolist() == [j < n for j in range(batch.text.shape[1])]
            assert batch.size_px[i].tolist() == [row["original_height_px"], row["original_width_px"]]
            assert batch.ratio[i] == pytest.approx(float(row["bucket"]))
        assert batch.text.shape[1] == batch.mask.sum(1).max()
    assert sorted(seen) == [f"source/{i:03d}" for i in range(23)]


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 7)])
def test_any_position_continues_the_same_stream(features, threads, prefetch):
    data = Data(features=str(features), batch_size=4, num_threads=threads, num_prefetch=prefetch)
    dataset = open_dataset(data)
    count = 2 * dataset.num_batches + 3
    stream = [(p, b.keys) for p, b in itertools.islice(dataset.batches(Position(5, 0, 0)), count)]
    for start in (1, dataset.num_batches - 1, dataset.num_batches, count - 1):
        position = stream[start][0]
        rest = itertools.islice(dataset.batches(position), count - start)
        assert [(p, b.keys) for p, b in rest] == stream[start:]
    assert stream[dataset.num_batches][0] == Position(5, 1, 0)
    dataset.close()


def test_a_damaged_sample_is_named(copy):
    row = FeatureSet(copy / "256px").index.to_pylist()[5]
    path = copy / "256px" / row["shard"]
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(row["offset_bytes"] + 3)
        byte = file.read(1)
        file.seek(row["offset_bytes"] + 3)
        file.write(bytes([byte[0] ^ 1]))
    dataset = open_dataset(Data(features=str(copy), batch_size=4))
    with pytest.raises(DataError, match=f"sample {row['key']} is damaged: its checksum"):
        list(itertools.islice(dataset.batches(Position(0, 0, 0)), dataset.num_batches))
    dataset.close()


def test_a_missing_shard_is_named(copy):
    dataset = open_dataset(Data(features=str(copy), batch_size=4))
    shard = FeatureSet(copy / "text").index["shard"][0].as_py()
    (copy / "text" / shard).unlink()
    with pytest.raises(DataError, match="missing"):
        dataset.read([0])
    dataset.close()


def test_the_null_caption_is_read_and_checked(dataset, copy):
    null = dataset.null_caption()
    assert (null.shape, null.dtype) == ((1, 24), torch.bfloat16)
    manifest = json.loads((copy / "text" / "manifest.json").read_text())
    manifest["model"]["null"]["crc32"] ^= 1
    (copy / "text" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="sample the empty caption is damaged"):
        open_dataset(Data(features=str(copy))).null_caption()
    del manifest["model"]["null"]
    (copy / "text" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no features of the empty caption"):
        open_dataset(Data(features=str(copy))).null_caption()


def test_sets_that_are_absent_swapped_or_strangers_are_refused(features, copy, write_texts):
    with pytest.raises(ConfigError, match="data.image_set: no feature set 512px in .*; sets there: 256px, text"):
        open_dataset(Data(features=str(features), image_set="512px"))
    with pytest.raises(DataError, match="expected image features in F16, found text in BF16"):
        open_dataset(Data(features=str(features), image_set="text"))
    shutil.rmtree(copy / "text")
    write_texts(copy / "text", ["other/1", "other/2"], np.random.default_rng(0))
    with pytest.raises(DataError, match="25 samples and text 2, with no key in common"):
        open_dataset(Data(features=str(copy)))


def test_a_model_must_fit(dataset):
    fitting = pixart_tiny().model_copy(update={"caption_width": 24, "base_size": 8})
    dataset.require(fitting)
    with pytest.raises(ConfigError, match="model.base_size: expected 8 for the features in .*, got 32"):
        dataset.require(fitting.model_copy(update={"base_size": 32}))
    with pytest.raises(
        ConfigError, match="model.caption_width: expected 24, .* got 4096; set model.caption_width = 24"
    ):
        dataset.require(pixart_tiny())


def test_facts_say_where_the_features_come_from(dataset):
    facts = dataset.facts()
    assert facts["image"]["model"]["scaling_factor"] == 0.18215
    assert facts["text"]["model"]["revision"] == "def"
    assert facts["resolution_px"] == 64
    assert json.loads(json.dumps(facts)) == facts


def test_captions_are_padded_with_zeros():
    text, mask = pad([torch.ones(2, 3), torch.ones(4, 3)])
    assert text.shape == (2, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert not text[0, 2:].any()
