import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.errors import ConfigError, DataError
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import Sample, count_rows, find_units, read_samples

SUFFIXES = (".jsonl", ".parquet", ".json")


def source(path: Path, **settings: object) -> Source:
    return Source(paths=[str(path)], **settings)


def read(path: Path, **settings: object) -> list[Sample]:
    job = source(path, **settings)
    samples = []
    for unit in find_units(job):
        rows = list(read_samples(unit, job))
        assert count_rows(unit) == unit.num_rows == unit.stop - unit.start == len(rows)
        light = list(read_samples(unit, job, with_images=False))
        assert [(row.key, row.caption, row.data) for row in light] == [(row.key, row.caption, None) for row in rows]
        samples += rows
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys)
    return samples


def write_list(path: Path, rows: list, **options: object) -> Path:
    """Write rows in the format that the suffix says, with an image file beside for each path without `gone`."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, **options))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    for row in rows:
        name = row.get("path") if isinstance(row, dict) else None
        if isinstance(name, str) and name and "gone" not in name and "://" not in name:
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / name).write_text(name)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rows_per_unit", [1, 2, 3, 1000])
def test_rows_and_their_slices(tmp_path, suffix, rows_per_unit):
    rows = [
        {"path": "in/a.jpg", "caption": " a cat\n"},
        {"path": "in/b.x.png", "caption": None},
        {"path": "in/a.jpg", "caption": "again"},
        {"path": "gone.jpg", "caption": "é 猫"},
        {"path": "https://example.com/x.jpg", "caption": "far"},
        {"path": None, "caption": "nowhere"},
        {"path": "in/a.jpg", "caption": "and again"},
        {"path": "in/a.png", "caption": "the same stem"},
    ]
    path = write_list(tmp_path / f"my.list{suffix}", rows)
    samples = read(path, rows_per_unit=rows_per_unit)
    number = "line-000006" if suffix == ".jsonl" else "row-000006"
    assert [sample.key for sample in samples] == [
        "my%2Elist/in/a",
        "my%2Elist/in/b%2Ex",
        "my%2Elist/in/a~2",
        "my%2Elist/gone",
        "my%2Elist/https%3A/example%2Ecom/x",
        f"my%2Elist/{number}",
        "my%2Elist/in/a~3",
        "my%2Elist/in/a~4",
    ]
    assert [sample.error for sample in samples] == [
        None,
        None,
        None,
        Reason.MISSING_FILE,
        Reason.BAD_ROW,
        Reason.BAD_ROW,
        None,
        None,
    ]
    assert samples[0].data == b"in/a.jpg"
    assert [sample.caption for sample in samples[:4]] == ["a cat", None, "again", "é 猫"]
    assert "remote address" in samples[4].detail
    assert "path: expected a path, found None" in samples[5].detail
    units = find_units(source(path, rows_per_unit=rows_per_unit))
    assert [unit.id for unit in units] == [f"my%2Elist-{i:05d}" for i in range(-(-8 // rows_per_unit))]


def test_absolute_paths_and_paths_above_the_list(tmp_path):
    (tmp_path / "out.jpg").write_text("out")
    (tmp_path / "lists").mkdir()
    rows = [{"path": "../out.jpg"}, {"path": str(tmp_path / "out.jpg")}, {"path": "../lists"}, {"path": "a\0b.jpg"}]
    path = tmp_path / "lists" / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read(path)
    assert samples[0].key == "x/%2E%2E/out"
    assert [sample.data for sample in samples] == [b"out", b"out", None, None]
    assert [sample.error for sample in samples[2:]] == [Reason.NOT_A_FILE, Reason.MISSING_FILE]
    assert not any(sample.key.startswith("/") or ".." in sample.key for sample in samples)


def test_a_key_column_names_rows(tmp_path):
    rows = [
        {"path": "a.jpg", "key": "cat.1"},
        {"path": "b.jpg", "key": 7},
        {"path": "c.jpg", "key": None},
        {"path": "d.jpg", "key": "cat.1"},
        {"key": "no path"},
    ]
    samples = read(write_list(tmp_path / "x.jsonl", rows))
    assert [sample.key for sample in samples] == ["x/cat%2E1", "x/7", "x/c", "x/cat%2E1~2", "x/no%20path"]
    assert samples[4].error is Reason.BAD_ROW


def test_malformed_lines(tmp_path):
    (tmp_path / "a.jpg").write_text("a")
    lines = [
        b'\xef\xbb\xbf{"path": "a.jpg"}',
        b"",
        b"{broken",
        b'["a.jpg"]',
        b"\xff\xfe",
        b"   ",
        b'{"path": "a.jpg", "caption": ["x"]}',
        b'{"path": "line-000003.jpg"}',
        b'{"path": "\\ud800.jpg", "caption": "\\ud800"}',
        b"[" * 100_000,
        b'{"path": "a.jpg"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    expected = [
        ("x/a", None),
        ("x/line-000003", Reason.BAD_ROW),
        ("x/line-000004", Reason.BAD_ROW),
        ("x/line-000005", Reason.BAD_ROW),
        ("x/a~2", Reason.BAD_ROW),
        ("x/line-000003~2", Reason.MISSING_FILE),
        ("x/%ED%A0%80", Reason.MISSING_FILE),
        ("x/line-000010", Reason.BAD_ROW),
        ("x/a~3", None),
    ]
    for rows_per_unit in (1, 2, 1000):
        samples = read(tmp_path / "x.jsonl", rows_per_unit=rows_per_unit)
        assert [(sample.key, sample.error) for sample in samples] == expected
    assert samples[1].detail.startswith("line 3: not JSON")
    assert "caption: expected a text, found ['x']" in samples[4].detail
    assert samples[6].caption == "?"
    for sample in samples:
        (sample.key + sample.detail + (sample.caption or "")).encode()


def test_the_references_data_info(tmp_path):
    rows = [{"height": 4, "width": 4, "ratio": 1.0, "path": f"é{i}.png", "prompt": f"words {i}"} for i in range(5)]
    for options in ({}, {"indent": 2}, {"ensure_ascii": False}, {"indent": 1, "ensure_ascii": False}):
        path = write_list(tmp_path / "data_info.json", rows, **options)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        for rows_per_unit in (1, 2, 5):
            samples = read(path, caption_column="prompt", rows_per_unit=rows_per_unit)
            assert [sample.caption for sample in samples] == [f"words {i}" for i in range(5)]
            assert [sample.data.decode() for sample in samples] == [f"é{i}.png" for i in range(5)]
    path.write_text(json.dumps([*rows, "a.png"]))
    assert read(path)[5].error is Reason.BAD_ROW


def test_columns_of_journeydb(tmp_path):
    (tmp_path / "a.jpg").write_text("a")
    path = tmp_path / "train.jsonl"
    path.write_text('{"img_path": "./a.jpg", "prompt": "a castle"}\n')
    (sample,) = read(path, path_column="img_path", caption_column="prompt")
    assert (sample.key, sample.data, sample.caption) == ("train/a", b"a", "a castle")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_that_do_not_exist(tmp_path, suffix):
    path = write_list(tmp_path / f"x{suffix}", [{"path": "a.jpg", "prompt": "x"}])
    with pytest.raises(ConfigError, match="source.path_column: .* has no column 'img'; set it to one of: path, prompt"):
        find_units(source(path, path_column="img"))
    with pytest.raises(ConfigError, match="source.caption_column: .* no column 'text'.*: path, prompt"):
        find_units(source(path, caption_column="text"))
    assert read(path)[0].caption is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_lists(tmp_path, suffix):
    path = write_list(tmp_path / f"x{suffix}", [])
    with pytest.raises(ConfigError, match="x.(jsonl|json|parquet)"):
        find_units(source(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'{"path": "a.jpg"}', "expected a JSON list of objects"),
        ("x.json", b'[{"path": "a.jpg"}, {"pa', "expected a JSON list of objects"),
        ("x.json", b'[{"path": "a.jpg"} 3]', "expected ',' at character 19"),
        ("x.json", b"", "expected a JSON list"),
        ("x.json", b"\xff", "expected a JSON list"),
        ("x.parquet", b"no parquet", "expected a Parquet file"),
        ("x.parquet", b"", "expected a Parquet file"),
    ],
)
def test_lists_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_units(source(tmp_path / name))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fingerprints_of_lists(tmp_path, suffix):
    rows = [{"path": f"{i}.jpg", "caption": "x"} for i in range(6)]
    path = write_list(tmp_path / f"x{suffix}", rows)

    def prints(**settings: object) -> set[str]:
        return {unit.fingerprint for unit in find_units(source(path, **settings))}

    before = prints(rows_per_unit=3)
    assert len(before) == 2
    assert prints(rows_per_unit=3) == before
    assert not prints(rows_per_unit=2) & before
    write_list(path, [*rows[:5], {"path": "5.jpg", "caption": "y"}])
    assert not prints(rows_per_unit=3) & before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_list_that_changed_is_refused(tmp_path, suffix):
    path = write_list(tmp_path / f"x{suffix}", [{"path": f"{i}.jpg"} for i in range(6)])
    job = source(path, rows_per_unit=3)
    units = find_units(job)
    write_list(path, [{"path": "0.jpg"}])
    with pytest.raises(DataError, match="it changed: run the job again"):
        list(read_samples(units[1], job))


def test_a_slice_reads_only_its_part(tmp_path):
    path = write_list(tmp_path / "x.jsonl", [{"path": f"{i}.jpg"} for i in range(6)])
    job = source(path, rows_per_unit=2)
    unit = find_units(job)[1]
    data = path.read_bytes()
    begin, end = unit.byte_range
    path.write_bytes(b"?" * begin + data[begin:end] + b"?" * (len(data) - end))
    assert [sample.key for sample in read_samples(unit, job)] == ["x/2", "x/3"]
