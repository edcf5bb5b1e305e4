"""`pixart retry`: rows that were rejected for a cause that has passed are done again, and nothing else."""

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.retry import retry
from pixart_data.commits import read_records
from pixart_data.config import load
from pixart_data.errors import ConfigError, DataError
from pixart_data.verification import verify

pytestmark = pytest.mark.usefixtures("ray_here")
CLUSTER = {"num_workers": 1, "cpus_per_worker": 1.0}


def picture(colour, size=(64, 64)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def source(tmp_path):
    """A list of six images in two units; two of them are not there yet, and one never will be."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{name}.png" for name in ("a", "b", "late1", "c", "late2", "never")]
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(picture("red" if name == "a" else "blue"))
    listed = tmp_path / "list.jsonl"
    rows = [{"path": str(folder / name), "caption": f"caption of {name}"} for name in names]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"paths": [str(listed)], "rows_per_unit": 3}, folder


def keys(path):
    return pq.read_table(path, columns=["key"])["key"].to_pylist()


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*.tar")}


def retry_all(path, *reasons, dry_run=False):
    from jobs.config import Retry

    retry(load(Retry, None, given={"path": str(path), "reasons": list(reasons)}), dry_run)


def extract(tmp_path, source, model):
    from pipelines import extract
    from pipelines.config import Extract

    job = {"output": str(tmp_path / "out"), "source": source, "image": {"model": model}, "cluster": CLUSTER}
    return extract.run(load(Extract, None, given=job))


def test_features_of_images_that_came_late_are_appended(miniatures, source, tmp_path, capsys):
    config, folder = source
    root = tmp_path / "out/256px"
    [(_, account)] = extract(tmp_path, config, miniatures["vae"])
    assert account.line() == "6 in = 3 out + 3 rejected (missing_file 3)"
    before, records = snapshot(root), read_records(root)
    index = keys(root / "index.parquet")
    for name in ("late1", "late2"):
        (folder / f"{name}.png").write_bytes(picture("green", (96, 48)))
    retry_all(tmp_path / "out", dry_run=True)
    assert capsys.readouterr().out == f"retry: missing_file 3 -> {root}\n"
    (tmp_path / "link").symlink_to(tmp_path / "out")
    retry_all(tmp_path / "link/256px", "missing_file")  # another name of the same set
    assert "6 in = 5 out + 1 rejected (missing_file 1)" in capsys.readouterr().out
    after = snapshot(root)
    assert all(after[path] == content for path, content in before.items())  # appended, never rewritten
    assert len(after) == len(before) + 2
    assert set(index) < set(keys(root / "index.parquet"))
    assert len(keys(root / "index.parquet")) == 5
    [rejected] = keys(root / "rejected.parquet")
    assert "never" in rejected
    assert [record.digest for record in read_records(root).values()] == [record.digest for record in records.values()]
    assert not [finding for finding in verify(root) if finding.problem]
    times = {path: path.stat().st_mtime_ns for path in root.glob("commits/*")}
    [(_, again)] = extract(tmp_path, config, miniatures["vae"])  # a retried unit counts as done
    assert again.line() == "6 in = 5 out + 1 rejected (missing_file 1)"
    assert {path: path.stat().st_mtime_ns for path in root.glob("commits/*")} == times


def test_captions_of_images_that_came_late_take_their_places(miniatures, source, tmp_path, capsys):
    from pipelines import caption
    from pipelines.config import Caption

    config, folder = source
    captioner = {"model": miniatures["llava"], "max_new_tokens": 4}

    def run(output):
        job = {"output": str(tmp_path / output), "source": config, "captioner": captioner, "cluster": CLUSTER}
        [(_, account)] = caption.run(load(Caption, None, given=job))
        return account.line()

    assert run("out") == "6 in = 3 out + 3 rejected (missing_file 3)"
    for name in ("late1", "late2", "never"):
        (folder / f"{name}.png").write_bytes(picture("green", (96, 48)))
    retry_all(tmp_path / "out")
    assert "6 in = 6 out + 0 rejected" in capsys.readouterr().out
    assert run("fresh") == "6 in = 6 out + 0 rejected"
    assert keys(tmp_path / "out/parts") == keys(tmp_path / "fresh/parts")
    assert len(list((tmp_path / "out/parts").iterdir())) == 2  # the parts before are gone
    retry_all(tmp_path / "out")
    assert capsys.readouterr().out == f"retry: no rejected rows to try again -> {tmp_path / 'out'}\n"


def test_what_cannot_be_retried_is_said(miniatures, source, tmp_path):
    config, folder = source
    with pytest.raises(ConfigError, match=r"expected the output directory of a run, found no job\.toml in it"):
        retry_all(tmp_path)
    extract(tmp_path, config, miniatures["vae"])
    root = tmp_path / "out/256px"
    with pytest.raises(ConfigError, match="did you mean 'missing_file'"):
        retry_all(root, "missing_fil")
    job = root / "job.toml"
    job.write_text(job.read_text().replace("# pixart extract", "# pixart stats"))
    with pytest.raises(ConfigError, match="expected the job of `fetch`, `caption`, `extract`, `import`, found 'stats'"):
        retry_all(root)
    job.write_text(job.read_text().replace("# pixart stats", "# pixart extract"))
    listed = Path(config["paths"][0])
    listed.write_text(listed.read_text().replace("caption of a", "another"))
    with pytest.raises(DataError, match="expected a finished run, found . shards to do; run `pixart extract` on"):
        retry_all(root)
