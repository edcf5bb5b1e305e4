"""What is refused before the first step, in one line that says what to do."""

import itertools
import logging
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import read_manifest
from pixart_model import refusals
from pixart_model.config import Data
from pixart_model.dataset import open_dataset
from pixart_model.orders import Order
from pixart_model.sizes import pixart_tiny
from tests.model.conftest import change_manifest, open_set, write_image_set, write_text_set

MODEL = pixart_tiny().model_copy(update={"caption_width": 24, "base_size": 8})


@pytest.fixture
def opened(features):
    """Opens the features, or others, and closes them in the end."""
    datasets = []

    def open_(root=features, seed=0, classes=None, **data):
        datasets.append(open_dataset(Data(features=str(root), **{"batch_size": 4, **data}), seed, classes))
        return datasets[-1]

    yield open_
    for dataset in datasets:
        dataset.close()


@pytest.fixture
def refused(opened):
    """Opens a dataset, requires a model of it, and returns the one line that it is refused with."""

    def line(error, root, model=MODEL, **data):
        with pytest.raises(error) as raised:
            opened(root, **data).require(model)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return line


# The model and the manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_width": 4096}, "model.caption_width: expected 24, the width of .*text, got 4096; set model.cap"),
        ({"in_channels": 16}, "model.in_channels: expected 4, the channels of .*256px, got 16; set model.in_channels"),
        ({"base_size": 32}, "model.base_size: expected 8 for the features in .*256px, got 32; set model.base_size = 8"),
        ({"patch": 8}, "model.patch: expected a divisor of 6 and 12, the latent cells of bucket 0.50 .*, got 8; set"),
        ({"condition": "class"}, "model.condition: expected 'caption' for features .* opened with captions"),
    ],
)
def test_a_model_of_another_shape(opened, features, refused, change, message):
    assert re.match(message, refused(ConfigError, features, MODEL.model_copy(update=change)))
    opened().require(MODEL)


def test_a_model_of_classes_and_one_of_captions(opened, tmp_path, features, refused):
    write_image_set(tmp_path / "256px", [f"train/{i % 2}/{i}" for i in range(30)], np.random.default_rng(0))
    model = MODEL.model_copy(update={"condition": "class", "num_classes": 2, "caption_width": 4096})
    opened(tmp_path, classes=2).require(model)
    said = refused(ConfigError, tmp_path, model.model_copy(update={"num_classes": 3}), classes=2)
    assert "model.num_classes: expected 2, with which the features were opened, got 3" in said
    assert "data.text_set: expected captions" in refused(ConfigError, tmp_path, classes=2)
    said = refused(ConfigError, tmp_path)
    assert "data.text_set: no feature set text in" in said
    assert "sets there: 256px; name one of those, run `pixart extract` with [text], or train on classes" in said


@pytest.mark.parametrize("value", [None, 0, 0.0, -0.18, "0.18215", float("inf"), True])
def test_an_image_set_that_does_not_say_how_latents_are_scaled(copy, refused, value):
    change_manifest(copy / "256px", lambda fields: fields["model"].update(scaling_factor=value))
    said = refused(DataError, copy)
    assert f"expected a scaling_factor above 0 under model, the VAE's own, found {value!r}; extract the set" in said
    change_manifest(copy / "256px", lambda fields: fields["model"].pop("scaling_factor"))
    assert "found None" in refused(DataError, copy)


def test_a_shift_that_is_no_number(opened, copy, refused):
    change_manifest(copy / "256px", lambda fields: fields["model"].update(shift_factor=None))
    opened(copy).require(MODEL)
    change_manifest(copy / "256px", lambda fields: fields["model"].update(shift_factor="none"))
    assert "expected a number as shift_factor" in refused(DataError, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["model"].pop("channels"), "a whole number above 0 as model.channels, found None"),
        (lambda fields: fields["model"].update(downsampling=0), "above 0 as model.downsampling, found 0"),
        (lambda fields: fields["policy"].pop("resolution_px"), "above 0 as policy.resolution_px, found None"),
        (lambda fields: fields["buckets"][1].pop("width_px"), r"above 0 as buckets\[1\].width_px, found None"),
        (lambda fields: fields["buckets"].clear(), "above 0 as buckets, found 0"),
        (lambda fields: fields.update(kind="text"), "expected image features in F16, found text in F16"),
        (lambda fields: fields.update(dtype="F32"), "expected image features in F16, found image in F32"),
        (lambda fields: fields.update(version=99), "expected pixart-features version 2, found pixart-features version"),
        (lambda fields: fields.update(format="else"), "expected pixart-features version 2, found else version 2; run"),
    ],
)
def test_a_manifest_of_another_schema(copy, refused, change, message):
    change_manifest(copy / "256px", change)
    assert re.search(message, refused(DataError, copy))


