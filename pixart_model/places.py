"""Where the tensors of a feature set lie, and reading them against their checksums."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.errors import DataError
from pixart_data.shards import FeatureSet

PLACE_COLUMNS = ["key", "shard", "offset_bytes", "size_bytes", "crc32"]

Rows = npt.NDArray[np.int64]


class Places:
    """The places of tensors, by the rows of a table that has the index's columns."""

    def __init__(self, features: FeatureSet, table: pa.Table) -> None:
        self.features, self._shards = features, table["shard"]
        self._columns = columns(table, ("offset_bytes", "size_bytes", "crc32"))

    def read(self, row: int, key: str, out: npt.NDArray[np.float16 | np.int16]) -> None:
        """Read a row's tensor into `out`, which is contiguous.

        Raises:
            DataError: Naming the sample, if it is damaged or not of this size.
        """
        place = {name: int(values[row]) for name, values in self._columns.items()}
        read_checked(self.features, self._shards[row].as_py(), place, key, out)


def read_checked(
    features: FeatureSet, shard: str, place: dict[str, Any], key: str, out: npt.NDArray[np.float16 | np.int16]
) -> None:
    """Read the tensor at a place into `out`, which is contiguous.

    Raises:
        DataError: Naming the sample, if it is damaged or not of this size.
    """
    if out.nbytes != int(place["size_bytes"]):
        tensor, dtype = features.manifest.tensor, features.manifest.dtype
        found = f"found {place['size_bytes']} bytes"
        raise DataError(f"{features.root}: {key}: expected {tensor} {out.shape} in {dtype}, {found}")
    data = out.reshape(-1).view(np.uint8).data
    features.read_into(shard, int(place["offset_bytes"]), data)
    if zlib.crc32(data) != int(place["crc32"]):
        raise DataError(
            f"{features.root / shard}: sample {key} is damaged: its checksum differs from the index; "
            f"`pixart verify {features.root}` names all such samples"
        )


def columns(table: pa.Table, names: Sequence[str]) -> dict[str, Rows]:
    """Return integer columns as arrays."""
    return {name: table[name].to_numpy().astype(np.int64) for name in names}
