import shutil
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.captions import seal_captions
from pixart_data.commits import Record, publish, read_records, write_record
from pixart_data.errors import DataError
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.shards import Manifest, ShardWriter, seal
from pixart_data.storage import staging_path
from pixart_data.verification import verify

SHAPES = {"1.00": (2, 4, 4, 4), "0.50": (2, 4, 3, 6)}


def write_images(root):
    """Two shards of three samples each, one for each of two buckets."""
    rows, files = [], []
    for bucket, shape in SHAPES.items():
        staged = staging_path(root / bucket, "s")
        with ShardWriter(staged, "moments", "F16") as writer:
            size = {"bucket": bucket, "height_px": 8 * shape[2], "width_px": 8 * shape[3]}
            for i in range(3):
                key = f"photos/{bucket.replace('.', '-')}-{i}"
                rows.append({"key": key, **size, **asdict(writer.add(key, np.full(shape, i + 0.5, np.float16)))})
        files.append(publish(staged, root, root / bucket, "unit", ".tar"))
        for row in rows[-3:]:
            row["shard"] = files[-1].path
    model = {"channels": 4, "downsampling": 8}
    return finish(root, rows, files, IMAGE_INDEX, Manifest("image", "moments", "F16", model, {}, {}, []))


def write_texts(root):
    staged = staging_path(root / "shards", "s")
    with ShardWriter(staged, "t5", "BF16") as writer:
        null = writer.add("null-caption", np.full((1, 6), 9, np.uint16))
    null_file = publish(staged, root, root / "shards", "null", ".tar")
    staged = staging_path(root / "shards", "s")
    with ShardWriter(staged, "t5", "BF16") as writer:
        places = [writer.add(f"t/{i}", np.full((i + 1, 6), i, np.uint16)) for i in range(3)]
    file = publish(staged, root, root / "shards", "unit", ".tar")
    rows = [{"key": f"t/{i}", "shard": file.path, "num_tokens": i + 1, **asdict(p)} for i, p in enumerate(places)]
    model = {"width": 6, "null": {"path": null_file.path, "num_tokens": 1, **asdict(null)}}
    return finish(root, rows, [null_file, file], TEXT_INDEX, Manifest("text", "t5", "BF16", model, {}, {}, []))


def finish(root, rows, files, schema, manifest):
    part = staging_path(root / "index", "p")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    record = Record(
        "unit", "", {}, len(rows), len(rows), {}, [*files, publish(part, root, root / "index", "u", ".parquet")]
    )
    write_record(root, record)
    shards = [asdict(file) for file in files]
    seal(root, [record], schema, Manifest(**{**asdict(manifest), "shards": shards}))
    return rows


@pytest.fixture
def dataset(tmp_path):
    write_images(tmp_path / "256px")
    write_texts(tmp_path / "text")
    return tmp_path


@pytest.fixture
def images(dataset):
    return pq.read_table(dataset / "256px/index.parquet").to_pylist()


def problems(root):
    return [finding for finding in verify(root) if finding.problem]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def test_a_whole_dataset_has_a_finding_for_every_file_and_no_problem(dataset):
    findings = list(verify(dataset))
    expected = {*dataset.rglob("*.tar"), *dataset.rglob("*.parquet")}
    assert {finding.path for finding in findings} == expected
    assert not problems(dataset)
    assert all(finding.size_bytes == finding.path.stat().st_size for finding in findings)
    assert sorted(f.num_samples for f in findings if f.path.suffix == ".tar") == [1, 3, 3, 3]


def test_a_single_set_can_be_verified(dataset):
    expected = {*(dataset / "text").rglob("*.tar"), *(dataset / "text").rglob("*.parquet")}
    assert {finding.path for finding in verify(dataset / "text")} == expected


def test_a_flipped_bit_anywhere_in_a_shard_names_its_sample(dataset, images):
    [*rows, last] = [row for row in images if row["bucket"] == "1.00"]
    path = dataset / "256px" / last["shard"]
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        flip(path, place)
        [finding] = problems(dataset)
        begins = [row for row in [*rows, last] if row["offset_bytes"] + row["size_bytes"] > place]
        assert finding.path == path
        assert finding.sample in {row["key"] for row in [*rows, last]}
        if begins and begins[0]["offset_bytes"] <= place:
            assert finding.sample == begins[0]["key"]
        path.write_bytes(whole)
    assert not problems(dataset)


