"""What the stages of `extract` write a unit's features with: open shards and the rows of an index part."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixart_data.commits import PublishedFile, Record, publish, publish_table, read_table
from pixart_data.records import Reason
from pixart_data.shards import FLIPPED_MEMBER, INDEX_PARTS, ShardWriter
from pixart_data.storage import discard, staging_path


class FeatureWriter:
    """The open shards of one unit, one for each folder, and the rows of its index part.

    To be used in a `with`: shards that were not published do not outlast it.
    """

    def __init__(self, root: Path, unit: str, tensors: Sequence[tuple[str, str]]) -> None:
        self.root, self.unit, self.tensors = root, unit, tensors
        self.rows: list[dict[str, Any]] = []
        self._writers: dict[str, ShardWriter] = {}

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.discard()

    def add(
        self, folder: str, values: Sequence[npt.NDArray[Any]], row: dict[str, Any], flipped: Any = None
    ) -> dict[str, Any]:
        """Write a sample's tensors to the unit's shard in `folder` and its row to the index.

        Args:
            flipped: The tensor of the mirrored image, if it is to be stored too.

        Returns:
            The row as it stands in the index part, but for the name of the shard, which `finish` fills in.
        """
        writer = self._writer(folder)
        added = {**row, "shard": folder, **asdict(writer.add(row["key"], *values))}
        if flipped is not None:
            place = writer.add(row["key"], flipped, extension=FLIPPED_MEMBER)
            added |= {"flipped_offset_bytes": place.offset_bytes, "flipped_crc32": place.crc32}
        self.rows.append(added)
        return added

    def share(self, row: dict[str, Any], key: str) -> None:
        """Write a row for another sample with the tensors of a row that `add` returned."""
        self.rows.append({**row, "key": key})

    def _writer(self, folder: str) -> ShardWriter:
        writer = self._writers.get(folder)
        if writer is None:
            staged = staging_path(self.root / folder, f"{self.unit}.tar")
            try:
                writer = self._writers[folder] = ShardWriter(staged, self.tensors)
            except BaseException:
                discard(staged)
                raise
        return writer

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
