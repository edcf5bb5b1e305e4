"""The stages of `extract`: images to VAE posteriors and captions to T5 features, one unit after another."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.engine import Engine
from pipelines.pictures import read_pictures
from pipelines.worker import Report
from pixart_data.buckets import Bucket, bucket_table, nearest_bucket, place
from pixart_data.captions import CaptionFile, CaptionRow, read_captions
from pixart_data.commits import PublishedFile, Record, publish, publish_table, read_table
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX, Reason
from pixart_data.sections import ImageFeatures, Source, TextFeatures
from pixart_data.shards import INDEX_PARTS, ShardWriter
from pixart_data.sources import Unit, read_samples
from pixart_data.storage import discard, staging_path

if TYPE_CHECKING:
    from pixart_data.images import Decoded

NULL_UNIT = "null-caption"
TEXT_SHARDS = "shards"
_TEXT_ROWS_PER_READ = 1024


class FeatureWriter:
    """The open shards of one unit, one for each folder, and the rows of its index part.

    To be used in a `with`: shards that were not published do not outlast it.
    """

    def __init__(self, root: Path, unit: str, tensor: str, dtype: str) -> None:
        self.root, self.unit, self.tensor, self.dtype = root, unit, tensor, dtype
        self.rows: list[dict[str, Any]] = []
        self._writers: dict[str, ShardWriter] = {}

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.discard()

    def add(self, folder: str, values: Any, row: dict[str, Any]) -> None:
        """Write a tensor to the unit's shard in `folder` and its row to the index; row["shard"] is set at the end."""
        writer = self._writers.get(folder)
        if writer is None:
            staged = staging_path(self.root / folder, f"{self.unit}.tar")
            try:
                writer = self._writers[folder] = ShardWriter(staged, self.tensor, self.dtype)
            except BaseException:
                discard(staged)
                raise
        self.rows.append({**row, "shard": folder, **asdict(writer.add(row["key"], values))})

    def reject(self, key: str, error: Reason, detail: str) -> None:
        """Write a rejected row to the index."""
        self.rows.append({"key": key, "error": str(error), "detail": detail or None})

    def finish(self, schema: pa.Schema | None, before: Record | None = None) -> list[PublishedFile]:
        """Publish the shards, then the index part (none without a schema), and return them all.

        With a record, the rows written here take the places of those with the same keys in its index part; its shards
        stay as they are.
        """
        shards = {}
        for folder, writer in self._writers.items():
            writer.close()
            shards[folder] = publish(writer.path, self.root, self.root / folder, self.unit, ".tar")
        for row in self.rows:
            if "shard" in row:
                row["shard"] = shards[row["shard"]].path
        files = list(shards.values())
        if before is not None:
            won = {row["key"]: row for row in self.rows}
            self.rows = [won.get(row["key"], row) for row in read_part(self.root, before).to_pylist()]
            files = [file for file in before.files if not _is_index_part(file)] + files
        if schema is not None:
            table = pa.Table.from_pylist(self.rows, schema=schema)
            files.append(publish_table(table, self.root, self.root / INDEX_PARTS, self.unit))
        return files

    def record(self, files: list[PublishedFile], facts: dict[str, Any]) -> Record:
        """Return the unit's record; the driver fills in what decided it."""
        rejected = Counter(row["error"] for row in self.rows if row.get("error"))
        rows_out = len(self.rows) - rejected.total()
        return Record(self.unit, "", {}, len(self.rows), rows_out, dict(rejected), files, facts=facts)


def read_part(root: Path, record: Record) -> pa.Table:
    """Return the index part of a unit that is done."""
    [part] = [file for file in record.files if _is_index_part(file)]
    return read_table(root / part.path)


def _is_index_part(file: PublishedFile) -> bool:
    return file.path.startswith(f"{INDEX_PARTS}/")


def rejected_keys(rows: pa.Table, reasons: Sequence[str]) -> set[str]:
    """Return the keys of the rows that were rejected for one of `reasons`."""
    rejected = rows.filter(pc.is_in(rows["error"], value_set=pa.array(reasons, pa.string())))
    return set(rejected["key"].to_pylist())


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
        self.buckets = bucket_table(config.resolution_px)
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
        return FeatureWriter(self.root, unit.id, "moments", "F16")

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
        moments = self.encoder({"pixels": np.stack(canvas.pixels)})["moments"]  # (B, 2, C, h, w)
        for row, values in zip(canvas.rows, moments, strict=True):
            if np.isfinite(values).all():
                writer.add(canvas.bucket.ratio, values, row)
            else:
                writer.reject(row["key"], Reason.NONFINITE_FEATURES, "the VAE gave values that fp16 cannot hold")
        canvas.pixels.clear()
        canvas.rows.clear()