def test_two_damaged_samples_are_both_named(dataset, images):
    row, _, other = [row for row in images if row["bucket"] == "0.50"]
    for one in (row, other):
        flip(dataset / "256px" / one["shard"], one["offset_bytes"])
    assert [finding.sample for finding in problems(dataset)] == [row["key"], other["key"]]


def test_a_damaged_null_caption_is_named(dataset):
    [path] = (dataset / "text/shards").glob("null-*.tar")
    flip(path, 700)
    [finding] = problems(dataset)
    assert (finding.path, finding.sample) == (path, "null-caption")


def test_a_shard_that_was_cut_off_names_what_is_lost(dataset, images):
    rows = [row for row in images if row["bucket"] == "1.00"]
    path = dataset / "256px" / rows[0]["shard"]
    with path.open("r+b") as file:
        file.truncate(rows[1]["offset_bytes"] + 5)
    assert [finding.sample for finding in problems(dataset)] == [row["key"] for row in rows[1:]]


def test_a_shard_that_grew_is_damaged(dataset, images):
    path = dataset / "256px" / images[0]["shard"]
    path.write_bytes(path.read_bytes() + b"\0")
    [finding] = problems(dataset)
    assert finding.path == path


def test_a_missing_shard_says_how_much_it_held(dataset, images):
    path = dataset / "256px" / images[0]["shard"]
    path.unlink()
    [finding] = problems(dataset)
    assert finding.path == path
    assert finding.problem.startswith(f"missing, with 3 samples from {images[0]['key']} on")


@pytest.mark.parametrize("damage", ["flip", "unlink"])
def test_a_damaged_index_is_found_and_the_other_set_is_still_read(dataset, damage):
    path = dataset / "256px/index.parquet"
    flip(path, 30) if damage == "flip" else path.unlink()
    [finding] = problems(dataset)
    assert finding.path == path
    assert "run `pixart extract` again" in finding.problem
    read = {finding.path for finding in verify(dataset) if not finding.problem}
    assert {path for path in (dataset / "text").rglob("*.tar")} <= read


@pytest.mark.parametrize("name", ["rejected.parquet", "index/u-*.parquet"])
def test_a_damaged_table_beside_the_index_is_found(dataset, name):
    [path] = (dataset / "text").glob(name)
    flip(path, 30)
    assert [finding.path for finding in problems(dataset)] == [path]


def test_a_table_of_captions_is_verified_by_its_records(tmp_path):
    for unit in ("a", "b", "c"):
        staged = staging_path(tmp_path, "s")
        pq.write_table(pa.table({"key": [unit] * 2}), staged)
        write_record(tmp_path, Record(unit, "", {}, 2, 2, {}, [publish(staged, tmp_path, tmp_path, unit, ".parquet")]))
    *findings, unfinished = verify(tmp_path)
    assert "not finished" in unfinished.problem
    seal_captions(tmp_path, list(read_records(tmp_path).values()))
    assert list(verify(tmp_path)) == findings
    assert [(f.num_samples, f.problem) for f in findings] == [(2, "")] * 3
    flip(findings[0].path, 50)
    findings[2].path.unlink()
    first, second, third = verify(tmp_path)
    assert first.problem.startswith("damaged; delete ")
    assert "commits/a.json" in first.problem
    assert not second.problem
    assert third.problem.startswith("missing; delete ")


def test_a_finished_table_of_captions_is_no_feature_set(tmp_path):
    staged = staging_path(tmp_path, "s")
    pq.write_table(pa.table({"key": ["a"]}), staged)
    record = Record("a", "", {}, 1, 1, {}, [publish(staged, tmp_path, tmp_path, "a", ".parquet")])
    write_record(tmp_path, record)
    seal_captions(tmp_path, [record])
    [finding] = verify(tmp_path)
    assert (finding.path.suffix, finding.problem) == (".parquet", "")


def test_nothing_to_verify_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: expected a dataset, a feature set or a table of captions"):
        list(verify(tmp_path))


def test_a_set_that_is_not_finished_is_not_passed_as_whole(dataset):
    """A kill before the manifest leaves records and shards; the other set is finished."""
    shutil.copytree(dataset / "256px", dataset / "512px")
    (dataset / "512px/manifest.json").unlink()
    [path, *_] = (dataset / "512px").glob("*.*/*.tar")
    flip(path, 700)
    assert any(finding.problem for finding in verify(dataset / "512px"))
    assert any("512px" in str(finding.path) for finding in verify(dataset))
