import errno
import os
import shutil

import pytest

from pixart_data.editions import Original
from pixart_data.errors import ConfigError, DataError
from pixart_data.partitions import by_share, write
from pixart_data.unions import merge, open_all
from pixart_data.verification import verify
from tests.sealing import contents, write_images, write_texts

CALIBRATION = [1, 2, 3, 4]


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def dataset(root, name, **more):
    """Four images and texts of their own, a rejected image, a rejected text."""
    keys = [f"{name}/{i}" for i in range(4)]
    write_images(root / name / "256px", {name: [(key, "1.00") for key in keys]}, rejected=[f"{name}/bad"])
    texts = [(key, "red" if i % 2 else None) for i, key in enumerate(keys)]
    write_texts(root / name / "text", {name: texts}, **more)
    return root / name


def do(roots, output):
    return dict(merge(open_all(roots), output))


def test_a_union_has_the_samples_of_all_and_links_their_shards(tmp_path):
    roots = [dataset(tmp_path, name) for name in ("b", "a")]
    manifests = do(roots, tmp_path / "joint")
    for name in ("256px", "text"):
        rows, rejected = contents(tmp_path / "joint" / name)
        apart = [contents(root / name) for root in roots]
        assert rows == apart[0][0] | apart[1][0]
        assert list(rows) == [*apart[0][0], *apart[1][0]]
        assert [row for row in rejected if isinstance(row, dict)] == [
            row for _, rows in apart for row in rows if isinstance(row, dict)
        ]
        shards = manifests[name].shards
        assert all((tmp_path / "joint" / name / shard["path"]).stat().st_nlink > 1 for shard in shards)
    assert manifests["256px"].counts == {"rows_in": 10, "rows_out": 8, "rejected": {"truncated_image": 2}}
    assert manifests["text"].counts == {"rows_in": 8, "rows_out": 4, "rejected": {"no_caption": 4}}
    assert len(manifests["text"].provenance["merged_from"]) == 2
    assert not [finding for finding in verify(tmp_path / "joint") if finding.problem]


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    roots = [dataset(tmp_path, name) for name in "ab"]
    do(roots, tmp_path / "linked")
    real = os.link
    monkeypatch.setattr("pixart_data.links.os", type("Os", (), {"link": staticmethod(link)}))
    assert os.link is real  # leases and the like go on
    manifests = do(roots, tmp_path / "copied")
    for name, manifest in manifests.items():
        assert contents(tmp_path / "copied" / name) == contents(tmp_path / "linked" / name)
        assert all((tmp_path / "copied" / name / shard["path"]).stat().st_nlink == 1 for shard in manifest.shards)


def test_killed_and_run_again_it_finishes_and_leaves_nothing_behind(tmp_path, monkeypatch):
    roots = [dataset(tmp_path, name) for name in "ab"]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pixart_data.links.write_edition", die)
        with pytest.raises(KeyboardInterrupt):
            do(roots, tmp_path / "joint")
    folder = tmp_path / "joint/256px/1.00"
    assert list(folder.iterdir())
    assert not (tmp_path / "joint/256px/manifest.json").exists()
    (folder / ".tmp-left").touch()
    (folder / "x-01234567.tar").touch()
    do(roots, tmp_path / "joint")
    do(roots, tmp_path / "straight")
    for name in ("256px", "text"):
        assert contents(tmp_path / "joint" / name) == contents(tmp_path / "straight" / name)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "straight/256px/1.00").iterdir()
    )
    do(roots[:1], tmp_path / "joint")  # other rows replace the set
    assert contents(tmp_path / "joint/256px") == contents(tmp_path / "a/256px")
    assert len(list(folder.iterdir())) == 1


def test_shards_of_one_name_and_other_content_are_both_there(tmp_path):
    for name in "ab":
        write_images(tmp_path / name / "256px", {"u": [(f"{name}/0", "1.00")]})
        root = tmp_path / name / "256px"
        [shard] = (root / "1.00").iterdir()
        manifest = Original(root).manifest
        renamed = [{**manifest.shards[0], "path": "1.00/u-00000000.tar"}]
        shard.rename(root / "1.00/u-00000000.tar")
        rename(root, renamed)
    manifests = do([tmp_path / name for name in "ab"], tmp_path / "joint")
    assert len({shard["path"] for shard in manifests["256px"].shards}) == 2
    assert (
        contents(tmp_path / "joint/256px")[0] == contents(tmp_path / "a/256px")[0] | contents(tmp_path / "b/256px")[0]
    )


