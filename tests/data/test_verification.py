import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import damage, verification
from pixart_data.captions import seal_captions
from pixart_data.commits import PublishedFile, Record, file_sha256, publish, read_records, write_record
from pixart_data.editions import Original
from pixart_data.entries import checks, entry_type
from pixart_data.errors import DataError
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX
from pixart_data.seals import seal
from pixart_data.shards import MOMENTS, Manifest, ShardWriter, manifest_bytes, read_manifest
from pixart_data.storage import location, staging_path
from pixart_data.verification import planned, verify
from tests.corruption import build

SHAPES = {"1.00": (2, 4, 4, 4), "0.50": (2, 4, 3, 6)}


def write_images(root):
    """Two shards of three samples each, one for each of two buckets."""
    rows, files = [], []
    for bucket, shape in SHAPES.items():
        staged = staging_path(root / bucket, "s")
        with ShardWriter(staged, MOMENTS) as writer:
            size = {"bucket": bucket, "height_px": 8 * shape[2], "width_px": 8 * shape[3]}
            for i in range(3):
                key = f"photos/{bucket.replace('.', '-')}-{i}"
                rows.append({"key": key, **size, **asdict(writer.add(key, np.full(shape, i + 0.5, np.float16)))})
        files.append(publish(staged, root, root / bucket, "unit", ".tar"))
        for row in rows[-3:]:
            row["shard"] = files[-1].path
    model = {"channels": 4, "downsampling": 8}
    buckets = [{"ratio": b, "height_px": 8 * s[2], "width_px": 8 * s[3]} for b, s in SHAPES.items()]
    manifest = Manifest("image", "moments", "F16", model, {}, {}, buckets=buckets)
    return finish(root, rows, files, IMAGE_INDEX, manifest)


def write_texts(root):
    staged = staging_path(root / "shards", "s")
    with ShardWriter(staged, [("t5", "BF16")]) as writer:
        null = writer.add("null-caption", np.full((1, 6), 9, np.uint16))
    null_file = publish(staged, root, root / "shards", "null", ".tar")
    staged = staging_path(root / "shards", "s")
    with ShardWriter(staged, [("t5", "BF16")]) as writer:
        places = [writer.add(f"t/{i}", np.full((i + 1, 6), i, np.uint16)) for i in range(3)]
    file = publish(staged, root, root / "shards", "unit", ".tar")
    rows = [{"key": f"t/{i}", "shard": file.path, "num_tokens": i + 1, **asdict(p)} for i, p in enumerate(places)]
    model = {"width": 6, "null": {"path": null_file.path, "num_tokens": 1, **asdict(null)}}
    return finish(root, rows, [null_file, file], TEXT_INDEX, Manifest("text", "t5", "BF16", model, {}, {}))


def finish(root, rows, files, schema, manifest):
    part = staging_path(root / "index", "p")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
    record = Record(
        "unit", "", {}, len(rows), len(rows), {}, [*files, publish(part, root, root / "index", "u", ".parquet")]
    )
    write_record(root, record)
    seal(
        root, [record], schema, replace(manifest, counts={"rows_in": len(rows), "rows_out": len(rows), "rejected": {}})
    )
    return rows


@pytest.fixture
def dataset(tmp_path):
    write_images(tmp_path / "256px")
    write_texts(tmp_path / "text")
    return tmp_path


@pytest.fixture
def images(dataset):
    return pq.read_table(dataset / "256px/index.parquet").to_pylist()


def files_of(root):
    """The files that verify has a finding for when they are whole; of a record it has one when it is not."""
    return {path for path in root.rglob("*") if path.is_file() and path.parent.name != "commits"}


def problems(root, **options):
    return [finding for finding in verify(root, **options) if finding.problem]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def test_a_whole_dataset_has_a_finding_for_every_file_and_no_problem(dataset):
    findings = list(verify(dataset))
    assert {finding.path for finding in findings} == files_of(dataset)
    assert not problems(dataset)
    assert all(finding.size_bytes == finding.path.stat().st_size for finding in findings)
    assert sorted(f.num_samples for f in findings if f.path.suffix == ".tar") == [1, 3, 3, 3]


def test_a_single_set_can_be_verified(dataset):
    assert {finding.path for finding in verify(dataset / "text")} == files_of(dataset / "text")


def test_outputs_further_down_are_verified_too(dataset):
    """Captions beside a dataset: reading these alone would pass a folder with damaged features."""
    top = dataset / "top"
    shutil.copytree(dataset / "256px", top / "a/features/256px")
    shutil.copytree(dataset / "text", top / "captions")
    assert {finding.path for finding in verify(top)} == files_of(top)
    assert {path: size for path, size in planned(top)} == {path: path.stat().st_size for path in files_of(top)}
    assert len(list(planned(top))) == len(files_of(top))
    [path, *_] = (top / "a/features/256px").glob("*.*/*.tar")
    flip(path, 700)
    assert [finding.path for finding in problems(top)] == [path]


