import errno
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data import seals
from pixart_data.commits import PublishedFile, Record, write_record
from pixart_data.entries import IMAGE_ENTRY, TEXT_ENTRY, checks, key_hash
from pixart_data.errors import DataError, JobError
from pixart_data.records import IMAGE_INDEX, REJECTED, TEXT_INDEX
from pixart_data.seals import seal, without
from pixart_data.shards import FeatureSet, Manifest, read_manifest
from pixart_data.storage import scratch_file
from pixart_data.verification import verify

BUCKETS = [{"ratio": f"{n}.00", "height_px": 8 * n, "width_px": 8} for n in (1, 2, 3)]
IMAGES = Manifest("image", "moments", "F16", {"channels": 4, "downsampling": 8}, {}, {}, buckets=BUCKETS)
TEXTS = Manifest("text", "t5", "BF16", {"width": 4}, {}, {})


def unit_record(root, unit, rows, schema, shards):
    """A unit's index part, and the record that names it and its shards, of which there are no files."""
    path = root / "index" / f"{unit}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    files = [PublishedFile(shard, 1, "") for shard in shards]
    rejected = Counter(row["error"] for row in rows if row.get("error"))
    files.append(PublishedFile(f"index/{unit}.parquet", 1, ""))
    return Record(unit, "", {}, len(rows), len(rows) - rejected.total(), dict(rejected), files)


def image_row(key, bucket, shard, offset, flipped=None):
    numbers = {"offset_bytes": offset, "size_bytes": 128 * bucket, "crc32": offset + 7}
    canvas = {"bucket": f"{bucket}.00", "height_px": 8 * bucket, "width_px": 8}
    sizes = {"original_height_px": 100 + offset, "original_width_px": 50 + offset}
    mirrored = {} if flipped is None else {"flipped_offset_bytes": flipped, "flipped_crc32": flipped + 9}
    return {"key": key, "shard": shard, **numbers, **canvas, **sizes, **mirrored}


def text_row(key, shard, offset, num_tokens=2):
    numbers = {"offset_bytes": offset, "size_bytes": 8 * num_tokens, "crc32": offset + 7, "num_tokens": num_tokens}
    return {"key": key, "shard": shard, **numbers}


def rejected_row(key):
    return {"key": key, "error": "zero_bytes", "detail": "d"}


def expected_entries(root, manifest):
    """The records that an index must have, one by one, by the words of the format."""
    index = pq.read_table(root / "index.parquet").to_pylist()
    shards = [shard["path"] for shard in manifest.shards]
    buckets = [bucket["ratio"] for bucket in manifest.buckets]
    made = []
    for number, row in enumerate(index):
        record = np.zeros((), IMAGE_ENTRY if manifest.kind == "image" else TEXT_ENTRY)
        values = {"key": key_hash(row["key"]), "offset": row["offset_bytes"], "crc": row["crc32"], "row": number}
        values |= {"size": row["size_bytes"], "shard": shards.index(row["shard"])}
        if manifest.kind == "image":
            values |= {"height": row["original_height_px"], "width": row["original_width_px"]}
            values |= {"flipped_offset": row["flipped_offset_bytes"] or 0, "flipped_crc": row["flipped_crc32"] or 0}
            values["bucket"] = buckets.index(row["bucket"])
        else:
            values["num_tokens"] = row["num_tokens"]
        for name, value in values.items():
            record[name] = value
        made.append(record)
    order = ("bucket", "shard", "offset", "row") if manifest.kind == "image" else ("shard", "offset", "row")
    made.sort(key=lambda record: [int(record[name]) for name in order])
    return np.array(made, IMAGE_ENTRY if manifest.kind == "image" else TEXT_ENTRY)


def require_expected(root):
    manifest = read_manifest(root)
    found, expected = np.array(FeatureSet(root).entries), expected_entries(root, manifest)
    assert found["check"].tolist() == checks(found).tolist()
    found["check"] = 0
    assert found.tobytes() == expected.tobytes()
    return manifest


