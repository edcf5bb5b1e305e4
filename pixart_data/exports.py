"""A dataset in the layouts of other tools: the reference's folders, or MDS.

An export is cut into portions, each written whole before `export.jsonl` counts it: what a kill left half done is
written again, what was counted is not. The list or the index, by which the other tool finds the samples, comes last.
"""

import itertools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pixart_data import mds
from pixart_data.arrivals import NULL_CAPTION, widened
from pixart_data.buckets import bucket_table
from pixart_data.confinement import is_plain
from pixart_data.entries import key_hashes
from pixart_data.errors import ConfigError, DataError
from pixart_data.mosaics import COLUMNS
from pixart_data.pairs import Bits, Pair, Pairs
from pixart_data.references import LIST, flat_name
from pixart_data.retries import storage
from pixart_data.storage import TEMPORARY, make_dir, read_bytes, write_atomic
from pixart_data.threads import ahead

PROGRESS = "export.jsonl"
MOSAIC_BYTES = 1 << 26
"""MDS shards are filled up to this, the library's own default."""

_FORMAT, _VERSION = "pixart-export", 1
_ROWS_PER_PORTION = 1000
_THREADS, _AHEAD = 2, 8


class Layout(Protocol):
    """What samples are exported to."""

    def portions(self) -> list[tuple[int, int]]:
        """Return first row and end of each portion."""

    def write(self, number: int, pairs: Sequence[Pair]) -> dict[str, Any] | None:
        """Write a portion, and return what `finish` needs to know of it."""

    def finish(self, notes: Sequence[dict[str, Any]]) -> None:
        """Write what the other tool starts from."""


