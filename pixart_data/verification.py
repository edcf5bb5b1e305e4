"""Re-reading every byte of what was written, and naming the sample that is damaged."""

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pixart_data.commits import COMMITS, file_sha256, read_records
from pixart_data.errors import DataError
from pixart_data.shards import INDEX, Manifest, feature_sets, member_prefix, read_manifest, tensor_shape

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

    Raises:
        DataError: If there is nothing here that can be verified.
    """
    sets = feature_sets(root)
    if not sets and not (root / COMMITS).is_dir():
        raise DataError(f"{root}: expected a dataset, a feature set or a table of captions, found none of them")
    for path in sets.values():
        yield from _verify_set(path)
    for path in sorted(path.parent for path in (root / COMMITS, *root.glob(f"*/{COMMITS}")) if path.is_dir()):
        if path not in sets.values():  # captions, or a feature set that is not finished
            yield from _verify_records(path)


def _verify_records(root: Path) -> Iterator[Finding]:
    for record in read_records(root).values():
        for file in record.files:
            path = root / file.path
            if not path.is_file():
                yield Finding(path, problem=f"missing; delete commits/{record.unit}.json and run the job again")
            elif file_sha256(path) != file.sha256:
                yield Finding(path, problem=f"damaged; delete commits/{record.unit}.json and run the job again")
            else:
                yield Finding(path, file.size_bytes, record.rows_out)


def _verify_set(root: Path) -> Iterator[Finding]:
    manifest = read_manifest(root)
    index_path = root / INDEX
    if not index_path.is_file() or file_sha256(index_path) != manifest.index_sha256:
        yield Finding(index_path, problem="the index is missing or damaged; run `pixart extract` again to rewrite it")
        return
    yield Finding(index_path, index_path.stat().st_size)
    rows = _rows_by_shard(index_path, manifest)
    remedy = {
        file.path: f"delete {root / COMMITS / record.unit}.json and extract again: only that shard is redone"
        for record in read_records(root).values()
        for file in record.files
    }
    for shard in manifest.shards:
        for finding in _verify_shard(root / shard["path"], shard, rows.pop(shard["path"], []), manifest):
            advice = f"; {remedy.get(shard['path'], 'extract again')}" if finding.problem else ""
            yield replace(finding, problem=finding.problem + advice)
    for path, orphans in rows.items():
        yield Finding(root / path, 0, len(orphans), orphans[0]["key"], "in the index but not in the manifest")


def _rows_by_shard(index_path: Path, manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    extra = ("height_px", "width_px") if manifest.kind == "image" else ("num_tokens",)
    rows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in pq.read_table(index_path, columns=[*_ADDRESS, *extra]).to_pylist():
        rows[row["shard"]].append(row)
    null = manifest.model.get("null")
    if null:
        rows[null["path"]].append({"key": "null-caption", **null})
    return rows


def _verify_shard(
    path: Path, shard: dict[str, Any], rows: list[dict[str, Any]], manifest: Manifest
) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(path, problem=f"missing, with {len(rows)} samples from {rows[0]['key'] if rows else '?'} on")
        return
    data = path.read_bytes()
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


def _tensor(data: bytes, row: dict[str, Any]) -> bytes:
    return data[row["offset_bytes"] : row["offset_bytes"] + row["size_bytes"]]


def _prefix_is_whole(data: bytes, row: dict[str, Any], manifest: Manifest) -> bool:
    prefix = member_prefix(row["key"], manifest.tensor, manifest.dtype, tensor_shape(row, manifest))
    return data[row["offset_bytes"] - len(prefix) : row["offset_bytes"]] == prefix
