"""Captions as Arrow columns: every text type, broken bytes, and the columns beside them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.captions import CaptionFile
from pixart_data.columns import as_text, read_columns
from pixart_data.errors import DataError

TEXTS = ["a dog", None, "", "Ünïcode \U0001f600", "a\0b"]


def encoded(kind):
    array = pa.array(TEXTS, pa.string())
    if pa.types.is_dictionary(kind):
        return array.dictionary_encode()
    return array.cast(kind)


def unit(path, start=0, stop=-1):
    return CaptionFile("unit", str(path), "fingerprint", start, stop)


def rows_of(path, column="caption", **options):
    return list(read_columns(unit(path), column, **options))


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_every_type_of_text_is_read(tmp_path, kind):
    pq.write_table(pa.table({"text": encoded(kind)}), tmp_path / "t.parquet")
    [rows] = rows_of(tmp_path / "t.parquet", "text")
    assert rows.captions.to_pylist() == TEXTS
    assert pa.types.is_string(rows.captions.type) or pa.types.is_large_string(rows.captions.type)


def test_a_column_of_nulls_is_one_of_absent_captions(tmp_path):
    pq.write_table(pa.table({"caption": pa.nulls(3)}), tmp_path / "t.parquet")
    [rows] = rows_of(tmp_path / "t.parquet")
    assert rows.captions.to_pylist() == [None] * 3
    assert pa.types.is_string(rows.captions.type)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_bytes_that_are_no_utf_8_become_replacement_characters(kind):
    raw = pa.array([b"caf\xe9", b"good", None], pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    broken = raw if pa.types.is_binary(kind) else raw.view(kind)
    assert as_text(broken).to_pylist() == ["caf�", "good", None]


def test_a_key_is_taken_where_there_is_one_and_else_made_of_file_and_row(tmp_path):
    pq.write_table(pa.table({"caption": ["a", "b"], "key": ["x/1", None]}), tmp_path / "with.parquet")
    pq.write_table(pa.table({"caption": ["a", "b"], "key": [7, 8]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "without.parquet")
    (tmp_path / "lines.txt").write_text("a\nb\n")
    (tmp_path / "rows.jsonl").write_text('{"caption": "a", "key": "x/1"}\n\n{"caption": "b"}\n')
    keys = {path.stem: rows_of(path)[0].keys.to_pylist() for path in tmp_path.iterdir()}
    assert keys == {
        "with": ["x/1", None],
        "numbers": ["7", "8"],
        "without": ["without/row-000000", "without/row-000001"],
        "lines": ["lines/line-000000", "lines/line-000001"],
        "rows": ["x/1", "rows/line-000002"],
    }


SIZES = (("width_px", "width"), ("height_px", "height"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_further_columns_come_where_there_are_some(tmp_path, suffix):
    rows = [
        {"caption": "a", "error_x": None, "width": 640, "height_px": 480.0, "prompt": 3},
        {"caption": None, "error_x": "bad", "width": None, "height_px": 0.5, "prompt": 4},
    ]
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [read] = rows_of(path, texts={"error": "error_x", "prompt": "prompt", "gone": "gone"}, numbers=SIZES)
    assert {name: column.to_pylist() for name, column in read.more.items()} == {
        "error": [None, "bad"],
        "width_px": [640.0, None],
        "height_px": [480.0, 0.5],
    }


def test_broken_lines_are_rows_without_a_caption(tmp_path):
    lines = [
        '{"caption": "a"}',
        "not JSON",
        '{"caption": 5}',
        '{"caption": null}',
        '["list"]',
        "",
        '{"caption": "\\ud800"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    [rows] = rows_of(tmp_path / "t.jsonl")
    assert rows.captions.to_pylist() == ["a", None, None, None, None, "?"]
    assert rows.num_bad == 3
    assert rows.problem.startswith("not JSON")


def test_a_mark_of_the_byte_order_and_carriage_returns_are_no_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \n\n\r\nfive\rfive")
    [rows] = rows_of(tmp_path / "t.txt", "whatever")
    assert rows.captions.to_pylist() == ["one", "two ", "", "", "five\rfive"]


def test_a_slice_knows_where_it_begins(tmp_path):
    table = pa.table({"caption": [str(i) for i in range(10_000)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4_000)
    rows = list(read_columns(unit(tmp_path / "t.parquet", 3_000, 9_500), "caption"))
    assert [caption for some in rows for caption in some.captions.to_pylist()] == [str(i) for i in range(3_000, 9_500)]
    assert [some.captions[0].as_py() for some in rows] == [str(some.first) for some in rows]


def test_damage_within_a_table_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"caption": [f"caption {i}" for i in range(50_000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[1000:3000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet: .*; it is damaged, cut off .* again"):
        rows_of(path)
    path.unlink()
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read: .*; check its place and who may read it"):
        rows_of(path)


def test_a_column_that_is_gone_since_the_job_was_planned_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="expected a column 'caption', found text; run the job again"):
        rows_of(tmp_path / "t.parquet")
