"""Samples to pictures: decoded in threads while the model works on the ones before, in the order of the source."""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from pixart_data.buckets import Bucket
from pixart_data.records import Reason
from pixart_data.sections import Source
from pixart_data.sources import Sample, Unit, read_samples
from pixart_data.threads import ahead

if TYPE_CHECKING:
    from pixart_data.images import Decoded


@dataclass
class Picture:
    """A sample and its pixels, or the reason why it has none."""

    sample: Sample
    decoded: "Decoded | None" = None
    placed: Any = None
    error: Reason | None = None
    detail: str = ""


def read_pictures(
    unit: Unit,
    source: Source,
    batch_size: int,
    min_side_px: int | None = None,
    buckets: Sequence[Bucket] = (),
    then: "Callable[[Decoded], Any] | None" = None,
    keys: Set[str] | None = None,
) -> Iterator[Picture]:
    """Yield every sample of a unit, decoded.

    Args:
        batch_size: Two batches are decoded ahead.
        min_side_px: Lets JPEGs be decoded smaller, as long as both sides keep this many pixels.
        buckets: Lets JPEGs be decoded smaller, as far as the bucket of each allows.
        then: Done in the same thread; its result goes into `Picture.placed`, and the decoded image is dropped.
        keys: Only the samples with these; the images of the others are not read.
    """
    samples = read_samples(unit, source, keys=keys)
    sizes = {"max_pixels": source.max_image_pixels, "min_side_px": min_side_px, "buckets": buckets}
    return ahead(partial(_decode, sizes=sizes, then=then), samples, _num_threads(), 2 * batch_size)


def _num_threads() -> int:
    """Return the CPUs that Ray gave this worker, or 2 outside of one."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return 2
    return max(2, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 2)))


def _decode(sample: Sample, sizes: dict[str, Any], then: "Callable[[Decoded], Any] | None") -> Picture:
    """A bad image becomes a reason, never an exception."""
    from pixart_data.images import ImageRejected, decode

    if sample.error is not None or sample.data is None:
        return Picture(sample, error=sample.error or Reason.NO_IMAGE, detail=sample.detail)
    try:
        decoded = decode(sample.data, **sizes)
    except ImageRejected as rejected:
        return Picture(sample, error=rejected.reason, detail=rejected.detail)
    return Picture(sample, decoded) if then is None else Picture(sample, placed=then(decoded))
