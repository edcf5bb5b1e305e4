"""The folders of the PixArt-alpha and PixArt-Sigma repositories: a list, a .npz of T5 and a .npy of VAE for each image.

A list is JSON, `[{"path", "prompt", "height", "width", "ratio"}]`, or, of SAM, a text file of ids. The features of the
image `a/b.png` are `<text folder>/a_b.npz` (`caption_feature` (1, L, D), `attention_mask` (1, L), 1 on true tokens) and
`<image folder>/a_b.npy` ((2C, h, w): mean and standard deviation, unscaled). Folder names differ between the loaders,
the misspelt `img_vae_fatures` of the multi-scale one included.
Source: InternalData.py, InternalData_ms.py and SA.py of both repositories, tools/extract_features.py.
"""

import hashlib
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pixart_data.arrivals import (
    Array,
    Arrival,
    Portion,
    Unusable,
    conversion,
    is_key,
    original_px,
    posterior,
    require_mask_size,
    require_text_size,
    tokens,
)
from pixart_data.confinement import stays_below
from pixart_data.errors import ConfigError, DataError
from pixart_data.lists import find_list, read_rows
from pixart_data.places import Local
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.storage import read_bytes
from pixart_data.stores import patiently, unreadable, words
from pixart_data.threads import ahead
from pixart_data.units import (
    MAX_FILE_BYTES,
    Unit,
    encode_name,
    encode_path,
    is_missing,
    read_caption,
    split_extension,
    storable,
)

IMAGE_FOLDERS = (
    "img_vae_features_{}resolution/noflip",
    "img_vae_fatures_{}_multiscale/ms",
    "img_vae_features_{}_multiscale/ms",
    "img_vae_feature/train_vae_{}/noflip",
    "img_sdxl_vae_features_{}resolution_new",
    "img_sdxl_vae_features_{}resolution_ms_new",
)
"""Of single-scale, multi-scale (twice), SAM and the two of Sigma; the resolution goes into the braces."""
TEXT_FOLDERS = ("caption_feature_wmask", "caption_features", "caption_features_new")
LIST_FOLDERS = ("partition", "partition_filter", "")
LIST = "data_info.json"

