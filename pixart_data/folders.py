"""Folders of images, searched recursively, each image with an optional caption in a `.txt` of the same stem.

Hidden files and folders are left out. Links are followed; a folder that two names lead to is read once.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set

from pixart_data.errors import ConfigError
from pixart_data.places import Place
from pixart_data.sections import Source
from pixart_data.stores import is_url, read_ahead
from pixart_data.units import (
    Sample,
    Unit,
    encode_name,
    encode_path,
    is_image,
    load_sample,
    read_caption,
    split_extension,
)


def find_folder(path: str, name: str, source: Source, place: Place) -> list[Unit]:
    """Cut a folder into units.

    Raises:
        ConfigError: If there is no image in it.
        DataError: If a folder below it cannot be listed.
    """
    sizes = dict(place.walk(path))
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


def read_folder(unit: Unit, with_images: bool, wanted: Set[str] | None = None) -> Iterator[Sample]:
    """Yield the images of a slice in order.

    Args:
        wanted: Only the samples with these keys.

    Raises:
        DataError: If the storage fails.
    """

    def load(named: tuple[str, str]) -> Sample:
        key, path = named
        return load_sample(key, path, read_caption(split_extension(path)[0] + ".txt"), with_images)

    keys = (f"{unit.name}/{key}" for key in _keys(unit.files, unit.file_before))
    paths = (os.path.join(unit.path, file) for file in unit.files)
    named = (pair for pair in zip(keys, paths, strict=True) if wanted is None or pair[0] in wanted)
    yield from read_ahead(load, named, is_url(unit.path))


def _keys(files: Sequence[str], before: str) -> list[str]:
    """Name the first image of a stem by the stem, and `a.png` after `a.jpg` by `a~png`."""
    keys = []
    for previous, file in itertools.pairwise((before, *files)):
        stem, extension = split_extension(file)
        shared = split_extension(previous)[0] == stem
        keys.append(encode_path(stem) + (f"~{encode_name(extension)}" if shared else ""))
    return keys


def _fingerprint(files: Sequence[str], keys: Sequence[str], sizes: Mapping[str, int | str]) -> str:
    facts = [
        (key, file, sizes[file], sizes.get(split_extension(file)[0] + ".txt"))
        for key, file in zip(keys, files, strict=True)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
