import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart_data.scores import read_scores
from pixart_data.sections import Source
from pixart_data.sources import find_units, read_samples


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def scores_of(path, column="pwatermark", **settings):
    """The scores of all samples behind a path, by key."""
    source = Source(paths=[str(path)], **settings)
    found = {}
    for unit in find_units(source):
        scores = read_scores(unit, column)
        found |= {sample.key: scores.of(i, sample.key) for i, sample in enumerate(read_samples(unit, source))}
    return found


def test_the_parquet_beside_a_tar(tmp_path):
    write_tar(tmp_path / "00000.tar", {f"{i:09d}.jpg": b"x" for i in range(4)})
    rows = {"key": [f"{i:09d}" for i in range(3)], "status": ["success"] * 3, "pwatermark": [0.25, None, float("nan")]}
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    expected = {f"00000/{i:09d}": 0.25 if i == 0 else None for i in range(4)}
    assert scores_of(tmp_path / "00000.tar") == expected


@pytest.mark.parametrize("sidecar", ["none", "without the column", "no Parquet"])
def test_the_json_in_a_tar_where_the_parquet_says_nothing(tmp_path, sidecar):
    members = {"a.jpg": b"x", "a.png": b"x", "a.json": b'{"pwatermark": 0.5}', "b.jpg": b"x", "b.json": b"{"}
    members |= {"c.d.jpg": b"x", "c.d.json": b'{"pwatermark": 1}', "e.jpg": b"x", "e.json": b'{"pwatermark": true}'}
    write_tar(tmp_path / "t.tar", members)
    if sidecar == "without the column":
        pq.write_table(pa.table({"key": ["a"], "status": ["success"]}), tmp_path / "t.parquet")
    elif sidecar == "no Parquet":
        (tmp_path / "t.parquet").write_bytes(b"PAR1 and then something else")
    assert scores_of(tmp_path / "t.tar") == {"t/a": 0.5, "t/a~png": 0.5, "t/b": None, "t/c%2Ed": 1.0, "t/e": None}


def test_the_json_of_a_damaged_tar_as_far_as_it_can_be_read(tmp_path):
    write_tar(tmp_path / "t.tar", {f"{i}.{end}": b'{"pwatermark": 0.5}' for i in range(3) for end in ("jpg", "json")})
    whole = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: 512 * 5])
    found = scores_of(tmp_path / "t.tar")
    assert found["t/0"] == 0.5
    assert set(found.values()) == {0.5, None}


def test_the_json_beside_an_image_in_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "a.json").write_text('{"pwatermark": 0.75}')
    assert scores_of(tmp_path) == {f"{tmp_path.name}/a": 0.75, f"{tmp_path.name}/b": None}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_the_columns_of_a_list_in_every_slice(tmp_path, kind):
    rows = [{"path": f"{i}.jpg", "pwatermark": None if i == 3 else i / 10} for i in range(7)]
    path = tmp_path / f"l.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\ufeff\n" + "\n\n".join(map(json.dumps, rows)) + "\n")
    expected = {f"l/{i}": None if i == 3 else i / 10 for i in range(7)}
    assert scores_of(path, rows_per_unit=3) == expected
    assert set(scores_of(path, column="other", rows_per_unit=3).values()) == {None}


def test_scores_are_false_if_there_are_none(tmp_path):
    (tmp_path / "l.jsonl").write_text('{"path": "a.jpg", "pwatermark": 0.0}\n')
    [unit] = find_units(Source(paths=[str(tmp_path / "l.jsonl")]))
    assert read_scores(unit, "pwatermark")
    assert not read_scores(unit, "pwatermarks")
