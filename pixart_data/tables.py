"""Parquet tables of which nobody knows yet whether they are whole: what is wrong with one is told as damage."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pixart_data.errors import DataError
from pixart_data.storage import is_remote


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say of a table that is read inside, perhaps from a copy, what is wrong with it; `path` is named.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: missing; run `pixart verify {path.parent}`, which says what to do") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # Parquet cut short is an OSError as well
        why = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read ({why}); run `pixart verify {path.parent}`") from error


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file on any storage; of one in an object store, what is asked for is fetched and no more.

    Raises:
        DataError: If it is missing or damaged.
    """
    with readable(path), contextlib.ExitStack() as stack:
        source = stack.enter_context(path.open("rb")) if is_remote(path) else path
        yield stack.enter_context(pq.ParquetFile(source))
