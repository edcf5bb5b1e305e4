"""The same output again, with something changed: what is kept, what is redone, and what is nobody's business."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from pixart_data.captions import caption_files
from pixart_data.errors import DataError

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture
def caption(pictures, miniatures, job_file, tmp_path):
    """Run the caption job with overrides; returns the exit code."""
    job = {
        "output": str(tmp_path / "captions"),
        "source": {"paths": [str(pictures)], "rows_per_unit": 4},
        "captioner": {"model": miniatures["llava"], "max_new_tokens": 4},
    }
    path = job_file("caption", job)
    return lambda *overrides: cli.main(["caption", str(path), *(w for o in overrides for w in ("--set", o))])


def keys(output):
    return [k for part in caption_files(output, "path") for k in pq.read_table(part.path)["key"].to_pylist()]


def test_an_output_folder_may_hold_files_of_the_user(caption, tmp_path):
    output = tmp_path / "captions"
    output.mkdir()
    for name in ("00000.parquet", "metadata-0123abcd.parquet", "notes.txt"):
        pq.write_table(pa.table({"a": [1]}), output / name)
    assert caption() == 0
    assert caption("captioner.max_new_tokens=5") == 0
    assert {path.name for path in output.glob("*") if path.is_file()} >= {
        "00000.parquet", "metadata-0123abcd.parquet", "notes.txt",
    }  # fmt: skip


def test_another_slicing_does_not_count_rows_twice(caption, tmp_path, capsys):
    assert caption() == 0
    assert caption("source.rows_per_unit=1000") == 0
    assert len(keys(tmp_path / "captions")) == len(set(keys(tmp_path / "captions"))) == 12
    assert cli.main(["inspect", str(tmp_path / "captions")]) == 0
    assert "12 rows in 1 part(s)" in capsys.readouterr().out


def test_a_redo_that_never_starts_leaves_what_is_there(pictures, miniatures, job_file, tmp_path):
    job = {
        "output": str(tmp_path / "features"),
        "source": {"paths": [str(pictures)], "rows_per_unit": 4},
        "image": {"model": miniatures["vae"]},
    }
    path = job_file("extract", job)
    assert cli.main(["extract", str(path)]) == 0
    assert cli.main(["extract", str(path), "--set", f"image.model={miniatures['t5']}"]) == 2
    assert cli.main(["verify", str(tmp_path / "features")]) == 0


def test_captions_that_are_not_finished_are_not_read(caption, miniatures, job_file, tmp_path, capsys):
    assert caption() == 0
    (tmp_path / "captions/manifest.json").unlink()
    with pytest.raises(DataError, match="not finished; run `pixart caption`"):
        caption_files(tmp_path / "captions", "captions.path")
    job = {
        "output": str(tmp_path / "features"),
        "captions": {"path": str(tmp_path / "captions")},
        "text": {"model": miniatures["t5"]},
    }
    assert cli.main(["extract", str(job_file("extract", job))]) == 3
    assert "not finished" in capsys.readouterr().err