# For each unit, for each of its shards: the bucket, and of each row the place in the unit's part and whether flipped.
UNITS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=5)), max_size=4
    ),
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(UNITS)
def test_entries_are_the_index_in_the_order_of_the_shards(units):
    """Several shards of a unit may lie in one folder: a retry adds one beside the first."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        records = []
        for number, unit in enumerate(units):
            rows = [rejected_row(f"{number}/bad")]
            shards = []
            for place, (bucket, samples) in enumerate(unit):
                shards.append(f"{bucket}.00/{number}-{place}.tar")
                for i, (_, flipped) in enumerate(samples):
                    flip = 1024 * i + 512 if flipped else None
                    rows.append(image_row(f"{number}/{place}/{i}", bucket, shards[-1], 1024 * i + 64, flip))
            rank = {
                row["key"]: samples for row, samples in zip(rows[1:], (s for _, ss in unit for s in ss), strict=True)
            }
            rows.sort(key=lambda row: rank.get(row["key"], (0, False))[0])  # the order of the part is no shard's
            records.append(unit_record(root, f"u{number}", rows, IMAGE_INDEX, shards))
        sealed = seal(root, records, IMAGE_INDEX, IMAGES)
        manifest = require_expected(root)
        assert manifest == sealed
        rows = [row for record in records for row in pq.read_table(root / record.files[-1].path).to_pylist()]
        good = [row for row in rows if not row["error"]]
        assert pq.read_table(root / "index.parquet")["key"].to_pylist() == [row["key"] for row in good]
        assert pq.read_table(root / "rejected.parquet")["key"].to_pylist() == [f"{n}/bad" for n in range(len(units))]
        of_shard = Counter(row["shard"] for row in good)
        assert [(shard["path"], shard["rows"]) for shard in manifest.shards] == [
            (file.path, of_shard[file.path]) for record in records for file in record.files[:-1]
        ]
        for bucket in manifest.buckets:
            own = [row for row in good if row["bucket"] == bucket["ratio"]]
            assert (bucket["rows"], bucket["shards"]) == (len(own), len({row["shard"] for row in own}))


def test_samples_of_one_caption_share_a_member_and_keep_their_rows(tmp_path):
    rows = [
        text_row("a", "shards/u.tar", 2048),
        text_row("b", "shards/u.tar", 64, 3),
        text_row("c", "shards/u.tar", 2048),
    ]
    null = Record("null-caption", "", {}, 0, 0, {}, [PublishedFile("shards/null.tar", 1, "")])
    seal(tmp_path, [null, unit_record(tmp_path, "u", rows, TEXT_INDEX, ["shards/u.tar"])], TEXT_INDEX, TEXTS)
    manifest = require_expected(tmp_path)
    entries = FeatureSet(tmp_path).entries
    assert entries["row"].tolist() == [1, 0, 2]
    assert entries["offset"].tolist() == [64, 2048, 2048]
    assert entries["shard"].tolist() == [1, 1, 1]
    assert [shard["rows"] for shard in manifest.shards] == [0, 3]
    assert manifest.buckets == []


@pytest.mark.parametrize(("schema", "manifest"), [(IMAGE_INDEX, IMAGES), (TEXT_INDEX, TEXTS)])
@pytest.mark.parametrize("units", [[], [[]], [[rejected_row("a")], [rejected_row("b")]]])
def test_a_set_without_samples_is_sealed(tmp_path, schema, manifest, units):
    records = [unit_record(tmp_path, f"u{n}", rows, schema, []) for n, rows in enumerate(units)]
    sealed = seal(tmp_path, records, schema, manifest)
    opened = FeatureSet(tmp_path)
    assert (len(opened), opened.shards) == (0, [])
    assert opened.index.schema == without(schema, "error", "detail")
    assert pq.read_table(tmp_path / "rejected.parquet").schema == REJECTED
    assert (tmp_path / "entries.bin").read_bytes() == b""
    assert all((bucket["rows"], bucket["shards"]) == (0, 0) for bucket in sealed.buckets)


def test_a_set_of_version_1_is_upgraded_by_sealing_it_again(tmp_path):
    """Its index parts have no columns of mirrored images; shards and parts stay as they are."""
    old = without(IMAGE_INDEX, "flipped_offset_bytes", "flipped_crc32")
    rows = [image_row(f"k{i}", 1 + i % 2, f"{1 + i % 2}.00/u.tar", 64 + 1024 * i) for i in range(4)]
    record = unit_record(tmp_path, "u", rows, old, ["1.00/u.tar", "2.00/u.tar"])
    part = (tmp_path / record.files[-1].path).read_bytes()
    version_1 = {
        name: value for name, value in asdict(IMAGES).items() if name not in ("codec", "entries_sha256", "records")
    }
    (tmp_path / "manifest.json").write_text(json.dumps({**version_1, "version": 1}))
    with pytest.raises(DataError, match="found pixart-features version 1; run `pixart extract` .* alone") as caught:
        FeatureSet(tmp_path)
    assert f"with its job, {tmp_path}/job.toml, and the same sources" in str(caught.value)
    seal(tmp_path, [record], IMAGE_INDEX, IMAGES)
    require_expected(tmp_path)
    opened = FeatureSet(tmp_path)
    assert opened.entries["flipped_offset"].tolist() == [0] * 4
    assert opened.index.schema == without(IMAGE_INDEX, "error", "detail")
    assert opened.index["flipped_crc32"].null_count == 4
    assert (tmp_path / record.files[-1].path).read_bytes() == part


def leftovers(root):
    """What a seal that failed left behind: files in the set, and in this process's scratch folder."""
    probe = scratch_file("probe")
    probe.unlink()
    found = [*root.rglob(".tmp-*"), *probe.parent.iterdir()]
    return [path for path in found if "entries.bin" in path.name or path.suffix == ".parquet"]