def test_an_index_without_its_columns(copy, refused):
    """Of the index, training reads what queries and classes ask for."""
    path = copy / "256px/index.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["bucket"]), path)
    said = refused(DataError, copy, where='bucket == "1.00"')
    assert "index.parquet: damaged, or of another set; run `pixart extract` again" in said
    said = refused(DataError, copy, MODEL, classes=3)
    assert "index.parquet: damaged, or of another set" in said


# Buckets


def test_a_bucket_without_samples_is_passed_over(opened):
    dataset = opened(where='bucket != "2.00"')
    dataset.require(MODEL)
    assert 0 in dataset.portions[0].order.bucket_counts
    ratios = {float(ratio) for batch in itertools.islice(dataset.batches(), 20) for ratio in batch.ratio}
    assert ratios == {1.0, 0.5}
    assert dataset.commonest_bucket().ratio in ("1.00", "0.50")
    assert all(quality.num_batches for quality in dataset.quality())


def test_only_empty_buckets_are_refused(tmp_path, refused):
    write_image_set(tmp_path / "one/256px", ["a/b/c"], np.random.default_rng(0))
    write_text_set(tmp_path / "one/text", ["a/b/c"], np.random.default_rng(0))
    assert "matches data.where" in refused(DataError, tmp_path / "one", where="original_width_px < 0")
    write_image_set(tmp_path / "none/256px", [], np.random.default_rng(0))
    write_text_set(tmp_path / "none/text", ["a/b/c"], np.random.default_rng(0))
    for classes in (None, 3):
        said = refused(DataError, tmp_path / "none", classes=classes)
        assert "none/256px: expected images, found none: all 3 buckets are empty; `pixart inspect" in said


@pytest.fixture
def uneven(tmp_path):
    """20 samples of bucket 1.00, 2 of 0.50, and 3 of 2.00."""
    keys = [f"s/{i}" for i in range(60)]
    write_image_set(tmp_path / "uneven/256px", keys, np.random.default_rng(0))
    wanted = {"1.00": 20, "0.50": 2, "2.00": 3}
    of_buckets = {ratio: [] for ratio in wanted}
    for row in open_set(tmp_path / "uneven/256px")[1].values():
        of_buckets[row["bucket"]].append(row["key"])
    keys = [key for ratio, count in wanted.items() for key in of_buckets[ratio][:count]]
    write_text_set(tmp_path / "uneven/text", keys, np.random.default_rng(0))
    return tmp_path / "uneven"


def test_buckets_smaller_than_a_batch_are_named_and_each_way_out_is_one(uneven, opened, refused):
    said = refused(ConfigError, uneven)
    assert "data.batch_size: expected 4 samples or more in every bucket of" in said
    assert "found fewer in 2 of 3: 1.00" not in said
    assert "found fewer in 2 of 3: 0.50 with 2, 2.00 with 3; lower data.batch_size to 2, leave them out with" in said
    [lowered] = re.findall(r"lower data.batch_size to (\d+)", said)
    opened(uneven, batch_size=int(lowered)).require(MODEL)
    [where] = re.findall(r"data.where = '(.*?)'", said)
    assert where == 'bucket not in ("0.50", "2.00")'
    left = opened(uneven, where=where)
    left.require(MODEL)
    assert len(left) == 20
    [carry] = re.findall(r'data.small_buckets = "(\w+)"', said)
    carrying = opened(uneven, small_buckets=carry)
    carrying.require(MODEL)
    ratios = {float(ratio) for batch in itertools.islice(carrying.batches(), 13) for ratio in batch.ratio}
    assert ratios == {0.5, 1.0, 2.0}