def rename(root, shards):
    """Seal a set again with other names of its shards."""
    from dataclasses import replace

    import numpy as np

    from pixart_data.editions import Excerpt, write_edition

    original = Original(root)
    all_rows = np.ones(len(original), np.bool_)
    fields = (original.column(name) for name in ("shard", "offset", "flipped_offset"))
    write_edition(root, replace(original.manifest, shards=shards), [Excerpt(original, all_rows, *fields)])


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path):
    one = dataset(tmp_path, "one", calibration=CALIBRATION)
    other = dataset(tmp_path, "other", calibration=[9, 2, 3, 4])
    with pytest.raises(
        DataError, match=r"other/text: codec\.calibration: expected .* extract the captions of one again"
    ):
        open_all([one, other])
    shutil.rmtree(other)
    with pytest.raises(DataError, match=r"text: codec.*: expected "):
        open_all([one, dataset(tmp_path, "other")])
    shutil.rmtree(other)
    with pytest.raises(DataError, match=r"other/text: model\.null\.crc32: expected .* the empty captions differ"):
        open_all([one, dataset(tmp_path, "other", calibration=CALIBRATION, null="another")])
    shutil.rmtree(other / "text")
    with pytest.raises(
        DataError, match="other: expected the sets 256px, text as in .*one, found 256px; extract what is"
    ):
        open_all([one, other])
    with pytest.raises(
        DataError, match="4 of its 4 keys are in .*256px too, the first is one/0; leave one of them out"
    ):
        open_all([one, one])
    with pytest.raises(DataError, match="expected a dataset, found no finished feature set"):
        open_all([one, tmp_path / "one/256px/1.00"])


def test_sets_of_one_calibration_join_what_was_measured(tmp_path):
    from pixart_data.codecs import Measure

    torch = pytest.importorskip("torch")
    facts = []
    for seed in range(2):
        measure = Measure()
        values = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        measure.add(values, values * 1.01)
        facts.append(measure.facts())
    roots = [dataset(tmp_path, f"{i}", calibration=CALIBRATION, measured=facts[i]) for i in range(2)]
    codec = do(roots, tmp_path / "joint")["text"].codec
    assert codec["measured"]["num_tokens"] == 10
    assert (tmp_path / "joint/text" / codec["calibration"]["path"]).exists()
    alike = [dataset(tmp_path, f"x{i}", calibration=CALIBRATION, measured=facts[0]) for i in range(2)]
    assert do(alike, tmp_path / "parts")["text"].codec["measured"] == facts[0]


def test_a_folder_with_something_else_and_a_lost_shard_are_refused(tmp_path):
    one, two = dataset(tmp_path, "one"), dataset(tmp_path, "two")
    with pytest.raises(ConfigError, match="256px: expected a new folder, .* found commit records of another command"):
        do([one], two)
    shutil.rmtree(two / "256px/commits")
    with pytest.raises(ConfigError, match="found a feature set that another command made"):
        do([one], two)
    (two / "256px/manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"256px: expected a new folder, .* found shards without manifest\.json"):
        do([one], two)
    [shard] = (one / "256px/1.00").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=rf"{shard.name}: expected a shard of .* bytes, found none or another; `pixart verify`"
    ):
        do([one], tmp_path / "joint")


def test_a_part_of_a_union_is_not_taken_for_a_union(tmp_path):
    """Provenance is inherited: it says that the samples were merged once, not what the set is."""
    one, two = (dataset(tmp_path, name) for name in ("one", "two"))
    do([one], tmp_path / "joint")
    list(write(by_share(tmp_path / "joint", {"all": 1.0}), tmp_path / "parts"))
    before = contents(tmp_path / "parts/all/256px")
    with pytest.raises(
        ConfigError, match="256px: expected a new folder, .* found a feature set that `pixart split` made"
    ):
        do([two], tmp_path / "parts/all")
    assert contents(tmp_path / "parts/all/256px") == before
    with pytest.raises(ConfigError, match="found a feature set that `pixart merge` made"):
        list(write(by_share(two, {"joint": 1.0}), tmp_path))