def test_outputs_in_a_bucket_are_found_at_every_depth(dataset, bucket):
    root = location(bucket) / "top"
    for path in (path for path in (dataset / "text").rglob("*") if path.is_file()):
        (root / "project/features" / path.relative_to(dataset).as_posix()).write_bytes(path.read_bytes())
    assert len(list(verify(root))) == len(files_of(dataset / "text"))
    assert not problems(root)


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
    assert "run the command that wrote it again" in finding.problem
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


@pytest.fixture
def rich(tmp_path):
    """A dataset with mirrored images, captions that samples share, and codecs with a calibration."""
    return build(tmp_path / "rich")


def index_rows(root):
    return {row["key"]: row for row in pq.read_table(root / "index.parquet").to_pylist()}


def test_a_whole_dataset_with_all_that_a_set_can_have_is_whole(rich):
    assert {finding.path for finding in verify(rich)} == files_of(rich)
    assert not problems(rich)
    assert not problems(rich, fast=True)
    assert {finding.path for finding in verify(rich, fast=True)} == files_of(rich)
    counts = {f.path.name.split("-")[0]: f.num_samples for f in verify(rich / "text") if f.path.suffix == ".tar"}
    assert counts == {"null": 1, "a": 6, "b": 6}


@pytest.mark.parametrize(
    ("column", "problem"), [("offset_bytes", "damaged;"), ("flipped_offset_bytes", "its mirrored image is damaged;")]
)
def test_an_image_and_its_mirror_image_are_told_apart(rich, column, problem):
    row = index_rows(rich / "256px")["b/2"]
    flip(rich / "256px" / row["shard"], row[column] + 3)
    [finding] = problems(rich)
    assert finding.sample == "b/2"
    assert finding.problem.startswith(f"{problem} delete {rich / '256px/commits/b.json'}")


@pytest.mark.parametrize("column", ["offset_bytes", "flipped_offset_bytes"])
def test_a_damaged_header_names_its_sample(rich, column):
    row = index_rows(rich / "256px")["a/3"]
    flip(rich / "256px" / row["shard"], row[column] - 20)
    [finding] = problems(rich)
    assert (finding.sample, "mirrored" in finding.problem) == ("a/3", column.startswith("flipped"))


@pytest.mark.parametrize("name", ["text", "short", "packed"])
@pytest.mark.parametrize("back", [0, -10, -500])
def test_a_damaged_caption_that_samples_share_says_how_many(rich, name, back):
    row = index_rows(rich / name)["a/5"]
    flip(rich / name / row["shard"], row["offset_bytes"] + back)
    [finding] = problems(rich)
    assert finding.sample == "a/3"
    assert finding.problem.startswith("damaged, with 2 other sample(s) of the same caption; delete ")


def part_of(root, keys):
    """Make a set one of some of its samples, as `pixart split` does: the shards stay, index and entries lose rows."""
    manifest = read_manifest(root)
    rows = [row for row in index_rows(root).values() if row["key"] in keys]
    part = staging_path(root / "index", "p")
    pq.write_table(pa.Table.from_pylist(rows, schema=TEXT_INDEX), part)
    files = [PublishedFile(**{n: shard[n] for n in ("path", "size_bytes", "sha256")}) for shard in manifest.shards]
    files.append(publish(part, root, root / "index", "part", ".parquet"))
    shutil.rmtree(root / "commits")
    record = Record("part", "", {}, len(rows), len(rows), {}, files)
    seal(root, [record], TEXT_INDEX, replace(manifest, counts={"rows_in": len(rows), "rows_out": len(rows)}))


def test_a_member_may_be_named_by_a_sample_of_another_part(rich):
    """The first row of a shared caption gave the member its name, and another part of a split has that row."""
    root = rich / "text"
    part_of(root, {"a/5", "b/0"})
    assert not problems(root)
    rows = index_rows(root)
    shard = root / rows["a/5"]["shard"]
    whole = shard.read_bytes()
    flip(shard, rows["a/5"]["offset_bytes"])
    [finding] = problems(root)
    assert finding.sample == "a/5"
    assert finding.problem.endswith("copy it again, or make the set again with the command that wrote it")
    shard.write_bytes(whole)
    flip(shard, 130)  # in the header of a member of the other part
    [finding] = problems(root)
    assert "between samples" in finding.problem
    shard.write_bytes(whole)
    flip(shard, rows["a/5"]["offset_bytes"] - 30)
    assert [finding.sample for finding in problems(root)] == ["a/5"]