@dataclass(frozen=True)
class MosaicLayout:
    """MDS shards with the columns `mosaics.COLUMNS`."""

    out: Path
    pairs: Pairs

    def portions(self) -> list[tuple[int, int]]:
        """Return the rows of each shard, by the sizes in the index."""
        width = self.pairs.texts.manifest.model["width"]
        captions = pc.fill_null(pc.binary_length(self.pairs.text_rows["caption"]), 0).to_numpy()
        tokens = self.pairs.text_rows["num_tokens"].to_numpy().astype(np.int64)
        sizes = self.pairs.image_rows["size_bytes"].to_numpy() + tokens * width * 2 + captions + 256
        bounds, filled = [0], 0
        for row, size_bytes in enumerate(sizes.tolist()):
            if filled and filled + size_bytes > MOSAIC_BYTES:
                bounds.append(row)
                filled = 0
            filled += size_bytes
        return list(itertools.pairwise([*bounds, len(sizes)]))

    def write(self, number: int, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Write a shard and return its entry in the index."""
        samples = list(ahead(self._sample, pairs, _THREADS, _AHEAD))
        return mds.write_shard(self.out, number, COLUMNS, samples)

    def _sample(self, pair: Pair) -> dict[str, Any]:
        sizes = {name: pair.image[name] for name in ("original_height_px", "original_width_px")}
        values = {"moments": self.pairs.moments(pair), "t5": self.pairs.text(pair)}
        return {"key": pair.image["key"], "caption": pair.text["caption"] or "", **values, **sizes}

    def finish(self, notes: Sequence[dict[str, Any]]) -> None:
        """Write the index."""
        mds.write_index(self.out, notes)


@dataclass(frozen=True)
class ReferenceLayout:
    """The folders that the reference's `InternalData` reads, or `InternalDataMS` where there are other canvases."""

    out: Path
    pairs: Pairs

    def portions(self) -> list[tuple[int, int]]:
        """Return rows by the thousand.

        Raises:
            DataError: If the reference would call two samples the same, or a key is a path out of the export.
        """
        keys = self.pairs.image_rows["key"].to_pylist()
        bad = next((key for key in keys if not is_plain(key)), None)
        if bad is not None:
            raise DataError(
                f"{self.pairs.images.root}: expected keys that can be the paths of files in the export, found "
                f"{bad!r:.80}; leave such samples out with `pixart split {self.pairs.images.root.parent} --out DIR "
                "--where NAME=QUERY`, or export to mds"
            )
        hashes = key_hashes(flat_name(key, "") for key in keys)
        order = np.argsort(hashes, kind="stable")
        twice = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(twice):
            first, second = (keys[order[twice[0] + i]] for i in (0, 1))
            raise DataError(
                f"{self.pairs.images.root}: expected keys that differ when their last slash becomes an underscore, as "
                f"the reference names files, found {first} and {second}; split the dataset and export the parts"
            )
        return [(at, min(at + _ROWS_PER_PORTION, len(keys))) for at in range(0, len(keys), _ROWS_PER_PORTION)]

    def write(self, number: int, pairs: Sequence[Pair]) -> None:
        """Write the files of some samples, and wait until they are on the disk."""
        for _ in ahead(self._write, pairs, _THREADS, _AHEAD):
            pass
        os.sync()  # one for all: flushing millions of small files one by one takes days

    def _write(self, pair: Pair) -> None:
        name = pair.image["key"]
        _put(self.out / self.image_folder / flat_name(name, ".npy"), _npy(self.pairs.moments(pair)))
        _put(self.out / "caption_feature_wmask" / flat_name(name, ".npz"), npz(self.pairs.text(pair), self.max_tokens))

    @cached_property
    def image_folder(self) -> str:
        """The folder of the latents: the reference's one for squares, or its misspelt one for many canvases."""
        resolution_px = self.pairs.images.manifest.policy["resolution_px"]
        square = {"1.00"} >= set(pc.unique(self.pairs.image_rows["bucket"]).to_pylist())
        name = "img_vae_features_{}resolution/noflip" if square else "img_vae_fatures_{}_multiscale/ms"
        return name.format(resolution_px)

    @cached_property
    def max_tokens(self) -> int:
        """The length that captions are padded to."""
        longest: int = pc.max(self.pairs.text_rows["num_tokens"]).as_py()
        return max(longest, int(self.pairs.texts.manifest.policy["max_tokens"]))

    def finish(self, notes: Sequence[dict[str, Any]]) -> None:
        """Write the list, in both folders where versions of the loaders look for it."""
        for folder in ("partition_filter", "partition"):
            path = self.out / folder / LIST
            with storage(path):
                make_dir(path.parent)
                staged = path.with_name(f"{TEMPORARY}{path.name}")
                with staged.open("w", encoding="utf-8") as file:
                    file.writelines(self._lines())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(staged, path)

    def _lines(self) -> Iterator[str]:
        for start in range(0, len(self.pairs), _ROWS_PER_PORTION):
            for number, pair in enumerate(self.pairs.rows(start, start + _ROWS_PER_PORTION), start):
                yield ("[\n" if number == 0 else ",\n") + json.dumps(listed(pair), ensure_ascii=False)
        yield "\n]\n"


_RATIOS = tuple(float(bucket.ratio) for bucket in bucket_table(256))


def listed(pair: Pair) -> dict[str, Any]:
    """Return a sample's row of the reference's list; `key` is ours, and brings the sample back under its name.

    The reference finds a sample's canvas anew from its size, by the nearest ratio on a linear scale, and leaves out
    what is taller than 4:1. Where that is not the canvas of the latents, the canvas itself is given as the size.
    """
    image = pair.image
    height, width = image["original_height_px"], image["original_width_px"]
    nearest = min(_RATIOS, key=lambda ratio: abs(ratio - height / width))
    if f"{nearest:.2f}" != image["bucket"] or height > 4 * width:
        height, width = image["height_px"], image["width_px"]
    path, prompt = f"{image['key']}.png", pair.text["caption"] or ""
    return {
        "path": path,
        "prompt": prompt,
        "height": height,
        "width": width,
        "ratio": height / width,
        "key": image["key"],
    }


def npz(bits: Bits, length: int) -> bytes:
    """Return a .npz of text features (n, D) as the reference stores them: fp32, padded with zeros, and a mask.

    Deflated at the fastest level: the default, which the reference takes, saves a tenth for eight times the work.
    """
    feature = np.zeros((1, length, bits.shape[1]), np.float32)
    feature[0, : len(bits)] = widened(bits)
    mask = (np.arange(length) < len(bits)).astype(np.int64)[None]
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in (("caption_feature", feature), ("attention_mask", mask)):
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, _npy_bytes(array), zipfile.ZIP_DEFLATED, 1)
    return packed.getvalue()


