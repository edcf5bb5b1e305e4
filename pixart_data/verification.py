"""Re-reading what was written, every byte of it or its tables alone, and naming what is damaged down to the sample.

A feature set hangs together like this: `manifest.json` holds a digest of itself, the sha256 of index.parquet,
entries.bin, rejected.parquet and the codec's calibration, sizes and sha256 of the shards, and the digests of the commit
records, which hold those of the index parts.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pixart_data import archives, bundles, captions, selection
from pixart_data.advice import command
from pixart_data.agreement import disagreements, from_index, wrong_numbers
from pixart_data.commits import COMMITS, MANIFEST, Record, file_sha256, read_records
from pixart_data.config import digest
from pixart_data.damage import Finding, Keys, by_shard, check_shard, check_size
from pixart_data.entries import ENTRIES, Entries, map_entries
from pixart_data.errors import ConfigError, DataError
from pixart_data.retries import retrying
from pixart_data.shards import FORMAT, INDEX, REJECTED_FILE, Manifest, manifest_bytes, read_manifest
from pixart_data.storage import exists, is_remote, local_copy, read_bytes, size_bytes

__all__ = ["Finding", "planned", "verify"]

REPORT = "stats.json"  # what finishes the output of `stats`, as a manifest does that of the other stages
_LEVELS = 3  # of folders below the one that is named
_FORMATS = {FORMAT, selection.FORMAT, captions.FORMAT, archives.FORMAT, bundles.FORMAT}


def verify(root: Path, fast: bool = False) -> Iterator[Finding]:
    """Yield a finding for each file of all datasets, feature sets and other outputs at a folder and below it.

    An output that was never finished is a finding of its own, besides those of its files. What lies more than three
    folders below is not looked for.

    Args:
        fast: Look at the sizes of shards and of tables of captions only; all else is read as ever.

    Raises:
        ConfigError: If the path does not exist.
        DataError: If there is nothing here that can be verified.
    """
    for path in _found(root):
        yield from _verify_output(path, fast)


def planned(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield each file that `verify` would tell of, with its size in bytes as its output has it noted.

    Raises:
        ConfigError: If the path does not exist.
        DataError: If there is nothing here that can be verified, or an output does not say what it holds.
    """
    for output in _found(root):
        yield from _planned(output)


def _planned(root: Path) -> Iterator[tuple[Path, int]]:
    kind = _format(root) if exists(root / MANIFEST) else ""
    named: list[tuple[str, int]] = []
    if kind == FORMAT:
        manifest = read_manifest(root)
        named = [(name, max(_size(root / name), 0)) for name in (MANIFEST, *_tables(manifest))]
        named += [(shard["path"], shard["size_bytes"]) for shard in manifest.shards]
    elif kind == selection.FORMAT:
        kept = selection.read_selection(root)
        named = [(file.path, file.size_bytes) for file in (*(part.file for part in kept.parts), kept.rejected_file)]
    elif kind == bundles.FORMAT:
        named = [(file.path, file.size_bytes) for file in bundles.read_bundle(root)]
    for record in read_records(root).values():
        named += [(f.path, f.size_bytes) for f in record.files if kind != FORMAT or not f.path.endswith(".tar")]
    yield from ((root / path, size) for path, size in named)


def _outputs(root: Path) -> list[Path]:
    """Return the folders that a command wrote to, or began to: `root` and those below it."""
    return sorted(path for path, names in _folders(root, _LEVELS) if names & {MANIFEST, INDEX, ENTRIES, COMMITS})


def _found(root: Path) -> list[Path]:
    if not retrying(root.is_dir, root, "read"):
        raise ConfigError(f"{root}: no such folder; check the path")
    outputs = _outputs(root)
    if not outputs:
        raise DataError(f"{root}: expected a dataset, a feature set or a table of captions, found none of them")
    return outputs


def _folders(root: Path, levels: int) -> Iterator[tuple[Path, set[str]]]:
    """Yield `root` and the folders down to so many levels below it, each with the names of what is in it."""
    try:
        found = retrying(lambda: _names(root), root, "read")
    except FileNotFoundError:  # swept away meanwhile, by a run that goes on
        return
    yield root, set(found)
    for name, is_folder in found.items():
        if is_folder and levels:
            yield from _folders(root / name, levels - 1)