def test_a_damaged_calibration_is_found(rich):
    [path] = (rich / "short").glob("codec-*.safetensors")
    flip(path, 90)
    for fast in (False, True):
        [finding] = problems(rich, fast=fast)
        assert (finding.path, finding.problem.partition(",")[0]) == (path, "damaged")
    path.unlink()
    assert [finding.problem.partition(";")[0] for finding in problems(rich)] == ["missing"]


@pytest.mark.parametrize("damaged", [["entries.bin"], ["index.parquet"], ["entries.bin", "index.parquet"]])
def test_samples_are_named_as_long_as_index_or_entries_are_whole(rich, damaged):
    root = rich / "256px"
    row = index_rows(root)["b/1"]
    flip(root / row["shard"], row["offset_bytes"])
    for name in damaged:
        flip(root / name, 100)
    found = {finding.path: finding for finding in problems(root)}
    assert found.keys() == {root / row["shard"], *(root / name for name in damaged)}
    names = {1: "b/1" if damaged == ["entries.bin"] else "of row 7 of the index", 2: ""}
    assert found[root / row["shard"]].sample == names[len(damaged)]
    if len(damaged) == 2:
        assert "cannot be named, as the index is not whole" in found[root / row["shard"]].problem


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "pixart-featurez"}', "\0\1"])
def test_a_manifest_that_names_nothing_is_no_reason_to_pass_over_a_set(rich, text):
    """With a flipped bit in the name of its format, a set is none any more to who looks for sets."""
    (rich / "256px/manifest.json").write_text(text)
    [finding] = problems(rich)
    assert finding.path == rich / "256px/manifest.json"
    assert "damaged" in finding.problem
    shard = next((rich / "256px").glob("0.50/a-*.tar"))
    flip(shard, 700)
    assert {finding.path for finding in problems(rich)} == {finding.path, shard}  # the records still tell


def test_a_set_without_records_whose_manifest_is_gone_is_found(rich):
    shutil.rmtree(rich / "256px/commits")
    (rich / "256px/manifest.json").unlink()
    assert [(f.path, f.problem.partition(":")[0]) for f in problems(rich)] == [(rich / "256px", "not finished")]


def test_an_unreadable_record_is_found_and_all_else_is_still_read(rich):
    path = rich / "256px/commits/a.json"
    path.write_text(path.read_text()[:-5])
    shard = next((rich / "text").glob("shards/a-*.tar"))
    flip(shard, 700)
    found = {finding.path: finding.problem for finding in problems(rich)}
    assert shard in found
    assert f"{path}: not a commit record" in found[rich / "256px/commits"]


def test_the_fast_check_reads_no_shard(rich, monkeypatch):
    opened = []
    whole = verification.local_copy
    monkeypatch.setattr(verification, "local_copy", lambda path: opened.append(path) or whole(path))
    monkeypatch.setattr(damage, "local_copy", None)
    assert not problems(rich, fast=True)
    assert opened
    assert not [path for path in opened if path.suffix == ".tar"]


def sealed_with(root, **changes):
    """Put another manifest, which fits its digest, in the place of a set's."""
    manifest = replace(read_manifest(root), **changes)
    (root / "manifest.json").write_bytes(manifest_bytes(manifest))


def entries_with(root, change):
    """Put entries that were changed, with checks and checksum that fit, in the place of a set's."""
    entries = np.fromfile(root / "entries.bin", entry_type(read_manifest(root).kind))
    changed = change(entries)
    changed["check"] = checks(changed)
    changed.tofile(root / "entries.bin")
    sealed_with(root, entries_sha256=file_sha256(root / "entries.bin"))


def swap(field, first=0, second=1):
    def change(entries):
        entries[field][[first, second]] = entries[field][[second, first]]
        return entries

    return change


def add_one(field):
    def change(entries):
        entries[field][2] += 1
        return entries

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add_one("crc"), "sample .*: entries.bin has another crc;"),
        (add_one("height"), "sample .*: entries.bin has another height;"),
        (add_one("flipped_crc"), "sample .*: entries.bin has another flipped_crc;"),
        (swap("key"), "sample a/0: entries.bin has another key, and 1 rows near it;"),
        (swap("row"), "sample a/0: entries.bin has another"),
        (add_one("row"), "row 4 is not in entries.bin, and another is there twice;"),
        (lambda entries: entries[::-1].copy(), "entries.bin is not in the order of the shards;"),
        (lambda entries: entries[:-1].copy(), "holds 12 rows, entries.bin 11;"),
        (add_one("bucket"), "entries.bin is not in the order of the shards;"),
    ],
)
def test_entries_that_say_something_else_than_the_index_are_found(rich, change, expected):
    root = rich / "256px"
    entries_with(root, change)
    for fast in (False, True):
        [finding] = [finding for finding in problems(root, fast=fast) if finding.path.name == "index.parquet"]
        assert re.match(expected, finding.problem), finding.problem
        assert finding.problem.endswith("run the command that wrote it again: it is rewritten")