def test_how_often_small_buckets_that_carry_repeat_a_sample_is_said_once(uneven, opened, caplog):
    """No batch of the first hundred holds a sample more often than is said, and one of each bucket does as often."""
    dataset = opened(uneven, batch_size=7, small_buckets="carry")
    caplog.clear()
    with caplog.at_level(logging.INFO, "pixart_model.refusals"):
        dataset.require(MODEL)
    [line] = [one.getMessage() for one in caplog.records if one.name == "pixart_model.refusals"]
    assert line == (
        "data.small_buckets: batches of 7 hold a sample more than once in 2 of 3 buckets: "
        "0.50 with 2 (up to 4 times), 2.00 with 3 (up to 3 times)"
    )
    most = {}
    for picks in map(dataset.portions[0].order.batch, range(100)):
        ratio = dataset.portions[0].buckets[picks.bucket].ratio
        most[ratio] = max(most.get(ratio, 0), *np.unique(picks.samples, return_counts=True)[1].tolist())
    assert (most["0.50"], most["2.00"]) == (4, 3)
    caplog.clear()
    opened(uneven, batch_size=2, small_buckets="carry").require(MODEL)
    assert "pixart_model.refusals" not in {one.name for one in caplog.records}


@pytest.mark.parametrize(("count", "size", "times"), [(1, 4, 4), (2, 4, 2), (3, 4, 2), (3, 5, 3), (4, 6, 2)])
def test_how_often_a_batch_can_hold_a_sample(count, size, times):
    order = Order([count], size, 0)
    found = max(np.unique(order.batch(number).samples, return_counts=True)[1].max() for number in range(300))
    assert refusals._most_times(count, size) == found == times


def test_what_leaves_small_buckets_out_goes_with_the_query_there_is(uneven, opened, refused):
    said = refused(ConfigError, uneven, where='bucket in ("1.00", "0.50")')
    [where] = re.findall(r"data.where = '(.*?)',", said)
    assert where == '(bucket in ("1.00", "0.50")) and bucket != "0.50"'
    opened(uneven, where=where).require(MODEL)
    said = refused(ConfigError, uneven, where="bucket in ('1.00', '0.50')")
    assert """data.where = "(bucket in ('1.00', '0.50')) and bucket != \\"0.50\\"",""" in said


def test_where_every_bucket_is_small_none_can_be_left_out(uneven, refused):
    said = refused(ConfigError, uneven, batch_size=21)
    assert "found fewer in 3 of 3: 0.50 with 2, 2.00 with 3, 1.00 with 20; lower" in said
    assert "data.where" not in said


# Shards


def cut(root, key, more_bytes=100):
    """Cut a shard short in a sample; returns the shard and the keys that it lost."""
    _, rows = open_set(root)
    path = root / rows[key]["shard"]
    path.chmod(0o644)
    end = rows[key]["offset_bytes"] + more_bytes
    with path.open("r+b") as file:
        file.truncate(end)
    lost = [row for row in rows.values() if row["shard"] == rows[key]["shard"]]
    return path, [row["key"] for row in lost if row["offset_bytes"] + row["size_bytes"] > end]


@pytest.mark.parametrize("name", ["256px", "text"])
def test_a_shard_that_was_cut_short_is_named_with_the_first_sample_lost(copy, opened, refused, name, caplog):
    expected = {shard["path"]: shard["size_bytes"] for shard in read_manifest(copy / name).shards}
    path, lost = cut(copy / name, "source/010")
    said = refused(DataError, copy)
    whole = expected[path.relative_to(copy / name).as_posix()]
    assert f"{path}: expected {whole:,} bytes, found {path.stat().st_size:,}: {len(lost)} of its" in said
    assert any(f"samples are lost, {key} first; copy it again, or" in said for key in lost)
    assert f"data.damaged = 'skip'; `pixart verify {copy / name}` names all" in said
    with caplog.at_level(logging.WARNING):
        opened(copy, damaged="skip").require(MODEL)
    assert "samples are lost" in caplog.text
    with pytest.raises(DataError, match=rf"sample source/\d+: {path}: ends early; `pixart verify .* 'skip'"):
        list(itertools.islice(opened(copy).batches(), 20))


def test_of_several_shards_that_are_not_whole_the_first_is_named(copy, refused):
    keys = {row["shard"]: key for key, row in open_set(copy / "256px")[1].items()}
    paths = [cut(copy / "256px", key)[0] for key in keys.values()]
    assert len(paths) == 3
    assert "(2 more shards are not whole either)" in refused(DataError, copy)
    paths[0].unlink()
    assert "(2 more shards are not whole either)" in refused(DataError, copy)
    for path in paths[1:]:
        shutil.copy(copy / "text/manifest.json", path)  # of another length
    assert "(2 more shards are not whole either)" in refused(DataError, copy)


def lose(root, lost=lambda path: True):
    """Take away shards, by their paths."""
    for shard in read_manifest(root).shards:
        if lost(shard["path"]):
            (root / shard["path"]).unlink()