@dataclass(frozen=True)
class NullCaption:
    """The unit that encodes the empty string: what caption dropout and guidance use, stored with the dataset."""

    id: str = NULL_UNIT
    fingerprint: str = ""


class TextStage:
    """T5 features of one unit after another."""

    def __init__(self, root: Path, source: Source | None, column: str, config: TextFeatures) -> None:
        from pixart_data.encoders import TextEncoder

        self.root, self.source, self.column = root, source, column
        self.encoder = Engine(TextEncoder(config))

    def __call__(self, unit: Unit | CaptionFile | NullCaption, report: Report) -> Record:
        """Write the unit's shard and index part and return its record."""
        with self._writer(unit) as writer:
            if isinstance(unit, NullCaption):
                return self._null(writer)
            self._write(writer, unit, report)
            return writer.record(writer.finish(TEXT_INDEX), self.encoder.model.facts)

    def retry(self, unit: Unit | CaptionFile, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Encode the captions again that were rejected for one of `reasons`, into a shard beside the unit's other."""
        with self._writer(unit) as writer:
            self._write(writer, unit, report, rejected_keys(read_part(self.root, record), reasons))
            return writer.record(writer.finish(TEXT_INDEX, record), self.encoder.model.facts)

    def _writer(self, unit: Unit | CaptionFile | NullCaption) -> FeatureWriter:
        return FeatureWriter(self.root, unit.id, "t5", "BF16")

    def _write(
        self, writer: FeatureWriter, unit: Unit | CaptionFile, report: Report, keys: Set[str] | None = None
    ) -> None:
        held: list[CaptionRow] = []
        num_rejected = 0
        rows = (row for row in self._captions(unit) if keys is None or row.key in keys)
        for count, row in enumerate(rows, 1):
            if row.error is not None or row.caption is None:
                writer.reject(row.key, row.error or Reason.NO_CAPTION, row.detail)
                num_rejected += 1
            else:
                held.append(row)
            if len(held) == _TEXT_ROWS_PER_READ:
                self._encode(held, writer)
            report(count, num_rejected)
        self._encode(held, writer)

    def _captions(self, unit: Unit | CaptionFile) -> Iterator[CaptionRow]:
        if isinstance(unit, CaptionFile):
            yield from read_captions(unit, self.column, need_key=True)
        elif self.source is not None:
            for sample in read_samples(unit, self.source, with_images=False):
                missing = (Reason.NO_CAPTION, "the source has no caption for it") if not sample.caption else (None, "")
                error, detail = (sample.error, sample.detail) if sample.error else missing
                yield CaptionRow(sample.key, sample.caption, error, detail)

    def _encode(self, held: list[CaptionRow], writer: FeatureWriter) -> None:
        if not held:
            return
        batch = self.encoder({"caption": [row.caption for row in held]})
        for i, row in enumerate(held):
            fields = {"key": row.key, "caption": batch["caption"][i], "truncated": batch["truncated"][i]}
            if batch["finite"][i]:
                writer.add(TEXT_SHARDS, batch["t5"][i], {**fields, "num_tokens": len(batch["t5"][i])})
            else:
                writer.reject(row.key, Reason.NONFINITE_FEATURES, "T5 gave infinite values; use text.dtype = 'bf16'")
        held.clear()

    def _null(self, writer: FeatureWriter) -> Record:
        values = self.encoder({"caption": [""]})["t5"][0]
        writer.add(TEXT_SHARDS, values, {"key": NULL_UNIT, "num_tokens": len(values)})
        [file] = writer.finish(schema=None)
        place = {name: writer.rows[0][name] for name in ("offset_bytes", "size_bytes", "crc32", "num_tokens")}
        facts = {**self.encoder.model.facts, "null": {"path": file.path, **place}}
        return Record(writer.unit, "", {}, 0, 0, {}, [file], facts=facts)
