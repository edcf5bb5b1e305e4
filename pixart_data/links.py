"""Feature sets over the shards of others: of some of their samples, or of the samples of several.

Shards are never written to, so that one file can be part of many sets: it is linked where the file system can, else
copied. The tables are the set's own.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pixart_data.commits import COMMITS, MANIFEST, PublishedFile, Record, sweep
from pixart_data.editions import Excerpt, Original, copy_calibration, write_edition
from pixart_data.errors import ConfigError, DataError
from pixart_data.leases import output_lock
from pixart_data.packs import TEXT_FOLDER
from pixart_data.retries import retrying, storage
from pixart_data.shards import Manifest, read_manifest
from pixart_data.storage import (
    delete,
    exists,
    is_remote,
    list_files,
    local_copy,
    make_dir,
    replace_file,
    size_bytes,
    staging,
)
from pixart_data.threads import ahead

_COPY_THREADS = 8


@dataclass(frozen=True)
class Linked:
    """Shards of a set over those of others, where each is taken from, and the rows of each of these."""

    shards: list[dict[str, Any]]
    sources: dict[str, Path]
    excerpts: list[Excerpt]


def write_linked(
    root: Path, manifest: Manifest, excerpts: Sequence[Excerpt], shards: Mapping[str, Path], made_by: str
) -> Manifest:
    """Write a set over the shards of others, which are linked where the file system can, else copied.

    Killed and called again, it goes on; called with other rows, it replaces the set.

    Args:
        manifest: As `write_edition` takes it.
        excerpts: The first one's codec is that of the set.
        shards: Where to take each shard of the manifest from.
        made_by: The key in the provenance that says so.

    Raises:
        ConfigError: If there is something else in the folder.
        DataError: If a shard is missing or cut off.
    """
    with output_lock(root) as lease:
        _require_own(root, made_by)
        delete([root / MANIFEST])
        folders = [root / name for name in {*(bucket["ratio"] for bucket in manifest.buckets), TEXT_FOLDER}]
        files = [PublishedFile(shard["path"], shard["size_bytes"], shard["sha256"]) for shard in manifest.shards]
        record = Record(made_by, "", {}, 0, 0, {}, files)
        sweep(root, folders, [record])
        place = partial(_place_shard, root, shards)
        for _ in ahead(place, files, _COPY_THREADS, 2 * _COPY_THREADS):
            lease.check()
        copy_calibration(excerpts[0].original, root)
        lease.check()
        return write_edition(root, manifest, excerpts)


def _require_own(root: Path, made_by: str) -> None:
    what = ""
    if list_files(root / COMMITS):
        what = "commit records of another command"
    elif exists(root / MANIFEST) and made_by not in read_manifest(root).provenance:
        what = "a feature set that another command made"
    if what:
        raise ConfigError(f"output: {root}: expected a new folder, or what this command left there, found {what}")


def _place_shard(root: Path, sources: Mapping[str, Path], file: PublishedFile) -> None:
    source, target = sources[file.path], root / file.path
    if not exists(source) or size_bytes(source) != file.size_bytes:
        what = f"expected a shard of {file.size_bytes:,} bytes, found none or another"
        raise DataError(f"{source}: {what}; `pixart verify` on its dataset says what to do")
    if exists(target) and size_bytes(target) == file.size_bytes:
        return
    if not is_remote(source) and not is_remote(target):
        make_dir(target.parent)
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    if is_remote(source) and is_remote(target) and source.fs == target.fs:  # type: ignore[attr-defined]
        store: Any = cast(Any, source).fs
        retrying(lambda: store.cp_file(cast(Any, source).path, cast(Any, target).path), target)
        return
    with local_copy(source) as copy, staging(target.parent, target.name) as staged:
        with storage(staged):
            shutil.copyfile(copy, staged)
        replace_file(staged, target)


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
