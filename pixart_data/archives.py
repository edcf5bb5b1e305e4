"""Tars of images in the layout of img2dataset: what `fetch` writes, and which of them make up a finished output.

`images/00012-1a2b3c4d.tar` holds `000120007.jpg`, `.txt` and `.json`; a Parquet of the same name beside it has a row
for each URL, failures included. Both names carry one digest of both contents, so that the pair is published like
any other file. `rows/` holds the truth about every row: it is replaced when rows are tried again, tars are only added.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.commits import COMMITS, MANIFEST, PublishedFile, Record, file_sha256, publish_table, read_table
from pixart_data.errors import DataError
from pixart_data.records import FETCHED
from pixart_data.retries import storage
from pixart_data.storage import location, read_bytes, replace_file, staging, write_atomic

IMAGES = "images"
ROWS = "rows"
FORMAT = "pixart-images"
FORMAT_VERSION = 1

_SIDECAR = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),  # "success" or "failed_to_download"
        ("error_message", pa.string()),  # a Reason and its detail
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),  # the same: images are stored as they came
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
        ("http_status", pa.int32()),
        ("num_attempts", pa.int32()),
        ("size_bytes", pa.int64()),
    ]
)

Row = dict[str, Any]
"""A row by the columns of `records.FETCHED`."""


def publish_shard(
    root: Path, unit: str, rows: Sequence[Row], read: Callable[[Row], bytes]
) -> tuple[list[Row], list[PublishedFile]]:
    """Write the images of a unit's rows as a tar with its sidecar; nothing where no row has one.

    Args:
        rows: In the order of the list; `read` gives the image of those without an error.

    Returns:
        The rows, those with an image naming their tar, and the two files.
    """
    if all(row["error"] is not None for row in rows):
        return list(rows), []
    directory = root / IMAGES
    with (
        staging(directory, f"{unit}.tar") as tar,
        staging(directory, f"{unit}.parquet") as table,
    ):
        with storage(tar):
            with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
                for row in rows:
                    if row["error"] is None:
                        _add(archive, row, read(row))
            pq.write_table(pa.Table.from_pylist([_sidecar(row) for row in rows], schema=_SIDECAR), table)
            contents = [file_sha256(tar), file_sha256(table)]
        stem = f"{unit}-{hashlib.sha256(''.join(contents).encode()).hexdigest()[:8]}"
        files = []
        for staged, suffix, sha256 in zip((tar, table), (".tar", ".parquet"), contents, strict=True):
            size_bytes = staged.stat().st_size
            replace_file(staged, directory / f"{stem}{suffix}")
            files.append(PublishedFile(f"{IMAGES}/{stem}{suffix}", size_bytes, sha256))
    return [{**row, "shard": files[0].path} if row["error"] is None else row for row in rows], files


def publish_rows(root: Path, unit: str, rows: Sequence[Row]) -> PublishedFile:
    """Write the table that says what became of each row of a unit."""
    return publish_table(pa.Table.from_pylist(list(rows), schema=FETCHED), root, root / ROWS, unit)


def read_status(root: Path, record: Record) -> list[Row]:
    """Return what became of each row of a committed unit, as of its last attempt.

    Raises:
        DataError: If the record names no such table.
    """
    paths = [file.path for file in record.files if is_rows(file)]
    if len(paths) != 1:
        raise DataError(f"{root}: unit {record.unit} has {len(paths)} tables in {ROWS}/, expected one; fetch it again")
    rows: list[Row] = read_table(root / paths[0], schema=FETCHED).to_pylist()
    return rows


def is_rows(file: PublishedFile) -> bool:
    """Tell a unit's table of rows from its tars and their sidecars."""
    return file.path.startswith(f"{ROWS}/")


def seal_images(root: Path, records: Sequence[Record]) -> None:
    """Write the manifest of a finished output: which tars make it up."""
    files = [{"unit": record.unit, **asdict(file)} for record in records for file in record.files]
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "rows_in": sum(record.rows_in for record in records),
        "rows_out": sum(record.rows_out for record in records),
        "tars": [file for file in files if file["path"].endswith(".tar")],
        "rows": [file for file in files if file["path"].startswith(f"{ROWS}/")],
    }
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1).encode())


def sealed_tars(root: str, names: Collection[str]) -> list[str] | None:
    """Return the tars of an output of `fetch`; None if the folder is something else.

    Args:
        root: A folder, or the URL of one.
        names: What it holds.

    Raises:
        DataError: If the output is not finished, or holds no image.
    """
    if MANIFEST not in names:
        if {IMAGES, ROWS, COMMITS} <= set(names):
            raise DataError(f"{root}: its images are not all fetched; run `pixart fetch` on it to the end")
        return None
    manifest = read_seal(location(root))
    if manifest is None:
        return None
    if not manifest["tars"]:
        raise DataError(f"{root}: not one of its {manifest['rows_in']} URLs gave an image; see its {ROWS}/ for why")
    return [os.path.join(root, tar["path"]) for tar in manifest["tars"]]


def read_seal(root: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished output of `fetch`; None if the manifest is another stage's.

    Raises:
        DataError: If it is of another version.
    """
    try:
        manifest = json.loads(read_bytes(root / MANIFEST))
    except ValueError:
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    if manifest.get("version") != FORMAT_VERSION:
        found = manifest.get("version")
        raise DataError(f"{root}/{MANIFEST}: expected {FORMAT} version {FORMAT_VERSION}, found {found}; fetch it again")
    return manifest


def _add(archive: tarfile.TarFile, row: Row, image: bytes) -> None:
    caption = row["caption"]
    metadata = json.dumps(_sidecar(row), ensure_ascii=False).encode()
    members = [(row["format"], image), ("json", metadata)]
    if caption is not None:
        members.insert(1, ("txt", caption.encode()))
    for extension, data in members:
        info = tarfile.TarInfo(f"{row['key']}.{extension}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def _sidecar(row: Mapping[str, Any]) -> Row:
    error = row["error"]
    return {
        "url": row["url"],
        "caption": row["caption"],
        "key": row["key"],
        "status": "success" if error is None else "failed_to_download",
        "error_message": None if error is None else f"{error}: {row['detail']}",
        "width": row["width_px"],
        "height": row["height_px"],
        "original_width": row["width_px"],
        "original_height": row["height_px"],
        "sha256": row["sha256"],
        "http_status": row["http_status"],
        "num_attempts": row["num_attempts"],
        "size_bytes": row["size_bytes"],
    }
