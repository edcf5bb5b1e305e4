"""What a finished `filter` kept: its manifest, the lists of keys, and the units of a source reduced to them.

The manifest names, for each unit of the source, a table of the keys that were kept. A unit that is read through it has
a fingerprint that changes with those keys, so that later stages redo the units whose keys have changed and no others.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pixart_data.commits import COMMITS, MANIFEST, PublishedFile, read_table
from pixart_data.errors import ConfigError, DataError
from pixart_data.storage import location, read_bytes, write_atomic
from pixart_data.units import Sample, Unit

FORMAT = "pixart-filter"
FORMAT_VERSION = 1
_SHOWN = 3


@dataclass(frozen=True)
class KeptUnit(Unit):
    """A unit of which only the samples that a filter kept are read.

    Attributes:
        kept: Path of the table of their keys.
        num_kept: How many they are.
    """

    kept: str = ""
    num_kept: int = 0


@dataclass(frozen=True)
class Part:
    """A unit in the manifest, with its account and the table of the keys that were kept.

    Attributes:
        fingerprint: Of the unit when it was measured.
        keys_sha256: Of the keys that were kept: unlike the table's, the same whatever version of Arrow wrote it.
    """

    unit: str
    fingerprint: str
    rows_in: int
    rows_out: int
    keys_sha256: str
    file: PublishedFile


@dataclass(frozen=True)
class Selection:
    """The manifest: the filters, the account of all rows, the units, and the table of rejected rows."""

    filters: dict[str, Any]
    rows_in: int
    rows_out: int
    rejected: dict[str, int]
    parts: list[Part]
    rejected_file: PublishedFile


def seal_selection(root: Path, selection: Selection) -> None:
    """Write the manifest of a finished filter.

    Raises:
        DataError: If a row is neither kept nor rejected.
    """
    sums = (sum(part.rows_in for part in selection.parts), sum(part.rows_out for part in selection.parts))
    lost = selection.rows_in - selection.rows_out - sum(selection.rejected.values())
    if lost or sums != (selection.rows_in, selection.rows_out):
        raise DataError(f"{root}: {lost} of {selection.rows_in} rows unaccounted for; please report this")
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(selection)}
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1).encode())


def is_selection(root: Path) -> bool:
    """Tell the output of a finished filter from others."""
    try:
        return f'"{FORMAT}"'.encode() in read_bytes(root / MANIFEST)
    except FileNotFoundError:
        return False


def read_selection(root: Path) -> Selection:
    """Return what a filter kept.

    Raises:
        ConfigError: If there is none, or it is not finished.
        DataError: If the manifest is damaged.
    """
    path = root / MANIFEST
    try:
        content = json.loads(read_bytes(path))
    except FileNotFoundError:
        what = "one that is not finished" if (root / COMMITS).is_dir() else "none"
        raise ConfigError(
            f"{root}: expected the output of a finished filter, found {what}; run `pixart filter` with this output "
            "first, to its end"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run `pixart filter` again") from error
    found = (content.pop("format", None), content.pop("version", None)) if isinstance(content, dict) else (None, None)
    if found != (FORMAT, FORMAT_VERSION):
        raise ConfigError(
            f"{path}: expected {FORMAT} version {FORMAT_VERSION}, found {found[0]} version {found[1]}; name the output "
            "of `pixart filter`"
        )
    try:
        parts = [Part(**{**part, "file": PublishedFile(**part["file"])}) for part in content["parts"]]
        return Selection(**{**content, "parts": parts, "rejected_file": PublishedFile(**content["rejected_file"])})
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); run `pixart filter` again") from error


def select(units: Sequence[Unit], kept: str) -> list[Unit]:
    """Reduce the units of a source to the samples that a filter kept.

    Args:
        kept: The filter's output directory, as `source.kept` has it.

    Raises:
        ConfigError: If there is no finished filter, or it has not seen these units as they are now.
        DataError: If its manifest is damaged.
    """
    root = location(kept)
    parts = {part.unit: part for part in read_selection(root).parts}
    unseen = [unit.id for unit in units if unit.id not in parts]
    changed = [unit.id for unit in units if unit.id in parts and parts[unit.id].fingerprint != unit.fingerprint]
    for names, what in ((unseen, "has not seen"), (changed, "saw another content of")):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
            raise ConfigError(
                f"source.kept: the filter in {kept} {what} {len(names)} of {len(units)} shards: {shown}; run "
                "`pixart filter` with this [source] and that output, then this again"
            )
    return [_kept_unit(unit, parts[unit.id], root) for unit in units]


def _kept_unit(unit: Unit, part: Part, root: Path) -> KeptUnit:
    same = {field.name: getattr(unit, field.name) for field in fields(unit)}
    made = KeptUnit(**same, kept=str(root / part.file.path), num_kept=part.rows_out)
    return replace(made, fingerprint=f"{unit.fingerprint}+{part.keys_sha256}")


def kept_samples(samples: Iterator[Sample], unit: KeptUnit) -> Iterator[Sample]:
    """Yield those samples of a unit that the filter kept.

    Raises:
        DataError: If there are others now, in the unit or in the filter's output.
    """
    if not unit.num_kept:
        return
    count = 0
    keys = kept_keys(unit)
    for sample in samples:
        if sample.key in keys:
            count += 1
            yield sample
    if count != unit.num_kept:
        raise DataError(
            f"{unit.path}: expected {unit.num_kept} samples that a filter kept, found {count}; the source changed: run "
            "`pixart filter` again"
        )


def kept_keys(unit: KeptUnit) -> frozenset[str]:
    """Return the keys of the samples of a unit that the filter kept.

    Raises:
        DataError: If their table is missing or damaged.
    """
    try:
        return frozenset(read_table(location(unit.kept), columns=["key"])["key"].to_pylist())
    except FileNotFoundError:
        what = "missing; the filter ran again meanwhile: run this job again"
        raise DataError(f"{unit.kept}: {what}") from None
    except pa.ArrowException as error:
        raise DataError(f"{unit.kept}: cannot be read as Parquet: {error}; run `pixart filter` again") from error
