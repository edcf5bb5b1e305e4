"""The same tar whole, in slices, and on an object store: the same samples come out of the command."""

import tarfile

import pyarrow.parquet as pq
import s3fs


def test_a_tar_whole_sliced_and_on_a_store(pictures, miniatures, pixart, job_file, bucket, tmp_path):
    tar = tmp_path / "sa_000000.tar"
    with tarfile.open(tar, "w") as file:
        for path in sorted(pictures.iterdir()):
            file.add(path, arcname=path.name)
    s3fs.S3FileSystem(use_listings_cache=False).put_file(str(tar), f"{bucket}/data/{tar.name}")
    sources = {
        "whole": {"paths": [str(tar)]},
        "sliced": {"paths": [str(tar)], "bytes_per_unit": tar.stat().st_size // 3},
        "remote": {"paths": [f"{bucket}/data/*.tar"]},
    }
    rows, records = {}, {}
    for name, source in sources.items():
        output = tmp_path / name
        job = {"output": str(output), "source": source, "cluster": {"num_workers": 1}}
        job |= {"image": {"model": miniatures["vae"]}, "text": {"model": miniatures["t5"]}}
        done = pixart("extract", job_file(name, job))
        assert done.returncode == 0, done.stderr
        done = pixart("verify", output)
        assert done.returncode == 0, done.stdout
        columns = {"256px": ["key", "crc32", "bucket"], "text": ["key", "crc32", "caption"]}
        rows[name] = {kind: pq.read_table(output / kind / "index.parquet", columns=columns[kind]) for kind in columns}
        records[name] = sorted(path.stem for path in (output / "256px" / "commits").iterdir())
    assert rows["whole"]["256px"].num_rows == 12
    assert rows["whole"] == rows["sliced"] == rows["remote"]
    assert records["whole"] == records["remote"] == ["sa_000000"]
    assert records["sliced"] == ["sa_000000~00000", "sa_000000~00001", "sa_000000~00002"]
