"""The image stage of `extract`: images to VAE posteriors, one unit after another."""

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.engine import Engine
from pipelines.features import FeatureWriter, read_part, rejected_keys
from pipelines.pictures import read_pictures
from pipelines.worker import Report
from pixart_data.buckets import Bucket, nearest_bucket, place
from pixart_data.commits import Record
from pixart_data.records import IMAGE_INDEX, Reason
from pixart_data.sections import ImageFeatures, Source
from pixart_data.shards import MOMENTS
from pixart_data.sources import Unit

if TYPE_CHECKING:
    from pixart_data.images import Decoded


@dataclass
class _Canvas:
    """Pictures of one bucket that wait for a full batch."""

    bucket: Bucket
    pixels: list[Any] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


class ImageStage:
    """VAE posteriors of one unit after another.

    `expected` is the image preparation that the driver put into the records.

    Raises:
        JobError: If images are prepared otherwise on this machine.
    """

    def __init__(self, root: Path, source: Source, config: ImageFeatures, expected: str | None = None) -> None:
        from pixart_data.canvases import require
        from pixart_data.encoders import ImageEncoder

        if expected is not None:
            require(expected)
        self.root, self.source, self.config = root, source, config
        self.buckets = config.table
        self.encoder = Engine(ImageEncoder(config))

    def __call__(self, unit: Unit, report: Report) -> Record:
        """Write the unit's shards and index part and return its record."""
        with self._writer(unit) as writer:
            self._write(writer, unit, report)
            return writer.record(writer.finish(IMAGE_INDEX), self.encoder.model.facts)

    def retry(self, unit: Unit, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Encode the images again that were rejected for one of `reasons`, into shards beside the unit's others."""
        with self._writer(unit) as writer:
            self._write(writer, unit, report, rejected_keys(read_part(self.root, record), reasons))
            return writer.record(writer.finish(IMAGE_INDEX, record), self.encoder.model.facts)

    def _writer(self, unit: Unit) -> FeatureWriter:
        return FeatureWriter(self.root, unit.id, MOMENTS)

    def _write(self, writer: FeatureWriter, unit: Unit, report: Report, keys: Set[str] | None = None) -> None:
        canvases: dict[str, _Canvas] = {}
        num_rejected = 0
        batch_size, buckets = self.config.batch_size, self.buckets
        pictures = read_pictures(unit, self.source, batch_size, buckets=buckets, then=self._place, keys=keys)
        for count, picture in enumerate(pictures, 1):
            if picture.placed is None:
                writer.reject(picture.sample.key, picture.error or Reason.NO_IMAGE, picture.detail)
                num_rejected += 1
            else:
                bucket, pixels, row = picture.placed
                canvas = canvases.setdefault(bucket.ratio, _Canvas(bucket))
                canvas.pixels.append(pixels)
                canvas.rows.append({"key": picture.sample.key, **row})
                if len(canvas.rows) == self.config.batch_size:
                    self._encode(canvas, writer)
            report(count, num_rejected)
        for canvas in canvases.values():
            self._encode(canvas, writer)

    def _place(self, decoded: "Decoded") -> tuple[Bucket, npt.NDArray[np.uint8], dict[str, Any]]:
        """Fit a picture to its bucket; returns the bucket, the pixels (H, W, 3), and what the index says of it."""
        from pixart_data.canvases import fit

        bucket = nearest_bucket(decoded.width_px, decoded.height_px, self.buckets)
        row = {
            "bucket": bucket.ratio,
            "height_px": bucket.height_px,
            "width_px": bucket.width_px,
            "original_width_px": decoded.width_px,
            "original_height_px": decoded.height_px,
            **asdict(place(decoded.width_px, decoded.height_px, bucket)),
            "image_ops": decoded.ops,
        }
        return bucket, fit(decoded, bucket), row

    def _encode(self, canvas: _Canvas, writer: FeatureWriter) -> None:
        if not canvas.rows:
            return
        pixels = np.stack(canvas.pixels)  # (B, H, W, 3)
        moments = self.encoder({"pixels": pixels})["moments"]  # (B, 2, C, h, w)
        mirrored: Any = [None] * len(moments)
        if self.config.flips:
            mirrored = self.encoder({"pixels": np.ascontiguousarray(pixels[:, :, ::-1])})["moments"]
        for row, values, flipped in zip(canvas.rows, moments, mirrored, strict=True):
            if np.isfinite(values).all() and (flipped is None or np.isfinite(flipped).all()):
                writer.add(canvas.bucket.ratio, [values], row, flipped)
            else:
                writer.reject(row["key"], Reason.NONFINITE_FEATURES, "the VAE gave values that fp16 cannot hold")
        canvas.pixels.clear()
        canvas.rows.clear()
