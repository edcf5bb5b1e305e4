import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.entries import (
    IMAGE_ENTRY,
    TEXT_ENTRY,
    checks,
    entry_type,
    key_hash,
    key_hashes,
    map_entries,
    read_keys,
    require_whole,
)
from pixart_data.errors import DataError

TYPES = {"image": IMAGE_ENTRY, "text": TEXT_ENTRY}


def records(kind, count=5, seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, count * TYPES[kind].itemsize, np.uint8)
    made = raw.view(TYPES[kind])
    made["check"] = checks(made)
    return made


def slow_check(record):
    """The format in plain numbers: what a reader in another language has to do."""
    words = record.copy()
    words["check"] = 0
    data = words.tobytes()
    mixed = 0x9E3779B97F4A7C15
    for start in range(0, len(data), 8):
        mixed = (mixed ^ int.from_bytes(data[start : start + 8], "little")) * 0x9E3779B97F4A7C15 % (1 << 64)
        mixed ^= mixed >> 29
    return mixed >> 32


def test_records_have_the_sizes_that_files_have_on_any_machine():
    assert (IMAGE_ENTRY.itemsize, TEXT_ENTRY.itemsize) == (64, 40)
    for dtype in TYPES.values():
        assert all(dtype[name].str.startswith("<") for name in dtype.names)
        assert sum(dtype[name].itemsize for name in dtype.names) == dtype.itemsize  # no holes
    assert {kind: entry_type(kind) for kind in TYPES} == TYPES


def test_a_key_has_the_hash_that_other_programs_can_compute():
    keys = ["a", "photos/summer/img_%41", "", "ä" * 300]
    expected = [int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") for k in keys]
    assert [key_hash(key) for key in keys] == expected
    assert key_hashes(keys).tolist() == expected
    assert key_hashes([]).dtype == np.uint64


@pytest.mark.parametrize("kind", TYPES)
def test_checks_are_those_of_the_format(kind):
    made = records(kind, 50)
    assert made["check"].tolist() == [slow_check(record) for record in made]
    assert checks(made[::3]).tolist() == made["check"][::3].tolist()  # not one piece of memory
    assert len(checks(made[:0])) == 0


@pytest.mark.parametrize("kind", TYPES)
def test_any_flipped_bit_of_any_record_is_noticed(kind, tmp_path):
    whole = records(kind, 5)
    num_bits = 8 * whole.nbytes
    flipped = np.repeat(whole.view(np.uint8)[None], num_bits, axis=0)  # one copy for each bit
    bits = np.arange(num_bits)
    flipped[bits, bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    found = flipped.reshape(-1).view(TYPES[kind])
    wrong = (found["check"] != checks(found)).reshape(num_bits, len(whole))
    assert (wrong.sum(axis=1) == 1).all()
    require_whole(whole, tmp_path)
    with pytest.raises(DataError, match="entries.bin: damaged: a record does not fit its check; run the command that"):
        require_whole(found[: len(whole)], tmp_path / "entries.bin")


@pytest.mark.parametrize("kind", TYPES)
def test_holes_and_fields_that_changed_places_are_noticed(kind):
    made = records(kind, 200)
    hole = np.zeros(1, TYPES[kind])
    assert (checks(hole) != 0).all()
    assert len(set(made["check"].tolist())) == len(made)
    swapped = made.copy()
    swapped["offset"], swapped["key"] = made["key"], made["offset"]
    assert (checks(swapped) != made["check"]).all()


def test_a_file_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "entries.bin"
    made = records("image", 7)
    made.tofile(path)
    mapped = map_entries(path, "image")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, made)
    require_whole(mapped[2:4], path)
    with pytest.raises(ValueError, match="read-only"):
        mapped["key"] = 0


def test_a_file_that_cannot_be_used_is_a_data_error(tmp_path):
    path = tmp_path / "entries.bin"
    with pytest.raises(DataError, match="entries.bin: missing; run the command that wrote it again: the index"):
        map_entries(path, "text")
    path.write_bytes(bytes(41))
    with pytest.raises(DataError, match="expected records of 40 bytes, found 41 bytes; run the command that wrote it"):
        map_entries(path, "text")
    path.write_bytes(b"")
    assert len(map_entries(path, "image")) == 0


def test_keys_are_read_from_the_row_groups_that_hold_them(tmp_path):
    keys = [f"k{number}" for number in range(10)]
    with pq.ParquetWriter(tmp_path / "index.parquet", pa.schema([("n", pa.int8()), ("key", pa.string())])) as writer:
        for group in (keys[:3], [], keys[3:4], keys[4:]):
            writer.write_table(
                pa.table({"n": pa.array([0] * len(group), pa.int8()), "key": pa.array(group, pa.string())})
            )
    for rows in ([9, 0, 3, 9, 4], [2], [], np.arange(10)):
        assert read_keys(tmp_path / "index.parquet", rows) == [keys[row] for row in rows]
    data = (tmp_path / "index.parquet").read_bytes()
    (tmp_path / "index.parquet").write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"index\.parquet: cannot be read \(.*\); run `pixart verify"):
        read_keys(tmp_path / "index.parquet", [0])
    (tmp_path / "index.parquet").unlink()
    with pytest.raises(DataError, match=r"index\.parquet: missing; run `pixart verify"):
        read_keys(tmp_path / "index.parquet", [0])
