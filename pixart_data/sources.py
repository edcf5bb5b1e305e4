"""Where images come from: job settings turned into units of work, and units into samples.

Sources are read in place. `find_units` names and cuts them, deterministically and without reading their images;
`read_samples` yields every sample of a unit exactly once, bad ones as rejected samples.
"""

import os
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from pixart_data.archives import sealed_tars
from pixart_data.errors import ConfigError
from pixart_data.folders import find_folder, read_folder
from pixart_data.lists import find_list, read_list
from pixart_data.places import Place, Store, place_of
from pixart_data.sections import Source
from pixart_data.selection import KeptUnit, kept_keys, kept_samples, select
from pixart_data.stores import is_url
from pixart_data.tars import count_tar_rows, cut_tar, read_tar
from pixart_data.units import Sample, Unit, encode_name, split_extension

__all__ = ["Sample", "Unit", "count_rows", "find_units", "read_samples"]

_NUM_THREADS = 16
_Kind = Literal["tar", "folder", "list"]
_LISTS = (".jsonl", ".parquet", ".json")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_SIDECARS = (".parquet", "_stats.json")  # what img2dataset leaves beside x.tar
_LAYOUT_KINDS: dict[str, tuple[_Kind, str]] = {
    "sa1b": ("tar", "tars"),
    "img2dataset": ("tar", "tars"),
    "folder": ("folder", "folders of images"),
    "list": ("list", ".jsonl, .json or .parquet lists"),
}


class _Shard(NamedTuple):
    path: str
    kind: _Kind
    place: Place


def find_units(source: Source) -> list[Unit]:
    """Return the units of work behind `source.paths`, in a fixed order.

    Tars are named by size and a few bytes (on object stores by what the listing says), folders are listed, lists are
    read once.

    Raises:
        ConfigError: If a pattern matches nothing, a path is of no known kind or of another than `source.layout` says,
            two sources have the same name, a folder or list is empty, an object store refuses access, or the filter in
            `source.kept` has not seen a unit as it is.
        DataError: If a source cannot be read.
    """
    store = Store()
    shards = {
        shard.path: shard for pattern in source.paths for shard in _shards(pattern, source, place_of(pattern, store))
    }.values()
    _check_nesting([shard.path for shard in shards if shard.kind == "folder"])
    names = [_name(shard, source.root) for shard in shards]
    _check_distinct(((name, shard.path) for shard, name in zip(shards, names, strict=True)), source.root)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:  # a look at each of 40,000 tars on shared storage
        parts = threads.map(lambda shard, name: _units(shard, name, source), shards, names)
        units = [unit for part in parts for unit in part]
    _check_distinct(((unit.id, unit.path) for unit in units), source.root)
    return select(units, source.kept) if source.kept else units


def read_samples(
    unit: Unit, source: Source, *, with_images: bool = True, keys: Set[str] | None = None
) -> Iterator[Sample]:
    """Yield every sample of a unit exactly once, in a fixed order, reading one image at a time.

    Args:
        with_images: False gives keys and captions only; image files are then not opened, so that what is wrong
            with them goes unnoticed.
        keys: Only the samples with these; the images of the others are not read.

    Raises:
        DataError: If the storage fails, or a list changed since `find_units`.
    """
    if isinstance(unit, KeptUnit):
        if keys is not None:
            return _read(unit, source, with_images, kept_keys(unit) & keys)
        return kept_samples(_read(unit, source, with_images, None), unit)
    return _read(unit, source, with_images, keys)


def _read(unit: Unit, source: Source, with_images: bool, keys: Set[str] | None) -> Iterator[Sample]:
    if unit.kind == "tar":
        return read_tar(unit, source, with_images, keys)
    if unit.kind == "folder":
        return read_folder(unit, with_images, keys)
    return read_list(unit, source, with_images, keys)


def count_rows(unit: Unit) -> int:
    """Return how many samples a unit holds, rejected ones included; for a tar that takes one seek per member."""
    if isinstance(unit, KeptUnit):
        return unit.num_kept
    return count_tar_rows(unit) if unit.kind == "tar" else unit.num_rows


# Paths


def _shards(pattern: str, source: Source, place: Place) -> Iterator[_Shard]:
    for path in place.expand(pattern):
        in_folder = place.is_folder(path)
        for shard in _in_folder(path, source.layout, place) if in_folder else (_of_file(path, source.layout, place),):
            _check_layout(shard, source.layout)
            yield shard


