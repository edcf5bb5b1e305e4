"""Samples of a dataset, image and text together, read and checked one by one: for what is no training."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from zlib_ng.zlib_ng import crc32

from pixart_data.calibrations import read_codec, split
from pixart_data.commits import MANIFEST, file_sha256
from pixart_data.errors import DataError
from pixart_data.shards import FeatureSet, tensor_shape
from pixart_data.tables import readable

_PLACE = ["key", "shard", "offset_bytes", "size_bytes", "crc32"]
_IMAGE = [*_PLACE, "bucket", "height_px", "width_px", "original_height_px", "original_width_px"]
_TEXT = [*_PLACE, "num_tokens", "caption"]

Row = Mapping[str, Any]
Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Pair:
    """The index rows of a sample in both sets."""

    image: Row
    text: Row


class Pairs:
    """The samples that an image set and a text set have in common, in the order of the image index.

    Raises:
        DataError: If a set is not finished, its index is not that of its manifest, or they have no key in common.
    """

    def __init__(self, image_root: Path, text_root: Path) -> None:
        self.images, self.texts = FeatureSet(image_root), FeatureSet(text_root)
        for features, kind in ((self.images, "image"), (self.texts, "text")):
            if features.manifest.kind != kind:
                raise DataError(
                    f"{features.root}: expected {kind} features, found {features.manifest.kind}; name another"
                )
        images, texts = _index(self.images, _IMAGE), _index(self.texts, _TEXT)
        texts = texts.set_column(_TEXT.index("caption"), "caption", texts["caption"].cast(pa.large_string()))
        number = pc.index_in(images["key"], value_set=texts["key"])
        both = number.is_valid()
        self.image_rows, self.text_rows = images.filter(both), texts.take(number.filter(both))
        if not len(self):
            raise DataError(
                f"{image_root} and {text_root}: expected samples in both, found no key in common; extract both from "
                "the same images"
            )
        self.codec = read_codec(text_root, self.texts.manifest)

    def __len__(self) -> int:
        return int(self.image_rows.num_rows)

    def rows(self, start: int, stop: int) -> list[Pair]:
        """Return the index rows of some samples."""
        parts = [table.slice(start, stop - start).to_pylist() for table in (self.image_rows, self.text_rows)]
        return [Pair(*rows) for rows in zip(*parts, strict=True)]

    def moments(self, pair: Pair) -> npt.NDArray[np.float16]:
        """Return a posterior (2, C, h, w), checked.

        Raises:
            DataError: If it is damaged.
        """
        data = _checked(self.images, pair.image, pair.image["key"])
        return data.view(np.float16).reshape(tensor_shape(pair.image, self.images.manifest))

    def text(self, pair: Pair) -> Bits:
        """Return text features (n, D) as bits of bf16, checked and decoded.

        Raises:
            DataError: If they are damaged.
        """
        return self._decoded(pair.text, pair.text["key"])

    def null_caption(self) -> Bits | None:
        """Return the features (n, D) of the empty caption as bits of bf16; None if the set has none.

        Raises:
            DataError: If they are damaged.
        """
        place = self.texts.manifest.model.get("null")
        return self._decoded({**place, "shard": place["path"]}, "the empty caption") if place else None

    def identity(self) -> str:
        """Return what changes when the samples do."""
        return hashlib.sha256(f"{self.images.manifest} {self.texts.manifest}".encode()).hexdigest()

    def close(self) -> None:
        """Close the shards."""
        self.images.close()
        self.texts.close()

    def _decoded(self, row: Row, name: str) -> Bits:
        import torch

        data = _checked(self.texts, row, name)
        arrays = split(self.codec, data, row["num_tokens"])
        bits: Bits = self.codec.decode_arrays(arrays).contiguous().view(torch.int16).numpy().view(np.uint16)
        return bits


def _index(features: FeatureSet, columns: list[str]) -> pa.Table:
    with readable(features.index_path):
        if file_sha256(features.index_path) != features.manifest.index_sha256:
            problem = f"damaged, or not the one that {MANIFEST} names"
            raise DataError(f"{features.index_path}: {problem}; `pixart verify {features.root}` says what to do")
        return pq.read_table(features.index_path, columns=columns)


def _checked(features: FeatureSet, row: Row, name: str) -> npt.NDArray[np.uint8]:
    data = np.empty(row["size_bytes"], np.uint8)
    features.read_into(row["shard"], row["offset_bytes"], data.data)
    if crc32(data) != row["crc32"]:
        raise DataError(
            f"{features.root / row['shard']}: {name}: damaged: its bytes do not fit their checksum; "
            f"`pixart verify {features.root}` names all that is"
        )
    return data
