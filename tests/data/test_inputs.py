"""Captions to count: what is found at a path, how it is cut, and what is said of files that hold none."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data import captions as module
from pixart_data.columns import read_columns
from pixart_data.errors import ConfigError, DataError
from pixart_data.inputs import find_captions, look_at, num_rows, require_text
from pixart_data.storage import location


def parquet(path, captions, row_group_size=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"caption": captions, **columns}), path, row_group_size=row_group_size)
    return path


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def found(path):
    return find_captions(str(path), "the set 'x'")


def captions(files, column="caption"):
    return [caption for file in files for rows in read_columns(file, column) for caption in rows.captions.to_pylist()]


def test_a_folder_gives_its_tables_in_the_order_of_their_names(tmp_path):
    parquet(tmp_path / "b/2.parquet", ["three"])
    jsonl(tmp_path / "b/1.jsonl", {"caption": "two"})
    text(tmp_path / "a.txt", "not read: there are tables\n")
    parquet(tmp_path / "a.parquet", ["one"])
    text(tmp_path / "b/.hidden.parquet", "no table")
    assert [file.id for file in found(tmp_path)] == ["a", "b%2F1", "b%2F2"]
    assert captions(found(tmp_path)) == ["one", "two", "three"]


def test_a_folder_without_tables_gives_its_text_files(tmp_path):
    text(tmp_path / "x/1.txt", "a\nb")
    text(tmp_path / "2.txt", "c\n")
    assert captions(found(tmp_path)) == ["c", "a", "b"]


def test_a_pattern_gives_each_file_once(tmp_path):
    parquet(tmp_path / "run1/part.parquet", ["one"])
    parquet(tmp_path / "run2/part.parquet", ["two"])
    text(tmp_path / "three.txt", "three\n")
    for pattern, expected in {
        "run*": ["one", "two"],
        "*": ["one", "two", "three"],
        "**/*.parquet": ["one", "two"],
    }.items():
        files = found(tmp_path / pattern)
        assert sorted(captions(files)) == sorted(expected)
        assert len({file.id for file in files}) == len(files)
    assert captions(found(tmp_path / "**")) == ["one", "two"]  # as the folder itself


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    parquet(tmp_path / "a[1].parquet", ["one"])
    parquet(tmp_path / "a1.parquet", ["another"])
    assert captions(found(tmp_path / "a[1].parquet")) == ["one"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "the set 'x': no such file or folder: .*none; check the path, or run"),
        ("none*.parquet", "the set 'x': nothing matches .*none"),
        ("empty", "holds no .parquet or .jsonl or .txt file"),
        ("x.csv", "expected .parquet, .jsonl, .txt or a folder of them, found .*x.csv; convert it to Parquet first: "),
        ("*.csv", "expected .parquet, .jsonl, .txt or folders of them, found .*x.csv; convert it to Parquet first: "),
        ("x.tar", "found .*x.tar; of tars of images, name the table of their captions"),
    ],
)
def test_nothing_to_count_is_a_setting_to_mend(tmp_path, name, expected):
    (tmp_path / "empty").mkdir()
    text(tmp_path / "x.csv", "a,b\n")
    text(tmp_path / "x.tar", "")
    with pytest.raises(ConfigError, match=expected):
        found(tmp_path / name)


@pytest.mark.parametrize(("suffix", "sign"), [(".csv", ","), (".tsv", "\t")])
def test_the_advice_for_a_csv_file_makes_a_table_that_can_be_read(tmp_path, suffix, sign):
    path = text(tmp_path / "in" / f"x{suffix}", f"caption{sign}url\na dog{sign}u\n")
    with pytest.raises(ConfigError) as caught:  # of the folder: the advice is for what is in it
        found(path.parent)
    _, code = str(caught.value).split("python -c ")
    subprocess.run([sys.executable, "-c", *shlex.split(code)], check=True)
    assert captions(found(path.parent)) == ["a dog"]


def test_parquet_is_cut_between_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 10)
    every = [f"caption {i}" for i in range(64)]
    path = parquet(tmp_path / "t.parquet", every, row_group_size=4)
    files = found(path)
    assert [(file.start, file.stop) for file in files] == [(0, 12), (12, 24), (24, 36), (36, 48), (48, 60), (60, 64)]
    assert [len(captions([file])) for file in files] == [num_rows(file) for file in files]
    assert captions(files) == every


def test_a_very_large_row_group_is_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 3)
    every = [f"caption {i}" for i in range(64)]
    files = found(parquet(tmp_path / "t.parquet", every))
    assert len(files) == 5
    assert max(num_rows(file) for file in files) <= 15
    assert captions(files) == every


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_lines_are_cut_where_they_end(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 3)
    rng = np.random.default_rng(0)
    every = ["é" * int(n) + "x" for n in rng.integers(0, 9, 10)]
    path = tmp_path / f"t{suffix}"
    text(path, "\n".join(every)) if suffix == ".txt" else jsonl(path, *({"caption": c} for c in every))
    files = found(path)
    assert [num_rows(file) for file in files] == [3, 3, 3, 1]
    assert captions(files) == every
    assert len({file.fingerprint for file in files}) == 4


@pytest.mark.parametrize(
    ("data", "line"), [("café\n".encode("latin-1"), 1), (b"fine\n\xff\n", 2), ("wide\n".encode("utf-16"), 1)]
)
def test_a_text_file_that_is_not_utf_8_is_named_with_its_line(tmp_path, data, line):
    with pytest.raises(
        DataError, match=rf"t\.txt: expected text in UTF-8, found the byte 0x.. in line {line}; convert"
    ):
        found(text(tmp_path / "t.txt", data))


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_table_is_named(tmp_path, data):
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as Parquet"):
        found(text(tmp_path / "t.parquet", data))


def require(path, column):
    require_text(look_at(found(path)), "x", column)


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path):
    path = parquet(tmp_path / "t.parquet", ["a"], url=["u"])
    with pytest.raises(ConfigError, match="expected a column 'captoin', found caption, url; did you mean 'caption'[?]"):
        require(path, "captoin")
    with pytest.raises(
        ConfigError,
        match="found caption, url; name another one with --column, in a job file as `column` of the set 'x'",
    ):
        require(jsonl(tmp_path / "t.jsonl", {"caption": "a", "url": "u"}), "zzz")


@pytest.mark.parametrize(
    "values", [pa.array([1, 2]), pa.array([0.5, None]), pa.array([["a"], ["b"]]), pa.array([True, False])]
)
def test_a_column_of_something_else_is_named_with_those_of_text(tmp_path, values):
    path = parquet(tmp_path / "t.parquet", ["a", "b"], other=values)
    with pytest.raises(
        ConfigError,
        match="expected text in the column 'other', found .*; columns of text: caption; name another",
    ):
        require(path, "other")
    require(path, "caption")


def test_numbers_in_jsonl_are_found_in_the_first_row(tmp_path):
    with pytest.raises(ConfigError, match="expected text in the column 'n', found int; columns of text: caption"):
        require(jsonl(tmp_path / "t.jsonl", {"caption": "a", "n": 3}), "n")


def test_every_file_of_a_set_is_looked_at(tmp_path):
    parquet(tmp_path / "1.parquet", ["a"])
    pq.write_table(pa.table({"other": ["b"]}), tmp_path / "2.parquet")
    with pytest.raises(ConfigError, match=r"2\.parquet: expected a column 'caption', found other"):
        require(tmp_path, "caption")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_an_empty_file_has_no_rows_and_no_columns(tmp_path, suffix):
    path = text(tmp_path / f"t{suffix}", b"")
    require(path, "caption")
    assert [num_rows(file) for file in found(path)] == [0]
    assert captions(found(path)) == []


def test_captions_are_found_on_an_object_store(bucket, tmp_path):
    parquet(tmp_path / "a.parquet", ["one", "two"])
    for name, data in {"set/a.parquet": (tmp_path / "a.parquet").read_bytes(), "texts/b.txt": b"three\r\nfour"}.items():
        location(f"{bucket}/{name}").write_bytes(data)
    for path in ("set/*.parquet", "set", "set/a.parquet"):
        files = find_captions(f"{bucket}/{path}", "the set 'x'")
        assert captions(files) == ["one", "two"]
        require_text(look_at(files), "x", "caption")
        with pytest.raises(ConfigError, match="expected a column 'captions', found caption; did you mean 'caption'"):
            require_text(look_at(files), "x", "captions")
    files = find_captions(f"{bucket}/*/*.txt", "the set 'x'")
    assert captions(files) == ["three", "four"]
    assert [num_rows(file) for file in files] == [2]
    with pytest.raises(ConfigError, match="/none: no such file or folder; check the path"):
        find_captions(f"{bucket}/none/*.txt", "the set 'x'")
    with pytest.raises(ConfigError, match="the set 'x': nothing matches"):
        find_captions(f"{bucket}/set/*.txt", "the set 'x'")