def _names(folder: Path) -> dict[str, bool]:
    """Return what is in a folder by name, and whether it is a folder."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_dir() for entry in entries}
    remote: Any = folder
    found = [(entry["name"].rstrip("/"), entry["type"]) for entry in remote.fs.ls(remote.path, detail=True)]
    own = remote.path.rstrip("/")  # stores that have an object for a folder list it, too
    return {name.rsplit("/", 1)[-1]: kind == "directory" for name, kind in found if name != own}


def _verify_output(root: Path, fast: bool) -> Iterator[Finding]:
    try:
        records = read_records(root)
    except DataError as error:
        yield Finding(root / COMMITS, problem=str(error))
        records = {}
    finished, is_features = exists(root / MANIFEST), False
    if finished:
        kind = _format(root)
        if kind == FORMAT:
            is_features = True
            yield from _verify_set(root, records, fast)
        elif kind == selection.FORMAT:
            yield from _verify_selection(root)
        elif kind == bundles.FORMAT:
            yield from _verify_bundle(root)
        elif kind not in _FORMATS:
            yield Finding(root / MANIFEST, problem=f"damaged: it names no format; run {command(root)} again")
    yield from _verify_records(root, records, {".tar"} if is_features else set(), fast)
    if not finished and not exists(root / REPORT):
        yield Finding(root, problem=f"not finished: run {command(root)} again, to its end")


def _format(root: Path) -> str:
    try:
        fields = json.loads(read_bytes(root / MANIFEST))
    except ValueError:
        return ""
    return str(fields.get("format")) if isinstance(fields, dict) else ""


def _verify_records(root: Path, records: dict[str, Record], skipped: set[str], fast: bool) -> Iterator[Finding]:
    for record in records.values():
        for file in record.files:
            path = root / file.path
            if path.suffix in skipped:
                continue
            found = _size(path) == file.size_bytes if fast else _sha256(path) == file.sha256
            if found:
                yield Finding(path, file.size_bytes, record.rows_out)
            else:
                what = "damaged" if exists(path) else "missing"
                yield Finding(path, problem=f"{what}; delete commits/{record.unit}.json and run the job again")


def _verify_selection(root: Path) -> Iterator[Finding]:
    kept = selection.read_selection(root)
    for file in (*(part.file for part in kept.parts), kept.rejected_file):
        if _sha256(root / file.path) == file.sha256:
            yield Finding(root / file.path, file.size_bytes)
        else:
            yield Finding(root / file.path, problem="missing or damaged; run `pixart filter` again: it is rewritten")


def _verify_bundle(root: Path) -> Iterator[Finding]:
    try:
        files = bundles.read_bundle(root)
    except DataError as error:
        yield Finding(root / MANIFEST, problem=str(error).removeprefix(f"{root / MANIFEST}: "))
        return
    for file in files:
        if _sha256(root / file.path) == file.sha256:
            yield Finding(root / file.path, file.size_bytes)
        else:
            advice = f"delete {MANIFEST} and run `pixart stats` on job.toml again: it is rewritten"
            yield Finding(root / file.path, problem=f"missing or damaged; {advice}")


def _verify_set(root: Path, records: dict[str, Record], fast: bool) -> Iterator[Finding]:
    path = root / MANIFEST
    try:
        manifest = read_manifest(root)
    except DataError as error:
        yield Finding(path, problem=str(error).removeprefix(f"{path}: "))
        return
    whole = read_bytes(path) == manifest_bytes(manifest)  # a digest does not see how a number is spelt
    yield Finding(path, size_bytes(path), problem="" if whole else f"damaged; run {command(root)} again")
    yield from _verify_sealed_records(root, manifest, records)
    with ExitStack() as stack:
        copies: dict[str, Path] = {}
        for name, sha256 in _tables(manifest).items():
            copy, problem = _opened(stack, root / name, sha256)
            if copy is not None and not problem:
                copies[name] = copy
            advice = f"; run {command(root)} again: it is rewritten" if problem else ""
            yield Finding(root / name, copy.stat().st_size if copy else 0, problem=problem + advice)
        entries = map_entries(copies[ENTRIES], manifest.kind) if ENTRIES in copies else None
        yield from _verify_agreement(root, copies, entries, manifest)
        yield from _verify_shards(root, copies.get(INDEX), entries, manifest, _Units(root, records), fast)


def _tables(manifest: Manifest) -> dict[str, str]:
    """Return the files that the manifest names besides the shards, with their sha256."""
    tables = {INDEX: manifest.index_sha256, REJECTED_FILE: manifest.rejected_sha256, ENTRIES: manifest.entries_sha256}
    calibration = manifest.codec.get("calibration")
    return {**tables, calibration["path"]: calibration["sha256"]} if calibration else tables


def _opened(stack: ExitStack, path: Path, sha256: str) -> tuple[Path | None, str]:
    """Return a local copy of a file, and what is wrong with it."""
    try:
        copy = stack.enter_context(local_copy(path))
        found = file_sha256(copy)
    except FileNotFoundError:
        return None, "missing"
    return copy, "" if found == sha256 else "damaged, or not the one that the manifest names"


def _verify_sealed_records(root: Path, manifest: Manifest, records: dict[str, Record]) -> Iterator[Finding]:
    for unit, expected in manifest.records.items():
        path = root / COMMITS / f"{unit}.json"
        if unit not in records:
            yield Finding(path, problem=f"missing; run {command(root)} again: its unit is redone")
        elif digest(asdict(records[unit])) != expected:
            problem = f"not the one that the manifest was written from; delete it and run {command(root)} again"
            yield Finding(path, problem=problem)


def _verify_agreement(
    root: Path, copies: dict[str, Path], entries: Entries | None, manifest: Manifest
) -> Iterator[Finding]:
    if entries is None or INDEX not in copies or REJECTED_FILE not in copies:
        return
    for problem in disagreements(copies[INDEX], copies[REJECTED_FILE], entries, manifest):
        yield Finding(root / INDEX, problem=f"{problem}; run {command(root)} again: it is rewritten")


class _Units:
    """Says what to do about a damaged shard, by the unit that wrote it."""

    def __init__(self, root: Path, records: dict[str, Record]) -> None:
        self.root = root
        self.of_file = {file.path: record.unit for record in records.values() for file in record.files}

    def advice(self, shard: str) -> str:
        if not self.of_file:
            return "; copy it again, or make the set again with the command that wrote it"
        record = self.root / COMMITS / f"{self.of_file.get(shard, '*')}.json"
        return f"; delete {record} and extract again: only that shard is redone"


def _verify_shards(
    root: Path, index: Path | None, entries: Entries | None, manifest: Manifest, units: _Units, fast: bool
) -> Iterator[Finding]:
    keys = Keys(index)
    records = entries
    try:
        if records is None and index is not None:
            records = from_index(index, manifest)
    except DataError:
        records = None  # the index has a finding already, or is not this set's
    if records is not None and wrong_numbers(records, manifest):
        records = None  # which is a finding already
    numbers = len(manifest.shards)
    bounds = by_shard(records, numbers) if records is not None else [(0, 0)] * numbers
    for shard, (start, end) in zip(manifest.shards, bounds, strict=True):
        held = None if records is None else records[start:end]
        findings = (
            iter([check_size(root, shard, held, keys)]) if fast else check_shard(root, shard, held, manifest, keys)
        )
        for finding in findings:
            advice = units.advice(shard["path"]) if finding.problem else ""
            yield replace(finding, problem=finding.problem + advice)


def _size(path: Path) -> int:
    """Return the size of a file on any storage; -1 if there is none."""
    return size_bytes(path) if exists(path) else -1


def _sha256(path: Path) -> str:
    """Return the sha256 of a file on any storage; empty if there is none."""
    try:
        with local_copy(path) as copy:
            return file_sha256(copy)
    except FileNotFoundError:
        return ""
