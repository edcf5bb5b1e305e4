"""Hostile and broken input and storage: rejected rows with reasons and a finished job, or one clear line."""

import io
import os
import struct
import subprocess
import tarfile
import zlib

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import cli
from pixart_data import commits, leases
from pixart_data.errors import JobError

pytestmark = pytest.mark.usefixtures("ray_here")


def jpeg(width=96, height=64):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def huge_png():
    """The header of a 30,000 x 30,000 PNG, and hardly anything behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def bad_folder(tmp_path):
    folder = tmp_path / "source" / "bad"
    folder.mkdir(parents=True)
    (folder / "good.jpg").write_bytes(jpeg())
    (folder / "truncated.jpg").write_bytes(jpeg()[:400])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    (folder / "huge.png").write_bytes(huge_png())
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        for i in range(6):
            add(tar, f"{i}.jpg", jpeg() + bytes(3000))
    (tmp_path / "source" / "half.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return folder.parent


REASONS = {
    "bad/truncated": "truncated_image",
    "bad/zero": "zero_bytes",
    "bad/text": "not_an_image",
    "bad/huge": "too_large",
}


def test_bad_images_are_rejected_rows_and_the_job_finishes(bad_folder, miniatures, job_file, tmp_path, capsys):
    source = {"paths": [f"{bad_folder}/bad", f"{bad_folder}/half.tar"]}
    job = {
        "output": str(tmp_path / "captions"),
        "source": source,
        "captioner": {"model": miniatures["llava"], "max_new_tokens": 4},
    }
    assert cli.main(["caption", str(job_file("caption", job))]) == 0
    assert "truncated_tar 1" in capsys.readouterr().out
    rows = {
        row["key"]: row
        for record in commits.read_records(tmp_path / "captions").values()
        for file in record.files
        for row in pq.read_table(tmp_path / "captions" / file.path).to_pylist()
    }
    assert {key: rows[key]["error"] for key in REASONS} == REASONS
    assert all(rows[key]["detail"] and rows[key]["caption"] is None for key in REASONS)
    assert rows["bad/good"]["status"] == "ok"
    half = {key: row["error"] for key, row in rows.items() if key.startswith("half/")}
    assert {"half/0", "half/1"} <= half.keys()
    assert half["half/0"] is None
    assert list(half.values()).count("truncated_tar") == 1

    extract = {
        "output": str(tmp_path / "features"),
        "source": source,
        "captions": {"path": str(tmp_path / "captions")},
        "image": {"model": miniatures["vae"]},
        "text": {"model": miniatures["t5"]},
    }
    assert cli.main(["extract", str(job_file("extract", extract))]) == 0
    for name in ("256px", "text"):
        rejected = pq.read_table(tmp_path / "features" / name / "rejected.parquet").to_pylist()
        assert {row["key"] for row in rejected} >= set(REASONS)
        index = pq.read_table(tmp_path / "features" / name / "index.parquet")["key"].to_pylist()
        assert set(index) == {key for key, row in rows.items() if row["error"] is None}


def test_a_tar_cannot_write_anywhere(miniatures, job_file, tmp_path):
    source = tmp_path / "a" / "b" / "evil.tar"
    source.parent.mkdir(parents=True)
    with tarfile.open(source, "w") as tar:
        add(tar, "../../../outside.jpg", jpeg())
        add(tar, "/etc/absolute.jpg", jpeg())
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    output = tmp_path / "a" / "b" / "out"
    job = {"output": str(output), "source": {"paths": [str(source)]}, "image": {"model": miniatures["vae"]}}
    before = {path for path in tmp_path.rglob("*") if output not in path.parents}
    assert cli.main(["extract", str(job_file("extract", job))]) == 0
    after = {path for path in tmp_path.rglob("*") if output not in path.parents}
    assert after - before == {output, tmp_path / "extract.toml"}
    keys = pq.read_table(output / "256px" / "index.parquet")["key"].to_pylist()
    assert len(keys) == 2
    for shard in (output / "256px").glob("*.*/*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert not member.name.startswith("/")
                assert ".." not in member.name.split("/")
    rejected = pq.read_table(output / "256px" / "rejected.parquet").to_pylist()
    assert [row["error"] for row in rejected] == ["not_a_file"]


def test_too_many_rejected_rows_fail_the_finished_job(miniatures, job_file, tmp_path, capsys):
    folder = tmp_path / "mostly_bad"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.jpg").write_bytes(jpeg() if i % 3 else b"")
    job = {"output": str(tmp_path / "out"), "source": {"paths": [str(folder)]}, "image": {"model": miniatures["vae"]}}
    path = job_file("extract", job)
    assert cli.main(["extract", str(path)]) == 3
    assert "33% rejected, limit 20% (cluster.max_rejected)" in capsys.readouterr().err
    assert cli.main(["extract", str(path), "--set", "cluster.max_rejected=0.5"]) == 0


@pytest.mark.parametrize(
    ("command", "section", "key"),
    [
        ("caption", "captioner", "captioner.model"),
        ("extract", "image", "image.model"),
        ("extract", "text", "text.model"),
    ],
)
@pytest.mark.parametrize("model", ["./no/such/folder", "no-such-owner/no-such-model"])
def test_a_missing_model_is_one_clear_line(pictures, job_file, tmp_path, capsys, command, section, key, model):
    job = {"output": str(tmp_path / "out"), "source": {"paths": [str(pictures)]}, section: {"model": model}}
    assert cli.main([command, str(job_file(command, job))]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixart")]
    assert key in line
    assert "no-such" in line or "no/such" in line


def test_an_unwritable_output_is_one_clear_line(pictures, miniatures, job_file, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    job = {
        "output": str(tmp_path / "file" / "captions"),
        "source": {"paths": [str(pictures)]},
        "captioner": {"model": miniatures["llava"]},
    }
    assert cli.main(["caption", str(job_file("caption", job))]) == 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixart")]
    assert "cannot write: a part of the path is a file; choose another output" in line


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; test_a_full_disk_is_told_from_other_failures covers the message")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_job_with_one_clear_line(pictures, miniatures, job_file, small_disk, capsys):
    job = {
        "output": str(small_disk / "features"),
        "source": {"paths": [str(pictures)], "rows_per_unit": 2},
        "image": {"model": miniatures["vae"]},
    }
    assert cli.main(["extract", str(job_file("extract", job))]) == 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixart")]
    assert "the disk is full; free space" in line
    whole = [unit for unit in commits.read_records(small_disk / "features/256px").values()]
    assert all((small_disk / "features/256px" / file.path).is_file() for unit in whole for file in unit.files)


def test_a_full_disk_is_told_from_other_failures(monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match="the disk is full"):
        commits.write_atomic(tmp_path / "record.json", b"{}")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_on_one_output_is_refused(pictures, miniatures, job_file, tmp_path, capsys):
    job = {
        "output": str(tmp_path / "out"),
        "source": {"paths": [str(pictures)]},
        "captioner": {"model": miniatures["llava"]},
    }
    with leases.output_lock(tmp_path / "out"):
        assert cli.main(["caption", str(job_file("caption", job))]) == 4
    assert "another run is writing here" in capsys.readouterr().err