def _in_folder(path: str, layout: str, place: Place) -> list[_Shard]:
    """Take the tars that `fetch` wrote, or those directly in a folder, or else the folder itself as images."""
    if layout == "folder":
        return [_Shard(path, "folder", place)]
    names = place.names(path)
    fetched = sealed_tars(path, names)
    if fetched is not None:
        return [_Shard(tar, "tar", place) for tar in fetched]
    for name in names:
        if name.lower().endswith(_COMPRESSED) and f"{_uncompressed(name)}.tar" not in names:
            _refuse_compressed(os.path.join(path, name))
    tars = [os.path.join(path, name) for name in names if name.lower().endswith(".tar")]
    found = [_Shard(tar, "tar", place) for tar in tars if place.is_file(tar)]
    return found or [_Shard(path, "folder", place)]


def _of_file(path: str, layout: str, place: Place) -> _Shard:
    lower = path.lower()
    if lower.endswith(_COMPRESSED):
        _refuse_compressed(path)
    tar = path if lower.endswith(".tar") else _tar_beside(path, place)
    if tar and (tar == path or layout != "list") and place.is_file(tar):
        return _Shard(tar, "tar", place)
    if lower.endswith(_LISTS) and place.is_file(path):
        return _Shard(path, "list", place)
    raise ConfigError(
        f"source.paths: expected a .tar, a folder of images, or a .jsonl, .json or .parquet list, got {path}; "
        "name the folder or the list that holds the images, or narrow the pattern"
    )


def _tar_beside(path: str, place: Place) -> str:
    for suffix in _SIDECARS:
        tar = path.removesuffix(suffix) + ".tar"
        if path.endswith(suffix) and place.is_file(tar):
            return tar
    return ""


def _uncompressed(name: str) -> str:
    suffix = next(suffix for suffix in _COMPRESSED if name.lower().endswith(suffix))
    return name[: -len(suffix)]


def _refuse_compressed(path: str) -> None:
    tool = {"gz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}
    command = next(command for end, command in tool.items() if path.lower().endswith(end))
    raise ConfigError(
        f"source.paths: expected an uncompressed tar, got {path}; run `{command} {path}`: images are read by "
        "their offset, and compressing them again saves nothing"
    )


def _check_layout(shard: _Shard, layout: str) -> None:
    kind, words = _LAYOUT_KINDS.get(layout, (shard.kind, ""))
    if shard.kind != kind:
        raise ConfigError(
            f"source.layout: {layout!r} expects {words}, found {shard.path}, a {shard.kind}; use layout = 'auto'"
        )


def _check_nesting(folders: Iterable[str]) -> None:
    previous = ""
    for folder in sorted(folders, key=lambda path: path.split("/")):
        if previous and folder.startswith(previous.rstrip("/") + "/"):
            raise ConfigError(
                f"source.paths: {folder} lies in {previous}, which is searched recursively; name one of them"
            )
        previous = folder


# Names


def _name(shard: _Shard, root: str | None) -> str:
    path = os.path.basename(shard.path) or "root"
    if root:
        path = os.path.relpath(shard.path, root) if is_url(shard.path) == is_url(root) else ".."
        if path.split("/")[0] == "..":
            raise ConfigError(f"source.root: expected a folder above all sources, got {root}; {shard.path} is outside")
        if path == ".":
            path = os.path.basename(shard.path) or "root"
    return encode_name(path if shard.kind == "folder" else split_extension(path)[0])


def _check_distinct(named: Iterable[tuple[str, str]], root: str | None) -> None:
    seen: dict[str, str] = {}
    for name, path in named:
        other = seen.setdefault(name, path)
        if other != path:
            hint = "give one another name" if root else "set source.root to a folder above both"
            raise ConfigError(f"source.paths: {other} and {path} are both called {name!r}; {hint}")


def _units(shard: _Shard, name: str, source: Source) -> list[Unit]:
    place = shard.place
    if shard.kind == "folder":
        return find_folder(shard.path, name, source, place)
    if shard.kind == "list":
        return find_list(shard.path, name, source, place)
    sidecar = f"{split_extension(shard.path)[0]}.parquet"
    sidecar = sidecar if place.is_file(sidecar) else ""
    content = place.fingerprint(*filter(None, (shard.path, sidecar)))
    unit = Unit(name, "tar", shard.path, 0, -1, 0, content, name, sidecar=sidecar)
    # A tar on an object store stays whole: each of its slices would have to fetch all of it to find its headers.
    return [unit] if is_url(shard.path) else cut_tar(unit, place.size_bytes(shard.path), source.bytes_per_unit)
