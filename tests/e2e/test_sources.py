"""The same tar whole, in slices, and on an object store: the same samples come out of the command."""

import tarfile

import pyarrow.parquet as pq
import pytest
import s3fs

from jobs import cli


@pytest.fixture
def tar(pictures, tmp_path):
    with tarfile.open(tmp_path / "sa_000000.tar", "w") as file:
        for path in sorted(pictures.iterdir()):
            file.add(path, arcname=path.name)
    return tmp_path / "sa_000000.tar"


@pytest.fixture
def extract_job(miniatures, job_file, tmp_path):
    """Write a job of `extract` and return its path."""

    def write(name, **source):
        job = {"output": str(tmp_path / name), "source": source, "cluster": {"num_workers": 1}}
        return job_file(name, job | {"image": {"model": miniatures["vae"]}})

    return write


def index(output):
    return pq.read_table(output / "256px/index.parquet", columns=["key", "bucket", "crc32"]).sort_by("key")


def units(output):
    return sorted(path.stem for path in (output / "256px/commits").iterdir())


@pytest.mark.usefixtures("ray_here")
def test_a_tar_in_slices(tar, extract_job, tmp_path):
    assert cli.main(["extract", str(extract_job("whole", paths=[str(tar)]))]) == 0
    job = extract_job("sliced", paths=[str(tar)], bytes_per_unit=tar.stat().st_size // 3)
    assert cli.main(["extract", str(job)]) == 0
    assert cli.main(["verify", str(tmp_path / "sliced")]) == 0
    whole, sliced = index(tmp_path / "whole"), index(tmp_path / "sliced")
    assert whole.num_rows == 12
    assert sliced.select(["key", "bucket"]) == whole.select(["key", "bucket"])
    assert units(tmp_path / "whole") == ["sa_000000"]
    assert units(tmp_path / "sliced") == ["sa_000000~00000", "sa_000000~00001", "sa_000000~00002"]


def test_a_tar_on_a_store(tar, extract_job, pixart, bucket, tmp_path):
    s3fs.S3FileSystem(use_listings_cache=False).put_file(str(tar), f"{bucket}/data/{tar.name}")
    here, there = extract_job("here", paths=[str(tar)]), extract_job("there", paths=[f"{bucket}/data/*.tar"])
    for job in (here, there):
        done = pixart("extract", job)
        assert done.returncode == 0, done.stderr
    assert index(tmp_path / "there") == index(tmp_path / "here")
    assert units(tmp_path / "there") == units(tmp_path / "here") == ["sa_000000"]