_DAMAGED = (
    ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError, RuntimeError, MemoryError, struct.error,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What numpy and zipfile raise for damaged files."""
_MAX_HEADER_BYTES = 1 << 14  # of a .npy: numpy reads as many at most
_MAX_ITEM_BYTES = 16
_THREADS, _AHEAD = 4, 8


@dataclass(frozen=True)
class References:
    """A folder of the reference's layout.

    Attributes:
        lists: Paths of the lists, below `root` or absolute; empty: those found in the usual folders.
        image_folder: Below `root`; None: the one there is of the usual names for `resolution_px`.
        text_folder: Likewise.
        num_channels: Of the latents.
        text_width: Of the text features; None: any.
    """

    root: Path
    lists: tuple[str, ...]
    image_folder: str | None
    text_folder: str | None
    caption_column: str
    resolution_px: int
    num_channels: int
    text_width: int | None
    rows_per_unit: int

    def portions(self) -> list[Portion]:
        """Cut the lists into units of work.

        Raises:
            ConfigError: If a list or a folder is missing, or more than one folder could be meant.
            DataError: If a list is not of a known form.
        """
        self._folder("image")
        self._folder("text")
        found = []
        for path in self._lists():
            stem = path.stem
            name = encode_name(self.root.name if path.name == LIST else f"{self.root.name}-{stem}")
            find = self._id_portions if path.suffix == ".txt" else self._json_portions
            found += find(path, name)
        ids = [portion.id for portion in found]
        twice = [first for first, second in itertools.pairwise(sorted(ids)) if first == second]
        if twice:
            raise ConfigError(f"lists: expected different file names, found two called {twice[0]}; import one of them")
        return found

    def images(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the posteriors of a portion.

        Raises:
            DataError: If the storage fails.
        """
        yield from ahead(partial(self._image, self._folder("image")), self._rows(portion), _THREADS, _AHEAD)

    def texts(self, portion: Portion) -> Iterator[Arrival]:
        """Yield the text features of a portion.

        Raises:
            DataError: If the storage fails.
        """
        yield from ahead(partial(self._text, self._folder("text")), self._rows(portion), _THREADS, _AHEAD)

    # Lists

    def _lists(self) -> list[Path]:
        if self.lists:
            paths = [self.root / name for name in self.lists]
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise ConfigError(f"lists: expected a file below {self.root}, found no {missing[0]}; check the name")
            return paths
        for folder in LIST_FOLDERS:
            place = self.root / folder
            paths = sorted([*place.glob("*.json"), *(place.glob("*.txt") if folder else [])])
            if paths:
                return paths
        raise ConfigError(
            f"path: expected lists in {self.root}/partition, {self.root}/partition_filter or {self.root}/{LIST}, found "
            "none; name them with --set 'lists=[\"FILE\"]'"
        )

    def _source(self, path: Path) -> Source:
        return Source(paths=[str(path)], layout="list", rows_per_unit=self.rows_per_unit)

    def _json_portions(self, path: Path, name: str) -> list[Portion]:
        try:
            units = find_list(str(path), name, self._source(path), Local())
        except ConfigError as error:
            raise ConfigError(
                f"lists: {path}: expected a JSON list of objects, each with the `path` of an image, found none; leave "
                "this file out of `lists`"
            ) from error
        return [Portion(unit.id, unit.fingerprint, unit.num_rows, unit) for unit in units]

    def _id_portions(self, path: Path, name: str) -> list[Portion]:
        ids = [line for line in read_bytes(path).decode("utf-8", "replace").split() if line]
        portions = []
        for number, start in enumerate(range(0, len(ids), self.rows_per_unit)):
            some = tuple(ids[start : start + self.rows_per_unit])
            fingerprint = hashlib.sha256("\n".join(some).encode()).hexdigest()
            portions.append(Portion(f"{name}-{number:05d}", fingerprint, len(some), (name, some)))
        return portions

    def _rows(self, portion: Portion) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
        if isinstance(portion.content, Unit):
            yield from read_rows(portion.content, self._source(Path(portion.content.path)))
            return
        name, ids = portion.content
        for one in ids:
            yield f"{name}/{encode_path(one)}", {"path": f"{one}.jpg", "id": one}

    # Features

    def _folder(self, kind: str) -> Path:
        """Return the folder of a kind of features, "image" or "text"."""
        given = self.image_folder if kind == "image" else self.text_folder
        if given is not None:
            if not (self.root / given).is_dir():
                raise ConfigError(f"{kind}.folder: expected a folder in {self.root}, found no {given}; check the name")
            return self.root / given
        known = [name.format(self.resolution_px) for name in IMAGE_FOLDERS] if kind == "image" else TEXT_FOLDERS
        found = [name for name in known if (self.root / name).is_dir()]
        if len(found) == 1:
            return self.root / found[0]
        what = f"{', '.join(found)}; choose" if found else f"none of {', '.join(known)}; name it"
        where = f" for {self.resolution_px} px" if kind == "image" else ""
        raise ConfigError(
            f"path: expected one folder of {kind} features{where} in {self.root}, found {what} with "
            f"--set {kind}.folder=FOLDER"
        )

    def _image(self, folder: Path, row: tuple[str, Mapping[str, Any] | str]) -> Arrival:
        key, content = row
        try:
            key, path = _named(key, content)
            array = _read_npy(_feature_file(folder, path, ".npy"))
            with conversion(path):
                values = posterior(array, self.num_channels)
        except Unusable as why:
            return Arrival(key, error=why.reason, detail=storable(why.detail))
        return Arrival(key, values, original_px=_size(content))

    def _text(self, folder: Path, row: tuple[str, Mapping[str, Any] | str]) -> Arrival:
        key, content = row
        try:
            key, path = _named(key, content)
            feature, mask = read_npz(_feature_file(folder, path, ".npz"), self.text_width)
            with conversion(path):
                values = tokens(feature, mask, self.text_width)
        except Unusable as why:
            return Arrival(key, error=why.reason, detail=storable(why.detail))
        return Arrival(key, values, self._caption(content), num_padded=feature.shape[-2])

    def _caption(self, content: Mapping[str, Any] | str) -> str | None:
        if isinstance(content, str):
            return None
        if content.keys() == {"path", "id"}:  # of a list of ids
            if not stays_below(f"{content['id']}.txt"):
                return None
            return read_caption(str(self.root / "captions" / f"{content['id']}.txt"))
        caption = content.get(self.caption_column)
        return storable(caption).strip() if isinstance(caption, str) else None


def flat_name(path: str, extension: str) -> str:
    """Return what the reference calls the features of an image: the last slash becomes `_`, `.png` the extension."""
    return "_".join(split_extension(path)[0].rsplit("/", 1)) + extension


def read_npz(path: Path, width: int | None) -> tuple[Array, Array | None]:
    """Return `caption_feature` and `attention_mask`, None if there is none, of a .npz.

    Raises:
        Unusable: If the file is missing or damaged, or would inflate to more than a caption's features of `width`.
        DataError: If the storage fails.
    """
    data = read_file(path)
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            held = set(archive.namelist())
            mask = _unzipped(archive, "attention_mask", require_mask_size) if "attention_mask.npy" in held else None
            return _unzipped(archive, "caption_feature", partial(require_text_size, width=width)), mask
    except _DAMAGED as error:
        raise Unusable(Reason.DAMAGED_FILE, f"{path}: {error}") from error


def _unzipped(archive: zipfile.ZipFile, name: str, require_size: Callable[[tuple[int, ...]], None]) -> Array:
    """Return an array of a .npz whose header, the only part that is inflated before, says that it is not too large."""
    with archive.open(f"{name}.npy") as file:
        head = BytesIO(file.read(_MAX_HEADER_BYTES))
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    require_size(shape)
    if dtype.itemsize > _MAX_ITEM_BYTES:
        raise ValueError(f"expected numbers, found {dtype}")
    with archive.open(f"{name}.npy") as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


def read_null_caption(path: Path, width: int | None) -> Array:
    """Return the text features (n, D) of the empty caption from a .npz.

    Raises:
        DataError: If they cannot be read, or are of another width.
    """
    try:
        feature, mask = read_npz(path, width)
        with conversion(str(path)):
            return tokens(feature, mask, width)
    except Unusable as why:
        raise DataError(
            f"{path}: expected the features of the empty caption as the reference stores a caption's: {why.detail}; "
            "give another file in text.null_caption, or none"
        ) from why


def _read_npy(path: Path) -> Array:
    data = read_file(path)
    try:
        array = np.load(BytesIO(data), allow_pickle=False)
    except _DAMAGED as error:
        raise Unusable(Reason.DAMAGED_FILE, f"{path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise Unusable(Reason.DAMAGED_FILE, f"{path}: expected an array, found a .npz")
    return array


def read_file(path: Path) -> bytes:
    """Return the content of a file of features.

    Raises:
        Unusable: If there is none, it is empty, or far too large for a sample.
        DataError: If the storage fails.
    """

    def read() -> bytes:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise Unusable(Reason.TOO_LARGE, f"{path}: {size_bytes:,} bytes")
        return path.read_bytes()

    try:
        data = patiently(read, str(path))
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise Unusable(Reason.MISSING_FILE, f"{str(path)!r}: {error}") from error
    except OSError as error:
        if not is_missing(error):
            raise unreadable(str(path), error) from error
        raise Unusable(Reason.MISSING_FILE, f"{path}: {words(error)}") from error
    if not data:
        raise Unusable(Reason.ZERO_BYTES, f"{path}: no bytes")
    return data


def _named(key: str, content: Mapping[str, Any] | str) -> tuple[str, str]:
    """Return key and path of a row; a key that a dataset of ours was exported with is taken as it is."""
    if isinstance(content, str):
        raise Unusable(Reason.BAD_ROW, content)
    path, own = content.get("path"), content.get("key")
    if not isinstance(path, str) or not path:
        raise Unusable(Reason.BAD_ROW, f"path: expected the path of an image, found {path!r:.80}")
    if not stays_below(path):
        raise Unusable(Reason.BAD_ROW, f"path: expected one below the folder, found {path!r:.80}")
    return own if is_key(own) else key, path


def _feature_file(folder: Path, path: str, extension: str) -> Path:
    """Return the file of an image's features; one that keeps the image's folders is found as well."""
    flat = folder / flat_name(path, extension)
    kept = folder / (split_extension(path)[0] + extension)
    return flat if flat == kept or os.path.lexists(flat) or not os.path.lexists(kept) else kept


def _size(content: Mapping[str, Any] | str) -> tuple[int, int] | None:
    if isinstance(content, str):
        return None
    return original_px([content.get(name) for name in ("height", "width")])