@pytest.mark.parametrize("field", ["shard", "bucket", "row"])
def test_numbers_of_nothing_are_findings_and_no_crash(rich, field):
    def change(entries):
        entries[field][-1] = 99
        return entries

    entries_with(rich / "256px", change)
    [path] = (rich / "256px/2.00").glob("b-*.tar")
    flip(path, 700)  # a damaged sample has a name to be looked up
    for fast in (False, True):
        said = "; ".join(finding.problem for finding in problems(rich, fast=fast))
        assert f"entries.bin has {field} 99" in said
        assert fast or "damaged; its samples cannot be named" in said


def test_the_command_that_wrote_a_set_is_the_one_to_run_again(rich):
    root = rich / "256px"
    (root / "entries.bin").unlink()
    for first, expected in (
        ("# pixart merge", "`pixart merge`"),
        ("# pixart split\r", "`pixart split`"),
        ("# pixart \x1b[2J", "the command that wrote it"),
        ("", "the command that wrote it"),
    ):
        (root / "job.toml").write_text(f"{first}\nx = 1\n")
        [finding] = [finding for finding in problems(root) if finding.path.name == "entries.bin"]
        assert finding.problem == f"missing; run {expected} again: it is rewritten"
        with pytest.raises(DataError, match=f"entries.bin: missing; run {expected} again: the index is rewritten"):
            Original(root)


def changed(lines, /, **values):
    return [{**row, **values} if n == 0 else row for n, row in enumerate(lines)]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("256px", lambda m: {"counts": {**m.counts, "rows_out": 11}}, "holds 12 rows, the manifest counts 11"),
        ("256px", lambda m: {"counts": {**m.counts, "rejected": {}}}, r"rejected.parquet holds 2 rows, .* counts {}"),
        ("256px", lambda m: {"buckets": changed(m.buckets, rows=7)}, "6 rows in 2 shards of bucket 0.50, .* 7 in 2"),
        ("256px", lambda m: {"buckets": changed(m.buckets, shards=1)}, "6 rows in 2 shards of bucket 0.50, .* 6 in 1"),
        ("256px", lambda m: {"buckets": m.buckets[::-1]}, "bucket"),
        ("256px", lambda m: {"buckets": changed(m.buckets, height_px=48, width_px=24)}, "a/0: its size is not that"),
        ("256px", lambda m: {"buckets": changed(m.buckets, height_px=16)}, "sample a/0: its size is not that"),
        ("256px", lambda m: {"shards": changed(m.shards, rows=2)}, "holds 3 rows of 0.50/a-.*, the manifest counts 2"),
        ("256px", lambda m: {"shards": m.shards[:-1]}, "entries.bin has shard 3, the manifest 3 of them"),
        ("256px", lambda m: {"shards": changed(m.shards, path="x.tar")}, "its shard 0.50/a-.* is not in the manifest"),
        ("text", lambda m: {"model": {**m.model, "width": 6}}, "sample a/0: its size is not that of its tokens"),
    ],
)
def test_a_manifest_that_says_something_else_than_the_index_is_found(rich, name, changes, expected):
    root = rich / name
    sealed_with(root, **changes(read_manifest(root)))
    said = [finding.problem for finding in problems(root, fast=True) if finding.path.name == "index.parquet"]
    assert re.search(expected, "\n".join(said)), said


def test_a_set_on_an_object_store_is_verified_alike(rich, bucket):
    local, root = rich / "256px", location(f"{bucket}/256px")
    root.fs.put(f"{local}/", f"{root.path}/", recursive=True)
    expected = {path.relative_to(local).as_posix() for path in files_of(local)}
    for fast in (False, True):
        found = list(verify(root, fast=fast))
        assert not [finding for finding in found if finding.problem]
        assert {str(finding.path).removeprefix(f"{root}/") for finding in found} == expected
    row = index_rows(local)["b/2"]
    data = bytearray((local / row["shard"]).read_bytes())
    data[row["offset_bytes"]] ^= 1
    (root / row["shard"]).write_bytes(bytes(data))
    assert [finding.sample for finding in problems(root)] == ["b/2"]
    (root / "entries.bin").unlink()
    [finding] = problems(root, fast=True)
    assert finding.problem == "missing; run the command that wrote it again: it is rewritten"
