"""Paths in files that anyone may have written: manifests, indexes, lists."""

import json
import os
from dataclasses import asdict

import pytest

from pixart_data.config import digest
from pixart_data.confinement import is_plain, stays_below
from pixart_data.errors import DataError
from pixart_data.exports import ReferenceLayout
from pixart_data.pairs import Pairs
from pixart_data.shards import Manifest, read_manifest
from tests.sealing import write_images, write_texts

OUTSIDE = ["../a", "a/../../b", "/etc/passwd", "..", "", ".", "a/..", "a\0b", None, 3]
ODD = ["./a", "a//b", "a/./b", "a/../b", "a\\b", "a/"]
PLAIN = ["a", "1.00/unit-1a.tar", "a b/c..d", "..a", "%2E%2E/a"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_that_leave_their_folder_are_told(path):
    assert not stays_below(path)
    assert not is_plain(path)


@pytest.mark.parametrize("path", ODD)
def test_paths_with_several_spellings_stay_below_and_are_not_plain(path):
    assert stays_below(path)
    assert not is_plain(path)


@pytest.mark.parametrize("path", PLAIN)
def test_plain_paths_are_taken(path, tmp_path):
    assert stays_below(path)
    assert is_plain(path)
    assert os.path.realpath(tmp_path / path) == f"{tmp_path}/{path}"


SHARD = {"path": "1.00/a.tar", "size_bytes": 1, "sha256": "", "rows": 1}
BUCKET = {"ratio": "1.00", "height_px": 16, "width_px": 16, "rows": 1, "shards": 1}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"shards": [SHARD, SHARD | {"path": "../../other/a.tar"}]}, "path '../../other/a.tar'"),
        ({"shards": [SHARD | {"path": "/etc/passwd"}]}, "path '/etc/passwd'"),
        ({"shards": [SHARD | {"path": "a\\..\\b"}]}, "path 'a"),
        ({"shards": [SHARD | {"path": "a\0"}]}, "path 'a"),
        ({"codec": {"name": "int8", "calibration": {"path": "../payload.txt", "sha256": ""}}}, "path '../payload.txt'"),
        ({"model": {"null": {"path": "shards/../../a.tar"}}}, "path 'shards/../../a.tar'"),
        ({"buckets": [BUCKET, BUCKET | {"ratio": "../../../victim"}]}, "bucket '../../../victim'"),
        ({"buckets": [BUCKET | {"ratio": "1.00\n"}]}, "bucket '1.00"),
        ({"buckets": [BUCKET | {"ratio": 1.0}]}, "bucket 1.0"),
        ({"buckets": [3]}, "not a complete manifest"),
        ({"shards": [{}]}, "not a complete manifest"),
        ({"model": None}, "not a complete manifest"),
    ],
)
def test_a_manifest_that_names_what_is_outside_its_set_is_refused(tmp_path, change, found):
    good = asdict(Manifest("image", "moments", "F16", {}, {}, {}, [SHARD], [BUCKET]))
    for fields in (good, good | change):
        (tmp_path / "manifest.json").write_text(json.dumps({**fields, "digest": digest(fields)}))
        if fields is good:
            assert read_manifest(tmp_path).shards == [SHARD]
    with pytest.raises(DataError, match="manifest.json: .*") as told:
        read_manifest(tmp_path)
    assert found in str(told.value)


@pytest.mark.parametrize("key", ["../../../pwn/a", "/abs/b", "a/../../../b"])
def test_a_key_that_leads_out_of_an_export_stops_it(tmp_path, key):
    write_images(tmp_path / "set" / "images", {"u": [("a/b", "1.00"), (key, "1.00")]})
    write_texts(tmp_path / "set" / "text", {"u": [("a/b", "one"), (key, "two")]})
    pairs = Pairs(tmp_path / "set" / "images", tmp_path / "set" / "text")
    with pytest.raises(DataError, match="expected keys that can be the paths of files in the export") as told:
        ReferenceLayout(tmp_path / "out", pairs).portions()
    pairs.close()
    assert repr(key) in str(told.value)
