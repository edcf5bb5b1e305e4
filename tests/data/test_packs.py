import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_data.editions import Excerpt, Original, find
from pixart_data.entries import IMAGE_ENTRY, key_hash
from pixart_data.errors import DataError
from pixart_data.packs import GENERATIONS, cut, make_groups, plan_generation, read_generations, read_members
from pixart_data.shards import manifest_bytes
from tests.sealing import write_images, write_texts

NOTHING = np.empty(0, np.uint64)


@given(
    sizes=st.lists(st.integers(1, 500), max_size=60),
    shard_bytes=st.integers(1, 2000),
    by_rank=st.booleans(),
    data=st.data(),
)
def test_packs_hold_all_members_in_order_and_are_of_about_one_size(sizes, shard_bytes, by_rank, data):
    ranks = np.array(sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))), np.int64)
    bounds = cut(np.array(sizes, np.int64), ranks if by_rank else None, shard_bytes)
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in bounds)
    for start, stop in bounds:
        assert sum(sizes[start:stop]) <= shard_bytes + max(sizes)
        assert not by_rank or len(set(ranks[start:stop])) == 1
    if bounds and not by_rank:
        assert len(bounds) <= -(-sum(sizes) // shard_bytes)


@given(st.lists(st.integers(0, 50), unique=True), st.lists(st.integers(0, 50)))
def test_find_tells_where_and_whether(keys, wanted):
    at, found = find(np.array(keys, np.uint64), np.array(wanted, np.uint64))
    assert found.tolist() == [key in keys for key in wanted]
    assert [keys[i] for i in at[found]] == [key for key in wanted if key in keys]


def test_rows_without_captions_share_what_they_shared_and_no_more(tmp_path):
    """What another tool wrote may have no captions; equal checksums alone do not prove that two members are equal."""
    units = {"a": [("1", "red"), ("2", "red")], "b": [("3", "red")]}
    write_texts(tmp_path / "with", units)
    write_texts(tmp_path / "without", units, with_captions=False)
    groups = {name: make_groups(Original(tmp_path / name), NOTHING).of.tolist() for name in ("with", "without")}
    assert groups["with"] == [0, 0, 0]
    assert groups["without"][0] == groups["without"][1] != groups["without"][2]


def test_a_member_is_named_by_its_first_row_unless_it_has_a_name(tmp_path):
    write_texts(tmp_path, {"a": [("1", "blue")], "b": [("2", "red"), ("3", "red")]})
    original = Original(tmp_path)
    rows = original.entries["row"]
    groups = make_groups(original, NOTHING)
    assert sorted(rows[groups.leader[np.unique(groups.of)]].tolist()) == [0, 1]
    assert not groups.packed.any()
    named = make_groups(original, original.column("key")[2:])
    assert sorted(rows[named.leader[np.unique(named.of)]].tolist()) == [0, 2]
    assert named.packed[named.of[rows == 1]].all()
    assert not named.packed[named.of[rows == 0]].any()


def test_a_plan_is_read_as_it_was_written_and_a_damaged_one_is_told_of(tmp_path):
    write_images(tmp_path / "in", {"u": [(f"{i}", "1.00") for i in range(9)]})
    original = Original(tmp_path / "in")
    ranks, groups = np.zeros(9, np.int64), make_groups(original, NOTHING)
    planned = plan_generation(tmp_path / "out", 0, original, groups, ranks, 4000, write=True)
    assert read_generations(tmp_path / "out") == [planned]
    keys = [key for pack in planned.packs for key in read_members(tmp_path / "out", pack)["key"].to_pylist()]
    assert keys == sorted((f"{i}" for i in range(9)), key=key_hash)
    (tmp_path / "out" / planned.plan.path).unlink()
    with pytest.raises(DataError, match=r"000-.*\.arrow: missing or damaged .*; compact into a new folder"):
        read_members(tmp_path / "out", planned.packs[0])
    (tmp_path / "out" / GENERATIONS / "000.json").write_text("{}")
    with pytest.raises(DataError, match=r"000\.json: not a plan of packs"):
        read_generations(tmp_path / "out")


def test_a_damaged_record_is_told_of(tmp_path):
    write_images(tmp_path, {"u": [("a", "1.00"), ("b", "1.00")]})
    data = bytearray((tmp_path / "entries.bin").read_bytes())
    data[IMAGE_ENTRY.itemsize + 3] ^= 4
    (tmp_path / "entries.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"entries\.bin: damaged, or not the one .*; `pixart verify"):
        Original(tmp_path)


def test_entries_of_another_time_are_told_of_though_each_record_is_whole(tmp_path):
    """Sealed into another edition, they would be consistent again, and wrong."""
    for name, key in (("one", "a"), ("two", "b")):
        write_images(tmp_path / name, {"u": [(key, "1.00")]})
    (tmp_path / "one/entries.bin").write_bytes((tmp_path / "two/entries.bin").read_bytes())
    with pytest.raises(DataError, match=r"one/entries\.bin: damaged, or not the one that manifest\.json names"):
        Original(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (lambda m: {"shards": m.shards[:-1]}, r"entries\.bin has shard 1, the manifest 1 of them"),
        (lambda m: {"buckets": m.buckets[:1]}, r"entries\.bin has bucket 1, the manifest 1 of them"),
        (lambda m: {"counts": {**m.counts, "rows_out": 3}}, "holds 2 samples, manifest.json counts 3"),
    ],
)
def test_a_manifest_of_fewer_shards_or_buckets_is_told_of(tmp_path, changes, expected):
    manifest = write_images(tmp_path, {"u": [("a", "0.50"), ("b", "1.00")]})
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(replace(manifest, **changes(manifest))))
    with pytest.raises(DataError, match=f"{expected}; `pixart verify {tmp_path}` says what to do"):
        Original(tmp_path)


def test_an_edition_is_made_of_no_set_whose_tables_name_different_shards(tmp_path):
    manifest = write_images(tmp_path, {"u": [("a", "1.00")], "v": [("b", "1.00")]})
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(replace(manifest, shards=manifest.shards[::-1])))
    original = Original(tmp_path)
    excerpt = Excerpt(original, np.ones(2, bool), *(original.column(n) for n in ("shard", "offset", "flipped_offset")))
    with pytest.raises(DataError, match=r"index\.parquet and entries\.bin name different shards, going by manifest"):
        list(excerpt.index(pa.array([shard["path"] for shard in manifest.shards])))


@pytest.mark.parametrize("name", ["index.parquet", "rejected.parquet"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "no table"])
def test_a_table_that_cannot_be_read_is_told_of(tmp_path, name, damage):
    manifest = write_images(tmp_path, {"u": [("a", "1.00")]})
    path = tmp_path / name
    content = {"missing": b"", "cut short": path.read_bytes()[:-9], "no table": b"PAR1"}[damage]
    path.unlink() if damage == "missing" else path.write_bytes(content)
    expected = "missing; run `pixart verify" if damage == "missing" else "damaged, or is not the one"
    if damage == "no table":  # and sealed
        field = {"index.parquet": "index_sha256", "rejected.parquet": "rejected_sha256"}[name]
        sealed = replace(manifest, **{field: hashlib.sha256(content).hexdigest()})
        (tmp_path / "manifest.json").write_bytes(manifest_bytes(sealed))
        expected = "cannot be read"
    original = Original(tmp_path)
    for columns in (None, ["key"]):
        with pytest.raises(DataError, match=f"{name}: {expected}"):
            list(original.tables(columns) if name == "index.parquet" else original.rejected())


def test_an_index_that_is_not_the_manifest_s_is_told_of(tmp_path):
    for name, key in (("one", "a"), ("two", "b")):
        write_images(tmp_path / name, {"u": [(key, "1.00")]})
    (tmp_path / "one/index.parquet").write_bytes((tmp_path / "two/index.parquet").read_bytes())
    with pytest.raises(DataError, match=r"is not the one that manifest\.json names"):
        list(Original(tmp_path / "one").tables())
