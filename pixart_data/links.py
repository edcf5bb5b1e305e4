"""Feature sets over the shards of others: of some of their samples, or of the samples of several.

Shards are never written to, so that one file can be part of many sets: it is linked where the file system can, else
copied. The tables are the set's own.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pixart_data.commits import PublishedFile, Record, file_sha256, sweep
from pixart_data.editions import Excerpt, Original, copy_calibration, write_edition
from pixart_data.errors import DataError
from pixart_data.leases import output_lock
from pixart_data.owners import MADE_BY, MARKER, require_links
from pixart_data.packs import TEXT_FOLDER
from pixart_data.retries import retrying, storage
from pixart_data.shards import Manifest
from pixart_data.storage import (
    delete,
    exists,
    is_remote,
    local_copy,
    make_dir,
    replace_file,
    size_bytes,
    staging,
    write_atomic,
)
from pixart_data.threads import ahead

_COPY_THREADS = 8


@dataclass(frozen=True)
class Linked:
    """Shards of a set over those of others, where each is taken from, and the rows of each of these."""

    shards: list[dict[str, Any]]
    sources: dict[str, Path]
    excerpts: list[Excerpt]


def require_shards(linked: Linked) -> None:
    """Make sure that the shards to be linked are there, before anything is written.

    Raises:
        DataError: If one is missing or cut off.
    """

    def check(shard: Mapping[str, Any]) -> None:
        _require_shard(linked.sources[shard["path"]], shard["size_bytes"])

    for _ in ahead(check, linked.shards, _COPY_THREADS, 2 * _COPY_THREADS):
        pass


def write_linked(root: Path, manifest: Manifest, linked: Linked, command: str) -> Manifest:
    """Write a set over the shards of others, which are linked where the file system can, else copied.

    Killed and called again, it goes on; called with other rows, it replaces the set, which stays as it was until all
    that the new one needs is there.

    Args:
        manifest: As `write_edition` takes it.
        linked: The first excerpt's codec is that of the set.
        command: What makes it; sets that another one made are not replaced.

    Raises:
        ConfigError: If there is something else in the folder.
        DataError: If a shard is missing or cut off.
    """
    manifest = replace(manifest, provenance={**manifest.provenance, MADE_BY: command})
    with output_lock(root) as lease:
        require_links(root, command)
        write_atomic(root / MARKER, json.dumps(manifest.provenance).encode())
        files = [PublishedFile(shard["path"], shard["size_bytes"], shard["sha256"]) for shard in manifest.shards]
        for _ in ahead(partial(_place_shard, root, linked.sources), files, _COPY_THREADS, 2 * _COPY_THREADS):
            lease.check()
        copy_calibration(linked.excerpts[0].original, root)
        lease.check()
        sealed = write_edition(root, manifest, linked.excerpts)
        folders = [root / name for name in {*(bucket["ratio"] for bucket in manifest.buckets), TEXT_FOLDER}]
        lease.check()
        sweep(root, folders, [Record(command, "", {}, 0, 0, {}, files)])
        delete([root / MARKER])
        return sealed


def _require_shard(source: Path, num_bytes: int) -> None:
    if not exists(source) or size_bytes(source) != num_bytes:
        what = f"expected a shard of {num_bytes:,} bytes, found none or another"
        raise DataError(f"{source}: {what}; `pixart verify` on its dataset says what to do")


def _place_shard(root: Path, sources: Mapping[str, Path], file: PublishedFile) -> None:
    source, target = sources[file.path], root / file.path
    _require_shard(source, file.size_bytes)
    is_local = not is_remote(source) and not is_remote(target)
    if is_remote(source) and is_remote(target) and source.fs == target.fs:  # type: ignore[attr-defined]
        store: Any = cast(Any, source).fs  # which copies faster than what is there already could be read and checked
        retrying(lambda: store.cp_file(cast(Any, source).path, cast(Any, target).path), target)
        return
    if exists(target):
        if (is_local and source.samefile(target)) or _is_whole(target, file):
            return
        if is_local:
            delete([target])  # damaged: it would stand in the way of the link
    if is_local:
        make_dir(target.parent)
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    with local_copy(source) as copy, staging(target.parent, target.name) as staged:
        with storage(staged):
            shutil.copyfile(copy, staged)
        replace_file(staged, target)


def _is_whole(path: Path, file: PublishedFile) -> bool:
    if size_bytes(path) != file.size_bytes:
        return False
    with local_copy(path) as copy:
        return file_sha256(copy) == file.sha256


def linked_shards(originals: Sequence[Original], kept: Sequence[npt.NDArray[np.bool_]]) -> Linked:
    """Choose the shards that hold rows that are kept, and that of the first set's empty caption.

    Args:
        kept: Of each set, which rows, by row of its index.
    """
    shards: dict[str, dict[str, Any]] = {}
    sources: dict[str, Path] = {}
    number_of: dict[str, int] = {}
    numbers = []
    for original, mask in zip(originals, kept, strict=True):
        null = original.manifest.model.get("null", {}).get("path") if original is originals[0] else None
        used = np.bincount(original.column("shard")[mask], minlength=len(original.manifest.shards)) > 0
        own = np.zeros(len(used), np.uint32)
        for number, shard in enumerate(original.manifest.shards):
            if used[number] or shard["path"] == null:
                path = _free_name(shard, shards)
                if path not in shards:
                    shards[path] = {"path": path, "size_bytes": shard["size_bytes"], "sha256": shard["sha256"]}
                    sources[path] = original.root / shard["path"]
                own[number] = number_of.setdefault(path, len(number_of))
        numbers.append(own)
    excerpts = [
        Excerpt(
            original,
            mask,
            own[original.column("shard")],
            original.column("offset"),
            original.column("flipped_offset" if original.manifest.kind == "image" else "offset"),
        )
        for original, mask, own in zip(originals, kept, numbers, strict=True)
    ]
    return Linked(list(shards.values()), sources, excerpts)


def _free_name(shard: Mapping[str, Any], taken: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a shard's path, or one that no other shard has; their digests in names are short."""
    path, sha256 = str(shard["path"]), str(shard["sha256"])
    if path in taken and taken[path]["sha256"] != sha256:
        return f"{path.removesuffix('.tar')}-{sha256[:24]}.tar"
    return path
