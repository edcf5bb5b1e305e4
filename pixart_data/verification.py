"""Re-reading every byte of what was written, and naming the sample that is damaged."""

import hashlib
import itertools
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_data import selection
from pixart_data.commits import COMMITS, MANIFEST, file_sha256, read_records, read_table
from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import INDEX, REJECTED_FILE, Manifest, feature_sets, member_prefix, read_manifest, tensor_shape
from pixart_data.storage import exists, local_copy, size_bytes

REPORT = "stats.json"  # what finishes the output of `stats`, as a manifest does that of the other stages
_ADDRESS = ("key", "shard", "offset_bytes", "size_bytes", "crc32")


@dataclass(frozen=True)
class Finding:
    """What one file turned out to be. `problem` is empty where it is whole; `sample` names a damaged sample."""

    path: Path
    size_bytes: int = 0
    num_samples: int = 0
    sample: str = ""
    problem: str = ""


def verify(root: Path) -> Iterator[Finding]:
    """Yield a finding for each file of a dataset, a feature set, or any output directory with commit records.

    An output that was never finished is a finding of its own, besides those of its files.

    Raises:
        ConfigError: If the path does not exist.
        DataError: If there is nothing here that can be verified.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; check the path")
    sets = feature_sets(root)
    if not sets and not (root / COMMITS).is_dir():
        raise DataError(f"{root}: expected a dataset, a feature set or a table of captions, found none of them")
    for path in sets.values():
        yield from _verify_set(path)
    if selection.is_selection(root):
        yield from _verify_selection(root)
    for path in sorted(path.parent for path in (root / COMMITS, *root.glob(f"*/{COMMITS}")) if path.is_dir()):
        in_manifest = {".tar"} if path in sets.values() else set()  # of captions and unfinished sets, all files
        yield from _verify_records(path, in_manifest)
        if not (path / MANIFEST).is_file() and not (path / REPORT).is_file():
            yield Finding(path, problem="not finished: run the command that writes it again, to its end")


def _verify_records(root: Path, skipped: set[str]) -> Iterator[Finding]:
    for record in read_records(root).values():
        for file in record.files:
            path = root / file.path
            if path.suffix in skipped:
                continue
            found = _sha256(path)
            if found == file.sha256:
                yield Finding(path, file.size_bytes, record.rows_out)
            else:
                what = "damaged" if found else "missing"
                yield Finding(path, problem=f"{what}; delete commits/{record.unit}.json and run the job again")


def _verify_selection(root: Path) -> Iterator[Finding]:
    kept = selection.read_selection(root)
    for file in (*(part.file for part in kept.parts), kept.rejected_file):
        if _sha256(root / file.path) == file.sha256:
            yield Finding(root / file.path, file.size_bytes)
        else:
            yield Finding(root / file.path, problem="missing or damaged; run `pixart filter` again: it is rewritten")


def _verify_set(root: Path) -> Iterator[Finding]:
    manifest = read_manifest(root)
    for path, sha256 in ((root / INDEX, manifest.index_sha256), (root / REJECTED_FILE, manifest.rejected_sha256)):
        if _sha256(path) != sha256:
            yield Finding(
                path, problem="missing or damaged; run `pixart extract` again: it is rewritten from its parts"
            )
            return
        yield Finding(path, size_bytes(path))
    index = _Index(root / INDEX, manifest)
    units = {file.path: record.unit for record in read_records(root).values() for file in record.files}
    for shard in manifest.shards:
        for finding in _verify_shard(root / shard["path"], shard, index.rows(shard["path"]), manifest):
            record = root / COMMITS / f"{units.get(shard['path'], '*')}.json"
            advice = f"; delete {record} and extract again: only that shard is redone" if finding.problem else ""
            yield replace(finding, problem=finding.problem + advice)
    for unknown in sorted(index.shards - {shard["path"] for shard in manifest.shards}):
        key = index.rows(unknown)[0]["key"]
        yield Finding(root / unknown, 0, 0, key, "in the index but not in the manifest; extract again")


def _sha256(path: Path) -> str:
    """Return the sha256 of a file on any storage; empty if there is none."""
    try:
        with local_copy(path) as copy:
            return file_sha256(copy)
    except FileNotFoundError:
        return ""


class _Index:
    """The rows of an index by shard, as Arrow columns until they are asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        extra = ("height_px", "width_px") if manifest.kind == "image" else ("num_tokens",)
        self._table = read_table(path, columns=[*_ADDRESS, *extra])
        shards = self._table["shard"].combine_chunks().dictionary_encode()
        numbers = shards.indices.to_numpy(zero_copy_only=False)
        self._order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[self._order], np.arange(len(shards.dictionary) + 1))
        self._slices = dict(zip(shards.dictionary.to_pylist(), itertools.pairwise(bounds.tolist()), strict=True))
        self._null = manifest.model.get("null")

    @property
    def shards(self) -> set[str]:
        return set(self._slices)

    def rows(self, shard: str) -> list[dict[str, Any]]:
        start, stop = self._slices.get(shard, (0, 0))
        rows: list[dict[str, Any]] = self._table.take(self._order[start:stop]).to_pylist()
        if self._null and self._null["path"] == shard:
            rows.append({"key": "null-caption", **self._null})
        return rows


def _verify_shard(
    path: Path, shard: dict[str, Any], rows: list[dict[str, Any]], manifest: Manifest
) -> Iterator[Finding]:
    if not exists(path):
        yield Finding(path, problem=f"missing, with {len(rows)} samples from {rows[0]['key'] if rows else '?'} on")
        return
    with local_copy(path) as copy, copy.open("rb") as file:
        if not copy.stat().st_size:
            yield Finding(path, problem=f"empty, expected {shard['size_bytes']} bytes")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _verify_data(path, data, shard, rows, manifest)


def _verify_data(
    path: Path, data: mmap.mmap, shard: dict[str, Any], rows: list[dict[str, Any]], manifest: Manifest
) -> Iterator[Finding]:
    damaged = [row["key"] for row in rows if zlib.crc32(_tensor(data, row)) != row["crc32"]]
    whole = hashlib.sha256(data).hexdigest() == shard["sha256"]
    if not whole and not damaged:
        damaged = [row["key"] for row in rows if not _prefix_is_whole(data, row, manifest)]
    for key in damaged:
        yield Finding(path, len(data), len(rows), key, "damaged")
    if not damaged and not whole:
        last = rows[-1]["key"] if rows else "?"
        yield Finding(path, len(data), len(rows), last, "damaged between samples or after this, the last one")
    elif not damaged:
        yield Finding(path, len(data), len(rows))


def _tensor(data: mmap.mmap, row: dict[str, Any]) -> bytes:
    return data[row["offset_bytes"] : row["offset_bytes"] + row["size_bytes"]]


def _prefix_is_whole(data: mmap.mmap, row: dict[str, Any], manifest: Manifest) -> bool:
    prefix = member_prefix(row["key"], manifest.tensor, manifest.dtype, tensor_shape(row, manifest))
    return data[row["offset_bytes"] - len(prefix) : row["offset_bytes"]] == prefix
