"""The text stage of `extract`: captions to T5 features, one unit after another, stored by a codec."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.engine import Engine
from pipelines.features import FeatureWriter, read_part, rejected_keys
from pipelines.worker import Report
from pixart_data.captions import CaptionFile, CaptionRow, read_captions
from pixart_data.commits import PublishedFile, Record
from pixart_data.errors import DataError
from pixart_data.records import TEXT_INDEX, Reason
from pixart_data.sections import Source, TextFeatures
from pixart_data.sources import Unit, read_samples
from pixart_data.storage import exists, read_bytes, write_new
from pixart_data.texts import clean

if TYPE_CHECKING:
    from pixart_data.codecs import Codec, Measure

CALIBRATION = "codec.safetensors"
NULL_UNIT = "null-caption"
TEXT_SHARDS = "shards"
PLAIN_CODEC, LOSSY_CODEC = "bf16", "int8"
_TEXT_ROWS_PER_READ = 1024
_NOT_FINITE = "T5 gave infinite values; use text.dtype = 'bf16'"
_CALIBRATION_CAPTIONS = 1024  # some 80,000 tokens


@dataclass(frozen=True)
class NullCaption:
    """The unit that encodes the empty string: what caption dropout and guidance use, stored with the dataset."""

    id: str = NULL_UNIT
    fingerprint: str = ""


class TextStage:
    """T5 features of one unit after another.

    `calibration` says how the codec is to be calibrated, if it needs to be.

    Raises:
        DataError: If there is no caption to calibrate the codec on.
    """

    def __init__(
        self,
        root: Path,
        source: Source | None,
        column: str,
        config: TextFeatures,
        calibration: "Calibration | None" = None,
    ) -> None:
        from pixart_data.encoders import TextEncoder

        self.root, self.source, self.column, self.config = root, source, column, config
        self.encoder = Engine(TextEncoder(config))
        self.codec, self.codec_facts = self._calibrated(calibration or Calibration(CALIBRATION, ()))

    def __call__(self, unit: Unit | CaptionFile | NullCaption, report: Report) -> Record:
        """Write the unit's shard and index part and return its record."""
        with self._writer(unit) as writer:
            if isinstance(unit, NullCaption):
                return self._null(writer)
            measure = self._write(writer, unit, report)
            return self._record(writer, writer.finish(TEXT_INDEX), measure)

    def retry(self, unit: Unit | CaptionFile, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Encode the captions again that were rejected for one of `reasons`, into a shard beside the unit's other."""
        with self._writer(unit) as writer:
            measure = self._write(writer, unit, report, rejected_keys(read_part(self.root, record), reasons))
            before = record.facts.get("measured")
            return self._record(writer, writer.finish(TEXT_INDEX, record), measure, [before] if before else [])

    def _writer(self, unit: Unit | CaptionFile | NullCaption) -> FeatureWriter:
        return FeatureWriter(self.root, unit.id, self.codec.tensors)

    def _record(
        self, writer: FeatureWriter, files: list[PublishedFile], measure: "Measure", before: Sequence[Any] = ()
    ) -> Record:
        from pixart_data.codecs import merge

        facts = {**self.encoder.model.facts, "codec": self.codec_facts}
        if self.codec.name == LOSSY_CODEC:
            facts["measured"] = merge([*before, measure.facts()])
        return writer.record(files, facts)

    def _calibrated(self, calibration: "Calibration") -> tuple["Codec", dict[str, Any]]:
        """Return the codec of the set, which the first worker to come here calibrates."""
        import safetensors.torch

        from pixart_data import codecs

        name, width = self.config.codec, self.encoder.model.facts["width"]
        facts: dict[str, Any] = {"name": name}
        if name == PLAIN_CODEC:
            return codecs.from_manifest(facts, width, {}), facts
        path = self.root / calibration.path
        if not exists(path):
            captions = list(itertools.islice(self._sample(calibration.units), _CALIBRATION_CAPTIONS))
            if not captions:
                raise DataError(
                    f"{self.root}: no caption in the first {len(calibration.units)} shards to calibrate codec {name} "
                    f"on; set text.codec = '{PLAIN_CODEC}'"
                )
            finite = [features for features in self.encoder.model.encode(captions) if features.isfinite().all()]
            if not finite:
                raise DataError(f"{self.root}: {_NOT_FINITE}, for all of the first {len(captions)} captions")
            tensors = codecs.calibrate(name, finite).calibration()
            write_new(path, safetensors.torch.save(tensors))
        data = read_bytes(path)  # another worker's, perhaps
        codec = codecs.from_manifest(facts, width, safetensors.torch.load(data))
        if name == LOSSY_CODEC:
            facts["group"] = width // codec.shapes(1, 0)[1][1]
        facts["calibration"] = {"path": calibration.path, "sha256": hashlib.sha256(data).hexdigest()}
        return codec, facts

    def _sample(self, units: Sequence[Any]) -> Iterator[str]:
        for unit in units:
            for row in self._captions(unit):
                if row.error is None and row.caption is not None:
                    yield row.caption

    def _write(
        self, writer: FeatureWriter, unit: Unit | CaptionFile, report: Report, keys: Set[str] | None = None
    ) -> "Measure":
        from pixart_data.codecs import Measure

        encoding = _Encoding(writer, Measure(), {})
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
                self._encode(held, encoding)
            report(count, num_rejected)
        self._encode(held, encoding)
        return encoding.measure

    def _captions(self, unit: Unit | CaptionFile) -> Iterator[CaptionRow]:
        if isinstance(unit, CaptionFile):
            yield from read_captions(unit, self.column, need_key=True)
        elif self.source is not None:
            for sample in read_samples(unit, self.source, with_images=False):
                missing = (Reason.NO_CAPTION, "the source has no caption for it") if not sample.caption else (None, "")
                error, detail = (sample.error, sample.detail) if sample.error else missing
                yield CaptionRow(sample.key, sample.caption, error, detail)

    def _encode(self, held: list[CaptionRow], encoding: "_Encoding") -> None:
        """Encode the captions that the unit has not had yet; rows with equal captions share a member."""
        captions = [clean(row.caption or "", self.config.cleaning) for row in held]
        fresh = [caption for caption in dict.fromkeys(captions) if caption not in encoding.done]
        if fresh:
            batch = self.encoder({"caption": fresh})
            names = ("t5", "truncated", "finite")
            fresh_of = {c: {name: batch[name][i] for name in names} for i, c in enumerate(fresh)}
        for row, caption in zip(held, captions, strict=True):
            if caption not in encoding.done:
                encoding.done[caption] = self._add(row.key, caption, fresh_of[caption], encoding)
            elif encoding.done[caption]:
                encoding.writer.share(encoding.done[caption], row.key)
            if not encoding.done[caption]:
                encoding.writer.reject(row.key, Reason.NONFINITE_FEATURES, _NOT_FINITE)
        held.clear()

    def _add(self, key: str, caption: str, encoded: dict[str, Any], encoding: "_Encoding") -> dict[str, Any]:
        """Write a caption and return its row, which is empty if the features cannot be stored."""
        if not encoded["finite"]:
            return {}
        values = self._stored(encoded["t5"], encoding.measure)
        fields = {"caption": caption, "truncated": encoded["truncated"], "num_tokens": len(encoded["t5"])}
        return encoding.writer.add(TEXT_SHARDS, values, {"key": key, **fields})

    def _stored(self, bits: npt.NDArray[np.uint16], measure: "Measure | None" = None) -> list[npt.NDArray[Any]]:
        """Return what the codec stores of features (n, D), given as bits of bf16."""
        import torch

        if self.codec.name == PLAIN_CODEC:
            return [bits]
        features = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        features = features.to(self.encoder.model.placement.device)  # (n, D)
        values = self.codec.encode(features)
        if self.codec.name == LOSSY_CODEC and measure is not None:
            measure.add(features, self.codec.decode_arrays(values).to(features.device))
        return values

    def _null(self, writer: FeatureWriter) -> Record:
        batch = self.encoder({"caption": [""]})
        if not batch["finite"][0]:
            raise DataError(f"{self.root}: the empty caption: {_NOT_FINITE}")
        bits = batch["t5"][0]
        writer.add(TEXT_SHARDS, self._stored(bits), {"key": NULL_UNIT, "num_tokens": len(bits)})
        [file] = writer.finish(schema=None)
        place = {name: writer.rows[0][name] for name in ("offset_bytes", "size_bytes", "crc32", "num_tokens")}
        facts = {**self.encoder.model.facts, "codec": self.codec_facts, "null": {"path": file.path, **place}}
        return Record(writer.unit, "", {}, 0, 0, {}, [file], facts=facts)


@dataclass(frozen=True)
class Calibration:
    """Where a text set keeps what its codec was calibrated to, and the units whose first captions that is done on."""

    path: str
    units: Sequence[Any]


@dataclass(frozen=True)
class _Encoding:
    """What a unit's captions are written to, and the rows of those that were, empty for what cannot be stored."""

    writer: FeatureWriter
    measure: "Measure"
    done: dict[str, dict[str, Any]]