def test_a_bucket_that_lost_all_its_samples_is_refused_with_what_leaves_it_out(copy, opened, refused):
    rows = open_set(copy / "256px")[1].values()
    lost = {row["shard"] for row in rows if row["bucket"] == "0.50"}
    lose(copy / "256px", lost.__contains__)
    assert {row["bucket"] for row in rows if row["shard"] not in lost} == {"1.00", "2.00"}
    said = refused(DataError, copy, damaged="skip")
    assert f"in every bucket of {copy / '256px'}, found none in 1 of 3: 0.50; copy the shards" in said
    [where] = re.findall(r"data.where = '(.*?)'", said)
    assert where == 'bucket != "0.50"'
    left = opened(copy, damaged="skip", where=where)
    left.require(MODEL)
    assert sum(1 for _ in itertools.islice(left.batches(), 12)) == 12


def test_where_every_bucket_is_lost_none_can_be_left_out(copy, refused):
    lose(copy / "text")
    said = refused(DataError, copy, damaged="skip")
    assert "found none in 3 of 3: " in said
    assert said.endswith("; copy the shards named above again")


def test_samples_that_another_text_set_holds_are_not_lost(copy, opened, refused):
    shutil.copytree(copy / "text", copy / "short")
    lose(copy / "text")
    opened(copy, damaged="skip", text_mix={"text": 1, "short": 1}).require(MODEL)
    lose(copy / "short")
    assert "found none in 3 of 3" in refused(DataError, copy, damaged="skip", text_mix={"text": 1, "short": 1})


def test_mirrored_tensors_that_are_left_keep_a_bucket(tmp_path, opened, refused):
    """A shard that ends before its mirrored images holds the others, and those are read where nothing is mirrored."""
    keys = [f"s/{i}" for i in range(30)]
    write_image_set(tmp_path / "one/256px", keys, np.random.default_rng(0), flips=True)
    write_text_set(tmp_path / "one/text", keys, np.random.default_rng(1))
    rows = [row for row in open_set(tmp_path / "one/256px")[1].values() if row["bucket"] == "0.50"]
    for shard in {row["shard"] for row in rows}:
        own = [row for row in rows if row["shard"] == shard]
        first = min(min(row["offset_bytes"], row["flipped_offset_bytes"]) + row["size_bytes"] for row in own)
        path = tmp_path / "one/256px" / shard
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.truncate(first)
    opened(tmp_path / "one", damaged="skip", flip=0.5).require(MODEL)
    for shard in {row["shard"] for row in rows}:
        with (tmp_path / "one/256px" / shard).open("r+b") as file:
            file.truncate(first - 1 - rows[0]["size_bytes"])
    assert "found none in 1 of 3: 0.50" in refused(DataError, tmp_path / "one", damaged="skip", flip=0.5)


def test_a_shard_that_is_gone_is_named(copy, refused):
    _, rows = open_set(copy / "256px")
    path = copy / "256px" / rows["source/000"]["shard"]
    path.unlink()
    held = sum(row["shard"] == rows["source/000"]["shard"] for row in rows.values())
    said = refused(DataError, copy)
    assert f"{path}: expected" in said
    assert f"bytes, found no such file: {held} of its {held} samples are lost, source/000 first; copy it" in said


def test_what_can_change_the_samples_of_a_run_is_among_the_facts_of_its_order(opened, tmp_path):
    root = tmp_path / "features"
    keys = [f"s/{i}" for i in range(30)]
    write_image_set(root / "256px", keys, np.random.default_rng(0), flips=True)
    for name in ("text", "short"):
        write_text_set(root / name, keys, np.random.default_rng(1))

    def facts(**data):
        return opened(root, **data).order_facts()

    assert facts(flip=0.5)["data.flip"] == 0.5 != facts()["data.flip"]
    mixes = [facts(text_mix={"text": a, "short": b}) for a, b in ((0.6, 0.3), (2, 1), (0.5, 0.5))]
    assert mixes[0] == mixes[1] != mixes[2]
    assert facts(text_mix={"text": 3}) == facts()


def test_a_run_knows_encoders_by_what_they_are_and_not_by_what_they_are_called(opened, copy):
    def facts(name, identity):
        for one in ("256px", "text"):
            change_manifest(copy / one, lambda fields: fields["model"].update(id=name, identity=identity))
        return opened(copy).order_facts()

    assert facts("hub/name", "sha256:a") == facts("a/folder", "sha256:a")
    differing = {key for key, value in facts("a/folder", "sha256:b").items() if value != facts("x", "sha256:a")[key]}
    assert differing == {"data.image_set, VAE", "data.text_set, text encoder"}
