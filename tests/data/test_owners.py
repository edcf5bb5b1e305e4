"""A run into the folder of another command: nothing of it may be lost. Merge and split are in test_unions."""

import os
import shutil

import pytest

from jobs.cli import main
from pixart_data.errors import ConfigError
from pixart_data.owners import require_run
from pixart_data.partitions import by_share, write
from pixart_data.unions import merge, open_all
from tests.layouts import made, write_reference
from tests.sealing import write_images, write_texts


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def data(tmp_path):
    """Two sets as `extract` leaves them, but for their job files."""
    write_images(tmp_path / "data/256px", {"u": [(f"s/{i}", "1.00") for i in range(4)]})
    write_texts(tmp_path / "data/text", {"u": [(f"s/{i}", "red") for i in range(4)]})
    return tmp_path / "data"


def signed(root, command):
    """Leave the job files of a command in all sets."""
    for name in ("256px", "text"):
        (root / name / "job.toml").write_text(f"# pixart {command}\nx = 1\n")
    return root


def files(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".lease" not in path.parts
    }


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("merged", "a feature set that `pixart merge` made"),
        ("split", "a feature set that `pixart split` made"),
        ("extracted", "the results of `pixart extract`"),
        ("unfinished", "what `pixart merge` left unfinished"),
        ("without records", "a feature set without commit records"),
    ],
)
def test_an_import_into_the_folder_of_another_command_is_refused(data, tmp_path, capsys, monkeypatch, kind, found):
    out = tmp_path / "out"
    if kind == "merged":
        list(merge(open_all([data]), out))
    elif kind == "split":
        list(write(by_share(data, {"all": 1.0}), tmp_path / "parts"))
        (tmp_path / "parts/all").rename(out)
    elif kind == "extracted":
        shutil.copytree(signed(data, "extract"), out)
    elif kind == "unfinished":
        monkeypatch.setattr("pixart_data.links.write_edition", die)
        with pytest.raises(KeyboardInterrupt):
            list(merge(open_all([data]), out))
    else:
        list(merge(open_all([data]), out))
        for path in out.rglob("manifest.json"):
            forget(path)
    before = files(out)
    assert any(path.suffix == ".tar" for path in before)
    write_reference(tmp_path / "toy", made())
    command = ["import", str(tmp_path / "toy"), "--from", "reference", "--out", str(out)]
    for more in ([], ["--dry-run"]):
        assert main([*command, *more]) == 2
        told = capsys.readouterr().err
        assert (
            f"256px: expected a new folder, or what `pixart import` left there, found {found}; choose another" in told
        )
    assert files(out) == before


def die(*_):
    raise KeyboardInterrupt


def forget(path):
    """Seal a manifest again without its provenance, as other programs may."""
    from dataclasses import replace

    from pixart_data.shards import manifest_bytes, read_manifest

    path.write_bytes(manifest_bytes(replace(read_manifest(path.parent), provenance={})))


def test_a_compaction_does_not_plan_in_the_folder_of_another_command(data, tmp_path, capsys):
    out = tmp_path / "out/256px"
    out.mkdir(parents=True)
    (out / "job.toml").write_text("# pixart extract\n")  # which was killed before its first commit
    assert main(["compact", str(data / "256px"), "--out", str(tmp_path / "out")]) == 2
    assert "or what `pixart compact` left there, found the results of `pixart extract`" in capsys.readouterr().err
    assert list(files(tmp_path / "out")) == [(out / "job.toml").relative_to(tmp_path / "out")]
    (tmp_path / "alias").symlink_to(data)
    assert main(["compact", str(data), "--out", str(tmp_path / "alias")]) == 2
    assert "expected another folder than the dataset's own" in capsys.readouterr().err


def test_a_command_may_go_on_with_what_it_left(data, tmp_path):
    require_run(tmp_path / "new", "extract")
    require_run(data / "256px", "extract")  # with records, and no job file
    signed(data, "extract")
    require_run(data / "256px", "extract")
    [record] = (data / "256px/commits").iterdir()
    record.unlink()  # as `pixart verify` advises where the only shard is damaged
    require_run(data / "256px", "extract")
    with pytest.raises(ConfigError, match="found the results of `pixart extract`"):
        require_run(data / "256px", "import")
    (data / "256px/manifest.json").write_text("{")
    require_run(data / "256px", "extract")
