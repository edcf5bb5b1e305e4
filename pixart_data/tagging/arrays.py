"""Captions as bytes: whatever Arrow array holds them, compiled code gets one form of it, mostly without a copy."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.errors import DataError


class Texts(NamedTuple):
    """The UTF-8 of many captions, one after another.

    Attributes:
        data: All bytes; between captions there may be some that belong to none.
        offsets: Where each caption begins, and the end of the last one's, (N + 1,).
        present: False for nulls, whose bytes mean nothing, (N,).

    All are aligned and read-only, for otherwise compiled code would be compiled once more.
    """

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    present: npt.NDArray[np.bool_]

    def text(self, caption: int) -> str:
        """Return one caption as a string."""
        start, stop = self.offsets[caption : caption + 2]
        return self.data[start:stop].tobytes().decode()


_PLAIN = (pa.types.is_string, pa.types.is_large_string)
_CAST = (pa.types.is_string_view, pa.types.is_null)


def text_type(captions: pa.Array | pa.ChunkedArray) -> pa.DataType:
    """Return the type of captions, that of its values for a dictionary: string, large_string, string_view or null.

    Raises:
        DataError: If it is another.
    """
    kind = captions.type.value_type if pa.types.is_dictionary(captions.type) else captions.type
    if not any(check(kind) for check in (*_PLAIN, *_CAST)):
        raise DataError(f"captions: expected texts, found {captions.type}; name the column that holds the captions")
    return kind


def texts(captions: pa.Array | pa.ChunkedArray) -> Texts:
    """Return the bytes of captions of type string, large_string, string_view or null, or of a dictionary of those.

    Bytes that are no UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`.

    Raises:
        DataError: If the array is of another type.
    """
    kind = text_type(captions)
    if kind != captions.type or any(check(kind) for check in _CAST):
        captions = captions.cast(pa.large_string())
    if isinstance(captions, pa.ChunkedArray):
        # As large strings, more than 2 GiB fit into one array.
        captions = captions.chunk(0) if captions.num_chunks == 1 else _joined(captions)
    try:
        captions.validate(full=True)
    except pa.ArrowInvalid:
        captions = _repaired(captions)
    return _buffers(captions)


def _joined(captions: pa.ChunkedArray) -> pa.Array:
    joined = captions.cast(pa.large_string()).combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def _repaired(captions: pa.Array) -> pa.Array:
    raw: list[Any] = captions.cast(pa.large_binary()).to_pylist()
    return pa.array([None if value is None else value.decode("utf-8", "replace") for value in raw], pa.large_string())


def _buffers(captions: pa.Array) -> Texts:
    count, width = len(captions), np.int64 if pa.types.is_large_string(captions.type) else np.int32
    _, offsets, data = captions.buffers()
    if offsets is None or not count:
        found = Texts(np.empty(0, np.uint8), np.zeros(count + 1, np.int64), np.zeros(count, np.bool_))
    else:
        bounds = np.frombuffer(offsets, width, count + 1, captions.offset * np.dtype(width).itemsize)
        found = Texts(
            np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8),
            np.require(bounds, np.int64, "A"),
            captions.is_valid().to_numpy(zero_copy_only=False),
        )
    for array in found:
        array.flags.writeable = False
    return found
