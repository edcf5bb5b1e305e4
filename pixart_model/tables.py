"""Tables beside a feature set: its own index, and those that a job file names, which are joined to it by key.

They are read in batches, and of them only the columns that are asked for.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.commits import file_sha256
from pixart_data.entries import key_hashes
from pixart_data.errors import ConfigError, DataError
from pixart_data.shards import FeatureSet
from pixart_model.draws import Words

KEY = "key"

_BATCH_ROWS = 1 << 16


def open_table(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        DataError: If it is missing, or is none.
    """
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; check the path, or copy the file again") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a Parquet table: {error}; write or copy it again") from error


def open_index(features: FeatureSet) -> Any:
    """Open the index of a set.

    Raises:
        DataError: If it is missing, or not the one that the set was sealed with: its rows would be taken for others.
    """
    index = open_table(features.index_path)
    if file_sha256(features.index_path) != features.manifest.index_sha256:
        raise DataError(
            f"{features.index_path}: damaged, or of another set; run `pixart extract` again: it is rewritten from its "
            "parts"
        )
    return index


def batches(file: Any, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield rows of a table, each time with the number of the first."""
    first = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
        yield first, pa.Table.from_batches([batch])
        first += batch.num_rows


def read_keyed(setting: str, path: Path, file: Any, columns: Sequence[str]) -> tuple[Words, pa.Table]:
    """Read columns of a table by key: the hashes of its keys, and the columns; both (rows,).

    Args:
        setting: The key of the job file that names the table.

    Raises:
        ConfigError: If it has no column of keys.
        DataError: If rows have no key.
    """
    schema = file.schema_arrow
    if KEY not in schema.names:
        raise ConfigError(f"{setting}: {path}: expected a column {KEY}, found {', '.join(schema.names)}; rename one")
    kind = schema.field(KEY).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ConfigError(
            f"{setting}: {path}: expected texts in column {KEY}, the keys of images, found {kind}; write them as text"
        )
    hashes, found = [np.empty(0, np.uint64)], [schema.empty_table().select(columns)]
    without = 0
    for _, rows in batches(file, [KEY, *columns]):
        keys = rows[KEY].to_pylist()
        without += keys.count(None)
        hashes.append(key_hashes(key or "" for key in keys))
        found.append(rows.select(columns))
    if without:
        raise DataError(f"{path}: expected a key in each row, found none in {without} rows; delete those rows")
    return np.concatenate(hashes), pa.concat_tables(found)


def rows_of(path: Path, hashes: Words, images: FeatureSet) -> npt.NDArray[np.int64]:
    """Return the row in a table of each row of an image set's index, by key; -1 where there is none.

    Args:
        path: Of the table, for messages.
        hashes: Of its keys.

    Raises:
        DataError: If a key is there twice.
    """
    order = np.argsort(hashes, kind="stable")
    ascending = hashes[order]
    twice = np.flatnonzero(ascending[1:] == ascending[:-1])
    if len(twice):
        numbers = sorted(order[twice[0] : twice[0] + 2].tolist())
        more = f" with the same, and {len(twice) - 1} more that repeat a key" if len(twice) > 1 else " with the same"
        raise DataError(
            f"{path}: expected one row for each key, found rows {numbers[0]} and {numbers[1]}{more}; keep one of each"
        )
    keys = np.zeros(len(images), np.uint64)
    keys[images.entries["row"]] = images.entries["key"]
    rows = np.full(len(keys), -1, np.int64)
    if len(ascending):
        places = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
        same = ascending[places] == keys
        rows[same] = order[places[same]]
    return rows
