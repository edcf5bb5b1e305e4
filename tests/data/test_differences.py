import os
import shutil

import pytest

from pixart_data.differences import compare
from pixart_data.editions import require_finished, unfinished_sets
from pixart_data.errors import ConfigError, DataError
from tests.sealing import write_images, write_texts

IMAGES = {"u": [("a", "1.00"), ("b", "0.50"), ("c", "1.00")]}
TEXTS = {"u": [("a", "red"), ("b", "blue"), ("c", None)]}
REST = "original_width_px or original_height_px or resized_width_px or resized_height_px or crop_left_px or crop_top_px"


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def roots(tmp_path):
    """A dataset, and where another is to be."""
    write_images(tmp_path / "left/256px", IMAGES, rejected=["x", "y"])
    write_texts(tmp_path / "left/text", TEXTS)
    return tmp_path / "left", tmp_path / "right"


def lines(roots, num_examples=3):
    """What is told of each set, with LEFT and RIGHT for the datasets."""
    found = {one.name: [str(difference) for difference in one.differences] for one in compare(*roots, num_examples)}
    for root, name in zip(roots, ("LEFT", "RIGHT"), strict=True):
        found = {one: [line.replace(str(root), name) for line in told] for one, told in found.items()}
    return found


def test_other_shards_and_another_order_are_no_difference(roots):
    write_images(roots[1] / "256px", {"z": IMAGES["u"][:1], "y": IMAGES["u"][:0:-1]}, rejected=["y", "x"])
    write_texts(roots[1] / "text", {"z": TEXTS["u"][2:], "y": TEXTS["u"][:2]})
    assert lines(roots) == {"256px": [], "text": []}
    assert [(found.num_common, found.num_same) for found in compare(*roots, 3)] == [(3, 3), (2, 2)]


def test_samples_that_are_in_one_only_are_told_and_what_was_rejected(roots):
    images = {"u": [("b", "0.50"), ("a", "1.00"), ("d", "1.00"), ("e", "1.00")]}
    write_images(roots[1] / "256px", images, rejected=["y", "z", "z"])
    write_texts(roots[1] / "text", {"u": [("a", "red"), ("b", "blue"), ("c", "green")]})
    assert lines(roots, 1) == {
        "256px": [
            "1 sample(s) only in LEFT/256px: c",
            "2 sample(s) only in RIGHT/256px: d, ...",
            "1 rejected row(s) only in LEFT/256px: x",
            "2 rejected row(s) only in RIGHT/256px: z, ...",
        ],
        "text": ["1 sample(s) only in RIGHT/text: c", "1 rejected row(s) only in LEFT/text: c"],
    }
    assert [(found.num_common, found.num_same) for found in compare(*roots, 3)] == [(2, 2), (2, 2)]


def test_samples_with_another_bucket_caption_or_features_are_told(roots):
    write_images(roots[1] / "256px", {"u": [("a", "2.00"), *IMAGES["u"][1:]]}, rejected=["x", "y"])
    write_texts(roots[1] / "text", {"u": [("a", "green"), *TEXTS["u"][1:]]})
    assert lines(roots) == {
        "256px": [
            "1 sample(s) with other features: a",
            "1 sample(s) in another bucket: a",
            f"1 sample(s) with another {REST} or image_ops: a",
        ],
        "text": ["1 sample(s) with other features: a", "1 sample(s) with another caption: a"],
    }
    assert [(found.num_common, found.num_same) for found in compare(*roots, 3)] == [(3, 2), (2, 1)]


def test_the_same_caption_with_other_features_and_the_other_way_round(roots):
    write_images(roots[1] / "256px", IMAGES, flips=True, rejected=["x", "y"])
    write_texts(roots[1] / "text", TEXTS, noise="other")
    assert lines(roots, 0) == {
        "256px": ["3 sample(s) with other features"],
        "text": ["2 sample(s) with other features"],
    }
    write_texts(roots[1] / "text", TEXTS, with_captions=False)
    assert lines(roots)["text"] == ["2 sample(s) with another caption: a, b"]


def test_other_models_codecs_and_sets_are_told(roots):
    write_images(roots[1] / "256px", IMAGES, rejected=["x", "y"], model={"sha256": "other"})
    write_texts(roots[1] / "short", TEXTS)
    assert lines(roots) == {
        "256px": ["model.sha256 is None in LEFT/256px, 'other' in RIGHT/256px"],
        "short": ["only in RIGHT"],
        "text": ["only in LEFT"],
    }
    write_texts(roots[1] / "text", TEXTS, calibration=[1, 2, 3, 4], null="other")
    told = lines(roots)["text"]
    facts = ["codec.calibration", "codec.group", "codec.name", "model.null.crc32"]
    assert [line.split(" is ")[0] for line in told[:4]] == facts
    assert told[-1] == "2 sample(s) with other features: a, b"


def test_a_set_that_is_not_finished_is_a_difference_and_not_passed_over(roots):
    shutil.copytree(roots[0], roots[1])
    (roots[1] / "text/manifest.json").unlink()
    (roots[1] / "text/job.toml").write_text("# pixart extract\n")
    assert lines(roots) == {"256px": [], "text": ["not finished: RIGHT/text; run `pixart extract` to its end"]}
    shutil.rmtree(roots[0] / "text")
    assert lines(roots)["text"] == ["not finished: RIGHT/text; run `pixart extract` to its end"]
    shutil.rmtree(roots[1] / "256px")
    with pytest.raises(DataError, match="right/text: not finished: expected a manifest.json, found none; run `pixart"):
        lines(roots)


def test_only_what_was_begun_and_holds_features_is_unfinished(roots):
    assert unfinished_sets(roots[0]) == []
    (roots[0] / "report/commits").mkdir(parents=True)
    (roots[0] / "report/stats.json").write_text("{}")
    (roots[0] / "photos").mkdir()
    require_finished(roots[0])
    for name in ("index.parquet", "entries.bin", "commits", "unfinished.json"):
        root = roots[1] / name / "begun"
        root.mkdir(parents=True)
        (root / name).mkdir() if name == "commits" else (root / name).write_bytes(b"")
        assert unfinished_sets(roots[1] / name) == unfinished_sets(root) == [root]


def test_feature_sets_are_compared_whatever_their_names(roots):
    write_texts(roots[1] / "short", TEXTS)
    [found] = compare(roots[0] / "text", roots[1] / "short", 3)
    assert (found.num_common, found.num_same, found.differences) == (2, 2, [])
    [found] = compare(roots[0] / "text", roots[0] / "256px", 3)
    [difference] = found.differences  # and not every field of their manifests
    one_kind = f"{roots[0]}/text, image in {roots[0]}/256px; name two sets of one kind"
    assert str(difference) == f"kind is text in {one_kind}"
    (roots[1].parent / "empty").mkdir()
    with pytest.raises(DataError, match="empty: expected a dataset, found no finished feature set; check the path"):
        list(compare(roots[0], roots[1].parent / "empty", 3))
    with pytest.raises(ConfigError, match="nowhere: no such file or folder; check the path"):
        list(compare(roots[0], roots[1].parent / "nowhere", 3))
