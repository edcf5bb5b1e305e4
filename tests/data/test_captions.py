import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import captions as module
from pixart_data.captions import (
    CaptionFile,
    CaptionRow,
    caption_files,
    count_captions,
    read_captions,
    require_columns,
    seal_captions,
)
from pixart_data.commits import Record, publish, write_record
from pixart_data.errors import ConfigError, DataError
from pixart_data.records import Reason
from pixart_data.storage import staging_path


def table(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def captions(path, column="caption", need_key=True):
    return list(read_captions(CaptionFile("unit", str(path), "fingerprint"), column, need_key))


def files(path):
    return caption_files(path, "captions.path")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_read_in_order(tmp_path, suffix):
    rows = [{"key": f"s/{i}", "caption": f"Ünïcode {i}", "other": i} for i in range(5)]
    path = tmp_path / f"t{suffix}"
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    assert captions(path) == [CaptionRow(f"s/{i}", f"Ünïcode {i}") for i in range(5)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_without_a_caption_say_why(tmp_path, suffix):
    rows = [
        {"key": "a", "caption": None, "error": "zero_bytes"},
        {"key": "b", "caption": None, "error": None},
        {"key": "c", "caption": " ", "error": None},
    ]
    path = tmp_path / f"t{suffix}"
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    assert captions(path) == [
        CaptionRow("a", None, Reason.NO_CAPTION, "zero_bytes"),
        CaptionRow("b", None, Reason.NO_CAPTION, "column caption is null"),
        CaptionRow("c", None, Reason.NO_CAPTION, "column caption is blank"),
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_caption_that_is_not_text_is_a_bad_row(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    rows = [{"key": "a", "caption": 7}]
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    assert captions(path) == [CaptionRow("a", None, Reason.BAD_ROW, "column caption holds int, not text")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(("column", "need_key", "missing"), [("text", False, "text"), ("caption", True, "key")])
def test_a_missing_column_is_named_beside_those_found(tmp_path, suffix, column, need_key, missing):
    path = tmp_path / f"t{suffix}"
    rows = [{"caption": "c", "id": 1}]
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    remedy = "set sets.x.column" if missing == "text" else "add one with the keys of the images"
    with pytest.raises(ConfigError, match=f"expected a column '{missing}', found caption, id; {remedy}"):
        require_columns(files(path), "sets.x.column", column, need_key)
    require_columns(files(path), "sets.x.column", "caption", need_key=False)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_keys_may_be_missing_where_they_are_not_needed(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    rows = [{"caption": "c"}]
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    assert captions(path, need_key=False) == [CaptionRow("", "c")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("key", [None, "", "../../etc/x", "/x", "a.b", "a b", "ä"])
def test_a_needed_key_that_cannot_name_a_sample_is_a_bad_row(tmp_path, suffix, key):
    path = tmp_path / f"t{suffix}"
    rows = [{"key": "s/0", "caption": "a"}, {"key": key, "caption": "b"}, {"key": "s/%2E~-_", "caption": "c"}]
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    first, bad, last = captions(path)
    assert (first.error, last.error) == (None, None)
    assert (bad.caption, bad.error) == (None, Reason.BAD_ROW)
    assert bad.key
    assert "key" in bad.detail


def test_whole_numbers_are_keys_and_zero_is_one(tmp_path):
    rows = [{"key": i, "caption": "c"} for i in range(3)]
    assert [row.key for row in captions(table(tmp_path / "t.parquet", rows))] == ["0", "1", "2"]
    assert [row.key for row in captions(lines(tmp_path / "t.jsonl", *rows))] == ["0", "1", "2"]


def test_lines_that_are_not_rows_are_rejected_each_by_itself(tmp_path):
    good = {"key": "s/0", "caption": "good"}
    deep = b"[" * 100_000
    path = lines(tmp_path / "t.jsonl", good, b"{not json", b"", b"[1]", b"7", b"\xff\xfe", deep, good | {"key": "s/1"})
    rows = captions(path)
    assert [row.key for row in rows if row.error is None] == ["s/0", "s/1"]
    bad = [row for row in rows if row.error is not None]
    assert len(bad) == 5
    assert all(row.key.startswith("t/line-") and row.detail for row in bad)


def test_a_byte_order_mark_does_not_cost_the_first_row(tmp_path):
    path = lines(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"key": "s/0", "caption": "first"}')
    assert captions(path) == [CaptionRow("s/0", "first")]


def test_half_an_emoji_can_still_be_stored(tmp_path):
    """JSON can spell lone surrogates, and scraped captions cut by length do."""
    [row] = captions(lines(tmp_path / "t.jsonl", b'{"key": "s/0", "caption": "smile \\ud83d"}'))
    assert row.caption.encode("utf-8").startswith(b"smile ")


def test_a_damaged_parquet_is_a_data_error(tmp_path):
    path = table(tmp_path / "t.parquet", [{"key": "a", "caption": "c"}])
    path.write_bytes(path.read_bytes()[:-10])
    file = CaptionFile("unit", str(path), "fingerprint")
    for read in (lambda: files(path), lambda: captions(path), lambda: count_captions(file)):
        with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet"):
            read()


def test_rows_are_counted_as_they_are_read(tmp_path):
    rows = [{"key": f"{i}", "caption": "c"} for i in range(7)]
    for path in (table(tmp_path / "t.parquet", rows), lines(tmp_path / "t.jsonl", *rows[:3], b"", b"bad", *rows[3:])):
        [file] = files(path)
        assert count_captions(file) == len(captions(path))


def test_a_folder_s_files_come_in_the_order_of_their_names(tmp_path):
    table(tmp_path / "b.parquet", [{"caption": "c"}])
    for name in ("a/z.jsonl", "a/.hidden.jsonl", "c.txt"):
        lines(tmp_path / name, {"caption": "c"})
    assert [file.path for file in files(tmp_path)] == [str(tmp_path / "a/z.jsonl"), str(tmp_path / "b.parquet")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_large_file_is_cut_and_every_row_is_in_one_piece(tmp_path, monkeypatch, suffix):
    rows = [{"key": f"s/{i}", "caption": f"Ünïcode {i}" * (i % 4)} for i in range(20)]
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        lines(path, *rows)
    [whole] = files(path)
    for rows_per_unit in (1, 4, 7, 19, 20):
        monkeypatch.setattr(module, "ROWS_PER_UNIT", rows_per_unit)
        pieces = files(path)
        assert len({piece.id for piece in pieces}) == len({p.fingerprint for p in pieces}) == -(-20 // rows_per_unit)
        assert [row for piece in pieces for row in read_captions(piece, "caption", True)] == captions(path)
        assert sum(count_captions(piece) for piece in pieces) == count_captions(whole) == 20


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_key_that_comes_up_again_is_rejected_where_keys_are_needed(tmp_path, suffix):
    rows = [{"key": key, "caption": "c"} for key in ("s/0", "s/1", "s/0")]
    path = tmp_path / f"t{suffix}"
    (table(path, rows) if suffix == ".parquet" else lines(path, *rows))
    assert [row.error for row in captions(path)] == [None, None, Reason.DUPLICATE_KEY]
    assert [row.error for row in captions(path, need_key=False)] == [None] * 3


def test_no_two_files_share_a_unit(tmp_path):
    """A unit's name is its record's: two files of one name would overwrite each other's results."""
    for name in ("a-b.jsonl", "a/b.jsonl", "a b.jsonl", "a_b.jsonl", "原文.jsonl", "标题.jsonl"):
        lines(tmp_path / name, {"caption": name})
    table(tmp_path / "a-b.parquet", [{"caption": "c"}])
    ids = [file.id for file in files(tmp_path)]
    assert len(set(ids)) == 7
    assert all(set(i) <= set("abcdefghijklmnopqrstuvwxyzABCDEF0123456789_%-") for i in ids)


def write_unit(root, unit):
    staged = staging_path(root, "x")
    table(staged, [{"key": unit, "caption": "c"}])
    record = Record(unit, "", {}, 1, 1, {}, [publish(staged, root, root / "parts", unit, ".parquet")])
    write_record(root, record)
    return record


def test_the_parts_of_a_finished_table_are_those_its_manifest_names(tmp_path):
    """Not those of records: a source that was cut otherwise leaves records of units that are no more."""
    (tmp_path / "parts").mkdir()
    records = [write_unit(tmp_path, unit) for unit in ("b", "a", "no-more")]
    with pytest.raises(DataError, match="its captions are not finished; run `pixart caption`"):
        files(tmp_path)
    seal_captions(tmp_path, records[:2])
    found = files(tmp_path)
    assert [file.id for file in found] == ["b", "a"]
    assert [row.key for file in found for row in read_captions(file, "caption", True)] == ["b", "a"]
    assert [file.fingerprint for file in found] == [record.files[0].sha256 for record in records[:2]]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "pixart-features", "version": 1}', "null"])
def test_a_manifest_of_something_else_is_a_data_error(tmp_path, text):
    (tmp_path / "commits").mkdir()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        files(tmp_path)


def test_a_fingerprint_follows_the_content(tmp_path):
    path = lines(tmp_path / "t.jsonl", {"caption": "one"})
    [before] = files(path)
    [same] = files(lines(tmp_path / "elsewhere/t.jsonl", {"caption": "one"}))
    [after] = files(lines(path, {"caption": "two"}))
    assert before.fingerprint == same.fingerprint != after.fingerprint
    assert before.id == same.id == after.id


def test_a_large_file_is_told_by_its_ends_and_size(tmp_path):
    path = tmp_path / "t.jsonl"
    seen = set()
    for size, tail in ((1 << 26, b"a"), (1 << 26, b"b"), ((1 << 26) + 1, b"b")):
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(size - 1)
            file.write(tail)
        seen.add(files(path)[0].fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no/such", "captions.path: no such file or folder: .*; check the path, or run `pixart caption` first"),
        ("empty", "captions.path: .* holds no .parquet or .jsonl file"),
        ("x.csv", "captions.path: expected .parquet, .jsonl or a folder of them, found "),
    ],
)
def test_nothing_to_read_is_a_setting_to_mend(tmp_path, name, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("key,caption\n")
    with pytest.raises(ConfigError, match=expected):
        files(tmp_path / name)
