"""Folders of images, searched recursively, each image with an optional caption in a `.txt` of the same stem.

Hidden files and folders are left out. Links are followed; a folder that two names lead to is read once.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence

from pixart_data.errors import ConfigError, DataError
from pixart_data.sections import Source
from pixart_data.units import (
    MAX_CAPTION_BYTES,
    Sample,
    Unit,
    caption_text,
    encode_name,
    encode_path,
    is_image,
    is_missing,
    load_sample,
    split_extension,
)


def find_folder(path: str, name: str, source: Source) -> list[Unit]:
    """Cut a folder into units.

    Raises:
        ConfigError: If there is no image in it.
        DataError: If a folder below it cannot be listed.
    """
    sizes = dict(_walk(path))
    files = sorted((file for file in sizes if is_image(file)), key=lambda file: (split_extension(file)[0], file))
    if not files:
        raise ConfigError(
            f"source.paths: expected images or .tar files in {path}, found none; "
            f"name the folder that holds them, or use a pattern such as {path}/**/*.tar"
        )
    units = []
    for number, start in enumerate(range(0, len(files), source.rows_per_unit)):
        part = tuple(files[start : start + source.rows_per_unit])
        before = files[start - 1] if start else ""
        units.append(
            Unit(
                id=f"{name}-{number:05d}",
                kind="folder",
                path=path,
                start=start,
                stop=start + len(part),
                num_rows=len(part),
                fingerprint=_fingerprint(part, _keys(part, before), sizes),
                name=name,
                files=part,
                file_before=before,
            )
        )
    return units


def read_folder(unit: Unit, with_images: bool) -> Iterator[Sample]:
    """Yield the images of a slice in order."""
    for key, file in zip(_keys(unit.files, unit.file_before), unit.files, strict=True):
        path = os.path.join(unit.path, file)
        yield load_sample(f"{unit.name}/{key}", path, _caption(path), with_images)


def _caption(image_path: str) -> str | None:
    try:
        with open(split_extension(image_path)[0] + ".txt", "rb") as file:
            return caption_text(file.read(MAX_CAPTION_BYTES))
    except OSError as error:
        if not is_missing(error):
            why = f"{error.strerror}; check the storage, then run again"
            raise DataError(f"{image_path}: its caption cannot be read: {why}") from error
        return None


def _keys(files: Sequence[str], before: str) -> list[str]:
    """Name the first image of a stem by the stem, and `a.png` after `a.jpg` by `a~png`."""
    keys = []
    for previous, file in itertools.pairwise((before, *files)):
        stem, extension = split_extension(file)
        shared = split_extension(previous)[0] == stem
        keys.append(encode_path(stem) + (f"~{encode_name(extension)}" if shared else ""))
    return keys


def _fingerprint(files: Sequence[str], keys: Sequence[str], sizes: dict[str, int]) -> str:
    facts = [
        (key, file, sizes[file], sizes.get(split_extension(file)[0] + ".txt"))
        for key, file in zip(keys, files, strict=True)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _walk(top: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `top`, size in bytes) of images and captions; -1 for dangling links."""
    seen = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(os.path.join(top, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(top, folder)) as scan:
                entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
            below = [os.path.join(folder, e.name) for e in entries if e.is_dir()]
        except OSError as error:
            where = os.path.join(top, folder)
            raise DataError(f"{where}: cannot be listed: {error.strerror}; check its permissions") from error
        folders += reversed(below)
        for entry in entries:
            if (is_image(entry.name) or entry.name.endswith(".txt")) and not entry.is_dir():
                yield os.path.join(folder, entry.name), _size_bytes(entry)


def _size_bytes(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
