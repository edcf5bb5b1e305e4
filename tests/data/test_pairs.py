import os
from dataclasses import replace

import pytest

from pixart_data.commits import file_sha256
from pixart_data.errors import DataError
from pixart_data.pairs import Pairs
from pixart_data.shards import manifest_bytes, read_manifest
from tests.sealing import write_images, write_texts

IMAGES = {"u": [("a", "1.00"), ("b", "1.00")]}
TEXTS = {"u": [("a", "red"), ("b", "blue")]}


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "256px", IMAGES)
    write_texts(tmp_path / "text", TEXTS, calibration=[1, 2, 3, 4])
    return tmp_path


@pytest.mark.parametrize("name", ["256px", "text"])
def test_an_index_of_another_time_is_not_exported(root, tmp_path, name):
    """Its shards have the same members in the same places: checksums of samples say nothing of captions and sizes."""
    write_images(tmp_path / "older/256px", {"u": [("a", "1.00"), ("bb", "1.00")]})
    write_texts(tmp_path / "older/text", {"u": [("a", "red"), ("b", "blau")]}, calibration=[1, 2, 3, 4])
    (root / name / "index.parquet").write_bytes((tmp_path / "older" / name / "index.parquet").read_bytes())
    with pytest.raises(DataError, match=f"{name}/index.parquet: damaged, or not the one that manifest.json names; `pi"):
        Pairs(root / "256px", root / "text")


@pytest.mark.parametrize("name", ["256px", "text"])
def test_an_index_that_is_missing_or_no_table_is_told_of(root, name):
    path = root / name / "index.parquet"
    path.unlink()
    with pytest.raises(DataError, match=f"{name}/index.parquet: missing; run `pixart verify"):
        Pairs(root / "256px", root / "text")
    path.write_bytes(b"PAR1")
    sealed = replace(read_manifest(root / name), index_sha256=file_sha256(path))
    (root / name / "manifest.json").write_bytes(manifest_bytes(sealed))
    with pytest.raises(DataError, match=f"{name}/index.parquet: cannot be read"):
        Pairs(root / "256px", root / "text")


def test_a_calibration_that_is_missing_or_damaged_is_told_of(root):
    path = root / "text/codec-1234.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"codec-1234\.safetensors: damaged, or of another set"):
        Pairs(root / "256px", root / "text")
    path.unlink()
    with pytest.raises(DataError, match=r"codec-1234\.safetensors: missing; copy it again"):
        Pairs(root / "256px", root / "text")
