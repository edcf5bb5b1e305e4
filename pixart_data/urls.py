"""Lists of URLs with captions, cut into units: Parquet and JSONL."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixart_data.captions import CaptionFile, count_captions, read_rows, require_columns, slices
from pixart_data.commits import Record
from pixart_data.errors import ConfigError
from pixart_data.records import Reason
from pixart_data.sections import UrlLists
from pixart_data.units import encode_name, storable

_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class UrlUnit:
    """A unit of work: a list, or a slice of a large one.

    Attributes:
        number: Of the unit in the whole job; every key begins with it.
    """

    number: int
    file: CaptionFile

    @property
    def id(self) -> str:
        """The number, as img2dataset names its tars."""
        return f"{self.number:05d}"

    @property
    def fingerprint(self) -> str:
        """Changes when the list does, and when it is cut differently."""
        return self.file.fingerprint


@dataclass(frozen=True)
class UrlRow:
    """A row of a list; `error` says why its URL cannot even be asked for."""

    key: str
    url: str | None
    caption: str | None
    error: Reason | None = None
    detail: str = ""


def find_urls(config: UrlLists) -> list[UrlUnit]:
    """Return the units behind `urls.paths`, numbered in the order of the paths.

    Raises:
        ConfigError: If a path matches nothing or is of no known kind, or a column is missing.
        DataError: If a list cannot be read.
    """
    paths = list(dict.fromkeys(path for pattern in config.paths for path in _expand(pattern)))
    files = [file for path in paths for file in slices(encode_name(path.stem), path, config.rows_per_unit)]
    require_columns(files, "urls.url_column", config.url_column, need_key=False)
    if config.caption_column:
        remedy = 'urls.caption_column, to "" if there are no captions'
        require_columns(files, remedy, config.caption_column, need_key=False)
    return [UrlUnit(number, file) for number, file in enumerate(files)]


def require_order(units: Sequence[UrlUnit], records: Mapping[str, Record]) -> None:
    """Refuse lists that are numbered otherwise than when they were fetched: all behind the first would be fetched anew.

    A list that changed in its place is none of these. Of two lists of one content either may have a number.

    Args:
        records: Of the output, by unit; `settings["shard"]` is the fingerprint of what was fetched.

    Raises:
        ConfigError: If a list that is committed has another number now.
    """
    now = {unit.id: unit.fingerprint for unit in units}
    before = {unit: record.settings.get("shard") for unit, record in records.items()}
    left = {shard: unit for unit, shard in before.items() if now.get(unit) != shard}
    moved = [unit for unit in units if unit.fingerprint in left and before.get(unit.id) != unit.fingerprint]
    if moved:
        first, num_others = moved[0], len({unit.file.path for unit in moved}) - 1
        more = f", and {num_others} more with it" if num_others else ""
        raise ConfigError(
            "urls.paths: expected the lists of the earlier runs in their old order and new ones at the end, found "
            f"{first.file.path} renumbered from {left[first.fingerprint]} to {first.id}{more}, to be fetched anew; "
            "name the lists in the old order in urls.paths, with the old urls.rows_per_unit, or choose another output"
        )


def read_urls(unit: UrlUnit, config: UrlLists) -> Iterator[UrlRow]:
    """Yield the rows of a unit, each with a key that no other row of the job has.

    Raises:
        DataError: If the list cannot be read.
    """
    digits = max(4, len(str(config.rows_per_unit - 1)))
    columns = [name for name in dict.fromkeys((config.url_column, config.caption_column)) if name]
    for number, row in read_rows(unit.file, columns):
        key = f"{unit.id}{number - unit.file.start:0{digits}d}"
        if isinstance(row, str):
            yield UrlRow(key, None, None, Reason.BAD_ROW, storable(row))
            continue
        url, caption = row.get(config.url_column), row.get(config.caption_column)
        text = storable(caption) if isinstance(caption, str) else None
        if not isinstance(url, str):
            detail = f"{config.url_column}: expected a URL, found {url!r:.80}"
            yield UrlRow(key, None, text, Reason.BAD_URL, storable(detail))
        elif caption is not None and text is None:
            detail = f"{config.caption_column}: expected a text, found {caption!r:.80}"
            yield UrlRow(key, storable(url), None, Reason.BAD_ROW, storable(detail))
        else:
            yield UrlRow(key, storable(url), text)


def count_urls(unit: UrlUnit) -> int:
    """Return the number of rows of a unit, for JSONL blank lines included."""
    return count_captions(unit.file)


def _expand(pattern: str) -> list[Path]:
    if "://" in pattern:
        raise ConfigError(f"urls.paths: expected a local path, got {pattern}; mount or download the list first")
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ConfigError(f"urls.paths: nothing matches {pattern}; check the path, and that the disk is mounted")
    return [path for name in found for path in _lists(Path(name))]


def _lists(path: Path) -> list[Path]:
    if path.is_dir():
        lists = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and not p.name.startswith("."))
        if not lists:
            raise ConfigError(f"urls.paths: {path} holds no .parquet or .jsonl file; name the folder of the lists")
        return lists
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"urls.paths: expected .parquet, .jsonl or a folder of them, found {path}; convert it first")
    return [path]