def _npy(moments: npt.NDArray[np.float16]) -> bytes:
    _, channels, height, width = moments.shape
    return _npy_bytes(moments.astype(np.float32).reshape(2 * channels, height, width))


def _npy_bytes(array: npt.NDArray[Any]) -> bytes:
    packed = BytesIO()
    np.lib.format.write_array(packed, array, allow_pickle=False)
    return packed.getvalue()


def _put(path: Path, data: bytes) -> None:
    """Write a file under a name of its own first; what a kill leaves is overwritten when the portion is done again."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{TEMPORARY}{path.name}")
        staged.write_bytes(data)
        os.replace(staged, path)


LAYOUTS: dict[str, type[MosaicLayout] | type[ReferenceLayout]] = {"mds": MosaicLayout, "reference": ReferenceLayout}


def export(pairs: Pairs, layout: str, out: Path) -> Iterator[int]:
    """Write an export, or what is left of it, and yield the number of samples that are done, at the start and then.

    Raises:
        ConfigError: If `out` holds something else.
        DataError: If a sample is damaged.
        JobError: If the storage fails.
    """
    target: Layout = LAYOUTS[layout](out, pairs)
    facts = {"format": _FORMAT, "version": _VERSION, "layout": layout, "dataset": pairs.identity()}
    portions = target.portions()
    notes = _progress(out, facts)
    for number, (start, stop) in enumerate(portions):
        if number >= len(notes):
            yield start
            notes.append(target.write(number, pairs.rows(start, stop)) or {})
            _count(out, notes[-1])
    null = pairs.null_caption()
    if null is not None:
        write_atomic(out / NULL_CAPTION, npz(null, len(null)))
    target.finish(notes)
    yield len(pairs)


def require_own(out: Path) -> None:
    """Check that a folder is empty, missing, or an export.

    Raises:
        ConfigError: If it is something else.
    """
    others = [path.name for path in out.iterdir() if path.name != ".lease"] if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output: expected a folder, found a file {out}; choose another with --out")
    if others and PROGRESS not in others:
        raise ConfigError(
            f"output: expected an empty folder or an export to go on with, found {min(others)} in {out}; choose "
            "another with --out"
        )


def _progress(out: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is noted of the portions that are done.

    The first line of the file says of what; a last line that a kill cut off counts for nothing and is cut away.
    """
    require_own(out)
    path = out / PROGRESS
    if not path.is_file():
        write_atomic(path, _line(facts))
        return []
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    try:
        theirs, *notes = map(json.loads, whole.splitlines())
    except ValueError as error:
        raise DataError(
            f"{path}: expected the progress of an export, found {error}; export to another folder"
        ) from error
    if theirs != dict(facts):
        raise ConfigError(
            f"output: {out} holds the export of another dataset, another state of it or another layout; choose another "
            "folder with --out, or delete this one"
        )
    with storage(path):
        os.truncate(path, len(whole))
    return notes


def _count(out: Path, note: Mapping[str, Any]) -> None:
    """Note that a portion is done."""
    path = out / PROGRESS
    with storage(path), path.open("ab") as file:
        file.write(_line(note))
        file.flush()
        os.fsync(file.fileno())


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"
