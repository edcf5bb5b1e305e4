"""The samples that a query chooses: `data.where` over the index of an image set, and scores joined to it by key."""

import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.errors import ConfigError
from pixart_data.queries import Query, parse
from pixart_data.shards import FeatureSet
from pixart_data.storage import require_there
from pixart_model.tables import KEY, batches, open_index, open_table, read_keyed, rows_of

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
    index = open_index(images)
    table = _Scores(scores, query, index.schema_arrow.names, images) if scores is not None else None
    further = [] if table is None else table.names
    advice = "" if table else "a table with other columns, by key, can be named as data.scores"
    query.require([*index.schema_arrow.names, *further], lambda _: advice)
    columns = [name for name in index.schema_arrow.names if name in query.columns]
    mask = np.zeros(index.metadata.num_rows, np.bool_)
    for first, rows in batches(index, columns or [KEY]):
        both = rows if table is None else table.beside(rows, first)
        mask[first : first + rows.num_rows] = query.mask(both)
    _log.info("%s: %d of %d rows match %s", images.root, np.count_nonzero(mask), len(mask), where)
    return mask


def narrowed(where: str | None, query: str) -> str:
    """Return `data.where` as a job file would have it, quotes included, with one more condition."""
    both = query if where is None else f"({where}) and {query}"
    return json.dumps(both) if "'" in both or "\n" in both else f"'{both}'"  # nothing is escaped in single quotes


class _Scores:
    """Columns of a table of scores, to be put beside rows of an index.

    Attributes:
        names: The columns that the table has, but for the key.
    """

    def __init__(self, path: Path, query: Query, taken: list[str], images: FeatureSet) -> None:
        require_there(path, "data.scores")
        file = open_table(path)
        names = file.schema_arrow.names
        twice = sorted(query.columns & set(names) & set(taken) - {KEY})
        if twice:
            raise ConfigError(f"data.scores: {path}: column {twice[0]} is in the index too; rename it in one of them")
        self.names = [name for name in names if name != KEY]
        wanted = [name for name in self.names if name in query.columns]
        hashes, self._table = read_keyed("data.scores", path, file, wanted)
        self._rows = rows_of(path, hashes, images)
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