@pytest.mark.parametrize("failing", ["shard", "tables", "calibration"])
def test_a_union_that_fails_leaves_the_one_before_as_it_was(tmp_path, monkeypatch, failing):
    more = {"calibration": CALIBRATION}
    roots = [dataset(tmp_path, name, **more) for name in "abc"]
    do(roots[:2], tmp_path / "joint")
    before = {name: contents(tmp_path / "joint" / name) for name in ("256px", "text")}
    with monkeypatch.context() as patch:
        if failing == "shard":  # of the set that comes last
            shards = [path for path in (roots[2] / "text/shards").iterdir() if not path.name.startswith("null")]
            shards[0].unlink()
        else:
            name = {"tables": "write_edition", "calibration": "copy_calibration"}[failing]
            patch.setattr(f"pixart_data.links.{name}", broken)
        with pytest.raises(DataError, match="expected a shard of" if failing == "shard" else "is damaged"):
            do([roots[0], roots[2]], tmp_path / "joint")
    assert {name: contents(tmp_path / "joint" / name) for name in before} == before
    assert not [finding for finding in verify(tmp_path / "joint") if finding.problem]
    do([roots[1]], tmp_path / "joint")
    assert contents(tmp_path / "joint/text") == contents(roots[1] / "text")
    assert not list((tmp_path / "joint").rglob("unfinished.json"))
    assert len(list((tmp_path / "joint/256px/1.00").iterdir())) == 1


def broken(*_):
    raise DataError("a table is damaged")


@pytest.mark.parametrize("is_linked", [True, False])
def test_a_damaged_copy_is_made_again_and_a_whole_one_is_not(tmp_path, monkeypatch, is_linked):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    roots = [dataset(tmp_path, name) for name in "ab"]
    monkeypatch.setattr("pixart_data.links.os", type("Os", (), {"link": staticmethod(link)}))
    do(roots, tmp_path / "joint")
    damaged, whole = sorted((tmp_path / "joint/256px/1.00").iterdir())
    data, before = bytearray(damaged.read_bytes()), whole.stat().st_ino
    data[-2000] ^= 1
    damaged.write_bytes(data)
    assert [finding for finding in verify(tmp_path / "joint") if finding.problem]
    if is_linked:
        monkeypatch.undo()
    do(roots, tmp_path / "joint")
    assert not [finding for finding in verify(tmp_path / "joint") if finding.problem]
    assert damaged.stat().st_nlink == (2 if is_linked else 1)
    assert whole.stat().st_ino == before


def test_no_set_is_written_over_one_that_is_read(tmp_path):
    one, two = (dataset(tmp_path, name) for name in ("one", "two"))
    before = files(one)
    with pytest.raises(
        ConfigError, match=r"output: .*one/256px: expected a folder of its own, found the dataset .*one"
    ):
        do([one / "256px", two / "256px"], one)
    (tmp_path / "alias").symlink_to(one)
    with pytest.raises(ConfigError, match=r"alias/256px: expected a folder of its own, found the dataset .*one/256px"):
        do([two, one], tmp_path / "alias")
    with pytest.raises(ConfigError, match="expected a folder of its own"):
        do([two, one], tmp_path / "two/../one")
    with pytest.raises(ConfigError, match="one/256px: expected a folder of its own"):
        list(write(by_share(one, {"two": 0.5, "one": 0.5}), tmp_path))
    assert files(one) == before


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_object_stores_are_merged_and_split(tmp_path, bucket):
    from pixart_data.storage import location, read_bytes

    roots = [dataset(tmp_path, name) for name in "ab"]
    do(roots, tmp_path / "here")
    do(roots, location(f"{bucket}/joint"))  # uploaded
    [shard, _] = location(f"{bucket}/joint/256px/1.00").iterdir()
    data = read_bytes(shard)
    shard.write_bytes(bytes(len(data)))
    do(roots, location(f"{bucket}/joint"))
    assert read_bytes(shard) == data
    for url in (f"{bucket}//joint/", f"{bucket}/x/../joint"):
        with pytest.raises(ConfigError, match="joint/256px: expected a folder of its own, found the dataset"):
            do([location(f"{bucket}/joint")], location(url))
    list(write(by_share(location(f"{bucket}/joint"), {"all": 1.0}), location(f"{bucket}/parts")))  # copied in the store
    list(write(by_share(location(f"{bucket}/parts/all"), {"all": 1.0}), tmp_path / "back"))  # downloaded
    for name in ("256px", "text"):
        expected = contents(tmp_path / "here" / name)
        assert contents(location(f"{bucket}/parts/all") / name) == expected
        assert contents(tmp_path / "back/all" / name) == expected
