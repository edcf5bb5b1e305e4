import os

import numpy as np
import pyarrow as pa
import pytest

from pixart_data.differences import compare
from pixart_data.editions import Original
from pixart_data.errors import ConfigError, DataError
from pixart_data.partitions import Partition, by_query, by_share, write
from pixart_data.unions import merge, open_all
from pixart_data.verification import verify
from tests.sealing import RATIOS, contents, write_images, write_texts

KEYS = [f"s/{i:03d}" for i in range(120)]


@pytest.fixture(autouse=True, scope="module")
def no_power_cuts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """120 images, ten of them rejected besides; captions of most, which repeat, and of five keys without an image."""
    root = tmp_path_factory.mktemp("split") / "dataset"
    pairs = [(key, RATIOS[i % 3]) for i, key in enumerate(KEYS)]
    write_images(root / "256px", {"a": pairs[:50], "b": pairs[50:]}, True, [f"bad/{i}" for i in range(10)])
    captions = [(key, f"caption {i % 13}" if i % 10 else None) for i, key in enumerate(KEYS)]
    write_texts(root / "text", {"a": captions[:60], "b": captions[60:], "c": [(f"t/{i}", "red") for i in range(5)]})
    return root


def keys(root):
    return set(contents(root)[0])


def test_shares_are_disjoint_datasets_over_the_same_shards(dataset, tmp_path):
    partition = by_share(dataset, {"train": 0.7, "val": 0.2})
    manifests = {(part, name): manifest for part, name, manifest in write(partition, tmp_path)}
    found = {pair: keys(tmp_path.joinpath(*pair)) for pair in manifests}
    rows = contents(dataset / "256px")[0]
    for part in ("train", "val"):
        images, texts = found[part, "256px"], found[part, "text"]
        assert {key for key in texts if key in rows} <= images  # a sample is in one part with all that it has
        assert contents(tmp_path / part / "256px")[0] == {key: rows[key] for key in rows if key in images}
        manifest = manifests[part, "256px"]
        assert manifest.counts["rows_in"] == len(images) + sum(manifest.counts["rejected"].values())
        assert all((tmp_path / part / "256px" / shard["path"]).stat().st_nlink > 1 for shard in manifest.shards)
        assert not [finding for finding in verify(tmp_path / part) if finding.problem]
    assert not found["train", "256px"] & found["val", "256px"]
    assert 70 <= len(found["train", "256px"]) <= 98
    assert 12 <= len(found["val", "256px"]) <= 38
    rest = partition.num_rows("256px", -1)
    assert rest == 120 - len(found["train", "256px"]) - len(found["val", "256px"]) > 0


def test_a_sample_stays_in_its_part_when_the_dataset_grows_or_is_compacted(dataset, tmp_path):
    write_images(tmp_path / "less" / "256px", {"x": [(key, "1.00") for key in KEYS[30:90]]})
    parts = {}
    for root in (dataset, tmp_path / "less"):
        partition = by_share(root, {"train": 0.5, "val": 0.5})
        original = Original(root / "256px")
        parts[root] = dict(zip(original.column("key").tolist(), partition.parts["256px"].tolist(), strict=True))
    less = parts[tmp_path / "less"]
    assert set(less.values()) == {0, 1}
    assert {key: parts[dataset][key] for key in less} == less


def test_merged_parts_are_the_dataset_again(dataset, tmp_path):
    list(write(by_share(dataset, {"a": 0.4, "b": 0.35, "c": 0.25}), tmp_path))
    list(merge(open_all([tmp_path / part for part in "cab"]), tmp_path / "joint"))
    found = list(compare(dataset, tmp_path / "joint", 3))
    assert [(comparison.num_same, comparison.differences) for comparison in found] == [(120, []), (113, [])]


def test_shares_that_add_up_to_one_leave_nothing(dataset):
    for shares in ({"a": 0.1, "b": 0.2, "c": 0.7}, {f"p{i}": 1 / 7 for i in range(7)}):
        partition = by_share(dataset, shares)
        assert partition.num_rows("256px", -1) == partition.num_rows("text", -1) == 0
    assert by_share(dataset, {"all": 1.0}).num_rows("256px", 0) == 120


def test_queries_choose_by_one_set_and_the_others_follow(dataset, tmp_path):
    queries = {"wide": "bucket == '0.50'", "tall": "original_height_px >= 2 * 32 and bucket != '0.50'"}
    partition = by_query(dataset, queries, None)
    manifests = {(part, name): manifest for part, name, manifest in write(partition, tmp_path)}
    images, texts = (contents(dataset / name)[0] for name in ("256px", "text"))
    for part, ratio in {"wide": "0.50", "tall": "2.00"}.items():
        wanted = {key for key, (row, _) in images.items() if row["bucket"] == ratio}
        assert keys(tmp_path / part / "256px") == wanted
        assert keys(tmp_path / part / "text") == wanted & texts.keys()
        assert manifests[part, "text"].counts["rejected"] == {}
        assert len(manifests[part, "256px"].shards) == 2  # none of other buckets
    assert partition.num_rows("256px", -1) == 40


def test_the_set_to_query_can_be_chosen_and_must_be_where_it_is_not_clear(dataset, tmp_path):
    by_text = by_query(dataset, {"seven": "caption == 'caption 7'"}, "text")
    assert by_text.num_rows("text", 0) == by_text.num_rows("256px", 0) == 8
    with pytest.raises(ConfigError, match="queried_set: expected one of 256px, text, found 'other'"):
        by_query(dataset, {"a": "bucket == '0.50'"}, "other")
    for name in ("256px", "512px"):
        write_images(tmp_path / name, {"u": [("a", "1.00")]})
    with pytest.raises(
        ConfigError, match=r"queried_set: required where there are several \(256px, 512px\); pass --set"
    ):
        by_query(tmp_path, {"a": "bucket == '1.00'"}, None)


def test_queries_that_overlap_match_nothing_or_are_wrong_are_refused(dataset, tmp_path):
    with pytest.raises(ConfigError, match="found s/000 in 'wide' and in 'low'; let one query exclude the other"):
        by_query(dataset, {"wide": "bucket == '0.50'", "low": "height_px == 16"}, None)
    with pytest.raises(ConfigError, match="where: expected samples in 'none', found none that match `height_px > 99`"):
        by_query(dataset, {"none": "height_px > 99"}, None)
    with pytest.raises(ConfigError, match="no column heigth_px; did you mean height_px"):
        by_query(dataset, {"wrong": "heigth_px > 99"}, None)
    with pytest.raises(DataError, match="expected a dataset, found no finished feature set"):
        by_share(tmp_path, {"a": 1.0})


def test_shares_are_fair():
    """Parts of a tenth of 20,000 keys are within five standard deviations of 2,000."""
    table = pa.table({"key": [f"photos/{i}" for i in range(20_000)]})
    partition = Partition(["tenth"], {}, {}, np.array([0.1]))
    assert abs(int((partition.rejected(table) == 0).sum()) - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)
