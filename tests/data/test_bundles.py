"""Finished reports: written whole, told from unfinished ones, and found damaged."""

import json

import pytest

from pixart_data.bundles import is_bundled, read_bundle, write_bundle
from pixart_data.commits import MANIFEST
from pixart_data.errors import DataError
from pixart_data.verification import planned, verify

FILES = {"stats.json": b"{}", "report.html": b"page", "figures/one.png": b"picture"}


def test_a_bundle_is_what_was_written(tmp_path):
    write_bundle(tmp_path, FILES, "digest")
    assert {file.path: (tmp_path / file.path).read_bytes() for file in read_bundle(tmp_path)} == FILES
    assert is_bundled(tmp_path, "digest")
    assert not is_bundled(tmp_path, "another digest")
    assert {path.relative_to(tmp_path).as_posix(): size for path, size in planned(tmp_path)} == {
        name: len(data) for name, data in FILES.items()
    }


def test_files_that_a_report_has_no_more_are_deleted_and_others_stay(tmp_path):
    write_bundle(tmp_path, FILES, "digest")
    (tmp_path / "figures/mine.png").write_bytes(b"not ours")
    write_bundle(tmp_path, {"stats.json": b"[]"}, "another")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [MANIFEST, "mine.png", "stats.json"]


def test_a_report_that_was_cut_off_is_not_finished(tmp_path, monkeypatch):
    write_bundle(tmp_path, FILES, "digest")

    def cut_off(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("pixart_data.bundles.write_atomic", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path, FILES, "digest")
    assert not is_bundled(tmp_path, "digest")


def test_a_missing_file_makes_it_unfinished_and_is_found(tmp_path):
    write_bundle(tmp_path, FILES, "digest")
    (tmp_path / "figures/one.png").unlink()
    assert not is_bundled(tmp_path, "digest")
    [finding] = [finding for finding in verify(tmp_path) if finding.problem]
    assert finding.path == tmp_path / "figures/one.png"
    assert finding.problem.startswith("missing or damaged; delete manifest.json and run `pixart stats`")


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_files_elsewhere_deletes_none_of_them(tmp_path, path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"precious")
    root = tmp_path / "report"
    write_bundle(root, FILES, "digest")
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["files"].append({"path": path, "size_bytes": 8, "sha256": ""})
    (root / MANIFEST).write_text(json.dumps(manifest))
    assert not is_bundled(root, "digest")
    write_bundle(root, FILES, "digest")
    assert outside.read_bytes() == b"precious"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "pixart-report", "version": 1}'])
def test_a_damaged_manifest_is_one_clear_line(tmp_path, content):
    write_bundle(tmp_path, FILES, "digest")
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="manifest.json: expected pixart-report version 1 and its files, found"):
        read_bundle(tmp_path)
    assert not is_bundled(tmp_path, "digest")
    assert any(finding.problem for finding in verify(tmp_path))