@pytest.mark.parametrize("keys", [("k", "k"), ("k", "k", "k"), ("k", "k", "l", "l")])
def test_keys_that_occur_twice_are_named_and_nothing_is_sealed(tmp_path, keys):
    records = [
        unit_record(tmp_path, f"u{n}", [text_row(key, f"shards/{n}.tar", 64)], TEXT_INDEX, [f"shards/{n}.tar"])
        for n, key in enumerate(keys)
    ]
    others = " and 1 others" if len(set(keys)) > 1 else ""
    with pytest.raises(DataError, match=rf"key [kl]{others} occur more than once; .* name sources apart"):
        seal(tmp_path, records, TEXT_INDEX, TEXTS)
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
    assert leftovers(tmp_path) == []


def test_two_keys_with_one_hash_are_told_from_one_key_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(seals, "key_hashes", lambda keys: np.array([ord(key[0]) for key in keys], np.uint64))
    records = [
        unit_record(tmp_path, f"u{n}", [text_row(key, f"shards/{n}.tar", 64)], TEXT_INDEX, [f"shards/{n}.tar"])
        for n, key in enumerate(["other", "same/1", "same/2"])
    ]
    with pytest.raises(DataError) as caught:
        seal(tmp_path, records, TEXT_INDEX, TEXTS)
    assert str(caught.value) == (
        f"{tmp_path}: the keys same/1 and same/2 differ, but have the same 64-bit hash, by which training finds them; "
        "leave one of these rows out, or rename its key"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_nothing_of_the_making_stays_behind(tmp_path):
    rows = [text_row("a", "shards/u.tar", 64)]
    seal(tmp_path, [unit_record(tmp_path, "u", rows, TEXT_INDEX, ["shards/u.tar"])], TEXT_INDEX, TEXTS)
    assert leftovers(tmp_path) == []
    names = {"index", "index.parquet", "rejected.parquet", "entries.bin", "manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_manifest_knows_the_records_it_was_sealed_from(tmp_path):
    rows = [[text_row(f"{n}", f"shards/{n}.tar", 64)] for n in range(2)]
    records = [unit_record(tmp_path, f"u{n}", rows[n], TEXT_INDEX, [f"shards/{n}.tar"]) for n in range(2)]
    assert seal(tmp_path, records, TEXT_INDEX, TEXTS).records == {}  # those of other sets, say
    for record in records:
        write_record(tmp_path, record)
    sealed = seal(tmp_path, records, TEXT_INDEX, TEXTS)
    assert sealed.records.keys() == {"u0", "u1"}
    path = tmp_path / "commits/u1.json"
    path.write_text(path.read_text().replace('"facts": {}', '"facts": {"width": 5}'))
    problems = {finding.path: finding.problem for finding in verify(tmp_path)}
    assert problems[path].startswith(
        "not the one that the manifest was written from; delete it and run the command that wrote it"
    )
    path.unlink()
    problems = {finding.path: finding.problem for finding in verify(tmp_path)}
    assert problems[path].startswith("missing; run the command that wrote it again")
    assert not problems[tmp_path / "manifest.json"]


def test_a_full_disk_is_an_error_that_can_be_told(tmp_path, monkeypatch):
    """Of a file that is only mapped, a full disk would be a signal that kills the process."""

    def full(descriptor, offset, size):
        assert size == 3 * TEXT_ENTRY.itemsize
        raise OSError(errno.ENOSPC, "No space left on device")

    rows = [text_row(f"k{n}", "shards/a.tar", 64 * (n + 1)) for n in range(3)]
    record = unit_record(tmp_path, "a", rows, TEXT_INDEX, ["shards/a.tar"])
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(JobError, match="entries.bin: cannot write: the disk is full"):
        seal(tmp_path, [record], TEXT_INDEX, TEXTS)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-") or path.name == "entries.bin"]
