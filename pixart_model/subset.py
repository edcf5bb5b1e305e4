"""The samples that a query chooses: `data.where` over the index of an image set, and over scores joined to it by key.

Both tables are read in batches, and of them only the columns that the query names.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.commits import file_sha256
from pixart_data.entries import key_hashes
from pixart_data.errors import ConfigError, DataError
from pixart_data.queries import Query, parse
from pixart_data.shards import FeatureSet
from pixart_data.storage import require_there
from pixart_model.draws import Words

_KEY = "key"
_BATCH_ROWS = 1 << 16
_log = logging.getLogger(__name__)


def chosen(images: FeatureSet, where: str, scores: Path | None = None) -> npt.NDArray[np.bool_]:
    """Return which rows of an image set's index match a query; (rows,).

    Args:
        images: The image set.
        where: The query.
        scores: A Parquet table of further columns, by key. A row without one has no value there.

    Raises:
        ConfigError: If there are no scores at their path, the query is not one, or names a column that is in neither
            table, or in both.
        DataError: If a table cannot be read, or a key has two scores.
    """
    query = parse(where)
    index = _open(images.index_path)
    if file_sha256(images.index_path) != images.manifest.index_sha256:  # rows would be judged by other images' columns
        raise DataError(
            f"{images.index_path}: damaged, or of another set; run `pixart extract` again: it is rewritten from its "
            "parts"
        )
    table = _Scores(scores, query, index.schema_arrow.names, images) if scores is not None else None
    further = [] if table is None else table.names
    advice = "" if table else "a table with other columns, by key, can be named as data.scores"
    query.require([*index.schema_arrow.names, *further], lambda _: advice)
    columns = [name for name in index.schema_arrow.names if name in query.columns]
    mask = np.zeros(index.metadata.num_rows, np.bool_)
    for first, rows in _batches(index, columns or [_KEY]):
        both = rows if table is None else table.beside(rows, first)
        mask[first : first + rows.num_rows] = query.mask(both)
    _log.info("%s: %d of %d rows match %s", images.root, np.count_nonzero(mask), len(mask), where)
    return mask


class _Scores:
    """Columns of a table of scores, to be put beside rows of an index.

    Attributes:
        names: The columns that the table has, but for the key.
    """

    def __init__(self, path: Path, query: Query, taken: list[str], images: FeatureSet) -> None:
        require_there(path, "data.scores")
        file = _open(path)
        names = file.schema_arrow.names
        if _KEY not in names:
            raise ConfigError(f"data.scores: {path}: expected a column {_KEY}, found {', '.join(names)}; rename one")
        twice = sorted(query.columns & set(names) & set(taken) - {_KEY})
        if twice:
            raise ConfigError(f"data.scores: {path}: column {twice[0]} is in the index too; rename it in one of them")
        self.names = [name for name in names if name != _KEY]
        wanted = [name for name in self.names if name in query.columns]
        hashes, columns = [np.empty(0, np.uint64)], [file.schema_arrow.empty_table().select(wanted)]
        for _, rows in _batches(file, [_KEY, *wanted]):
            hashes.append(key_hashes(rows[_KEY].to_pylist()))
            columns.append(rows.select(wanted))
        self._table = pa.concat_tables(columns)
        self._rows = _rows_of(path, np.concatenate(hashes), images)
        without = int(np.count_nonzero(self._rows < 0))
        if without:
            _log.info("%s: %d of %d samples have no row here", path, without, len(self._rows))

    def beside(self, rows: pa.Table, first: int) -> pa.Table:
        """Return rows of the index, the first of which is row `first`, with the scores of each."""
        numbers = self._rows[first : first + rows.num_rows]
        scores = self._table.take(pa.array(numbers, mask=numbers < 0))
        for name in self._table.schema.names:
            rows = rows.append_column(name, scores[name])
        return rows


def _rows_of(path: Path, hashes: Words, images: FeatureSet) -> npt.NDArray[np.int64]:
    """Return the row in the table of scores of each row of the index; -1 where there is none."""
    order = np.argsort(hashes)
    ascending = hashes[order]
    twice = np.flatnonzero(ascending[1:] == ascending[:-1])
    if len(twice):
        numbers = sorted(order[twice[0] : twice[0] + 2].tolist())
        raise DataError(f"{path}: expected one row for each key, found rows {numbers[0]} and {numbers[1]}; delete one")
    keys = np.zeros(len(images), np.uint64)
    keys[images.entries["row"]] = images.entries["key"]
    rows = np.full(len(keys), -1, np.int64)
    if len(ascending):
        places = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
        same = ascending[places] == keys
        rows[same] = order[places[same]]
    return rows


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; check the path, or copy the file again") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a Parquet table: {error}; write or copy it again") from error


def _batches(file: Any, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield rows of a table, each time with the number of the first."""
    first = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
        yield first, pa.Table.from_batches([batch])
        first += batch.num_rows
