"""Samples to pictures: decoded in threads while the model works on the ones before, in the order of the source."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import Sample, Unit, read_samples

if TYPE_CHECKING:
    from pixart_data.images import Decoded

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Picture:
    """A sample and its pixels, or the reason why it has none."""

    sample: Sample
    decoded: "Decoded | None" = None
    error: Reason | None = None
    detail: str = ""


def read_pictures(unit: Unit, source: Source, min_side_px: int | None = None) -> Iterator[Picture]:
    """Yield every sample of a unit, decoded.

    Args:
        min_side_px: Lets JPEGs be decoded smaller, as long as both sides keep this many pixels.
    """
    decode = partial(_decode, max_pixels=source.max_image_pixels, min_side_px=min_side_px)
    return ahead(decode, read_samples(unit, source))


def ahead(function: Callable[[T], R], items: Iterable[T], num_threads: int = 2, depth: int = 16) -> Iterator[R]:
    """Yield `function(item)` in the order of `items`, at most `depth` results ahead of the consumer."""
    with ThreadPoolExecutor(num_threads) as executor:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(executor.submit(function, item))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _decode(sample: Sample, max_pixels: int, min_side_px: int | None) -> Picture:
    """A bad image becomes a reason, never an exception."""
    from pixart_data.images import ImageRejected, decode

    if sample.error is not None or sample.data is None:
        return Picture(sample, None, sample.error or Reason.NO_IMAGE, sample.detail)
    try:
        decoded = decode(sample.data, max_pixels=max_pixels, min_side_px=min_side_px)
    except ImageRejected as rejected:
        return Picture(sample, None, rejected.reason, rejected.detail)
    return Picture(sample, decoded)
